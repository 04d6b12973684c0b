//! What a guest says on its second serial line: one line per event, words separated by tabs.

use std::time::Duration;

use anyhow::{Result, bail};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A step starts.
    Step {
        /// What it shows.
        name: String,
    },
    /// The step has ended.
    End(Step),
    /// Text for whoever reads the log.
    Log(String),
    /// The guest wants something done outside, and waits for the answer.
    Ask(Vec<String>),
}

/// A step that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it shows.
    pub name: String,
    /// How it ended.
    pub result: StepResult,
    /// How long it took on the guest's clock.
    pub took: Duration,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepResult {
    /// As it should.
    Passed,
    /// With an error; the log has its output.
    Failed(String),
    /// It does not apply to this peer.
    Skipped(String),
}

impl Line {
    /// Reads one.
    pub fn parse(line: &str) -> Result<Line> {
        let mut words = line.trim_end_matches(['\r', '\n']).split('\t');
        let kind = words.next().unwrap_or_default();
        let rest: Vec<String> = words.map(str::to_owned).collect();
        let end = |result: fn(String) -> StepResult| match rest.as_slice() {
            [name, centiseconds, reason @ ..] => Ok(Line::End(Step {
                name: name.clone(),
                result: result(reason.join(" ")),
                took: Duration::from_millis(centiseconds.parse::<u64>().unwrap_or(0) * 10),
            })),
            _ => bail!("an incomplete line: {line:?}"),
        };
        match kind {
            "step" => Ok(Line::Step {
                name: rest.join(" "),
            }),
            "pass" => end(|_| StepResult::Passed),
            "fail" => end(StepResult::Failed),
            "skip" => end(StepResult::Skipped),
            "log" => Ok(Line::Log(rest.join("\t"))),
            "ask" => Ok(Line::Ask(rest)),
            _ => bail!("not a line of the guest's report: {line:?}"),
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn lines_are_read() -> Result<()> {
        assert_eq!(
            Line::parse("step\tid-ctrl\n")?,
            Line::Step {
                name: "id-ctrl".into()
            }
        );
        assert_eq!(
            Line::parse("fail\tid-ctrl\t125\texit status 1")?,
            Line::End(Step {
                name: "id-ctrl".into(),
                result: StepResult::Failed("exit status 1".into()),
                took: Duration::from_millis(1250),
            })
        );
        assert_eq!(
            Line::parse("ask\tresize\t2\t64M\r\n")?,
            Line::Ask(vec!["resize".into(), "2".into(), "64M".into()])
        );
        assert_eq!(Line::parse("log\ta\tb")?, Line::Log("a\tb".into()));
        assert!(Line::parse("[    1.0] kernel").is_err());
        assert!(Line::parse("pass").is_err());
        Ok(())
    }
}
