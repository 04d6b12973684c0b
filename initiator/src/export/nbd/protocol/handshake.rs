//! Negotiation (proto, "Newstyle negotiation", "Option types", "Option reply types").

use super::{Broken, Export, MAX_PAYLOAD_BYTES, Session, Style, u16_at, u32_at, u64_at};

const INIT_PASSWORD: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERR + 1;
const REP_ERR_INVALID: u32 = REP_ERR + 3;
const REP_ERR_UNKNOWN: u32 = REP_ERR + 6;
const REP_ERR_TOO_BIG: u32 = REP_ERR + 9;
const REP_ERR_EXT_HEADER_REQD: u32 = REP_ERR + 10;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

const OPTION_HEADER_BYTES: usize = 16;
/// Data of an option that is looked at: names are at most 4096 bytes.
const MAX_OPTION_BYTES: u32 = 16 << 10;
/// More than this is not even skipped.
const MAX_SKIPPED_BYTES: u32 = 1 << 20;

/// Negotiation with one client. Send [`greeting`](Self::greeting) first; then give it what has arrived, again and
/// again, until it is over. It takes one option at a time, so that its caller decides how much is answered at once.
#[derive(Debug)]
pub struct Handshake {
    export: Export,
    state: State,
    style: Style,
    no_zeroes: bool,
    fixed: bool,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Option,
    /// Data of an option that is too long.
    Skip {
        left: u32,
    },
    Over,
}

/// What [`Handshake::handle`] came to.
#[derive(Debug)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// Something was taken from the input; call again.
    Again,
    /// The output ends negotiation; requests follow in the input.
    Session(Session),
    /// The output is the last: the client has ended it.
    Abort,
}

impl Handshake {
    /// For one client of that export.
    #[must_use]
    pub fn new(export: Export) -> Handshake {
        Handshake {
            export,
            state: State::ClientFlags,
            style: Style::Simple,
            no_zeroes: false,
            fixed: false,
        }
    }

