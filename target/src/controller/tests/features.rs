//! Features.

use super::*;

/// Number of Queues is answered from what there is (Base 5.1.25.1.5): the budget has room for ten
/// queues, the limit is eight, a second host gets what is left without the reserve.
#[test]
fn number_of_queues_comes_from_the_budget() {
    let world = World::new();
    let mut first = world.ready();
    let reply = world.set(&mut first, NumberOfQueues::of(64));
    assert_eq!(reply, done(NumberOfQueues::of(8).into_bits().into()));
    assert_eq!(world.directory.budget().free_bytes(), 200_000);
    let mut second = world.ready();
    let reply = world.set(&mut second, NumberOfQueues::of(4));
    assert_eq!(reply, done(NumberOfQueues::of(1).into_bits().into()));
    let reply = world.feature(&mut second, FeatureId::NumberOfQueues);
    assert_eq!(reply, done(NumberOfQueues::of(1).into_bits().into()));
    let reply = world.set(&mut second, NumberOfQueues::from_bits(0xFFFF_0000));
    assert_eq!(reply, failed(StatusCode::InvalidField));
    drop(first);
    assert_eq!(world.directory.budget().free_bytes(), 900_000);
}

/// "If the value specified is 65,535, the controller should abort the command with Invalid Field in
/// Command"; "the controller shall not change the value allocated between resets"; after the creation of
/// an I/O queue the command is Command Sequence Error (Base 5.1.25.1.5).
#[test]
fn the_number_of_queues_is_settled_once() {
    let world = World::new();
    let mut controller = world.ready();
    for asked in [0xFFFF_0001, 0x0001_FFFF, u32::MAX] {
        let reply = world.set(&mut controller, NumberOfQueues::from_bits(asked));
        assert_eq!(reply, failed(StatusCode::InvalidField), "{asked:#x}");
    }
    let number = |count| done(NumberOfQueues::of(count).into_bits().into());
    assert_eq!(
        world.set(&mut controller, NumberOfQueues::of(2)),
        number(2),
        "as many as asked for, although there is more"
    );
    assert_eq!(world.set(&mut controller, NumberOfQueues::of(5)), number(2));
    let reply = world.feature(&mut controller, FeatureId::NumberOfQueues);
    assert_eq!(reply, number(2));
    let association = Arc::clone(controller.association());
    association.add_queue(Qid::new(1), 0, 8).unwrap();
    let reply = world.set(&mut controller, NumberOfQueues::of(2));
    assert_eq!(reply, failed(StatusCode::CommandSequenceError));
}

/// Features: SV is Feature Identifier Not Saveable, unknown ones Invalid Field; the host identifier
/// is Connect's (Base 5.1.25).
#[test]
fn features() {
    let world = World::new();
    let mut controller = world.ready();
    let kato = flexblk_nvme::features::KeepAlive::new().with_timeout_ms(2001);
    assert_eq!(world.set(&mut controller, kato), done(0));
    assert_eq!(
        world.feature(&mut controller, FeatureId::KeepAlive),
        done(2100)
    );
    let save = SetFeatures {
        save: true,
        ..SetFeatures::new(kato.into())
    };
    let reply = world.send(&mut controller, save.emit(Cid::new(1), &Sgl::NONE));
    assert_eq!(reply, failed(StatusCode::FeatureNotSaveable));
    assert_eq!(
        world.set(&mut controller, HostIdFormat::new().with_extended(true)),
        failed(StatusCode::CommandSequenceError)
    );
    let get = GetFeatures {
        cdw11: 1,
        ..GetFeatures::new(FeatureId::HostId)
    };
    let reply = world.send(&mut controller, get.emit(Cid::new(1), &ANYWHERE));
    assert_eq!(data(reply), [7; 16]);
    assert_eq!(
        world.feature(&mut controller, FeatureId::HostId),
        failed(StatusCode::HostIdInconsistentFormat)
    );
    assert_eq!(
        world.feature(&mut controller, FeatureId::Timestamp),
        failed(StatusCode::InvalidField)
    );
    let cache = VolatileWriteCache::new().with_enable(false);
    assert_eq!(
        world.set(&mut controller, cache),
        failed(StatusCode::InvalidField)
    );
    let select = GetFeatures {
        select: Select::Capabilities,
        ..GetFeatures::new(FeatureId::KeepAlive)
    };
    assert_eq!(
        world.send(&mut controller, select.emit(Cid::new(1), &Sgl::NONE)),
        done(1 << 2)
    );
}
