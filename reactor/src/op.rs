//! The operations a reactor carries out, and their translation to submission queue entries.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};

use crate::Token;

/// One asynchronous operation. File descriptors are the caller's and must stay open until the final
/// completion; what else must stay in place is said at [`crate::Reactor::submit`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Op {
    /// Does nothing; completes with 0.
    Nop,
    /// `sendmsg(2)`.
    SendMsg {
        /// Socket.
        fd: RawFd,
        /// Message header, with everything it points at.
        msg: *const libc::msghdr,
        /// `MSG_*`.
        flags: u32,
    },
    /// `sendmsg(2)` without the kernel's copy: two completions, the second is the notification that
    /// the memory is free (its result is `i32::MIN` when the kernel copied after all). Needs [`crate::Features::send_zc`].
    SendMsgZc {
        /// Socket.
        fd: RawFd,
        /// Message header, with everything it points at.
        msg: *const libc::msghdr,
        /// `MSG_*`.
        flags: u32,
    },
    /// `recvmsg(2)`.
    RecvMsg {
        /// Socket.
        fd: RawFd,
        /// Message header, with everything it points at.
        msg: *mut libc::msghdr,
        /// `MSG_*`.
        flags: u32,
    },
    /// `recvmsg(2)` again and again into provided buffers; each message lies in its buffer behind a
    /// header that [`crate::ReceivedMessage`] reads. Needs [`crate::Features::recv_multishot`].
    RecvMsgMulti {
        /// Socket.
        fd: RawFd,
        /// Only `msg_namelen` and `msg_controllen` are used.
        msg: *const libc::msghdr,
        /// Group of the buffer ring.
        group: u16,
    },
    /// `send(2)`.
    Send {
        /// Socket.
        fd: RawFd,
        /// Bytes to send.
        ptr: *const u8,
        /// How many.
        len: u32,
        /// `MSG_*`.
        flags: i32,
    },
    /// `recv(2)`.
    Recv {
        /// Socket.
        fd: RawFd,
        /// Where to.
        ptr: *mut u8,
        /// At most.
        len: u32,
        /// `MSG_*`.
        flags: i32,
    },
    /// `recv(2)` into a buffer that the kernel takes from a ring of provided ones when there is
    /// something to receive: a thousand idle connections need no buffer. `ENOBUFS` when the ring is
    /// empty. Needs [`crate::Features::buffer_rings`].
    RecvProvided {
        /// Socket.
        fd: RawFd,
        /// At most; 0 is as much as the buffer holds.
        len: u32,
        /// Group of the buffer ring.
        group: u16,
    },
    /// `pread(2)`; for streams give `offset` = `u64::MAX`.
    Read {
        /// File.
        fd: RawFd,
        /// Where to.
        ptr: *mut u8,
        /// At most.
        len: u32,
        /// Byte offset in the file.
        offset: u64,
        /// Index of the registered buffer that contains the range, if any.
        fixed: Option<u16>,
    },
    /// `pwrite(2)`; for streams give `offset` = `u64::MAX`.
    Write {
        /// File.
        fd: RawFd,
        /// Bytes to write.
        ptr: *const u8,
        /// How many.
        len: u32,
        /// Byte offset in the file.
        offset: u64,
        /// Index of the registered buffer that contains the range, if any.
        fixed: Option<u16>,
        /// `RWF_DSYNC`: complete when the data would survive a power loss (FUA).
        dsync: bool,
    },
    /// `preadv(2)`.
    Readv {
        /// File.
        fd: RawFd,
        /// The vector; both it and the memory it names stay in place.
        iov: *const libc::iovec,
        /// Entries of the vector.
        n: u32,
        /// Byte offset in the file.
        offset: u64,
    },
    /// `pwritev2(2)`.
    Writev {
        /// File.
        fd: RawFd,
        /// The vector; both it and the memory it names stay in place.
        iov: *const libc::iovec,
        /// Entries of the vector.
        n: u32,
        /// Byte offset in the file.
        offset: u64,
        /// `RWF_DSYNC`.
        dsync: bool,
    },
    /// `fsync(2)` or `fdatasync(2)`.
    Fsync {
        /// File.
        fd: RawFd,
        /// `fdatasync`.
        data_only: bool,
    },
    /// `fallocate(2)`.
    Fallocate {
        /// File.
        fd: RawFd,
        /// `FALLOC_FL_*`.
        mode: i32,
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `poll(2)`.
    PollAdd {
        /// File.
        fd: RawFd,
        /// `POLL*`.
        mask: u32,
        /// Keep telling.
        multi: bool,
    },
    /// `accept4(2)` with `SOCK_CLOEXEC`; the address is not asked for.
    Accept {
        /// Listening socket.
        fd: RawFd,
        /// Keep accepting.
        multi: bool,
    },
    /// `connect(2)`.
    Connect {
        /// Socket.
        fd: RawFd,
        /// Address.
        addr: *const libc::sockaddr_storage,
        /// Its length in bytes.
        addr_len: u32,
    },
    /// `shutdown(2)`.
    Shutdown {
        /// Socket.
        fd: RawFd,
        /// `SHUT_*`.
        how: i32,
    },
    /// `close(2)`; the descriptor belongs to the kernel from now on.
    Close {
        /// Descriptor.
        fd: RawFd,
    },
    /// A command of 16 bytes to the driver behind `fd` (`IORING_OP_URING_CMD`, Linux 5.19).
    UringCmd {
        /// Device.
        fd: RawFd,
        /// The driver's number for it.
        cmd_op: u32,
        /// What it takes.
        cmd: [u8; 16],
    },
    /// Asks for the end of the operation with that token; it then completes with `-ECANCELED` (or
    /// with its result, if it was faster).
    Cancel {
        /// The operation to end.
        token: Token,
    },
}

