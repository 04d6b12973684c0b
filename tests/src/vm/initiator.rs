//! Our initiator outside of a guest that runs the kernel's target.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::network::GUEST;
use crate::process::{Finished, Process, find_program, run};
use crate::setup::Setup;
use crate::target::SUBNQN;

const LIMIT: Duration = Duration::from_secs(60);

/// Does what the guest's script asks for.
pub struct Initiator {
    setup: Setup,
    load: Option<Process>,
}

impl Initiator {
    /// Connects to nothing yet.
    pub fn new() -> Result<Initiator> {
        Ok(Initiator {
            setup: Setup::new()?,
            load: None,
        })
    }

    /// Does a step.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        match words.first().map(String::as_str).unwrap_or_default() {
            "discover" => self.discover()?,
            "identify" => self.identify()?,
            "copy" => self.copy(&[])?,
            "copy-digests" => self.copy(&["-g", "-G"])?,
            "fio" => self.fio(&[], "randwrite")?,
            "fio-digests" => self.fio(&["--hdr_digest", "--data_digest"], "randwrite")?,
            "discard" => self.fio(&[], "randtrimwrite")?,
            "outage-start" => self.load = Some(self.start_load()?),
            "outage-end" => self.end_load()?,
            other => bail!("unknown request {other}"),
        }
        Ok(String::new())
    }

    fn flexblk(&self, verb: &str, more: &[&str]) -> Result<Finished> {
        let mut arguments = vec![verb, "-t", "tcp", "-a", GUEST, "-n", SUBNQN];
        arguments.extend(more);
        self.setup
            .flexblk(&arguments)?
            .success()
            .with_context(|| verb.to_owned())
    }

    fn discover(&self) -> Result<()> {
        let arguments = ["discover", "-t", "tcp", "-a", GUEST, "-s", "4420", "--json"];
        let found = self.setup.flexblk(&arguments)?.success()?;
        let json: Value = serde_json::from_str(&found.stdout)?;
        let ours = json["records"].as_array().into_iter().flatten();
        let ours = ours.filter(|record| record["subnqn"] == SUBNQN && record["trtype"] == "tcp");
        ensure!(ours.count() == 1, "{json:#}");
        Ok(())
    }

    fn identify(&self) -> Result<()> {
        let info = self.flexblk("info", &["--json"])?;
        let info: Value = serde_json::from_str(&info.stdout)?;
        let bytes: Vec<u64> = (info["namespaces"].as_array().into_iter().flatten())
            .filter_map(|namespace| {
                Some(namespace["block_size"].as_u64()? * namespace["block_count"].as_u64()?)
            })
            .collect();
        ensure!(bytes == [64 << 20, 32 << 20], "{info:#}");
        for verb in ["id-ctrl", "id-ns", "smart-log", "ana-log", "error-log"] {
            self.flexblk(verb, &[])?;
        }
        Ok(())
    }

    /// A few MiB to a namespace and back.
    fn copy(&self, options: &[&str]) -> Result<()> {
        let data = self.setup.file("in.bin", 3 << 20, options.len() as u64)?;
        let with = |more: &[&'static str]| -> Vec<String> {
            let all = options.iter().chain(more).map(|word| (*word).to_owned());
            all.collect()
        };
        let write = with(&["--offset", "1M", "-i", "in.bin"]);
        self.flexblk(
            "write",
            &write.iter().map(String::as_str).collect::<Vec<_>>(),
        )?;
        let read = with(&["--offset", "1M", "--length", "3M", "-o", "out.bin"]);
        self.flexblk("read", &read.iter().map(String::as_str).collect::<Vec<_>>())?;
        let back = std::fs::read(self.setup.path().join("out.bin"))?;
        ensure!(back == data, "what was read is not what was written");
        Ok(())
    }

    fn job(&self, rw: &str) -> Result<Command> {
        let mut command = Command::new(find_program("fio")?);
        command.current_dir(self.setup.path()).args([
            "--name=job".to_owned(),
            format!(
                "--ioengine=external:{}",
                self.setup.binaries().fio_engine.display()
            ),
            "--trtype=tcp".to_owned(),
            format!("--traddr={GUEST}"),
            "--trsvcid=4420".to_owned(),
            format!("--subnqn={SUBNQN}"),
            "--nsid=1".to_owned(),
            format!("--rw={rw}"),
            "--bs=16k".to_owned(),
            "--iodepth=16".to_owned(),
            "--size=8M".to_owned(),
        ]);
        Ok(command)
    }

    fn fio(&self, options: &[&str], rw: &str) -> Result<()> {
        let mut command = self.job(rw)?;
        command.args(options).arg("--end_fsync=1");
        if rw == "randwrite" {
            command.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]);
        }
        run(&mut command, LIMIT)?.success()?;
        Ok(())
    }

    fn start_load(&self) -> Result<Process> {
        let mut command = self.job("randread")?;
        command.args([
            "--time_based",
            "--runtime=30",
            "--kato_ms=1000",
            "--io_timeout_ms=2000",
        ]);
        let load = Process::spawn(&mut command, "load", self.setup.path())?;
        std::thread::sleep(Duration::from_secs(2));
        Ok(load)
    }

    /// The job has ended with an error, soon and by itself; a new one works.
    fn end_load(&mut self) -> Result<()> {
        let mut load = self.load.take().context("no job was started")?;
        let status = load.wait(Duration::from_secs(20))?;
        let said = load.tail();
        let failed = status.code().is_some_and(|code| code != 0);
        ensure!(failed && !said.is_empty(), "it ended with {status}: {said}");
        println!("fio on a lost connection: {status}: {said}");
        self.copy(&[])
    }
}
