//! Drain of a queue: a consumer in batches, and one with as many workers as asked, one message a transaction, in turn.

use super::{Scratch, body, envelope, median, with_queue};
use crate::backoff::Backoff;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, Outcome, Publisher};
use crate::config::Config;
use crate::consumer::{self, ConsumerOptions, Order};
use crate::inbox::handler::SqlHandler;
use anyhow::bail;
use clap::Args;
use comfy_table::Table;
use sqlx::{Connection, Executor, PgConnection};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest drain.
const LIMIT: Duration = Duration::from_secs(300);

/// Two handlers: each effect a row of its own, and effects that share ten rows.
const HANDLERS: &str = "
    create table effect (message_id uuid, payload jsonb);
    create table hot (id int primary key, total bigint not null) with (fillfactor = 10);
    insert into hot select i, 0 from generate_series(0, 9) as i;
    create function own(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$ begin insert into effect values (message_id, payload); end $$;
    create function shared(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$ begin
        update hot set total = total + 1 where id = (headers ->> 'oncebox-offset')::bigint * 7919 % 10; end $$;";

#[derive(Debug, Args)]
pub(super) struct InboxBench {
    /// Messages in the queue
    #[arg(long, default_value_t = 10_000)]
    messages: i64,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Workers with one message a transaction each
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Most messages of a batch
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// Times each is measured
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

pub(super) async fn run(bench: InboxBench, config: &Config) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.set_header(["effects", "how", "msg/s, each run", "median", "ratio of medians"]);
    for (handler, what) in [("own", "a row each"), ("shared", "ten rows for all")] {
        let (mut single, mut batches) = (Vec::new(), Vec::new());
        for run in 1..=bench.runs {
            for (batch, rates) in [(1, &mut single), (bench.batch, &mut batches)] {
                let rate = with_queue(config, async |queue| drain(&bench, config, queue, handler, batch).await).await?;
                eprintln!("run {run}: {what}, batch {batch}: {rate:.0}/s");
                rates.push(rate);
            }
        }
        let base = median(single.clone());
        let workers = format!("{} workers, one by one", bench.workers);
        for (how, rates) in [(workers, single), (format!("batches of {}", bench.batch), batches)] {
            let each: Vec<String> = rates.iter().map(|rate| format!("{rate:.0}")).collect();
            let rate = median(rates);
            table.add_row([what, &how, &each.join(" "), &format!("{rate:.0}"), &format!("{:.2}", rate / base)]);
        }
    }
    println!("{} messages of {} bytes from a quorum queue", bench.messages, bench.payload);
    println!("{table}");
    Ok(())
}

async fn drain(bench: &InboxBench, config: &Config, queue: &str, handler: &str, batch: usize) -> anyhow::Result<f64> {
    let scratch = Scratch::create(config.database_url()?).await?;
    let mut conn = PgConnection::connect(&scratch.url).await?;
    conn.execute(HANDLERS).await?;
    fill(bench, config, queue).await?;
    conn.execute("checkpoint").await?;
    let options = ConsumerOptions {
        name: "bench".to_owned(),
        database_url: scratch.url.clone(),
        outbox_url: None,
        queue: queue.to_owned(),
        exchange: queue.to_owned(),
        bindings: vec!["#".to_owned()],
        concurrency: bench.workers,
        batch,
        max_attempts: 5,
        order: Order::None,
        backoff: Backoff { initial: Duration::from_secs(1), cap: Duration::from_secs(10) },
        handler_timeout: Duration::from_secs(60),
        drain_deadline: Duration::from_secs(10),
    };
    let broker = RabbitMq::new(RabbitMqOptions::new(config.amqp_url()?))?;
    let shutdown = CancellationToken::new();
    let handler = Arc::new(SqlHandler::new(handler)?);
    let began = Instant::now();
    let consumer = tokio::spawn(consumer::run(Arc::new(broker), handler, options, shutdown.clone()));
    loop {
        let applied: i64 = sqlx::query_scalar("select count(*) from oncebox.inbox").fetch_one(&mut conn).await?;
        if applied >= bench.messages {
            break;
        }
        if began.elapsed() > LIMIT || consumer.is_finished() {
            bail!("the consumer did not drain the queue: {applied} messages after {:?}", began.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let rate = bench.messages as f64 / began.elapsed().as_secs_f64();
    shutdown.cancel();
    consumer.await??;
    scratch.drop().await?;
    Ok(rate)
}

/// Publishes what is to be drained.
async fn fill(bench: &InboxBench, config: &Config, exchange: &str) -> anyhow::Result<()> {
    let mut publisher = RabbitMq::new(RabbitMqOptions::new(config.amqp_url()?))?.publisher(exchange).await?;
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
