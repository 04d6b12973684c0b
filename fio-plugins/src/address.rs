//! From a job's options and a file name to the controller to connect to.

use std::collections::BTreeMap;

use flexblk_initiator::{ConnectOptions, Host, Nsid, TransportId, discover};

use crate::options::Options;

/// Words of an address that options may give.
const ADDRESS_WORDS: [&str; 9] = [
    "trtype",
    "adrfam",
    "traddr",
    "trsvcid",
    "subnqn",
    "nsid",
    "hostnqn",
    "hostid",
    "host_traddr",
];
/// Options that go to the initiator library as they are.
const CONNECT_WORDS: [&str; 12] = [
    "udp_port",
    "kato_ms",
    "io_timeout_ms",
    "connect_timeout_ms",
    "poll_budget_us",
    "tx",
    "rx",
    "digest",
    "hdr_digest",
    "data_digest",
    "fault",
    "capture",
];

/// One namespace of one subsystem, as a file of a job.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) connect: ConnectOptions,
    pub(crate) nsid: Nsid,
}

impl Address {
    /// Whether two files can share a connection.
    pub(crate) fn same_controller(&self, other: &Address) -> bool {
        format!("{:?}", self.connect) == format!("{:?}", other.connect)
    }
}

/// Whether a file name says where to connect. fio makes up names like `job1.0.0` when a job has none.
pub(crate) fn is_address(file_name: &str) -> bool {
    file_name.contains('=') || file_name.contains("://")
}

/// The address of a file: what its name says, over what the options say.
pub(crate) fn resolve(options: &Options, file_name: &str) -> Result<Address, String> {
    let host = Host::load().map_err(|e| e.to_string())?;
    let mut address = parse(options, file_name, host)?;
    if address.connect.target.subnqn.is_none() {
        only_subsystem(&mut address.connect)?;
    }
    Ok(address)
}

/// As [`resolve`], but for what only a target can tell.
fn parse(options: &Options, file_name: &str, host: Host) -> Result<Address, String> {
    let mut words = BTreeMap::from([("trtype".to_owned(), "flexins".to_owned())]);
    for key in ADDRESS_WORDS {
        if let Some(value) = options.word(key) {
            words.insert(key.to_owned(), value);
        }
    }
    let parsed = if file_name.contains("://") {
        let found = TransportId::parse_with_rest(file_name);
        let (id, rest) = found.map_err(|e| format!("filename={file_name}: {e}"))?;
        // Words that the URI leaves open come from the options.
        let from_options = join(words.into_iter().filter(|(key, _)| match key.as_str() {
            "nsid" => id.nsid.is_none(),
            "subnqn" => id.subnqn.is_none(),
            "hostnqn" => id.hostnqn.is_none(),
            "hostid" => id.hostid.is_none(),
            "host_traddr" => id.host_traddr.is_none(),
            _ => false,
        }));
        let text = format!("{} {from_options}", id.words());
        (
            TransportId::parse_with_rest(&text)
                .map_err(|e| format!("{text}: {e}"))?
                .0,
            rest,
        )
    } else {
        if is_address(file_name) {
            for word in file_name.split_whitespace() {
                let Some((key, value)) = word.split_once('=') else {
                    return Err(format!("filename={file_name}: {word:?} is not key=value"));
                };
                // SPDK's plugin says ns.
                let key = if key == "ns" { "nsid" } else { key };
                words.insert(key.to_owned(), value.to_owned());
            }
        }
        if !words.contains_key("traddr") {
            return Err("no target: set traddr=, or filename= to a transport id".to_owned());
        }
        let text = join(words);
        TransportId::parse_with_rest(&text).map_err(|e| format!("{text}: {e}"))?
    };
    let (mut id, rest) = parsed;
    let nsid = id.nsid.take().unwrap_or(Nsid::new(1));
    let mut connect = ConnectOptions::new(id, host);
    connect.nr_io_queues = 1;
    let set = |connect: &mut ConnectOptions, word: &str, value: &str| {
        connect.set(word, value).map_err(|e| e.to_string())
    };
    for word in CONNECT_WORDS {
        if let Some(value) = options.word(word) {
            set(&mut connect, word, &value)?;
        }
    }
    if options.number("mtu") != 0 {
        set(&mut connect, "mtu", &options.number("mtu").to_string())?;
    }
    if let Some(engine) = options.word("engine") {
        match options.text("engine_core") {
            Some(core) if engine == "thread" => {
                set(&mut connect, "engine", &format!("thread:{core}"))?
            }
            _ => set(&mut connect, "engine", &engine)?,
        }
    }
    for (word, value) in rest {
        set(&mut connect, &word, &value).map_err(|e| format!("filename={file_name}: {e}"))?;
    }
    Ok(Address { connect, nsid })
}

fn join(words: impl IntoIterator<Item = (String, String)>) -> String {
    let words: Vec<String> = words
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    words.join(" ")
}

