//! The queue against a controller that is made of the codec's other half, over a wire that cuts the bytes anywhere.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ptr::NonNull;

use flexblk_nvme::tcp::{
    Alignment, C2hData, Cursor, Digests, End, Error, Established, Event, Framing, HEAD_MAX, IcReq,
    IcResp, Pdu, R2t, Stream, TERM_MAX,
};
use flexblk_nvme::{Cid, Cqe, Sgl, Sqe, Status, StatusCode};
use flexblk_reactor::Span;
use proptest::prelude::*;

use super::NO_KEY;
use super::queue::{Broken, Kind, Queue};
use crate::LostReason;
use crate::link::{Data, LinkEvent, PostRefused};

const DEPTH: u16 = 8;

/// A buffer that stays where it is.
struct Buffer(Box<[u8]>);

impl Buffer {
    fn new(len: usize, fill: u8) -> Buffer {
        Buffer(vec![fill; len].into_boxed_slice())
    }

    fn span(&mut self) -> Span {
        let ptr = NonNull::new(self.0.as_mut_ptr()).unwrap();
        // SAFETY: it lives as long as the buffer, and nobody else uses it until the command is over.
        unsafe { Span::from_raw_parts(ptr, self.0.len() as u32) }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.len()];
        self.span().copy_to_slice(&mut bytes);
        bytes
    }
}

/// What a controller does about a command.
struct Served {
    sqe: Sqe,
    in_capsule: Vec<u8>,
    /// What R2Ts brought.
    written: Vec<u8>,
    /// Until where R2Ts have asked, and an R2T that is not answered yet.
    asked: Option<Cursor>,
}

/// The controller: PDUs out of and into byte streams.
struct Peer {
    stream: Stream,
    framing: Framing,
    digests: Digests,
    maxh2cdata: u32,
    commands: BTreeMap<u16, Served>,
    current: Option<u16>,
    to_host: Vec<u8>,
}

impl Peer {
    fn new(digests: Digests, alignment: Alignment, maxh2cdata: u32) -> Peer {
        Peer {
            stream: Stream::new(End::Controller),
            framing: Framing { digests, alignment },
            digests,
            maxh2cdata,
            commands: BTreeMap::new(),
            current: None,
            to_host: Vec::new(),
        }
    }

    fn take(&mut self, mut input: &[u8]) {
        while let Some(event) = self.stream.next(&mut input).expect("a correct host") {
            match event {
                Event::Pdu(Pdu::IcReq(request)) => self.on_ic_req(&request),
                Event::Pdu(Pdu::CapsuleCmd(capsule)) => {
                    let cid = capsule.sqe.cid().get();
                    let served = Served {
                        sqe: capsule.sqe,
                        in_capsule: Vec::new(),
                        written: Vec::new(),
                        asked: None,
                    };
                    assert!(self.commands.insert(cid, served).is_none());
                    self.current = Some(cid);
                }
                Event::Pdu(Pdu::H2cData(data)) => {
                    let command = self.commands.get_mut(&data.cid.get()).unwrap();
                    let asked = command.asked.as_mut().expect("an R2T");
                    asked
                        .accept(data.offset, data.len_bytes, data.last)
                        .expect("what the R2T asked for");
                    assert!(data.len_bytes <= self.maxh2cdata);
                    assert_eq!(data.ttag, 0x4000 | data.cid.get());
                    assert_eq!(data.last, asked.is_complete());
                    self.current = Some(data.cid.get());
                }
                Event::Data(bytes) => {
                    let command = self.commands.get_mut(&self.current.unwrap()).unwrap();
                    match command.asked {
                        Some(_) => command.written.extend_from_slice(bytes),
                        None => command.in_capsule.extend_from_slice(bytes),
                    }
                }
                Event::DataEnd { intact } => {
                    assert!(intact, "a digest of the host");
                    let command = self.commands.get_mut(&self.current.unwrap()).unwrap();
                    if command.asked.is_some_and(|asked| asked.has_ended()) {
                        command.asked = None;
                    }
                }
                other => panic!("{other:?} from a host"),
            }
        }
    }

