//! The servers and exporters that are compared, all at once: whichever is not measured sleeps.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::fio::{Fio, Measured};
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::process::{Process, eventually, find_program, is_root, run as run_program};
use flexblk_tests::target::{Target, TargetOptions};

use super::{Cell, Image, LIMIT, Server, Way};
use crate::apt::Need;

pub(super) const NEEDS: [Need; 5] = [
    Need {
        program: "qemu-nbd",
        package: "qemu-utils",
    },
    Need {
        program: "qemu-storage-daemon",
        package: "qemu-utils",
    },
    Need {
        program: "nbdkit",
        package: "nbdkit",
    },
    Need {
        program: "nbdfuse",
        package: "libnbd-bin",
    },
    Need {
        program: "losetup",
        package: "mount",
    },
];

/// How long a server may take until it serves.
const START: Duration = Duration::from_secs(20);
pub(super) const QEMU_NBD: [&str; 6] = ["qemu-nbd", "-f", "raw", "-t", "-e", "16"];
pub(super) const NBDKIT: [&str; 2] = ["nbdkit", "-f"];
const QEMU_HERE: Server = peer("QEMU", Image::Here);
pub(super) const QEMU_THERE: Server = peer("QEMU", Image::There);
const NBDKIT_HERE: Server = peer("nbdkit", Image::Here);
pub(super) const NBDKIT_THERE: Server = peer("nbdkit", Image::There);

const fn peer(name: &'static str, image: Image) -> Server {
    Server::Peer { name, image }
}

/// Where everything runs.
pub(super) struct Place<'a> {
    pub(super) binaries: &'a Binaries,
    pub(super) directory: &'a Path,
    /// The core of the machine that has the image.
    pub(super) far: usize,
    /// The core of the host.
    pub(super) near: usize,
    pub(super) mib: u32,
}

impl Place<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn command(&self, core: usize, program: &Path) -> Result<Command> {
        let mut command = Command::new(find_program("taskset")?);
        command.args(["-c", &core.to_string()]).arg(program);
        Ok(command)
    }
}

/// What fio opens.
enum Opening {
    Namespace { udp_port: u16 },
    Uri(String),
    Device(PathBuf),
}

/// One way to one image.
pub(super) struct Export {
    pub(super) way: Way,
    pub(super) server: Server,
    opening: Opening,
}

impl Export {
    fn job(&self, place: &Place<'_>, name: &str) -> Fio {
        let directory = place.directory;
        let fio = match &self.opening {
            Opening::Namespace { udp_port } => {
                Fio::at_port(place.binaries, *udp_port, 1, name, directory)
            }
            Opening::Uri(uri) => Fio::with_engine("nbd", name, directory).option("uri", uri),
            Opening::Device(path) => Fio::with_engine("io_uring", name, directory)
                .option("filename", path.display())
                .option("direct", 1),
        };
        fio.option("size", format!("{}M", place.mib))
            .on_core(Some(place.near))
    }

    /// Every page of the image exists before anything is measured.
    pub(super) fn fill(&self, place: &Place<'_>) -> Result<()> {
        let job = self.job(place, "fill").option("rw", "write");
        let job = job.option("bs", "128k").option("iodepth", 16);
        job.success(LIMIT).map(drop)
    }

    pub(super) fn measure(&self, place: &Place<'_>, cell: Cell, seconds: u32) -> Result<Measured> {
        let result = self
            .job(place, "export")
            .option("rw", cell.rw)
            .option("bs", cell.size)
            .option("iodepth", cell.depth)
            .option("runtime", seconds)
            .flag("time_based")
            .success(LIMIT)?;
        Ok(result.measured(cell.rw.trim_start_matches("rand")))
    }
}

/// Everything that runs while it is measured.
pub(super) struct Servers {
    pub(super) exports: Vec<Export>,
    // In the order in which they end: who uses something before what it uses.
    loops: Vec<Loop>,
    attached: Option<Attached>,
    mounts: Vec<Mount>,
    processes: Vec<Process>,
    target: Target,
    image: MemoryFile,
}

impl Servers {
    pub(super) fn start(place: &Place<'_>, skipped: &mut Vec<String>) -> Result<Servers> {
        let options = TargetOptions {
            core: Some(place.far),
            ..TargetOptions::with_devices(&[&format!("ram:{}M,block_size=4096", place.mib)])
        };
        let target = Target::start(place.binaries, place.directory, options)?;
        let udp_port = target.udp_port();
        let mut servers = Servers {
            exports: Vec::new(),
            loops: Vec::new(),
            attached: None,
            mounts: Vec::new(),
            processes: Vec::new(),
            target,
            image: MemoryFile::new(place.mib)?,
        };
        servers.add(Way::Library, Server::Ours, Opening::Namespace { udp_port });
        let far = servers.far_servers(place)?;
        servers.nbd_exports(place, &far)?;
        match why_no_loop() {
            Some(reason) => skipped.push(format!("{}: {reason}", Way::FuseLoop)),
            None => servers.fuse_exports(place, &far)?,
        }
        Ok(servers)
    }

