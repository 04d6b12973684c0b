use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::ids::Cntlid;
use crate::log::discovery::{EntryFlags, SubsystemType, Treq};

const NQN: &str = "nqn.2016-06.io.spdk:cnode1";

fn parse(text: &str) -> TransportId {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn error(text: &str) -> String {
    text.parse::<TransportId>().expect_err(text).to_string()
}

#[test]
fn words_of_spdk_and_nvme_cli() {
    let spdk = parse(&format!(
        "trtype:TCP adrfam:IPv4 traddr:10.0.0.1 trsvcid:4421 subnqn:{NQN} ns:2"
    ));
    assert_eq!(spdk.trtype, TrType::Tcp);
    assert_eq!(spdk.adrfam, Some(AdrFam::Ipv4));
    assert_eq!(spdk.port(), 4421);
    assert_eq!(spdk.subnqn.as_ref().unwrap().as_str(), NQN);
    assert_eq!(spdk.nsid, Some(Nsid::new(2)));
    let cli = parse(&format!(
        "  transport=tcp traddr=10.0.0.1\ttrsvcid=4421 nqn={NQN} nsid=0x2\n"
    ));
    assert_eq!(cli, spdk);
    assert_eq!(
        spdk.words(),
        format!("trtype=tcp adrfam=ipv4 traddr=10.0.0.1 trsvcid=4421 subnqn={NQN} nsid=2")
    );
}

#[test]
fn uris() {
    let id = parse(&format!("nvme+flexins://[::1]:4420/{NQN}?nsid=1"));
    assert_eq!(
        (id.trtype, id.adrfam),
        (TrType::Flexins, Some(AdrFam::Ipv6))
    );
    assert_eq!(id.traddr, "::1");
    assert_eq!(id.authority(), "[::1]:4420");
    assert_eq!(
        id.to_string(),
        format!("nvme+flexins://[::1]:4420/{NQN}?nsid=1")
    );
    assert_eq!(
        parse("NVME+TCP://host.example/nqn%2Ea%3fb")
            .subnqn
            .unwrap()
            .as_str(),
        "nqn.a?b"
    );
    assert_eq!(parse("nvme+rdma://[fe80::1%25eth0]").traddr, "fe80::1%eth0");
    assert_eq!(parse("nvme+tcp://h:/").trsvcid, None);
}

#[test]
fn a_name_with_a_uri_in_it_stays_a_word() {
    let id = parse("trtype=tcp traddr=h subnqn=a://b");
    assert_eq!(id.subnqn.as_ref().unwrap().as_str(), "a://b");
    assert_eq!(id.words().parse(), Ok(id.clone()));
    assert_eq!(id.uri().parse(), Ok(id));
}

#[test]
fn default_ports() {
    assert_eq!(parse("trtype=flexins traddr=::1").port(), DISCOVERY_PORT);
    assert_eq!(parse("nvme+flexins://a").authority(), "a:8009");
    assert_eq!(
        parse(&format!("nvme+tcp://a/{}", crate::nqn::DISCOVERY)).port(),
        DISCOVERY_PORT
    );
    assert_eq!(parse(&format!("nvme+tcp://a/{NQN}")).port(), DEFAULT_PORT);
}

#[test]
fn other_keys_are_handed_back() {
    let (id, rest) =
        TransportId::parse_with_rest("trtype=flexins traddr=h tx=copy digest=crc32c").unwrap();
    assert_eq!(id.traddr, "h");
    assert_eq!(
        rest,
        [("tx", "copy"), ("digest", "crc32c")].map(|(k, v)| (k.into(), v.into()))
    );
    let (_, rest) = TransportId::parse_with_rest("nvme+flexins://h?tx=header%2donly").unwrap();
    assert_eq!(rest, [("tx".to_owned(), "header-only".to_owned())]);
}

#[test]
fn errors_name_key_and_value() {
    for (text, expected) in [
        ("", "`trtype` is missing"),
        ("trtype=tcp", "`traddr` is missing"),
        ("traddr=h", "`trtype` is missing"),
        (
            "trtype=pcie traddr=h",
            "trtype=pcie: not one of flexins, tcp, rdma",
        ),
        (
            "trtype=tcp traddr=h trsvcid=0",
            "trsvcid=0: not a port number (1 to 65535)",
        ),
        (
            "trtype=tcp traddr=h trsvcid=+1",
            "trsvcid=+1: not a port number (1 to 65535)",
        ),
        (
            "trtype=tcp traddr=h nsid=0",
            "nsid=0: not a namespace identifier (1 to 4294967294)",
        ),
        (
            "trtype=tcp traddr=1.2.3.400",
            "traddr=1.2.3.400: not an IPv4 address",
        ),
        (
            "trtype=tcp traddr=a/b",
            "traddr=a/b: not an IP address or a host name",
        ),
        (
            "trtype=tcp traddr=1::2::3",
            "traddr=1::2::3: not an IPv6 address",
        ),
        (
            "trtype=tcp traddr=::1 adrfam=ipv4",
            "adrfam=ipv4: but traddr=::1 is an ipv6 address",
        ),
        (
            "trtype=tcp traddr=h traddr=i",
            "`traddr` is given twice, the second time as `i`",
        ),
        ("trtype=tcp traddr=h hostid=5", "hostid=5: not a UUID"),
        ("trtype=tcp traddr=h subnqn=", "subnqn=: the name is empty"),
        (
            "nvme+udp://h",
            "scheme `nvme+udp` is not one of nvme+flexins, nvme+tcp, nvme+rdma",
        ),
        (
            "nvme+tcp://::1",
            "`::1`: an IPv6 address is written in brackets: [::1]",
        ),
        ("nvme+tcp://[::1", "`[::1`: `]` is missing"),
        (
            "nvme+tcp://[::1]4420",
            "`[::1]4420`: after `]` only :port may follow",
        ),
        (
            "nvme+tcp://u@h",
            "`u@h`: a user name (@) has no meaning here",
        ),
        (
            "nvme+tcp://h/a%2",
            "`a%2`: % is not followed by two hexadecimal digits",
        ),
        ("nvme+tcp://h/%ff", "`%ff`: not UTF-8 after decoding"),
        (
            "nvme+tcp://h?trsvcid=9999999",
            "trsvcid=9999999: not a port number (1 to 65535)",
        ),
        (
            "nvme+tcp://h:1?trsvcid=2",
            "`trsvcid` is given twice, the second time as `2`",
        ),
    ] {
        assert_eq!(error(text), expected, "{text}");
    }
    assert!(error("10.0.0.1").starts_with("`10.0.0.1` is not of the form key=value"));
    assert!(error("trtype=tcp traddr=h tarddr=i").starts_with("unknown key `tarddr` (value `i`)"));
}

#[test]
fn discovery_records_lead_to_addresses() {
    let mut record = Record {
        trtype: TransportType::Flexins,
        adrfam: AddressFamily::Ipv6,
        subtype: SubsystemType::Nvm,
        treq: Treq::new(),
        portid: 0,
        cntlid: Cntlid::DYNAMIC,
        asqsz: 32,
        eflags: EntryFlags::empty(),
        trsvcid: "4420".into(),
        subnqn: NQN.parse().unwrap(),
        traddr: "2001:db8::1".into(),
        tsas: [0; 256],
    };
    let id = TransportId::from_record(&record).unwrap();
    assert_eq!(
        id,
        parse(&format!("nvme+flexins://[2001:db8::1]:4420/{NQN}"))
    );
    record.traddr = "10.0.0.1".into();
    assert_eq!(TransportId::from_record(&record), None);
    record.trtype = TransportType::FibreChannel;
    assert_eq!(TransportId::from_record(&record), None);
}

fn ids() -> impl Strategy<Value = TransportId> {
    let host = prop_oneof![
        any::<std::net::Ipv4Addr>().prop_map(|ip| (ip.to_string(), Some(AdrFam::Ipv4))),
        any::<std::net::Ipv6Addr>().prop_map(|ip| (ip.to_string(), Some(AdrFam::Ipv6))),
        Just(("fe80::1%eth0.5".to_owned(), Some(AdrFam::Ipv6))),
        (
            "[a-z]([a-z0-9-]{0,8}[a-z0-9])?(\\.[a-z]{1,5}){0,3}",
            prop_oneof![
                Just(None),
                Just(Some(AdrFam::Ipv4)),
                Just(Some(AdrFam::Ipv6))
            ]
        ),
    ];
    let trtype = prop_oneof![Just(TrType::Flexins), Just(TrType::Tcp), Just(TrType::Rdma)];
    let nqn =
        || proptest::option::of("[!-~\u{e9}\u{4e16}]{1,70}".prop_map(|nqn| nqn.parse().unwrap()));
    let options = (
        proptest::option::of(1u16..),
        nqn(),
        proptest::option::of(1u32..u32::MAX),
        nqn(),
        proptest::option::of(any::<u128>()),
        proptest::option::of(any::<IpAddr>()),
    );
    (trtype, host, options).prop_map(|(trtype, (traddr, adrfam), options)| TransportId {
        trtype,
        adrfam,
        traddr,
        trsvcid: options.0,
        subnqn: options.1,
        nsid: options.2.map(Nsid::new),
        hostnqn: options.3,
        hostid: options.4.map(|id| HostId(Uuid::from_u128(id))),
        host_traddr: options.5,
    })
}

proptest! {
    #[test]
    fn both_forms_round_trip(id in ids()) {
        prop_assert_eq!(id.uri().parse(), Ok(id.clone()), "{}", id.uri());
        prop_assert_eq!(id.words().parse(), Ok(id.clone()), "{}", id.words());
    }

    #[test]
    fn random_text_is_judged(text in prop_oneof![
        "\\PC{0,80}",
        "(nvme\\+(tcp|flexins)://)?[\\[\\]a-z0-9:./?&%=@ -]{0,60}",
        "(trtype=tcp )?(traddr|subnqn|nsid|ns)[=:]\\PC{0,30}",
    ]) {
        if let Ok(id) = text.parse::<TransportId>() {
            prop_assert_eq!(id.uri().parse(), Ok(id.clone()));
            prop_assert_eq!(id.words().parse(), Ok(id));
        }
    }
}
