use flexblk_nvme::Nsid;

use super::super::AllowedHosts;
use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::from_toml(text, Path::new("t.toml"))
}

fn refused(text: &str) -> String {
    let message = parse(text).unwrap_err().to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

#[test]
fn the_example_is_a_configuration() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/target.toml");
    let config = Config::from_file(&path).unwrap();
    assert_eq!(config.subsystems.len(), 2);
    assert_eq!(config.bdevs.len(), 2);
    assert_eq!(config.subsystems[0].namespaces[0].nsid, Some(Nsid::new(1)));
    assert!(matches!(&config.subsystems[1].hosts, AllowedHosts::Only(hosts) if hosts.len() == 1));
    assert_eq!(config.memory_budget_bytes, 256 << 20);
    assert_eq!(config.cores, [0]);
}

#[test]
fn nothing_is_a_configuration_with_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.listener.address, super::super::DEFAULT_LISTEN);
    assert!(config.subsystems.is_empty());
}

#[test]
fn file_line_and_key_are_named() {
    let unknown = refused("[target]\n\ncorse = \"0\"\n");
    assert!(
        unknown.starts_with("t.toml:3: key `corse`: unknown field"),
        "{unknown}"
    );
    let kind = refused("[listener]\nudp_port = \"x\"\n");
    assert!(
        kind.starts_with("t.toml:2: key `udp_port`: invalid type"),
        "{kind}"
    );
    let range = refused("[listener]\nudp_port = 70000\n");
    assert_eq!(
        range,
        "t.toml:2: key `udp_port`: 70000 is out of range, give 1 to 65535"
    );
    let device = refused("[[bdev]]\ntype = \"ram\"\nname = \"a\"\nsizee = \"1G\"\n");
    assert!(
        device.starts_with("t.toml:4: key `sizee`: unknown field"),
        "{device}"
    );
    let neither = refused("[target]\nmemory_budget = true\n");
    assert!(
        neither.starts_with("t.toml:2: key `memory_budget`: a size is"),
        "{neither}"
    );
    let syntax = refused("[listener]\naddress = 127.0.0.1\n");
    assert!(syntax.starts_with("t.toml:2: key `address`:"), "{syntax}");
    let missing = refused("[[subsystem]]\nserial = \"1\"\n");
    assert!(
        missing.starts_with("t.toml:1:") && missing.contains("`nqn`"),
        "{missing}"
    );
}

#[test]
fn values_are_judged() {
    let subsystem = "[[subsystem]]\nnqn = \"nqn.2026-11.test:a\"\n";
    for (text, wanted) in [
        (
            "[[subsystem]]\nnqn = \"a b\"\n".to_owned(),
            "t.toml:2: key `nqn`: the name",
        ),
        (
            format!(
                "[[subsystem]]\nnqn = \"{}\"\n",
                flexblk_nvme::nqn::DISCOVERY
            ),
            "discovery service",
        ),
        (
            format!("{subsystem}{subsystem}"),
            "t.toml:4: key `nqn`: another subsystem",
        ),
        (
            format!("{subsystem}serial = \"{}\"\n", "x".repeat(21)),
            "t.toml:3: key `serial`: must be 1 to 20",
        ),
        (
            format!("{subsystem}allow_hosts = [\"\"]\n"),
            "t.toml:3: key `allow_hosts`: the name is empty",
        ),
        (
            format!("{subsystem}[[subsystem.namespace]]\nnsid = 0\nbdev = \"ram:1M\"\n"),
            "t.toml:4: key `nsid`: 0 is out of range",
        ),
        (
            format!("{subsystem}[[subsystem.namespace]]\nbdev = \"rom:1M\"\n"),
            "t.toml:4: key `bdev`:",
        ),
        (
            "[target]\nmemory_budget = \"lots\"\n".to_owned(),
            "t.toml:2: key `memory_budget`: `lots` is no size",
        ),
        (
            "[target]\ncores = \"x\"\n".to_owned(),
            "t.toml:2: key `cores`:",
        ),
        (
            "[listener]\naddress = \"somewhere\"\n".to_owned(),
            "t.toml:2: key `address`: `somewhere` is no address",
        ),
        (
            "[listener]\nfault = \"rain=1\"\n".to_owned(),
            "t.toml:2: key `fault`: fault \"rain\"",
        ),
    ] {
        let message = refused(&text);
        assert!(
            message.contains(wanted),
            "{message}\n  should have: {wanted}"
        );
    }
}

#[test]
fn tcp_is_listened_on_when_there_is_a_table() {
    assert_eq!(parse("").unwrap().tcp, None);
    assert_eq!(parse("[tcp]\n").unwrap().tcp, Some(TcpListener::default()));
    let text =
        "[tcp]\naddress = \"[::1]:4421\"\ndata_digest = \"require\"\nheader_digest = \"off\"\n";
    let tcp = parse(text).unwrap().tcp.unwrap();
    assert_eq!(tcp.address, "[::1]:4421".parse().unwrap());
    assert_eq!(
        (tcp.header_digest, tcp.data_digest),
        (TcpDigest::Off, TcpDigest::Require)
    );
    assert_eq!(tcp.zerocopy_threshold, None);
    let tcp = parse("[tcp]\nzerocopy_threshold = 32768\n").unwrap().tcp;
    assert_eq!(tcp.unwrap().zerocopy_threshold, Some(32768));
    let message = refused("[tcp]\nzerocopy_threshold = 100\n");
    assert!(
        message.starts_with("t.toml:2: key `zerocopy_threshold`"),
        "{message}"
    );
    let message = refused("[tcp]\nheader_digest = \"maybe\"\n");
    assert!(
        message.starts_with("t.toml:2: key `header_digest`: unknown variant"),
        "{message}"
    );
}

#[test]
fn addresses() {
    assert_eq!(parse_listen("::1"), Ok("[::1]:4420".parse().unwrap()));
    assert_eq!(
        parse_listen("[::1]:5000"),
        Ok("[::1]:5000".parse().unwrap())
    );
    assert_eq!(
        parse_listen("10.0.0.1"),
        Ok("10.0.0.1:4420".parse().unwrap())
    );
    assert!(parse_listen("10.0.0.1:0").is_err());
}

#[test]
fn a_file_that_is_not_there() {
    let error = Config::from_file(Path::new("/nonexistent/t.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("/nonexistent/t.toml: cannot read"),
        "{error}"
    );
}

#[test]
fn what_is_kept_is_where_a_service_has_its_state() {
    let config = Path::new("/etc/flexblk/target.toml");
    for (directories, expected) in [
        (None, "/etc/flexblk/target.ptpl.json"),
        (Some(""), "/etc/flexblk/target.ptpl.json"),
        (
            Some("/var/lib/flexblk"),
            "/var/lib/flexblk/target.ptpl.json",
        ),
        (Some("/var/lib/a:/var/lib/b"), "/var/lib/a/target.ptpl.json"),
    ] {
        let found = default_ptpl_file(config, directories.map(OsStr::new));
        assert_eq!(found, Path::new(expected), "{directories:?}");
    }
}