    fn add(&mut self, way: Way, server: Server, opening: Opening) {
        self.exports.push(Export {
            way,
            server,
            opening,
        });
    }

    fn spawn(&mut self, place: &Place<'_>, core: usize, name: &str, words: &[&str]) -> Result<()> {
        let (program, words) = words.split_first().context("a program")?;
        let mut command = place.command(core, &find_program(program)?)?;
        let process = Process::spawn(command.args(words), name, place.directory)?;
        self.processes.push(process);
        Ok(())
    }

    /// Until what the process that was started last makes is there.
    fn wait(&mut self, is_there: impl Fn() -> bool) -> Result<()> {
        let process = self.processes.last_mut().context("a process")?;
        let mut ended = None;
        eventually("the server serves", START, || {
            ended = process.status().ok().flatten();
            ended.is_some() || is_there()
        })
        .with_context(|| process.tail())?;
        match ended {
            Some(status) => bail!("a server ended with {status}: {}", process.tail()),
            None => Ok(()),
        }
    }

    /// The peers' servers on the machine that has the image.
    fn far_servers(&mut self, place: &Place<'_>) -> Result<FarServers> {
        let image = self.image.text();
        let qemu_port = free_tcp_port()?.to_string();
        let words = ["-b", "127.0.0.1", "-p", &qemu_port, &image];
        self.spawn(
            place,
            place.far,
            "qemu-far",
            &[&QEMU_NBD[..], &words].concat(),
        )?;
        let nbdkit_port = free_tcp_port()?.to_string();
        let size = format!("{}M", place.mib);
        let words = ["-i", "127.0.0.1", "-p", &nbdkit_port, "memory", &size];
        let words = [&NBDKIT[..], &words, &["allocator=malloc"]].concat();
        self.spawn(place, place.far, "nbdkit-far", &words)?;
        let listens =
            |port: &str| std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok();
        self.wait(|| listens(&qemu_port) && listens(&nbdkit_port))?;
        Ok(FarServers {
            qemu_uri: format!("nbd://127.0.0.1:{qemu_port}"),
            qemu_port,
            nbdkit_uri: format!("nbd://127.0.0.1:{nbdkit_port}"),
        })
    }

    fn nbd_exports(&mut self, place: &Place<'_>, far: &FarServers) -> Result<()> {
        let flexblk = place.binaries.flexblk.display().to_string();
        let address = self.target.address();
        let address = address.iter().map(String::as_str);
        let ours: Vec<&str> = [flexblk.as_str(), "export", "nbd"]
            .into_iter()
            .chain(address)
            .chain(["--socket"])
            .collect();
        self.nbd(place, place.near, Server::Ours, &ours, &[])?;
        let qemu = [&QEMU_NBD[..], &["-k"]].concat();
        let nbdkit = [&NBDKIT[..], &["-U"]].concat();
        let uri = format!("uri={}", far.nbdkit_uri);
        self.nbd(place, place.near, QEMU_THERE, &qemu, &[&far.qemu_uri])?;
        self.nbd(place, place.near, NBDKIT_THERE, &nbdkit, &["nbd", &uri])?;
        let (image, size) = (self.image.text(), format!("{}M", place.mib));
        self.nbd(place, place.far, QEMU_HERE, &qemu, &[&image])?;
        let memory = ["memory", &size, "allocator=malloc"];
        self.nbd(place, place.far, NBDKIT_HERE, &nbdkit, &memory)
    }

    /// An export on a Unix socket, whose path goes between the words.
    fn nbd(
        &mut self,
        place: &Place<'_>,
        core: usize,
        server: Server,
        before: &[&str],
        after: &[&str],
    ) -> Result<()> {
        let socket = place.path(&format!("{}.nbd", self.exports.len()));
        let text = socket.display().to_string();
        let words = [before, &[text.as_str()], after].concat();
        self.spawn(place, core, &format!("nbd-{}", self.exports.len()), &words)?;
        self.wait(|| socket.exists())
            .with_context(|| format!("NBD of {server}"))?;
        let uri = format!("nbd+unix:///?socket={text}");
        self.add(Way::Nbd, server, Opening::Uri(uri));
        Ok(())
    }

