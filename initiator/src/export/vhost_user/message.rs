//! The messages of the vhost-user protocol (QEMU: docs/interop/vhost-user.rst), as bytes in and out. No I/O.
//!
//! The front-end (the virtual machine monitor) asks, we answer. Every number is in the machine's byte order, because
//! both sides run on the same machine.

use arrayvec::ArrayVec;

/// Bytes of a header: request, flags, size of the payload ("Header").
pub(crate) const HEADER_BYTES: usize = 12;
/// Longest payload that we take: a configuration space with its own header.
pub(crate) const MAX_PAYLOAD_BYTES: usize = CONFIG_HEADER_BYTES + MAX_CONFIG_BYTES;
/// Descriptors that one message brings at most ("Memory regions description").
pub(crate) const MAX_FDS: usize = MAX_TABLE_REGIONS;
/// Regions of one SET_MEM_TABLE.
pub(crate) const MAX_TABLE_REGIONS: usize = 8;
/// VHOST_USER_MAX_CONFIG_SIZE.
pub(crate) const MAX_CONFIG_BYTES: usize = 256;
const CONFIG_HEADER_BYTES: usize = 12;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Bit 8 of the number of a ring message: no descriptor comes with it.
const NO_FD: u64 = 1 << 8;
const RING_MASK: u64 = 0xff;

/// VHOST_USER_PROTOCOL_F_*.
pub(crate) mod protocol_feature {
    /// Several queues.
    pub(crate) const MQ: u64 = 1 << 0;
    /// NEED_REPLY.
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    /// A channel for our own requests.
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG, SET_CONFIG.
    pub(crate) const CONFIG: u64 = 1 << 9;
    /// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// VHOST_USER_F_PROTOCOL_FEATURES, among the virtio features.
pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Why a message is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MessageError {
    /// The version in the flags is not 1, or it is a reply.
    #[error("flags {0:#x} are not those of a request of protocol version 1")]
    Flags(u32),
    /// Longer than any message is.
    #[error("a payload of {0} bytes is longer than any message's")]
    TooLong(u32),
    /// Not as long as this message is.
    #[error("request {request} does not have a payload of {bytes} bytes")]
    Length {
        /// Request.
        request: u32,
        /// Of its payload.
        bytes: usize,
    },
    /// Too many or too few descriptors.
    #[error("request {request} does not come with {fds} descriptors")]
    Descriptors {
        /// Request.
        request: u32,
        /// How many came.
        fds: usize,
    },
    /// A field is out of its range.
    #[error("request {request} has a field out of range")]
    Field {
        /// Request.
        request: u32,
    },
    /// Not one of ours.
    #[error("request {0} is unknown, or of a feature that was not offered")]
    Unknown(u32),
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// VHOST_USER_*.
    pub(crate) request: u32,
    /// The peer waits for an answer even where there is none by itself.
    pub(crate) need_reply: bool,
    /// Bytes that follow.
    pub(crate) payload_bytes: usize,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, MessageError> {
        let mut fields = Fields(bytes);
        let (request, flags, size) = (fields.u32(), fields.u32(), fields.u32());
        let (Some(request), Some(flags), Some(size)) = (request, flags, size) else {
            return Err(MessageError::Flags(0));
        };
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(MessageError::Flags(flags));
        }
        let payload_bytes = usize::try_from(size).unwrap_or(usize::MAX);
        if payload_bytes > MAX_PAYLOAD_BYTES {
            return Err(MessageError::TooLong(size));
        }
        Ok(Header {
            request,
            need_reply: flags & NEED_REPLY != 0,
            payload_bytes,
        })
    }
}

/// A piece of the guest's memory ("Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryRegion {
    /// Where the guest sees it.
    pub(crate) guest: u64,
    /// How long it is, in bytes.
    pub(crate) len: u64,
    /// Where the front-end sees it.
    pub(crate) user: u64,
    /// Where it starts in its file.
    pub(crate) offset: u64,
}

/// Where a ring lies, in the front-end's addresses ("Vring address description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddress {
    /// Descriptor table.
    pub(crate) descriptors: u64,
    /// Used ring.
    pub(crate) used: u64,
    /// Available ring.
    pub(crate) available: u64,
}

/// Shared memory for requests in flight ("Inflight description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inflight {
    /// Bytes.
    pub(crate) size: u64,
    /// Where it starts in its file.
    pub(crate) offset: u64,
    /// Number of queues.
    pub(crate) queues: u16,
    /// Entries of each.
    pub(crate) queue_size: u16,
}

