//! A queue pair of a thread and its commands under way.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use flexblk_nvme::command::Fuse;
use flexblk_nvme::log::discovery::TransportType;
use flexblk_nvme::{Cid, Lba, Nsid, Qid, Status};
use flexins::verbs::{Cq, Qpn, Segments};

use super::buffers::{HeldId, Share};
use super::copy::Copy;
use super::fused::First;
use super::liveness::Liveness;
use super::tcp::ConnKey;
use crate::association::{Association, QueueShared};
use crate::budget::Reservation;
use crate::controller::Controller;
use crate::directory::Announced;
use crate::metrics::{Shard, Spent, Stage as TimeOf};
use crate::queue::data::{Addressing, Remote};
use crate::queue::request::{Range, Reserve};

/// Names a queue of a thread; a later queue in the same place has another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueKey {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl QueueKey {
    /// As the word that comes back in completions and deliveries.
    pub(crate) fn to_word(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(crate) fn from_word(word: u64) -> Self {
        Self {
            index: word as u32,
            generation: (word >> 32) as u32,
        }
    }

    /// Together with a command as the tag of a device's I/O: index 24 bits, generation 24, slot 16.
    pub(crate) fn tag(self, slot: u16) -> u64 {
        u64::from(self.index & 0xFF_FFFF) << 40
            | u64::from(self.generation & 0xFF_FFFF) << 16
            | u64::from(slot)
    }
}

/// What a queue pair is for.
pub(crate) enum Role {
    /// It has not sent Connect yet.
    Unconnected(Announced),
    /// Admin queue; the controller lives here.
    Admin(Box<Admin>),
    /// I/O queue.
    Io(Io),
}

/// What an Admin queue has besides commands.
pub(crate) struct Admin {
    pub(crate) controller: Controller,
    /// The address by which this host reaches us.
    pub(crate) own_ip: Option<IpAddr>,
    pub(crate) liveness: Liveness,
}

impl Admin {
    /// When the queue has to be looked at. A controller without a timer of its own is one whose host
    /// turned Keep Alive off.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.controller
            .next_timeout()
            .or_else(|| Some(self.liveness.deadline()))
    }
}

/// What an I/O queue has besides commands.
pub(crate) struct Io {
    pub(crate) qid: Qid,
    pub(crate) subsystem: usize,
    pub(crate) association: Arc<Association>,
    pub(crate) shared: Arc<QueueShared>,
    /// Numbers by NSID - 1; a namespace has them from its first command on.
    pub(crate) series: Vec<Option<Arc<Shard>>>,
}

/// Where a command stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not in use.
    Free,
    /// Waits for buffers.
    Buffers,
    /// Its data is being read from the host.
    Fetch,
    /// Waits for, or is with, the device.
    Device,
    /// Waits for the control thread.
    Control,
    /// Waits for room in the send queue.
    Post,
    /// Its response is with the transport.
    Response,
    /// Half of a fused operation that is ready, and waits for the other or for the device's range.
    Fused,
    /// It was aborted and its response is on the way, but the device still uses its buffers.
    Abandoned,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write {
        fua: bool,
    },
    Compare,
    Flush,
    WriteZeroes {
        unmap: bool,
        fua: bool,
    },
    Verify,
    /// Ranges to deallocate lie in the buffers; `next` is the one the device does or is to do.
    Deallocate {
        ranges: u16,
        next: u16,
    },
    /// The source ranges lie in the buffers, and after that what they name.
    Copy {
        ranges: u16,
        format: u8,
        fua: bool,
    },
    /// A reservation command; its keys lie in the buffers.
    Reserve(Reserve),
    /// An Admin command with data for the host, or a Reservation Report.
    AdminOut,
    /// An Admin command (or Connect) with data from the host.
    AdminIn,
    /// Not a command: flushes the devices one after the other, for a shutdown.
    Shutdown,
    /// Only the response is left.
    Respond,
}