/// Without a subsystem NQN: the only I/O subsystem that the target shows.
fn only_subsystem(connect: &mut ConnectOptions) -> Result<(), String> {
    let log = discover(connect).map_err(|e| e.to_string())?;
    let mut found: Vec<TransportId> = log
        .records
        .into_iter()
        .filter_map(|record| TransportId::from_record(&record))
        .filter(|target| !target.is_discovery())
        .collect();
    found.dedup_by(|a, b| a.subnqn == b.subnqn);
    match found.as_slice() {
        [only] => {
            connect.target.subnqn.clone_from(&only.subnqn);
            connect.target.trsvcid = only.trsvcid;
            Ok(())
        }
        [] => Err("the target shows no subsystem to this host: set subnqn=".to_owned()),
        several => {
            let names: Vec<&str> = several
                .iter()
                .filter_map(|id| Some(id.subnqn.as_ref()?.as_str()))
                .collect();
            Err(format!(
                "the target has several subsystems: set subnqn= to one of {}",
                names.join(", ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Kind, SPECS, Value};

    fn options(words: &[(&str, &str)]) -> Options {
        let values = SPECS.iter().map(|spec| {
            let given = words
                .iter()
                .find(|(name, _)| *name == spec.name)
                .map(|(_, value)| *value);
            match &spec.kind {
                Kind::Text => Value::Text(given.map(str::to_owned)),
                Kind::Number { default } => {
                    Value::Number(given.unwrap_or(default).parse().expect("a number"))
                }
                Kind::Choice { default, words } => {
                    let word = given.unwrap_or(default);
                    let index = words
                        .iter()
                        .position(|(known, _)| *known == word)
                        .expect("a word");
                    Value::Number(index as u32)
                }
                Kind::Flag => Value::Number(u32::from(given.is_some())),
            }
        });
        Options::new(values.collect())
    }

    fn parsed(words: &[(&str, &str)], file_name: &str) -> Result<Address, String> {
        let host = Host {
            hostnqn: "nqn.2026-11.org.example:host".parse().expect("an NQN"),
            hostid: "00000000-0000-4000-8000-000000000001"
                .parse()
                .expect("a UUID"),
        };
        parse(&options(words), file_name, host)
    }

    const NQN: &str = "nqn.2026-11.org.example:disk";

    #[test]
    fn options_alone_are_an_address() {
        let words = [
            ("traddr", "127.0.0.1"),
            ("subnqn", NQN),
            ("nsid", "3"),
            ("udp_port", "4799"),
            ("tx", "copy"),
        ];
        let address = parsed(&words, "job.0.0").expect("an address");
        assert_eq!(address.nsid, Nsid::new(3));
        assert_eq!(address.connect.udp_port, 4799);
        assert_eq!(address.connect.target.traddr, "127.0.0.1");
        assert_eq!(address.connect.target.nsid, None);
        assert_eq!(address.connect.tx, flexblk_initiator::TxMode::Copy);
    }

    #[test]
    fn words_in_the_file_name_win() {
        let words = [("traddr", "127.0.0.1"), ("subnqn", NQN)];
        let address =
            parsed(&words, "trtype=flexins traddr=::1 ns=2 udp_port=5000").expect("an address");
        assert_eq!(address.connect.target.traddr, "::1");
        assert_eq!(address.nsid, Nsid::new(2));
        assert_eq!(address.connect.udp_port, 5000);
        let other = parsed(&words, "nsid=7").expect("an address");
        assert_eq!(
            (other.nsid, other.connect.target.traddr.as_str()),
            (Nsid::new(7), "127.0.0.1")
        );
        assert!(!address.same_controller(&other));
        assert!(
            parsed(&words, "nsid=8")
                .expect("an address")
                .same_controller(&other)
        );
    }

    #[test]
    fn a_uri_is_an_address_and_the_options_fill_it_up() {
        let words = [
            ("traddr", "10.0.0.1"),
            ("nsid", "4"),
            ("hostnqn", "nqn.2026-11.org.example:me"),
        ];
        let address =
            parsed(&words, &format!("nvme+flexins://127.0.0.1:4420/{NQN}")).expect("an address");
        assert_eq!(address.connect.target.traddr, "127.0.0.1");
        assert_eq!(address.nsid, Nsid::new(4));
        assert_eq!(
            address
                .connect
                .target
                .hostnqn
                .expect("from options")
                .as_str(),
            "nqn.2026-11.org.example:me"
        );
        let address =
            parsed(&words, &format!("nvme+flexins://127.0.0.1/{NQN}?nsid=9")).expect("an address");
        assert_eq!(address.nsid, Nsid::new(9));
    }

    #[test]
    fn mistakes_are_named() {
        for (words, name, told) in [
            (vec![], "job.0.0", "traddr="),
            (vec![("traddr", "127.0.0.1")], "nsid=1 bogus", "bogus"),
            (vec![("traddr", "127.0.0.1")], "colour=red", "colour"),
            (
                vec![("traddr", "127.0.0.1"), ("fault", "loss=x")],
                "job.0.0",
                "fault",
            ),
            (vec![("traddr", "300.0.0.1")], "job.0.0", "300.0.0.1"),
        ] {
            let error = parsed(&words, name).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
    }
}
