//! Each test names the requirement it holds us to; a property test holds the invariants.

use super::*;
use flexblk_nvme::Nsid;
use proptest::prelude::*;

const NSID: Nsid = Nsid::new(1);

fn host(number: u8) -> HostId {
    HostId::from_bytes([number; 16])
}

fn register(action: u8, ignore_key: bool, current: u64, new: u64) -> Action {
    let command = ReservationRegister {
        nsid: NSID,
        action,
        ignore_key,
        persist: persist_change::NONE,
    };
    Action::Register {
        command,
        current,
        new,
    }
}

fn acquire(action: u8, rtype: ReservationType, current: u64, preempt: u64) -> Action {
    let command = ReservationAcquire {
        nsid: NSID,
        action,
        ignore_key: false,
        rtype: rtype.raw(),
    };
    Action::Acquire {
        command,
        current,
        preempt,
    }
}

fn release(action: u8, rtype: ReservationType, current: u64) -> Action {
    let command = ReservationRelease {
        nsid: NSID,
        action,
        ignore_key: false,
        rtype: rtype.raw(),
    };
    Action::Release { command, current }
}

/// Hosts 1 to `count` with keys 10, 20 ...
fn registered(count: u8) -> Reservations {
    (1..=count).fold(Reservations::default(), |state, number| {
        let action = register(register_action::REGISTER, false, 0, u64::from(number) * 10);
        state.apply(host(number), &action, true).unwrap().next
    })
}

fn held(count: u8, rtype: ReservationType) -> Reservations {
    let action = acquire(acquire_action::ACQUIRE, rtype, 10, 0);
    registered(count)
        .apply(host(1), &action, true)
        .unwrap()
        .next
}

fn code(result: Result<Outcome, Status>) -> StatusCode {
    result.expect_err("refused").code()
}

/// Base 8.1.22, "Command Behavior in the Presence of a Reservation": host 1 holds, 2 is registered,
/// 3 is not.
#[test]
fn who_may_read_and_write() {
    use ReservationType::*;
    for (rtype, registrant, other) in [
        (WriteExclusive, (true, false), (true, false)),
        (ExclusiveAccess, (false, false), (false, false)),
        (WriteExclusiveRegistrantsOnly, (true, true), (true, false)),
        (ExclusiveAccessRegistrantsOnly, (true, true), (false, false)),
        (WriteExclusiveAllRegistrants, (true, true), (true, false)),
        (ExclusiveAccessAllRegistrants, (true, true), (false, false)),
    ] {
        let state = held(2, rtype);
        let may = |number| {
            (
                state.check(host(number), Access::Read).is_ok(),
                state.check(host(number), Access::Write).is_ok(),
            )
        };
        assert_eq!(may(1), (true, true), "{rtype:?}");
        assert_eq!(may(2), registrant, "{rtype:?}");
        assert_eq!(may(3), other, "{rtype:?}");
    }
    let refused = held(1, ExclusiveAccess).check(host(2), Access::Read);
    assert_eq!(refused, Err(StatusCode::ReservationConflict.dnr()));
}

/// "If a registrant registers again with a different key ... Reservation Conflict"; Replace and
/// Unregister want the current key unless IEKEY is set.
#[test]
fn registrations() {
    let state = registered(1);
    let try_one = |number, action: Action| state.apply(host(number), &action, true);
    use register_action::*;
    assert_eq!(
        code(try_one(1, register(REGISTER, false, 0, 11))),
        StatusCode::ReservationConflict
    );
    let same = try_one(1, register(REGISTER, false, 0, 10)).unwrap().next;
    assert_eq!((same.registrants().len(), same.generation), (1, 2));
    assert_eq!(
        code(try_one(2, register(REGISTER, false, 0, 0))),
        StatusCode::InvalidField
    );
    assert_eq!(
        code(try_one(1, register(REPLACE, false, 9, 11))),
        StatusCode::ReservationConflict
    );
    assert_eq!(
        code(try_one(2, register(REPLACE, true, 0, 11))),
        StatusCode::ReservationConflict
    );
    for replaced in [
        register(REPLACE, false, 10, 11),
        register(REPLACE, true, 9, 11),
    ] {
        assert_eq!(try_one(1, replaced).unwrap().next.key_of(host(1)), Some(11));
    }
    assert_eq!(
        code(try_one(1, register(UNREGISTER, false, 9, 0))),
        StatusCode::ReservationConflict
    );
    assert_eq!(
        code(try_one(2, register(UNREGISTER, true, 0, 0))),
        StatusCode::ReservationConflict
    );
    for gone in [
        register(UNREGISTER, false, 10, 0),
        register(UNREGISTER, true, 9, 0),
    ] {
        assert!(try_one(1, gone).unwrap().next.registrants().is_empty());
    }
    assert_eq!(
        code(try_one(1, register(3, false, 10, 1))),
        StatusCode::InvalidField
    );
}

