//! `nvmf_*`: subsystems, namespaces, hosts, controllers.

use flexblk_nvme::{Nqn, Nsid};
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, change, listeners, masking, query};
use crate::config::{self, AllowedHosts, MAX_ALLOWED_HOSTS, MAX_NSID};
use crate::draft::find;
use crate::snapshot::Subsystem;

pub(super) const METHODS: &[Method] = &[
    change("nvmf_create_subsystem", create_subsystem),
    change("nvmf_delete_subsystem", delete_subsystem),
    query("nvmf_get_subsystems", get_subsystems),
    change("nvmf_subsystem_add_ns", add_ns),
    change("nvmf_subsystem_remove_ns", remove_ns),
    change("nvmf_subsystem_add_host", add_host),
    change("nvmf_subsystem_remove_host", remove_host),
    change("nvmf_subsystem_allow_any_host", allow_any_host),
    query("nvmf_subsystem_get_controllers", get_controllers),
    query("nvmf_subsystem_get_qpairs", get_qpairs),
];

/// The subsystem that `nqn` names.
pub(super) fn subsystem_name(params: &mut Params) -> Result<Nqn> {
    let nqn: Nqn = params.required("nqn")?;
    params.target_name()?;
    // SPDK's short name.
    match nqn.as_str() {
        "discovery" => Ok(Nqn::discovery()),
        _ => Ok(nqn),
    }
}

pub(super) fn not_found(nqn: &Nqn) -> RpcError {
    RpcError::params(format!("Subsystem with NQN '{}' not found", nqn.as_str()))
}

