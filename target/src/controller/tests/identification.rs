//! Identify.

use super::*;

/// Identify Controller: what Fabrics requires (Base 5.1.13.2.1).
#[test]
fn identify_controller() {
    let world = World::new();
    let mut controller = world.ready();
    let bytes = data(world.identify(&mut controller, Cns::Controller, 0));
    let id = identify::Controller::view(&bytes).unwrap();
    assert_eq!(
        (id.serial_number(), id.model_number()),
        ("S1".into(), "flexblk test".into())
    );
    assert_eq!(
        (id.cntlid().get(), id.nn.get(), id.in_capsule_bytes()),
        (5, 1024, 8192)
    );
    assert_eq!(id.max_transfer_bytes(0), Some(1 << 20));
    assert_eq!(
        (id.sqes, id.cqes, id.maxcmd.get(), id.kas.get()),
        (0x66, 0x44, 256, 1)
    );
    assert_eq!(
        id.sgls.get() & 0x10_0005,
        0x10_0005,
        "SGLs, keyed, in-capsule offset"
    );
    assert_eq!(
        id.ctratt.get() & 0x41,
        0x41,
        "128-bit host identifier, traffic-based keep-alive"
    );
    assert_eq!(id.subnqn().unwrap(), nqn("nqn.2026-11.test:a"));
    assert_eq!(
        id.vwc & 1,
        0,
        "memory has no volatile write cache that a flush would empty"
    );
    assert_eq!(id.tnvmcap.get(), 2 << 20);
}

/// CNS 00h: an inactive namespace is all zeros, an invalid identifier Invalid Namespace or Format
/// (Base 5.1.13.2, NVM 4.1.5.1).
#[test]
fn identify_namespace() {
    let world = World::new();
    let mut controller = world.ready();
    let bytes = data(world.identify(&mut controller, Cns::Namespace, 3));
    let id = identify::Namespace::view(&bytes).unwrap();
    assert_eq!((id.nsze.get(), id.block_bytes()), (256, Some(4096)));
    assert!(
        data(world.identify(&mut controller, Cns::Namespace, 2))
            .iter()
            .all(|byte| *byte == 0)
    );
    for nsid in [0, 1025, u32::MAX] {
        let reply = world.identify(&mut controller, Cns::Namespace, nsid);
        assert_eq!(
            reply,
            failed(StatusCode::InvalidNamespaceOrFormat),
            "{nsid}"
        );
    }
    let reply = world.identify(&mut controller, Cns::NamespaceDescriptors, 2);
    assert_eq!(reply, failed(StatusCode::InvalidNamespaceOrFormat));
    let list = data(world.identify(&mut controller, Cns::ActiveNamespaces, 1));
    let list = identify::NamespaceList::view(&list).unwrap();
    assert_eq!(list.iter().map(Nsid::get).collect::<Vec<_>>(), [3]);
    let reply = world.identify(&mut controller, Cns::ActiveNamespaces, 0xFFFF_FFFE);
    assert_eq!(reply, failed(StatusCode::InvalidNamespaceOrFormat));
    for cns in [
        Cns::CommandSetNamespace,
        Cns::IndependentNamespace,
        Cns::CommandSetController,
    ] {
        assert_eq!(data(world.identify(&mut controller, cns, 1)).len(), 4096);
    }
    let zoned = Identify {
        csi: Csi::Zoned,
        ..Identify::new(Cns::CommandSetNamespace, Nsid::new(1))
    };
    let reply = world.send(&mut controller, zoned.emit(Cid::new(1), &ANYWHERE));
    assert_eq!(reply, failed(StatusCode::InvalidField));
    assert_eq!(
        world.identify(&mut controller, Cns::Uuids, 0),
        failed(StatusCode::InvalidField)
    );
}
