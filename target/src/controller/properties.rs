//! Properties (Base 3.1.4): capabilities, enabling, disabling, shutdown.

use std::time::Instant;

use flexblk_nvme::command::fabrics::{PropertyGet, PropertySet};
use flexblk_nvme::property::{Cap, Cc, Crto, Csts, Property, Vs, Width};
use flexblk_nvme::{Status, StatusCode};

use super::{Action, Controller, Ending, Environment, Kind, READY_TIMEOUT_500MS};
use super::{AsyncEvents, Features};

/// CC.CSS: the NVM command set, all that are supported, none.
const CSS_NVM: u8 = 0b000;
const CSS_ALL: u8 = 0b110;
const CSS_ADMIN_ONLY: u8 = 0b111;

/// CC.SHN; 1 is a normal shutdown, 2 an abrupt one.
const SHN_NONE: u8 = 0;
const SHN_RESERVED: u8 = 3;
/// CSTS.SHST.
pub(super) const SHST_NORMAL: u8 = 0;
const SHST_OCCURRING: u8 = 1;
const SHST_COMPLETE: u8 = 2;

/// The version that Identify and VS report.
pub(super) const VERSION: Vs = Vs::V2_0;

impl Controller {
    /// Property Get (Base 6.5). An unknown property or a wrong width is Invalid Field in Command.
    pub fn property_get(
        &mut self,
        get: &PropertyGet,
        environment: &Environment<'_>,
    ) -> Result<u64, Status> {
        self.keep_alive.command();
        let property = property(get.offset, get.width)?;
        Ok(match property {
            Property::Cap => capabilities(environment.directory.limits().queue_entries).into_bits(),
            Property::Vs => VERSION.into_bits().into(),
            Property::Cc => self.cc.into_bits().into(),
            Property::Csts => self.csts.into_bits().into(),
            Property::Crto => Crto::new()
                .with_crwmt(READY_TIMEOUT_500MS.into())
                .into_bits()
                .into(),
            // CAP.NSSRS is 0: the property does not exist.
            Property::Nssr => return Err(StatusCode::InvalidField.dnr()),
        })
    }

    /// Property Set (Base 6.6). Only CC can be set.
    pub fn property_set(
        &mut self,
        set: &PropertySet,
        environment: &Environment<'_>,
    ) -> Result<(), Status> {
        self.keep_alive.command();
        match property(set.offset, set.width)? {
            Property::Cc => {
                let new = Cc::from_bits(set.value as u32);
                if new.shn() == SHN_RESERVED {
                    return Err(StatusCode::InvalidField.dnr());
                }
                self.configure(new, environment.now);
                Ok(())
            }
            _ => Err(StatusCode::InvalidField.dnr()),
        }
    }

    fn configure(&mut self, new: Cc, now: Instant) {
        let old = core::mem::replace(&mut self.cc, new);
        if new.en() && !old.en() {
            self.enable(now);
        } else if !new.en() && old.en() {
            self.disable(now);
        }
        if new.shn() != SHN_NONE && old.shn() == SHN_NONE {
            self.shut_down(now);
        }
    }

    /// CC.EN 0 to 1 (Base 3.5.1). Values that CAP does not offer are answered with CSTS.CFS.
    fn enable(&mut self, now: Instant) {
        if self.ending.is_some() || !self.is_supported(self.cc) {
            self.csts.set_cfs(true);
            return;
        }
        self.keep_alive.activate(now);
        self.csts.set_cfs(false);
        self.csts.set_shst(SHST_NORMAL);
        self.csts.set_rdy(true);
        self.association.set_ready(self.kind == Kind::Io);
    }

    fn is_supported(&self, cc: Cc) -> bool {
        let css = matches!(cc.css(), CSS_NVM | CSS_ALL | CSS_ADMIN_ONLY);
        let entries = match self.kind {
            // 64- and 16-byte entries, the only ones that Identify's SQES and CQES offer.
            Kind::Io => cc.iosqes() == 6 && cc.iocqes() == 4,
            Kind::Discovery => true,
        };
        css && entries && cc.mps() == 0 && cc.ams() == 0
    }

    /// CC.EN 1 to 0, a Controller Level Reset (Base 3.7.2): I/O queues are deleted, features and
    /// events start afresh; CSTS.RDY becomes 0 when the queues are gone.
    fn disable(&mut self, now: Instant) {
        self.keep_alive.suspend(now);
        self.association.set_ready(false);
        self.association.forget_grant();
        self.association.set_write_through(false);
        self.association.set_copies_between_namespaces(false);
        // Requests are not completed, events are forgotten (Base 5.1.2).
        self.events = AsyncEvents::default();
        self.features = Features::default();
        self.changed = Default::default();
        self.reservations = Default::default();
        self.end(Ending::Reset);
    }

    /// CC.SHN (Base 3.6.1): the I/O queues are closed, what was written is made safe, then it is
    /// complete. Normal and abrupt are the same: no command is waited for. Keep Alive is not active from
    /// now on (Base 3.9), and the controller works again after a reset only.
    fn shut_down(&mut self, now: Instant) {
        self.keep_alive.suspend(now);
        self.association.set_ready(false);
        self.csts.set_shst(SHST_OCCURRING);
        self.end(Ending::Shutdown);
    }

    /// Closes the I/O queues, if there are any, and goes on from there.
    fn end(&mut self, ending: Ending) {
        self.ending = Some(ending);
        if self.association.has_queues() {
            self.actions.push_back(Action::CloseQueues(ending));
        } else {
            self.note_queues_closed();
        }
    }

    /// What [`Action::Flush`] asked for is done.
    pub fn note_flushed(&mut self) {
        if self.csts.shst() == SHST_OCCURRING {
            self.csts.set_shst(SHST_COMPLETE);
        }
    }

    /// An I/O queue was closed; there may be others.
    pub fn note_queues_closed(&mut self) {
        if self.association.has_queues() {
            return;
        }
        match self.ending.take() {
            Some(Ending::Reset) => self.csts = Csts::new(),
            Some(Ending::Shutdown) => self.actions.push_back(Action::Flush),
            None => {}
        }
    }
}

fn capabilities(queue_entries: u16) -> Cap {
    Cap::new()
        .with_mqes(queue_entries.saturating_sub(1))
        .with_cqr(true)
        .with_to(READY_TIMEOUT_500MS)
        // Bit 0 the NVM command set, bit 6 more than one may be selected (CC.CSS 110b).
        .with_css(0b0100_0001)
        .with_crwms(true)
}

fn property(offset: u32, width: Width) -> Result<Property, Status> {
    let property = Property::from_offset(offset).filter(|property| property.width() == width);
    property.ok_or_else(|| StatusCode::InvalidField.dnr())
}