impl What {
    /// What it writes is on the medium when it ends.
    pub(crate) fn force(&mut self) {
        if let Self::Write { fua } | Self::WriteZeroes { fua, .. } | Self::Copy { fua, .. } = self {
            *fua = true;
        }
    }

    pub(crate) fn is_forced(self) -> bool {
        matches!(
            self,
            Self::Write { fua: true }
                | Self::WriteZeroes { fua: true, .. }
                | Self::Copy { fua: true, .. }
        )
    }
}

/// Where a command's data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere.
    None,
    /// In buffers of the pool.
    Held(HeldId),
    /// In the device's own memory.
    Device,
}

/// A command under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) stage: Stage,
    pub(crate) what: What,
    pub(crate) place: Place,
    pub(crate) opcode: u8,
    pub(crate) cid: Cid,
    /// How it ended, once it has.
    pub(crate) status: Status,
    /// Bytes of data.
    pub(crate) length: u32,
    pub(crate) nsid: Nsid,
    pub(crate) range: Range,
    pub(crate) remote: Remote,
    /// Dwords 0 and 1 of the completion.
    pub(crate) result: u64,
    /// It counts as one I/O of its device.
    pub(crate) counted: bool,
    /// Its data has been moved: copied out of the capsule, or handed to the transport.
    pub(crate) data_moved: bool,
    /// Pieces of its data whose transfer has been posted.
    pub(crate) posted: u8,
    /// On NVMe/TCP: bytes of its data that H2CData PDUs have announced.
    pub(crate) fetched: u32,
    /// In stage Post: what waits is the request for its data, not its response.
    pub(crate) fetches: bool,
    /// In stage Device: the device has it.
    pub(crate) with_device: bool,
    /// Not success: it was aborted while its data was being fetched, and ends so when that is over.
    pub(crate) doomed: Status,
    /// Which half of a fused operation it is.
    pub(crate) fuse: Fuse,
}

impl Slot {
    const FREE: Self = Self {
        stage: Stage::Free,
        what: What::Respond,
        place: Place::None,
        opcode: 0,
        cid: Cid::new(0),
        status: Status::SUCCESS,
        length: 0,
        nsid: Nsid::NONE,
        range: Range {
            device: u32::MAX,
            blocks: 0,
            lba: 0,
            block_shift: 0,
        },
        remote: Remote::NONE,
        result: 0,
        counted: false,
        data_moved: false,
        fetches: false,
        posted: 0,
        with_device: false,
        doomed: Status::SUCCESS,
        fuse: Fuse::Normal,
        fetched: 0,
    };

    /// A command in its first stage.
    pub(crate) fn new(what: What, opcode: u8, cid: Cid) -> Self {
        Self {
            stage: Stage::Buffers,
            what,
            opcode,
            cid,
            ..Self::FREE
        }
    }

    /// First block, for the error log.
    pub(crate) fn lba(&self) -> Lba {
        Lba::new(self.range.lba)
    }
}

/// What carries a queue's capsules and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fabric {
    /// A FlexiNS queue pair.
    Flexins {
        qpn: Qpn,
        cq: Cq,
        /// Completions may travel in an immediate.
        immediate: bool,
        /// How data is cut into packets.
        segments: Segments,
    },
    /// An NVMe/TCP connection.
    Tcp(ConnKey),
}

impl Fabric {
    /// Its transport type.
    pub(crate) fn transport(self) -> TransportType {
        match self {
            Self::Flexins { .. } => TransportType::Flexins,
            Self::Tcp(_) => TransportType::Tcp,
        }
    }

    /// How commands name the host's memory.
    #[inline]
    pub(crate) fn addressing(self) -> Addressing {
        match self {
            Self::Flexins { .. } => Addressing::Keyed,
            Self::Tcp(_) => Addressing::Transport,
        }
    }
}

