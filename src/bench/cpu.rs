//! CPU seconds of processes, from /proc: of this one, and of a server with all its children.

use std::fs;
use std::time::Instant;

/// Linux counts in hundredths of a second on every architecture this runs on.
const TICKS_PER_S: f64 = 100.0;

/// Processes of the servers, as far as they are known.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pids {
    /// The postmaster.
    pub(super) postgres: Option<u32>,
    /// The broker's Erlang machine.
    pub(super) broker: Option<u32>,
}

/// A clock that also notes how much CPU this process and the servers took.
pub(super) struct Meter {
    pids: Pids,
    began: Instant,
    cpu: Cpu,
}

/// What passed on a [`Meter`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spent {
    /// Wall-clock seconds.
    pub(super) seconds: f64,
    /// CPU seconds.
    pub(super) cpu: Cpu,
}

/// CPU seconds, user and system; none where the process is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub(super) struct Cpu {
    /// This process, and with it the relay or consumer that runs in it.
    pub(super) client: Option<f64>,
    /// The postmaster and all its backends, those that ended meanwhile included.
    pub(super) postgres: Option<f64>,
    /// The broker's Erlang machine and its helpers.
    pub(super) broker: Option<f64>,
}

impl Cpu {
    fn now(pids: Pids) -> Self {
        Self {
            client: own_seconds(),
            postgres: pids.postgres.and_then(tree_seconds),
            broker: pids.broker.and_then(tree_seconds),
        }
    }

    /// Applies a function of both values where both are known.
    pub(super) fn with(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let both = |a: Option<f64>, b: Option<f64>| Some(f(a?, b?));
        Self {
            client: both(self.client, other.client),
            postgres: both(self.postgres, other.postgres),
            broker: both(self.broker, other.broker),
        }
    }

    /// Applies a function to each value.
    pub(super) fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self { client: self.client.map(&f), postgres: self.postgres.map(&f), broker: self.broker.map(&f) }
    }
}

impl Meter {
    pub(super) fn start(pids: Pids) -> Self {
        let cpu = Cpu::now(pids);
        Self { pids, began: Instant::now(), cpu }
    }

    /// What passed since the start.
    pub(super) fn spent(&self) -> Spent {
        self.spent_between(self.began, Instant::now())
    }

    /// The same with the time between two moments of the work itself: CPU is taken from the meter's start until now.
    pub(super) fn spent_between(&self, began: Instant, ended: Instant) -> Spent {
        let seconds = ended.saturating_duration_since(began).as_secs_f64();
        Spent { seconds, cpu: Cpu::now(self.pids).with(self.cpu, |now, then| now - then) }
    }
}

/// CPU seconds of this process so far; its children do not count.
pub(super) fn own_seconds() -> Option<f64> {
    Some(Stat::parse(&fs::read_to_string("/proc/self/stat").ok()?)?.own_ticks as f64 / TICKS_PER_S)
}

/// CPU seconds so far of a process and everything below it, those included that ended and were waited for.
pub(super) fn tree_seconds(root: u32) -> Option<f64> {
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let stats: Vec<Stat> =
        pids.filter_map(|pid| Stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)).collect();
    tree_ticks(&stats, root).map(|ticks| ticks as f64 / TICKS_PER_S)
}

/// What one line of `/proc/<pid>/stat` says of CPU and family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    pid: u32,
    parent: u32,
    /// User and system.
    own_ticks: u64,
    /// The same of children that were waited for, theirs included.
    reaped_ticks: u64,
}

impl Stat {
    /// The name stands in brackets and may hold spaces and brackets itself.
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.rsplit_once(')')?;
        let pid = head.split_once(' ')?.0.parse().ok()?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            own_ticks: ticks(11)? + ticks(12)?,
            reaped_ticks: ticks(13)? + ticks(14)?,
        })
    }
}

/// None if the root is not among them.
fn tree_ticks(stats: &[Stat], root: u32) -> Option<u64> {
    let mut tree = vec![*stats.iter().find(|stat| stat.pid == root)?];
    let mut next = 0;
    while let Some(parent) = tree.get(next).map(|stat| stat.pid) {
        tree.extend(stats.iter().filter(|stat| stat.parent == parent && stat.pid != root));
        next += 1;
    }
    Some(tree.iter().map(|stat| stat.own_ticks + stat.reaped_ticks).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "77 (a b) c) S 70 77 77 0 -1 4194560 1 2 3 4 500 60 7000 800 20 0 1 0 5 6 7";

    /// Goal: a name with spaces and brackets does not move the fields.
    #[test]
    fn a_stat_line_is_read_from_its_last_bracket() {
        assert_eq!(Stat::parse(LINE), Some(Stat { pid: 77, parent: 70, own_ticks: 560, reaped_ticks: 7_800 }));
        assert_eq!(Stat::parse("77 (x) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    /// Goal: the whole family counts, what ended included, and nobody else.
    #[test]
    fn a_tree_is_summed_with_its_dead() {
        let stat = |pid, parent, own_ticks, reaped_ticks| Stat { pid, parent, own_ticks, reaped_ticks };
        let stats =
            [stat(1, 0, 9_999, 9_999), stat(5, 1, 1, 10), stat(6, 5, 100, 0), stat(7, 6, 1_000, 0), stat(8, 1, 50, 0)];
        assert_eq!(tree_ticks(&stats, 5), Some(1_111));
        assert_eq!(tree_ticks(&stats, 9), None);
    }

    /// Goal: the kernel's own lines are read, and time only grows.
    #[test]
    fn this_process_has_a_time() {
        let before = own_seconds().expect("Linux");
        let tree = tree_seconds(std::process::id()).expect("this process is there");
        assert!(tree >= before, "{tree} {before}");
    }
}
