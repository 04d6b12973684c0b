//! `cargo xtask test`: everything that has to be right before a change goes in.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use flexblk_tests::binaries::{self, Binaries};
use flexblk_tests::process::find_program;
use flexblk_tests::vm::{DIRECTORY_VARIABLE, NO_IMAGE, PACKAGES_VARIABLE};
use serde_json::Value;

use crate::apt;
use crate::cargo::cargo;
use crate::deb;
use crate::vm;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Only the tests, not format, lints, documentation and features.
    #[arg(long)]
    quick: bool,
    /// Linux as a peer instead: the tests that run in a virtual machine with Debian's kernel (needs root).
    #[arg(long)]
    vm: bool,
    /// The usual ones, then those in a virtual machine: what CI runs.
    #[arg(long, conflicts_with_all = ["vm", "quick"])]
    all: bool,
    /// With --vm, only the tests whose names contain this.
    #[arg(long, requires = "vm")]
    only: Option<String>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// One check that either passed or failed.
    fn check(&mut self, name: &str, passed: bool, started: Instant) {
        println!(
            "== {name}: {} ({:.0} s)",
            if passed { "ok" } else { "FAILED" },
            started.elapsed().as_secs_f64()
        );
        if passed {
            self.passed += 1
        } else {
            self.failed += 1
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let mut counts = Counts::default();
    if arguments.vm {
        virtual_machines(&mut counts, arguments)?;
        return Ok(summary(counts));
    }
    let mut needs = vec![apt::FIO, apt::MKE2FS, apt::TASKSET];
    needs.extend(apt::OF_EXPORTS);
    if let Err(error) = apt::ensure(&needs, arguments.yes) {
        // The tests that need them say so themselves and are counted as skipped.
        println!("going on without: {error:#}");
    }
    if !arguments.quick {
        lints(&mut counts)?;
    }
    tests(&mut counts, arguments.all)?;
    if arguments.all {
        virtual_machines(&mut counts, arguments)?;
    }
    Ok(summary(counts))
}

fn summary(counts: Counts) -> bool {
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed, counts.failed, counts.skipped
    );
    counts.failed == 0
}

/// The tests of `tests/tests/vm.rs`, one guest at a time.
fn virtual_machines(counts: &mut Counts, arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let image = vm::prepare(arguments.yes);
    match &image {
        Ok(_) => println!(
            "== virtual machine: image ready ({:.0} s)",
            started.elapsed().as_secs_f64()
        ),
        // The tests say so themselves and are counted as skipped.
        Err(error) => println!("going on without virtual machines: {error:#}"),
    }
    let Some(programs) = programs(counts) else {
        return Ok(());
    };
    let skip_file = programs.skip_file();
    let mut test = cargo(&["test", "-p", "flexblk-tests", "--test", "vm", "--"]);
    test.args(["--test-threads=1", "--nocapture"]);
    test.args(&arguments.only);
    programs.prepare(&mut test);
    if let Ok(directory) = image {
        test.env(DIRECTORY_VARIABLE, directory);
        let (_, packages) =
            deb::unpacked(&programs.binaries(), &programs.directory.join("deb-vm"))?;
        test.env(PACKAGES_VARIABLE, packages);
    }
    counts.add(counted("virtual machines", &mut test, libtest_summary)?);
    note_skips(counts, &skip_file, |_| false)
}

/// The programs under test, and where tests note that they were skipped.
struct Programs {
    directory: PathBuf,
}

impl Programs {
    fn skip_file(&self) -> PathBuf {
        self.directory.join("skipped-tests.txt")
    }

    fn binaries(&self) -> Binaries {
        Binaries::in_directory(&self.directory.join("debug"))
    }

    /// Tells a test runner of them.
    fn prepare(&self, command: &mut Command) {
        command
            .env("FLEXBLK_BIN_DIR", self.directory.join("debug"))
            .env("FLEXBLK_SKIP_FILE", self.skip_file());
    }
}

