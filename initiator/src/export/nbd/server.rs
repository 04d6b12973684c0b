//! A worker's clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flexblk_reactor::{Completion, Reactor, Token, mailbox};

use super::DEPTH;
use super::connection::{Connection, index_of};
use super::listen::Client;
use super::shared::Shared;
use crate::export::{Buffers, Geometry, Requests, Server};
use crate::link::guest::Guest;
use crate::volume::Channel;
use crate::{Error, IoCompletion};

/// Clients of one worker.
const MAX_CLIENTS: usize = 256;
/// Requests of all clients of one worker.
const MAX_JOBS: u32 = 1024;
/// The longest I/O buffer.
const LARGEST_BYTES: u32 = 1 << 20;
/// Clients that wait to be looked at.
const MAIL: usize = 64;
/// How long a client may negotiate.
const NEGOTIATION: Duration = Duration::from_secs(60);
/// How long a client may keep buffers that others wait for without reading or sending.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);
/// The timer's token; those of clients are smaller.
const TICK_SLOT: u64 = 1 << 48;

/// NBD on a worker's reactor.
pub(super) struct NbdServer {
    owner: u8,
    mail: mailbox::Receiver<Client>,
    /// How many clients there are, for the acceptor.
    count: Arc<AtomicUsize>,
    clients: Vec<Option<Box<Connection>>>,
    shared: Shared,
    /// Clients with something to submit.
    dirty: Vec<u32>,
    ticking: bool,
    stopping: bool,
    now: Instant,
}

impl NbdServer {
    pub(super) fn new(
        channel: &mut Channel,
        geometry: &Geometry,
        buffer_bytes: u64,
        count: Arc<AtomicUsize>,
    ) -> Result<(NbdServer, mailbox::Sender<Client>), Error> {
        let largest = LARGEST_BYTES
            .min(geometry.max_transfer_bytes)
            .max(geometry.block_bytes);
        let buffers = Buffers::new("flexblk nbd", buffer_bytes, largest)?;
        channel.register_memory(buffers.memory())?;
        let (sender, mail) = mailbox::channel(MAIL, channel.waker());
        let requests = Requests::new(MAX_JOBS, geometry);
        let server = NbdServer {
            owner: 0,
            mail,
            count,
            clients: Vec::new(),
            shared: Shared::new(buffers, requests, MAX_JOBS),
            dirty: Vec::with_capacity(MAX_CLIENTS),
            ticking: false,
            stopping: false,
            now: channel.now(),
        };
        Ok((server, sender))
    }

    fn welcome(&mut self, client: Client) {
        let free = self.clients.iter().position(Option::is_none);
        let index = match free {
            Some(index) => index,
            None if self.clients.len() < MAX_CLIENTS => {
                self.clients.push(None);
                self.clients.len() - 1
            }
            None => {
                self.count.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!("an NBD client is turned away: {MAX_CLIENTS} are there");
                return self.close_oldest_stranger();
            }
        };
        let number = index as u32;
        let connection =
            Connection::new(self.owner, number, client.socket, client.export, self.now);
        if let Some(place) = self.clients.get_mut(index) {
            *place = Some(connection);
        }
        self.mark(number);
    }

    /// Somebody who only connects shall not keep others away for long.
    fn close_oldest_stranger(&mut self) {
        let strangers = self.clients.iter_mut().flatten();
        let oldest = strangers
            .filter(|client| client.is_negotiating())
            .min_by_key(|client| client.since);
        if let Some(client) = oldest {
            client.close(&mut self.shared);
        }
    }

    fn client(&mut self, index: u32) -> Option<&mut Connection> {
        self.clients.get_mut(index as usize)?.as_deref_mut()
    }

    /// Calls a client with what all share; afterwards it may have something to submit, or be over.
    fn with(&mut self, index: u32, call: impl FnOnce(&mut Connection, &mut Shared)) {
        let Some(Some(client)) = self.clients.get_mut(index as usize) else {
            return;
        };
        call(client, &mut self.shared);
        self.mark(index);
    }

    fn mark(&mut self, index: u32) {
        if let Some(client) = self.client(index)
            && !client.dirty
        {
            client.dirty = true;
            self.dirty.push(index);
        }
    }

    fn end(&mut self, ended: &crate::export::Ended) {
        if let Some((client, job)) = self.shared.end(ended) {
            self.with(client, |client, shared| client.answer(shared, job));
        }
    }

    /// Closes who takes too long.
    fn tick(&mut self) {
        let now = self.now;
        let others_wait = self.shared.first_waiting().is_some();
        for index in 0..self.clients.len() as u32 {
            let Some(client) = self.client(index) else {
                continue;
            };
            let slow = client.is_negotiating() && now > client.since + NEGOTIATION;
            let stuck = others_wait
                && client
                    .stuck_since()
                    .is_some_and(|since| now > since + PATIENCE);
            if slow || stuck {
                tracing::info!(client = index, stuck, "an NBD client takes too long");
                self.with(index, |client, shared| client.close(shared));
            }
        }
    }
}

impl Guest for NbdServer {
    fn flush(&mut self, reactor: &mut Reactor) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let Some(place) = self.clients.get_mut(index as usize) else {
                continue;
            };
            if let Some(client) = place {
                client.dirty = false;
                client.flush(reactor, &self.shared);
                if client.is_over() {
                    *place = None;
                    self.count.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
        // Its memory is used again.
        self.dirty = dirty;
        if !self.ticking && self.clients.iter().any(Option::is_some) {
            self.ticking = true;
            reactor.arm(reactor.now() + TICK, Token::new(self.owner, TICK_SLOT));
        }
    }

    fn on_completion(&mut self, reactor: &mut Reactor, completion: &Completion) {
        self.now = reactor.now();
        if completion.token.slot() == TICK_SLOT {
            self.ticking = false;
            return self.tick();
        }
        let (index, now) = (index_of(completion.token), self.now);
        self.with(index, |client, shared| {
            client.on_completion(completion, shared, now);
        });
    }
}

impl Server for NbdServer {
    fn start(&mut self, owner: u8, reactor: &mut Reactor) -> Result<(), Error> {
        self.owner = owner;
        self.now = reactor.now();
        Ok(())
    }

    fn on_io(&mut self, completion: &IoCompletion) {
        if let Some(ended) = self.shared.requests.completed(completion) {
            self.end(&ended);
        }
    }

    fn submit(&mut self, channel: &mut Channel) {
        while let Some(client) = self.mail.try_recv() {
            if self.stopping {
                self.count.fetch_sub(1, Ordering::Relaxed);
            } else {
                self.welcome(client);
            }
        }
        // Memory may have come back.
        while let Some(first) = self.shared.first_waiting() {
            self.with(first, |client, shared| client.pump(shared));
            if self.shared.first_waiting() == Some(first) {
                break;
            }
        }
        let mut ended = std::mem::take(&mut self.shared.ended);
        self.shared
            .requests
            .submit(|request, tag| channel.submit(request, tag), &mut ended);
        for ended in ended.drain(..) {
            self.end(&ended);
        }
        self.shared.ended = ended;
    }

    fn stop(&mut self, reactor: &mut Reactor) {
        self.now = reactor.now();
        self.stopping = true;
        for index in 0..self.clients.len() as u32 {
            self.with(index, |client, shared| client.leave(shared));
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopping
            && self.clients.iter().all(Option::is_none)
            && self.shared.requests.outstanding() == 0
    }
}

const _: () = assert!(DEPTH as u32 <= MAX_JOBS);
