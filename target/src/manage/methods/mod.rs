//! The methods, by subject. Names, parameters and results are SPDK's where a method means the same;
//! what only this target has begins with `flexblk_`.

pub(crate) mod ana;
mod bdev;
mod bdev_error;
mod capture;
pub(crate) mod discovery;
mod framework;
mod io;
pub(crate) mod iostat;
pub(crate) mod listeners;
mod log;
pub(crate) mod masking;
mod nvmf;
mod reports;
mod state;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::cores::CoreTimes;
use super::jsonrpc::RpcError;
use super::log::LogControl;
use super::params::Params;
use super::server::Lane;
use crate::target::Target;

pub(crate) use bdev::says_all;

/// What methods work on.
pub(crate) struct Context {
    pub(crate) target: Arc<Target>,
    pub(crate) log: Option<Arc<LogControl>>,
    pub(crate) signal: Option<Box<dyn Fn(i32) + Send + Sync>>,
    /// Where to keep what runs.
    pub(crate) state_file: Option<PathBuf>,
    /// Where the processors' time had gone when management was started.
    pub(crate) core_times: BTreeMap<usize, CoreTimes>,
}

type Result<T = Value> = core::result::Result<T, RpcError>;

/// A method.
pub(crate) struct Method {
    name: &'static str,
    pub(crate) lane: Lane,
    pub(crate) run: fn(&Context, Params) -> Result,
}

const fn query(name: &'static str, run: fn(&Context, Params) -> Result) -> Method {
    Method {
        name,
        lane: Lane::Query,
        run,
    }
}

const fn change(name: &'static str, run: fn(&Context, Params) -> Result) -> Method {
    Method {
        name,
        lane: Lane::Change,
        run,
    }
}

fn all() -> impl Iterator<Item = &'static Method> {
    let groups = [
        framework::METHODS,
        log::METHODS,
        bdev::METHODS,
        bdev_error::METHODS,
        nvmf::METHODS,
        listeners::METHODS,
        ana::METHODS,
        masking::METHODS,
        discovery::METHODS,
        reports::METHODS,
        capture::METHODS,
        io::METHODS,
        iostat::METHODS,
        state::METHODS,
    ];
    groups.into_iter().flatten()
}

/// The method of that name.
pub(crate) fn find(name: &str) -> Option<&'static Method> {
    all().find(|method| method.name == name)
}

/// Every method's name.
fn names() -> Vec<&'static str> {
    let mut names: Vec<&'static str> = all().map(|method| method.name).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    /// A name is listed once: the second one would never be called.
    #[test]
    fn names_differ() {
        let mut names = super::names();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
