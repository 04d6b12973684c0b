//! Writes cpio archives of the `newc` kind, which the kernel unpacks as an initramfs (Documentation:
//! `driver-api/early-userspace/buffer-format.rst`).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// File types of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Everything in it belongs to root.
pub(super) struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Archive<W> {
        Archive { out, inode: 0 }
    }

    /// A folder; its parents must have been written before.
    pub(super) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// A file that everybody may read and run.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | 0o755, (0, 0), content)
    }

    /// A file that everybody may read.
    pub(super) fn plain(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | 0o644, (0, 0), content)
    }

    /// A copy of a file or a symbolic link, with its permissions.
    pub(super) fn copy(&mut self, path: &str, source: &Path) -> io::Result<()> {
        let metadata = fs::symlink_metadata(source)?;
        if metadata.is_symlink() {
            let target = fs::read_link(source)?;
            return self.entry(
                path,
                SYMLINK | 0o777,
                (0, 0),
                target.as_os_str().as_encoded_bytes(),
            );
        }
        let mode = metadata.permissions().mode() & 0o7777;
        self.entry(path, REGULAR | mode, (0, 0), &fs::read(source)?)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub(super) fn device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.inode += 1;
        let len = u32::try_from(content.len())
            .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, path.to_owned()))?;
        let name_len = path.len() as u32 + 1;
        let fields = [
            self.inode, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0,
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(path.as_bytes())?;
        // The header has 110 bytes; name and content each end on a multiple of four.
        self.out.write_all(&[0])?;
        self.pad(110 + path.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, len: usize) -> io::Result<()> {
        let padding = len.next_multiple_of(4) - len;
        self.out
            .write_all([0; 3].get(..padding).unwrap_or_default())
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn entries_start_on_multiples_of_four() -> io::Result<()> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("d")?;
        archive.file("d/f", b"hello")?;
        archive.symlink("d/s", "f")?;
        archive.device("d/console", 5, 1)?;
        let bytes = archive.finish()?;
        let starts: Vec<usize> = bytes
            .windows(6)
            .enumerate()
            .filter_map(|(at, window)| (window == b"070701").then_some(at))
            .collect();
        assert_eq!(starts.len(), 5, "four entries and the trailer");
        assert!(starts.iter().all(|start| start % 4 == 0), "{starts:?}");
        let file = bytes
            .get(*starts.get(1).unwrap_or(&0)..)
            .unwrap_or_default();
        let text = String::from_utf8_lossy(file.get(..110).unwrap_or_default()).into_owned();
        assert_eq!(text.get(14..22), Some("000081ED"), "mode of a file");
        assert_eq!(text.get(54..62), Some("00000005"), "length of its content");
        assert_eq!(text.get(94..102), Some("00000004"), "length of its name");
        Ok(())
    }
}
