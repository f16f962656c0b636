//! Writers, relay, broker and consumer together for a while: does anything grow, and does anything get lost?
//!
//! Relay, consumer and both janitors run in this process, as in `oncebox run`. Once a second it is noted what was committed,
//! confirmed and applied, how big each part of the schema is, what is dead in it, and how much memory is taken. At the end
//! every message must have been applied exactly once, by count, by id and by `oncebox audit`.

use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side};
use super::flow::{CONSUMER, Consuming, EFFECTS, Flow, with_queue_for};
use super::growth::Growth;
use super::report::{Line, Measurement, Plot};
use super::scratch::Scratch;
use super::stage::Stage;
use super::writers::{Load, Writers};
use crate::audit::{self, AuditOptions};
use crate::consumer::Order;
use anyhow::ensure;
use clap::Args;
use sqlx::{Connection, Executor, PgConnection};
use std::time::{Duration, Instant};

/// Longest wait for the first and for the last message.
const LIMIT: Duration = Duration::from_secs(60);
/// Samples of a run, at least: a short run is looked at more often than once a second.
const SAMPLES: u32 = 20;
/// Turns of the ring in a run, about: a slot is written for a sixth of the retention.
const TURNS: u32 = 60;
const RETENTION_MAX_S: u32 = 60;
const MIB: f64 = 1_048_576.0;
/// No growth of memory or of a table: a few pages more.
const PAGES_MIB: f64 = 0.25;
/// Tables whose rows are updated or deleted shrink and use their pages again only by autovacuum, once a minute.
const VACUUMED_S: u32 = 300;
/// No growth of a lag: what a tick of the clock holds up.
const TICK_S: f64 = 0.01;

/// Bytes with indexes and toast, and dead rows as the statistics have them, by part. A truncated slot begins anew.
const LOOK: &str = "
    select
        coalesce(sum(t.bytes) filter (where t.part = 'log'), 0)::float8,
        coalesce(sum(t.bytes) filter (where t.part = 'journal'), 0)::float8,
        coalesce(sum(t.bytes) filter (where t.part = 'inbox'), 0)::float8,
        coalesce(sum(t.bytes) filter (where t.part = 'rest'), 0)::float8,
        coalesce(sum(t.dead) filter (where t.part = 'log'), 0)::float8,
        coalesce(sum(t.dead) filter (where t.part <> 'log'), 0)::float8
    from (
        select
            coalesce(pg_total_relation_size(c.oid), 0) as bytes,
            coalesce(pg_stat_get_dead_tuples(c.oid), 0) as dead,
            case
                when c.relname ~ '^outbox_[0-9]+$' then 'log'
                when c.relname ~ '^inbox_[0-9]+$' then 'inbox'
                when c.relname ~ '^outbox_plan' then 'journal'
                else 'rest'
            end as part
        from pg_class as c
        -- The handler's effects lie in the first schema of the user's path, which may be this one.
        where c.relnamespace = 'oncebox'::regnamespace and c.relkind = 'r' and c.relname <> 'effect'
    ) as t";
/// Exact, by reading every page.
const DEAD_BY_PAGE: &str = "
    select coalesce(sum((pgstattuple(c.oid)).dead_tuple_count), 0)::float8
    from pg_class as c
    where c.relnamespace = 'oncebox'::regnamespace and c.relkind = 'r' and c.relname ~ '^outbox_[0-9]+$'";

#[derive(Debug, Args)]
pub(super) struct EndToEndBench {
    /// Seconds of a run
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(2..=86_400))]
    seconds: u32,
    /// Messages a second, each in a transaction of its own
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Write as fast as commits return, whatever the rate
    #[arg(long)]
    flat_out: bool,
    /// Sessions that write
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    writers: u32,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// Ordering keys, 0 for none; with keys the consumer keeps their order
    #[arg(long, default_value_t = 1_000)]
    keys: i64,
    /// Most messages of a transaction of the consumer
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch: u32,
    /// Seconds that settled messages stay in the log [default: a tenth of the run, at most 60]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    retention_s: Option<u32>,
}

impl EndToEndBench {
    fn retention_s(&self) -> u32 {
        // A slot is written for a sixth of it.
        self.retention_s.unwrap_or((self.seconds * 6 / TURNS).clamp(1, RETENTION_MAX_S))
    }
}

