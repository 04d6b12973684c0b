//! Addresses as users type them: nvme-cli's and SPDK's words, and one URI.

mod uri;
mod words;

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::ids::{HostId, Nsid};
use crate::log::discovery::{AddressFamily, Record, TransportType};
use crate::nqn::Nqn;

/// Port of I/O controllers when none is given (IANA `nvme`).
pub const DEFAULT_PORT: u16 = 4420;
/// Port of discovery controllers when none is given (IANA `nvme-disc`).
pub const DISCOVERY_PORT: u16 = 8009;

/// Transport that a controller is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrType {
    /// FlexiNS over UDP.
    Flexins,
    /// NVMe/TCP.
    Tcp,
    /// NVMe/RDMA (RoCEv2).
    Rdma,
}

impl TrType {
    /// The word users type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flexins => "flexins",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }

    /// As a discovery log entry says it.
    #[must_use]
    pub const fn to_discovery(self) -> TransportType {
        match self {
            Self::Flexins => TransportType::Flexins,
            Self::Tcp => TransportType::Tcp,
            Self::Rdma => TransportType::Rdma,
        }
    }

    /// From a discovery log entry; `None` for transports that are not spoken here.
    #[must_use]
    pub const fn from_discovery(trtype: TransportType) -> Option<Self> {
        match trtype {
            TransportType::Flexins => Some(Self::Flexins),
            TransportType::Tcp => Some(Self::Tcp),
            TransportType::Rdma => Some(Self::Rdma),
            _ => None,
        }
    }
}

impl fmt::Display for TrType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Address family (ADRFAM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdrFam {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl AdrFam {
    /// The word users type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    /// As a discovery log entry says it.
    #[must_use]
    pub const fn to_discovery(self) -> AddressFamily {
        match self {
            Self::Ipv4 => AddressFamily::Ipv4,
            Self::Ipv6 => AddressFamily::Ipv6,
        }
    }
}

impl fmt::Display for AdrFam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where a controller is and what is wanted of it.
///
/// Parsed from either form by [`str::parse`], printed as a URI by `Display` and as words by
/// [`TransportId::words`]. Words are `key=value` or `key:value`, separated by white space:
/// `trtype=flexins traddr=10.0.0.1 trsvcid=4420 subnqn=nqn... nsid=1 hostnqn=nqn... hostid=uuid`.
/// The URI is `nvme+flexins://host:port/subnqn?nsid=1&hostnqn=...&hostid=...`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TransportId {
    /// Transport.
    pub trtype: TrType,
    /// Family; `None` when it does not matter, which only a host name can leave open.
    pub adrfam: Option<AdrFam>,
    /// IP address (IPv6 without brackets) or host name.
    pub traddr: String,
    /// Port; see [`TransportId::port`].
    pub trsvcid: Option<u16>,
    /// Name of the subsystem; `None` asks the discovery service.
    pub subnqn: Option<Nqn>,
    /// Namespace.
    pub nsid: Option<Nsid>,
    /// Name to appear under.
    pub hostnqn: Option<Nqn>,
    /// Host identifier to appear under.
    pub hostid: Option<HostId>,
    /// Own address to connect from.
    pub host_traddr: Option<IpAddr>,
}

/// Why an address cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportIdError {
    /// Not `key=value`.
    #[error(
        "`{0}` is not of the form key=value; an address looks like `trtype=flexins traddr=10.0.0.1 subnqn=nqn...` or `nvme+flexins://10.0.0.1:4420/nqn...`"
    )]
    Word(String),
    /// A key that has no meaning.
    #[error(
        "unknown key `{key}` (value `{value}`); known are trtype, adrfam, traddr, trsvcid, subnqn, nsid, hostnqn, hostid, host_traddr"
    )]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// A value that does not fit its key.
    #[error("{key}={value}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key given twice.
    #[error("`{key}` is given twice, the second time as `{value}`")]
    Twice {
        /// The key.
        key: &'static str,
        /// The second value.
        value: String,
    },
    /// A key that must be there.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A scheme other than `nvme+flexins`, `nvme+tcp`, `nvme+rdma`.
    #[error("scheme `{0}` is not one of nvme+flexins, nvme+tcp, nvme+rdma")]
    Scheme(String),
    /// A malformed part of a URI.
    #[error("`{part}`: {reason}")]
    Uri {
        /// The part.
        part: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl TransportId {
    /// That address, everything else open.
    pub fn new(trtype: TrType, traddr: &str) -> Result<Self, TransportIdError> {
        let mut builder = words::Builder::default();
        builder.set("trtype", trtype.as_str())?;
        builder.set("traddr", traddr)?;
        builder.finish()
    }

    /// As [`str::parse`], but keys without a meaning here (`tx`, `digest`, ...) are handed back as
    /// they stand instead of being an error.
    pub fn parse_with_rest(text: &str) -> Result<(Self, Vec<(String, String)>), TransportIdError> {
        let text = text.trim();
        let mut builder = words::Builder::default();
        let mut rest = Vec::new();
        if uri::has_scheme(text) {
            uri::parse(text, &mut builder, &mut rest)?;
        } else {
            words::parse(text, &mut builder, &mut rest)?;
        }
        Ok((builder.finish()?, rest))
    }

    /// From a discovery log entry; `None` when its transport or address family is not spoken here,
    /// or its address makes no sense.
    #[must_use]
    pub fn from_record(record: &Record) -> Option<Self> {
        let adrfam = match record.adrfam {
            AddressFamily::Ipv4 => AdrFam::Ipv4,
            AddressFamily::Ipv6 => AdrFam::Ipv6,
            _ => return None,
        };
        let mut builder = words::Builder::default();
        builder
            .set("trtype", TrType::from_discovery(record.trtype)?.as_str())
            .ok()?;
        builder.set("adrfam", adrfam.as_str()).ok()?;
        builder.set("traddr", &record.traddr).ok()?;
        builder.set("trsvcid", &record.trsvcid).ok()?;
        builder.set("subnqn", record.subnqn.as_str()).ok()?;
        builder.finish().ok()
    }

    /// The port: the one given, 8009 for the discovery service, 4420 for everything else.
    #[must_use]
    pub fn port(&self) -> u16 {
        let default = if self.is_discovery() {
            DISCOVERY_PORT
        } else {
            DEFAULT_PORT
        };
        self.trsvcid.unwrap_or(default)
    }

    /// Does it lead to a discovery service: no subsystem, or its well-known name?
    #[must_use]
    pub fn is_discovery(&self) -> bool {
        self.subnqn.as_ref().is_none_or(Nqn::is_discovery)
    }

    /// The address as a number; `None` for a host name or an address with a zone (`fe80::1%eth0`).
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.traddr.parse().ok()
    }

    /// `host:port`, IPv6 in brackets.
    #[must_use]
    pub fn authority(&self) -> String {
        let port = self.port();
        if self.traddr.contains(':') {
            format!("[{}]:{port}", self.traddr)
        } else {
            format!("{}:{port}", self.traddr)
        }
    }

    /// The words, as SPDK and nvme-cli take them.
    #[must_use]
    pub fn words(&self) -> String {
        words::emit(self)
    }

    /// The URI.
    #[must_use]
    pub fn uri(&self) -> String {
        uri::emit(self)
    }
}

