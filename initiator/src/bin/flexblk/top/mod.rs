//! `flexblk top`: who does what on a target, and where the time goes, as it happens.

mod load;
mod screen;
mod table;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use flexblk_rpc::{DEFAULT_SOCKET, RpcClient};
use serde_json::json;

use crate::size;
use load::{Load, Sample};
use screen::{Key, Screen};

/// Shortest time between two looks: a target with thousands of hosts has a lot to say.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args, Debug)]
pub(crate) struct Top {
    /// RPC socket of the target.
    #[arg(short, long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    rpc_socket: PathBuf,
    /// Time between two looks; rates are averages over it.
    #[arg(short, long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    interval: Duration,
    /// Look at one interval and end.
    #[arg(long)]
    once: bool,
    /// Print one JSON object for each interval.
    #[arg(long)]
    json: bool,
    /// What the busiest are the first by.
    #[arg(long, value_enum, default_value = "iops")]
    sort: Sort,
}

/// What makes a line come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// Commands in a second.
    Iops,
    /// Bytes in a second.
    Bandwidth,
    /// Mean time of a command.
    Latency,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = size::parse_duration(text)?;
    match interval >= MIN_INTERVAL {
        true => Ok(interval),
        false => Err("at least 100ms".to_owned()),
    }
}

pub(crate) fn top(args: &Top) -> Result<()> {
    let mut target = RpcClient::connect(&args.rpc_socket)?;
    let before = look(&mut target)?;
    let is_live = !args.once && !args.json && screen::is_capable();
    match is_live {
        true => live(args, target, before),
        false => lines(args, target, before),
    }
}

/// What the target has counted so far.
fn look(target: &mut RpcClient) -> Result<Sample> {
    let io = target.call("flexblk_get_io", json!({}))?;
    let stats = target.call("flexblk_get_stats", json!({}))?;
    Sample::parse(io, stats).context("this target's counters are not those that flexblk top knows")
}

/// For files, pipes and terminals that cannot do more: one table, or one object, after another.
fn lines(args: &Top, mut target: RpcClient, mut before: Sample) -> Result<()> {
    let mut next = Instant::now();
    loop {
        next += args.interval;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let after = look(&mut target)?;
        let mut load = Load::between(&before, &after);
        load.sort(args.sort);
        let text = match args.json {
            true => serde_json::to_string(&load)? + "\n",
            false => table::text(&load, args.sort, None) + "\n",
        };
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
        if args.once {
            return Ok(());
        }
        before = after;
    }
}

/// A screen that is drawn anew after each interval and each key.
fn live(args: &Top, target: RpcClient, mut before: Sample) -> Result<()> {
    let mut target = Some(target);
    let mut sort = args.sort;
    let mut load = Load::between(&before, &before);
    let mut note = "counting".to_owned();
    let mut screen = Screen::open()?;
    let mut next = Instant::now() + args.interval;
    loop {
        load.sort(sort);
        screen.draw(|size| table::screen(&load, sort, &note, size))?;
        match screen.wait(next.saturating_duration_since(Instant::now()))? {
            Some(Key::Quit) => return Ok(()),
            Some(Key::Sort(by)) => sort = by,
            Some(Key::Other) => {}
            None => {
                next = Instant::now() + args.interval;
                let seen = match target.as_mut() {
                    Some(target) => look(target),
                    // It may be back.
                    None => RpcClient::connect(&args.rpc_socket)
                        .map_err(Into::into)
                        .and_then(|mut new| look(&mut new).map(|seen| (new, seen)))
                        .map(|(new, seen)| {
                            target = Some(new);
                            seen
                        }),
                };
                match seen {
                    Ok(after) => {
                        load = Load::between(&before, &after);
                        before = after;
                        note.clear();
                    }
                    Err(error) => {
                        target = None;
                        note = format!("{error:#}");
                    }
                }
            }
        }
    }
}
