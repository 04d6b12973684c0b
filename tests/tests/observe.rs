//! Looking at a target that works: `flexblk top`, `flexblk telemetry-log`, the journal.

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_tests::ports::free_udp_port;
use flexblk_tests::process::{Finished, Process, eventually, find_program, is_root, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use flexblk_tests::target::{SUBNQN, Target};
use rustix::process::Signal;
use serde_json::Value;

const HOST: &str = "nqn.2026-11.dev.flexblk:busy-host";

/// Reads and writes for some seconds.
fn load(setup: &Setup, target: &Target) -> Result<Process> {
    let mut bench = Command::new(&setup.binaries().flexblk);
    bench.arg("bench").args(target.address());
    bench.args([
        "--rw",
        "randrw",
        "--bs",
        "4k",
        "--iodepth",
        "4",
        "--time",
        "20",
    ]);
    bench.args(["--overwrite", "--hostnqn", HOST]);
    Process::spawn(&mut bench, "bench", setup.path())
}

fn top(setup: &Setup, target: &Target, arguments: &[&str]) -> Result<Finished> {
    let socket = target.rpc_socket().display().to_string();
    let mut all = vec!["top", "--rpc-socket", &socket];
    all.extend(arguments);
    setup.flexblk(&all)
}

#[test]
fn top_shows_who_does_what() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let idle = top(&setup, &target, &["--once", "--interval", "200ms"])?.success()?;
    assert!(idle.stdout.contains("no I/O"), "{}", idle.stdout);
    assert!(idle.stdout.contains("data-0"), "{}", idle.stdout);

    let _load = load(&setup, &target)?;
    let json = ["--once", "--json", "--interval", "300ms"];
    let mut shown = Value::Null;
    // The load has to connect first.
    for _ in 0..30 {
        shown = serde_json::from_str(&top(&setup, &target, &json)?.success()?.stdout)?;
        if shown["io"].as_array().is_some_and(|io| io.len() == 2) {
            break;
        }
    }
    assert_eq!(shown["io"].as_array().context("io")?.len(), 2, "{shown}");
    for io in shown["io"].as_array().context("io")? {
        assert_eq!(
            (&io["host"], &io["subsystem"]),
            (&HOST.into(), &SUBNQN.into())
        );
        assert_eq!(io["nsid"], 1);
        let number = |key: &str| io[key].as_f64().with_context(|| format!("{key} in {io}"));
        assert!(number("iops")? > 0.0, "{io}");
        let expected = number("iops")? * 4096.0;
        assert!(
            (number("bytes_per_s")? / expected - 1.0).abs() < 0.01,
            "{io}"
        );
        let parts = number("wait_us")? + number("network_us")? + number("backend_us")?;
        assert!(parts <= number("mean_us")? + 0.1, "{io}");
    }
    let thread = &shown["threads"][0];
    assert!(thread["queues"].as_u64() >= Some(2), "{thread}");
    assert!(thread["busy_percent"].as_f64() > Some(0.0), "{thread}");

    // Sorted, and one line of a table for each of them.
    let text = top(
        &setup,
        &target,
        &["--once", "--interval", "300ms", "--sort", "bandwidth"],
    )?;
    let text = text.success()?.stdout;
    assert!(text.contains("by bandwidth"), "{text}");
    assert_eq!(
        text.lines().filter(|line| line.contains(HOST)).count(),
        2,
        "{text}"
    );
    Ok(())
}

/// On a terminal it draws a screen, obeys a key and leaves the terminal as it was; a terminal that
/// cannot be drawn on gets one table after another.
#[test]
fn top_on_a_terminal() -> Result<()> {
    let Ok(script) = find_program("script") else {
        skip::note(
            "top_on_a_terminal",
            "no script(1) of util-linux, which makes a terminal",
        );
        return Ok(());
    };
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let flexblk = setup.binaries().flexblk.display().to_string();
    let command = format!(
        "stty rows 24 cols 80; {flexblk} top -r {} -i 200ms; stty -a",
        target.rpc_socket().display()
    );
    // Keys after a second, in which it has drawn several times.
    let typed = |keys: &[&str], term: &str| -> Result<String> {
        let keys: Vec<String> = keys
            .iter()
            .map(|key| format!("sleep 1; printf '{key}'"))
            .collect();
        let line = format!(
            "({}; sleep 2) | \"$0\" -qec \"$1\" /dev/null",
            keys.join(";")
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).arg(&script).arg(&command);
        shell.env("TERM", term);
        Ok(run(&mut shell, Duration::from_secs(30))?.stdout)
    };
    const ENTER: &str = "\u{1b}[?1049h";
    const LEAVE: &str = "\u{1b}[?1049l";
    let screen = typed(&["b", "q"], "xterm")?;
    let (_, drawn) = screen.split_once(ENTER).context("a screen of its own")?;
    let (drawn, after) = drawn.split_once(LEAVE).context("and back")?;
    assert!(
        drawn.contains("by bandwidth") && drawn.contains("data-0"),
        "{drawn}"
    );
    assert!(
        after.contains(" icanon") && after.contains(" echo "),
        "{after}"
    );

    let dumb = typed(&["\\003"], "dumb")?;
    assert!(!dumb.contains('\u{1b}'), "{dumb}");
    assert!(dumb.matches("data-0").count() >= 2, "{dumb}");
    Ok(())
}

