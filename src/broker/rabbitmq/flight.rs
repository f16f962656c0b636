//! The messages in flight on one channel, and what became of each.
//!
//! lapin queues a returned message and hands it to whichever confirm it handles next; a multiple confirm it
//! handles in the order of a hash map. So a confirm tells only that *its* message is settled, and whether that
//! one was returned must be found out from the returns that other confirms carry. What helps is that the broker
//! sends a return before the confirm of the same message, and that lapin handles one thing after the other:
//!
//! * A confirm without a return found the queue of returns empty. Its message's return, if there was one, went
//!   to a confirm that was handled before.
//! * A confirm with another message's return says nothing of its own. Once some confirm that was still missing
//!   afterwards comes without a return, the queue was empty then, and its message's return, if there was one,
//!   went to a confirm that was handled before that.
//! * When no confirm is missing, no return is.
//!
//! So nothing is told of a confirm before all is seen that was handled before it; [`Flight::look`] takes two
//! passes over the missing confirms for that. The confirm of a message not known to be written counts: it may be
//! there, with another's return. But lapin's one thread says that a message is written before it reads on, so
//! before it handles the confirm. Hence a look asks between its passes which messages were written; any other has
//! no confirm that was handled before one that the first pass saw.
//!
//! Several channels, each left to rest between batches, would be simpler. But RabbitMQ keeps order only within
//! a channel: the consumer saw message 5,001 before 4,961.

use super::wire::{self, Place};
use crate::broker::Outcome;
use lapin::{ChannelState, Confirmation, Error, ErrorKind};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use tokio::time::Instant;

/// The confirm that wakes the task is this far behind the oldest missing one: one look for so many messages.
const STRIDE: usize = 1_000;
/// Up to so many missing confirms each wakes the task.
const FEW: usize = 64;

/// Messages in flight, `C` being the promise of a confirm.
pub(super) struct Flight<C> {
    /// In the order of publishing; those with an outcome leave when they are the oldest.
    messages: VecDeque<InFlight<C>>,
    /// Number of the first of `messages`, counted from the channel's first.
    first: u64,
    unconfirmed: usize,
    /// Passes over the missing confirms so far.
    passes: u64,
    /// Messages seen settled before this pass have no return outstanding in lapin's queue.
    emptied: u64,
    /// For what was seen by then, all that was handled before it has been seen.
    conclusive: Conclusive,
    /// The last look saw something that it was not conclusive for.
    unsure: bool,
    /// Something was looked at and not told yet.
    looked: bool,
    returns: HashMap<Place, Vec<(u16, String)>>,
}

/// What [`Flight`] counts, as it stood at an earlier moment.
#[derive(Default)]
struct Conclusive {
    passes: u64,
    emptied: u64,
}

struct InFlight<C> {
    ticket: u64,
    place: Place,
    published_at: Instant,
    state: State<C>,
}

enum State<C> {
    /// Not on the socket yet: lapin gives the promise of the confirm when it is.
    Unwritten,
    /// Not there yet at the pass named, or after it.
    Missing(C, u64),
    /// Confirmed, as was seen at the pass named or after it; `alone` if the confirm carried no return.
    Settled { acked: bool, alone: bool, pass: u64 },
    /// Its outcome has been told.
    Told,
}

/// The number of a message that was written, with the promise of its confirm.
pub(super) type Written<C> = Result<(u64, C), Error>;

impl<C: Future<Output = Result<Confirmation, Error>> + Unpin> Flight<C> {
    pub(super) fn new() -> Self {
        Self {
            messages: VecDeque::new(),
            first: 0,
            unconfirmed: 0,
            passes: 0,
            emptied: 0,
            conclusive: Conclusive::default(),
            unsure: false,
            looked: false,
            returns: HashMap::new(),
        }
    }

    /// Messages whose outcome has not been told.
    pub(super) fn unconfirmed(&self) -> usize {
        self.unconfirmed
    }

    /// Takes a message on; answers its number.
    pub(super) fn board(&mut self, ticket: u64, place: Place) -> u64 {
        self.messages.push_back(InFlight { ticket, place, published_at: Instant::now(), state: State::Unwritten });
        self.unconfirmed += 1;
        self.first + self.messages.len() as u64 - 1
    }

    /// The message of this number was written: from now on its confirm is awaited.
    pub(super) fn written(&mut self, number: u64, confirm: C) {
        self.messages[(number - self.first) as usize].state = State::Missing(confirm, 0);
    }

