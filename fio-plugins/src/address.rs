//! From a job's options and a file name to the controller to connect to.

use std::collections::BTreeMap;
use std::time::Duration;

use flexblk_initiator::{
    ConnectOptions, Digest, EngineMode, FaultConfig, Host, Nsid, RxMode, TransportId, TxMode, discover,
};

use crate::options::Options;

/// One namespace of one subsystem, as a file of a job.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) connect: ConnectOptions,
    pub(crate) nsid: Nsid,
    /// The same for files that can share a connection.
    pub(crate) link: String,
}

/// Whether a file name says where to connect. fio makes up names like `job1.0.0` when a job has none.
pub(crate) fn is_address(file_name: &str) -> bool {
    file_name.contains('=') || file_name.contains("://")
}

/// The address of a file: what its name says, over what the options say.
pub(crate) fn resolve(options: &Options, file_name: &str) -> Result<Address, String> {
    let mut words = words_of_options(options);
    let mut id = if file_name.contains("://") {
        let from_name: TransportId = file_name.parse().map_err(|e| format!("filename={file_name}: {e}"))?;
        from_name
    } else {
        if is_address(file_name) {
            words_of_name(file_name, &mut words)?;
        }
        if !words.contains_key("traddr") {
            return Err("no target: set traddr=, or filename= to a transport id".to_owned());
        }
        let udp_port = words.remove("udp_port");
        let text = join(&words);
        let id: TransportId = text.parse().map_err(|e| format!("{text}: {e}"))?;
        if let Some(port) = udp_port {
            words.insert("udp_port", port);
        }
        id
    };
    let number = options.number("nsid");
    let nsid = match id.nsid {
        Some(nsid) => nsid,
        None => Nsid::new(number).map_err(|_| format!("nsid={number} is no namespace id"))?,
    };
    id.nsid = None;
    let mut connect = connect_options(options, id)?;
    if let Some(port) = words.get("udp_port") {
        connect.udp_port = port.parse().map_err(|_| format!("udp_port={port} is no port"))?;
    }
    if connect.target.subnqn.is_none() {
        only_subsystem(&mut connect)?;
    }
    let link = format!("{} udp_port={}", connect.target, connect.udp_port);
    Ok(Address { connect, nsid, link })
}

fn words_of_options(options: &Options) -> BTreeMap<&'static str, String> {
    let mut words = BTreeMap::new();
    for key in ["trtype", "adrfam", "traddr", "trsvcid", "subnqn", "hostnqn", "hostid"] {
        if let Some(value) = options.text(key) {
            words.insert(key, value.to_owned());
        }
    }
    words.entry("trtype").or_insert_with(|| "flexins".to_owned());
    words.insert("udp_port", options.number("udp_port").to_string());
    words
}

/// `key=value` words, as nvme-cli and SPDK write them.
fn words_of_name(name: &str, words: &mut BTreeMap<&'static str, String>) -> Result<(), String> {
    const KEYS: [(&str, &str); 10] = [
        ("trtype", "trtype"),
        ("adrfam", "adrfam"),
        ("traddr", "traddr"),
        ("trsvcid", "trsvcid"),
        ("subnqn", "subnqn"),
        ("nsid", "nsid"),
        ("ns", "nsid"),
        ("hostnqn", "hostnqn"),
        ("hostid", "hostid"),
        ("udp_port", "udp_port"),
    ];
    for word in name.split_whitespace() {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("filename={name}: {word:?} is not key=value"));
        };
        let Some((_, key)) = KEYS.iter().find(|(known, _)| known.eq_ignore_ascii_case(key)) else {
            let known: Vec<&str> = KEYS.iter().map(|(known, _)| *known).collect();
            return Err(format!("filename={name}: unknown word {key:?}; known: {}", known.join(" ")));
        };
        words.insert(key, value.to_owned());
    }
    Ok(())
}

fn join(words: &BTreeMap<&'static str, String>) -> String {
    let words: Vec<String> = words.iter().map(|(key, value)| format!("{key}={value}")).collect();
    words.join(" ")
}

fn connect_options(options: &Options, target: TransportId) -> Result<ConnectOptions, String> {
    let host = Host::load().map_err(|e| e.to_string())?;
    let mut connect = ConnectOptions::new(target);
    connect.host = host;
    if let Some(address) = options.text("host_traddr") {
        connect.host_traddr = Some(address.parse().map_err(|_| format!("host_traddr={address} is no IP address"))?);
    }
    let port = options.number("udp_port");
    connect.udp_port = u16::try_from(port).map_err(|_| format!("udp_port={port} is no port"))?;
    connect.kato = milliseconds(options, "kato_ms");
    connect.io_timeout = positive(options, "io_timeout_ms")?;
    connect.connect_timeout = positive(options, "connect_timeout_ms")?;
    connect.nr_io_queues = 1;
    connect.digest = if options.number("digest") == 0 { Digest::None } else { Digest::Crc32c };
    connect.tx = if options.number("tx") == 0 { TxMode::HeaderOnly } else { TxMode::Copy };
    if options.number("rx") == 1 {
        connect.rx = RxMode::ring();
    }
    let mtu = options.number("mtu");
    connect.mtu = (mtu != 0).then_some(mtu);
    let core = options.text("engine_core");
    let core = core
        .map(|core| core.parse().map_err(|_| format!("engine_core={core} is no CPU core")))
        .transpose()?;
    connect.engine = if options.number("engine") == 0 { EngineMode::Inline } else { EngineMode::Thread { core } };
    connect.poll_budget = Duration::from_micros(u64::from(options.number("poll_budget_us")));
    if let Some(fault) = options.text("fault") {
        let fault: FaultConfig = fault.parse().map_err(|e| format!("fault={fault}: {e}"))?;
        connect.fault = Some(fault);
    }
    connect.capture = options.text("capture").map(Into::into);
    Ok(connect)
}

fn milliseconds(options: &Options, name: &str) -> Duration {
    Duration::from_millis(u64::from(options.number(name)))
}

fn positive(options: &Options, name: &str) -> Result<Duration, String> {
    match options.number(name) {
        0 => Err(format!("{name}=0: it must be at least 1")),
        _ => Ok(milliseconds(options, name)),
    }
}

/// Without a subsystem NQN: the only I/O subsystem that the target shows.
fn only_subsystem(connect: &mut ConnectOptions) -> Result<(), String> {
    let log = discover(connect).map_err(|e| e.to_string())?;
    let mut found: Vec<TransportId> = log
        .records
        .into_iter()
        .filter(|record| record.subtype == "nvme subsystem")
        .filter_map(|record| record.target)
        .collect();
    found.dedup_by(|a, b| a.subnqn == b.subnqn);
    match found.as_slice() {
        [only] => {
            connect.target.subnqn.clone_from(&only.subnqn);
            connect.target.trsvcid.clone_from(&only.trsvcid);
            Ok(())
        }
        [] => Err("the target shows no subsystem to this host: set subnqn=".to_owned()),
        several => {
            let names: Vec<String> =
                several.iter().filter_map(|id| id.subnqn.as_ref()).map(ToString::to_string).collect();
            Err(format!("the target has several subsystems: set subnqn= to one of {}", names.join(", ")))
        }
    }
}
