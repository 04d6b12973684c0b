//! Volumes with the real daemon: a target is killed, falls silent, is cut off, comes back.
//!
//! Each test prints the longest time without any completion (stall) and the longest latency of a request.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flexblk_initiator::volume::{
    Channel, MultipathOptions, PathOptions, PathState, Request, Volume, VolumeOptions, WriteFence,
};
use flexblk_initiator::{ConnectOptions, Host, IoCompletion, Op, SharedMemory, Span, TransportId};
use flexblk_reactor::HugePages;
use flexblk_tests::cable::{Cable, FAR, with_cable};
use flexblk_tests::ports::free_udp_port;
use flexblk_tests::process::eventually;
use flexblk_tests::setup::Setup;
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};
use rustix::process::Signal;

const BLOCK: u32 = 4096;
const SECOND: Duration = Duration::from_secs(1);
const DEPTH: u64 = 8;
/// Between two submissions, so that blocks are not written again while they are fenced.
const PACE: Duration = Duration::from_micros(400);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Flexins,
    Tcp,
}

/// An image for several targets.
fn image(setup: &Setup, blocks: u64) -> Result<String> {
    let path = setup.path().join("disk");
    std::fs::File::create(&path)?.set_len(blocks * u64::from(BLOCK))?;
    Ok(format!(
        "file:{},block_size={BLOCK},share_rw=true",
        path.display()
    ))
}

/// A target that exports it, and its path.
fn target(setup: &Setup, device: &str, transport: Transport) -> Result<(Target, PathOptions)> {
    // Below the ports that the kernel gives to clients: while the target is down, ours could get it.
    let tcp = SocketAddr::from((Ipv4Addr::LOCALHOST, free_udp_port()?));
    let target = setup.target_with(TargetOptions {
        extra: format!("[tcp]\naddress = \"{tcp}\"\n"),
        ..TargetOptions::with_devices(&[device])
    })?;
    let path = match transport {
        Transport::Flexins => path("flexins://127.0.0.1:4420", target.udp_port())?,
        Transport::Tcp => path(&format!("tcp://{tcp}"), 0)?,
    };
    Ok((target, path))
}

fn path(address: &str, udp_port: u16) -> Result<PathOptions> {
    let target: TransportId = format!("nvme+{address}/{SUBNQN}").parse()?;
    let mut connect = ConnectOptions::new(target, Host::load()?);
    connect.udp_port = udp_port;
    Ok(PathOptions {
        connect,
        nsid: None,
    })
}

fn open(paths: Vec<PathOptions>, multipath: MultipathOptions) -> Result<Volume> {
    let options = VolumeOptions {
        paths,
        poll_budget: Duration::from_micros(50),
    };
    let volume = Volume::open_with(&options, &multipath)?;
    eventually("every path is up", Duration::from_secs(10), || {
        let live = |path: &flexblk_initiator::volume::PathReport| path.state == PathState::Live;
        volume.paths().iter().all(live)
    })?;
    Ok(volume)
}

fn quick() -> MultipathOptions {
    MultipathOptions {
        reconnect_delay: SECOND / 4,
        ..MultipathOptions::default()
    }
}

/// Writes and reads all the time, and knows what has to be in every block.
struct Load {
    channel: Channel,
    memory: Arc<SharedMemory>,
    /// By block: version that is there.
    versions: Vec<u64>,
    places: Vec<Option<(u64, Op, Instant)>>,
    next: u64,
    version: u64,
    next_submit: Instant,
    last_done: Instant,
    stall: Duration,
    latency: Duration,
    done: u64,
    errors: u64,
    completions: Vec<IoCompletion>,
}

impl Load {
    fn new(volume: &Volume, blocks: u64) -> Result<Load> {
        let mut channel = volume.channel(DEPTH as u16)?;
        let memory = SharedMemory::create("load", DEPTH * u64::from(BLOCK), HugePages::No)?;
        channel.register_memory(&memory)?;
        let now = Instant::now();
        Ok(Load {
            channel,
            memory,
            versions: vec![0; blocks as usize],
            places: vec![None; DEPTH as usize],
            next: 0,
            version: 0,
            next_submit: now,
            last_done: now,
            stall: Duration::ZERO,
            latency: Duration::ZERO,
            done: 0,
            errors: 0,
            completions: Vec::new(),
        })
    }

