//! Namespace Identification Descriptor list (CNS 03h, Base 5.1.13.2.3).

use uuid::Uuid;

use crate::command::admin::Csi;

/// Length of the list in bytes.
pub const LIST_LEN: usize = 4096;

// Namespace Identifier Type (NIDT) and its length (NIDL).
const EUI64: (u8, u8) = (1, 8);
const NGUID: (u8, u8) = (2, 16);
const UUID: (u8, u8) = (3, 16);
const CSI: (u8, u8) = (4, 1);

const HEADER_LEN: usize = 4;

/// A namespace identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// NIDT 1h: IEEE Extended Unique Identifier.
    Eui64([u8; 8]),
    /// NIDT 2h: Namespace Globally Unique Identifier.
    Nguid([u8; 16]),
    /// NIDT 3h: Namespace UUID.
    Uuid(Uuid),
    /// NIDT 4h: the namespace's command set.
    Csi(Csi),
}

/// Why a list cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// A descriptor goes past the end of the list.
    #[error("namespace identification descriptor at byte {0} is cut off")]
    CutOff(usize),
    /// The length does not belong to the type.
    #[error("namespace identification descriptor of type {nidt} has length {nidl}")]
    Length {
        /// Namespace Identifier Type.
        nidt: u8,
        /// Namespace Identifier Length.
        nidl: u8,
    },
}

/// The list with those descriptors, zeros behind them. What does not fit is left out (the longest
/// possible set of distinct types takes 61 bytes).
#[must_use]
pub fn emit(descriptors: &[Descriptor]) -> [u8; LIST_LEN] {
    let mut list = [0; LIST_LEN];
    let mut rest = list.as_mut_slice();
    for descriptor in descriptors {
        let csi;
        let ((nidt, nidl), id): (_, &[u8]) = match descriptor {
            Descriptor::Eui64(id) => (EUI64, id),
            Descriptor::Nguid(id) => (NGUID, id),
            Descriptor::Uuid(id) => (UUID, id.as_bytes()),
            Descriptor::Csi(id) => {
                csi = [id.raw()];
                (CSI, &csi)
            }
        };
        let Some((to, behind)) = rest.split_at_mut_checked(HEADER_LEN + id.len()) else {
            break;
        };
        let (header, body) = to.split_at_mut(HEADER_LEN);
        header.copy_from_slice(&[nidt, nidl, 0, 0]);
        body.copy_from_slice(id);
        rest = behind;
    }
    list
}

/// The descriptors of a list, up to the first of type 0; types that are not known are skipped.
pub fn iter(list: &[u8]) -> impl Iterator<Item = Result<Descriptor, DescriptorError>> + '_ {
    let mut offset = 0;
    core::iter::from_fn(move || {
        loop {
            let (&[nidt, nidl, _, _], rest) = list.get(offset..)?.split_first_chunk()?;
            if nidt == 0 {
                return None;
            }
            let Some(id) = rest.get(..usize::from(nidl)) else {
                let error = DescriptorError::CutOff(offset);
                offset = list.len();
                return Some(Err(error));
            };
            offset += HEADER_LEN + id.len();
            if let Some(item) = read(nidt, nidl, id) {
                return Some(item);
            }
        }
    })
}

fn read(nidt: u8, nidl: u8, id: &[u8]) -> Option<Result<Descriptor, DescriptorError>> {
    let descriptor = match nidt {
        1 => id.try_into().ok().map(Descriptor::Eui64),
        2 => id.try_into().ok().map(Descriptor::Nguid),
        3 => id
            .try_into()
            .ok()
            .map(Uuid::from_bytes)
            .map(Descriptor::Uuid),
        4 => <[u8; 1]>::try_from(id)
            .ok()
            .map(|[csi]| Descriptor::Csi(Csi::from_raw(csi))),
        _ => return None,
    };
    Some(descriptor.ok_or(DescriptorError::Length { nidt, nidl }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unknown_types_are_skipped_and_errors_end_or_report() {
        let mut list = vec![9, 2, 0, 0, 1, 1];
        list.extend([4, 1, 0, 0, 2]);
        list.extend([1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        list.extend([3, 16, 0, 0, 5]);
        let all: Vec<_> = iter(&list).collect();
        assert_eq!(
            all,
            [
                Ok(Descriptor::Csi(Csi::Zoned)),
                Err(DescriptorError::Length { nidt: 1, nidl: 7 }),
                Err(DescriptorError::CutOff(22)),
            ]
        );
    }

    fn descriptor() -> impl Strategy<Value = Descriptor> {
        prop_oneof![
            any::<[u8; 8]>().prop_map(Descriptor::Eui64),
            any::<[u8; 16]>().prop_map(Descriptor::Nguid),
            any::<u128>().prop_map(|id| Descriptor::Uuid(Uuid::from_u128(id))),
            any::<u8>().prop_map(|csi| Descriptor::Csi(Csi::from_raw(csi))),
        ]
    }

    proptest! {
        #[test]
        fn round_trips(descriptors in proptest::collection::vec(descriptor(), 0..20)) {
            let list = emit(&descriptors);
            let again: Vec<_> = iter(&list).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!(again, descriptors);
        }

        #[test]
        fn random_bytes_are_read(list in proptest::collection::vec(0u8..20, 0..300)) {
            prop_assert!(iter(&list).count() <= 75);
        }
    }
}
