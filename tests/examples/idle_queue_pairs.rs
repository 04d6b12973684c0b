//! Opens a number of I/O queue pairs in one thread and keeps them idle until it is killed: for measuring what one
//! costs.
//!
//! `idle_queue_pairs TRTYPE PORT COUNT` (`flexins` and the UDP port, or `tcp`) prints `ready COUNT` when they are open.

use std::io::Write as _;
use std::thread;

use anyhow::{Context, Result};
use flexblk_initiator::{ConnectOptions, Controller, Host, QueuePairOptions};
use flexblk_tests::target::SUBNQN;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let trtype = arguments.next().context("TRTYPE")?;
    let port = arguments.next().context("PORT")?;
    let port_word = match trtype.as_str() {
        "tcp" => "trsvcid",
        _ => "udp_port",
    };
    let count: u16 = arguments.next().context("COUNT")?.parse()?;
    let words = format!(
        "trtype={trtype} traddr=127.0.0.1 subnqn={SUBNQN} {port_word}={port} nr_io_queues={count}"
    );
    let controller = Controller::connect(&ConnectOptions::parse(&words, Host::load()?)?)?;
    let mut queues = Vec::new();
    for _ in 0..count.min(controller.granted_io_queues()) {
        // No bounce buffers: fio registers its memory, and so do other callers who care.
        let options = QueuePairOptions {
            bounce_bytes: Some(0),
            ..QueuePairOptions::default()
        };
        queues.push(controller.queue_pair(&options)?);
    }
    println!("ready {}", queues.len());
    std::io::stdout().flush()?;
    loop {
        thread::park();
    }
}
