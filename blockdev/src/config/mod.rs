//! Devices as they stand in a configuration file, and making them.
//!
//! Where SPDK's RPC methods have a parameter for the same thing, the key has its name.

mod short;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::{
    BlockDevice, ByteSize, DelayDevice, DirectMode, Error, FaultDevice, FileDevice, NullDevice,
    RamDevice,
};

/// One device.
///
/// ```
/// # use flexblk_blockdev::{BdevConfig, open_all};
/// #[derive(serde::Deserialize)]
/// struct File { bdev: Vec<BdevConfig> }
/// let file: File = toml::from_str(r#"
///     [[bdev]]
///     type = "malloc"
///     name = "fast"
///     size = "64M"
///     block_size = 4096
///
///     [[bdev]]
///     type = "delay"
///     name = "slow"
///     base_bdev_name = "fast"
///     avg_read_latency = 100
/// "#).unwrap();
/// let devices = open_all(&file.bdev).unwrap();
/// assert_eq!(devices[1].info().size_bytes(), 64 << 20);
/// ```
///
/// The short form is `TYPE:ARGUMENT[,KEY=VALUE...]`: `ram:1G`, `null:1T,block_size=4096`,
/// `file:disk.img,readonly`, `file:/dev/sdb,direct=on`. It knows the keys `name`, `block_size`,
/// `readonly`, `share_rw`, `direct`, `max_size` and `hugepages`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum BdevConfig {
    /// Nothing behind it: writes vanish, reads give zeroes.
    Null(NullConfig),
    /// Memory. Also `type = "malloc"`.
    #[serde(alias = "malloc")]
    Ram(RamConfig),
    /// A file or block device through io_uring. Also `type = "uring"` and `type = "aio"`.
    #[serde(alias = "uring", alias = "aio")]
    File(FileConfig),
    /// Errors on purpose. Also `type = "error"`.
    #[serde(alias = "error")]
    Fault(FaultConfig),
    /// Latency on purpose.
    Delay(DelayConfig),
}

impl BdevConfig {
    /// What `type` may be, without the other names.
    pub const TYPES: [&str; 5] = ["null", "ram", "file", "fault", "delay"];

    /// Reads the other keys of a device of this type; `None` when there is no such type.
    pub fn of_type<'de, D: Deserializer<'de>>(
        kind: &str,
        keys: D,
    ) -> Option<Result<Self, D::Error>> {
        Some(match kind {
            "null" => NullConfig::deserialize(keys).map(Self::Null),
            "ram" | "malloc" => RamConfig::deserialize(keys).map(Self::Ram),
            "file" | "uring" | "aio" => FileConfig::deserialize(keys).map(Self::File),
            "fault" | "error" => FaultConfig::deserialize(keys).map(Self::Fault),
            "delay" => DelayConfig::deserialize(keys).map(Self::Delay),
            _ => return None,
        })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Null(config) => &config.name,
            Self::Ram(config) => &config.name,
            Self::File(config) => &config.name,
            Self::Fault(config) => &config.name,
            Self::Delay(config) => &config.name,
        }
    }

    /// Gives it another name.
    pub fn rename(&mut self, name: &str) {
        let place = match self {
            Self::Null(config) => &mut config.name,
            Self::Ram(config) => &mut config.name,
            Self::File(config) => &mut config.name,
            Self::Fault(config) => &mut config.name,
            Self::Delay(config) => &mut config.name,
        };
        name.clone_into(place);
    }

    /// The name of the device below, for a wrapper.
    #[must_use]
    pub fn base(&self) -> Option<&str> {
        match self {
            Self::Null(_) | Self::Ram(_) | Self::File(_) => None,
            Self::Fault(config) => Some(&config.base_bdev_name),
            Self::Delay(config) => Some(&config.base_bdev_name),
        }
    }
}

/// See [`BdevConfig::Null`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NullConfig {
    /// Name of the device.
    pub name: String,
    /// Bytes of a block, 512 (default) or 4096.
    #[serde(default = "default_block_size")]
    pub block_size: u32,
    /// Size; or give `num_blocks`.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// Size in blocks.
    #[serde(default)]
    pub num_blocks: Option<u64>,
    /// Identity; default: a new one.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Reads fill the memory with zeroes (default). `false` leaves it as it was, which measures a
    /// path without touching memory, and shows a reader what the buffer held before.
    #[serde(default = "yes")]
    pub read_zeroes: bool,
}

