//! Tests of a pipe's two sides, in one thread and in two.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory};
use proptest::prelude::*;

use super::*;
use crate::middleware::random::SplitMix64;

fn ring(capacity: u32) -> Ring {
    let len = Ring::len_bytes(capacity);
    let memory = SharedMemory::create("pipe-test", len, HugePages::No).unwrap();
    Ring::create(&memory, 0, capacity).unwrap()
}

fn producer(ring: &Ring) -> Producer {
    Producer::attach(ring.clone(), Box::new(EventFd::new().unwrap()))
}

fn pair(capacity: u32) -> (Producer, Consumer) {
    let ring = ring(capacity);
    (producer(&ring), Consumer::attach(ring))
}

/// Message of any length with a number in it; the length is not part of the pipe's format.
fn message(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; len.max(6)];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    let len = bytes.len() as u16;
    bytes[4..6].copy_from_slice(&len.to_le_bytes());
    bytes
}

fn check(number: u32, received: &[u8]) {
    let len = usize::from(u16::from_le_bytes([received[4], received[5]]));
    assert_eq!(received[..len], message(number, len), "message {number}");
    assert_eq!(
        received.len(),
        len.div_ceil(ENTRY_PAYLOAD_BYTES) * ENTRY_PAYLOAD_BYTES
    );
    assert!(received[len..].iter().all(|&byte| byte == 0));
}

#[test]
fn messages_of_every_length_arrive_in_order() {
    let (mut producer, mut consumer) = pair(8);
    for number in 0..2000 {
        let len = number as usize % (MESSAGE_LEN_MAX_BYTES + 1);
        producer.push(&message(number, len)).unwrap();
        producer.flush().unwrap();
        check(number, consumer.pop().unwrap().unwrap());
        assert_eq!(consumer.pop(), Ok(None));
    }
    assert_eq!(
        producer.push(&[0; MESSAGE_LEN_MAX_BYTES + 1]),
        Err(PipeError::TooLong(MESSAGE_LEN_MAX_BYTES + 1))
    );
}

#[test]
fn nothing_is_visible_before_a_flush_and_credits_never_overflow() {
    let (mut producer, mut consumer) = pair(8);
    assert_eq!(producer.credits(), Ok(8));
    for number in 0..8 {
        producer.push(&message(number, 10)).unwrap();
    }
    assert_eq!(consumer.pop(), Ok(None));
    // Full: and that has flushed, or both would wait for ever.
    assert_eq!(producer.push(&[1]), Err(PipeError::Full));
    for number in 0..8 {
        check(number, consumer.pop().unwrap().unwrap());
        if number == 0 {
            // One taken, a quarter ring not reached: not given back yet.
            assert_eq!(producer.push(&[1]), Err(PipeError::Full));
        }
    }
    assert_eq!(producer.credits(), Ok(8));
    assert_eq!(producer.stats().entries, 8);
    assert_eq!(producer.stats().batches, 1);
}

#[test]
fn full_batches_move_by_themselves() {
    let (mut producer, mut consumer) = pair(64);
    for number in 0..20 {
        producer.push(&message(number, 10)).unwrap();
    }
    assert_eq!(producer.stats().batches, 1);
    for number in 0..16 {
        check(number, consumer.pop().unwrap().unwrap());
    }
    assert_eq!(consumer.pop(), Ok(None));
    producer.flush().unwrap();
    check(16, consumer.pop().unwrap().unwrap());
}

