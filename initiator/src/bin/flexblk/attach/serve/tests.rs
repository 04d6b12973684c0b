use std::path::Path;

use super::super::state::Objects;
use super::*;

/// A device that takes a new size, or cannot.
struct Device {
    fixed: bool,
}

impl Backend for Device {
    fn path(&self) -> &Path {
        Path::new("/dev/null")
    }

    fn objects(&self) -> Objects {
        Objects::Ublk { number: u32::MAX }
    }

    fn counters(&self) -> ExportCounters {
        ExportCounters::default()
    }

    fn resize(&mut self, _: u64) -> Result<()> {
        if self.fixed {
            bail!("this kernel does not change sizes");
        }
        Ok(())
    }

    fn abort(&mut self) {}
    fn let_go(&mut self) {}

    fn has_ended(&mut self) -> bool {
        false
    }

    fn end(&mut self) {}
}

const MIB: u64 = 1 << 20;

/// A device of `size_bytes` over a namespace of 2 MiB.
fn attachment(fixed: bool, size_bytes: u64) -> Attachment {
    let namespace = Namespace {
        block_count: 2 * MIB / 512,
        ..Namespace::example()
    };
    let backend = Device { fixed };
    let identity = Identity::of("nqn.2026-11.io.example:disk", &namespace);
    Attachment {
        name: Name::of(&identity.subnqn, identity.nsid),
        record: Record::new(identity, backend.objects(), None),
        path: backend.path().to_owned(),
        backend: Box::new(backend),
        how: String::new(),
        namespace,
        size_bytes,
        note: None,
        state: State::Live,
        shutdown: None,
        rate: Rate::default(),
    }
}

#[test]
fn a_device_that_was_taken_over_gets_the_size_of_the_namespace() {
    let mut attachment = attachment(false, MIB);
    attachment.resize();
    assert_eq!((attachment.size_bytes, attachment.note), (2 * MIB, None));
}

#[test]
fn a_device_that_cannot_change_its_size_is_served_and_says_so() {
    let mut attachment = attachment(true, MIB);
    attachment.resize();
    assert_eq!(attachment.size_bytes, MIB);
    let note = attachment.note.clone().unwrap();
    assert!(note.contains("does not change sizes"), "{note}");
    assert!(note.contains(&human(MIB)) && note.contains(&human(2 * MIB)));
    // The namespace is again what the device is.
    attachment.namespace.block_count = MIB / 512;
    attachment.resize();
    assert_eq!((attachment.size_bytes, attachment.note), (MIB, None));
}
