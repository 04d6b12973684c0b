//! The daemon `flexblk-target`: flags, signals, exit codes. Everything else is in the library.

mod cli;
mod log;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use clap::Parser;
use flexblk_target::Target;
use flexblk_target::config::RpcSocket;
use flexblk_target::manage::{
    DEFAULT_RPC_SOCKET, LogControl, Management, ManagementError, Options,
};
use flexblk_target::stats::TargetStats;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use cli::{Args, Command, ExitKind, Failure};

/// How often the daemon looks whether its threads still run.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let args = Args::parse();
    let log = log::init(&args);
    let result = match &args.command {
        Some(Command::Apply(apply)) => apply.run(),
        Some(Command::Manuals { directory }) => cli::write_manuals(directory),
        None => serve(&args, log),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("flexblk-target: {}", failure.message);
            ExitCode::from(failure.kind as u8)
        }
    }
}

fn serve(args: &Args, log: Arc<LogControl>) -> Result<(), Failure> {
    raise_file_limit();
    let config = args.config()?;
    let listener = config.listener.clone();
    // Before the first thread, so that a signal during the start ends us cleanly too.
    let signals = watch_signals().map_err(|error| Failure::runtime(format!("signals: {error}")))?;
    let target = Arc::new(Target::start(config).map_err(|error| Failure::start(&error))?);
    let management = manage(&target, log)?;
    println!(
        "listening on {} service {}, UDP port {}",
        listener.address.ip(),
        listener.address.port(),
        listener.udp_port
    );
    if let Some(address) = target.tcp_address() {
        println!("listening on {address} with NVMe/TCP");
    }
    if let Some(path) = management.rpc_socket() {
        println!("rpc: {}", path.display());
    }
    if let Some(address) = management.metrics_address() {
        println!("metrics: http://{address}/metrics");
    }
    for uri in target.uris() {
        println!("ready: {uri}");
    }
    let _ = std::io::stdout().flush();
    tell_systemd(NotifyState::Ready);

    let mut last_stats = std::time::Instant::now();
    let failed = loop {
        match signals.recv_timeout(
            args.stats_interval()
                .map_or(WATCH_INTERVAL, |interval| interval.min(WATCH_INTERVAL)),
        ) {
            Ok(SIGUSR1) => report(&target.stats(), args.stats_file.as_deref()),
            Ok(signal) => {
                tracing::info!(signal, "closing");
                break false;
            }
            Err(mpsc::RecvTimeoutError::Timeout) if target.has_failed() => break true,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => break true,
        }
        if let Some(interval) = args.stats_interval()
            && last_stats.elapsed() >= interval
        {
            last_stats = std::time::Instant::now();
            report(&target.stats(), args.stats_file.as_deref());
        }
    };
    tell_systemd(NotifyState::Stopping);
    drop(management);
    let stats = target.stats();
    let clean = target.stop();
    report(&stats, args.stats_file.as_deref());
    match (failed, clean) {
        (false, true) => Ok(()),
        _ => Err(Failure::runtime(
            "a data thread failed; its last words are above".to_owned(),
        )),
    }
}

/// For a unit of `Type=notify`; without systemd nothing happens.
fn tell_systemd(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(false, &[state]) {
        tracing::warn!(%error, "systemd cannot be told");
    }
}

/// Management clients each take a descriptor, and the usual limit of 1024 leaves room for few.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    // Without it clients are turned away earlier.
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Starts management. The usual socket is done without when another process has it, one that was
/// asked for is not.
fn manage(target: &Arc<Target>, log: Arc<LogControl>) -> Result<Management, Failure> {
    let options = |rpc_socket| Options {
        rpc_socket,
        log: Some(Arc::clone(&log)),
        metrics: target.config().management.metrics,
        state_file: target.config().management.state_file.clone(),
        signal: Some(Box::new(|signal| {
            if let Err(error) = signal_hook::low_level::raise(signal) {
                tracing::error!(%error, signal, "a signal could not be sent");
            }
        })),
    };
    let slow = target.config().management.slow_io;
    let slow_us = slow.map(|time| u32::try_from(time.as_micros()).unwrap_or(u32::MAX));
    target.metrics().set_slow_us(slow_us);
    let (path, is_usual) = match &target.config().management.rpc_socket {
        RpcSocket::Default => (Some(DEFAULT_RPC_SOCKET.into()), true),
        RpcSocket::Path(path) => (Some(path.clone()), false),
        RpcSocket::Off => (None, false),
    };
    let started = match Management::start(target, options(path)) {
        Err(ManagementError::Socket(error)) if is_usual => {
            tracing::warn!(%error, "no management; --rpc-socket gives it a place of its own");
            Management::start(target, options(None))
        }
        started => started,
    };
    started.map_err(|error| Failure {
        kind: ExitKind::Start,
        message: error.to_string(),
    })
}

/// Signals arrive in a channel; a thread of its own waits for them.
fn watch_signals() -> std::io::Result<mpsc::Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1])?;
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if sender.send(signal).is_err() {
                    return;
                }
            }
        })?;
    Ok(receiver)
}

/// One JSON line: to the file if there is one, else to standard output.
fn report(stats: &TargetStats, file: Option<&Path>) {
    let line = match serde_json::to_string(stats) {
        Ok(line) => line,
        Err(error) => return tracing::error!(%error, "counters"),
    };
    let written = match file {
        Some(path) => {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            opened.and_then(|mut file| writeln!(file, "{line}"))
        }
        None => writeln!(std::io::stdout(), "{line}"),
    };
    if let Err(error) = written {
        tracing::error!(%error, "counters could not be written");
    }
}

impl Failure {
    fn runtime(message: String) -> Self {
        Self {
            kind: ExitKind::Runtime,
            message,
        }
    }
}
