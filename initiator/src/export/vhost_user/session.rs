//! One front-end, from its first message to its last: what was negotiated, the guest's memory, the rings.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use arrayvec::ArrayVec;
use rustix::net::SendFlags;

use super::block::{CONFIG_WRITEBACK, Device};
use super::inflight::InflightMemory;
use super::memory::{GuestMemory, MAX_SLOTS};
use super::message::{
    F_PROTOCOL_FEATURES, MessageError, Reply, Request, RingAddress, config_change,
    protocol_feature as protocol,
};
use super::server::Workers;
use super::socket::{Fds, Incoming, Socket, SocketError, send};
use super::worker::{DRAIN, Order, RingSetup};
use crate::Namespace;

/// What we offer.
const PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The connection.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message that asks for what cannot be.
    #[error("the front-end asks for what cannot be: {0}")]
    Refused(String),
    /// A thread of ours has ended.
    #[error("a worker thread has ended")]
    Worker,
}

/// A ring as the front-end has set it up so far.
#[derive(Debug, Default)]
struct RingState {
    size: u16,
    address: Option<RingAddress>,
    next_available: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    running: bool,
}

/// See the module.
pub(crate) struct Session<'a> {
    socket: Socket,
    workers: &'a Workers,
    device: Device,
    features: u64,
    memory: GuestMemory,
    rings: Vec<RingState>,
    inflight: Option<InflightMemory>,
    backend: Option<OwnedFd>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(socket: Socket, workers: &'a Workers, device: Device) -> Session<'a> {
        Session {
            socket,
            workers,
            device,
            features: 0,
            memory: GuestMemory::default(),
            rings: (0..workers.queues())
                .map(|_| RingState::default())
                .collect(),
            inflight: None,
            backend: None,
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Receives one message and does what it says.
    pub(crate) fn step(&mut self) -> Result<(), SessionError> {
        let Incoming {
            header,
            payload,
            fds,
        } = self.socket.receive()?;
        let request = Request::parse(&header, &payload, fds.len()).map_err(SocketError::Message)?;
        tracing::debug!(?request, "message");
        let replied = self.handle(header.request, request, fds);
        match replied {
            Ok(true) => Ok(()),
            Ok(false) if header.need_reply => self.reply(header.request, &Reply::Number(0)),
            Ok(false) => Ok(()),
            Err(SessionError::Refused(reason)) if header.need_reply => {
                tracing::warn!(%reason, "refused");
                self.reply(header.request, &Reply::Number(1))
            }
            Err(error) => Err(error),
        }
    }

    /// The namespace is not what it was: the driver is told, if it can be.
    pub(crate) fn namespace_changed(&mut self, namespace: &Namespace) -> Result<(), SessionError> {
        self.device.set_namespace(namespace);
        self.tell_device()?;
        if let Some(backend) = &self.backend {
            // A front-end that does not read what it asked for misses it.
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            if let Err(error) = send(backend.as_fd(), &config_change(), None, flags) {
                tracing::warn!(%error, "the front-end was not told of the new size");
            }
        }
        Ok(())
    }

    /// Stops everything and forgets the guest's memory.
    pub(crate) fn end(&mut self) -> Result<(), SessionError> {
        self.stop_all()?;
        if self.memory.mappings().next().is_some() {
            self.memory = GuestMemory::default();
            self.tell_memory(false)?;
        }
        Ok(())
    }

    /// True: an answer has left.
    fn handle(
        &mut self,
        number: u32,
        request: Request,
        mut fds: Fds,
    ) -> Result<bool, SessionError> {
        match request {
            Request::GetFeatures => {
                let features = self.device.features() | F_PROTOCOL_FEATURES;
                self.reply(number, &Reply::Number(features))?;
                return Ok(true);
            }
            Request::SetFeatures(features) => {
                let unknown = features & !(self.device.known_features() | F_PROTOCOL_FEATURES);
                if unknown != 0 {
                    return refuse(format!("features {unknown:#x}, which were not offered"));
                }
                self.features = features;
                self.device.set_features(features);
                self.tell_device()?;
                if features & F_PROTOCOL_FEATURES == 0 {
                    self.rings.iter_mut().for_each(|ring| ring.enabled = true);
                }
            }
            Request::SetOwner => {}
            Request::ResetOwner | Request::ResetDevice => {
                self.stop_all()?;
                self.rings.fill_with(RingState::default);
            }
            Request::GetProtocolFeatures => {
                self.reply(number, &Reply::Number(PROTOCOL_FEATURES))?;
                return Ok(true);
            }
            Request::SetProtocolFeatures(features) => {
                let unknown = features & !PROTOCOL_FEATURES;
                if unknown != 0 {
                    return refuse(format!(
                        "protocol features {unknown:#x}, which were not offered"
                    ));
                }
            }
            Request::GetQueueNum => {
                self.reply(number, &Reply::Number(self.rings.len() as u64))?;
                return Ok(true);
            }
            Request::GetMaxMemSlots => {
                self.reply(number, &Reply::Number(MAX_SLOTS as u64))?;
                return Ok(true);
            }
            Request::SetMemTable(places) => {
                let mut memory = GuestMemory::default();
                for (place, fd) in places.into_iter().zip(fds) {
                    memory.add(place, fd).map_err(refused)?;
                }
                self.replace_memory(memory)?;
            }
            Request::AddMemReg(place) => {
                let fd = fds.pop().ok_or_else(missing)?;
                self.memory.add(place, fd).map_err(refused)?;
                self.tell_memory(true)?;
            }
            Request::RemMemReg(place) => {
                let mut memory = self.memory.clone();
                memory.remove(&place).map_err(refused)?;
                self.replace_memory(memory)?;
            }
            Request::SetBackendReqFd => self.backend = fds.pop(),
            Request::GetConfig { offset, len } => {
                let bytes = self.config(offset, len);
                self.reply(number, &Reply::Config { offset, bytes })?;
                return Ok(true);
            }
            Request::SetConfig { offset, bytes } => match bytes.as_slice() {
                [cache] if usize::try_from(offset) == Ok(CONFIG_WRITEBACK) => {
                    self.device.set_writeback(*cache != 0);
                    self.tell_device()?;
                }
                _ => {
                    return refuse(format!(
                        "{} bytes of configuration at {offset}",
                        bytes.len()
                    ));
                }
            },
            Request::GetInflightFd(wanted) => {
                let memory = InflightMemory::create(&wanted)
                    .ok_or_else(|| SessionError::Refused(format!("{wanted:?}")))?;
                let reply = Reply::Inflight(memory.describe()).emit(number);
                self.socket
                    .send(&reply, memory.fd())
                    .map_err(SocketError::Io)?;
                self.inflight = Some(memory);
                return Ok(true);
            }
            Request::SetInflightFd(description) => {
                let fd = fds.pop().ok_or_else(missing)?;
                let memory = InflightMemory::open(&description, fd)
                    .ok_or_else(|| SessionError::Refused(format!("{description:?}")))?;
                self.inflight = Some(memory);
            }
            Request::SetVringNum(index, size) => self.stopped_ring(index)?.size = size,
            Request::SetVringAddr(index, address) => {
                self.stopped_ring(index)?.address = Some(address);
            }
            Request::SetVringBase(index, base) => self.stopped_ring(index)?.next_available = base,
            Request::GetVringBase(index) => {
                self.ring(index)?;
                self.stop(usize::from(index))?;
                let ring = self.ring(index)?;
                ring.kick = None;
                let base = ring.next_available;
                self.reply(number, &Reply::VringBase(index, base))?;
                return Ok(true);
            }
            Request::SetVringKick(index) => {
                self.ring(index)?;
                let Some(fd) = fds.pop() else {
                    return refuse("a ring without kicks".into());
                };
                self.stop(usize::from(index))?;
                self.ring(index)?.kick = Some(fd);
                self.start(usize::from(index))?;
            }
            Request::SetVringCall(index) => {
                let fd = fds.pop();
                let ring = self.ring(index)?;
                ring.call = fd;
                if ring.running {
                    let fd = clone(&ring.call)?;
                    self.workers
                        .send(usize::from(index), Order::Call(usize::from(index), fd))?;
                }
            }
            Request::SetVringErr(index) => self.ring(index)?.error = fds.pop(),
            Request::SetVringEnable(index, enabled) => {
                self.ring(index)?.enabled = enabled;
                if enabled {
                    self.start(usize::from(index))?;
                } else {
                    self.stop(usize::from(index))?;
                }
            }
        }
        Ok(false)
    }

    fn config(&self, offset: u32, len: u32) -> ArrayVec<u8, { super::message::MAX_CONFIG_BYTES }> {
        // What lies behind the fields that we know is zero: features that were not offered.
        let config = self.device.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = from.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
        let mut bytes = ArrayVec::new();
        if end <= super::message::MAX_CONFIG_BYTES {
            bytes.extend((from..end).map(|at| config.get(at).copied().unwrap_or(0)));
        }
        bytes
    }

    /// Rings stop for as long as the memory changes.
    fn replace_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        let stopped = self.stop_all()?;
        let first = self.memory.mappings().next().is_none() && memory.mappings().count() == 1;
        self.memory = memory;
        self.tell_memory(first)?;
        for index in stopped {
            self.start(index)?;
        }
        Ok(())
    }

    fn tell_memory(&self, only_more: bool) -> Result<(), SessionError> {
        let memory = Arc::new(self.memory.clone());
        let mut answers = Vec::with_capacity(self.workers.count());
        for worker in 0..self.workers.count() {
            let (reply, answer) = channel();
            let order = Order::Memory(Arc::clone(&memory), only_more, reply);
            self.workers.send(worker, order)?;
            answers.push(answer);
        }
        for answer in answers {
            answer
                .recv()
                .map_err(|_| SessionError::Worker)?
                .map_err(SessionError::Refused)?;
        }
        Ok(())
    }

    fn tell_device(&self) -> Result<(), SessionError> {
        for worker in 0..self.workers.count() {
            let order = Order::Device(Box::new(self.device.clone()));
            self.workers.send(worker, order)?;
        }
        Ok(())
    }

    /// Starts a ring for which everything is there.
    fn start(&mut self, index: usize) -> Result<(), SessionError> {
        let Some(ring) = self.rings.get_mut(index) else {
            return refuse(format!("queue {index}"));
        };
        let (Some(address), false) = (ring.address, ring.running) else {
            return Ok(());
        };
        if !ring.enabled || ring.kick.is_none() || ring.size == 0 {
            return Ok(());
        }
        let record = self.inflight.as_ref();
        let inflight = record.and_then(|memory| memory.queue(index as u16, ring.size));
        if record.is_some() && inflight.is_none() {
            // The record is another back-end's, made for smaller queues.
            tracing::warn!(
                queue = index,
                size = ring.size,
                "too large to be tracked over a restart"
            );
        }
        let setup = Box::new(RingSetup {
            size: ring.size,
            address,
            next_available: ring.next_available,
            features: self.features,
            kick: clone(&ring.kick)?,
            call: clone(&ring.call)?,
            error: clone(&ring.error)?,
            inflight,
        });
        let (reply, answer) = channel();
        self.workers
            .send(index, Order::Start(index, setup, reply))?;
        if !answer.recv().map_err(|_| SessionError::Worker)? {
            return refuse(format!("queue {index} lies outside of the guest's memory"));
        }
        ring.running = true;
        Ok(())
    }

    /// Stops a ring if it runs; afterwards nothing of it is under way.
    fn stop(&mut self, index: usize) -> Result<(), SessionError> {
        self.stop_those([index]).map(drop)
    }

    /// Stops all rings; those that ran.
    fn stop_all(&mut self) -> Result<Vec<usize>, SessionError> {
        self.stop_those(0..self.rings.len())
    }

    /// Stops rings, all at once: what they wait for may take as long for each of them. Those that ran.
    fn stop_those(
        &mut self,
        rings: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<usize>, SessionError> {
        let until = Instant::now() + DRAIN;
        let mut answers = Vec::new();
        for index in rings {
            if self.rings.get(index).is_some_and(|ring| ring.running) {
                let (reply, answer) = channel();
                self.workers.send(index, Order::Stop(index, until, reply))?;
                answers.push((index, answer));
            }
        }
        let mut stopped = Vec::with_capacity(answers.len());
        for (index, answer) in answers {
            let next_available = answer.recv().map_err(|_| SessionError::Worker)?;
            if let Some(ring) = self.rings.get_mut(index) {
                ring.next_available = next_available;
                ring.running = false;
            }
            stopped.push(index);
        }
        Ok(stopped)
    }

    fn ring(&mut self, index: u8) -> Result<&mut RingState, SessionError> {
        self.rings
            .get_mut(usize::from(index))
            .ok_or_else(|| SessionError::Refused(format!("queue {index}, which there is not")))
    }

    fn stopped_ring(&mut self, index: u8) -> Result<&mut RingState, SessionError> {
        let ring = self.ring(index)?;
        if ring.running {
            return refuse(format!("a change of queue {index} while it runs"));
        }
        Ok(ring)
    }

    fn reply(&mut self, number: u32, reply: &Reply) -> Result<(), SessionError> {
        let sent = self.socket.send(&reply.emit(number), None);
        sent.map_err(|error| SocketError::Io(error).into())
    }
}

fn refuse<T>(what: String) -> Result<T, SessionError> {
    Err(SessionError::Refused(what))
}

fn refused(error: impl std::fmt::Display) -> SessionError {
    SessionError::Refused(error.to_string())
}

fn missing() -> SessionError {
    SocketError::Message(MessageError::Descriptors { request: 0, fds: 0 }).into()
}

fn clone(fd: &Option<OwnedFd>) -> Result<Option<OwnedFd>, SessionError> {
    fd.as_ref()
        .map(OwnedFd::try_clone)
        .transpose()
        .map_err(|error| SocketError::Io(error).into())
}

#[cfg(test)]
mod tests;