    fn on_ic_req(&mut self, request: &IcReq) {
        assert_eq!((request.hpda, request.maxr2t), (Alignment::DWORD, 0));
        let response = IcResp {
            cpda: self.framing.alignment,
            digests: self.digests & request.digests,
            maxh2cdata: self.maxh2cdata,
        };
        self.framing.digests = response.digests;
        self.stream.establish(Established {
            digests: response.digests,
            alignment: response.cpda,
            max_in_capsule_bytes: 8192,
            max_data_bytes: self.maxh2cdata,
        });
        self.to_host.extend_from_slice(&response.emit());
    }

    /// A PDU to the host. Its data is not aligned beyond four bytes, as the host asked for.
    fn send(&mut self, write: impl FnOnce(&Framing, &mut [u8; HEAD_MAX]) -> usize, data: &[u8]) {
        let framing = Framing {
            digests: self.framing.digests,
            alignment: Alignment::DWORD,
        };
        let mut head = [0; HEAD_MAX];
        let len = write(&framing, &mut head);
        self.to_host.extend_from_slice(&head[..len]);
        self.to_host.extend_from_slice(data);
        if !data.is_empty() && framing.has_data_digest() {
            let mut digest = flexblk_nvme::tcp::Crc32c::new();
            digest.update(data);
            self.to_host.extend_from_slice(&digest.to_bytes());
        }
    }

    fn respond(&mut self, cid: u16, status: Status) {
        self.commands.remove(&cid).expect("outstanding");
        let cqe = Cqe::new(Cid::new(cid), status).with_result(u64::from(cid) << 8);
        self.send(|framing, head| framing.capsule_resp(&cqe, head), &[]);
    }

    fn data(&mut self, cid: u16, offset: usize, bytes: &[u8], last: bool, success: bool) {
        let pdu = C2hData {
            cid: Cid::new(cid),
            offset: offset as u32,
            len_bytes: bytes.len() as u32,
            last,
            success,
        };
        self.send(|framing, head| framing.c2h_data(&pdu, head), bytes);
    }

    fn r2t(&mut self, cid: u16, offset: u32, len: u32) {
        let command = self.commands.get_mut(&cid).unwrap();
        command.asked = Cursor::new(offset, len);
        let pdu = R2t {
            cid: Cid::new(cid),
            ttag: 0x4000 | cid,
            offset,
            len_bytes: len,
        };
        self.send(|framing, head| framing.r2t(&pdu, head), &[]);
    }
}

/// Both ends and the wires between them.
struct World {
    queue: Queue,
    peer: Peer,
    scratch: Vec<u8>,
    events: Vec<LinkEvent>,
}

impl World {
    fn new(digests: Digests, alignment: Alignment, maxh2cdata: u32, kind: Kind) -> World {
        let mut world = World {
            queue: Queue::new(DEPTH, kind, digests).unwrap(),
            peer: Peer::new(digests, alignment, maxh2cdata),
            scratch: Vec::new(),
            events: Vec::new(),
        };
        world.flow_to_peer(usize::MAX);
        world.flow_to_host(usize::MAX).unwrap();
        assert_eq!(world.queue.established().unwrap().digests, digests);
        world
    }

    fn plain() -> World {
        World::new(Digests::empty(), Alignment::DWORD, 4096, Kind::Io)
    }

    /// Sends what the host has, in pieces of at most `piece` bytes.
    fn flow_to_peer(&mut self, piece: usize) {
        while let Some(mut batch) = self.queue.take_batch() {
            loop {
                let mut bytes = Vec::new();
                for entry in batch.entries() {
                    // SAFETY: the entries name the batch and buffers of outstanding commands.
                    let part = unsafe {
                        std::slice::from_raw_parts(entry.iov_base.cast::<u8>(), entry.iov_len)
                    };
                    bytes.extend_from_slice(part);
                    if bytes.len() >= piece {
                        break;
                    }
                }
                bytes.truncate(piece);
                self.peer.take(&bytes);
                if batch.sent(bytes.len()) {
                    break;
                }
            }
            self.queue.batch_sent(batch);
        }
    }

