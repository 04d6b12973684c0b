//! Who uses a block device.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Everybody who uses `device` or a partition of it, but process `except`: mounts, swap, devices on top, and programs
/// that have it open. In words, for a message.
pub(super) fn of(device: &Path, except: i32) -> Vec<String> {
    let nodes = nodes(device);
    let numbers: Vec<String> = nodes.iter().filter_map(|node| number(node)).collect();
    let mut users = Vec::new();
    for table in mount_tables() {
        for line in table.lines() {
            let mut words = line.split(' ').skip(2);
            if let Some(number) = words.next()
                && numbers.iter().any(|ours| ours == number)
            {
                let place = words.nth(1).unwrap_or_default();
                let mounted = format!("mounted on {}", unescape(place));
                if !users.contains(&mounted) {
                    users.push(mounted);
                }
            }
        }
    }
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for line in text.lines().skip(1) {
        let path = line.split_whitespace().next().unwrap_or_default();
        if nodes.iter().any(|node| node == Path::new(path)) {
            users.push("used as swap".into());
        }
    }
    for node in &nodes {
        for holder in holders(node) {
            users.push(format!("below /dev/{holder}"));
        }
    }
    users.extend(openers(&nodes, except));
    users
}

/// What is mounted in each mount namespace that a process has, ours first.
fn mount_tables() -> Vec<String> {
    let (mut seen, mut tables) = (HashSet::new(), Vec::new());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ours = std::iter::once(PathBuf::from("/proc/self"));
    for process in ours.chain(processes.map(|entry| entry.path())) {
        if let Ok(namespace) = fs::read_link(process.join("ns/mnt"))
            && seen.insert(namespace)
            && let Ok(table) = fs::read_to_string(process.join("mountinfo"))
        {
            tables.push(table);
        }
    }
    tables
}

/// The device and its partitions.
pub(super) fn nodes(device: &Path) -> Vec<PathBuf> {
    let Some(name) = device.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let mut nodes = vec![device.to_owned()];
    let entries = fs::read_dir(Path::new("/sys/class/block").join(name));
    for entry in entries.into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            nodes.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    nodes
}

fn sysfs(node: &Path) -> PathBuf {
    Path::new("/sys/class/block").join(node.file_name().unwrap_or_default())
}

/// `MAJOR:MINOR`.
fn number(node: &Path) -> Option<String> {
    let text = fs::read_to_string(sysfs(node).join("dev")).ok()?;
    Some(text.trim().to_owned())
}

fn holders(node: &Path) -> Vec<String> {
    let entries = fs::read_dir(sysfs(node).join("holders"));
    entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn openers(nodes: &[PathBuf], except: i32) -> Vec<String> {
    let mut openers = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process
            .file_name()
            .to_str()
            .and_then(|pid| pid.parse().ok());
        let Some(pid) = pid.filter(|pid: &i32| *pid != except) else {
            continue;
        };
        let files = fs::read_dir(process.path().join("fd"));
        let has_it = files
            .into_iter()
            .flatten()
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|target| nodes.contains(&target)));
        if has_it {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            openers.push(format!("open in {} (process {pid})", program.trim()));
        }
    }
    openers
}

/// Spaces and the like are octal in mountinfo (`\040`).
pub(super) fn unescape(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        plain.push_str(before);
        match after
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok())
        {
            Some(code) => {
                plain.push(char::from(code));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                plain.push('\\');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/x\9"), r"/x\9");
    }
}