    fn span(&self, place: usize) -> Result<Span> {
        self.memory
            .span(place as u64 * u64::from(BLOCK), BLOCK)
            .context("in the memory")
    }

    fn content(lba: u64, version: u64) -> Vec<u8> {
        let words = (0..u64::from(BLOCK) / 16).flat_map(|_| [lba, version]);
        words.flat_map(u64::to_le_bytes).collect()
    }

    fn submit(&mut self, op: Op, lba: u64) -> Result<bool> {
        let Some(place) = self.places.iter().position(Option::is_none) else {
            return Ok(false);
        };
        let buffer = self.span(place)?;
        if op != Op::Read {
            self.version += 1;
            buffer.copy_from_slice(&Load::content(lba, self.version));
        }
        let request = Request {
            op,
            lba,
            blocks: 1,
            buffer: Some(buffer),
        };
        self.channel.submit(&request, place as u64)?;
        self.places[place] = Some((lba, op, Instant::now()));
        Ok(true)
    }

    fn collect(&mut self, until: Instant) -> Result<()> {
        let mut completions = std::mem::take(&mut self.completions);
        self.channel.turn(Some(until), &mut completions);
        let now = Instant::now();
        for completion in completions.drain(..) {
            let place = completion.tag as usize;
            let (lba, op, since) = self.places[place].take().context("outstanding")?;
            self.stall = self.stall.max(now - self.last_done);
            self.last_done = now;
            self.latency = self.latency.max(now - since);
            self.done += 1;
            let mut bytes = vec![0; BLOCK as usize];
            self.span(place)?.copy_to_slice(&mut bytes);
            match completion.result {
                Err(_) => self.errors += 1,
                Ok(()) if op == Op::Read => {
                    let expected = match self.versions[lba as usize] {
                        0 => vec![0; BLOCK as usize],
                        version => Load::content(lba, version),
                    };
                    ensure!(
                        bytes == expected,
                        "block {lba} does not hold what was written last"
                    );
                }
                Ok(()) => {
                    let words: [u8; 8] = bytes[8..16].try_into()?;
                    self.versions[lba as usize] = u64::from_le_bytes(words);
                }
            }
        }
        self.completions = completions;
        Ok(())
    }

    /// Every third request reads what was written some time ago.
    fn run(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let blocks = self.versions.len() as u64;
        while Instant::now() < end {
            let now = Instant::now();
            if now >= self.next_submit {
                let is_busy = |lba| self.places.iter().flatten().any(|(busy, ..)| *busy == lba);
                let (op, lba) = match self.next % 3 {
                    2 => (Op::Read, (self.next * 7) % blocks),
                    _ => (Op::Write { fua: false }, self.next % blocks),
                };
                if is_busy(lba) {
                    self.next += 1;
                } else if self.submit(op, lba)? {
                    self.next += 1;
                    self.next_submit = now + PACE;
                }
            }
            self.collect(end.min(now + Duration::from_millis(1)))?;
        }
        Ok(())
    }

    /// Until nothing is outstanding.
    fn drain(&mut self) -> Result<()> {
        let end = Instant::now() + 60 * SECOND;
        while self.channel.outstanding() > 0 {
            ensure!(Instant::now() < end, "requests do not end");
            self.collect(Instant::now() + Duration::from_millis(10))?;
        }
        Ok(())
    }

    /// Reads everything.
    fn verify(&mut self) -> Result<()> {
        self.drain()?;
        for lba in 0..self.versions.len() as u64 {
            while !self.submit(Op::Read, lba)? {
                self.collect(Instant::now() + SECOND)?;
            }
        }
        self.drain()
    }

    /// What was measured; starts anew.
    fn take(&mut self, what: &str) -> (Duration, u64) {
        println!(
            "{what}: {} requests, {} errors, longest stall {:.0?}, longest latency {:.0?}",
            self.done, self.errors, self.stall, self.latency
        );
        let result = (self.stall, self.errors);
        (self.stall, self.latency, self.done, self.errors) = (Duration::ZERO, Duration::ZERO, 0, 0);
        self.last_done = Instant::now();
        result
    }
}