    /// One receive of at most `len` bytes of what the controller has sent.
    fn receive(&mut self, len: usize) -> Result<(), Broken> {
        self.queue.plan();
        let mut from = std::mem::take(&mut self.peer.to_host);
        let mut taken = 0;
        for piece in &self.queue.planned {
            let part = (len - taken)
                .min(from.len() - taken)
                .min(piece.span.len() as usize);
            piece.span.copy_from_slice(&from[taken..taken + part]);
            taken += part;
        }
        assert!(taken > 0 || from.is_empty(), "a receive without room");
        self.peer.to_host = from.split_off(taken);
        let received = self.queue.received(taken, &mut self.scratch);
        self.queue.take_events(&mut self.events);
        received
    }

    fn flow_to_host(&mut self, piece: usize) -> Result<(), Broken> {
        while !self.peer.to_host.is_empty() {
            self.receive(piece)?;
        }
        Ok(())
    }

    fn post(&mut self, cid: u16, data: Data<'_>) -> Result<(), PostRefused> {
        let mut sqe = [0; 64];
        sqe[2..4].copy_from_slice(&cid.to_le_bytes());
        self.queue.post(cid, &mut sqe, data)
    }

    /// As post; what does not fit into the batch, behind answers to R2Ts, does when that has left.
    fn post_soon(&mut self, cid: u16, data: Data<'_>) {
        if self.post(cid, data) == Err(PostRefused::Full) {
            self.flow_to_peer(usize::MAX);
            self.post(cid, data).unwrap();
        }
    }

    fn read(&mut self, cid: u16, buffer: &mut Buffer) {
        self.post_soon(cid, Data::FromController(buffer.span(), NO_KEY));
    }

    fn one(&mut self) -> (u16, Status) {
        assert_eq!(self.events.len(), 1, "{:?}", self.events);
        match self.events.remove(0) {
            LinkEvent::Response { cid, status, .. } => (cid, status),
            LinkEvent::SendDone { .. } => panic!("a response"),
        }
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| (n.wrapping_mul(31) ^ (n / 253) ^ seed.wrapping_mul(97)) as u8)
        .collect()
}

