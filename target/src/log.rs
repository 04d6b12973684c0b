//! Where the daemon logs to: the journal with priorities and fields when systemd has connected standard
//! error to it, else lines on standard error.

use std::io;
use std::sync::Arc;

use flexblk_target::manage::{LogControl, LogLevel};
use rustix::fs::{Stat, fstat};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, registry, reload};

use crate::cli::Args;

/// What the journal's fields of ours begin with: `FLEXBLK_HOST`, `FLEXBLK_CNTLID`.
const FIELD_PREFIX: &str = "FLEXBLK";

/// Starts logging; the result changes what is logged.
pub(crate) fn init(args: &Args) -> Arc<LogControl> {
    let (level, fallback) = match args.verbose {
        true => (LogLevel::Debug, "debug"),
        false => (LogLevel::Info, "info"),
    };
    let filter =
        EnvFilter::try_from_env("FLEXBLK_LOG").unwrap_or_else(|_| EnvFilter::new(fallback));
    let (filter, handle) = reload::Layer::new(filter);
    let journal = is_journal().then(tracing_journald::layer);
    // Without the journal's socket, lines on standard error reach it, too.
    let journal = journal.and_then(Result::ok);
    let journal = journal.map(|layer| layer.with_field_prefix(Some(FIELD_PREFIX.to_owned())));
    let lines = journal.is_none().then(|| {
        let lines = fmt::layer().with_writer(io::stderr);
        lines.with_ansi(false)
    });
    registry().with(filter).with(journal).with(lines).init();
    Arc::new(LogControl::new(level, move |filter| {
        let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    }))
}

/// Is standard error the stream to the journal that systemd names (systemd.exec(5), `JOURNAL_STREAM`)?
/// The variable alone says nothing: it is inherited by programs whose output goes elsewhere.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr()).is_ok_and(|stat| names(&stream, &stat))
}

fn names(stream: &str, stat: &Stat) -> bool {
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}
