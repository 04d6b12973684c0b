//! Runs a guest and listens to what it reports.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::image::Image;
use super::network::{Network, TAP};
use super::report::{Line, Step, StepResult};
use super::scenario::{First, Scenario};
use super::system;
use crate::process::Process;

/// QEMU ends with (value << 1) | 1 when the guest writes a value to isa-debug-exit; the guest's init writes these.
const GUEST_PASSED: i32 = (0x10 << 1) | 1;
const GUEST_FAILED: i32 = (0x11 << 1) | 1;

/// Of the kernel.
const ARGUMENTS: &str = "console=ttyS0 quiet panic=-1";

/// What a scenario showed.
#[derive(Debug)]
pub struct Outcome {
    /// Every step that has ended.
    pub steps: Vec<Step>,
    /// What the guest's kernel and its first process wrote to the console.
    pub console: String,
}

impl Outcome {
    /// An error that names the steps that failed; notes the skipped ones.
    pub fn check(&self, test: &str) -> Result<()> {
        for step in &self.steps {
            if let StepResult::Skipped(reason) = &step.result {
                crate::skip::note_part(&format!("{test}, {}", step.name), reason);
            }
        }
        let failed: Vec<String> = self
            .steps
            .iter()
            .filter_map(|step| match &step.result {
                StepResult::Failed(reason) => Some(format!("{}: {reason}", step.name)),
                StepResult::Passed | StepResult::Skipped(_) => None,
            })
            .collect();
        if failed.is_empty() && !self.steps.is_empty() {
            return Ok(());
        }
        bail!(
            "{} of {} steps failed:\n{}\nconsole:\n{}",
            failed.len(),
            self.steps.len(),
            failed.join("\n"),
            self.console
        )
    }
}

/// Does what a guest asks for; what it returns is the answer.
pub type Answer<'a> = dyn FnMut(&[String]) -> Result<String> + 'a;

/// Boots `image` in `network`, runs `scenario`, and answers what it asks. Files go to `directory`.
pub fn run(
    image: &Image,
    _network: &Network,
    scenario: &Scenario,
    directory: &Path,
    answer: &mut Answer<'_>,
) -> Result<Outcome> {
    let deadline = Instant::now() + scenario.limit;
    let mut guest = Guest::start(image, scenario, directory)?;
    let listened = guest.listen(deadline, answer);
    let ended = match listened {
        Ok(()) => guest.end(deadline),
        Err(error) => Err(error),
    };
    let console = guest.console();
    ended.with_context(|| format!("{}; console:\n{console}", scenario.name))?;
    Ok(Outcome {
        steps: guest.steps,
        console,
    })
}

struct Guest {
    process: Process,
    control: BufReader<UnixStream>,
    console: PathBuf,
    steps: Vec<Step>,
    first: First,
}

impl Guest {
    fn start(image: &Image, scenario: &Scenario, directory: &Path) -> Result<Guest> {
        let initramfs = directory.join(format!("{}.cpio", scenario.name));
        let mut file = File::create(&initramfs)?;
        // The kernel unpacks one archive after the other.
        io::copy(&mut File::open(image.initramfs())?, &mut file)?;
        if scenario.first == First::Systemd {
            io::copy(&mut File::open(image.system())?, &mut file)?;
        }
        file.write_all(&scenario.archive()?)?;
        drop(file);
        let socket = directory.join(format!("{}.sock", scenario.name));
        let console = directory.join(format!("{}.console", scenario.name));
        let shared = image.tree().root().join("usr/share");
        // The root is memory, too, of which it may take half: here with programs that have all their symbols.
        let memory_mib = match scenario.first {
            First::Systemd => 3072,
            First::Script => 1024,
        };
        let mut command = image
            .tree()
            .command("usr/bin/qemu-system-x86_64", "qemu-system-x86_64");
        command
            .args([
                "-accel",
                "tcg,thread=multi",
                "-machine",
                "q35,memory-backend=memory",
                // Shared with back-ends of devices in other processes.
                "-object",
                &format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
                "-cpu",
                "max",
            ])
            .args(["-smp", "2", "-m", &memory_mib.to_string(), "-no-reboot"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .arg("-netdev")
            .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no"))
            .args(["-device", "virtio-net-pci,netdev=net,romfile="])
            .arg("-L")
            .arg(shared.join("qemu"))
            .arg("-L")
            .arg(shared.join("seabios"))
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=on", socket.display()))
            .arg("-kernel")
            .arg(image.kernel())
            .arg("-initrd")
            .arg(&initramfs)
            .arg("-append")
            .arg(match scenario.first {
                First::Script => ARGUMENTS.to_owned(),
                First::Systemd => format!("{ARGUMENTS} {}", system::ARGUMENTS),
            });
        for (index, (socket, queues)) in scenario.disks.iter().enumerate() {
            command
                .arg("-chardev")
                .arg(format!(
                    "socket,id=disk{index},path={},reconnect-ms=200",
                    socket.display()
                ))
                .arg("-device")
                .arg(format!(
                    "vhost-user-blk-pci,chardev=disk{index},num-queues={queues}"
                ));
        }
        let mut process = Process::spawn(&mut command, &scenario.name, directory)?;
        let control = connect(&mut process, &socket)?;
        Ok(Guest {
            process,
            control: BufReader::new(control),
            console,
            steps: Vec::new(),
            first: scenario.first,
        })
    }

    /// Reads lines until the guest closes the line.
    fn listen(&mut self, deadline: Instant, answer: &mut Answer<'_>) -> Result<()> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest has not ended in time");
            }
            self.control
                .get_ref()
                .set_read_timeout(Some(left.min(Duration::from_secs(1))))?;
            match self.control.read_until(b'\n', &mut line) {
                Ok(0) => return Ok(()),
                Ok(_) if line.ends_with(b"\n") => {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    line.clear();
                    self.handle(&text, answer)?;
                }
                // A part of a line, then the end.
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error).context("the guest's control line"),
            }
        }
    }

    fn handle(&mut self, text: &str, answer: &mut Answer<'_>) -> Result<()> {
        let shown = match Line::parse(text)? {
            Line::Step { name } => format!("-- {name}"),
            Line::Log(text) => format!("     {text}"),
            Line::End(step) => {
                let shown = format!("   {:?} after {:.2?}", step.result, step.took);
                self.steps.push(step);
                shown
            }
            Line::Ask(words) => {
                let answered = answer(&words);
                let reply = match &answered {
                    Ok(text) => format!("ok\t{text}"),
                    Err(error) => format!("no\t{error:#}"),
                };
                let reply = reply.replace('\n', " ");
                self.control
                    .get_mut()
                    .write_all(format!("{reply}\n").as_bytes())?;
                format!("     asked: {} -> {reply}", words.join(" "))
            }
        };
        eprintln!("{shown}");
        Ok(())
    }

    fn end(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let status = self.process.wait(left.max(Duration::from_secs(5)))?;
        match (self.first, status.code()) {
            (First::Script, Some(GUEST_PASSED | GUEST_FAILED)) => Ok(()),
            // It has shut down, which is the end of QEMU.
            (First::Systemd, Some(0)) => Ok(()),
            _ => bail!("QEMU ended with {status}: {}", self.process.tail()),
        }
    }

    fn console(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = File::open(&self.console) {
            let _ = file.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

fn connect(process: &mut Process, socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                if process.status()?.is_some() || Instant::now() >= deadline {
                    bail!("QEMU does not start ({error}): {}", process.tail());
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