    /// When the oldest message without a confirm was published; call [`look`](Self::look) before.
    pub(super) fn oldest_missing(&self) -> Option<Instant> {
        let missing = |message: &&InFlight<C>| matches!(message.state, State::Unwritten | State::Missing(..));
        self.messages.iter().find(missing).map(|message| message.published_at)
    }

    /// Messages between the oldest and the newest without an outcome, those that have one included.
    pub(super) fn span(&self) -> usize {
        self.messages.len()
    }

    /// Tells the outcomes that are certain; if there are none, has a confirm wake the task. `next_written` gives
    /// the messages written since, in order, and wakes nobody.
    pub(super) fn poll<W: FnMut() -> Option<Written<C>>>(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<(u64, Outcome)>,
        mut next_written: W,
    ) -> Poll<Result<(), Error>> {
        let before = into.len();
        loop {
            if std::mem::take(&mut self.looked) {
                self.tell(into)?;
            }
            if into.len() > before {
                return Poll::Ready(Ok(()));
            }
            self.take_written(&mut next_written)?;
            // Not only what is to come makes another look worth it.
            if !self.poll_watched(cx)? && !self.unsure {
                return Poll::Pending;
            }
            self.look(&mut next_written)?;
        }
    }

    /// Looks at every confirm that was missing. Takes the wakers off: follow it with [`poll`](Self::poll).
    pub(super) fn look<W: FnMut() -> Option<Written<C>>>(&mut self, mut next_written: W) -> Result<(), Error> {
        self.take_written(&mut next_written)?;
        let found = self.pass(0..self.messages.len())?;
        let seen = Conclusive { passes: self.passes, emptied: self.emptied };
        // Whatever was handled before something that the first pass saw, and was missing when that pass came by,
        // lies before its last find; or it was not known to be written.
        let written = self.take_written(&mut next_written)?;
        self.unsure = self.pass((0..found).chain(written))? > 0;
        self.conclusive = seen;
        self.looked = true;
        Ok(())
    }

    /// Awaits the confirms of messages written since, and answers where they lie.
    pub(super) fn take_written<W: FnMut() -> Option<Written<C>>>(
        &mut self,
        mut next: W,
    ) -> Result<Range<usize>, Error> {
        let mut taken = 0..0;
        while let Some(written) = next() {
            let (number, confirm) = written?;
            let at = (number - self.first) as usize;
            taken = if taken.is_empty() { at..at + 1 } else { taken.start..at + 1 };
            self.written(number, confirm);
        }
        Ok(taken)
    }

    /// Looks at the missing among these confirms; answers how many messages lie up to the last one found.
    fn pass(&mut self, over: impl Iterator<Item = usize>) -> Result<usize, Error> {
        self.passes += 1;
        let mut found = 0;
        for at in over {
            if matches!(self.messages[at].state, State::Missing(..))
                && self.take(at, &mut Context::from_waker(Waker::noop()))?
            {
                found = at + 1;
            }
        }
        Ok(found)
    }

    /// Passes on what the broken channel says to each missing confirm.
    pub(super) fn hear(&mut self, cx: &mut Context<'_>, heard: &mut Vec<Error>) {
        for at in 0..self.messages.len() {
            heard.extend(self.take(at, cx).err());
        }
    }

    /// Takes in one confirm, if it is there; false if it is missing.
    fn take(&mut self, at: usize, cx: &mut Context<'_>) -> Result<bool, Error> {
        let message = &mut self.messages[at];
        let State::Missing(confirm, missing_at) = &mut message.state else { return Ok(true) };
        let Poll::Ready(confirmation) = Pin::new(confirm).poll(cx) else {
            *missing_at = self.passes;
            return Ok(false);
        };
        let missing_at = *missing_at;
        // Should it be an error: a promise must not be asked again.
        message.state = State::Unwritten;
        let (acked, returned) = match confirmation? {
            Confirmation::Ack(returned) => (true, returned),
            Confirmation::Nack(returned) => (false, returned),
            // Only without confirm mode: taking it for an ack would lose messages.
            Confirmation::NotRequested => {
                let context = "publishing on a channel that is not in confirm mode";
                return Err(ErrorKind::InvalidChannelState(ChannelState::Connected, context).into());
            }
        };
        message.state = State::Settled { acked, alone: returned.is_none(), pass: self.passes };
        match returned {
            None => self.emptied = self.emptied.max(missing_at),
            Some(returned) => {
                let place = wire::place(&returned.delivery.properties).unwrap_or_default();
                let told = (returned.reply_code, returned.reply_text.to_string());
                self.returns.entry(place).or_default().push(told);
            }
        }
        Ok(true)
    }

