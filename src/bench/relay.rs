//! Drain of a backlog by the real relay, beside the ceiling and a bare client; with an old snapshot held; and its cost by
//! the size of the backlog.

use super::backlog::Backlog;
use super::bare::{self, Load};
use super::ceiling::Pace;
use super::cpu::Spent;
use super::figure::{Better, Measured, Section, Side};
use super::report::{Line, Measurement, Plot};
use super::scratch::{ExchangeType, QueueKind, with_route};
use super::stage::Stage;
use crate::config::ConfigError;
use anyhow::Context;
use clap::Args;
use sqlx::Connection;

/// Unconfirmed messages on a connection: what the relay has in flight at most on each of its lanes' connections, and so
/// the others on the one they have.
const WINDOW: usize = 5_000;
const CEILING: &str = "hand-framed AMQP";
const LAPIN: &str = "lapin";
/// Most drains of a small backlog that are measured as one.
const ROUNDS: u64 = 10;

#[derive(Debug, Args)]
pub(super) struct RelayBench {
    /// Messages of the backlog
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..=2_000_000))]
    messages: u64,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256, value_parser = super::publish::payload())]
    payload: u64,
    /// Ordering keys, 0 for none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    keys: i64,
    /// Lanes of the outbox, all drained by one relay
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    lanes: u16,
    /// Kind of the queue
    #[arg(long, value_enum, default_value_t = QueueKind::Quorum)]
    queue: QueueKind,
    /// Kind of the exchange; the relay publishes to topic exchanges only
    #[arg(long, value_enum, default_value_t = ExchangeType::Topic)]
    exchange: ExchangeType,
    /// Compare with a drain while an old snapshot is held, instead
    #[arg(long, conflicts_with = "backlog")]
    snapshot_held: bool,
    /// Compare the CPU a message takes in backlogs of these sizes, instead, e.g. 50000,5000000
    #[arg(long, value_delimiter = ',', value_name = "SIZES", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    backlog: Vec<u64>,
    /// With --backlog: messages that are drained in each run; the rest of a larger backlog stays
    #[arg(long, default_value_t = 500_000, requires = "backlog", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    part: u64,
}

impl RelayBench {
    /// Refuses what the relay does not do.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let refused = |setting: &str, reason: String| Err(ConfigError { setting: setting.to_owned(), reason });
        if self.exchange != ExchangeType::Topic {
            let kind = self.exchange.name();
            let reason =
                format!("{kind}: the relay publishes to a topic exchange; `oncebox bench publish` takes the others");
            return refused("--exchange", reason);
        }
        match self.backlog.iter().find(|size| self.backlog.iter().filter(|other| other == size).count() > 1) {
            Some(twice) => refused("--backlog", format!("{twice} is there twice")),
            None => Ok(()),
        }
    }

    fn load(&self, messages: u64) -> Load {
        Load { messages, payload: self.payload as usize, keys: self.keys }
    }
}

pub(super) async fn run(bench: &RelayBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let measurement = Measurement::new("relay", "How fast and how cheap does the relay drain a backlog?")
        .setting("payload", format!("{} B", bench.payload))
        .setting("keys", bench.keys)
        .setting("unconfirmed messages of a key", stage.key_window)
        .setting("lanes", bench.lanes)
        .setting("exchange", bench.exchange.name())
        .setting("queue", bench.queue.name());
    if !bench.backlog.is_empty() {
        return by_size(bench, stage, measurement).await;
    }
    let measurement = measurement.setting("messages", bench.messages);
    let section =
        if bench.snapshot_held { beside_snapshot(bench, stage).await } else { beside_ceiling(bench, stage).await }?;
    let measurement = if bench.lanes > 1 && !bench.snapshot_held {
        measurement.note(format!(
            "The relay has {} connections, one a lane, with {WINDOW} messages in flight on each; {CEILING} and {LAPIN} have one.",
            bench.lanes
        ))
    } else {
        measurement
    };
    Ok(measurement.section(&section).note(
        "Clocked from the first message published to the last one confirmed. CPU of the relay, which runs in this process, \
         and of Postgres is from before its start to after its end, with taking the lane and settling.",
    ))
}

async fn beside_ceiling(bench: &RelayBench, stage: &Stage) -> anyhow::Result<Section> {
    let mut section = Section::new("drain of a backlog", "msg/s", Better::Higher)
        .side(Side::ceiling(CEILING))
        .side(Side::baseline(LAPIN).against(CEILING))
        .side(Side::subject("relay").against(CEILING).against(LAPIN));
    let (load, servers) = (bench.load(bench.messages), &stage.servers);
    for turn in stage.turns(section.sides()) {
        let spent = with_route(servers, bench.exchange, bench.queue, async |route| match turn.side {
            0 => bare::ceiling(servers, &load, Pace { window: WINDOW, channels: 1 }, route).await,
            1 => bare::lapin(servers, &load, WINDOW, route).await,
            _ => drain(bench, stage, &route.exchange, false).await,
        });
        stage.record(&mut section, turn, Measured::rate(load.messages, &spent.await?));
    }
    Ok(section)
}

