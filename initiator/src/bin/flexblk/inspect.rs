//! `flexblk list` and the log pages.

use anyhow::{Context, Result, anyhow};
use flexblk_initiator::{Controller, LogPageId, Nsid, SubsystemType, TrType, TransportType};
use flexblk_nvme::log::{ErrorEntry, Smart, ana};
use flexblk_nvme::text::trim_ascii;
use serde_json::{Map, Value, json};

use crate::connect;
use crate::nvme_args::{ErrorLog, Inspect, List, OutputFormat};
use crate::size::human;

/// Longest ANA log page: 128 groups and 1024 namespaces, and then some.
const ANA_BYTES: u32 = 16 << 10;

/// The controller that an administrator asks about.
pub(crate) fn controller(args: &Inspect) -> Result<Controller> {
    let options = connect::options(&args.address, &args.connection, false)?;
    Ok(Controller::connect(&options)?)
}

/// Prints an object as lines `key : value`, or as it is.
fn print(value: &Value, format: OutputFormat) {
    if format == OutputFormat::Json {
        println!("{value:#}");
        return;
    }
    let lines = |object: &Map<String, Value>, indent: &str| {
        for (key, value) in object {
            match value {
                Value::String(text) => println!("{indent}{key:<10}: {text}"),
                value if !value.is_array() => println!("{indent}{key:<10}: {value}"),
                _ => {}
            }
        }
    };
    if let Value::Object(object) = value {
        lines(object, "");
        for (key, list) in object {
            for (number, entry) in list.as_array().into_iter().flatten().enumerate() {
                println!("{key} {number}");
                match entry {
                    Value::Object(entry) => lines(entry, "  "),
                    entry => println!("  {entry}"),
                }
            }
        }
    }
}

/// A 128-bit number: JSON has no room for it beyond 64 bits.
pub(crate) fn wide(value: u128) -> Value {
    match u64::try_from(value) {
        Ok(value) => value.into(),
        Err(_) => value.to_string().into(),
    }
}

pub(crate) fn smart_log(args: &Inspect) -> Result<()> {
    let controller = controller(args)?;
    let len = Smart::SIZE as u32;
    let page = controller.log_page(LogPageId::Smart, Nsid::BROADCAST, 0, len)?;
    let smart = Smart::view(&page).context("the SMART log is cut off")?;
    let value = json!({
        "critical_warning": smart.critical_warning,
        "temperature": smart.temperature.get(),
        "avail_spare": smart.available_spare,
        "spare_thresh": smart.spare_threshold,
        "percent_used": smart.percentage_used,
        "endurance_grp_critical_warning_summary": smart.endurance_warning,
        "data_units_read": wide(smart.data_units_read.get()),
        "data_units_written": wide(smart.data_units_written.get()),
        "host_read_commands": wide(smart.host_reads.get()),
        "host_write_commands": wide(smart.host_writes.get()),
        "controller_busy_time": wide(smart.busy_minutes.get()),
        "power_cycles": wide(smart.power_cycles.get()),
        "power_on_hours": wide(smart.power_on_hours.get()),
        "unsafe_shutdowns": wide(smart.unsafe_shutdowns.get()),
        "media_errors": wide(smart.media_errors.get()),
        "num_err_log_entries": wide(smart.error_entries.get()),
        "warning_temp_time": smart.warning_minutes.get(),
        "critical_comp_time": smart.critical_minutes.get(),
    });
    print(&value, args.output_format);
    Ok(())
}

pub(crate) fn error_log(args: &ErrorLog) -> Result<()> {
    let controller = controller(&args.inspect)?;
    let held = u32::from(controller.identify().elpe) + 1;
    let entries = u32::from(args.log_entries).min(held);
    let len = entries * ErrorEntry::SIZE as u32;
    let page = controller.log_page(LogPageId::Error, Nsid::BROADCAST, 0, len)?;
    let entries: Vec<Value> = page
        .chunks_exact(ErrorEntry::SIZE)
        .filter_map(ErrorEntry::view)
        .filter(|entry| entry.count.get() != 0)
        .map(|entry| {
            json!({
                "error_count": entry.count.get(),
                "sqid": entry.sqid.get(),
                "cmdid": entry.cid.get(),
                "status_field": entry.status().bits(),
                "phase_tag": entry.status.get() & 1,
                "parm_error_location": entry.location.get(),
                "lba": entry.lba.get(),
                "nsid": entry.nsid.get(),
                "vs": entry.vendor_page,
                "trtype": entry.trtype,
                "csi": entry.csi,
                "opcode": entry.opcode,
                "cs": entry.command_specific.get(),
                "trtype_spec_info": entry.transport_specific.get(),
                "log_page_version": entry.version,
            })
        })
        .collect();
    print(&json!({ "errors": entries }), args.inspect.output_format);
    Ok(())
}