#[derive(Clone, Debug)]
enum Step {
    Read {
        len: usize,
    },
    Write {
        len: usize,
    },
    Small,
    NoData,
    /// The controller goes on with the n-th outstanding command: `part` of its data, or its end.
    Serve {
        pick: usize,
        part: usize,
        how: u8,
    },
    ToPeer {
        piece: usize,
    },
    ToHost {
        piece: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let len = || prop_oneof![3 => Just(512usize), 2 => Just(4096usize), 1 => 1usize..40_000];
    let piece = || prop_oneof![1usize..80, 80usize..6000, Just(usize::MAX)];
    prop_oneof![
        6 => len().prop_map(|len| Step::Read { len }),
        3 => len().prop_map(|len| Step::Write { len }),
        1 => Just(Step::Small),
        1 => Just(Step::NoData),
        // Mostly the oldest: what controllers do, and what is foreseen.
        9 => (prop_oneof![3 => Just(0usize), 1 => 0usize..8], prop_oneof![2 => Just(usize::MAX), 1 => 1usize..9000], any::<u8>())
            .prop_map(|(pick, part, how)| Step::Serve { pick, part, how }),
        4 => piece().prop_map(|piece| Step::ToPeer { piece }),
        6 => piece().prop_map(|piece| Step::ToHost { piece }),
    ]
}

/// What the test knows about a command.
struct Expected {
    buffer: Buffer,
    content: Vec<u8>,
    inbound: bool,
    small: bool,
    status: Option<Status>,
}

fn run(digests: Digests, alignment: Alignment, maxh2cdata: u32, steps: &[Step]) {
    let mut world = World::new(digests, alignment, maxh2cdata, Kind::Io);
    let mut expected: BTreeMap<u16, Expected> = BTreeMap::new();
    let mut order: Vec<u16> = Vec::new();
    // How much of each command the controller has dealt with.
    let mut served: BTreeMap<u16, usize> = BTreeMap::new();
    let mut finished = 0;
    let mut started = 0;
    let settle =
        |world: &mut World, expected: &mut BTreeMap<u16, Expected>, finished: &mut usize| {
            for event in world.events.drain(..) {
                let LinkEvent::Response { cid, status, .. } = event else {
                    panic!("{event:?}");
                };
                let mut command = expected.remove(&cid).expect("completes once");
                assert_eq!(Some(status), command.status, "as the controller said");
                if command.inbound && status.is_success() {
                    assert!(command.buffer.bytes() == command.content, "data of {cid}");
                }
                *finished += 1;
            }
        };
    let serve = |world: &mut World,
                 expected: &mut BTreeMap<u16, Expected>,
                 served: &mut BTreeMap<u16, usize>,
                 order: &mut Vec<u16>,
                 pick: usize,
                 part: usize,
                 how: u8| {
        let known: Vec<u16> = order
            .iter()
            .copied()
            .filter(|cid| world.peer.commands.contains_key(cid))
            .collect();
        let Some(&cid) = known.get(pick.min(known.len().saturating_sub(1))) else {
            return;
        };
        let command = expected.get_mut(&cid).unwrap();
        let done = served.entry(cid).or_default();
        let left = command.content.len() - *done;
        let mut end = |world: &mut World, command: &mut Expected, status: Status, send: bool| {
            command.status = Some(status);
            if send {
                world.peer.respond(cid, status);
            } else {
                world.peer.commands.remove(&cid);
            }
            order.retain(|other| *other != cid);
            true
        };
        let failed: Status = StatusCode::LbaOutOfRange.into();
        let over = if how < 8 && world.peer.commands[&cid].asked.is_none() {
            end(world, command, failed, true)
        } else if command.inbound && left > 0 {
            let part = part.min(left);
            let bytes = command.content[*done..*done + part].to_vec();
            let last = part == left;
            let success = last && how & 1 == 1;
            world.peer.data(cid, *done, &bytes, last, success);
            *done += part;
            success && end(world, command, Status::SUCCESS, false)
        } else if !command.inbound && left > 0 {
            let peer = &mut world.peer;
            let capsule = &peer.commands[&cid];
            if let Ok(Sgl::Transport { length }) = capsule.sqe.sgl() {
                assert_eq!(length as usize, command.content.len());
                if capsule.asked.is_none() {
                    let part = part.min(left);
                    peer.r2t(cid, *done as u32, part as u32);
                    *done += part;
                }
                false
            } else {
                assert_eq!(capsule.in_capsule, command.content, "in-capsule data");
                *done += left;
                end(world, command, Status::SUCCESS, true)
            }
        } else if world.peer.commands[&cid].asked.is_none() {
            if !command.inbound && !command.small {
                let capsule = &world.peer.commands[&cid];
                if capsule.in_capsule.is_empty() {
                    assert_eq!(capsule.written, command.content, "written data");
                }
            }
            end(world, command, Status::SUCCESS, true)
        } else {
            false
        };
        if over {
            served.remove(&cid);
        }
    };
    for step in steps {
        let free = (0..DEPTH).find(|cid| !expected.contains_key(cid));
        match (step, free) {
            (Step::Read { len }, Some(cid)) => {
                let mut buffer = Buffer::new(*len, 0xee);
                world.read(cid, &mut buffer);
                started += 1;
                order.push(cid);
                let content = pattern(started, *len);
                expected.insert(
                    cid,
                    Expected {
                        buffer,
                        content,
                        inbound: true,
                        small: false,
                        status: None,
                    },
                );
            }
            (Step::Write { .. } | Step::Small | Step::NoData, Some(cid)) => {
                started += 1;
                let content = match step {
                    Step::Write { len } => pattern(started, *len),
                    Step::Small => pattern(started, 16),
                    _ => Vec::new(),
                };
                let mut buffer = Buffer::new(content.len(), 0);
                buffer.span().copy_from_slice(&content);
                let data = match step {
                    Step::Write { .. } => Data::ToController(buffer.span(), NO_KEY),
                    Step::Small => Data::Small(&content),
                    _ => Data::None,
                };
                world.post_soon(cid, data);
                order.push(cid);
                expected.insert(
                    cid,
                    Expected {
                        buffer,
                        small: matches!(step, Step::Small),
                        content,
                        inbound: false,
                        status: None,
                    },
                );
            }
            (Step::Serve { pick, part, how }, _) => {
                serve(
                    &mut world,
                    &mut expected,
                    &mut served,
                    &mut order,
                    *pick,
                    *part,
                    *how,
                );
            }
            (Step::ToPeer { piece }, _) => world.flow_to_peer(*piece),
            (Step::ToHost { piece }, _) => {
                world.receive(*piece).unwrap();
                settle(&mut world, &mut expected, &mut finished);
            }
            _ => {}
        }
    }
    for _ in 0..10_000 {
        if expected.is_empty() {
            break;
        }
        world.flow_to_peer(usize::MAX);
        serve(
            &mut world,
            &mut expected,
            &mut served,
            &mut order,
            0,
            usize::MAX,
            255,
        );
        world.flow_to_peer(usize::MAX);
        world.flow_to_host(usize::MAX).unwrap();
        settle(&mut world, &mut expected, &mut finished);
    }
    assert_eq!(finished, started, "every command completes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn data_arrives_whole_however_it_is_cut_and_ordered(
        digests in 0u8..4,
        alignment in 0u8..32,
        maxh2cdata in prop_oneof![Just(4096u32), Just(131_072u32)],
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let alignment = Alignment::from_raw(alignment).unwrap();
        run(Digests::from_bits_truncate(digests), alignment, maxh2cdata, &steps);
    }

    #[test]
    fn no_bytes_of_a_peer_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), piece in 1usize..100) {
        let mut world = World::plain();
        let (mut a, mut b) = (Buffer::new(4096, 0), Buffer::new(512, 0));
        world.read(0, &mut a);
        world.read(1, &mut b);
        world.flow_to_peer(usize::MAX);
        world.peer.to_host = bytes;
        let _ = world.flow_to_host(piece);
    }
}

