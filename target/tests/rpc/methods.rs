//! Every method.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::error_devices::error_devices;
use crate::world::{Client, NQN, World};

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
    let latency = |name: &str, which: &str, us: u64| json!({ "delay_bdev_name": name, "latency_type": which, "latency_us": us });
    let update = "bdev_delay_update_latency";
    assert_eq!(rpc.ok(update, latency("d", "avg_read", 0)), true);
    rpc.refused(update, latency("m", "avg_read", 0), -19, "no delay device");
    rpc.refused(update, latency("d", "p50_read", 0), -32602, "p99_write");
    rpc.refused(update, latency("d", "p99_read", u64::MAX), -22, "at most");
    let shown = rpc.ok("bdev_get_bdevs", json!({ "name": "d" }));
    let delay = &shown[0]["driver_specific"]["delay"];
    assert_eq!(
        (&delay["avg_read_latency"], &delay["p99_read_latency"]),
        (&json!(0), &json!(2))
    );
    rpc.refused(
        "bdev_malloc_delete",
        json!({ "name": "m" }),
        -16,
        "d is on top",
    );
    error_devices(&mut rpc);
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
    let units = json!({ "trtype": "TCP", "io_unit_size": 131_072 });
    rpc.refused(
        "nvmf_create_transport",
        units,
        -32602,
        "`io_unit_size` cannot be set here: buffers come from `memory_budget`",
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
    let mut secret = host.clone();
    secret["dhchap_key"] = "key0".into();
    let add_host = "nvmf_subsystem_add_host";
    rpc.refused(add_host, secret, -32602, "no authentication");
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
    assert_eq!(rpc.ok("nvmf_subsystem_add_listener", listen("4421")), true);
    let removed = "nvmf_subsystem_remove_listener";
    assert_eq!(rpc.ok(removed, listen("4421")), true);
    rpc.refused(
        removed,
        listen("4421"),
        -32602,
        "no listener flexins 127.0.0.1:4421",
    );
    let elsewhere = json!({ "trtype": "FLEXINS", "traddr": "127.0.0.2", "trsvcid": "4420" });
    let elsewhere = json!({ "nqn": NQN, "listen_address": elsewhere });
    rpc.refused(
        "nvmf_subsystem_add_listener",
        elsewhere,
        -32602,
        "FlexiNS is on 127.0.0.1",
    );
    listeners(&mut rpc);
    let listeners = rpc.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    assert_eq!(listeners[0]["address"]["trsvcid"], "4420");
    let controllers = rpc.ok("nvmf_subsystem_get_controllers", json!({ "nqn": NQN }));
    assert_eq!(controllers, json!([]));
    let queues = rpc.ok("nvmf_subsystem_get_qpairs", json!({ "nqn": NQN }));
    assert_eq!(queues, json!([]));

    access(&mut rpc);
    discovery(&mut rpc);

    // Numbers.
    let stats = rpc.ok("nvmf_get_stats", json!({}));
    assert_eq!(
        stats["poll_groups"][0]["transports"][0]["trtype"],
        "FLEXINS"
    );
    let reactors = rpc.ok("framework_get_reactors", json!({}));
    assert_eq!(reactors["pid"], std::process::id());
    assert_eq!(reactors["reactors"][0]["lw_threads"][0]["name"], "data-0");
    for key in ["irq", "sys", "usr", "numa_id", "tid"] {
        assert!(reactors["reactors"][0][key].is_i64(), "{key}: {reactors}");
    }
    let scheduler = rpc.ok("framework_get_scheduler", json!({}));
    assert_eq!(scheduler["scheduler_name"], "static");
    let threads = rpc.ok("thread_get_stats", json!({}));
    assert_eq!(threads["threads"][0]["id"], 1);
    let pollers = rpc.ok("thread_get_pollers", json!({}));
    let pollers = pollers["threads"][0]["active_pollers"].as_array().unwrap();
    assert_eq!(threads["threads"][0]["active_pollers_count"], pollers.len());
    let mailbox = pollers.iter().find(|poller| poller["name"] == "mailbox");
    let busy = |poller: &Value| poller["busy_count"].as_u64().unwrap();
    // It has had the question before this one, and each of the changes.
    let mailbox = mailbox.unwrap();
    assert!(busy(mailbox) > 1, "{mailbox}");
    for poller in pollers {
        assert!(
            busy(poller) <= poller["run_count"].as_u64().unwrap(),
            "{poller}"
        );
    }
    let stats = rpc.ok("flexblk_get_stats", json!({}));
    assert!(stats["uptime_s"].as_f64().unwrap() > 0.0);

    let iostat = rpc.ok(
        "bdev_get_iostat",
        json!({ "names": ["m"], "per_channel": false }),
    );
    assert_eq!(iostat["bdevs"][0]["num_read_ops"], 0);
    let channels = json!({ "names": ["m"], "per_channel": true, "reset_mode": "maxmin" });
    let channels = rpc.ok("bdev_get_iostat", channels);
    assert_eq!(channels["name"], "m");
    assert_eq!(channels["channels"][0]["thread_id"], 1);
    assert_eq!(channels["channels"][0]["max_write_latency_ticks"], 0);
    rpc.refused(
        "bdev_get_iostat",
        json!({ "per_channel": true }),
        -32602,
        "for one device",
    );
    rpc.refused(
        "bdev_get_iostat",
        json!({ "reset_mode": "some" }),
        -32602,
        "`reset_mode` must be all, maxmin, error or none",
    );
    histograms(&mut rpc);
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
    let capture =
        json!({ "file": world.directory.path().join("live.pcapng"), "limit_bytes": 4096 });
    let started = rpc.ok("flexblk_start_capture", capture.clone());
    assert_eq!(started["files"][0], capture["file"]);
    rpc.refused("flexblk_start_capture", capture, -114, "stop it first");
    let stopped = rpc.ok("flexblk_stop_capture", json!({}));
    assert_eq!(stopped["recorded"], 0);
    rpc.refused(
        "flexblk_stop_capture",
        json!({}),
        -2,
        "no capture is running",
    );

    let recorded = rpc.ok("flexblk_get_flight_recorder", json!({ "events": 5 }));
    assert_eq!(recorded["events"], json!([]), "no host was here");

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

/// Off, on, of another kind, off again.
fn histograms(rpc: &mut Client) {
    let (enable, get) = ("bdev_enable_histogram", "bdev_get_histogram");
    rpc.refused(get, json!({ "name": "m" }), -61, "bdev_enable_histogram");
    rpc.refused(get, json!({ "name": "x" }), -19, "x");
    assert_eq!(rpc.ok(enable, json!({ "name": "m", "enable": true })), true);
    let histogram = rpc.ok(get, json!({ "name": "m" }));
    // 21 ranges of 128 buckets of 8 bytes: 1 us to 120 s.
    let text = histogram["histogram"].as_str().unwrap();
    assert_eq!(text.len(), (21 * 128 * 8_usize).div_ceil(3) * 4);
    for (key, value) in [
        ("granularity", 7),
        ("min_range", 0),
        ("max_range", 20),
        ("tsc_rate", 1_000_000),
    ] {
        assert_eq!(histogram[key], value, "{key}");
    }
    let borders = json!({ "name": "m", "borders": [10, 100] });
    let borders = rpc.ok("bdev_get_histogram_borders", borders);
    assert_eq!(borders, json!({ "borders_count": [0, 0, 0] }));
    rpc.refused(
        "bdev_get_histogram_borders",
        json!({ "name": "m", "borders": [10, 5] }),
        -32602,
        "ascending",
    );
    let finer = json!({
        "name": "m", "enable": true, "opc": "unmap", "granularity": 9, "min_nsec": 1_000_000,
        "max_nsec": 1_000_000_000,
    });
    assert_eq!(rpc.ok(enable, finer), true);
    assert_eq!(rpc.ok(get, json!({ "name": "m" }))["min_range"], 1);
    for (key, value, wanted) in [
        ("opc", json!("reset"), "`opc` must be one of read, write"),
        ("granularity", json!(11), "at most 10"),
        ("granularity", json!(256), "8 bits"),
        ("max_nsec", json!(1000), "below max_nsec"),
        ("min_usec", json!(1), "unknown parameter `min_usec`"),
    ] {
        let mut params = json!({ "name": "m", "enable": true });
        params[key] = value;
        rpc.refused(enable, params, -32602, wanted);
    }
    assert_eq!(
        rpc.ok(enable, json!({ "name": "m", "enable": false })),
        true
    );
    rpc.refused(get, json!({ "name": "m" }), -61, "m has no histogram");
}

/// Addresses come and go with those who use them.
fn listeners(rpc: &mut Client) {
    let port = flexblk_tests::ports::free_udp_port().unwrap();
    let free = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let address = free.local_addr().unwrap();
    let listen = json!({
        "trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": address.port().to_string(),
    });
    let own = json!({ "nqn": NQN, "listen_address": listen, "ana_state": "inaccessible" });
    rpc.refused(
        "nvmf_subsystem_add_listener",
        own.clone(),
        -32602,
        "cannot listen on tcp",
    );
    drop(free);
    assert_eq!(rpc.ok("nvmf_subsystem_add_listener", own), true);
    let found = rpc.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    assert_eq!(found[1]["address"]["trsvcid"], address.port().to_string());
    assert_eq!(found[1]["ana_states"][0]["ana_state"], "inaccessible");
    assert_eq!(found[0]["ana_states"][0]["ana_state"], "optimized");
    assert!(std::net::TcpStream::connect(address).is_ok());
    // The discovery service has it, too: now it stays without the subsystem.
    let service = json!({ "nqn": "discovery", "listen_address": listen });
    assert_eq!(rpc.ok("nvmf_subsystem_add_listener", service.clone()), true);
    let set = "flexblk_subsystem_set_listeners";
    let first = found[0]["address"].clone();
    let only = json!({ "nqn": NQN, "listen_addresses": [first] });
    assert_eq!(rpc.ok(set, only.clone()), true);
    assert!(std::net::TcpStream::connect(address).is_ok());
    assert_eq!(
        rpc.ok("nvmf_subsystem_remove_listener", service.clone()),
        true
    );
    rpc.refused(
        "nvmf_subsystem_remove_listener",
        service,
        -32602,
        "no listener",
    );
    let services = rpc.ok(
        "nvmf_subsystem_get_listeners",
        json!({ "nqn": "discovery" }),
    );
    assert_eq!(services.as_array().unwrap().len(), 1);
    assert_eq!(
        rpc.ok(set, json!({ "nqn": NQN, "listen_addresses": [] })),
        true
    );
    let shown = rpc.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    assert_eq!(shown[0]["listen_addresses"], json!([]));
    assert_eq!(rpc.ok(set, json!({ "nqn": NQN })), true);
    let shown = rpc.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    assert_eq!(
        shown[0]["listen_addresses"],
        json!([only["listen_addresses"][0]])
    );
}

/// ANA, masking and write protection: namespace 1 is on "d", 2 on "n".
fn access(rpc: &mut Client) {
    let listener = |state: &str, group: Value| {
        let address = json!({ "trtype": "FLEXINS", "traddr": "127.0.0.1", "trsvcid": "4420" });
        json!({ "nqn": NQN, "listen_address": address, "ana_state": state, "anagrpid": group })
    };
    let set = "nvmf_subsystem_listener_set_ana_state";
    assert_eq!(rpc.ok(set, listener("inaccessible", Value::Null)), true);
    assert_eq!(rpc.ok(set, listener("non_optimized", json!(2))), true);
    rpc.refused(set, listener("good", json!(2)), -32602, "persistent_loss");
    rpc.refused(set, listener("change", json!(129)), -32602, "1 to 128");
    let group = json!({ "nqn": NQN, "nsid": 2, "anagrpid": 2 });
    assert_eq!(rpc.ok("nvmf_subsystem_set_ns_ana_group", group), true);
    let group = json!({ "nqn": NQN, "nsid": 9, "anagrpid": 2 });
    rpc.refused(
        "nvmf_subsystem_set_ns_ana_group",
        group,
        -32602,
        "no namespace 9",
    );
    let listeners = rpc.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    let states = &listeners[0]["ana_states"];
    assert_eq!(
        states[0],
        json!({ "ana_group": 1, "ana_state": "inaccessible" })
    );
    assert_eq!(
        states[1],
        json!({ "ana_group": 2, "ana_state": "non_optimized" })
    );
    let all = json!({ "nqn": NQN, "ana_state": "optimized" });
    assert_eq!(rpc.ok("flexblk_subsystem_set_ana_state", all), true);
    let listeners = rpc.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    assert_eq!(listeners[0]["ana_states"][0]["ana_state"], "optimized");

    let host = |nsid: u32| json!({ "nqn": NQN, "nsid": nsid, "host": "nqn.2026-11.test:host" });
    rpc.refused("nvmf_ns_add_host", host(2), -32602, "no_auto_visible");
    let masked = json!({
        "nqn": NQN,
        "namespace": { "bdev_name": "n", "nsid": 3, "anagrpid": 2, "no_auto_visible": true },
    });
    assert_eq!(rpc.ok("nvmf_subsystem_add_ns", masked), 3);
    assert_eq!(rpc.ok("nvmf_ns_add_host", host(3)), true);
    let protect =
        |nsid: u32, word: &str| json!({ "nqn": NQN, "nsid": nsid, "write_protect": word });
    let set = "flexblk_ns_set_write_protect";
    assert_eq!(rpc.ok(set, protect(3, "write_protect")), true);
    rpc.refused(set, protect(3, "yes"), -32602, "until_power_cycle");
    // There is no file in which it would survive.
    rpc.refused(set, protect(3, "permanent"), -32602, "cannot be changed so");
    let shown = rpc.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    let third = &shown[0]["namespaces"][2];
    assert_eq!(
        (&third["anagrpid"], &third["no_auto_visible"]),
        (&json!(2), &json!(true))
    );
    assert_eq!(third["hosts"], json!([{ "nqn": "nqn.2026-11.test:host" }]));
    assert_eq!(third["write_protect"], "write_protect");
    assert_eq!(rpc.ok("nvmf_ns_remove_host", host(3)), true);
    let shown = rpc.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    assert_eq!(shown[0]["namespaces"][2]["hosts"], json!([]));
    rpc.ok("nvmf_subsystem_remove_ns", json!({ "nqn": NQN, "nsid": 3 }));
}

fn discovery(rpc: &mut Client) {
    let address = |port: &str| json!({ "trtype": "tcp", "adrfam": "ipv4", "traddr": "192.0.2.7", "trsvcid": port });
    let add = "nvmf_discovery_add_referral";
    let plain = json!({ "address": address("8009"), "secure_channel": false });
    assert_eq!(rpc.ok(add, plain.clone()), true);
    // One that is there is left as it is.
    assert_eq!(rpc.ok(add, plain), true);
    let named = json!({
        "address": address("8010"), "subnqn": "nqn.2026-11.test:other", "hosts": ["nqn.2026-11.test:host"],
    });
    assert_eq!(rpc.ok(add, named), true);
    rpc.refused(
        add,
        json!({ "address": address("0") }),
        -32602,
        "`address.trsvcid`",
    );
    let secure = json!({ "address": address("8011"), "secure_channel": true });
    rpc.refused(add, secure, -32602, "`secure_channel`");
    let referrals = rpc.ok("nvmf_discovery_get_referrals", json!({}));
    assert_eq!(referrals.as_array().unwrap().len(), 2);
    assert_eq!(
        referrals[0],
        json!({
            "address": { "trtype": "TCP", "adrfam": "IPv4", "traddr": "192.0.2.7", "trsvcid": "8009" },
            "secure_channel": false, "subnqn": "nqn.2014-08.org.nvmexpress.discovery",
        })
    );
    assert_eq!(referrals[1]["hosts"], json!(["nqn.2026-11.test:host"]));
    let remove = "nvmf_discovery_remove_referral";
    assert_eq!(rpc.ok(remove, json!({ "address": address("8009") })), true);
    let named = json!({ "address": address("8010") });
    rpc.refused(remove, named, -32602, "no referral");
    let named = json!({ "address": address("8010"), "subnqn": "nqn.2026-11.test:other" });
    assert_eq!(rpc.ok(remove, named), true);
    let name = json!({ "nqn": "nqn.2026-11.test:discovery" });
    assert_eq!(rpc.ok("flexblk_discovery_set_nqn", name), true);
    let bad = json!({ "nqn": "x" });
    rpc.refused("flexblk_discovery_set_nqn", bad, -32602, "`nqn`");
    assert_eq!(rpc.ok("flexblk_discovery_set_nqn", json!({})), true);
}
