//! The queue pair over a link that does what the test says.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::rc::Rc;

use flexblk_nvme::{Sqe, Status, StatusCode};
use proptest::prelude::*;

use super::*;
use crate::Namespace;

const BLOCK: u32 = 512;
const TIMEOUT: Duration = Duration::from_secs(30);

/// What the other side of the fake link sees and decides.
#[derive(Default)]
struct Wire {
    /// Posted and not answered: command identifier, SQE, data.
    posted: BTreeMap<u16, ([u8; 64], Option<Span>)>,
    /// Command identifiers in the order in which they were posted.
    order: Vec<u16>,
    unsent: BTreeSet<u16>,
    events: Vec<LinkEvent>,
    lost: Option<LostReason>,
    refuse: Option<PostRefused>,
    /// Capsules that the link still has room for.
    room: Option<usize>,
    closed: bool,
    registered: u32,
    late: Duration,
}

struct FakeLink(Rc<RefCell<Wire>>);

impl Link for FakeLink {
    fn now(&self) -> Instant {
        Instant::now() + self.0.borrow().late
    }
    fn waker(&self) -> Option<flexblk_reactor::Waker> {
        None
    }
    fn register(&mut self, _: Span) -> Result<Option<MemoryKey>, Error> {
        self.0.borrow_mut().registered += 1;
        Ok(Some(MemoryKey {
            local: 1,
            remote: 2,
        }))
    }
    fn register_memory(&mut self, _: &Arc<SharedMemory>) -> Result<MemoryKey, Error> {
        self.0.borrow_mut().registered += 1;
        Ok(MemoryKey {
            local: 1,
            remote: 2,
        })
    }
    fn unregister(&mut self, _: MemoryKey) -> Result<(), Error> {
        self.0.borrow_mut().registered -= 1;
        Ok(())
    }
    fn post(
        &mut self,
        cid: u16,
        sqe: &mut [u8; 64],
        data: Data<'_>,
    ) -> Result<Posted, PostRefused> {
        let mut wire = self.0.borrow_mut();
        assert!(!wire.closed, "posted after close");
        if let Some(refused) = wire.refuse {
            return Err(refused);
        }
        match &mut wire.room {
            Some(0) => return Err(PostRefused::Full),
            Some(room) => *room -= 1,
            None => {}
        }
        assert_eq!(Sqe::cast(sqe).cid().get(), cid);
        wire.order.push(cid);
        let span = match data {
            Data::ToController(span, _) | Data::FromController(span, _) => Some(span),
            Data::None | Data::Small(_) => None,
        };
        assert!(
            wire.posted.insert(cid, (*sqe, span)).is_none(),
            "command identifier in use"
        );
        if matches!(data, Data::ToController(..)) {
            wire.unsent.insert(cid);
            return Ok(Posted::HoldsBuffer);
        }
        Ok(Posted::Free)
    }
    fn turn(&mut self, _: Wait, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        let mut wire = self.0.borrow_mut();
        events.append(&mut wire.events);
        wire.lost.map_or(Ok(()), Err)
    }
    fn set_controller_in_capsule_bytes(&mut self, _: u32) {}
    fn pause(&mut self) {}
    fn close(&mut self, _: Instant) {
        self.0.borrow_mut().closed = true;
    }
    fn counters(&self) -> crate::TransportCounters {
        crate::TransportCounters::default()
    }
}

impl Wire {
    fn answer(&mut self, cid: u16, status: Status) {
        self.posted.remove(&cid);
        self.events.push(LinkEvent::Response {
            cid,
            status,
            result: 0,
            immediate: status.is_success(),
        });
    }
}

fn namespace(nsid: u32) -> Namespace {
    Namespace {
        nsid: Nsid::new(nsid),
        block_size: BLOCK,
        block_count: 1000,
        uuid: None,
        nguid: [0; 16],
        eui64: [0; 8],
        read_only: false,
        deallocated_reads_zero: true,
        optimal_io_bytes: 0,
        max_transfer_bytes: 65536,
        max_blocks: crate::MaxBlocks::EXPRESSIBLE,
        write_zeroes: true,
        discard: true,
        compare: true,
        compare_and_write: true,
        verify: false,
        volatile_write_cache: true,
    }
}

