//! How to connect: the words of nvme-cli, SPDK and FlexiNS with their defaults.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use flexblk_nvme::TransportId;
use flexblk_nvme::transport_id::TrType;

use crate::{Error, Host};

pub use flexins::endpoint::RxMode;
pub use flexins::engine::TxMode;
pub use flexins::middleware::fault::FaultConfig;
pub use flexins::verbs::Digest;

/// Where the transport engine of the I/O queue pairs runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineMode {
    /// In the caller's thread, driven by its polls: lowest latency.
    #[default]
    Inline,
    /// In a thread of its own; the caller meets it in shared-memory rings.
    Thread {
        /// Pin that thread to this core.
        core: Option<usize>,
    },
}

/// Everything that decides how a controller is reached. [`ConnectOptions::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Transport, address, service id and subsystem. `hostnqn`/`hostid` in it override [`host`](Self::host).
    pub target: TransportId,
    /// Who we are.
    pub host: Host,
    /// Local address to connect from.
    pub host_traddr: Option<IpAddr>,
    /// FlexiNS: UDP port of the target's responder (not `trsvcid`, which is the service id). Default 4791.
    pub udp_port: u16,
    /// Keep-alive time-out; zero turns it off. Default 5 s.
    pub kato: Duration,
    /// How long the target's end of a connection may leave what was sent unacknowledged before the connection is taken for
    /// dead. `None`: FlexiNS 3 s, NVMe/TCP as long as the kernel likes.
    pub ack_timeout: Option<Duration>,
    /// Limit for one I/O command. Default 30 s.
    pub io_timeout: Duration,
    /// Limit for reaching the target and for each step of bringing a controller up. Default 5 s.
    pub connect_timeout: Duration,
    /// Limit for one admin command. Default 10 s.
    pub admin_timeout: Duration,
    /// Number of I/O queue pairs asked for. Default: number of CPUs.
    pub nr_io_queues: u16,
    /// Commands a queue pair may have outstanding unless it asks otherwise. Default 128.
    pub queue_size: u16,
    /// FlexiNS: where the engine runs. Default inline.
    pub engine: EngineMode,
    /// FlexiNS: `header-only` or `copy`.
    pub tx: TxMode,
    /// FlexiNS: `in-cache` or `ring`.
    pub rx: RxMode,
    /// FlexiNS: packet checksum.
    pub digest: Digest,
    /// FlexiNS: largest payload per packet that we offer; `None`: the transport's default.
    pub mtu: Option<u32>,
    /// How long a thread with queue pairs spins after the last activity before it sleeps. Default 100 us. That of the
    /// Admin queue never spins.
    pub poll_budget: Duration,
    /// NVMe/TCP: a digest over the header of every PDU.
    pub hdr_digest: bool,
    /// NVMe/TCP: a digest over the data of every PDU.
    pub data_digest: bool,
    /// FlexiNS: deliberate faults on our own packets, for tests.
    pub fault: Option<FaultConfig>,
    /// FlexiNS: write every packet to this pcapng file; queue `n` of the controller adds `.q<n>` before the extension. A
    /// captured queue pair shares its endpoint with no other.
    pub capture: Option<PathBuf>,
}

/// How one queue pair differs from the controller's defaults.
#[derive(Clone, Debug, Default)]
pub struct QueuePairOptions {
    /// Commands outstanding at once; default [`ConnectOptions::queue_size`], capped by the controller's MQES.
    pub depth: Option<u16>,
    /// Memory to register before the first command (more can be registered later).
    pub memory: Vec<flexblk_reactor::Span>,
    /// Bytes of bounce buffers for commands whose memory is not registered. Default 1 MiB; 0: such commands fail.
    pub bounce_bytes: Option<usize>,
}

/// Bytes of the receive ring when `rx=ring` says none.
const RING_BYTES: usize = 64 << 20;

