//! /etc/flexblk/attach.toml: what is attached at boot.
//!
//! Each `[[attach]]` table is a command line of `flexblk attach`: `name`, `target`, and long options by their names. It
//! is parsed as one, so file and command line cannot differ.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::parser::ValueSource;
use clap::{ArgAction, CommandFactory as _, Parser as _};
use toml::de::{DeTable, DeValue};

use super::args::Attach;
use super::state::Name;
use crate::args::{Action, Cli};
use crate::exit::Usage;

/// Where it is unless `--config` says otherwise.
pub(super) const DEFAULT: &str = "/etc/flexblk/attach.toml";
/// Options that are not of an attachment, or have a key of their own.
const NOT_KEYS: [&str; 8] = [
    "as",
    "config",
    "entry",
    "all",
    "persist",
    "foreground",
    "detached",
    "verbose",
];

/// One attachment.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Name,
    pub(super) attach: Attach,
}

/// A text with its name, for messages.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    /// `FILE:LINE: KEY: reason`.
    fn wrong(&self, span: &Range<usize>, key: &str, reason: &str) -> anyhow::Error {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let key = if key.is_empty() {
            String::new()
        } else {
            format!("{key}: ")
        };
        let reason = reason.trim().replace('\n', " ");
        Usage(format!("{}:{line}: {key}{reason}", self.path.display())).into()
    }
}

/// Every entry; none when there is no file.
pub(super) fn load(path: &Path) -> Result<Vec<Entry>> {
    match fs::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// The entry of that name.
pub(super) fn find(path: &Path, name: &Name) -> Result<Attach> {
    load(path)?
        .into_iter()
        .find(|entry| entry.name == *name)
        .map(|entry| entry.attach)
        .with_context(|| format!("{}: there is no entry {name}", path.display()))
}

fn parse(path: &Path, text: &str) -> Result<Vec<Entry>> {
    let source = Source { path, text };
    let root = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        source.wrong(&span, "", error.message())
    })?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = HashSet::new();
    for (key, value) in root.get_ref() {
        if key.get_ref() != "attach" {
            let reason = "there is no such key; an attachment begins with [[attach]]";
            return Err(source.wrong(&key.span(), key.get_ref(), reason));
        }
        let DeValue::Array(tables) = value.get_ref() else {
            return Err(source.wrong(&key.span(), "attach", "write [[attach]]"));
        };
        for table in tables.iter() {
            let DeValue::Table(keys) = table.get_ref() else {
                return Err(source.wrong(&table.span(), "attach", "write [[attach]]"));
            };
            let entry = entry(&source, &table.span(), keys)?;
            if !names.insert(entry.name.as_str().to_owned()) {
                return Err(source.wrong(&table.span(), "name", "two entries have this name"));
            }
            entries.push(entry);
        }
    }
    Ok(entries)
}

fn entry(source: &Source<'_>, at: &Range<usize>, table: &DeTable<'_>) -> Result<Entry> {
    let command = attach_command();
    let mut arguments: Vec<OsString> = vec!["flexblk".into(), "attach".into()];
    let mut name = None;
    for (key, value) in table {
        let word: &str = key.get_ref();
        let wrong = |reason: &str| source.wrong(&key.span(), word, reason);
        if word == "name" {
            let DeValue::String(text) = value.get_ref() else {
                return Err(wrong("must be a string"));
            };
            name = Some(Name::parse(text).map_err(|reason| wrong(&reason))?);
            continue;
        }
        let values = texts(value.get_ref()).ok_or_else(|| {
            wrong("must be a string, a number, true or false, or an array of strings")
        })?;
        if word == "target" {
            arguments.extend(values.into_iter().map(OsString::from));
            continue;
        }
        let known = command
            .get_arguments()
            .find(|argument| argument.get_long() == Some(word) && !NOT_KEYS.contains(&word));
        let Some(argument) = known else {
            return Err(wrong("there is no such option of `flexblk attach`"));
        };
        if matches!(argument.get_action(), ArgAction::SetTrue) {
            match values.as_slice() {
                [value] if value == "true" => arguments.push(format!("--{word}").into()),
                [value] if value == "false" => {}
                _ => return Err(wrong("must be true or false")),
            }
        } else {
            arguments.extend(
                values
                    .iter()
                    .map(|value| format!("--{word}={value}").into()),
            );
        }
    }
    let Some(name) = name else {
        return Err(source.wrong(at, "name", "is missing in this [[attach]]"));
    };
    let parsed = Cli::try_parse_from(&arguments).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let first = first.strip_prefix("error: ").unwrap_or(first);
        source.wrong(at, name.as_str(), first)
    })?;
    let Action::Attach(mut attach) = parsed.command else {
        return Err(source.wrong(at, name.as_str(), "is no attachment"));
    };
    if attach.address.is_empty() {
        return Err(source.wrong(at, "target", "is missing in this [[attach]]"));
    }
    attach.name = Some(name.clone());
    Ok(Entry {
        name,
        attach: *attach,
    })
}

fn attach_command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
        .find_subcommand("attach")
        .cloned()
        .unwrap_or(command)
}

fn texts(value: &DeValue<'_>) -> Option<Vec<String>> {
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    };
    match value {
        DeValue::Array(values) => values.iter().map(|value| one(value.get_ref())).collect(),
        value => Some(vec![one(value)?]),
    }
}

/// Refuses a name that has an entry.
pub(super) fn check_new(path: &Path, name: &Name) -> Result<()> {
    if load(path)?.iter().any(|entry| entry.name == *name) {
        bail!("{}: there is an entry {name} already", path.display());
    }
    Ok(())
}

