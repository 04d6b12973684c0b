//! What keeps a host from a namespace: masking, the namespace's ANA state, a reservation. Looked at
//! only for namespaces of which [`crate::queue::request::View`] says that there is something.

use flexblk_nvme::command::nvm::opcode;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nsid, Status, StatusCode};

use super::parts::Parts;
use super::queue::Io;
use crate::reservation::Access;

impl Parts {
    /// May the command be processed?
    #[cold]
    pub(super) fn gate(&self, io: &Io, port: u16, nsid: Nsid, opcode: u8) -> Result<(), Status> {
        let invalid = || StatusCode::InvalidNamespaceOrFormat.dnr();
        let subsystem = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let subsystem = subsystem.ok_or_else(invalid)?.current();
        let association = &io.association;
        let namespace = subsystem.namespace(nsid).ok_or_else(invalid)?;
        if !namespace.hosts.allows(&association.hostnqn) {
            return Err(invalid());
        }
        check_ana(subsystem.ana_state(namespace.anagrpid, port))?;
        match access_of(opcode) {
            Some(access) => namespace.reservations.check(association.hostid, access),
            None => Ok(()),
        }
    }
}

/// Base 8.1.1.4: what I/O to a namespace of a group in that state is answered with.
fn check_ana(state: AnaState) -> Result<(), Status> {
    match state {
        AnaState::Optimized | AnaState::NonOptimized => Ok(()),
        AnaState::Inaccessible => Err(StatusCode::AnaInaccessible.into()),
        AnaState::PersistentLoss => Err(StatusCode::AnaPersistentLoss.into()),
        _ => Err(StatusCode::AnaTransition.into()),
    }
}

/// Base 8.1.22, Command Behavior in the Presence of a Reservation; the reservation commands judge
/// for themselves.
fn access_of(opcode: u8) -> Option<Access> {
    match opcode {
        opcode::READ | opcode::COMPARE | opcode::VERIFY => Some(Access::Read),
        opcode::RESERVATION_REGISTER
        | opcode::RESERVATION_ACQUIRE
        | opcode::RESERVATION_RELEASE
        | opcode::RESERVATION_REPORT => None,
        _ => Some(Access::Write),
    }
}