    fn fuse_exports(&mut self, place: &Place<'_>, far: &FarServers) -> Result<()> {
        let attached = Attached::new(place, &self.target)?;
        let device = Opening::Device(attached.device.clone());
        self.attached = Some(attached);
        self.add(Way::FuseLoop, Server::Ours, device);

        let image = self.image.text();
        let there = format!(
            "driver=raw,node-name=disk,file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={}",
            far.qemu_port
        );
        let here = format!(
            "driver=raw,node-name=disk,file.driver=file,file.locking=off,file.filename={image}"
        );
        self.qemu_fuse(place, place.near, QEMU_THERE, &there)?;
        self.qemu_fuse(place, place.far, QEMU_HERE, &here)?;

        let file = place.path("nbdfuse");
        let text = self.mount_file(&file)?;
        let words = ["nbdfuse", &text, &far.nbdkit_uri];
        self.spawn(place, place.near, "nbdfuse", &words)?;
        self.looped(place, NBDKIT_THERE, &file)
    }

    fn qemu_fuse(
        &mut self,
        place: &Place<'_>,
        core: usize,
        server: Server,
        blockdev: &str,
    ) -> Result<()> {
        let name = format!("fuse-{}", self.exports.len());
        let file = place.path(&name);
        let text = self.mount_file(&file)?;
        let export = format!("type=fuse,id=export,node-name=disk,mountpoint={text},writable=on");
        let words = [
            "qemu-storage-daemon",
            "--blockdev",
            blockdev,
            "--export",
            &export,
        ];
        self.spawn(place, core, &name, &words)?;
        self.looped(place, server, &file)
    }

    /// A file for a peer to mount itself over.
    fn mount_file(&mut self, file: &Path) -> Result<String> {
        File::create(file)?;
        self.mounts.push(Mount(file.to_owned()));
        Ok(file.display().to_string())
    }

    /// A loop device on a file that a peer serves, once it does.
    fn looped(&mut self, place: &Place<'_>, server: Server, file: &Path) -> Result<()> {
        let len_bytes = u64::from(place.mib) << 20;
        self.wait(|| fs::metadata(file).is_ok_and(|file| file.len() == len_bytes))
            .with_context(|| format!("FUSE of {server}"))?;
        let made = Loop::new(file)?;
        let device = Opening::Device(made.0.clone());
        self.loops.push(made);
        self.add(Way::FuseLoop, server, device);
        Ok(())
    }
}

/// Where the peers' servers are.
struct FarServers {
    qemu_port: String,
    qemu_uri: String,
    nbdkit_uri: String,
}

fn why_no_loop() -> Option<&'static str> {
    if !is_root() {
        Some("needs root")
    } else if !Path::new("/dev/fuse").exists() {
        Some("there is no /dev/fuse")
    } else if !Path::new("/dev/loop-control").exists() {
        Some("there is no /dev/loop-control")
    } else {
        None
    }
}

/// A file in memory: what the peers that know no RAM disk serve.
struct MemoryFile(PathBuf);

impl MemoryFile {
    fn new(mib: u32) -> Result<MemoryFile> {
        let path = PathBuf::from(format!("/dev/shm/flexblk-bench-{}", std::process::id()));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let made = MemoryFile(path);
        file.set_len(u64::from(mib) << 20)?;
        Ok(made)
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        // It is memory of the machine, and nothing else can be done about it.
        let _ = fs::remove_file(&self.0);
    }
}

/// A namespace attached by `flexblk attach`.
struct Attached {
    flexblk: PathBuf,
    name: String,
    device: PathBuf,
}

impl Attached {
    fn new(place: &Place<'_>, target: &Target) -> Result<Attached> {
        let name = format!("bench-{}", std::process::id());
        let mut command = place.command(place.near, &place.binaries.flexblk)?;
        command.arg("attach").args(target.address());
        command.args(["-N", "1", "--as", &name]);
        let done = run_program(&mut command, START)?
            .success()
            .context("flexblk attach")?;
        Ok(Attached {
            flexblk: place.binaries.flexblk.clone(),
            name,
            device: done.stdout.trim().into(),
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut command = Command::new(&self.flexblk);
        command.args(["detach", "--force", &self.name]);
        if let Err(error) = run_program(&mut command, START).and_then(|done| done.success()) {
            println!("flexblk detach {}: {error:#}", self.name);
        }
    }
}

/// A loop device.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Result<Loop> {
        let mut command = Command::new(find_program("losetup")?);
        command.args(["--find", "--show", "--direct-io=on", "--sector-size=4096"]);
        let done = run_program(command.arg(file), START)?
            .success()
            .context("losetup")?;
        Ok(Loop(done.stdout.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        command.arg("--detach").arg(&self.0);
        if let Err(error) = run_program(&mut command, START).and_then(|done| done.success()) {
            println!("losetup --detach {}: {error:#}", self.0.display());
        }
    }
}

/// A file that a peer has mounted itself over, if it came so far.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        // Not mounted: then there is nothing to do.
        let _ = run_program(Command::new("umount").arg("--lazy").arg(&self.0), START);
    }
}
