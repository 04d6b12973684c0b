//! SPDK's management client, the PyPI package `spdk`, at one of our targets.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{Finished, run};
use crate::skip;
use crate::target::Target;

/// The client as a program with its first arguments.
pub struct SpdkRpc(Vec<String>);

impl SpdkRpc {
    /// `SPDK_RPC` names it, or a Python has the package. `None` where neither is so, and `test` is
    /// counted as skipped.
    pub fn or_skip(test: &str) -> Option<SpdkRpc> {
        if let Ok(program) = std::env::var("SPDK_RPC") {
            return Some(SpdkRpc(vec![program]));
        }
        let mut python = Command::new("python3");
        let found = python.args(["-c", "import spdk.spdk_rpc"]).output();
        if found.is_ok_and(|output| output.status.success()) {
            let words = ["python3", "-m", "spdk.spdk_rpc"];
            return Some(SpdkRpc(words.map(str::to_owned).into()));
        }
        skip::note(
            test,
            "no SPDK client (python3 with the package spdk, or SPDK_RPC=/path/of/spdk-rpc)",
        );
        None
    }

    /// Its words, before any argument.
    pub fn words(&self) -> &[String] {
        &self.0
    }

    /// The client of that target.
    pub fn at(&self, target: &Target) -> Client {
        Client {
            words: self.0.clone(),
            socket: target.rpc_socket().display().to_string(),
        }
    }
}

/// SPDK's client of one target.
pub struct Client {
    words: Vec<String>,
    /// The target's RPC socket.
    pub socket: String,
}

impl Client {
    /// Runs a method.
    pub fn run(&self, arguments: &[&str]) -> Result<Finished> {
        let (program, first) = self.words.split_first().context("a program")?;
        let mut command = Command::new(program);
        command.args(first).args(["-s", &self.socket]);
        run(command.args(arguments), Duration::from_secs(30))
    }

    /// What a method that succeeds prints.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.run(arguments)?.success()?.stdout.trim().to_owned())
    }

    /// What a method that succeeds prints, as JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(arguments)?)?)
    }
}