/// Adds the command line that this process was called with, under `name`.
pub(super) fn persist(path: &Path, name: &Name) -> Result<()> {
    check_new(path, name)?;
    let matches = Cli::command().get_matches_from(std::env::args_os());
    let (_, given) = matches.subcommand().context("there is a command")?;
    let mut text = fs::read_to_string(path).unwrap_or_default();
    if !text.is_empty() && !text.ends_with("\n\n") {
        text.push('\n');
    }
    text += &format!("[[attach]]\nname = {}\n", quoted(name.as_str()));
    for argument in attach_command().get_arguments() {
        let id = argument.get_id().as_str();
        let key = argument.get_long().unwrap_or("target");
        // Not every argument of the command is one of the parsed ones: `help`.
        let source = given
            .try_contains_id(id)
            .is_ok()
            .then(|| given.value_source(id));
        if NOT_KEYS.contains(&key) || source.flatten() != Some(ValueSource::CommandLine) {
            continue;
        }
        if matches!(argument.get_action(), ArgAction::SetTrue) {
            text += &format!("{key} = true\n");
            continue;
        }
        let values: Vec<String> = given
            .get_raw(id)
            .into_iter()
            .flatten()
            .map(|value| quoted(&value.to_string_lossy()))
            .collect();
        match values.as_slice() {
            [value] => text += &format!("{key} = {value}\n"),
            values => text += &format!("{key} = [{}]\n", values.join(", ")),
        }
    }
    // What was written is what will be read.
    parse(path, &text)?;
    replace(path, &text)
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Removes the entry of that name; false when there is none.
pub(super) fn forget(path: &Path, name: &Name) -> Result<bool> {
    let entries = load(path)?;
    let Some(index) = entries.iter().position(|entry| entry.name == *name) else {
        return Ok(false);
    };
    let text = fs::read_to_string(path)?;
    let mut kept = String::new();
    let mut number = None;
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with("[[attach]]") {
            number = Some(number.map_or(0, |number: usize| number + 1));
        }
        if number != Some(index) {
            kept += line;
        }
    }
    // Somebody's own layout may be one that this does not understand.
    let left = parse(path, &kept)?;
    if left.len() + 1 != entries.len() || left.iter().any(|entry| entry.name == *name) {
        bail!("{}: remove the entry {name} by hand", path.display());
    }
    replace(path, &kept)?;
    Ok(true)
}

/// The whole file or nothing.
fn replace(path: &Path, text: &str) -> Result<()> {
    let failed = || format!("{}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(failed)?;
    }
    let fresh = PathBuf::from(format!("{}.new", path.display()));
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors_of(text: &str) -> String {
        parse(Path::new("attach.toml"), text)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn an_entry_is_a_command_line() {
        let text = r#"
[[attach]]
name = "data"
target = "nvme+tcp://192.0.2.7/nqn.2026-11.io.example:disk1"
path = ["nvme+tcp://192.0.2.8/nqn.2026-11.io.example:disk1"]
io-timeout = "10s"
nr-io-queues = 2
no-partitions = true
ctrl-loss-tmo = -1

[[attach]]
name = "more"
traddr = "192.0.2.7"
nqn = "nqn.2026-11.io.example:disk2"
"#;
        let entries = parse(Path::new("attach.toml"), text).unwrap();
        let [data, more] = entries.as_slice() else {
            panic!("two entries");
        };
        assert_eq!(data.attach.nr_io_queues, 2);
        assert!(data.attach.no_partitions && !more.attach.no_partitions);
        assert_eq!(data.attach.paths.more.len(), 1);
        assert_eq!(data.attach.paths.options().unwrap().ctrl_loss_tmo, None);
        assert_eq!(more.attach.name.as_ref().unwrap().as_str(), "more");
    }

    #[test]
    fn mistakes_name_file_line_and_key() {
        let entry = "[[attach]]\nname = \"a\"\ntarget = \"t\"\n";
        for (text, error) in [
            ("[[attach]\n".to_owned(), "attach.toml:1: "),
            ("\ncolour = 1\n".to_owned(), "attach.toml:2: colour: "),
            (
                "[[attach]]\ntarget = \"t\"\n".to_owned(),
                "attach.toml:1: name: ",
            ),
            (
                "[[attach]]\nname = \"a\"\n".to_owned(),
                "attach.toml:1: target: ",
            ),
            (
                "[[attach]]\nname = \"a/b\"\n".to_owned(),
                "attach.toml:2: name: ",
            ),
            (format!("{entry}colour = 1\n"), "attach.toml:4: colour: "),
            (
                format!("{entry}persist = true\n"),
                "attach.toml:4: persist: ",
            ),
            (
                format!("{entry}no-partitions = 3\n"),
                "attach.toml:4: no-partitions: ",
            ),
            (format!("{entry}nr-io-queues = 0\n"), "attach.toml:1: a: "),
            (format!("{entry}{entry}"), "attach.toml:4: name: "),
        ] {
            let found = errors_of(&text);
            assert!(found.starts_with(error), "{text}: {found}");
            assert_eq!(found.lines().count(), 1, "{found}");
        }
    }

    #[test]
    fn an_entry_is_forgotten_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("attach.toml");
        let text = "# mine\n[[attach]]\nname = \"a\"\ntarget = \"t\"\n\n[[attach]]\nname = \"b\"\ntarget = \"u\"\n";
        fs::write(&path, text).unwrap();
        let name = |text: &str| Name::parse(text).unwrap();
        assert!(!forget(&path, &name("c")).unwrap());
        assert!(forget(&path, &name("a")).unwrap());
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, "# mine\n[[attach]]\nname = \"b\"\ntarget = \"u\"\n");
        assert!(find(&path, &name("b")).is_ok() && find(&path, &name("a")).is_err());
    }
}
