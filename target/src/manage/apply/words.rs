//! Hosts, addresses, ANA states and latencies in the words of a difference.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::log::ana::AnaState;

use crate::config::{self, AllowedHosts, ListenAddress, Referral, ana_state_word};
use crate::snapshot::{AnaGroup, Snapshot};

/// States of a group: through all listeners, and through single ones.
#[derive(Clone, Debug)]
pub(super) struct States {
    pub(super) all: AnaState,
    pub(super) single: BTreeMap<ListenAddress, AnaState>,
}

impl Default for States {
    fn default() -> Self {
        Self {
            all: AnaState::Optimized,
            single: BTreeMap::new(),
        }
    }
}

impl States {
    pub(super) fn wanted(groups: &[config::AnaGroup], id: u32) -> Self {
        let mut states = Self::default();
        for group in groups.iter().filter(|group| group.anagrpid == id) {
            match group.listener {
                None => states.all = group.state,
                Some(listen) => {
                    states.single.insert(listen, group.state);
                }
            }
        }
        states
    }

    pub(super) fn running(group: &AnaGroup, snapshot: &Snapshot) -> Self {
        let ports = group.ports.iter();
        let single = ports.filter_map(|(id, state)| Some((snapshot.port(*id)?.listen, *state)));
        Self {
            all: group.state,
            single: single.collect(),
        }
    }

    fn through(&self, listen: &ListenAddress) -> AnaState {
        self.single.get(listen).copied().unwrap_or(self.all)
    }

    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        let mut listeners = self.single.keys().chain(other.single.keys());
        self.all == other.all
            && listeners.all(|listen| self.through(listen) == other.through(listen))
    }
}

impl std::fmt::Display for States {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(ana_state_word(self.all))?;
        for (listen, state) in &self.single {
            write!(f, ", {} through {listen}", ana_state_word(*state))?;
        }
        Ok(())
    }
}

/// Addresses, in words.
pub(super) fn listeners(listeners: Option<&Vec<ListenAddress>>) -> String {
    match listeners {
        None => "all from the start".to_owned(),
        Some(listeners) if listeners.is_empty() => "none".to_owned(),
        Some(listeners) => {
            let shown: Vec<String> = listeners.iter().map(ToString::to_string).collect();
            shown.join(", ")
        }
    }
}

/// The lines about a referral that comes or goes.
pub(super) fn referral(sign: char, referral: &Referral) -> String {
    let listen = ListenAddress {
        trtype: referral.trtype,
        address: referral.address,
    };
    let hosts = hosts(&referral.hosts);
    let mut line = format!("{sign} referral to {listen} for {hosts}");
    if let Some(nqn) = &referral.nqn {
        let _ = write!(line, ", by the name {}", nqn.as_str());
    }
    line
}

pub(super) fn hosts(hosts: &AllowedHosts) -> String {
    match hosts {
        AllowedHosts::Any | AllowedHosts::AnyAnd(_) => "any host".to_owned(),
        AllowedHosts::Only(names) if names.is_empty() => "no host".to_owned(),
        AllowedHosts::Only(names) => {
            let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
            names.join(", ")
        }
    }
}

/// A delay device's latencies, in the file's words.
pub(super) fn latencies(config: &BdevConfig) -> String {
    let BdevConfig::Delay(delay) = config else {
        return String::new();
    };
    let p99 = |average, p99: Option<u64>| p99.unwrap_or(average);
    format!(
        "read {} us (p99 {}), write {} us (p99 {}), flush {} us",
        delay.avg_read_latency,
        p99(delay.avg_read_latency, delay.p99_read_latency),
        delay.avg_write_latency,
        p99(delay.avg_write_latency, delay.p99_write_latency),
        delay.flush_latency,
    )
}
