//! Our initiator as the host of another's NVMe/TCP target: the kernel's in a guest, SPDK's, and what it has to do there.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::{Finished, Process, find_program, run};
use crate::setup::Setup;
use crate::target::SUBNQN;

const LIMIT: Duration = Duration::from_secs(60);

/// Does steps with the target at an address.
pub struct Host {
    setup: Setup,
    address: String,
    port: String,
    /// Sizes of its namespaces.
    namespaces: Vec<u64>,
    load: Option<Process>,
}

impl Host {
    /// Connects to nothing yet.
    pub fn new(address: &str, port: u16, namespaces: &[u64]) -> Result<Host> {
        Ok(Host {
            setup: Setup::new()?,
            address: address.to_owned(),
            port: port.to_string(),
            namespaces: namespaces.to_vec(),
            load: None,
        })
    }

    /// Does a step.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        match words.first().map(String::as_str).unwrap_or_default() {
            "discover" => self.discover()?,
            "identify" => self.identify()?,
            "ana-log" => drop(self.flexblk("ana-log", &[])?),
            "flush" => drop(self.flexblk("flush", &[])?),
            "compare" => self.compare()?,
            "compare-refused" => self.compare_refused()?,
            "write-zeroes" => self.write_zeroes()?,
            "dsm" => drop(self.flexblk("dsm", &["--slbs", "0,64", "--blocks", "8,8", "--ad"])?),
            "reservations" => self.reservations()?,
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
        let mut arguments = vec![
            verb,
            "-n",
            SUBNQN,
            "-t",
            "tcp",
            "-a",
            &self.address,
            "-s",
            &self.port,
        ];
        arguments.extend(more);
        self.setup
            .flexblk(&arguments)?
            .success()
            .with_context(|| verb.to_owned())
    }

    fn discover(&self) -> Result<()> {
        let (address, port) = (self.address.as_str(), self.port.as_str());
        let arguments = ["discover", "-t", "tcp", "-a", address, "-s", port, "--json"];
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
        ensure!(bytes == self.namespaces, "{info:#}");
        for verb in ["id-ctrl", "id-ns", "smart-log", "error-log", "show-regs"] {
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

    fn write_blocks(&self, seed: u64) -> Result<()> {
        self.setup.file("blocks.bin", 4096, seed)?;
        self.flexblk("write", &["--lba", "16", "-i", "blocks.bin"])?;
        Ok(())
    }

    /// What eight blocks from 16 on are compared with.
    fn compare_with(&self, file: &str) -> Result<Finished> {
        let (address, port) = (self.address.as_str(), self.port.as_str());
        let place = ["-t", "tcp", "-a", address, "-s", port, "-n", SUBNQN];
        let mut arguments = vec!["compare", "--start-block", "16", "-c", "7", "-d", file];
        arguments.extend(place);
        self.setup.flexblk(&arguments)
    }

    fn compare(&self) -> Result<()> {
        self.write_blocks(3)?;
        self.compare_with("blocks.bin")?.success()?;
        self.setup.file("blocks.bin", 4096, 4)?;
        let differs = self.compare_with("blocks.bin")?;
        ensure!(differs.code == Some(7), "{}", differs.stderr);
        Ok(())
    }

    fn compare_refused(&self) -> Result<()> {
        let refused = self.compare_with("/dev/zero")?;
        let said = &refused.stderr;
        ensure!(refused.code == Some(6), "{said}");
        ensure!(said.contains("Invalid Command Opcode"), "{said}");
        Ok(())
    }

    fn write_zeroes(&self) -> Result<()> {
        self.write_blocks(5)?;
        self.flexblk("write-zeroes", &["--start-block", "16", "-c", "7"])?;
        let read = ["--lba", "16", "--blocks", "8", "-o", "zeroes.bin"];
        self.flexblk("read", &read)?;
        let zeroes = std::fs::read(self.setup.path().join("zeroes.bin"))?;
        ensure!(zeroes == [0; 4096], "not zeroes");
        Ok(())
    }

    /// Register, acquire, report, release, unregister.
    fn reservations(&self) -> Result<()> {
        self.flexblk("resv-register", &["--nrkey", "0xabc"])?;
        self.flexblk("resv-acquire", &["--crkey", "0xabc", "--rtype", "1"])?;
        let report = self.flexblk("resv-report", &["-o", "json"])?;
        let report: Value = serde_json::from_str(&report.stdout)?;
        ensure!(report["rtype"] == 1 && report["regctl"] == 1, "{report:#}");
        self.flexblk("resv-release", &["--crkey", "0xabc", "--rtype", "1"])?;
        self.flexblk("resv-register", &["--crkey", "0xabc", "--rrega", "1"])?;
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
            format!("--traddr={}", self.address),
            format!("--trsvcid={}", self.port),
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
