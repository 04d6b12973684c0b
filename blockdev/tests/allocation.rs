//! Nothing is allocated per I/O.
#![allow(unsafe_code)]

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::Arc,
};

use flexblk_blockdev::{
    BdevConfig, BlockDevice, DelayConfig, DelayDevice, DirectMode, FaultConfig, FaultDevice,
    FileConfig, Io, IoBuffers, IoOp, Submitted, open,
};
use flexblk_reactor::{Completion, Token, Wait};
use support::*;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Every operation `rounds` times at depth 8, with aligned, unaligned and divided memory.
fn drive(
    rig: &mut Rig,
    completions: &mut Vec<Completion>,
    done: &mut Vec<flexblk_blockdev::IoDone>,
    rounds: u32,
) {
    const OPS: [IoOp; 8] = [
        IoOp::Read,
        IoOp::Write { fua: false },
        IoOp::Write { fua: true },
        IoOp::Flush,
        IoOp::WriteZeroes {
            unmap: true,
            fua: true,
        },
        IoOp::Discard,
        IoOp::Compare,
        IoOp::Verify,
    ];
    for round in 0..rounds {
        let mut pending = 0;
        for (i, op) in OPS.into_iter().enumerate() {
            let span = rig.span(i as u64, round % 2, 8192);
            let mut data = IoBuffers::one(span);
            if round % 3 == 0 {
                data.spans.clear();
                data.spans.extend(
                    [span.sub(0, 512), span.sub(512, 7680)]
                        .into_iter()
                        .flatten(),
                );
            }
            let io = Io {
                tag: i as u64,
                op,
                lba: i as u64 * 16,
                blocks: 16,
                data,
            };
            match rig.channel.submit(&mut rig.reactor, io) {
                Submitted::Pending => pending += 1,
                Submitted::Done(_) => {}
            }
        }
        while pending > 0 {
            rig.reactor
                .turn(Wait::Adaptive, completions)
                .expect("a turn");
            for completion in completions.drain(..) {
                rig.channel.complete(&mut rig.reactor, &completion, done);
            }
            pending -= done.drain(..).count();
        }
    }
}

fn allocations(device: &dyn BlockDevice) -> u64 {
    let mut rig = Rig::new(device);
    let (mut completions, mut done) = (Vec::with_capacity(1024), Vec::with_capacity(1024));
    drive(&mut rig, &mut completions, &mut done, 30);
    // the reactor's list of timers grows to the most that ever ran at once
    for i in 0..64 {
        rig.reactor.arm(rig.reactor.now(), Token::new(9, i));
    }
    while completions.len() < 64 {
        rig.reactor
            .turn(Wait::Adaptive, &mut completions)
            .expect("a turn");
    }
    completions.clear();
    let before = ALLOCATIONS.get();
    drive(&mut rig, &mut completions, &mut done, 300);
    ALLOCATIONS.get() - before
}

#[test]
fn no_device_allocates_per_io() {
    let ram = open(&"ram:1M".parse::<BdevConfig>().unwrap()).unwrap();
    assert_eq!(allocations(&*ram), 0, "ram");
    for direct in [DirectMode::Off, DirectMode::Auto] {
        let image = Image::new(1 << 20);
        let file = open(&BdevConfig::File(FileConfig {
            direct,
            ..image.config()
        }))
        .unwrap();
        assert_eq!(allocations(&*file), 0, "{}", file.info().kind);
        let fault: FaultConfig = toml::from_str(
            "name = 'f'\nbase_bdev_name = 'b'\nread_error_rate = 0.1\nmedia_errors = [{ lba = 3 }]",
        )
        .unwrap();
        let fault = Arc::new(FaultDevice::new(&fault, file).unwrap());
        let delay: DelayConfig = toml::from_str(
            "name = 'd'\nbase_bdev_name = 'f'\navg_read_latency = 20\navg_write_latency = 1",
        )
        .unwrap();
        let delay = DelayDevice::new(&delay, fault).unwrap();
        assert_eq!(allocations(&delay), 0, "{}", delay.info().kind);
    }
}
