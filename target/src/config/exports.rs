//! What the file exports: subsystems, their namespaces, and what the discovery service says.

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::{Nqn, Nsid};
use serde::Deserialize;
use toml::Spanned;
use uuid::Uuid;

use super::ana::parse_ana_state;
use super::file::{ConfigError, parse_listen, parse_nqn};
use super::place::Place;
use super::{
    AllowedHosts, AnaGroup, Discovery, ListenAddress, MAX_ALLOWED_HOSTS, MAX_ANA_GROUPS,
    MAX_LISTENERS, MAX_NSID, MAX_REFERRALS, Namespace, Referral, Subsystem, Transport,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SubsystemTable {
    pub(super) nqn: Spanned<String>,
    serial: Option<Spanned<String>>,
    model: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
    listener: Option<Vec<ListenTable>>,
    #[serde(default)]
    ana_group: Vec<AnaGroupTable>,
    #[serde(default)]
    namespace: Vec<NamespaceTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamespaceTable {
    nsid: Option<Spanned<u64>>,
    bdev: Spanned<String>,
    uuid: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
    anagrpid: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnaGroupTable {
    anagrpid: Spanned<u64>,
    ana_state: Spanned<String>,
    /// Transport of the listener.
    trtype: Option<Transport>,
    address: Option<Spanned<String>>,
}

/// Where something is reached.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenTable {
    #[serde(default)]
    trtype: Transport,
    address: Spanned<String>,
}

impl ListenTable {
    fn check(self, at: &Place<'_>) -> Result<ListenAddress, ConfigError> {
        let address = parse_listen(self.address.as_ref())
            .map_err(|what| at.value(&self.address.span(), "address", what))?;
        Ok(ListenAddress {
            trtype: self.trtype,
            address,
        })
    }
}

fn listeners(at: &Place<'_>, tables: Vec<ListenTable>) -> Result<Vec<ListenAddress>, ConfigError> {
    if tables.len() > MAX_LISTENERS {
        let what = format!("at most {MAX_LISTENERS} listeners are possible");
        return Err(at.line(0, "listener", what));
    }
    let mut listeners = Vec::with_capacity(tables.len());
    for table in tables {
        let span = table.address.span();
        let listener = table.check(at)?;
        if listeners.contains(&listener) {
            return Err(at.value(&span, "address", "the listener is there twice"));
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DiscoveryTable {
    nqn: Option<Spanned<String>>,
    #[serde(default)]
    listener: Vec<ListenTable>,
    #[serde(default)]
    referral: Vec<ReferralTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReferralTable {
    #[serde(default)]
    trtype: Transport,
    address: Spanned<String>,
    nqn: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
}

impl DiscoveryTable {
    pub(super) fn check(self, at: &Place<'_>) -> Result<Discovery, ConfigError> {
        let name = |nqn: Option<Spanned<String>>| {
            nqn.map(|nqn| parse_nqn(nqn.as_ref()).map_err(|e| at.value(&nqn.span(), "nqn", e)))
                .transpose()
        };
        if self.referral.len() > MAX_REFERRALS {
            let what = format!("at most {MAX_REFERRALS} referrals are possible");
            return Err(at.line(0, "referral", what));
        }
        let mut discovery = Discovery {
            nqn: name(self.nqn)?,
            listeners: listeners(at, self.listener)?,
            referrals: Vec::new(),
        };
        for table in self.referral {
            let span = table.address.span();
            let address = table.address.as_ref().parse().map_err(|_| {
                let what = "write an address and a port, such as \"192.0.2.7:8009\"";
                at.value(&span, "address", what)
            })?;
            discovery.referrals.push(Referral {
                trtype: table.trtype,
                address,
                nqn: name(table.nqn)?,
                hosts: allowed_hosts(at, table.allow_hosts)?,
            });
        }
        Ok(discovery)
    }
}

fn allowed_hosts(
    at: &Place<'_>,
    hosts: Option<Spanned<Vec<Spanned<String>>>>,
) -> Result<AllowedHosts, ConfigError> {
    let Some(hosts) = hosts else {
        return Ok(AllowedHosts::Any);
    };
    if hosts.as_ref().len() > MAX_ALLOWED_HOSTS {
        let what = format!("at most {MAX_ALLOWED_HOSTS} hosts can be listed");
        return Err(at.value(&hosts.span(), "allow_hosts", what));
    }
    let names = hosts.into_inner().into_iter().map(|host| {
        Nqn::opaque(host.as_ref()).map_err(|e| at.value(&host.span(), "allow_hosts", e))
    });
    Ok(AllowedHosts::Only(names.collect::<Result<_, _>>()?))
}

impl SubsystemTable {
    pub(super) fn check(self, at: &Place<'_>, bdevs: &[&str]) -> Result<Subsystem, ConfigError> {
        let nqn = parse_nqn(self.nqn.as_ref()).map_err(|e| at.value(&self.nqn.span(), "nqn", e))?;
        let mut subsystem = Subsystem::new(nqn);
        subsystem.serial = at.ascii(self.serial, "serial", 20)?;
        subsystem.model = at.ascii(self.model, "model", 40)?;
        subsystem.hosts = allowed_hosts(at, self.allow_hosts)?;
        subsystem.listeners = self
            .listener
            .map(|tables| listeners(at, tables))
            .transpose()?;
        for group in self.ana_group {
            let id = at.number(&group.anagrpid, "anagrpid", 1..=u64::from(MAX_ANA_GROUPS))?;
            let listener = match group.address {
                Some(address) => Some(ListenTable {
                    trtype: group.trtype.unwrap_or_default(),
                    address,
                }),
                None if group.trtype.is_some() => {
                    let what = "a transport needs an address besides";
                    return Err(at.value(&group.anagrpid.span(), "trtype", what));
                }
                None => None,
            };
            let listener = listener.map(|listener| listener.check(at)).transpose()?;
            let same = |other: &AnaGroup| (other.anagrpid, other.listener) == (id, listener);
            if subsystem.ana_groups.iter().any(same) {
                let span = group.anagrpid.span();
                return Err(at.value(&span, "anagrpid", "the group is listed twice"));
            }
            let state = parse_ana_state(group.ana_state.as_ref())
                .map_err(|what| at.value(&group.ana_state.span(), "ana_state", what))?;
            subsystem.ana_groups.push(AnaGroup {
                anagrpid: id,
                state,
                listener,
            });
        }
        for table in self.namespace {
            let span = table.nsid.as_ref().map(Spanned::span);
            let namespace = table.check(at, bdevs)?;
            let taken = |other: &Namespace| other.nsid.is_some() && other.nsid == namespace.nsid;
            if let Some(span) = span
                && subsystem.namespaces.iter().any(taken)
            {
                return Err(at.value(&span, "nsid", "another namespace of this subsystem has it"));
            }
            subsystem.namespaces.push(namespace);
        }
        Ok(subsystem)
    }
}

impl NamespaceTable {
    fn check(self, at: &Place<'_>, bdevs: &[&str]) -> Result<Namespace, ConfigError> {
        let mut namespace = Namespace::new(self.bdev.as_ref().clone());
        if !bdevs.contains(&self.bdev.as_ref().as_str()) {
            // Not a name: a short form, which carries its own device.
            let short: Result<BdevConfig, _> = self.bdev.as_ref().parse();
            short.map_err(|e| at.value(&self.bdev.span(), "bdev", e))?;
        }
        if let Some(nsid) = self.nsid {
            let number = at.number(&nsid, "nsid", 1..=u64::from(MAX_NSID))?;
            namespace.nsid = Some(Nsid::new(number));
        }
        if let Some(uuid) = self.uuid {
            let parsed: Uuid = uuid
                .as_ref()
                .parse()
                .map_err(|e| at.value(&uuid.span(), "uuid", e))?;
            namespace.uuid = Some(parsed);
        }
        namespace.hosts = allowed_hosts(at, self.allow_hosts)?;
        if let Some(group) = self.anagrpid {
            let groups = 1..=u64::from(MAX_ANA_GROUPS);
            namespace.anagrpid = at.number(&group, "anagrpid", groups)?;
        }
        Ok(namespace)
    }
}
