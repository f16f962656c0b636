//! Sagas: steps in several services that all happen, or are undone in reverse order.
//!
//! ```text
//! saga_start → orchestrator → outbox … participant: barrier, work, saga_reply → inbox → orchestrator → …
//! ```
//!
//! [`state`] is what a saga is, [`definition`] what it should do, [`decide`] the pure step from one state to the next,
//! [`fold`] all steps again from the history, [`verify`] what the tables hold against that.
//! Everything a reply causes is one transaction ([`store`]): the saga's rows, its compensations, its history and the next
//! commands in the outbox. Left out on purpose: the broker; sagas speak through outbox and inbox alone.

pub mod allowed;
pub mod conformance;
pub mod decide;
pub mod definition;
pub mod fold;
pub mod graph;
pub mod orchestrator;
pub mod participant;
pub mod read;
pub mod replies;
pub mod snapshot;
pub mod start;
pub mod state;
pub mod store;
pub mod template;
pub mod verify;