/// Builds them; `None` when that failed, which is counted.
fn programs(counts: &mut Counts) -> Option<Programs> {
    let started = Instant::now();
    let built = binaries::build(false).and_then(|_| binaries::target_directory());
    counts.check("build of the programs under test", built.is_ok(), started);
    match built {
        Ok(directory) => {
            let programs = Programs { directory };
            let _ = fs::remove_file(programs.skip_file());
            Some(programs)
        }
        Err(error) => {
            println!("{error:#}");
            None
        }
    }
}

fn lints(counts: &mut Counts) -> Result<()> {
    step(
        counts,
        "cargo fmt",
        &mut cargo(&["fmt", "--all", "--check"]),
    )?;
    let deny = ["--", "-D", "warnings"];
    let mut clippy = cargo(&["clippy", "--quiet", "--workspace", "--all-targets"]);
    step(counts, "cargo clippy, default features", clippy.args(deny))?;
    for package in features()? {
        for set in package.sets() {
            let mut clippy = cargo(&["clippy", "--quiet", "--all-targets", "-p", &package.name]);
            clippy.args(&set.flags).args(deny);
            let name = format!("cargo clippy, {} {}", package.name, set.description);
            step(counts, &name, &mut clippy)?;
        }
    }
    // As the world reads it, whose links must lead somewhere, and all of it.
    for (name, extra) in [
        ("cargo doc", None),
        ("cargo doc, private items", Some("--document-private-items")),
    ] {
        let mut doc = cargo(&["doc", "--quiet", "--workspace", "--no-deps"]);
        doc.args(extra).env("RUSTDOCFLAGS", "-D warnings");
        step(counts, name, &mut doc)?;
    }
    Ok(())
}

fn step(counts: &mut Counts, name: &str, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("{name}: cannot run"))?;
    counts.check(name, status.success(), started);
    Ok(())
}

/// A package of the workspace that has features.
struct Package {
    name: String,
    /// `default` is not one of them.
    features: Vec<String>,
    default: Vec<String>,
}

/// Some of its features.
struct FeatureSet {
    description: String,
    /// For Cargo.
    flags: Vec<String>,
}

impl Package {
    /// None, and each alone, except what the default is.
    fn sets(&self) -> Vec<FeatureSet> {
        let none = FeatureSet {
            description: "without features".to_owned(),
            flags: vec!["--no-default-features".to_owned()],
        };
        let alone = |feature: &String| FeatureSet {
            description: format!("with feature {feature} alone"),
            flags: vec![
                "--no-default-features".to_owned(),
                format!("--features={feature}"),
            ],
        };
        let others = self
            .features
            .iter()
            .filter(|feature| self.default != [feature.as_str()]);
        std::iter::once(none).chain(others.map(alone)).collect()
    }
}

fn features() -> Result<Vec<Package>> {
    let output = cargo(&["metadata", "--no-deps", "--format-version=1"])
        .stderr(Stdio::inherit())
        .output()?;
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata gives JSON")?;
    let packages = metadata
        .get("packages")
        .and_then(Value::as_array)
        .context("it has packages")?;
    let mut found = Vec::new();
    for package in packages {
        let name = package
            .get("name")
            .and_then(Value::as_str)
            .context("a package has a name")?;
        let features = package
            .get("features")
            .and_then(Value::as_object)
            .context("a package has features")?;
        let default = features
            .get("default")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).map(str::to_owned))
            .map(Iterator::collect)
            .unwrap_or_default();
        let features: Vec<String> = features
            .keys()
            .filter(|name| *name != "default")
            .cloned()
            .collect();
        if !features.is_empty() {
            found.push(Package {
                name: name.to_owned(),
                features,
                default,
            });
        }
    }
    Ok(found)
}

