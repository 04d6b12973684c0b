//! Transports and where they listen, in SPDK's words.

use std::net::SocketAddr;

use flexblk_nvme::Nqn;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::log::discovery::TransportType;
use serde_json::{Value, json};

use super::super::params::Params;
use super::nvmf::{not_found, subsystem_name};
use super::{Context, Method, Result, RpcError, ana, change, query};
use crate::config::{Discovery, ListenAddress, Transport};
use crate::port::Port;
use crate::snapshot::{Snapshot, Subsystem};
use crate::target::Target;

pub(super) const METHODS: &[Method] = &[
    change("nvmf_create_transport", create_transport),
    query("nvmf_get_transports", get_transports),
    change("nvmf_subsystem_add_listener", add_listener),
    change("nvmf_subsystem_remove_listener", remove_listener),
    change("flexblk_subsystem_set_listeners", set_listeners),
    query("nvmf_subsystem_get_listeners", get_listeners),
];

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
    pub(crate) fn of(port: &Port) -> Self {
        let ListenAddress { trtype, address } = port.listen;
        Self {
            trtype,
            address,
            port: port.id,
        }
    }

    /// As a configuration says it.
    pub(super) fn listen(self) -> ListenAddress {
        ListenAddress {
            trtype: self.trtype,
            address: self.address,
        }
    }

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

/// Where a subsystem, or the discovery service, is reached.
pub(crate) fn addresses(snapshot: &Snapshot, subsystem: Option<&Subsystem>) -> Vec<Address> {
    let ports = snapshot.ports.iter();
    let reached = ports.filter(|port| subsystem.is_none_or(|own| own.is_reached_at(port)));
    reached.map(|port| Address::of(port)).collect()
}

