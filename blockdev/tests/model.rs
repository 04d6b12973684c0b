//! Random I/O, several at a time, against an array of bytes.

mod support;

use std::{collections::HashMap, ops::Range};

use arrayvec::ArrayVec;
use flexblk_blockdev::{
    BlockDevice, DirectMode, FileConfig, FileDevice, IoBuffers, IoError, IoOp, open,
};
use proptest::prelude::*;
use support::*;

const BLOCKS: u64 = 512;

/// One random operation; numbers are folded into range where they are used.
#[derive(Clone, Debug)]
struct Step {
    kind: u8,
    lba: u64,
    blocks: u32,
    /// Fills the data.
    seed: u8,
    /// Where the memory is cut into pieces, as sizes in 64 bytes.
    cuts: Vec<u32>,
    /// Shift of the memory: misaligned for direct I/O unless 0.
    shift: u32,
    flag: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        0..20_u8,
        0..BLOCKS,
        // mostly small, sometimes longer than a bounce buffer
        prop_oneof![6 => 1..16_u32, 1 => 1..(BLOCKS as u32)],
        any::<u8>(),
        prop::collection::vec(1..64_u32, 0..6),
        prop_oneof![3 => Just(0_u32), 1 => 1..600_u32],
        any::<bool>(),
    )
        .prop_map(|(kind, lba, blocks, seed, cuts, shift, flag)| Step {
            kind,
            lba,
            blocks,
            seed,
            cuts,
            shift,
            flag,
        });
    prop::collection::vec(step, 1..60)
}

enum Expect {
    Done,
    Bytes {
        data: Box<IoBuffers>,
        bytes: Vec<u8>,
    },
    Mismatch,
}

/// What the device should hold. A discarded block of a device that does not promise zeroes is not
/// looked at until it is written again; none of the devices tested here is like that.
struct Model {
    rig: Rig,
    blocks: u64,
    bytes: Vec<u8>,
    in_flight: HashMap<u64, (Range<u64>, Expect, u64)>,
    areas: Vec<u64>,
}

impl Model {
    fn new(device: &dyn BlockDevice) -> Self {
        let size = device.info().size_bytes() as usize;
        Self {
            rig: Rig::new(device),
            blocks: device.info().block_count,
            bytes: vec![0; size],
            in_flight: HashMap::new(),
            areas: (0..SLOTS).collect(),
        }
    }

    fn drain(&mut self) {
        let in_flight = std::mem::take(&mut self.in_flight);
        for (tag, (range, expect, area)) in in_flight {
            let result = self.rig.wait(tag);
            match expect {
                Expect::Done => assert_eq!(result, Ok(()), "{range:?}"),
                Expect::Mismatch => assert_eq!(result, Err(IoError::CompareMismatch), "{range:?}"),
                Expect::Bytes { data, bytes } => {
                    assert_eq!(result, Ok(()), "{range:?}");
                    let read: Vec<u8> = data.spans.iter().flat_map(bytes_of).collect();
                    assert!(read == bytes, "wrong bytes in {range:?}");
                }
            }
            self.areas.push(area);
        }
        assert_eq!(self.rig.channel.in_flight(), 0);
        assert!(self.rig.ended.is_empty());
    }

    fn memory(&self, area: u64, len: u32, step: &Step) -> IoBuffers {
        let whole = self.rig.span(area, step.shift, len);
        let mut spans = ArrayVec::new();
        let mut at = 0;
        for cut in &step.cuts {
            // pieces of any length are allowed; those of 64 bytes need a bounce buffer for direct I/O
            let n = (cut * if step.flag { 64 } else { 512 }).min(len - at);
            if n == 0 {
                break;
            }
            spans.push(whole.sub(at, n).expect("inside"));
            at += n;
        }
        if at < len {
            spans.push(whole.sub(at, len - at).expect("inside"));
        }
        IoBuffers { spans, fixed: None }
    }

