//! Managing a target that serves: by SPDK's own client, and while I/O takes all it can.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flexblk_initiator::{ConnectOptions, Controller, Host};
use flexblk_rpc::RpcClient;
use flexblk_tests::process::{Process, eventually, find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use flexblk_tests::spdk::Spdk;
use flexblk_tests::spdk_rpc::SpdkRpc;
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};
use serde_json::{Value, json};

fn host_of(target: &Target) -> Result<Controller> {
    let words = format!(
        "trtype=flexins traddr=127.0.0.1 subnqn={SUBNQN} udp_port={} nr_io_queues=2",
        target.udp_port()
    );
    Ok(Controller::connect(&ConnectOptions::parse(
        &words,
        Host::load()?,
    )?)?)
}

#[test]
fn spdk_rpc_drives_the_target() -> Result<()> {
    let Some(spdk_rpc) = SpdkRpc::or_skip("spdk_rpc_drives_the_target") else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let rpc = spdk_rpc.at(&target);
    let nqn = "nqn.2016-06.io.spdk:cnode1";
    let version = rpc.json(&["spdk_get_version"])?;
    assert!(
        version["version"]
            .as_str()
            .context("text")?
            .contains("flexblk")
    );
    assert_eq!(
        rpc.ok(&["bdev_malloc_create", "-b", "m0", "16", "512"])?,
        "m0"
    );
    assert_eq!(rpc.ok(&["bdev_null_create", "n0", "100", "4096"])?, "n0");
    assert_eq!(rpc.ok(&["bdev_null_resize", "n0", "200"])?, "true");
    let image = setup.path().join("a.img");
    fs::write(&image, vec![0; 1 << 20])?;
    let image = image.display().to_string();
    assert_eq!(rpc.ok(&["bdev_aio_create", &image, "a0", "512"])?, "a0");
    let delay = [
        "bdev_delay_create",
        "-b",
        "m0",
        "-d",
        "d0",
        "-r",
        "1",
        "-t",
        "2",
        "-w",
        "3",
        "-n",
        "4",
    ];
    assert_eq!(rpc.ok(&delay)?, "d0");
    rpc.ok(&["nvmf_create_transport", "-t", "FLEXINS"])?;
    rpc.ok(&["nvmf_create_subsystem", nqn, "-s", "SPDK1", "-a"])?;
    rpc.ok(&["nvmf_subsystem_add_ns", nqn, "d0", "-n", "3"])?;
    let listen = ["-t", "flexins", "-a", "127.0.0.1", "-s", "4420"];
    rpc.ok(&[&["nvmf_subsystem_add_listener", nqn], &listen[..]].concat())?;
    rpc.ok(&["nvmf_subsystem_add_host", nqn, "nqn.2026-11.test:host"])?;
    rpc.ok(&["nvmf_subsystem_allow_any_host", nqn, "--no-allow-any-host"])?;
    let shown = rpc.json(&["nvmf_get_subsystems", nqn])?;
    assert_eq!(shown[0]["namespaces"][0]["nsid"], 3);
    assert_eq!(shown[0]["hosts"][0]["nqn"], "nqn.2026-11.test:host");

    let _host = host_of(&target)?;
    let controllers = rpc.json(&["nvmf_subsystem_get_controllers", SUBNQN])?;
    assert_eq!(controllers[0]["cntrltype"], "io");
    let queues = rpc.json(&["nvmf_subsystem_get_qpairs", SUBNQN])?;
    assert_eq!(queues[0]["qid"], 0);
    assert_eq!(queues[0]["state"], "enabled");
    assert_eq!(queues[0]["peer_address"]["traddr"], "127.0.0.1");
    let stats = rpc.json(&["nvmf_get_stats"])?;
    assert_eq!(stats["poll_groups"][0]["current_admin_qpairs"], 1);

    rpc.ok(&["bdev_delay_update_latency", "d0", "p99_read", "7"])?;
    let pollers = rpc.json(&["thread_get_pollers"])?;
    assert_eq!(pollers["threads"][0]["name"], "data-0");
    let scheduler = rpc.json(&["framework_get_scheduler"])?;
    assert_eq!(scheduler["scheduler_name"], "static");
    rpc.ok(&["bdev_enable_histogram", "--histogram", "d0"])?;

    let wrong = rpc.run(&["nvmf_subsystem_add_ns", nqn, "nothing"])?;
    assert!(wrong.success().is_err(), "a wrong name is refused");

    // A batch in one array, which the client makes of its standard input.
    let batch = setup.path().join("batch");
    fs::write(
        &batch,
        "bdev_malloc_create -b z 8 512\nbdev_malloc_delete z\n",
    )?;
    let line = format!("exec \"$@\" -s {} -b < {}", rpc.socket, batch.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", &line, "sh"]).args(spdk_rpc.words());
    let answered = run(&mut shell, Duration::from_secs(30))?.success()?;
    assert!(answered.stdout.contains("\"z\""), "{}", answered.stdout);

    // Saved here, loaded into a target that has nothing.
    let saved = rpc.ok(&["save_config"])?;
    let file = setup.path().join("saved.json");
    fs::write(&file, &saved)?;
    let directory = setup.path().join("second");
    fs::create_dir(&directory)?;
    drop(target);
    let empty = TargetOptions {
        no_subsystem: true,
        ..TargetOptions::default()
    };
    let second = Target::start(setup.binaries(), &directory, empty)?;
    let rpc = spdk_rpc.at(&second);
    let file = file.display().to_string();
    rpc.ok(&["load_config", "-j", &file])?;
    assert_eq!(rpc.ok(&["save_config"])?, saved);
    Ok(())
}

/// What a host does is counted under its name, by namespace and operation, with the time and where it
/// went; a device that is slow is named in the log.
#[test]
fn io_is_counted_by_host_and_namespace() -> Result<()> {
    let setup = Setup::new()?;
    let options = TargetOptions {
        extra: "[management]\nmetrics = \"127.0.0.1:0\"\nslow_io_us = 1000".to_owned(),
        no_subsystem: true,
        ..TargetOptions::default()
    };
    let target = setup.target_with(options)?;
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    slow_reads(&mut rpc)?;
    setup.file("in.bin", 64 << 10, 1)?;
    setup
        .flexblk_at(&target, "write", &["-i", "in.bin", "--offset", "0"])?
        .success()?;
    let read = ["--length", "64k", "--offset", "0", "-o", "out.bin"];
    setup.flexblk_at(&target, "read", &read)?.success()?;

    let io = rpc.call("flexblk_get_io", json!({}))?;
    let series = io["series"].as_array().context("series")?;
    assert_eq!(series.len(), 1, "{io:#}");
    let series = &series[0];
    assert_eq!(
        (&series["nsid"], &series["bdev_name"]),
        (&json!(1), &json!("slow"))
    );
    let host = series["host"].as_str().context("host")?;
    assert!(host.starts_with("nqn."), "{host}");
    assert_eq!(series["read"]["bytes"], 64 << 10, "{io:#}");
    assert_eq!(series["write"]["bytes"], 64 << 10);
    let reads = series["read"]["commands"].as_u64().context("reads")?;
    let backend = series["read"]["backend"]["sum_us"]
        .as_u64()
        .context("time")?;
    assert!(
        backend >= reads * 4900,
        "{reads} reads of 5 ms took {backend} us"
    );
    let iostat = rpc.call("bdev_get_iostat", json!({ "names": ["slow"] }))?;
    assert_eq!(iostat["bdevs"][0]["bytes_read"], 64 << 10);
    assert_eq!(iostat["bdevs"][0]["num_read_ops"], reads);
    rpc.call("bdev_reset_iostat", json!({}))?;
    let iostat = rpc.call("bdev_get_iostat", json!({ "names": ["slow"] }))?;
    assert_eq!(iostat["bdevs"][0]["bytes_read"], 0);

    let text = scrape(&target)?;
    let labels = format!("host=\"{host}\",subsystem=\"{SUBNQN}\",nsid=\"1\",operation=\"read\"");
    for wanted in [
        format!("flexblk_commands_total{{{labels}}} {reads}\n"),
        format!("flexblk_data_bytes_total{{{labels}}} 65536\n"),
        format!("flexblk_command_duration_seconds_count{{{labels},stage=\"backend\"}} {reads}\n"),
        format!(
            "flexblk_command_duration_seconds_bucket{{le=\"+Inf\",{labels},stage=\"total\"}} {reads}\n"
        ),
    ] {
        assert!(text.contains(&wanted), "{wanted}\nnot in\n{text}");
    }
    // Every line is a comment, or a name with labels and a number.
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').context("a value")?;
        assert!(value.parse::<f64>().is_ok(), "{line}");
        assert!(name.starts_with("flexblk_"), "{line}");
    }
    let log = target.output();
    let slow = log.lines().find(|line| line.contains("what=\"slow\""));
    let slow = slow.with_context(|| log.clone())?;
    for wanted in [
        host,
        "cntlid=",
        "qid=",
        "cid=",
        "nsid=1",
        "lba=",
        "backend_us=",
    ] {
        assert!(slow.contains(wanted), "{wanted}: {slow}");
    }
    // Each command of a host, from now on.
    rpc.call("flexblk_set_slow_io", json!({ "threshold_us": 0 }))?;
    rpc.call(
        "flexblk_trace_host",
        json!({ "host": host, "enable": true }),
    )?;
    setup
        .flexblk_at(&target, "write", &["-i", "in.bin", "--offset", "0"])?
        .success()?;
    assert!(target.output().contains("what=\"traced\""));
    Ok(())
}