pub(crate) fn ana_log(args: &Inspect) -> Result<()> {
    let controller = controller(args)?;
    let page = controller.log_page(LogPageId::Ana, Nsid::BROADCAST, 0, ANA_BYTES)?;
    let (change_count, groups) = ana::parse(&page).map_err(|error| anyhow!(error))?;
    let mut list = Vec::new();
    for group in groups {
        let group = group.map_err(|error| anyhow!(error))?;
        let nsids: Vec<Value> = group
            .nsids()
            .map(|nsid| json!({ "nsid": nsid.get() }))
            .collect();
        list.push(json!({
            "grpid": group.id,
            "nnsids": nsids.len(),
            "chgcnt": group.change_count,
            "state": state_name(group.state),
            "NSIDS": nsids,
        }));
    }
    if args.output_format == OutputFormat::Json {
        let value = json!({ "chgcnt": change_count, "ngrps": list.len(), "ANA DESC LIST ": list });
        println!("{value:#}");
        return Ok(());
    }
    println!("chgcnt    : {change_count}\nngrps     : {}", list.len());
    for group in &list {
        let nsids = group["NSIDS"].as_array().into_iter().flatten();
        let nsids: Vec<String> = nsids.map(|entry| entry["nsid"].to_string()).collect();
        let (id, state) = (&group["grpid"], group["state"].as_str().unwrap_or_default());
        println!("group {id}: {state}, namespaces {}", nsids.join(" "));
    }
    Ok(())
}

fn state_name(state: ana::AnaState) -> &'static str {
    match state {
        ana::AnaState::Optimized => "optimized",
        ana::AnaState::NonOptimized => "non-optimized",
        ana::AnaState::Inaccessible => "inaccessible",
        ana::AnaState::PersistentLoss => "persistent-loss",
        ana::AnaState::Change => "change",
        ana::AnaState::Other(_) => "invalid",
    }
}

/// Every subsystem that the discovery service lists over a transport we have, and its namespaces.
pub(crate) fn list(args: &List) -> Result<()> {
    let options = connect::options(&args.address, &args.connection, true)?;
    let log = flexblk_initiator::discover(&options)?;
    // The log names every way to a subsystem; the one that it was asked over is enough.
    let trtype = options.target.trtype;
    let wire = match trtype {
        TrType::Flexins => TransportType::Flexins,
        TrType::Tcp => TransportType::Tcp,
        TrType::Rdma => TransportType::Rdma,
    };
    let mut subsystems = Vec::new();
    for record in &log.records {
        if record.subtype != SubsystemType::Nvm || record.trtype != wire {
            continue;
        }
        let mut own = options.clone();
        own.target.subnqn = Some(record.subnqn.clone());
        own.target.traddr.clone_from(&record.traddr);
        own.target.trsvcid = record.trsvcid.parse().ok();
        let controller = Controller::connect(&own)?;
        let id = controller.identify();
        let namespaces: Vec<Value> = controller
            .namespaces()
            .iter()
            .map(|namespace| {
                json!({
                    "NSID": namespace.nsid.get(),
                    "PhysicalSize": namespace.len_bytes(),
                    "MaximumLBA": namespace.block_count,
                    "SectorSize": namespace.block_size,
                })
            })
            .collect();
        subsystems.push(json!({
            "SubsystemNQN": record.subnqn.as_str(),
            "Address": format!("traddr={},trsvcid={}", record.traddr, record.trsvcid),
            "Transport": trtype.as_str(),
            "SerialNumber": trim_ascii(&id.sn),
            "ModelNumber": trim_ascii(&id.mn),
            "Firmware": trim_ascii(&id.fr),
            "Namespaces": namespaces,
        }));
    }
    if args.output_format == OutputFormat::Json {
        println!("{:#}", json!({ "Subsystems": subsystems }));
        return Ok(());
    }
    for subsystem in &subsystems {
        let text = |key: &str| subsystem[key].as_str().unwrap_or_default().to_owned();
        println!(
            "{} ({}, {})",
            text("SubsystemNQN"),
            text("Address"),
            text("ModelNumber")
        );
        for namespace in subsystem["Namespaces"].as_array().into_iter().flatten() {
            let bytes = namespace["PhysicalSize"].as_u64().unwrap_or_default();
            let sector = &namespace["SectorSize"];
            println!(
                "  namespace {}: {}, {sector} B blocks",
                namespace["NSID"],
                human(bytes)
            );
        }
    }
    Ok(())
}
