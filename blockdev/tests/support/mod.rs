//! A device, a reactor and memory on this thread, driven to completion.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use flexblk_blockdev::{
    BdevConfig, BlockDevice, Channel, DirectMode, FileConfig, Io, IoBuffers, IoDone, IoError, IoOp,
    Submitted, Tokens,
};
use flexblk_reactor::{Config, HugePages, Reactor, SharedMemory, Span, Wait};

pub type Outcome = Result<(), IoError>;

pub const TOKENS: Tokens = Tokens::new(5, 3);

/// The caller's memory: `SLOTS` areas of `AREA` bytes.
pub const AREA: u32 = 1 << 20;
pub const SLOTS: u64 = 16;

pub struct Rig {
    // order of drop: the channel before the reactor, the memory last
    pub channel: Box<dyn Channel>,
    pub reactor: Reactor,
    pub memory: Arc<SharedMemory>,
    pub ended: HashMap<u64, Outcome>,
    pub block_size: u32,
    next_tag: u64,
}

impl Rig {
    pub fn new(device: &dyn BlockDevice) -> Self {
        let mut reactor = Reactor::new(&Config::default()).expect("a reactor");
        let channel = device.open(&mut reactor, TOKENS).expect("a channel");
        let memory =
            SharedMemory::create("rig", u64::from(AREA) * SLOTS, HugePages::No).expect("memory");
        let block_size = device.info().block_size;
        Self {
            channel,
            reactor,
            memory,
            ended: HashMap::new(),
            block_size,
            next_tag: 1,
        }
    }

    /// Memory of area `slot`, from `offset`.
    pub fn span(&self, slot: u64, offset: u32, len: u32) -> Span {
        assert!(offset + len <= AREA);
        self.memory
            .span(slot * u64::from(AREA) + u64::from(offset), len)
            .expect("inside")
    }

    /// Starts an I/O; its end shows up in `ended` under the tag returned.
    pub fn start(&mut self, op: IoOp, lba: u64, blocks: u32, data: IoBuffers) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        if let Submitted::Done(result) = self.channel.submit(
            &mut self.reactor,
            Io {
                tag,
                op,
                lba,
                blocks,
                data,
            },
        ) {
            self.end(IoDone { tag, result });
        }
        tag
    }

    pub fn turn(&mut self) {
        let (mut completions, mut done) = (Vec::new(), Vec::new());
        self.reactor
            .turn(
                Wait::Until(Instant::now() + Duration::from_millis(50)),
                &mut completions,
            )
            .expect("a turn");
        for completion in completions {
            assert_eq!(
                (
                    completion.token.owner(),
                    Tokens::channel_of(completion.token)
                ),
                (5, 3)
            );
            self.channel
                .complete(&mut self.reactor, &completion, &mut done);
        }
        for done in done {
            self.end(done);
        }
    }

    fn end(&mut self, done: IoDone) {
        assert!(
            self.ended.insert(done.tag, done.result).is_none(),
            "tag {} ended twice",
            done.tag
        );
    }

    pub fn wait(&mut self, tag: u64) -> Outcome {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(result) = self.ended.remove(&tag) {
                return result;
            }
            assert!(Instant::now() < deadline, "I/O {tag} does not end");
            self.turn();
        }
    }

    pub fn run(&mut self, op: IoOp, lba: u64, blocks: u32, data: IoBuffers) -> Outcome {
        let tag = self.start(op, lba, blocks, data);
        self.wait(tag)
    }

    pub fn write(&mut self, lba: u64, bytes: &[u8]) -> Outcome {
        self.write_with(lba, bytes, false)
    }

    pub fn write_with(&mut self, lba: u64, bytes: &[u8], fua: bool) -> Outcome {
        let span = self.span(0, 0, bytes.len() as u32);
        span.copy_from_slice(bytes);
        self.run(
            IoOp::Write { fua },
            lba,
            bytes.len() as u32 / self.block_size,
            IoBuffers::one(span),
        )
    }

    pub fn read(&mut self, lba: u64, blocks: u32) -> Result<Vec<u8>, IoError> {
        let span = self.span(1, 0, blocks * self.block_size);
        span.fill(0xee);
        self.run(IoOp::Read, lba, blocks, IoBuffers::one(span))?;
        Ok(bytes_of(&span))
    }

    pub fn compare(&mut self, lba: u64, bytes: &[u8]) -> Outcome {
        let span = self.span(2, 0, bytes.len() as u32);
        span.copy_from_slice(bytes);
        self.run(
            IoOp::Compare,
            lba,
            bytes.len() as u32 / self.block_size,
            IoBuffers::one(span),
        )
    }

    pub fn plain(&mut self, op: IoOp, lba: u64, blocks: u32) -> Outcome {
        self.run(op, lba, blocks, IoBuffers::none())
    }

    pub fn flush(&mut self) -> Outcome {
        self.plain(IoOp::Flush, 0, 0)
    }
}

pub fn bytes_of(span: &Span) -> Vec<u8> {
    let mut bytes = vec![0; span.len() as usize];
    span.copy_to_slice(&mut bytes);
    bytes
}

/// An image on a real file system, removed on drop.
pub struct Image {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
}

impl Image {
    pub fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = dir.path().join("disk.img");
        File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .expect("an image");
        Self { _dir: dir, path }
    }

    pub fn config(&self) -> FileConfig {
        file_config(&self.path)
    }
}

pub fn file_config(path: &Path) -> FileConfig {
    let BdevConfig::File(config) = format!("file:{}", path.display()).parse().expect("a spec")
    else {
        unreachable!()
    };
    config
}

pub fn counter(device: &dyn BlockDevice, name: &str) -> u64 {
    device
        .counters()
        .into_iter()
        .find(|(key, _)| *key == name)
        .expect("a counter")
        .1
}

/// Whether the file system of the test images can do direct I/O (overlayfs and tmpfs may not).
pub fn direct_works() -> bool {
    let image = Image::new(1 << 20);
    let works = flexblk_blockdev::FileDevice::new(&FileConfig {
        direct: DirectMode::On,
        ..image.config()
    })
    .is_ok();
    if !works {
        eprintln!("skipped: no direct I/O on {}", env!("CARGO_TARGET_TMPDIR"));
    }
    works
}

/// A loop device; detached on drop.
pub struct Loop {
    pub path: PathBuf,
    image: Option<Image>,
}

impl Loop {
    /// Over a new image; `None` where it is not allowed, which is said on stderr.
    pub fn new(bytes: u64, options: &[&str]) -> Option<Self> {
        let image = Image::new(bytes);
        let mut device = Self::over(&image.path, options)?;
        device.image = Some(image);
        Some(device)
    }

    /// Over an image that is there.
    pub fn over(image: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .args(options)
            .arg(image)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                Some(Self { path, image: None })
            }
            other => {
                eprintln!("skipped: no loop device ({other:?})");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// A file system with room for 1 MiB; unmounted on drop.
pub struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    /// `None` where it is not allowed, which is said on stderr.
    pub fn new() -> Option<Self> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1M", "none"])
            .arg(dir.path())
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: cannot mount");
        None
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // lazily: the kernel may still be letting go of a loop device's file
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
