//! Management over the RPC socket: every method, bad input, clients that misbehave.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flexblk_target::Target;
use flexblk_target::config::Config;
use flexblk_target::manage::{
    LogControl, LogLevel, Management, ManagementError, Options, SocketError,
};
use serde_json::{Value, json};

const NQN: &str = "nqn.2026-11.test:rpc";

/// A target without anything, its socket, and what it was told.
struct World {
    target: Arc<Target>,
    management: Management,
    filters: Arc<Mutex<Vec<String>>>,
    signals: Arc<Mutex<Vec<i32>>>,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let mut config = Config::default();
        config.listener.udp_port = UdpSocket::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .unwrap()
            .port();
        let target = Arc::new(Target::start(config).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let (filters, signals) = (Arc::default(), Arc::default());
        let options = options(&socket_in(directory.path()), &filters, &signals);
        let management = Management::start(&target, options).unwrap();
        Self {
            target,
            management,
            filters,
            signals,
            directory,
        }
    }

    fn client(&self) -> Client {
        Client::new(self.management.rpc_socket().unwrap())
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join("rpc.sock")
}

fn options(
    socket: &Path,
    filters: &Arc<Mutex<Vec<String>>>,
    signals: &Arc<Mutex<Vec<i32>>>,
) -> Options {
    let (filters, signals) = (Arc::clone(filters), Arc::clone(signals));
    Options {
        rpc_socket: Some(socket.to_owned()),
        log: Some(Arc::new(LogControl::new(LogLevel::Info, move |filter| {
            filters.lock().unwrap().push(filter.to_owned());
            Ok(())
        }))),
        signal: Some(Box::new(move |signal| signals.lock().unwrap().push(signal))),
        ..Options::default()
    }
}

struct Client {
    socket: UnixStream,
    kept: Vec<u8>,
    called: BTreeSet<String>,
}

impl Client {
    fn new(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            socket,
            kept: Vec::new(),
            called: BTreeSet::new(),
        }
    }

    fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).unwrap();
    }

    /// The next answer; `None` when the server has closed.
    fn read(&mut self) -> Option<Value> {
        loop {
            let mut stream = serde_json::Deserializer::from_slice(&self.kept).into_iter();
            if let Some(Ok(value)) = stream.next() {
                let end = stream.byte_offset();
                self.kept.drain(..end);
                return Some(value);
            }
            let mut more = [0; 4096];
            let len = self.socket.read(&mut more).expect("an answer in time");
            if len == 0 {
                return None;
            }
            self.kept.extend_from_slice(&more[..len]);
        }
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.read().expect("an answer")
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.called.insert(method.to_owned());
        let request = json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params });
        let answer = self.ask(&request.to_string());
        assert_eq!(
            (&answer["jsonrpc"], &answer["id"]),
            (&json!("2.0"), &json!(7))
        );
        answer
    }

    fn ok(&mut self, method: &str, params: Value) -> Value {
        let answer = self.call(method, params);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    fn refused(&mut self, method: &str, params: Value, code: i64, wanted: &str) {
        let answer = self.call(method, params);
        let error = &answer["error"];
        assert_eq!(error["code"], code, "{method}: {answer}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(wanted), "{method}: {message}");
    }
}

/// Every method once, with what SPDK's client sends and what it expects.
#[test]
fn every_method() {
    let world = World::new();
    let mut rpc = world.client();
    let image = world.directory.path().join("a.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();

    assert_eq!(rpc.ok("framework_wait_init", json!({})), true);
    let version = rpc.ok("spdk_get_version", Value::Null);
    assert!(version["version"].as_str().unwrap().contains("flexblk"));
    assert!(version["fields"]["major"].is_u64());

    // Block devices.
    let malloc = json!({
        "name": "m", "block_size": 512, "num_blocks": 4096, "md_interleave": false,
        "dif_is_head_of_md": false,
    });
    assert_eq!(rpc.ok("bdev_malloc_create", malloc.clone()), "m");
    rpc.refused("bdev_malloc_create", malloc, -17, "m exists already");
    let unnamed = rpc.ok(
        "bdev_malloc_create",
        json!({ "block_size": 512, "num_blocks": 8 }),
    );
    assert_eq!(
        rpc.ok("bdev_malloc_delete", json!({ "name": unnamed })),
        true
    );
    let null = json!({ "name": "n", "block_size": 4096, "num_blocks": 256 });
    assert_eq!(rpc.ok("bdev_null_create", null), "n");
    assert_eq!(
        rpc.ok("bdev_null_resize", json!({ "name": "n", "new_size": 2 })),
        true
    );
    let file = json!({ "name": "f", "filename": image, "block_size": 512 });
    assert_eq!(rpc.ok("bdev_uring_create", file), "f");
    std::fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    assert_eq!(rpc.ok("bdev_uring_rescan", json!({ "name": "f" })), true);
    let shown = rpc.ok("bdev_get_bdevs", json!({ "name": "f", "timeout": 0 }));
    assert_eq!(shown[0]["num_blocks"], 4096);
    assert_eq!(
        shown[0]["driver_specific"]["uring"]["filename"],
        json!(image)
    );
    rpc.refused(
        "bdev_malloc_delete",
        json!({ "name": "f" }),
        -19,
        "no malloc device",
    );
    assert_eq!(rpc.ok("bdev_uring_delete", json!({ "name": "f" })), true);
    let aio = json!({
        "name": "a", "filename": image, "block_size": 512, "readonly": true, "fallocate": false,
        "nowait": false,
    });
    assert_eq!(rpc.ok("bdev_aio_create", aio), "a");
    assert_eq!(rpc.ok("bdev_aio_rescan", json!({ "name": "a" })), true);
    let delay = json!({
        "name": "d", "base_bdev_name": "m", "avg_read_latency": 1, "p99_read_latency": 2,
        "avg_write_latency": 3, "p99_write_latency": 4,
    });
    assert_eq!(rpc.ok("bdev_delay_create", delay), "d");
    rpc.refused(
        "bdev_malloc_delete",
        json!({ "name": "m" }),
        -16,
        "d is on top",
    );
    let ours = json!({ "type": "ram", "name": "r", "size": "1M", "max_size": "4M" });
    assert_eq!(rpc.ok("flexblk_bdev_create", ours), "r");
    let wider = json!({ "name": "r", "size_bytes": 2 << 20 });
    assert_eq!(rpc.ok("flexblk_bdev_resize", wider), true);
    let names = rpc.ok("bdev_get_bdevs", json!({}));
    let names: Vec<&str> = names
        .as_array()
        .unwrap()
        .iter()
        .map(|bdev| bdev["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["m", "n", "a", "d", "r"]);
    assert_eq!(rpc.ok("bdev_wait_for_examine", json!({})), true);

    // Transports and subsystems.
    let transport = json!({ "trtype": "flexins", "zcopy": false, "c2h_success": true });
    assert_eq!(rpc.ok("nvmf_create_transport", transport), true);
    let other = json!({ "trtype": "FLEXINS", "max_queue_depth": 7 });
    rpc.refused(
        "nvmf_create_transport",
        other,
        -32602,
        "`max_queue_depth` = 7",
    );
    rpc.refused(
        "nvmf_create_transport",
        json!({ "trtype": "FC" }),
        -32602,
        "FLEXINS",
    );
    let transports = rpc.ok("nvmf_get_transports", json!({ "trtype": "FLEXINS" }));
    assert_eq!(transports[0]["max_queue_depth"], 1024);
    let subsystem = json!({
        "nqn": NQN, "serial_number": "S1", "allow_any_host": false, "ana_reporting": false,
        "passthrough": false, "enable_nssr": false,
    });
    assert_eq!(rpc.ok("nvmf_create_subsystem", subsystem.clone()), true);
    rpc.refused("nvmf_create_subsystem", subsystem, -32603, "exists already");
    let add = |bdev: &str| json!({ "nqn": NQN, "namespace": { "bdev_name": bdev, "no_auto_visible": false } });
    assert_eq!(rpc.ok("nvmf_subsystem_add_ns", add("d")), 1);
    assert_eq!(rpc.ok("nvmf_subsystem_add_ns", add("n")), 2);
    rpc.refused(
        "nvmf_subsystem_add_ns",
        add("ram:1M"),
        -32602,
        "no block device",
    );
    let third = json!({ "nqn": NQN, "namespace": { "bdev_name": "n", "nsid": 2 } });
    rpc.refused(
        "nvmf_subsystem_add_ns",
        third,
        -32602,
        "already has a namespace 2",
    );
    let host = json!({ "nqn": NQN, "host": "nqn.2026-11.test:host" });
    assert_eq!(rpc.ok("nvmf_subsystem_add_host", host.clone()), true);
    let any = |on: bool| json!({ "nqn": NQN, "allow_any_host": on });
    assert_eq!(rpc.ok("nvmf_subsystem_allow_any_host", any(true)), true);
    assert_eq!(rpc.ok("nvmf_subsystem_allow_any_host", any(false)), true);
    let shown = rpc.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    assert_eq!(
        shown[0]["hosts"][0]["nqn"], "nqn.2026-11.test:host",
        "kept meanwhile"
    );
    assert_eq!(shown[0]["allow_any_host"], false);
    assert_eq!(shown[0]["serial_number"], "S1");
    assert_eq!(shown[0]["namespaces"][1]["bdev_name"], "n");
    let all = rpc.ok("nvmf_get_subsystems", json!({}));
    assert_eq!(all[0]["subtype"], "Discovery");
    assert_eq!(rpc.ok("nvmf_subsystem_remove_host", host.clone()), true);
    rpc.refused(
        "nvmf_subsystem_remove_host",
        host,
        -32602,
        "not on the list",
    );
    let listen = |port: &str| {
        let address = json!({
            "trtype": "FLEXINS", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": port,
        });
        json!({ "nqn": NQN, "listen_address": address })
    };
    assert_eq!(rpc.ok("nvmf_subsystem_add_listener", listen("4420")), true);
    rpc.refused(
        "nvmf_subsystem_add_listener",
        listen("4421"),
        -32602,
        "127.0.0.1:4420",
    );
    rpc.refused(
        "nvmf_subsystem_remove_listener",
        listen("4420"),
        -32603,
        "every subsystem",
    );
    let listeners = rpc.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    assert_eq!(listeners[0]["address"]["trsvcid"], "4420");
    let controllers = rpc.ok("nvmf_subsystem_get_controllers", json!({ "nqn": NQN }));
    assert_eq!(controllers, json!([]));
    let queues = rpc.ok("nvmf_subsystem_get_qpairs", json!({ "nqn": NQN }));
    assert_eq!(queues, json!([]));

    // Numbers.
    let stats = rpc.ok("nvmf_get_stats", json!({}));
    assert_eq!(
        stats["poll_groups"][0]["transports"][0]["trtype"],
        "FLEXINS"
    );
    let reactors = rpc.ok("framework_get_reactors", json!({}));
    assert_eq!(reactors["pid"], std::process::id());
    assert_eq!(reactors["reactors"][0]["lw_threads"][0]["name"], "data-0");
    let threads = rpc.ok("thread_get_stats", json!({}));
    assert_eq!(threads["threads"][0]["id"], 1);
    let stats = rpc.ok("flexblk_get_stats", json!({}));
    assert!(stats["uptime_s"].as_f64().unwrap() > 0.0);

    let iostat = rpc.ok(
        "bdev_get_iostat",
        json!({ "names": ["m"], "per_channel": false }),
    );
    assert_eq!(iostat["bdevs"][0]["num_read_ops"], 0);
    assert_eq!(
        rpc.ok("bdev_get_iostat", json!({}))["bdevs"]
            .as_array()
            .unwrap()
            .len(),
        5
    );
    rpc.refused("bdev_get_iostat", json!({ "names": ["x"] }), -19, "x");
    assert_eq!(
        rpc.ok("bdev_reset_iostat", json!({ "name": "m", "mode": "all" })),
        true
    );
    rpc.refused(
        "bdev_reset_iostat",
        json!({ "mode": "some" }),
        -32602,
        "maxmin",
    );
    assert_eq!(rpc.ok("flexblk_get_io", json!({}))["series"], json!([]));
    assert_eq!(
        rpc.ok("flexblk_set_slow_io", json!({ "threshold_us": 500 })),
        true
    );
    assert_eq!(world.target.metrics().slow_us(), Some(500));
    assert_eq!(
        rpc.ok("flexblk_set_slow_io", json!({ "threshold_us": 0 })),
        true
    );
    assert_eq!(world.target.metrics().slow_us(), None);
    let trace = json!({ "host": "nqn.2026-11.test:host", "enable": true });
    assert_eq!(rpc.ok("flexblk_trace_host", trace), true);

    // The log.
    assert_eq!(rpc.ok("log_get_level", json!({})), "INFO");
    assert_eq!(rpc.ok("log_set_level", json!({ "level": "DEBUG" })), true);
    assert_eq!(
        rpc.ok("log_set_print_level", json!({ "level": "WARNING" })),
        true
    );
    assert_eq!(rpc.ok("log_get_print_level", json!({})), "WARNING");
    rpc.refused(
        "log_set_level",
        json!({ "level": "LOUD" }),
        -32602,
        "ERROR, WARNING",
    );
    assert_eq!(rpc.ok("log_set_flag", json!({ "flag": "transport" })), true);
    assert_eq!(rpc.ok("log_get_flags", json!({}))["transport"], true);
    assert_eq!(rpc.ok("log_clear_flag", json!({ "flag": "all" })), true);
    rpc.refused(
        "log_set_flag",
        json!({ "flag": "x" }),
        -32602,
        "log_get_flags",
    );
    let filters = ["debug", "warn", "warn,flexins=trace", "warn"];
    assert_eq!(*world.filters.lock().unwrap(), filters);

    // Away again.
    let second = json!({ "nqn": NQN, "nsid": 2 });
    assert_eq!(rpc.ok("nvmf_subsystem_remove_ns", second.clone()), true);
    rpc.refused("nvmf_subsystem_remove_ns", second, -32602, "no namespace 2");
    assert_eq!(rpc.ok("bdev_delay_delete", json!({ "name": "d" })), true);
    let left = world.target.snapshot();
    assert_eq!(
        left.subsystems[0].as_ref().unwrap().active().count(),
        0,
        "gone with its device"
    );
    assert_eq!(rpc.ok("bdev_null_delete", json!({ "name": "n" })), true);
    assert_eq!(rpc.ok("bdev_aio_delete", json!({ "name": "a" })), true);
    assert_eq!(rpc.ok("flexblk_bdev_delete", json!({ "name": "r" })), true);
    assert_eq!(rpc.ok("nvmf_delete_subsystem", json!({ "nqn": NQN })), true);
    rpc.refused("nvmf_delete_subsystem", json!({ "nqn": NQN }), -32602, NQN);
    let subsystems = rpc.ok("framework_get_subsystems", json!({}));
    assert_eq!(subsystems[1]["depends_on"], json!(["bdev"]));
    let config = rpc.ok("framework_get_config", json!({ "name": "bdev" }));
    assert_eq!(config[0]["method"], "bdev_malloc_create");
    rpc.refused(
        "framework_get_config",
        json!({ "name": "iscsi" }),
        -32602,
        "'iscsi' not found",
    );
    assert_eq!(
        rpc.ok("spdk_kill_instance", json!({ "sig_name": "SIGTERM" })),
        true
    );
    assert_eq!(*world.signals.lock().unwrap(), [15]);

    let nothing = rpc.ok("flexblk_apply", json!({ "toml": "", "dry_run": true }));
    assert_eq!(nothing["changes"], json!(["- block device m"]));

    let listed = rpc.ok("rpc_get_methods", json!({ "current": true }));
    let listed: BTreeSet<String> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    let untested: Vec<&String> = listed.difference(&rpc.called).collect();
    assert!(untested.is_empty(), "{untested:?}");
}

/// What a configuration makes, `framework_get_config` gives back: replayed on another target it makes
/// the same.
#[test]
fn a_saved_configuration_makes_the_same() {
    let world = World::new();
    let mut rpc = world.client();
    rpc.ok(
        "bdev_malloc_create",
        json!({ "name": "m", "block_size": 4096, "num_blocks": 64 }),
    );
    rpc.ok(
        "bdev_null_create",
        json!({ "name": "n", "block_size": 512, "num_blocks": 64 }),
    );
    let fault = json!({
        "type": "fault", "name": "e", "base_bdev_name": "n", "read_error_rate": 0.5,
    });
    rpc.ok("flexblk_bdev_create", fault);
    let roomy = json!({ "type": "ram", "name": "r", "size": "1M", "max_size": "64M" });
    rpc.ok("flexblk_bdev_create", roomy);
    rpc.ok(
        "nvmf_create_subsystem",
        json!({ "nqn": NQN, "model_number": "M" }),
    );
    rpc.ok(
        "nvmf_subsystem_add_host",
        json!({ "nqn": NQN, "host": "nqn.2026-11.test:host" }),
    );
    for (nsid, bdev) in [(3, "m"), (1, "e"), (7, "r")] {
        let namespace = json!({ "bdev_name": bdev, "nsid": nsid });
        rpc.ok(
            "nvmf_subsystem_add_ns",
            json!({ "nqn": NQN, "namespace": namespace }),
        );
    }
    let save = |rpc: &mut Client| -> Vec<Value> {
        ["bdev", "nvmf"]
            .iter()
            .flat_map(|name| {
                let config = rpc.ok("framework_get_config", json!({ "name": name }));
                config.as_array().unwrap().clone()
            })
            .collect()
    };
    let saved = save(&mut rpc);
    assert!(saved.len() >= 9, "{saved:#?}");

    let other = World::new();
    let mut again = other.client();
    for call in &saved {
        again.ok(call["method"].as_str().unwrap(), call["params"].clone());
    }
    assert_eq!(save(&mut again), saved);
}

#[test]
fn what_is_no_request() {
    let world = World::new();
    // Not JSON: the answer says so, and the connection is closed, since nobody knows where the next
    // request would begin.
    for text in [
        "hello",
        "{\"a\":}",
        "{\"method\":\"x\"]",
        "\u{fffd}",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut client = world.client();
        let answer = client.ask(text);
        assert_eq!(answer["error"]["code"], -32700, "{text}: {answer}");
        assert_eq!(answer["id"], Value::Null);
        assert!(client.read().is_none(), "closed");
    }
    let mut client = world.client();
    let mut refused = |text: &str, code: i64, wanted: &str| {
        let answer = client.ask(text);
        let error = &answer["error"];
        assert_eq!(error["code"], code, "{text}: {answer}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(wanted), "{text}: {message}");
    };
    refused(r#"{"id":1}"#, -32600, "`method`");
    refused(r#"{"id":1,"method":7}"#, -32600, "`method`");
    refused(r#"{"id":[],"method":"x"}"#, -32600, "`id`");
    refused(
        r#"{"id":1,"jsonrpc":"1.0","method":"x"}"#,
        -32600,
        "`jsonrpc`",
    );
    refused(r#"{"id":1,"method":"x","params":3}"#, -32600, "`params`");
    refused(r#"{"id":1,"method":"x","extra":3}"#, -32600, "`extra`");
    refused(r#"{"id":1,"method":"bdev_none"}"#, -32601, "bdev_none");
    // Parameters: unknown, of a wrong type, missing, too large; always by name.
    let call =
        |method: &str, params: &str| format!(r#"{{"id":1,"method":"{method}","params":{params}}}"#);
    refused(&call("spdk_get_version", "[1]"), -32602, "object");
    refused(&call("spdk_get_version", r#"{"x":1}"#), -32602, "`x`");
    refused(
        &call("nvmf_delete_subsystem", "{}"),
        -32602,
        "`nqn` is missing",
    );
    refused(
        &call("nvmf_create_subsystem", r#"{"nqn":"x"}"#),
        -32602,
        "`nqn`",
    );
    let long = format!(r#"{{"nqn":"{NQN}","serial_number":"{}"}}"#, "x".repeat(21));
    refused(
        &call("nvmf_create_subsystem", &long),
        -32602,
        "`serial_number`",
    );
    let discovery = r#"{"nqn":"nqn.2014-08.org.nvmexpress.discovery"}"#;
    refused(
        &call("nvmf_create_subsystem", discovery),
        -32602,
        "discovery",
    );
    refused(
        &call("nvmf_delete_subsystem", discovery),
        -32602,
        "discovery",
    );
    let passthrough = format!(r#"{{"nqn":"{NQN}","passthrough":true}}"#);
    refused(
        &call("nvmf_create_subsystem", &passthrough),
        -32602,
        "`passthrough`",
    );
    let other = format!(r#"{{"nqn":"{NQN}","tgt_name":"second"}}"#);
    refused(&call("nvmf_delete_subsystem", &other), -32602, "second");
    let inner = format!(r#"{{"nqn":"{NQN}","namespace":{{"bdev_name":"m","nsid":"1"}}}}"#);
    refused(
        &call("nvmf_subsystem_add_ns", &inner),
        -32602,
        "`namespace.nsid`",
    );
    let unknown = format!(r#"{{"nqn":"{NQN}","namespace":{{"bdev_name":"m","color":1}}}}"#);
    refused(
        &call("nvmf_subsystem_add_ns", &unknown),
        -32602,
        "`namespace.color`",
    );
    for blocks in ["-1", "1.5", "18446744073709551616", "\"8\"", "[]"] {
        let params = format!(r#"{{"name":"m","block_size":512,"num_blocks":{blocks}}}"#);
        refused(&call("bdev_malloc_create", &params), -32602, "`num_blocks`");
    }
    for (size, blocks) in [(513, 8), (512, 0), (512, u64::MAX)] {
        let params = format!(r#"{{"name":"m","block_size":{size},"num_blocks":{blocks}}}"#);
        refused(&call("bdev_malloc_create", &params), -22, "");
    }
    let missing = r#"{"name":"f","filename":"/nonexistent/f.img"}"#;
    refused(&call("bdev_aio_create", missing), -2, "/nonexistent/f.img");
    refused(&call("bdev_get_bdevs", r#"{"name":"m"}"#), -19, "m");
    let odd = r#"{"type":"ram","name":"m","size":"1M","sizee":1}"#;
    refused(&call("flexblk_bdev_create", odd), -32602, "sizee");
    assert!(world.target.bdevs().is_empty());
    assert!(
        world
            .target
            .snapshot()
            .subsystems
            .iter()
            .all(Option::is_none)
    );
}

#[test]
fn batches_and_notifications() {
    let world = World::new();
    let mut client = world.client();
    let answers = client.ask(
        r#"[{"id":"a","method":"bdev_malloc_create","params":{"name":"m","block_size":512,"num_blocks":8}},
            {"method":"bdev_malloc_delete","params":{"name":"m"}},
            {"id":2,"method":"bdev_get_bdevs"}, 5, {"id":3,"method":"nope"}]"#,
    );
    let answers = answers.as_array().unwrap();
    assert_eq!(
        answers.len(),
        4,
        "a notification is done and not answered: {answers:?}"
    );
    assert_eq!(
        (&answers[0]["id"], &answers[0]["result"]),
        (&json!("a"), &json!("m"))
    );
    assert_eq!(
        (&answers[1]["id"], &answers[1]["result"]),
        (&json!(2), &json!([]))
    );
    assert_eq!(
        (&answers[2]["id"], &answers[2]["error"]["code"]),
        (&json!(null), &json!(-32600))
    );
    assert_eq!(
        (&answers[3]["id"], &answers[3]["error"]["code"]),
        (&json!(3), &json!(-32601))
    );
    assert_eq!(client.ask("[]")["error"]["code"], -32600);
    assert!(client.read().is_none());

    // Only notifications: no answer at all, and the next request has its own.
    let mut client = world.client();
    client.send(r#"[{"method":"rpc_get_methods"}]{"method":"rpc_get_methods"}"#);
    assert_eq!(
        client.ask(r#"{"id":9,"method":"framework_wait_init"}"#)["id"],
        9
    );
}

/// Requests in any pieces, and many in one piece, are answered in their order.
#[test]
fn fragments_and_pipelines() {
    let world = World::new();
    let mut client = world.client();
    let request = r#" {"jsonrpc":"2.0","id":1,"method":"framework_wait_init","params":{}}"#;
    for byte in request.as_bytes() {
        client.socket.write_all(std::slice::from_ref(byte)).unwrap();
    }
    assert_eq!(client.read().unwrap()["result"], true);
    let many: String = (0..300)
        .map(|id| format!("{{\"id\":{id},\"method\":\"framework_wait_init\"}}\n"))
        .collect();
    client.send(&many);
    for id in 0..300 {
        assert_eq!(client.read().unwrap()["id"], id);
    }
    // A client that says it has no more gets its answer all the same.
    client.send(request);
    client.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read().unwrap()["result"], true);
    assert!(client.read().is_none());
}

/// A thousand clients that say nothing, one in the middle of a request, one that does not read its
/// answers: nobody else waits for them. When all places are taken the one idle for longest goes.
#[test]
fn idle_and_slow_clients_are_in_nobodys_way() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let world = World::new();
    let mut idle: Vec<Client> = (0..1000).map(|_| world.client()).collect();
    idle[999].send("{\"id\":1,\"method\":\"");
    let mut deaf = world.client();
    let everything = "{\"id\":1,\"method\":\"flexblk_get_stats\"}".repeat(2000);
    deaf.socket.set_nonblocking(true).unwrap();
    // Fails when the server has stopped reading, as it should.
    let _ = deaf.socket.write_all(everything.as_bytes());

    let mut client = world.client();
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let began = Instant::now();
        client.ok("bdev_get_bdevs", json!({}));
        slowest = slowest.max(began.elapsed());
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    // All are still there: the first one is served.
    idle[0].ok("framework_wait_init", json!({}));

    // More than there are places for: those idle for longest make room, the busy one stays.
    let more: Vec<Client> = (0..100).map(|_| world.client()).collect();
    client.ok("framework_wait_init", json!({}));
    idle[0].ok("framework_wait_init", json!({}));
    assert!(idle[1].read().is_none(), "the one idle for longest");
    drop(more);
}

/// The socket is its owner's only; what a dead target left is replaced, a live one's is not touched.
#[test]
fn whose_socket_it_is() {
    let world = World::new();
    let path = socket_in(world.directory.path());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = |path: &Path| {
        let options = options(path, &Arc::default(), &Arc::default());
        Management::start(&world.target, options)
    };
    let taken = again(&path).unwrap_err();
    assert!(
        matches!(taken, ManagementError::Socket(SocketError::InUse(_))),
        "{taken}"
    );
    world.client().ok("framework_wait_init", json!({}));

    let left = world.directory.path().join("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    assert!(left.exists());
    let management = again(&left).unwrap();
    Client::new(&left).ok("framework_wait_init", json!({}));
    drop(management);
    assert!(!left.exists(), "removed at the end");

    let file = world.directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(again(&file).unwrap_err().to_string().contains("no socket"));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert!(again(Path::new("/nonexistent/x.sock")).is_err());
    let long = world.directory.path().join("x".repeat(200));
    assert!(again(&long).is_err(), "longer than an address can be");
}

/// A configuration file is applied whole or not at all, and its differences are told before.
#[test]
fn a_configuration_is_applied_whole() {
    let world = World::new();
    let mut rpc = world.client();
    let port = world.target.config().listener.udp_port;
    let toml = |rest: &str| format!("[listener]\nudp_port = {port}\n{rest}");
    let first = toml(
        r#"
        [[bdev]]
        type = "ram"
        name = "m"
        size = "1M"
        [[subsystem]]
        nqn = "nqn.2026-11.test:rpc"
        serial = "S"
        [[subsystem.namespace]]
        bdev = "m"
        [[subsystem.namespace]]
        bdev = "null:1G"
        [[subsystem]]
        nqn = "nqn.2026-11.test:second"
        "#,
    );
    let dry = rpc.ok("flexblk_apply", json!({ "toml": first, "dry_run": true }));
    let wanted = json!([
        "+ block device m",
        "+ subsystem nqn.2026-11.test:rpc for any host",
        "+ subsystem nqn.2026-11.test:second for any host",
        "+ namespace 1 of nqn.2026-11.test:rpc on m",
        "+ namespace 2 of nqn.2026-11.test:rpc on null:1G",
    ]);
    assert_eq!(dry["changes"], wanted);
    assert!(world.target.bdevs().is_empty(), "only looked");
    let done = rpc.ok(
        "flexblk_apply",
        json!({ "toml": first, "epoch": dry["epoch"] }),
    );
    assert_eq!(done["changes"], wanted);
    let again = rpc.ok("flexblk_apply", json!({ "toml": first }));
    assert_eq!(
        again["changes"],
        json!([]),
        "there is no difference any more"
    );
    // Somebody else was faster.
    rpc.refused(
        "flexblk_apply",
        json!({ "toml": first, "epoch": dry["epoch"] }),
        -116,
        "since",
    );

    let second = toml(
        r#"
        [[bdev]]
        type = "ram"
        name = "m"
        size = "2M"
        [[subsystem]]
        nqn = "nqn.2026-11.test:rpc"
        allow_hosts = ["nqn.2026-11.test:host"]
        [[subsystem.namespace]]
        bdev = "m"
        [[subsystem.namespace]]
        bdev = "null:2G"
        [[subsystem.namespace]]
        nsid = 9
        bdev = "ram:1M"
        "#,
    );
    let done = rpc.ok("flexblk_apply", json!({ "toml": second }));
    assert_eq!(
        done["changes"],
        json!([
            "- subsystem nqn.2026-11.test:second with its namespaces",
            "~ hosts of nqn.2026-11.test:rpc: any host -> nqn.2026-11.test:host",
            "+ namespace 9 of nqn.2026-11.test:rpc on ram:1M",
            "~ size of block device m: 1M -> 2M",
            "~ size of block device null: 1G -> 2G",
        ])
    );
    let shown = rpc.ok("bdev_get_bdevs", json!({ "name": "m" }));
    assert_eq!(shown[0]["num_blocks"], 4096);

    // The last of several changes fails: nothing of them is seen, sizes included.
    let before = rpc.ok("framework_get_config", json!({ "name": "nvmf" }));
    let bad = second
        .replace("2M", "3M")
        .replace("null:2G", "null:3G")
        .replace("bdev = \"ram:1M\"", "bdev = \"file:/nonexistent/f.img\"");
    rpc.refused(
        "flexblk_apply",
        json!({ "toml": bad }),
        -2,
        "/nonexistent/f.img",
    );
    let large = second.replace("2M", "1G").replace("null:2G", "null:3G");
    rpc.refused("flexblk_apply", json!({ "toml": large }), -22, "max_size");
    assert_eq!(
        rpc.ok("framework_get_config", json!({ "name": "nvmf" })),
        before
    );
    let same = rpc.ok("flexblk_apply", json!({ "toml": second, "dry_run": true }));
    assert_eq!(same["changes"], json!([]));

    // What cannot be changed is said, and then nothing is done.
    let fixed = second
        .replace("[listener]", "[target]\ncores = \"0\"\n[listener]")
        .replace("allow_hosts", "serial = \"T\"\nallow_hosts")
        + "[[subsystem]]\nnqn = \"nqn.2026-11.test:third\"\n";
    let dry = rpc.ok("flexblk_apply", json!({ "toml": fixed, "dry_run": true }));
    assert_eq!(dry["impossible"].as_array().unwrap().len(), 2, "{dry}");
    rpc.refused("flexblk_apply", json!({ "toml": fixed }), -32602, "cores");
    assert_eq!(
        rpc.ok("framework_get_config", json!({ "name": "nvmf" })),
        before
    );
    rpc.refused(
        "flexblk_apply",
        json!({ "toml": "[x]", "path": "t.toml" }),
        -32602,
        "t.toml:1",
    );
}

/// What ran is there again after a crash; a file that is damaged is not started from.
#[test]
fn the_state_file_brings_back_what_ran() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.json");
    let start = |number: u32| {
        let mut config = Config::default();
        config.listener.udp_port = UdpSocket::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .unwrap()
            .port();
        let target = Arc::new(Target::start(config).unwrap());
        let options = Options {
            rpc_socket: Some(directory.path().join(format!("{number}.sock"))),
            state_file: Some(state.clone()),
            ..Options::default()
        };
        let management = Management::start(&target, options);
        management.map(|management| (Client::new(management.rpc_socket().unwrap()), management))
    };
    let save = |rpc: &mut Client| {
        let bdev = rpc.ok("framework_get_config", json!({ "name": "bdev" }));
        (
            bdev,
            rpc.ok("framework_get_config", json!({ "name": "nvmf" })),
        )
    };
    let (mut rpc, management) = start(1).unwrap();
    assert!(!state.exists(), "nothing was changed");
    rpc.ok(
        "bdev_null_create",
        json!({ "name": "n", "block_size": 512, "num_blocks": 64 }),
    );
    rpc.ok(
        "nvmf_create_subsystem",
        json!({ "nqn": NQN, "allow_any_host": true }),
    );
    let namespace = json!({ "nqn": NQN, "namespace": { "bdev_name": "n", "nsid": 5 } });
    rpc.ok("nvmf_subsystem_add_ns", namespace);
    let ran = save(&mut rpc);
    drop((rpc, management));

    let (mut rpc, management) = start(2).unwrap();
    assert_eq!(save(&mut rpc), ran);
    // The disk is full, or the directory gone: whoever asked is told.
    let aside = directory.path().join("aside");
    std::fs::create_dir(state.with_extension("json.new")).unwrap();
    let host = json!({ "nqn": NQN, "host": "nqn.2026-11.test:host" });
    rpc.refused("nvmf_subsystem_add_host", host, -5, "will not survive");
    std::fs::rename(&state, &aside).unwrap();
    drop((rpc, management));

    std::fs::write(&state, "{\"subsystems\": [").unwrap();
    let damaged = start(3).err().unwrap().to_string();
    assert!(damaged.contains("damaged"), "{damaged}");
    let unknown = json!({ "subsystems": [{ "config": [{ "method": "nope" }] }] });
    std::fs::write(&state, unknown.to_string()).unwrap();
    let unknown = start(4).err().unwrap().to_string();
    assert!(unknown.contains("nope"), "{unknown}");
}

/// Metrics are served to whoever asks properly; who does not is told so and holds nothing up.
#[test]
fn metrics_are_served_to_any_client() {
    use std::net::{SocketAddr, TcpStream};
    let world = World::new();
    let options = Options {
        metrics: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..Options::default()
    };
    let management = Management::start(&world.target, options).unwrap();
    let address = management.metrics_address().unwrap();
    let connect = || {
        let socket = TcpStream::connect(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket
    };
    let ask = |text: &[u8]| {
        let mut socket = connect();
        socket.write_all(text).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    };
    // Nothing said, half a request, and a megabyte without an end.
    let _silent: Vec<TcpStream> = (0..50).map(|_| connect()).collect();
    let mut half = connect();
    half.write_all(b"GET /metr").unwrap();
    let mut endless = connect();
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);

    let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"), "{body}");
    assert!(body.contains("flexblk_controllers 0\n"), "{body}");
    let turns = "flexblk_reactor_total{thread=\"data-0\",counter=\"turns\"} ";
    assert!(body.contains(turns), "{body}");
    let head_only = ask(b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head_only.ends_with("\r\n\r\n"), "{head_only}");
    for (text, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"hello\r\n\r\n", "400"),
        (b"\r\n\r\n", "400"),
        (&[b'x'; 8192], "431"),
    ] {
        let answer = ask(text);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    // The address is taken: said in one line that names it.
    let options = Options {
        metrics: Some(address),
        ..Options::default()
    };
    let taken = Management::start(&world.target, options).unwrap_err();
    assert!(taken.to_string().contains(&address.to_string()), "{taken}");
}