fn queue(depth: u16, bounce_bytes: usize) -> (QueuePair, Rc<RefCell<Wire>>, Arc<ControllerView>) {
    let wire = Rc::new(RefCell::new(Wire::default()));
    let view = Arc::new(ControllerView::default());
    view.set_namespaces(vec![namespace(1)]);
    let queue = QueuePair::assemble(Parts {
        link: Box::new(FakeLink(wire.clone())),
        view: view.clone(),
        depth,
        io_timeout: TIMEOUT,
        max_transfer_bytes: 65536,
        bounce_bytes,
        keep: Keep {
            _qid: None,
            _controller: None,
        },
    })
    .unwrap();
    (queue, wire, view)
}

fn span(memory: &mut [u8]) -> Span {
    // SAFETY: the memory outlives the queue in every test, and is looked at only when no command is outstanding.
    unsafe { Span::from_raw_parts(NonNull::from(&mut *memory).cast(), memory.len() as u32) }
}

const NSID: Nsid = Nsid::new(1);

#[test]
fn a_write_waits_for_its_response_and_its_send() {
    let (mut queue, wire, _) = queue(4, 0);
    let mut memory = vec![0; 4096];
    let span = span(&mut memory);
    queue.register(span).unwrap();
    let mut out = Vec::new();
    for send_first in [true, false] {
        queue.submit(&Command::write(NSID, 0, 8, span), 7).unwrap();
        let cid = *wire.borrow().posted.keys().next().unwrap();
        let mut order = [
            LinkEvent::SendDone { cid },
            LinkEvent::Response {
                cid,
                status: Status::SUCCESS,
                result: 0,
                immediate: false,
            },
        ];
        if !send_first {
            order.reverse();
        }
        wire.borrow_mut().posted.clear();
        wire.borrow_mut().events.push(order[0]);
        assert_eq!(queue.poll(&mut out), 0);
        wire.borrow_mut().events.push(order[1]);
        assert_eq!(queue.poll(&mut out), 1);
        assert_eq!(
            out.pop(),
            Some(IoCompletion {
                tag: 7,
                result: Ok(())
            })
        );
    }
}

#[test]
fn unregistered_memory_goes_through_a_bounce_buffer() {
    let (mut queue, wire, _) = queue(4, 1 << 20);
    let mut memory: Vec<u8> = (0..1024).map(|i| i as u8).collect();
    let span = span(&mut memory);
    queue.submit(&Command::write(NSID, 0, 2, span), 1).unwrap();
    let sent = wire.borrow().posted[&0].1.unwrap();
    assert_ne!(sent.as_ptr(), span.as_ptr());
    let mut seen = vec![0; 1024];
    sent.copy_to_slice(&mut seen);
    assert_eq!(seen[..], (0..1024).map(|i| i as u8).collect::<Vec<_>>()[..]);
    wire.borrow_mut().answer(0, Status::SUCCESS);
    wire.borrow_mut()
        .events
        .push(LinkEvent::SendDone { cid: 0 });
    let mut out = Vec::new();
    assert_eq!(queue.poll(&mut out), 1);
    queue.submit(&Command::read(NSID, 0, 2, span), 2).unwrap();
    let (&cid, &(_, target)) = wire.borrow().posted.iter().next().unwrap();
    target.unwrap().fill(0xa5);
    wire.borrow_mut().answer(cid, Status::SUCCESS);
    assert_eq!(queue.poll(&mut out), 1);
    let mut seen = vec![0; 1024];
    span.copy_to_slice(&mut seen);
    assert!(seen.iter().all(|b| *b == 0xa5));
    assert_eq!(
        (queue.counters().bounced, queue.counters().bounced_bytes),
        (2, 2048)
    );
}

