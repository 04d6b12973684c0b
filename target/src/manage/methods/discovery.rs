//! The discovery service: its name, and the other services that it refers hosts to.

use flexblk_nvme::Nqn;
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, change, listeners, query};
use crate::config::{AllowedHosts, Discovery, MAX_REFERRALS, Referral, parse_nqn};

pub(super) const METHODS: &[Method] = &[
    change("nvmf_discovery_add_referral", add_referral),
    change("nvmf_discovery_remove_referral", remove_referral),
    query("nvmf_discovery_get_referrals", get_referrals),
    change("flexblk_discovery_set_nqn", set_nqn),
];

/// Of a call, whether it adds or removes.
struct Named {
    referral: Referral,
    nqn: Nqn,
}

/// Address, name and hosts. `hosts` is ours: SPDK's referrals are for every host.
fn referral(params: &mut Params) -> Result<Named> {
    let address = params
        .object("address")?
        .ok_or_else(|| RpcError::params("`address` is missing"))?;
    let address = listeners::parse(address)?;
    let nqn: Option<Nqn> = params.optional("subnqn")?;
    params.target_name()?;
    // The well-known name is the default, whether said or not.
    let nqn = nqn.filter(|nqn| !nqn.is_discovery());
    Ok(Named {
        nqn: nqn.clone().unwrap_or_else(Nqn::discovery),
        referral: Referral {
            trtype: address.trtype,
            address: address.address,
            nqn,
            hosts: AllowedHosts::Any,
        },
    })
}

fn is_same(one: &Referral, other: &Referral) -> bool {
    (one.trtype, one.address, &one.nqn) == (other.trtype, other.address, &other.nqn)
}

/// One that is there already is left as it is, as in SPDK; only its hosts may become others.
fn add_referral(context: &Context, mut params: Params) -> Result {
    let mut named = referral(&mut params)?;
    let hosts: Option<Vec<Nqn>> = params.optional("hosts")?;
    params.only(
        &[("secure_channel", false.into())],
        "connections are not encrypted",
    )?;
    params.end()?;
    if named.nqn.as_str().is_empty() {
        return Err(RpcError::params("`subnqn` is empty"));
    }
    if let Some(hosts) = hosts.clone() {
        named.referral.hosts = AllowedHosts::Only(hosts);
    }
    edit(context, |discovery| {
        let full = discovery.referrals.len() >= MAX_REFERRALS;
        let known = discovery
            .referrals
            .iter_mut()
            .find(|known| is_same(known, &named.referral));
        match known {
            Some(known) => {
                if hosts.is_some() {
                    known.hosts = named.referral.hosts;
                }
            }
            None if full => {
                let what = format!("at most {MAX_REFERRALS} referrals are possible");
                return Err(RpcError::internal(what));
            }
            None => discovery.referrals.push(named.referral),
        }
        Ok(())
    })
}

fn remove_referral(context: &Context, mut params: Params) -> Result {
    let named = referral(&mut params)?;
    params.end()?;
    edit(context, |discovery| {
        let before = discovery.referrals.len();
        discovery
            .referrals
            .retain(|known| !is_same(known, &named.referral));
        if discovery.referrals.len() == before {
            let what = format!(
                "there is no referral to {} at {}",
                named.nqn.as_str(),
                named.referral.address
            );
            return Err(RpcError::params(what));
        }
        Ok(())
    })
}

fn get_referrals(context: &Context, mut params: Params) -> Result {
    params.target_name()?;
    params.end()?;
    let snapshot = context.target.snapshot();
    let referrals = snapshot.discovery.referrals.iter();
    Ok(referrals.map(to_json).collect::<Vec<_>>().into())
}

/// In the words of the calls.
pub(crate) fn to_json(referral: &Referral) -> Value {
    let address = listeners::Address {
        trtype: referral.trtype,
        address: referral.address,
        port: 0,
    };
    let nqn = referral.nqn.clone().unwrap_or_else(Nqn::discovery);
    let mut shown = json!({
        "address": address.to_json(), "secure_channel": false, "subnqn": nqn.as_str(),
    });
    if let AllowedHosts::Only(hosts) = &referral.hosts {
        let hosts: Vec<&str> = hosts.iter().map(Nqn::as_str).collect();
        shown["hosts"] = hosts.into();
    }
    shown
}

/// Gives the discovery service a name beside the well-known one, or takes it away.
fn set_nqn(context: &Context, mut params: Params) -> Result {
    let text: Option<String> = params.optional("nqn")?;
    params.end()?;
    let nqn = match text {
        Some(text) => {
            let nqn = parse_nqn(&text);
            Some(nqn.map_err(|what| RpcError::params(format!("`nqn`: {what}")))?)
        }
        None => None,
    };
    edit(context, |discovery| {
        discovery.nqn = nqn;
        Ok(())
    })
}

/// Changes it in one step. Hosts are told only when there is a difference.
fn edit(context: &Context, edit: impl FnOnce(&mut Discovery) -> Result<()>) -> Result {
    context.target.change(|draft| {
        let mut discovery = Discovery::clone(&draft.snapshot.discovery);
        edit(&mut discovery)?;
        if discovery != *draft.snapshot.discovery {
            draft
                .set_discovery(discovery)
                .map_err(|error| RpcError::nvmf(&error))?;
        }
        Ok::<_, RpcError>(())
    })?;
    Ok(true.into())
}
