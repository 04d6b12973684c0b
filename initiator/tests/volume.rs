//! Volumes against real targets in this process: several paths, their loss and return.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_initiator::volume::{
    Channel, MultipathOptions, NoPath, PathOptions, PathState, Request, Volume, VolumeEvent,
    VolumeOptions,
};
use flexblk_initiator::{
    ConnectOptions, Error, Host, IoCompletion, IoError, Nqn, Nsid, Op, SharedMemory, Span, TrType,
};
use flexblk_reactor::HugePages;
use flexblk_target::Target;
use flexblk_target::config::{Config, Namespace, Subsystem, TcpListener};
use flexblk_tests::ports::free_udp_port;

const NQN: &str = "nqn.2026-11.io.example:disk";
const BLOCK: u32 = 512;

fn host() -> Host {
    Host {
        hostnqn: "nqn.2026-11.io.example:host".parse().unwrap(),
        hostid: flexblk_initiator::HostId::random(),
    }
}

/// A target with one namespace over both transports, and its two paths: FlexiNS and TCP.
struct Server {
    target: Option<Target>,
    config: Config,
    paths: [ConnectOptions; 2],
}

impl Server {
    fn start(bdev: &str) -> Server {
        Server::start_with(bdev, |_| {})
    }

    fn start_with(bdev: &str, change: impl FnOnce(&mut Config)) -> Server {
        let nqn: Nqn = NQN.parse().unwrap();
        let mut subsystem = Subsystem::new(nqn);
        subsystem.namespaces.push(Namespace::new(bdev));
        let mut config = Config {
            subsystems: vec![subsystem],
            ..Config::default()
        };
        config.tcp = Some(TcpListener {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            ..TcpListener::default()
        });
        change(&mut config);
        for _ in 0..50 {
            config.listener.udp_port = free_udp_port().unwrap();
            let started = Target::start(config.clone());
            if let Err(error) = &started {
                eprintln!("{error}");
            }
            if let Ok(target) = started {
                let uri = target.uris().into_iter().next().unwrap();
                let flexins = ConnectOptions::parse(&uri, host()).unwrap();
                let mut tcp = flexins.clone();
                tcp.target.trtype = TrType::Tcp;
                tcp.target.trsvcid = target.tcp_address().map(|address| address.port());
                // The same place again after a restart.
                config.tcp = Some(TcpListener {
                    address: target.tcp_address().unwrap(),
                    ..TcpListener::default()
                });
                return Server {
                    target: Some(target),
                    config,
                    paths: [flexins, tcp],
                };
            }
        }
        panic!("no free UDP port");
    }

    fn stop(&mut self) {
        self.target = None;
    }

    fn restart(&mut self) {
        self.stop();
        self.target = Some(Target::start(self.config.clone()).unwrap());
    }

    fn path(&self, number: usize) -> PathOptions {
        PathOptions {
            connect: self.paths[number].clone(),
            nsid: None,
        }
    }
}

fn volume_options(paths: Vec<PathOptions>) -> VolumeOptions {
    VolumeOptions {
        paths,
        poll_budget: Duration::from_micros(50),
    }
}

fn quick() -> MultipathOptions {
    MultipathOptions {
        reconnect_delay: Duration::from_millis(200),
        ..MultipathOptions::default()
    }
}

struct Bench {
    channel: Channel,
    memory: Arc<SharedMemory>,
    done: Vec<IoCompletion>,
}

impl Bench {
    fn new(volume: &Volume) -> Bench {
        let mut channel = volume.channel(32).unwrap();
        let memory = SharedMemory::create("test", 1 << 20, HugePages::No).unwrap();
        channel.register_memory(&memory).unwrap();
        Bench {
            channel,
            memory,
            done: Vec::new(),
        }
    }

    fn block(&self, number: u64) -> Span {
        self.memory.span(number * u64::from(BLOCK), BLOCK).unwrap()
    }

    /// One request to its end; `None`: not within `limit`.
    fn run(&mut self, op: Op, lba: u64, limit: Duration) -> Option<Result<(), IoError>> {
        let request = Request {
            op,
            lba,
            blocks: 1,
            buffer: Some(self.block(0)),
        };
        self.channel.submit(&request, 7).unwrap();
        self.wait(limit)
    }

