//! Codec of the FUSE kernel protocol, as far as one file of fixed size needs it: `include/uapi/linux/fuse.h`, version
//! 7.31 and newer. Numbers are in the host's byte order. No I/O in here.

/// Length of `struct fuse_in_header`.
pub(super) const IN_HEADER_LEN: usize = 40;
/// Header and the longest arguments of a request that we look at (`struct fuse_write_in`, `struct fuse_read_in`). What
/// a write carries follows directly.
pub(super) const REQUEST_LEN: usize = IN_HEADER_LEN + 40;
/// Length of `struct fuse_out_header`.
pub(super) const OUT_HEADER_LEN: usize = 16;
/// Longest reply without data: header and `struct fuse_attr_out`.
pub(super) const REPLY_LEN: usize = OUT_HEADER_LEN + 104;
/// Room for the kernel's `FUSE_INIT`: header and `struct fuse_init_in`.
pub(super) const INIT_LEN: usize = IN_HEADER_LEN + 64;
/// Reply to it: header and `struct fuse_init_out`.
pub(super) const INIT_REPLY_LEN: usize = OUT_HEADER_LEN + 64;
/// `FUSE_ROOT_ID`: our only file is the root of its file system.
pub(super) const ROOT: u64 = 1;

const MAJOR: u32 = 7;
/// The first version that tells `max_pages` (7.28) and knows everything else that we use.
const OLDEST_MINOR: u32 = 31;
/// What we know; the smaller of both versions is spoken.
const MINOR: u32 = 41;

/// `enum fuse_opcode`.
mod opcode {
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const FALLOCATE: u32 = 43;
}

/// Flags of `FUSE_INIT`.
mod init_flag {
    /// Reads need not wait for one another.
    pub(super) const ASYNC_READ: u32 = 1 << 0;
    /// Writes longer than a page.
    pub(super) const BIG_WRITES: u32 = 1 << 5;
    /// Direct I/O is asynchronous when its caller's is: what makes a loop device over the file fast.
    pub(super) const ASYNC_DIO: u32 = 1 << 15;
    /// `max_pages` counts.
    pub(super) const MAX_PAGES: u32 = 1 << 22;
}

