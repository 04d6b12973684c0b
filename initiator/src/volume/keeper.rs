//! The thread that keeps a volume's paths: connects, reconnects, follows what controllers tell.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::reconnect::Backoff;
use super::report::PathState;
use super::shared::{Shared, Up, namespace_of};
use super::{VolumeEvent, identity};
use crate::{Controller, ControllerState, Error, Event, LostReason, Namespace, Nsid};

/// How long an ANA state that changes is waited for before the page is read again.
const ANA_AGAIN: Duration = Duration::from_secs(1);
/// How long the keeper sleeps at most.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// What the keeper gets to know.
pub(super) enum Mail {
    /// An attempt to connect ended.
    Connected {
        path: usize,
        number: u64,
        result: Result<Controller, Error>,
    },
    /// A controller told something.
    Event {
        path: usize,
        number: u64,
        event: Event,
    },
    /// The volume is closed.
    Close,
}

/// How the first attempt of a path ended.
pub(super) type First = Result<(), Error>;

pub(super) struct Keeper {
    shared: Arc<Shared>,
    nsids: Vec<Option<Nsid>>,
    inbox: Receiver<Mail>,
    outbox: Sender<Mail>,
    first: mpsc::Sender<First>,
    paths: Vec<Kept>,
    random: u64,
}

