//! Memory regions: who may touch which bytes, by local key or by unguessable remote key.
//!
//! A registered span is lent to the engine: it stays mapped until `Engine::deregister` has
//! returned and every train that was built before has left. Payload is only ever moved by raw
//! copies, so a peer or another thread that writes at the same time changes bytes, nothing else.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use flexblk_reactor::{SharedMemory, Span};

use crate::engine::random::Random;
use crate::verbs::{Access, Lkey, Mr, Pd, Rkey, VerbsError};

/// Why a range of memory cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryFault {
    /// No such key, or of another domain.
    Key,
    /// Outside the region.
    Bounds,
    /// The region does not allow it.
    Access,
}

struct Region {
    lkey: u32,
    pd: Pd,
    ptr: NonNull<u8>,
    addr: u64,
    len: u64,
    access: Access,
    /// `None` after an invalidation.
    rkey: Option<u32>,
    /// Keeps a memfd mapping alive.
    _keep: Option<Arc<SharedMemory>>,
}

// SAFETY: `ptr` is only used to make spans, whose own contract allows use from any thread.
unsafe impl Send for Region {}

impl Region {
    fn slice(&self, addr: u64, len: u32, need: Access) -> Result<Span, MemoryFault> {
        let offset = addr.wrapping_sub(self.addr);
        if offset > self.len || u64::from(len) > self.len - offset {
            return Err(MemoryFault::Bounds);
        }
        if !self.access.contains(need) {
            return Err(MemoryFault::Access);
        }
        // SAFETY: offset + len lie inside the region, which its owner lent until deregistration.
        Ok(unsafe { Span::from_raw_parts(self.ptr.add(offset as usize), len) })
    }
}

/// All regions of an engine.
pub(crate) struct MemoryTable {
    /// By the low half of an lkey; the high half is the slot's generation.
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Open addressing by rkey, at most half full: (rkey, slot).
    rkeys: Vec<Option<(u32, u16)>>,
    live: usize,
    limit: usize,
}

struct Slot {
    generation: u16,
    region: Option<Region>,
}

