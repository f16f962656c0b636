//! What the broker alone can take: the hand-framed ceiling, beside lapin and oncebox's own publisher; and the price of
//! exchange and queue kinds.

use super::bare::{self, Load};
use super::ceiling::Pace;
use super::figure::{Better, Measured, Section, Side};
use super::report::Measurement;
use super::scratch::{ExchangeType, QueueKind, with_route};
use super::stage::Stage;
use clap::Args;

const CEILING: &str = "hand-framed AMQP";
const LAPIN: &str = "lapin";

/// Exchanges and queues that the matrix compares, the usual one first.
const MATRIX: [(ExchangeType, QueueKind); 4] = [
    (ExchangeType::Topic, QueueKind::Quorum),
    (ExchangeType::Direct, QueueKind::Quorum),
    (ExchangeType::Topic, QueueKind::Classic),
    (ExchangeType::Direct, QueueKind::Classic),
];

#[derive(Debug, Args)]
pub(super) struct PublishBench {
    /// Messages of each measurement
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..=2_000_000))]
    messages: u64,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256, value_parser = payload())]
    payload: u64,
    /// Ordering keys, 0 for none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    keys: i64,
    /// Kind of the queue
    #[arg(long, value_enum, default_value_t = QueueKind::Quorum)]
    queue: QueueKind,
    /// Kind of the exchange
    #[arg(long, value_enum, default_value_t = ExchangeType::Topic)]
    exchange: ExchangeType,
    /// Unconfirmed messages, over all channels
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    window: u32,
    /// Channels of the ceiling; the others have one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: u16,
    /// Compare topic and direct exchanges, quorum and classic queues instead, by the ceiling
    #[arg(long, conflicts_with_all = ["queue", "exchange"])]
    matrix: bool,
}

/// The outbox takes no larger payload.
pub(super) fn payload() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(12..=1_048_576)
}

pub(super) async fn run(bench: &PublishBench, stage: &Stage) -> anyhow::Result<Measurement> {
    let measurement = Measurement::new("publish", "What can the broker take?")
        .setting("messages", bench.messages)
        .setting("payload", format!("{} B", bench.payload))
        .setting("keys", bench.keys)
        .setting("window", bench.window)
        .setting("channels of the ceiling", bench.channels);
    if bench.matrix {
        return Ok(measurement.section(&matrix(bench, stage).await?));
    }
    Ok(measurement
        .setting("exchange", bench.exchange.name())
        .setting("queue", bench.queue.name())
        .section(&publishers(bench, stage).await?)
        .note(
            "The ceiling's frames lie ready before the clock starts; the others make theirs from messages in memory.",
        ))
}

impl PublishBench {
    fn load(&self) -> Load {
        Load { messages: self.messages, payload: self.payload as usize, keys: self.keys }
    }

    fn pace(&self) -> Pace {
        Pace { window: self.window as usize, channels: self.channels }
    }
}

async fn publishers(bench: &PublishBench, stage: &Stage) -> anyhow::Result<Section> {
    let mut section = Section::new("publishers", "msg/s", Better::Higher)
        .side(Side::ceiling(CEILING))
        .side(Side::baseline(LAPIN).against(CEILING));
    // Its exchange is a topic one, always.
    if bench.exchange == ExchangeType::Topic {
        section = section.side(Side::subject("oncebox's publisher, from memory").against(CEILING).against(LAPIN));
    }
    let (load, window, servers) = (bench.load(), bench.window as usize, &stage.servers);
    for turn in stage.turns(section.sides()) {
        let spent = with_route(servers, bench.exchange, bench.queue, async |route| match turn.side {
            0 => bare::ceiling(servers, &load, bench.pace(), route).await,
            1 => bare::lapin(servers, &load, window, route).await,
            _ => bare::own(servers, &load, window, route).await,
        });
        stage.record(&mut section, turn, Measured::rate(load.messages, &spent.await?));
    }
    Ok(section)
}

async fn matrix(bench: &PublishBench, stage: &Stage) -> anyhow::Result<Section> {
    let name =
        |(exchange, queue): (ExchangeType, QueueKind)| format!("{} exchange, {} queue", exchange.name(), queue.name());
    let usual = name(MATRIX[0]);
    let title = "exchange and queue kinds, hand-framed AMQP";
    let mut section = Section::new(title, "msg/s", Better::Higher).side(Side::baseline(usual.clone()));
    for kinds in &MATRIX[1..] {
        section = section.side(Side::subject(name(*kinds)).against(usual.clone()));
    }
    let load = bench.load();
    for turn in stage.turns(section.sides()) {
        let ((exchange, queue), servers) = (MATRIX[turn.side], &stage.servers);
        let spent = with_route(servers, exchange, queue, async |route| {
            bare::ceiling(servers, &load, bench.pace(), route).await
        });
        stage.record(&mut section, turn, Measured::rate(load.messages, &spent.await?));
    }
    Ok(section)
}