/// A queue pair.
pub(crate) struct Queue {
    pub(crate) key: QueueKey,
    pub(crate) fabric: Fabric,
    pub(crate) role: Role,
    /// Commands under way end, new ones are ignored.
    pub(crate) closing: bool,
    /// The last round in which it was refused buffers.
    pub(crate) refused_in: u64,
    pub(crate) peer: SocketAddr,
    /// Port by which it came.
    pub(crate) port: u16,
    /// Entries of the submission queue.
    pub(crate) entries: u16,
    /// The host counts on SQHD.
    pub(crate) flow_control: bool,
    /// Most bytes of data in a command capsule.
    pub(crate) in_capsule_bytes: u32,
    /// When [`super::Core`] has to look at the queue.
    pub(crate) timer: Option<Instant>,
    /// I/O buffers that its commands hold.
    pub(crate) share: Share,
    sqhd: u16,
    /// Where the time of each slot's command goes; made with the first I/O command, so that a queue
    /// that only waits has none.
    spent: Vec<Spent>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Entries of commands whose data is being fetched and that are judged when it is there.
    pub(crate) fetching: Vec<(u16, [u8; 64])>,
    /// The first half of a fused operation whose second is the next command.
    pub(crate) fused: Option<First>,
    /// What Copy commands have to do.
    pub(crate) copies: Vec<(u16, Copy)>,
    /// In-capsule data of commands that wait for buffers.
    pub(crate) spills: Vec<(u16, Spill)>,
    /// Memory that the queue was given; goes back with it.
    pub(crate) _memory: Reservation,
}

/// In-capsule data, or data for the host, of a command that waits for buffers.
pub(crate) struct Spill {
    pub(crate) bytes: Vec<u8>,
    pub(crate) _memory: Reservation,
}

/// Commands that a queue can have under way: a quarter more than its entries, because a host may
/// use an entry again as soon as it has the response, and our send completes only when its
/// acknowledgement has come back. That comes with the next command, so few are in between (see
/// [`Queue::is_short`]).
pub(crate) fn slots_for(entries: u16) -> u32 {
    u32::from(entries) + u32::from(entries) / 4 + 8
}

/// Send requests that a queue pair can have posted: one or two for each command, and responses that
/// nobody waits for. A power of two, since the transport rounds up to one.
pub(crate) fn send_requests_for(entries: u16) -> u32 {
    slots_for(entries).next_power_of_two()
}

/// What a queue of that size costs: commands, the transport's queue pair (16 KiB and 80 bytes for
/// each send request), completions of 64 bytes. `memory_per_queue` in the tests holds it to that.
pub(crate) fn queue_bytes(entries: u16) -> u64 {
    let per_slot = size_of::<Slot>() + size_of::<Spent>() + 2;
    let slots = u64::from(slots_for(entries) + 1) * per_slot as u64;
    let requests = u64::from(send_requests_for(entries)) * (80 + 64);
    size_of::<Queue>() as u64 + slots + requests + (16 << 10)
}

impl Queue {
    pub(crate) fn new(
        key: QueueKey,
        fabric: Fabric,
        announced: Announced,
        peer: SocketAddr,
        in_capsule_bytes: u32,
        memory: Reservation,
        timer: Instant,
    ) -> Self {
        // One more than there are credits, for the flush of a shutdown.
        let count = (slots_for(announced.entries) + 1).min(u32::from(u16::MAX)) as u16;
        Self {
            key,
            fabric,
            role: Role::Unconnected(announced),
            closing: false,
            refused_in: 0,
            peer,
            port: announced.port,
            entries: announced.entries,
            flow_control: true,
            in_capsule_bytes,
            timer: Some(timer),
            share: Share::default(),
            sqhd: 0,
            spent: Vec::new(),
            slots: vec![Slot::FREE; usize::from(count)],
            free: (0..count).rev().collect(),
            fetching: Vec::new(),
            fused: None,
            copies: Vec::new(),
            spills: Vec::new(),
            _memory: memory,
        }
    }

    /// Takes a free slot.
    pub(crate) fn alloc(&mut self, slot: Slot) -> Option<u16> {
        let index = self.free.pop()?;
        if let Some(place) = self.slots.get_mut(usize::from(index)) {
            *place = slot;
        }
        Some(index)
    }

