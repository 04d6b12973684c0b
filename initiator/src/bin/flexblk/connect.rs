//! From the words on the command line to a connected namespace.

use anyhow::{Context, Result};
use flexblk_initiator::volume::{PathOptions, Volume, VolumeOptions};
use flexblk_initiator::{ConnectOptions, Controller, Host, Namespace, Nsid, TrType, TransportId};

use crate::args::{Address, Connection};
use crate::exit::Usage;
use crate::paths::Paths;

/// Does this argument of `copy` name a target rather than a file?
pub(crate) fn is_target(text: &str) -> bool {
    text.starts_with("nvme+")
        || text
            .split_whitespace()
            .any(|word| word.starts_with("traddr="))
}

/// The options for a subsystem (or, `discovery`, for a discovery service).
pub(crate) fn options(
    address: &Address,
    connection: &Connection,
    discovery: bool,
) -> Result<ConnectOptions> {
    let host = Host::load().context("host identity")?;
    let mut options = match &address.target {
        Some(text) => ConnectOptions::parse(text, host)?,
        None => ConnectOptions::parse(&words_of(address)?, host)?,
    };
    override_target(&mut options.target, address, connection)?;
    if !discovery && options.target.subnqn.is_none() {
        return Err(Usage("which subsystem? Give its NQN with -n, or in the URI; `flexblk discover` lists what is there".into()).into());
    }
    for (word, value) in [
        ("engine", &connection.engine),
        ("tx", &connection.tx),
        ("rx", &connection.rx),
        ("digest", &connection.digest),
        ("fault", &connection.fault),
    ] {
        if let Some(value) = value {
            options.set(word, value)?;
        }
    }
    options.host_traddr = connection.host_traddr.or(options.host_traddr);
    options.udp_port = connection.udp_port.unwrap_or(options.udp_port);
    options.kato = connection.kato.unwrap_or(options.kato);
    options.io_timeout = connection.io_timeout.unwrap_or(options.io_timeout);
    options.connect_timeout = connection
        .connect_timeout
        .unwrap_or(options.connect_timeout);
    options.poll_budget = connection.poll_budget().unwrap_or(options.poll_budget);
    options.mtu = connection.mtu.or(options.mtu);
    options.hdr_digest |= connection.hdr_digest;
    options.data_digest |= connection.data_digest;
    options.capture = connection.capture.clone().or(options.capture);
    Ok(options)
}

/// Connects and finds the namespace that is meant.
pub(crate) fn open(address: &Address, connection: &Connection) -> Result<(Controller, Namespace)> {
    let options = options(address, connection, false)?;
    let nsid = options.target.nsid.unwrap_or(Nsid::new(1));
    let controller = Controller::connect(&options)?;
    let namespace = controller.namespace(nsid)?;
    Ok((controller, namespace))
}

/// A namespace with all of its paths, for `queues` threads: as many I/O queues are asked for on each path.
pub(crate) fn volume(
    address: &Address,
    paths: &Paths,
    connection: &Connection,
    queues: u16,
) -> Result<Volume> {
    let mut all = vec![options(address, connection, false)?];
    for text in &paths.more {
        let address = Address {
            target: Some(text.clone()),
            ..Address::default()
        };
        let mut path = options(&address, connection, false)?;
        // Our words are about all paths; what an address says itself is about that one.
        let (_, own) = TransportId::parse_with_rest(text)
            .map_err(|error| Usage(format!("--path {text}: {error}")))?;
        for (word, value) in &own {
            path.set(word, value)?;
        }
        all.push(path);
    }
    let poll_budget = all
        .first()
        .map_or_else(Default::default, |first| first.poll_budget);
    let path = |mut connect: ConnectOptions| {
        connect.nr_io_queues = connect.nr_io_queues.max(queues);
        PathOptions {
            nsid: connect.target.nsid,
            connect,
        }
    };
    let options = VolumeOptions {
        paths: all.into_iter().map(path).collect(),
        poll_budget,
    };
    Ok(Volume::open_with(&options, &paths.options()?)?)
}

/// The address as words, when there is no positional target.
fn words_of(address: &Address) -> Result<String> {
    let Some(traddr) = &address.traddr else {
        return Err(Usage(
            "which target? Give nvme+flexins://HOST/SUBNQN, or -a ADDRESS -n SUBNQN".into(),
        )
        .into());
    };
    Ok(format!(
        "trtype={} traddr={traddr}",
        address.trtype.as_deref().unwrap_or("flexins")
    ))
}

/// A word given on its own wins over the same word in the target.
fn override_target(
    target: &mut TransportId,
    address: &Address,
    connection: &Connection,
) -> Result<()> {
    fn value<T: std::str::FromStr>(word: &str, text: &Option<String>) -> Result<Option<T>>
    where
        T::Err: std::fmt::Display,
    {
        text.as_deref()
            .map(|text| {
                text.parse()
                    .map_err(|e| Usage(format!("{word} '{text}': {e}")).into())
            })
            .transpose()
    }
    if let Some(text) = &address.trtype {
        let known = [TrType::Flexins, TrType::Tcp, TrType::Rdma];
        target.trtype = *known
            .iter()
            .find(|known| known.as_str() == text)
            .ok_or_else(|| Usage(format!("-t {text}: use flexins or tcp")))?;
    }
    if let (Some(traddr), true) = (&address.traddr, address.target.is_some()) {
        let fresh = TransportId::new(target.trtype, traddr)
            .map_err(|e| Usage(format!("-a {traddr}: {e}")))?;
        (target.traddr, target.adrfam) = (fresh.traddr, fresh.adrfam);
    }
    target.trsvcid = value("-s", &address.trsvcid)?.or(target.trsvcid);
    target.subnqn = value("-n", &address.subnqn)?.or(target.subnqn.take());
    target.nsid = address.nsid.map(Nsid::new).or(target.nsid);
    target.hostnqn = value("-q", &connection.hostnqn)?.or(target.hostnqn.take());
    target.hostid = value("-I", &connection.hostid)?.or(target.hostid);
    Ok(())
}
