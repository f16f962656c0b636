//! `oncebox saga conformance`: does a participant keep to the rules of sagas?

use crate::broker::QueueSpec;
use crate::broker::rabbitmq::{Found, RabbitMq, RabbitMqOptions};
use crate::config::{self, Config, ConfigError};
use crate::saga::conformance::{self, ConformanceOptions, Report, Verdict};
use anyhow::bail;
use clap::Args;
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;

/// Arguments of `oncebox saga conformance`.
#[derive(Debug, Args)]
pub struct ConformanceArgs {
    /// The participant's queue
    #[arg(long, value_name = "NAME")]
    queue: String,
    /// Topic of the step's command
    #[arg(long, value_name = "TOPIC")]
    topic: String,
    /// Topic of the command that undoes it
    #[arg(long, value_name = "TOPIC")]
    undo_topic: String,
    /// Step the commands name
    #[arg(long, value_name = "NAME", default_value = "conformance")]
    step: String,
    /// Body of the commands: one the participant succeeds with
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json)]
    body: Value,
    /// A body the participant answers `failed` to
    #[arg(long, value_name = "JSON", value_parser = json)]
    failing_body: Option<Value>,
    /// How long a reply is waited for: 500ms, 10s, 2m
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    timeout: String,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("is no JSON: {error}"))
}

fn of_length(setting: &str, text: String, at_most_bytes: usize) -> Result<String, ConfigError> {
    if (1..=at_most_bytes).contains(&text.len()) {
        return Ok(text);
    }
    let reason = format!("must be 1 to {at_most_bytes} bytes, got {}", text.len());
    Err(ConfigError { setting: setting.to_owned(), reason })
}

/// Makes every check: exit code 1 if one failed.
///
/// # Errors
/// The broker, a queue that does not exist, and topics that no queue is bound to.
pub async fn run(args: ConformanceArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let queue = of_length("--queue", args.queue, 255)?;
    let options = ConformanceOptions {
        exchange: config.exchange.clone(),
        topic: of_length("--topic", args.topic, 255)?,
        undo_topic: of_length("--undo-topic", args.undo_topic, 255)?,
        step: of_length("--step", args.step, 100)?,
        body: args.body,
        failing_body: args.failing_body,
        timeout: config::duration("--timeout", Some(args.timeout), Duration::from_secs(10))?,
    };
    let mut broker = RabbitMqOptions::new(config.amqp_url()?);
    broker.connection_name = "oncebox saga conformance".to_owned();
    let broker = RabbitMq::new(broker)
        .map_err(|error| ConfigError { setting: "amqp_url".to_owned(), reason: error.to_string() })?;
    look(&broker, &options.exchange, queue).await?;
    let report = conformance::run(&broker, &options).await?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => say(&report),
    }
    Ok(if report.conforms { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Fails unless there is a participant to speak to. Whether its queue is as oncebox declares it is not asked here.
async fn look(broker: &RabbitMq, exchange: &str, queue: String) -> anyhow::Result<()> {
    let spec = QueueSpec {
        name: queue,
        exchange: exchange.to_owned(),
        bindings: Vec::new(),
        single_active_consumer: false,
        voids: false,
    };
    let found = broker.inspect(exchange, std::slice::from_ref(&spec)).await?;
    if found.exchange == Found::Missing {
        bail!("the exchange \"{exchange}\" does not exist: start a relay or the participant, which declare it");
    } else if found.queues.contains(&Found::Missing) {
        bail!("the queue \"{}\" does not exist: start the participant, which declares it", spec.name);
    } else if found.is_blocked {
        bail!("the broker takes no messages now: a memory or disk alarm is in force");
    }
    Ok(())
}

fn say(report: &Report) {
    for finding in &report.findings {
        let word = match finding.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Skipped => "skip",
        };
        println!("{word}  {:15} {}", finding.check, finding.sent);
        if finding.verdict == Verdict::Fail {
            println!("      expected: {}", finding.expected);
            println!("      seen:     {}", finding.seen);
        }
    }
    let count = |verdict| report.findings.iter().filter(|finding| finding.verdict == verdict).count();
    let skipped = match count(Verdict::Skipped) {
        0 => String::new(),
        skipped => format!(", {skipped} not made"),
    };
    println!("\n{} passed, {} failed{skipped}", count(Verdict::Pass), count(Verdict::Fail));
    if report.left_done > 0 {
        println!("{} actions of these checks were not undone", report.left_done);
    }
}
