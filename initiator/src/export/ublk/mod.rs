//! ublk: a volume as a block device of this host, without a loop device and without a copy of ours (Linux 6.0,
//! Documentation/block/ublk.rst).
//!
//! Each queue of the device is a thread with a channel (`queue.rs`). The kernel copies a write's data into the buffer of the
//! request's tag, from which the transport sends it, and a read's data out of it. Passing the kernel's own pages to the
//! transport (UBLK_F_SUPPORT_ZERO_COPY, UBLK_F_AUTO_BUF_REG) is not possible: their bytes can be named in operations of
//! io_uring, but not be read, and both of our transports have to read them: for checksums, and to put them into packets.
//!
//! The device survives its server: requests that were not answered wait in the kernel and are given to whoever takes the
//! device over ([`UblkExport::take_over`]).

mod abi;
mod control;
mod queue;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::Namespace;
use crate::volume::Volume;

use super::{Counters, ExportCounters, Worker, WorkerConfig};
use abi::{ANY_DEVICE, DeviceInfo, Parameters, SECTOR_BYTES, feature};
use control::{Control, open_node};
use queue::{Queue, QueueConfig};

pub use control::{UblkError, probe};

/// Longest request. The driver takes up to 32 MiB, but the buffers of all tags have this size.
const MAX_IO_BYTES: u32 = 512 << 10;
/// How long nodes may take to appear, and the kernel to notice that a server has died.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a server that seems to live may take to die.
const HESITATION: Duration = Duration::from_secs(1);

/// How a device is made.
#[derive(Clone, Copy, Debug)]
pub struct UblkOptions {
    /// Its number (`/dev/ublkbN`); the kernel chooses one when `None`.
    pub number: Option<u32>,
    /// Queues, each with a thread and a queue pair of its own.
    pub queues: u16,
    /// Requests of each queue at once, 1 to 1024.
    pub depth: u16,
}

/// A device with a number, and no block device yet. Dropping it removes it.
#[derive(Debug)]
pub struct UblkDevice {
    control: Control,
    info: DeviceInfo,
    namespace: Namespace,
    started: bool,
}

impl UblkDevice {
    /// Adds a device for `volume`.
    pub fn add(volume: &Volume, options: &UblkOptions) -> Result<UblkDevice, UblkError> {
        let namespace = volume.namespace()?;
        check(&namespace)?;
        let mut control = Control::open()?;
        let wanted = feature::USER_RECOVERY
            | feature::USER_RECOVERY_REISSUE
            | control.features() & feature::CMD_IOCTL_ENCODE;
        let mut info = DeviceInfo {
            nr_hw_queues: options.queues.max(1),
            queue_depth: options.depth.clamp(1, 1024),
            max_io_buf_bytes: max_io_bytes(&namespace),
            dev_id: options.number.unwrap_or(ANY_DEVICE),
            ublksrv_pid: std::process::id() as i32,
            flags: wanted,
            ublksrv_flags: identity(volume, &namespace),
            ..DeviceInfo::default()
        };
        control.add(&mut info)?;
        Ok(UblkDevice {
            control,
            info,
            namespace,
            started: false,
        })
    }

    /// N of `/dev/ublkbN`.
    pub fn number(&self) -> u32 {
        self.info.dev_id
    }

    /// Serves it: the block device appears.
    pub fn serve(mut self, volume: &Volume) -> Result<UblkExport, UblkError> {
        let number = self.number();
        let parameters = Parameters::of(&self.namespace, self.info.max_io_buf_bytes);
        self.control.set_parameters(number, &parameters)?;
        let export = UblkExport::serve(volume, &self.namespace, &self.control, &self.info)?;
        self.control.start(number)?;
        self.started = true;
        Ok(export)
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        if !self.started {
            // What kept it from starting is the error to tell of.
            let _ = self.control.delete(self.info.dev_id);
        }
    }
}

/// A device that is served. Dropping it leaves the device without a server: [`UblkExport::end`] removes it.
#[derive(Debug)]
pub struct UblkExport {
    number: u32,
    len_bytes: u64,
    workers: Vec<Worker>,
    counters: Vec<Arc<Counters>>,
}

impl UblkExport {
    /// Makes a device of `volume` and serves it.
    pub fn start(volume: &Volume, options: &UblkOptions) -> Result<UblkExport, UblkError> {
        UblkDevice::add(volume, options)?.serve(volume)
    }