/// See [`BdevConfig::Ram`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamConfig {
    /// Name of the device.
    pub name: String,
    /// Bytes of a block, 512 (default) or 4096.
    #[serde(default = "default_block_size")]
    pub block_size: u32,
    /// Size; or give `num_blocks`.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// Size in blocks.
    #[serde(default)]
    pub num_blocks: Option<u64>,
    /// How far a resize may go. Costs address space only, memory with hugepages. Default: four times the size, or the size
    /// itself with hugepages, which are taken at once.
    #[serde(default)]
    pub max_size: Option<ByteSize>,
    /// Identity; default: a new one, as the contents are new too.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Whether to use hugepages.
    #[serde(default)]
    pub hugepages: HugePagesMode,
    /// Keep [`crate::Channel::direct_read`] from being used while several threads have the device
    /// open (default), so that no block is ever read half-written. And keep what comes in pieces that are no whole
    /// blocks from being received straight into the device, where a host that dies would leave a block half-written: over
    /// NVMe/TCP what is not sent with its command, over FlexiNS what comes in packets that are smaller than blocks (4 KiB
    /// blocks on a path with an MTU of 1500).
    /// One case is left: a block that is written while the network is taking it for a read over NVMe/TCP, from a thread
    /// that has the device alone, can be sent half old and half new; a data digest tells the host.
    #[serde(default = "yes")]
    pub atomic_blocks: bool,
    /// I/Os in flight per thread.
    #[serde(default = "default_depth")]
    pub depth: u32,
}

/// Hugepages for a RAM device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePagesMode {
    /// Ordinary pages, taken as blocks are written, given back by a discard.
    #[default]
    No,
    /// Transparent hugepages where the kernel has them to give, taken at once: reads and writes at
    /// random are faster, and no write waits for memory.
    Transparent,
    /// Reserved hugepages if there are enough, else as `transparent`.
    Try,
}

/// See [`BdevConfig::File`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// Name of the device.
    pub name: String,
    /// Path of the image or block device.
    pub filename: PathBuf,
    /// Bytes of a block: 512 or 4096. Default: 512, or what a block device asks for.
    #[serde(default)]
    pub block_size: Option<u32>,
    /// Open for reading only.
    #[serde(default)]
    pub readonly: bool,
    /// Other targets export the same file, too, as further paths to it: it is locked against everybody who does not say so.
    #[serde(default)]
    pub share_rw: bool,
    /// Whether to go past the page cache.
    #[serde(default)]
    pub direct: DirectMode,
    /// Identity; default: derived from this machine's id and the path, the same at each start.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// I/Os in flight per thread.
    #[serde(default = "default_depth")]
    pub depth: u32,
}

/// See [`BdevConfig::Fault`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultConfig {
    /// Name of the device.
    pub name: String,
    /// The device that works.
    #[serde(alias = "base_name")]
    pub base_bdev_name: String,
    /// Identity; derived from the base's and the name unless configured.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Same seed, same faults (per channel, in the order of its I/Os).
    #[serde(default)]
    pub seed: u64,
    /// Share of reads, compares and verifies that fail, 0.0 to 1.0.
    #[serde(default)]
    pub read_error_rate: f64,
    /// Share of writes, write zeroes and discards that fail, 0.0 to 1.0.
    #[serde(default)]
    pub write_error_rate: f64,
    /// Share of flushes that fail, 0.0 to 1.0.
    #[serde(default)]
    pub flush_error_rate: f64,
    /// Bad places.
    #[serde(default)]
    pub media_errors: Vec<MediaError>,
}

/// Blocks that cannot be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MediaError {
    /// The first bad block.
    pub lba: u64,
    /// How many.
    #[serde(default = "one")]
    pub blocks: u64,
    /// Which I/Os fail there.
    #[serde(default)]
    pub on: FaultOn,
}

/// Which I/Os a media error concerns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultOn {
    /// Those that read.
    #[default]
    Read,
    /// Those that write.
    Write,
    /// All.
    Both,
}

/// See [`BdevConfig::Delay`]. Latencies in microseconds, added to those of the base. One I/O in a
/// hundred, chosen with the seed, gets the p99 latency, the others get the average (SPDK's rule).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DelayConfig {
    /// Name of the device.
    pub name: String,
    /// The fast device.
    pub base_bdev_name: String,
    /// Identity; derived from the base's and the name unless configured.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Same seed, same spikes (per channel, in the order of its I/Os).
    #[serde(default)]
    pub seed: u64,
    /// Reads, compares, verifies.
    #[serde(default)]
    pub avg_read_latency: u64,
    /// Default: the average.
    #[serde(default)]
    pub p99_read_latency: Option<u64>,
    /// Writes, write zeroes, discards.
    #[serde(default)]
    pub avg_write_latency: u64,
    /// Default: the average.
    #[serde(default)]
    pub p99_write_latency: Option<u64>,
    /// Flushes.
    #[serde(default)]
    pub flush_latency: u64,
    /// I/Os in flight per thread.
    #[serde(default = "default_depth")]
    pub depth: u32,
}