    /// The command of a slot begins.
    pub(crate) fn begin(&mut self, index: u16, now_us: u32) {
        if self.spent.is_empty() {
            self.spent = vec![Spent::ZERO; self.slots.len()];
        }
        if let Some(spent) = self.spent.get_mut(usize::from(index)) {
            *spent = Spent::begin(now_us);
        }
    }

    /// The time since the last call, or since the beginning, was spent there; says how long it was.
    pub(crate) fn spend(&mut self, index: u16, stage: TimeOf, now_us: u32) -> u32 {
        let spent = self.spent.get_mut(usize::from(index));
        spent.map_or(0, |spent| spent.spend(stage, now_us))
    }

    /// The time that a slot's command has taken, whole and by stage.
    pub(crate) fn spent_us(&self, index: u16, now_us: u32) -> [u32; 4] {
        let spent = self.spent.get(usize::from(index));
        spent.map_or([0; 4], |spent| spent.end(now_us))
    }

    /// Gives a slot back, and what was in it.
    pub(crate) fn release(&mut self, index: u16) -> Option<Slot> {
        let slot = self.slots.get_mut(usize::from(index))?;
        if slot.stage == Stage::Free {
            return None;
        }
        let old = core::mem::replace(slot, Slot::FREE);
        self.free.push(index);
        if !self.fetching.is_empty() {
            // Of a command that ended before its data was judged: the slot's next one has its own.
            let _ = self.take_fetching(index);
        }
        Some(old)
    }

    pub(crate) fn slot(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots
            .get_mut(usize::from(index))
            .filter(|slot| slot.stage != Stage::Free)
    }

    /// Are nearly all slots in use? Then those whose responses have been acknowledged should be freed
    /// before more commands are taken.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.free.len() < self.slots.len() / 8
    }

    /// Is there room for another command, and for the flush of a shutdown?
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.free.len() > 1
    }

    /// Commands in a stage that ends when the transport has let go of their memory.
    pub(crate) fn with_fabric(&self, stage: Stage) -> Vec<u16> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.stage == stage)
            .filter_map(|(index, _)| u16::try_from(index).ok())
            .collect()
    }

    /// Is any command under way?
    pub(crate) fn is_busy(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    /// The command of that identifier, if it has not been answered.
    pub(crate) fn find(&self, cid: Cid) -> Option<u16> {
        let open =
            |slot: &Slot| !matches!(slot.stage, Stage::Free | Stage::Response | Stage::Abandoned);
        let found = self
            .slots
            .iter()
            .position(|slot| slot.cid == cid && open(slot))?;
        u16::try_from(found).ok()
    }

    /// Commands that nobody else will end: those that wait for buffers, for room or for a mate.
    pub(crate) fn waiting(&self) -> Vec<u16> {
        self.matching(|slot| matches!(slot.stage, Stage::Buffers | Stage::Post | Stage::Fused))
    }

    /// The commands for which `wanted` holds.
    pub(crate) fn matching(&self, wanted: impl Fn(&Slot) -> bool) -> Vec<u16> {
        let indexed = self.slots.iter().enumerate();
        indexed
            .filter(|(_, slot)| slot.stage != Stage::Free && wanted(slot))
            .filter_map(|(index, _)| u16::try_from(index).ok())
            .collect()
    }

    /// A command capsule was received: its submission queue entry is free again.
    pub(crate) fn advance_head(&mut self) {
        self.sqhd = if self.sqhd + 1 >= self.entries {
            0
        } else {
            self.sqhd + 1
        };
    }

    /// SQHD for a completion; 0 when the host has turned flow control off.
    pub(crate) fn head(&self) -> u16 {
        if self.flow_control { self.sqhd } else { 0 }
    }

    /// Takes the entry of a command whose data has been fetched.
    pub(crate) fn take_fetching(&mut self, slot: u16) -> Option<[u8; 64]> {
        let at = self.fetching.iter().position(|(owner, _)| *owner == slot)?;
        Some(self.fetching.swap_remove(at).1)
    }

    /// What a Copy command has to do.
    pub(crate) fn copy(&mut self, slot: u16) -> Option<&mut Copy> {
        let found = self.copies.iter_mut().find(|(owner, _)| *owner == slot)?;
        Some(&mut found.1)
    }

    /// Takes the data that a command left aside.
    pub(crate) fn take_spill(&mut self, slot: u16) -> Option<Spill> {
        let at = self.spills.iter().position(|(owner, _)| *owner == slot)?;
        Some(self.spills.swap_remove(at).1)
    }
}

