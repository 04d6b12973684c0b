//! ANA groups: their states, and which namespace is in which. SPDK knows a group's state through a
//! listener only; a state through all of them, whatever they are, has a method of ours.

use std::collections::BTreeSet;

use flexblk_nvme::Nsid;
use flexblk_nvme::log::ana::AnaState;
use serde_json::{Value, json};

use super::super::params::{Param, Params};
use super::nvmf::subsystem_name;
use super::{Context, Method, Result, RpcError, change, listeners};
use crate::config::{MAX_ANA_GROUPS, ana_state_word, parse_ana_state};
use crate::snapshot::Subsystem;

pub(super) const METHODS: &[Method] = &[
    change("nvmf_subsystem_listener_set_ana_state", listener_state),
    change("nvmf_subsystem_set_ns_ana_group", namespace_group),
    change("flexblk_subsystem_set_ana_state", state),
];

impl Param for AnaState {
    const WHAT: &'static str = "optimized, non_optimized, inaccessible, persistent_loss or change";
    fn read(value: &Value) -> Option<Self> {
        parse_ana_state(value.as_str()?).ok()
    }
}

/// The state of a group, or of all groups, through one listener.
fn listener_state(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let listen = listeners::listen_address(&mut params)?;
    let state: AnaState = params.required("ana_state")?;
    let group: Option<u32> = params.optional("anagrpid")?;
    params.end()?;
    let changed = context.target.change(|draft| {
        let port = draft.port_of(&nqn, &listen)?;
        draft.set_ana_state(&nqn, group, Some(port), state)
    });
    changed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

/// The state of a group, or of all groups, through every listener.
fn state(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let state: AnaState = params.required("ana_state")?;
    let group: Option<u32> = params.optional("anagrpid")?;
    params.end()?;
    let changed = context.target.set_ana_state(&nqn, group, None, state);
    changed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

fn namespace_group(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let nsid: Nsid = params.required("nsid")?;
    let group: u32 = params.required("anagrpid")?;
    params.end()?;
    let changed = context.target.set_ana_group(&nqn, nsid, group);
    changed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

/// States through a port, of the groups that have members or of which something was said.
pub(super) fn states(subsystem: &Subsystem, port: u16) -> Value {
    let mut groups: BTreeSet<u32> = subsystem.ana_groups.iter().map(|group| group.id).collect();
    groups.extend(subsystem.active().map(|namespace| namespace.anagrpid));
    groups.insert(1);
    let states = groups.into_iter().map(|group| {
        json!({
            "ana_group": group,
            "ana_state": ana_state_word(subsystem.ana_state(group, port)),
        })
    });
    states.collect::<Vec<_>>().into()
}

/// The calls that make a subsystem's ANA states as they are; `address_of` gives a port's address.
pub(crate) fn calls(
    subsystem: &Subsystem,
    ports: &[listeners::Address],
) -> Vec<(&'static str, Value)> {
    let nqn = subsystem.nqn.as_str();
    let mut calls = Vec::new();
    let all: Vec<(u32, AnaState)> = subsystem
        .ana_groups
        .iter()
        .map(|group| (group.id, group.state))
        .collect();
    for (group, state) in compact(&all, AnaState::Optimized) {
        let mut params = json!({ "nqn": nqn, "ana_state": ana_state_word(state) });
        if let Some(group) = group {
            params["anagrpid"] = group.into();
        }
        calls.push(("flexblk_subsystem_set_ana_state", params));
    }
    for port in ports {
        let own: Vec<(u32, AnaState)> = subsystem
            .ana_groups
            .iter()
            .filter_map(|group| {
                let own = group.ports.iter().find(|(other, _)| *other == port.port);
                own.map(|(_, state)| (group.id, *state))
            })
            .collect();
        for (group, state) in compact_all(&own) {
            let mut params = json!({
                "nqn": nqn, "listen_address": port.to_json(), "ana_state": ana_state_word(state),
            });
            if let Some(group) = group {
                params["anagrpid"] = group.into();
            }
            calls.push(("nvmf_subsystem_listener_set_ana_state", params));
        }
    }
    calls
}

/// States that differ from the usual one.
fn compact(states: &[(u32, AnaState)], usual: AnaState) -> Vec<(Option<u32>, AnaState)> {
    match states.len() == MAX_ANA_GROUPS as usize {
        true => compact_all(states)
            .into_iter()
            .filter(|said| *said != (None, usual))
            .collect(),
        false => states
            .iter()
            .filter(|(_, state)| *state != usual)
            .map(|(group, state)| (Some(*group), *state))
            .collect(),
    }
}

/// When something was said of every group, one call says the most of it: `None` is all groups.
fn compact_all(states: &[(u32, AnaState)]) -> Vec<(Option<u32>, AnaState)> {
    let single = |(group, state): &(u32, AnaState)| (Some(*group), *state);
    if states.len() != MAX_ANA_GROUPS as usize {
        return states.iter().map(single).collect();
    }
    let count = |state| states.iter().filter(|(_, other)| *other == state).count();
    let most = states
        .iter()
        .map(|(_, state)| *state)
        .max_by_key(|state| count(*state));
    let Some(most) = most else {
        return Vec::new();
    };
    let rest = states.iter().filter(|(_, state)| *state != most);
    std::iter::once((None, most))
        .chain(rest.map(single))
        .collect()
}
