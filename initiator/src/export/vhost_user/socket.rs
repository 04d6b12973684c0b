//! The front-end's connection: whole messages with their descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::{HEADER_BYTES, Header, MAX_FDS, MAX_PAYLOAD_BYTES, MessageError};

/// How long the rest of a message that has begun may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors of one message.
pub(crate) type Fds = ArrayVec<OwnedFd, MAX_FDS>;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// The kernel said so, or the peer is gone.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message has, or none where bytes went on.
    #[error("more descriptors than any message brings")]
    Descriptors,
}

/// A message as it came.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) header: Header,
    pub(crate) payload: ArrayVec<u8, MAX_PAYLOAD_BYTES>,
    pub(crate) fds: Fds,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Socket(UnixStream);

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Socket(stream))
    }

    /// Whether a message has begun to arrive within `timeout`.
    pub(crate) fn ready(&self, timeout: Duration) -> io::Result<bool> {
        wait_readable(self.0.as_fd(), timeout)
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Result<Incoming, SocketError> {
        let mut fds = Fds::new();
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header, &mut fds)?;
        let header = Header::parse(&header)?;
        let mut payload = ArrayVec::from([0; MAX_PAYLOAD_BYTES]);
        payload.truncate(header.payload_bytes);
        self.fill(&mut payload, &mut fds)?;
        Ok(Incoming {
            header,
            payload,
            fds,
        })
    }

    /// A message with one descriptor or none.
    pub(crate) fn send(&mut self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        send(self.0.as_fd(), message, fd, SendFlags::NOSIGNAL)
    }

    fn fill(&mut self, mut bytes: &mut [u8], fds: &mut Fds) -> Result<(), SocketError> {
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let mut into = [IoSliceMut::new(bytes)];
            let received = match recvmsg(&self.0, &mut into, &mut control, flags) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(io::Error::from)?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    for fd in rights {
                        fds.try_push(fd).map_err(|_| SocketError::Descriptors)?;
                    }
                }
            }
            if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
                return Err(SocketError::Descriptors);
            }
            if received.bytes == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            bytes = bytes.get_mut(received.bytes..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Sends a whole message; a short count would be half a message, which ends the connection.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &[u8],
    fd: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let sent = loop {
        match sendmsg(socket, &[IoSlice::new(message)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    if sent == message.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Whether there is something to read within `timeout`.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
