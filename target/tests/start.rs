//! What keeps a target from starting is said in one line, with a number for scripts; and what a
//! running one exports can be changed.

use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use flexblk_nvme::{Nqn, Nsid};
use flexblk_target::config::{AllowedHosts, Config, Namespace, Subsystem};
use flexblk_target::{StartError, Target};
use flexblk_tests::ports::free_udp_port;

fn daemon(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexblk-target"));
    command
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the daemon runs")
}

/// The daemon does not start: exit code and one line that has `wanted` in it.
fn refused(args: &[&str], code: i32, wanted: &str) {
    let output = daemon(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("flexblk-target:"))
        .collect();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert_eq!(lines.len(), 1, "{args:?}: {text}");
    assert!(lines[0].contains(wanted), "{args:?}: {text}");
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn free_port() -> u16 {
    free_udp_port().expect("a free port")
}

fn config(port: u16, bdev: &str) -> Config {
    let mut subsystem = Subsystem::new(Nqn::new("nqn.2026-11.test:a").unwrap());
    subsystem.namespaces.push(Namespace::new(bdev));
    let mut config = Config {
        subsystems: vec![subsystem],
        ..Config::default()
    };
    config.listener.udp_port = port;
    config
}

#[test]
fn nothing_to_export() {
    refused(&[], 2, "--ram 1G");
}

#[test]
fn images_that_cannot_be_served() {
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join("odd.img");
    std::fs::write(&odd, [0; 1000]).unwrap();
    let missing = directory.path().join("missing.img");
    refused(&["--file", path(&missing)], 3, "no such file");
    refused(
        &["--file", path(&odd)],
        3,
        "not a multiple of the block size 512",
    );
    refused(
        &["--file", path(directory.path())],
        3,
        "neither a regular file nor a block device",
    );
    refused(
        &["--file", &format!("{},block_size=999", path(&odd))],
        3,
        "block size 999 is not supported",
    );
}

#[test]
fn no_permission() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("secret.img");
    std::fs::write(&image, [0; 4096]).unwrap();
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o000)).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexblk-target"));
    command.args(["--file", path(&image)]);
    // Root reads everything: be somebody else.
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|meta| {
        use std::os::unix::fs::MetadataExt;
        meta.uid() == 0
    });
    if is_root {
        command.uid(65534).gid(65534);
    }
    let Ok(output) = command.output() else {
        // The build folder may be closed to others: then there is nothing to run as them.
        println!("SKIPPED: the daemon cannot be run as another user here");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("permission denied"), "{text}");
}

#[test]
fn too_little_memory() {
    refused(
        &["--ram", "1M", "--memory-budget", "1M"],
        3,
        "--memory-budget",
    );
    // Flags are clap's to refuse, in its own words, with the same number.
    let output = daemon(&["--ram", "1M", "--memory-budget", "much"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`much` is no size"));
}

#[test]
fn addresses_that_are_not_ours() {
    refused(
        &["--ram", "1M", "--listen", "192.0.2.1:4420"],
        3,
        "no address of this machine",
    );
}

#[test]
fn configuration_files() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.toml");
    refused(&["-c", path(&file)], 2, "cannot read");
    std::fs::write(&file, "[listener]\nudp_prot = 1\n").unwrap();
    refused(&["-c", path(&file)], 2, "bad.toml:2: key `udp_prot`");
    std::fs::write(&file, "[[subsystem]]\nnqn = \"nqn.2026-11.test:a\"\n[[subsystem.namespace]]\nnsid = 7\nbdev = \"ram:1M\"\n[[subsystem.namespace]]\nnsid = 7\nbdev = \"ram:1M\"\n").unwrap();
    refused(&["-c", path(&file)], 2, "bad.toml:7: key `nsid`");
}

#[test]
fn a_port_in_use_is_named_with_one_thread_and_with_several() {
    for cores in [vec![], vec![0, 0]] {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut config = config(port, "ram:1M");
        config.cores = cores;
        let error = Target::start(config).unwrap_err();
        assert!(
            matches!(error, StartError::PortInUse(address) if address.port() == port),
            "{error}"
        );
        assert!(error.to_string().contains("--udp-port"));
    }
}

/// Two targets do not share a port, and a stopped one leaves it free.
#[test]
fn the_port_is_free_again_after_a_stop() {
    let port = free_port();
    let first = Target::start(config(port, "ram:1M")).unwrap();
    assert!(matches!(
        Target::start(config(port, "ram:1M")),
        Err(StartError::PortInUse(_))
    ));
    assert!(first.shutdown());
    assert!(Target::start(config(port, "ram:1M")).unwrap().shutdown());
}

#[test]
fn namespaces_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut config = config(free_port(), "ram:1M");
    config.cores = vec![0, 0];
    let target = Target::start(config).unwrap();
    let nqn = Nqn::new("nqn.2026-11.test:a").unwrap();
    let file = format!("file:{}", path(&image));
    let nsid = target
        .add_namespace(&nqn, &Namespace::new(file.clone()))
        .unwrap();
    assert_eq!(nsid, Nsid::new(2));
    let taken = Namespace {
        nsid: Some(Nsid::new(1)),
        ..Namespace::new("ram:1M")
    };
    assert!(target.add_namespace(&nqn, &taken).is_err());
    target.resize_namespace(&nqn, nsid, 2 << 20).unwrap();
    let snapshot = target.snapshot();
    let namespace = snapshot.find(&nqn).unwrap().namespace(nsid).unwrap();
    assert_eq!(namespace.info.size_bytes(), 2 << 20);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 2 << 20);
    let devices = |target: &Target| -> Vec<usize> {
        target
            .stats()
            .threads
            .iter()
            .map(|thread| thread.devices)
            .collect()
    };
    assert_eq!(devices(&target), [2, 2]);
    drop(snapshot);
    target.remove_namespace(&nqn, nsid).unwrap();
    assert!(target.remove_namespace(&nqn, nsid).is_err());
    assert_eq!(devices(&target), [1, 1]);
    // The image is let go: it can be opened for another namespace.
    assert!(target.add_namespace(&nqn, &Namespace::new(file)).is_ok());

    let other = Nqn::new("nqn.2026-11.test:b").unwrap();
    assert!(
        target
            .add_namespace(&other, &Namespace::new("ram:1M"))
            .is_err()
    );
    target
        .add_subsystem(&Subsystem::new(other.clone()))
        .unwrap();
    assert!(
        target
            .add_subsystem(&Subsystem::new(other.clone()))
            .is_err()
    );
    target
        .set_allowed_hosts(&other, AllowedHosts::Only(Vec::new()))
        .unwrap();
    target.remove_subsystem(&other).unwrap();
    assert!(target.shutdown());
}

