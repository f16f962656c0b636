//! `oncebox bench`: what oncebox does, beside its ceiling or what one would do otherwise, measured in the same run.
//!
//! One file a measurement (`relay`, `saga`, …), each of which takes its turns on a `stage` and gives a
//! `report::Measurement`; `ceiling` is the fastest program there can be for the broker; table, JSON and page show the
//! same report. Everything happens in databases, exchanges and queues of its own, which are dropped afterwards, on given
//! servers or on private ones. Absolute rates say something about the machine; the ratio says something about oncebox.

mod all;
mod backlog;
mod bare;
mod ceiling;
mod cpu;
mod end_to_end;
mod figure;
mod flow;
mod frames;
mod growth;
mod inbox;
mod latency;
mod output;
mod page;
mod publish;
mod relay;
mod report;
mod saga;
mod scratch;
mod servers;
mod stage;
mod svg;
mod table;
mod timed;
mod write;
mod writers;

use crate::config::{Config, ConfigError};
use clap::{Args, Subcommand};
use output::OutputOptions;
use report::{Fact, Measurement, Report};
use servers::{Needs, ServerOptions, Servers};
use stage::Stage;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Exit code after Ctrl-C, as shells count it.
const INTERRUPTED: u8 = 130;

/// Arguments of `oncebox bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    words: Words,
    /// Times each side is measured; under 3 there is no median
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    servers: ServerOptions,
    #[command(flatten)]
    output: OutputOptions,
}

#[derive(Debug, Subcommand)]
enum Words {
    #[command(flatten)]
    One(What),
    /// Everything that docs/performance.md shows, one after the other, on one page; takes two hours
    All(all::AllBench),
}

#[derive(Debug, Subcommand)]
enum What {
    /// What the broker alone can take, by a hand-framed client; beside lapin and oncebox's own publisher
    Publish(publish::PublishBench),
    /// Drain of a backlog by the relay, beside the broker's ceiling and a bare client
    Relay(relay::RelayBench),
    /// Commit to confirm and commit to effect at a given rate, beside the least that a machine needs
    Latency(latency::LatencyBench),
    /// What an outbox row adds to a business transaction
    Write(write::WriteBench),
    /// Drain of a queue by a consumer, beside its handler without an inbox and a bare client
    Inbox(inbox::InboxBench),
    /// Writers, relay and consumer together for a while: does anything grow or get lost
    EndToEnd(end_to_end::EndToEndBench),
    /// Sagas of three steps from start to end, beside chains of as many messages without a saga
    Saga(saga::SagaBench),
}

impl What {
    fn name(&self) -> &'static str {
        match self {
            Self::Publish(_) => "publish",
            Self::Relay(_) => "relay",
            Self::Latency(_) => "latency",
            Self::Write(_) => "write",
            Self::Inbox(_) => "inbox",
            Self::EndToEnd(_) => "end-to-end",
            Self::Saga(_) => "saga",
        }
    }

    /// Refuses what needs no server to be refused.
    fn check(&self) -> Result<(), ConfigError> {
        match self {
            Self::Relay(bench) => bench.check(),
            _ => Ok(()),
        }
    }

    /// Which servers it works on.
    fn needs(&self) -> Needs {
        match self {
            Self::Publish(_) => Needs::BROKER,
            Self::Write(bench) => bench.needs(),
            Self::Relay(_) | Self::Latency(_) | Self::Inbox(_) | Self::EndToEnd(_) | Self::Saga(_) => Needs::BOTH,
        }
    }

    async fn run(&self, stage: &Stage) -> anyhow::Result<Measurement> {
        match self {
            Self::Publish(bench) => publish::run(bench, stage).await,
            Self::Relay(bench) => relay::run(bench, stage).await,
            Self::Latency(bench) => latency::run(bench, stage).await,
            Self::Write(bench) => write::run(bench, stage).await,
            Self::Inbox(bench) => inbox::run(bench, stage).await,
            Self::EndToEnd(bench) => end_to_end::run(bench, stage).await,
            Self::Saga(bench) => saga::run(bench, stage).await,
        }
    }
}

/// Measures and writes table, JSON and page.
///
/// # Errors
/// A wrong option, a server that cannot be reached or started, or a measurement that did not come to its end.
pub async fn run(args: BenchArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        measured = measure(&args, config) => measured.map(|()| ExitCode::SUCCESS),
        _ = interrupt.recv() => Ok(ExitCode::from(INTERRUPTED)),
        _ = terminate.recv() => Ok(ExitCode::from(INTERRUPTED)),
        _ = hang_up.recv() => Ok(ExitCode::from(INTERRUPTED)),
    }
}

async fn measure(args: &BenchArgs, config: &Config) -> anyhow::Result<()> {
    let (name, needs) = match &args.words {
        Words::One(what) => what.check().map(|()| (what.name(), what.needs()))?,
        Words::All(all) => all.check().map(|()| ("all", Needs::BOTH))?,
    };
    let output = args.output.open(name)?;
    let mut machine = report::machine();
    let servers = Servers::open(&args.servers, config, needs).await?;
    machine.extend(servers.facts().await?.into_iter().map(|(name, value)| Fact::new(name, value)));
    let stage = Stage { servers, runs: args.runs as usize, key_window: config.key_window };
    let (measurements, failures) = match &args.words {
        Words::One(what) => (vec![what.run(&stage).await?], Vec::new()),
        Words::All(all) => all.run(&stage).await?,
    };
    let mut warnings = report::warnings(stage.runs, &machine);
    warnings.extend(stage.servers.silent());
    warnings.extend(failures.iter().cloned());
    stage.servers.end();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    output.write(&Report { version, date: report::date(), runs: stage.runs, machine, warnings, measurements })?;
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}
