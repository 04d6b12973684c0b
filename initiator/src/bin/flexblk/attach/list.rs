//! `flexblk list` without an address: what is attached to this host.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::control::{self, Answer, Question, State, Status};
use super::state::{self, Name, Record};
use crate::nvme_args::OutputFormat;
use crate::size::human;

/// How long one that does not answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

struct Entry {
    name: Name,
    record: Option<Record>,
    status: Option<Status>,
    served: bool,
}

impl Entry {
    fn of(name: Name) -> Entry {
        let status = match control::ask(&name, Question::Status, PATIENCE) {
            Ok(Answer::Status(status)) => Some(status),
            _ => None,
        };
        Entry {
            record: Record::load(&name),
            served: status.is_some() || state::is_served(&name),
            status,
            name,
        }
    }

    fn state(&self) -> &'static str {
        match &self.status {
            Some(status) => match status.state {
                State::Live => "live",
                State::NoPath => "no path",
                State::Lost => "lost",
                State::Detaching => "detaching",
            },
            None if self.served => "not answering",
            None => "killed",
        }
    }
}

/// Prints them.
pub(crate) fn list(format: OutputFormat) -> Result<()> {
    let entries: Vec<Entry> = state::names().into_iter().map(Entry::of).collect();
    if format == OutputFormat::Json {
        let entries: Vec<Value> = entries.iter().map(json_of).collect();
        println!("{:#}", json!({ "Attachments": entries }));
        return Ok(());
    }
    if entries.is_empty() {
        println!("nothing is attached");
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "name",
        "device",
        "size",
        "block",
        "state",
        "paths",
        "IOPS",
        "latency",
        "by",
        "namespace",
    ]);
    for entry in &entries {
        let dash = || "-".to_owned();
        let record = entry.record.as_ref();
        let status = entry.status.as_ref();
        table.add_row([
            entry.name.to_string(),
            record
                .and_then(|record| record.device.as_ref())
                .map_or_else(dash, |device| device.display().to_string()),
            status.map_or_else(dash, |status| human(status.size_bytes)),
            status.map_or_else(dash, |status| status.block_size.to_string()),
            entry.state().to_owned(),
            status.map_or_else(dash, paths_of),
            status.map_or_else(dash, |status| status.iops.to_string()),
            status
                .and_then(|status| status.latency_us)
                .map_or_else(dash, |us| format!("{us:.0} us")),
            record.map_or_else(dash, |record| record.objects.backend().to_owned()),
            record.map_or_else(dash, |record| {
                format!("{} of {}", record.identity.nsid, record.identity.subnqn)
            }),
        ]);
    }
    println!("{table}");
    for entry in &entries {
        if let Some(note) = entry
            .status
            .as_ref()
            .and_then(|status| status.note.as_ref())
        {
            println!("{}: {note}", entry.name);
        }
    }
    Ok(())
}

/// Each path's transport and state.
fn paths_of(status: &Status) -> String {
    let paths = status.paths.iter();
    let paths: Vec<String> = paths
        .map(|path| format!("{} {}", path.transport, path.state))
        .collect();
    paths.join(", ")
}

fn json_of(entry: &Entry) -> Value {
    let record = entry.record.as_ref();
    let status = entry.status.as_ref();
    json!({
        "Name": entry.name.as_str(),
        "Link": entry.name.link(),
        "DevicePath": record.and_then(|record| record.device.as_ref()),
        "State": entry.state(),
        "Backend": record.map(|record| record.objects.backend()),
        "Process": record.map(|record| record.pid),
        "SubsystemNQN": record.map(|record| &record.identity.subnqn),
        "NSID": record.map(|record| record.identity.nsid),
        "WWID": record.and_then(|record| record.identity.wwid.as_ref()),
        "PhysicalSize": status.map(|status| status.size_bytes),
        "SectorSize": status.map(|status| status.block_size),
        "IOPS": status.map(|status| status.iops),
        "LatencyMicroseconds": status.and_then(|status| status.latency_us),
        "Reads": status.map(|status| status.reads),
        "Writes": status.map(|status| status.writes),
        "BytesRead": status.map(|status| status.bytes_read),
        "BytesWritten": status.map(|status| status.bytes_written),
        "Paths": status.map(|status| &status.paths).into_iter().flatten().map(|path| json!({
            "Address": path.address,
            "Transport": path.transport,
            "State": path.state,
            "IOs": path.ios,
            "LatencyMicroseconds": path.latency_us,
            "LastError": path.last_error,
        })).collect::<Vec<Value>>(),
        "Errors": status.map(|status| status.errors),
        "Note": status.and_then(|status| status.note.as_ref()),
    })
}
