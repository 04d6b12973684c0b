//! The flight recorder: what has happened lately, for afterwards. Each data thread writes into rings of
//! its own with plain stores; whoever wants to know (the telemetry log pages, management) reads them at
//! any time and passes over an entry that is being written.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use flexblk_nvme::{HostId, Nqn};

/// Entries of a ring.
const ENTRIES: usize = 512;
/// Words of an entry: its number, then the event.
const WORDS: usize = 9;
/// Most events that are told at once, the newest.
pub const MAX_EVENTS: usize = 1024;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A controller was connected.
    Connect = 1,
    /// An I/O queue was connected.
    ConnectQueue,
    /// Connect was refused: `status`.
    ConnectRefused,
    /// A controller has ended.
    Disconnect,
    /// No command within the keep-alive time-out.
    KeepAliveExpired,
    /// No command for two minutes while the Keep Alive Timer was not active: the controller was not
    /// enabled, was shut down, or is a discovery controller.
    Idle,
    /// Keep Alive is off, and the host's transport was silent for too long.
    Silence,
    /// The subsystem, its listener, or the host's right to it was taken away.
    NotAllowed,
    /// The host has disabled the controller, which closes its I/O queues.
    Reset,
    /// The host has shut the controller down.
    Shutdown,
    /// An Abort command was answered; `value` is 1 when the command was aborted.
    Abort,
    /// A command has failed: `status`; `value` is its first block.
    Error,
    /// A command took longer than the limit for slow ones; `value` is microseconds.
    SlowIo,
    /// The peer has broken the protocol of an NVMe/TCP connection, which ends with it: `value` is the
    /// Fatal Error Status (TCP 3.6.2.4), 0 when the peer is not told.
    ProtocolError,
}

impl Kind {
    const ALL: [(Self, &'static str); 14] = [
        (Self::Connect, "connect"),
        (Self::ConnectQueue, "connect-queue"),
        (Self::ConnectRefused, "connect-refused"),
        (Self::Disconnect, "disconnect"),
        (Self::KeepAliveExpired, "keep-alive-expired"),
        (Self::Idle, "idle"),
        (Self::Silence, "silence"),
        (Self::NotAllowed, "not-allowed"),
        (Self::Reset, "reset"),
        (Self::Shutdown, "shutdown"),
        (Self::Abort, "abort"),
        (Self::Error, "error"),
        (Self::SlowIo, "slow-io"),
        (Self::ProtocolError, "protocol-error"),
    ];

    fn from_raw(raw: u8) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|(kind, _)| *kind as u8 == raw)
            .map(|(kind, _)| *kind)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(kind, _)| *kind == self);
        found.map_or("", |(_, name)| name)
    }

    /// Is it of a single command, or of whoever only connects? There may be many of these, and they must
    /// not push the others out.
    fn is_frequent(self) -> bool {
        matches!(
            self,
            Self::Abort | Self::Error | Self::SlowIo | Self::ProtocolError
        )
    }

    /// Has a host lost its controller or a connection without having asked for it?
    #[must_use]
    pub fn is_loss(self) -> bool {
        matches!(
            self,
            Self::KeepAliveExpired
                | Self::Idle
                | Self::Silence
                | Self::NotAllowed
                | Self::ProtocolError
        )
    }
}

/// An event; what does not apply is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Microseconds since the target's start.
    pub at_us: u64,
    /// What.
    pub kind: Kind,
    /// Opcode of the command.
    pub opcode: u8,
    /// Queue.
    pub qid: u16,
    /// Controller.
    pub cntlid: u16,
    /// Status of the completion, without the phase tag.
    pub status: u16,
    /// Command.
    pub cid: u16,
    /// Namespace.
    pub nsid: u32,
    /// A number that goes with the kind.
    pub value: u64,
    /// Where the host sends from.
    pub peer: SocketAddr,
    /// Tells hosts apart: [`host_tag`].
    pub host: u64,
}

impl Event {
    /// An event of that kind, without anything.
    #[must_use]
    pub fn new(kind: Kind, peer: SocketAddr) -> Self {
        Self {
            at_us: 0,
            kind,
            opcode: 0,
            qid: 0,
            cntlid: 0,
            status: 0,
            cid: 0,
            nsid: 0,
            value: 0,
            peer,
            host: 0,
        }
    }

    fn to_words(self) -> [u64; WORDS - 1] {
        let ip = match self.peer.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let ip = ip.to_bits();
        [
            self.at_us,
            u64::from(self.kind as u8)
                | u64::from(self.opcode) << 8
                | u64::from(self.qid) << 16
                | u64::from(self.cntlid) << 32
                | u64::from(self.status) << 48,
            u64::from(self.cid) | u64::from(self.peer.port()) << 16 | u64::from(self.nsid) << 32,
            self.value,
            (ip >> 64) as u64,
            ip as u64,
            self.host,
            0,
        ]
    }

    fn from_words(words: &[u64; WORDS - 1]) -> Option<Self> {
        let [at_us, what, command, value, high, low, host, _] = *words;
        let ip = Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
        Some(Self {
            at_us,
            kind: Kind::from_raw(what as u8)?,
            opcode: (what >> 8) as u8,
            qid: (what >> 16) as u16,
            cntlid: (what >> 32) as u16,
            status: (what >> 48) as u16,
            cid: command as u16,
            nsid: (command >> 32) as u32,
            value,
            peer: SocketAddr::new(ip.to_canonical(), (command >> 16) as u16),
            host,
        })
    }
}

