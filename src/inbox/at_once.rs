//! Accepting and applying in one statement, for a handler that is a SQL function: one round trip a message or a batch,
//! and no transaction that stays open between two.
//!
//! The statement is a transaction of its own: that it succeeded means that everything is committed. What the answers are
//! is decided by the same functions as step by step, and the handler is called, in the order of delivery, for what is
//! new. What must be held is left to the caller, who would have no lock on it in one transaction either.

use super::handler::{Call, HandlerError, SqlHandler, arguments};
use super::{Received, Reception};
use sqlx::{AssertSqlSafe, PgConnection};
use std::time::Duration;

/// Written for what was done or held before: its commit may not have waited for the standby, so this one does.
const MARK: &str = "pg_logical_emit_message(true, 'oncebox', 'known')";

/// The statements that name a function.
#[derive(Debug, Clone)]
pub(super) struct AtOnce {
    one: String,
    all: String,
}

impl AtOnce {
    /// For a function that is called so.
    pub(super) fn of(call: &Call) -> Self {
        let one = call.of("$2, $7, $8::text::jsonb, $9::text::jsonb", "$10");
        let each = call.of("m.id, m.topic, m.payload::jsonb, m.headers::jsonb", "$10");
        Self {
            one: format!(
                "with received as materialized (
                    select oncebox.inbox_receive($1, $2, $3, $4, $5, $6) as answer, clock_timestamp() as at
                )
                select r.answer, (date_part('epoch', r.at - statement_timestamp()) * 1000000)::bigint,
                    case
                        when r.answer = 'new' then {one} is null
                        when r.answer in ('done', 'held') then {MARK} is null
                        else true end,
                    (date_part('epoch', clock_timestamp() - r.at) * 1000000)::bigint
                from received as r"
            ),
            // A volatile function in the list is evaluated after the sort: in the order of n.
            all: format!(
                "select r.answers, (date_part('epoch', r.ended - r.began) * 1000000)::bigint, (
                    select count(c.done) from (
                        select {each} as done
                        from unnest($2::uuid[], $7::text[], $8::text[], $9::text[], r.answers)
                            with ordinality as m(id, topic, payload, headers, answer, n)
                        where m.answer = 'new'
                        order by m.n
                    ) as c),
                    (date_part('epoch', clock_timestamp() - r.ended) * 1000000)::bigint,
                    case when r.answers && '{{done,held}}' then {MARK} end is null
                from oncebox.inbox_receive_batch($1, $2, $3, $4, $5, $6) as r"
            ),
        }
    }
}

/// What became of a message, or of many, and what that took in the database, without the commit.
pub(crate) struct Applied<T> {
    pub(crate) receptions: T,
    pub(crate) inbox: Duration,
    pub(crate) handler: Duration,
}

impl SqlHandler {
    /// Accepts a delivery and, if it is new, applies it; durable on return. Nothing is done if the function cannot take
    /// its payload: step by step it is known whether that matters.
    ///
    /// # Errors
    /// The handler's, the inbox's or the commit's alike; nothing is done then.
    pub(crate) async fn receive_and_apply(
        &self,
        conn: &mut PgConnection,
        consumer: &str,
        message: &Received,
        by_key: bool,
    ) -> Result<Option<Applied<Reception>>, sqlx::Error> {
        let Ok((payload, headers)) = arguments(message) else { return Ok(None) };
        let position = message.position.as_ref();
        let (answer, inbox_us, _, handler_us): (String, i64, bool, i64) =
            sqlx::query_as(AssertSqlSafe(self.at_once.one.as_str()))
                .bind(consumer)
                .bind(message.id.0)
                .bind(position.map(|at| at.source))
                .bind(position.map(|at| at.stream.as_str()))
                .bind(position.map(|at| at.offset))
                .bind(message.key.as_deref().filter(|_| by_key))
                .bind(&message.topic)
                .bind(payload)
                .bind(headers)
                .bind(self.known())
                .fetch_one(conn)
                .await?;
        Ok(Some(Applied { receptions: Reception::of(&answer), inbox: micros(inbox_us), handler: micros(handler_us) }))
    }

    /// Accepts many deliveries and applies the new ones, in this order, while no other batch of the consumer is in a
    /// transaction; durable on return. An answer each.
    ///
    /// # Errors
    /// Of any of them; nothing is done then.
    pub(crate) async fn receive_and_apply_all(
        &self,
        conn: &mut PgConnection,
        consumer: &str,
        messages: &[Received],
        by_key: bool,
    ) -> Result<Applied<Vec<Reception>>, HandlerError> {
        let arguments = messages.iter().map(arguments).collect::<Result<Vec<_>, _>>()?;
        let (payloads, headers): (Vec<&str>, Vec<String>) = arguments.into_iter().unzip();
        let positions = || messages.iter().map(|message| message.position.as_ref());
        let row: (Vec<String>, i64, i64, i64, bool) = sqlx::query_as(AssertSqlSafe(self.at_once.all.as_str()))
            .bind(consumer)
            .bind(messages.iter().map(|message| message.id.0).collect::<Vec<_>>())
            .bind(positions().map(|at| at.map(|at| at.source)).collect::<Vec<_>>())
            .bind(positions().map(|at| at.map(|at| at.stream.as_str())).collect::<Vec<_>>())
            .bind(positions().map(|at| at.map(|at| at.offset)).collect::<Vec<_>>())
            .bind(messages.iter().map(|message| message.key.as_deref().filter(|_| by_key)).collect::<Vec<_>>())
            .bind(messages.iter().map(|message| message.topic.as_str()).collect::<Vec<_>>())
            .bind(payloads)
            .bind(headers)
            .bind(self.known())
            .fetch_one(conn)
            .await?;
        let (answers, inbox_us, _, handler_us, _) = row;
        let receptions = answers.iter().map(|answer| Reception::of(answer)).collect();
        Ok(Applied { receptions, inbox: micros(inbox_us), handler: micros(handler_us) })
    }
}

fn micros(us: i64) -> Duration {
    Duration::from_micros(us.max(0).unsigned_abs())
}
