//! Figures: what several sides did in the same runs, and how they stand to each other. Pure.

use super::cpu::{Cpu, Spent};
use serde::Serialize;
use std::collections::BTreeMap;

/// CPU is given for so many messages.
const CPU_MESSAGES: f64 = 100_000.0;

/// Bounds of the bins of a histogram of latencies: eight for each doubling, from 10 µs to about 3 minutes.
const BINS_PER_DOUBLING: f64 = 8.0;
const FIRST_BIN_MS: f64 = 0.01;

/// What one side did in one run.
#[derive(Debug, Clone, Default)]
pub(super) struct Measured {
    /// In the section's unit.
    pub(super) value: f64,
    /// CPU seconds for 100,000 messages.
    cpu: Cpu,
    /// Sorted.
    samples_ms: Vec<f64>,
    extras: Vec<(&'static str, f64)>,
}

impl Measured {
    /// Messages a second.
    pub(super) fn rate(messages: u64, spent: &Spent) -> Self {
        Self::of(messages as f64 / spent.seconds, messages, spent)
    }

    /// Any value; `messages` are those that the CPU was spent on.
    pub(super) fn of(value: f64, messages: u64, spent: &Spent) -> Self {
        Self { value, cpu: spent.cpu.map(|s| s * CPU_MESSAGES / messages as f64), ..Self::default() }
    }

    /// A value that no CPU goes with.
    pub(super) fn plain(value: f64) -> Self {
        Self { value, ..Self::default() }
    }

    /// Latencies of single messages; the value is their 99th percentile. `messages` are those that the CPU was spent on.
    pub(super) fn latency(mut samples_ms: Vec<f64>, messages: u64, spent: &Spent) -> Self {
        samples_ms.sort_by(f64::total_cmp);
        let measured = Self::of(quantile(&samples_ms, 0.99), messages, spent);
        Self { samples_ms, ..measured }
    }

    /// Adds a further number, whose name gives its unit.
    pub(super) fn with(mut self, name: &'static str, value: f64) -> Self {
        self.extras.push((name, value));
        self
    }
}

/// What a side is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// No program could do more.
    Ceiling,
    /// What one would do otherwise.
    Baseline,
    /// What is judged.
    Subject,
}

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Better {
    Higher,
    Lower,
}

/// One of the things compared.
#[derive(Debug, Clone)]
pub(super) struct Side {
    pub(super) name: String,
    role: Role,
    against: Vec<String>,
}

impl Side {
    pub(super) fn ceiling(name: impl Into<String>) -> Self {
        Self { name: name.into(), role: Role::Ceiling, against: Vec::new() }
    }

    pub(super) fn baseline(name: impl Into<String>) -> Self {
        Self { name: name.into(), role: Role::Baseline, against: Vec::new() }
    }

    pub(super) fn subject(name: impl Into<String>) -> Self {
        Self { name: name.into(), role: Role::Subject, against: Vec::new() }
    }

    /// A side of the same section that a ratio is taken to; the first one named is what the side is judged by.
    pub(super) fn against(mut self, name: impl Into<String>) -> Self {
        self.against.push(name.into());
        self
    }
}

/// Sides measured in turn under the same conditions.
#[derive(Debug, Clone)]
pub(super) struct Section {
    title: String,
    unit: String,
    better: Better,
    sides: Vec<(Side, Vec<Measured>)>,
}

impl Section {
    pub(super) fn new(title: impl Into<String>, unit: impl Into<String>, better: Better) -> Self {
        Self { title: title.into(), unit: unit.into(), better, sides: Vec::new() }
    }

    /// Adds a side; sides are counted from 0.
    pub(super) fn side(mut self, side: Side) -> Self {
        self.sides.push((side, Vec::new()));
        self
    }

    /// How many sides there are.
    pub(super) fn sides(&self) -> usize {
        self.sides.len()
    }

    pub(super) fn name(&self, side: usize) -> &str {
        &self.sides[side].0.name
    }

    pub(super) fn unit(&self) -> &str {
        &self.unit
    }

    /// Keeps what a side did in the next run.
    pub(super) fn record(&mut self, side: usize, measured: Measured) {
        self.sides[side].1.push(measured);
    }

    /// Something was measured.
    pub(super) fn has_figures(&self) -> bool {
        self.sides.iter().any(|(_, runs)| !runs.is_empty())
    }

    /// The figures of all sides.
    pub(super) fn figures(&self) -> Figures {
        let figures = self.sides.iter().map(|(side, runs)| self.figure(side, runs)).collect();
        Figures { title: self.title.clone(), unit: self.unit.clone(), better: self.better, figures }
    }

