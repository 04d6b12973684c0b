//! `nvme+flexins://host:port/subnqn?key=value&...` (RFC 3986), IPv6 in brackets.

use super::words::Builder;
use super::{TransportId, TransportIdError};

const SCHEME_PREFIX: &str = "nvme+";

/// Does the text begin as a URI does (RFC 3986, 3.1), rather than being words with `://` in a value?
pub(super) fn has_scheme(text: &str) -> bool {
    let in_scheme = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    text.split_once("://")
        .is_some_and(|(scheme, _)| scheme.bytes().all(in_scheme))
}

/// Reads a URI into the builder, query keys it does not know into `rest`.
pub(super) fn parse(
    text: &str,
    builder: &mut Builder,
    rest: &mut Vec<(String, String)>,
) -> Result<(), TransportIdError> {
    let bad = |part: &str, reason| TransportIdError::Uri {
        part: part.to_owned(),
        reason,
    };
    let (scheme, text) = text
        .split_once("://")
        .ok_or_else(|| bad(text, "not a URI"))?;
    let lower = scheme.to_ascii_lowercase();
    let trtype = lower
        .strip_prefix(SCHEME_PREFIX)
        .filter(|trtype| matches!(*trtype, "flexins" | "tcp" | "rdma"))
        .ok_or_else(|| TransportIdError::Scheme(scheme.to_owned()))?;
    builder.set("trtype", trtype)?;

    if text.contains('#') {
        return Err(bad(text, "a fragment (#) has no meaning here"));
    }
    let (text, query) = match text.split_once('?') {
        Some((text, query)) => (text, Some(query)),
        None => (text, None),
    };
    let (authority, path) = match text.split_once('/') {
        Some((authority, path)) => (authority, path),
        None => (text, ""),
    };
    let (host, port) = split_authority(authority)?;
    builder.set("traddr", &decode(host)?)?;
    if let Some(port) = port {
        builder.set("trsvcid", port)?;
    }
    if !path.is_empty() {
        builder.set("subnqn", &decode(path)?)?;
    }
    for pair in query
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| TransportIdError::Word(pair.to_owned()))?;
        let (key, value) = (decode(key)?, decode(value)?);
        if !builder.set(&key, &value)? {
            rest.push((key, value));
        }
    }
    Ok(())
}

/// Host without brackets, and port.
fn split_authority(authority: &str) -> Result<(&str, Option<&str>), TransportIdError> {
    let bad = |reason| TransportIdError::Uri {
        part: authority.to_owned(),
        reason,
    };
    if authority.contains('@') {
        return Err(bad("a user name (@) has no meaning here"));
    }
    let (host, port) = if let Some(inner) = authority.strip_prefix('[') {
        let (host, behind) = inner.split_once(']').ok_or(bad("`]` is missing"))?;
        if !host.contains(':') {
            return Err(bad("only an IPv6 address is written in brackets"));
        }
        match behind.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if behind.is_empty() => (host, None),
            None => return Err(bad("after `]` only :port may follow")),
        }
    } else {
        match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err(bad("an IPv6 address is written in brackets: [::1]"));
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    Ok((host, port.filter(|port| !port.is_empty())))
}

fn decode(text: &str) -> Result<String, TransportIdError> {
    let bad = |reason| TransportIdError::Uri {
        part: text.to_owned(),
        reason,
    };
    let digit = |byte: Option<u8>| {
        let digit = byte.and_then(|byte| char::from(byte).to_digit(16));
        digit.ok_or(bad("% is not followed by two hexadecimal digits"))
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push((high << 4 | low) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad("not UTF-8 after decoding"))
}

/// Appends `text`, percent-encoding what is neither unreserved nor a colon.
fn encode(to: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':') {
            to.push(char::from(byte));
        } else {
            to.push_str(&format!("%{byte:02X}"));
        }
    }
}

/// The URI of everything that is set.
pub(super) fn emit(id: &TransportId) -> String {
    let mut text = format!("{SCHEME_PREFIX}{}://", id.trtype);
    if id.traddr.contains(':') {
        text.push('[');
        encode(&mut text, &id.traddr);
        text.push(']');
    } else {
        encode(&mut text, &id.traddr);
    }
    if let Some(port) = id.trsvcid {
        text.push_str(&format!(":{port}"));
    }
    if let Some(subnqn) = &id.subnqn {
        text.push('/');
        encode(&mut text, subnqn.as_str());
    }
    let mut separator = '?';
    let mut query = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push(separator);
            text.push_str(key);
            text.push('=');
            encode(&mut text, &value);
            separator = '&';
        }
    };
    // The family of an address is plain to see; that of a host name is not.
    query(
        "adrfam",
        id.adrfam
            .filter(|_| is_name(id))
            .map(|adrfam| adrfam.to_string()),
    );
    query("nsid", id.nsid.map(|nsid| nsid.to_string()));
    query("hostnqn", id.hostnqn.as_ref().map(ToString::to_string));
    query("hostid", id.hostid.map(|hostid| hostid.to_string()));
    query("host_traddr", id.host_traddr.map(|ip| ip.to_string()));
    text
}

fn is_name(id: &TransportId) -> bool {
    matches!(super::check_host(&id.traddr), Ok(None))
}