    fn step(&mut self, step: &Step) {
        let block_size = u64::from(self.rig.block_size);
        let lba = step.lba % self.blocks;
        let blocks = u64::from(step.blocks).min(self.blocks - lba);
        let range = lba * block_size..(lba + blocks) * block_size;
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        if self.areas.is_empty() || self.in_flight.values().any(|(other, ..)| overlaps(other)) {
            self.drain();
        }
        let len = (range.end - range.start) as u32;
        let held = range.start as usize..range.end as usize;
        let area = self.areas.pop().expect("an area");
        let data = self.memory(area, len, step);
        let fill = |bytes: &[u8]| {
            let mut at = 0;
            for span in &data.spans {
                at += span.copy_from_slice(&bytes[at..]);
            }
        };
        let (op, data, expect) = match step.kind {
            0..=5 => {
                let bytes: Vec<u8> = (0..len).map(|i| step.seed ^ (i / 64) as u8).collect();
                fill(&bytes);
                self.bytes[held].copy_from_slice(&bytes);
                (IoOp::Write { fua: step.flag }, data, Expect::Done)
            }
            6..=11 => {
                fill(&vec![0xa5; len as usize]);
                let bytes = self.bytes[held].to_vec();
                (
                    IoOp::Read,
                    data.clone(),
                    Expect::Bytes {
                        data: Box::new(data),
                        bytes,
                    },
                )
            }
            12 | 13 => {
                let mut bytes = self.bytes[held].to_vec();
                let differs = step.flag;
                if differs {
                    let at = usize::from(step.seed) * bytes.len() / 256;
                    bytes[at] ^= 1;
                }
                fill(&bytes);
                (
                    IoOp::Compare,
                    data,
                    if differs {
                        Expect::Mismatch
                    } else {
                        Expect::Done
                    },
                )
            }
            14 | 15 => {
                self.bytes[held].fill(0);
                (
                    IoOp::WriteZeroes {
                        unmap: step.seed.is_multiple_of(2),
                        fua: step.flag,
                    },
                    IoBuffers::none(),
                    Expect::Done,
                )
            }
            16 | 17 => {
                self.bytes[held].fill(0);
                (IoOp::Discard, IoBuffers::none(), Expect::Done)
            }
            18 => (IoOp::Verify, IoBuffers::none(), Expect::Done),
            _ => (IoOp::Flush, IoBuffers::none(), Expect::Done),
        };
        let tag = self.rig.start(op, lba, blocks as u32, data);
        self.in_flight.insert(tag, (range, expect, area));
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step);
        }
        self.drain();
        // everything once more, in one long read
        let all = self.rig.read(0, self.blocks as u32).expect("a read of all");
        assert!(
            all == self.bytes,
            "the device differs from the model at the end"
        );
    }
}

fn cases(n: u32) -> ProptestConfig {
    ProptestConfig {
        cases: n,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn file(image: &Image, direct: DirectMode, block_size: u32) -> FileDevice {
    FileDevice::new(&FileConfig {
        direct,
        block_size: Some(block_size),
        ..image.config()
    })
    .expect("a device")
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn ram(steps in steps()) {
        let size = BLOCKS * 512;
        let device = open(&format!("ram:{size}").parse().unwrap()).unwrap();
        Model::new(&*device).run(&steps);
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn file_buffered(steps in steps()) {
        let image = Image::new(BLOCKS * 512);
        let device = file(&image, DirectMode::Off, 512);
        Model::new(&device).run(&steps);
    }

    #[test]
    fn file_direct(steps in steps()) {
        if !direct_works() { return Ok(()); }
        let image = Image::new(BLOCKS * 512);
        let device = file(&image, DirectMode::On, 512);
        Model::new(&device).run(&steps);
    }
}

#[test]
fn loop_device() {
    for block_size in [512_u32, 4096] {
        let size = u64::from(AREA / 4);
        let Some(device) = Loop::new(size, &["--sector-size", &block_size.to_string()]) else {
            return;
        };
        let config = FileConfig {
            direct: DirectMode::On,
            ..file_config(&device.path)
        };
        let opened = FileDevice::new(&config).expect("a device");
        let info = opened.info();
        assert_eq!(&*info.kind, "block device (direct)");
        assert_eq!((info.block_size, info.size_bytes()), (block_size, size));
        let mut runner = proptest::test_runner::TestRunner::new(cases(12));
        runner
            .run(&steps(), |steps| {
                let mut model = Model::new(&opened);
                let clear = IoOp::WriteZeroes {
                    unmap: false,
                    fua: false,
                };
                prop_assert_eq!(model.rig.plain(clear, 0, info.block_count as u32), Ok(()));
                model.run(&steps);
                Ok(())
            })
            .expect("the model holds");
    }
}
