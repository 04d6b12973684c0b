//! From an address to an enabled controller: connect, Connect, properties, Identify, features.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::time::Duration;

use flexblk_nvme::command::admin::{self, Cns};
use flexblk_nvme::command::fabrics;
use flexblk_nvme::features::{AsyncEventConfig, FeatureValue, NumberOfQueues};
use flexblk_nvme::identify::{self, Oncs, descriptors};
use flexblk_nvme::property::{Cap, Cc, Csts, Property};
use flexblk_nvme::status::{CodeSpace, StatusCode};
use flexblk_nvme::transport_id::TrType;
use flexblk_nvme::{Cntlid, Nqn, Nsid, Qid, Sgl, Status};

use super::runner::{Payload, Reply, Runner};
use super::{ADMIN_DEPTH, AdminQueue};
use crate::link::Link;
use crate::link::open::{OpenArgs, SharedEngine, open};
use crate::{
    ConnectOptions, EngineMode, Error, Host, IdentifyController, LostReason, MaxBlocks, Namespace,
};

/// Largest transfer of one command that we use, also when the controller has no limit.
const MAX_TRANSFER_BYTES: u32 = 1 << 20;
/// Namespaces of one controller that we look at.
const MAX_NAMESPACES: usize = 65_536;

/// What bringing a controller up found out.
pub(crate) struct BroughtUp {
    pub(crate) queue: AdminQueue,
    pub(crate) facts: Facts,
    /// A namespace could not be read, for a reason that may pass.
    pub(crate) unread: bool,
}

/// What queue pairs need to know about a controller.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) address: SocketAddr,
    pub(crate) subnqn: Nqn,
    pub(crate) host: Host,
    pub(crate) cntlid: Cntlid,
    pub(crate) identify: IdentifyController,
    pub(crate) max_transfer_bytes: u32,
    /// In-capsule data of I/O queues.
    pub(crate) in_capsule_bytes: u32,
    /// Entries of a queue at most.
    pub(crate) max_queue_entries: u32,
    /// Limits of commands without data, in units of `page_bytes`; all zeroes when the controller names none.
    pub(crate) nvm: identify::NvmController,
    /// CAP.MPSMIN.
    page_bytes: u64,
}

impl Facts {
    /// Whether the subsystem reports asymmetric access (CMIC bit 3).
    pub(crate) fn reports_ana(&self) -> bool {
        self.identify.cmic & 1 << 3 != 0
    }
}

/// Connects to the subsystem `subnqn` and enables the controller.
pub(crate) fn bring_up(options: &ConnectOptions, subnqn: &Nqn) -> Result<BroughtUp, Error> {
    options.check()?;
    let address = resolve(options)?;
    // Nobody waits for an admin command as for an I/O, and the core may be that of a thread that polls for I/O.
    let options = &ConnectOptions {
        poll_budget: Duration::ZERO,
        ..options.clone()
    };
    let link = open(&OpenArgs {
        options,
        address,
        qid: Qid::ADMIN,
        depth: ADMIN_DEPTH,
        cntlid: Cntlid::DYNAMIC,
        // The control thread is a thread already.
        engine: EngineMode::Inline,
        shared_engine: &SharedEngine::default(),
    })?;
    bring_up_over(link, options, address, subnqn)
}