/// A namespace on a delay device whose reads take 5 ms and more, over memory.
fn slow_reads(rpc: &mut RpcClient) -> Result<()> {
    for (method, params) in [
        (
            "bdev_malloc_create",
            json!({ "name": "m", "block_size": 512, "num_blocks": 32768 }),
        ),
        (
            "bdev_delay_create",
            json!({
                "name": "slow", "base_bdev_name": "m", "avg_read_latency": 5000,
                "p99_read_latency": 5000, "avg_write_latency": 0, "p99_write_latency": 0,
            }),
        ),
        (
            "nvmf_create_subsystem",
            json!({ "nqn": SUBNQN, "allow_any_host": true }),
        ),
        (
            "nvmf_subsystem_add_ns",
            json!({ "nqn": SUBNQN, "namespace": { "bdev_name": "slow" } }),
        ),
    ] {
        rpc.call(method, params)?;
    }
    Ok(())
}

/// What a device takes is counted by device and kind of I/O, with the shortest and longest time and,
/// when that is turned on, as a histogram; latencies that are changed show at once.
#[test]
fn a_devices_latencies_are_counted() -> Result<()> {
    let setup = Setup::new()?;
    let options = TargetOptions {
        no_subsystem: true,
        ..TargetOptions::default()
    };
    let target = setup.target_with(options)?;
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    slow_reads(&mut rpc)?;
    let reads = json!({ "name": "slow", "enable": true, "opc": "read" });
    rpc.call("bdev_enable_histogram", reads)?;
    setup.file("in.bin", 64 << 10, 1)?;
    let zero = ["-i", "in.bin", "--offset", "0"];
    let read = ["--length", "64k", "--offset", "0", "-o", "out.bin"];
    setup.flexblk_at(&target, "write", &zero)?.success()?;
    setup.flexblk_at(&target, "read", &read)?.success()?;
    let ranges = ["--slbs", "8,64", "--blocks", "8,24", "--ad"];
    setup.flexblk_at(&target, "dsm", &ranges)?.success()?;
    // What was written is no more in blocks 8 to 15.
    let compare = [
        "--start-block",
        "8",
        "--block-count",
        "7",
        "--data",
        "in.bin",
    ];
    let differs = setup.flexblk_at(&target, "compare", &compare)?;
    assert_eq!(differs.code, Some(7), "{}", differs.stderr);

    let mut iostat = |mode: &str| -> Result<Value> {
        let params = json!({ "names": ["slow"], "reset_mode": mode });
        let answer = rpc.call("bdev_get_iostat", params)?;
        assert_eq!(answer["tick_rate"], 1_000_000);
        Ok(answer["bdevs"][0].clone())
    };
    let first = iostat("maxmin")?;
    let number = |of: &Value, key: &str| of[key].as_u64().with_context(|| format!("{key}: {of:#}"));
    let operations = number(&first, "num_read_ops")?;
    assert_eq!(first["bytes_read"], 64 << 10);
    assert_eq!(first["bytes_written"], 64 << 10);
    assert_eq!(
        (&first["num_unmap_ops"], &first["bytes_unmapped"]),
        (&json!(2), &json!(32 * 512)),
        "each range is an I/O"
    );
    assert_eq!(first["io_error"], json!({ "miscompare": 1 }));
    let (shortest, longest) = (
        number(&first, "min_read_latency_ticks")?,
        number(&first, "max_read_latency_ticks")?,
    );
    // The thread's clock is read once in a turn.
    assert!(shortest >= 4900 && longest >= shortest, "{first:#}");
    let sum = number(&first, "read_latency_ticks")?;
    assert!((shortest * operations..=longest * operations).contains(&sum));
    let second = iostat("none")?;
    assert_eq!(second["max_read_latency_ticks"], 0);
    assert_eq!(second["num_read_ops"], operations);

    let params = json!({ "names": ["slow"], "per_channel": true });
    let channels = rpc.call("bdev_get_iostat", params)?;
    let channels = channels["channels"].as_array().context("channels")?;
    let all: u64 = channels
        .iter()
        .filter_map(|channel| channel["bytes_read"].as_u64())
        .sum();
    assert_eq!(all, 64 << 10);

    let borders = json!({ "name": "slow", "borders": [4000, 60_000_000] });
    let counted = rpc.call("bdev_get_histogram_borders", borders.clone())?;
    let wanted = [0, operations, operations];
    assert_eq!(counted["borders_count"], json!(wanted));

    // The same connection's reads are as fast as the memory below, from one I/O to the next.
    for latency_type in ["avg_read", "p99_read"] {
        let fast = json!({
            "delay_bdev_name": "slow", "latency_type": latency_type, "latency_us": 0,
        });
        rpc.call("bdev_delay_update_latency", fast)?;
    }
    eventually("a read is fast", Duration::from_secs(20), || {
        let ran = setup.flexblk_at(&target, "read", &read);
        let counted = rpc.call("bdev_get_histogram_borders", borders.clone());
        ran.is_ok_and(|ran| ran.success().is_ok())
            && counted.is_ok_and(|counted| counted["borders_count"][0] != 0)
    })?;
    Ok(())
}

