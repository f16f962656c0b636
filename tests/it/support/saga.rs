//! Sagas without processes: the test is orchestrator and participant in one, step by step.

use super::Lab;
use oncebox::saga::decide::decide;
use oncebox::saga::definition::{Definition, document_from_text};
use oncebox::saga::state::{Event, Op, Operator, Outcome, Saga};
use oncebox::saga::store::{self, Applied, Definitions};
use serde_json::{Value, json};
use sqlx::types::Json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// A list with everything a step can be: undone, waited for, the pivot, after the pivot.
pub const ORDER: &str = "
name: order
version: 3
deadline: 10m
steps:
- id: reserve
  do: {topic: stock.reserve, body: {sku: $.input.sku}}
  undo: {topic: stock.release, body: {id: $.steps.reserve.output.id}}
  undo_retry: {max: 1}
- id: label
  do: {topic: label.print, body: {key: $.business_key}}
  undo: {topic: label.void, body: {key: $.business_key}}
  retry: {max: 1}
- id: approve
  wait: {signal: approved, timeout: 24h}
- id: charge
  pivot: true
  do: {topic: pay.charge, body: {order: $.business_key, by: $.steps.approve.output.who}}
- id: ship
  do: {topic: ship.order, body: {reserved: $.steps.reserve.output}}
  retry: {max: 1}
";

/// Stores a definition.
pub async fn define(lab: &Lab, text: &str) -> Definition {
    let document = document_from_text(text).expect("a document");
    let definition = Definition::parse(&document).expect("a definition");
    let conn = &mut lab.connect().await;
    store::define(conn, &definition.name, definition.version, &document, Some("test")).await.expect("stored");
    definition
}

/// One saga, moved by hand.
pub struct Driven {
    pub conn: PgConnection,
    pub id: Uuid,
    definitions: Definitions,
    /// How far its clock is ahead.
    ahead_ms: i64,
}

impl Driven {
    /// Of an order, not begun.
    pub async fn start(lab: &Lab, key: &str) -> Self {
        let mut conn = lab.connect().await;
        let id = sqlx::query_scalar(
            "select oncebox.saga_start('order', $1, '{\"sku\": \"s-1\"}', deadline => '10 min', labels => '{\"region\": \"eu\"}')",
        )
        .bind(key)
        .fetch_one(&mut conn)
        .await
        .expect("a saga");
        Self::of(conn, id)
    }

    /// One that is there.
    pub fn of(conn: PgConnection, id: Uuid) -> Self {
        Self { conn, id, definitions: Definitions::default(), ahead_ms: 0 }
    }

    /// What the saga makes of an event.
    pub async fn happen(&mut self, event: Event, cause: Option<Uuid>) -> Saga {
        let mut transaction = self.conn.begin().await.expect("begins");
        let sagas = store::load(&mut transaction, &[self.id]).await.expect("loads");
        let definition = self.definitions.of(&mut transaction, &sagas).await.expect("reads").remove(0).expect("valid");
        let at = store::now(&mut transaction).await.expect("a time") + self.ahead_ms;
        let limits = store::limits(&mut transaction).await.expect("limits");
        let transition = decide(&sagas[0], &definition, &event, at, &limits).expect("allowed");
        let mut applied = [Applied { before: &sagas[0], transition, event: &event, at, cause }];
        store::apply(&mut transaction, &mut applied).await.expect("applies");
        transaction.commit().await.expect("commits");
        let [Applied { transition, .. }] = applied;
        transition.saga
    }

    /// Lets happen what is due at once.
    pub async fn settle(&mut self) -> Saga {
        loop {
            let due: bool =
                sqlx::query_scalar("select coalesce(next_due <= clock_timestamp() + make_interval(secs => $2), false) from oncebox.saga where id = $1")
                    .bind(self.id)
                    .bind(self.ahead_ms as f64 / 1000.0)
                    .fetch_one(&mut self.conn)
                    .await
                    .expect("a saga");
            if !due {
                let mut transaction = self.conn.begin().await.expect("begins");
                let saga = store::load(&mut transaction, &[self.id]).await.expect("loads").remove(0);
                transaction.rollback().await.expect("rolls back");
                return saga;
            }
            self.happen(Event::Due {}, None).await;
        }
    }

