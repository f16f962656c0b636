//! Exactly-once messaging for teams that run Postgres and RabbitMQ.
//!
//! ```text
//! app transaction → outbox → relay → broker → consumer → inbox → handler's transaction
//! ```
//!
//! An app calls `oncebox.publish` in SQL, or [`outbox::publish`] here, inside its own transaction. The relay reads the
//! outbox by snapshot windows and publishes with confirms. The consumer's inbox deduplicates by message id inside the
//! handler's own transaction, so each effect happens exactly once.
//!
//! With `default-features = false` the crate is the producer's half alone.

pub mod message;
pub mod outbox;

#[cfg(feature = "cli")]
pub mod api;
#[cfg(feature = "cli")]
pub mod audit;
#[cfg(feature = "cli")]
pub mod backoff;
#[cfg(feature = "cli")]
pub mod bench;
#[cfg(feature = "cli")]
pub mod broker;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod config;
#[cfg(feature = "cli")]
pub mod consumer;
#[cfg(feature = "cli")]
pub mod db;
#[cfg(feature = "cli")]
pub mod demo;
#[cfg(feature = "cli")]
pub mod doctor;
#[cfg(feature = "cli")]
pub mod failpoints;
#[cfg(feature = "cli")]
pub mod http;
#[cfg(feature = "cli")]
pub mod inbox;
#[cfg(feature = "cli")]
pub mod janitor;
#[cfg(feature = "cli")]
pub mod migrate;
#[cfg(feature = "cli")]
pub mod node;
#[cfg(feature = "cli")]
pub mod parked;
#[cfg(feature = "cli")]
pub mod ranges;
#[cfg(feature = "cli")]
pub mod relay;
#[cfg(feature = "cli")]
pub mod replay;
#[cfg(feature = "cli")]
pub mod saga;
#[cfg(feature = "cli")]
pub mod status;
#[cfg(feature = "cli")]
pub mod streams;
#[cfg(feature = "cli")]
pub mod supervise;
#[cfg(feature = "cli")]
pub mod telemetry;
#[cfg(feature = "cli")]
pub mod topic;
