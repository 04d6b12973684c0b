//! Transports and where they listen, in SPDK's words.

use std::net::SocketAddr;

use flexblk_nvme::log::discovery::TransportType;
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Result, RpcError};
use crate::target::Target;

/// Names of the transports.
const FLEXINS: &str = "FLEXINS";
const TCP: &str = "TCP";

/// The name of a queue's transport.
pub(crate) fn trtype(transport: TransportType) -> &'static str {
    match transport {
        TransportType::Tcp => TCP,
        _ => FLEXINS,
    }
}

/// A transport's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) trtype: &'static str,
    pub(crate) address: SocketAddr,
}

impl Address {
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "trtype": self.trtype,
            "adrfam": adrfam(self.address),
            "traddr": self.address.ip().to_string(),
            "trsvcid": self.address.port().to_string(),
        })
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
        trtype: FLEXINS,
        address: target.config().listener.address,
    };
    let tcp = target.tcp_address().map(|address| Address {
        trtype: TCP,
        address,
    });
    std::iter::once(flexins).chain(tcp).collect()
}

/// The transports, with what SPDK calls their parameters.
pub(crate) fn transports(target: &Target) -> Vec<Value> {
    let limits = target.config().limits;
    let transports = addresses(target).into_iter().map(|ours| {
        json!({
            "trtype": ours.trtype,
            "max_queue_depth": limits.queue_entries,
            "max_io_qpairs_per_ctrlr": limits.io_queues,
            "in_capsule_data_size": crate::thread::MAX_IN_CAPSULE_BYTES,
            "max_aq_depth": crate::queue::ADMIN_ENTRIES,
        })
    });
    transports.collect()
}

/// Reads a transport address out of parameters, and finds ours that it means.
pub(super) fn find(target: &Target, mut params: Params) -> Result<Address> {
    let trtype: String = params.required("trtype")?;
    let traddr: String = params.required("traddr")?;
    let trsvcid: Option<String> = params.optional("trsvcid")?;
    let family: Option<String> = params.optional("adrfam")?;
    params.end()?;
    let ours = addresses(target);
    let meant = ours.iter().find(|ours| {
        ours.trtype.eq_ignore_ascii_case(&trtype)
            && traddr.parse() == Ok(ours.address.ip())
            && trsvcid
                .as_ref()
                .is_none_or(|port| *port == ours.address.port().to_string())
            && family
                .as_ref()
                .is_none_or(|family| family.eq_ignore_ascii_case(adrfam(ours.address)))
    });
    meant.cloned().ok_or_else(|| {
        let shown: Vec<String> = ours
            .iter()
            .map(|ours| format!("{} {}", ours.trtype, ours.address))
            .collect();
        RpcError::params(format!(
            "the target does not listen on {trtype} {traddr} {}; addresses are settled when it \
             starts (--listen, --tcp), and are {}",
            trsvcid.unwrap_or_default(),
            shown.join(", ")
        ))
    })
}
