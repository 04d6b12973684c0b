//! The checks of commands.

use super::*;
use flexblk_nvme::{Cid, Lba, Sgl};
use proptest::prelude::*;

const VIEW: View = View {
    block_count: 1 << 20,
    device: 3,
    block_shift: 12,
    read_only: false,
    discard: true,
    gated: false,
};
const NSID: Nsid = Nsid::new(7);

fn parse_with(view: &View, bytes: [u8; 64], data_len: usize) -> Result<Request, Status> {
    Request::parse(Sqe::cast(&bytes), data_len, Addressing::Keyed, |nsid| {
        (nsid == NSID).then_some(view)
    })
}

fn parse(bytes: [u8; 64], data_len: usize) -> Result<Request, Status> {
    parse_with(&VIEW, bytes, data_len)
}

fn keyed(length: u32) -> Sgl {
    Sgl::Keyed {
        address: 0x1000,
        length,
        key: 9,
        invalidate: false,
    }
}

fn in_capsule(offset: u64, length: u32) -> Sgl {
    Sgl::InCapsule { offset, length }
}

fn write(lba: u64, blocks: u32) -> nvm::Write {
    nvm::Write {
        nsid: NSID,
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
    }
}

fn read(lba: u64, blocks: u32) -> nvm::Read {
    nvm::Read {
        nsid: NSID,
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
    }
}

#[test]
fn read_and_write_become_ranges() {
    let to = Remote {
        address: 0x1000,
        key: 9,
        invalidate: false,
    };
    let range = Range {
        device: 3,
        lba: 5,
        blocks: 2,
        block_shift: 12,
    };
    let got = parse(read(5, 2).emit(Cid::new(1), &keyed(8192)), 0);
    assert_eq!(got, Ok(Request::Read { range, to }));
    let got = parse(write(5, 2).emit(Cid::new(1), &in_capsule(0, 8192)), 8192);
    assert_eq!(
        got,
        Ok(Request::Write {
            range,
            from: Source::InCapsule(0),
            fua: false
        })
    );
    assert_eq!((range.offset_bytes(), range.len_bytes()), (20_480, 8192));
}

/// "If the specified LBA range extends beyond the size of the namespace, the controller shall
/// abort with LBA Out of Range" (NVM 2.1.1).
#[test]
fn ranges_end_with_the_namespace() {
    let last = VIEW.block_count - 1;
    assert!(parse(read(last, 1).emit(Cid::new(1), &keyed(4096)), 0).is_ok());
    for (lba, blocks) in [
        (last, 2),
        (VIEW.block_count, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, 65_536),
    ] {
        let bytes = read(lba, blocks).emit(Cid::new(1), &keyed(4096));
        assert_eq!(
            parse(bytes, 0),
            Err(StatusCode::LbaOutOfRange.dnr()),
            "{lba}+{blocks}"
        );
    }
}

/// "If a command is submitted that exceeds this transfer size, then the command is aborted with
/// a status code of Invalid Field in Command" (Base, MDTS).
#[test]
fn transfers_are_bounded() {
    let blocks = MAX_TRANSFER_BYTES >> 12;
    assert!(
        parse(
            read(0, blocks).emit(Cid::new(1), &keyed(MAX_TRANSFER_BYTES)),
            0
        )
        .is_ok()
    );
    let longer = read(0, blocks + 1).emit(Cid::new(1), &keyed(MAX_TRANSFER_BYTES + 4096));
    assert_eq!(parse(longer, 0), Err(StatusCode::InvalidField.dnr()));
}

/// TCP 3.3.2: in-capsule data and the Command Data Buffer descriptor are the only ones.
#[test]
fn each_transport_has_descriptors_of_its_own() {
    let parse = |bytes: [u8; 64], addressing| {
        Request::parse(Sqe::cast(&bytes), 0, addressing, |_| Some(&VIEW))
    };
    let transport = Sgl::Transport { length: 4096 };
    let kind = Err(StatusCode::SglDescriptorTypeInvalid.dnr());
    let read = |sgl: &Sgl| read(0, 1).emit(Cid::new(1), sgl);
    let write = |sgl: &Sgl| write(0, 1).emit(Cid::new(1), sgl);
    let (keyed, tcp) = (Addressing::Keyed, Addressing::Transport);
    assert_eq!(parse(read(&self::keyed(4096)), tcp), kind);
    assert_eq!(parse(write(&self::keyed(4096)), tcp), kind);
    assert_eq!(parse(read(&transport), keyed), kind);
    assert!(matches!(
        parse(read(&transport), tcp),
        Ok(Request::Read {
            to: Remote::NONE,
            ..
        })
    ));
    assert!(matches!(
        parse(write(&transport), tcp),
        Ok(Request::Write {
            from: Source::Remote(Remote::NONE),
            ..
        })
    ));
    assert_eq!(
        parse(read(&Sgl::Transport { length: 4095 }), tcp),
        Err(StatusCode::DataSglLengthInvalid.dnr())
    );
}