    /// True if one of the confirms that speak for the others is there: the newest, and one a stride behind the
    /// oldest, because a queue that is slow to confirm must not hold up the outcomes of the rest. When few are
    /// missing, each of them: while messages trickle in, the newest is always one that was only just published.
    fn poll_watched(&mut self, cx: &mut Context<'_>) -> Result<bool, Error> {
        let missing = |at: &usize| matches!(self.messages[*at].state, State::Missing(..));
        let first: Vec<usize> = (0..self.messages.len()).filter(missing).take(FEW + 1).collect();
        let watched = if first.len() <= FEW {
            first
        } else {
            let strided = (0..self.messages.len()).filter(missing).nth(STRIDE);
            strided.into_iter().chain((0..self.messages.len()).rev().find(missing)).collect()
        };
        let mut there = false;
        for at in watched {
            there |= self.take(at, cx)?;
        }
        Ok(there)
    }

    /// Tells every outcome that is certain after the last look.
    fn tell(&mut self, into: &mut Vec<(u64, Outcome)>) -> Result<(), Error> {
        let none_missing = self.oldest_missing().is_none();
        for message in &mut self.messages {
            let State::Settled { acked, alone, pass } = message.state else { continue };
            let conclusive = match alone {
                true => pass <= self.conclusive.passes,
                false => pass < self.conclusive.emptied,
            };
            let returned = match self.returns.is_empty() {
                true => None,
                false => self.returns.get_mut(&message.place).and_then(Vec::pop),
            };
            let outcome = match returned {
                Some((code, text)) if acked => Outcome::Returned { code, text },
                None if !conclusive && !none_missing => continue,
                None if acked => Outcome::Confirmed,
                // A message that was nacked was not taken, whatever else is said of it.
                _ => Outcome::Nacked,
            };
            into.push((message.ticket, outcome));
            message.state = State::Told;
            self.unconfirmed -= 1;
        }
        self.returns.retain(|_, returns| !returns.is_empty());
        while matches!(self.messages.front(), Some(InFlight { state: State::Told, .. })) {
            self.messages.pop_front();
            self.first += 1;
        }
        // A return that fits no message means that some outcome told was wrong.
        if none_missing && !self.returns.is_empty() {
            let context = "the broker returned a message that was not in flight";
            return Err(ErrorKind::InvalidChannelState(ChannelState::Connected, context).into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Envelope, Message, MessageId, Position};
    use lapin::message::{BasicReturnMessage, Delivery};
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;
    use uuid::Uuid;

    /// A broker, and lapin's way with returns and confirms, one step at a time in an order drawn by chance.
    struct Wire {
        random: u64,
        /// The oldest message lies in a queue that confirms only when this is lifted.
        stuck: bool,
        /// Messages not on the socket yet: number and fate.
        unwritten: VecDeque<(u64, Outcome)>,
        /// Messages written, which this side has not been told.
        written: VecDeque<u64>,
        /// Messages without a confirm: number, fate, and whether the return is on its way.
        open: Vec<(u64, Outcome, bool)>,
        queue: VecDeque<BasicReturnMessage>,
        confirms: HashMap<u64, Confirmation>,
    }

    impl Wire {
        fn draw(&mut self, below: usize) -> usize {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) as usize % below
        }

        fn step(&mut self) {
            if self.draw(2) == 0
                && let Some((number, fate)) = self.unwritten.pop_front()
            {
                self.open.push((number, fate, false));
                return self.written.push_back(number);
            }
            let skipped = usize::from(self.stuck);
            if self.open.len() <= skipped {
                return;
            }
            // Near the oldest mostly, as brokers confirm.
            let open = self.open.len() - skipped;
            let reach = if self.draw(4) == 0 { open } else { open.min(3) };
            let at = self.draw(reach) + skipped;
            match self.draw(3) {
                0 => self.hand_back(at),
                1 => self.confirm(at),
                _ => {
                    for left in (1..=at + 1 - skipped).rev() {
                        let next = self.draw(left) + skipped;
                        self.confirm(next);
                    }
                }
            }
        }

        fn hand_back(&mut self, at: usize) {
            let (number, fate, on_its_way) = &mut self.open[at];
            if matches!(fate, Outcome::Returned { .. }) && !*on_its_way {
                *on_its_way = true;
                self.queue.push_back(returned(*number));
            }
        }

        fn confirm(&mut self, at: usize) {
            self.hand_back(at);
            let (number, fate, _) = self.open.remove(at);
            let returned = self.queue.pop_front();
            let nacked = fate == Outcome::Nacked;
            let confirm = if nacked { Confirmation::Nack(returned) } else { Confirmation::Ack(returned) };
            self.confirms.insert(number, confirm);
        }
    }

    /// What the publisher gives a flight: lapin's thread goes on between two questions.
    fn next_written(wire: &Rc<RefCell<Wire>>) -> Option<Written<Promise>> {
        let mut this = wire.borrow_mut();
        while this.draw(4) == 0 {
            this.step();
        }
        this.written.pop_front().map(|number| Ok((number, Promise(Rc::clone(wire), number))))
    }

    struct Promise(Rc<RefCell<Wire>>, u64);

    impl Future for Promise {
        type Output = Result<Confirmation, Error>;
        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            let mut wire = self.0.borrow_mut();
            // lapin's thread goes on between two polls.
            while wire.draw(4) == 0 {
                wire.step();
            }
            wire.confirms.remove(&self.1).map_or(Poll::Pending, |confirmation| Poll::Ready(Ok(confirmation)))
        }
    }

