use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use flexblk_reactor::{Config, Reactor};

use super::*;

/// Longer than a thread takes to answer, and shorter than a test may take.
const SOON: Duration = Duration::from_secs(20);
const QUEUES: usize = 4;

/// What the workers were told.
fn order(orders: &Receiver<Order>) -> Order {
    orders.recv_timeout(SOON).expect("an order")
}

/// Runs `front_end` with four rings that run in two threads, which `workers` plays.
fn session(
    front_end: impl FnOnce(&mut Session<'_>),
    workers: impl FnOnce([Receiver<Order>; 2]) + Send,
) {
    let reactor = Reactor::new(&Config::default()).unwrap();
    let (first, first_orders) = channel();
    let (second, second_orders) = channel();
    let played = Workers::played(QUEUES, vec![first, second], &reactor.waker());
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let device = Device::new(&Namespace::example(), QUEUES as u16);
    std::thread::scope(|scope| {
        scope.spawn(|| workers([first_orders, second_orders]));
        let mut session = Session::new(Socket::new(ours).unwrap(), &played, device);
        for ring in &mut session.rings {
            ring.running = true;
        }
        front_end(&mut session);
    });
}

/// Answers the orders to stop only when all have come; their deadlines.
fn stop_together(orders: &[Receiver<Order>; 2]) -> Vec<Instant> {
    let mut waiting = Vec::new();
    for inbox in orders {
        for _ in 0..QUEUES / 2 {
            match order(inbox) {
                Order::Stop(index, until, reply) => waiting.push((index, until, reply)),
                other => panic!("{other:?}"),
            }
        }
    }
    let mut deadlines = Vec::new();
    for (index, until, reply) in waiting {
        reply.send(100 + index as u16).unwrap();
        deadlines.push(until);
    }
    deadlines
}

#[test]
fn all_rings_stop_at_once_and_have_one_deadline() {
    session(
        |session| {
            session.end().unwrap();
            let rings = session.rings.iter();
            let left: Vec<(bool, u16)> = rings
                .map(|ring| (ring.running, ring.next_available))
                .collect();
            assert_eq!(
                left,
                [(false, 100), (false, 101), (false, 102), (false, 103)]
            );
        },
        |orders| {
            let deadlines = stop_together(&orders);
            assert!(deadlines.iter().all(|until| *until == deadlines[0]));
            assert!(deadlines[0] <= Instant::now() + DRAIN);
        },
    );
}

#[test]
fn a_reset_stops_all_rings_at_once_and_forgets_them() {
    session(
        |session| {
            let answered = session.handle(0, Request::ResetDevice, Fds::default());
            assert!(!answered.unwrap());
            let rings = &session.rings;
            assert!(
                rings
                    .iter()
                    .all(|ring| !ring.running && ring.next_available == 0)
            );
        },
        |orders| drop(stop_together(&orders)),
    );
}

#[test]
fn all_threads_get_other_memory_at_once() {
    session(
        |session| {
            session.rings[1].running = false;
            session.rings[2].running = false;
            session.replace_memory(GuestMemory::default()).unwrap();
            // Nothing is known of them to be started again with.
            assert!(session.rings.iter().all(|ring| !ring.running));
        },
        |orders| {
            let stops = [order(&orders[0]), order(&orders[1])];
            for (stop, ring) in stops.into_iter().zip([0, 3]) {
                let Order::Stop(index, _, reply) = stop else {
                    panic!("{stop:?}");
                };
                assert_eq!(index, ring);
                reply.send(7).unwrap();
            }
            let changes = [order(&orders[0]), order(&orders[1])];
            for change in changes {
                let Order::Memory(_, false, reply) = change else {
                    panic!("{change:?}");
                };
                reply.send(Ok(())).unwrap();
            }
        },
    );
}

#[test]
fn a_thread_that_is_gone_ends_the_session() {
    session(
        |session| {
            let ended = session.end();
            assert!(matches!(ended, Err(SessionError::Worker)), "{ended:?}");
        },
        drop,
    );
}