#[test]
fn a_restarted_producer_is_noticed_and_nothing_old_is_taken() {
    let ring = ring(16);
    let mut consumer = Consumer::attach(ring.clone());
    for life in 0..200_u32 {
        let mut producer = producer(&ring);
        // Restarted only from the second life on; told once, though it may take some polls.
        let mut told = 0;
        for _ in 0..1000 {
            match consumer.pop() {
                Ok(None) => {}
                // What the earlier producer had finished, and only until we are told.
                Ok(Some(old)) if told == 0 => {
                    let number = u32::from_le_bytes([old[0], old[1], old[2], old[3]]);
                    assert_eq!(number / 100, life - 1);
                }
                Err(PipeError::Restarted) => told += 1,
                other => panic!("life {life}: {other:?}"),
            }
        }
        assert_eq!(told, u32::from(life > 0), "life {life}");
        for number in 0..10 + life % 5 {
            producer.push(&message(life * 100 + number, 20)).unwrap();
        }
        producer.flush().unwrap();
        for number in 0..5 {
            check(life * 100 + number, consumer.pop().unwrap().unwrap());
        }
        // Killed: it says no goodbye; in odd lives most of what it wrote is not taken yet.
        std::mem::forget(producer);
        while consumer.pop().unwrap().is_some_and(|_| life % 2 == 0) {}
    }
}

#[test]
fn a_restarted_consumer_is_noticed_and_gets_nothing_old() {
    let ring = ring(16);
    let mut producer = producer(&ring);
    for life in 0..200_u32 {
        let mut consumer = Consumer::attach(ring.clone());
        if life % 7 == 3 {
            // Twice in a row, before the producer has looked.
            std::mem::forget(consumer);
            consumer = Consumer::attach(ring.clone());
        }
        let expected = if life == 0 {
            Ok(16)
        } else {
            Err(PipeError::Restarted)
        };
        assert_eq!(producer.credits(), expected, "life {life}");
        if life > 0 {
            assert_eq!(producer.credits(), Ok(0), "not acknowledged yet");
            assert_eq!(producer.push(&[1]), Err(PipeError::Full));
        }
        assert_eq!(consumer.pop(), Ok(None));
        for number in 0..12 {
            producer.push(&message(life * 100 + number, 20)).unwrap();
        }
        producer.flush().unwrap();
        for number in 0..life % 12 {
            check(life * 100 + number, consumer.pop().unwrap().unwrap());
        }
        std::mem::forget(consumer);
    }
}

#[test]
fn each_side_learns_that_the_other_is_gone_after_what_was_sent() {
    let (mut producer, mut consumer) = pair(8);
    producer.credits().unwrap();
    producer.push(&message(0, 10)).unwrap();
    drop(producer);
    check(0, consumer.pop().unwrap().unwrap());
    assert_eq!(consumer.pop(), Err(PipeError::Closed));

    let (mut producer, consumer) = pair(8);
    producer.credits().unwrap();
    drop(consumer);
    producer.push(&[1]).unwrap();
    assert_eq!(producer.flush(), Err(PipeError::Closed));
    assert_eq!(producer.credits(), Err(PipeError::Closed));
}

#[test]
fn a_ring_is_opened_by_its_other_side_and_checked() {
    let memory = SharedMemory::create("pipe-test", 1 << 16, HugePages::No).unwrap();
    assert!(matches!(
        Ring::open(&memory, 4096),
        Err(PipeError::Corrupt(_))
    ));
    let ring = Ring::create(&memory, 4096, 64).unwrap();
    assert_eq!(Ring::open(&memory, 4096).unwrap().capacity(), 64);
    assert!(Ring::create(&memory, 4097, 64).is_err());
    assert!(Ring::create(&memory, 0, 63).is_err());
    assert!(Ring::create(&memory, 0, 1024).is_err());
    assert!(Ring::create(&memory, u64::MAX - 63, 8).is_err());
    drop(memory);
    let mut producer = producer(&ring);
    assert_eq!(producer.push(&message(1, 10)), Err(PipeError::Full));
    let mut consumer = Consumer::attach(ring);
    producer.push(&message(1, 10)).unwrap();
    producer.flush().unwrap();
    check(1, consumer.pop().unwrap().unwrap());
}

