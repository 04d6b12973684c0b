//! Identify data structures (Base 5.1.13.2, NVM 4.1.5).

mod capabilities;
mod controller;
pub mod descriptors;
mod namespace;

pub use capabilities::*;
pub use controller::*;
pub use namespace::*;

use crate::U32;
use crate::ids::Nsid;

wire! {
    /// A namespace list (Base 4.6.2): data of Identify CNS 02h and 10h, and the Changed Attached
    /// Namespace List log page. Identifiers ascend; zeros fill the rest.
    pub struct NamespaceList: 4096 {
        /// Entries.
        0 => pub nsid: [U32; 1024],
    }
}

impl NamespaceList {
    /// The identifiers above `after`, ascending, as Identify CNS 02h lists them. `namespaces` must
    /// ascend.
    #[must_use]
    pub fn above(after: Nsid, namespaces: impl IntoIterator<Item = Nsid>) -> Self {
        let mut list = Self::zeroed();
        let above = namespaces.into_iter().filter(|nsid| *nsid > after);
        for (entry, nsid) in list.nsid.iter_mut().zip(above) {
            *entry = U32::new(nsid.get());
        }
        list
    }

    /// The identifiers up to the first 0.
    pub fn iter(&self) -> impl Iterator<Item = Nsid> + '_ {
        self.nsid
            .iter()
            .map(|nsid| Nsid::new(nsid.get()))
            .take_while(|nsid| *nsid != Nsid::NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn list_continues_where_it_ended(ids in proptest::collection::btree_set(1u32..5000, 0..3000)) {
            let all: Vec<Nsid> = ids.iter().copied().map(Nsid::new).collect();
            let mut seen = Vec::new();
            loop {
                let after = seen.last().copied().unwrap_or(Nsid::NONE);
                let list = NamespaceList::above(after, all.iter().copied());
                let before = seen.len();
                seen.extend(NamespaceList::view(list.bytes()).unwrap().iter());
                if seen.len() == before {
                    break;
                }
            }
            prop_assert_eq!(seen, all);
        }
    }
}
