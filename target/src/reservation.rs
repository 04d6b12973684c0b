//! Reservations of a namespace (Base 8.1.22) as an immutable value: who is registered, who holds
//! what. A command makes a new value and says whom to tell; threads look at the current one through
//! the snapshot, so that a check takes no lock.

use flexblk_nvme::command::reservation::{
    RegisteredController, ReservationAcquire, ReservationRegister, ReservationRelease,
    ReservationStatus, ReservationType, acquire_action, persist_change, register_action,
    release_action,
};
use flexblk_nvme::{HostId, Status, StatusCode, U16, U32, U64};

#[cfg(test)]
mod tests;

/// Hosts that may be registered with one namespace.
pub const MAX_REGISTRANTS: usize = 1024;

/// A registered host and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// The host.
    pub host: HostId,
    /// Its key; never 0.
    pub key: u64,
}

/// A reservation. With an all-registrants type every registrant holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who acquired it.
    pub host: HostId,
    /// What it keeps from others.
    pub rtype: ReservationType,
}

/// The reservations of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservations {
    /// Counts Register, Preempt and Clear.
    pub generation: u32,
    /// Registrations and reservation persist through a power loss (PTPL).
    pub persist: bool,
    /// Ascending by host.
    registrants: Vec<Registrant>,
    holder: Option<Holder>,
}

/// What a command wants of a namespace, as far as reservations matter (Base 8.1.22, Command Behavior
/// in the Presence of a Reservation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, Compare, Verify; the source of a Copy.
    Read,
    /// Write, Write Zeroes, Write Uncorrectable, Dataset Management, Flush; the destination of a Copy.
    Write,
}

/// A reservation command, with its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reservation Register.
    Register {
        /// The command.
        command: ReservationRegister,
        /// CRKEY.
        current: u64,
        /// NRKEY.
        new: u64,
    },
    /// Reservation Acquire.
    Acquire {
        /// The command.
        command: ReservationAcquire,
        /// CRKEY.
        current: u64,
        /// PRKEY.
        preempt: u64,
    },
    /// Reservation Release.
    Release {
        /// The command.
        command: ReservationRelease,
        /// CRKEY.
        current: u64,
    },
}

/// What a host is told by the Reservation Notification log page (Base 5.1.12.1.32).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// 1: its registration was removed by another host.
    RegistrationPreempted,
    /// 2: a reservation that kept it out, or that it shared, is released.
    ReservationReleased,
    /// 3: the reservation was taken from it, or all were cleared.
    ReservationPreempted,
}

/// What a command has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The reservations from now on.
    pub next: Reservations,
    /// Whom to tell what.
    pub notices: Vec<(HostId, Notice)>,
    /// Hosts whose commands are to be aborted (Preempt and Abort).
    pub abort: Vec<HostId>,
}

const CONFLICT: StatusCode = StatusCode::ReservationConflict;

impl Reservations {
    /// From what was saved; `None` when it cannot have been: too many registrants, a host twice, a
    /// key of 0, a holder that is not registered.
    #[must_use]
    pub fn restore(
        generation: u32,
        mut registrants: Vec<Registrant>,
        holder: Option<Holder>,
    ) -> Option<Self> {
        registrants.sort_by_key(|registrant| registrant.host);
        let twice = registrants
            .windows(2)
            .any(|pair| matches!(pair, [a, b] if a.host == b.host));
        let keyless = registrants.iter().any(|registrant| registrant.key == 0);
        let restored = Self {
            generation,
            persist: true,
            registrants,
            holder,
        };
        let lost = holder.is_some_and(|holder| restored.key_of(holder.host).is_none());
        let fine = !twice && !keyless && !lost && restored.registrants.len() <= MAX_REGISTRANTS;
        fine.then_some(restored)
    }

    /// Registered hosts, ascending.
    #[must_use]
    pub fn registrants(&self) -> &[Registrant] {
        &self.registrants
    }