/// `machines_follow`: those that want a virtual machine run later, and are not counted here.
fn tests(counts: &mut Counts, machines_follow: bool) -> Result<()> {
    let Some(programs) = programs(counts) else {
        return Ok(());
    };
    packages(counts, &programs);
    if find_program("cargo-nextest").is_ok() {
        let mut nextest = cargo(&[
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--color=never",
        ]);
        nextest.args([
            "--status-level=slow",
            "--final-status-level=fail",
            "--show-progress=none",
        ]);
        programs.prepare(&mut nextest);
        counts.add(counted("tests (nextest)", &mut nextest, nextest_summary)?);
    } else {
        println!("cargo-nextest is not installed: tests run with cargo test");
        let mut test = cargo(&[
            "test",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
            "--examples",
            "--",
            "--test-threads=2",
        ]);
        programs.prepare(&mut test);
        counts.add(counted("tests", &mut test, libtest_summary)?);
    }
    // `cargo test --doc` wants library targets that can be linked: the fio engine is a cdylib and has no documentation tests.
    let mut doc = cargo(&[
        "test",
        "--workspace",
        "--doc",
        "--no-fail-fast",
        "--exclude",
        "flexblk-fio",
    ]);
    counts.add(counted("documentation tests", &mut doc, libtest_summary)?);
    note_skips(counts, &programs.skip_file(), |line| {
        machines_follow && line.ends_with(NO_IMAGE)
    })?;
    tests_by_feature(counts, &programs)
}

/// The Debian packages, from the programs under test.
fn packages(counts: &mut Counts, programs: &Programs) {
    let name = "Debian packages";
    if find_program("dpkg-deb").is_err() {
        println!("SKIPPED {name}: dpkg-deb is not there");
        counts.skipped += 1;
        return;
    }
    let started = Instant::now();
    let checked = deb::check(&programs.binaries(), &programs.directory.join("deb-test"));
    counts.check(name, checked.is_ok(), started);
    if let Err(error) = checked {
        println!("{error:#}");
    }
}

/// The tests of packages with features, with each set of features that clippy looks at and that is not the default.
fn tests_by_feature(counts: &mut Counts, programs: &Programs) -> Result<()> {
    for package in features()? {
        for set in package.sets() {
            let name = format!("tests, {} {}", package.name, set.description);
            let mut test = cargo(&["test", "--quiet", "-p", &package.name, "--lib", "--tests"]);
            test.args(&set.flags);
            programs.prepare(&mut test);
            counts.add(counted(&name, &mut test, libtest_summary)?);
        }
    }
    Ok(())
}

/// Tests that found out that they cannot run here passed in the runner's eyes. Those for which `elsewhere` holds run in
/// another step, and count there.
fn note_skips(
    counts: &mut Counts,
    skip_file: &Path,
    elsewhere: impl Fn(&str) -> bool,
) -> Result<()> {
    let Ok(text) = fs::read_to_string(skip_file) else {
        return Ok(());
    };
    let mut names: Vec<&str> = text.lines().collect();
    names.sort_unstable();
    names.dedup();
    for line in names {
        if elsewhere(line) {
            counts.passed = counts.passed.saturating_sub(1);
            continue;
        }
        println!("{line}");
        counts.skipped += 1;
        // The rest of a test that skipped a part did pass.
        if !line.starts_with("SKIPPED part of ") {
            counts.passed = counts.passed.saturating_sub(1);
        }
    }
    Ok(())
}

