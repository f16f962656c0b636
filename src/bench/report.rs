//! What a run of the benchmarks found, as it goes into table, JSON and page. Pure, but for the facts of the machine.

use super::figure::{Figures, Section};
use serde::Serialize;
use std::fs;
use time::OffsetDateTime;

/// Fewer runs have no median worth the name.
pub(super) const RUNS_FOR_A_MEDIAN: usize = 3;

/// A whole run of `oncebox bench`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    /// Of oncebox.
    pub(super) version: String,
    /// UTC.
    pub(super) date: String,
    /// Times each figure was measured.
    pub(super) runs: usize,
    pub(super) machine: Vec<Fact>,
    /// What makes the figures less than they seem.
    pub(super) warnings: Vec<String>,
    pub(super) measurements: Vec<Measurement>,
}

/// A name and a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Fact {
    pub(super) name: String,
    pub(super) value: String,
}

impl Fact {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

/// What one benchmark found.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measurement {
    /// Its name on the command line.
    pub(super) name: String,
    /// What it answers.
    pub(super) title: String,
    pub(super) settings: Vec<Fact>,
    pub(super) sections: Vec<Figures>,
    pub(super) plots: Vec<Plot>,
    /// What one must know to read the figures.
    pub(super) notes: Vec<String>,
}

impl Measurement {
    pub(super) fn new(name: impl Into<String>, title: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            title: title.into(),
            settings: Vec::new(),
            sections: Vec::new(),
            plots: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub(super) fn setting(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.settings.push(Fact::new(name, value.to_string()));
        self
    }

    pub(super) fn section(mut self, section: &Section) -> Self {
        self.sections.push(section.figures());
        self
    }

    pub(super) fn plot(mut self, plot: Plot) -> Self {
        self.plots.push(plot);
        self
    }

    pub(super) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
}

/// Curves over time or size.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Plot {
    pub(super) title: String,
    /// Unit of the first numbers.
    pub(super) x: String,
    /// Unit of the second numbers.
    pub(super) y: String,
    pub(super) lines: Vec<Line>,
}

/// One curve.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// What the figures depend on besides the servers.
pub(super) fn machine() -> Vec<Fact> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let line = |text: &str, start: &str| {
        let line = text.lines().find(|line| line.starts_with(start))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut facts = vec![Fact::new("cores", cores.to_string())];
    facts.extend(line(&read("/proc/cpuinfo"), "model name").map(|model| Fact::new("processor", model)));
    facts.extend(line(&read("/proc/meminfo"), "MemTotal").map(|memory| Fact::new("memory", memory)));
    let kernel = format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim());
    facts.push(Fact::new("kernel", kernel.trim()));
    facts.push(Fact::new("load before", read("/proc/loadavg").split(' ').next().unwrap_or_default()));
    facts.push(Fact::new("build", if cfg!(debug_assertions) { "debug" } else { "release" }));
    facts
}

/// What a reader must be warned of.
pub(super) fn warnings(runs: usize, machine: &[Fact]) -> Vec<String> {
    let is = |name: &str, value: &str| machine.iter().any(|fact| fact.name.ends_with(name) && fact.value == value);
    let mut warnings = Vec::new();
    if runs < RUNS_FOR_A_MEDIAN {
        warnings.push(format!("{runs} run(s): no median; measure at least {RUNS_FOR_A_MEDIAN} times"));
    }
    if is("build", "debug") {
        warnings.push("a debug build: rates and CPU say nothing of the program".to_owned());
    }
    if is("fsync", "off") {
        warnings
            .push("Postgres runs with fsync off: it would lose data, and is faster than one that does not".to_owned());
    }
    if is("file system", "tmpfs") {
        warnings.push("data lie in memory (tmpfs), not on a disk: --dir names another folder".to_owned());
    }
    let load = machine.iter().find(|fact| fact.name == "load before").and_then(|fact| fact.value.parse::<f64>().ok());
    if load.is_some_and(|load| load > 1.0) {
        warnings.push("the machine was not idle before: ratios and CPU hold, rates do not".to_owned());
    }
    warnings
}

