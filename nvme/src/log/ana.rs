//! Asymmetric Namespace Access log page (LID 0Ch, Base 5.1.12.1.13).

use zerocopy::FromBytes;

use crate::ids::Nsid;
use crate::{U16, U32, U64};

wire! {
    /// Head of the page.
    pub struct Header: 16 {
        /// Change Count: rises with every change of the page.
        0 => pub change_count: U64,
        /// Number of ANA Group Descriptors.
        8 => pub groups: U16,
        10 => _r10: [u8; 6],
    }
}

wire! {
    /// Head of an ANA Group Descriptor; its namespace identifiers follow.
    pub struct GroupHeader: 32 {
        /// ANA Group ID.
        0 => pub id: U32,
        /// Number of NSID Values.
        4 => pub namespaces: U32,
        /// Change Count of the group.
        8 => pub change_count: U64,
        /// Asymmetric Namespace Access State in 3:0.
        16 => pub state: u8,
        17 => _r17: [u8; 15],
    }
}

open_enum! {
    /// Asymmetric Namespace Access State (Base 8.1.1).
    pub enum AnaState {
        /// The controller is the best way to the group.
        Optimized = 0x1,
        /// It works, another may be better.
        NonOptimized = 0x2,
        /// Not through this controller now.
        Inaccessible = 0x3,
        /// Never again through this controller.
        PersistentLoss = 0x4,
        /// Changing; wait up to ANATT.
        Change = 0xF,
    }
}

/// A group of namespaces that share their state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// ANA Group ID, from 1 on.
    pub id: u32,
    /// Its state.
    pub state: AnaState,
    /// Change count.
    pub change_count: u64,
    /// Namespaces, ascending; none when the host asked for groups only.
    pub namespaces: &'a [U32],
}

/// Bit 0 of Get Log Page's LSP: Return Groups Only (RGO).
pub const RETURN_GROUPS_ONLY: u8 = 1;

/// Why a page cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ANA log page is cut off at byte {0}")]
pub struct CutOff(pub usize);

/// Builds the page.
#[must_use]
pub fn emit<'a>(change_count: u64, groups: impl IntoIterator<Item = Group<'a>>) -> Vec<u8> {
    let mut page = vec![0; Header::SIZE];
    let mut count: u16 = 0;
    for group in groups {
        let Some(next) = count.checked_add(1) else {
            break;
        };
        count = next;
        let head = GroupHeader {
            id: U32::new(group.id),
            namespaces: U32::new(group.namespaces.len() as u32),
            change_count: U64::new(group.change_count),
            state: group.state.raw() & 0xF,
            ..GroupHeader::zeroed()
        };
        page.extend_from_slice(head.bytes());
        page.extend_from_slice(zerocopy::IntoBytes::as_bytes(group.namespaces));
    }
    let header = Header {
        change_count: U64::new(change_count),
        groups: U16::new(count),
        ..Header::zeroed()
    };
    if let Some(front) = page.get_mut(..Header::SIZE) {
        front.copy_from_slice(header.bytes());
    }
    page
}

/// The page's change count and its groups. An error ends the groups.
pub fn parse(page: &[u8]) -> Result<(u64, Groups<'_>), CutOff> {
    let (header, rest) = Header::ref_from_prefix(page).map_err(|_| CutOff(0))?;
    let groups = Groups {
        rest,
        left: header.groups.get(),
        offset: Header::SIZE,
    };
    Ok((header.change_count.get(), groups))
}

/// The groups of a page.
#[derive(Clone, Debug)]
pub struct Groups<'a> {
    rest: &'a [u8],
    left: u16,
    offset: usize,
}

impl<'a> Iterator for Groups<'a> {
    type Item = Result<Group<'a>, CutOff>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let group = split_group(self.rest);
        let Some((group, rest)) = group else {
            self.left = 0;
            return Some(Err(CutOff(self.offset)));
        };
        self.offset += self.rest.len() - rest.len();
        self.rest = rest;
        Some(Ok(group))
    }
}

fn split_group(bytes: &[u8]) -> Option<(Group<'_>, &[u8])> {
    let (head, rest) = GroupHeader::ref_from_prefix(bytes).ok()?;
    let count = usize::try_from(head.namespaces.get()).ok()?;
    let (namespaces, rest) = <[U32]>::ref_from_prefix_with_elems(rest, count).ok()?;
    let group = Group {
        id: head.id.get(),
        state: AnaState::from_raw(head.state & 0xF),
        change_count: head.change_count.get(),
        namespaces,
    };
    Some((group, rest))
}

impl Group<'_> {
    /// The namespaces.
    pub fn nsids(&self) -> impl Iterator<Item = Nsid> + '_ {
        self.namespaces.iter().map(|nsid| Nsid::new(nsid.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cut_off_pages_are_refused() {
        let namespaces = [U32::new(1), U32::new(2)];
        let group = Group {
            id: 1,
            state: AnaState::Optimized,
            change_count: 0,
            namespaces: &namespaces,
        };
        let page = emit(7, [group.clone(), group.clone()]);
        assert_eq!(page.len(), 16 + 2 * 40);
        let (count, groups) = parse(&page[..90]).unwrap();
        assert_eq!(count, 7);
        assert_eq!(groups.collect::<Vec<_>>(), [Ok(group), Err(CutOff(56))]);
        assert_eq!(parse(&page[..15]).err(), Some(CutOff(0)));
    }

    proptest! {
        #[test]
        fn round_trips(
            change_count: u64,
            groups in proptest::collection::vec((any::<u32>(), 0u8..16, any::<u64>(), proptest::collection::vec(any::<u32>(), 0..9)), 0..9),
        ) {
            let lists: Vec<Vec<U32>> = groups.iter().map(|group| group.3.iter().copied().map(U32::new).collect()).collect();
            let groups: Vec<Group<'_>> = groups.iter().zip(&lists).map(|((id, state, change_count, _), list)| {
                Group { id: *id, state: AnaState::from_raw(*state), change_count: *change_count, namespaces: list }
            }).collect();
            let page = emit(change_count, groups.clone());
            let (count, again) = parse(&page).unwrap();
            prop_assert_eq!(count, change_count);
            prop_assert_eq!(again.collect::<Result<Vec<_>, _>>().unwrap(), groups);
        }

        #[test]
        fn random_bytes_are_read(page in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..400)) {
            if let Ok((_, groups)) = parse(&page) {
                prop_assert!(groups.count() <= 13);
            }
        }
    }
}
