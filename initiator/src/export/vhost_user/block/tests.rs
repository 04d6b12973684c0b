use std::sync::Arc;

use flexblk_reactor::{HugePages, SharedMemory};

use super::*;

fn device(block_size: u32) -> Device {
    let namespace = Namespace {
        block_size,
        block_count: 1000,
        eui64: [0xab; 8],
        optimal_io_bytes: 64 << 10,
        ..Namespace::example()
    };
    Device::new(&namespace, 4)
}

/// Memory to make chains of.
struct Guest(Arc<SharedMemory>);

impl Guest {
    fn new() -> Guest {
        Guest(SharedMemory::create("guest", 1 << 20, HugePages::No).unwrap())
    }

    /// A request: what the device reads, cut at `cuts`, and how much it may write, status included.
    fn chain(&self, readable: &[u8], cuts: &[usize], writable: &[u32]) -> Chain {
        let mut chain = Chain::default();
        let mut at = 0_usize;
        for end in cuts.iter().copied().chain([readable.len()]) {
            // A byte in between, so that pieces are pieces.
            let span = self
                .0
                .span((at + 7 * chain.readable.len()) as u64, (end - at) as u32);
            let span = span.unwrap();
            span.copy_from_slice(&readable[at..end]);
            chain.readable.push(span);
            at = end;
        }
        for (index, len) in writable.iter().enumerate() {
            let span = self.0.span((512 << 10) + 16384 * index as u64, *len);
            chain.writable.push(span.unwrap());
        }
        chain
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn work(device: &Device, chain: &mut Chain) -> Option<Work> {
    device.parse(chain).map(|(work, _)| work)
}

#[test]
fn header_and_status_are_found_wherever_descriptors_are_cut() {
    let guest = Guest::new();
    let mut request = header(1, 8);
    request.extend([7; 1024]);
    for cuts in [&[][..], &[16], &[3, 16], &[1, 2, 20, 500], &[15, 17]] {
        let mut chain = guest.chain(&request, cuts, &[1]);
        let expected = Work::Volume(Op::Write { fua: false }, 8, 2);
        assert_eq!(work(&device(512), &mut chain), Some(expected), "{cuts:?}");
        let data: u32 = chain.readable.iter().map(Span::len).sum();
        assert_eq!((data, chain.writable.len()), (1024, 0));
    }
    // The status is the last byte, also when it shares a buffer with data.
    let mut chain = guest.chain(&header(0, 0), &[], &[512, 513]);
    let (read, status) = device(512).parse(&mut chain).unwrap();
    assert_eq!(read, Work::Volume(Op::Read, 0, 2));
    let last = chain.writable.last().unwrap();
    assert_eq!(last.as_ptr().wrapping_add(512), status.as_ptr());
}

#[test]
fn without_a_status_there_is_no_answer_and_without_a_header_an_error() {
    let guest = Guest::new();
    assert_eq!(
        work(&device(512), &mut guest.chain(&header(0, 0), &[], &[])),
        None
    );
    let mut short = guest.chain(&header(0, 0)[..15], &[], &[1]);
    assert_eq!(
        work(&device(512), &mut short),
        Some(Work::Answer(Status::IoError))
    );
}

#[test]
fn transfers_that_cannot_be_are_answered_with_an_error() {
    let guest = Guest::new();
    let error = Some(Work::Answer(Status::IoError));
    // No data, no whole sector, data in both directions, behind the end, an end that is no number.
    for (kind, sector, readable, writable) in [
        (0, 0, 0, 1),
        (0, 0, 0, 512),
        (0, 0, 512, 513),
        (0, 1000, 0, 513),
        (0, 999, 0, 1025),
        (0, u64::MAX, 0, 513),
        (1, 0, 100, 1),
        (1, 0, 0, 1),
        (1, 0, 512, 513),
    ] {
        let mut request = header(kind, sector);
        request.extend(vec![0; readable]);
        let mut chain = guest.chain(&request, &[], &[writable]);
        assert_eq!(work(&device(512), &mut chain), error, "{kind} {sector}");
    }
    let mut unknown = guest.chain(&header(99, 0), &[], &[1]);
    let unsupported = Some(Work::Answer(Status::Unsupported));
    assert_eq!(work(&device(512), &mut unknown), unsupported);
    // Half a block of 4 KiB.
    let mut half = guest.chain(&header(0, 8), &[], &[2049]);
    assert_eq!(work(&device(4096), &mut half), error);
    let mut whole = guest.chain(&header(0, 8), &[], &[4097]);
    let read = Some(Work::Volume(Op::Read, 1, 1));
    assert_eq!(work(&device(4096), &mut whole), read);
}

#[test]
fn ranges_have_one_segment() {
    let guest = Guest::new();
    let parse = |kind: u32, segments: &[(u64, u32, u32)]| {
        let mut request = header(kind, 0);
        for (sector, sectors, flags) in segments {
            request.extend(sector.to_le_bytes());
            request.extend(sectors.to_le_bytes());
            request.extend(flags.to_le_bytes());
        }
        work(&device(512), &mut guest.chain(&request, &[16], &[1])).unwrap()
    };
    let zeroes = |deallocate| Work::Volume(Op::WriteZeroes { deallocate }, 10, 20);
    assert_eq!(parse(11, &[(10, 20, 0)]), Work::Volume(Op::Discard, 10, 20));
    assert_eq!(parse(13, &[(10, 20, 0)]), zeroes(false));
    assert_eq!(parse(13, &[(10, 20, 1)]), zeroes(true));
    let error = Work::Answer(Status::IoError);
    assert_eq!(parse(11, &[]), error);
    assert_eq!(parse(11, &[(10, 20, 0), (50, 20, 0)]), error);
    assert_eq!(parse(11, &[(10, 0, 0)]), error);
    assert_eq!(parse(13, &[(990, 20, 0)]), error);
    let unsupported = Work::Answer(Status::Unsupported);
    assert_eq!(parse(11, &[(10, 20, 1)]), unsupported);
    assert_eq!(parse(13, &[(10, 20, 2)]), unsupported);
}

#[test]
fn writes_are_durable_when_the_driver_expects_it() {
    let guest = Guest::new();
    let mut device = device(512);
    let mut request = header(1, 0);
    request.extend([0; 512]);
    let fua = |device: &Device| match work(device, &mut guest.chain(&request, &[], &[1])) {
        Some(Work::Volume(Op::Write { fua }, 0, 1)) => fua,
        other => panic!("{other:?}"),
    };
    let zeroes = Op::WriteZeroes { deallocate: false };
    device.set_features(device.features());
    assert!(!fua(&device) && !device.then_flush(zeroes));
    assert_eq!(device.config()[CONFIG_WRITEBACK], 1);
    device.set_features(device.features() & !feature::FLUSH);
    assert!(fua(&device) && device.then_flush(zeroes));
    assert!(!device.then_flush(Op::Discard) && !device.then_flush(Op::Read));
    assert!(!device.then_flush(Op::Write { fua: true }));
    assert_eq!(device.config()[CONFIG_WRITEBACK], 0);
    // Nothing is lost without a cache; one that appears is honoured.
    device.namespace.volatile_write_cache = false;
    assert!(!fua(&device) && !device.then_flush(zeroes));
    device.namespace.volatile_write_cache = true;
    assert!(fua(&device));
}

#[test]
fn the_cache_is_not_the_driver_s_to_switch_off() {
    let mut device = device(512);
    assert_eq!(device.features() & feature::CONFIG_WCE, 0);
    assert_ne!(device.features() & feature::FLUSH, 0);
    // A guest from before took it, and may have switched the cache off: nobody tells us.
    let taken = device.features() | feature::CONFIG_WCE;
    assert_eq!(taken & !device.known_features(), 0);
    device.set_features(taken);
    assert!(device.write_through());
    device.set_writeback(true);
    assert!(!device.write_through());
    device.set_writeback(false);
    assert!(device.write_through());
}

#[test]
fn the_configuration_space_has_the_fields_of_the_specification() {
    let config = device(4096).config();
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 8000);
    assert_eq!([12, 20, 28, 44].map(u32_at), [254, 4096, 16, 8]);
    assert_eq!(u16::from_le_bytes([config[34], config[35]]), 4);
    assert_eq!(&device(512).id()[..16], b"abababababababab");
    let mut read_only = device(512);
    read_only.namespace.read_only = true;
    assert_eq!(
        read_only.features() & (feature::RO | feature::DISCARD),
        feature::RO
    );
}
