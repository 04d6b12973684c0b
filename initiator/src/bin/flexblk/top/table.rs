//! A load as text.

use comfy_table::{CellAlignment, Table};

use super::Sort;
use super::load::{IoLoad, Load, ThreadLoad};

const THREADS: [&str; 8] = [
    "thread", "core", "busy %", "cpu %", "queues", "ctrls", "pending", "waits/s",
];
const IO: [&str; 12] = [
    "host",
    "subsystem",
    "nsid",
    "op",
    "IOPS",
    "MB/s",
    "mean us",
    "p99 us",
    "wait",
    "network",
    "backend",
    "failed/s",
];
/// Columns of [`IO`] with names, which may be cut.
const NAMES: usize = 2;
/// What the other columns of [`IO`] take at least.
const NUMBERS_WIDTH: usize = 96;
/// Shortest that names are cut to.
const MIN_NAME: usize = 12;

/// The whole of it. `width` is what a line may take.
pub(super) fn text(load: &Load, sort: Sort, width: Option<usize>) -> String {
    let threads = load.threads.iter().map(thread);
    let name_width = width.map(|width| (width.saturating_sub(NUMBERS_WIDTH) / NAMES).max(MIN_NAME));
    let io = load.io.iter().map(|load| line(load, name_width));
    let mut parts = vec![summary(load, sort), table(&THREADS, 1, threads.collect())];
    parts.push(match load.io.is_empty() {
        true => "no I/O".to_owned(),
        false => table(&IO, NAMES, io.collect()),
    });
    parts.join("\n\n") + "\n"
}

/// As many lines as a screen of `columns` and `rows` takes, each as long as it takes.
pub(super) fn screen(
    load: &Load,
    sort: Sort,
    note: &str,
    (columns, rows): (usize, usize),
) -> Vec<String> {
    let keys = "q quit   sort by: i IOPS, b bandwidth, l latency";
    let whole = text(load, sort, Some(columns));
    let mut lines: Vec<String> = whole.lines().map(str::to_owned).collect();
    let room = rows.saturating_sub(1);
    if lines.len() > room {
        let hidden = lines.len() - room + 1;
        lines.truncate(room.saturating_sub(1));
        if room > 0 {
            lines.push(format!("... and {hidden} more lines"));
        }
    }
    lines.push(match note.is_empty() {
        true => keys.to_owned(),
        false => format!("{note}   ({keys})"),
    });
    for line in &mut lines {
        if let Some((end, _)) = line.char_indices().nth(columns) {
            line.truncate(end);
        }
    }
    lines
}

fn summary(load: &Load, sort: Sort) -> String {
    // `sum` of nothing is -0.0, and would be shown so.
    let total = |of: fn(&IoLoad) -> f64| load.io.iter().map(of).fold(0.0, |sum, one| sum + one);
    let by = match sort {
        Sort::Iops => "IOPS",
        Sort::Bandwidth => "bandwidth",
        Sort::Latency => "latency",
    };
    format!(
        "{:.0} IOPS, {:.1} MB/s in {:.1} s; {} controllers, {} queues; up {:.0} s; by {by}",
        total(|load| load.iops),
        total(|load| load.bytes_per_s) / 1e6,
        load.seconds,
        load.controllers,
        load.queues,
        load.uptime_s,
    )
}

/// Columns after the first few are numbers.
fn table(header: &[&str], texts: usize, rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(texts) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

fn thread(load: &ThreadLoad) -> Vec<String> {
    vec![
        load.thread.clone(),
        load.core.to_string(),
        format!("{:.0}", load.busy_percent),
        format!("{:.0}", load.cpu_percent),
        load.queues.to_string(),
        load.controllers.to_string(),
        load.pending_bdev_io.to_string(),
        format!("{:.0}", load.buffer_waits),
    ]
}

fn line(load: &IoLoad, name_width: Option<usize>) -> Vec<String> {
    let name = |name: &str| match name_width {
        Some(width) => end_of(name, width),
        None => name.to_owned(),
    };
    let us = |us: f64| format!("{us:.1}");
    vec![
        name(&load.host),
        name(&load.subsystem),
        load.nsid.to_string(),
        load.operation.to_owned(),
        format!("{:.0}", load.iops),
        format!("{:.1}", load.bytes_per_s / 1e6),
        us(load.mean_us),
        load.p99_us
            .map_or_else(|| "longer".to_owned(), |us| format!("<={us}")),
        us(load.wait_us),
        us(load.network_us),
        us(load.backend_us),
        format!("{:.0}", load.failed_per_s),
    ]
}

/// Names differ at their ends.
fn end_of(name: &str, width: usize) -> String {
    let len = name.chars().count();
    match len <= width {
        true => name.to_owned(),
        false => {
            let end: String = name.chars().skip(len - width + 1).collect();
            format!("~{end}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::load::tests::load;

    #[test]
    fn no_load_is_zero() {
        let idle = Load {
            io: Vec::new(),
            ..load()
        };
        let shown = text(&idle, Sort::Iops, None);
        assert!(shown.starts_with("0 IOPS, 0.0 MB/s"), "{shown}");
    }

    #[test]
    fn a_screen_is_never_exceeded() {
        for (columns, rows) in [(200, 50), (80, 24), (40, 5), (10, 2), (1, 1)] {
            let lines = screen(&load(), Sort::Iops, "a note", (columns, rows));
            assert!(lines.len() <= rows, "{rows}: {lines:#?}");
            assert!(lines.iter().all(|line| line.chars().count() <= columns));
        }
    }

    #[test]
    fn names_are_whole_where_there_is_room() {
        let whole = text(&load(), Sort::Iops, None);
        assert!(whole.contains("nqn.2026-11.test:host"), "{whole}");
        let narrow = text(&load(), Sort::Iops, Some(100));
        assert!(
            narrow.contains("~6-11.test:sub") || narrow.contains("~11.test:sub"),
            "{narrow}"
        );
        assert!(
            whole.contains("<=32") && whole.contains("longer"),
            "{whole}"
        );
    }
}
