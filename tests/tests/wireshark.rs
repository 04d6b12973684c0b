//! What somebody else's dissector makes of our packets: the capture of a session, read by tshark. It knows
//! RoCEv2, the connection manager's messages and NVMe over RDMA, and has none of our code.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_rpc::RpcClient;
use flexblk_tests::process::{find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// The packets of a capture that `filter` lets through, each with the values of `fields`.
fn dissect(capture: &Path, port: u16, filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut command = Command::new(find_program("tshark")?);
    command
        .arg("-r")
        .arg(capture)
        .args(["-d", &format!("udp.port=={port},infiniband")])
        .args(["-o", "ip.check_checksum:TRUE"])
        .args(["-Y", filter, "-T", "fields", "-E", "separator=;"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let dissected = run(&mut command, LIMIT)?.success()?;
    let lines = dissected.stdout.lines();
    Ok(lines
        .map(|line| line.split(';').map(str::to_owned).collect())
        .collect())
}

#[test]
fn our_packets_mean_to_wireshark_what_they_mean_to_us() -> Result<()> {
    if find_program("tshark").is_err() {
        skip::note(
            "our_packets_mean_to_wireshark_what_they_mean_to_us",
            "tshark is not installed",
        );
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let port = target.udp_port();
    setup.file("in.bin", 64 << 10, 1)?;
    for (verb, arguments) in [
        ("write", ["--input", "in.bin", "--capture", "write.pcapng"]),
        ("read", ["--length", "64K", "--capture", "read.pcapng"]),
    ] {
        setup.flexblk_at(&target, verb, &arguments)?.success()?;
    }
    for name in [
        "write.q0.pcapng",
        "write.q1.pcapng",
        "read.q0.pcapng",
        "read.q1.pcapng",
    ] {
        let capture = setup.path().join(name);
        // Malformed, or an error in the expert's eyes (0x800000).
        let wrong = dissect(
            &capture,
            port,
            "_ws.malformed || _ws.expert.severity >= 8388608",
            &["frame.number", "_ws.expert.message"],
        )?;
        assert_eq!(wrong, Vec::<Vec<String>>::new(), "{name}");
        let all = dissect(&capture, port, "udp", &["frame.number"])?.len();
        let roce = dissect(&capture, port, "infiniband.bth", &["frame.number"])?.len();
        assert_eq!(roce, all, "{name}: every packet is RoCEv2");

        // Connection set-up with RDMA-CM's service id for TCP port 4420.
        let requests = dissect(
            &capture,
            port,
            "infiniband.cm.req",
            &[
                "infiniband.bth.destqp",
                "infiniband.cm.req.serviceid.protocol",
                "infiniband.cm.req.serviceid.dport",
                "infiniband.cm.req.localqpn",
                "infiniband.cm.req.startpsn",
            ],
        )?;
        let [request] = requests.as_slice() else {
            panic!("{name}: {requests:?}");
        };
        assert_eq!(request[..3], ["0x000001", "0x06", "0x1144"]);
        // The first request has the announced sequence number; what the target sends goes to the announced
        // queue pair.
        let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16);
        let sent = dissect(
            &capture,
            port,
            &format!("udp.dstport == {port} && infiniband.bth.opcode == 4"),
            &["infiniband.bth.psn"],
        )?;
        let first: u32 = sent.first().context("a SEND")?[0].parse()?;
        assert_eq!(first, number(&request[4])?, "{name}");
        let answers = dissect(
            &capture,
            port,
            &format!("udp.srcport == {port} && infiniband.bth.destqp != 1"),
            &["infiniband.bth.destqp"],
        )?;
        assert!(answers.iter().all(|answer| answer[0] == request[3]));
    }

    let admin = setup.path().join("write.q0.pcapng");
    let fabrics = dissect(
        &admin,
        port,
        "nvme.fabrics.cmd.fctype",
        &["nvme.fabrics.cmd.fctype"],
    )?;
    let mut types: BTreeMap<String, u32> = BTreeMap::new();
    for row in fabrics {
        *types.entry(row[0].clone()).or_default() += 1;
    }
    for (fctype, name) in [
        ("0x01", "Connect"),
        ("0x00", "Property Set"),
        ("0x04", "Property Get"),
    ] {
        assert!(types.contains_key(fctype), "{name}: {types:?}");
    }
    // The commands, and where the data goes: a WRITE or READ of the length that the SQE asks for.
    for (name, opcode, rdma) in [
        ("write.q1.pcapng", "0x01", 12),
        ("read.q1.pcapng", "0x02", 10),
    ] {
        let capture = setup.path().join(name);
        let commands = dissect(&capture, port, "nvme.cmd.opc", &["nvme.cmd.opc"])?;
        assert!(
            commands.iter().any(|command| command[0] == opcode),
            "{name}: {commands:?}"
        );
        let moved = dissect(
            &capture,
            port,
            &format!(
                "udp.srcport == {port} && (infiniband.bth.opcode == {rdma} || infiniband.bth.opcode == 11)"
            ),
            &["infiniband.bth.opcode", "infiniband.reth.dmalen"],
        )?;
        assert!(!moved.is_empty(), "{name}");
        assert!(
            moved
                .iter()
                .all(|packet| packet[1].parse::<u32>().is_ok_and(|len| len > 0))
        );
    }
    Ok(())
}

#[test]
fn a_running_target_captures_from_here_to_there() -> Result<()> {
    const TEST: &str = "a_running_target_captures_from_here_to_there";
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    let read = || {
        let arguments = ["--length", "64K", "--output", "out.bin"];
        setup.flexblk_at(&target, "read", &arguments)?.success()
    };
    let file = setup.path().join("live.pcapng");
    // Before, nothing is captured; afterwards nothing more.
    read()?;
    let refused = rpc.call("flexblk_stop_capture", json!({})).unwrap_err();
    assert!(
        refused.to_string().contains("no capture is running"),
        "{refused}"
    );
    let start = |peer: &str| json!({ "file": file, "peer": peer });
    let started = rpc.call("flexblk_start_capture", start("127.0.0.1"))?;
    assert_eq!(started["files"], json!([file]));
    let refused = rpc
        .call("flexblk_start_capture", start("127.0.0.1"))
        .unwrap_err();
    assert!(refused.to_string().contains("stop it first"), "{refused}");
    read()?;
    let report = rpc.call("flexblk_stop_capture", json!({}))?;
    let recorded = report["recorded"].as_u64().context("a number")?;
    assert!(recorded > 10, "{report}");
    assert_eq!(report["not_recorded"], 0);
    read()?;
    if find_program("tshark").is_err() {
        skip::note_part(TEST, "tshark is not installed");
    } else {
        let packets = dissect(
            &file,
            target.udp_port(),
            "infiniband.bth",
            &["frame.number"],
        )?;
        assert_eq!(packets.len() as u64, recorded, "all of them are RoCEv2");
    }
    // Somebody else's packets.
    rpc.call("flexblk_start_capture", start("127.0.0.2"))?;
    read()?;
    let report = rpc.call("flexblk_stop_capture", json!({}))?;
    assert_eq!(report["recorded"], 0, "{report}");
    // Full at once.
    let small = json!({ "file": file, "limit_bytes": 500 });
    rpc.call("flexblk_start_capture", small)?;
    read()?;
    let report = rpc.call("flexblk_stop_capture", json!({}))?;
    assert!(report["not_recorded"].as_u64() > Some(10), "{report}");
    assert!(std::fs::metadata(&file)?.len() <= 500);
    let nowhere = json!({ "file": setup.path().join("no/where") });
    let refused = rpc.call("flexblk_start_capture", nowhere).unwrap_err();
    assert!(refused.to_string().contains("no/where"), "{refused}");
    let wrong = json!({ "file": file, "peer": "somebody" });
    let refused = rpc.call("flexblk_start_capture", wrong).unwrap_err();
    assert!(refused.to_string().contains("peer"), "{refused}");
    Ok(())
}
