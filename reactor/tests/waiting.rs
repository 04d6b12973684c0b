//! Sleeping, waking, timers, mailboxes, and what an idle thread costs.
#![allow(unsafe_code)]

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flexblk_reactor::mailbox::{self, TrySendError};
use flexblk_reactor::{Config, Features, Op, Polled, Reactor, Token, Wait};

fn features() -> [Features; 2] {
    [Features::ALL, Features::NONE]
}

fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_idle_reactor_costs_less_than_one_percent_of_a_core() {
    for wanted in features() {
        let mut reactor = Reactor::with_features(&Config::default(), &wanted).unwrap();
        let mut out = Vec::new();
        let start = Instant::now();
        let cpu = thread_cpu_time();
        // A target's housekeeping: a timer every 100 ms, spinning for the budget after each.
        reactor.arm(start + Duration::from_millis(100), Token::new(1, 0));
        let mut ticks = 0;
        while start.elapsed() < Duration::from_secs(2) {
            reactor
                .turn(Wait::Until(start + Duration::from_secs(2)), &mut out)
                .unwrap();
            for completion in out.drain(..) {
                assert!(completion.flags.timer());
                ticks += 1;
                reactor.arm(reactor.now() + Duration::from_millis(100), Token::new(1, 0));
            }
        }
        let used = thread_cpu_time() - cpu;
        assert!(used < Duration::from_millis(20), "{used:?} of 2 s");
        assert!((15..=20).contains(&ticks), "{ticks} ticks");
        let stats = reactor.stats();
        assert!(stats.slept > Duration::from_millis(1900), "{stats:?}");
        assert!(stats.sleeps < 100, "{stats:?}");
    }
}

#[test]
fn timers_fire_in_order_not_early_and_not_late() {
    for wanted in features() {
        let mut reactor = Reactor::with_features(&Config::default(), &wanted).unwrap();
        let start = Instant::now();
        let after = |ms: u64| start + Duration::from_millis(ms);
        for ms in [30, 10, 20] {
            reactor.arm(after(ms), Token::new(1, ms));
        }
        let gone = reactor.arm(after(15), Token::new(1, 15));
        assert!(reactor.disarm(gone) && !reactor.disarm(gone));
        let mut fired = Vec::new();
        while fired.len() < 3 {
            let mut out = Vec::new();
            reactor.turn(Wait::Adaptive, &mut out).unwrap();
            for completion in out {
                let late = Instant::now().saturating_duration_since(after(completion.token.slot()));
                assert!(Instant::now() >= after(completion.token.slot()), "early");
                assert!(late < Duration::from_millis(500), "{late:?} late");
                fired.push(completion.token.slot());
            }
        }
        assert_eq!(fired, [10, 20, 30]);
        assert_eq!(reactor.next_timer(), None);
    }
}

#[test]
fn until_returns_in_time_and_poll_at_once() {
    for wanted in features() {
        let mut reactor = Reactor::with_features(&Config::default(), &wanted).unwrap();
        let mut out = Vec::new();
        let started = Instant::now();
        assert_eq!(reactor.turn(Wait::Poll, &mut out).unwrap(), 0);
        assert_eq!(reactor.turn(Wait::Until(started), &mut out).unwrap(), 0);
        assert!(started.elapsed() < Duration::from_millis(50));
        let until = Instant::now() + Duration::from_millis(30);
        let mut announced = false;
        while Instant::now() < until {
            assert_eq!(reactor.turn(Wait::Until(until), &mut out).unwrap(), 0);
            announced |= reactor.will_sleep();
        }
        assert!(until.elapsed() < Duration::from_millis(500));
        assert!(announced && reactor.stats().sleeps >= 1);
    }
}

#[test]
fn what_only_waits_for_others_is_no_reason_to_spin() {
    for wanted in features() {
        let config = Config {
            poll_budget: Duration::from_millis(20),
            ..Config::default()
        };
        let mut reactor = Reactor::with_features(&config, &wanted).unwrap();
        let mut out = Vec::new();
        while !reactor.will_sleep() {
            reactor.turn(Wait::Adaptive, &mut out).unwrap();
        }
        let (mut socket, peer) = UnixStream::pair().unwrap();
        let readable = Op::PollAdd {
            fd: peer.as_raw_fd(),
            mask: libc::POLLIN as u32,
            multi: false,
        };
        // SAFETY: no pointers; the socket stays open until the completion.
        unsafe { reactor.submit_passive(readable, Token::new(1, 7)) };
        let spun = reactor.stats().spun;
        let until = Wait::Until(Instant::now() + Duration::from_millis(50));
        reactor.turn(until, &mut out).unwrap();
        assert_eq!((reactor.stats().sleeps, out.len()), (1, 0));
        assert!(reactor.stats().spun - spun < Duration::from_millis(10));
        // What comes wakes it, and is a reason.
        socket.write_all(b"x").unwrap();
        reactor.turn(Wait::Adaptive, &mut out).unwrap();
        assert_eq!(out.len(), 1);
        assert!(!reactor.will_sleep());
    }
}