/// A number for a host, by which its events are found. It means nothing in another process.
#[must_use]
pub fn host_tag(hostnqn: &Nqn, hostid: HostId) -> u64 {
    let mut hasher = DefaultHasher::new();
    (hostnqn.as_str(), hostid.to_bytes()).hash(&mut hasher);
    hasher.finish()
}

#[derive(Debug)]
struct Ring {
    entries: Box<[[AtomicU64; WORDS]]>,
    /// Events ever written; of the writer.
    count: AtomicU64,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            entries: (0..ENTRIES)
                .map(|_| std::array::from_fn(|_| AtomicU64::new(0)))
                .collect(),
            count: AtomicU64::new(0),
        }
    }
}

impl Ring {
    fn write(&self, event: Event) {
        let number = self.count.load(Ordering::Relaxed);
        let Some(entry) = self.entries.get(number as usize % ENTRIES) else {
            return;
        };
        let [own, words @ ..] = entry;
        // A reader that sees one of the new words sees this 0, or the number at the end.
        own.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, value) in words.iter().zip(event.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        own.store(number + 1, Ordering::Release);
        self.count.store(number + 1, Ordering::Relaxed);
    }

    fn read(&self) -> impl Iterator<Item = Event> {
        self.entries.iter().filter_map(|[own, words @ ..]| {
            let before = own.load(Ordering::Acquire);
            let mut copy = [0; WORDS - 1];
            for (copy, word) in copy.iter_mut().zip(words) {
                *copy = word.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            (before != 0 && own.load(Ordering::Relaxed) == before)
                .then(|| Event::from_words(&copy))?
        })
    }
}

/// The rings of a thread: one for what happens to controllers, one for what is frequent.
#[derive(Debug, Default)]
pub struct Recorder {
    controllers: Ring,
    frequent: Ring,
}

impl Recorder {
    /// Notes an event. Only the thread whose recorder it is may.
    pub fn record(&self, event: Event) {
        match event.kind.is_frequent() {
            true => self.frequent.write(event),
            false => self.controllers.write(event),
        }
    }

    /// What is in the rings.
    pub fn read(&self) -> impl Iterator<Item = Event> {
        self.controllers.read().chain(self.frequent.read())
    }
}

/// The newest events of all threads that `which` wants, oldest first, with their threads.
#[must_use]
pub fn collect(recorders: &[Recorder], which: impl Fn(&Event) -> bool) -> Vec<(usize, Event)> {
    let threads = recorders.iter().enumerate();
    let mut events: Vec<(usize, Event)> = threads
        .flat_map(|(thread, recorder)| recorder.read().map(move |event| (thread, event)))
        .filter(|(_, event)| which(event))
        .collect();
    events.sort_by_key(|(_, event)| event.at_us);
    events.drain(..events.len().saturating_sub(MAX_EVENTS));
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    fn event(kind: Kind, value: u64) -> Event {
        Event {
            at_us: value,
            value,
            nsid: value as u32,
            host: value,
            ..Event::new(kind, ([127, 0, 0, 1], 4420).into())
        }
    }

    proptest! {
        #[test]
        fn words_say_it_all(
            (at_us, value, host) in any::<(u64, u64, u64)>(), kind in 1..=Kind::ALL.len() as u8,
            (opcode, qid, cntlid, status, cid) in any::<(u8, u16, u16, u16, u16)>(),
            nsid in any::<u32>(), (ip, port) in any::<(u32, u16)>(),
        ) {
            let event = Event {
                at_us, kind: Kind::from_raw(kind).unwrap(), opcode, qid, cntlid, status, cid, nsid, value,
                peer: SocketAddr::new(std::net::Ipv4Addr::from_bits(ip).into(), port), host,
            };
            prop_assert_eq!(Event::from_words(&event.to_words()), Some(event));
        }
    }

    /// A flood of failed commands leaves what happened to controllers; the newest stay, in order.
    #[test]
    fn the_newest_stay() {
        let recorders = [Recorder::default(), Recorder::default()];
        recorders[1].record(event(Kind::Connect, 1));
        for at in 2..3000 {
            recorders[0].record(event(Kind::Error, at));
        }
        let events = collect(&recorders, |_| true);
        assert_eq!(events.len(), ENTRIES + 1);
        assert_eq!(events[0].0, 1);
        assert_eq!(events[0].1.kind, Kind::Connect);
        assert_eq!(events[1].1.at_us, 3000 - ENTRIES as u64);
        assert_eq!(events.last().unwrap().1.at_us, 2999);
        assert!(collect(&recorders, |event| event.host == 1).len() == 1);
    }

    /// Whoever reads while the thread writes sees whole events only.
    #[test]
    fn no_event_is_torn() {
        let recorder = Recorder::default();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for at in 1.. {
                    recorder.record(event(Kind::Error, at));
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let mut seen = 0;
            while seen < 100_000 {
                for event in recorder.read() {
                    assert_eq!((event.value, event.host), (event.at_us, event.at_us));
                    assert_eq!(event.nsid, event.at_us as u32);
                    seen += 1;
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
