//! The engine's options: what fio is told about them, and what a job made of them.

/// One option as fio's parser and `--enghelp` know it.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) kind: Kind,
}

/// What an option takes.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Any text.
    Text,
    /// A non-negative number, fio's suffixes included.
    Number { default: &'static str },
    /// One of a few words; stored as its index.
    Choice {
        default: &'static str,
        words: &'static [(&'static str, &'static str)],
    },
    /// On when it is mentioned.
    Flag,
}

/// A value as fio stored it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Text(Option<String>),
    Number(u32),
}

const fn text(name: &'static str, help: &'static str) -> Spec {
    Spec {
        name,
        help,
        kind: Kind::Text,
    }
}

const fn number(name: &'static str, default: &'static str, help: &'static str) -> Spec {
    Spec {
        name,
        help,
        kind: Kind::Number { default },
    }
}

/// Every option. None of the names is one of fio's own.
#[rustfmt::skip]
pub(crate) static SPECS: &[Spec] = &[
    text("trtype", "Transport type: flexins or tcp (default flexins)"),
    text("adrfam", "Address family, ipv4 or ipv6 (default: as traddr)"),
    text("traddr", "Address or name of the target"),
    text("trsvcid", "Service id of the target, with tcp its port (default 4420)"),
    text("subnqn", "NQN of the subsystem (default: the only one that discovery at traddr shows)"),
    number("nsid", "1", "Namespace id"),
    text("hostnqn", "Host NQN (default: /etc/nvme/hostnqn, else derived from the machine id)"),
    text("hostid", "Host identifier, a UUID (default: /etc/nvme/hostid, else derived)"),
    text("host_traddr", "Local address to connect from"),
    number("udp_port", "4791", "UDP port of the target"),
    Spec {
        name: "digest",
        help: "Checksum of every packet",
        kind: Kind::Choice { default: "crc32c", words: &[("none", "no checksum"), ("crc32c", "CRC32C")] },
    },
    Spec { name: "hdr_digest", help: "With trtype=tcp: a digest over the header of every PDU", kind: Kind::Flag },
    Spec { name: "data_digest", help: "With trtype=tcp: a digest over the data of every PDU", kind: Kind::Flag },
    Spec {
        name: "tx",
        help: "How packets are built",
        kind: Kind::Choice {
            default: "header-only",
            words: &[("header-only", "payload gathered where it lies"), ("copy", "payload copied behind its header")],
        },
    },
    Spec {
        name: "rx",
        help: "Where packets are received",
        kind: Kind::Choice {
            default: "in-cache",
            words: &[("in-cache", "a few buffers, last used first"), ("ring", "a large ring in order")],
        },
    },
    number("mtu", "0", "Largest payload of a packet in bytes (0: what the path allows)"),
    Spec {
        name: "engine",
        help: "Where the transport engine runs",
        kind: Kind::Choice {
            default: "inline",
            words: &[("inline", "in the job's own thread"), ("thread", "in a thread of its own")],
        },
    },
    text("engine_core", "CPU core for the thread of engine=thread (default: not pinned)"),
    number("queue_size", "0", "Commands in flight per queue pair (0: iodepth)"),
    number("kato_ms", "5000", "Keep-alive time-out in milliseconds (0: off)"),
    number("io_timeout_ms", "30000", "Limit for one I/O in milliseconds"),
    number("connect_timeout_ms", "5000", "Limit for each step of connecting in milliseconds"),
    Spec { name: "hipri", help: "Poll for completions, never sleep", kind: Kind::Flag },
    number("poll_budget_us", "100", "Without hipri: spin this long after the last activity, then sleep"),
    number("submit_batch", "16", "Send as soon as this many commands wait (they never wait longer than fio computes)"),
    Spec {
        name: "write_mode",
        help: "What fio's writes are",
        kind: Kind::Choice {
            default: "write",
            words: &[("write", "Write"), ("zeroes", "Write Zeroes"), ("verify", "Verify")],
        },
    },
    Spec { name: "writefua", help: "Force unit access: writes complete when they are durable", kind: Kind::Flag },
    text("fault", "Deliberate faults on sent packets, for tests: loss=1%,reorder=1%,corrupt=0.1%,duplicate=0%,seed=1"),
    text("capture", "Write every packet to this pcapng file"),
    text("counters_file", "Append one line of JSON with the transport's counters when a job ends"),
];

/// How the writes of a job are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteMode {
    Write,
    Zeroes,
    Verify,
}

/// The options of one job.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    values: Vec<Value>,
}

impl Options {
    /// `values` in the order of [`SPECS`].
    pub(crate) fn new(values: Vec<Value>) -> Options {
        Options { values }
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let index = SPECS.iter().position(|spec| spec.name == name)?;
        self.values.get(index)
    }

    /// A text option; `None` when absent or empty.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match self.value(name)? {
            Value::Text(Some(text)) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// A number, a choice's index, or a flag as 0 or 1.
    pub(crate) fn number(&self, name: &str) -> u32 {
        match self.value(name) {
            Some(Value::Number(number)) => *number,
            _ => 0,
        }
    }

    /// Any option as its user would write it; `None` for text that is absent or empty.
    pub(crate) fn word(&self, name: &str) -> Option<String> {
        let index = SPECS.iter().position(|spec| spec.name == name)?;
        let number = || self.number(name);
        match &SPECS.get(index)?.kind {
            Kind::Text => self.text(name).map(str::to_owned),
            Kind::Number { .. } | Kind::Flag => Some(number().to_string()),
            Kind::Choice { words, .. } => words
                .get(number() as usize)
                .map(|(word, _)| (*word).to_owned()),
        }
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        self.number(name) != 0
    }

    pub(crate) fn write_mode(&self) -> WriteMode {
        match self.number("write_mode") {
            1 => WriteMode::Zeroes,
            2 => WriteMode::Verify,
            _ => WriteMode::Write,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_defaults_are_words() {
        let mut seen = HashSet::new();
        for spec in SPECS {
            assert!(seen.insert(spec.name), "{} twice", spec.name);
            assert!(!spec.help.is_empty());
            if let Kind::Choice { default, words } = &spec.kind {
                assert!(
                    words.iter().any(|(word, _)| word == default),
                    "{}",
                    spec.name
                );
                assert!(words.len() < 32, "fio has room for 32");
            }
        }
    }

    #[test]
    fn values_are_found_by_name() {
        let mut values: Vec<Value> = SPECS
            .iter()
            .map(|spec| match spec.kind {
                Kind::Text => Value::Text(None),
                _ => Value::Number(0),
            })
            .collect();
        let at = |name| SPECS.iter().position(|s| s.name == name).expect("known");
        values[at("traddr")] = Value::Text(Some("127.0.0.1".into()));
        values[at("subnqn")] = Value::Text(Some(String::new()));
        values[at("nsid")] = Value::Number(7);
        values[at("write_mode")] = Value::Number(1);
        values[at("hipri")] = Value::Number(1);
        let options = Options::new(values);
        assert_eq!(options.text("traddr"), Some("127.0.0.1"));
        assert_eq!(options.text("subnqn"), None);
        assert_eq!(options.text("trsvcid"), None);
        assert_eq!(options.number("nsid"), 7);
        assert!(options.flag("hipri"));
        assert_eq!(options.write_mode(), WriteMode::Zeroes);
    }
}
