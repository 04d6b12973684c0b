//! Whole configurations: saved, applied, kept.

use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::{Nqn, Nsid};
use flexblk_target::Target;
use flexblk_target::config::Config;
use flexblk_target::manage::{Management, Options};
use flexblk_target::snapshot::Protection;
use flexblk_tests::ports::{free_tcp_port, free_udp_port};
use serde_json::{Value, json};

use crate::host::Host;
use crate::world::{Client, NQN, World};

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
    let delay = json!({
        "name": "d", "base_bdev_name": "n", "avg_read_latency": 1, "p99_read_latency": 2,
        "avg_write_latency": 3, "p99_write_latency": 4,
        "uuid": "6d1c8b5e-5f3b-4b34-9f55-0d6a2a3f7f10",
    });
    rpc.ok("bdev_delay_create", delay.clone());
    let error = json!({ "base_name": "d", "uuid": "f1f7c8a4-0a3c-4c50-8a53-61f7be4d8a07" });
    rpc.ok("bdev_error_create", error.clone());
    let made = rpc.ok("bdev_get_bdevs", json!({ "name": "EE_d" }));
    assert_eq!(made[0]["uuid"], error["uuid"]);
    let made = rpc.ok("bdev_get_bdevs", json!({ "name": "d" }));
    assert_eq!(made[0]["uuid"], delay["uuid"]);
    for histogram in [
        json!({ "name": "n", "enable": true }),
        json!({ "name": "e", "enable": true, "opc": "read", "granularity": 5 }),
    ] {
        rpc.ok("bdev_enable_histogram", histogram);
    }
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
    assert!(saved.len() >= 12, "{saved:#?}");
    let call = json!({ "method": "bdev_error_create", "params": error });
    assert!(saved.contains(&call), "{saved:#?}");

    let other = World::new();
    let mut again = other.client();
    for call in &saved {
        again.ok(call["method"].as_str().unwrap(), call["params"].clone());
    }
    assert_eq!(save(&mut again), saved);
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