/// The transports, with what SPDK calls their parameters.
pub(crate) fn transports(target: &Target) -> Vec<Value> {
    let limits = target.config().limits;
    let transports = [Transport::Flexins, Transport::Tcp]
        .into_iter()
        .map(|trtype| {
            json!({
                "trtype": name(trtype),
                "max_queue_depth": limits.queue_entries,
                "max_io_qpairs_per_ctrlr": limits.io_queues,
                "in_capsule_data_size": crate::thread::MAX_IN_CAPSULE_BYTES,
                "max_io_size": crate::queue::request::MAX_TRANSFER_BYTES,
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

/// Both transports are there from the start: this says whether one is the one that is meant.
fn create_transport(context: &Context, mut params: Params) -> Result {
    let trtype: String = params.required("trtype")?;
    params.target_name()?;
    let transports = transports(&context.target);
    let named = |transport: &&Value| {
        let name = transport.get("trtype").and_then(Value::as_str);
        name.is_some_and(|name| name.eq_ignore_ascii_case(&trtype))
    };
    let Some(transport) = transports.iter().find(named) else {
        let known: Vec<&str> = transports
            .iter()
            .filter_map(|transport| transport.get("trtype")?.as_str())
            .collect();
        return Err(RpcError::params(format!(
            "there is no transport `{trtype}`, only {}",
            known.join(", ")
        )));
    };
    for key in [
        "max_queue_depth",
        "max_io_qpairs_per_ctrlr",
        "in_capsule_data_size",
        "max_io_size",
        "max_aq_depth",
    ] {
        let ours = transport.get(key).cloned().unwrap_or_default();
        let why = format!("it is {ours} and settled when the target starts");
        params.only(&[(key, ours)], &why)?;
    }
    // What rpc.py sends with every call, and is so here.
    params.only(
        &[
            ("zcopy", false.into()),
            ("no_srq", false.into()),
            ("c2h_success", true.into()),
            ("dif_insert_or_strip", false.into()),
            ("no_wr_batching", false.into()),
            ("disable_mappable_bar0", false.into()),
            ("disable_adaptive_irq", false.into()),
            ("disable_shadow_doorbells", false.into()),
            ("disable_command_passthru", false.into()),
        ],
        "this target has no such thing",
    )?;
    for (keys, why) in [
        (
            &[
                "io_unit_size",
                "num_shared_buffers",
                "buf_cache_size",
                "iobuf_small_cache_size",
                "iobuf_large_cache_size",
                "data_wr_pool_size",
                "control_msg_num",
            ][..],
            "buffers come from `memory_budget` in the file that the target is started with",
        ),
        (
            &["num_cqe", "max_srq_depth"],
            "there is no RDMA hardware whose queues it sizes",
        ),
        (
            &["sock_priority", "acceptor_backlog", "acceptor_poll_rate"],
            "sockets are as the kernel makes them, and wake the thread",
        ),
        (
            &["ack_timeout", "abort_timeout_sec"],
            "how long is waited for a host is settled in the target",
        ),
        (
            &["kas", "min_kato", "masked_oncs", "masked_fuses"],
            "what controllers say of themselves is settled in the target",
        ),
    ] {
        params.none(keys, why)?;
    }
    params.end()?;
    Ok(true.into())
}

fn get_transports(context: &Context, mut params: Params) -> Result {
    let trtype: Option<String> = params.optional("trtype")?;
    params.target_name()?;
    params.end()?;
    let mut transports = transports(&context.target);
    if let Some(trtype) = trtype {
        transports.retain(|transport| {
            let name = transport.get("trtype").and_then(Value::as_str);
            name.is_some_and(|name| name.eq_ignore_ascii_case(&trtype))
        });
        if transports.is_empty() {
            return Err(RpcError::params(format!(
                "there is no transport `{trtype}`"
            )));
        }
    }
    Ok(transports.into())
}

/// The `listen_address` of a call.
pub(super) fn listen_address(params: &mut Params) -> Result<ListenAddress> {
    let address = params
        .object("listen_address")?
        .ok_or_else(|| RpcError::params("`listen_address` is missing"))?;
    Ok(parse(address)?.listen())
}

/// From then on the subsystem is reached at its own listeners only. The address is opened when it is
/// the first to be reached there.
fn add_listener(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let listen = listen_address(&mut params)?;
    let state: Option<AnaState> = params.optional("ana_state")?;
    params.only(
        &[
            ("secure_channel", false.into()),
            ("sock_impl", "posix".into()),
            ("numa_id", (-1).into()),
        ],
        "connections are not encrypted, and sockets are of one kind",
    )?;
    params.end()?;
    let nvmf = |error| RpcError::nvmf(&error);
    context.target.change(|draft| {
        if nqn.is_discovery() {
            let mut discovery = Discovery::clone(&draft.snapshot.discovery);
            let fixed = draft
                .snapshot
                .port_at(&listen)
                .is_some_and(|port| port.fixed);
            if fixed || discovery.listeners.contains(&listen) {
                return Ok(());
            }
            discovery.listeners.push(listen);
            return draft.set_discovery(discovery).map_err(nvmf);
        }
        let mut listeners = own(&draft.snapshot, &nqn)?.unwrap_or_default();
        if !listeners.contains(&listen) {
            listeners.push(listen);
            draft.set_listeners(&nqn, Some(&listeners)).map_err(nvmf)?;
        }
        if let Some(state) = state {
            let port = draft.port_of(&nqn, &listen).map_err(nvmf)?;
            draft
                .set_ana_state(&nqn, None, Some(port), state)
                .map_err(nvmf)?;
        }
        Ok(())
    })?;
    Ok(true.into())
}

/// The listeners of a subsystem, if it has some of its own.
fn own(snapshot: &Snapshot, nqn: &Nqn) -> Result<Option<Vec<ListenAddress>>> {
    let subsystem = snapshot.find(nqn).ok_or_else(|| not_found(nqn))?;
    Ok(subsystem.listeners.as_ref().map(|ids| {
        let ports = ids.iter().filter_map(|id| snapshot.port(*id));
        ports.map(|port| port.listen).collect()
    }))
}

/// Controllers that were connected there are closed. Without its last listener a subsystem is not
/// reached at all.
fn remove_listener(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let listen = listen_address(&mut params)?;
    params.end()?;
    let nvmf = |error| RpcError::nvmf(&error);
    context.target.change(|draft| {
        if nqn.is_discovery() {
            let mut discovery = Discovery::clone(&draft.snapshot.discovery);
            discovery.listeners.retain(|other| *other != listen);
            if discovery == *draft.snapshot.discovery {
                let what = format!("the discovery service has no listener {listen} of its own");
                return Err(RpcError::params(what));
            }
            return draft.set_discovery(discovery).map_err(nvmf);
        }
        draft.port_of(&nqn, &listen).map_err(nvmf)?;
        let subsystem = draft.snapshot.find(&nqn).ok_or_else(|| not_found(&nqn))?;
        let left: Vec<ListenAddress> = addresses(&draft.snapshot, Some(subsystem))
            .into_iter()
            .map(Address::listen)
            .filter(|other| *other != listen)
            .collect();
        draft.set_listeners(&nqn, Some(&left)).map_err(nvmf)
    })?;
    Ok(true.into())
}

/// All listeners at once; none is reached nowhere, and `null` is at every address from the start.
fn set_listeners(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    let given: Option<Vec<Value>> = params.optional("listen_addresses")?;
    params.end()?;
    let listeners = match given {
        Some(values) => {
            let addresses = values
                .into_iter()
                .map(|value| Ok(parse(Params::new(Some(value))?)?.listen()));
            Some(addresses.collect::<Result<Vec<_>>>()?)
        }
        None => None,
    };
    let changed = context.target.set_listeners(&nqn, listeners.as_deref());
    changed.map_err(|error| RpcError::nvmf(&error))?;
    Ok(true.into())
}

fn get_listeners(context: &Context, mut params: Params) -> Result {
    let nqn = subsystem_name(&mut params)?;
    params.end()?;
    let snapshot = context.target.snapshot();
    let subsystem = snapshot.find(&nqn);
    if !nqn.is_discovery() && subsystem.is_none() {
        return Err(not_found(&nqn));
    }
    let all = addresses(&snapshot, subsystem.map(|subsystem| &**subsystem));
    let shown = all.iter().map(|address| {
        let mut shown = json!({ "address": address.to_json() });
        if let Some(subsystem) = subsystem {
            shown["ana_states"] = ana::states(subsystem, address.port);
        }
        shown
    });
    Ok(shown.collect::<Vec<_>>().into())
}

/// The calls that make subsystems and the discovery service reached where they are.
pub(crate) fn calls(snapshot: &Snapshot) -> Vec<(&'static str, Value)> {
    let mut calls = Vec::new();
    let mut add = |nqn: &Nqn, address: Address| {
        let params = json!({ "nqn": nqn.as_str(), "listen_address": address.to_json() });
        calls.push(("nvmf_subsystem_add_listener", params));
    };
    for listen in &snapshot.discovery.listeners {
        if let Some(port) = snapshot.port_at(listen) {
            add(&Nqn::discovery(), Address::of(port));
        }
    }
    let mut nowhere = Vec::new();
    for subsystem in snapshot.subsystems.iter().flatten() {
        match &subsystem.listeners {
            // At every address from the start: nothing was said.
            None => {}
            Some(ids) if ids.is_empty() => {
                let params = json!({ "nqn": subsystem.nqn.as_str(), "listen_addresses": [] });
                nowhere.push(("flexblk_subsystem_set_listeners", params));
            }
            Some(ids) => {
                let ports = ids.iter().filter_map(|id| snapshot.port(*id));
                ports.for_each(|port| add(&subsystem.nqn, Address::of(port)));
            }
        }
    }
    calls.extend(nowhere);
    calls
}
