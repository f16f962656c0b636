//! Handlers that work outside the transaction: look, call, and then the transaction as for any other.
//!
//! The look is the receiving transaction itself, rolled back: what is done, held, held up or cannot be accepted is not
//! called for, and no lock is held while the call lasts. Whatever happens between call and commit, the call is made
//! again, with the same id.

use super::{Failure, MARGIN, TRANSIENT_BACKOFF, Worker, accept_error, ended, within};
use crate::consumer::retry::LEASE;
use crate::consumer::stream;
use crate::inbox::{self, Received, Reception, held};
use sqlx::Connection;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

impl Worker {
    /// Applies a delivery, after the call if the handler makes one. `called` is kept over attempts: what is called for
    /// once in this process is not called for again because the database failed afterwards.
    pub(in crate::consumer) async fn attempt(&mut self, message: &Received, called: &mut bool) -> Result<(), Failure> {
        if self.handler.works_outside() && !*called && self.looks_new(message).await? {
            self.call_out(message).await?;
            *called = true;
        }
        self.apply(message).await
    }

    /// The same for a waiting delivery whose start was counted as `attempt`.
    pub(in crate::consumer) async fn attempt_held(
        &mut self,
        id: Uuid,
        attempt: u32,
        called: &mut bool,
    ) -> Result<Option<held::Due>, Failure> {
        if self.handler.works_outside()
            && !*called
            && let Some(message) = self.look_at_held(id, attempt).await?
        {
            let (handler, options) = (Arc::clone(&self.handler), Arc::clone(&self.options));
            let call = ended(handler.call_out(&message), &options);
            tokio::pin!(call);
            loop {
                tokio::select! {
                    result = &mut call => break result?,
                    // No lock says that it runs.
                    () = tokio::time::sleep(LEASE / 3) => if !self.renew(id, attempt, LEASE).await {
                        return Ok(None);
                    },
                }
            }
            *called = true;
        }
        self.apply_held(id, attempt).await
    }

    async fn call_out(&self, message: &Received) -> Result<(), Failure> {
        ended(self.handler.call_out(message), &self.options).await
    }

    pub(super) async fn looks_new(&mut self, message: &Received) -> Result<bool, Failure> {
        let options = Arc::clone(&self.options);
        let conn = self.session().await?;
        let mut is_new = false;
        let look = async {
            let mut transaction = conn.begin().await?;
            let reception = stream::receive(&mut transaction, &options, message).await.map_err(accept_error)?;
            is_new = reception == Reception::New;
            transaction.rollback().await?;
            Ok(())
        };
        let result = within(2 * MARGIN, look).await;
        self.keep_session(&result).await;
        result.map(|()| is_new)
    }

    /// The waiting delivery, if it has its turn and is not applied yet.
    async fn look_at_held(&mut self, id: Uuid, attempt: u32) -> Result<Option<Received>, Failure> {
        let options = Arc::clone(&self.options);
        let conn = self.session().await?;
        let mut found = None;
        let look = async {
            let mut transaction = conn.begin().await?;
            if let Some(message) = stream::claim(&mut transaction, &options, id, attempt).await? {
                let position = message.position.as_ref();
                if inbox::accept(&mut transaction, &options.name, message.id, position).await.map_err(accept_error)? {
                    found = Some(message);
                }
            }
            transaction.rollback().await?;
            Ok(())
        };
        let result = within(2 * MARGIN, look).await;
        self.keep_session(&result).await;
        result.map(|()| found)
    }

    /// Waits until what the handler depends on may be back; false if the worker is to stop.
    pub(in crate::consumer) async fn pause(
        &self,
        reason: &str,
        retry_after: Option<Duration>,
        failures: u32,
        stop: &CancellationToken,
    ) -> bool {
        let delay = retry_after.unwrap_or_else(|| TRANSIENT_BACKOFF.jittered(failures));
        tracing::warn!(consumer = self.options.name, worker = self.number, reason, ?delay, "paused");
        tokio::select! {
            () = tokio::time::sleep(delay) => true,
            () = stop.cancelled() => false,
        }
    }
}
