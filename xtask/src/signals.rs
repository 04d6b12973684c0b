//! Ctrl-C and a service manager's stop: no child is left behind.

use std::process::exit;
use std::thread;

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Watches for signals in a thread of its own.
pub(crate) fn install() -> Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                flexblk_tests::process::kill_all();
                eprintln!("interrupted");
                exit(128 + signal);
            }
        })?;
    Ok(())
}