/// Devices are opened once and named; namespaces on one that is deleted go with it, and a change that
/// fails leaves nothing behind.
#[test]
fn block_devices_come_and_go() {
    let config = config(free_port(), "ram:1M");
    let target = Target::start(config).unwrap();
    let nqn = Nqn::new("nqn.2026-11.test:a").unwrap();
    let names = || -> Vec<String> {
        let bdevs = target.bdevs();
        bdevs.iter().map(|bdev| bdev.name().to_owned()).collect()
    };
    assert_eq!(names(), ["ram"]);
    // The same short form again is a device of its own.
    let second = target
        .add_namespace(&nqn, &Namespace::new("ram:2M"))
        .unwrap();
    assert_eq!(names(), ["ram", "ram-2"]);
    target
        .create_bdev("null:1G,name=n".parse().unwrap())
        .unwrap();
    let again = target.create_bdev("ram:1M,name=n".parse().unwrap());
    assert!(again.unwrap_err().to_string().contains("exists already"));
    let on_null = target.add_namespace(&nqn, &Namespace::new("n")).unwrap();
    let twice = target.add_namespace(&nqn, &Namespace::new("n")).unwrap();
    assert_ne!(on_null, twice);
    assert!(target.add_namespace(&nqn, &Namespace::new("m")).is_err());

    target.resize_bdev("n", 2 << 30).unwrap();
    let namespace = |nsid| {
        target
            .snapshot()
            .find(&nqn)
            .unwrap()
            .namespace(nsid)
            .cloned()
    };
    assert_eq!(namespace(twice).unwrap().info.size_bytes(), 2 << 30);
    target.delete_bdev("n").unwrap();
    assert!(namespace(on_null).is_none() && namespace(twice).is_none());
    assert!(target.delete_bdev("n").is_err());
    // A device that came with its namespace goes with it.
    target.remove_namespace(&nqn, second).unwrap();
    assert_eq!(names(), ["ram"]);
    target.remove_subsystem(&nqn).unwrap();
    assert!(names().is_empty());
}

#[test]
fn ports_that_a_predecessor_gives_up_soon_are_waited_for() {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut config = config(free_port(), "ram:1M");
    config.tcp = Some(flexblk_target::config::TcpListener {
        address,
        ..flexblk_target::config::TcpListener::default()
    });
    let udp = (std::net::Ipv4Addr::LOCALHOST, config.listener.udp_port);
    let held = (
        std::net::TcpListener::bind(address).unwrap(),
        UdpSocket::bind(udp).unwrap(),
    );
    let holder = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(held);
    });
    Target::start(config).unwrap();
    holder.join().unwrap();
}
