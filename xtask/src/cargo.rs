//! Calling cargo.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use flexblk_tests::binaries::workspace;

/// A cargo command in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace())
        .args(arguments)
        .stdin(Stdio::null());
    // What `cargo run` told us about ourselves is nothing to those we call.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_")
            || name == "CARGO_MANIFEST_DIR"
            || name == "CARGO_MANIFEST_PATH"
        {
            command.env_remove(name);
        }
    }
    command
}