/// CPTPL 01b is reserved; 11b needs a controller that can persist (RESCAP bit 0).
#[test]
fn persistence_is_asked_for() {
    let with = |persist| {
        let command = ReservationRegister {
            nsid: NSID,
            persist,
            ..Default::default()
        };
        Action::Register {
            command,
            current: 0,
            new: 5,
        }
    };
    let empty = Reservations::default();
    assert!(
        empty
            .apply(host(1), &with(persist_change::SET), true)
            .unwrap()
            .next
            .persist
    );
    assert_eq!(
        code(empty.apply(host(1), &with(persist_change::SET), false)),
        StatusCode::InvalidField
    );
    assert_eq!(
        code(empty.apply(host(1), &with(1), true)),
        StatusCode::InvalidField
    );
    let set = empty
        .apply(host(1), &with(persist_change::SET), true)
        .unwrap()
        .next;
    assert!(
        set.apply(host(2), &with(persist_change::NONE), true)
            .unwrap()
            .next
            .persist
    );
    assert!(
        !set.apply(host(2), &with(persist_change::CLEAR), true)
            .unwrap()
            .next
            .persist
    );
}

#[test]
fn at_least_256_registrants() {
    let mut state = Reservations::default();
    let number = |at: usize| HostId::from_bytes((at as u128 + 1).to_be_bytes());
    for at in 0..MAX_REGISTRANTS {
        let action = register(register_action::REGISTER, false, 0, at as u64 + 1);
        state = state.apply(number(at), &action, true).unwrap().next;
    }
    assert_eq!(state.registrants().len(), MAX_REGISTRANTS);
    let one_more = register(register_action::REGISTER, false, 0, 1);
    assert_eq!(
        code(state.apply(number(MAX_REGISTRANTS), &one_more, true)),
        StatusCode::NotEnoughResources
    );
    assert_eq!(state.report().len(), 64 + MAX_REGISTRANTS * 64);
}

/// "A host that is not a registrant ... Reservation Conflict"; another holder or another type too.
#[test]
fn acquiring() {
    use ReservationType::*;
    use acquire_action::*;
    let state = registered(2);
    let refused = |state: &Reservations, number, action: Action| {
        code(state.apply(host(number), &action, true))
    };
    assert_eq!(
        refused(&state, 3, acquire(ACQUIRE, WriteExclusive, 0, 0)),
        StatusCode::ReservationConflict
    );
    assert_eq!(
        refused(&state, 1, acquire(ACQUIRE, WriteExclusive, 11, 0)),
        StatusCode::ReservationConflict
    );
    let held = held(2, WriteExclusive);
    assert_eq!(held.generation, state.generation, "Acquire does not count");
    assert_eq!(
        refused(&held, 2, acquire(ACQUIRE, WriteExclusive, 20, 0)),
        StatusCode::ReservationConflict
    );
    assert_eq!(
        refused(&held, 1, acquire(ACQUIRE, ExclusiveAccess, 10, 0)),
        StatusCode::ReservationConflict
    );
    assert!(
        held.apply(host(1), &acquire(ACQUIRE, WriteExclusive, 10, 0), true)
            .is_ok()
    );
    let all = super::tests::held(2, WriteExclusiveAllRegistrants);
    assert!(
        all.apply(
            host(2),
            &acquire(ACQUIRE, WriteExclusiveAllRegistrants, 20, 0),
            true
        )
        .is_ok()
    );
    for (rtype, ignore_key) in [(0, false), (7, false), (1, true)] {
        let command = ReservationAcquire {
            nsid: NSID,
            action: ACQUIRE,
            ignore_key,
            rtype,
        };
        let action = Action::Acquire {
            command,
            current: 10,
            preempt: 0,
        };
        assert_eq!(refused(&state, 1, action), StatusCode::InvalidField);
    }
}

