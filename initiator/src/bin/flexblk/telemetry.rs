//! `flexblk telemetry-log`: the telemetry log pages (Base 5.1.12.1.8 and .9), to a file, or, when a
//! target of ours has written them, its flight recorder for people and programs.

use std::fs;

use anyhow::{Context as _, Result};
use flexblk_initiator::{AdminCommand, Controller, LogPageId};
use flexblk_nvme::Sgl;
use flexblk_nvme::command::admin::GetLogPage;
use flexblk_nvme::log::telemetry::{BLOCK, CREATE, TelemetryHeader};
use serde_json::{Value, json};

use crate::exit::Usage;
use crate::inspect::controller;
use crate::nvme_args::{OutputFormat, TelemetryLog};

/// Bytes of one Get Log Page.
const CHUNK_BYTES: u32 = 16 << 10;

pub(crate) fn telemetry_log(args: &TelemetryLog) -> Result<()> {
    let controller = controller(&args.inspect)?;
    let lid = match args.controller_init {
        true => LogPageId::TelemetryController,
        false => LogPageId::TelemetryHost,
    };
    let log = read(&controller, lid, args)?;
    if let Some(path) = &args.output_file {
        return fs::write(path, &log).with_context(|| path.display().to_string());
    }
    let header = TelemetryHeader::view(&log).context("the telemetry log is cut off")?;
    let data = log.get(TelemetryHeader::SIZE..).unwrap_or_default();
    let events = events(data).ok_or_else(|| {
        Usage(format!(
            "{} bytes of telemetry in a format of the controller's vendor; --output-file keeps them",
            data.len()
        ))
    })?;
    match args.inspect.output_format {
        OutputFormat::Json => {
            let value = json!({
                "log_id": header.lid,
                "host_generation": header.host_generation,
                "controller_available": header.controller_available,
                "controller_generation": header.controller_generation,
                "events": events,
            });
            println!("{value:#}");
        }
        OutputFormat::Normal => print(&events),
    }
    Ok(())
}

/// The header, and the blocks of the data area that was asked for.
fn read(controller: &Controller, lid: LogPageId, args: &TelemetryLog) -> Result<Vec<u8>> {
    let mut log = part(controller, lid, 0, BLOCK as u32, args.creates())?;
    let header = TelemetryHeader::view(&log).context("the telemetry log is cut off")?;
    let last_block = match args.data_area {
        1 => header.data_area_1_last.get().into(),
        2 => header.data_area_2_last.get().into(),
        3 => header.data_area_3_last.get().into(),
        _ => header.data_area_4_last.get(),
    };
    let end = (u64::from(last_block) + 1) * BLOCK as u64;
    while (log.len() as u64) < end {
        let at = log.len() as u64;
        let len = u32::try_from(end - at).unwrap_or(u32::MAX).min(CHUNK_BYTES);
        log.extend(part(controller, lid, at, len, false)?);
    }
    Ok(log)
}

fn part(
    controller: &Controller,
    lid: LogPageId,
    offset: u64,
    len: u32,
    create: bool,
) -> Result<Vec<u8>> {
    let mut get = GetLogPage::new(lid, offset, len);
    if create {
        get.lsp = CREATE;
    }
    let reply = controller.admin(AdminCommand {
        name: "Get Log Page",
        sqe: Box::new(move |cid| get.emit(cid, &Sgl::NONE)),
        data_out: Vec::new(),
        data_in_bytes: len,
    })?;
    anyhow::ensure!(
        reply.data.len() == len as usize,
        "the telemetry log is cut off at byte {offset}"
    );
    Ok(reply.data)
}

/// Our targets write one JSON object per line and fill the last block up with line feeds.
fn events(data: &[u8]) -> Option<Vec<Value>> {
    let text = std::str::from_utf8(data).ok()?;
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let event: Value = serde_json::from_str(line).ok()?;
            event.get("event").is_some().then_some(event)
        })
        .collect()
}

fn print(events: &[Value]) {
    if events.is_empty() {
        println!("nothing is recorded");
        return;
    }
    let columns = [
        "us", "thread", "event", "cntlid", "qid", "cid", "opcode", "nsid", "status", "value",
        "peer",
    ];
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(columns);
    for event in events {
        table.add_row(columns.map(|column| match (column, &event[column]) {
            ("status" | "opcode", Value::Number(number)) => {
                format!("{:#x}", number.as_u64().unwrap_or_default())
            }
            (_, Value::String(text)) => text.clone(),
            (_, value) => value.to_string(),
        }));
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_text_is_taken_for_events() {
        let ours = b"{\"us\":1,\"event\":\"connect\"}\n{\"us\":2,\"event\":\"error\"}\n\n\n";
        assert_eq!(events(ours).map(|events| events.len()), Some(2));
        assert_eq!(events(b"\n\n"), Some(Vec::new()));
        assert_eq!(events(b""), Some(Vec::new()));
        assert_eq!(events(&[0; 512]), None);
        assert_eq!(events(b"{\"x\":1}\n"), None);
        assert_eq!(events(&[0xFF, 0xFE]), None);
    }
}