#[test]
fn reads_that_are_answered_in_order_are_not_copied() {
    let mut world = World::plain();
    let mut buffers: Vec<Buffer> = (0..4).map(|_| Buffer::new(4096, 0)).collect();
    for round in 0..20 {
        for (cid, buffer) in buffers.iter_mut().enumerate() {
            world.read(cid as u16, buffer);
        }
        world.flow_to_peer(usize::MAX);
        for cid in 0..4 {
            let data = pattern(round * 4 + usize::from(cid), 4096);
            world.peer.data(cid, 0, &data, true, true);
            world.peer.commands.remove(&cid);
        }
        world.flow_to_host(5000).unwrap();
        assert_eq!(world.events.len(), 4);
        world.events.clear();
        for (cid, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!(buffer.bytes(), pattern(round * 4 + cid, 4096));
        }
    }
    let counters = world.queue.counters();
    // Until the first SUCCESS flag a response was foreseen behind the data.
    assert!(counters.wrong_guesses <= 1, "{counters:?}");
    assert!(
        counters.payload_bytes_placed > 8 * counters.payload_bytes_copied,
        "{counters:?}"
    );
}

#[test]
fn a_response_waits_until_its_command_is_sent() {
    let mut world = World::plain();
    let mut buffer = Buffer::new(4096, 7);
    world
        .post(3, Data::ToController(buffer.span(), NO_KEY))
        .unwrap();
    let mut batch = world.queue.take_batch().unwrap();
    // The kernel has only sent the half of it, and the controller answers already.
    assert!(!batch.sent(2000));
    let cqe = Cqe::success(Cid::new(3));
    world
        .peer
        .send(|framing, head| framing.capsule_resp(&cqe, head), &[]);
    world.flow_to_host(usize::MAX).unwrap();
    assert!(world.events.is_empty(), "the kernel still reads its buffer");
    batch.sent(usize::MAX);
    world.queue.batch_sent(batch);
    world.queue.take_events(&mut world.events);
    assert_eq!(world.one(), (3, Status::SUCCESS));
}

