//! Who is measured when: alternating, so that what drifts on the machine strikes all sides alike.

use super::figure::{Measured, Section};
use super::servers::Servers;

/// What every measurement is given.
pub(super) struct Stage {
    /// The servers.
    pub(super) servers: Servers,
    /// Times each side is measured.
    pub(super) runs: usize,
    /// Unconfirmed messages of one key, as the relay is configured.
    pub(super) key_window: usize,
}

/// One side's measurement in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    /// From 1.
    pub(super) run: usize,
    /// From 0.
    pub(super) side: usize,
}

impl Stage {
    /// Every side once a run, in an order that is flipped every second run.
    pub(super) fn turns(&self, sides: usize) -> Vec<Turn> {
        turns(self.runs, sides)
    }

    /// Keeps what a side did and says it.
    pub(super) fn record(&self, section: &mut Section, turn: Turn, measured: Measured) {
        let (name, unit) = (section.name(turn.side), section.unit());
        eprintln!("run {} of {}: {name} {} {unit}", turn.run, self.runs, super::table::number(measured.value));
        section.record(turn.side, measured);
    }
}

fn turns(runs: usize, sides: usize) -> Vec<Turn> {
    let side = |run: usize, nth: usize| if run % 2 == 1 { nth } else { sides - 1 - nth };
    (1..=runs).flat_map(|run| (0..sides).map(move |nth| Turn { run, side: side(run, nth) })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no side is always the first, and each has its turn in each run.
    #[test]
    fn the_order_flips() {
        let order: Vec<(usize, usize)> = turns(3, 3).iter().map(|turn| (turn.run, turn.side)).collect();
        assert_eq!(order, [(1, 0), (1, 1), (1, 2), (2, 2), (2, 1), (2, 0), (3, 0), (3, 1), (3, 2)]);
    }
}
