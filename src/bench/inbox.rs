//! Drain of a queue: a consumer in batches and one message a transaction, beside what the same handler does without an inbox
//! and what a bare client takes from the broker.

use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side};
use super::flow::{Consuming, EFFECTS, Flow, with_queue_for};
use super::report::Measurement;
use super::scratch::{Scratch, body, channel, envelope};
use super::stage::Stage;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, Outcome, Publisher};
use crate::consumer::Order;
use anyhow::{Context, bail};
use clap::Args;
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Longest drain.
const LIMIT: Duration = Duration::from_secs(300);
/// Deliveries on their way to the bare client: more is no faster.
const PREFETCH: u16 = 1_000;

/// Effects that share ten rows, beside those that have a row each.
const HOT: &str = "
    create table hot (id int primary key, total bigint not null) with (fillfactor = 10);
    insert into hot select i, 0 from generate_series(0, 9) as i;
    create function shared(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$ begin
        update hot set total = total + 1 where id = (headers ->> 'oncebox-offset')::bigint * 7919 % 10; end $$;";

/// How many effects there are, whichever handler made them.
const DONE: &str = "select (select count(*) from effect) + (select sum(total)::bigint from hot)";

const BROKER_ALONE: &str = "bare client: consume and ack";

#[derive(Debug, Args)]
pub(super) struct InboxBench {
    /// Messages in the queue
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(i64).range(1..=100_000_000))]
    messages: i64,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Workers with one message a transaction each, one number for each comparison; the first one is what batches are
    /// compared with
    #[arg(long, value_delimiter = ',', default_values_t = [8, 32], value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Vec<u32>,
    /// Most messages of a batch
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    batch: u32,
}

/// What is measured in its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    BrokerAlone,
    /// The handler without an inbox, so many messages a transaction, in so many sessions.
    Bare {
        handler: &'static str,
        sessions: usize,
        batch: usize,
    },
    Consumer {
        handler: &'static str,
        workers: usize,
        batch: usize,
    },
}

impl How {
    fn name(self) -> String {
        match self {
            Self::BrokerAlone => BROKER_ALONE.to_owned(),
            Self::Bare { sessions, batch: 1, .. } => format!("bare SQL, {sessions} sessions, one a transaction"),
            Self::Bare { batch, .. } => format!("bare SQL, one session, {batch} a transaction"),
            Self::Consumer { workers, batch: 1, .. } => format!("consumer, {workers} workers, one a transaction"),
            Self::Consumer { batch, .. } => format!("consumer, batches of up to {batch}"),
        }
    }

    /// Ceilings first. The consumer is held against the same handler without an inbox, in batches if it makes them.
    fn side(self, batch: usize) -> Side {
        match self {
            Self::BrokerAlone | Self::Bare { .. } => Side::ceiling(self.name()),
            Self::Consumer { handler, workers, batch: 1 } => {
                Side::subject(self.name()).against(Self::Bare { handler, sessions: workers, batch: 1 }.name())
            }
            Self::Consumer { handler, .. } => {
                Side::subject(self.name()).against(Self::Bare { handler, sessions: 1, batch }.name())
            }
        }
    }
}

pub(super) async fn run(bench: &InboxBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let batch = bench.batch as usize;
    let mut measurement = Measurement::new("inbox", "How fast a queue is drained into effects")
        .setting("messages", bench.messages)
        .setting("payload", format!("{} B", bench.payload))
        .setting("queue", "quorum, consumer without order");
    for (handler, what) in [("own", "effects of a row each"), ("shared", "effects that share ten rows")] {
        let mut hows = vec![How::BrokerAlone, How::Bare { handler, sessions: 1, batch }];
        let workers = if handler == "own" { &bench.workers[..] } else { &bench.workers[..1] };
        hows.extend(workers.iter().map(|&n| How::Bare { handler, sessions: n as usize, batch: 1 }));
        hows.push(How::Consumer { handler, workers: 8, batch });
        hows.extend(workers.iter().map(|&n| How::Consumer { handler, workers: n as usize, batch: 1 }));
        let mut section = Section::new(what, "msg/s", Better::Higher);
        for how in &hows {
            section = section.side(how.side(batch));
        }
        let single = How::Consumer { handler, workers: workers[0] as usize, batch: 1 };
        let batches = How::Consumer { handler, workers: 8, batch };
        let mut compared = Section::new(format!("{what}: batches beside one by one"), "msg/s", Better::Higher)
            .side(Side::baseline(single.name()))
            .side(Side::subject(batches.name()).against(single.name()));
        for turn in stage.turns(hows.len()) {
            let how = hows[turn.side];
            let measured = measure(bench, stage, how).await?;
            if how == single || how == batches {
                compared.record(usize::from(how == batches), measured.clone());
            }
            stage.record(&mut section, turn, measured);
        }
        measurement = measurement.section(&section).section(&compared);
    }
    Ok(measurement
        .note(
            "Bare SQL calls the same handler with the same arguments, without broker and inbox: the least that the effects \
             alone cost this database. The bare client is lapin, with no database. Each is one half of the consumer's work, \
             on the cores that the consumer must share between both.",
        )
        .note("From the first delivery to the last acknowledgement; each effect is counted afterwards, and once."))
}

async fn measure(bench: &InboxBench, stage: &Stage, how: How) -> anyhow::Result<Measured> {
    let scratch = Scratch::create(stage.servers.database_url()?).await?;
    let spent = measure_on(bench, stage, &scratch, how).await;
    scratch.drop().await?;
    Ok(Measured::rate(bench.messages.unsigned_abs(), &spent?))
}

