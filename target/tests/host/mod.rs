//! A host made of verbs: sends the capsules it is told to, right or wrong, over real UDP.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{GetLogPage, Identify, SetFeatures};
use flexblk_nvme::command::fabrics::{Connect, ConnectData, PropertyGet, PropertySet};
use flexblk_nvme::features::NumberOfQueues;
use flexblk_nvme::flexins::{Immediate, NvmeParams, ParamFlags};
use flexblk_nvme::property::{Cc, Csts, Property};
use flexblk_nvme::rdma::{AcceptPrivate, RejectPrivate, RejectStatus, RequestPrivate};
use flexblk_nvme::{Cid, Cntlid, Cqe, HostId, Nqn, Qid, Sgl, Status};
use flexblk_reactor::{Config, HugePages, Reactor, SharedMemory, Wait};
use flexins::cm::ServiceId;
use flexins::endpoint::{Endpoint, EndpointConfig};
use flexins::engine::ConnEvent;
use flexins::verbs::{
    Access, AckRequest, Cq, Mr, Pd, QpInit, Qpn, SendFlags, SendOp, SendWr, WcStatus,
};

const OWNER: u8 = 1;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Memory of the host that the target may read and write.
pub(crate) const MEMORY_BYTES: u32 = 4 << 20;

/// How a queue is connected.
#[derive(Clone, Copy)]
pub(crate) struct Offer {
    pub(crate) qid: u16,
    pub(crate) entries: u16,
    pub(crate) cntlid: Cntlid,
    /// Offer completions in immediates.
    pub(crate) immediate: bool,
}

impl Offer {
    pub(crate) fn admin() -> Self {
        Self {
            qid: 0,
            entries: 32,
            cntlid: Cntlid::DYNAMIC,
            immediate: true,
        }
    }
}

/// A queue pair of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queue {
    pub(crate) qpn: Qpn,
    pub(crate) qid: u16,
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A response capsule.
    Capsule(Cqe),
    /// An immediate with the data.
    Immediate(Immediate),
}

impl Answer {
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Capsule(cqe) => cqe.status(),
            Self::Immediate(immediate) => immediate.status,
        }
    }

    fn cid(&self) -> Cid {
        match self {
            Self::Capsule(cqe) => cqe.cid(),
            Self::Immediate(immediate) => immediate.cid,
        }
    }

    pub(crate) fn result(&self) -> u64 {
        match self {
            Self::Capsule(cqe) => cqe.result(),
            Self::Immediate(_) => 0,
        }
    }
}

/// The host.
pub(crate) struct Host {
    reactor: Reactor,
    endpoint: Endpoint,
    pd: Pd,
    cq: Cq,
    memory: Arc<SharedMemory>,
    mr: Mr,
    to: SocketAddr,
    /// Service that it connects to.
    pub(crate) service: u16,
    pub(crate) nqn: Nqn,
    pub(crate) hostid: HostId,
    next_cid: u16,
    answers: VecDeque<(u64, Answer)>,
    pub(crate) closed: Vec<Qpn>,
}

impl Host {
    pub(crate) fn new(udp_port: u16) -> Self {
        Self::with(udp_port, |_| {})
    }