/// Base 8.1.22.6: the holder's key takes the reservation over, another key takes registrations
/// away, a key that nobody has is Reservation Conflict, and 0 is for all registrants.
#[test]
fn preempting() {
    use ReservationType::*;
    use acquire_action::*;
    let state = held(3, WriteExclusiveRegistrantsOnly);
    let apply = |state: &Reservations, action: Action| state.apply(host(2), &action, true);
    let taken = apply(&state, acquire(PREEMPT, ExclusiveAccess, 20, 10)).unwrap();
    assert_eq!(
        taken.next.holder(),
        Some(Holder {
            host: host(2),
            rtype: ExclusiveAccess
        })
    );
    assert_eq!(taken.next.key_of(host(1)), None);
    assert_eq!(
        taken.notices,
        [
            (host(1), Notice::RegistrationPreempted),
            (host(3), Notice::ReservationReleased),
        ]
    );
    assert_eq!(
        (taken.abort.len(), taken.next.generation),
        (0, state.generation + 1)
    );
    let aborted = apply(&state, acquire(PREEMPT_AND_ABORT, ExclusiveAccess, 20, 10)).unwrap();
    assert_eq!(aborted.abort, [host(1)]);

    let other = apply(&state, acquire(PREEMPT, ExclusiveAccess, 20, 30)).unwrap();
    assert_eq!(other.next.holder(), state.holder());
    assert_eq!(other.notices, [(host(3), Notice::RegistrationPreempted)]);
    assert_eq!(
        code(apply(&state, acquire(PREEMPT, ExclusiveAccess, 20, 99))),
        StatusCode::ReservationConflict
    );
    assert_eq!(
        code(apply(&state, acquire(PREEMPT, ExclusiveAccess, 20, 0))),
        StatusCode::InvalidField
    );

    let all = held(3, ExclusiveAccessAllRegistrants);
    let alone = apply(&all, acquire(PREEMPT, WriteExclusive, 20, 0)).unwrap();
    assert_eq!(alone.next.registrants().len(), 1);
    assert_eq!(
        alone.next.holder(),
        Some(Holder {
            host: host(2),
            rtype: WriteExclusive
        })
    );
    let one = apply(&all, acquire(PREEMPT, WriteExclusive, 20, 10)).unwrap();
    assert_eq!(
        one.next.holder().map(|holder| holder.rtype),
        Some(ExclusiveAccessAllRegistrants)
    );
    assert!(one.next.holds(host(3)) && !one.next.holds(host(1)));

    let none = apply(&registered(3), acquire(PREEMPT, WriteExclusive, 20, 30)).unwrap();
    assert_eq!(
        (none.next.holder(), none.next.registrants().len()),
        (None, 2)
    );
    // A holder preempts itself: another type, its registration stays.
    let own = held(2, WriteExclusive);
    let changed = own
        .apply(host(1), &acquire(PREEMPT, ExclusiveAccess, 10, 10), true)
        .unwrap();
    assert_eq!(
        changed.next.holder(),
        Some(Holder {
            host: host(1),
            rtype: ExclusiveAccess
        })
    );
    assert_eq!(changed.next.registrants().len(), 2);
}

