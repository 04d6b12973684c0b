//! Nothing that a TOML file can say is lost on the way through `save_config` and the state file:
//! what they bring back is, for the file, what runs.

use std::fmt::Write as _;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;

use flexblk_target::Target;
use flexblk_target::config::Config;
use flexblk_target::manage::{Management, Options};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::world::{Client, World};

/// A namespace's table: device, identifier, UUID, ANA group, hosts.
#[derive(Clone, Debug)]
struct Namespace {
    bdev: usize,
    nsid: Option<u32>,
    uuid: Option<u128>,
    group: Option<u32>,
    hosts: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Subsystem {
    serial: Option<String>,
    model: Option<String>,
    hosts: Option<Vec<u8>>,
    /// Services of FlexiNS; `None` is those from the start.
    listeners: Option<Vec<u16>>,
    groups: Vec<(u32, &'static str)>,
    /// State of group 1 through the first listener.
    through: Option<&'static str>,
    namespaces: Vec<Namespace>,
}

#[derive(Clone, Debug)]
struct Referral {
    tcp: bool,
    number: u8,
    nqn: Option<u8>,
    hosts: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Document {
    discovery: Option<u8>,
    referrals: Vec<Referral>,
    subsystems: Vec<Subsystem>,
}

/// Devices that a namespace can name: a `[[bdev]]`, or a short form.
const BDEVS: [&str; 5] = ["r", "n", "d", "null:1G", "ram:64K,block_size=4096"];
const TABLES: &str = r#"
[[bdev]]
type = "ram"
name = "r"
size = "1M"
max_size = "2M"
[[bdev]]
type = "null"
name = "n"
size = "1G"
uuid = "6d1c8b5e-5f3b-4b34-9f55-0d6a2a3f7f10"
[[bdev]]
type = "delay"
name = "d"
base_bdev_name = "n"
avg_read_latency = 10
"#;

fn hosts() -> impl Strategy<Value = Option<Vec<u8>>> {
    prop::option::of(prop::collection::btree_set(0..9_u8, 0..3))
        .prop_map(|hosts| hosts.map(|hosts| hosts.into_iter().collect()))
}

fn document() -> impl Strategy<Value = Document> {
    let state = prop::sample::select(vec![
        "optimized",
        "non_optimized",
        "inaccessible",
        "persistent_loss",
        "change",
    ]);
    let namespace = (
        0..BDEVS.len(),
        prop::option::of(1..1000_u32),
        prop::option::of(any::<u128>()),
        prop::option::of(1..=128_u32),
        hosts(),
    )
        .prop_map(|(bdev, nsid, uuid, group, hosts)| Namespace {
            bdev,
            nsid,
            uuid,
            group,
            hosts,
        });
    let subsystem = (
        prop::option::of("[A-Z0-9]{1,20}"),
        prop::option::of("[a-z]{1,40}"),
        hosts(),
        prop::option::of(prop::collection::btree_set(5000..5005_u16, 0..3)),
        prop::collection::btree_map(1..=128_u32, state.clone(), 0..4),
        prop::option::of(state),
        prop::collection::vec(namespace, 0..4),
    )
        .prop_map(
            |(serial, model, hosts, listeners, groups, through, namespaces)| Subsystem {
                serial,
                model,
                hosts,
                listeners: listeners.map(|listeners| listeners.into_iter().collect()),
                groups: groups.into_iter().collect(),
                through,
                namespaces,
            },
        );
    let referral = (
        any::<bool>(),
        any::<u8>(),
        prop::option::of(0..9_u8),
        hosts(),
    )
        .prop_map(|(tcp, number, nqn, hosts)| Referral {
            tcp,
            number,
            nqn,
            hosts,
        });
    (
        prop::option::of(0..9_u8),
        prop::collection::vec(referral, 0..3),
        prop::collection::vec(subsystem, 0..3),
    )
        .prop_map(|(discovery, referrals, subsystems)| Document {
            discovery,
            referrals,
            subsystems,
        })
}

fn write_hosts(toml: &mut String, hosts: Option<&Vec<u8>>) {
    if let Some(hosts) = hosts {
        let names: Vec<String> = hosts
            .iter()
            .map(|host| format!("\"nqn.2026-11.test:host{host}\""))
            .collect();
        writeln!(toml, "allow_hosts = [{}]", names.join(", ")).unwrap();
    }
}

impl Document {
    fn to_toml(&self, udp_port: u16) -> String {
        let mut toml = format!("[listener]\nudp_port = {udp_port}\n[discovery]\n");
        if let Some(name) = self.discovery {
            writeln!(toml, "nqn = \"nqn.2026-11.test:discovery{name}\"").unwrap();
        }
        for referral in &self.referrals {
            let Referral {
                number, nqn, hosts, ..
            } = referral;
            let trtype = if referral.tcp { "tcp" } else { "flexins" };
            writeln!(toml, "[[discovery.referral]]\ntrtype = \"{trtype}\"").unwrap();
            writeln!(toml, "address = \"192.0.2.{number}:8009\"").unwrap();
            if let Some(nqn) = nqn {
                writeln!(toml, "nqn = \"nqn.2026-11.test:service{nqn}\"").unwrap();
            }
            write_hosts(&mut toml, hosts.as_ref());
        }
        toml.push_str(TABLES);
        for (at, subsystem) in self.subsystems.iter().enumerate() {
            writeln!(toml, "[[subsystem]]\nnqn = \"nqn.2026-11.test:s{at}\"").unwrap();
            for (key, value) in [("serial", &subsystem.serial), ("model", &subsystem.model)] {
                if let Some(value) = value {
                    writeln!(toml, "{key} = \"{value}\"").unwrap();
                }
            }
            write_hosts(&mut toml, subsystem.hosts.as_ref());
            let listeners = subsystem.listeners.as_deref();
            if listeners.is_some_and(<[u16]>::is_empty) {
                toml.push_str("listener = []\n");
            }
            for service in listeners.unwrap_or_default() {
                writeln!(
                    toml,
                    "[[subsystem.listener]]\naddress = \"127.0.0.1:{service}\""
                )
                .unwrap();
            }
            let first = listeners.map_or(Some(&4420), <[u16]>::first);
            if let Some((service, state)) = first.zip(subsystem.through) {
                writeln!(
                    toml,
                    "[[subsystem.ana_group]]\nanagrpid = 1\nana_state = \"{state}\""
                )
                .unwrap();
                writeln!(
                    toml,
                    "trtype = \"flexins\"\naddress = \"127.0.0.1:{service}\""
                )
                .unwrap();
            }
            for (group, state) in &subsystem.groups {
                writeln!(toml, "[[subsystem.ana_group]]\nanagrpid = {group}").unwrap();
                writeln!(toml, "ana_state = \"{state}\"").unwrap();
            }
            // Those that are chosen must differ, and not be one that the others get by themselves.
            let mut taken = std::collections::BTreeSet::new();
            for namespace in &subsystem.namespaces {
                let bdev = BDEVS[namespace.bdev];
                writeln!(toml, "[[subsystem.namespace]]\nbdev = \"{bdev}\"").unwrap();
                if let Some(nsid) = namespace.nsid.map(|nsid| nsid + 20)
                    && taken.insert(nsid)
                {
                    writeln!(toml, "nsid = {nsid}").unwrap();
                }
                if let Some(uuid) = namespace.uuid {
                    writeln!(toml, "uuid = \"{}\"", uuid::Uuid::from_u128(uuid)).unwrap();
                }
                if let Some(group) = namespace.group {
                    writeln!(toml, "anagrpid = {group}").unwrap();
                }
                write_hosts(&mut toml, namespace.hosts.as_ref());
            }
        }
        toml
    }
}

fn free_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

fn save(rpc: &mut Client) -> Vec<Value> {
    let config = |name| {
        let config = rpc.ok("framework_get_config", json!({ "name": name }));
        config.as_array().unwrap().clone()
    };
    ["bdev", "nvmf"].into_iter().flat_map(config).collect()
}

/// What the file would change; nothing, when it says what runs.
fn differences(rpc: &mut Client, toml: &str) -> Value {
    let plan = rpc.ok("flexblk_apply", json!({ "toml": toml, "dry_run": true }));
    assert_eq!(plan["impossible"], json!([]), "{toml}");
    plan["changes"].clone()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn toml_running_saved_loaded_is_the_same(document in document()) {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state.json");
        let port = free_port();
        let toml = document.to_toml(port);
        let config = Config::from_toml(&toml, Path::new("t.toml")).unwrap();
        let start = |config: Config, socket: &str| {
            let target = Arc::new(Target::start(config).unwrap());
            let options = Options {
                rpc_socket: Some(directory.path().join(socket)),
                state_file: Some(state.clone()),
                ..Options::default()
            };
            let management = Management::start(&target, options).unwrap();
            (Client::new(management.rpc_socket().unwrap()), management, target)
        };
        let (mut rpc, management, target) = start(config, "1");
        prop_assert_eq!(differences(&mut rpc, &toml), json!([]));
        // Any change writes the state file.
        rpc.ok("nvmf_create_subsystem", json!({ "nqn": "nqn.2026-11.test:extra" }));
        rpc.ok("nvmf_delete_subsystem", json!({ "nqn": "nqn.2026-11.test:extra" }));
        let saved = save(&mut rpc);
        drop((rpc, management, target));

        // load_config, on a target without anything.
        let other = World::new();
        let mut loaded = other.client();
        for call in &saved {
            loaded.ok(call["method"].as_str().unwrap(), call["params"].clone());
        }
        prop_assert_eq!(save(&mut loaded), saved.clone());
        let same_port = toml.replace(
            &format!("udp_port = {port}"),
            &format!("udp_port = {}", other.target.config().listener.udp_port),
        );
        prop_assert_eq!(differences(&mut loaded, &same_port), json!([]));
        // From nothing to the file, too.
        let empty = format!("[listener]\nudp_port = {}\n", other.target.config().listener.udp_port);
        loaded.ok("flexblk_apply", json!({ "toml": empty }));
        loaded.ok("flexblk_apply", json!({ "toml": same_port }));
        prop_assert_eq!(differences(&mut loaded, &same_port), json!([]));

        // The state file, on a target that is started from nothing else.
        let mut config = Config::default();
        config.listener.udp_port = port;
        let (mut restored, _management, _target) = start(config, "2");
        prop_assert_eq!(save(&mut restored), saved);
        prop_assert_eq!(differences(&mut restored, &toml), json!([]));
    }
}

/// ANA states through one port, all groups of it, and write protection come back, too.
#[test]
fn what_only_calls_can_say_comes_back() {
    const NQN: &str = "nqn.2026-11.test:rpc";
    let world = World::new();
    let mut rpc = world.client();
    rpc.ok(
        "bdev_null_create",
        json!({ "name": "n", "block_size": 512, "num_blocks": 64 }),
    );
    rpc.ok(
        "nvmf_create_subsystem",
        json!({ "nqn": NQN, "allow_any_host": true }),
    );
    rpc.ok(
        "nvmf_subsystem_add_host",
        json!({ "nqn": NQN, "host": "nqn.2026-11.test:host" }),
    );
    let namespace = json!({ "bdev_name": "n", "no_auto_visible": true });
    rpc.ok(
        "nvmf_subsystem_add_ns",
        json!({ "nqn": NQN, "namespace": namespace }),
    );
    let protect = json!({ "nqn": NQN, "nsid": 1, "write_protect": "write_protect" });
    rpc.ok("flexblk_ns_set_write_protect", protect);
    let address = json!({ "trtype": "FLEXINS", "traddr": "127.0.0.1", "trsvcid": "4420" });
    for (state, group) in [("inaccessible", Value::Null), ("change", json!(7))] {
        let params = json!({
            "nqn": NQN, "listen_address": address, "ana_state": state, "anagrpid": group,
        });
        rpc.ok("nvmf_subsystem_listener_set_ana_state", params);
    }
    let saved = save(&mut rpc);
    let states = |calls: &[Value]| {
        let set = |call: &&Value| call["method"] == "nvmf_subsystem_listener_set_ana_state";
        calls.iter().filter(set).count()
    };
    assert_eq!(
        states(&saved),
        2,
        "one for all groups, one for the other: {saved:#?}"
    );
    let other = World::new();
    let mut loaded = other.client();
    for call in &saved {
        loaded.ok(call["method"].as_str().unwrap(), call["params"].clone());
    }
    assert_eq!(save(&mut loaded), saved);
    let listeners = loaded.ok("nvmf_subsystem_get_listeners", json!({ "nqn": NQN }));
    assert_eq!(listeners[0]["ana_states"][6]["ana_state"], "change");
    assert_eq!(listeners[0]["ana_states"][127]["ana_state"], "inaccessible");
    let shown = loaded.ok("nvmf_get_subsystems", json!({ "nqn": NQN }));
    assert_eq!(shown[0]["namespaces"][0]["write_protect"], "write_protect");
}
