//! A connection's incoming bytes as PDUs, however they are cut into pieces.
//!
//! ```text
//!            header complete        no data
//! Head ----------------------> Pdu ---------------------------------------> Head
//!                               | data
//!                               v    padding, then       all bytes there
//!                              Body ------------> Data* -----------------> DataEnd -> Head
//! ```

use super::digest::{Crc32c, crc32c};
use super::error::Error;
use super::framing::{HEAD_MAX, TERM_MAX, term_req};
use super::pdu::{Layout, Pdu, PduType};
use super::wire::CommonHeader;
use super::{Alignment, DIGEST_LEN, Digests, End};

/// What connection set-up has agreed about PDUs towards this end, and this end's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Established {
    /// Digests in use.
    pub digests: Digests,
    /// Alignment that this end asked for.
    pub alignment: Alignment,
    /// On a controller: most in-capsule data of a command, in bytes.
    pub max_in_capsule_bytes: u32,
    /// Most data of one data PDU, in bytes: on a controller its MAXH2CDATA.
    pub max_data_bytes: u32,
}

impl Default for Established {
    /// No digests, no in-capsule data, data PDUs of any length.
    fn default() -> Self {
        Self {
            digests: Digests::empty(),
            alignment: Alignment::DWORD,
            max_in_capsule_bytes: 0,
            max_data_bytes: u32::MAX,
        }
    }
}

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A PDU whose header is complete and right. If it carries data, zero or more [`Event::Data`]
    /// and one [`Event::DataEnd`] follow before the next PDU: for data PDUs always, for a capsule
    /// when `len_bytes` is not 0.
    Pdu(Pdu),
    /// The next bytes of the PDU's data, never empty.
    Data(&'a [u8]),
    /// All of the PDU's data has come.
    DataEnd {
        /// False when its digest does not match: the command fails with Transient Transport Error
        /// (TCP 3.5, Digest Error handling). Always true without data digests.
        intact: bool,
    },
}

/// The receiving half of a connection.
///
/// Call [`Stream::next`] with what was received until it returns `Ok(None)`, which it does when the
/// input is used up. Whenever it does, [`Stream::payload_left`] tells whether the middle of a
/// payload has been reached: the caller may then receive up to that many bytes straight to where
/// they belong, tell with [`Stream::placed`], and go on with `next` (an empty input will do).
///
/// After an error the stream stays there and repeats it.
#[derive(Clone, Debug)]
pub struct Stream {
    end: End,
    /// `None` until [`Stream::establish`].
    established: Option<Established>,
    state: State,
    /// The header being gathered, and after that the header of the PDU in `state`.
    head: [u8; TERM_MAX],
    head_len: usize,
    digest: Crc32c,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// `want` bytes of header make it complete; with no layout that is the common header.
    Head {
        want: usize,
        layout: Option<Layout>,
    },
    Body {
        pad: usize,
        data: u32,
        /// Bytes of the data digest that have come, and what they are.
        digest_len: usize,
        digest: [u8; DIGEST_LEN],
        has_digest: bool,
    },
    Failed(Error),
}

const COMMON: State = State::Head {
    want: CommonHeader::SIZE,
    layout: None,
};

impl Stream {
    /// The receiving half of `end`, before connection set-up.
    #[must_use]
    pub fn new(end: End) -> Self {
        Self {
            end,
            established: None,
            state: COMMON,
            head: [0; TERM_MAX],
            head_len: 0,
            digest: Crc32c::new(),
        }
    }

    /// Connection set-up is done: call it after ICReq (on a controller) or ICResp (on a host) has
    /// come in and before the next call to [`Stream::next`].
    pub fn establish(&mut self, established: Established) {
        self.established = Some(established);
    }

    /// Changes how much in-capsule data is taken, which depends on the queue that Connect names.
    pub fn set_max_in_capsule_bytes(&mut self, bytes: u32) {
        if let Some(established) = &mut self.established {
            established.max_in_capsule_bytes = bytes;
        }
    }

