//! Whether two paths lead to the same namespace, and what it can do by all of them.

use crate::Namespace;

/// Why the namespace of a path is not the volume's; `Ok`: it is.
///
/// An identifier that both have decides (Base 4.7.1). Without any, the same size and block size have to do.
pub(crate) fn same(volume: &Namespace, path: &Namespace) -> Result<(), String> {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let id = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0).then(|| hex(bytes));
    let pairs = [
        (
            "UUID",
            volume.uuid.map(|uuid| uuid.to_string()),
            path.uuid.map(|uuid| uuid.to_string()),
        ),
        ("NGUID", id(&volume.nguid), id(&path.nguid)),
        ("EUI64", id(&volume.eui64), id(&path.eui64)),
    ];
    let mut known = false;
    for (name, ours, theirs) in pairs {
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            if ours != theirs {
                return Err(format!("its {name} is {theirs}, the volume's is {ours}"));
            }
            known = true;
        }
    }
    if path.block_size != volume.block_size {
        return Err(format!(
            "its blocks have {} bytes, the volume's {}",
            path.block_size, volume.block_size
        ));
    }
    if !known && path.block_count != volume.block_count {
        return Err(format!(
            "neither has an identifier in common with the other, and it has {} blocks, the volume {}",
            path.block_count, volume.block_count
        ));
    }
    Ok(())
}

/// The namespace as every path can serve it. `fresh` is the one that was heard of last: its size counts.
pub(crate) fn common<'a>(
    fresh: &Namespace,
    paths: impl Iterator<Item = &'a Namespace>,
) -> Namespace {
    paths.fold(fresh.clone(), |mut all, path| {
        all.read_only |= path.read_only;
        all.deallocated_reads_zero &= path.deallocated_reads_zero;
        all.max_transfer_bytes = all.max_transfer_bytes.min(path.max_transfer_bytes);
        all.max_blocks = all.max_blocks.min(path.max_blocks);
        all.write_zeroes &= path.write_zeroes;
        all.discard &= path.discard;
        all.compare &= path.compare;
        all.verify &= path.verify;
        all.volatile_write_cache |= path.volatile_write_cache;
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MaxBlocks, Nsid};

    fn namespace() -> Namespace {
        Namespace {
            nsid: Nsid::new(1),
            block_size: 4096,
            block_count: 100,
            uuid: None,
            nguid: [0; 16],
            eui64: [0; 8],
            read_only: false,
            deallocated_reads_zero: true,
            optimal_io_bytes: 0,
            max_transfer_bytes: 1 << 20,
            max_blocks: MaxBlocks::EXPRESSIBLE,
            write_zeroes: true,
            discard: true,
            compare: true,
            compare_and_write: true,
            verify: true,
            volatile_write_cache: false,
        }
    }

    #[test]
    fn identifiers_decide_then_sizes() {
        let (volume, mut path) = (namespace(), namespace());
        assert_eq!(same(&volume, &path), Ok(()));
        path.block_count = 101;
        assert!(same(&volume, &path).unwrap_err().contains("101 blocks"));
        // It has grown: the identifier says that it is the same.
        let named = Namespace {
            nguid: [7; 16],
            ..namespace()
        };
        path.nguid = [7; 16];
        assert_eq!(same(&named, &path), Ok(()));
        path.uuid = Some(uuid::Uuid::from_u128(1));
        assert_eq!(same(&named, &path), Ok(()), "only one has a UUID");
        path.nguid = [8; 16];
        assert!(same(&named, &path).unwrap_err().contains("NGUID"));
        path.nguid = [7; 16];
        path.block_size = 512;
        assert!(same(&named, &path).unwrap_err().contains("512 bytes"));
    }

    #[test]
    fn what_one_path_cannot_do_the_volume_cannot() {
        let poor = Namespace {
            discard: false,
            read_only: true,
            max_transfer_bytes: 4096,
            max_blocks: MaxBlocks {
                write_zeroes: 1024,
                ..MaxBlocks::EXPRESSIBLE
            },
            ..namespace()
        };
        let all = common(&namespace(), [&namespace(), &poor].into_iter());
        assert_eq!(
            (all.discard, all.read_only, all.max_transfer_bytes),
            (false, true, 4096)
        );
        assert_eq!(all.max_blocks, poor.max_blocks);
        assert!(all.compare);
    }
}