/// Runs a test runner, shows what it prints, and counts with `summary` what each line tells.
fn counted(
    name: &str,
    command: &mut Command,
    summary: fn(&str) -> Option<Counts>,
) -> Result<Counts> {
    println!("== {name}");
    let started = Instant::now();
    // Both streams into one pipe, so that lines come in order.
    let (reader, writer) = std::io::pipe()?;
    let mut child = {
        let mut owned = Command::new(command.get_program());
        owned.args(command.get_args()).stdin(Stdio::null());
        if let Some(directory) = command.get_current_dir() {
            owned.current_dir(directory);
        }
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => owned.env(key, value),
                None => owned.env_remove(key),
            };
        }
        owned
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("{name}: cannot run"))?
    };
    let mut counts = Counts::default();
    let mut seen = false;
    for line in BufReader::new(reader).lines() {
        let line = line?;
        println!("{line}");
        if let Some(found) = summary(&line) {
            counts.add(found);
            seen = true;
        }
    }
    let status = child.wait()?;
    if !seen {
        // It did not get as far as running a test, most likely a build error.
        println!("== {name}: no result");
        counts.failed += 1;
    } else if !status.success() && counts.failed == 0 {
        println!("== {name}: ended with {status}");
        counts.failed += 1;
    }
    if counts.skipped > 0 {
        println!(
            "SKIPPED {} tests of {name}: marked as ignored",
            counts.skipped
        );
    }
    println!(
        "== {name}: {} passed, {} failed ({:.0} s)",
        counts.passed,
        counts.failed,
        started.elapsed().as_secs_f64()
    );
    Ok(counts)
}

/// `     Summary [   0.1s] 12 tests run: 10 passed (1 slow), 2 failed, 1 timed out, 3 skipped`
fn nextest_summary(line: &str) -> Option<Counts> {
    let rest = line.trim_start().strip_prefix("Summary [")?;
    let (_, rest) = rest.split_once("run:")?;
    let mut counts = Counts::default();
    for part in rest.split(',') {
        let mut words = part.split_whitespace();
        let Some(number) = words.next().and_then(|word| word.parse::<u64>().ok()) else {
            continue;
        };
        match words.next() {
            Some("passed") => counts.passed += number,
            Some("skipped") => counts.skipped += number,
            Some(_) => counts.failed += number,
            None => {}
        }
    }
    Some(counts)
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
fn libtest_summary(line: &str) -> Option<Counts> {
    let rest = line.trim_start().strip_prefix("test result:")?;
    let number = |word: &str| {
        rest.split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    Some(Counts {
        passed: number("passed"),
        failed: number("failed"),
        skipped: number("ignored"),
    })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn summaries_of_nextest_are_read() {
        let line = "     Summary [  12.345s] 120 tests run: 117 passed (2 slow), 2 failed, 1 timed out, 3 skipped";
        assert_eq!(
            nextest_summary(line),
            Some(Counts {
                passed: 117,
                failed: 3,
                skipped: 3
            })
        );
        let line = "     Summary [   0.020s] 8/9 tests run: 7 passed, 1 failed, 0 skipped";
        assert_eq!(
            nextest_summary(line),
            Some(Counts {
                passed: 7,
                failed: 1,
                skipped: 0
            })
        );
        assert_eq!(nextest_summary("        PASS [   0.012s] crate test"), None);
    }

    #[test]
    fn summaries_of_cargo_test_are_read() {
        let line = "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(
            libtest_summary(line),
            Some(Counts {
                passed: 5,
                failed: 0,
                skipped: 1
            })
        );
        let line = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.21s";
        assert_eq!(
            libtest_summary(line),
            Some(Counts {
                passed: 3,
                failed: 2,
                skipped: 0
            })
        );
        assert_eq!(libtest_summary("running 5 tests"), None);
    }

    #[test]
    fn notes_of_skipped_tests_move_from_passed_to_skipped() {
        let directory = std::env::temp_dir().join(format!("flexblk-skips-{}", std::process::id()));
        fs::write(
            &directory,
            "SKIPPED b: no root\nSKIPPED a: no fio\nSKIPPED a: no fio\nSKIPPED v: no kernel\nSKIPPED part of c, step: not there\n",
        )
        .expect("written");
        let mut counts = Counts {
            passed: 10,
            failed: 0,
            skipped: 1,
        };
        note_skips(&mut counts, &directory, |line| line.ends_with("no kernel")).expect("read");
        fs::remove_file(&directory).expect("removed");
        assert_eq!(
            counts,
            Counts {
                passed: 7,
                failed: 0,
                skipped: 4
            }
        );
    }
}
