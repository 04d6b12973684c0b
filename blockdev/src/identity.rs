//! Stable identities for devices that have none of their own.

use uuid::{Builder, Uuid};

/// A UUID (version 8, RFC 9562 section 5.8) out of `parts`; the same parts give the same one.
pub(crate) fn derived(parts: &[&[u8]]) -> Uuid {
    let half = |basis: u64| {
        // FNV-1a with the part's end mixed in; identity only, nobody gains by a collision
        parts.iter().fold(basis, |hash, part| {
            let hash = part.iter().fold(hash, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
            (hash ^ 0x1ff).wrapping_mul(0x100_0000_01b3)
        })
    };
    let (high, low) = (half(0xcbf2_9ce4_8422_2325), half(0x6c62_272e_07bb_0142));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&high.to_be_bytes());
    bytes[8..].copy_from_slice(&low.to_be_bytes());
    Builder::from_custom_bytes(bytes).into_uuid()
}

/// Of this machine, so that equal paths on two machines are two identities; empty if there is none.
pub(crate) fn machine_id() -> Vec<u8> {
    std::fs::read("/etc/machine-id").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_identities_depend_on_every_part() {
        let a = derived(&[b"ab", b"c"]);
        assert_eq!(a, derived(&[b"ab", b"c"]));
        assert_ne!(a, derived(&[b"a", b"bc"]));
        assert_ne!(a, derived(&[b"ab", b"d"]));
        assert_eq!(a.get_version_num(), 8);
    }
}