fn create_subsystem(context: &Context, mut params: Params) -> Result {
    let text: String = params.required("nqn")?;
    let nqn =
        config::parse_nqn(&text).map_err(|what| RpcError::params(format!("`nqn`: {what}")))?;
    params.target_name()?;
    let mut subsystem = config::Subsystem::new(nqn);
    subsystem.serial = ascii(&mut params, "serial_number", 20)?;
    subsystem.model = ascii(&mut params, "model_number", 40)?;
    let any: Option<bool> = params.optional("allow_any_host")?;
    subsystem.hosts = AllowedHosts::new(any.unwrap_or(false), Vec::new());
    if let Some(most) = params.optional::<u32>("max_namespaces")?
        && most > MAX_NSID
    {
        let what = format!("`max_namespaces` = {most}: at most {MAX_NSID} are possible");
        return Err(RpcError::params(what));
    }
    // ANA is always reported: a host that does not know it does not look.
    params.optional::<bool>("ana_reporting")?;
    params.only(
        &[
            ("passthrough", false.into()),
            ("enable_nssr", false.into()),
            ("min_cntlid", 1.into()),
            ("max_cntlid", 0xFFEF.into()),
            ("dmrsl", 0.into()),
            ("wzsl", 0.into()),
        ],
        "this target does not have it",
    )?;
    params.none(&["admin_label"], "subsystems have no such label")?;
    params.end()?;
    let added = context.target.add_subsystem(&subsystem);
    added.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

fn ascii(params: &mut Params, key: &'static str, most: usize) -> Result<Option<String>> {
    let Some(text) = params.optional::<String>(key)? else {
        return Ok(None);
    };
    let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if text.trim().is_empty() || text.len() > most || !printable {
        let what = format!("`{key}` must be 1 to {most} characters of ASCII");
        return Err(RpcError::params(what));
    }
    Ok(Some(text))
}

fn delete_subsystem(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    params.end()?;
    let removed = context.target.remove_subsystem(&nqn);
    removed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

fn get_subsystems(context: &Context, mut params: Params) -> Result {
    let nqn: Option<Nqn> = params.optional("nqn")?;
    params.target_name()?;
    params.end()?;
    let snapshot = context.target.snapshot();
    let addresses = |subsystem: Option<&Subsystem>| -> Vec<Value> {
        let addresses = listeners::addresses(&snapshot, subsystem).into_iter();
        addresses.map(listeners::Address::to_json).collect()
    };
    let discovery = || {
        json!({
            "nqn": Nqn::discovery().as_str(),
            "subtype": "Discovery",
            "listen_addresses": addresses(None),
            "allow_any_host": true,
            "hosts": [],
        })
    };
    let shown = |subsystem: &Subsystem| show(subsystem, &addresses(Some(subsystem)));
    match nqn {
        Some(nqn) if nqn.is_discovery() => Ok(json!([discovery()])),
        Some(nqn) => {
            let found = snapshot.find(&nqn).ok_or_else(|| not_found(&nqn))?;
            Ok(json!([shown(found)]))
        }
        None => {
            let all = snapshot.subsystems.iter().flatten();
            let mut list = vec![discovery()];
            list.extend(all.map(|subsystem| shown(subsystem)));
            Ok(list.into())
        }
    }
}

fn names(hosts: &AllowedHosts) -> Vec<Value> {
    let names = hosts.names().iter();
    names.map(|host| json!({ "nqn": host.as_str() })).collect()
}

fn show(subsystem: &Subsystem, addresses: &[Value]) -> Value {
    let namespaces = subsystem.active().map(|namespace| {
        json!({
            "nsid": namespace.nsid.get(),
            "bdev_name": &*namespace.info.name,
            // SPDK keeps the old key beside the new one.
            "name": &*namespace.info.name,
            "uuid": namespace.uuid,
            "anagrpid": namespace.anagrpid,
            "no_auto_visible": !namespace.hosts.any(),
            "hosts": names(&namespace.hosts),
            "write_protect": masking::protection_word(namespace.protection),
        })
    });
    json!({
        "nqn": subsystem.nqn.as_str(),
        "subtype": "NVMe",
        "listen_addresses": addresses,
        "allow_any_host": subsystem.hosts.any(),
        "hosts": names(&subsystem.hosts),
        "serial_number": &*subsystem.serial,
        "model_number": &*subsystem.model,
        "max_namespaces": MAX_NSID,
        "min_cntlid": 1,
        "max_cntlid": 0xFFEF,
        "namespaces": namespaces.collect::<Vec<_>>(),
    })
}

fn add_ns(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let mut inner = params
        .object("namespace")?
        .ok_or_else(|| RpcError::params("`namespace` is missing"))?;
    let bdev: String = inner.required("bdev_name")?;
    let mut namespace = config::Namespace::new(bdev);
    namespace.nsid = inner.optional("nsid")?;
    namespace.uuid = inner.optional("uuid")?;
    if let Some(group) = inner.optional("anagrpid")? {
        namespace.anagrpid = group;
    }
    if inner.optional("no_auto_visible")?.unwrap_or(false) {
        namespace.hosts = AllowedHosts::Only(Vec::new());
    }
    inner.only(
        &[("hide_metadata", false.into())],
        "this target does not have it",
    )?;
    inner.none(&["nguid", "eui64"], "the identity is the UUID")?;
    inner.none(
        &["ptpl_file"],
        "all reservations are kept in `ptpl_file` of the file that the target is started with",
    )?;
    inner.end()?;
    params.end()?;
    // SPDK opens no device here: neither do we, so that a misspelt name is not taken for a new one.
    if !context
        .target
        .bdevs()
        .iter()
        .any(|bdev| bdev.name() == namespace.bdev)
    {
        let what = format!("no block device is named `{}`", namespace.bdev);
        return Err(RpcError::params(what));
    }
    let added = context.target.add_namespace(&nqn, &namespace);
    Ok(added.map_err(|error| RpcError::nvmf(&error))?.get().into())
}

fn remove_ns(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let nsid: Nsid = params.required("nsid")?;
    params.end()?;
    let removed = context.target.remove_namespace(&nqn, nsid);
    removed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

/// Changes the list of hosts, or whether it matters, in one step.
fn edit_hosts(
    context: &Context,
    nqn: &Nqn,
    edit: impl FnOnce(&mut bool, &mut Vec<Nqn>) -> Result<()>,
) -> Result {
    context.target.change(|draft| {
        let subsystem = find(&draft.snapshot, nqn).map_err(|error| RpcError::nvmf(&error))?;
        let mut any = subsystem.hosts.any();
        let mut names = subsystem.hosts.names().to_vec();
        edit(&mut any, &mut names)?;
        draft
            .set_allowed_hosts(nqn, AllowedHosts::new(any, names))
            .map_err(|error| RpcError::nvmf(&error))
    })?;
    Ok(true.into())
}

fn add_host(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let host: Nqn = params.required("host")?;
    params.none(
        &["psk", "dhchap_key", "dhchap_ctrlr_key"],
        "there is no TLS and no authentication",
    )?;
    params.end()?;
    edit_hosts(context, &nqn, |_, names| {
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

fn remove_host(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let host: Nqn = params.required("host")?;
    // Commands that have begun end by themselves here, whatever the limit.
    params.optional::<u64>("timeout_ms")?;
    params.end()?;
    edit_hosts(context, &nqn, |_, names| {
        let before = names.len();
        names.retain(|name| *name != host);
        if names.len() == before {
            let what = format!("{} is not on the list of {}", host.as_str(), nqn.as_str());
            return Err(RpcError::params(what));
        }
        Ok(())
    })
}

fn allow_any_host(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let allow: bool = params.required("allow_any_host")?;
    params.end()?;
    edit_hosts(context, &nqn, |any, _| {
        *any = allow;
        Ok(())
    })
}

fn get_controllers(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    params.end()?;
    if !nqn.is_discovery() && context.target.snapshot().find(&nqn).is_none() {
        return Err(not_found(&nqn));
    }
    let all = context.target.controllers();
    let its = all.iter().filter(|controller| controller.subnqn == nqn);
    let shown = its.map(|controller| {
        json!({
            "cntlid": controller.cntlid.get(),
            "cntrltype": if nqn.is_discovery() { "discovery" } else { "io" },
            "hostnqn": controller.hostnqn.as_str(),
            "hostid": controller.hostid.0,
            "num_io_qpairs": controller.queue_count(),
        })
    });
    Ok(shown.collect::<Vec<_>>().into())
}

fn get_qpairs(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    params.end()?;
    if !nqn.is_discovery() && context.target.snapshot().find(&nqn).is_none() {
        return Err(not_found(&nqn));
    }
    let all = context.target.queues();
    let snapshot = context.target.snapshot();
    let its = all.iter().filter(|queue| queue.subnqn == nqn);
    let shown = its.map(|queue| {
        let trtype = listeners::trtype(queue.transport);
        let own = snapshot.port(queue.port);
        json!({
            "cntlid": queue.cntlid.get(),
            "qid": queue.qid.get(),
            "state": if queue.closing { "deactivating" } else { "enabled" },
            "thread": format!("data-{}", queue.thread),
            "hostnqn": queue.hostnqn.as_str(),
            "listen_address": own.map(|port| listeners::Address::of(port).to_json()),
            "peer_address": listeners::peer(trtype, queue.peer),
        })
    });
    Ok(shown.collect::<Vec<_>>().into())
}
