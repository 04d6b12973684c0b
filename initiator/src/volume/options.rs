//! How a volume deals with its paths: the words of nvme-cli with their meanings.

use std::time::Duration;

use crate::Error;

/// Which of several equally good paths a request takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPolicy {
    /// One after the other.
    RoundRobin,
    /// The one with the fewest requests outstanding.
    #[default]
    QueueDepth,
    /// The one that would be through with its requests first, by the moving average of its latency.
    Latency,
}

/// What happens to requests while there is no usable path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoPath {
    /// They wait: for ever, or for `fast_io_fail_tmo` when that is set. A channel's depth bounds how many.
    #[default]
    Queue,
    /// They fail when there has been no path for `fast_io_fail_tmo`, 5 s when that is not set.
    Fail,
}

/// Whether a write waits while an older one to the same blocks may still be carried out by a path that is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteFence {
    /// It does: no write is ever overtaken by an older one. After a path that ended without a word, a write to blocks
    /// that had a write outstanding there waits for twice the keep-alive time-out.
    #[default]
    Strict,
    /// It does not, as with the Linux host: a target that a network failure cut off may later overwrite new data with old.
    Off,
}

/// How a volume deals with its paths. `Default` gives what is said at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultipathOptions {
    /// Which path a request takes. Default: queue depth.
    pub iopolicy: IoPolicy,
    /// Without a path. Default: requests wait.
    pub no_path: NoPath,
    /// Longest pause between two attempts to reconnect; pauses start at 50 ms and double. Default 10 s.
    pub reconnect_delay: Duration,
    /// How long a lost path is tried; `None`: for ever. Default 600 s. When all paths are given up, requests fail.
    pub ctrl_loss_tmo: Option<Duration>,
    /// How long requests wait without a usable path; `None`: see [`NoPath`]. Default `None`.
    pub fast_io_fail_tmo: Option<Duration>,
    /// Order of writes across fail-over. Default strict.
    pub write_fence: WriteFence,
    /// Command quiesce time: how long a target may take, after it ended a connection, until no command of it changes
    /// data any more, packets in the network included. A controller that reports a longer one (CQT) is believed.
    /// Default 500 ms.
    pub cqt: Duration,
}

impl Default for MultipathOptions {
    fn default() -> Self {
        MultipathOptions {
            iopolicy: IoPolicy::default(),
            no_path: NoPath::default(),
            reconnect_delay: Duration::from_secs(10),
            ctrl_loss_tmo: Some(Duration::from_secs(600)),
            fast_io_fail_tmo: None,
            write_fence: WriteFence::default(),
            cqt: Duration::from_millis(500),
        }
    }
}

/// [`NoPath::Fail`] without a `fast_io_fail_tmo`.
const FAIL_AFTER: Duration = Duration::from_secs(5);

impl MultipathOptions {
    /// The words of [`set`](Self::set).
    pub const WORDS: [&str; 7] = [
        "iopolicy",
        "no_path",
        "reconnect_delay",
        "ctrl_loss_tmo",
        "fast_io_fail_tmo",
        "write_fence",
        "cqt_ms",
    ];

