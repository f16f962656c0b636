//! Sagas of three steps: how many a second get from start to end, beside the same messages without a saga; and what a
//! step takes when there is no backlog.
//!
//! Relay, orchestrator and participants run in this process, on a database, an exchange and queues of their own. A saga of
//! three steps is six messages, so the baseline is a chain of as many: each answered by the next one, by plain handlers.

use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side};
use super::report::Measurement;
use super::scratch::{self, Scratch};
use super::servers::Servers;
use super::stage::{Stage, Turn};
use crate::backoff::Backoff;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::consumer::{self, ConsumerOptions, Order};
use crate::inbox::handler::{Handler, SqlHandler};
use crate::relay::{self, RelayOptions};
use crate::saga::definition::{Definition, Fault, document_from_text};
use crate::saga::orchestrator::{self, OrchestratorOptions};
use crate::saga::replies::{self, Replies};
use crate::saga::store::define;
use anyhow::{Context, bail};
use clap::Args;
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use sqlx::{Connection, Executor, PgConnection};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Longest measurement.
const LIMIT: Duration = Duration::from_secs(300);
/// Most messages of a participant's transaction.
const BATCH: usize = 100;
/// Messages of a saga of three steps: a command and a reply each.
const MESSAGES: u32 = 6;

const PARTICIPANTS: &str = "
    create table effect (saga uuid not null, step text not null);
    create function participate(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    begin
        if oncebox.saga_barrier((headers ->> 'oncebox-saga')::uuid, headers ->> 'oncebox-step', headers ->> 'oncebox-op',
                (headers ->> 'oncebox-epoch')::integer) <> 'run' then
            return;
        end if;
        insert into effect values ((headers ->> 'oncebox-saga')::uuid, headers ->> 'oncebox-step');
        perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('n', 1));
    end
    $$;
    create table link (id bigint not null, n integer not null);
    create function follow(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    declare
        v_n constant integer := payload ->> 'n';
    begin
        insert into link values ((payload ->> 'id')::bigint, v_n);
        if v_n < 6 then
            perform oncebox.publish(
                'chain', jsonb_build_object('id', payload -> 'id', 'n', v_n + 1), key => payload ->> 'id');
        end if;
    end
    $$;";

const DEFINITION: &str = "
name: bench
version: 1
steps:
- {id: one, do: {topic: step.one, body: {n: $.input.n}}, undo: {topic: step.one}, timeout: 5m}
- {id: two, do: {topic: step.two, body: {n: $.steps.one.output.n}}, undo: {topic: step.two}, timeout: 5m}
- {id: three, do: {topic: step.three, body: {n: $.steps.two.output.n}}, timeout: 5m}
";

#[derive(Debug, Args)]
pub(super) struct SagaBench {
    /// Sagas started at once, for the rate
    #[arg(long, default_value_t = 3_000, value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
    sagas: i64,
    /// Sagas a second, for the time of a step
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rate: u32,
    /// Seconds of that
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
}

pub(super) async fn run(bench: &SagaBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let mut rates = Section::new(format!("{} at once, from start to end", bench.sagas), "a second", Better::Higher)
        .side(Side::baseline("chains of six messages"))
        .side(Side::subject("sagas of three steps").against("chains of six messages"));
    let mut steps = Section::new("a step: command decided to reply recorded", "ms", Better::Lower)
        .side(Side::subject(format!("at {} sagas a second", bench.rate)));
    for turn in stage.turns(rates.sides()) {
        let servers = &stage.servers;
        if turn.side == 0 {
            let spent = measure(servers, async |conn: &mut PgConnection| chains_of(bench, servers, conn).await).await?;
            stage.record(&mut rates, turn, rate(bench, &spent));
        } else {
            let work = async |conn: &mut PgConnection| {
                Ok((sagas_of(bench, servers, conn).await?, calm_sagas_of(bench, servers, conn).await?))
            };
            let (spent, calm) = measure(servers, work).await?;
            stage.record(&mut rates, turn, rate(bench, &spent));
            stage.record(&mut steps, Turn { side: 0, ..turn }, calm);
        }
    }
    Ok(Measurement::new("saga", "What does a saga cost over its messages?")
        .setting("messages of a saga", MESSAGES)
        .setting("participants' batch", BATCH)
        .section(&rates)
        .section(&steps)
        .note("CPU is for 100,000 messages: a saga of three steps is six, as is a chain. Relay, orchestrator and participants run in this process."))
}

/// Sagas, or chains, a second.
fn rate(bench: &SagaBench, spent: &Spent) -> Measured {
    Measured::of(bench.sagas as f64 / spent.seconds, bench.sagas.unsigned_abs() * u64::from(MESSAGES), spent)
}

/// Runs a measurement beside a relay, an orchestrator and participants, and removes everything.
async fn measure<T>(
    servers: &Servers,
    work: impl AsyncFnOnce(&mut PgConnection) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let scratch = Scratch::create(servers.database_url()?).await?;
    let mut conn = PgConnection::connect(&scratch.url).await?;
    conn.execute(PARTICIPANTS).await?;
    let faults = |faults: Vec<Fault>| anyhow::anyhow!("the definition of the benchmark: {faults:?}");
    let document = document_from_text(DEFINITION).map_err(faults)?;
    let definition = Definition::parse(&document).map_err(faults)?;
    define(&mut conn, &definition.name, definition.version, &document, None).await?;

    let exchange = format!("oncebox-bench-{}", Uuid::now_v7().simple());
    let shutdown = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let broker = || RabbitMq::new(RabbitMqOptions::new(servers.amqp_url()?)).map(Arc::new).map_err(anyhow::Error::from);
    let sql = |name: &str| SqlHandler::new(name).map(|handler| Arc::new(handler) as Arc<dyn Handler>);
    let consumers: [(&str, &str, Arc<dyn Handler>); 3] = [
        ("participants", "step.*", sql("participate")?),
        ("chains", "chain", sql("follow")?),
        (replies::CONSUMER, replies::TOPIC, Arc::new(Replies::default())),
    ];
    let queues = consumers.each_ref().map(|(name, ..)| format!("{exchange}-{name}"));
    for ((name, binding, handler), queue) in consumers.into_iter().zip(queues.clone()) {
        let options = ConsumerOptions {
            name: name.to_owned(),
            database_url: scratch.url.clone(),
            outbox_url: None,
            queue,
            exchange: exchange.clone(),
            bindings: vec![binding.to_owned()],
            concurrency: 2,
            batch: BATCH,
            max_attempts: 5,
            order: Order::None,
            backoff: Backoff { initial: Duration::from_secs(1), cap: Duration::from_secs(10) },
            handler_timeout: Duration::from_secs(60),
            drain_deadline: Duration::from_secs(10),
        };
        let (broker, shutdown) = (broker()?, shutdown.clone());
        tasks
            .spawn(async move { consumer::run(broker, handler, options, shutdown).await.map_err(anyhow::Error::from) });
    }
    wait_for_queues(servers, &queues).await?;
    let options = RelayOptions {
        database_url: scratch.url.clone(),
        exchange: exchange.clone(),
        key_window: 1,
        drain_deadline: Duration::from_secs(10),
        unroutable_probe: None,
    };
    let (relay_broker, stop) = (broker()?, shutdown.clone());
    tasks.spawn(async move { relay::run(relay_broker, options, stop).await.map_err(anyhow::Error::from) });
    let (options, stop) = (OrchestratorOptions { database_url: scratch.url.clone() }, shutdown.clone());
    tasks.spawn(async move {
        orchestrator::run(options, stop).await;
        Ok(())
    });
    conn.execute("checkpoint").await?;

    let result = tokio::select! {
        result = work(&mut conn) => result,
        Some(ended) = tasks.join_next() => Err(match ended {
            Ok(Err(error)) => error,
            _ => anyhow::anyhow!("a part of the benchmark ended by itself"),
        }),
    };
    shutdown.cancel();
    while tasks.join_next().await.is_some() {}
    let channel = scratch::channel(servers).await?;
    for queue in queues {
        channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
    }
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await?;
    scratch.drop().await?;
    result
}

/// Nothing may be published before its queue is bound.
async fn wait_for_queues(servers: &Servers, queues: &[String]) -> anyhow::Result<()> {
    let began = Instant::now();
    for queue in queues {
        loop {
            // A passive declaration of a queue that is not there ends the channel.
            let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
            let channel = scratch::channel(servers).await?;
            let found = channel.queue_declare(queue.as_str().into(), options, Default::default()).await;
            if found.is_ok_and(|queue| queue.consumer_count() > 0) {
                break;
            }
            anyhow::ensure!(began.elapsed() < LIMIT, "queue {queue} was not declared");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

/// Waits until a count is what it must become.
async fn reach(conn: &mut PgConnection, query: &'static str, expected: i64) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let count: i64 = sqlx::query_scalar(query).fetch_one(&mut *conn).await?;
        if count >= expected {
            return Ok(());
        } else if began.elapsed() > LIMIT {
            bail!("{count} of {expected} after {:?}: {query}", began.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn chains_of(bench: &SagaBench, servers: &Servers, conn: &mut PgConnection) -> anyhow::Result<Spent> {
    let meter = servers.meter();
    sqlx::query(
        "select oncebox.publish('chain', jsonb_build_object('id', n, 'n', 1), key => n::text)
        from generate_series(1, $1::bigint) as n",
    )
    .bind(bench.sagas)
    .execute(&mut *conn)
    .await?;
    reach(conn, "select count(*) from link", bench.sagas * i64::from(MESSAGES)).await?;
    Ok(meter.spent())
}

/// How many sagas have come to their end.
const ENDED: &str = "select count(*) from oncebox.saga where status = 'completed'";

async fn sagas_of(bench: &SagaBench, servers: &Servers, conn: &mut PgConnection) -> anyhow::Result<Spent> {
    let meter = servers.meter();
    let start = "select oncebox.saga_start('bench', $2 || n, jsonb_build_object('n', n)) from generate_series(1, $1::bigint) as n";
    sqlx::query(start).bind(bench.sagas).bind("all-").execute(&mut *conn).await?;
    reach(conn, ENDED, bench.sagas).await?;
    let spent = meter.spent();
    let effects: i64 = sqlx::query_scalar("select count(*) from effect").fetch_one(&mut *conn).await?;
    anyhow::ensure!(effects == 3 * bench.sagas, "{effects} effects of {} sagas", bench.sagas);
    Ok(spent)
}

/// The times of steps without a backlog; after [`sagas_of`].
async fn calm_sagas_of(bench: &SagaBench, servers: &Servers, conn: &mut PgConnection) -> anyhow::Result<Measured> {
    let meter = servers.meter();
    let calm = i64::from(bench.rate * bench.seconds);
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / bench.rate);
    for n in 1..=calm {
        ticks.tick().await;
        sqlx::query("select oncebox.saga_start('bench', 'calm-' || $1, '{\"n\": 1}')")
            .bind(n)
            .execute(&mut *conn)
            .await?;
    }
    reach(conn, ENDED, bench.sagas + calm).await?;
    let spent = meter.spent();
    // Each row of a calm saga's history but the first two holds a reply; the row before it sent the command.
    let steps = "
        select extract(epoch from h.at - lag(h.at) over (partition by h.saga_id order by h.seq))::float8 * 1000, h.event
        from oncebox.saga_history as h join oncebox.saga as s on s.id = h.saga_id
        where s.business_key like 'calm-%'";
    let rows: Vec<(Option<f64>, String)> =
        sqlx::query_as(steps).fetch_all(conn).await.context("the times of the steps")?;
    let steps_ms = rows.into_iter().filter(|(_, event)| event == "reply").filter_map(|(ms, _)| ms).collect();
    Ok(Measured::latency(steps_ms, calm.unsigned_abs() * u64::from(MESSAGES), &spent))
}