proptest! {
    /// Whatever stands in the shared memory, the sides neither panic nor loop.
    #[test]
    fn foreign_bytes_do_no_harm(seed in any::<u64>()) {
        let len = Ring::len_bytes(8);
        let memory = SharedMemory::create("pipe-test", len, HugePages::No).unwrap();
        let ring = Ring::create(&memory, 0, 8).unwrap();
        let mut producer = producer(&ring);
        let mut consumer = Consumer::attach(ring);
        let mut random = SplitMix64::new(seed);
        for _ in 0..200 {
            let at = 64 + random.below(len - 64);
            memory.span(at, 1).unwrap().copy_from_slice(&[random.next_u64() as u8]);
            let _ = producer.push(&[1; 100]);
            let _ = producer.flush();
            let _ = consumer.pop();
            let _ = consumer.has_something();
        }
    }
}

/// Two threads with random pauses and batches: every message arrives once and in order, and a
/// consumer that sleeps is woken.
#[test]
fn no_entry_and_no_wake_up_is_lost() {
    for seed in 0..8 {
        let ring = ring(16);
        let bell = EventFd::new().unwrap();
        let mut producer = Producer::attach(ring.clone(), Box::new(bell.clone()));
        let count = 20_000_u32;
        let sender = std::thread::spawn(move || {
            let mut random = SplitMix64::new(seed);
            let mut number = 0;
            while number < count {
                let len = random.below(200) as usize;
                match producer.push(&message(number, len)) {
                    Ok(()) => number += 1,
                    Err(PipeError::Full) => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
                if random.below(4) == 0 {
                    producer.flush().unwrap();
                    match random.below(64) {
                        0 => std::thread::sleep(Duration::from_micros(random.below(300))),
                        1..8 => std::thread::yield_now(),
                        _ => {}
                    }
                }
            }
            producer.flush().unwrap();
            *producer.stats()
        });
        let mut consumer = Consumer::attach(ring);
        let mut random = SplitMix64::new(seed + 1000);
        let mut sleeps = 0;
        let mut declarations = 0;
        let mut number = 0;
        loop {
            match consumer.pop() {
                Ok(Some(received)) => {
                    check(number, received);
                    number += 1;
                }
                Ok(None) if random.below(3) == 0 => {
                    declarations += 1;
                    if consumer.prepare_sleep() {
                        sleeps += 1;
                        let started = Instant::now();
                        let rung = bell.wait(Some(Duration::from_secs(20))).unwrap();
                        assert!(rung, "seed {seed}: asleep for {:?}", started.elapsed());
                        consumer.awake();
                    }
                }
                Ok(None) => std::hint::spin_loop(),
                Err(PipeError::Closed) => break,
                Err(error) => panic!("seed {seed}: {error}"),
            }
        }
        let stats = sender.join().unwrap();
        assert_eq!(number, count);
        assert_eq!(stats.messages, u64::from(count));
        // The last ring may be that of the drop.
        assert!(stats.doorbells + 1 >= sleeps && stats.doorbells <= declarations);
        assert!(sleeps > 0);
    }
}

#[test]
fn the_doorbell_is_silent_while_the_consumer_is_awake() {
    let (mut producer, mut consumer) = pair(64);
    producer.credits().unwrap();
    for number in 0..1000 {
        producer.push(&message(number, 10)).unwrap();
        producer.flush().unwrap();
        check(number, consumer.pop().unwrap().unwrap());
        let _ = producer.credits();
    }
    assert_eq!(producer.stats().doorbells, 0);
    while consumer.pop().unwrap().is_some() {}
    assert!(consumer.prepare_sleep());
    producer.push(&message(0, 10)).unwrap();
    producer.flush().unwrap();
    producer.push(&message(1, 10)).unwrap();
    producer.flush().unwrap();
    assert_eq!(producer.stats().doorbells, 1);
    assert!(!consumer.prepare_sleep());
}

#[test]
fn an_eventfd_waits_and_takes() {
    let bell = Arc::new(EventFd::new().unwrap());
    assert!(!bell.wait(Some(Duration::from_millis(1))).unwrap());
    bell.ring();
    bell.ring();
    assert!(bell.wait(None).unwrap());
    assert!(!bell.wait(Some(Duration::ZERO)).unwrap());
}