    /// Sets one option by its word: `iopolicy` (`round-robin`, `queue-depth`, `latency`), `no_path` (`queue`, `fail`),
    /// `reconnect_delay`, `ctrl_loss_tmo`, `fast_io_fail_tmo` (seconds, also fractions; of the latter two `-1` is for ever),
    /// `write_fence` (`strict`, `off`), `cqt_ms`.
    pub fn set(&mut self, word: &str, value: &str) -> Result<(), Error> {
        let wrong = |allowed: &str| Error::Option {
            name: word.to_owned(),
            reason: format!("'{value}' is not {allowed}"),
        };
        match word {
            "iopolicy" => {
                self.iopolicy = match value {
                    "round-robin" => IoPolicy::RoundRobin,
                    "queue-depth" => IoPolicy::QueueDepth,
                    "latency" => IoPolicy::Latency,
                    _ => return Err(wrong("round-robin, queue-depth or latency")),
                }
            }
            "no_path" => {
                self.no_path = match value {
                    "queue" => NoPath::Queue,
                    "fail" => NoPath::Fail,
                    _ => return Err(wrong("queue or fail")),
                }
            }
            "reconnect_delay" => {
                self.reconnect_delay = seconds(value)
                    .flatten()
                    .filter(|delay| !delay.is_zero())
                    .ok_or_else(|| wrong("a number of seconds above 0"))?;
            }
            "ctrl_loss_tmo" => {
                self.ctrl_loss_tmo =
                    seconds(value).ok_or_else(|| wrong("a number of seconds, or -1 for ever"))?;
            }
            "fast_io_fail_tmo" => {
                self.fast_io_fail_tmo =
                    seconds(value).ok_or_else(|| wrong("a number of seconds, or -1 for ever"))?;
            }
            "write_fence" => {
                self.write_fence = match value {
                    "strict" => WriteFence::Strict,
                    "off" => WriteFence::Off,
                    _ => return Err(wrong("strict or off")),
                }
            }
            "cqt_ms" => {
                self.cqt = value
                    .parse()
                    .map(Duration::from_millis)
                    .map_err(|_| wrong("a number of milliseconds"))?;
            }
            _ => {
                return Err(Error::Option {
                    name: word.to_owned(),
                    reason: "there is no such option".into(),
                });
            }
        }
        Ok(())
    }

    /// How long requests wait for a path; `None`: for ever.
    pub(crate) fn patience(&self) -> Option<Duration> {
        match self.no_path {
            NoPath::Queue => self.fast_io_fail_tmo,
            NoPath::Fail => Some(self.fast_io_fail_tmo.unwrap_or(FAIL_AFTER)),
        }
    }
}

/// Outer `None`: no such number; inner: for ever.
fn seconds(value: &str) -> Option<Option<Duration>> {
    if value == "-1" {
        return Some(None);
    }
    let seconds: f64 = value.parse().ok()?;
    // A year: beyond, the sums of times would end somewhere.
    (0.0..=31_536_000.0)
        .contains(&seconds)
        .then(|| Some(Duration::from_secs_f64(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_known_and_checked() {
        let mut options = MultipathOptions::default();
        for (word, value) in [
            ("iopolicy", "latency"),
            ("no_path", "fail"),
            ("reconnect_delay", "0.5"),
            ("ctrl_loss_tmo", "-1"),
            ("fast_io_fail_tmo", "2"),
            ("write_fence", "off"),
            ("cqt_ms", "100"),
        ] {
            assert!(MultipathOptions::WORDS.contains(&word));
            options.set(word, value).unwrap();
            let error = options.set(word, "gibberish").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let expected = MultipathOptions {
            iopolicy: IoPolicy::Latency,
            no_path: NoPath::Fail,
            reconnect_delay: Duration::from_millis(500),
            ctrl_loss_tmo: None,
            fast_io_fail_tmo: Some(Duration::from_secs(2)),
            write_fence: WriteFence::Off,
            cqt: Duration::from_millis(100),
        };
        assert_eq!(options, expected);
        for (word, value) in [
            ("reconnect_delay", "0"),
            ("reconnect_delay", "-1"),
            ("ctrl_loss_tmo", "-2"),
            ("fast_io_fail_tmo", "NaN"),
            ("fast_io_fail_tmo", "1e99"),
            ("color", "red"),
        ] {
            assert!(options.set(word, value).is_err(), "{word}={value}");
        }
    }

    #[test]
    fn who_waits_how_long() {
        let mut options = MultipathOptions::default();
        assert_eq!(options.patience(), None);
        options.no_path = NoPath::Fail;
        assert_eq!(options.patience(), Some(FAIL_AFTER));
        options.fast_io_fail_tmo = Some(Duration::ZERO);
        assert_eq!(options.patience(), Some(Duration::ZERO));
        options.no_path = NoPath::Queue;
        assert_eq!(options.patience(), Some(Duration::ZERO));
    }
}