#[test]
fn a_data_digest_error_fails_the_command_and_only_it() {
    let mut world = World::new(Digests::DATA, Alignment::DWORD, 4096, Kind::Io);
    let (mut a, mut b) = (Buffer::new(512, 0), Buffer::new(512, 0));
    world.read(0, &mut a);
    world.read(1, &mut b);
    world.flow_to_peer(usize::MAX);
    world.peer.data(0, 0, &pattern(1, 512), true, true);
    let middle = world.peer.to_host.len() / 2;
    world.peer.to_host[middle] ^= 1;
    world.flow_to_host(usize::MAX).unwrap();
    assert_eq!(world.one(), (0, StatusCode::TransientTransportError.into()));
    world.peer.data(1, 0, &pattern(2, 512), true, false);
    world.peer.respond(1, Status::SUCCESS);
    world.flow_to_host(usize::MAX).unwrap();
    assert_eq!(world.one(), (1, Status::SUCCESS));
    assert_eq!(b.bytes(), pattern(2, 512));
}

#[test]
fn a_header_digest_error_is_the_end() {
    let mut world = World::new(Digests::HEADER, Alignment::DWORD, 4096, Kind::Io);
    world.post(0, Data::None).unwrap();
    world.flow_to_peer(usize::MAX);
    world.peer.respond(0, Status::SUCCESS);
    world.peer.to_host[12] ^= 1;
    let broken = world.flow_to_host(usize::MAX).unwrap_err();
    assert!(matches!(broken, Broken::Wire(Error::HeaderDigest { .. })));
    assert_eq!(broken.reason(), LostReason::Protocol);
    let mut term = [0; TERM_MAX];
    assert!(world.queue.term_req(broken, &mut term) > 24, "it is told");
    assert!(world.events.is_empty());
}

/// Lets the controller do something that it must not, with a read (0), an in-capsule write (1) and a long write (2)
/// outstanding.
fn broken_by(wrong: impl FnOnce(&mut Peer)) -> Broken {
    let mut world = World::plain();
    let mut buffers = [
        Buffer::new(1024, 0),
        Buffer::new(512, 0),
        Buffer::new(20_000, 0),
    ];
    world.read(0, &mut buffers[0]);
    for cid in [1, 2] {
        let span = buffers[usize::from(cid)].span();
        world.post(cid, Data::ToController(span, NO_KEY)).unwrap();
    }
    world.flow_to_peer(usize::MAX);
    wrong(&mut world.peer);
    world.flow_to_host(usize::MAX).unwrap_err()
}

#[test]
fn what_a_controller_must_not_do_ends_the_connection() {
    use Broken::Wire;
    let data = [0; 1024];
    let response = |peer: &mut Peer, cid: u16| {
        let cqe = Cqe::success(Cid::new(cid));
        peer.send(|framing, head| framing.capsule_resp(&cqe, head), &[]);
    };
    // Unknown commands.
    let unknown = Wire(Error::InvalidField { offset: 8 });
    assert_eq!(
        broken_by(|peer| peer.data(5, 0, &data, true, true)),
        unknown
    );
    assert_eq!(broken_by(|peer| response(peer, 7)), unknown);
    assert_eq!(broken_by(|peer| response(peer, 999)), unknown);
    // Data beyond the buffer, out of order, twice, too little, or for a write.
    assert_eq!(
        broken_by(|peer| peer.data(0, 1, &data, true, true)),
        Wire(Error::OutOfRange)
    );
    assert_eq!(
        broken_by(|peer| peer.data(0, 512, &data[..512], true, true)),
        Wire(Error::Sequence)
    );
    assert_eq!(
        broken_by(|peer| {
            peer.data(0, 0, &data, true, false);
            peer.data(0, 0, &data, true, false);
        }),
        Wire(Error::Sequence)
    );
    assert_eq!(
        broken_by(|peer| peer.data(0, 0, &data[..512], true, true)),
        Wire(Error::Sequence)
    );
    assert_eq!(
        broken_by(|peer| response(peer, 0)),
        Wire(Error::Sequence),
        "a read that succeeds without data"
    );
    assert_eq!(
        broken_by(|peer| peer.data(2, 0, &data, true, false)),
        Wire(Error::OutOfRange)
    );
    // R2Ts for a read, for in-capsule data, beyond the data, of nothing, of what was asked for already.
    for cid in [0, 1] {
        assert_eq!(
            broken_by(|peer| peer.r2t(cid, 0, 512)),
            Wire(Error::OutOfRange)
        );
    }
    assert_eq!(
        broken_by(|peer| peer.r2t(2, 0, 20_001)),
        Wire(Error::OutOfRange)
    );
    assert_eq!(
        broken_by(|peer| peer.r2t(2, 0, 0)),
        Wire(Error::InvalidField { offset: 16 })
    );
    assert_eq!(
        broken_by(|peer| {
            peer.r2t(2, 0, 4096);
            peer.r2t(2, 0, 4096);
        }),
        Wire(Error::Sequence)
    );
    // Connection set-up again.
    let again = IcResp {
        cpda: Alignment::DWORD,
        digests: Digests::empty(),
        maxh2cdata: 4096,
    };
    assert_eq!(
        broken_by(|peer| peer.to_host.extend_from_slice(&again.emit())),
        Wire(Error::Sequence)
    );
    // It ends the connection itself.
    let terminated = broken_by(|peer| {
        let mut term = [0; TERM_MAX];
        let len = peer.stream.term_req(Error::Sequence, &mut term);
        peer.to_host.extend_from_slice(&term[..len]);
    });
    assert!(matches!(terminated, Broken::Terminated(_)));
    assert_eq!(terminated.reason(), LostReason::PeerClosed);
}