impl Op {
    pub(crate) fn entry(&self, token: Token) -> squeue::Entry {
        let entry = match *self {
            Op::Nop => opcode::Nop::new().build(),
            Op::SendMsg { fd, msg, flags } => opcode::SendMsg::new(types::Fd(fd), msg)
                .flags(flags)
                .build(),
            Op::SendMsgZc { fd, msg, flags } => opcode::SendMsgZc::new(types::Fd(fd), msg)
                .ioprio(SEND_ZC_REPORT_USAGE)
                .flags(flags)
                .build(),
            Op::RecvMsg { fd, msg, flags } => opcode::RecvMsg::new(types::Fd(fd), msg)
                .flags(flags)
                .build(),
            Op::RecvMsgMulti { fd, msg, group } => {
                opcode::RecvMsgMulti::new(types::Fd(fd), msg, group).build()
            }
            Op::Send {
                fd,
                ptr,
                len,
                flags,
            } => opcode::Send::new(types::Fd(fd), ptr, len)
                .flags(flags)
                .build(),
            Op::Recv {
                fd,
                ptr,
                len,
                flags,
            } => opcode::Recv::new(types::Fd(fd), ptr, len)
                .flags(flags)
                .build(),
            Op::RecvProvided { fd, len, group } => {
                opcode::Recv::new(types::Fd(fd), std::ptr::null_mut(), len)
                    .buf_group(group)
                    .build()
                    .flags(squeue::Flags::BUFFER_SELECT)
            }
            Op::Read {
                fd,
                ptr,
                len,
                offset,
                fixed: None,
            } => opcode::Read::new(types::Fd(fd), ptr, len)
                .offset(offset)
                .build(),
            Op::Read {
                fd,
                ptr,
                len,
                offset,
                fixed: Some(index),
            } => opcode::ReadFixed::new(types::Fd(fd), ptr, len, index)
                .offset(offset)
                .build(),
            Op::Write {
                fd,
                ptr,
                len,
                offset,
                fixed: None,
                dsync,
            } => opcode::Write::new(types::Fd(fd), ptr, len)
                .offset(offset)
                .rw_flags(dsync_flag(dsync))
                .build(),
            Op::Write {
                fd,
                ptr,
                len,
                offset,
                fixed: Some(index),
                dsync,
            } => opcode::WriteFixed::new(types::Fd(fd), ptr, len, index)
                .offset(offset)
                .rw_flags(dsync_flag(dsync))
                .build(),
            Op::Readv { fd, iov, n, offset } => opcode::Readv::new(types::Fd(fd), iov, n)
                .offset(offset)
                .build(),
            Op::Writev {
                fd,
                iov,
                n,
                offset,
                dsync,
            } => opcode::Writev::new(types::Fd(fd), iov, n)
                .offset(offset)
                .rw_flags(dsync_flag(dsync))
                .build(),
            Op::Fsync { fd, data_only } => opcode::Fsync::new(types::Fd(fd))
                .flags(if data_only {
                    types::FsyncFlags::DATASYNC
                } else {
                    types::FsyncFlags::empty()
                })
                .build(),
            Op::Fallocate {
                fd,
                mode,
                offset,
                len,
            } => opcode::Fallocate::new(types::Fd(fd), len)
                .offset(offset)
                .mode(mode)
                .build(),
            Op::PollAdd { fd, mask, multi } => opcode::PollAdd::new(types::Fd(fd), mask)
                .multi(multi)
                .build(),
            Op::Accept { fd, multi: false } => {
                opcode::Accept::new(types::Fd(fd), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Accept { fd, multi: true } => opcode::AcceptMulti::new(types::Fd(fd))
                .flags(libc::SOCK_CLOEXEC)
                .build(),
            Op::Connect { fd, addr, addr_len } => {
                opcode::Connect::new(types::Fd(fd), addr.cast(), addr_len).build()
            }
            Op::Shutdown { fd, how } => opcode::Shutdown::new(types::Fd(fd), how).build(),
            Op::Close { fd } => opcode::Close::new(types::Fd(fd)).build(),
            Op::UringCmd { fd, cmd_op, cmd } => opcode::UringCmd16::new(types::Fd(fd), cmd_op)
                .cmd(cmd)
                .build(),
            Op::Cancel { token } => opcode::AsyncCancel::new(token.user_data()).build(),
        };
        entry.user_data(token.user_data())
    }
}

/// `IORING_SEND_ZC_REPORT_USAGE` (Linux 6.2).
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;

fn dsync_flag(dsync: bool) -> i32 {
    if dsync { libc::RWF_DSYNC } else { 0 }
}
