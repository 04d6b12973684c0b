//! What a host sees: masked namespaces, a device in two subsystems, the discovery service.

use std::time::Duration;

use flexblk_nvme::command::admin::{AsyncEventRequest, Cns, GetLogPage, Identify, SetFeatures};
use flexblk_nvme::command::nvm::{Read, Write};
use flexblk_nvme::features::{AsyncEventConfig, WriteProtect};
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::discovery::Page;
use flexblk_nvme::{Nqn, Nsid, Sgl, StatusCode, identify};
use flexblk_target::config::{AllowedHosts, Config, Discovery, Namespace, Referral, Transport};

use crate::host::Answer;
use crate::member::{BLOCK, Member, NSID, OK};
use crate::world::{World, nqn, read, write};

/// A namespace that a host does not see is not there for it: not in lists, not for I/O, not in the
/// ANA log; who sees a difference is told, and nobody else.
#[test]
fn namespaces_are_masked_by_host() {
    let world = World::with(
        &["ram:1M,block_size=4096", "ram:1M,block_size=4096"],
        |config| {
            config.cores = vec![0, 0];
        },
    );
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    for member in [&mut a, &mut b] {
        let config = AsyncEventConfig::new().with_namespace_attribute(true);
        assert_eq!(member.set(config.into(), Nsid::NONE), OK);
    }
    let (event_a, event_b) = (a.listen(), b.listen());
    let only = AllowedHosts::Only(vec![a.host.nqn.clone()]);
    world
        .target
        .set_namespace_hosts(&nqn(), NSID, only)
        .unwrap();
    assert_eq!(b.host.answer(b.admin, event_b).result(), 0x0004_0002);
    assert_eq!(
        a.host
            .try_answer(a.admin, event_a, Duration::from_millis(100)),
        None
    );
    assert_eq!((a.active(), b.active()), (vec![1, 2], vec![2]));
    assert_eq!(
        (a.reads(), b.reads()),
        (OK, StatusCode::InvalidNamespaceOrFormat)
    );
    assert_eq!(b.namespace(), identify::Namespace::zeroed());
    assert_eq!((a.ana_log().1[0].2.len(), b.ana_log().1[0].2.len()), (2, 1));
    let wrong = WriteProtect::new().with_state(1);
    assert_eq!(
        b.set(wrong.into(), NSID),
        StatusCode::InvalidNamespaceOrFormat
    );
    let nobody = AllowedHosts::Only(Vec::new());
    world
        .target
        .set_namespace_hosts(&nqn(), NSID, nobody)
        .unwrap();
    assert_eq!(a.host.answer(a.admin, event_a).result(), 0x0004_0002);
    assert_eq!(a.active(), [2]);
}

/// One device under two subsystems: both see one another's data.
#[test]
fn one_device_in_two_subsystems() {
    let other = Nqn::new("nqn.2026-11.test:second").unwrap();
    let world = World::with(&[], |config| {
        let text = format!(
            "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"1M\"\nblock_size = 4096\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"base\"\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"base\"\nnsid = 5\n",
            nqn().as_str(),
            other.as_str()
        );
        let parsed = Config::from_toml(&text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
    });
    let mut a = Member::new(&world, 1);
    a.host.put(0, &[7; BLOCK as usize]);
    assert_eq!(a.writes(), OK);
    let mut host = world.host();
    let (_, cntlid) = host.controller(&other);
    let io = host.io_queue(1, 32, cntlid, &other);
    let sgl = host.keyed(0, BLOCK);
    let answer: Answer = host.command(io, |cid| {
        Read {
            nsid: Nsid::new(5),
            ..read(0, 1)
        }
        .emit(cid, &sgl)
    });
    assert!(answer.status().is_success());
    assert!(host.get(0, BLOCK).iter().all(|byte| *byte == 7));
    let second = Write {
        nsid: Nsid::new(5),
        ..write(0, 1)
    };
    assert!(
        host.command(io, |cid| second.emit(cid, &sgl))
            .status()
            .is_success()
    );
    world
        .target
        .add_namespace(&nqn(), &Namespace::new("base"))
        .unwrap();
}

/// The discovery service by both of its names; a change of its referrals is an event.
#[test]
fn discovery_by_both_names() {
    let own = Nqn::new("nqn.2026-11.test:discovery").unwrap();
    let world = World::with(&["ram:1M"], |config| {
        config.discovery.nqn = Some(own.clone())
    });
    for name in [own.clone(), Nqn::discovery()] {
        let mut host = world.host();
        let (admin, _) = host.controller(&name);
        let bytes = host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
        assert_eq!(
            identify::Controller::view(&bytes).unwrap().subnqn,
            own.to_field()
        );
        let config = AsyncEventConfig::new().with_discovery_log(true);
        let set = SetFeatures::new(config.into());
        assert!(
            host.command(admin, |cid| set.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        let event = host.cid();
        host.send(admin, &AsyncEventRequest.emit(event, &Sgl::NONE), None);
        let referral = Referral {
            trtype: Transport::Tcp,
            address: "192.0.2.7:8009".parse().unwrap(),
            nqn: None,
            hosts: AllowedHosts::Any,
        };
        let discovery = Discovery {
            nqn: Some(own.clone()),
            listeners: Vec::new(),
            referrals: vec![referral],
        };
        world.target.set_discovery(discovery).unwrap();
        assert_eq!(host.answer(admin, event).result(), 0x0070_F002);
        let page = host.log(admin, &GetLogPage::new(LogPageId::Discovery, 0, 4096));
        assert_eq!(Page::parse(&page).unwrap().record_count(), 3);
    }
}
