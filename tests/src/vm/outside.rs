//! Our target outside of a guest, and what a guest asks to be done to it.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flexblk_rpc::RpcClient;
use serde_json::{Value, json};

use super::network::{Network, OUTSIDE, OUTSIDE_2, TAP};
use crate::binaries::Binaries;
use crate::target::{SUBNQN, Target, TargetOptions};

/// Size of namespace 2, a file.
const FILE_MIB: u64 = 32;

/// A target that guests reach over NVMe/TCP: namespace 1 in RAM, namespace 2 a file.
pub struct Outside<'a> {
    network: &'a Network,
    directory: PathBuf,
    target: Option<Target>,
}

impl<'a> Outside<'a> {
    /// Starts nothing yet: guests ask for it.
    pub fn new(network: &'a Network, directory: &Path) -> Result<Outside<'a>> {
        let outside = Outside {
            network,
            directory: directory.to_owned(),
            target: None,
        };
        outside.set_len(2, FILE_MIB)?;
        Ok(outside)
    }

    /// Does what a guest asks for.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            // Its own address, which is what the discovery log has to name.
            ["start"] => self.start(OUTSIDE)?,
            // Every address, so that there is more than one path.
            ["start", "everywhere"] => self.start("0.0.0.0")?,
            // A listener of its own for each path, so that ANA states can differ.
            ["start", "listeners"] => {
                self.start(OUTSIDE)?;
                for address in [OUTSIDE, OUTSIDE_2] {
                    let params = json!({ "nqn": SUBNQN, "listen_address": listener(address) });
                    self.rpc()?.call("nvmf_subsystem_add_listener", params)?;
                }
            }
            ["ana", path, state] => {
                let params = json!({
                    "nqn": SUBNQN, "listen_address": listener(address(path)?), "anagrpid": 1,
                    "ana_state": state.replace('-', "_"),
                });
                self.rpc()?
                    .call("nvmf_subsystem_listener_set_ana_state", params)?;
            }
            // As a crash does: nothing is said to hosts.
            ["stop"] => self.running()?.kill()?,
            ["again"] => self.running()?.restart(Binaries::get()?)?,
            ["path-down", path] => {
                let address = address(path)?;
                self.network
                    .ip(&format!("addr del {address}/24 dev {TAP}"))?;
            }
            ["path-up", path] => {
                let address = address(path)?;
                self.network
                    .ip(&format!("addr add {address}/24 dev {TAP}"))?;
            }
            ["add", nsid, mib] => self.add(nsid.parse()?, mib.parse()?)?,
            ["remove", nsid] => self.remove(nsid.parse()?)?,
            ["resize", nsid, mib] => self.resize(nsid.parse()?, mib.parse()?)?,
            _ => bail!("unknown request"),
        }
        Ok(String::new())
    }

    fn start(&mut self, address: &str) -> Result<()> {
        let device = format!("file:{}", self.file(2).display());
        let options = TargetOptions {
            extra: format!("[tcp]\naddress = \"{address}:4420\"\n"),
            ..TargetOptions::with_devices(&["ram:64M", &device])
        };
        self.target = Some(Target::start(Binaries::get()?, &self.directory, options)?);
        Ok(())
    }

    /// The UUID of a namespace.
    pub fn uuid(&mut self, nsid: u32) -> Result<String> {
        let subsystems = self.rpc()?.call("nvmf_get_subsystems", json!({}))?;
        let namespaces = subsystems.as_array().into_iter().flatten();
        namespaces
            .filter_map(|subsystem| subsystem.get("namespaces")?.as_array())
            .flatten()
            .find(|namespace| namespace.get("nsid") == Some(&json!(nsid)))
            .and_then(|namespace| Some(namespace.get("uuid")?.as_str()?.to_owned()))
            .with_context(|| format!("namespace {nsid} is not exported"))
    }

    /// What a namespace is in.
    pub fn file(&self, nsid: u32) -> PathBuf {
        self.directory.join(format!("namespace-{nsid}.img"))
    }

    fn set_len(&self, nsid: u32, mib: u64) -> Result<()> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.file(nsid))?;
        Ok(file.set_len(mib << 20)?)
    }

    fn rpc(&mut self) -> Result<RpcClient> {
        Ok(RpcClient::connect(&self.running()?.rpc_socket())?)
    }

    fn add(&mut self, nsid: u32, mib: u64) -> Result<()> {
        self.set_len(nsid, mib)?;
        let filename = self.file(nsid);
        let name = format!("namespace-{nsid}");
        let mut rpc = self.rpc()?;
        let device = json!({ "name": name, "filename": filename, "block_size": 512 });
        rpc.call("bdev_aio_create", device)?;
        let namespace = json!({ "bdev_name": name, "nsid": nsid });
        let call = json!({ "nqn": SUBNQN, "namespace": namespace });
        rpc.call("nvmf_subsystem_add_ns", call)?;
        Ok(())
    }

    fn remove(&mut self, nsid: u32) -> Result<()> {
        let mut rpc = self.rpc()?;
        rpc.call(
            "nvmf_subsystem_remove_ns",
            json!({ "nqn": SUBNQN, "nsid": nsid }),
        )?;
        let name = format!("namespace-{nsid}");
        rpc.call("bdev_aio_delete", json!({ "name": name }))?;
        Ok(())
    }

    fn resize(&mut self, nsid: u32, mib: u64) -> Result<()> {
        self.set_len(nsid, mib)?;
        let name = format!("namespace-{nsid}");
        self.rpc()?
            .call("bdev_aio_rescan", json!({ "name": name }))?;
        Ok(())
    }

    fn running(&mut self) -> Result<&mut Target> {
        self.target.as_mut().context("no target was started")
    }

    /// Whether the target still runs as it should.
    pub fn check(&mut self) -> Result<()> {
        let target = self.running()?;
        let output = target.output();
        if output.contains("panicked") || !target.is_running() {
            bail!("the target has died:\n{output}");
        }
        Ok(())
    }
}

fn listener(address: &str) -> Value {
    json!({ "trtype": "TCP", "adrfam": "ipv4", "traddr": address, "trsvcid": "4420" })
}

fn address(path: &str) -> Result<&'static str> {
    match path {
        "1" => Ok(OUTSIDE),
        "2" => Ok(OUTSIDE_2),
        _ => bail!("no path {path}"),
    }
}
