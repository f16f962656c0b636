//! Handlers that are one SQL function: a delivery is accepted, applied and committed in one statement.
//!
//! If that fails, whose fault it was is asked with the look that handlers outside the transaction begin with: a message
//! that still looks new has failed in its handler.

use super::{Failure, MARGIN, Times, Worker, handler_failure, within};
use crate::consumer::Order;
use crate::db;
use crate::failpoints;
use crate::inbox::handler::HandlerError;
use crate::inbox::held::Reason;
use crate::inbox::{Received, Reception, held};
use std::sync::Arc;

/// What is one statement otherwise.
const STEPS: &[&str] = &["consumer.accepted", "consumer.handled"];

impl Worker {
    /// Brings a delivery to a committed outcome in one statement; false if it must go step by step.
    pub(super) async fn apply_at_once(&mut self, message: &Received) -> Result<bool, Failure> {
        let (options, handler) = (Arc::clone(&self.options), Arc::clone(&self.handler));
        let Some(function) = handler.as_function() else { return Ok(false) };
        if options.order == Order::Stream || failpoints::armed(STEPS) {
            return Ok(false);
        }
        let limit = options.handler_timeout + 2 * MARGIN;
        let mut took = None;
        let conn = self.session().await?;
        let work = async {
            let by_key = options.order == Order::Key;
            let applied = db::watched(function.receive_and_apply(conn, &options.name, message, by_key)).await;
            let applied = applied.map_err(|error| handler_failure(HandlerError::Database(error)))?;
            let Some(applied) = applied.confirmed(conn).await? else { return Ok(false) };
            if applied.receptions == Reception::New {
                took = Some(Times { inbox: applied.inbox, handler: applied.handler });
            }
            if let Some(reason @ Reason::BehindKey) = applied.receptions.holds() {
                db::fenced(async { Ok(held::hold(conn, &options.name, message, &reason).await?) }).await?;
            }
            failpoints::pass("consumer.committed");
            Ok(true)
        };
        let result = within(limit, work).await;
        self.keep_session(&result).await;
        self.took = took;
        match result {
            // Not the inbox's fault, and nobody else has applied it meanwhile.
            Err(Failure::Handler(error)) => match self.looks_new(message).await? {
                true => Err(Failure::Handler(error)),
                false => Ok(false),
            },
            result => result,
        }
    }
}
