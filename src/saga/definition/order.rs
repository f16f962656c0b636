//! `after` as written → which step comes before which, in the places of the document. Pure.

use super::faults::{Faults, Path};
use std::collections::HashMap;

/// What a step says of its place.
pub(super) struct Link<'a> {
    /// Its id; empty where there was none to read.
    pub(super) id: &'a str,
    /// The ids it waits for, empty where there was none to read; none: the step before it.
    pub(super) after: Option<&'a [String]>,
    /// Whether `after` could be read.
    pub(super) known: bool,
}

/// Which step waits for which, by places in the document. It may have cycles: then there was a fault.
pub(super) struct Links {
    after: Vec<Vec<usize>>,
    known: Vec<bool>,
}

impl Links {
    /// Finds the steps that `after` names, and every fault of the order.
    pub(super) fn of(links: &[Link<'_>], faults: &mut Faults) -> Self {
        let steps = Path::ROOT.field("steps");
        let mut by_id = HashMap::new();
        for (place, link) in links.iter().enumerate().filter(|(_, link)| !link.id.is_empty()) {
            if by_id.contains_key(link.id) {
                faults.add(&steps.place(place).field("id"), format!("another step has the id \"{}\"", link.id));
            } else {
                by_id.insert(link.id, place);
            }
        }
        let mut known: Vec<bool> = links.iter().map(|link| link.known).collect();
        let resolve = |(place, link): (usize, &Link<'_>)| {
            let Some(ids) = link.after else { return place.checked_sub(1).into_iter().collect() };
            let mut after = Vec::new();
            for (at, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_empty()) {
                let fault = match by_id.get(id.as_str()).copied() {
                    None => {
                        known[place] = false;
                        format!("there is no step \"{id}\"")
                    }
                    Some(earlier) if earlier == place => "a step cannot wait for itself".to_owned(),
                    Some(earlier) if after.contains(&earlier) => format!("\"{id}\" is given twice"),
                    Some(earlier) => {
                        after.push(earlier);
                        continue;
                    }
                };
                faults.add(&steps.place(place).field("after").place(at), fault);
            }
            after
        };
        let after = links.iter().enumerate().map(resolve).collect();
        let found = Self { after, known };
        found.name_cycles(links, faults);
        found
    }

    /// The steps that the one at `place` waits for.
    pub(super) fn after(&self, place: usize) -> &[usize] {
        &self.after[place]
    }

    /// The steps that the one at `place` comes after, however far; and whether those are all.
    pub(super) fn ancestors(&self, place: usize) -> (Vec<bool>, bool) {
        let mut found = vec![false; self.after.len()];
        let mut known = self.known[place];
        let mut open = self.after[place].clone();
        while let Some(at) = open.pop() {
            if !std::mem::replace(&mut found[at], true) {
                known &= self.known[at];
                open.extend(&self.after[at]);
            }
        }
        (found, known)
    }

    /// Each step after those it waits for, and as near to the document's order as can be. Without those in a cycle or
    /// behind one.
    pub(super) fn order(&self) -> Vec<usize> {
        let mut order = Vec::with_capacity(self.after.len());
        let mut placed = vec![false; self.after.len()];
        let ready = |placed: &[bool]| {
            (0..placed.len()).find(|place| !placed[*place] && self.after[*place].iter().all(|earlier| placed[*earlier]))
        };
        while let Some(next) = ready(&placed) {
            placed[next] = true;
            order.push(next);
        }
        order
    }

    /// Each step without a place in the order waits for another such one: following them leads into a cycle.
    fn name_cycles(&self, links: &[Link<'_>], faults: &mut Faults) {
        let steps = Path::ROOT.field("steps");
        let mut placed = vec![false; links.len()];
        self.order().iter().for_each(|place| placed[*place] = true);
        let mut seen = placed.clone();
        for start in 0..links.len() {
            let mut way = Vec::new();
            let mut at = start;
            while !seen[at] {
                seen[at] = true;
                way.push(at);
                at = self.after[at].iter().copied().find(|earlier| !placed[*earlier]).unwrap_or(at);
            }
            // Only where the way meets itself there is a cycle that was not named yet.
            let Some(entry) = way.iter().position(|place| *place == at) else { continue };
            let cycle = &way[entry..];
            let first = cycle.iter().copied().min().unwrap_or(at);
            let turn = cycle.iter().position(|place| *place == first).unwrap_or_default();
            let names = cycle[turn..].iter().chain(&cycle[..turn]).chain([&first]);
            let named = names.map(|place| links[*place].id).collect::<Vec<_>>().join("\" waits for \"");
            faults.add(&steps.place(first).field("after"), format!("a cycle: \"{named}\""));
        }
    }
}