/// What the front-end asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    /// With a descriptor for each.
    SetMemTable(ArrayVec<MemoryRegion, MAX_TABLE_REGIONS>),
    SetVringNum(u8, u16),
    SetVringAddr(u8, RingAddress),
    SetVringBase(u8, u16),
    GetVringBase(u8),
    /// With a descriptor, or without: none is there.
    SetVringKick(u8),
    /// The same.
    SetVringCall(u8),
    /// The same.
    SetVringErr(u8),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(u8, bool),
    /// With a descriptor.
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        len: u32,
    },
    SetConfig {
        offset: u32,
        bytes: ArrayVec<u8, MAX_CONFIG_BYTES>,
    },
    GetInflightFd(Inflight),
    /// With a descriptor.
    SetInflightFd(Inflight),
    ResetDevice,
    GetMaxMemSlots,
    /// With a descriptor.
    AddMemReg(MemoryRegion),
    /// With a descriptor that we have no use for, or without.
    RemMemReg(MemoryRegion),
}

/// How many descriptors go with a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fds {
    Exactly(usize),
    AtMost(usize),
}

impl Request {
    /// `fds`: how many descriptors came along.
    pub(crate) fn parse(
        header: &Header,
        payload: &[u8],
        fds: usize,
    ) -> Result<Request, MessageError> {
        let number = header.request;
        let length = MessageError::Length {
            request: number,
            bytes: payload.len(),
        };
        let field = MessageError::Field { request: number };
        let mut fields = Fields(payload);
        let mut wanted = Fds::Exactly(0);
        let request = match number {
            1 => Request::GetFeatures,
            2 => Request::SetFeatures(fields.u64().ok_or(length)?),
            3 => Request::SetOwner,
            4 => Request::ResetOwner,
            5 => {
                let count = fields.u32().ok_or(length)?;
                fields.u32().ok_or(length)?;
                let count = usize::try_from(count).unwrap_or(usize::MAX);
                if count > MAX_TABLE_REGIONS {
                    return Err(field);
                }
                wanted = Fds::Exactly(count);
                let mut regions = ArrayVec::new();
                for _ in 0..count {
                    regions
                        .try_push(fields.region().ok_or(length)?)
                        .map_err(|_| field)?;
                }
                Request::SetMemTable(regions)
            }
            8 => {
                let (ring, size) = fields.ring_state().ok_or(length)?.ok_or(field)?;
                if size == 0 || size > 32768 || !size.is_power_of_two() {
                    return Err(field);
                }
                Request::SetVringNum(ring, size as u16)
            }
            9 => {
                let ring = fields.u32().ok_or(length)?;
                let _flags = fields.u32().ok_or(length)?; // logging, which is not offered
                let address = RingAddress {
                    descriptors: fields.u64().ok_or(length)?,
                    used: fields.u64().ok_or(length)?,
                    available: fields.u64().ok_or(length)?,
                };
                fields.u64().ok_or(length)?;
                Request::SetVringAddr(u8::try_from(ring).map_err(|_| field)?, address)
            }
            10 => {
                let (ring, base) = fields.ring_state().ok_or(length)?.ok_or(field)?;
                Request::SetVringBase(ring, u16::try_from(base).map_err(|_| field)?)
            }
            11 => Request::GetVringBase(fields.ring_state().ok_or(length)?.ok_or(field)?.0),
            12..=14 => {
                let word = fields.u64().ok_or(length)?;
                wanted = Fds::Exactly(usize::from(word & NO_FD == 0));
                let ring = (word & RING_MASK) as u8;
                match number {
                    12 => Request::SetVringKick(ring),
                    13 => Request::SetVringCall(ring),
                    _ => Request::SetVringErr(ring),
                }
            }
            15 => Request::GetProtocolFeatures,
            16 => Request::SetProtocolFeatures(fields.u64().ok_or(length)?),
            17 => Request::GetQueueNum,
            18 => {
                let (ring, on) = fields.ring_state().ok_or(length)?.ok_or(field)?;
                Request::SetVringEnable(ring, on != 0)
            }
            21 => {
                wanted = Fds::Exactly(1);
                Request::SetBackendReqFd
            }
            24 | 25 => {
                let offset = fields.u32().ok_or(length)?;
                let len = fields.u32().ok_or(length)?;
                let _flags = fields.u32().ok_or(length)?;
                // The payload of a GET_CONFIG is as long as what is asked for, and of no meaning.
                let bytes = fields.rest();
                if usize::try_from(len) != Ok(bytes.len()) {
                    return Err(length);
                }
                if number == 24 {
                    Request::GetConfig { offset, len }
                } else {
                    let bytes = ArrayVec::try_from(bytes).map_err(|_| field)?;
                    Request::SetConfig { offset, bytes }
                }
            }
            31 | 32 => {
                let inflight = Inflight {
                    size: fields.u64().ok_or(length)?,
                    offset: fields.u64().ok_or(length)?,
                    queues: fields.u16().ok_or(length)?,
                    queue_size: fields.u16().ok_or(length)?,
                };
                // Padded to a multiple of 8 by some front-ends, in others not.
                if matches!(fields.0.len(), 4) {
                    fields.rest();
                }
                if number == 31 {
                    Request::GetInflightFd(inflight)
                } else {
                    wanted = Fds::Exactly(1);
                    Request::SetInflightFd(inflight)
                }
            }
            34 => Request::ResetDevice,
            36 => Request::GetMaxMemSlots,
            37 | 38 => {
                fields.u64().ok_or(length)?;
                let region = fields.region().ok_or(length)?;
                if number == 37 {
                    wanted = Fds::Exactly(1);
                    Request::AddMemReg(region)
                } else {
                    wanted = Fds::AtMost(1);
                    Request::RemMemReg(region)
                }
            }
            unknown => return Err(MessageError::Unknown(unknown)),
        };
        if !fields.0.is_empty() {
            return Err(length);
        }
        let fits = match wanted {
            Fds::Exactly(count) => fds == count,
            Fds::AtMost(count) => fds <= count,
        };
        if fits {
            Ok(request)
        } else {
            Err(MessageError::Descriptors {
                request: number,
                fds,
            })
        }
    }
}

