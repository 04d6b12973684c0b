//! Hosts that vanish: their network is cut with data under way, and nobody tells the target.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flexblk_initiator::{
    Command, ConnectOptions, Controller, Host, Nsid, QueuePair, QueuePairOptions, SharedMemory,
};
use flexblk_reactor::HugePages;
use flexblk_rpc::RpcClient;
use flexblk_tests::cable::{Cable, FAR, with_cable};
use flexblk_tests::proc::{anonymous_bytes, descriptors};
use flexblk_tests::process::eventually;
use flexblk_tests::setup::Setup;
use flexblk_tests::target::SUBNQN;
use serde_json::json;

const READ_BYTES: u32 = 128 << 10;
const DEPTH: u32 = 16;
/// The target's `longest_silence_s`.
const SILENCE: Duration = Duration::from_secs(5);

#[test]
fn a_target_ends_what_its_network_has_lost() -> Result<()> {
    with_cable("a_target_ends_what_its_network_has_lost", cut_off)
}

/// Reads all the time, until the connection is lost.
fn read_for_ever(mut queue: QueuePair) -> Result<()> {
    let memory = SharedMemory::create(
        "reads",
        u64::from(READ_BYTES) * u64::from(DEPTH),
        HugePages::No,
    )?;
    queue.register_memory(&memory)?;
    let mut done = Vec::new();
    let submit = |queue: &mut QueuePair, slot: u64| -> Result<()> {
        let span = memory.span(slot * u64::from(READ_BYTES), READ_BYTES);
        let read = Command::read(Nsid::new(1), 0, READ_BYTES / 512, span.context("a span")?);
        queue.submit(&read, slot)?;
        Ok(())
    };
    for slot in 0..u64::from(DEPTH) {
        submit(&mut queue, slot)?;
    }
    loop {
        queue.wait(Duration::from_secs(1), 1, &mut done);
        for completion in done.drain(..) {
            if completion.result.is_err() {
                return Ok(());
            }
            submit(&mut queue, completion.tag)?;
        }
    }
}

/// Both transports without Keep Alive, so that only the transport can tell, and NVMe/TCP with it. Each host has a
/// queue that reads without a pause, and one that is idle.
fn cut_off(cable: &Cable) -> Result<()> {
    let setup = Setup::new()?;
    let extra = format!("longest_silence_s = {}", SILENCE.as_secs());
    let far = cable.target(&setup, "ram:64M", &extra)?;
    let pid = far.process.id();
    let mut rpc = RpcClient::connect(&far.rpc_socket)?;
    let mut controllers = || -> Result<usize> {
        let answer = rpc.call("nvmf_subsystem_get_controllers", json!({ "nqn": SUBNQN }))?;
        Ok(answer.as_array().context("a list")?.len())
    };
    let tcp = format!("trtype=tcp traddr={FAR} trsvcid={}", far.tcp_port);
    let flexins = format!("trtype=flexins traddr={FAR} udp_port={}", far.udp_port);
    let hosts = [
        format!("{tcp} kato_ms=0"),
        format!("{tcp} kato_ms=2000"),
        format!("{flexins} kato_ms=0"),
    ];
    let connect = || {
        let connect = |words: &String| -> Result<Controller> {
            let words = format!("{words} subnqn={SUBNQN} nr_io_queues=2 io_timeout_ms=4000");
            Ok(Controller::connect(&ConnectOptions::parse(
                &words,
                Host::load()?,
            )?)?)
        };
        hosts.iter().map(connect).collect::<Result<Vec<_>>>()
    };
    // The first time brings what stays.
    drop(connect()?);
    eventually("the first hosts are gone", 2 * SILENCE, || {
        matches!(controllers(), Ok(0))
    })?;
    let before = (descriptors(pid)?, anonymous_bytes(pid)?);
    let all = connect()?;
    let idle = all
        .iter()
        .map(|controller| controller.queue_pair(&QueuePairOptions::default()))
        .collect::<Result<Vec<_>, _>>()?;
    ensure!(controllers()? == hosts.len(), "not all are connected");
    thread::scope(|scope| {
        for controller in &all {
            scope.spawn(move || -> Result<()> {
                read_for_ever(controller.queue_pair(&QueuePairOptions::default())?)
            });
        }
        thread::sleep(Duration::from_millis(500));
        cable.cut()?;
        let began = Instant::now();
        let is_over = || {
            let gone = matches!(controllers(), Ok(0));
            gone && matches!(descriptors(pid), Ok(count) if count <= before.0)
        };
        eventually("the target has ended everything", 5 * SILENCE, is_over)?;
        println!("everything ended after {:?}", began.elapsed());
        anyhow::Ok(())
    })?;
    let after = anonymous_bytes(pid)?;
    ensure!(
        after < before.1 + (2 << 20),
        "memory {} -> {after}",
        before.1
    );
    drop((idle, all));
    cable.mend()?;
    // It goes on for whoever comes now.
    let again = connect()?;
    ensure!(controllers()? == hosts.len(), "not all came back");
    drop(again);
    Ok(())
}