/// What was seen at one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at_s: f64,
    committed: u64,
    confirmed: u64,
    applied: u64,
    /// MiB.
    log: f64,
    journal: f64,
    inbox: f64,
    rest: f64,
    memory: Option<f64>,
    broker_memory: Option<f64>,
    /// Rows.
    dead_log: f64,
    dead_rest: f64,
}

/// One run.
struct Seen {
    samples: Vec<Sample>,
    /// Over the time that was written.
    spent: Spent,
    /// By reading the pages, if the extension is there.
    dead_by_page: Option<f64>,
    /// From the last commit to the last effect.
    drained_s: f64,
    messages: u64,
    turns: i64,
}

/// A quantity that should not grow.
struct Series {
    name: &'static str,
    unit: &'static str,
    of: fn(&Sample) -> Option<f64>,
    /// No growth, whatever the samples say.
    at_least: f64,
    /// A shorter run says nothing.
    settles_s: u32,
}

impl Series {
    const BYTES: Self = Self { name: "", unit: "MiB", of: |_| None, at_least: PAGES_MIB, settles_s: 0 };

    fn lag(bench: &EndToEndBench) -> Self {
        Self { unit: "messages", at_least: f64::from(bench.rate) * TICK_S, ..Self::BYTES }
    }
}

pub(super) async fn run(bench: &EndToEndBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let series = [
        Series {
            name: "lag of the relay: committed, not confirmed",
            of: |s| Some(s.relay_lag()),
            ..Series::lag(bench)
        },
        Series {
            name: "lag of the consumer: confirmed, not applied",
            of: |s| Some(s.consumer_lag()),
            ..Series::lag(bench)
        },
        Series { name: "size of the log", of: |s| Some(s.log), ..Series::BYTES },
        Series { name: "size of the journal", of: |s| Some(s.journal), settles_s: VACUUMED_S, ..Series::BYTES },
        Series {
            name: "size of the ledger and all other tables but the inbox",
            of: |s| Some(s.rest),
            settles_s: VACUUMED_S,
            ..Series::BYTES
        },
        Series { name: "memory of this process", of: |s| s.memory, ..Series::BYTES },
        Series { name: "memory of the broker", of: |s| s.broker_memory, ..Series::BYTES },
    ];
    let mut flowed = Section::new("what flowed", "msg/s", Better::Higher)
        .side(Side::baseline("committed by the writers"))
        .side(Side::subject("confirmed by the broker").against("committed by the writers"))
        .side(Side::subject("applied by the consumer").against("committed by the writers"));
    let mut dead = Section::new("dead rows, most at a time", "rows", Better::Lower)
        .side(Side::subject("in the log"))
        .side(Side::baseline("in all other tables"));
    let mut inbox = Section::new("size of the inbox", "bytes a message", Better::Lower).side(Side::subject("inbox"));
    let quarters = |series: &Series| {
        Section::new(series.name, series.unit, Better::Lower)
            .side(Side::baseline("third quarter, median"))
            .side(Side::subject("last quarter, median").against("third quarter, median"))
    };
    let mut sections = series.each_ref().map(quarters);
    let (mut plots, mut notes) = (Vec::new(), Vec::new());
    for turn in stage.turns(1) {
        let order = if bench.keys > 0 { Order::Key } else { Order::None };
        let seen = with_queue_for(stage, order, async |queue| measure(bench, stage, queue, order).await).await?;
        let rates = seen.rates();
        for (side, rate) in rates.into_iter().enumerate() {
            let measured = Measured::of(rate, seen.messages, &seen.spent);
            let measured = if side == 2 {
                measured
                    .with("lost or doubled", 0.0)
                    .with("to the last effect after the last commit, s", seen.drained_s)
            } else {
                measured
            };
            stage.record(&mut flowed, super::stage::Turn { run: turn.run, side }, measured);
        }
        let most = |of: fn(&Sample) -> f64| seen.samples.iter().map(of).fold(0.0, f64::max);
        let in_log = Measured::plain(most(|sample| sample.dead_log));
        let in_log = match seen.dead_by_page {
            Some(count) => in_log.with("by pgstattuple at the end", count),
            None => in_log,
        };
        dead.record(0, in_log.with("turns of the ring", seen.turns as f64));
        dead.record(1, Measured::plain(most(|sample| sample.dead_rest)));
        inbox.record(0, Measured::plain(seen.inbox_bytes_a_message()));
        for (series, section) in series.iter().zip(&mut sections) {
            let samples: Vec<_> = seen.samples.iter().filter_map(|s| Some((s.at_s, (series.of)(s)?))).collect();
            let Some(growth) = Growth::of(&samples) else { continue };
            section.record(0, Measured::plain(growth.third).with("highest", growth.third_max));
            let mut last = Measured::plain(growth.last)
                .with("highest of the run", growth.max)
                .with("growth a minute", growth.per_minute);
            let mut verdict = "is not judged";
            if bench.seconds >= series.settles_s {
                let grows = growth.grows(series.at_least);
                last = last.with("grows", f64::from(u8::from(grows)));
                verdict = if grows { "GROWS" } else { "does not grow" };
            }
            section.record(1, last);
            notes.push(format!(
                "run {}: {} {verdict} ({:+.2} {} a minute)",
                turn.run, series.name, growth.per_minute, series.unit
            ));
        }
        plots.extend(seen.plots(turn.run));
    }
    let pace = if bench.flat_out { "flat out".to_owned() } else { format!("{}/s", bench.rate) };
    let mut measurement = Measurement::new("end-to-end", "Writers, relay, broker and consumer together, for a while")
        .setting("pace", pace)
        .setting("writers", bench.writers)
        .setting("seconds a run", bench.seconds)
        .setting("payload", format!("{} B", bench.payload))
        .setting("keys", bench.keys)
        .setting("consumer", format!("batches of up to {}, SQL handler of one insert", bench.batch))
        .setting("retention of the log", format!("{} s, a slot is written for a sixth of it", bench.retention_s()))
        .setting("dedup window", "7 days, the default")
        .section(&flowed);
    // Memory of servers that are not ours is not known.
    for section in sections.iter().filter(|section| section.has_figures()) {
        measurement = measurement.section(section);
    }
    measurement = measurement.section(&inbox).section(&dead);
    for plot in plots {
        measurement = measurement.plot(plot);
    }
    for note in notes {
        measurement = measurement.note(note);
    }
    Ok(measurement
        .note(
            "Something grows if its median in the last quarter of the run is above the highest value of the third quarter, by \
             more than a hundredth of that (and than 0.25 MiB, or the messages of 10 ms). The growth a minute is the slope of \
             the line of least squares through the second half, whatever it means for what fills and empties by turns. \
             Journal, ledger and leases use their pages again only after autovacuum, which comes once a minute: they are \
             judged in runs of five minutes and more.",
        )
        .note(
            "The inbox keeps a row a message for the dedup window, two hours at least, so it grows all through a shorter run: \
             its figure is what a message adds, and the window times the rate bounds it.",
        )
        .note(
            "Dead rows are those of the statistics (each session reports when it is idle, a second apart at most), looked at \
             with every sample; rows of rolled-back transactions would count. pgstattuple, where it is installed, reads \
             every page of the log once more at the end.",
        )
        .note("Each run ends with a count: every committed message has one effect, and `oncebox audit` finds nothing missing, \
               doubled or unknown; otherwise the benchmark fails."))
}