/// The same over an open link.
pub(crate) fn bring_up_over(
    link: Box<dyn Link>,
    options: &ConnectOptions,
    address: SocketAddr,
    subnqn: &Nqn,
) -> Result<BroughtUp, Error> {
    let host = options
        .host
        .overridden(options.target.hostnqn.as_ref(), options.target.hostid);
    let mut runner = Runner::new(link)?;
    let who = Who {
        options,
        address,
        subnqn,
        host: &host,
    };
    let connect = fabrics::Connect {
        qid: Qid::ADMIN,
        sqsize: ADMIN_DEPTH,
        cattr: fabrics::ConnectAttributes::new().with_disable_sq_flow_control(true),
        kato_ms: u32::try_from(options.kato.as_millis()).unwrap_or(u32::MAX),
    };
    let cntlid = who.connect(&mut runner, &connect, Cntlid::DYNAMIC)?;
    let mut queue = AdminQueue::new(runner, options.admin_timeout);
    queue.keep_alive(options.kato);

    let cap = Cap::from_bits(property(&mut queue, Property::Cap)?);
    set_property(&mut queue, Property::Cc, u64::from(Cc::ENABLE.into_bits()))?;
    wait_ready(&mut queue, cap)?;
    let data = queue.identify(Cns::Controller, Nsid::NONE)?;
    let identify = *identify::Controller::view(&data)
        .ok_or(Error::Protocol("Identify Controller is too short"))?;
    let facts = Facts {
        address,
        subnqn: subnqn.clone(),
        host,
        cntlid,
        max_transfer_bytes: max_transfer(&identify, cap),
        // IOCCSZ counts 16-byte units and includes the SQE; with an offset we would have to pad.
        in_capsule_bytes: if identify.icdoff.get() == 0 {
            identify.ioccsz.get().saturating_mul(16).saturating_sub(64)
        } else {
            0
        },
        max_queue_entries: u32::from(cap.mqes()) + 1,
        nvm: identify::NvmController::zeroed(),
        page_bytes: 1 << (12 + u32::from(cap.mpsmin())),
        identify,
    };
    Ok(BroughtUp {
        queue,
        facts,
        unread: false,
    })
}

/// What an I/O controller has beyond a discovery controller: queues, events, namespaces.
pub(crate) fn bring_up_io(
    options: &ConnectOptions,
    up: &mut BroughtUp,
) -> Result<(u16, Vec<Namespace>), Error> {
    let wanted = options.nr_io_queues.max(1);
    let feature = admin::SetFeatures::new(FeatureValue::NumberOfQueues(NumberOfQueues::of(wanted)));
    let reply = up
        .queue
        .execute("Set Features (Number of Queues)", Payload::None, |cid| {
            feature.emit(cid, &Sgl::NONE)
        })?;
    let granted = NumberOfQueues::from_bits(reply.result as u32)
        .pairs()
        .min(u32::from(wanted)) as u16;
    // Events are a comfort: a controller without them still works.
    let events = AsyncEventConfig::new()
        .with_namespace_attribute(true)
        .with_ana_change(up.facts.reports_ana());
    let feature = admin::SetFeatures::new(FeatureValue::AsyncEventConfig(events));
    match up.queue.execute(
        "Set Features (Asynchronous Event Configuration)",
        Payload::None,
        |cid| feature.emit(cid, &Sgl::NONE),
    ) {
        Ok(_) => up.queue.listen()?,
        Err(Error::Status { status, .. }) => tracing::info!(%status, "no asynchronous events"),
        Err(other) => return Err(other),
    }
    up.facts.nvm = read_limits(&mut up.queue)?;
    let namespaces = read_namespaces(up, &[])?;
    Ok((granted, namespaces))
}

/// An I/O queue's link after Fabrics Connect.
pub(crate) fn connect_io_queue(
    options: &ConnectOptions,
    facts: &Facts,
    qid: Qid,
    depth: u16,
    shared_engine: &SharedEngine,
) -> Result<Box<dyn Link>, Error> {
    let link = open(&OpenArgs {
        options,
        address: facts.address,
        qid,
        depth,
        cntlid: facts.cntlid,
        engine: options.engine,
        shared_engine,
    })?;
    connect_over(link, options, facts, qid, depth)
}

/// Fabrics Connect of an I/O queue over an open link.
pub(crate) fn connect_over(
    link: Box<dyn Link>,
    options: &ConnectOptions,
    facts: &Facts,
    qid: Qid,
    depth: u16,
) -> Result<Box<dyn Link>, Error> {
    let mut runner = Runner::new(link)?;
    let who = Who {
        options,
        address: facts.address,
        subnqn: &facts.subnqn,
        host: &facts.host,
    };
    who.connect(&mut runner, &io_connect(qid, depth), facts.cntlid)?;
    io_link(runner, facts)
}

pub(super) fn io_connect(qid: Qid, depth: u16) -> fabrics::Connect {
    fabrics::Connect {
        qid,
        // 0's based: a queue of depth + 1 entries holds `depth` commands.
        sqsize: depth,
        cattr: fabrics::ConnectAttributes::new().with_disable_sq_flow_control(true),
        kato_ms: 0,
    }
}

pub(super) fn io_link(runner: Runner, facts: &Facts) -> Result<Box<dyn Link>, Error> {
    let mut link = runner.into_link()?;
    link.set_controller_in_capsule_bytes(facts.in_capsule_bytes);
    Ok(link)
}

