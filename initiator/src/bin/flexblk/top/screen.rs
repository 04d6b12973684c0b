//! The terminal: a screen of its own, keys without Enter, and everything as it was at the end.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use crossterm::{execute, queue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::Sort;

/// What somebody has typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// The end.
    Quit,
    /// Another order.
    Sort(Sort),
    /// Nothing that means anything.
    Other,
}

/// Can lines be drawn over, and is there somebody to type?
pub(super) fn is_capable() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    io::stdout().is_terminal() && io::stdin().is_terminal() && !is_dumb
}

/// The screen while it is ours.
#[derive(Debug)]
pub(super) struct Screen {
    /// A signal asks for the end.
    ended: Arc<AtomicBool>,
}

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&ended))?;
        }
        enable_raw_mode()?;
        // From here on dropping it restores the terminal.
        let screen = Self { ended };
        execute!(io::stdout(), EnterAlternateScreen, Hide)?;
        Ok(screen)
    }

    /// Puts lines on it; `lines` gets the columns and rows that there are.
    pub(super) fn draw(
        &mut self,
        lines: impl FnOnce((usize, usize)) -> Vec<String>,
    ) -> io::Result<()> {
        let (columns, rows) = size()?;
        let mut stdout = io::stdout().lock();
        queue!(stdout, MoveTo(0, 0))?;
        for (number, line) in lines((columns.into(), rows.into())).iter().enumerate() {
            if number > 0 {
                stdout.write_all(b"\r\n")?;
            }
            stdout.write_all(line.as_bytes())?;
            queue!(stdout, Clear(ClearType::UntilNewLine))?;
        }
        queue!(stdout, Clear(ClearType::FromCursorDown))?;
        stdout.flush()
    }

    /// Waits for a key.
    pub(super) fn wait(&mut self, time: Duration) -> io::Result<Option<Key>> {
        let mut stdin = io::stdin().lock();
        let mut keyboard = [PollFd::new(&stdin, PollFlags::IN)];
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut keyboard, Some(&time)) {
            Ok(0) => return Ok(None),
            Err(rustix::io::Errno::INTR) if self.ended.load(Ordering::Relaxed) => {
                return Ok(Some(Key::Quit));
            }
            Err(rustix::io::Errno::INTR) => return Ok(Some(Key::Other)),
            result => result?,
        };
        let mut typed = [0; 64];
        let len = stdin.read(&mut typed)?;
        Ok(Some(meaning(typed.get(..len).unwrap_or_default())))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody left to tell when the terminal is gone.
        let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// Raw mode gives Ctrl-C as a byte; no byte at all is the end of the terminal. Several keys may have
/// come at once, and the last order holds.
fn meaning(typed: &[u8]) -> Key {
    const CTRL_C: u8 = 3;
    const ESCAPE: u8 = 27;
    let key = |byte: &u8| match byte {
        b'q' | b'Q' | &CTRL_C => Key::Quit,
        b'i' => Key::Sort(Sort::Iops),
        b'b' => Key::Sort(Sort::Bandwidth),
        b'l' => Key::Sort(Sort::Latency),
        _ => Key::Other,
    };
    match typed {
        [] => Key::Quit,
        // An arrow or a function key.
        [ESCAPE, ..] => Key::Other,
        typed if typed.iter().any(|byte| key(byte) == Key::Quit) => Key::Quit,
        [.., last] => key(last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_may_come_together() {
        assert_eq!(meaning(b""), Key::Quit);
        assert_eq!(meaning(b"bq"), Key::Quit);
        assert_eq!(meaning(b"ib"), Key::Sort(Sort::Bandwidth));
        assert_eq!(meaning(&[3]), Key::Quit);
        assert_eq!(meaning(b"\x1b[B"), Key::Other);
    }
}