impl ConnectOptions {
    /// The defaults for a target.
    pub fn new(target: TransportId, host: Host) -> ConnectOptions {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        ConnectOptions {
            host_traddr: target.host_traddr,
            target,
            host,
            udp_port: 4791,
            kato: Duration::from_secs(5),
            ack_timeout: None,
            io_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
            admin_timeout: Duration::from_secs(10),
            nr_io_queues: u16::try_from(cpus).unwrap_or(u16::MAX),
            queue_size: 128,
            engine: EngineMode::Inline,
            tx: TxMode::HeaderOnly,
            rx: RxMode::InCache,
            digest: Digest::Crc32c,
            mtu: None,
            poll_budget: Duration::from_micros(100),
            hdr_digest: false,
            data_digest: false,
            fault: None,
            capture: None,
        }
    }

    /// From one text: words or URI of the target, with any of the words of [`set`](Self::set) among them.
    pub fn parse(text: &str, host: Host) -> Result<ConnectOptions, Error> {
        let (target, rest) =
            TransportId::parse_with_rest(text).map_err(|e| Error::Address(e.to_string()))?;
        let mut options = ConnectOptions::new(target, host);
        for (word, value) in &rest {
            options.set(word, value)?;
        }
        Ok(options)
    }

    /// Sets one option by its word: `udp_port`, `kato_ms`, `ack_timeout_ms`, `io_timeout_ms`, `connect_timeout_ms`,
    /// `admin_timeout_ms`, `nr_io_queues`, `queue_size`, `engine` (`inline`, `thread`, `thread:CORE`), `tx`
    /// (`header-only`, `copy`), `rx` (`in-cache`, `ring`, `ring:MIB`), `digest` (`none`, `crc32c`), `mtu`,
    /// `hdr_digest` and `data_digest` (`0`, `1`), `poll_budget_us`, `fault` (`loss=0.01,...`), `capture`, `host_traddr`.
    pub fn set(&mut self, word: &str, value: &str) -> Result<(), Error> {
        match word {
            "udp_port" => self.udp_port = number("udp_port", value)?,
            "kato_ms" => self.kato = millis("kato_ms", value)?,
            "ack_timeout_ms" => self.ack_timeout = Some(positive_millis("ack_timeout_ms", value)?),
            "io_timeout_ms" => self.io_timeout = positive_millis("io_timeout_ms", value)?,
            "connect_timeout_ms" => {
                self.connect_timeout = positive_millis("connect_timeout_ms", value)?
            }
            "admin_timeout_ms" => self.admin_timeout = positive_millis("admin_timeout_ms", value)?,
            "nr_io_queues" => self.nr_io_queues = number::<u16>("nr_io_queues", value)?.max(1),
            "queue_size" => self.queue_size = number::<u16>("queue_size", value)?.max(1),
            "mtu" => self.mtu = Some(number("mtu", value)?),
            "poll_budget_us" => {
                self.poll_budget = Duration::from_micros(number("poll_budget_us", value)?)
            }
            "capture" => self.capture = Some(PathBuf::from(value)),
            "host_traddr" => self.host_traddr = Some(number("host_traddr", value)?),
            "engine" => {
                self.engine = match value.split_once(':') {
                    None if value == "inline" => EngineMode::Inline,
                    None if value == "thread" => EngineMode::Thread { core: None },
                    Some(("thread", core)) => EngineMode::Thread {
                        core: Some(number("engine", core)?),
                    },
                    _ => return Err(wrong("engine", value, "inline, thread or thread:CORE")),
                }
            }
            "tx" => {
                self.tx = match value {
                    "header-only" => TxMode::HeaderOnly,
                    "copy" => TxMode::Copy,
                    _ => return Err(wrong("tx", value, "header-only or copy")),
                }
            }
            "rx" => {
                self.rx = match value.split_once(':') {
                    None if value == "in-cache" => RxMode::InCache,
                    None if value == "ring" => RxMode::Ring { bytes: RING_BYTES },
                    Some(("ring", mib)) => RxMode::Ring {
                        bytes: number::<usize>("rx", mib)?.saturating_mul(1 << 20),
                    },
                    _ => return Err(wrong("rx", value, "in-cache, ring or ring:MIB")),
                }
            }
            "digest" => {
                self.digest = match value {
                    "none" => Digest::None,
                    "crc32c" => Digest::Crc32c,
                    _ => return Err(wrong("digest", value, "none or crc32c")),
                }
            }
            "hdr_digest" => self.hdr_digest = switch("hdr_digest", value)?,
            "data_digest" => self.data_digest = switch("data_digest", value)?,
            "fault" => {
                self.fault = Some(value.parse().map_err(|e| Error::Option {
                    name: "fault".into(),
                    reason: format!("{e}"),
                })?);
            }
            _ => {
                return Err(Error::Option {
                    name: word.to_owned(),
                    reason: "there is no such option".into(),
                });
            }
        }
        Ok(())
    }
}