fn is_used_again(volume: &Volume, load: &mut Load, path: usize) -> Result<()> {
    let deadline = Instant::now() + 20 * SECOND;
    while volume.paths()[path].state != PathState::Live {
        ensure!(Instant::now() < deadline, "{:?}", volume.paths());
        load.run(SECOND / 20)?;
    }
    // On a busy machine it may look slow for a while.
    let before = volume.paths()[path].ios;
    while volume.paths()[path].ios < before + 100 {
        ensure!(Instant::now() < deadline, "{:?}", volume.paths());
        load.run(SECOND / 20)?;
    }
    Ok(())
}

/// One of two targets goes and comes back.
fn fail_over(
    what: &str,
    transport: Transport,
    limit: Duration,
    go: impl Fn(&mut Target) -> Result<()>,
    come_back: impl Fn(&mut Target, &Setup) -> Result<()>,
) -> Result<()> {
    let setup = Setup::new()?;
    let blocks = 16_384;
    let device = image(&setup, blocks)?;
    let (mut first, first_path) = target(&setup, &device, transport)?;
    let (_second, second_path) = target(&setup, &device, transport)?;
    let volume = open(vec![first_path, second_path], quick())?;
    let mut load = Load::new(&volume, blocks)?;
    load.run(SECOND)?;
    load.take(&format!("{transport:?}, before"));
    go(&mut first)?;
    load.run(3 * SECOND)?;
    let (stall, errors) = load.take(&format!("{transport:?}, {what}"));
    ensure!(errors == 0, "{errors} errors");
    ensure!(stall < limit, "stall {stall:?}");
    come_back(&mut first, &setup)?;
    is_used_again(&volume, &mut load, 0)?;
    load.verify()?;
    let (_, errors) = load.take(&format!("{transport:?}, back"));
    ensure!(errors == 0, "{errors} errors");
    Ok(())
}

#[test]
fn one_of_two_targets_is_killed() -> Result<()> {
    for transport in [Transport::Flexins, Transport::Tcp] {
        fail_over(
            "one of two killed",
            transport,
            SECOND,
            Target::kill,
            |target, setup| target.restart(setup.binaries()),
        )?;
    }
    Ok(())
}

#[test]
fn one_of_two_targets_falls_silent() -> Result<()> {
    // Over TCP its kernel goes on to acknowledge: only what nobody answers tells.
    for transport in [Transport::Flexins, Transport::Tcp] {
        fail_over(
            "one of two stopped",
            transport,
            2 * SECOND,
            |target| target.signal(Signal::STOP),
            |target, _| target.signal(Signal::CONT),
        )?;
    }
    Ok(())
}

#[test]
fn the_only_target_is_restarted_fifty_times() -> Result<()> {
    let setup = Setup::new()?;
    let blocks = 16_384;
    for transport in [Transport::Flexins, Transport::Tcp] {
        let device = image(&setup, blocks)?;
        let (mut target, mut path) = target(&setup, &device, transport)?;
        // Without it a FlexiNS target is found dead after three seconds, and three restarts are one.
        path.connect.ack_timeout = Some(SECOND / 2);
        let volume = open(vec![path], quick())?;
        let mut load = Load::new(&volume, blocks)?;
        for round in 1..=25 {
            load.run(SECOND / 5)?;
            target.restart(setup.binaries())?;
            let deadline = Instant::now() + 20 * SECOND;
            while volume.paths()[0].connects <= round {
                ensure!(Instant::now() < deadline, "{:?}", volume.paths());
                load.run(SECOND / 20)?;
            }
        }
        load.run(SECOND)?;
        load.verify()?;
        let (_, errors) = load.take(&format!("{transport:?}, 25 restarts"));
        ensure!(errors == 0, "{errors} errors");
    }
    Ok(())
}

