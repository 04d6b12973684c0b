//! A running `flexblk export nbd`, and a client that says exactly what a test wants.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::process::{Process, eventually};
use crate::setup::Setup;
use crate::target::Target;

/// An exporter that serves. Dropping it kills it.
pub struct NbdServer {
    process: Process,
    uri: String,
    socket: PathBuf,
}

impl NbdServer {
    /// On the Unix socket `NAME.nbd` in the test's folder.
    pub fn start(setup: &Setup, target: &Target, name: &str, more: &[&str]) -> Result<NbdServer> {
        let socket = setup.path().join(format!("{name}.nbd"));
        let path = socket.to_string_lossy().into_owned();
        let mut arguments = vec!["--socket", &path];
        arguments.extend(more);
        NbdServer::spawn(setup, target, name, &arguments, socket.clone())
    }

    /// On a TCP port of its choice.
    pub fn on_tcp(setup: &Setup, target: &Target, name: &str, more: &[&str]) -> Result<NbdServer> {
        let mut arguments = vec!["--listen", "127.0.0.1:0"];
        arguments.extend(more);
        NbdServer::spawn(setup, target, name, &arguments, PathBuf::new())
    }

    fn spawn(
        setup: &Setup,
        target: &Target,
        name: &str,
        arguments: &[&str],
        socket: PathBuf,
    ) -> Result<NbdServer> {
        let mut command = Command::new(&setup.binaries().flexblk);
        command
            .args(["export", "nbd"])
            .args(target.address())
            .args(arguments);
        let mut process = Process::spawn(&mut command, name, setup.path())?;
        let uri_in = |output: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix("ready: "));
            line.map(str::to_owned)
        };
        let mut ended = None;
        eventually("flexblk export nbd serves", Duration::from_secs(20), || {
            ended = process.status().ok().flatten();
            ended.is_some() || process.stdout().ends_with('\n')
        })?;
        let Some(uri) = uri_in(&process.stdout()) else {
            bail!("flexblk export nbd: {ended:?}\n{}", process.tail());
        };
        Ok(NbdServer {
            process,
            uri,
            socket,
        })
    }

    /// What it printed for clients to use.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Its Unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end, and waits.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait(limit)
    }

    /// Waits for its end, whatever it is.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.wait(limit)
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// The end of what it said.
    pub fn tail(&self) -> String {
        self.process.tail()
    }
}

/// A client byte by byte, with simple replies.
pub struct RawClient(pub UnixStream);

impl RawClient {
    /// Connects, and says nothing yet.
    pub fn connect(socket: &Path) -> Result<RawClient> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        Ok(RawClient(stream))
    }

    /// Connects and names the export the old way, so that nothing but requests follows.
    pub fn open(socket: &Path) -> Result<RawClient> {
        let mut client = RawClient::connect(socket)?;
        let mut greeting = [0; 18];
        client.0.read_exact(&mut greeting)?;
        client.0.write_all(&[0, 0, 0, 3])?;
        client.0.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut export = [0; 10];
        client.0.read_exact(&mut export).context("size and flags")?;
        Ok(client)
    }

    /// Sends the header of a request.
    pub fn request(&mut self, kind: u16, cookie: u64, offset: u64, len: u32) -> io::Result<()> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(0_u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        self.0.write_all(&bytes)
    }

    /// A reply's error number and cookie.
    pub fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut bytes = [0; 16];
        self.0.read_exact(&mut bytes)?;
        let error = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let cookie = bytes
            .iter()
            .skip(8)
            .fold(0, |all, byte| all << 8 | u64::from(*byte));
        Ok((error, cookie))
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.0.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}
