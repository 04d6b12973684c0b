//! `flexblk connect-all`: attaches every namespace that a discovery service offers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use flexblk_initiator::{
    ConnectOptions, Controller, DiscoveryController, DiscoveryLog, Namespace, Nqn, SubsystemType,
    TransportId,
};

use super::state::{self, Identity, Record};
use crate::args::{Address, Connection};
use crate::connect;
use crate::exit::Reported;

#[derive(Args, Debug)]
pub(crate) struct ConnectAll {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Stay connected to the discovery service, and attach what it offers later: subsystems at once, namespaces of
    /// subsystems that were there within half a minute.
    #[arg(short = 'p', long)]
    pub(crate) persistent: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// Options for each `flexblk attach`.
    #[arg(last = true, value_name = "ATTACH OPTIONS")]
    pub(crate) attach: Vec<OsString>,
}

/// The discovery service tells of subsystems, but not of their namespaces: those are looked for so often.
const RESCAN: Duration = Duration::from_secs(30);
/// Pause before a lost discovery service is connected to again.
const RECONNECT_DELAY: Duration = Duration::from_secs(10);

/// Attaches; prints each device, as `attach` does. What fails does not keep the others from being attached; the exit code
/// is then that of the first failure.
pub(crate) fn connect_all(args: &ConnectAll) -> Result<()> {
    let options = connect::options(&args.address, &args.connection, true)?;
    if !args.persistent {
        let log = flexblk_initiator::discover(&options)?;
        return attach_offered(args, &options, &log);
    }
    // Whoever asks for it wants to know of a wrong address at once; later the service may come and go.
    let mut service = Some(DiscoveryController::connect(&options)?);
    loop {
        let result = match service.take() {
            Some(service) => follow(args, &options, service),
            None => DiscoveryController::connect(&options)
                .map_err(anyhow::Error::from)
                .and_then(|service| follow(args, &options, service)),
        };
        if let Err(error) = result {
            eprintln!("flexblk: {error:#}; trying again every {RECONNECT_DELAY:?}");
        }
        thread::sleep(RECONNECT_DELAY);
    }
}

/// Until the service is lost.
fn follow(
    args: &ConnectAll,
    options: &ConnectOptions,
    mut service: DiscoveryController,
) -> Result<()> {
    loop {
        let log = service.log()?;
        // What failed has been said; the next change is another chance.
        let _ = attach_offered(args, options, &log);
        service.wait_for_change(RESCAN)?;
    }
}

/// Attaches what is not attached yet.
fn attach_offered(args: &ConnectAll, options: &ConnectOptions, log: &DiscoveryLog) -> Result<()> {
    let mut failed = None;
    for (subnqn, paths) in subsystems(options, log) {
        let namespaces = match namespaces(options, &paths) {
            Ok(namespaces) => namespaces,
            Err(error) => {
                eprintln!("flexblk: {subnqn}: {error:#}");
                failed.get_or_insert(crate::exit::number_of(&error));
                continue;
            }
        };
        for namespace in namespaces {
            let nsid = namespace.nsid.get();
            if is_attached(&Identity::of(subnqn.as_str(), &namespace)) {
                if !args.persistent {
                    eprintln!("namespace {nsid} of {subnqn} is attached already");
                }
            } else if let Err(error) = attach(args, &paths, nsid) {
                // It has said why.
                let code = error
                    .downcast_ref::<Reported>()
                    .map_or(1, |reported| reported.0);
                failed.get_or_insert(code);
            }
        }
    }
    match failed {
        Some(code) => Err(Reported(code).into()),
        None => Ok(()),
    }
}

/// The subsystems, each with its addresses of the transport that the service itself was asked over; those of the other
/// one where there is no such address.
fn subsystems<'a>(
    options: &ConnectOptions,
    log: &'a DiscoveryLog,
) -> BTreeMap<&'a Nqn, Vec<TransportId>> {
    let mut subsystems: BTreeMap<&Nqn, Vec<TransportId>> = BTreeMap::new();
    for record in &log.records {
        if record.subtype == SubsystemType::Nvm
            && let Some(path) = TransportId::from_record(record)
        {
            subsystems.entry(&record.subnqn).or_default().push(path);
        }
    }
    let asked = |path: &TransportId| path.trtype == options.target.trtype;
    for paths in subsystems.values_mut() {
        if paths.iter().any(asked) {
            paths.retain(asked);
        }
    }
    subsystems
}

/// The namespaces that this host sees, asked over the first path that works.
fn namespaces(options: &ConnectOptions, paths: &[TransportId]) -> Result<Vec<Namespace>> {
    let mut result = Err(anyhow::anyhow!("no address"));
    for path in paths {
        let mut options = options.clone();
        let host = (options.target.hostnqn.take(), options.target.hostid);
        options.target = path.clone();
        (options.target.hostnqn, options.target.hostid) = host;
        result = Controller::connect(&options)
            .map(|controller| controller.namespaces())
            .map_err(anyhow::Error::from);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn is_attached(wanted: &Identity) -> bool {
    state::names().into_iter().any(|name| {
        Record::load(&name).is_some_and(|record| record.identity == *wanted)
            && state::is_served(&name)
    })
}

/// One `flexblk attach`, with the words that we were given ourselves.
fn attach(args: &ConnectAll, paths: &[TransportId], nsid: u32) -> Result<()> {
    let program = std::env::current_exe().context("who am I?")?;
    let mut command = Command::new(program);
    command.arg("attach");
    for (number, path) in paths.iter().enumerate() {
        let mut path = path.clone();
        path.nsid = Some(flexblk_initiator::Nsid::new(nsid));
        if number > 0 {
            command.arg("--path");
        }
        command.arg(path.uri());
    }
    let connection = &args.connection;
    if let Some(port) = connection.udp_port {
        command.args(["--udp-port", &port.to_string()]);
    }
    for (flag, value) in [
        ("--hostnqn", &connection.hostnqn),
        ("--hostid", &connection.hostid),
    ] {
        if let Some(value) = value {
            command.args([flag, value]);
        }
    }
    for (flag, given) in [
        ("--hdr-digest", connection.hdr_digest),
        ("--data-digest", connection.data_digest),
    ] {
        if given {
            command.arg(flag);
        }
    }
    let status = command.args(&args.attach).status()?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) => Ok(()),
        code => Err(Reported(code.unwrap_or(1)).into()),
    }
}