/// Latencies of a delay device change under I/O: by a call, which `save_config` and the file see, and
/// back by the file.
#[test]
fn latencies_change_in_place() {
    let world = World::new();
    let mut rpc = world.client();
    let port = world.target.config().listener.udp_port;
    let toml = format!(
        r#"
        [listener]
        udp_port = {port}
        [[bdev]]
        type = "null"
        name = "n"
        size = "1G"
        [[bdev]]
        type = "delay"
        name = "d"
        base_bdev_name = "n"
        avg_read_latency = 10
        seed = 7
        "#
    );
    rpc.ok("flexblk_apply", json!({ "toml": toml }));
    let latency =
        json!({ "delay_bdev_name": "d", "latency_type": "avg_write", "latency_us": 3000 });
    rpc.ok("bdev_delay_update_latency", latency);
    let saved = rpc.ok("framework_get_config", json!({ "name": "bdev" }));
    assert_eq!(saved[1]["params"]["avg_write_latency"], 3000, "{saved:#}");
    let back = json!([
        "~ block device d: read 10 us (p99 10), write 3000 us (p99 3000), flush 0 us -> \
         read 10 us (p99 10), write 0 us (p99 0), flush 0 us"
    ]);
    let done = rpc.ok("flexblk_apply", json!({ "toml": toml }));
    assert_eq!(done["changes"], back);
    let same = rpc.ok("flexblk_apply", json!({ "toml": toml, "dry_run": true }));
    assert_eq!(same["changes"], json!([]));
    // Nothing else of the device can change.
    let other = toml.replace("seed = 7", "seed = 8");
    rpc.refused(
        "flexblk_apply",
        json!({ "toml": other }),
        -32602,
        "block device d",
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

/// A subsystem that takes the place of another one within one change has none of its controllers.
#[test]
fn a_subsystem_that_is_replaced_takes_its_controllers_with_it() {
    let world = World::new();
    let mut rpc = world.client();
    let port = world.target.config().listener.udp_port;
    let toml = |nqn: &str| {
        format!(
            "[listener]\nudp_port = {port}\n[[subsystem]]\nnqn = \"{nqn}\"\n\
             [[subsystem.namespace]]\nbdev = \"ram:1M\"\n"
        )
    };
    rpc.ok(
        "flexblk_apply",
        json!({ "toml": toml("nqn.2026-11.test:old") }),
    );
    let old = Nqn::new("nqn.2026-11.test:old").unwrap();
    let mut host = Host::new(port);
    let (admin, cntlid) = host.controller(&old);
    assert_eq!(host.queues(admin, 1), 1);
    let _io = host.io_queue(1, 8, cntlid, &old);
    assert_eq!(world.target.stats().controllers, 1);
    rpc.ok(
        "flexblk_apply",
        json!({ "toml": toml("nqn.2026-11.test:new") }),
    );
    let deadline = Instant::now() + Duration::from_secs(5);
    while world.target.stats().controllers > 0 {
        assert!(Instant::now() < deadline, "the controller is there still");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Addresses may change hands within one change, and those at which nothing is reached are closed.
#[test]
fn listeners_change_places_in_one_change() {
    let world = World::new();
    let mut rpc = world.client();
    let port = world.target.config().listener.udp_port;
    let subsystem = |name: &str, address: &str| {
        format!(
            "[[subsystem]]\nnqn = \"nqn.2026-11.test:{name}\"\n\
             [[subsystem.listener]]\ntrtype = \"tcp\"\naddress = \"{address}\"\n"
        )
    };
    let mut apply = |subsystems: &[String]| {
        let toml = format!("[listener]\nudp_port = {port}\n{}", subsystems.concat());
        rpc.ok("flexblk_apply", json!({ "toml": toml }));
    };
    let addresses: Vec<String> = (0..4)
        .map(|_| format!("127.0.0.1:{}", free_tcp_port().unwrap()))
        .collect();
    let [a, b, c, d] = addresses.as_slice() else {
        unreachable!()
    };
    let expect = |open: [&String; 2], closed: [&String; 2]| {
        for address in open {
            TcpStream::connect(address).unwrap();
        }
        for address in closed {
            let deadline = Instant::now() + Duration::from_secs(5);
            while TcpStream::connect(address).is_ok() {
                assert!(Instant::now() < deadline, "{address} is open still");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    };
    apply(&[subsystem("one", a), subsystem("two", b)]);
    expect([a, b], [c, d]);
    apply(&[subsystem("one", c), subsystem("two", d)]);
    expect([c, d], [a, b]);
    // An address goes to another subsystem, which comes for it.
    apply(&[subsystem("one", d), subsystem("three", c)]);
    expect([c, d], [a, b]);
}

/// With a file for what has to survive, that file says how a namespace is protected, not the state file,
/// which does not follow what hosts change.
#[test]
fn protection_is_restored_as_hosts_left_it() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_udp_port().unwrap();
    let start = || {
        let mut config = Config {
            ptpl_file: Some(directory.path().join("ptpl.json")),
            ..Config::default()
        };
        config.listener.udp_port = port;
        let target = Arc::new(Target::start(config).unwrap());
        let options = Options {
            rpc_socket: Some(directory.path().join("rpc.sock")),
            state_file: Some(directory.path().join("state.json")),
            ..Options::default()
        };
        let management = Management::start(&target, options);
        (target, management)
    };
    let nqn = Nqn::new(NQN).unwrap();
    let nsid = Nsid::new(1);
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let protection = |target: &Target| {
        let snapshot = target.snapshot();
        snapshot
            .find(&nqn)
            .unwrap()
            .namespace(nsid)
            .unwrap()
            .protection
    };
    // By a host, that is: management does not hear of it.
    let protect = |target: &Target, protection| target.set_write_protection(&nqn, nsid, protection);
    {
        let (target, management) = start();
        let management = management.unwrap();
        let mut rpc = Client::new(management.rpc_socket().unwrap());
        let device = json!({ "name": "disk", "filename": image, "block_size": 512 });
        rpc.ok("bdev_aio_create", device);
        rpc.ok(
            "nvmf_create_subsystem",
            json!({ "nqn": NQN, "allow_any_host": true }),
        );
        let namespace = json!({ "bdev_name": "disk" });
        rpc.ok(
            "nvmf_subsystem_add_ns",
            json!({ "nqn": NQN, "namespace": namespace }),
        );
        let word = json!({ "nqn": NQN, "nsid": 1, "write_protect": "write_protect" });
        rpc.ok("flexblk_ns_set_write_protect", word);
        protect(&target, Protection::None).unwrap();
    }
    {
        let (target, management) = start();
        management.unwrap();
        assert_eq!(protection(&target), Protection::None);
        protect(&target, Protection::Permanent).unwrap();
    }
    let (target, management) = start();
    management.unwrap();
    assert_eq!(protection(&target), Protection::Permanent);
}