#[test]
fn top_says_what_is_wrong() -> Result<()> {
    let setup = Setup::new()?;
    let nobody = setup.flexblk(&["top", "-r", "/nowhere/rpc.sock"])?;
    assert_eq!(nobody.code, Some(3));
    assert!(
        nobody.stderr.contains("/nowhere/rpc.sock"),
        "{}",
        nobody.stderr
    );
    let hasty = setup.flexblk(&["top", "--interval", "1ms"])?;
    assert_eq!(hasty.code, Some(2));
    Ok(())
}

/// What happened to a host, asked for by the host: for people, for programs, and as it is.
#[test]
fn a_host_reads_its_part_of_the_flight_recorder() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let beyond = ["--lba", "100000", "--blocks", "8", "-o", "nothing.bin"];
    assert!(setup.flexblk_at(&target, "read", &beyond)?.code != Some(0));
    setup.flexblk_at(&target, "flush", &[])?.success()?;
    let log = |arguments: &[&str]| setup.flexblk_at(&target, "telemetry-log", arguments);
    let json: Value = serde_json::from_str(&log(&["-o", "json"])?.success()?.stdout)?;
    assert_eq!(
        (&json["log_id"], &json["host_generation"]),
        (&7.into(), &1.into())
    );
    let names: Vec<&str> = json["events"]
        .as_array()
        .context("events")?
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect();
    for wanted in ["connect", "connect-queue", "disconnect"] {
        assert!(names.contains(&wanted), "{names:?}");
    }
    let text = log(&[])?.success()?.stdout;
    assert!(
        text.contains("connect-queue") && text.contains("peer"),
        "{text}"
    );

    // As nvme-cli writes it: a header, and blocks up to the end of the data area.
    log(&["--output-file", "telemetry.bin", "--data-area", "1"])?.success()?;
    let bytes = std::fs::read(setup.path().join("telemetry.bin"))?;
    let last = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((bytes[0], bytes.len()), (7, (last + 1) * 512));
    assert!(last > 0);
    // Nothing was captured by this controller, and it has nothing to tell of its own accord.
    let old = log(&["--host-generate", "0"])?.success()?.stdout;
    assert!(old.contains("nothing is recorded"), "{old}");
    let own: Value = serde_json::from_str(&log(&["-c", "-o", "json"])?.success()?.stdout)?;
    assert_eq!(
        (&own["log_id"], &own["controller_available"]),
        (&8.into(), &0.into())
    );
    assert_eq!(log(&["--data-area", "5"])?.code, Some(2));
    Ok(())
}

/// With systemd's journal behind standard error, what is logged goes there with priorities and fields, and is not
/// printed, too.
#[test]
fn the_journal_gets_fields() -> Result<()> {
    if !is_root() || find_program("unshare").is_err() {
        skip::note(
            "the_journal_gets_fields",
            "a mount namespace needs root and unshare",
        );
        return Ok(());
    }
    let setup = Setup::new()?;
    let journal = UnixDatagram::bind(setup.path().join("socket"))?;
    journal.set_read_timeout(Some(Duration::from_secs(20)))?;
    // A /run of its own, where our socket is the journal's.
    let script = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && \
                  mount --bind \"$1\" /run/systemd/journal && exec 2>\"$1/stderr\" && \
                  JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) && export JOURNAL_STREAM && \
                  exec \"$2\" --rpc-socket off --bdev ram:1M --udp-port \"$3\"";
    let mut shell = Command::new(find_program("unshare")?);
    shell.args(["--mount", "sh", "-c", script, "sh"]);
    shell.arg(setup.path()).arg(&setup.binaries().target);
    shell.arg(free_udp_port()?.to_string());
    let mut target = Process::spawn(&mut shell, "journal", setup.path())?;
    let printed = || std::fs::read_to_string(setup.path().join("stderr")).unwrap_or_default();
    eventually("it serves", Duration::from_secs(20), || {
        target.stdout().contains("ready: ")
    })
    .with_context(printed)?;
    // What it logs at its end has a field.
    target.signal(Signal::TERM)?;
    let mut bytes = vec![0; 64 << 10];
    let entry = loop {
        let len = journal.recv(&mut bytes).with_context(printed)?;
        let entry = String::from_utf8_lossy(bytes.get(..len).unwrap_or_default());
        if entry.contains("closing") {
            break entry.into_owned();
        }
    };
    assert!(target.wait(Duration::from_secs(20))?.success());
    assert!(entry.contains("PRIORITY"), "{entry}");
    assert!(entry.contains("SYSLOG_IDENTIFIER"), "{entry}");
    assert!(entry.contains("FLEXBLK_SIGNAL"), "{entry}");
    assert!(!printed().contains("closing"), "{}", printed());
    Ok(())
}
