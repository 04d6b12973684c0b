//! Arguments of everything that serves a namespace: the paths to it, and what happens when they fail.

use clap::Args;
use flexblk_initiator::Error;
use flexblk_initiator::volume::MultipathOptions;

#[derive(Args, Debug)]
pub(crate) struct Paths {
    /// One more address of the same namespace, as TARGET; may be repeated, and transports may be mixed.
    #[arg(long = "path", value_name = "TARGET", help_heading = "Paths")]
    pub(crate) more: Vec<String>,
    /// Which of equally good paths a request takes: `round-robin`, `queue-depth` or `latency` [default: queue-depth].
    #[arg(long, value_name = "POLICY", help_heading = "Paths")]
    iopolicy: Option<String>,
    /// Without a path, I/O waits (`queue`), or fails after --fast_io_fail_tmo (`fail`) [default: queue].
    #[arg(long, value_name = "POLICY", help_heading = "Paths")]
    policy: Option<String>,
    /// Longest pause between two attempts to reconnect, in seconds [default: 10].
    #[arg(
        short = 'c',
        long,
        value_name = "SECONDS",
        help_heading = "Paths",
        allow_negative_numbers = true
    )]
    reconnect_delay: Option<String>,
    /// How long a lost path is tried, in seconds; -1 is for ever [default: 600]. When all are given up, I/O fails.
    #[arg(
        short = 'l',
        long,
        value_name = "SECONDS",
        help_heading = "Paths",
        allow_negative_numbers = true
    )]
    ctrl_loss_tmo: Option<String>,
    /// How long I/O waits without a path, in seconds; -1 is for ever [default: for ever; with --policy fail: 5].
    #[arg(
        long = "fast_io_fail_tmo",
        visible_alias = "fast-io-fail-tmo",
        value_name = "SECONDS",
        help_heading = "Paths",
        allow_negative_numbers = true
    )]
    fast_io_fail_tmo: Option<String>,
    /// Whether a write waits while an older one to the same blocks may still be carried out by a lost path: `strict`
    /// or `off` [default: strict].
    #[arg(long, value_name = "MODE", help_heading = "Paths")]
    write_fence: Option<String>,
    /// How long a target that ended a connection may still carry out its commands, in milliseconds; one that reports
    /// a longer time is believed [default: 500].
    #[arg(long, value_name = "MILLISECONDS", help_heading = "Paths")]
    cqt_ms: Option<String>,
}

impl Paths {
    /// How a volume deals with its paths.
    pub(crate) fn options(&self) -> Result<MultipathOptions, Error> {
        let mut options = MultipathOptions::default();
        for (word, value) in [
            ("iopolicy", &self.iopolicy),
            ("no_path", &self.policy),
            ("reconnect_delay", &self.reconnect_delay),
            ("ctrl_loss_tmo", &self.ctrl_loss_tmo),
            ("fast_io_fail_tmo", &self.fast_io_fail_tmo),
            ("write_fence", &self.write_fence),
            ("cqt_ms", &self.cqt_ms),
        ] {
            if let Some(value) = value {
                options.set(word, value)?;
            }
        }
        Ok(options)
    }
}
