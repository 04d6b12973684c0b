//! What goes before the data of an answer (proto, "Simple reply message", "Structured reply chunk message").

use super::{Errno, Style};

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Each answer is a single chunk, so it is always the last one.
const REPLY_FLAG_DONE: u16 = 1 << 0;
const REPLY_TYPE_NONE: u16 = 0;
const REPLY_TYPE_OFFSET_DATA: u16 = 1;
const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

/// The longest head: an extended header, error number and length, a text.
pub const MAX_REPLY_HEAD_BYTES: usize = 32 + 6 + MAX_TEXT_BYTES;
const MAX_TEXT_BYTES: usize = 48;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; no data.
    Done,
    /// So many bytes follow, which lie at that offset.
    Data {
        /// Of the first byte.
        offset: u64,
        /// How many.
        len_bytes: u32,
    },
    /// It failed. The text reaches whoever negotiated structured replies.
    Failed(Errno, &'static str),
}

/// The bytes before an answer's data.
#[derive(Clone, Copy, Debug)]
pub struct ReplyHead {
    bytes: [u8; MAX_REPLY_HEAD_BYTES],
    len: usize,
}

impl ReplyHead {
    /// The head of the answer to the request with that cookie and offset.
    #[inline]
    #[must_use]
    pub fn new(style: Style, cookie: u64, request_offset: u64, answer: Answer) -> ReplyHead {
        let mut head = ReplyHead {
            bytes: [0; MAX_REPLY_HEAD_BYTES],
            len: 0,
        };
        if style == Style::Simple {
            let error = match answer {
                Answer::Failed(errno, _) => errno as u32,
                Answer::Done | Answer::Data { .. } => 0,
            };
            head.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
            head.put(&error.to_be_bytes());
            head.put(&cookie.to_be_bytes());
            return head;
        }
        let (kind, payload) = match answer {
            Answer::Done => (REPLY_TYPE_NONE, 0),
            Answer::Data { len_bytes, .. } => (REPLY_TYPE_OFFSET_DATA, 8 + u64::from(len_bytes)),
            Answer::Failed(_, text) => (REPLY_TYPE_ERROR, 6 + cut(text).len() as u64),
        };
        let magic = match style {
            Style::Extended => EXTENDED_REPLY_MAGIC,
            _ => STRUCTURED_REPLY_MAGIC,
        };
        head.put(&magic.to_be_bytes());
        head.put(&REPLY_FLAG_DONE.to_be_bytes());
        head.put(&kind.to_be_bytes());
        head.put(&cookie.to_be_bytes());
        if style == Style::Extended {
            head.put(&request_offset.to_be_bytes());
            head.put(&payload.to_be_bytes());
        } else {
            // A payload is at most MAX_PAYLOAD_BYTES.
            head.put(&(payload as u32).to_be_bytes());
        }
        match answer {
            Answer::Done => {}
            Answer::Data { offset, .. } => head.put(&offset.to_be_bytes()),
            Answer::Failed(errno, text) => {
                let text = cut(text);
                head.put(&(errno as u32).to_be_bytes());
                head.put(&(text.len() as u16).to_be_bytes());
                head.put(text);
            }
        }
        head
    }

    /// The bytes.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    #[inline]
    fn put(&mut self, field: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.len..self.len + field.len()) {
            place.copy_from_slice(field);
            self.len += field.len();
        }
    }
}

fn cut(text: &'static str) -> &'static [u8] {
    let bytes = text.as_bytes();
    bytes.get(..MAX_TEXT_BYTES).unwrap_or(bytes)
}
