//! Drain of a backlog: the relay, and a bare lapin publisher of the same messages, in turn.

use super::{Scratch, body, channel, cpu_seconds, envelope, median, with_queue};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions, properties};
use crate::config::Config;
use crate::relay::{self, RelayOptions};
use anyhow::{Context, bail};
use clap::Args;
use comfy_table::Table;
use lapin::Confirmation;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use sqlx::{Connection, PgConnection};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Unconfirmed messages of the bare publisher: more is no faster.
const WINDOW: usize = 5_000;
/// Longest drain.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
pub(super) struct RelayBench {
    /// Messages of the backlog
    #[arg(long, default_value_t = 200_000)]
    messages: i64,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Ordering keys, 0 for none
    #[arg(long, default_value_t = 0)]
    keys: i64,
    /// Times each is measured
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

/// Messages a second, and CPU seconds of this process for 100,000.
#[derive(Debug, Clone, Copy)]
struct Figure {
    rate: f64,
    cpu: f64,
}

pub(super) async fn run(bench: RelayBench, config: &Config) -> anyhow::Result<()> {
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for run in 1..=bench.runs {
        let figure = with_queue(config, async |queue| lapin_alone(&bench, config, queue).await).await?;
        eprintln!("run {run}: lapin {:.0}/s", figure.rate);
        bare.push(figure);
        let figure = with_queue(config, async |queue| drain(&bench, config, queue).await).await?;
        eprintln!("run {run}: relay {:.0}/s", figure.rate);
        ours.push(figure);
    }
    let mut table = Table::new();
    table.set_header(["what", "msg/s, each run", "median", "ratio of medians", "CPU-s of the process / 100k"]);
    let base = median(bare.iter().map(|figure| figure.rate).collect());
    for (what, figures) in [("lapin alone, window 5,000", &bare), ("relay, drain of a backlog", &ours)] {
        let rate = median(figures.iter().map(|figure| figure.rate).collect());
        let each: Vec<String> = figures.iter().map(|figure| format!("{:.0}", figure.rate)).collect();
        let cpu = median(figures.iter().map(|figure| figure.cpu).collect());
        table.add_row([
            what,
            &each.join(" "),
            &format!("{rate:.0}"),
            &format!("{:.2}", rate / base),
            &format!("{cpu:.2}"),
        ]);
    }
    println!(
        "{} messages of {} bytes, {} keys, topic exchange to a quorum queue",
        bench.messages, bench.payload, bench.keys
    );
    println!("{table}");
    Ok(())
}

async fn lapin_alone(bench: &RelayBench, config: &Config, exchange: &str) -> anyhow::Result<Figure> {
    let channel = channel(config).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let body = body(bench.payload);
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let mut confirms = VecDeque::with_capacity(WINDOW);
    for ordinal in 1..=bench.messages {
        if confirms.len() == WINDOW {
            confirmed(confirms.pop_front()).await?;
        }
        let envelope = envelope(ordinal, &body, bench.keys);
        let topic = envelope.message.topic.as_str();
        let publish = channel.basic_publish(
            exchange.into(),
            topic.into(),
            options,
            &envelope.message.body,
            properties(&envelope)?,
        );
        confirms.push_back(publish.await?);
    }
    while !confirms.is_empty() {
        confirmed(confirms.pop_front()).await?;
    }
    Ok(figure(bench, began, cpu))
}

async fn confirmed(confirm: Option<impl Future<Output = lapin::Result<Confirmation>>>) -> anyhow::Result<()> {
    match confirm.context("a confirm is awaited")?.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("not confirmed: {other:?}"),
    }
}

async fn drain(bench: &RelayBench, config: &Config, exchange: &str) -> anyhow::Result<Figure> {
    let scratch = Scratch::create(config.database_url()?).await?;
    let mut conn = PgConnection::connect(&scratch.url).await?;
    sqlx::query(
        "select oncebox.publish('order.placed', $1::jsonb, key => case when $2 > 0 then 'k' || i % $2 end)
        from generate_series(1, $3) as i",
    )
    .bind(serde_json::from_str::<serde_json::Value>(&body(bench.payload))?)
    .bind(bench.keys)
    .bind(bench.messages)
    .execute(&mut conn)
    .await?;
    sqlx::query("checkpoint").execute(&mut conn).await?;
    conn.close().await?;

    let mut options = RabbitMqOptions::new(config.amqp_url()?);
    options.connection_name = "oncebox bench".to_owned();
    let relay_options = RelayOptions {
        database_url: scratch.url.clone(),
        exchange: exchange.to_owned(),
        key_window: config.key_window,
        drain_deadline: Duration::from_secs(10),
        unroutable_probe: None,
    };
    let watch = channel(config).await?;
    let shutdown = CancellationToken::new();
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let relay = tokio::spawn(relay::run(Arc::new(RabbitMq::new(options)?), relay_options, shutdown.clone()));
    loop {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = watch.queue_declare(exchange.into(), passive, FieldTable::default()).await?;
        if i64::from(queue.message_count()) >= bench.messages {
            break;
        }
        if began.elapsed() > LIMIT || relay.is_finished() {
            bail!(
                "the relay did not drain the backlog: {} messages after {:?}",
                queue.message_count(),
                began.elapsed()
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let figure = figure(bench, began, cpu);
    shutdown.cancel();
    relay.await??;
    scratch.drop().await?;
    Ok(figure)
}

fn figure(bench: &RelayBench, began: Instant, cpu: f64) -> Figure {
    let messages = bench.messages as f64;
    Figure { rate: messages / began.elapsed().as_secs_f64(), cpu: (cpu_seconds() - cpu) * 100_000.0 / messages }
}
