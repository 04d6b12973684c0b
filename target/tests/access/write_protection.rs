//! Write protection: its states, and what survives a restart.

use flexblk_nvme::command::admin::{Cns, Identify, Select};
use flexblk_nvme::features::{
    AsyncEventConfig, Capabilities, FeatureId, FeatureValue, WriteProtect,
};
use flexblk_nvme::{Nsid, StatusCode, identify};

use crate::kept::Kept;
use crate::member::{Member, NSID, OK};

/// Base 8.1.15: the states of write protection, the ways between them, what survives a restart, and
/// the event for the other hosts.
#[test]
fn write_protection() {
    let kept = Kept::new();
    let start = || kept.start();
    let protect = |state| FeatureValue::from(WriteProtect::new().with_state(state));
    let expect = |member: &mut Member, state: u8| {
        assert_eq!(
            member.get(FeatureId::WriteProtect, NSID, Select::Current),
            u32::from(state)
        );
        let wanted = if state == 0 {
            OK
        } else {
            StatusCode::NamespaceWriteProtected
        };
        assert_eq!((member.reads(), member.writes()), (OK, wanted));
        assert_eq!(member.namespace().nsattr, u8::from(state != 0));
    };
    {
        let world = start();
        let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
        let bytes = a
            .host
            .identify(a.admin, &Identify::new(Cns::Controller, Nsid::NONE));
        assert_eq!(identify::Controller::view(&bytes).unwrap().nwpc, 0b111);
        let capabilities = a.get(FeatureId::WriteProtect, NSID, Select::Capabilities);
        let capabilities = Capabilities::from_bits(capabilities);
        assert!(
            capabilities.changeable()
                && capabilities.namespace_specific()
                && !capabilities.saveable()
        );
        assert_eq!(
            b.set(
                AsyncEventConfig::new()
                    .with_namespace_attribute(true)
                    .into(),
                Nsid::NONE
            ),
            OK
        );
        let event = b.listen();
        expect(&mut a, 0);
        assert_eq!(a.set(protect(WriteProtect::PROTECT), NSID), OK);
        assert_eq!(b.host.answer(b.admin, event).result(), 0x0004_0002);
        expect(&mut b, 1);
        assert_eq!(a.set(protect(WriteProtect::NONE), NSID), OK);
        expect(&mut b, 0);
        assert_eq!(a.set(protect(7), NSID), StatusCode::InvalidField);
        assert_eq!(
            a.set(protect(1), Nsid::new(9)),
            StatusCode::InvalidNamespaceOrFormat
        );
        assert_eq!(a.set(protect(WriteProtect::UNTIL_POWER_CYCLE), NSID), OK);
        expect(&mut b, 2);
        assert_eq!(
            a.set(protect(WriteProtect::NONE), NSID),
            StatusCode::FeatureNotChangeable
        );
    }
    for state in [WriteProtect::PROTECT, WriteProtect::PERMANENT] {
        let world = start();
        let mut a = Member::new(&world, 1);
        let before = if state == WriteProtect::PERMANENT {
            1
        } else {
            0
        };
        expect(&mut a, before);
        assert_eq!(a.set(protect(state), NSID), OK);
        expect(&mut a, state);
    }
    let world = start();
    let mut a = Member::new(&world, 1);
    expect(&mut a, 3);
    assert_eq!(
        a.set(protect(WriteProtect::NONE), NSID),
        StatusCode::FeatureNotChangeable
    );
}