async fn measure(bench: &EndToEndBench, stage: &Stage, queue: &str, order: Order) -> anyhow::Result<Seen> {
    let scratch = Scratch::create(stage.servers.database_url()?).await?;
    let seen = watch(bench, stage, &scratch, queue, order).await;
    scratch.drop().await?;
    seen
}

async fn watch(
    bench: &EndToEndBench,
    stage: &Stage,
    scratch: &Scratch,
    queue: &str,
    order: Order,
) -> anyhow::Result<Seen> {
    let mut conn = PgConnection::connect(&scratch.url).await?;
    conn.execute(EFFECTS).await?;
    sqlx::query("update oncebox.setting set retention = make_interval(secs => $1)")
        .bind(f64::from(bench.retention_s()))
        .execute(&mut conn)
        .await?;
    conn.execute("checkpoint").await?;
    let mut flow = Flow::new(stage, false)?;
    flow.relay(scratch, queue)?;
    flow.janitors(scratch);
    flow.consumer(scratch, queue, Consuming { handler: "own", workers: 8, batch: bench.batch as usize, order })?;
    // All have begun when the first message is through.
    conn.execute("select oncebox.publish('order.placed', '{}')").await?;
    flow.applied(1, LIMIT).await?;

    let from = Instant::now() + Duration::from_millis(100);
    let time = Duration::from_secs(bench.seconds.into());
    let load = Load {
        database_url: scratch.url.clone(),
        writers: bench.writers,
        rate: (!bench.flat_out).then_some(bench.rate),
        payload: bench.payload,
        keys: bench.keys,
        from,
        until: from + time,
    };
    let writers = Writers::start(&load, false).await?;
    tokio::time::sleep_until(from.into()).await;
    let meter = stage.servers.meter();
    let (mut samples, mut turns, mut slot) = (Vec::new(), 0, None);
    let mut ticks = tokio::time::interval((time / SAMPLES).min(Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while Instant::now() < load.until {
        ticks.tick().await;
        flow.still_runs()?;
        samples.push(look(&mut conn, stage, &flow, &writers, from).await?);
        let current: i16 = sqlx::query_scalar("select slot from oncebox.outbox_ring").fetch_one(&mut conn).await?;
        turns += i64::from(slot.is_some_and(|slot| slot != current));
        slot = Some(current);
    }
    let spent = meter.spent();
    let last_commit = Instant::now();
    let (written, _) = writers.end().await?;
    let messages = written + 1;
    let dead_by_page = dead_by_page(&mut conn).await?;
    let drained = drained(&mut conn, &mut flow, messages).await?;
    audited(scratch, messages).await?;
    flow.end().await?;
    conn.close().await?;
    let drained_s = drained.saturating_duration_since(last_commit).as_secs_f64();
    ensure!(samples.len() > 1, "the run was too short for two looks");
    Ok(Seen { samples, spent, dead_by_page, drained_s, messages, turns })
}

async fn look(
    conn: &mut PgConnection,
    stage: &Stage,
    flow: &Flow,
    writers: &Writers,
    from: Instant,
) -> anyhow::Result<Sample> {
    // What is further on its way first: nothing is seen applied before it was committed.
    let (applied, confirmed) = (flow.notes.applied.count(), flow.notes.confirmed.count());
    let committed = writers.committed() + 1;
    let at_s = from.elapsed().as_secs_f64();
    let (log, journal, inbox, rest, dead_log, dead_rest): (f64, f64, f64, f64, f64, f64) =
        sqlx::query_as(LOOK).fetch_one(conn).await?;
    Ok(Sample {
        at_s,
        committed,
        confirmed,
        applied,
        log: log / MIB,
        journal: journal / MIB,
        inbox: inbox / MIB,
        rest: rest / MIB,
        memory: memory_mib(std::process::id()),
        broker_memory: stage.servers.pids().broker.and_then(memory_mib),
        dead_log,
        dead_rest,
    })
}

/// Resident memory of a process, where there is /proc.
fn memory_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? / 1_024.0)
}