async fn measure_on(bench: &InboxBench, stage: &Stage, scratch: &Scratch, how: How) -> anyhow::Result<Spent> {
    let mut conn = PgConnection::connect(&scratch.url).await?;
    conn.execute(EFFECTS).await?;
    conn.execute(HOT).await?;
    conn.execute("checkpoint").await?;
    let spent = match how {
        How::BrokerAlone => {
            return with_queue_for(stage, Order::None, async |queue| {
                fill(bench, stage, queue).await?;
                consume_and_ack(bench, stage, queue).await
            })
            .await;
        }
        How::Bare { handler, sessions, batch } => bare(bench, stage, scratch, handler, sessions, batch).await?,
        How::Consumer { handler, workers, batch } => {
            with_queue_for(stage, Order::None, async |queue| {
                fill(bench, stage, queue).await?;
                let mut flow = Flow::new(stage, false)?;
                let meter = stage.servers.meter();
                flow.consumer(scratch, queue, Consuming { handler, workers, batch, order: Order::None })?;
                let ended = flow.applied(bench.messages.unsigned_abs(), LIMIT).await?;
                let began = flow.notes.first_delivery.get().context("something was delivered")?;
                let spent = meter.spent_between(*began, ended);
                flow.end().await?;
                Ok(spent)
            })
            .await?
        }
    };
    let done: i64 = sqlx::query_scalar(DONE).fetch_one(&mut conn).await?;
    anyhow::ensure!(done == bench.messages, "{done} effects of {} messages", bench.messages);
    Ok(spent)
}

/// The handler alone, with what a consumer would hand to it.
async fn bare(
    bench: &InboxBench,
    stage: &Stage,
    scratch: &Scratch,
    handler: &'static str,
    sessions: usize,
    batch: usize,
) -> anyhow::Result<Spent> {
    let body: Arc<str> = body(bench.payload).into();
    let next = Arc::new(AtomicI64::new(1));
    let mut work = JoinSet::new();
    let mut conns = Vec::new();
    for _ in 0..sessions {
        conns.push(PgConnection::connect(&scratch.url).await?);
    }
    let meter = stage.servers.meter();
    for mut conn in conns {
        let (next, body, messages) = (Arc::clone(&next), Arc::clone(&body), bench.messages);
        work.spawn(async move {
            let call = format!(
                "select {handler}(m.id, 'order.placed', m.payload::jsonb, m.headers::jsonb)
                from unnest($1::uuid[], $2::text[], $3::text[]) with ordinality as m(id, payload, headers, n) order by m.n"
            );
            loop {
                let from = next.fetch_add(batch as i64, Ordering::SeqCst);
                let numbers = from..(from + batch as i64).min(messages + 1);
                if numbers.is_empty() {
                    return anyhow::Ok(());
                }
                let ids: Vec<Uuid> = numbers.clone().map(|_| Uuid::now_v7()).collect();
                let payloads = vec![&*body; ids.len()];
                let headers: Vec<String> = numbers.map(headers).collect();
                let call = sqlx::query(AssertSqlSafe(call.as_str())).bind(ids).bind(payloads).bind(headers);
                tokio::time::timeout(LIMIT, call.execute(&mut conn)).await.context("a call took too long")??;
            }
        });
    }
    while let Some(ended) = work.join_next().await {
        ended.context("a session")??;
    }
    Ok(meter.spent())
}

fn headers(ordinal: i64) -> String {
    let source = Uuid::nil();
    format!(r#"{{"oncebox-source": "{source}", "oncebox-stream": "order.placed#0", "oncebox-offset": {ordinal}}}"#)
}

/// A client without a database.
async fn consume_and_ack(bench: &InboxBench, stage: &Stage, queue: &str) -> anyhow::Result<Spent> {
    let channel = channel(&stage.servers).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let meter = stage.servers.meter();
    let mut consumer = channel
        .basic_consume(queue.into(), "bench".into(), BasicConsumeOptions::default(), FieldTable::default())
        .await?;
    let mut began = None;
    for _ in 0..bench.messages {
        let next = tokio::time::timeout(LIMIT, consumer.next()).await.context("no delivery in time")?;
        let delivery = next.context("the consumer was cancelled")??;
        began.get_or_insert_with(Instant::now);
        channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default()).await?;
    }
    Ok(meter.spent_between(began.context("something was delivered")?, Instant::now()))
}

/// Publishes what is to be drained.
async fn fill(bench: &InboxBench, stage: &Stage, exchange: &str) -> anyhow::Result<()> {
    let mut publisher = RabbitMq::new(RabbitMqOptions::new(stage.servers.amqp_url()?))?.publisher(exchange).await?;
    let body = body(bench.payload);
    let mut outcomes = Vec::new();
    for ordinal in 1..=bench.messages {
        while publisher.capacity() == 0 {
            publisher.outcomes(&mut outcomes).await?;
        }
        publisher.publish(ordinal.unsigned_abs(), &envelope(ordinal, &body, 0)).await?;
    }
    while publisher.unconfirmed() > 0 {
        publisher.outcomes(&mut outcomes).await?;
    }
    if let Some((ordinal, outcome)) = outcomes.iter().find(|(_, outcome)| *outcome != Outcome::Confirmed) {
        bail!("message {ordinal} is not confirmed: {outcome:?}");
    }
    publisher.close().await;
    Ok(())
}