/// The limits of a controller's commands without data; none if it does not have this structure, which came with NVMe 2.0.
fn read_limits(queue: &mut AdminQueue) -> Result<identify::NvmController, Error> {
    match queue.identify(Cns::CommandSetController, Nsid::NONE) {
        Ok(data) => identify::NvmController::view(&data)
            .copied()
            .ok_or(Error::Protocol("Identify Controller (NVM) is too short")),
        Err(Error::Status { status, .. }) => {
            tracing::debug!(%status, "the controller names no limits of commands without data");
            Ok(identify::NvmController::zeroed())
        }
        Err(other) => Err(other),
    }
}

/// Active namespaces of a controller, described; `known` are those of before. Notes whether all could be read.
pub(crate) fn read_namespaces(
    up: &mut BroughtUp,
    known: &[Namespace],
) -> Result<Vec<Namespace>, Error> {
    let BroughtUp {
        queue,
        facts,
        unread,
    } = up;
    // Until all have been.
    *unread = true;
    let mut all_read = true;
    let mut namespaces = Vec::new();
    let mut after = Nsid::NONE;
    loop {
        let data = identify(queue, Cns::ActiveNamespaces, after)?;
        let list = identify::NamespaceList::view(&data)
            .ok_or(Error::Protocol("a namespace list is too short"))?;
        let nsids: Vec<Nsid> = list.iter().collect();
        for &nsid in &nsids {
            if nsid <= after || namespaces.len() >= MAX_NAMESPACES {
                return Err(Error::Protocol("a namespace list that does not ascend"));
            }
            after = nsid;
            match read_namespace(queue, facts, nsid) {
                Ok(namespace) => namespaces.extend(namespace),
                // It went away between the two commands.
                Err(Error::Status { status, .. }) if is_final(status) => {
                    tracing::info!(%nsid, %status, "namespace left out")
                }
                // That says nothing of the namespace: taking it away would fail I/O, or hold it, for nothing.
                Err(Error::Status { status, .. }) => {
                    all_read = false;
                    let before = known.iter().find(|known| known.nsid == nsid);
                    tracing::warn!(%nsid, %status, kept = before.is_some(), "a namespace cannot be read");
                    namespaces.extend(before.cloned());
                }
                Err(other) => return Err(other),
            }
        }
        if nsids.len() < 1024 {
            *unread = !all_read;
            return Ok(namespaces);
        }
    }
}

/// Times that Identify is tried when its status says that it may go better.
const ATTEMPTS: u32 = 3;

/// Whether trying again is of no use.
fn is_final(status: Status) -> bool {
    let final_codes = [
        StatusCode::InvalidNamespaceOrFormat,
        StatusCode::InvalidField,
        StatusCode::InvalidOpcode,
    ];
    status.dnr() || final_codes.contains(&status.code())
}

/// Identify; again after a status that passes, such as a damaged transfer's.
fn identify(queue: &mut AdminQueue, cns: Cns, nsid: Nsid) -> Result<Vec<u8>, Error> {
    let mut result = queue.identify(cns, nsid);
    for _ in 1..ATTEMPTS {
        match &result {
            Err(Error::Status { status, .. }) if !is_final(*status) => {
                result = queue.identify(cns, nsid);
            }
            _ => break,
        }
    }
    result
}