/// SPDK's client asks for a histogram, and its script reads it.
#[test]
fn spdk_reads_our_histograms() -> Result<()> {
    let test = "spdk_reads_our_histograms";
    let (Some(spdk_rpc), Some(spdk)) = (SpdkRpc::or_skip(test), Spdk::or_skip(test)) else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let options = TargetOptions {
        no_subsystem: true,
        ..TargetOptions::default()
    };
    let target = setup.target_with(options)?;
    slow_reads(&mut RpcClient::connect(&target.rpc_socket())?)?;
    let rpc = spdk_rpc.at(&target);
    let enable = ["bdev_enable_histogram", "--histogram", "slow"];
    rpc.ok(&[&enable[..], &["--opc", "read", "--granularity", "8"]].concat())?;
    let read = ["--length", "64k", "--offset", "0", "-o", "out.bin"];
    setup.flexblk_at(&target, "read", &read)?.success()?;
    let iostat = rpc.json(&["bdev_get_iostat", "--names", "slow", "--reset-mode", "all"])?;
    let reads = iostat["bdevs"][0]["num_read_ops"]
        .as_u64()
        .context("reads")?;
    fs::write(
        setup.path().join("histogram"),
        rpc.ok(&["bdev_get_histogram", "slow"])?,
    )?;
    let line = "exec python3 \"$0\" < histogram";
    let mut script = Command::new("sh");
    script.args(["-c", line]).arg(spdk.script("histogram.py"));
    script.current_dir(setup.path());
    let printed = run(&mut script, Duration::from_secs(30))?.success()?.stdout;
    // Lines such as `5024.000 -  5040.000:  50.0000%  (        1)`.
    let mut counted = 0;
    for row in printed.lines().filter(|line| line.contains('%')) {
        let (range, rest) = row.split_once(':').context("a range")?;
        let (begin, _) = range.split_once('-').context("two ends")?;
        let begin: f64 = begin.trim().parse()?;
        assert!(begin >= 4800.0, "{printed}");
        let (_, count) = rest.split_once('(').context("a count")?;
        counted += count.trim_end_matches(')').trim().parse::<u64>()?;
    }
    assert_eq!(counted, reads, "{printed}");
    rpc.ok(&["bdev_enable_histogram", "--no-histogram", "slow"])?;
    assert!(rpc.ok(&["bdev_get_histogram", "slow"]).is_err());
    Ok(())
}