    /// What the server says first.
    #[must_use]
    pub fn greeting() -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[0..8].copy_from_slice(&INIT_PASSWORD.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..18].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        bytes
    }

    /// Takes the next piece from the front of `input` and appends what is to be sent to `out`.
    ///
    /// # Errors
    /// [`Broken`]: close the connection.
    pub fn handle(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, Broken> {
        match self.state {
            State::ClientFlags => {
                let Some(flags) = u32_at(input, 0) else {
                    return Ok(Step::More);
                };
                advance(input, 4);
                let offered = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
                if flags & !offered != 0 {
                    return Err(Broken::ClientFlags(flags));
                }
                self.fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
                self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
                self.state = State::Option;
                Ok(Step::Again)
            }
            State::Skip { left } => {
                let skipped = left.min(u32::try_from(input.len()).unwrap_or(u32::MAX));
                advance(input, skipped as usize);
                self.state = match left - skipped {
                    0 => State::Option,
                    left => State::Skip { left },
                };
                Ok(if skipped == left {
                    Step::Again
                } else {
                    Step::More
                })
            }
            State::Option => self.option(input, out),
            State::Over => Ok(Step::More),
        }
    }

    fn option(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, Broken> {
        if u64_at(input, 0).is_some_and(|magic| magic != OPTION_MAGIC) {
            return Err(Broken::Magic);
        }
        let (Some(option), Some(len)) = (u32_at(input, 8), u32_at(input, 12)) else {
            return Ok(Step::More);
        };
        if !self.fixed && option != OPT_EXPORT_NAME {
            return Err(Broken::NotFixed);
        }
        if len > MAX_OPTION_BYTES {
            if len > MAX_SKIPPED_BYTES || option == OPT_EXPORT_NAME {
                return Err(Broken::Length(len.into()));
            }
            advance(input, OPTION_HEADER_BYTES);
            reply(out, option, REP_ERR_TOO_BIG, &[b"too long"]);
            self.state = State::Skip { left: len };
            return Ok(Step::Again);
        }
        let end = OPTION_HEADER_BYTES + len as usize;
        let Some(data) = input.get(OPTION_HEADER_BYTES..end) else {
            return Ok(Step::More);
        };
        let step = self.answer(option, data, out)?;
        advance(input, end);
        if !matches!(step, Step::Again) {
            self.state = State::Over;
        }
        Ok(step)
    }

    /// A whole option.
    fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Step, Broken> {
        match option {
            OPT_EXPORT_NAME => {
                if !self.export.is_called(data) {
                    return Err(Broken::UnknownExport);
                }
                out.extend(self.export.len_bytes.to_be_bytes());
                out.extend(self.export.flags(self.style).to_be_bytes());
                if !self.no_zeroes {
                    out.extend([0; 124]);
                }
                return Ok(Step::Session(self.session()));
            }
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Ok(Step::Abort);
            }
            OPT_LIST if data.is_empty() => {
                let name = self.export.name.as_bytes();
                let len = (name.len() as u32).to_be_bytes();
                let description = self.export.description.as_bytes();
                reply(out, option, REP_SERVER, &[&len, name, description]);
                reply(out, option, REP_ACK, &[]);
            }
            OPT_INFO | OPT_GO => {
                let Some((name, infos)) = parse_info(data) else {
                    reply(out, option, REP_ERR_INVALID, &[b"malformed"]);
                    return Ok(Step::Again);
                };
                if !self.export.is_called(name) {
                    reply(out, option, REP_ERR_UNKNOWN, &[b"no export of that name"]);
                    return Ok(Step::Again);
                }
                self.describe(option, infos, out);
                if option == OPT_GO {
                    return Ok(Step::Session(self.session()));
                }
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => match self.style {
                Style::Simple => {
                    self.style = Style::Structured;
                    reply(out, option, REP_ACK, &[]);
                }
                Style::Structured => reply(out, option, REP_ERR_INVALID, &[b"already so"]),
                Style::Extended => {
                    reply(
                        out,
                        option,
                        REP_ERR_EXT_HEADER_REQD,
                        &[b"extended headers are in use"],
                    );
                }
            },
            OPT_EXTENDED_HEADERS if data.is_empty() => match self.style {
                Style::Simple | Style::Structured => {
                    self.style = Style::Extended;
                    reply(out, option, REP_ACK, &[]);
                }
                Style::Extended => reply(out, option, REP_ERR_INVALID, &[b"already so"]),
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => match parse_queries(data) {
                Some(_) if self.style == Style::Simple => {
                    reply(out, option, REP_ERR_INVALID, &[b"needs structured replies"]);
                }
                Some(name) if self.export.is_called(name) => {
                    // No context: NVMe has no way to ask what is allocated that all controllers have.
                    reply(out, option, REP_ACK, &[]);
                }
                Some(_) => reply(out, option, REP_ERR_UNKNOWN, &[b"no export of that name"]),
                None => reply(out, option, REP_ERR_INVALID, &[b"malformed"]),
            },
            OPT_LIST | OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS => {
                reply(out, option, REP_ERR_INVALID, &[b"takes no data"]);
            }
            // STARTTLS among them.
            _ => reply(out, option, REP_ERR_UNSUP, &[]),
        }
        Ok(Step::Again)
    }

    fn describe(&self, option: u32, infos: &[u8], out: &mut Vec<u8>) {
        let export = &self.export;
        reply(
            out,
            option,
            REP_INFO,
            &[
                &INFO_EXPORT.to_be_bytes(),
                &export.len_bytes.to_be_bytes(),
                &export.flags(self.style).to_be_bytes(),
            ],
        );
        // Also to those who did not ask: whoever knows them can keep to them.
        reply(
            out,
            option,
            REP_INFO,
            &[
                &INFO_BLOCK_SIZE.to_be_bytes(),
                &export.block_bytes.to_be_bytes(),
                &export.preferred_bytes.to_be_bytes(),
                &MAX_PAYLOAD_BYTES.to_be_bytes(),
            ],
        );
        let wants = |info: u16| {
            infos
                .chunks_exact(2)
                .any(|wanted| wanted == info.to_be_bytes())
        };
        for (info, text) in [
            (INFO_NAME, &export.name),
            (INFO_DESCRIPTION, &export.description),
        ] {
            if wants(info) {
                reply(
                    out,
                    option,
                    REP_INFO,
                    &[&info.to_be_bytes(), text.as_bytes()],
                );
            }
        }
        reply(out, option, REP_ACK, &[]);
    }

    fn session(&self) -> Session {
        Session::new(self.export.clone(), self.style)
    }
}

fn advance(input: &mut &[u8], len: usize) {
    *input = input.get(len..).unwrap_or_default();
}

/// Appends one reply with its data in parts.
fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[&[u8]]) {
    let len: usize = data.iter().map(|part| part.len()).sum();
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((len as u32).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

/// Name and information types of NBD_OPT_INFO and NBD_OPT_GO.
fn parse_info(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, rest) = parse_string(data)?;
    let count = usize::from(u16_at(rest, 0)?);
    let infos = rest.get(2..)?;
    (infos.len() == 2 * count).then_some((name, infos))
}

/// The name of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT, when the queries behind it are well-formed.
fn parse_queries(data: &[u8]) -> Option<&[u8]> {
    let (name, rest) = parse_string(data)?;
    let count = u32_at(rest, 0)?;
    let mut rest = rest.get(4..)?;
    for _ in 0..count {
        (_, rest) = parse_string(rest)?;
    }
    rest.is_empty().then_some(name)
}

/// A length of 32 bits, so many bytes, and what follows.
fn parse_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = u32_at(data, 0)? as usize;
    data.get(4..)?.split_at_checked(len)
}