impl DelayConfig {
    /// The device with another one's latencies.
    #[must_use]
    pub fn with_latencies_of(&self, other: &Self) -> Self {
        Self {
            name: self.name.clone(),
            base_bdev_name: self.base_bdev_name.clone(),
            uuid: self.uuid,
            seed: self.seed,
            depth: self.depth,
            ..other.clone()
        }
    }
}

/// I/Os in flight per thread and device unless configured.
pub(crate) const DEFAULT_DEPTH: u32 = 1024;

fn default_block_size() -> u32 {
    512
}

fn default_depth() -> u32 {
    DEFAULT_DEPTH
}

fn yes() -> bool {
    true
}

fn one() -> u64 {
    1
}

/// Makes a device that needs no other.
pub fn open(config: &BdevConfig) -> Result<Arc<dyn BlockDevice>, Error> {
    open_over(config, &HashMap::new())
}

/// Makes all devices of a configuration, in its order; a wrapper's base stands before it.
pub fn open_all(configs: &[BdevConfig]) -> Result<Vec<Arc<dyn BlockDevice>>, Error> {
    let mut by_name = HashMap::new();
    let mut devices = Vec::with_capacity(configs.len());
    for config in configs {
        let device = open_over(config, &by_name)?;
        if by_name
            .insert(config.name().to_owned(), Arc::clone(&device))
            .is_some()
        {
            return Err(Error::Duplicate {
                name: config.name().to_owned(),
            });
        }
        devices.push(device);
    }
    Ok(devices)
}

/// Makes a device, over one of `bases` (by name) if it is a wrapper.
pub fn open_over(
    config: &BdevConfig,
    bases: &HashMap<String, Arc<dyn BlockDevice>>,
) -> Result<Arc<dyn BlockDevice>, Error> {
    let base = |name: &str, base: &str| {
        let missing = || Error::NoBase {
            name: name.to_owned(),
            base: base.to_owned(),
        };
        bases.get(base).cloned().ok_or_else(missing)
    };
    Ok(match config {
        BdevConfig::Null(config) => Arc::new(NullDevice::new(config)?),
        BdevConfig::Ram(config) => Arc::new(RamDevice::new(config)?),
        BdevConfig::File(config) => Arc::new(FileDevice::new(config)?),
        BdevConfig::Fault(config) => Arc::new(FaultDevice::new(
            config,
            base(&config.name, &config.base_bdev_name)?,
        )?),
        BdevConfig::Delay(config) => Arc::new(DelayDevice::new(
            config,
            base(&config.name, &config.base_bdev_name)?,
        )?),
    })
}

/// The number of blocks out of `size` or `num_blocks`.
pub(crate) fn block_count(
    name: &str,
    block_size: u32,
    size: Option<ByteSize>,
    num_blocks: Option<u64>,
) -> Result<u64, Error> {
    check_block_size(name, block_size)?;
    let what = name.to_owned();
    let count = match (size, num_blocks) {
        (Some(size), None) => whole_blocks(name, size.bytes(), block_size)?,
        (None, Some(count)) => count,
        _ => {
            return Err(Error::Config {
                what,
                reason: "give either size or num_blocks".to_owned(),
            });
        }
    };
    match count.checked_mul(u64::from(block_size)) {
        Some(0) => Err(Error::Empty { what }),
        Some(bytes) if i64::try_from(bytes).is_ok() => Ok(count),
        _ => Err(Error::Config {
            what,
            reason: format!("{count} blocks are more than 8 EiB"),
        }),
    }
}

pub(crate) fn check_block_size(name: &str, block_size: u32) -> Result<(), Error> {
    if matches!(block_size, 512 | 4096) {
        return Ok(());
    }
    Err(Error::BlockSize {
        what: name.to_owned(),
        block_size,
    })
}

pub(crate) fn check_depth(name: &str, depth: u32) -> Result<(), Error> {
    if (1..=65_536).contains(&depth) {
        return Ok(());
    }
    Err(Error::Config {
        what: name.to_owned(),
        reason: format!("depth {depth} is not within 1..=65536"),
    })
}