struct Kept {
    backoff: Backoff,
    state: State,
    told_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting {
        until: Instant,
    },
    Connecting {
        number: u64,
    },
    Live {
        number: u64,
        ana_again: Option<Instant>,
    },
    Lost,
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        nsids: Vec<Option<Nsid>>,
        (outbox, inbox): (Sender<Mail>, Receiver<Mail>),
        first: mpsc::Sender<First>,
    ) -> Keeper {
        let options = shared.multipath;
        let now = Instant::now();
        let kept = |_: &Option<Nsid>| Kept {
            backoff: Backoff::new(options.reconnect_delay, options.ctrl_loss_tmo),
            state: State::Waiting { until: now },
            told_first: false,
        };
        let seed = uuid::Uuid::new_v4().as_u64_pair().0;
        Keeper {
            paths: nsids.iter().map(kept).collect(),
            shared,
            nsids,
            inbox,
            outbox,
            first,
            random: seed,
        }
    }

    /// Until the volume is closed.
    pub(super) fn run(mut self) {
        loop {
            let now = Instant::now();
            let mut next = now + LONGEST_SLEEP;
            for path in 0..self.paths.len() {
                if let Some(at) = self.due(path, now) {
                    next = next.min(at);
                }
            }
            let mail = self
                .inbox
                .recv_timeout(next.saturating_duration_since(Instant::now()));
            match mail {
                Ok(Mail::Connected {
                    path,
                    number,
                    result,
                }) => self.connected(path, number, result),
                Ok(Mail::Event {
                    path,
                    number,
                    event,
                }) => self.event(path, number, event),
                Ok(Mail::Close) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        self.close();
    }

    /// Does what is due on a path, and says when the next is.
    fn due(&mut self, path: usize, now: Instant) -> Option<Instant> {
        let kept = self.paths.get_mut(path)?;
        match &mut kept.state {
            State::Waiting { until } if *until <= now => {
                self.connect(path);
                None
            }
            State::Waiting { until } => Some(*until),
            State::Live { ana_again, .. } => {
                let at = (*ana_again)?;
                if at > now {
                    return Some(at);
                }
                *ana_again = None;
                if let Some(up) = self.shared.up(path) {
                    up.controller.read_ana();
                }
                None
            }
            State::Connecting { .. } | State::Lost => None,
        }
    }

    /// Starts an attempt, in a thread of its own: it may take as long as the time-outs allow.
    fn connect(&mut self, path: usize) {
        let Some(options) = self.shared.paths.get(path).map(|path| path.connect.clone()) else {
            return;
        };
        let number = self.shared.id();
        if let Some(kept) = self.paths.get_mut(path) {
            kept.state = State::Connecting { number };
        }
        let outbox = self.outbox.clone();
        let started = std::thread::Builder::new()
            .name("flexblk-connect".into())
            .spawn(move || {
                let events = outbox.clone();
                let listener = Box::new(move |event| {
                    // Fails when the volume is closed.
                    let _ = events.send(Mail::Event {
                        path,
                        number,
                        event,
                    });
                });
                let result = Controller::connect_for(&options, Some(listener));
                let _ = outbox.send(Mail::Connected {
                    path,
                    number,
                    result,
                });
            });
        if let Err(cause) = started {
            let what = "starting a thread";
            self.lost(path, Error::System { what, cause });
        }
    }

    fn connected(&mut self, path: usize, number: u64, result: Result<Controller, Error>) {
        if self.paths.get(path).map(|kept| kept.state) != Some(State::Connecting { number }) {
            return;
        }
        let up = result.and_then(|controller| {
            if let ControllerState::Lost(reason) = controller.state() {
                return Err(Error::Lost(reason));
            }
            let nsid = self.nsids.get(path).copied().flatten();
            let namespace = namespace_of(&controller, nsid)?;
            self.check(path, &namespace)?;
            let up = Up {
                number,
                controller,
                nsid: namespace.nsid,
                present: true,
            };
            Ok((up, namespace))
        });
        match up {
            Ok((up, namespace)) => {
                let address = up.controller.address();
                if let Some(kept) = self.paths.get_mut(path) {
                    kept.backoff.connected();
                    kept.state = State::Live {
                        number,
                        ana_again: None,
                    };
                }
                self.shared.set_up(path, up, namespace);
                tracing::info!(path, %address, "path up");
                self.shared.push(VolumeEvent::PathUp { path });
                self.shared.announce();
                self.tell_first(path, Ok(()));
            }
            Err(error) => self.lost(path, error),
        }
    }

    /// Whether it is the volume's namespace. The first path that is up says what that is.
    fn check(&self, path: usize, namespace: &Namespace) -> Result<(), Error> {
        let Some(volume) = self.shared.namespace() else {
            return Ok(());
        };
        identity::same(&volume, namespace).map_err(|reason| Error::OtherNamespace {
            address: self
                .shared
                .paths
                .get(path)
                .map_or_else(String::new, |path| path.connect.target.to_string()),
            reason,
        })
    }

    fn event(&mut self, path: usize, number: u64, event: Event) {
        let Some(kept) = self.paths.get_mut(path) else {
            return;
        };
        let State::Live {
            number: current,
            ana_again,
        } = &mut kept.state
        else {
            return;
        };
        if *current != number {
            return;
        }
        match event {
            Event::Lost(reason) => self.lost(path, Error::Lost(reason)),
            Event::NamespacesChanged | Event::AnaChanged => {
                let Some(up) = self.shared.up(path) else {
                    return;
                };
                let namespace = up.controller.namespace(up.nsid).ok();
                let ana = up.controller.ana_state(up.nsid);
                if ana == flexblk_nvme::log::ana::AnaState::Change {
                    *ana_again = Some(Instant::now() + ANA_AGAIN);
                }
                tracing::info!(path, ?ana, present = namespace.is_some(), "path changed");
                match namespace.as_ref().map(|found| self.check(path, found)) {
                    Some(Err(error)) => {
                        // Another namespace under the same number: nothing may go there.
                        up.controller.disconnect();
                        self.lost(path, error);
                    }
                    Some(Ok(())) | None => {
                        self.shared.set_namespace(path, namespace);
                        self.shared.announce();
                    }
                }
            }
        }
    }

    /// A path was lost, or could not be connected: when is the next attempt?
    fn lost(&mut self, path: usize, error: Error) {
        let random = self.next_random();
        let Some(kept) = self.paths.get_mut(path) else {
            return;
        };
        let was_live = matches!(kept.state, State::Live { .. });
        let next = kept.backoff.next(Instant::now(), random);
        let (state, told) = match next {
            Some(until) => (State::Waiting { until }, PathState::Connecting),
            None => (State::Lost, PathState::Lost),
        };
        kept.state = state;
        // A channel that lost an I/O queue has said why.
        let why = (!matches!(error, Error::Lost(LostReason::IoQueue))).then(|| error.to_string());
        // Its queue pairs are the channels'; the rest of it ends here.
        drop(self.shared.set_down(path, told, why));
        tracing::warn!(path, %error, state = %told, "path down");
        if was_live {
            self.shared.push(VolumeEvent::PathDown { path });
        }
        if self.paths.iter().all(|path| path.state == State::Lost) {
            self.shared.set_gone();
            self.shared.push(VolumeEvent::Lost);
        }
        self.shared.announce();
        self.tell_first(path, Err(error));
    }

    fn tell_first(&mut self, path: usize, result: First) {
        if let Some(kept) = self.paths.get_mut(path)
            && !std::mem::replace(&mut kept.told_first, true)
        {
            // Nobody waits for it any more when the volume is open.
            let _ = self.first.send(result);
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Disconnects from all at once: each says goodbye, and one that is dead takes its time.
    fn close(&mut self) {
        let closing: Vec<_> = (0..self.paths.len())
            .filter_map(|path| {
                let up = self.shared.set_down(
                    path,
                    PathState::Lost,
                    Some("the volume is closed".into()),
                )?;
                std::thread::Builder::new()
                    .name("flexblk-close".into())
                    .spawn(move || up.controller.disconnect())
                    .ok()
            })
            .collect();
        for thread in closing {
            let _ = thread.join();
        }
    }
}
