//! `key=value` words, and the builder that both forms fill.

use core::net::IpAddr;

use super::{AdrFam, TrType, TransportId, TransportIdError, check_host};
use crate::ids::Nsid;
use crate::nqn::Nqn;

/// Values as far as they are known.
#[derive(Default)]
pub(super) struct Builder {
    trtype: Option<TrType>,
    adrfam: Option<AdrFam>,
    traddr: Option<String>,
    trsvcid: Option<u16>,
    subnqn: Option<Nqn>,
    nsid: Option<Nsid>,
    hostnqn: Option<Nqn>,
    hostid: Option<crate::ids::HostId>,
    host_traddr: Option<IpAddr>,
}

/// The one name of a key for the names that nvme-cli and SPDK have for it.
fn canonical(key: &str) -> Option<&'static str> {
    Some(match key.to_ascii_lowercase().as_str() {
        "trtype" | "transport" => "trtype",
        "adrfam" => "adrfam",
        "traddr" => "traddr",
        "trsvcid" => "trsvcid",
        "subnqn" | "nqn" => "subnqn",
        "nsid" | "ns" => "nsid",
        "hostnqn" => "hostnqn",
        "hostid" => "hostid",
        "host_traddr" | "host-traddr" | "hostaddr" => "host_traddr",
        _ => return None,
    })
}

impl Builder {
    /// Sets a key. `Ok(false)` when it has no meaning here.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<bool, TransportIdError> {
        let Some(key) = canonical(key) else {
            return Ok(false);
        };
        let fits = match key {
            "trtype" => put(&mut self.trtype, trtype(value), key, value)?,
            "adrfam" => put(&mut self.adrfam, adrfam(value), key, value)?,
            "traddr" => put(&mut self.traddr, traddr(value), key, value)?,
            "trsvcid" => put(&mut self.trsvcid, trsvcid(value), key, value)?,
            "subnqn" => put(&mut self.subnqn, nqn(value), key, value)?,
            "nsid" => put(&mut self.nsid, nsid(value), key, value)?,
            "hostnqn" => put(&mut self.hostnqn, nqn(value), key, value)?,
            "hostid" => {
                let id = value.parse().map_err(|_| "not a UUID".to_owned());
                put(&mut self.hostid, id, key, value)?
            }
            _ => {
                let ip = value.parse().map_err(|_| "not an IP address".to_owned());
                put(&mut self.host_traddr, ip, key, value)?
            }
        };
        Ok(fits)
    }

    /// Checks what only the whole shows.
    pub(super) fn finish(self) -> Result<TransportId, TransportIdError> {
        let trtype = self.trtype.ok_or(TransportIdError::Missing("trtype"))?;
        let traddr = self.traddr.ok_or(TransportIdError::Missing("traddr"))?;
        let family = check_host(&traddr).map_err(|reason| TransportIdError::Value {
            key: "traddr",
            value: traddr.clone(),
            reason: reason.to_owned(),
        })?;
        let adrfam = match (self.adrfam, family) {
            (Some(asked), Some(is)) if asked != is => {
                let value = asked.to_string();
                let reason = format!("but traddr={traddr} is an {is} address");
                return Err(TransportIdError::Value {
                    key: "adrfam",
                    value,
                    reason,
                });
            }
            (asked, is) => asked.or(is),
        };
        Ok(TransportId {
            trtype,
            adrfam,
            traddr,
            trsvcid: self.trsvcid,
            subnqn: self.subnqn,
            nsid: self.nsid,
            hostnqn: self.hostnqn,
            hostid: self.hostid,
            host_traddr: self.host_traddr,
        })
    }
}

fn put<T>(
    place: &mut Option<T>,
    parsed: Result<T, String>,
    key: &'static str,
    value: &str,
) -> Result<bool, TransportIdError> {
    let value = || value.to_owned();
    if place.is_some() {
        return Err(TransportIdError::Twice {
            key,
            value: value(),
        });
    }
    match parsed {
        Ok(parsed) => *place = Some(parsed),
        Err(reason) => {
            return Err(TransportIdError::Value {
                key,
                value: value(),
                reason,
            });
        }
    }
    Ok(true)
}

fn trtype(value: &str) -> Result<TrType, String> {
    [TrType::Flexins, TrType::Tcp, TrType::Rdma]
        .into_iter()
        .find(|trtype| trtype.as_str().eq_ignore_ascii_case(value))
        .ok_or_else(|| "not one of flexins, tcp, rdma".to_owned())
}

fn adrfam(value: &str) -> Result<AdrFam, String> {
    [AdrFam::Ipv4, AdrFam::Ipv6]
        .into_iter()
        .find(|adrfam| adrfam.as_str().eq_ignore_ascii_case(value))
        .ok_or_else(|| "not one of ipv4, ipv6".to_owned())
}

fn traddr(value: &str) -> Result<String, String> {
    let bare = value
        .strip_prefix('[')
        .and_then(|value| value.strip_suffix(']'));
    let host = match bare {
        Some(bare) if bare.contains(':') => bare,
        _ => value,
    };
    check_host(host)
        .map(|_| host.to_owned())
        .map_err(str::to_owned)
}

pub(super) fn trsvcid(value: &str) -> Result<u16, String> {
    let port = value
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| value.parse().ok());
    match port.flatten() {
        Some(port @ 1..) => Ok(port),
        _ => Err("not a port number (1 to 65535)".to_owned()),
    }
}

fn nqn(value: &str) -> Result<Nqn, String> {
    Nqn::opaque(value).map_err(|error| error.to_string())
}

fn nsid(value: &str) -> Result<Nsid, String> {
    let parsed = match value.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u32::from_str_radix(hex, 16).ok()
        }
        None if value.bytes().all(|byte| byte.is_ascii_digit()) => value.parse().ok(),
        _ => None,
    };
    parsed
        .map(Nsid::new)
        .filter(|nsid| nsid.is_single())
        .ok_or_else(|| "not a namespace identifier (1 to 4294967294)".to_owned())
}

/// Reads words into the builder, those it does not know into `rest`.
pub(super) fn parse(
    text: &str,
    builder: &mut Builder,
    rest: &mut Vec<(String, String)>,
) -> Result<(), TransportIdError> {
    for word in text.split_whitespace() {
        let (key, value) = word
            .split_once(['=', ':'])
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| TransportIdError::Word(word.to_owned()))?;
        if !builder.set(key, value)? {
            rest.push((key.to_owned(), value.to_owned()));
        }
    }
    Ok(())
}

/// The words of everything that is set.
pub(super) fn emit(id: &TransportId) -> String {
    let mut text = format!("trtype={}", id.trtype);
    let mut word = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(" {key}={value}"));
        }
    };
    word("adrfam", id.adrfam.map(|adrfam| adrfam.to_string()));
    word("traddr", Some(id.traddr.clone()));
    word("trsvcid", id.trsvcid.map(|port| port.to_string()));
    word("subnqn", id.subnqn.as_ref().map(ToString::to_string));
    word("nsid", id.nsid.map(|nsid| nsid.to_string()));
    word("hostnqn", id.hostnqn.as_ref().map(ToString::to_string));
    word("hostid", id.hostid.map(|hostid| hostid.to_string()));
    word("host_traddr", id.host_traddr.map(|ip| ip.to_string()));
    text
}