    fn figure(&self, side: &Side, runs: &[Measured]) -> Figure {
        let values: Vec<f64> = runs.iter().map(|run| run.value).collect();
        let ratios = side.against.iter().filter_map(|to| {
            let (_, others) = self.sides.iter().find(|(other, _)| other.name == *to)?;
            let others: Vec<f64> = others.iter().map(|run| run.value).collect();
            let ratio = median(values.iter().zip(&others).map(|(ours, theirs)| ours / theirs).collect());
            Some(Ratio { to: to.clone(), ratio, of_medians: median(values.clone()) / median(others) })
        });
        let mut extras = BTreeMap::new();
        for (name, _) in runs.iter().flat_map(|run| &run.extras) {
            let of = |run: &Measured| run.extras.iter().find(|(other, _)| other == name).map(|(_, value)| *value);
            extras.insert((*name).to_owned(), median(runs.iter().filter_map(of).collect()));
        }
        Figure {
            name: side.name.clone(),
            role: side.role,
            median: median(values.clone()),
            min: values.iter().copied().fold(f64::NAN, f64::min),
            max: values.iter().copied().fold(f64::NAN, f64::max),
            ratios: ratios.collect(),
            cpu_s_per_100k: PerMessages {
                client: median_of(runs, |run| run.cpu.client),
                postgres: median_of(runs, |run| run.cpu.postgres),
                broker: median_of(runs, |run| run.cpu.broker),
            },
            latency_ms: Latency::of(runs),
            extras,
            runs: values,
        }
    }
}

/// A section's figures, ready to be shown.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) title: String,
    pub(super) unit: String,
    pub(super) better: Better,
    pub(super) figures: Vec<Figure>,
}

/// What one side did over all runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) role: Role,
    /// In the order of the runs.
    pub(super) runs: Vec<f64>,
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// To other sides of the section, the one it is judged by first.
    pub(super) ratios: Vec<Ratio>,
    pub(super) cpu_s_per_100k: PerMessages,
    pub(super) latency_ms: Option<Latency>,
    /// Medians of further numbers.
    pub(super) extras: BTreeMap<String, f64>,
}

/// How a side stands to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Ratio {
    pub(super) to: String,
    /// Median of the ratios of each run: what drifts over the runs does not count.
    pub(super) ratio: f64,
    /// For comparison with other programs' figures.
    pub(super) of_medians: f64,
}

/// CPU seconds for 100,000 messages, medians of the runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct PerMessages {
    pub(super) client: Option<f64>,
    pub(super) postgres: Option<f64>,
    pub(super) broker: Option<f64>,
}

/// Latencies of a side: percentiles are medians over the runs, the histogram holds all runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Latency {
    pub(super) samples: usize,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
    /// Bins in order, empty ones between others included.
    pub(super) histogram: Vec<Bin>,
}

/// How many latencies were up to a bound and above the bin before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Bin {
    pub(super) up_to_ms: f64,
    pub(super) count: u64,
}

impl Latency {
    fn of(runs: &[Measured]) -> Option<Self> {
        let of = |share: f64| median(runs.iter().map(|run| quantile(&run.samples_ms, share)).collect());
        let samples: usize = runs.iter().map(|run| run.samples_ms.len()).sum();
        (samples > 0).then(|| Self {
            samples,
            p50: of(0.5),
            p90: of(0.9),
            p99: of(0.99),
            max: of(1.0),
            histogram: histogram(runs.iter().flat_map(|run| run.samples_ms.iter().copied())),
        })
    }
}

/// Counts latencies in bins of equal ratio.
fn histogram(samples_ms: impl Iterator<Item = f64>) -> Vec<Bin> {
    let mut counts: BTreeMap<i32, u64> = BTreeMap::new();
    for sample in samples_ms {
        let bin = (sample.max(FIRST_BIN_MS) / FIRST_BIN_MS).log2() * BINS_PER_DOUBLING;
        *counts.entry(bin.ceil() as i32).or_default() += 1;
    }
    let (Some(first), Some(last)) = (counts.keys().next().copied(), counts.keys().next_back().copied()) else {
        return Vec::new();
    };
    let bound = |bin: i32| FIRST_BIN_MS * (f64::from(bin) / BINS_PER_DOUBLING).exp2();
    (first..=last).map(|bin| Bin { up_to_ms: bound(bin), count: counts.get(&bin).copied().unwrap_or(0) }).collect()
}

