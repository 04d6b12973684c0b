//! Numbers: threads, reactors, transports. Times are in ticks of a microsecond.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::super::cores::{self, CoreTimes};
use super::super::params::Params;
use super::{Context, Method, Result, query};
use crate::histogram::TICK_RATE;
use crate::stats::ThreadStats;

pub(super) const METHODS: &[Method] = &[
    query("flexblk_get_flight_recorder", flight_recorder),
    query("framework_get_reactors", get_reactors),
    query("framework_get_scheduler", get_scheduler),
    query("thread_get_stats", thread_stats),
    query("thread_get_pollers", thread_pollers),
    query("nvmf_get_stats", nvmf_stats),
    query("flexblk_get_stats", all_stats),
];

fn counter(thread: &ThreadStats, name: &str) -> u64 {
    thread.reactor.get(name).copied().unwrap_or(0)
}

fn busy(thread: &ThreadStats) -> u64 {
    counter(thread, "busy_us")
}

fn idle(thread: &ThreadStats) -> u64 {
    counter(thread, "spun_us") + counter(thread, "slept_us")
}

fn name(thread: &ThreadStats) -> String {
    format!("data-{}", thread.thread)
}

/// The cores a thread may run on, as a hexadecimal mask.
fn cpumask(context: &Context, thread: &ThreadStats) -> String {
    match context.target.config().cores.get(thread.thread) {
        Some(core) if *core < 64 => format!("{:x}", 1_u64 << core),
        _ => {
            let cores = flexblk_reactor::affinity::allowed_cores().unwrap_or_default();
            let all = cores.iter().filter(|core| **core < 64);
            format!("{:x}", all.fold(0_u64, |mask, core| mask | 1 << core))
        }
    }
}

fn get_reactors(context: &Context, params: Params) -> Result {
    params.end()?;
    let stats = context.target.stats();
    let times = cores::times();
    let reactors = stats.threads.iter().map(|thread| {
        let of = |times: &BTreeMap<usize, CoreTimes>| times.get(&thread.core).copied();
        let then = of(&context.core_times).unwrap_or_default();
        let spent = of(&times).unwrap_or_default().since(then);
        json!({
            "lcore": thread.core,
            // -1 is SPDK's word for none.
            "numa_id": cores::numa_node(thread.core).map_or(-1, i64::from),
            // Of the core, in the kernel's clock ticks.
            "irq": spent.irq,
            "sys": spent.system,
            "usr": spent.user,
            "tid": thread.tid,
            "busy": busy(thread),
            "idle": idle(thread),
            // It sleeps when it has nothing to do.
            "in_interrupt": true,
            "lw_threads": [{
                "name": name(thread),
                "id": thread.thread + 1,
                "cpumask": cpumask(context, thread),
                "elapsed": busy(thread) + idle(thread),
            }],
        })
    });
    Ok(json!({
        "tick_rate": TICK_RATE,
        "pid": std::process::id(),
        "reactors": reactors.collect::<Vec<_>>(),
    }))
}

/// Threads stay on their cores, and so do their queues: that is what SPDK calls static.
fn get_scheduler(_: &Context, params: Params) -> Result {
    params.end()?;
    Ok(json!({ "scheduler_name": "static", "scheduler_period": 0 }))
}

/// What each thread's loop looks after: all of it in every turn, and nothing at fixed intervals.
fn thread_pollers(context: &Context, params: Params) -> Result {
    params.end()?;
    let stats = context.target.stats();
    let threads = stats.threads.iter().map(|thread| {
        let turns = counter(thread, "turns");
        let pollers = (1..).zip(&thread.busy_turns).map(|(id, (name, busy))| {
            json!({
                "name": name, "id": id, "state": "waiting", "run_count": turns,
                "busy_count": busy,
            })
        });
        json!({
            "name": name(thread),
            "id": thread.thread + 1,
            "active_pollers": pollers.collect::<Vec<_>>(),
            "timed_pollers": [],
            "paused_pollers": [],
        })
    });
    Ok(json!({ "tick_rate": TICK_RATE, "threads": threads.collect::<Vec<_>>() }))
}

fn thread_stats(context: &Context, params: Params) -> Result {
    params.end()?;
    let stats = context.target.stats();
    let threads = stats.threads.iter().map(|thread| {
        json!({
            "name": name(thread),
            "id": thread.thread + 1,
            "cpumask": cpumask(context, thread),
            "busy": busy(thread),
            "idle": idle(thread),
            "active_pollers_count": thread.busy_turns.len(),
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        })
    });
    Ok(json!({ "tick_rate": TICK_RATE, "threads": threads.collect::<Vec<_>>() }))
}

fn nvmf_stats(context: &Context, mut params: Params) -> Result {
    params.target_name()?;
    params.end()?;
    let stats = context.target.stats();
    let snapshot = context.target.snapshot();
    let groups = stats.threads.iter().map(|thread| {
        let subsystems = snapshot.subsystems.iter().flatten();
        let completed: u64 = subsystems
            .filter_map(|subsystem| subsystem.counters.get(thread.thread))
            .map(|counters| {
                let total = crate::counters::total(std::slice::from_ref(counters));
                total.reads + total.writes + total.other + total.failed
            })
            .sum();
        let mut transport = Map::new();
        transport.insert("trtype".to_owned(), "FLEXINS".into());
        for (counter, value) in thread.engine.iter().chain(&thread.port) {
            transport.insert((*counter).to_owned(), (*value).into());
        }
        let io = thread.queues - thread.controllers - thread.unconnected_queues;
        json!({
            "name": name(thread),
            "admin_qpairs": thread.connects.0,
            "io_qpairs": thread.connects.1,
            "current_admin_qpairs": thread.controllers,
            "current_io_qpairs": io,
            "current_unassociated_qpairs": thread.unconnected_queues,
            "pending_bdev_io": thread.pending_bdev_io,
            "completed_nvme_io": completed,
            "transports": [Value::Object(transport)],
        })
    });
    Ok(json!({ "tick_rate": TICK_RATE, "poll_groups": groups.collect::<Vec<_>>() }))
}

/// Everything that SIGUSR1 writes.
fn all_stats(context: &Context, params: Params) -> Result {
    params.end()?;
    serde_json::to_value(context.target.stats()).map_err(super::RpcError::internal)
}

/// What has happened lately, oldest first; `events` is how many at most.
fn flight_recorder(context: &Context, mut params: Params) -> Result {
    let most: Option<u32> = params.optional("events")?;
    params.end()?;
    let mut events = context.target.flight_recorder();
    if let Some(most) = most {
        events.drain(..events.len().saturating_sub(most as usize));
    }
    let shown = events.into_iter().map(|(thread, event)| {
        json!({
            "us": event.at_us, "thread": format!("data-{thread}"), "event": event.kind.name(),
            "cntlid": event.cntlid, "qid": event.qid, "cid": event.cid, "opcode": event.opcode,
            "nsid": event.nsid, "status": event.status, "value": event.value,
            "peer": event.peer.to_string(),
        })
    });
    Ok(json!({ "events": shown.collect::<Vec<_>>() }))
}
