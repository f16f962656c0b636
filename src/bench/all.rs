//! The measurements that `docs/performance.md` shows, as command lines, one after the other on the same servers.

use super::What;
use super::report::Measurement;
use super::stage::Stage;
use crate::config::ConfigError;
use clap::{Args, FromArgMatches, Subcommand};

/// What is measured, in the order of the page; each works alone, too, as `oncebox bench …`.
const SET: &[&[&str]] = &[
    &["publish"],
    &["publish", "--matrix"],
    &["relay"],
    &["relay", "--payload", "1024"],
    &["relay", "--snapshot-held"],
    &["relay", "--backlog", "50000,5000000"],
    &["latency"],
    &["latency", "--seconds", "60", "--open-transaction"],
    &["write"],
    &["inbox"],
    &["saga"],
    &["end-to-end", "--seconds", "600"],
];

#[derive(Debug, Args)]
pub(super) struct AllBench {
    /// Only these, by their first word, e.g. publish,relay
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
}

impl AllBench {
    /// The command lines that are asked for.
    fn lines(&self) -> Result<Vec<&'static [&'static str]>, ConfigError> {
        if let Some(unknown) = self.only.iter().find(|name| !SET.iter().any(|line| line[0] == name.as_str())) {
            let mut known: Vec<&str> = SET.iter().map(|line| line[0]).collect();
            known.dedup();
            let reason = format!("{unknown} is none of {}", known.join(", "));
            return Err(ConfigError { setting: "--only".to_owned(), reason });
        }
        let wanted = |line: &&&[&str]| self.only.is_empty() || self.only.iter().any(|name| name == line[0]);
        Ok(SET.iter().filter(wanted).copied().collect())
    }

    /// Checks the names before servers are started.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        self.lines().map(drop)
    }

    /// Measures one after the other. What fails is told and does not take the rest with it.
    pub(super) async fn run(&self, stage: &Stage) -> anyhow::Result<(Vec<Measurement>, Vec<String>)> {
        let (mut measurements, mut failures) = (Vec::new(), Vec::new());
        for line in self.lines()? {
            let text = line.join(" ");
            eprintln!("--- oncebox bench {text}");
            match parse(line)?.run(stage).await {
                Ok(measurement) => measurements.push(measurement.setting("command", format!("oncebox bench {text}"))),
                Err(error) => failures.push(format!("oncebox bench {text} failed: {error:#}")),
            }
        }
        Ok((measurements, failures))
    }
}

fn parse(line: &[&str]) -> Result<What, clap::Error> {
    let command = What::augment_subcommands(clap::Command::new("bench").no_binary_name(true));
    What::from_arg_matches(&command.try_get_matches_from(line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every line of the set is one that the command line takes, and the documentation names it.
    #[test]
    fn the_set_can_be_run_and_is_documented() {
        let docs = include_str!("../../docs/performance.md");
        for line in SET {
            let what = parse(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            assert_eq!(what.name(), line[0]);
            let text = format!("oncebox bench {}", line.join(" "));
            assert!(docs.contains(&text), "docs/performance.md does not name `{text}`");
        }
    }

    /// Goal: a name that is none is refused, with those there are.
    #[test]
    fn only_takes_known_names() {
        let some = AllBench { only: vec!["relay".to_owned()] };
        assert!(some.lines().expect("known").iter().all(|line| line[0] == "relay"));
        let error = AllBench { only: vec!["relya".to_owned()] }.check().expect_err("unknown");
        assert!(error.to_string().starts_with("--only: relya is none of publish, relay, "), "{error}");
    }
}