/// `None`: not one that we can use.
fn read_namespace(
    queue: &mut AdminQueue,
    facts: &Facts,
    nsid: Nsid,
) -> Result<Option<Namespace>, Error> {
    let data = identify(queue, Cns::Namespace, nsid)?;
    let id = identify::Namespace::view(&data)
        .ok_or(Error::Protocol("Identify Namespace is too short"))?;
    let (block_count, format) = (id.nsze.get(), id.format());
    let Some(block_size) = id.block_bytes().filter(|_| format.ms() == 0) else {
        tracing::warn!(%nsid, ?format, "namespace left out: its block format is not supported");
        return Ok(None);
    };
    let mut namespace = Namespace {
        nsid,
        block_size,
        block_count,
        uuid: None,
        nguid: id.nguid,
        eui64: id.eui64,
        read_only: id.nsattr & 1 != 0,
        deallocated_reads_zero: id.dlfeat & 7 == 1,
        optimal_io_bytes: optimal_io_bytes(id, block_size),
        max_transfer_bytes: facts.max_transfer_bytes - facts.max_transfer_bytes % block_size,
        max_blocks: MaxBlocks::of(&facts.nvm, facts.page_bytes, block_size),
        write_zeroes: false,
        discard: false,
        compare: false,
        compare_and_write: false,
        verify: false,
        volatile_write_cache: facts.identify.vwc & 1 != 0,
    };
    let optional = Oncs::from_bits_truncate(facts.identify.oncs.get());
    namespace.compare = optional.contains(Oncs::COMPARE);
    // Base 5.1.13.2.1, FUSES bit 0.
    namespace.compare_and_write = facts.identify.fuses.get() & 1 != 0;
    namespace.discard = optional.contains(Oncs::DATASET_MANAGEMENT);
    namespace.write_zeroes = optional.contains(Oncs::WRITE_ZEROES);
    namespace.verify = optional.contains(Oncs::VERIFY);
    // Descriptors are optional before 1.3.
    match identify(queue, Cns::NamespaceDescriptors, nsid) {
        Ok(data) => {
            for descriptor in descriptors::iter(&data).map_while(Result::ok) {
                match descriptor {
                    descriptors::Descriptor::Uuid(uuid) => namespace.uuid = Some(uuid),
                    descriptors::Descriptor::Nguid(nguid) => namespace.nguid = nguid,
                    descriptors::Descriptor::Eui64(eui64) => namespace.eui64 = eui64,
                    descriptors::Descriptor::Csi(admin::Csi::Nvm) => {}
                    descriptors::Descriptor::Csi(csi) => {
                        tracing::warn!(%nsid, ?csi, "namespace left out: its command set is not supported");
                        return Ok(None);
                    }
                }
            }
        }
        Err(Error::Status { .. }) => {}
        Err(other) => return Err(other),
    }
    Ok(Some(namespace))
}

fn optimal_io_bytes(id: &identify::Namespace, block_size: u32) -> u32 {
    let features = identify::Nsfeat::from_bits_truncate(id.nsfeat);
    let blocks = if features.contains(identify::Nsfeat::OPTIMAL_PERFORMANCE) {
        u32::from(id.npwg.get()) + 1
    } else {
        u32::from(id.noiob.get())
    };
    blocks.saturating_mul(block_size)
}

fn max_transfer(identify: &IdentifyController, cap: Cap) -> u32 {
    // MDTS counts pages of CAP.MPSMIN as a power of two; 0 is no limit.
    match identify.mdts {
        0 => MAX_TRANSFER_BYTES,
        mdts => 1u32
            .checked_shl(12 + u32::from(cap.mpsmin()) + u32::from(mdts))
            .filter(|bytes| *bytes > 0)
            .unwrap_or(u32::MAX)
            .min(MAX_TRANSFER_BYTES),
    }
}

fn property(queue: &mut AdminQueue, property: Property) -> Result<u64, Error> {
    let get = fabrics::PropertyGet {
        offset: property.offset(),
        width: property.width(),
    };
    Ok(queue
        .execute("Property Get", Payload::None, |cid| {
            get.emit(cid, &Sgl::NONE)
        })?
        .result)
}

fn set_property(queue: &mut AdminQueue, property: Property, value: u64) -> Result<(), Error> {
    let set = fabrics::PropertySet {
        offset: property.offset(),
        width: property.width(),
        value,
    };
    queue
        .execute("Property Set", Payload::None, |cid| {
            set.emit(cid, &Sgl::NONE)
        })
        .map(drop)
}

