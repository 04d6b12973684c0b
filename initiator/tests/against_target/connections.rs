//! How a controller changes and ends, who may connect, and what queue pairs have in common.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flexblk_initiator::{
    Command, Controller, ControllerState, Error, Event, IoError, Nsid, QueuePairOptions, discover,
};
use flexblk_target::config::{AllowedHosts, Namespace};

use crate::setup::{Bench, NQN, NSID, Transport, nqn, pattern, start};

over_both_transports! {
    a_pause_does_no_harm
    namespaces_come_change_and_go
    discovery_lists_the_subsystem
    a_target_that_closes_ends_everything_once
    a_command_that_takes_too_long_times_out
    queue_pairs_of_one_thread_do_not_disturb_each_other
    descriptors_and_memory_return_after_connect_and_disconnect
}

fn a_pause_does_no_harm(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 4);
    std::thread::sleep(Duration::from_secs(4));
    bench.write(0, &pattern(1, 4096)).unwrap();
    bench.queue.pause();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(bench.read(0, 4096).unwrap(), pattern(1, 4096));
    drop((bench, controller));
    assert!(target.shutdown());
}

fn namespaces_come_change_and_go(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let absent = controller.namespace(Nsid::new(2)).unwrap_err();
    assert!(
        matches!(&absent, Error::NoNamespace { .. })
            && absent.to_string().contains("active namespaces: 1"),
        "{absent}"
    );
    let mut bench = Bench::new(&controller, 4);
    let nsid = target
        .add_namespace(&nqn(), &Namespace::new("ram:8M"))
        .unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert_eq!(controller.namespace(nsid).unwrap().len_bytes(), 8 << 20);
    let span = bench.span(0, 512);
    bench.run(Command::write(nsid, 0, 1, span)).unwrap();
    target.resize_namespace(&nqn(), nsid, 16 << 20).unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert_eq!(controller.namespace(nsid).unwrap().len_bytes(), 16 << 20);
    target.remove_namespace(&nqn(), nsid).unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert!(controller.namespace(nsid).is_err());
    assert!(bench.run(Command::write(nsid, 0, 1, span)).is_err());
    bench.write(0, &pattern(1, 512)).unwrap();
    drop((bench, controller));
    assert!(target.shutdown());
}

fn discovery_lists_the_subsystem(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let mut discovery = options.clone();
    discovery.target.subnqn = None;
    let log = discover(&discovery).unwrap();
    assert!(
        log.records
            .iter()
            .any(|record| record.subnqn.as_str() == NQN),
        "{log:?}"
    );
    assert!(target.shutdown());
}

#[test]
fn who_may_not_is_told() {
    let (target, options) = start(|config| {
        config.subsystems[0].hosts =
            AllowedHosts::Only(["nqn.2026-11.io.example:friend".parse().unwrap()].into());
    });
    let error = Controller::connect(&options).unwrap_err();
    assert!(matches!(error, Error::HostNotAllowed { .. }), "{error}");
    let mut friend = options.clone();
    friend.target.hostnqn = Some("nqn.2026-11.io.example:friend".parse().unwrap());
    Controller::connect(&friend).unwrap();
    let mut elsewhere = friend.clone();
    elsewhere.target.subnqn = Some("nqn.2026-11.io.example:nothing".parse().unwrap());
    let error = Controller::connect(&elsewhere).unwrap_err();
    assert!(matches!(error, Error::NoSubsystem { .. }), "{error}");
    let mut deaf = friend;
    deaf.target.trsvcid = Some(4421);
    let error = Controller::connect(&deaf).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("nothing listens on service 4421"),
        "{error}"
    );
    assert!(target.shutdown());
}

fn a_target_that_closes_ends_everything_once(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 32);
    let span = bench.span(0, 4096);
    for tag in 0..32 {
        bench
            .queue
            .submit(&Command::read(NSID, tag * 8, 8, span), tag)
            .unwrap();
    }
    let closing = std::thread::spawn(move || target.shutdown());
    let mut out = Vec::new();
    let started = Instant::now();
    let mut next_tag = 32;
    while bench.queue.lost().is_none() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "nobody noticed"
        );
        bench.queue.wait(Duration::from_millis(10), 1, &mut out);
        if bench
            .queue
            .submit(&Command::read(NSID, 0, 8, span), next_tag)
            .is_ok()
        {
            next_tag += 1;
        }
    }
    bench.queue.poll(&mut out);
    let tags: BTreeSet<u64> = out.iter().map(|completion| completion.tag).collect();
    assert_eq!(
        (tags.len(), out.len()),
        (next_tag as usize, next_tag as usize)
    );
    let lost_by = Instant::now() + Duration::from_secs(10);
    while controller.state() == ControllerState::Live {
        assert!(Instant::now() < lost_by, "the controller does not notice");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(
        controller.next_event(Duration::from_secs(1)),
        Some(Event::Lost(_))
    ));
    assert!(matches!(
        controller.queue_pair(&QueuePairOptions::default()),
        Err(Error::Lost(_))
    ));
    assert!(closing.join().unwrap());
}

