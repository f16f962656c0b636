//! Which step comes before which. Pure.
//!
//! Steps are stored so that each comes after those it waits for ([`StepDefinition::after`] points backward): one walk
//! over the steps answers every question, and nothing needs to be kept beside them.
//!
//! [`StepDefinition::after`]: super::StepDefinition::after

use super::Definition;

/// Steps of one definition, by their places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSet(Vec<bool>);

impl StepSet {
    /// Whether it holds the step at `place`.
    pub fn contains(&self, place: usize) -> bool {
        self.0.get(place).copied().unwrap_or_default()
    }

    /// The places, rising.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.0.iter().enumerate().filter_map(|(place, held)| held.then_some(place))
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        !self.0.contains(&true)
    }
}

impl Definition {
    /// The steps that the one at `place` comes after, however far.
    pub fn ancestors(&self, place: usize) -> StepSet {
        let mut found = vec![false; self.steps.len()];
        found[place] = true;
        for at in (0..=place).rev() {
            if found[at] {
                self.steps[at].after.iter().for_each(|before| found[*before] = true);
            }
        }
        found[place] = false;
        StepSet(found)
    }

    /// The steps that come after the one at `place`, however far.
    pub fn dependents(&self, place: usize) -> StepSet {
        let mut found = vec![false; self.steps.len()];
        found[place] = true;
        for at in place + 1..self.steps.len() {
            found[at] = self.steps[at].after.iter().any(|before| found[*before]);
        }
        found[place] = false;
        StepSet(found)
    }

    /// The place of the pivot.
    pub fn pivot(&self) -> Option<usize> {
        self.steps.iter().position(|step| step.pivot)
    }

    /// Whether the step at `place` is the pivot or comes after it: it is never undone.
    pub fn is_at_or_after_pivot(&self, place: usize) -> bool {
        self.pivot().is_some_and(|pivot| pivot == place || self.ancestors(place).contains(pivot))
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn definition(afters: &[Vec<usize>], pivot: Option<usize>) -> Definition {
        let step = |(place, after): (usize, &Vec<usize>)| StepDefinition {
            id: format!("s{place}"),
            after: after.clone(),
            work: Work::Wait { signal: format!("w{place}"), timeout_ms: None },
            pivot: pivot == Some(place),
            timeout_ms: DEFAULT_TIMEOUT_MS,
            retry: DEFAULT_RETRY,
            undo: None,
            undo_retry: DEFAULT_UNDO_RETRY,
            on_undo_exhausted: OnExhausted::Stuck,
        };
        Definition {
            name: "d".into(),
            version: 1,
            deadline_ms: None,
            steps: afters.iter().enumerate().map(step).collect(),
        }
    }

    /// By the words of the definition: what a step waits for, and what those wait for.
    fn before(afters: &[Vec<usize>], place: usize) -> BTreeSet<usize> {
        afters[place].iter().flat_map(|before_it| [*before_it].into_iter().chain(before(afters, *before_it))).collect()
    }

    proptest! {
        /// Goal: ancestors, dependents and the pivot's side are those of the graph, however it branches and joins.
        #[test]
        fn order_is_that_of_the_graph(
            picks in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..4), 1..12),
            pivot in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let afters: Vec<Vec<usize>> = picks.iter().enumerate().map(|(place, picks)| {
                let places = picks.iter().filter(|_| place > 0).map(|pick| pick.index(place));
                places.collect::<BTreeSet<_>>().into_iter().collect()
            }).collect();
            let pivot = pivot.map(|pivot| pivot.index(afters.len()));
            let definition = definition(&afters, pivot);
            prop_assert_eq!(definition.pivot(), pivot);
            for place in 0..afters.len() {
                let expected = before(&afters, place);
                let ancestors = definition.ancestors(place);
                prop_assert_eq!(ancestors.iter().collect::<BTreeSet<_>>(), expected.clone());
                prop_assert_eq!(ancestors.is_empty(), expected.is_empty());
                for other in 0..afters.len() {
                    prop_assert_eq!(definition.dependents(other).contains(place), expected.contains(&other));
                }
                let beyond = pivot.is_some_and(|pivot| pivot == place || expected.contains(&pivot));
                prop_assert_eq!(definition.is_at_or_after_pivot(place), beyond);
            }
        }
    }
}
