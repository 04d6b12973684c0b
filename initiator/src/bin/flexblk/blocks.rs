//! I/O commands under nvme-cli's names, one at a time: `flexblk flush`, `compare`, `write-zeroes`, `dsm`, `verify`,
//! `write-uncor`, `nvme-copy`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context, Result};
use flexblk_initiator::{BlockHandle, Controller, Data, Error, IoError, Nsid, StatusCode};
use flexblk_nvme::command::nvm;
use flexblk_nvme::{Lba, U16, U32, U64};

use crate::args::{Address, Connection};
use crate::connect;
use crate::exit::{Differs, Usage};
use crate::nvme_args::{Blocks, Compare, Dsm, Inspect, NvmeCopy, WriteZeroes};

/// A namespace, opened. The controller stays connected as long as the handle lives.
pub(crate) fn open(
    address: &Address,
    connection: &Connection,
) -> Result<(Controller, Nsid, BlockHandle)> {
    let (controller, namespace) = connect::open(address, connection)?;
    let handle = BlockHandle::open(&controller, namespace.nsid)?;
    Ok((controller, namespace.nsid, handle))
}

pub(crate) fn flush(args: &Inspect) -> Result<()> {
    let (_controller, _, mut handle) = open(&args.address, &args.connection)?;
    handle.flush()?;
    Ok(())
}

pub(crate) fn compare(args: &Compare) -> Result<()> {
    let Blocks {
        address,
        start_block,
        block_count,
        connection,
    } = &args.blocks;
    let (_controller, nsid, mut handle) = open(address, connection)?;
    let blocks = u32::from(*block_count) + 1;
    let bytes = blocks as usize * handle.namespace().block_size as usize;
    let data = read_data(&args.data, bytes)?;
    let command = nvm::Command::Compare(nvm::Compare {
        nsid,
        slba: Lba::new(*start_block),
        blocks,
        ..Default::default()
    });
    match handle.passthrough(&command, Data::Out(&data)) {
        Err(Error::Io(IoError::Nvme(status))) if status.is(StatusCode::CompareFailure) => {
            let last = start_block + u64::from(*block_count);
            Err(Differs(format!(
                "blocks {start_block} to {last} differ from the data"
            ))
            .into())
        }
        result => Ok(result?),
    }
}

/// Exactly `bytes` of a file, or of standard input.
fn read_data(path: &Path, bytes: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; bytes];
    let result = if path == Path::new("-") {
        io::stdin().lock().read_exact(&mut data)
    } else {
        File::open(path).and_then(|mut file| file.read_exact(&mut data))
    };
    result.with_context(|| format!("reading {bytes} bytes from {}", path.display()))?;
    Ok(data)
}

pub(crate) fn write_zeroes(args: &WriteZeroes) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.blocks.address, &args.blocks.connection)?;
    let command = nvm::Command::WriteZeroes(nvm::WriteZeroes {
        nsid,
        slba: Lba::new(args.blocks.start_block),
        blocks: u32::from(args.blocks.block_count) + 1,
        control: nvm::IoControl::new()
            .with_deac(args.deac)
            .with_fua(args.force_unit_access),
        ..Default::default()
    });
    handle.passthrough(&command, Data::None)?;
    Ok(())
}

pub(crate) fn verify(args: &Blocks) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let command = nvm::Command::Verify(nvm::Verify {
        nsid,
        slba: Lba::new(args.start_block),
        blocks: u32::from(args.block_count) + 1,
        ..Default::default()
    });
    handle.passthrough(&command, Data::None)?;
    Ok(())
}

pub(crate) fn dsm(args: &Dsm) -> Result<()> {
    let ranges = args.slbs.len();
    if ranges != args.blocks.len() || ranges > 256 {
        let text = "--slbs and --blocks list as many ranges, at most 256";
        return Err(Usage(text.into()).into());
    }
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let mut data = Vec::with_capacity(ranges * 16);
    for (lba, blocks) in args.slbs.iter().zip(&args.blocks) {
        let range = nvm::DsmRange {
            cattr: U32::ZERO,
            nlb: U32::new(*blocks),
            slba: U64::new(*lba),
        };
        data.extend_from_slice(range.bytes());
    }
    let command = nvm::Command::DatasetManagement(nvm::DatasetManagement {
        nsid,
        ranges: u16::try_from(ranges).context("too many ranges")?,
        attributes: nvm::DsmAttributes::new()
            .with_deallocate(args.ad)
            .with_integral_write(args.idw)
            .with_integral_read(args.idr),
    });
    handle.passthrough(&command, Data::Out(&data))?;
    Ok(())
}

pub(crate) fn write_uncor(args: &Blocks) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let command = nvm::Command::WriteUncorrectable(nvm::WriteUncorrectable {
        nsid,
        slba: Lba::new(args.start_block),
        blocks: u32::from(args.block_count) + 1,
        ..Default::default()
    });
    handle.passthrough(&command, Data::None)?;
    Ok(())
}

pub(crate) fn nvme_copy(args: &NvmeCopy) -> Result<()> {
    if args.slbs.len() != args.blocks.len() || args.slbs.len() > 256 {
        let text = "--slbs and --blocks list as many ranges, at most 256";
        return Err(Usage(text.into()).into());
    }
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let mut data = Vec::with_capacity(args.slbs.len() * nvm::CopyRange::SIZE);
    for (lba, blocks) in args.slbs.iter().zip(&args.blocks) {
        let mut range = nvm::CopyRange::zeroed();
        (range.slba, range.nlb) = (U64::new(*lba), U16::new(*blocks));
        data.extend_from_slice(range.bytes());
    }
    let command = nvm::Command::Copy(nvm::Copy {
        nsid,
        sdlba: Lba::new(args.sdlba),
        ranges: u16::try_from(args.slbs.len()).context("too many ranges")?,
        format: 0,
        prinfo_read: 0,
        control: nvm::IoControl::new().with_fua(args.force_unit_access),
        dspec: 0,
        tags: nvm::Tags::default(),
    });
    handle.passthrough(&command, Data::Out(&data))?;
    Ok(())
}
