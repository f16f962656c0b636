//! The janitor: keeps log, journal and inbox from growing for ever, beside the flow and never in its way.
//!
//! [`outbox`] turns the log's ring, clears its settled slots and trims the journal. [`inbox`] folds what was accepted into
//! the ledger and clears what the dedup window has passed. Each part is a loop of its own; any number may run at once, and
//! one that is frozen or gone holds up neither producers nor consumers. Left out on purpose: decisions. What may go is
//! decided in the database, by functions that a cron job could call as well.

pub mod inbox;
pub mod outbox;