fn a_command_that_takes_too_long_times_out(transport: Transport) {
    let (target, mut options) = transport.start(|config| {
        let bdevs = r#"
            [[bdev]]
            type = "ram"
            name = "base"
            size = "8M"
            [[bdev]]
            type = "delay"
            name = "slow"
            base_bdev_name = "base"
            avg_read_latency = 3000000
        "#;
        #[derive(serde::Deserialize)]
        struct Bdevs {
            bdev: Vec<flexblk_blockdev::BdevConfig>,
        }
        config.bdevs = toml::from_str::<Bdevs>(bdevs).unwrap().bdev;
        config.subsystems[0].namespaces = vec![Namespace::new("slow")];
    });
    options.io_timeout = Duration::from_millis(300);
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 4);
    bench.write(0, &pattern(1, 512)).unwrap();
    let started = Instant::now();
    assert_eq!(bench.read(0, 512), Err(IoError::TimedOut));
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(300) && took < Duration::from_millis(1500),
        "{took:?}"
    );
    // The queue pair is gone, the controller is not.
    assert!(bench.queue.lost().is_some());
    assert_eq!(controller.state(), ControllerState::Live);
    let mut again = Bench::new(&controller, 4);
    again.write(0, &pattern(1, 512)).unwrap();
    drop((bench, again, controller));
    assert!(target.shutdown());
}

fn queue_pairs_of_one_thread_do_not_disturb_each_other(transport: Transport) {
    const QUEUES: usize = 6;
    const READS: u64 = 16;
    let (target, mut options) = transport.start(|_| {});
    options.nr_io_queues = QUEUES as u16;
    let controller = Controller::connect(&options).unwrap();
    let mut benches: Vec<Bench> = (0..QUEUES)
        .map(|_| Bench::new(&controller, READS as u16))
        .collect();
    let lba_of = |queue: usize| queue as u64 * 8 * READS;
    let data: Vec<Vec<u8>> = (0..QUEUES)
        .map(|queue| pattern(queue as u64 + 1, READS as usize * 4096))
        .collect();
    for (queue, bench) in benches.iter_mut().enumerate() {
        bench.write(lba_of(queue), &data[queue]).unwrap();
    }
    let submit = |bench: &mut Bench, queue: usize| {
        bench.span(2 << 20, READS as u32 * 4096).fill(0xee);
        for tag in 0..READS {
            let span = bench.span((2 << 20) + tag * 4096, 4096);
            let command = Command::read(NSID, lba_of(queue) + 8 * tag, 8, span);
            bench.queue.submit(&command, tag).unwrap();
        }
    };
    for (queue, bench) in benches.iter_mut().enumerate() {
        submit(bench, queue);
    }
    // Waiting for the last sends and receives for all.
    let mut out = Vec::new();
    let last = benches.last_mut().unwrap();
    let all = last
        .queue
        .wait(Duration::from_secs(10), READS as usize, &mut out);
    assert_eq!(all, READS as usize);
    if transport == Transport::Flexins {
        assert_eq!(
            benches[0].queue.transport_counters(),
            benches[1].queue.transport_counters(),
            "one endpoint"
        );
    }
    // One goes with everything outstanding, another in order; the others keep what is theirs.
    drop(benches.remove(0));
    benches.pop().unwrap().queue.close(&mut out);
    for (bench, data) in benches.iter_mut().zip(&data[1..]) {
        out.clear();
        let all = bench
            .queue
            .wait(Duration::from_secs(10), READS as usize, &mut out);
        assert_eq!(all, READS as usize);
        assert!(out.iter().all(|completion| completion.result.is_ok()));
        let mut read = vec![0; READS as usize * 4096];
        bench
            .span(2 << 20, READS as u32 * 4096)
            .copy_to_slice(&mut read);
        assert_eq!(&read, data);
    }
    // Their places serve others.
    for queue in [0, 5] {
        let mut bench = Bench::new(&controller, READS as u16);
        let read = bench.read(lba_of(queue), 4096).unwrap();
        assert_eq!(read, data[queue][..4096]);
    }
    // A thread of its own has an endpoint of its own.
    let elsewhere = controller.clone();
    let counters = std::thread::spawn(move || {
        let mut bench = Bench::new(&elsewhere, 4);
        bench.read(0, 4096).unwrap();
        bench.queue.transport_counters()
    });
    let (theirs, ours) = (
        counters.join().unwrap(),
        benches[0].queue.transport_counters(),
    );
    if transport == Transport::Flexins {
        assert!(theirs.port.segments_rx < ours.port.segments_rx);
    }
    drop((benches, controller));
    assert!(target.shutdown());
}

fn descriptors_and_memory_return_after_connect_and_disconnect(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let cycle = || {
        let controller = Controller::connect(&options).unwrap();
        let mut bench = Bench::new(&controller, 8);
        bench.write(0, &pattern(1, 4096)).unwrap();
    };
    cycle();
    // Other tests of this process open and close descriptors, too: the lowest number of several looks counts.
    let lowest = || {
        (0..20)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                descriptors()
            })
            .min()
            .unwrap()
    };
    let before = lowest();
    for _ in 0..100 {
        cycle();
    }
    let after = lowest();
    assert!(
        after <= before + 40,
        "{before} descriptors before, {after} after 100 connections"
    );
    assert!(target.shutdown());
}