    fn returned(number: u64) -> BasicReturnMessage {
        let mut delivery = Delivery::mock(0, "".into(), "".into(), false, Vec::new());
        delivery.properties = wire::properties(&envelope(number)).expect("it fits");
        BasicReturnMessage { delivery, reply_code: 312, reply_text: "NO_ROUTE".into() }
    }

    fn no_route() -> Outcome {
        Outcome::Returned { code: 312, text: "NO_ROUTE".to_owned() }
    }

    fn place(number: u64) -> Place {
        (Uuid::nil(), "t#0".to_owned(), number as i64)
    }

    fn envelope(number: u64) -> Envelope {
        Envelope {
            message: Message {
                id: MessageId(Uuid::nil()),
                topic: "t".to_owned(),
                key: None,
                content_type: String::new(),
                headers: Default::default(),
                body: Vec::new(),
                published_at_s: 0,
            },
            position: Position { source: Uuid::nil(), stream: "t#0".to_owned(), offset: number as i64 },
            ordinal: number as i64,
        }
    }

    /// Publishes 400 messages with a window, and answers the outcomes told as (number, fate, told), with how many
    /// were told while the first message was stuck. With `clock`, looks between the polls as well.
    fn fly(seed: u64, stuck: bool, clock: bool) -> (Vec<(u64, Outcome, Outcome)>, usize) {
        let wire = Rc::new(RefCell::new(Wire {
            random: seed,
            stuck,
            unwritten: VecDeque::new(),
            written: VecDeque::new(),
            open: Vec::new(),
            queue: VecDeque::new(),
            confirms: HashMap::new(),
        }));
        let (mut flight, mut fates, mut told, mut idle, mut before) = (Flight::new(), Vec::new(), Vec::new(), 0, 0);
        let mut cx = Context::from_waker(Waker::noop());
        while told.len() < 400 {
            assert!(idle < 10_000, "the flight never ended");
            if fates.len() < 400 && flight.unconfirmed() < 40 && wire.borrow_mut().draw(3) > 0 {
                let number = fates.len() as u64;
                let fate = match wire.borrow_mut().draw(4) {
                    0 => no_route(),
                    1 => Outcome::Nacked,
                    _ => Outcome::Confirmed,
                };
                fates.push(fate.clone());
                assert_eq!(flight.board(number, place(number)), number);
                wire.borrow_mut().unwritten.push_back((number, fate));
            } else if wire.borrow_mut().draw(8) == 0 {
                flight.take_written(|| next_written(&wire)).expect("every write succeeds");
            } else if clock && wire.borrow_mut().draw(8) == 0 {
                flight.look(|| next_written(&wire)).expect("every confirm is one");
            } else if let Poll::Ready(result) = flight.poll(&mut cx, &mut told, || next_written(&wire)) {
                result.expect("every return is somebody's");
                idle = 0;
            } else {
                idle += 1;
                if idle > 1_000 && wire.borrow().stuck {
                    before = told.len();
                    wire.borrow_mut().stuck = false;
                }
            }
        }
        assert_eq!((flight.unconfirmed(), flight.span()), (0, 0));
        let told = told.into_iter().map(|(number, told)| (number, fates[number as usize].clone(), told));
        (told.collect(), before)
    }