    /// Takes from the front of `input` up to the next event. `None`: all of it is used and more is
    /// needed.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Error> {
        loop {
            match self.state {
                State::Head { want, layout } => {
                    if !self.gather(want, input) {
                        return Ok(None);
                    }
                    let step = match layout {
                        None => self.common_header(),
                        Some(layout) => self.header(&layout).map(Some),
                    };
                    match step {
                        Ok(None) => {}
                        Ok(Some(pdu)) => return Ok(Some(Event::Pdu(pdu))),
                        Err(error) => return Err(self.fail(error)),
                    }
                }
                State::Body { .. } => return Ok(self.body(input)),
                State::Failed(error) => return Err(error),
            }
        }
    }

    /// Bytes of the current PDU's payload that have not come yet; 0 when the next bytes are
    /// something else. Ask only after [`Stream::next`] has returned `None`.
    #[inline]
    #[must_use]
    pub fn payload_left(&self) -> u32 {
        match self.state {
            State::Body { pad: 0, data, .. } => data,
            _ => 0,
        }
    }

    /// The caller has received the next `len` bytes of payload itself. `bytes` gives them in pieces,
    /// in order; it is called only when the digest needs them. More than [`Stream::payload_left`] is
    /// a bug of the caller and is cut.
    pub fn placed<'b, I: IntoIterator<Item = &'b [u8]>>(
        &mut self,
        len: u32,
        bytes: impl FnOnce() -> I,
    ) {
        if let State::Body {
            pad: 0,
            data,
            has_digest,
            ..
        } = &mut self.state
        {
            debug_assert!(len <= *data);
            *data = data.saturating_sub(len);
            if *has_digest {
                for piece in bytes() {
                    self.digest.update(piece);
                }
            }
        }
    }

    /// Does the current PDU's data have a digest?
    #[inline]
    #[must_use]
    pub fn is_digested(&self) -> bool {
        matches!(
            self.state,
            State::Body {
                has_digest: true,
                ..
            }
        )
    }

    /// Is nothing of a PDU here? Then the other end may close without cutting anything off.
    #[must_use]
    pub fn is_between_pdus(&self) -> bool {
        matches!(self.state, State::Head { layout: None, .. }) && self.head_len == 0
    }

    /// The TermReq that tells the other end of `error`, about the last header that came in; 0 when
    /// none is sent. The error is the stream's own or one that the caller has found in the PDU.
    pub fn term_req(&self, error: Error, out: &mut [u8; TERM_MAX]) -> usize {
        let Some((fes, fei)) = error.status() else {
            return 0;
        };
        let wrong = self.head.get(..self.header_len()).unwrap_or_default();
        term_req(self.end, fes, fei, wrong, out)
    }

    /// Length of the header in `head` without a digest.
    fn header_len(&self) -> usize {
        let header = CommonHeader::view(&self.head);
        let hlen = header
            .and_then(|header| PduType::from_raw(header.pdu_type))
            .map_or(CommonHeader::SIZE, PduType::hlen);
        // In the middle of the next header, or of one that never became complete, what there is.
        match self.state {
            State::Head { .. } if self.head_len > 0 => hlen.min(self.head_len),
            State::Failed(_) => hlen.min(self.head_len.max(CommonHeader::SIZE)),
            _ => hlen,
        }
    }

    fn fail(&mut self, error: Error) -> Error {
        self.state = State::Failed(error);
        error
    }

    /// Takes header bytes until there are `want`.
    #[inline]
    fn gather(&mut self, want: usize, input: &mut &[u8]) -> bool {
        let missing = want.saturating_sub(self.head_len);
        let take = missing.min(input.len());
        let (bytes, rest) = input.split_at(take);
        if let Some(to) = self.head.get_mut(self.head_len..self.head_len + take) {
            to.copy_from_slice(bytes);
        }
        self.head_len += take;
        *input = rest;
        take == missing
    }

    /// The common header is complete: what is to come of this PDU?
    #[inline]
    fn common_header(&mut self) -> Result<Option<Pdu>, Error> {
        let header = CommonHeader::view(&self.head).ok_or(Error::Sequence)?;
        let (digests, alignment) = match &self.established {
            Some(established) => (established.digests, established.alignment),
            None => (Digests::empty(), Alignment::DWORD),
        };
        let layout = Layout::parse(header, self.end, digests, alignment)?;
        let pdu_type = layout.pdu_type;
        // Set-up comes first and once; only TermReq may come at any time.
        if !pdu_type.is_term() && pdu_type.is_setup() == self.established.is_some() {
            return Err(Error::Sequence);
        }
        self.state = State::Head {
            want: layout.head_len,
            layout: Some(layout),
        };
        Ok(None)
    }

    /// The header is complete.
    #[inline]
    fn header(&mut self, layout: &Layout) -> Result<Pdu, Error> {
        let pdu_type = layout.pdu_type;
        let (header, rest) = self.head.split_at(pdu_type.hlen());
        if layout.has_header_digest {
            let received = rest
                .first_chunk()
                .map_or(0, |bytes| u32::from_le_bytes(*bytes));
            if received != crc32c(header) {
                return Err(Error::HeaderDigest { received });
            }
        }
        // Lengths are believed after the digest only: a flipped bit must not be called a limit.
        if let Some(established) = &self.established {
            match pdu_type {
                PduType::CapsuleCmd if layout.data_len > established.max_in_capsule_bytes => {
                    return Err(Error::InvalidField {
                        offset: super::pdu::PLEN,
                    });
                }
                PduType::H2cData if layout.data_len > established.max_data_bytes => {
                    return Err(Error::LimitExceeded);
                }
                PduType::C2hData if layout.data_len > established.max_data_bytes => {
                    return Err(Error::OutOfRange);
                }
                _ => {}
            }
        }
        let pdu = Pdu::parse(pdu_type, header, layout.data_len)?;
        self.head_len = 0;
        let has_body = match pdu_type {
            PduType::CapsuleCmd => layout.data_len > 0,
            other => other.has_data(),
        };
        self.state = if has_body {
            if layout.has_data_digest {
                self.digest = Crc32c::new();
            }
            State::Body {
                pad: layout.pad_len,
                data: layout.data_len,
                digest_len: 0,
                digest: [0; DIGEST_LEN],
                has_digest: layout.has_data_digest,
            }
        } else {
            COMMON
        };
        Ok(pdu)
    }

    #[inline]
    fn body<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let State::Body {
            pad,
            data,
            digest_len,
            digest,
            has_digest,
        } = &mut self.state
        else {
            return None;
        };
        if *pad > 0 {
            let take = (*pad).min(input.len());
            *pad -= take;
            *input = input.get(take..).unwrap_or_default();
            if *pad > 0 {
                return None;
            }
        }
        if *data > 0 {
            if input.is_empty() {
                return None;
            }
            let take = (*data as usize).min(input.len());
            let (bytes, rest) = input.split_at(take);
            *input = rest;
            // Fits: not more than `data`.
            *data -= take as u32;
            if *has_digest {
                self.digest.update(bytes);
            }
            return Some(Event::Data(bytes));
        }
        let mut intact = true;
        if *has_digest {
            let place = digest.get_mut(*digest_len..).unwrap_or_default();
            let take = place.len().min(input.len());
            let (bytes, rest) = input.split_at(take);
            for (to, from) in place.iter_mut().zip(bytes) {
                *to = *from;
            }
            *input = rest;
            *digest_len += take;
            if *digest_len < DIGEST_LEN {
                return None;
            }
            intact = u32::from_le_bytes(*digest) == self.digest.finish();
        }
        self.state = COMMON;
        Some(Event::DataEnd { intact })
    }
}

// A TermReq is gathered whole, everything else up to its header digest.
const _: () = assert!(HEAD_MAX + DIGEST_LEN <= TERM_MAX);