/// "If the type differs ... Invalid Field in Command"; a registrant that does not hold releases
/// nothing; Clear takes everything and tells everybody.
#[test]
fn releasing() {
    use ReservationType::*;
    use release_action::*;
    let state = held(2, WriteExclusiveRegistrantsOnly);
    assert_eq!(
        code(state.apply(host(1), &release(RELEASE, WriteExclusive, 10), true)),
        StatusCode::InvalidField
    );
    let nothing = state
        .apply(
            host(2),
            &release(RELEASE, WriteExclusiveRegistrantsOnly, 20),
            true,
        )
        .unwrap();
    assert_eq!(nothing.next, state);
    let released = state
        .apply(
            host(1),
            &release(RELEASE, WriteExclusiveRegistrantsOnly, 10),
            true,
        )
        .unwrap();
    assert_eq!(released.next.holder(), None);
    assert_eq!(released.notices, [(host(2), Notice::ReservationReleased)]);
    let quiet = held(2, WriteExclusive)
        .apply(host(1), &release(RELEASE, WriteExclusive, 10), true)
        .unwrap();
    assert_eq!((quiet.next.holder(), quiet.notices), (None, vec![]));
    assert_eq!(
        code(state.apply(host(3), &release(CLEAR, WriteExclusive, 0), true)),
        StatusCode::ReservationConflict
    );
    let cleared = state
        .apply(host(2), &release(CLEAR, WriteExclusive, 20), true)
        .unwrap();
    assert_eq!(cleared.next.registrants().len(), 0);
    assert_eq!(cleared.notices, [(host(1), Notice::ReservationPreempted)]);
    // The holder that unregisters gives the reservation up; with all registrants only the last does.
    let gone = register(register_action::UNREGISTER, false, 10, 0);
    assert_eq!(
        state.apply(host(1), &gone, true).unwrap().next.holder(),
        None
    );
    let all = held(2, ExclusiveAccessAllRegistrants)
        .apply(host(1), &gone, true)
        .unwrap()
        .next;
    assert!(all.holds(host(2)));
    let last = register(register_action::UNREGISTER, false, 20, 0);
    assert_eq!(all.apply(host(2), &last, true).unwrap().next.holder(), None);
}

fn any_action() -> impl Strategy<Value = Action> {
    let key = 0u64..5;
    let command = (0u8..3, 0u8..4, any::<bool>(), 0u8..8, 0u8..4);
    (command, key.clone(), key).prop_map(
        |((kind, action, ignore_key, rtype, persist), current, second)| match kind {
            0 => Action::Register {
                command: ReservationRegister {
                    nsid: NSID,
                    action,
                    ignore_key,
                    persist,
                },
                current,
                new: second,
            },
            1 => Action::Acquire {
                command: ReservationAcquire {
                    nsid: NSID,
                    action,
                    ignore_key,
                    rtype,
                },
                current,
                preempt: second,
            },
            _ => Action::Release {
                command: ReservationRelease {
                    nsid: NSID,
                    action,
                    ignore_key,
                    rtype,
                },
                current,
            },
        },
    )
}

proptest! {
    /// Whatever hosts do: the holder is registered, at least one host can always write, the report
    /// says what is, and what is saved can be restored.
    #[test]
    fn invariants_hold(steps in proptest::collection::vec((1u8..6, any_action()), 0..80)) {
        let mut state = Reservations::default();
        for (number, action) in steps {
            if let Ok(outcome) = state.apply(host(number), &action, true) {
                for (told, _) in &outcome.notices {
                    prop_assert!(*told != host(number), "who did it is not told");
                }
                state = outcome.next;
            }
            if let Some(holder) = state.holder() {
                prop_assert!(state.key_of(holder.host).is_some());
                prop_assert!(state.check(holder.host, Access::Write).is_ok());
            }
            let page = state.report();
            let (head, entries) = ReservationStatus::parse(&page).unwrap();
            prop_assert_eq!(entries.len(), state.registrants().len());
            prop_assert_eq!(head.rtype != 0, state.holder().is_some());
            prop_assert_eq!(entries.iter().any(|entry| entry.status == 1), state.holder().is_some());
            let again = Reservations::restore(state.generation, state.registrants.clone(), state.holder);
            prop_assert_eq!(again, Some(Reservations { persist: true, ..state.clone() }));
        }
    }
}
