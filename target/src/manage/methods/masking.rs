//! What hosts see of a namespace: masking per host, and write protection.

use flexblk_nvme::{Nqn, Nsid};
use serde_json::Value;

use super::super::params::{Param, Params};
use super::nvmf::subsystem_name;
use super::{Context, Method, Result, RpcError, change};
use crate::config::{AllowedHosts, MAX_ALLOWED_HOSTS};
use crate::draft::{active, find};
use crate::snapshot::Protection;

pub(super) const METHODS: &[Method] = &[
    change("nvmf_ns_add_host", add_host),
    change("nvmf_ns_remove_host", remove_host),
    change("flexblk_ns_set_write_protect", set_write_protect),
];

const PROTECTIONS: [(Protection, &str); 4] = [
    (Protection::None, "none"),
    (Protection::Protect, "write_protect"),
    (Protection::UntilPowerCycle, "until_power_cycle"),
    (Protection::Permanent, "permanent"),
];

impl Param for Protection {
    const WHAT: &'static str = "none, write_protect, until_power_cycle or permanent";
    fn read(value: &Value) -> Option<Self> {
        let word = value.as_str()?;
        let found = PROTECTIONS.iter().find(|(_, other)| *other == word);
        found.map(|(protection, _)| *protection)
    }
}

/// The word for a state of write protection.
pub(crate) fn protection_word(protection: Protection) -> &'static str {
    let found = PROTECTIONS.iter().find(|(other, _)| *other == protection);
    found.map_or("", |(_, word)| word)
}

/// Changes who sees a namespace, in one step. As in SPDK it must have been added with
/// `no_auto_visible`: else every host sees it, and the list would mean nothing.
fn edit_hosts(
    context: &Context,
    mut params: Params,
    edit: impl FnOnce(Nqn, &mut Vec<Nqn>) -> Result<()>,
) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let nsid: Nsid = params.required("nsid")?;
    let host: Nqn = params.required("host")?;
    params.end()?;
    context.target.change(|draft| {
        let subsystem = find(&draft.snapshot, &nqn).map_err(|error| RpcError::nvmf(&error))?;
        let namespace = active(subsystem, nsid).map_err(|error| RpcError::nvmf(&error))?;
        if namespace.hosts.any() {
            let what = format!(
                "every host sees namespace {nsid}: add it with `no_auto_visible` to choose hosts"
            );
            return Err(RpcError::params(what));
        }
        let mut names = namespace.hosts.names().to_vec();
        edit(host, &mut names)?;
        draft
            .set_namespace_hosts(&nqn, nsid, AllowedHosts::Only(names))
            .map_err(|error| RpcError::nvmf(&error))
    })?;
    Ok(true.into())
}

fn add_host(context: &Context, params: Params) -> Result {
    edit_hosts(context, params, |host, names| {
        if names.contains(&host) {
            return Ok(());
        }
        if names.len() >= MAX_ALLOWED_HOSTS {
            let what = format!("at most {MAX_ALLOWED_HOSTS} hosts can be listed");
            return Err(RpcError::internal(what));
        }
        names.push(host);
        Ok(())
    })
}

/// A host that is not on the list does not see the namespace: as in SPDK that is what was asked for.
fn remove_host(context: &Context, params: Params) -> Result {
    edit_hosts(context, params, |host, names| {
        names.retain(|name| *name != host);
        Ok(())
    })
}

fn set_write_protect(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let nsid: Nsid = params.required("nsid")?;
    let protection: Protection = params.required("write_protect")?;
    params.end()?;
    let changed = context.target.set_write_protection(&nqn, nsid, protection);
    changed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}
