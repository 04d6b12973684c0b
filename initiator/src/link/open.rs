//! Opening a queue's connection: connection request with NVMe/RDMA private data, and what the target answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flexblk_nvme::flexins::{NvmeParams, ParamFlags};
use flexblk_nvme::rdma::{AcceptPrivate, RejectPrivate, RequestPrivate};
use flexblk_nvme::transport_id::TrType;
use flexblk_nvme::{Cntlid, Qid};
use flexins::cm::{RejectReason, ServiceId};
use flexins::endpoint::EndpointConfig;
use flexins::engine::EngineConfig;
use flexins::remote::EngineThread;

use super::Link;
use super::inline::InlineVerbs;
use super::rdma::{Agreed, RdmaLink};
use super::tcp::TcpLink;
use super::thread::{ThreadVerbs, start_engine};
use crate::{ConnectOptions, EngineMode, Error};

/// Which queue to open, and how.
pub(crate) struct OpenArgs<'a> {
    pub(crate) options: &'a ConnectOptions,
    pub(crate) address: SocketAddr,
    pub(crate) qid: Qid,
    /// Commands outstanding at once.
    pub(crate) depth: u16,
    pub(crate) cntlid: Cntlid,
    pub(crate) engine: EngineMode,
    /// The engine thread of the controller's queues, in mode `thread`.
    pub(crate) shared_engine: &'a SharedEngine,
}

/// An engine thread that the queues of a controller share; started with the first of them.
#[derive(Default)]
pub(crate) struct SharedEngine(Mutex<Option<Arc<EngineThread>>>);

impl SharedEngine {
    /// The thread; a new one when there is none or it died.
    fn get_or_start(
        &self,
        start: impl FnOnce() -> Result<Arc<EngineThread>, Error>,
    ) -> Result<Arc<EngineThread>, Error> {
        let mut engine = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = engine.as_ref().filter(|engine| engine.is_alive()) {
            return Ok(Arc::clone(engine));
        }
        let fresh = start()?;
        *engine = Some(Arc::clone(&fresh));
        Ok(fresh)
    }
}

/// In-capsule data that we ask for; the MTU limits it further, so that a capsule is one packet.
const IN_CAPSULE_BYTES: u32 = 8192;

/// What a connection attempt ends with; the same for every place an engine can be.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Private data of the acceptance; whether FlexiNS framing was agreed; payload bytes of a packet.
    Established {
        private: Vec<u8>,
        flexins: bool,
        mtu_bytes: u32,
    },
    Rejected {
        reason: RejectReason,
        private: Vec<u8>,
    },
    Unreachable,
}

/// Opens a queue's connection; Fabrics Connect comes next.
pub(crate) fn open(args: &OpenArgs<'_>) -> Result<Box<dyn Link>, Error> {
    match args.options.target.trtype {
        TrType::Flexins => {}
        TrType::Tcp => return Ok(Box::new(TcpLink::connect(args)?)),
        other => {
            return Err(Error::Address(format!(
                "transport {other} is not supported: use flexins or tcp"
            )));
        }
    }
    match args.engine {
        EngineMode::Inline => {
            let (verbs, outcome) = InlineVerbs::connect(args)?;
            let agreed = agree(args, outcome)?;
            Ok(Box::new(RdmaLink::new(verbs, args.depth, agreed)))
        }
        EngineMode::Thread { core } => {
            let engine = args
                .shared_engine
                .get_or_start(|| start_engine(args, core))?;
            let (verbs, outcome) = ThreadVerbs::connect(args, engine)?;
            let agreed = agree(args, outcome)?;
            Ok(Box::new(RdmaLink::new(verbs, args.depth, agreed)))
        }
    }
}

impl OpenArgs<'_> {
    /// RDMA-CM's service identifier of the NVMe port.
    pub(crate) fn service(&self) -> ServiceId {
        ServiceId::from_port(self.options.target.port())
    }

    /// Private data of the connection request.
    pub(crate) fn request(&self) -> Vec<u8> {
        let params = NvmeParams {
            in_capsule_bytes: IN_CAPSULE_BYTES,
            flags: ParamFlags::IMMEDIATE_COMPLETIONS,
        };
        let mut request = RequestPrivate::new(self.qid, self.depth.saturating_add(1), self.cntlid);
        request.extension = params.emit();
        request.bytes().to_vec()
    }

    /// Where and how our endpoint works; `group` is free on its reactor.
    pub(crate) fn endpoint(&self, group: u16) -> EndpointConfig {
        let options = self.options;
        let any = match self.address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let mut engine = EngineConfig {
            digest: options.digest,
            tx: options.tx,
            ..EngineConfig::default()
        };
        engine.mtu = options.mtu.unwrap_or(engine.mtu);
        if let Some(limit) = options.ack_timeout {
            engine.retry_time = limit;
            // It is looked at when a timeout comes: a few of them within the limit keep to it.
            engine.max_rto = engine.max_rto.min(limit / 4).max(engine.min_rto);
        }
        EndpointConfig {
            engine,
            peer: Some(self.address),
            rx: options.rx,
            fault: options.fault,
            buffer_group: group,
            capture: options
                .capture
                .as_deref()
                .map(|path| capture_path(path, self.qid)),
            ..EndpointConfig::new(SocketAddr::new(options.host_traddr.unwrap_or(any), 0))
        }
    }

    /// Nobody answered until the deadline.
    pub(crate) fn unreachable(&self) -> Error {
        Error::Unreachable {
            address: self.address,
            protocol: match self.options.target.trtype {
                TrType::Tcp => "TCP",
                _ => "UDP",
            },
            after: self.options.connect_timeout,
        }
    }
}

/// `trace.pcapng` becomes `trace.q1.pcapng`: each captured queue has an engine, and a file, of its own.
fn capture_path(path: &Path, qid: Qid) -> PathBuf {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or("pcapng");
    path.with_extension(format!("q{qid}.{extension}"))
}

pub(crate) fn agree(args: &OpenArgs<'_>, outcome: Outcome) -> Result<Agreed, Error> {
    match outcome {
        Outcome::Established {
            private,
            flexins,
            mtu_bytes,
        } => {
            let params = AcceptPrivate::parse(&private)
                .filter(|_| flexins)
                .and_then(|accept| NvmeParams::parse(&accept.extension));
            Ok(match params {
                Some(params) => Agreed {
                    in_capsule_bytes: Some(
                        params.in_capsule_bytes.min(mtu_bytes.saturating_sub(64)),
                    ),
                    immediate_completions: params.flags.contains(ParamFlags::IMMEDIATE_COMPLETIONS),
                },
                None => Agreed {
                    in_capsule_bytes: None,
                    immediate_completions: false,
                },
            })
        }
        Outcome::Unreachable => Err(args.unreachable()),
        Outcome::Rejected { reason, private } => Err(Error::Refused {
            address: args.address,
            reason: match (reason, RejectPrivate::parse(&private)) {
                (RejectReason::InvalidServiceId, _) => {
                    format!(
                        "nothing listens on service {}: check trsvcid",
                        args.options.target.port()
                    )
                }
                (_, Some(status)) if status.raw() != 0 => status.to_string(),
                (reason, _) => format!("{reason:?}"),
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_has_a_capture_file() {
        assert_eq!(
            capture_path(Path::new("/tmp/a.pcapng"), Qid::new(2)),
            Path::new("/tmp/a.q2.pcapng")
        );
        assert_eq!(
            capture_path(Path::new("a"), Qid::ADMIN),
            Path::new("a.q0.pcapng")
        );
    }
}