/// None unless the extension can be had.
async fn dead_by_page(conn: &mut PgConnection) -> anyhow::Result<Option<f64>> {
    let there = "select exists (select from pg_available_extensions where name = 'pgstattuple')";
    let may = "select usesuper from pg_user where usename = current_user";
    for condition in [there, may] {
        if !sqlx::query_scalar::<_, bool>(condition).fetch_one(&mut *conn).await? {
            return Ok(None);
        }
    }
    conn.execute("create extension if not exists pgstattuple with schema public").await?;
    Ok(Some(sqlx::query_scalar(DEAD_BY_PAGE).fetch_one(conn).await?))
}

/// Waits until every message has its effect, and makes sure that none has two. Says by when.
async fn drained(conn: &mut PgConnection, flow: &mut Flow, messages: u64) -> anyhow::Result<Instant> {
    let mut at = flow.applied(messages, LIMIT).await?;
    let expected = i64::try_from(messages)?;
    let began = Instant::now();
    loop {
        // The acknowledgements count redelivered messages too.
        let (effects, distinct): (i64, i64) =
            sqlx::query_as("select count(*), count(distinct message_id) from effect").fetch_one(&mut *conn).await?;
        ensure!(
            effects == distinct && effects <= expected,
            "{effects} effects of {distinct} messages, {expected} committed"
        );
        if effects == expected {
            return Ok(at);
        }
        ensure!(began.elapsed() < LIMIT, "{effects} effects of {expected} messages after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(200)).await;
        at = Instant::now();
    }
}

/// What `oncebox audit` looks at must say the same: every offset applied, under one id.
async fn audited(scratch: &Scratch, messages: u64) -> anyhow::Result<()> {
    let options = AuditOptions {
        database_url: scratch.url.clone(),
        consumer_database_urls: Vec::new(),
        grace: Duration::from_secs(2),
    };
    let began = Instant::now();
    loop {
        let report = audit::run(&options).await?;
        let (missing, doubled, unknown) = (report.missing_count(), report.doubled_count(), report.unknown_count());
        ensure!(report.is_clean(), "the audit found {missing} missing, {doubled} doubled, {unknown} unknown");
        let ours = report.consumers.iter().filter(|stream| stream.consumer == CONSUMER);
        let applied: u64 = ours.map(|stream| stream.applied).sum();
        if applied == messages {
            return Ok(());
        }
        ensure!(began.elapsed() < LIMIT, "the audit knows of {applied} applied messages, not {messages}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Sample {
    fn relay_lag(&self) -> f64 {
        self.committed.saturating_sub(self.confirmed) as f64
    }

    fn consumer_lag(&self) -> f64 {
        self.confirmed.saturating_sub(self.applied) as f64
    }
}

impl Seen {
    /// Committed, confirmed and applied, a second, between the first sample and the last one.
    fn rates(&self) -> [f64; 3] {
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else { return [f64::NAN; 3] };
        let of = |count: fn(&Sample) -> u64| (count(last) - count(first)) as f64 / (last.at_s - first.at_s);
        [of(|sample| sample.committed), of(|sample| sample.confirmed), of(|sample| sample.applied)]
    }

    fn inbox_bytes_a_message(&self) -> f64 {
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else { return f64::NAN };
        (last.inbox - first.inbox) * MIB / (last.applied - first.applied) as f64
    }

    fn plots(&self, run: usize) -> Vec<Plot> {
        let line = |name: &str, of: &dyn Fn(&Sample) -> Option<f64>| Line {
            name: name.to_owned(),
            points: self.samples.iter().filter_map(|sample| Some((sample.at_s, of(sample)?))).collect(),
        };
        let rate = |name: &str, of: fn(&Sample) -> u64| Line {
            name: name.to_owned(),
            points: self
                .samples
                .windows(2)
                .map(|pair| (pair[1].at_s, (of(&pair[1]) - of(&pair[0])) as f64 / (pair[1].at_s - pair[0].at_s)))
                .collect(),
        };
        let plot = |title: &str, y: &str, lines: Vec<Line>| Plot {
            title: format!("{title}, run {run}"),
            x: "s".to_owned(),
            y: y.to_owned(),
            lines: lines.into_iter().filter(|line| !line.points.is_empty()).collect(),
        };
        vec![
            plot(
                "messages a second",
                "msg/s",
                vec![rate("committed", |sample| sample.committed), rate("applied", |sample| sample.applied)],
            ),
            plot(
                "lag",
                "messages",
                vec![
                    line("committed, not confirmed", &|sample| Some(sample.relay_lag())),
                    line("confirmed, not applied", &|sample| Some(sample.consumer_lag())),
                ],
            ),
            plot(
                "size of tables with indexes",
                "MiB",
                vec![
                    line("log", &|sample| Some(sample.log)),
                    line("journal", &|sample| Some(sample.journal)),
                    line("all others but the inbox", &|sample| Some(sample.rest)),
                ],
            ),
            plot("size of the inbox", "MiB", vec![line("inbox", &|sample| Some(sample.inbox))]),
            plot(
                "resident memory",
                "MiB",
                vec![line("this process", &|sample| sample.memory), line("broker", &|sample| sample.broker_memory)],
            ),
            plot(
                "dead rows",
                "rows",
                vec![
                    line("log", &|sample| Some(sample.dead_log)),
                    line("all other tables", &|sample| Some(sample.dead_rest)),
                ],
            ),
        ]
    }
}