/// What we answer.
#[expect(
    clippy::large_enum_variant,
    reason = "made and sent at once, never kept"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// A number: features, counts; where a reply was only asked for (NEED_REPLY), 0 says that all went well.
    Number(u64),
    /// A ring and its next available index.
    VringBase(u8, u16),
    /// What was asked for of the configuration space; nothing: there is no such part.
    Config {
        /// As in the request.
        offset: u32,
        /// From there on.
        bytes: ArrayVec<u8, MAX_CONFIG_BYTES>,
    },
    /// The description of what goes with it.
    Inflight(Inflight),
}

/// Longest message that we send.
pub(crate) type Message = ArrayVec<u8, { HEADER_BYTES + MAX_PAYLOAD_BYTES }>;

impl Reply {
    /// The whole message.
    pub(crate) fn emit(&self, request: u32) -> Message {
        let mut payload = ArrayVec::<u8, MAX_PAYLOAD_BYTES>::new();
        let mut put = |bytes: &[u8]| payload.extend(bytes.iter().copied());
        match self {
            Reply::Number(number) => put(&number.to_ne_bytes()),
            Reply::VringBase(ring, base) => {
                put(&u32::from(*ring).to_ne_bytes());
                put(&u32::from(*base).to_ne_bytes());
            }
            Reply::Config { offset, bytes } => {
                // Without bytes the whole payload is missing: that is how an error is told.
                if !bytes.is_empty() {
                    put(&offset.to_ne_bytes());
                    put(&(bytes.len() as u32).to_ne_bytes());
                    put(&0_u32.to_ne_bytes());
                    put(bytes);
                }
            }
            Reply::Inflight(inflight) => {
                put(&inflight.size.to_ne_bytes());
                put(&inflight.offset.to_ne_bytes());
                put(&inflight.queues.to_ne_bytes());
                put(&inflight.queue_size.to_ne_bytes());
                put(&[0; 4]);
            }
        }
        message(request, VERSION | REPLY, &payload)
    }
}

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: the configuration space is not what it was. No answer is asked for.
pub(crate) fn config_change() -> Message {
    message(2, VERSION, &[])
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Message {
    let mut message = Message::new();
    for word in [request, flags, payload.len() as u32] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(payload.iter().copied());
    message
}

/// Fields taken off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn region(&mut self) -> Option<MemoryRegion> {
        Some(MemoryRegion {
            guest: self.u64()?,
            len: self.u64()?,
            user: self.u64()?,
            offset: self.u64()?,
        })
    }

    /// A ring and a number ("A vring state description"); the inner `None`: there can be no such ring.
    fn ring_state(&mut self) -> Option<Option<(u8, u32)>> {
        let (ring, number) = (self.u32()?, self.u32()?);
        Some(u8::try_from(ring).ok().map(|ring| (ring, number)))
    }
}

