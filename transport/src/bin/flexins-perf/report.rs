//! Results: named numbers, as a table or as JSON.

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use serde_json::{Map, Value};

/// Results of one test in the order in which they are shown.
#[derive(Debug, Default)]
pub(crate) struct Report {
    title: String,
    rows: Vec<(&'static str, Value, &'static str)>,
}

impl Report {
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            rows: Vec::new(),
        }
    }

    /// Adds a count.
    pub(crate) fn count(&mut self, name: &'static str, value: u64, unit: &'static str) {
        self.rows.push((name, value.into(), unit));
    }

    /// Adds a number with a fraction.
    pub(crate) fn number(&mut self, name: &'static str, value: f64, unit: &'static str) {
        self.rows
            .push((name, (value * 1000.0).round().into(), unit));
        if let Some((_, number, _)) = self.rows.last_mut() {
            *number = ((value * 1000.0).round() / 1000.0).into();
        }
    }

    /// Adds the usual percentiles of nanoseconds, shown in microseconds.
    pub(crate) fn latency(&mut self, histogram: &Histogram<u64>) {
        for (name, quantile) in [("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)] {
            self.number(
                name,
                histogram.value_at_quantile(quantile) as f64 / 1000.0,
                "us",
            );
        }
    }

    pub(crate) fn print(&self, json: bool) {
        if json {
            let mut object = Map::new();
            object.insert("test".to_owned(), self.title.clone().into());
            for (name, value, _) in &self.rows {
                object.insert((*name).to_owned(), value.clone());
            }
            println!("{}", Value::Object(object));
            return;
        }
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_header([self.title.as_str(), "", ""]);
        for (name, value, unit) in &self.rows {
            table.add_row([(*name).to_owned(), grouped(value), (*unit).to_owned()]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}");
    }
}

/// Digits in groups of three.
fn grouped(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let (whole, fraction) = text
        .split_once('.')
        .map_or((text.as_str(), None), |(w, f)| (w, Some(f)));
    let mut out = String::new();
    for (n, digit) in whole.chars().enumerate() {
        if n > 0 && (whole.len() - n).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    if let Some(fraction) = fraction.filter(|&fraction| fraction != "0") {
        out.push('.');
        out.push_str(fraction);
    }
    out
}
