//! A target with nothing to do costs nothing, with or without hosts connected.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use flexblk_initiator::{ConnectOptions, Controller, Host, QueuePairOptions};
use flexblk_tests::proc::CpuMeter;
use flexblk_tests::setup::Setup;
use flexblk_tests::target::{SUBNQN, Target};

fn percent_while_idle(target: &Target) -> Result<f64> {
    // What came before is to be over.
    thread::sleep(Duration::from_millis(500));
    let meter = CpuMeter::start(target.id())?;
    thread::sleep(Duration::from_secs(4));
    meter.percent()
}

#[test]
fn an_idle_target_uses_less_than_one_percent_of_a_core() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let alone = percent_while_idle(&target)?;
    assert!(alone < 1.0, "{alone:.2} % without a host");
    let words = format!(
        "trtype=flexins traddr=127.0.0.1 subnqn={SUBNQN} udp_port={}",
        target.udp_port()
    );
    let controller = Controller::connect(&ConnectOptions::parse(&words, Host::load()?)?)?;
    let queue = controller.queue_pair(&QueuePairOptions::default())?;
    let connected = percent_while_idle(&target)?;
    assert!(connected < 1.0, "{connected:.2} % with an idle host");
    drop(queue);
    Ok(())
}