    pub(crate) fn with(udp_port: u16, change: impl FnOnce(&mut EndpointConfig)) -> Self {
        let mut reactor = Reactor::new(&Config::default()).unwrap();
        let mut config = EndpointConfig::new("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let mut endpoint = Endpoint::bind(&mut reactor, OWNER, config).unwrap();
        let engine = endpoint.engine();
        let pd = engine.alloc_pd();
        let cq = engine.create_cq(4096).unwrap();
        let memory = SharedMemory::create("host", MEMORY_BYTES.into(), HugePages::No).unwrap();
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let mr = engine
            .register_memory(pd, &memory, 0, memory.len(), access)
            .unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], udp_port));
        Self {
            reactor,
            endpoint,
            pd,
            cq,
            memory,
            mr,
            to,
            service: 4420,
            nqn: Nqn::opaque("nqn.2026-11.test:host").unwrap(),
            hostid: HostId::from_bytes([9; 16]),
            next_cid: 1,
            answers: VecDeque::new(),
            closed: Vec::new(),
        }
    }

    /// A descriptor of the host's memory.
    pub(crate) fn keyed(&self, offset: u32, length: u32) -> Sgl {
        Sgl::Keyed {
            address: self.mr.addr + u64::from(offset),
            length,
            key: self.mr.rkey.0,
            invalidate: false,
        }
    }

    pub(crate) fn put(&self, offset: u32, bytes: &[u8]) {
        self.memory
            .span(offset.into(), bytes.len() as u32)
            .unwrap()
            .copy_from_slice(bytes);
    }

    pub(crate) fn get(&self, offset: u32, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory
            .span(offset.into(), len)
            .unwrap()
            .copy_to_slice(&mut bytes);
        bytes
    }

    /// One turn of the loop.
    pub(crate) fn turn(&mut self) {
        let mut completions = Vec::new();
        let soon = Instant::now() + Duration::from_millis(5);
        let wait = self.endpoint.next_timeout().map_or(soon, |at| at.min(soon));
        self.reactor
            .turn(Wait::Until(wait), &mut completions)
            .unwrap();
        let now = self.reactor.now();
        let Self {
            reactor,
            endpoint,
            answers,
            ..
        } = self;
        // Messages of at most 32 bytes and immediates come in completions; there are no others.
        for completion in &completions {
            endpoint.on_completion(reactor, completion, &mut |_, delivery, _| {
                panic!("{delivery:?}")
            });
        }
        endpoint.handle_timeout(now, &mut |_, delivery, _| panic!("{delivery:?}"));
        while let Some(wc) = endpoint.engine().poll_one(self.cq) {
            if !wc.is_recv() || wc.status != WcStatus::Success {
                continue;
            }
            let answer = match wc.imm() {
                Some(imm) => Answer::Immediate(Immediate::from_bits(imm).unwrap()),
                None => Answer::Capsule(Cqe::from_bytes(wc.inline_bytes().try_into().unwrap())),
            };
            answers.push_back((wc.user, answer));
            let _ = endpoint.engine().post_recv_in_place(Qpn::new(wc.qpn), 1);
        }
        endpoint.flush(reactor, now);
    }

    fn event(&mut self) -> ConnEvent {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(event) = self.endpoint.engine().poll_cm() {
                return event;
            }
            assert!(
                Instant::now() < deadline,
                "no answer to a connection request"
            );
            self.turn();
        }
    }

    /// Makes a transport connection, with private data as given.
    pub(crate) fn dial(
        &mut self,
        offer: Offer,
        private: &[u8],
    ) -> Result<(Queue, NvmeParams), RejectStatus> {
        let entries = u32::from(offer.entries);
        let init = QpInit {
            pd: self.pd,
            send_cq: self.cq,
            recv_cq: self.cq,
            max_send_wr: entries * 2,
            max_recv_wr: entries * 2,
            max_sge: 1,
            max_inline: 64,
            inline_recv: true,
            ack_request: AckRequest::Never,
            user: u64::from(offer.qid) + 1,
        };
        let to = self.to;
        let engine = self.endpoint.engine();
        let qpn = engine.create_qp(&init).unwrap();
        let now = Instant::now();
        engine
            .connect(qpn, to, ServiceId::from_port(self.service), private, now)
            .unwrap();
        engine.post_recv_in_place(qpn, entries * 2).ok();
        loop {
            match self.event() {
                ConnEvent::Established {
                    qpn: own, private, ..
                } if own == qpn => {
                    let _ = self.endpoint.engine().post_recv_in_place(qpn, entries * 2);
                    let accept = AcceptPrivate::parse(&private).unwrap();
                    let none = NvmeParams {
                        in_capsule_bytes: 0,
                        flags: ParamFlags::empty(),
                    };
                    let params = NvmeParams::parse(&accept.extension).unwrap_or(none);
                    return Ok((
                        Queue {
                            qpn,
                            qid: offer.qid,
                        },
                        params,
                    ));
                }
                ConnEvent::Rejected { private, .. } => {
                    let _ = self.endpoint.engine().destroy_qp(qpn, Instant::now());
                    return Err(RejectPrivate::parse(&private).expect("a reason"));
                }
                ConnEvent::Disconnected { qpn, .. } | ConnEvent::Broken { qpn, .. } => {
                    self.closed.push(qpn)
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Makes a transport connection as hosts do.
    pub(crate) fn connect_queue(
        &mut self,
        offer: Offer,
    ) -> Result<(Queue, NvmeParams), RejectStatus> {
        let mut request = RequestPrivate::new(Qid::new(offer.qid), offer.entries, offer.cntlid);
        if offer.immediate {
            let flags = ParamFlags::IMMEDIATE_COMPLETIONS;
            request.extension = NvmeParams {
                in_capsule_bytes: 8192,
                flags,
            }
            .emit();
        }
        self.dial(offer, request.bytes())
    }

    pub(crate) fn cid(&mut self) -> Cid {
        self.next_cid += 1;
        Cid::new(self.next_cid)
    }

    /// Sends a capsule: an entry, and data that lies at `data` of the host's memory.
    pub(crate) fn send(&mut self, queue: Queue, entry: &[u8], data: Option<(u32, u32)>) {
        let sge = data.map(|(offset, len)| self.mr.sge(offset.into(), len));
        let wr = SendWr {
            wr_id: 0,
            op: SendOp::Send,
            inline: entry,
            sges: sge.as_slice(),
            flags: SendFlags::empty(),
        };
        self.endpoint.engine().post_send(queue.qpn, &wr).unwrap();
    }

    /// The answer to that command.
    pub(crate) fn answer(&mut self, queue: Queue, cid: Cid) -> Answer {
        self.try_answer(queue, cid, LIMIT)
            .expect("an answer in time")
    }

    pub(crate) fn try_answer(&mut self, queue: Queue, cid: Cid, limit: Duration) -> Option<Answer> {
        let deadline = Instant::now() + limit;
        let user = u64::from(queue.qid) + 1;
        loop {
            let wanted = |(from, answer): &(u64, Answer)| *from == user && answer.cid() == cid;
            if let Some(at) = self.answers.iter().position(wanted) {
                return self.answers.remove(at).map(|(_, answer)| answer);
            }
            if Instant::now() >= deadline {
                return None;
            }
            self.turn();
        }
    }

    /// Sends a command without in-capsule data and waits for its answer.
    pub(crate) fn command(&mut self, queue: Queue, emit: impl FnOnce(Cid) -> [u8; 64]) -> Answer {
        let cid = self.cid();
        self.send(queue, &emit(cid), None);
        self.answer(queue, cid)
    }

    /// Connect, its data in the capsule or to be fetched.
    pub(crate) fn nvme_connect(
        &mut self,
        queue: Queue,
        connect: &Connect,
        cntlid: Cntlid,
        subnqn: &Nqn,
        in_capsule: bool,
    ) -> Answer {
        let data = ConnectData::new(self.hostid, cntlid, subnqn, &self.nqn);
        self.put(0, data.bytes());
        let cid = self.cid();
        let length = ConnectData::SIZE as u32;
        if in_capsule {
            let entry = connect.emit(cid, &Sgl::InCapsule { offset: 0, length });
            self.send(queue, &entry, Some((0, length)));
        } else {
            let entry = connect.emit(cid, &self.keyed(0, length));
            self.send(queue, &entry, None);
        }
        self.answer(queue, cid)
    }

    /// An enabled controller: its Admin queue and identifier.
    pub(crate) fn controller(&mut self, subnqn: &Nqn) -> (Queue, Cntlid) {
        self.controller_with(subnqn, 0)
    }

    pub(crate) fn controller_with(&mut self, subnqn: &Nqn, kato_ms: u32) -> (Queue, Cntlid) {
        let (queue, _) = self.connect_queue(Offer::admin()).unwrap();
        let connect = Connect {
            sqsize: 31,
            kato_ms,
            ..connect(0)
        };
        let answer = self.nvme_connect(queue, &connect, Cntlid::DYNAMIC, subnqn, true);
        assert!(answer.status().is_success(), "{answer:?}");
        self.set_cc(queue, Cc::ENABLE);
        assert!(self.csts(queue).rdy());
        (queue, Cntlid::new(answer.result() as u16))
    }

    /// An I/O queue of a controller.
    pub(crate) fn io_queue(
        &mut self,
        qid: u16,
        entries: u16,
        cntlid: Cntlid,
        subnqn: &Nqn,
    ) -> Queue {
        let offer = Offer {
            qid,
            entries,
            cntlid,
            immediate: true,
        };
        let (queue, _) = self.connect_queue(offer).unwrap();
        let connect = Connect {
            sqsize: entries - 1,
            ..connect(qid)
        };
        let answer = self.nvme_connect(queue, &connect, cntlid, subnqn, true);
        assert!(answer.status().is_success(), "{answer:?}");
        queue
    }

    pub(crate) fn set_cc(&mut self, queue: Queue, cc: Cc) {
        let set = PropertySet {
            offset: Property::Cc.offset(),
            width: Property::Cc.width(),
            value: cc.into_bits().into(),
        };
        let answer = self.command(queue, |cid| set.emit(cid, &Sgl::NONE));
        assert!(answer.status().is_success(), "{answer:?}");
    }

    pub(crate) fn csts(&mut self, queue: Queue) -> Csts {
        let get = PropertyGet {
            offset: Property::Csts.offset(),
            width: Property::Csts.width(),
        };
        let answer = self.command(queue, |cid| get.emit(cid, &Sgl::NONE));
        Csts::from_bits(answer.result() as u32)
    }

    pub(crate) fn identify(&mut self, queue: Queue, identify: &Identify) -> Vec<u8> {
        let sgl = self.keyed(0, 4096);
        let answer = self.command(queue, |cid| identify.emit(cid, &sgl));
        assert!(answer.status().is_success(), "{answer:?}");
        self.get(0, 4096)
    }

    pub(crate) fn log(&mut self, queue: Queue, get: &GetLogPage) -> Vec<u8> {
        let len = get.len_bytes() as u32;
        let sgl = self.keyed(0, len);
        let answer = self.command(queue, |cid| get.emit(cid, &sgl));
        assert!(answer.status().is_success(), "{answer:?}");
        self.get(0, len)
    }

    pub(crate) fn queues(&mut self, queue: Queue, wanted: u16) -> u32 {
        let set = SetFeatures::new(NumberOfQueues::of(wanted).into());
        let answer = self.command(queue, |cid| set.emit(cid, &Sgl::NONE));
        assert!(answer.status().is_success(), "{answer:?}");
        NumberOfQueues::from_bits(answer.result() as u32).pairs()
    }

    /// Waits until the target has closed a queue.
    pub(crate) fn wait_closed(&mut self, queue: Queue) {
        let deadline = Instant::now() + LIMIT;
        while !self.closed.contains(&queue.qpn) {
            assert!(Instant::now() < deadline, "the queue is still open");
            self.turn();
            while let Some(event) = self.endpoint.engine().poll_cm() {
                if let ConnEvent::Disconnected { qpn, .. } | ConnEvent::Broken { qpn, .. } = event {
                    self.closed.push(qpn);
                }
            }
        }
    }

    /// Ends a queue as a host does.
    pub(crate) fn hang_up(&mut self, queue: Queue) {
        let _ = self.endpoint.engine().disconnect(queue.qpn, Instant::now());
        self.wait_closed(queue);
    }
}

/// A Connect of that queue, SQ flow control off.
pub(crate) fn connect(qid: u16) -> Connect {
    use flexblk_nvme::command::fabrics::ConnectAttributes;
    Connect {
        qid: Qid::new(qid),
        sqsize: 31,
        cattr: ConnectAttributes::new().with_disable_sq_flow_control(true),
        kato_ms: 0,
    }
}