/// Base 3.5.1: after CC.EN the controller becomes ready within CAP.TO.
fn wait_ready(queue: &mut AdminQueue, cap: Cap) -> Result<(), Error> {
    let limit = Duration::from_millis(500) * u32::from(cap.to()).max(1);
    let deadline = queue.runner().clock() + limit;
    let mut pause = Duration::from_micros(200);
    loop {
        let csts = Csts::from_bits(property(queue, Property::Csts)? as u32);
        if csts.cfs() {
            return Err(queue.runner().end(LostReason::Fatal));
        }
        if csts.rdy() {
            return Ok(());
        }
        if queue.runner().clock() >= deadline {
            queue.runner().end(LostReason::CommandTimeout);
            return Err(Error::TimedOut {
                command: "enabling the controller",
                after: limit,
            });
        }
        let until = queue.runner().clock() + pause;
        queue.service(until)?;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Who connects to what: for the Connect command and its error messages.
pub(super) struct Who<'a> {
    pub(super) options: &'a ConnectOptions,
    pub(super) address: SocketAddr,
    pub(super) subnqn: &'a Nqn,
    pub(super) host: &'a Host,
}

impl Who<'_> {
    fn connect(
        &self,
        runner: &mut Runner,
        connect: &fabrics::Connect,
        cntlid: Cntlid,
    ) -> Result<Cntlid, Error> {
        let data = self.connect_data(cntlid);
        let payload = Payload::ToController(data.bytes());
        let limit = self.options.connect_timeout;
        let reply = runner.execute(
            "Connect",
            payload,
            limit,
            |cid| connect.emit(cid, &Sgl::NONE),
            |_| {},
        )?;
        self.judge(&reply)
    }

    pub(super) fn connect_data(&self, cntlid: Cntlid) -> fabrics::ConnectData {
        fabrics::ConnectData::new(self.host.hostid, cntlid, self.subnqn, &self.host.hostnqn)
    }

    /// What the answer to Connect says.
    pub(super) fn judge(&self, reply: &Reply) -> Result<Cntlid, Error> {
        let answer = fabrics::ConnectReply::from_bits(reply.result as u32);
        if !reply.status.is_success() {
            return Err(self.refused(reply, answer));
        }
        if answer.authentication_required() || answer.secure_channel_required() {
            return Err(Error::Refused {
                address: self.address,
                reason: "the subsystem demands authentication, which flexblk does not have yet"
                    .into(),
            });
        }
        Ok(answer.cntlid())
    }

    /// Base 6.3: what the Connect command's status codes say about the user's words.
    fn refused(&self, reply: &Reply, answer: fabrics::ConnectReply) -> Error {
        let status = reply.status;
        let (hostnqn, subnqn) = (self.host.hostnqn.to_string(), self.subnqn.to_string());
        match status.code_in(CodeSpace::Fabrics) {
            StatusCode::ConnectInvalidHost => Error::HostNotAllowed { hostnqn, subnqn },
            StatusCode::ConnectInvalidParameters if answer.invalid_field() == "SUBNQN" => {
                Error::NoSubsystem {
                    subnqn,
                    address: self.address,
                    hostnqn,
                }
            }
            StatusCode::ConnectInvalidParameters if answer.invalid_field() == "HOSTNQN" => {
                Error::HostNotAllowed { hostnqn, subnqn }
            }
            StatusCode::ConnectInvalidParameters => Error::Refused {
                address: self.address,
                reason: format!(
                    "Connect: {} ({})",
                    status.describe(CodeSpace::Fabrics),
                    answer.invalid_field()
                ),
            },
            _ => Error::Refused {
                address: self.address,
                reason: format!("Connect: {}", status.describe(CodeSpace::Fabrics)),
            },
        }
    }
}

/// The target's address; a name is looked up with a deadline.
fn resolve(options: &ConnectOptions) -> Result<SocketAddr, Error> {
    let name = options.target.traddr.clone();
    let port = match options.target.trtype {
        TrType::Tcp => options.target.port(),
        // The service id is in the connection request.
        _ => options.udp_port,
    };
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let wanted = options.host_traddr;
    let (tx, rx) = mpsc::sync_channel(1);
    let lookup = (name.clone(), port);
    // The C library's resolver has time-outs of its own: a thread that outlives ours does no harm.
    std::thread::Builder::new()
        .name("resolve".into())
        .spawn(move || {
            let _ = tx.send(
                lookup
                    .to_socket_addrs()
                    .map(|found| found.collect::<Vec<_>>()),
            );
        })
        .map_err(|cause| Error::System {
            what: "starting a thread",
            cause,
        })?;
    let found = rx
        .recv_timeout(options.connect_timeout)
        .unwrap_or_else(|_| {
            Err(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                "no answer from the name service",
            ))
        })
        .map_err(|cause| Error::Resolve {
            name: name.clone(),
            cause,
        })?;
    let same_family =
        |address: &&SocketAddr| wanted.is_none_or(|wanted| wanted.is_ipv4() == address.is_ipv4());
    found
        .iter()
        .find(same_family)
        .copied()
        .ok_or_else(|| Error::Resolve {
            name,
            cause: std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "no address of the family of host_traddr",
            ),
        })
}
