//! Errors that are put into an error device while it runs.

mod support;

use std::{
    num::NonZeroU8,
    sync::Arc,
    time::{Duration, Instant},
};

use flexblk_blockdev::{
    BdevConfig, BlockDevice, FaultDevice, InjectOn, InjectedError, Injection, IoBuffers, IoError,
    IoOp, open, open_over,
};
use support::*;

fn over(base: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    let config = serde_json::from_value(serde_json::json!({
        "type": "fault", "name": "EE_base", "base_bdev_name": "base",
    }));
    let bases = [("base".to_owned(), base)].into();
    open_over(&config.expect("a configuration"), &bases).expect("a device")
}

fn ram() -> Arc<dyn BlockDevice> {
    open(&"ram:1M".parse::<BdevConfig>().expect("a spec")).expect("a device")
}

fn inject(device: &Arc<dyn BlockDevice>, on: InjectOn, error: InjectedError, count: u32) {
    let injection = Injection {
        error,
        count,
        queue_depth: 0,
    };
    let injector = device.injector().expect("an error device");
    injector.inject(on, &injection);
}

const fn corrupt(offset: u64) -> InjectedError {
    let value = NonZeroU8::new(0x81).expect("not zero");
    InjectedError::CorruptData { offset, value }
}

#[test]
fn so_many_fail_and_the_base_sees_none_of_them() {
    let base = ram();
    let device = over(Arc::clone(&base));
    let mut rig = Rig::new(&*device);
    inject(&device, InjectOn::Write, InjectedError::Failure, 2);
    let nvme = InjectedError::Nvme { sct: 2, sc: 0x81 };
    inject(&device, InjectOn::Flush, nvme, 1);
    let failed = Err(IoError::Io(libc::EIO));
    assert_eq!(rig.write(3, &[1; 512]), failed);
    assert_eq!(rig.plain(IoOp::Discard, 3, 1), Ok(()), "another type");
    let zeroes = IoOp::WriteZeroes {
        unmap: false,
        fua: false,
    };
    assert_eq!(rig.plain(zeroes, 3, 1), failed);
    assert_eq!(rig.flush(), Err(IoError::Nvme { sct: 2, sc: 0x81 }));
    assert_eq!(rig.read(3, 1), Ok(vec![0; 512]));
    assert_eq!((rig.write(3, &[2; 512]), rig.flush()), (Ok(()), Ok(())));
    assert_eq!(counter(&*device, "injected_errors"), 3);
    assert!(base.injector().is_none());
}

/// Over memory, which is done at once, and over a file, which is not.
#[test]
fn one_byte_is_another() {
    let image = Image::new(1 << 20);
    let file = open(&BdevConfig::File(image.config())).expect("a device");
    for base in [ram(), file] {
        let device = over(Arc::clone(&base));
        let (mut rig, mut below) = (Rig::new(&*device), Rig::new(&*base));
        rig.write(0, &[7; 1024]).unwrap();
        inject(&device, InjectOn::Read, corrupt(513), 1);
        let mut wrong = vec![7; 1024];
        wrong[513] = 7 ^ 0x81;
        assert_eq!(rig.read(0, 2), Ok(wrong.clone()));
        assert_eq!(rig.read(0, 2), Ok(vec![7; 1024]), "only once");

        inject(&device, InjectOn::Write, corrupt(513), 1);
        let pieces = [rig.span(3, 0, 512), rig.span(4, 0, 512)];
        let mut data = IoBuffers::none();
        for piece in pieces {
            piece.fill(7);
            data.spans.push(piece);
        }
        assert_eq!(rig.run(IoOp::Write { fua: false }, 8, 2, data), Ok(()));
        assert_eq!(below.read(8, 2), Ok(wrong), "that is what the base has");
        let lent = pieces.map(|piece| bytes_of(&piece));
        assert_eq!(lent, [[7; 512], [7; 512]], "the caller's is what it was");

        inject(&device, InjectOn::Write, corrupt(4096), 1);
        assert_eq!(rig.write(8, &[8; 1024]), Ok(()));
        assert_eq!(below.read(8, 2), Ok(vec![8; 1024]), "beyond its end");
        inject(&device, InjectOn::Read, corrupt(0), 1);
        assert_eq!(rig.compare(8, &[8; 512]), Ok(()));
        assert!(rig.read(1 << 40, 1).is_err(), "an error stays one");
    }
}

