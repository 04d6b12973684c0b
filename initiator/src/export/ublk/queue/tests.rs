use std::os::unix::fs::FileExt;
use std::time::Instant;

use flexblk_reactor::Config;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

const DEPTH: u16 = 4;
const BUFFER_BYTES: u32 = 8192;
/// Of requests, as the kernel numbers them.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 2;
const DISCARD: u32 = 3;
const WRITE_ZEROES: u32 = 5;

/// A queue without a driver: a file has the descriptors that the kernel would write.
fn queue() -> (Queue, Arc<File>) {
    let node = Arc::new(File::from(
        memfd_create("ublk", MemfdFlags::CLOEXEC).unwrap(),
    ));
    node.set_len(PAGE_BYTES as u64).unwrap();
    let config = QueueConfig {
        node: Arc::clone(&node),
        q_id: 0,
        depth: DEPTH,
        buffer_bytes: BUFFER_BYTES,
        block_size: 512,
        ioctl_encoded: true,
    };
    let descriptors = Descriptors::map(&config).unwrap();
    let queue = Queue::with_descriptors(config, Arc::default(), descriptors).unwrap();
    (queue, node)
}

/// What the kernel writes before it completes the command of that tag.
fn describe(node: &File, tag: u16, op: u32, sectors: u32) {
    let mut bytes = [op.to_le_bytes(), sectors.to_le_bytes()].concat();
    bytes.resize(DESCRIPTOR_BYTES, 0);
    let at = u64::from(tag) * DESCRIPTOR_BYTES as u64;
    node.write_all_at(&bytes, at).unwrap();
}

/// As if the channel had taken the request of that tag.
fn begun(queue: &mut Queue, node: &File, tag: u16, op: u32, sectors: u32) {
    describe(node, tag, op, sectors);
    let (_, op) = queue
        .request(tag, &queue.descriptors.get(tag).unwrap())
        .unwrap();
    queue.counters.begin();
    let started = Instant::now();
    queue.set(tag, Place::Volume { started, op });
}

fn ended(queue: &mut Queue, tag: u16) -> Commit {
    queue.on_io(&IoCompletion {
        tag: tag.into(),
        result: Ok(()),
    });
    queue.commits.pop().unwrap()
}

/// The bytes that the driver may touch until it comes back with the tag.
fn driver_range(queue: &Queue, commit: &Commit) -> std::ops::Range<u64> {
    let from = queue.io_command(commit).addr - queue.memory.as_ptr() as u64;
    from..from + u64::from(BUFFER_BYTES)
}

#[test]
fn the_kernel_gets_no_buffer_that_the_channel_still_has() {
    let (mut queue, node) = queue();
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    begun(&mut queue, &node, 0, READ, 8);
    begun(&mut queue, &node, 1, WRITE, 8);
    // What a read brought lies in the tag's own buffer, also when the end comes before the kernel was told.
    queue.on_io(&IoCompletion {
        tag: 0,
        result: Ok(()),
    });
    queue.stop(&mut reactor);
    let [read, write] = queue.commits[..] else {
        panic!("{:?}", queue.commits);
    };
    assert_eq!((read.tag, read.result), (0, 4096));
    assert_eq!(driver_range(&queue, &read), 0..8192);
    assert_eq!((write.tag, write.result), (1, -libc::EIO));
    let all = u64::from(DEPTH) * u64::from(BUFFER_BYTES);
    assert_eq!(driver_range(&queue, &write), all..all + 8192);
    assert!(
        queue.memory.span(all, BUFFER_BYTES).is_some(),
        "memory of ours"
    );
    // The kernel comes back with the tag, and again.
    queue.commits.clear();
    for _ in 0..2 {
        describe(&node, 1, WRITE, 16);
        queue.incoming.push_back(1);
        queue.stop(&mut reactor);
        let again = queue.commits.pop().unwrap();
        assert_eq!((again.tag, again.result), (1, -libc::EIO));
        assert_eq!(driver_range(&queue, &again).start, all);
    }
    // The old request's end is nothing to the new one.
    queue.on_io(&IoCompletion {
        tag: 1,
        result: Ok(()),
    });
    assert!(queue.commits.is_empty());
}

#[test]
fn each_tag_has_a_buffer_of_its_own() {
    let (mut queue, node) = queue();
    for tag in 0..DEPTH {
        begun(&mut queue, &node, tag, WRITE, 8);
        let commit = ended(&mut queue, tag);
        assert_eq!((commit.tag, commit.result), (tag, 4096));
        let from = u64::from(tag) * u64::from(BUFFER_BYTES);
        assert_eq!(
            driver_range(&queue, &commit),
            from..from + u64::from(BUFFER_BYTES)
        );
    }
}

#[test]
fn what_was_done_is_no_error_whatever_its_length() {
    let (mut queue, node) = queue();
    // What the driver of a device from before may ask for: 2 GiB, whose bytes as a result would be negative.
    for op in [DISCARD, WRITE_ZEROES] {
        begun(&mut queue, &node, 2, op, 1 << 22);
        assert_eq!(ended(&mut queue, 2).result, 0);
    }
    begun(&mut queue, &node, 2, FLUSH, 0);
    assert_eq!(ended(&mut queue, 2).result, 0);
    begun(&mut queue, &node, 2, READ, 16);
    assert_eq!(ended(&mut queue, 2).result, 8192);
}