/// `size_bytes` in blocks.
pub(crate) fn whole_blocks(what: &str, size_bytes: u64, block_size: u32) -> Result<u64, Error> {
    if size_bytes == 0 {
        return Err(Error::Empty {
            what: what.to_owned(),
        });
    }
    if !size_bytes.is_multiple_of(u64::from(block_size)) {
        return Err(Error::NotMultiple {
            what: what.to_owned(),
            size_bytes,
            block_size,
        });
    }
    Ok(size_bytes / u64::from(block_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Doc {
        bdev: Vec<BdevConfig>,
    }

    #[test]
    fn a_configuration_survives_a_round_trip() {
        let text = r#"
            [[bdev]]
            type = "malloc"
            name = "a"
            num_blocks = 2048
            block_size = 4096
            [[bdev]]
            type = "uring"
            name = "b"
            filename = "/tmp/x.img"
            direct = "off"
            [[bdev]]
            type = "error"
            name = "c"
            base_bdev_name = "a"
            read_error_rate = 0.5
            media_errors = [{ lba = 7 }, { lba = 9, blocks = 2, on = "both" }]
        "#;
        let doc: Doc = toml::from_str(text).unwrap();
        assert!(matches!(&doc.bdev[0], BdevConfig::Ram(ram) if ram.num_blocks == Some(2048)));
        assert!(matches!(&doc.bdev[1], BdevConfig::File(file) if file.direct == DirectMode::Off));
        let BdevConfig::Fault(fault) = &doc.bdev[2] else {
            panic!("a fault device")
        };
        assert_eq!(
            fault.media_errors[0],
            MediaError {
                lba: 7,
                blocks: 1,
                on: FaultOn::Read
            }
        );
        let json = serde_json::to_string(&doc.bdev).unwrap();
        assert_eq!(
            serde_json::from_str::<Vec<BdevConfig>>(&json).unwrap(),
            doc.bdev
        );
    }

    #[test]
    fn a_wrong_key_is_named_with_its_table() {
        let text = "a = 1\n\n[[bdev]]\ntype = \"ram\"\nname = \"a\"\nsizee = \"1G\"\n";
        #[derive(Debug, Deserialize)]
        #[allow(dead_code)]
        struct Doc {
            a: u32,
            bdev: Vec<BdevConfig>,
        }
        let message = toml::from_str::<Doc>(text).unwrap_err().to_string();
        assert!(message.contains("unknown field `sizee`"), "{message}");
        assert!(message.contains("line 3"), "{message}");
    }

    #[test]
    fn every_type_is_read_alone_as_in_its_table() {
        for kind in BdevConfig::TYPES
            .into_iter()
            .chain(["malloc", "uring", "aio", "error"])
        {
            let keys = "name = \"a\"\n".to_owned()
                + match kind {
                    "file" | "uring" | "aio" => "filename = \"x\"",
                    "fault" | "error" | "delay" => "base_bdev_name = \"b\"",
                    _ => "",
                };
            let table = toml::de::Deserializer::parse(&keys).unwrap();
            let alone = BdevConfig::of_type(kind, table).expect("known").unwrap();
            let whole: BdevConfig = toml::from_str(&format!("type = \"{kind}\"\n{keys}")).unwrap();
            assert_eq!(alone, whole, "{kind}");
        }
        let table = toml::de::Deserializer::parse("").unwrap();
        assert!(BdevConfig::of_type("tape", table).is_none());
    }

    #[test]
    fn sizes_are_checked() {
        let message = |text: &str| match open(&text.parse().unwrap()) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(
            message("ram:1000"),
            "ram: size 1000 is not a multiple of the block size 512"
        );
        assert_eq!(message("ram:0"), "ram: size is 0");
        assert_eq!(
            message("null:1G,block_size=520"),
            "null: block size 520 is not supported (512 or 4096)"
        );
        assert!(
            "null:16777216T".parse::<BdevConfig>().is_err(),
            "2^64 bytes"
        );
        assert!(message("null:8388608T").ends_with("are more than 8 EiB"));
    }

    #[test]
    fn names_and_bases_are_checked() {
        let ram: BdevConfig = "ram:1M".parse().unwrap();
        assert!(
            matches!(open_all(&[ram.clone(), ram.clone()]), Err(Error::Duplicate { name }) if name == "ram")
        );
        let delay = BdevConfig::Delay(DelayConfig {
            name: "d".to_owned(),
            base_bdev_name: "nowhere".to_owned(),
            uuid: None,
            seed: 0,
            avg_read_latency: 0,
            p99_read_latency: None,
            avg_write_latency: 0,
            p99_write_latency: None,
            flush_latency: 0,
            depth: 1,
        });
        assert!(
            matches!(open_all(&[ram, delay]), Err(Error::NoBase { base, .. }) if base == "nowhere")
        );
    }
}
