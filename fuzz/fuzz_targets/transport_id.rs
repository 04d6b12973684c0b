//! Addresses as users type them: nothing panics, and what is understood survives printing.

#![no_main]

use flexblk_nvme::{Nqn, TransportId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<TransportId>() {
        assert_eq!(id.uri().parse(), Ok(id.clone()), "{}", id.uri());
        assert_eq!(id.words().parse(), Ok(id.clone()), "{}", id.words());
        let _ = (id.port(), id.authority(), id.ip());
    }
    if let Ok(name) = Nqn::new(text) {
        assert!(name.is_well_formed());
        assert_eq!(Nqn::from_field(&name.to_field()), Ok(name));
    }
});