#[test]
fn a_target_that_is_dead_for_ever_holds_nobody() -> Result<()> {
    let setup = Setup::new()?;
    for transport in [Transport::Flexins, Transport::Tcp] {
        for wait in [Some(SECOND), None] {
            let device = image(&setup, 1024)?;
            let (mut target, path) = target(&setup, &device, transport)?;
            let multipath = MultipathOptions {
                fast_io_fail_tmo: wait,
                ..quick()
            };
            let volume = open(vec![path], multipath)?;
            let mut load = Load::new(&volume, 1024)?;
            load.run(SECOND / 2)?;
            load.take("before");
            target.signal(Signal::STOP)?;
            let since = Instant::now();
            if wait.is_some() {
                // Until it is found dead: 3 s (FlexiNS) or twice the keep-alive time-out; then the second.
                while load.errors == 0 {
                    ensure!(since.elapsed() < 15 * SECOND, "nothing fails");
                    load.run(SECOND / 20)?;
                }
                println!("{transport:?}: requests fail after {:.1?}", since.elapsed());
            } else {
                load.run(SECOND)?;
                ensure!(load.channel.outstanding() > 0);
            }
            let closing = Instant::now();
            drop(load);
            drop(volume);
            let took = closing.elapsed();
            println!("{transport:?}: closed within {took:.1?}");
            ensure!(took < 5 * SECOND, "closing took {took:?}");
            target.kill()?;
        }
    }
    Ok(())
}

#[test]
fn writes_to_fenced_blocks_wait_and_with_the_fence_off_they_do_not() -> Result<()> {
    let setup = Setup::new()?;
    let off = latency_over_a_kill(&setup, WriteFence::Off)?;
    ensure!(off < Duration::from_millis(400), "off: {off:?}");
    // Whether a write is under way when the target dies is a matter of luck: one of several deaths will do.
    let mut strict = Duration::ZERO;
    for _ in 0..5 {
        strict = strict.max(latency_over_a_kill(&setup, WriteFence::Strict)?);
        ensure!(strict < 2 * SECOND, "strict: {strict:?}");
        if strict >= Duration::from_millis(400) {
            return Ok(());
        }
    }
    bail!("strict: no write waited for the fence, at most {strict:?}")
}

/// The longest latency when one of two targets dies, while the same few blocks are written all the time.
fn latency_over_a_kill(setup: &Setup, fence: WriteFence) -> Result<Duration> {
    let device = image(setup, 16)?;
    let (mut first, first_path) = target(setup, &device, Transport::Tcp)?;
    let (_second, second_path) = target(setup, &device, Transport::Tcp)?;
    let multipath = MultipathOptions {
        write_fence: fence,
        ..quick()
    };
    let volume = open(vec![first_path, second_path], multipath)?;
    let mut load = Load::new(&volume, 16)?;
    load.run(SECOND)?;
    // Killed in the middle of a request, at last.
    for _ in 0..50 {
        load.run(SECOND / 50)?;
        if load.channel.outstanding() > 2 {
            break;
        }
    }
    load.take("before");
    first.signal(Signal::STOP)?;
    load.run(SECOND / 20)?;
    first.kill()?;
    load.run(3 * SECOND)?;
    let latency = load.latency;
    let (_, errors) = load.take(&format!("fence {fence:?}"));
    ensure!(errors == 0, "{errors} errors");
    Ok(latency)
}

#[test]
fn one_of_two_targets_is_cut_off() -> Result<()> {
    with_cable("one_of_two_targets_is_cut_off", cut_off)
}

fn cut_off(cable: &Cable) -> Result<()> {
    for transport in [Transport::Flexins, Transport::Tcp] {
        let setup = Setup::new()?;
        let blocks = 16_384;
        let device = image(&setup, blocks)?;
        let mut far = cable.target(&setup, &device, "")?;
        let far_path = match transport {
            Transport::Flexins => path(&format!("flexins://{FAR}:4420"), far.udp_port)?,
            Transport::Tcp => path(&format!("tcp://{FAR}:{}", far.tcp_port), 0)?,
        };
        let (_near, near_path) = target(&setup, &device, transport)?;
        let volume = open(vec![far_path, near_path], quick())?;
        let mut load = Load::new(&volume, blocks)?;
        load.run(SECOND)?;
        load.take(&format!("{transport:?}, before"));
        cable.cut()?;
        load.run(4 * SECOND)?;
        let (stall, errors) = load.take(&format!("{transport:?}, cut off"));
        ensure!(errors == 0, "{errors} errors");
        ensure!(stall < 2 * SECOND, "stall {stall:?}");
        cable.mend()?;
        is_used_again(&volume, &mut load, 0)?;
        load.verify()?;
        let (_, errors) = load.take(&format!("{transport:?}, healed"));
        ensure!(errors == 0, "{errors} errors");
        far.process.kill()?;
    }
    Ok(())
}
