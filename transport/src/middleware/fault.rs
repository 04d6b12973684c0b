//! Faults of a network on purpose: loss, reordering, duplication, corruption and delay of packets.
//!
//! The same seed and the same packets give the same faults. Packets that nothing happens to are
//! passed on where they lie, the others are copied into a bounded store.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::random::SplitMix64;

/// Packets held back at most; beyond it a packet is passed on at once.
const HOLD_PACKETS: usize = 1024;
/// Bytes held back at most.
const HOLD_BYTES: usize = 8 << 20;
/// A packet that is to be overtaken waits for at most so many others ...
const REORDER_PACKETS: u64 = 8;
/// ... and for at most this time, in case that none follow.
const REORDER_TIME: Duration = Duration::from_millis(1);

/// A probability, exact to 2^-32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probability(u64);

impl Probability {
    const ONE: u64 = 1 << 32;

    /// A probability from 0 to 1; `None` for any other number.
    #[must_use]
    pub fn new(value: f64) -> Option<Self> {
        let fraction = (value * Self::ONE as f64) as u64;
        (0.0..=1.0).contains(&value).then_some(Self(fraction))
    }

    /// The probability as a number from 0 to 1.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0 as f64 / Self::ONE as f64
    }

    fn happens(self, random: &mut SplitMix64) -> bool {
        // Always draws, so that one probability does not shift the sequence of another.
        u64::from(random.next_u32()) < self.0
    }
}

/// What is done to packets. Written and parsed as words:
/// `loss=0.01,reorder=1%,duplicate=0.001,corrupt=0.001,delay=0.01,delay_us=500,seed=7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultConfig {
    /// Packets that vanish.
    pub loss: Probability,
    /// Packets that are overtaken by a few later ones.
    pub reorder: Probability,
    /// Packets that come twice.
    pub duplicate: Probability,
    /// Packets of which one bit is flipped.
    pub corrupt: Probability,
    /// Packets that come later, by a random time up to `delay_max`.
    pub delay: Probability,
    /// Longest delay.
    pub delay_max: Duration,
    /// Seed of all decisions.
    pub seed: u64,
}

impl Default for FaultConfig {
    fn default() -> Self {
        Self {
            loss: Probability::default(),
            reorder: Probability::default(),
            duplicate: Probability::default(),
            corrupt: Probability::default(),
            delay: Probability::default(),
            delay_max: Duration::from_micros(500),
            seed: 0,
        }
    }
}

/// Why words do not describe faults.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultParseError {
    /// A word without `=`.
    #[error("\"{0}\" is not of the form name=value")]
    Form(String),
    /// A word that is not known.
    #[error(
        "fault \"{0}\" is not known: use loss, reorder, duplicate, corrupt, delay, delay_us, seed"
    )]
    Name(String),
    /// A value that does not fit its word.
    #[error("{name}={value}: {expected}")]
    Value {
        /// The word.
        name: String,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl FromStr for FaultConfig {
    type Err = FaultParseError;

    fn from_str(words: &str) -> Result<Self, Self::Err> {
        let mut config = Self::default();
        for word in words.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let (name, value) = word
                .split_once('=')
                .ok_or_else(|| FaultParseError::Form(word.to_owned()))?;
            let wrong = |expected| FaultParseError::Value {
                name: name.to_owned(),
                value: value.to_owned(),
                expected,
            };
            let probability = || {
                parse_probability(value).ok_or_else(|| wrong("give a number from 0 to 1, or 1%"))
            };
            let integer = || {
                let parsed = value.parse::<u64>().ok();
                parsed.ok_or_else(|| wrong("give a whole number"))
            };
            match name {
                "loss" => config.loss = probability()?,
                "reorder" => config.reorder = probability()?,
                "duplicate" => config.duplicate = probability()?,
                "corrupt" => config.corrupt = probability()?,
                "delay" => config.delay = probability()?,
                "delay_us" => config.delay_max = Duration::from_micros(integer()?),
                "seed" => config.seed = integer()?,
                _ => return Err(FaultParseError::Name(name.to_owned())),
            }
        }
        Ok(config)
    }
}

impl fmt::Display for FaultConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, probability) in [
            ("loss", self.loss),
            ("reorder", self.reorder),
            ("duplicate", self.duplicate),
            ("corrupt", self.corrupt),
            ("delay", self.delay),
        ] {
            if probability != Probability::default() {
                write!(f, "{name}={},", probability.get())?;
            }
        }
        let (delay_us, seed) = (self.delay_max.as_micros(), self.seed);
        write!(f, "delay_us={delay_us},seed={seed}")
    }
}

/// What was done so far (packets).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounters {
    /// Packets taken.
    pub packets: u64,
    /// Packets that vanished.
    pub lost: u64,
    /// Packets held back to be overtaken.
    pub reordered: u64,
    /// Packets passed on twice.
    pub duplicated: u64,
    /// Packets with a flipped bit.
    pub corrupted: u64,
    /// Packets held back for a time.
    pub delayed: u64,
    /// Packets that were to be held back, but the store was full.
    pub hold_full: u64,
}

