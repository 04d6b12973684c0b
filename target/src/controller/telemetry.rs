//! The telemetry log pages (Base 5.1.12.1.8 and .9): the target's flight recorder, as far as it is about
//! the host that asks. One JSON object per line, oldest first, filled up with line feeds.

use std::fmt::Write as _;

use flexblk_nvme::command::admin::GetLogPage;
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::telemetry::{BLOCK, CREATE, TelemetryHeader};
use flexblk_nvme::{Status, StatusCode};

use super::Controller;
use crate::recorder::{Event, Recorder, collect};

/// What was captured; the pages do not change until it is captured anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Telemetry {
    host: Vec<u8>,
    host_generation: u8,
    controller: Vec<u8>,
    losses: u8,
}

impl Controller {
    /// Captures what the page is to say, when the command begins to read it.
    pub(super) fn capture_telemetry(
        &mut self,
        get: &GetLogPage,
        recorders: &[Recorder],
    ) -> Result<(), Status> {
        if !matches!(
            get.lid,
            LogPageId::TelemetryHost | LogPageId::TelemetryController
        ) {
            return Ok(());
        }
        // Base 5.1.12.1.8: offsets are of blocks.
        if !get.offset.is_multiple_of(BLOCK as u64) {
            return Err(StatusCode::InvalidField.dnr());
        }
        let own = self.association.host_tag;
        let events = || collect(recorders, |event| event.host == own);
        let losses = |events: &[(usize, Event)]| {
            let losses = events.iter().filter(|(_, event)| event.kind.is_loss());
            losses.count() as u8
        };
        if get.lid == LogPageId::TelemetryHost && get.lsp & CREATE != 0 {
            let events = events();
            self.telemetry.losses = losses(&events);
            self.telemetry.host = text(&events);
            self.telemetry.host_generation = self.telemetry.host_generation.wrapping_add(1);
        }
        if get.lid == LogPageId::TelemetryController && get.offset == 0 {
            let events = events();
            self.telemetry.losses = losses(&events);
            self.telemetry.controller = match self.telemetry.losses {
                0 => Vec::new(),
                _ => text(&events),
            };
        }
        Ok(())
    }

    /// Has the host lost a connection without having asked for it, as far as is still known?
    pub(super) fn has_lost(&self, recorders: &[Recorder]) -> bool {
        let own = self.association.host_tag;
        let is_own_loss = |event: &Event| event.host == own && event.kind.is_loss();
        !collect(recorders, is_own_loss).is_empty()
    }

    /// The page of that identifier.
    pub(super) fn telemetry_page(&self, lid: LogPageId) -> Vec<u8> {
        let telemetry = &self.telemetry;
        let data = match lid {
            LogPageId::TelemetryHost => &telemetry.host,
            _ => &telemetry.controller,
        };
        let mut header = TelemetryHeader::new(lid.raw(), data.len());
        header.host_generation = telemetry.host_generation;
        // There is something of the controller's own accord when it, or one of its connections, ended
        // without having been asked.
        header.controller_available = u8::from(telemetry.losses != 0);
        header.controller_generation = telemetry.losses;
        let mut page = header.bytes().to_vec();
        page.extend_from_slice(data);
        page
    }
}

fn text(events: &[(usize, Event)]) -> Vec<u8> {
    let mut text = String::new();
    for (thread, event) in events {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{{\"us\":{},\"thread\":{thread},\"event\":\"{}\",\"cntlid\":{},\"qid\":{},\"cid\":{},\
             \"opcode\":{},\"nsid\":{},\"status\":{},\"value\":{},\"peer\":\"{}\"}}",
            event.at_us,
            event.kind.name(),
            event.cntlid,
            event.qid,
            event.cid,
            event.opcode,
            event.nsid,
            event.status,
            event.value,
            event.peer,
        );
    }
    let mut bytes = text.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), b'\n');
    bytes
}