#[test]
fn descriptors_must_fit_the_command() {
    let length = Err(StatusCode::DataSglLengthInvalid.dnr());
    let kind = Err(StatusCode::SglDescriptorTypeInvalid.dnr());
    let offset = Err(StatusCode::SglOffsetInvalid.dnr());
    assert_eq!(parse(read(0, 1).emit(Cid::new(1), &keyed(4095)), 0), length);
    assert_eq!(parse(read(0, 1).emit(Cid::new(1), &keyed(8192)), 0), length);
    assert_eq!(
        parse(read(0, 1).emit(Cid::new(1), &in_capsule(0, 4096)), 4096),
        kind
    );
    assert_eq!(
        parse(
            read(0, 1).emit(Cid::new(1), &Sgl::Transport { length: 4096 }),
            0
        ),
        kind
    );
    assert_eq!(
        parse(write(0, 1).emit(Cid::new(1), &in_capsule(0, 512)), 512),
        length
    );
    assert_eq!(
        parse(write(0, 1).emit(Cid::new(1), &in_capsule(1, 4096)), 4096),
        offset
    );
    assert_eq!(
        parse(
            write(0, 1).emit(Cid::new(1), &in_capsule(u64::MAX, 4096)),
            4096
        ),
        offset
    );
    assert_eq!(
        parse(write(0, 1).emit(Cid::new(1), &in_capsule(0, 4096)), 4095),
        offset
    );
}

/// PSDT other than SGL, and fused operations that Identify's FUSES does not list, are Invalid
/// Field in Command (Base 4.1.1).
#[test]
fn flags_must_say_sgl_and_not_fused() {
    for flags in [0x00, 0x41, 0x42, 0xC0] {
        let mut bytes = read(0, 1).emit(Cid::new(1), &keyed(4096));
        bytes[1] = flags;
        assert_eq!(
            parse(bytes, 0),
            Err(StatusCode::InvalidField.dnr()),
            "{flags:#x}"
        );
    }
}

#[test]
fn unknown_namespaces_and_opcodes() {
    let other = nvm::Read {
        nsid: Nsid::BROADCAST,
        ..Default::default()
    };
    let bytes = other.emit(Cid::new(1), &keyed(4096));
    assert_eq!(
        parse(bytes, 0),
        Err(StatusCode::InvalidNamespaceOrFormat.dnr())
    );
    let mut bytes = read(0, 1).emit(Cid::new(1), &keyed(4096));
    for opcode in [0x0A, 0x7D, 0xFF] {
        bytes[0] = opcode;
        assert_eq!(
            parse(bytes, 0),
            Err(StatusCode::InvalidOpcode.dnr()),
            "{opcode:#x}"
        );
    }
}

/// "Namespace is Write Protected" for everything that would change a read-only namespace.
#[test]
fn read_only_namespaces_can_be_read() {
    let view = View {
        read_only: true,
        ..VIEW
    };
    let protected = Err(StatusCode::NamespaceWriteProtected.dnr());
    assert_eq!(
        parse_with(&view, write(0, 1).emit(Cid::new(1), &keyed(4096)), 0),
        protected
    );
    let zeroes = nvm::WriteZeroes {
        nsid: NSID,
        ..Default::default()
    };
    assert_eq!(
        parse_with(&view, zeroes.emit(Cid::new(1), &Sgl::NONE), 0),
        protected
    );
    assert!(parse_with(&view, read(0, 1).emit(Cid::new(1), &keyed(4096)), 0).is_ok());
}

#[test]
fn write_zeroes_is_bounded_and_takes_no_data() {
    let zeroes = |blocks| nvm::WriteZeroes {
        nsid: NSID,
        blocks,
        ..Default::default()
    };
    let most = (MAX_WRITE_ZEROES_BYTES >> 12) as u32;
    assert!(parse(zeroes(most).emit(Cid::new(1), &Sgl::NONE), 0).is_ok());
    let more = zeroes(most + 1).emit(Cid::new(1), &Sgl::NONE);
    assert_eq!(parse(more, 0), Err(StatusCode::InvalidField.dnr()));
}