/// The faults of one direction of one endpoint.
#[derive(Debug)]
pub struct FaultInjector {
    config: FaultConfig,
    random: SplitMix64,
    held: Vec<Held>,
    held_bytes: usize,
    spare: Vec<Vec<u8>>,
    counters: FaultCounters,
}

#[derive(Debug)]
struct Held {
    due: Instant,
    /// Also due when so many packets were taken.
    due_packets: u64,
    address: SocketAddr,
    bytes: Vec<u8>,
}

impl FaultInjector {
    /// Faults as configured.
    #[must_use]
    pub fn new(config: FaultConfig) -> Self {
        Self {
            config,
            random: SplitMix64::new(config.seed),
            held: Vec::new(),
            held_bytes: 0,
            spare: Vec::new(),
            counters: FaultCounters::default(),
        }
    }

    /// Takes a packet from (or to) `address` and gives `deliver` what comes out now: the packet,
    /// nothing, it twice, a damaged copy, earlier packets whose time has come.
    pub fn apply(
        &mut self,
        now: Instant,
        address: SocketAddr,
        packet: &[u8],
        deliver: &mut dyn FnMut(SocketAddr, &[u8]),
    ) {
        self.counters.packets += 1;
        let random = &mut self.random;
        let lost = self.config.loss.happens(random);
        let duplicated = self.config.duplicate.happens(random);
        let corrupted = self.config.corrupt.happens(random);
        let delayed = self.config.delay.happens(random);
        let reordered = self.config.reorder.happens(random);
        if lost {
            self.counters.lost += 1;
        } else {
            if duplicated {
                self.counters.duplicated += 1;
                deliver(address, packet);
            }
            if corrupted || delayed || reordered {
                let mut bytes = self.spare.pop().unwrap_or_default();
                bytes.clear();
                bytes.extend_from_slice(packet);
                if corrupted {
                    self.corrupt(&mut bytes);
                }
                self.hold_or_deliver(now, address, bytes, delayed, reordered, deliver);
            } else {
                deliver(address, packet);
            }
        }
        self.poll(now, deliver);
    }

    /// Gives `deliver` the packets held back whose time has come.
    pub fn poll(&mut self, now: Instant, deliver: &mut dyn FnMut(SocketAddr, &[u8])) {
        let packets = self.counters.packets;
        let mut at = 0;
        while let Some(held) = self.held.get(at) {
            if held.due > now && held.due_packets > packets {
                at += 1;
                continue;
            }
            let held = self.held.remove(at);
            self.held_bytes -= held.bytes.len();
            deliver(held.address, &held.bytes);
            self.recycle(held.bytes);
        }
    }

    /// When [`Self::poll`] wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.held.iter().map(|held| held.due).min()
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> &FaultCounters {
        &self.counters
    }

    /// What is configured.
    #[must_use]
    pub fn config(&self) -> &FaultConfig {
        &self.config
    }

    fn corrupt(&mut self, bytes: &mut [u8]) {
        let bit = self.random.below(bytes.len() as u64 * 8);
        if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
            *byte ^= 1 << (bit % 8);
            self.counters.corrupted += 1;
        }
    }

    fn hold_or_deliver(
        &mut self,
        now: Instant,
        address: SocketAddr,
        bytes: Vec<u8>,
        delayed: bool,
        reordered: bool,
        deliver: &mut dyn FnMut(SocketAddr, &[u8]),
    ) {
        let full = self.held.len() >= HOLD_PACKETS || self.held_bytes + bytes.len() > HOLD_BYTES;
        if !(delayed || reordered) || full {
            self.counters.hold_full += u64::from(full && (delayed || reordered));
            deliver(address, &bytes);
            self.recycle(bytes);
            return;
        }
        let (due, due_packets) = if delayed {
            self.counters.delayed += 1;
            let max_ns = u64::try_from(self.config.delay_max.as_nanos()).unwrap_or(u64::MAX);
            (
                now + Duration::from_nanos(self.random.below(max_ns)),
                u64::MAX,
            )
        } else {
            self.counters.reordered += 1;
            let behind = 1 + self.random.below(REORDER_PACKETS);
            (now + REORDER_TIME, self.counters.packets + behind)
        };
        self.held_bytes += bytes.len();
        self.held.push(Held {
            due,
            due_packets,
            address,
            bytes,
        });
    }

    fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < 64 {
            self.spare.push(bytes);
        }
    }
}