/// `FOPEN_DIRECT_IO`: the page cache of a block device above is enough.
const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// `FOPEN_NOFLUSH` (Linux 5.16): closing the file asks nobody, so whoever dies with it open needs nobody alive.
const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FOPEN_PARALLEL_DIRECT_WRITES` (Linux 6.2): writes of one file need not wait for one another.
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// `FALLOC_FL_*` of `include/uapi/linux/falloc.h`.
const FALLOC_KEEP_SIZE: u32 = 0x01;
const FALLOC_PUNCH_HOLE: u32 = 0x02;
const FALLOC_ZERO_RANGE: u32 = 0x10;

/// One request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Names it in the reply.
    pub(super) unique: u64,
    pub(super) operation: Operation,
}

/// What it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Attributes,
    Open,
    Read {
        offset: u64,
        size: u32,
    },
    /// The data follows the first [`REQUEST_LEN`] bytes.
    Write {
        offset: u64,
        size: u32,
    },
    /// fsync(2), fdatasync(2).
    Sync,
    /// fallocate(2) that makes a range read as zeroes.
    Zero {
        offset: u64,
        length: u64,
        /// `FALLOC_FL_PUNCH_HOLE`: the range need not stay allocated.
        deallocate: bool,
    },
    StatFs,
    /// The last user of an open file has gone.
    Release,
    /// Wants no reply.
    Forget,
    /// The file system is being unmounted.
    Destroy,
    /// Not for us.
    Unknown,
}

/// The kernel sent something that the protocol does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a FUSE request of {len} bytes that makes no sense")]
pub(super) struct Malformed {
    len: usize,
}

impl Request {
    /// Reads a message of `len` bytes in all, which begins with `head`.
    pub(super) fn parse(head: &[u8; REQUEST_LEN], len: usize) -> Result<Request, Malformed> {
        let malformed = Malformed { len };
        if len < IN_HEADER_LEN || u32_at(head, 0) as usize != len {
            return Err(malformed);
        }
        // Shorter messages leave what an earlier one left in the rest of `head`: every use below checks the length.
        let arguments = |want: usize| {
            if len >= IN_HEADER_LEN + want {
                Ok(())
            } else {
                Err(malformed)
            }
        };
        let operation = match u32_at(head, 4) {
            opcode::GETATTR => Operation::Attributes,
            opcode::OPEN => Operation::Open,
            opcode::READ => {
                arguments(40)?;
                Operation::Read {
                    offset: u64_at(head, 48),
                    size: u32_at(head, 56),
                }
            }
            opcode::WRITE => {
                let (offset, size) = (u64_at(head, 48), u32_at(head, 56));
                if len != REQUEST_LEN + size as usize {
                    return Err(malformed);
                }
                Operation::Write { offset, size }
            }
            opcode::FSYNC => Operation::Sync,
            opcode::FALLOCATE => {
                arguments(32)?;
                let (offset, length) = (u64_at(head, 48), u64_at(head, 56));
                match u32_at(head, 64) & !FALLOC_KEEP_SIZE {
                    FALLOC_PUNCH_HOLE => Operation::Zero {
                        offset,
                        length,
                        deallocate: true,
                    },
                    FALLOC_ZERO_RANGE => Operation::Zero {
                        offset,
                        length,
                        deallocate: false,
                    },
                    _ => Operation::Unknown,
                }
            }
            opcode::STATFS => Operation::StatFs,
            opcode::RELEASE => Operation::Release,
            opcode::FORGET | opcode::BATCH_FORGET => Operation::Forget,
            opcode::DESTROY => Operation::Destroy,
            // A reply of ENOSYS tells the kernel to ask no more: nothing of ours can be interrupted (a command that
            // is on its way ends by itself), and closing has nothing to write back.
            opcode::FLUSH | opcode::INTERRUPT => Operation::Unknown,
            _ => Operation::Unknown,
        };
        Ok(Request {
            unique: u64_at(head, 8),
            operation,
        })
    }
}

/// `FUSE_INIT`: the kernel's first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Init {
    unique: u64,
    minor: u32,
    flags: u32,
}

/// What we answer to [`Init`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Asynchronous requests under way at most.
    pub(super) max_background: u16,
    /// Bytes of a write at most.
    pub(super) max_write: u32,
}

/// The kernel and we do not understand one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InitError {
    #[error("the kernel's first FUSE request is not FUSE_INIT")]
    NotInit,
    #[error("the kernel speaks FUSE {0}.{1}; 7.31 or newer is needed (Linux 5.4)")]
    Version(u32, u32),
}

impl Init {
    pub(super) fn parse(message: &[u8]) -> Result<Init, InitError> {
        let Some(head) = message.first_chunk::<{ IN_HEADER_LEN + 16 }>() else {
            return Err(InitError::NotInit);
        };
        if u32_at(head, 4) != opcode::INIT {
            return Err(InitError::NotInit);
        }
        let (major, minor) = (u32_at(head, 40), u32_at(head, 44));
        if major != MAJOR || minor < OLDEST_MINOR {
            return Err(InitError::Version(major, minor));
        }
        Ok(Init {
            unique: u64_at(head, 8),
            minor,
            flags: u32_at(head, 52),
        })
    }

    /// The reply (`struct fuse_init_out`).
    pub(super) fn reply(&self, limits: &Limits) -> [u8; INIT_REPLY_LEN] {
        const PAGE: u32 = 4096;
        let wanted = init_flag::ASYNC_READ
            | init_flag::BIG_WRITES
            | init_flag::ASYNC_DIO
            | init_flag::MAX_PAGES;
        let mut reply = [0; INIT_REPLY_LEN];
        out_header(&mut reply, INIT_REPLY_LEN as u32, 0, self.unique);
        put(&mut reply, 16, &MAJOR.to_ne_bytes());
        put(&mut reply, 20, &self.minor.min(MINOR).to_ne_bytes());
        // No read-ahead: there is no page cache on this file.
        put(&mut reply, 28, &(self.flags & wanted).to_ne_bytes());
        put(&mut reply, 32, &limits.max_background.to_ne_bytes());
        // Congestion throttles only buffered I/O; as high as it goes.
        put(&mut reply, 34, &limits.max_background.to_ne_bytes());
        put(&mut reply, 36, &limits.max_write.to_ne_bytes());
        put(&mut reply, 40, &1_u32.to_ne_bytes());
        let pages = u16::try_from(limits.max_write.div_ceil(PAGE)).unwrap_or(u16::MAX);
        put(&mut reply, 44, &pages.to_ne_bytes());
        reply
    }
}

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Done,
    /// A positive errno.
    Error(i32),
    Attributes {
        size: u64,
        block_size: u32,
        read_only: bool,
    },
    Opened,
    /// So many bytes follow the header.
    Data(u32),
    Written(u32),
    StatFs {
        size: u64,
        block_size: u32,
    },
}

impl Reply {
    /// Writes the reply without its data; returns how many bytes that is.
    pub(super) fn emit(&self, unique: u64, out: &mut [u8; REPLY_LEN]) -> usize {
        *out = [0; REPLY_LEN];
        let (body, data, errno) = match *self {
            Reply::Done => (0, 0, 0),
            Reply::Error(errno) => (0, 0, errno),
            Reply::Data(bytes) => (0, bytes, 0),
            Reply::Attributes {
                size,
                block_size,
                read_only,
            } => {
                // Valid for no time: the size is asked for again whenever somebody wants to know it.
                put(out, 32, &ROOT.to_ne_bytes());
                put(out, 40, &size.to_ne_bytes());
                put(out, 48, &(size / 512).to_ne_bytes());
                let mode: u32 = 0o100_000 | if read_only { 0o400 } else { 0o600 };
                put(out, 92, &mode.to_ne_bytes());
                put(out, 96, &1_u32.to_ne_bytes());
                put(out, 112, &block_size.to_ne_bytes());
                (104, 0, 0)
            }
            Reply::Opened => {
                let flags = FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES;
                put(out, 24, &flags.to_ne_bytes());
                (16, 0, 0)
            }
            Reply::Written(bytes) => {
                put(out, 16, &bytes.to_ne_bytes());
                (8, 0, 0)
            }
            Reply::StatFs { size, block_size } => {
                // A loop device takes `bsize` for the granularity of discards.
                put(
                    out,
                    16,
                    &(size / u64::from(block_size.max(1))).to_ne_bytes(),
                );
                put(out, 40, &1_u64.to_ne_bytes());
                put(out, 56, &block_size.to_ne_bytes());
                put(out, 60, &255_u32.to_ne_bytes());
                put(out, 64, &block_size.to_ne_bytes());
                (80, 0, 0)
            }
        };
        let len = OUT_HEADER_LEN + body;
        out_header(out, len as u32 + data, errno, unique);
        len
    }
}

fn out_header(out: &mut [u8], len: u32, errno: i32, unique: u64) {
    put(out, 0, &len.to_ne_bytes());
    put(out, 4, &(-errno).to_ne_bytes());
    put(out, 8, &unique.to_ne_bytes());
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = out.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(opcode: u32, arguments: &[u8], len: usize) -> [u8; REQUEST_LEN] {
        let mut head = [0xA5; REQUEST_LEN];
        put(&mut head, 0, &(len as u32).to_ne_bytes());
        put(&mut head, 4, &opcode.to_ne_bytes());
        put(&mut head, 8, &77_u64.to_ne_bytes());
        put(&mut head, IN_HEADER_LEN, arguments);
        head
    }

    fn transfer(offset: u64, size: u32) -> Vec<u8> {
        let mut arguments = vec![0; 40];
        put(&mut arguments, 8, &offset.to_ne_bytes());
        put(&mut arguments, 16, &size.to_ne_bytes());
        arguments
    }

    #[test]
    fn a_write_says_how_long_it_is_and_is_as_long() {
        let head = request(opcode::WRITE, &transfer(1 << 40, 8192), REQUEST_LEN + 8192);
        let parsed = Request::parse(&head, REQUEST_LEN + 8192).unwrap();
        let operation = Operation::Write {
            offset: 1 << 40,
            size: 8192,
        };
        assert_eq!((parsed.unique, parsed.operation), (77, operation));
        let head = request(opcode::WRITE, &transfer(0, 8192), REQUEST_LEN + 4096);
        assert!(Request::parse(&head, REQUEST_LEN + 4096).is_err());
    }

    #[test]
    fn a_message_shorter_than_its_arguments_is_refused() {
        let head = request(opcode::READ, &transfer(0, 4096), REQUEST_LEN - 1);
        assert!(Request::parse(&head, REQUEST_LEN - 1).is_err());
        let head = request(opcode::FALLOCATE, &[], IN_HEADER_LEN);
        assert!(Request::parse(&head, IN_HEADER_LEN).is_err());
        assert!(Request::parse(&head, IN_HEADER_LEN - 1).is_err());
    }

    #[test]
    fn only_ranges_that_become_zeroes_are_understood() {
        let fallocate = |mode: u32| {
            let mut arguments = vec![0; 32];
            put(&mut arguments, 8, &4096_u64.to_ne_bytes());
            put(&mut arguments, 16, &(1_u64 << 33).to_ne_bytes());
            put(&mut arguments, 24, &mode.to_ne_bytes());
            let len = IN_HEADER_LEN + 32;
            let head = request(opcode::FALLOCATE, &arguments, len);
            Request::parse(&head, len).unwrap().operation
        };
        let zero = |deallocate| Operation::Zero {
            offset: 4096,
            length: 1 << 33,
            deallocate,
        };
        assert_eq!(fallocate(0x03), zero(true));
        assert_eq!(fallocate(0x11), zero(false));
        assert_eq!(fallocate(0), Operation::Unknown);
        assert_eq!(fallocate(0x08), Operation::Unknown, "collapse");
    }

    #[test]
    fn init_settles_for_what_both_have() {
        let mut message = vec![0; INIT_LEN];
        put(&mut message, 0, &(INIT_LEN as u32).to_ne_bytes());
        put(&mut message, 4, &opcode::INIT.to_ne_bytes());
        put(&mut message, 8, &2_u64.to_ne_bytes());
        put(&mut message, 40, &7_u32.to_ne_bytes());
        put(&mut message, 44, &36_u32.to_ne_bytes());
        put(&mut message, 52, &(1_u32 << 22 | 1 << 3).to_ne_bytes());
        let limits = Limits {
            max_background: 128,
            max_write: 1 << 20,
        };
        let reply = Init::parse(&message).unwrap().reply(&limits);
        assert_eq!(u32_at(&reply, 0) as usize, INIT_REPLY_LEN);
        assert_eq!((u32_at(&reply, 16), u32_at(&reply, 20)), (7, 36));
        assert_eq!(u32_at(&reply, 28), 1 << 22, "only what the kernel offered");
        assert_eq!(u32_at(&reply, 36), 1 << 20);
        assert_eq!(u32_at(&reply, 44) & 0xFFFF, 256);
        put(&mut message, 44, &30_u32.to_ne_bytes());
        assert_eq!(Init::parse(&message), Err(InitError::Version(7, 30)));
        assert_eq!(Init::parse(&message[..50]), Err(InitError::NotInit));
    }

    #[test]
    fn replies_have_the_lengths_of_the_protocol() {
        let mut out = [0; REPLY_LEN];
        let attributes = Reply::Attributes {
            size: 1 << 30,
            block_size: 4096,
            read_only: true,
        };
        assert_eq!(attributes.emit(9, &mut out), 120);
        assert_eq!((u32_at(&out, 0), u64_at(&out, 8)), (120, 9));
        assert_eq!(u64_at(&out, 40), 1 << 30);
        assert_eq!(u32_at(&out, 92), 0o100_400);
        assert_eq!(Reply::Data(4096).emit(9, &mut out), 16);
        assert_eq!(u32_at(&out, 0), 16 + 4096);
        assert_eq!(Reply::Error(libc::EIO).emit(9, &mut out), 16);
        assert_eq!(u32_at(&out, 4) as i32, -libc::EIO);
        for (reply, len) in [
            (Reply::Opened, 32),
            (Reply::Written(1), 24),
            (
                Reply::StatFs {
                    size: 1,
                    block_size: 512,
                },
                96,
            ),
        ] {
            assert_eq!(reply.emit(9, &mut out), len);
            assert_eq!(u32_at(&out, 0) as usize, len);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::array::uniform32(any::<u8>()), len in 0_usize..300) {
            let mut head = [0; REQUEST_LEN];
            put(&mut head, 0, &bytes);
            put(&mut head, 32, &bytes);
            put(&mut head, 0, &(len as u32).to_ne_bytes());
            if let Ok(request) = Request::parse(&head, len)
                && let Operation::Write { size, .. } = request.operation
            {
                prop_assert_eq!(len, REQUEST_LEN + size as usize);
            }
        }
    }
}