/// The smallest value that at least `share` of the sorted values do not exceed.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

/// The middle value, or the mean of the two middle ones; not a number if there is none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (middle, odd) = (values.len() / 2, values.len() % 2 == 1);
    match values.get(middle) {
        None => f64::NAN,
        Some(value) if odd => *value,
        Some(value) => (values[middle - 1] + value) / 2.0,
    }
}

/// None unless every run has a value: a median of some would stand beside medians of all.
fn median_of(runs: &[Measured], of: impl Fn(&Measured) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = runs.iter().filter_map(of).collect();
    (!values.is_empty() && values.len() == runs.len()).then(|| median(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(seconds: f64) -> Spent {
        Spent { seconds, cpu: Cpu { client: Some(1.0), postgres: None, broker: Some(4.0) } }
    }

    fn section(values: &[(f64, f64)]) -> Section {
        let mut section = Section::new("drain", "msg/s", Better::Higher)
            .side(Side::ceiling("ceiling"))
            .side(Side::subject("relay").against("ceiling"));
        for (theirs, ours) in values {
            section.record(0, Measured::of(*theirs, 200_000, &spent(1.0)));
            section.record(1, Measured::of(*ours, 200_000, &spent(1.0)).with("lag, s", *ours));
        }
        section
    }

    /// Goal: the ratio is of pairs of one run, so that a drift of the machine cancels out.
    #[test]
    fn the_ratio_is_the_median_of_the_pairs() {
        let figures = section(&[(100.0, 90.0), (50.0, 45.0), (10.0, 5.0)]).figures().figures;
        let ratio = |ratio, of_medians| vec![Ratio { to: "ceiling".to_owned(), ratio, of_medians }];
        assert_eq!(figures[0].ratios, []);
        assert_eq!(figures[1].ratios, ratio(0.9, 0.9));
        let figures = section(&[(100.0, 90.0), (50.0, 20.0), (10.0, 9.0)]).figures().figures;
        assert_eq!(figures[1].ratios, ratio(0.9, 0.4));
        assert_eq!((figures[1].median, figures[1].min, figures[1].max), (20.0, 9.0, 90.0));
        assert_eq!(figures[1].runs, [90.0, 20.0, 9.0]);
        assert_eq!(figures[1].extras["lag, s"], 20.0);
    }

    /// Goal: CPU is for 100,000 messages; what was not measured is absent, not zero.
    #[test]
    fn cpu_is_per_100_000_messages() {
        let cpu = section(&[(1.0, 1.0)]).figures().figures[0].cpu_s_per_100k;
        assert_eq!(cpu, PerMessages { client: Some(0.5), postgres: None, broker: Some(2.0) });
        let json = serde_json::to_value(cpu).expect("serializable");
        assert_eq!(json, serde_json::json!({"client": 0.5, "postgres": null, "broker": 2.0}));
    }

    /// Goal: percentiles are samples that occurred; the value of a latency is its 99th percentile.
    #[test]
    fn latencies_have_percentiles() {
        let samples: Vec<f64> = (1..=1_000).rev().map(f64::from).collect();
        let measured = Measured::latency(samples, 1_000, &spent(1.0));
        assert_eq!(measured.value, 990.0);
        let latency = Latency::of(&[measured]).expect("there are samples");
        assert_eq!((latency.p50, latency.p90, latency.p99, latency.max), (500.0, 900.0, 990.0, 1_000.0));
        assert_eq!(latency.samples, 1_000);
        assert_eq!(latency.histogram.iter().map(|bin| bin.count).sum::<u64>(), 1_000);
        assert!(latency.histogram.windows(2).all(|pair| pair[0].up_to_ms < pair[1].up_to_ms));
        assert!(Latency::of(&[Measured::default()]).is_none());
    }

    /// Goal: every latency lies in the bin that says so, the smallest and zero too.
    #[test]
    fn bins_hold_what_they_say() {
        for sample in [0.0, 0.01, 0.0123, 1.0, 7.7, 60_000.0] {
            let bins = histogram([sample].into_iter());
            assert_eq!(bins.len(), 1);
            assert!(
                sample <= bins[0].up_to_ms * 1.000_001 && bins[0].up_to_ms <= sample.max(0.01) * 1.1,
                "{sample}: {bins:?}"
            );
        }
        assert_eq!(histogram([].into_iter()), []);
    }

    /// Goal: medians of few values, and of none.
    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!((quantile(&[5.0], 0.0), quantile(&[5.0], 1.0)), (5.0, 5.0));
    }
}
