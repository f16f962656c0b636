//! Which relay publishes which lane: pure.
//!
//! Every relay decides by the same rows, so two that see the same agree. A lease keeps them apart where they do not.

use crate::outbox::relays::{LiveRelay, Seat};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The relays that lanes are shared among, oldest first: those that reach the broker or, if none does, all that live.
/// One whose lease ran out is dead or stuck, whatever its last heartbeat says; `me` knows better of itself.
pub(crate) fn candidates(seats: &[Seat], relays: &[LiveRelay], me: Uuid) -> Vec<Uuid> {
    let stuck = |owner: Uuid| owner != me && seats.iter().any(|seat| seat.owner == Some(owner) && !seat.held);
    let live: Vec<&LiveRelay> = relays.iter().filter(|relay| !stuck(relay.owner)).collect();
    let none_ready = !live.iter().any(|relay| relay.ready);
    let mut owners: Vec<Uuid> =
        live.into_iter().filter(|relay| relay.ready || none_ready).map(|relay| relay.owner).collect();
    owners.sort_unstable();
    owners
}

/// Who should publish each lane. Shares differ by at most one; a relay keeps what it holds up to its share, and the
/// lanes left over go to those who hold them already, then to the oldest.
pub(crate) fn share(seats: &[Seat], candidates: &[Uuid]) -> BTreeMap<i16, Uuid> {
    if candidates.is_empty() {
        return BTreeMap::new();
    }
    let floor = seats.len() / candidates.len();
    let left_over = seats.len() % candidates.len();
    let holds = |owner: Uuid| seats.iter().filter(|seat| seat.held && seat.owner == Some(owner)).count();
    let mut order: Vec<Uuid> = candidates.to_vec();
    order.sort_unstable();
    order.sort_by_key(|owner| holds(*owner) <= floor);
    let mut room: BTreeMap<Uuid, usize> =
        order.iter().enumerate().map(|(i, owner)| (*owner, floor + usize::from(i < left_over))).collect();

    let mut shares = BTreeMap::new();
    for seat in seats.iter().filter(|seat| seat.held) {
        if let Some((owner, room)) = seat.owner.and_then(|owner| Some((owner, room.get_mut(&owner)?)))
            && *room > 0
        {
            *room -= 1;
            shares.insert(seat.lane, owner);
        }
    }
    let mut open = room.into_iter().flat_map(|(owner, room)| std::iter::repeat_n(owner, room));
    for seat in seats {
        shares.entry(seat.lane).or_insert_with(|| open.next().expect("the rooms add up to the lanes"));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn relay(n: u8) -> Uuid {
        Uuid::from_u128(u128::from(n) + 1)
    }

    fn seats(owners: &[Option<u8>]) -> Vec<Seat> {
        (0..).zip(owners).map(|(lane, owner)| Seat { lane, owner: owner.map(relay), held: owner.is_some() }).collect()
    }

    /// Everyone takes and gives back as told, in whatever order, until nothing moves; how many lanes changed hands.
    fn settle(seats: &mut [Seat], candidates: &[Uuid]) -> usize {
        let shares = share(seats, candidates);
        let mut moves = 0;
        for seat in seats {
            moves += usize::from(seat.owner != Some(shares[&seat.lane]));
            (seat.owner, seat.held) = (Some(shares[&seat.lane]), true);
        }
        moves
    }

    proptest! {
        /// Goal: every lane is wanted by exactly one relay, shares differ by at most one, nobody loses a lane within
        /// its share, and what was shared once stays as it is.
        #[test]
        fn shares_are_even_and_stay(
            owners in prop::collection::vec(prop::option::of(0u8..12), 1..65),
            live in prop::collection::btree_set(0u8..12, 1..10),
        ) {
            let mut seats = seats(&owners);
            let candidates: Vec<Uuid> = live.into_iter().map(relay).collect();
            let shares = share(&seats, &candidates);
            prop_assert_eq!(shares.len(), seats.len());
            let count = |owner: &Uuid| shares.values().filter(|share| *share == owner).count();
            let counts: Vec<usize> = candidates.iter().map(count).collect();
            prop_assert_eq!(counts.iter().sum::<usize>(), seats.len());
            let most = counts.iter().max().expect("one at least");
            prop_assert!(most - counts.iter().min().expect("one at least") <= 1, "{counts:?}");
            for owner in &candidates {
                let held = seats.iter().filter(|seat| seat.owner == Some(*owner)).count();
                let kept = seats.iter().filter(|s| s.owner == Some(*owner) && shares[&s.lane] == *owner).count();
                prop_assert_eq!(kept, held.min(count(owner)), "a lane moved for nothing");
            }
            settle(&mut seats, &candidates);
            prop_assert_eq!(settle(&mut seats, &candidates), 0);
        }

        /// Goal: one relay that comes takes its share and nothing else moves; one that goes leaves its lanes and
        /// nothing else moves.
        #[test]
        fn few_lanes_move(lanes in 1usize..65, relays in 1u8..10, gone in 0u8..10) {
            let mut seats = seats(&vec![None; lanes]);
            let mut candidates: Vec<Uuid> = (0..relays).map(relay).collect();
            settle(&mut seats, &candidates);
            candidates.push(relay(relays));
            prop_assert!(settle(&mut seats, &candidates) <= lanes / candidates.len());
            let gone = candidates.remove(usize::from(gone) % candidates.len());
            let left = seats.iter().filter(|seat| seat.owner == Some(gone)).count();
            prop_assert_eq!(settle(&mut seats, &candidates), left);
        }

        /// Goal: while lanes change hands one at a time, in any order, nobody is told to hand on what it has just
        /// taken.
        #[test]
        fn half_done_moves_go_on(
            lanes in 1usize..33,
            relays in 1u8..6,
            picks in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut seats = seats(&vec![Some(0); lanes]);
            let candidates: Vec<Uuid> = (0..relays).map(relay).collect();
            let goal_moves = lanes - lanes.div_ceil(usize::from(relays));
            let mut moves = 0;
            for pick in picks {
                let shares = share(&seats, &candidates);
                let moving: Vec<usize> =
                    (0..lanes).filter(|i| seats[*i].owner != Some(shares[&seats[*i].lane]) || !seats[*i].held).collect();
                if moving.is_empty() {
                    break;
                }
                let seat = &mut seats[moving[pick.index(moving.len())]];
                if seat.held {
                    (seat.owner, seat.held) = (None, false);
                } else {
                    (seat.owner, seat.held) = (Some(shares[&seat.lane]), true);
                    moves += 1;
                }
            }
            prop_assert_eq!(moves, goal_moves);
        }
    }

    /// Goal: with one lane the holder keeps it, whoever is older.
    #[test]
    fn the_holder_of_the_only_lane_keeps_it() {
        assert_eq!(share(&seats(&[Some(1)]), &[relay(0), relay(1)])[&0], relay(1));
    }

    /// Goal: who cannot publish gets nothing while others can; who let a lease run out is not counted on.
    #[test]
    fn candidates_can_publish() {
        let live = |n, ready| LiveRelay { owner: relay(n), ready };
        let relays = [live(0, false), live(1, true), live(2, true)];
        assert_eq!(candidates(&[], &relays, relay(0)), [relay(1), relay(2)]);
        assert_eq!(candidates(&[], &relays[..1], relay(0)), [relay(0)]);
        let run_out = [Seat { lane: 0, owner: Some(relay(1)), held: false }];
        assert_eq!(candidates(&run_out, &relays, relay(2)), [relay(2)]);
        assert_eq!(candidates(&run_out, &relays, relay(1)), [relay(1), relay(2)]);
    }
}
