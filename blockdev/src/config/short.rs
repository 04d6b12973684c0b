//! The short form of a device: `ram:1G,block_size=4096`.

use std::{collections::HashMap, path::PathBuf, str::FromStr};

use super::{DEFAULT_DEPTH, default_block_size};
use crate::{BdevConfig, DirectMode, Error, FileConfig, HugePagesMode, NullConfig, RamConfig};

impl FromStr for BdevConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Config {
            what: text.to_owned(),
            reason,
        };
        let (kind, rest) = text.split_once(':').ok_or_else(|| {
            wrong("expected TYPE:ARGUMENT, such as ram:1G or file:disk.img".to_owned())
        })?;
        let mut parts = rest.split(',');
        let argument = parts.next().unwrap_or_default();
        if argument.is_empty() {
            return Err(wrong(format!("nothing after {kind:?}:")));
        }
        let mut options = HashMap::new();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, "true"));
            options.insert(key, value);
        }
        let config = Self::short(kind, argument, &mut options).map_err(wrong)?;
        match options.keys().next() {
            Some(key) => Err(wrong(format!("{kind} has no option {key:?} here"))),
            None => Ok(config),
        }
    }
}

impl BdevConfig {
    fn short(
        kind: &str,
        argument: &str,
        options: &mut HashMap<&str, &str>,
    ) -> Result<Self, String> {
        fn take<T: FromStr>(
            options: &mut HashMap<&str, &str>,
            key: &str,
        ) -> Result<Option<T>, String> {
            match options.remove(key) {
                Some(value) => value
                    .parse()
                    .map(Some)
                    .map_err(|_| format!("{key}={value}: not a valid value")),
                None => Ok(None),
            }
        }
        let block_size = take(options, "block_size")?;
        let name = options.remove("name").map(str::to_owned);
        match kind {
            "null" => Ok(Self::Null(NullConfig {
                name: name.unwrap_or_else(|| "null".to_owned()),
                block_size: block_size.unwrap_or_else(default_block_size),
                size: Some(argument.parse()?),
                num_blocks: None,
                uuid: None,
                read_zeroes: true,
            })),
            "ram" | "malloc" => Ok(Self::Ram(RamConfig {
                name: name.unwrap_or_else(|| "ram".to_owned()),
                block_size: block_size.unwrap_or_else(default_block_size),
                size: Some(argument.parse()?),
                num_blocks: None,
                max_size: take(options, "max_size")?,
                uuid: None,
                hugepages: match options.remove("hugepages") {
                    None | Some("no") => HugePagesMode::No,
                    Some("transparent") => HugePagesMode::Transparent,
                    Some("try" | "true") => HugePagesMode::Try,
                    Some(other) => {
                        return Err(format!(
                            "hugepages={other}: expected no, transparent or try"
                        ));
                    }
                },
                atomic_blocks: true,
                depth: DEFAULT_DEPTH,
            })),
            "file" | "uring" | "aio" => {
                let filename = PathBuf::from(argument);
                let stem = filename
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned());
                Ok(Self::File(FileConfig {
                    name: name.or(stem).unwrap_or_else(|| "file".to_owned()),
                    filename,
                    block_size,
                    readonly: take(options, "readonly")?.unwrap_or(false),
                    share_rw: take(options, "share_rw")?.unwrap_or(false),
                    direct: match options.remove("direct") {
                        None | Some("auto") => DirectMode::Auto,
                        Some("on" | "true") => DirectMode::On,
                        Some("off" | "false") => DirectMode::Off,
                        Some(other) => {
                            return Err(format!("direct={other}: expected auto, on or off"));
                        }
                    },
                    uuid: None,
                    depth: DEFAULT_DEPTH,
                }))
            }
            other => Err(format!(
                "no device type {other:?} has a short form (null, ram, file)"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteSize;

    #[test]
    fn short_forms() {
        let BdevConfig::Ram(ram) = "ram:1G,block_size=4096,max_size=2G".parse().unwrap() else {
            panic!()
        };
        assert_eq!(
            (ram.size, ram.block_size, ram.max_size),
            (Some(ByteSize(1 << 30)), 4096, Some(ByteSize(2 << 30)))
        );
        let BdevConfig::File(file) = "file:/x/disk.img,readonly,direct=on".parse().unwrap() else {
            panic!()
        };
        assert_eq!(
            (file.name.as_str(), file.readonly, file.direct),
            ("disk", true, DirectMode::On)
        );
        for text in [
            "",
            "ram",
            "ram:",
            "ram:x",
            "tape:1G",
            "ram:1G,colour=red",
            "file:x,direct=perhaps",
            "ram:1G,block_size=a",
        ] {
            assert!(
                matches!(text.parse::<BdevConfig>(), Err(Error::Config { .. })),
                "{text}"
            );
        }
    }
}