fn parse_probability(value: &str) -> Option<Probability> {
    match value.strip_suffix('%') {
        Some(percent) => Probability::new(percent.trim().parse::<f64>().ok()? / 100.0),
        None => Probability::new(value.parse().ok()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 4791))
    }

    /// Numbered packets through an injector, a microsecond apart, then until it is empty.
    fn run(config: FaultConfig, count: u32) -> (Vec<Vec<u8>>, FaultCounters) {
        let mut injector = FaultInjector::new(config);
        let mut out = Vec::new();
        let mut now = Instant::now();
        for number in 0..count {
            now += Duration::from_micros(1);
            let mut packet = [0; 64];
            packet[..4].copy_from_slice(&number.to_be_bytes());
            injector.apply(now, address(), &packet, &mut |_, p| out.push(p.to_vec()));
        }
        while let Some(at) = injector.next_timeout() {
            injector.poll(at, &mut |_, p| out.push(p.to_vec()));
        }
        assert_eq!(injector.held_bytes, 0);
        (out, *injector.counters())
    }

    fn numbers(packets: &[Vec<u8>]) -> Vec<u32> {
        let number = |p: &Vec<u8>| u32::from_be_bytes([p[0], p[1], p[2], p[3]]);
        packets.iter().map(number).collect()
    }

    #[test]
    fn nothing_configured_changes_nothing() {
        let (out, counters) = run(FaultConfig::default(), 1000);
        assert_eq!(numbers(&out), (0..1000).collect::<Vec<_>>());
        let packets = 1000;
        assert_eq!(
            counters,
            FaultCounters {
                packets,
                ..FaultCounters::default()
            }
        );
    }

    #[test]
    fn frequencies_are_as_asked_and_seeds_repeat() {
        let config: FaultConfig = "loss=0.1,duplicate=0.05,corrupt=2%,reorder=0.2,delay=0.1,seed=3"
            .parse()
            .unwrap();
        let (out, counters) = run(config, 20_000);
        for (count, expected) in [
            (counters.lost, 2000.0),
            (counters.duplicated, 20_000.0 * 0.9 * 0.05),
            (counters.corrupted, 20_000.0 * 0.9 * 0.02),
            (counters.delayed, 20_000.0 * 0.9 * 0.1),
            (counters.reordered, 20_000.0 * 0.9 * 0.9 * 0.2),
        ] {
            assert!(
                (count as f64 / expected - 1.0).abs() < 0.2,
                "{count} {expected}"
            );
        }
        assert_eq!(
            out.len() as u64,
            20_000 - counters.lost + counters.duplicated
        );
        assert_eq!(run(config, 20_000), (out, counters));
        assert_ne!(run(FaultConfig { seed: 4, ..config }, 20_000).1, counters);
    }

    #[test]
    fn reordering_is_short_and_loses_nothing() {
        let (out, counters) = run("reorder=0.1,seed=1".parse().unwrap(), 5000);
        let numbers = numbers(&out);
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..5000).collect::<Vec<_>>());
        assert_ne!(numbers, sorted);
        for (at, number) in numbers.iter().enumerate() {
            assert!(at.abs_diff(*number as usize) <= 2 * REORDER_PACKETS as usize);
        }
        assert!(counters.reordered > 300);
    }

    #[test]
    fn corruption_flips_one_bit() {
        let (out, _) = run("corrupt=1".parse().unwrap(), 100);
        for (number, packet) in out.iter().enumerate() {
            let mut expected = [0; 64];
            expected[..4].copy_from_slice(&(number as u32).to_be_bytes());
            let flipped: u32 = packet
                .iter()
                .zip(expected)
                .map(|(a, b)| (a ^ b).count_ones())
                .sum();
            assert_eq!(flipped, 1);
        }
        let mut injector = FaultInjector::new("corrupt=1".parse().unwrap());
        injector.apply(Instant::now(), address(), &[], &mut |_, p| {
            assert!(p.is_empty())
        });
    }

    #[test]
    fn the_store_is_bounded() {
        let mut injector = FaultInjector::new("delay=1,delay_us=1000000".parse().unwrap());
        let now = Instant::now();
        let mut out = 0;
        for _ in 0..2000 {
            injector.apply(now, address(), &[0; 60_000], &mut |_, _| out += 1);
        }
        assert!(injector.held_bytes <= HOLD_BYTES);
        assert_eq!(out as u64, injector.counters().hold_full);
        assert!(out > 1800);
    }

    #[test]
    fn words_that_are_wrong_are_named() {
        let error = |words: &str| words.parse::<FaultConfig>().unwrap_err().to_string();
        assert_eq!(error("loss"), "\"loss\" is not of the form name=value");
        assert!(error("los=1").starts_with("fault \"los\" is not known"));
        assert_eq!(error("loss=2"), "loss=2: give a number from 0 to 1, or 1%");
        assert_eq!(
            error("loss=NaN"),
            "loss=NaN: give a number from 0 to 1, or 1%"
        );
        assert_eq!(error("seed=-1"), "seed=-1: give a whole number");
        assert_eq!("".parse(), Ok(FaultConfig::default()));
    }

    proptest! {
        #[test]
        fn words_round_trip(p in proptest::array::uniform5(0.0_f64..=1.0), us in 0_u64..1_000_000, seed in any::<u64>()) {
            let p = p.map(|value| Probability::new(value).unwrap());
            let config = FaultConfig {
                loss: p[0], reorder: p[1], duplicate: p[2], corrupt: p[3], delay: p[4],
                delay_max: Duration::from_micros(us), seed,
            };
            prop_assert_eq!(config.to_string().parse(), Ok(config));
        }
    }
}
