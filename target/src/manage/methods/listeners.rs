//! Transports and where they listen, in SPDK's words.

use std::net::SocketAddr;

use flexblk_nvme::log::discovery::TransportType;
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Result, RpcError};
use crate::config::Transport;
use crate::controller::portid;
use crate::target::Target;

/// A transport's name; the JSON-RPC clients of SPDK compare it in any case.
pub(crate) const fn name(transport: Transport) -> &'static str {
    match transport {
        Transport::Flexins => "FLEXINS",
        Transport::Tcp => "TCP",
    }
}

/// The name of a queue's transport.
pub(crate) fn trtype(transport: TransportType) -> &'static str {
    name(match transport {
        TransportType::Tcp => Transport::Tcp,
        _ => Transport::Flexins,
    })
}

/// A transport's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) trtype: Transport,
    pub(crate) address: SocketAddr,
    /// The port's identifier in the discovery log; 0 for an address that is not ours.
    pub(crate) port: u16,
}

impl Address {
    pub(crate) fn to_json(self) -> Value {
        peer(name(self.trtype), self.address)
    }
}

/// A host's end of a connection.
pub(crate) fn peer(trtype: &str, address: SocketAddr) -> Value {
    json!({
        "trtype": trtype,
        "adrfam": adrfam(address),
        "traddr": address.ip().to_string(),
        "trsvcid": address.port().to_string(),
    })
}

fn adrfam(address: SocketAddr) -> &'static str {
    match address {
        SocketAddr::V4(_) => "IPv4",
        SocketAddr::V6(_) => "IPv6",
    }
}

/// Where the target listens: every subsystem can be reached there.
pub(crate) fn addresses(target: &Target) -> Vec<Address> {
    let flexins = Address {
        trtype: Transport::Flexins,
        address: target.config().listener.address,
        port: portid(TransportType::Flexins),
    };
    let tcp = target.tcp_address().map(|address| Address {
        trtype: Transport::Tcp,
        address,
        port: portid(TransportType::Tcp),
    });
    std::iter::once(flexins).chain(tcp).collect()
}

/// The transports, with what SPDK calls their parameters.
pub(crate) fn transports(target: &Target) -> Vec<Value> {
    let limits = target.config().limits;
    let transports = addresses(target).into_iter().map(|ours| {
        json!({
            "trtype": name(ours.trtype),
            "max_queue_depth": limits.queue_entries,
            "max_io_qpairs_per_ctrlr": limits.io_queues,
            "in_capsule_data_size": crate::thread::MAX_IN_CAPSULE_BYTES,
            "max_aq_depth": crate::queue::ADMIN_ENTRIES,
        })
    });
    transports.collect()
}

/// Reads a whole transport address out of parameters.
pub(super) fn parse(mut params: Params) -> Result<Address> {
    let trtype: String = params.required("trtype")?;
    let traddr: String = params.required("traddr")?;
    let trsvcid: Option<String> = params.optional("trsvcid")?;
    let family: Option<String> = params.optional("adrfam")?;
    let transport = [Transport::Flexins, Transport::Tcp]
        .into_iter()
        .find(|transport| name(*transport).eq_ignore_ascii_case(&trtype));
    let transport = transport
        .ok_or_else(|| params.wrong("trtype", "FLEXINS or TCP", &trtype.as_str().into()))?;
    let ip = traddr
        .parse()
        .map_err(|_| params.wrong("traddr", "an IP address", &traddr.as_str().into()))?;
    let port = match &trsvcid {
        None => crate::config::DEFAULT_LISTEN.port(),
        Some(text) => match text.parse() {
            Ok(port) if port != 0 => port,
            _ => return Err(params.wrong("trsvcid", "a port, 1 to 65535", &text.as_str().into())),
        },
    };
    let address = SocketAddr::new(ip, port);
    if let Some(family) = &family
        && !family.eq_ignore_ascii_case(adrfam(address))
    {
        return Err(params.wrong("adrfam", adrfam(address), &family.as_str().into()));
    }
    params.end()?;
    Ok(Address {
        trtype: transport,
        address,
        port: 0,
    })
}

/// Reads a transport address out of parameters, and finds ours that it means.
pub(super) fn find(target: &Target, params: Params) -> Result<Address> {
    let meant = parse(params)?;
    let ours = addresses(target);
    let found = ours
        .iter()
        .find(|ours| (ours.trtype, ours.address) == (meant.trtype, meant.address));
    found.copied().ok_or_else(|| {
        let shown: Vec<String> = ours
            .iter()
            .map(|ours| format!("{} {}", name(ours.trtype), ours.address))
            .collect();
        RpcError::params(format!(
            "the target does not listen on {} {}; addresses are settled when it starts (--listen, \
             --tcp), and are {}",
            name(meant.trtype),
            meant.address,
            shown.join(", ")
        ))
    })
}