/// Now, in UTC, to the minute.
pub(super) fn date() -> String {
    let now = OffsetDateTime::now_utc();
    let (date, time) = (now.date(), now.time());
    format!("{date} {:02}:{:02} UTC", time.hour(), time.minute())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::cpu::{Cpu, Spent};
    use crate::bench::figure::{Better, Measured, Side};

    /// A report with everything in it that a report can have.
    pub(in crate::bench) fn sample() -> Report {
        let spent = Spent { seconds: 2.0, cpu: Cpu { client: Some(1.0), postgres: None, broker: Some(4.0) } };
        let mut drain = Section::new("drain", "msg/s", Better::Higher)
            .side(Side::ceiling("ceiling & co"))
            .side(Side::subject("relay").against("ceiling & co"));
        let mut latency = Section::new("latency", "ms", Better::Lower).side(Side::subject("poll"));
        for _ in 0..RUNS_FOR_A_MEDIAN {
            drain.record(0, Measured::rate(20_000, &spent));
            drain.record(1, Measured::rate(18_000, &spent).with("lag, s", 0.5));
            latency.record(0, Measured::latency(vec![1.0, 2.0, 30.0], 3, &spent));
        }
        let curve = Line { name: "rows".to_owned(), points: vec![(0.0, 1.0), (1.0, 5.0)] };
        let plot = Plot { title: "over time".to_owned(), x: "s".to_owned(), y: "rows".to_owned(), lines: vec![curve] };
        let measurement = Measurement::new("relay", "How fast?").setting("payload", "256 B").section(&drain);
        Report {
            version: "0.0.0".to_owned(),
            date: "2026-01-02 03:04 UTC".to_owned(),
            runs: RUNS_FOR_A_MEDIAN,
            machine: vec![Fact::new("cores", "2")],
            warnings: vec!["beware".to_owned()],
            measurements: vec![measurement.section(&latency).plot(plot).note("a note")],
        }
    }

    /// Goal: the JSON has every field, absent values as null.
    #[test]
    fn the_json_is_whole() {
        let json = serde_json::to_value(sample()).expect("serializable");
        let figure = &json["measurements"][0]["sections"][0]["figures"][1];
        assert_eq!(figure["name"], "relay");
        assert_eq!(figure["role"], "subject");
        assert_eq!(figure["runs"].as_array().map(Vec::len), Some(3));
        assert_eq!(figure["median"], 9_000.0);
        let ratio = &figure["ratios"][0];
        assert_eq!((ratio["to"].as_str(), ratio["ratio"].as_f64()), (Some("ceiling & co"), Some(0.9)));
        assert!(figure["cpu_s_per_100k"]["postgres"].is_null() && figure["latency_ms"].is_null());
        assert_eq!(figure["extras"]["lag, s"], 0.5);
        let latency = &json["measurements"][0]["sections"][1]["figures"][0]["latency_ms"];
        assert_eq!((latency["p50"].as_f64(), latency["max"].as_f64()), (Some(2.0), Some(30.0)));
        assert_eq!(json["measurements"][0]["plots"][0]["lines"][0]["points"][1][1], 5.0);
    }

    /// Goal: what spoils figures is said beside them.
    #[test]
    fn spoiled_runs_are_warned_of() {
        let sound =
            [Fact::new("build", "release"), Fact::new("Postgres fsync", "on"), Fact::new("load before", "0.10")];
        assert_eq!(warnings(3, &sound), Vec::<String>::new());
        let spoiled = [
            Fact::new("build", "debug"),
            Fact::new("Postgres fsync", "off"),
            Fact::new("Postgres file system", "tmpfs"),
            Fact::new("load before", "3.50"),
        ];
        let warnings = warnings(1, &spoiled).join("\n");
        for word in ["1 run", "debug build", "fsync off", "tmpfs", "not idle"] {
            assert!(warnings.contains(word), "{warnings}");
        }
    }

    /// Goal: the machine's facts are found here.
    #[test]
    fn the_machine_has_facts() {
        let facts = machine();
        for name in ["cores", "kernel", "build"] {
            assert!(facts.iter().any(|fact| fact.name == name && !fact.value.is_empty()), "{name}: {facts:?}");
        }
        assert_eq!(date().len(), "2026-01-02 03:04 UTC".len());
    }
}