impl MemoryTable {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            rkeys: vec![None; 64],
            live: 0,
            limit: limit.min(usize::from(u16::MAX)),
        }
    }

    pub(crate) fn register(
        &mut self,
        pd: Pd,
        ptr: NonNull<u8>,
        len: u64,
        access: Access,
        keep: Option<Arc<SharedMemory>>,
        random: &mut Random,
    ) -> Result<Mr, VerbsError> {
        if access.contains(Access::REMOTE_WRITE) && !access.contains(Access::LOCAL_WRITE) {
            return Err(VerbsError::Access);
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < self.limit => {
                self.slots.push(Slot {
                    generation: 1,
                    region: None,
                });
                (self.slots.len() - 1) as u16
            }
            None => return Err(VerbsError::TableFull("memory region")),
        };
        self.live += 1;
        if self.live * 2 > self.rkeys.len() {
            self.grow();
        }
        let rkey = self.fresh_rkey(index, random);
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return Err(VerbsError::TableFull("memory region"));
        };
        let lkey = u32::from(slot.generation) << 16 | u32::from(index);
        let addr = ptr.as_ptr() as u64;
        slot.region = Some(Region {
            lkey,
            pd,
            ptr,
            addr,
            len,
            access,
            rkey: Some(rkey),
            _keep: keep,
        });
        Ok(Mr {
            lkey: Lkey(lkey),
            rkey: Rkey(rkey),
            addr,
            len,
        })
    }

    pub(crate) fn deregister(&mut self, lkey: Lkey) -> Result<(), VerbsError> {
        let slot = self
            .slots
            .get_mut(lkey.0 as usize & 0xFFFF)
            .ok_or(VerbsError::Unknown("memory region"))?;
        let region = slot
            .region
            .take_if(|region| region.lkey == lkey.0)
            .ok_or(VerbsError::Unknown("memory region"))?;
        slot.generation = slot.generation.wrapping_add(1).max(1);
        self.live -= 1;
        self.free.push(lkey.0 as u16);
        if let Some(rkey) = region.rkey {
            self.forget_rkey(rkey);
        }
        Ok(())
    }

    /// Bytes of a region by its local key.
    #[inline]
    pub(crate) fn local(
        &self,
        pd: Pd,
        lkey: Lkey,
        addr: u64,
        len: u32,
        need: Access,
    ) -> Result<Span, MemoryFault> {
        match self.region(lkey) {
            Some(region) if region.pd == pd => region.slice(addr, len, need),
            _ => Err(MemoryFault::Key),
        }
    }

    /// Bytes of a region by its remote key.
    #[inline]
    pub(crate) fn remote(
        &self,
        pd: Pd,
        rkey: u32,
        addr: u64,
        len: u32,
        need: Access,
    ) -> Result<Span, MemoryFault> {
        let region = self
            .find_rkey(rkey)
            .and_then(|(_, index)| self.slots.get(usize::from(index))?.region.as_ref());
        match region {
            Some(region) if region.pd == pd => region.slice(addr, len, need),
            _ => Err(MemoryFault::Key),
        }
    }

    /// Takes a remote key out of use, for a peer that sent SEND_WITH_INV.
    pub(crate) fn invalidate(&mut self, pd: Pd, rkey: u32) -> Result<(), MemoryFault> {
        let (_, index) = self.find_rkey(rkey).ok_or(MemoryFault::Key)?;
        let region = self
            .slots
            .get_mut(usize::from(index))
            .and_then(|slot| slot.region.as_mut())
            .filter(|region| region.pd == pd)
            .ok_or(MemoryFault::Key)?;
        region.rkey = None;
        self.forget_rkey(rkey);
        Ok(())
    }

    /// Gives a region a new remote key; the old one stops working.
    pub(crate) fn rekey(&mut self, lkey: Lkey, random: &mut Random) -> Result<Rkey, VerbsError> {
        let old = self
            .region(lkey)
            .ok_or(VerbsError::Unknown("memory region"))?
            .rkey;
        if let Some(old) = old {
            self.forget_rkey(old);
        }
        let index = lkey.0 as u16;
        let rkey = self.fresh_rkey(index, random);
        if let Some(region) = self
            .slots
            .get_mut(usize::from(index))
            .and_then(|slot| slot.region.as_mut())
        {
            region.rkey = Some(rkey);
        }
        Ok(Rkey(rkey))
    }

    /// Whether any region belongs to this domain.
    pub(crate) fn uses(&self, pd: Pd) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.region.as_ref().is_some_and(|region| region.pd == pd))
    }

    /// Live regions.
    pub(crate) fn len(&self) -> usize {
        self.live
    }

    #[inline]
    fn region(&self, lkey: Lkey) -> Option<&Region> {
        let region = self.slots.get(lkey.0 as usize & 0xFFFF)?.region.as_ref()?;
        (region.lkey == lkey.0).then_some(region)
    }

    /// Position and slot of a remote key. The key is random, so its low bits are the hash.
    #[inline]
    fn find_rkey(&self, rkey: u32) -> Option<(usize, u16)> {
        let mask = self.rkeys.len() - 1;
        let mut at = rkey as usize & mask;
        // Ends: the table is at most half full.
        while let Some((key, index)) = *self.rkeys.get(at)? {
            if key == rkey {
                return Some((at, index));
            }
            at = (at + 1) & mask;
        }
        None
    }

    fn fresh_rkey(&mut self, index: u16, random: &mut Random) -> u32 {
        loop {
            let rkey = random.next_u32();
            if rkey != 0 && self.find_rkey(rkey).is_none() {
                self.place_rkey(rkey, index);
                return rkey;
            }
        }
    }

    fn place_rkey(&mut self, rkey: u32, index: u16) {
        let mask = self.rkeys.len() - 1;
        let mut at = rkey as usize & mask;
        while let Some(entry) = self.rkeys.get_mut(at) {
            if entry.is_none() {
                *entry = Some((rkey, index));
                return;
            }
            at = (at + 1) & mask;
        }
    }

    /// Removes by shifting later entries of the run back, so that no tombstones pile up.
    fn forget_rkey(&mut self, rkey: u32) {
        let Some((mut hole, _)) = self.find_rkey(rkey) else {
            return;
        };
        let mask = self.rkeys.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(&Some((key, index))) = self.rkeys.get(at) else {
                break;
            };
            let home = key as usize & mask;
            // May move into the hole unless its home lies between the hole and itself.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                if let Some(entry) = self.rkeys.get_mut(hole) {
                    *entry = Some((key, index));
                }
                hole = at;
            }
        }
        if let Some(entry) = self.rkeys.get_mut(hole) {
            *entry = None;
        }
    }

    fn grow(&mut self) {
        let bigger = vec![None; self.rkeys.len() * 2];
        let old = std::mem::replace(&mut self.rkeys, bigger);
        for (rkey, index) in old.into_iter().flatten() {
            self.place_rkey(rkey, index);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn region(table: &mut MemoryTable, random: &mut Random, pd: Pd, access: Access) -> Mr {
        let bytes = Box::leak(vec![0u8; 256].into_boxed_slice());
        let ptr = NonNull::new(bytes.as_mut_ptr()).unwrap();
        table.register(pd, ptr, 256, access, None, random).unwrap()
    }

    #[test]
    fn checks_domain_bounds_access_and_generation() {
        let mut table = MemoryTable::new(4);
        let mut random = Random::new(1);
        let mr = region(
            &mut table,
            &mut random,
            Pd(1),
            Access::LOCAL_WRITE | Access::REMOTE_READ,
        );
        let read = Access::REMOTE_READ;
        assert_eq!(
            table
                .remote(Pd(1), mr.rkey.0, mr.addr, 256, read)
                .unwrap()
                .len(),
            256
        );
        assert_eq!(
            table
                .remote(Pd(1), mr.rkey.0, mr.addr + 256, 0, read)
                .unwrap()
                .len(),
            0
        );
        let fault = |addr, len, access| table.remote(Pd(1), mr.rkey.0, addr, len, access).err();
        assert_eq!(fault(mr.addr, 257, read), Some(MemoryFault::Bounds));
        assert_eq!(fault(mr.addr + 257, 0, read), Some(MemoryFault::Bounds));
        assert_eq!(
            fault(mr.addr.wrapping_sub(1), 1, read),
            Some(MemoryFault::Bounds)
        );
        assert_eq!(fault(u64::MAX, u32::MAX, read), Some(MemoryFault::Bounds));
        assert_eq!(
            fault(mr.addr, 1, Access::REMOTE_WRITE),
            Some(MemoryFault::Access)
        );
        let other = table.remote(Pd(2), mr.rkey.0, mr.addr, 1, read).err();
        assert_eq!(other, Some(MemoryFault::Key));
        table.deregister(mr.lkey).unwrap();
        let again = region(&mut table, &mut random, Pd(1), Access::LOCAL_WRITE);
        assert_ne!(again.lkey, mr.lkey, "the slot is reused, the key is not");
        let stale = table
            .local(Pd(1), mr.lkey, again.addr, 1, Access::empty())
            .err();
        assert_eq!(stale, Some(MemoryFault::Key));
        assert_eq!(
            table.deregister(mr.lkey),
            Err(VerbsError::Unknown("memory region"))
        );
    }

    #[test]
    fn remote_write_needs_local_write_and_the_table_is_bounded() {
        let mut table = MemoryTable::new(1);
        let mut random = Random::new(1);
        let ptr = NonNull::dangling();
        let refused = table.register(Pd(1), ptr, 0, Access::REMOTE_WRITE, None, &mut random);
        assert_eq!(refused, Err(VerbsError::Access));
        region(&mut table, &mut random, Pd(1), Access::empty());
        let full = table.register(Pd(1), ptr, 0, Access::empty(), None, &mut random);
        assert_eq!(full, Err(VerbsError::TableFull("memory region")));
    }

    #[test]
    fn invalidated_key_works_no_more_until_a_new_one_is_made() {
        let mut table = MemoryTable::new(4);
        let mut random = Random::new(1);
        let mr = region(&mut table, &mut random, Pd(1), Access::REMOTE_READ);
        assert_eq!(table.invalidate(Pd(2), mr.rkey.0), Err(MemoryFault::Key));
        assert_eq!(table.invalidate(Pd(1), mr.rkey.0), Ok(()));
        assert_eq!(table.invalidate(Pd(1), mr.rkey.0), Err(MemoryFault::Key));
        let read = Access::REMOTE_READ;
        assert_eq!(
            table.remote(Pd(1), mr.rkey.0, mr.addr, 1, read).err(),
            Some(MemoryFault::Key)
        );
        let rkey = table.rekey(mr.lkey, &mut random).unwrap();
        assert!(table.remote(Pd(1), rkey.0, mr.addr, 1, read).is_ok());
        assert!(
            table
                .local(Pd(1), mr.lkey, mr.addr, 1, Access::empty())
                .is_ok()
        );
    }

    proptest! {
        /// The key table against a map, with keys that collide.
        #[test]
        fn rkey_table_equals_a_map(steps in prop::collection::vec((any::<bool>(), 0u32..64), 0..300)) {
            let mut table = MemoryTable::new(100);
            let mut model = HashMap::new();
            for (insert, key) in steps {
                let rkey = key.wrapping_mul(0x10001) & 0xF_000F;
                if insert && !model.contains_key(&rkey) && model.len() < 31 {
                    table.place_rkey(rkey, key as u16);
                    model.insert(rkey, key as u16);
                } else {
                    table.forget_rkey(rkey);
                    model.remove(&rkey);
                }
                for (&rkey, &index) in &model {
                    prop_assert_eq!(table.find_rkey(rkey).map(|found| found.1), Some(index));
                }
                prop_assert_eq!(table.rkeys.iter().flatten().count(), model.len());
            }
        }
    }
}