#[test]
fn an_admin_command_may_bring_less_than_there_is_room_for() {
    let mut world = World::new(Digests::empty(), Alignment::DWORD, 4096, Kind::Admin);
    let mut buffer = Buffer::new(4096, 0);
    world.read(0, &mut buffer);
    world.flow_to_peer(usize::MAX);
    world.peer.data(0, 0, &pattern(1, 8), true, false);
    world.peer.respond(0, Status::SUCCESS);
    world.flow_to_host(usize::MAX).unwrap();
    assert_eq!(world.one(), (0, Status::SUCCESS));
    assert_eq!(buffer.bytes()[..8], pattern(1, 8));
}

#[test]
fn a_full_batch_and_a_command_identifier_in_use_are_refused() {
    let mut world = World::plain();
    world.post(0, Data::None).unwrap();
    assert_eq!(
        world.post(0, Data::None),
        Err(PostRefused::Lost(LostReason::Protocol))
    );
    assert_eq!(
        world.post(DEPTH, Data::None),
        Err(PostRefused::Lost(LostReason::Protocol))
    );
    // Answered again and again without being sent: only a broken controller makes it so, and nothing grows.
    let mut refused = false;
    for _ in 0..200 {
        let cqe = Cqe::success(Cid::new(0));
        world
            .peer
            .send(|framing, head| framing.capsule_resp(&cqe, head), &[]);
        world.flow_to_host(usize::MAX).unwrap();
        if world.post(0, Data::None) == Err(PostRefused::Full) {
            refused = true;
            break;
        }
    }
    assert!(refused);
}

/// Whatever padding of headers a controller asks for: a batch is full before its memory is, which must not move, since
/// its entries point into it.
#[test]
fn a_batch_is_full_before_its_memory_is() {
    for digests in [Digests::empty(), Digests::all()] {
        for dwords in [0, 16, 17, 31] {
            let alignment = Alignment::from_raw(dwords).unwrap();
            let mut world = World::new(digests, alignment, 4096, Kind::Io);
            // Answered without being sent, so that the batch grows beyond the queue's depth.
            let posted = (0..1000).take_while(|_| {
                let posted = world.post(0, Data::Small(&[7; 16]));
                let cqe = Cqe::success(Cid::new(0));
                world
                    .peer
                    .send(|framing, head| framing.capsule_resp(&cqe, head), &[]);
                posted == Ok(()) && world.flow_to_host(usize::MAX).is_ok()
            });
            let posted = posted.count();
            assert!((usize::from(DEPTH)..1000).contains(&posted), "{posted}");
        }
    }
}