    fn wait(&mut self, limit: Duration) -> Option<Result<(), IoError>> {
        let deadline = Instant::now() + limit;
        while self.done.is_empty() && Instant::now() < deadline {
            self.channel.turn(Some(deadline), &mut self.done);
        }
        self.done.pop().map(|done| done.result)
    }

    fn turn_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.channel.turn(Some(deadline), &mut self.done);
        }
    }
}

const WRITE: Op = Op::Write { fua: false };
const SECOND: Duration = Duration::from_secs(1);

fn wait_for(what: &str, mut fulfilled: impl FnMut() -> bool) {
    let deadline = Instant::now() + 20 * SECOND;
    while !fulfilled() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn states(volume: &Volume) -> Vec<PathState> {
    volume.paths().iter().map(|path| path.state).collect()
}

#[test]
fn both_transports_carry_requests_of_one_channel() {
    let server = Server::start("ram:1M,block_size=512");
    let options = volume_options(vec![server.path(0), server.path(1)]);
    let volume = Volume::open_with(&options, &quick()).unwrap();
    wait_for("both paths", || states(&volume) == [PathState::Live; 2]);
    let mut bench = Bench::new(&volume);
    bench.turn_for(SECOND / 10);
    for lba in 0..64 {
        bench.block(0).fill(lba as u8);
        assert_eq!(bench.run(WRITE, lba, SECOND), Some(Ok(())));
    }
    for lba in 0..64 {
        assert_eq!(bench.run(Op::Read, lba, SECOND), Some(Ok(())));
        let mut bytes = [0; BLOCK as usize];
        bench.block(0).copy_to_slice(&mut bytes);
        assert_eq!(bytes, [lba as u8; BLOCK as usize]);
    }
    bench.turn_for(SECOND / 10);
    let paths = volume.paths();
    assert_eq!(paths[0].transport, TrType::Flexins);
    assert_eq!(paths[1].transport, TrType::Tcp);
    assert_eq!(paths[0].ios + paths[1].ios, 128);
    for path in &paths {
        assert!(path.ios > 20 && path.latency.is_some(), "{path:?}");
    }
}

#[test]
fn the_loss_of_one_path_is_no_error_and_it_comes_back() {
    // Two targets with one file, as two controllers of a disk shelf.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    let bdev = format!("file:{},block_size=512,share_rw=true", file.display());
    let uuid = uuid::Uuid::from_u128(7);
    let same = |config: &mut Config| config.subsystems[0].namespaces[0].uuid = Some(uuid);
    let (mut first, second) = (
        Server::start_with(&bdev, same),
        Server::start_with(&bdev, same),
    );
    let options = volume_options(vec![first.path(0), second.path(1)]);
    let volume = Volume::open_with(&options, &quick()).unwrap();
    wait_for("both paths", || states(&volume) == [PathState::Live; 2]);
    let mut bench = Bench::new(&volume);
    let mut lba = 0;
    let mut write = |bench: &mut Bench| {
        lba = (lba + 1) % 2048;
        assert_eq!(bench.run(WRITE, lba, 5 * SECOND), Some(Ok(())));
    };
    for _ in 0..100 {
        write(&mut bench);
    }
    first.stop();
    for _ in 0..100 {
        write(&mut bench);
    }
    wait_for("the path's loss", || {
        states(&volume)[0] == PathState::Connecting
    });
    assert!(volume.paths()[0].last_error.is_some());
    first.restart();
    wait_for("the path's return", || {
        states(&volume)[0] == PathState::Live
    });
    let before = volume.paths()[0].ios;
    let deadline = Instant::now() + 5 * SECOND;
    while volume.paths()[0].ios < before + 10 {
        assert!(Instant::now() < deadline, "it is used again");
        write(&mut bench);
    }
    let mut events = Vec::new();
    while let Some(event) = volume.next_event(Duration::ZERO) {
        events.push(event);
    }
    assert!(
        events.contains(&VolumeEvent::PathDown { path: 0 }),
        "{events:?}"
    );
    let ups = |path| {
        let up = VolumeEvent::PathUp { path };
        events.iter().filter(|event| **event == up).count()
    };
    assert_eq!((ups(0), ups(1)), (2, 1), "{events:?}");
}

#[test]
fn without_a_path_requests_wait_and_the_thread_does_not() {
    // One with an identity: memory is another disk after a restart.
    let mut server = Server::start_with("ram:1M,block_size=512", |config| {
        config.subsystems[0].namespaces[0].uuid = Some(uuid::Uuid::from_u128(7));
    });
    let options = volume_options(vec![server.path(0)]);
    let volume = Volume::open_with(&options, &quick()).unwrap();
    let mut bench = Bench::new(&volume);
    assert_eq!(bench.run(WRITE, 1, SECOND), Some(Ok(())));
    server.stop();
    assert_eq!(bench.run(WRITE, 2, SECOND), None);
    assert_eq!((bench.channel.held(), bench.channel.outstanding()), (1, 1));
    let before = Instant::now();
    let mut turns = 0;
    while before.elapsed() < SECOND {
        let soon = Instant::now() + Duration::from_millis(20);
        bench.channel.turn(Some(soon), &mut bench.done);
        turns += 1;
    }
    assert!(turns > 25, "only {turns} turns in a second");
    assert!(turns < 500, "{turns} turns: it does not sleep");
    server.restart();
    let result = bench.wait(10 * SECOND);
    assert_eq!(result, Some(Ok(())), "{:?}", volume.paths());
    assert_eq!(bench.channel.held(), 0);
}

#[test]
fn without_a_path_requests_fail_when_that_is_wanted() {
    let mut server = Server::start("ram:1M,block_size=512");
    let options = volume_options(vec![server.path(1)]);
    let multipath = MultipathOptions {
        no_path: NoPath::Fail,
        fast_io_fail_tmo: Some(SECOND / 2),
        ctrl_loss_tmo: Some(2 * SECOND),
        ..quick()
    };
    let volume = Volume::open_with(&options, &multipath).unwrap();
    let mut bench = Bench::new(&volume);
    server.stop();
    let before = Instant::now();
    let failed = bench.run(WRITE, 1, 5 * SECOND);
    assert_eq!(failed, Some(Err(IoError::ConnectionLost)));
    let took = before.elapsed();
    assert!(took > SECOND / 4 && took < 2 * SECOND, "{took:?}");
    // From now on at once, until there is a path again.
    let before = Instant::now();
    let failed = bench.run(WRITE, 1, 5 * SECOND);
    assert_eq!(failed, Some(Err(IoError::ConnectionLost)));
    assert!(before.elapsed() < SECOND / 4);
    // ... and after ctrl_loss_tmo there will be none.
    let lost = (0..20).find_map(|_| {
        volume
            .next_event(SECOND)
            .filter(|event| *event == VolumeEvent::Lost)
    });
    assert_eq!(lost, Some(VolumeEvent::Lost));
    assert_eq!(states(&volume), [PathState::Lost]);
    let before = Instant::now();
    drop(bench);
    drop(volume);
    assert!(before.elapsed() < 2 * SECOND, "{:?}", before.elapsed());
}

#[test]
fn paths_to_different_namespaces_are_refused() {
    let (first, second) = (Server::start("ram:1M"), Server::start("ram:2M"));
    let with_id = |server: &Server, nsid| PathOptions {
        nsid,
        ..server.path(0)
    };
    let other = Server::start_with("ram:1M", |config| {
        config.subsystems[0].namespaces[0].uuid = Some(uuid::Uuid::from_u128(9));
    });
    for wrong in [&second, &other] {
        let options = volume_options(vec![with_id(&first, None), with_id(wrong, None)]);
        let error = Volume::open(&options).unwrap_err();
        assert!(matches!(error, Error::OtherNamespace { .. }), "{error}");
        println!("{error}");
    }
    let missing = volume_options(vec![with_id(&first, Some(Nsid::new(5)))]);
    let error = Volume::open(&missing).unwrap_err();
    assert!(matches!(error, Error::NoNamespace { .. }), "{error}");
    let none = Volume::open(&volume_options(Vec::new())).unwrap_err();
    assert!(matches!(none, Error::Address(_)), "{none}");
    let mut no_keep_alive = first.path(0);
    no_keep_alive.connect.kato = Duration::ZERO;
    let error = Volume::open(&volume_options(vec![no_keep_alive])).unwrap_err();
    assert!(error.to_string().contains("write_fence=off"), "{error}");
}
