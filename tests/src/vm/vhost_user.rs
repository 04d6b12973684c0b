//! `flexblk export vhost-user` outside of a guest that has it as a disk, and what the guest asks to be done to it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flexblk_rpc::RpcClient;
use serde_json::json;

use crate::binaries::Binaries;
use crate::ports::free_udp_port;
use crate::process::{Process, eventually};
use crate::target::{SUBNQN, Target, TargetOptions};

/// Queues of the disk: more than the guest has processors.
pub const QUEUES: u16 = 4;
/// Threads that serve them.
const THREADS: u16 = 2;
/// Size of the disk at first, a file.
const DISK_MIB: u64 = 64;

/// Two targets that export one file, and the program that makes a disk of it.
pub struct VhostUser {
    directory: PathBuf,
    /// As the paths to the disk: FlexiNS, and NVMe/TCP.
    targets: [Target; 2],
    tcp_port: u16,
    server: Process,
    starts: u32,
}

impl VhostUser {
    /// Starts them.
    pub fn start(directory: &Path) -> Result<VhostUser> {
        let image = directory.join("disk.img");
        File::create(&image)?.set_len(DISK_MIB << 20)?;
        let device = format!("file:{},share_rw=true", image.display());
        let start = |tcp_port| {
            let options = TargetOptions {
                tcp_port,
                ..TargetOptions::with_devices(&[&device])
            };
            Target::start(Binaries::get()?, directory, options)
        };
        let tcp_port = free_udp_port()?;
        let targets = [start(None)?, start(Some(tcp_port))?];
        let server = spawn(directory, &targets[0], tcp_port, 0)?;
        Ok(VhostUser {
            directory: directory.to_owned(),
            targets,
            tcp_port,
            server,
            starts: 1,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Does what a guest asks for.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            // As a crash does: nothing is finished, nothing is said.
            ["crash"] => {
                self.server.kill()?;
                self.again()?;
            }
            ["terminate"] => {
                self.server.signal(rustix::process::Signal::TERM)?;
                let status = self.server.wait(Duration::from_secs(10))?;
                if !status.success() {
                    bail!("it ended with {status}: {}", self.server.tail());
                }
                self.again()?;
            }
            ["path-down", path] => self.target(path)?.kill()?,
            ["path-up", path] => self.target(path)?.restart(Binaries::get()?)?,
            ["resize", mib] => self.resize(mib.parse()?)?,
            _ => bail!("unknown request"),
        }
        Ok(String::new())
    }

    fn target(&mut self, path: &str) -> Result<&mut Target> {
        let index = path.parse::<usize>()?.checked_sub(1);
        let target = index.and_then(|index| self.targets.get_mut(index));
        target.with_context(|| format!("no path {path}"))
    }

    fn again(&mut self) -> Result<()> {
        // What it said goes with it, and is wanted when the guest then finds something wrong.
        eprint!("{}", self.server.stderr());
        self.server = spawn(
            &self.directory,
            &self.targets[0],
            self.tcp_port,
            self.starts,
        )?;
        self.starts += 1;
        Ok(())
    }

    fn resize(&mut self, mib: u64) -> Result<()> {
        File::options()
            .write(true)
            .open(self.directory.join("disk.img"))?
            .set_len(mib << 20)?;
        for target in &self.targets {
            let mut rpc = RpcClient::connect(&target.rpc_socket())?;
            let bdevs = rpc.call("bdev_get_bdevs", json!({}))?;
            let name = bdevs[0]["name"].as_str().context("no bdev")?.to_owned();
            rpc.call("bdev_aio_rescan", json!({ "name": name }))?;
        }
        Ok(())
    }

    /// Whether all of them still run as they should.
    pub fn check(&mut self) -> Result<()> {
        eprint!("{}", self.server.stderr());
        let targets_run = self.targets.iter_mut().all(Target::is_running);
        if self.server.status()?.is_some() || !targets_run {
            bail!("a program has died: {}", self.server.tail());
        }
        Ok(())
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("disk.sock")
}

fn spawn(directory: &Path, target: &Target, tcp_port: u16, number: u32) -> Result<Process> {
    let mut command = Command::new(&Binaries::get()?.flexblk);
    command
        .args(["-v", "export", "vhost-user"])
        .args(target.address())
        .args([
            "--path",
            &format!("nvme+tcp://127.0.0.1:{tcp_port}/{SUBNQN}"),
        ])
        .arg("--socket")
        .arg(socket(directory))
        .args(["--queues", &QUEUES.to_string()])
        .args(["--threads", &THREADS.to_string()]);
    let mut server = Process::spawn(&mut command, &format!("vhost-user-{number}"), directory)?;
    let started = eventually("the back-end listens", Duration::from_secs(20), || {
        server.stdout().contains("queues") || !matches!(server.status(), Ok(None))
    });
    if started.is_err() || server.status()?.is_some() {
        bail!("it does not start: {}", server.tail());
    }
    Ok(server)
}