    /// The reservation.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        self.holder
    }

    fn key_of(&self, host: HostId) -> Option<u64> {
        let at = self
            .registrants
            .binary_search_by_key(&host, |registrant| registrant.host);
        at.ok()
            .and_then(|at| self.registrants.get(at))
            .map(|registrant| registrant.key)
    }

    fn holds(&self, host: HostId) -> bool {
        self.holder.is_some_and(|holder| {
            holder.host == host || holder.rtype.is_all_registrants() && self.key_of(host).is_some()
        })
    }

    /// May a command of that host be processed?
    pub fn check(&self, host: HostId, access: Access) -> Result<(), Status> {
        let Some(holder) = self.holder else {
            return Ok(());
        };
        let open = access == Access::Read && !holder.rtype.is_exclusive_access();
        let member = match holder.rtype.is_holder_only() {
            true => holder.host == host,
            false => self.key_of(host).is_some(),
        };
        if open || member {
            Ok(())
        } else {
            Err(CONFLICT.dnr())
        }
    }

    /// Carries out a command of a host. `can_persist` is whether there is a place to save to.
    pub fn apply(
        &self,
        host: HostId,
        action: &Action,
        can_persist: bool,
    ) -> Result<Outcome, Status> {
        match *action {
            Action::Register {
                command,
                current,
                new,
            } => self.register(host, command, current, new, can_persist),
            Action::Acquire {
                command,
                current,
                preempt,
            } => self.acquire(host, command, current, preempt),
            Action::Release { command, current } => self.release(host, command, current),
        }
    }

    fn outcome(&self) -> Outcome {
        Outcome {
            next: self.clone(),
            notices: Vec::new(),
            abort: Vec::new(),
        }
    }

    fn register(
        &self,
        host: HostId,
        command: ReservationRegister,
        current: u64,
        new: u64,
        can_persist: bool,
    ) -> Result<Outcome, Status> {
        let invalid = || StatusCode::InvalidField.dnr();
        let mut outcome = self.outcome();
        let own = self.key_of(host);
        match command.persist {
            persist_change::NONE => {}
            persist_change::CLEAR => outcome.next.persist = false,
            persist_change::SET if can_persist => outcome.next.persist = true,
            _ => return Err(invalid()),
        }
        let knows_key = |own| command.ignore_key || own == current;
        match command.action {
            // "If a host registers ... with the same key, the command is successful; with another
            // key it is Reservation Conflict". IEKEY and CRKEY have no meaning here.
            register_action::REGISTER => {
                if new == 0 {
                    return Err(invalid());
                }
                match own {
                    Some(own) if own == new => {}
                    Some(_) => return Err(CONFLICT.dnr()),
                    None if self.registrants.len() >= MAX_REGISTRANTS => {
                        return Err(StatusCode::NotEnoughResources.dnr());
                    }
                    None => outcome.next.set_key(host, new),
                }
            }
            register_action::UNREGISTER => {
                if !own.is_some_and(knows_key) {
                    return Err(CONFLICT.dnr());
                }
                outcome.remove(host);
            }
            register_action::REPLACE => {
                if !own.is_some_and(knows_key) {
                    return Err(CONFLICT.dnr());
                }
                if new == 0 {
                    return Err(invalid());
                }
                outcome.next.set_key(host, new);
            }
            _ => return Err(invalid()),
        }
        outcome.next.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    fn set_key(&mut self, host: HostId, key: u64) {
        match self
            .registrants
            .binary_search_by_key(&host, |registrant| registrant.host)
        {
            Ok(at) => {
                if let Some(registrant) = self.registrants.get_mut(at) {
                    registrant.key = key;
                }
            }
            Err(at) => self.registrants.insert(at, Registrant { host, key }),
        }
    }

    /// Acquire and Release: the host must be registered with that key, and IEKEY is Invalid Field in
    /// Command (Base 7.5, 7.7).
    fn authorize(&self, host: HostId, current: u64, ignore_key: bool) -> Result<(), Status> {
        if ignore_key {
            return Err(StatusCode::InvalidField.dnr());
        }
        if self.key_of(host) == Some(current) {
            Ok(())
        } else {
            Err(CONFLICT.dnr())
        }
    }

    fn acquire(
        &self,
        host: HostId,
        command: ReservationAcquire,
        current: u64,
        preempt: u64,
    ) -> Result<Outcome, Status> {
        let rtype = ReservationType::from_raw(command.rtype);
        let rtype = rtype.ok_or_else(|| StatusCode::InvalidField.dnr())?;
        self.authorize(host, current, command.ignore_key)?;
        match command.action {
            acquire_action::ACQUIRE => {
                let mut outcome = self.outcome();
                match self.holder {
                    None => outcome.next.holder = Some(Holder { host, rtype }),
                    // "the holder ... may acquire it again", with the same type.
                    Some(holder) if self.holds(host) && holder.rtype == rtype => {}
                    Some(_) => return Err(CONFLICT.dnr()),
                }
                Ok(outcome)
            }
            acquire_action::PREEMPT => self.preempt(host, rtype, preempt),
            acquire_action::PREEMPT_AND_ABORT => {
                let mut outcome = self.preempt(host, rtype, preempt)?;
                let gone = self.registrants.iter().map(|registrant| registrant.host);
                outcome.abort = gone
                    .filter(|host| outcome.next.key_of(*host).is_none())
                    .collect();
                Ok(outcome)
            }
            _ => Err(StatusCode::InvalidField.dnr()),
        }
    }

    /// Base 8.1.22.6 (Preempting a Reservation or Registration).
    fn preempt(
        &self,
        host: HostId,
        rtype: ReservationType,
        preempted: u64,
    ) -> Result<Outcome, Status> {
        let mut outcome = self.outcome();
        let takes_over = match self.holder {
            // "If there is no reservation, registrants with the key PRKEY are unregistered."
            None => false,
            // "If PRKEY is 0 ... all other registrants are unregistered, the reservation is
            // released, and a new one made"; otherwise only registrations go.
            Some(holder) if holder.rtype.is_all_registrants() => preempted == 0,
            Some(_) if preempted == 0 => return Err(StatusCode::InvalidField.dnr()),
            Some(holder) => self.key_of(holder.host) == Some(preempted),
        };
        let everyone = takes_over && preempted == 0;
        let matches = |registrant: &Registrant| everyone || registrant.key == preempted;
        if !self.registrants.iter().any(matches) {
            return Err(CONFLICT.dnr());
        }
        // The host that preempts keeps its own registration.
        let gone: Vec<HostId> = self
            .registrants
            .iter()
            .filter(|registrant| registrant.host != host && matches(registrant))
            .map(|registrant| registrant.host)
            .collect();
        let before = self.holder;
        if takes_over {
            outcome.next.holder = None;
        }
        for gone in &gone {
            outcome.remove(*gone);
        }
        outcome.notices.clear();
        if takes_over {
            outcome.next.holder = Some(Holder { host, rtype });
        }
        for gone in gone {
            outcome.notices.push((gone, Notice::RegistrationPreempted));
        }
        // "Reservation Released": to the registrants that are left, when the reservation that they
        // lived with is gone and another type has come.
        if takes_over && before.is_some_and(|before| before.rtype != rtype) {
            let left = outcome
                .next
                .registrants
                .iter()
                .map(|registrant| registrant.host);
            let left = left.filter(|left| *left != host);
            outcome
                .notices
                .extend(left.map(|left| (left, Notice::ReservationReleased)));
        }
        outcome.next.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    fn release(
        &self,
        host: HostId,
        command: ReservationRelease,
        current: u64,
    ) -> Result<Outcome, Status> {
        self.authorize(host, current, command.ignore_key)?;
        let mut outcome = self.outcome();
        match command.action {
            release_action::RELEASE => {
                // No reservation, or not the holder: nothing is done, and that is no error.
                let Some(holder) = self.holder else {
                    return Ok(outcome);
                };
                if ReservationType::from_raw(command.rtype) != Some(holder.rtype) {
                    return Err(StatusCode::InvalidField.dnr());
                }
                if self.holds(host) {
                    outcome.release(holder, host);
                }
            }
            release_action::CLEAR => {
                outcome.next.holder = None;
                outcome.next.registrants.clear();
                outcome.next.generation = self.generation.wrapping_add(1);
                let others = self.registrants.iter().map(|registrant| registrant.host);
                let others = others.filter(|other| *other != host);
                outcome.notices = others
                    .map(|other| (other, Notice::ReservationPreempted))
                    .collect();
            }
            _ => return Err(StatusCode::InvalidField.dnr()),
        }
        Ok(outcome)
    }

    /// The data of Reservation Report, extended form.
    #[must_use]
    pub fn report(&self) -> Vec<u8> {
        let entries: Vec<RegisteredController> = self
            .registrants
            .iter()
            .map(|registrant| {
                let mut entry = RegisteredController::zeroed();
                // Base 7.8: FFFFh for hosts of dynamic controllers.
                entry.cntlid = U16::new(0xFFFF);
                entry.status = self.holds(registrant.host).into();
                entry.key = U64::new(registrant.key);
                entry.hostid = registrant.host.to_bytes();
                entry
            })
            .collect();
        let mut head = ReservationStatus::zeroed();
        head.generation = U32::new(self.generation);
        head.rtype = self.holder.map_or(0, |holder| holder.rtype.raw());
        head.persist = self.persist.into();
        head.emit(&entries)
    }
}

impl Outcome {
    /// Takes a host's registration away, and the reservation if it goes with it: when the holder
    /// goes, or the last of all registrants.
    fn remove(&mut self, host: HostId) {
        self.next
            .registrants
            .retain(|registrant| registrant.host != host);
        let Some(holder) = self.next.holder else {
            return;
        };
        if holder.rtype.is_all_registrants() {
            match self.next.registrants.first() {
                Some(next) if holder.host == host => {
                    self.next.holder = Some(Holder {
                        host: next.host,
                        ..holder
                    });
                }
                Some(_) => {}
                None => self.next.holder = None,
            }
        } else if holder.host == host {
            self.release(holder, host);
        }
    }

    /// "Reservation Released" goes to registrants of a reservation that registrants shared.
    fn release(&mut self, holder: Holder, by: HostId) {
        self.next.holder = None;
        if !holder.rtype.is_holder_only() {
            let others = self
                .next
                .registrants
                .iter()
                .map(|registrant| registrant.host);
            let others = others.filter(|other| *other != by);
            self.notices
                .extend(others.map(|other| (other, Notice::ReservationReleased)));
        }
    }
}