/// "If the total number of logical blocks ... is greater than MCL", "if a Source Range is longer
/// than MSSRL", "if the number of Source Ranges is greater than MSRC": Command Size Limit
/// Exceeded (NVM 3.3.2).
#[test]
fn copies_are_bounded() {
    let copy = |ranges, format| nvm::Copy {
        nsid: NSID,
        sdlba: Lba::new(3),
        ranges,
        format,
        prinfo_read: 0,
        control: nvm::IoControl::new(),
        dspec: 0,
        tags: nvm::Tags::default(),
    };
    let emit = |ranges: u16, format| {
        let sgl = keyed(u32::from(ranges) * COPY_RANGE_BYTES);
        parse(copy(ranges, format).emit(Cid::new(1), &sgl), 0)
    };
    assert!(emit(MAX_COPY_RANGES, 0).is_ok() && emit(1, 2).is_ok());
    assert_eq!(emit(1, 1), Err(StatusCode::InvalidField.dnr()));
    let exceeded = Err(StatusCode::CommandSizeLimitExceeded.dnr());
    assert_eq!(
        emit(MAX_COPY_RANGES + 1, 0),
        exceeded.map(|()| unreachable!())
    );

    let source = |slba: u64, blocks: u32| {
        let mut range = nvm::CopyRange::zeroed();
        range.slba = flexblk_nvme::U64::new(slba);
        range.nlb = flexblk_nvme::U16::new((blocks - 1) as u16);
        copy_source(&range, &VIEW, &VIEW)
    };
    let most = MAX_COPY_BYTES >> VIEW.block_shift;
    assert_eq!(source(0, most).map(|range| range.blocks), Ok(most));
    assert_eq!(
        source(0, most + 1),
        Err(StatusCode::CommandSizeLimitExceeded.dnr())
    );
    assert_eq!(
        source(VIEW.block_count, 1),
        Err(StatusCode::LbaOutOfRange.dnr())
    );
    let other = View {
        block_shift: 9,
        ..VIEW
    };
    let differs = copy_source(&nvm::CopyRange::zeroed(), &other, &VIEW);
    assert_eq!(
        differs,
        Err(StatusCode::IncompatibleNamespaceOrFormat.dnr())
    );
    let beyond = copy_destination(0, most + 1, &VIEW);
    assert_eq!(beyond, Err(StatusCode::CommandSizeLimitExceeded.dnr()));
    let protected = View {
        read_only: true,
        ..VIEW
    };
    assert_eq!(
        copy_destination(0, 1, &protected),
        Err(StatusCode::NamespaceWriteProtected.dnr())
    );
}

#[test]
fn dataset_management_takes_a_page_for_its_ranges() {
    let dsm = nvm::DatasetManagement {
        nsid: NSID,
        ranges: 2,
        attributes: nvm::DsmAttributes::new().with_deallocate(true),
    };
    assert!(parse(dsm.emit(Cid::new(1), &keyed(4096)), 0).is_ok());
    assert!(parse(dsm.emit(Cid::new(1), &keyed(32)), 0).is_ok());
    let short = parse(dsm.emit(Cid::new(1), &keyed(31)), 0);
    assert_eq!(short, Err(StatusCode::DataSglLengthInvalid.dnr()));
    let advice = nvm::DatasetManagement {
        attributes: nvm::DsmAttributes::new(),
        ..dsm
    };
    assert_eq!(
        parse(advice.emit(Cid::new(1), &keyed(32)), 0),
        Ok(Request::Nothing)
    );
}

proptest! {
    /// Whatever a host sends: no panic, and what is accepted lies within the namespace, the
    /// limits and the capsule.
    #[test]
    fn accepted_requests_are_in_bounds(mut bytes: [u8; 64], opcode in 0u8..16, small: bool, data_len in 0usize..9000) {
        bytes[0] = opcode;
        bytes[1] = 0x40;
        bytes[4..8].copy_from_slice(&7u32.to_le_bytes());
        if small {
            bytes[42..48].fill(0);
            bytes[49..52].fill(0);
        }
        let inside = |range: Range| {
            range.blocks > 0 && range.lba + u64::from(range.blocks) <= VIEW.block_count
        };
        let fits = |from: Source, len: u64| match from {
            Source::InCapsule(offset) => u64::from(offset) + len <= data_len as u64,
            Source::Remote(_) => true,
        };
        if let Ok(request) = parse(bytes, data_len) {
            match request {
                Request::Read { range, .. } | Request::Verify { range } => {
                    prop_assert!(inside(range) && range.len_bytes() <= u64::from(MAX_TRANSFER_BYTES));
                }
                Request::Write { range, from, .. } | Request::Compare { range, from } => {
                    prop_assert!(inside(range) && fits(from, range.len_bytes()));
                }
                Request::WriteZeroes { range, .. } => {
                    prop_assert!(inside(range) && range.len_bytes() <= MAX_WRITE_ZEROES_BYTES);
                }
                Request::Deallocate { from, ranges, .. } => {
                    prop_assert!((1..=MAX_DSM_RANGES).contains(&ranges));
                    prop_assert!(fits(from, u64::from(ranges) * 16));
                }
                Request::Copy { from, destination, ranges, format, .. } => {
                    prop_assert!(inside(destination) && (1..=MAX_COPY_RANGES).contains(&ranges));
                    prop_assert!(format == 0 || format == 2);
                    prop_assert!(fits(from, u64::from(ranges) * 32));
                }
                Request::Reserve { command, from } => {
                    prop_assert!(fits(from, command.data_bytes().into()));
                }
                Request::Report { bytes } => prop_assert!(bytes <= MAX_TRANSFER_BYTES),
                Request::WriteUncorrectable { range } => prop_assert!(inside(range)),
                Request::Flush { .. } | Request::Nothing => {}
            }
        }
    }
}
