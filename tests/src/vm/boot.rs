//! A host that attaches at boot: its configuration, the target outside, and how long it takes to shut down.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::image::Image;
use super::network::{Network, OUTSIDE, OUTSIDE_2};
use super::outside::Outside;
use super::scenario::Scenario;
use crate::process::run;
use crate::target::SUBNQN;

const SCRIPT: &str = include_str!("../../vm/boot.sh");
/// The namespace that is attached: a file.
const NSID: u32 = 2;
const LIMIT: Duration = Duration::from_secs(30);
/// A target in the guest itself.
const TARGET: &str = "[[subsystem]]\nnqn = \"nqn.2026-11.dev.flexblk:guest\"\n\
    [[subsystem.namespace]]\nbdev = \"ram:16M\"\n";

/// A start of the guest, and how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The target lives when the guest restarts.
    First,
    /// The target is killed before the guest shuts down.
    TargetDies,
    /// No packet reaches the target when the guest shuts down.
    TargetSilent,
}

impl Start {
    /// For the script, and for files.
    pub fn name(self) -> &'static str {
        match self {
            Start::First => "first",
            Start::TargetDies => "target-dies",
            Start::TargetSilent => "target-silent",
        }
    }

    /// How long the guest may take to shut down.
    fn limit(self) -> Duration {
        match self {
            Start::First => Duration::from_secs(20),
            Start::TargetDies | Start::TargetSilent => Duration::from_secs(40),
        }
    }
}

/// A target with a file system, which guests mount at boot.
pub struct Boot<'a> {
    outside: Outside<'a>,
    image: &'a Image,
    wwid: String,
    /// When the guest was told to shut down.
    told: Option<Instant>,
}

impl<'a> Boot<'a> {
    /// Makes the file system and starts the target.
    pub fn start(image: &'a Image, network: &'a Network, directory: &Path) -> Result<Boot<'a>> {
        let mut outside = Outside::new(network, directory)?;
        let mut mkfs = image.tree().command("usr/sbin/mke2fs", "mkfs.ext4");
        mkfs.arg("-q").arg(outside.file(NSID));
        run(&mut mkfs, LIMIT)?.success().context("mkfs.ext4")?;
        outside.answer(&["start".into(), "everywhere".into()])?;
        Ok(Boot {
            wwid: format!("uuid.{}", outside.uuid(NSID)?),
            outside,
            image,
            told: None,
        })
    }

    /// A start of the guest: our packages as they are installed in `packages`, and the configuration of a user.
    pub fn scenario(&self, name: &str, start: Start, packages: &Path) -> Result<Scenario> {
        let by_id = format!("/dev/disk/by-id/nvme-{}", self.wwid);
        let attach = format!(
            "[[attach]]\nname = \"data\"\ntarget = \"nvme+tcp://{OUTSIDE}:4420/{SUBNQN}?nsid={NSID}\"\n\
             path = [\"nvme+tcp://{OUTSIDE_2}:4420/{SUBNQN}?nsid={NSID}\"]\n"
        );
        let scenario = Scenario::new(name, SCRIPT)
            .systemd()
            .installed(packages, self.image.tree())?
            .variable("PEER", "outside")
            .variable("SUBNQN", SUBNQN)
            .variable("BY_ID", &by_id)
            .variable("START", start.name())
            .text("etc/flexblk/attach.toml", &attach)
            .text("etc/flexblk/target.toml", TARGET)
            .text(
                "etc/fstab",
                &format!("{by_id} /mnt ext4 _netdev,nofail 0 2\n"),
            );
        Ok(scenario)
    }

    /// Does what a guest asks for.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        match words {
            // It says so just before.
            [word] if word == "shutdown" => {
                self.told = Some(Instant::now());
                Ok(String::new())
            }
            _ => self.outside.answer(words),
        }
    }

    /// The machine has gone: in time, and what it had mounted was unmounted.
    pub fn ended(&mut self, start: Start) -> Result<()> {
        let took = self
            .told
            .take()
            .context("the guest was not shut down")?
            .elapsed();
        eprintln!(
            "     {}: shut down in {:.1} s",
            start.name(),
            took.as_secs_f64()
        );
        ensure!(
            took <= start.limit(),
            "{}: shutdown took {took:.1?}, more than {:?}",
            start.name(),
            start.limit()
        );
        if start == Start::First {
            let mut fsck = self.image.tree().command("usr/sbin/e2fsck", "e2fsck");
            fsck.arg("-n").arg(self.outside.file(NSID));
            let found = run(&mut fsck, LIMIT)?.success()?.stdout;
            ensure!(found.contains(": clean,"), "not unmounted: {found}");
        }
        Ok(())
    }

    /// Whether the target still runs as it should.
    pub fn check(&mut self) -> Result<()> {
        self.outside.check()
    }
}