impl ConnectOptions {
    /// Whether every option is one that the transport has. FlexiNS's defaults are no demands.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let unsuitable = |name: &str, reason: &str| {
            Err(Error::Option {
                name: name.to_owned(),
                reason: reason.to_owned(),
            })
        };
        const OF_TCP: &str =
            "only trtype=tcp has it; FlexiNS has a checksum over every packet (digest=crc32c)";
        const OF_FLEXINS: &str = "trtype=tcp does not have it: leave it out, or use trtype=flexins";
        if self.target.trtype != TrType::Tcp {
            return match (self.hdr_digest, self.data_digest) {
                (true, _) => unsuitable("hdr_digest", OF_TCP),
                (_, true) => unsuitable("data_digest", OF_TCP),
                _ => Ok(()),
            };
        }
        if self.digest != Digest::Crc32c {
            return unsuitable(
                "digest",
                "trtype=tcp has hdr_digest and data_digest instead, both off unless asked for",
            );
        }
        let foreign = [
            ("engine", self.engine != EngineMode::Inline),
            ("tx", self.tx != TxMode::HeaderOnly),
            ("rx", self.rx != RxMode::InCache),
            ("mtu", self.mtu.is_some()),
            ("fault", self.fault.is_some()),
            ("capture", self.capture.is_some()),
        ];
        match foreign.iter().find(|(_, given)| *given) {
            Some((name, _)) => unsuitable(name, OF_FLEXINS),
            None => Ok(()),
        }
    }
}

fn switch(name: &str, value: &str) -> Result<bool, Error> {
    match value {
        "1" | "true" | "on" => Ok(true),
        "0" | "false" | "off" => Ok(false),
        _ => Err(wrong(name, value, "0 or 1")),
    }
}

fn wrong(name: &str, value: &str, allowed: &str) -> Error {
    Error::Option {
        name: name.to_owned(),
        reason: format!("'{value}' is not {allowed}"),
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, Error>
where
    T::Err: std::fmt::Display,
{
    value.parse().map_err(|e| Error::Option {
        name: name.to_owned(),
        reason: format!("'{value}': {e}"),
    })
}

fn millis(name: &str, value: &str) -> Result<Duration, Error> {
    Ok(Duration::from_millis(u64::from(number::<u32>(
        name, value,
    )?)))
}

fn positive_millis(name: &str, value: &str) -> Result<Duration, Error> {
    Some(millis(name, value)?)
        .filter(|time| !time.is_zero())
        .ok_or_else(|| wrong(name, value, "a time above 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> ConnectOptions {
        let host = Host {
            hostnqn: "nqn.2026-11.io.example:h".parse().unwrap(),
            hostid: crate::HostId::random(),
        };
        ConnectOptions::parse("traddr=127.0.0.1 subnqn=nqn.2026-11.io.example:s trtype=flexins udp_port=4799 digest=none", host).unwrap()
    }

    #[test]
    fn words_among_the_address() {
        let options = options();
        assert_eq!((options.udp_port, options.digest), (4799, Digest::None));
        assert_eq!(options.target.traddr, "127.0.0.1");
    }

    #[test]
    fn each_word_is_checked() {
        let mut options = options();
        options.set("engine", "thread:3").unwrap();
        assert_eq!(options.engine, EngineMode::Thread { core: Some(3) });
        options.set("rx", "ring:2").unwrap();
        assert_eq!(options.rx, RxMode::Ring { bytes: 2 << 20 });
        options.set("fault", "loss=0.5").unwrap();
        for (word, value) in [
            ("engine", "gpu"),
            ("tx", ""),
            ("rx", "ring:x"),
            ("kato_ms", "-1"),
            ("io_timeout_ms", "0"),
            ("colour", "red"),
        ] {
            let error = options.set(word, value).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
