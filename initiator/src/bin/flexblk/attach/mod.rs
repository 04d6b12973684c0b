//! `flexblk attach`, `detach`, and `list` without an address: remote namespaces as block devices of this host.
//!
//! Each attachment is a process of its own (`serve.rs`), so that a crash takes one device with it. What the others
//! need to know of it is in its folder under /run/flexblk (`state.rs`), and it answers on a socket there
//! (`control.rs`).

mod args;
mod connect_all;
mod control;
mod detach;
mod launch;
mod list;
mod notify;
mod serve;
mod state;
mod users;

use anyhow::Result;

pub(crate) use args::{Attach, Detach, Multipath};
pub(crate) use connect_all::{ConnectAll, connect_all};
pub(crate) use detach::detach;
pub(crate) use list::list;

/// Attaches in a process of its own, or, `--foreground`, in this one.
pub(crate) fn attach(args: &Attach) -> Result<()> {
    if args.foreground || args.detached {
        serve::serve(args)
    } else {
        launch::launch()
    }
}
