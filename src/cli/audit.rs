//! `oncebox audit`.

use crate::audit::{self, AuditOptions, Missing, Report, StreamId};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::config::{self, Config, ConfigError};
use crate::replay::{ReplayOptions, Selection};
use crate::supervise;
use clap::Args;
use comfy_table::{Table, presets};
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;
use uuid::Uuid;

/// Messages a second that a redrive sends at most.
const REDRIVE_RATE: u32 = 1_000;

/// Flags of `oncebox audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Database of consumers that are not beside the outbox; those of the config file are known
    #[arg(long, value_name = "URL")]
    consumer_database_url: Vec<String>,
    /// How long after a later message of its stream one may still be on its way
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    grace: String,
    /// Send what is missing once more, under the same ids and offsets
    #[arg(long)]
    redrive: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Audits; the exit code says whether anything is missing or doubled.
pub async fn run(config: &Config, args: AuditArgs) -> anyhow::Result<ExitCode> {
    let mut consumer_database_urls = args.consumer_database_url;
    for url in &consumer_database_urls {
        config::postgres_url("--consumer-database-url", url)?;
    }
    consumer_database_urls.extend(config.consumers.iter().filter_map(|consumer| consumer.database_url.clone()));
    let options = AuditOptions {
        database_url: config.database_url()?.to_owned(),
        consumer_database_urls,
        grace: config::duration("--grace", Some(args.grace), Duration::ZERO)?,
    };
    if args.redrive {
        config.amqp_url()?;
    }
    let report = audit::run(&options).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    if args.redrive && report.missing_count() > 0 {
        redrive(config, options.database_url, &report).await?;
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn redrive(config: &Config, database_url: String, report: &Report) -> anyhow::Result<()> {
    let mut options = RabbitMqOptions::new(config.amqp_url()?);
    options.connection_name = "oncebox audit".to_owned();
    let broker = RabbitMq::new(options)
        .map_err(|error| ConfigError { setting: "amqp_url".to_owned(), reason: error.to_string() })?;
    let options = ReplayOptions {
        database_url,
        exchange: config.exchange.clone(),
        selection: Selection::Offsets { source: None, streams: BTreeMap::new() },
        rate: REDRIVE_RATE,
        drain_deadline: config.drain_deadline,
    };
    for summary in audit::redrive(report, &broker, &options, &supervise::shutdown_on_signal()?).await? {
        // The report alone goes to stdout.
        eprintln!("sent once more: {}; of the rest `oncebox replay` tells more", summary.sent);
    }
    Ok(())
}

fn print(report: &Report) {
    // An outbox that was moved has streams of the same name under several sources.
    let sources: BTreeSet<Uuid> = report.streams.iter().map(|stream| stream.id.source).collect();
    let name = |id: &StreamId| match sources.len() {
        0 | 1 => id.stream.clone(),
        _ => format!("{} of {}", id.stream, id.source),
    };
    let mut streams = Table::new();
    streams.load_style(presets::UTF8_BORDERS_ONLY);
    streams.set_header(["stream", "produced", "published", "unpublished", "waiting", "parked", "discarded"]);
    for s in &report.streams {
        let figures = [s.produced, s.published, s.unpublished, s.waiting, s.parked, s.discarded];
        streams.add_row(std::iter::once(name(&s.id)).chain(figures.map(|figure| figure.to_string())));
    }
    println!("{streams}\n");
    let mut consumers = Table::new();
    consumers.load_style(presets::UTF8_BORDERS_ONLY);
    consumers.set_header([
        "consumer",
        "stream",
        "from",
        "applied",
        "behind",
        "waiting",
        "parked",
        "discarded",
        "missing",
        "doubled",
        "unknown",
    ]);
    for c in &report.consumers {
        let missing = if c.checked { c.missing.count().to_string() } else { "not checked".to_owned() };
        let figures = [c.from.to_string()]
            .into_iter()
            .chain([c.applied, c.behind, c.waiting, c.parked, c.discarded].map(|figure| figure.to_string()));
        let row = [c.consumer.clone(), name(&c.id)].into_iter().chain(figures);
        consumers.add_row(row.chain([missing, c.doubled.count().to_string(), c.unknown.count().to_string()]));
    }
    println!("{consumers}\n");
    for c in &report.consumers {
        for (what, ranges) in [("missing", &c.missing), ("doubled", &c.doubled), ("unknown", &c.unknown)] {
            for (from, to) in ranges.iter() {
                println!("{what}: consumer {} stream {} offsets {from} to {to}", c.consumer, name(&c.id));
            }
        }
    }
    for Missing { consumer, id, offset, message_id } in &report.missing {
        let message_id = message_id.map_or("is no longer in the log".to_owned(), |id| id.to_string());
        println!("missing: consumer {consumer} stream {} offset {offset}: {message_id}", name(id));
    }
    println!(
        "missing {}, doubled {}, unknown {}",
        report.missing_count(),
        report.doubled_count(),
        report.unknown_count()
    );
}
