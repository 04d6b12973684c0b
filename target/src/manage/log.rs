//! What is logged, changed at run time: a level for everything, and flags for parts of the program
//! that then log everything.

use std::collections::BTreeSet;
use std::sync::Mutex;

use crate::association::lock;

/// Parts that have a flag.
pub(crate) const FLAGS: [&str; 5] = ["blockdev", "nvme", "reactor", "target", "transport"];

/// How much is logged, in SPDK's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Errors.
    Error,
    /// And warnings.
    Warning,
    /// And what an operator wants to know. With `tracing` it is the same as [`LogLevel::Info`].
    Notice,
    /// And more of it.
    Info,
    /// Everything but what happens for each I/O.
    Debug,
}

impl LogLevel {
    const ALL: [(Self, &'static str, &'static str); 5] = [
        (Self::Error, "ERROR", "error"),
        (Self::Warning, "WARNING", "warn"),
        (Self::Notice, "NOTICE", "info"),
        (Self::Info, "INFO", "info"),
        (Self::Debug, "DEBUG", "debug"),
    ];

    /// By SPDK's word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        let found = Self::ALL
            .iter()
            .find(|(_, name, _)| name.eq_ignore_ascii_case(word));
        found.map(|(level, _, _)| *level)
    }

    /// SPDK's word.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.words().0
    }

    fn words(self) -> (&'static str, &'static str) {
        let found = Self::ALL.iter().find(|(level, _, _)| *level == self);
        found.map_or(("INFO", "info"), |(_, name, filter)| (name, filter))
    }
}

/// Applies a filter in the notation of `tracing-subscriber`.
type Apply = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// The program's log, as management sees it.
pub struct LogControl {
    state: Mutex<State>,
    apply: Apply,
}

struct State {
    level: LogLevel,
    flags: BTreeSet<&'static str>,
}

impl std::fmt::Debug for LogControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogControl").finish_non_exhaustive()
    }
}

impl LogControl {
    /// A log at a level. `apply` puts another filter in force.
    pub fn new(
        level: LogLevel,
        apply: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            level,
            flags: BTreeSet::new(),
        };
        Self {
            state: Mutex::new(state),
            apply: Box::new(apply),
        }
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> LogLevel {
        lock(&self.state).level
    }

    /// Changes it.
    pub fn set_level(&self, level: LogLevel) -> Result<(), String> {
        self.change(|state| state.level = level)
    }

    pub(crate) fn flags(&self) -> Vec<(&'static str, bool)> {
        let state = lock(&self.state);
        FLAGS
            .iter()
            .map(|flag| (*flag, state.flags.contains(flag)))
            .collect()
    }

    /// Changes a flag, or all; false when there is none of that name.
    pub(crate) fn set_flag(&self, name: &str, on: bool) -> Result<bool, String> {
        let named: Vec<&'static str> = FLAGS
            .into_iter()
            .filter(|flag| name == "all" || *flag == name)
            .collect();
        if named.is_empty() {
            return Ok(false);
        }
        self.change(|state| match on {
            true => state.flags.extend(&named),
            false => state.flags.retain(|flag| !named.contains(flag)),
        })?;
        Ok(true)
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), String> {
        let mut state = lock(&self.state);
        change(&mut state);
        let mut filter = state.level.words().1.to_owned();
        for flag in &state.flags {
            filter.push(',');
            filter.push_str(match *flag {
                "transport" => "flexins",
                "blockdev" => "flexblk_blockdev",
                "nvme" => "flexblk_nvme",
                "reactor" => "flexblk_reactor",
                _ => "flexblk_target",
            });
            filter.push_str("=trace");
        }
        (self.apply)(&filter)
    }
}
