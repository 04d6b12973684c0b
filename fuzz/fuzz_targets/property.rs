//! Property Get and Property Set: nothing panics, offsets and widths survive, bit fields keep every
//! bit.

#![no_main]

use flexblk_nvme::command::fabrics::{Command, fctype};
use flexblk_nvme::property::{Cap, Cc, Csts, Property, Vs, Width};
use flexblk_nvme::{Sgl, Sqe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|capsules: &[u8]| {
    let (capsules, _) = capsules.as_chunks::<64>();
    for capsule in capsules {
        let mut sqe = *Sqe::cast(capsule);
        sqe.opcode = flexblk_nvme::command::FABRICS_OPCODE;
        let kind = if sqe.cid().get() & 1 == 0 {
            fctype::PROPERTY_GET
        } else {
            fctype::PROPERTY_SET
        };
        sqe.nsid.set(u32::from(kind));
        let Ok(command) = Command::parse(&sqe) else {
            assert!(sqe.cdw10.get() & 7 > 1, "only an unknown width is refused");
            continue;
        };
        let emitted = command.emit(sqe.cid(), &Sgl::NONE);
        assert_eq!(Command::parse(Sqe::cast(&emitted)), Ok(command));
        let (offset, width, value) = match command {
            Command::PropertyGet(get) => (get.offset, get.width, 0),
            Command::PropertySet(set) => (set.offset, set.width, set.value),
            other => panic!("{other:?} is no property command"),
        };
        assert_eq!(width == Width::Eight, sqe.cdw10.get() & 1 == 1);
        if let Some(property) = Property::from_offset(offset) {
            assert_eq!(property.offset(), offset);
        }
        let low = value as u32;
        assert_eq!(Cap::from_bits(value).into_bits(), value);
        assert_eq!(Cc::from_bits(low).into_bits(), low);
        assert_eq!(Csts::from_bits(low).into_bits(), low);
        let _ = (
            Vs::from_bits(low).to_string(),
            format!("{:?}", Cc::from_bits(low)),
        );
    }
});