#[test]
fn pending_until_resumed_or_gone() {
    let device = over(ram());
    let mut rig = Rig::new(&*device);
    inject(&device, InjectOn::Read, InjectedError::Pending, u32::MAX);
    let verify = |rig: &mut Rig| rig.start(IoOp::Verify, 0, 1, IoBuffers::none());
    let held = [verify(&mut rig), verify(&mut rig)];
    assert_eq!(rig.write(0, &[1; 512]), Ok(()), "others go on");
    rig.turn();
    assert!(rig.ended.is_empty());
    assert_eq!(rig.channel.in_flight(), 2);
    device.injector().expect("one").resume();
    for tag in held {
        assert_eq!(rig.wait(tag), Ok(()));
    }
    assert_eq!(rig.plain(IoOp::Verify, 0, 1), Ok(()), "no more of them");

    inject(&device, InjectOn::Read, InjectedError::Pending, 1);
    let held = verify(&mut rig);
    device.injector().expect("one").clear();
    rig.turn();
    assert_eq!(rig.channel.in_flight(), 1, "clearing lets nothing go");
    drop(device);
    assert_eq!(rig.wait(held), Ok(()));
    assert_eq!(rig.channel.in_flight(), 0);
}

#[test]
fn without_memory_it_is_tried_again() {
    let device = over(ram());
    let mut rig = Rig::new(&*device);
    inject(&device, InjectOn::Write, InjectedError::NoMemory, 3);
    let began = Instant::now();
    assert_eq!(rig.write(5, &[1; 512]), Ok(()));
    assert!(began.elapsed() >= Duration::from_millis(30), "three times");
    assert_eq!(rig.read(5, 1), Ok(vec![1; 512]));
}

#[test]
fn only_from_a_depth_on_and_no_more_than_the_base_takes() {
    let delay = serde_json::from_value(serde_json::json!({
        "type": "delay", "name": "d", "base_bdev_name": "r", "avg_read_latency": 50_000, "depth": 4,
    }));
    let bases = [("r".to_owned(), ram())].into();
    let base = open_over(&delay.expect("a configuration"), &bases).expect("a device");
    let device = over(base);
    let mut rig = Rig::new(&*device);
    let deep = Injection {
        error: InjectedError::Failure,
        count: u32::MAX,
        queue_depth: 2,
    };
    let injector = device.injector().expect("one");
    injector.inject(InjectOn::Read, &deep);
    let mut verify = || rig.start(IoOp::Verify, 0, 1, IoBuffers::none());
    let tags = [verify(), verify(), verify()];
    let failed = Err(IoError::Io(libc::EIO));
    let ends = tags.map(|tag| rig.wait(tag));
    assert_eq!(ends, [Ok(()), Ok(()), failed]);

    inject(&device, InjectOn::Read, InjectedError::Pending, u32::MAX);
    let mut verify = || rig.start(IoOp::Verify, 0, 1, IoBuffers::none());
    let held = [verify(), verify(), verify(), verify()];
    let more = verify();
    assert_eq!(rig.wait(more), Err(IoError::Busy));
    device.injector().expect("one").resume();
    for tag in held {
        assert_eq!(rig.wait(tag), Ok(()));
    }
}

#[test]
fn a_uuid_of_its_own() {
    let uuid = "6d1c8b5e-5f3b-4b34-9f55-0d6a2a3f7f10";
    let config = serde_json::from_value(serde_json::json!({
        "name": "f", "base_bdev_name": "base", "uuid": uuid,
    }));
    let device = FaultDevice::new(&config.expect("a configuration"), ram()).expect("a device");
    assert_eq!(device.info().uuid.to_string(), uuid);
}