/// SPDK's view of threads, pollers and cores has ours.
#[test]
fn spdk_top_shows_the_data_threads() -> Result<()> {
    let test = "spdk_top_shows_the_data_threads";
    let Some(spdk) = Spdk::or_skip(test) else {
        return Ok(());
    };
    if find_program("script").is_err() {
        skip::note(
            test,
            "no terminal for spdk_top: script (util-linux) is not in PATH",
        );
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    // Each key is pressed when what the one before has led to is on the screen.
    let line = r#"
        until_shown() { for i in $(seq 200); do grep -q "$1" screen && return; sleep 0.1; done; }
        touch screen
        (until_shown data-0; printf 2; until_shown block_devices; printf 3; sleep 1; printf q) |
            TERM=xterm script -qefc "stty rows 40 cols 160; exec $0 -r $1" screen
    "#;
    let mut shell = Command::new("sh");
    shell.args(["-c", line]).arg(spdk.program("spdk_top")?);
    shell.arg(target.rpc_socket()).current_dir(setup.path());
    run(&mut shell, Duration::from_secs(60))?.success()?;
    let screen = fs::read_to_string(setup.path().join("screen"))?;
    for wanted in [
        "data-0",
        "block_devices",
        "flexins",
        "mailbox",
        "tcp",
        "timers",
    ] {
        assert!(screen.contains(wanted), "{wanted}: {screen}");
    }
    Ok(())
}

fn scrape(target: &Target) -> Result<String> {
    use std::io::{Read as _, Write as _};
    let output = target.output();
    let url = output
        .lines()
        .find_map(|line| line.strip_prefix("metrics: http://"))
        .context("an address")?;
    let address = url.strip_suffix("/metrics").context("a path")?;
    let mut socket = std::net::TcpStream::connect(address)?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("a body")?;
    Ok(body.to_owned())
}

/// The 99th of a hundred requests is answered within 10 ms while reads take a core whole: once with
/// management on the other core, and once when it has to share. Other tests may want the cores too:
/// the best of several seconds counts.
#[test]
fn requests_are_answered_while_io_saturates_the_core() -> Result<()> {
    for shares in [false, true] {
        let setup = Setup::new()?;
        let options = TargetOptions {
            core: shares.then_some(0),
            extra: match shares {
                true => String::new(),
                false => "cores = \"0\"".to_owned(),
            },
            ..TargetOptions::with_devices(&["ram:16M"])
        };
        let target = setup.target_with(options)?;
        let mut load = Command::new(&setup.binaries().flexblk);
        load.arg("bench").args(target.address());
        load.args(["--iodepth", "64", "--time", "60s", "--cores", "1"]);
        let mut load = Process::spawn(&mut load, "load", setup.path())?;
        let mut rpc = RpcClient::connect(&target.rpc_socket())?;
        let before = reads(&mut rpc)?;
        eventually("the load runs", Duration::from_secs(20), || {
            reads(&mut rpc).is_ok_and(|reads| reads > before + 1000)
        })?;
        // What is measured is the target: this client must not be what waits. Only root may, and
        // only now, since children inherit it.
        let priority = |nice| rustix::process::setpriority_process(None, nice);
        if priority(-15).is_err() {
            println!("the client keeps its priority, and may itself wait for a core");
        }
        let mut best = Duration::MAX;
        for _ in 0..10 {
            let before = reads(&mut rpc)?;
            let p99 = p99_of_a_second(&mut rpc)?;
            let during = reads(&mut rpc)? - before;
            let core = if shares {
                "the data thread's"
            } else {
                "another"
            };
            println!("management on {core} core: p99 {p99:?}, {during} reads meanwhile");
            if during > 1000 {
                best = best.min(p99);
            }
            if best < Duration::from_millis(10) {
                break;
            }
        }
        load.kill()?;
        assert!(
            best < Duration::from_millis(10),
            "shares {shares}: {best:?}"
        );
    }
    Ok(())
}

fn reads(rpc: &mut RpcClient) -> Result<u64> {
    let stats = rpc.call("flexblk_get_stats", json!({}))?;
    stats["subsystems"][SUBNQN]["reads"]
        .as_u64()
        .context("reads")
}

fn p99_of_a_second(rpc: &mut RpcClient) -> Result<Duration> {
    let mut times = Vec::new();
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        for (method, params) in [
            ("nvmf_get_subsystems", json!({})),
            ("nvmf_get_stats", json!({})),
            (
                "nvmf_subsystem_allow_any_host",
                json!({ "nqn": SUBNQN, "allow_any_host": true }),
            ),
        ] {
            let began = Instant::now();
            rpc.call(method, params)?;
            times.push(began.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    times.sort_unstable();
    Ok(times[times.len() * 99 / 100])
}