#[test]
fn wrong_commands_complete_with_their_reason() {
    let (mut queue, wire, _) = queue(16, 0);
    let mut memory = vec![0; 4096];
    let span = span(&mut memory);
    queue.register(span).unwrap();
    let wrong = [
        (
            Command::read(Nsid::new(2), 0, 8, span),
            InvalidCommand::Namespace,
        ),
        (Command::read(NSID, 0, 7, span), InvalidCommand::Buffer),
        (Command::read(NSID, 0, 0, span), InvalidCommand::Blocks),
        (Command::read(NSID, 0, 129, span), InvalidCommand::Blocks),
        (
            Command {
                buffer: None,
                ..Command::read(NSID, 0, 8, span)
            },
            InvalidCommand::Buffer,
        ),
        (
            Command {
                op: Op::Flush,
                ..Command::read(NSID, 0, 8, span)
            },
            InvalidCommand::Buffer,
        ),
        (
            Command::without_data(Op::Verify, NSID, 0, 8),
            InvalidCommand::Unsupported,
        ),
    ];
    let mut out = Vec::new();
    for (tag, (command, _)) in wrong.iter().enumerate() {
        queue.submit(command, tag as u64).unwrap();
    }
    queue.submit_discard(NSID, &[], 100).unwrap();
    queue
        .submit_discard(NSID, &[DiscardRange { lba: 0, blocks: 1 }; 257], 101)
        .unwrap();
    assert!(wire.borrow().posted.is_empty());
    assert_eq!(queue.outstanding(), wrong.len() + 2);
    queue.poll(&mut out);
    let reasons: Vec<_> = out.iter().map(|c| c.result).collect();
    let mut expected: Vec<_> = wrong
        .iter()
        .map(|(_, reason)| Err(IoError::Invalid(*reason)))
        .collect();
    expected.extend([Err(IoError::Invalid(InvalidCommand::Ranges)); 2]);
    assert_eq!(reasons, expected);
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn a_discard_carries_its_ranges() {
    let (mut queue, wire, _) = queue(4, 0);
    queue
        .submit(&Command::without_data(Op::Discard, NSID, 5, 6), 0)
        .unwrap();
    assert!(
        wire.borrow().posted[&0].1.is_none(),
        "one range fits the capsule"
    );
    let ranges: Vec<_> = (0..256u64)
        .map(|lba| DiscardRange {
            lba: lba * 3,
            blocks: 2,
        })
        .collect();
    queue.submit_discard(NSID, &ranges, 1).unwrap();
    let (sqe, data) = wire.borrow().posted[&1];
    assert_eq!(Sqe::cast(&sqe).cdw10.get(), 255);
    let mut bytes = vec![0; 4096];
    assert_eq!(data.unwrap().copy_to_slice(&mut bytes), 4096);
    assert_eq!(bytes[16 * 255 + 8..][..8], (255u64 * 3).to_le_bytes());
    // The only buffer for ranges is taken.
    assert_eq!(queue.submit_discard(NSID, &ranges, 2), Err(Busy));
}

#[test]
fn a_time_out_tears_down_and_says_so() {
    let (mut queue, wire, _) = queue(4, 0);
    queue.submit(&Command::flush(NSID), 1).unwrap();
    let mut out = Vec::new();
    assert_eq!(queue.poll(&mut out), 0);
    wire.borrow_mut().late = TIMEOUT + Duration::from_millis(1);
    queue.poll(&mut out);
    assert_eq!(queue.lost(), Some(LostReason::CommandTimeout));
    assert!(wire.borrow().closed);
    assert_eq!(
        out,
        [IoCompletion {
            tag: 1,
            result: Err(IoError::TimedOut)
        }]
    );
    queue.submit(&Command::flush(NSID), 2).unwrap();
    queue.poll(&mut out);
    assert_eq!(
        out[1],
        IoCompletion {
            tag: 2,
            result: Err(IoError::ConnectionLost)
        }
    );
}

#[test]
fn a_lost_controller_ends_its_queues() {
    let (mut queue, _, view) = queue(4, 0);
    queue.submit(&Command::flush(NSID), 1).unwrap();
    view.set_lost(LostReason::KeepAlive);
    let mut out = Vec::new();
    assert_eq!(queue.wait(Duration::from_secs(5), 1, &mut out), 1);
    assert_eq!(out[0].result, Err(IoError::ConnectionLost));
    assert_eq!(queue.lost(), Some(LostReason::KeepAlive));
}

#[test]
fn a_response_to_nothing_is_the_end() {
    let (mut queue, wire, _) = queue(4, 0);
    queue.submit(&Command::flush(NSID), 1).unwrap();
    wire.borrow_mut().answer(3, Status::SUCCESS);
    let mut out = Vec::new();
    queue.poll(&mut out);
    assert_eq!(queue.lost(), Some(LostReason::Protocol));
    assert_eq!(out.len(), 1);
}

#[test]
fn memory_in_use_stays_registered() {
    let (mut queue, wire, _) = queue(4, 0);
    let mut memory = vec![0; 4096];
    let span = span(&mut memory);
    let region = queue.register(span).unwrap();
    queue.submit(&Command::read(NSID, 0, 8, span), 1).unwrap();
    assert!(queue.unregister(region).is_err());
    wire.borrow_mut().answer(0, Status::SUCCESS);
    queue.poll(&mut Vec::new());
    queue.unregister(region).unwrap();
    assert!(queue.unregister(region).is_err());
    assert_eq!(wire.borrow().registered, 1, "the bounce buffers");
}

#[derive(Clone, Debug)]
enum Step {
    Submit { kind: u8 },
    Answer { pick: u16, ok: bool },
    Send { pick: u16 },
    Refuse { how: u8 },
    Lose,
    Late,
    Flush,
    Poll,
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (0u8..6).prop_map(|kind| Step::Submit { kind }),
        8 => (any::<u16>(), any::<bool>()).prop_map(|(pick, ok)| Step::Answer { pick, ok }),
        6 => any::<u16>().prop_map(|pick| Step::Send { pick }),
        1 => (0u8..3).prop_map(|how| Step::Refuse { how }),
        6 => Just(Step::Poll),
        2 => Just(Step::Flush),
        1 => prop_oneof![Just(Step::Lose), Just(Step::Late), Just(Step::Close)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    /// Whatever the link does, every accepted tag comes back exactly once.
    #[test]
    fn every_tag_completes_exactly_once(depth in 1u16..6, steps in prop::collection::vec(step(), 0..150)) {
        let (mut queue, wire, _) = queue(depth, 1 << 17);
        let mut memory = vec![0; 4096];
        let mut other = vec![0; 4096];
        let (inside, outside) = (span(&mut memory), span(&mut other));
        queue.register(inside).unwrap();
        let mut out = Vec::new();
        let (mut next_tag, mut done) = (0u64, 0);
        let mut pending = BTreeSet::new();
        for step in steps {
            match step {
                Step::Submit { kind } => {
                    let command = match kind {
                        0 => Command::read(NSID, 0, 8, inside),
                        1 => Command::write(NSID, 0, 8, inside),
                        2 => Command::read(NSID, 0, 8, outside),
                        3 => Command::write(NSID, 0, 8, outside),
                        4 => Command::flush(NSID),
                        _ => Command::read(NSID, 0, 9, inside),
                    };
                    if queue.submit(&command, next_tag).is_ok() {
                        pending.insert(next_tag);
                        next_tag += 1;
                    }
                }
                Step::Answer { pick, ok } => {
                    let mut wire = wire.borrow_mut();
                    let keys: Vec<u16> = wire.posted.keys().copied().collect();
                    if let Some(cid) = keys.get(usize::from(pick) % keys.len().max(1)) {
                        let status = if ok { Status::SUCCESS } else { StatusCode::InternalError.dnr() };
                        wire.answer(*cid, status);
                    }
                }
                Step::Send { pick } => {
                    let mut wire = wire.borrow_mut();
                    let keys: Vec<u16> = wire.unsent.iter().copied().collect();
                    if let Some(cid) = keys.get(usize::from(pick) % keys.len().max(1)) {
                        wire.unsent.remove(cid);
                        wire.events.push(LinkEvent::SendDone { cid: *cid });
                    }
                }
                Step::Refuse { how } => {
                    wire.borrow_mut().refuse = match how {
                        0 => None,
                        1 => Some(PostRefused::Full),
                        _ => Some(PostRefused::Lost(LostReason::Retries)),
                    };
                }
                Step::Lose => wire.borrow_mut().lost = Some(LostReason::PeerClosed),
                Step::Late => wire.borrow_mut().late += TIMEOUT,
                Step::Flush => queue.flush_submissions(),
                Step::Poll => { queue.poll(&mut out); }
                Step::Close => queue.close(&mut out),
            }
            prop_assert_eq!(queue.outstanding() + (out.len() - done) , pending.len());
            for completion in &out[done..] {
                prop_assert!(pending.remove(&completion.tag), "tag {} twice or never submitted", completion.tag);
            }
            done = out.len();
        }
        queue.close(&mut out);
        for completion in &out[done..] {
            prop_assert!(pending.remove(&completion.tag));
        }
        prop_assert!(pending.is_empty());
        prop_assert!(wire.borrow().closed);
        prop_assert_eq!(queue.counters().submitted, next_tag);
        prop_assert_eq!(queue.counters().completed, next_tag);
    }
}

/// "The commands ... shall be adjacent in the Submission Queue, first one first" (Base 3.4.2): also when the link has
/// room for the first half only, and whatever is submitted meanwhile.
#[test]
fn the_halves_of_a_pair_are_next_to_one_another() {
    let (mut queue, wire, _) = queue(8, 1 << 20);
    let (mut expected, mut new) = (vec![1; 512], vec![2; 512]);
    let (expected, new) = (span(&mut expected), span(&mut new));
    wire.borrow_mut().room = Some(1);
    queue
        .submit_compare_and_write(NSID, 9, expected, new, 5)
        .unwrap();
    assert_eq!(queue.submit(&Command::flush(NSID), 6), Err(Busy));
    let pair = queue.submit_compare_and_write(NSID, 9, expected, new, 6);
    assert_eq!(pair, Err(Busy));
    assert_eq!((queue.outstanding(), wire.borrow().order.len()), (1, 1));
    wire.borrow_mut().room = None;
    queue.submit(&Command::flush(NSID), 6).unwrap();
    let order = wire.borrow().order.clone();
    let sqe = |at: usize| *Sqe::cast(&wire.borrow().posted[&order[at]].0);
    assert_eq!(
        (sqe(0).opcode, sqe(0).fuse()),
        (nvm::opcode::COMPARE, flexblk_nvme::command::Fuse::First)
    );
    assert_eq!(
        (sqe(1).opcode, sqe(1).fuse()),
        (nvm::opcode::WRITE, flexblk_nvme::command::Fuse::Second)
    );
    assert_eq!(sqe(2).opcode, nvm::opcode::FLUSH);
    assert_eq!(sqe(0).cdw10, sqe(1).cdw10);
}

/// One completion for a pair, with what went wrong first; a torn down queue ends it once.
#[test]
fn a_pair_completes_once() {
    let (mut queue, wire, _) = queue(4, 1 << 20);
    let (mut expected, mut new) = (vec![1; 1024], vec![2; 1024]);
    let (expected, new) = (span(&mut expected), span(&mut new));
    let mut out = Vec::new();
    let ok = Status::SUCCESS;
    let (differs, aborted) = (
        StatusCode::CompareFailure.dnr(),
        StatusCode::AbortedFailedFused.dnr(),
    );
    let fault = Status::from(StatusCode::WriteFault);
    for (compare, write, wanted) in [
        (ok, ok, Ok(())),
        (differs, aborted, Err(IoError::Nvme(differs))),
        (ok, fault, Err(IoError::Nvme(fault))),
    ] {
        for write_first in [false, true] {
            queue
                .submit_compare_and_write(NSID, 0, expected, new, 5)
                .unwrap();
            let mut answers = [compare, write];
            let mut cids = std::mem::take(&mut wire.borrow_mut().order);
            if write_first {
                (cids[0], cids[1]) = (cids[1], cids[0]);
                answers.reverse();
            }
            wire.borrow_mut().unsent.clear();
            for (index, cid) in cids.into_iter().enumerate() {
                wire.borrow_mut().events.push(LinkEvent::SendDone { cid });
                assert_eq!((queue.poll(&mut out), queue.outstanding()), (0, 1));
                wire.borrow_mut().answer(cid, answers[index]);
                assert_eq!(queue.poll(&mut out), index);
            }
            let tag = 5;
            let completion = IoCompletion {
                tag,
                result: wanted,
            };
            assert_eq!(std::mem::take(&mut out), [completion]);
            assert_eq!(queue.outstanding(), 0);
        }
    }
    assert_eq!(
        (queue.counters().submitted, queue.counters().completed),
        (6, 6)
    );
    wire.borrow_mut().room = Some(1);
    queue
        .submit_compare_and_write(NSID, 0, expected, new, 8)
        .unwrap();
    queue.close(&mut out);
    assert_eq!(
        (out.len(), out[0].tag, out[0].result),
        (1, 8, Err(IoError::Closed))
    );
}

/// What cannot be a pair is refused, and says why.
#[test]
fn wrong_pairs_are_refused() {
    let (mut queue, _, view) = queue(4, 0);
    let mut memory = vec![0; 8192];
    let memory = span(&mut memory);
    let part = |bytes| memory.sub(0, bytes).unwrap();
    let refused = |queue: &mut QueuePair, expected, new| {
        queue
            .submit_compare_and_write(NSID, 0, expected, new, 1)
            .unwrap();
        let mut out = Vec::new();
        assert_eq!(queue.poll(&mut out), 1);
        match out[0].result {
            Err(IoError::Invalid(invalid)) => invalid,
            other => panic!("{other:?}"),
        }
    };
    for (expected, new, why) in [
        (512, 1024, InvalidCommand::Buffer),
        (100, 100, InvalidCommand::Buffer),
        // Neither is registered, and both do not fit into a bounce buffer.
        (4096, 4096, InvalidCommand::Buffer),
    ] {
        assert_eq!(refused(&mut queue, part(expected), part(new)), why);
    }
    queue.register(memory).unwrap();
    view.set_namespaces(vec![Namespace {
        compare_and_write: false,
        ..namespace(1)
    }]);
    let why = refused(&mut queue, part(512), part(512));
    assert_eq!(why, InvalidCommand::Unsupported);
}