#[test]
fn what_is_polled_ends_a_spinning_turn_and_is_not_asked_in_sleep() {
    for wanted in features() {
        let mut reactor = Reactor::with_features(&Config::default(), &wanted).unwrap();
        let mut out = Vec::new();
        let mut turn = |reactor: &mut Reactor, wait, first: u32, answer: Polled| {
            let mut asked = 0;
            let mut poll = || {
                asked += 1;
                if asked < first {
                    Polled::Nothing
                } else {
                    answer
                }
            };
            reactor.turn_polling(wait, &mut out, &mut poll).unwrap();
            assert!(out.is_empty());
            asked
        };
        // Without waiting, once.
        assert_eq!(turn(&mut reactor, Wait::Poll, 1, Polled::Nothing), 1);
        assert_eq!(turn(&mut reactor, Wait::Adaptive, 3, Polled::Ready), 3);
        assert_eq!(turn(&mut reactor, Wait::Adaptive, 3, Polled::Enough), 3);
        assert!(!reactor.will_sleep());
        // For the polling budget; then once more, and the thread sleeps.
        assert!(turn(&mut reactor, Wait::Adaptive, 1, Polled::Nothing) > 10);
        assert!(reactor.will_sleep());
        let until = Wait::Until(Instant::now() + Duration::from_millis(20));
        assert_eq!(turn(&mut reactor, until, 1, Polled::Nothing), 1);
        assert_eq!(reactor.stats().sleeps, 1);
        // What it finds is activity: the thread spins again before it sleeps.
        assert_eq!(turn(&mut reactor, Wait::Adaptive, 1, Polled::Ready), 1);
        assert!(!reactor.will_sleep());
        assert!(turn(&mut reactor, Wait::Adaptive, 1, Polled::Nothing) > 10);
    }
}

#[test]
fn a_waker_ends_the_sleep_and_costs_no_system_call_when_awake() {
    for wanted in features() {
        let mut reactor = Reactor::with_features(&Config::default(), &wanted).unwrap();
        let mut out = Vec::new();
        let waker = reactor.waker();
        for _ in 0..1000 {
            waker.wake(); // awake: the eventfd stays untouched
        }
        reactor.turn(Wait::Adaptive, &mut out).unwrap();
        assert_eq!((reactor.stats().wakes, reactor.stats().enters), (1, 0));

        let (started, woken) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let helper = thread::spawn({
            let woken = Arc::clone(&woken);
            move || {
                thread::sleep(Duration::from_millis(50));
                woken.store(true, Ordering::Relaxed);
                waker.wake();
            }
        });
        while !woken.load(Ordering::Relaxed) {
            reactor.turn(Wait::Adaptive, &mut out).unwrap();
        }
        helper.join().unwrap();
        let took = started.elapsed();
        assert!(
            took >= Duration::from_millis(50) && took < Duration::from_secs(1),
            "{took:?}"
        );
        assert!(out.is_empty());
        assert!(reactor.stats().sleeps >= 1);
    }
}

/// Senders that pause for random times around the polling budget, so that every message finds the
/// receiver spinning, about to sleep, falling asleep, asleep or waking. A lost wake-up would leave
/// the receiver asleep past the deadline.
#[test]
fn mailboxes_lose_no_message_and_no_wake_up() {
    for wanted in features() {
        for budget_us in [0, 20] {
            let config = Config {
                poll_budget: Duration::from_micros(budget_us),
                ..Config::default()
            };
            let mut reactor = Reactor::with_features(&config, &wanted).unwrap();
            let (sender, receiver) = mailbox::channel::<(u64, u64)>(16, reactor.waker());
            const EACH: u64 = 3000;
            let senders: Vec<_> = (0..3_u64)
                .map(|who| {
                    let sender = sender.clone();
                    thread::spawn(move || {
                        let mut seed = who + 1;
                        for n in 0..EACH {
                            let mut message = (who, n);
                            while let Err(TrySendError::Full(back)) = sender.try_send(message) {
                                message = back;
                                thread::yield_now();
                            }
                            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                            for _ in 0..(seed >> 33) % 4000 {
                                std::hint::spin_loop();
                            }
                        }
                    })
                })
                .collect();
            drop(sender);
            let deadline = Instant::now() + Duration::from_secs(20);
            let (mut next, mut out) = ([0; 3], Vec::new());
            while next != [EACH; 3] {
                assert!(
                    Instant::now() < deadline,
                    "stuck at {next:?}: {:?}",
                    reactor.stats()
                );
                while let Some((who, n)) = receiver.try_recv() {
                    assert_eq!(next[who as usize], n, "order of one sender");
                    next[who as usize] += 1;
                }
                if next != [EACH; 3] {
                    reactor.turn(Wait::Until(deadline), &mut out).unwrap();
                }
            }
            senders
                .into_iter()
                .for_each(|sender| sender.join().unwrap());
            assert_eq!(receiver.try_recv_or_closed(), Err(mailbox::Closed));
            assert!(
                reactor.stats().eventfd_wakes <= reactor.stats().sleeps,
                "{:?}",
                reactor.stats()
            );
            if budget_us == 0 {
                assert!(reactor.stats().sleeps > 0, "the test never slept");
            }
        }
    }
}

#[test]
fn a_mailbox_is_bounded_and_knows_when_its_receiver_is_gone() {
    let reactor = Reactor::new(&Config::default()).unwrap();
    let (sender, receiver) = mailbox::channel(2, reactor.waker());
    assert_eq!((sender.try_send(1), sender.try_send(2)), (Ok(()), Ok(())));
    assert_eq!(sender.try_send(3), Err(TrySendError::Full(3)));
    assert_eq!(receiver.try_recv(), Some(1));
    drop(receiver);
    assert_eq!(sender.try_send(4), Err(TrySendError::Closed(4)));
}