/// A thread's queues.
#[derive(Default)]
pub(crate) struct QueueTable {
    places: Vec<(u32, Option<Box<Queue>>)>,
    free: Vec<u32>,
    len: usize,
}

impl QueueTable {
    /// The key that the next queue gets.
    pub(crate) fn next_key(&self) -> QueueKey {
        let index = self
            .free
            .last()
            .copied()
            .unwrap_or(self.places.len() as u32);
        let generation = self
            .places
            .get(index as usize)
            .map_or(0, |(generation, _)| *generation);
        QueueKey { index, generation }
    }

    /// Adds a queue, whose key came from [`QueueTable::next_key`] just before.
    pub(crate) fn insert(&mut self, queue: Queue) {
        debug_assert_eq!(queue.key, self.next_key());
        let index = queue.key.index as usize;
        if self.free.pop().is_none() {
            self.places.push((0, None));
        }
        if let Some(place) = self.places.get_mut(index) {
            place.1 = Some(Box::new(queue));
            self.len += 1;
        }
    }

    #[inline]
    pub(crate) fn get(&self, key: QueueKey) -> Option<&Queue> {
        let (generation, queue) = self.places.get(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        queue.as_deref()
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: QueueKey) -> Option<&mut Queue> {
        let (generation, queue) = self.places.get_mut(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        queue.as_deref_mut()
    }

    /// By the tag of a device's I/O.
    pub(crate) fn by_tag(&mut self, tag: u64) -> Option<(&mut Queue, u16)> {
        let (generation, queue) = self.places.get_mut((tag >> 40) as usize)?;
        if u64::from(*generation & 0xFF_FFFF) != tag >> 16 & 0xFF_FFFF {
            return None;
        }
        Some((queue.as_deref_mut()?, tag as u16))
    }

    pub(crate) fn remove(&mut self, key: QueueKey) -> Option<Box<Queue>> {
        let (generation, queue) = self.places.get_mut(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        let queue = queue.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(key.index);
        self.len -= 1;
        Some(queue)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.places
            .iter_mut()
            .filter_map(|(_, queue)| queue.as_deref_mut())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use flexins::engine::{Engine, EngineConfig};
    use flexins::verbs::{AckRequest, Framing, QpInit};

    fn queue(key: QueueKey, entries: u16) -> Queue {
        let mut engine = Engine::new(EngineConfig::default(), 1);
        let cq = engine.create_cq(8192).unwrap();
        Queue::new(
            key,
            Fabric::Flexins {
                qpn: Qpn::new(1),
                cq,
                immediate: true,
                segments: Segments::new(8320, Framing::Flexins),
            },
            Announced {
                qid: Qid::new(1),
                entries,
                port: 1,
            },
            SocketAddr::from(([127, 0, 0, 1], 1)),
            8192,
            Budget::new(1).reserve(1).unwrap(),
            Instant::now(),
        )
    }

    /// A command that ends while its data is fetched leaves nothing to the next one in its slot.
    #[test]
    fn a_released_slot_keeps_no_entry() {
        let key = QueueKey {
            index: 0,
            generation: 1,
        };
        let mut queue = queue(key, 32);
        let slot = queue
            .alloc(Slot::new(What::AdminIn, 9, Cid::new(1)))
            .unwrap();
        queue.fetching.push((slot, [1; 64]));
        queue.release(slot).unwrap();
        let next = queue.alloc(Slot::new(What::AdminIn, 9, Cid::new(2)));
        assert_eq!(next, Some(slot));
        assert_eq!(queue.take_fetching(slot), None);
    }

    /// What the budget is charged for a queue is what it takes, and an idle one of usual size takes
    /// less than 64 KiB.
    #[test]
    fn memory_per_queue() {
        for entries in [32, 128, 1024] {
            let mut engine = Engine::new(EngineConfig::default(), 1);
            let pd = engine.alloc_pd();
            let cq = engine.create_cq(8192).unwrap();
            let requests = send_requests_for(entries);
            let init = QpInit {
                pd,
                send_cq: cq,
                recv_cq: cq,
                max_send_wr: requests,
                max_recv_wr: slots_for(entries),
                max_sge: 1,
                max_inline: 16,
                inline_recv: false,
                ack_request: AckRequest::Never,
                user: 0,
            };
            let qpn = engine.create_qp(&init).unwrap();
            let transport = engine.qp_memory_bytes(qpn).unwrap() as u64 + u64::from(requests) * 64;
            let slots = (u64::from(slots_for(entries)) + 1) * (size_of::<Slot>() as u64 + 2);
            let taken = transport + slots + size_of::<Queue>() as u64;
            let charged = queue_bytes(entries);
            println!(
                "{entries} entries: {taken} bytes taken ({transport} by the transport), {charged} charged"
            );
            assert!(taken <= charged, "{entries} entries: {taken} > {charged}");
            assert!(
                charged < taken + taken / 2,
                "{entries} entries: {charged} for {taken}"
            );
            assert!(
                entries > 128 || taken < 64 << 10,
                "{entries} entries: {taken}"
            );
        }
    }

    #[test]
    fn slots_come_back_and_are_found() {
        let key = QueueKey {
            index: 0,
            generation: 0,
        };
        let mut queue = queue(key, 2);
        assert!(!queue.is_busy());
        let slots: Vec<u16> = (0..slots_for(2) as u16 + 1)
            .map(|cid| {
                queue
                    .alloc(Slot::new(What::Read, 2, Cid::new(cid)))
                    .unwrap()
            })
            .collect();
        assert!(queue.alloc(Slot::new(What::Read, 2, Cid::new(9))).is_none());
        assert_eq!(queue.find(Cid::new(3)), Some(slots[3]));
        queue.slot(slots[3]).unwrap().stage = Stage::Response;
        assert_eq!(queue.find(Cid::new(3)), None, "it has been answered");
        queue.slot(slots[3]).unwrap().stage = Stage::Buffers;
        assert_eq!(queue.waiting().len(), slots.len());
        for slot in &slots {
            assert!(queue.release(*slot).is_some());
            assert!(queue.release(*slot).is_none(), "only once");
        }
        assert!(!queue.is_busy());
    }

    /// SQHD wraps with the queue, and is 0 when the host has turned flow control off.
    #[test]
    fn head_wraps() {
        let mut queue = queue(
            QueueKey {
                index: 0,
                generation: 0,
            },
            3,
        );
        let heads: Vec<u16> = (0..4)
            .map(|_| {
                queue.advance_head();
                queue.head()
            })
            .collect();
        assert_eq!(heads, [1, 2, 0, 1]);
        queue.flow_control = false;
        assert_eq!(queue.head(), 0);
    }

    #[test]
    fn keys_of_earlier_queues_name_nothing() {
        let mut table = QueueTable::default();
        let first = table.next_key();
        table.insert(queue(first, 2));
        let tag = first.tag(1);
        assert!(table.get_mut(first).is_some() && table.by_tag(tag).is_some());
        assert!(table.remove(first).is_some());
        let second = table.next_key();
        assert_eq!((second.index, second.generation), (0, 1));
        table.insert(queue(second, 2));
        assert!(table.get_mut(first).is_none() && table.by_tag(tag).is_none());
        assert!(table.remove(first).is_none());
        assert_eq!(QueueKey::from_word(second.to_word()), second);
        assert_eq!(table.len(), 1);
    }
}