    // Goal: no outcome is another message's, whatever the order of returns and confirms, and whenever we look.
    #[test]
    fn outcomes_are_exact_in_any_order() {
        for seed in 0..300 {
            for (number, fate, told) in fly(seed, seed % 2 == 0, seed % 4 < 2).0 {
                assert_eq!(fate, told, "message {number}, seed {seed}");
            }
        }
    }

    // Goal: a queue that does not confirm holds up its own messages, not those of other queues for good.
    #[test]
    fn a_slow_queue_does_not_hold_up_the_rest() {
        let told: usize = (0..100).map(|seed| fly(seed, true, false).1).sum();
        assert!(told > 100 * 395, "{told} of 40,000 outcomes were told");
    }

    type Promised = Pin<Box<dyn Future<Output = Result<Confirmation, Error>>>>;

    /// An ack that is there after it was asked for so many times in vain.
    fn ack_after(mut early: usize, returned: Option<BasicReturnMessage>) -> Promised {
        let mut ack = Some(Confirmation::Ack(returned));
        Box::pin(std::future::poll_fn(move |_| match early {
            0 => Poll::Ready(Ok(ack.take().expect("a promise is not asked again"))),
            _ => {
                early -= 1;
                Poll::Pending
            }
        }))
    }

    const NEVER: usize = usize::MAX;

    // Goal: a message is not told confirmed while its return lies on a confirm that came, with its own, before
    // this side knew that the other message was written.
    #[test]
    fn a_return_on_the_confirm_of_a_message_just_written_is_found() {
        let mut flight: Flight<Promised> = Flight::new();
        let first = flight.board(0, place(0));
        let second = flight.board(1, place(1));
        // One multiple ack for both is handled, the second's confirm first, when the first's is asked for.
        let handled = Rc::new(Cell::new(false));
        let handle = Rc::clone(&handled);
        let confirm = std::future::poll_fn(move |_| {
            handle.set(true);
            Poll::Ready(Ok(Confirmation::Ack(None)))
        });
        flight.written(first, Box::pin(confirm));
        let next_written = || handled.take().then(|| Ok((second, ack_after(0, Some(returned(0))))));
        let mut told = Vec::new();
        let poll = flight.poll(&mut Context::from_waker(Waker::noop()), &mut told, next_written);
        assert!(matches!(poll, Poll::Ready(Ok(()))));
        assert_eq!(told, [(0, no_route()), (1, Outcome::Confirmed)]);
    }

    // Goal: that the queue of returns was empty counts once all is seen that was handled before it was.
    #[test]
    fn a_return_handled_before_the_queue_was_empty_is_found() {
        let mut flight = Flight::new();
        // Returns come for 4, 5, 0; then confirms for 0, 2, 3 and 1. The second look sees 1 but has passed 3 by.
        let confirms = [(0, Some(4)), (2, None), (1, Some(5)), (2, Some(0)), (NEVER, None), (NEVER, None)];
        for (number, (early, carried)) in (0..).zip(confirms) {
            flight.board(number, place(number));
            flight.written(number, ack_after(early, carried.map(returned)));
        }
        flight.look(|| None).expect("every confirm is one");
        flight.look(|| None).expect("every confirm is one");
        let mut told = Vec::new();
        let poll = flight.poll(&mut Context::from_waker(Waker::noop()), &mut told, || None);
        assert!(matches!(poll, Poll::Ready(Ok(()))));
        assert!(told.contains(&(0, no_route())), "{told:?}");
    }

    // Goal: what came during a look is told though nothing else comes, not at the next tick only.
    #[test]
    fn a_confirm_that_comes_during_a_look_is_told() {
        let mut flight = Flight::new();
        // The first lie in a queue that does not confirm, and are too many to be watched each.
        let first = FEW as u64;
        for (number, early) in (0..).zip(std::iter::repeat_n(NEVER, FEW).chain([1, 0, 0])) {
            flight.board(number, place(number));
            flight.written(number, ack_after(early, None));
        }
        let (mut cx, mut told) = (Context::from_waker(Waker::noop()), Vec::new());
        while let Poll::Ready(result) = flight.poll(&mut cx, &mut told, || None) {
            result.expect("every confirm is one");
        }
        let told: Vec<u64> = told.into_iter().map(|(number, _)| number).collect();
        assert_eq!(told, [first + 1, first + 2, first]);
    }
}
