//! A real disk image: an ext4 file system made from files of this machine.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flexblk_tests::process::{find_program, run};

/// At least this much of real files goes into the image.
const WANTED_BYTES: u64 = 288 << 20;
/// Single files above this are left out: many small files are the better test.
const LARGEST_FILE_BYTES: u64 = 32 << 20;

/// What was put into an image.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) files: u64,
    pub(crate) file_bytes: u64,
    pub(crate) image_bytes: u64,
}

/// Copies a part of `/usr` to `directory` and makes an image of it with `mke2fs -d`.
pub(crate) fn create(directory: &Path) -> Result<Image> {
    let tree = directory.join("tree");
    fs::create_dir_all(&tree)?;
    let mut taken = Taken {
        files: 0,
        bytes: 0,
        rounded_bytes: 0,
    };
    for source in [
        "/usr/bin",
        "/usr/share",
        "/usr/lib",
        "/usr/include",
        "/usr/local",
    ] {
        let source = Path::new(source);
        if let Ok(relative) = source.strip_prefix("/") {
            copy_tree(source, &tree.join(relative), &mut taken)?;
        }
    }
    if taken.bytes < WANTED_BYTES {
        bail!(
            "/usr has only {} MiB of readable files, {} are needed",
            taken.bytes >> 20,
            WANTED_BYTES >> 20
        );
    }
    let path = directory.join("disk.img");
    // Room for inodes, directories and the journal.
    let image_bytes =
        (taken.rounded_bytes + taken.files * 512 + (96 << 20)).next_multiple_of(4 << 20);
    let inodes = taken.files * 5 / 4 + 4096;
    run(
        Command::new(find_program("mke2fs")?)
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-N",
                &inodes.to_string(),
                "-L",
                "flexblk-demo",
            ])
            .arg("-d")
            .arg(&tree)
            .arg(&path)
            .arg(format!("{}k", image_bytes >> 10)),
        Duration::from_secs(300),
    )?
    .success()
    .context("mke2fs")?;
    fs::remove_dir_all(&tree)?;
    Ok(Image {
        path,
        files: taken.files,
        file_bytes: taken.bytes,
        image_bytes,
    })
}

struct Taken {
    files: u64,
    bytes: u64,
    rounded_bytes: u64,
}

/// Copies regular files and symbolic links until there is enough; what cannot be read is left out.
fn copy_tree(from: &Path, to: &Path, taken: &mut Taken) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    fs::create_dir_all(to)?;
    taken.rounded_bytes += 4096;
    let mut names: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .collect();
    names.sort();
    for name in names {
        if taken.bytes >= WANTED_BYTES {
            return Ok(());
        }
        let (source, copy) = (from.join(&name), to.join(&name));
        let Ok(meta) = fs::symlink_metadata(&source) else {
            continue;
        };
        if meta.is_dir() {
            copy_tree(&source, &copy, taken)?;
        } else if meta.is_symlink() {
            let Ok(points_to) = fs::read_link(&source) else {
                continue;
            };
            std::os::unix::fs::symlink(points_to, &copy)
                .with_context(|| format!("{}", copy.display()))?;
            taken.files += 1;
        } else if meta.is_file()
            && meta.size() <= LARGEST_FILE_BYTES
            && fs::File::open(&source).is_ok()
        {
            fs::copy(&source, &copy).with_context(|| format!("{}", copy.display()))?;
            taken.files += 1;
            taken.bytes += meta.size();
            taken.rounded_bytes += meta.size().next_multiple_of(4096);
        }
    }
    Ok(())
}

/// The SHA-256 of a file, by the system's own program: nothing of ours decides whether the copy is right.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let done = run(
        Command::new("sha256sum").arg("--binary").arg(path),
        Duration::from_secs(600),
    )?
    .success()?;
    let digest = done.stdout.split_whitespace().next().unwrap_or_default();
    if digest.len() != 64 {
        bail!("sha256sum said {:?}", done.stdout);
    }
    Ok(digest.to_owned())
}

/// Checks the file system in an image, changing nothing.
pub(crate) fn check(path: &Path) -> Result<()> {
    run(
        Command::new(find_program("e2fsck")?).arg("-fn").arg(path),
        Duration::from_secs(600),
    )?
    .success()
    .with_context(|| format!("e2fsck {}", path.display()))?;
    Ok(())
}
