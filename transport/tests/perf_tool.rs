//! flexins-perf: every test runs, verifies its bytes and prints numbers that other programs read.
#![cfg(feature = "perf")]

use std::process::{Command, Output};

use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    let cores = flexblk_reactor::affinity::allowed_cores().unwrap();
    let cores = format!("{},{}", cores[0], cores[cores.len() - 1]);
    Command::new(env!("CARGO_BIN_EXE_flexins-perf"))
        .args(arguments)
        .args(["--seconds", "0.1", "--cores", &cores])
        .output()
        .unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(report: &Value, name: &str) -> f64 {
    report[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[test]
fn ceilings_are_measured() {
    for test in ["udp-stream", "tcp-stream", "port-stream"] {
        let report = json(&[test, "--size", "1024", "--train", "8"]);
        assert!(number(&report, "blocks_per_second") > 0.0);
        let (sent, received) = (number(&report, "sent"), number(&report, "received"));
        assert!(received > 0.0 && received <= sent, "{report}");
    }
    for to in ["host", "network"] {
        let report = json(&["relay", "--to", to, "--size", "10000"]);
        let (sent, received) = (number(&report, "sent"), number(&report, "received"));
        assert!(received > 0.0 && received == sent, "{report}");
    }
    let report = json(&["udp-rtt", "--size", "84", "--reply-size", "4136"]);
    let (p50, p99) = (number(&report, "p50_us"), number(&report, "p99_us"));
    assert!(p50 > 0.1 && p99 >= p50, "{report}");
}

#[test]
fn an_engine_thread_is_measured_too() {
    for test in ["write", "read", "send"] {
        let report = json(&[test, "--mode", "thread", "--depth", "8"]);
        assert!(number(&report, "ops_per_second") > 0.0, "{report}");
        assert_eq!(number(&report, "tx_copies_per_payload_byte"), 0.0);
        let packets = number(&report, "data_packets_per_op");
        assert!(packets >= 1.0, "counted by the engine thread: {report}");
    }
}

#[test]
fn verbs_are_measured_and_their_bytes_compared() {
    for test in ["write", "read", "send"] {
        for mode in [
            ["header-only", "in-cache", "crc32c"],
            ["copy", "ring", "none"],
        ] {
            let [tx, rx, digest] = mode;
            let report = json(&[
                test, "--depth", "16", "--tx", tx, "--rx", rx, "--digest", digest,
            ]);
            assert!(number(&report, "ops_per_second") > 0.0, "{report}");
            assert!(
                number(&report, "p99_us") >= number(&report, "p50_us"),
                "{report}"
            );
            let copies = number(&report, "tx_copies_per_payload_byte");
            assert!(
                if tx == "copy" {
                    copies > 0.9
                } else {
                    copies == 0.0
                },
                "{report}"
            );
        }
    }
    let report = json(&[
        "read",
        "--fault",
        "loss=0.02,corrupt=0.01",
        "--connections",
        "4",
    ]);
    assert!(
        number(&report, "retransmissions") + number(&report, "crc_failures") > 0.0,
        "{report}"
    );
}

#[test]
fn wrong_arguments_are_refused_with_a_reason() {
    for (arguments, reason) in [
        (&["send", "--size", "16384"][..], "--mtu"),
        (&["read", "--fault", "loss=2"], "loss"),
        (&["read", "--depth", "0"], "depth"),
        (&["nothing"], "nothing"),
    ] {
        let output = run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && errors.contains(reason),
            "{arguments:?}: {errors}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_flexins-perf"))
        .args(["udp-rtt", "--cores", "1000", "--seconds", "0.1"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && errors.contains("core 1000"),
        "{errors}"
    );
}