    /// The participant works and replies, its reply comes back: all in this database.
    pub async fn answer(&mut self, step: &str, op: Op, outcome: Outcome, output: Option<Value>) -> Saga {
        let mut transaction = self.conn.begin().await.expect("begins");
        let headers: Json<Value> = sqlx::query_scalar(
            "select headers from oncebox.outbox where key = $1::text and headers ->> 'oncebox-step' = $2
                and headers ->> 'oncebox-op' = $3 order by seq desc limit 1",
        )
        .bind(self.id.to_string())
        .bind(step)
        .bind(op.to_string())
        .fetch_one(&mut *transaction)
        .await
        .expect("a command");
        let answer: String = sqlx::query_scalar("select oncebox.saga_barrier($1, $2, $3, $4)")
            .bind(self.id)
            .bind(step)
            .bind(op.to_string())
            .bind(headers["oncebox-epoch"].as_i64().expect("an epoch") as i32)
            .fetch_one(&mut *transaction)
            .await
            .expect("an answer");
        if outcome != Outcome::UndoNoop {
            assert_eq!(answer, "run");
            let said = match outcome {
                Outcome::Succeeded => "succeeded",
                Outcome::Failed => "failed",
                _ => "retry",
            };
            let error = (outcome != Outcome::Succeeded).then_some("out of stock");
            sqlx::query("select oncebox.saga_reply($1, $2, $3, $4)")
                .bind(&headers)
                .bind(said)
                .bind(output.clone().map(Json))
                .bind(error)
                .execute(&mut *transaction)
                .await
                .expect("a reply");
        }
        let (message_id, body): (Uuid, Vec<u8>) = sqlx::query_as(
            "select message_id, body from oncebox.outbox where key = $1::text and topic = 'oncebox.saga.reply'
            order by seq desc limit 1",
        )
        .bind(self.id.to_string())
        .fetch_one(&mut *transaction)
        .await
        .expect("a reply");
        sqlx::query(
            "select oncebox.accept('oncebox.saga', $1, (select source from oncebox.outbox_source
                order by ordinal desc limit 1), 'oncebox.saga.reply#0', nextval('oncebox.outbox_seq'))",
        )
        .bind(message_id)
        .execute(&mut *transaction)
        .await
        .expect("accepted");
        transaction.commit().await.expect("commits");
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        let event = Event::Reply {
            step: step.to_owned(),
            op,
            epoch: headers["oncebox-epoch"].as_i64().expect("an epoch") as i32,
            outcome: serde_json::from_value(body["outcome"].clone()).expect("an outcome"),
            output: serde_json::from_value(body["output"].clone()).expect("an output"),
            error: serde_json::from_value(body["error"].clone()).expect("an error"),
        };
        self.happen(event, Some(message_id)).await;
        self.settle().await
    }

    pub async fn done(&mut self, step: &str) -> Saga {
        self.answer(step, Op::Do, Outcome::Succeeded, Some(json!({ "id": format!("{step}-1") }))).await
    }

    pub async fn undone(&mut self, step: &str) -> Saga {
        self.answer(step, Op::Undo, Outcome::Succeeded, None).await
    }

    /// Sent by somebody, and seen.
    pub async fn signal(&mut self) -> Saga {
        sqlx::query("select oncebox.saga_signal($1, 'approved', '{\"who\": \"ann\"}')")
            .bind(self.id)
            .execute(&mut self.conn)
            .await
            .expect("sent");
        let event = Event::Signal { name: "approved".to_owned(), payload: Some(json!({ "who": "ann" })) };
        self.happen(event, None).await;
        self.settle().await
    }

    /// An order from its beginning to its end.
    pub async fn complete(&mut self) -> Saga {
        self.settle().await;
        self.done("reserve").await;
        self.signal().await;
        self.done("label").await;
        self.done("charge").await;
        self.done("ship").await
    }

    /// One whose label is never printed: of that there is nothing to undo, its reservation is undone.
    pub async fn compensate(&mut self) -> Saga {
        self.settle().await;
        self.done("reserve").await;
        self.elapse(30_000).await;
        self.answer("label", Op::Undo, Outcome::UndoNoop, None).await;
        self.undone("reserve").await
    }

    /// Lets time pass, for this saga alone.
    pub async fn elapse(&mut self, ms: i64) -> Saga {
        self.ahead_ms += ms;
        self.settle().await
    }
}

/// Who decides here.
pub fn operator() -> Operator {
    Operator { who: "ann".to_owned(), why: "a test".to_owned() }
}