impl FromStr for TransportId {
    type Err = TransportIdError;

    fn from_str(text: &str) -> Result<Self, TransportIdError> {
        match Self::parse_with_rest(text)? {
            (id, rest) if rest.is_empty() => Ok(id),
            (_, rest) => {
                let (key, value) = rest.into_iter().next().unwrap_or_default();
                Err(TransportIdError::UnknownKey { key, value })
            }
        }
    }
}

impl fmt::Display for TransportId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.uri())
    }
}

/// Checks an address or host name, and gives the family that it determines.
fn check_host(host: &str) -> Result<Option<AdrFam>, &'static str> {
    if host.parse::<Ipv4Addr>().is_ok() {
        return Ok(Some(AdrFam::Ipv4));
    }
    let (address, zone) = match host.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (host, None),
    };
    if address.contains(':') {
        if address.parse::<Ipv6Addr>().is_err() {
            return Err("not an IPv6 address");
        }
        return match zone {
            Some(zone) if !is_zone(zone) => Err("the IPv6 zone is not an interface name"),
            _ => Ok(Some(AdrFam::Ipv6)),
        };
    }
    if host.is_empty() {
        return Err("the address is empty");
    }
    if host.len() > 253 {
        return Err("longer than a host name can be (253)");
    }
    // Digits and dots only is meant as an IPv4 address, and was not one.
    if host
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err("not an IPv4 address");
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.split('.').all(label) {
        Ok(None)
    } else {
        Err("not an IP address or a host name")
    }
}

/// An interface name or index (Linux: 15 bytes, no slash, no white space).
fn is_zone(zone: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'[' | b']' | b'%');
    (1..=15).contains(&zone.len()) && zone.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
