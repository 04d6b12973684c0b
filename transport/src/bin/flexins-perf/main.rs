//! Measures FlexiNS and what is below it on this machine, like perftest's tools for RDMA: each test
//! runs a client and a server thread, pinned to a core each, over 127.0.0.1.
//!
//! `udp-stream` and `udp-rtt` are the ceilings (plain sockets, no FlexiNS), `tcp-stream` is that of
//! NVMe/TCP, `relay` that of an export over it, `port-stream` is the UDP port without the engine, `write`, `read` and `send` are the verbs.

mod args;
mod cpu;
mod engine_thread;
mod port_stream;
mod relay;
mod report;
mod socket;
mod stream_memory;
mod tally;
mod tcp_stream;
mod udp_rtt;
mod udp_stream;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Test};

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.test {
        Test::UdpStream(options) => udp_stream::run(&args, options),
        Test::TcpStream(options) => tcp_stream::run(&args, options),
        Test::Relay(options) => relay::run(&args, options),
        Test::UdpRtt(options) => udp_rtt::run(&args, options),
        Test::PortStream(options) => port_stream::run(&args, options),
        Test::Write(options) => verbs::run(&args, options, verbs::Operation::Write),
        Test::Read(options) => verbs::run(&args, options, verbs::Operation::Read),
        Test::Send(options) => verbs::run(&args, options, verbs::Operation::Send),
    };
    match outcome {
        Ok(report) => {
            report.print(args.json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("flexins-perf: {error:#}");
            ExitCode::FAILURE
        }
    }
}
