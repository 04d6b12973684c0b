//! Idleness is cheap: a target with nothing to do uses no processor time, with or without hosts connected, and a
//! queue pair that waits uses little memory.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use flexblk_initiator::{ConnectOptions, Controller, Host, QueuePairOptions};
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::proc::{CpuMeter, resident_bytes};
use flexblk_tests::process::{Process, eventually};
use flexblk_tests::setup::Setup;
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};

/// What the target and this process, its host, use of a core.
fn percent_while_idle(target: &Target) -> Result<[f64; 2]> {
    // What came before is to be over.
    thread::sleep(Duration::from_millis(500));
    let meters = [
        CpuMeter::start(target.id())?,
        CpuMeter::start(std::process::id())?,
    ];
    thread::sleep(Duration::from_secs(4));
    Ok([meters[0].percent()?, meters[1].percent()?])
}

#[test]
fn an_idle_target_and_its_host_use_less_than_one_percent_of_a_core() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let [alone, _] = percent_while_idle(&target)?;
    assert!(alone < 1.0, "{alone:.2} % without a host");
    // The polling budget is that of a thread which turns queue pairs; none does here.
    let words = format!(
        "trtype=flexins traddr=127.0.0.1 subnqn={SUBNQN} udp_port={} poll_budget_us=60000000",
        target.udp_port()
    );
    let controller = Controller::connect(&ConnectOptions::parse(&words, Host::load()?)?)?;
    let queue = controller.queue_pair(&QueuePairOptions::default())?;
    let [connected, host] = percent_while_idle(&target)?;
    assert!(connected < 1.0, "{connected:.2} % with an idle host");
    assert!(host < 1.0, "{host:.2} % of the idle host itself");
    drop(queue);
    Ok(())
}

/// Memory of initiator and target with so many idle queue pairs, all of one thread.
fn resident_with(
    setup: &Setup,
    target: &Target,
    (trtype, port): (&str, u16),
    queue_pairs: u64,
) -> Result<[u64; 2]> {
    let mut command = Command::new(&setup.binaries().idle_queue_pairs);
    command.args([trtype, &port.to_string(), &queue_pairs.to_string()]);
    let mut process = Process::spawn(&mut command, "idle", setup.path())?;
    let ready = format!("ready {queue_pairs}\n");
    eventually("the queue pairs are open", Duration::from_secs(30), || {
        process.stdout().contains("ready") || !matches!(process.status(), Ok(None))
    })?;
    ensure!(process.stdout().contains(&ready), "{}", process.tail());
    Ok([resident_bytes(process.id())?, resident_bytes(target.id())?])
}

#[test]
fn an_idle_queue_pair_costs_each_side_less_than_64_kib() -> Result<()> {
    let setup = Setup::new()?;
    let tcp_port = free_tcp_port()?;
    let target = setup.target_with(TargetOptions {
        tcp_port: Some(tcp_port),
        ..TargetOptions::with_devices(&["ram:16M"])
    })?;
    for at in [("flexins", target.udp_port()), ("tcp", tcp_port)] {
        // The first brings the thread's reactor and endpoint and the controller with it.
        let one = resident_with(&setup, &target, at, 1)?;
        let many = resident_with(&setup, &target, at, 64)?;
        for (side, what) in ["initiator", "target"].into_iter().enumerate() {
            let each = many[side].saturating_sub(one[side]) / 63;
            println!("{}: {} KiB in the {what}", at.0, each >> 10);
            ensure!(
                each < 64 << 10,
                "{}: {} KiB in the {what}",
                at.0,
                each >> 10
            );
        }
    }
    Ok(())
}
