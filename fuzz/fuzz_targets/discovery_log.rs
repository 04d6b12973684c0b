//! Log pages and lists that a target sends to a host: nothing panics, and what is understood means
//! the same after it was emitted again.

#![no_main]

use flexblk_nvme::TransportId;
use flexblk_nvme::identify::{Controller, Namespace, descriptors};
use flexblk_nvme::log::{ana, discovery};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|page: &[u8]| {
    if let Ok(log) = discovery::Page::parse(page) {
        let _ = (log.generation(), log.full_len());
        for record in log.entries().flat_map(discovery::Entry::record) {
            let again = record.entry().record();
            assert_eq!(again.as_ref(), Ok(&record));
            if let Some(id) = TransportId::from_record(&record) {
                assert_eq!(id.uri().parse(), Ok(id.clone()));
                assert_eq!(id.words().parse(), Ok(id));
            }
        }
    }
    if let Ok((count, groups)) = ana::parse(page)
        && let Ok(groups) = groups.collect::<Result<Vec<_>, _>>()
    {
        let emitted = ana::emit(count, groups.clone());
        let (again, regroups) = ana::parse(&emitted).expect("what was emitted has a header");
        assert_eq!(again, count);
        assert_eq!(regroups.collect::<Result<Vec<_>, _>>(), Ok(groups));
    }
    assert!(descriptors::iter(page).count() <= page.len() / 4);
    if let Some(controller) = Controller::view(page) {
        let _ = (
            controller.subnqn(),
            controller.model_number(),
            controller.in_capsule_bytes(),
        );
    }
    if let Some(namespace) = Namespace::view(page) {
        let _ = (namespace.block_bytes(), namespace.format());
    }
});
