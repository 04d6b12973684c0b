//! `flexblk attach`, `detach`, and `list` without an address: remote namespaces as block devices of this host.
//!
//! Each attachment is a process of its own (`serve.rs`), so that a crash takes one device with it. What the others
//! need to know of it is in its folder under /run/flexblk (`state.rs`), and it answers on a socket there
//! (`control.rs`).

mod args;
mod backend;
mod boot;
mod config;
mod connect_all;
mod control;
mod detach;
mod launch;
mod list;
mod notify;
mod serve;
mod state;
mod users;
mod write_back;

use anyhow::Result;

pub(crate) use args::{Attach, Detach, Generator, Shutdown};
pub(crate) use boot::{generate, shutdown};
pub(crate) use connect_all::{ConnectAll, connect_all};
pub(crate) use detach::detach;
pub(crate) use list::list;

/// Attaches in a process of its own, or, `--foreground`, in this one.
pub(crate) fn attach(args: &Attach) -> Result<()> {
    if args.all {
        return boot::attach_all(&args.config);
    }
    if args.foreground || args.detached {
        return match &args.entry {
            None => serve::serve(args),
            Some(name) => {
                let mut entry = config::find(&args.config, name)?;
                (entry.foreground, entry.detached) = (args.foreground, args.detached);
                serve::serve(&entry)
            }
        };
    }
    if let (true, Some(name)) = (args.persist, &args.name) {
        // Before the device is there, which would stay when this fails.
        config::check_new(&args.config, name)?;
    }
    let (name, ready) = launch::launch(std::env::args_os().skip(1))?;
    let told = ready.tell();
    if args.persist {
        config::persist(&args.config, &name)?;
    }
    told
}
