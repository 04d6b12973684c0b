//! Cores: reading lists of them and pinning threads to them.

use std::fmt;
use std::str::FromStr;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Error;

/// Pins the calling thread to one core.
///
/// # Errors
/// [`Error::Pin`] when the core does not exist or may not be used.
pub fn pin_current_thread(core: usize) -> Result<(), Error> {
    let mut set = CpuSet::new();
    if core >= CpuSet::MAX_CPU {
        return Err(Error::Pin {
            core,
            source: rustix::io::Errno::INVAL.into(),
        });
    }
    set.set(core);
    sched_setaffinity(None, &set).map_err(|error| Error::Pin {
        core,
        source: error.into(),
    })
}

/// The cores that the calling thread may use, ascending.
///
/// # Errors
/// [`Error::Pin`] when the kernel does not say.
pub fn allowed_cores() -> Result<Vec<usize>, Error> {
    let set = sched_getaffinity(None).map_err(|error| Error::Pin {
        core: 0,
        source: error.into(),
    })?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&core| set.is_set(core))
        .collect())
}

/// A list of cores as people write it: `0`, `0,2`, `0-3,8`. Ascending, without repetition, not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreList(Vec<usize>);

/// A core list that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a list of cores like 0,2-3")]
pub struct ParseCoreListError(String);

impl CoreList {
    /// The cores.
    #[must_use]
    pub fn cores(&self) -> &[usize] {
        &self.0
    }
}

impl FromStr for CoreList {
    type Err = ParseCoreListError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseCoreListError(text.to_owned());
        let number = |word: &str| {
            let value: usize = word.trim().parse().map_err(|_| bad())?;
            if value < CpuSet::MAX_CPU {
                Ok(value)
            } else {
                Err(bad())
            }
        };
        let mut cores = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                None => cores.push(number(part)?),
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(bad());
                    }
                    cores.extend(first..=last);
                }
            }
        }
        cores.sort_unstable();
        cores.dedup();
        Ok(Self(cores))
    }
}

impl fmt::Display for CoreList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, core) in self.0.iter().enumerate() {
            write!(f, "{}{core}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists_read_as_people_write_them() {
        let cores = |text: &str| text.parse::<CoreList>().map(|list| list.0).ok();
        assert_eq!(cores("0"), Some(vec![0]));
        assert_eq!(cores("2, 0,2"), Some(vec![0, 2]));
        assert_eq!(cores("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
        for bad in [
            "",
            ",",
            "a",
            "3-1",
            "1-",
            "-1",
            "0-99999999",
            "18446744073709551616",
        ] {
            assert_eq!(cores(bad), None, "{bad}");
        }
        assert_eq!("3-4,1".parse::<CoreList>().unwrap().to_string(), "1,3,4");
    }

    #[test]
    fn pinning_holds_and_a_core_that_is_not_there_is_an_error() {
        std::thread::spawn(|| {
            let core = *allowed_cores().unwrap().last().unwrap();
            pin_current_thread(core).unwrap();
            assert_eq!(allowed_cores().unwrap(), vec![core]);
            assert!(pin_current_thread(CpuSet::MAX_CPU - 1).is_err());
            assert!(pin_current_thread(usize::MAX).is_err());
        })
        .join()
        .unwrap();
    }
}