    /// Serves a device of this volume whose server has died. Requests that it had not answered are done again, and
    /// the users of the device only see that they took longer. It keeps its size, which need not be that of the namespace
    /// any more: see [`len_bytes`](Self::len_bytes) and [`resize`](Self::resize).
    pub fn take_over(volume: &Volume, number: u32) -> Result<UblkExport, UblkError> {
        let namespace = volume.namespace()?;
        check(&namespace)?;
        let mut control = Control::open()?;
        let info = control.info(number)?;
        let parameters = control.parameters(number)?;
        let expected = Parameters::of(&namespace, info.max_io_buf_bytes);
        let same = info.ublksrv_flags == identity(volume, &namespace)
            && parameters.logical_bs_shift == expected.logical_bs_shift
            && info.max_io_buf_bytes <= max_io_bytes(&namespace);
        if !same {
            return Err(UblkError::Foreign(number));
        }
        // One that lives does not let go of it; one that has just died may still be about to.
        let limit = if is_alive(info.ublksrv_pid) {
            HESITATION
        } else {
            PATIENCE
        };
        if !control.start_recovery(number, limit)? {
            return Err(UblkError::Served(number, info.ublksrv_pid));
        }
        let mut export = UblkExport::serve(volume, &namespace, &control, &info)?;
        control.end_recovery(number)?;
        let sectors = parameters.dev_sectors;
        export.len_bytes = sectors.saturating_mul(u64::from(SECTOR_BYTES));
        Ok(export)
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.number))
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Bytes of the device: of the namespace, unless that has changed and the device has not followed.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether no queue is served any more: somebody has removed the device.
    pub fn has_ended(&self) -> bool {
        self.workers.iter().all(Worker::has_ended)
    }

    /// What was done so far.
    pub fn counters(&self) -> ExportCounters {
        ExportCounters::sum(&self.counters)
    }

    /// The namespace has another size.
    pub fn resize(&mut self, len_bytes: u64) -> Result<(), UblkError> {
        let sectors = len_bytes / u64::from(SECTOR_BYTES);
        Control::open()?.update_size(self.number, sectors)?;
        self.len_bytes = len_bytes;
        Ok(())
    }

    /// Removes the device. What is under way may end within `grace`, then it fails; afterwards a further second may pass.
    /// True when the kernel is done with it; false when somebody still holds it.
    pub fn end(self, grace: Duration) -> bool {
        let deadline = Instant::now() + grace;
        let number = self.number;
        let Some(stopped) = begin_removal(number) else {
            return false;
        };
        let mut ended = stopped
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .ok();
        // Answers everything with an error from here on.
        self.workers.iter().for_each(Worker::begin_stop);
        for worker in self.workers {
            worker.stop(Duration::from_secs(2));
        }
        if ended.is_none() {
            ended = stopped.recv_timeout(Duration::from_secs(1)).ok();
        }
        match ended {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                tracing::warn!(%error, number, "removing a ublk device");
                false
            }
            None => false,
        }
    }

    /// Removes a device that process `server` served until it died, unless it is gone already. Requests that wait for
    /// the next server fail. Takes no longer than `within`.
    pub fn remove(number: u32, server: i32, within: Duration) -> Result<(), UblkError> {
        let deadline = Instant::now() + within;
        // One that was just killed may still be about to end.
        while is_alive(server) {
            if Instant::now() >= deadline {
                return Err(UblkError::Served(number, server));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        match Control::open()?.info(number) {
            Ok(info) if info.ublksrv_pid != server => return Err(UblkError::Foreign(number)),
            Ok(_) => {}
            Err(UblkError::Command { source, .. })
                if source.raw_os_error() == Some(libc::ENODEV) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        begin_removal(number)
            .and_then(|removed| removed.recv_timeout(left).ok())
            .unwrap_or(Err(UblkError::Held(number)))
    }

    fn serve(
        volume: &Volume,
        namespace: &Namespace,
        control: &Control,
        info: &DeviceInfo,
    ) -> Result<UblkExport, UblkError> {
        let node = Arc::new(open_node(info.dev_id, PATIENCE)?);
        let (mut workers, mut counters) = (Vec::new(), Vec::new());
        for q_id in 0..info.nr_hw_queues {
            let config = QueueConfig {
                node: Arc::clone(&node),
                q_id,
                depth: info.queue_depth,
                buffer_bytes: info.max_io_buf_bytes,
                block_size: namespace.block_size,
                ioctl_encoded: control.ioctl_encoded(),
            };
            let counted = Arc::<Counters>::default();
            counters.push(Arc::clone(&counted));
            let worker = WorkerConfig {
                name: format!("ublk{} q{q_id}", info.dev_id),
                core: None,
                depth: info.queue_depth,
            };
            let (worker, ()) = Worker::spawn(&worker, volume, move |channel| {
                Queue::new(config, counted, channel).map(|queue| (queue, ()))
            })?;
            workers.push(worker);
        }
        Ok(UblkExport {
            number: info.dev_id,
            len_bytes: namespace.len_bytes(),
            workers,
            counters,
        })
    }
}

/// Stops and deletes a device in a thread of its own, because that waits for requests under way; the receiver tells of
/// its end. `None` when there is no thread to be had.
fn begin_removal(number: u32) -> Option<mpsc::Receiver<Result<(), UblkError>>> {
    let (done, removed) = mpsc::channel();
    let remove = move || {
        let ended = Control::open().and_then(|mut control| {
            control.stop(number)?;
            control.delete(number)
        });
        // Whoever waited for it may have given up.
        let _ = done.send(ended);
    };
    let started = std::thread::Builder::new()
        .name("ublk stop".into())
        .spawn(remove);
    if let Err(error) = started {
        tracing::error!(%error, "starting a thread");
        return None;
    }
    Some(removed)
}

fn check(namespace: &Namespace) -> Result<(), UblkError> {
    let size = namespace.block_size;
    if size.is_power_of_two() && (512..=4096).contains(&size) {
        Ok(())
    } else {
        Err(UblkError::BlockSize(size))
    }
}

/// Longest request: one command of the namespace, whole pages.
fn max_io_bytes(namespace: &Namespace) -> u32 {
    let most = namespace.max_transfer_bytes.min(MAX_IO_BYTES);
    (most - most % 4096).max(4096)
}

/// Whether that process lives. One that has ended and that nobody has waited for does not.
fn is_alive(pid: i32) -> bool {
    // proc_pid_stat(5): the state follows the name, which is in parentheses.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    })
}

/// What tells a device of this namespace from others: a word that the kernel keeps for us with the device (FNV-1a).
fn identity(volume: &Volume, namespace: &Namespace) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    let uuid = namespace.uuid.map_or([0; 16], |uuid| *uuid.as_bytes());
    if uuid == [0; 16] && namespace.nguid == [0; 16] && namespace.eui64 == [0; 8] {
        // No name of its own.
        add(volume.subnqn().unwrap_or_default().as_bytes());
        add(&namespace.nsid.get().to_le_bytes());
    }
    add(&uuid);
    add(&namespace.nguid);
    add(&namespace.eui64);
    hash
}