async fn beside_snapshot(bench: &RelayBench, stage: &Stage) -> anyhow::Result<Section> {
    const WITHOUT: &str = "relay";
    let mut section = Section::new("drain beside an old snapshot", "msg/s", Better::Higher)
        .side(Side::baseline(WITHOUT))
        .side(Side::subject("relay, a snapshot from before the backlog is held").against(WITHOUT));
    for turn in stage.turns(section.sides()) {
        let spent = with_route(&stage.servers, bench.exchange, bench.queue, async |route| {
            drain(bench, stage, &route.exchange, turn.side == 1).await
        });
        stage.record(&mut section, turn, Measured::rate(bench.messages, &spent.await?));
    }
    Ok(section)
}

async fn drain(bench: &RelayBench, stage: &Stage, exchange: &str, snapshot_held: bool) -> anyhow::Result<Spent> {
    let backlog = Backlog::create(stage, bench.lanes).await?;
    let snapshot = if snapshot_held { Some(backlog.hold_snapshot().await?) } else { None };
    backlog.fill(&bench.load(bench.messages)).await?;
    let drained = backlog.drain(bench.messages, exchange).await?;
    if let Some(snapshot) = snapshot {
        snapshot.close().await?;
    }
    backlog.drop().await?;
    Ok(drained.whole)
}

/// What a message takes by the size of the backlog it lies in. A small backlog is filled and drained several times in a
/// run; a large one is filled once and a part of it is drained in each run.
async fn by_size(bench: &RelayBench, stage: &Stage, measurement: Measurement) -> anyhow::Result<Measurement> {
    let (servers, sizes) = (&stage.servers, &bench.backlog);
    if servers.pids().postgres.is_none() {
        let reason =
            "needs the CPU of Postgres: take private servers, or name a local one's process with --postgres-pid";
        return Err(ConfigError { setting: "--backlog".to_owned(), reason: reason.to_owned() }.into());
    }
    let part = bench.part;
    let name = |size: u64| format!("backlog of {}", super::table::number(size as f64));
    let smallest = *sizes.iter().min().context("--backlog has a size")?;
    let mut section = Section::new("CPU of relay and Postgres by backlog", "CPU-s/100k", Better::Lower);
    for size in sizes {
        let side = if *size == smallest {
            Side::baseline(name(*size))
        } else {
            Side::subject(name(*size)).against(name(smallest))
        };
        section = section.side(side);
    }
    let mut backlogs = Vec::new();
    for size in sizes {
        let backlog = Backlog::create(stage, bench.lanes).await?;
        let runs = stage.runs as u64;
        // Filled once: each run drains the next part.
        let large = *size >= part.saturating_mul(runs);
        if large {
            eprintln!("filling a backlog of {size} …");
            backlog.fill(&bench.load(*size)).await?;
        }
        backlogs.push((*size, large, backlog));
    }
    for turn in stage.turns(section.sides()) {
        let (size, large, backlog) = &backlogs[turn.side];
        let rounds = if *large { 1 } else { (part / size).clamp(1, ROUNDS) };
        let (mut messages, mut cpu_s, mut start_s, mut start_cpu_s, mut seconds) = (0, 0.0, 0.0, 0.0, 0.0);
        for _ in 0..rounds {
            if !large {
                backlog.fill(&bench.load(*size)).await?;
            }
            let wanted = if *large { part } else { *size };
            let drained = with_route(servers, bench.exchange, bench.queue, async |route| {
                backlog.drain(wanted, &route.exchange).await
            });
            let drained = drained.await?;
            messages += drained.messages;
            seconds += drained.whole.seconds;
            cpu_s += drained.cpu_s.context("CPU is known")?;
            start_s += drained.start_s / rounds as f64;
            start_cpu_s += drained.start_cpu_s.context("CPU is known")? / rounds as f64;
        }
        let value = cpu_s * 100_000.0 / messages as f64;
        let measured = Measured::plain(value)
            .with("msg/s", messages as f64 / seconds)
            .with("until the first message, s", start_s)
            .with("CPU-s until the first message", start_cpu_s);
        stage.record(&mut section, turn, measured);
    }
    for (_, _, backlog) in backlogs {
        backlog.drop().await?;
    }
    let figures = section.figures();
    let points = sizes.iter().zip(&figures.figures).map(|(size, figure)| (*size as f64, figure.median)).collect();
    let line = Line { name: "relay and Postgres".to_owned(), points };
    let title = "CPU of 100,000 messages by the size of the backlog".to_owned();
    let plot = Plot { title, x: "messages in the backlog".to_owned(), y: "CPU-s".to_owned(), lines: vec![line] };
    let note = format!(
        "CPU from the first message published to the last one confirmed; what comes before stands beside it. In each run \
         {part} messages are drained: of a large backlog the next part, a small one is filled and drained up to {ROUNDS} times."
    );
    Ok(measurement.section(&section).plot(plot).note(note))
}