/// Any bytes as a message: for fuzzing.
pub(crate) fn check(bytes: &[u8], fds: usize) -> bool {
    let Some((header, payload)) = bytes.split_first_chunk() else {
        return false;
    };
    Header::parse(header)
        .and_then(|header| Request::parse(&header, payload, fds))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(number: u32, payload: &[u8], fds: usize) -> Result<Request, MessageError> {
        let header = message(number, VERSION, payload);
        let (header, payload) = header.split_first_chunk().unwrap();
        Request::parse(&Header::parse(header)?, payload, fds)
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_header_is_a_request_of_version_1() {
        let bytes = |flags: u32, size: u32| {
            let mut bytes = [0; HEADER_BYTES];
            bytes[0] = 24;
            bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
            bytes[8..].copy_from_slice(&size.to_ne_bytes());
            bytes
        };
        let header = Header::parse(&bytes(VERSION | NEED_REPLY, 12)).unwrap();
        assert!(header.need_reply && header.request == 24 && header.payload_bytes == 12);
        assert!(!Header::parse(&bytes(VERSION, 12)).unwrap().need_reply);
        assert_eq!(Header::parse(&bytes(2, 0)), Err(MessageError::Flags(2)));
        assert_eq!(Header::parse(&bytes(5, 0)), Err(MessageError::Flags(5)));
        let long = MAX_PAYLOAD_BYTES as u32 + 1;
        assert_eq!(
            Header::parse(&bytes(VERSION, long)),
            Err(MessageError::TooLong(long))
        );
    }

    #[test]
    fn descriptors_are_counted() {
        let one = words(&[1, 0x1000, 0x2000, 0x7000_0000, 0]);
        assert!(request(5, &one, 1).is_ok());
        assert!(matches!(
            request(5, &one, 0),
            Err(MessageError::Descriptors { fds: 0, .. })
        ));
        assert!(request(5, &one, 2).is_err());
        // Nine regions, and two of which one is missing.
        assert!(matches!(
            request(5, &words(&[9]), 0),
            Err(MessageError::Field { .. })
        ));
        assert!(matches!(
            request(5, &words(&[2, 0, 1, 0, 0]), 2),
            Err(MessageError::Length { .. })
        ));
        assert_eq!(request(12, &words(&[3]), 1), Ok(Request::SetVringKick(3)));
        assert_eq!(
            request(13, &words(&[NO_FD | 3]), 0),
            Ok(Request::SetVringCall(3))
        );
        assert!(request(12, &words(&[NO_FD | 3]), 1).is_err());
        assert!(request(12, &words(&[3]), 0).is_err());
        assert!(request(1, &[], 1).is_err());
    }

    #[test]
    fn rings_have_sizes_and_numbers_that_can_be() {
        let state = |ring: u32, number: u32| u64::from(ring) | u64::from(number) << 32;
        assert_eq!(
            request(8, &words(&[state(1, 256)]), 0),
            Ok(Request::SetVringNum(1, 256))
        );
        for (ring, size) in [(1, 0), (1, 3), (1, 65536), (256, 256)] {
            assert!(request(8, &words(&[state(ring, size)]), 0).is_err());
        }
        assert!(request(10, &words(&[state(0, 65536)]), 0).is_err());
        assert_eq!(
            request(10, &words(&[state(0, 65535)]), 0),
            Ok(Request::SetVringBase(0, 65535))
        );
    }

    #[test]
    fn a_config_is_as_long_as_it_says() {
        let mut payload = words(&[u64::from(32_u32) | 1 << 32]);
        payload.extend([0; 4]);
        assert!(request(25, &payload, 0).is_err());
        payload.push(1);
        let Ok(Request::SetConfig { offset: 32, bytes }) = request(25, &payload, 0) else {
            panic!("not understood");
        };
        assert_eq!(bytes.as_slice(), [1]);
        assert_eq!(
            request(24, &payload, 0),
            Ok(Request::GetConfig { offset: 32, len: 1 })
        );
        let reply = Reply::Config { offset: 32, bytes }.emit(24);
        assert_eq!(reply.len(), HEADER_BYTES + CONFIG_HEADER_BYTES + 1);
        let none = Reply::Config {
            offset: 32,
            bytes: ArrayVec::new(),
        };
        assert_eq!(none.emit(24).len(), HEADER_BYTES);
    }

    #[test]
    fn replies_carry_the_reply_flag() {
        let reply = Reply::VringBase(2, 0x1234).emit(11);
        let word = |at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!([0, 4, 8, 12, 16].map(word), [11, 5, 8, 2, 0x1234]);
        assert_eq!(config_change().len(), HEADER_BYTES);
    }

    proptest! {
        #[test]
        fn any_bytes_are_understood_or_refused(
            number in 0u32..45,
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            fds in 0usize..10,
        ) {
            let mut bytes = message(number, VERSION, &[]).to_vec();
            bytes.extend(payload);
            check(&bytes, fds);
        }

        #[test]
        fn what_is_cut_short_is_refused(number in prop_oneof![Just(2u32), Just(8), Just(9), Just(16), Just(31), Just(37)], cut in 1usize..8) {
            let full = [0u8; 40];
            let len = match number { 2 | 8 | 16 => 8, 9 | 37 => 40, _ => 20 };
            prop_assert!(request(number, &full[..len - cut], 0).is_err());
        }
    }
}
