//! `oncebox doctor`: gathers what is to be looked at from the config, and prints what was found.

use crate::broker::QueueSpec;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::config::{Config, ConfigError};
use crate::consumer::Order;
use crate::doctor::broker::{self, BrokerCheck};
use crate::doctor::database::{self, DatabaseCheck};
use crate::doctor::queue::QueueUse;
use crate::doctor::{self, Finding, Severity};
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use std::process::ExitCode;
use std::time::Duration;

/// Arguments of `oncebox doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// RabbitMQ's management API, with user and password
    #[arg(long, env = "ONCEBOX_MANAGEMENT_URL", value_name = "URL", hide_env_values = true)]
    management_url: Option<String>,
    /// From when on an open transaction is a warning
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=31_536_000))]
    long_transaction_s: u32,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Looks at everything the config names: exit code 1 if anything is unsafe.
pub async fn run(args: DoctorArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let main_url = config.database_url()?;
    let long_transaction = Duration::from_secs(args.long_transaction_s.into());
    let database = |name: String, url: &str, role| DatabaseCheck {
        name,
        url: url.to_owned(),
        roles: vec![role],
        long_transaction,
    };
    let mut databases = vec![database("database".to_owned(), main_url, "oncebox_relay")];
    for consumer in &config.consumers {
        let (url, role) = (consumer.database_url.as_deref().unwrap_or(main_url), "oncebox_consumer");
        // Consumers that share a database share its findings.
        match databases.iter_mut().find(|known| known.url == url) {
            Some(known) if known.roles.contains(&role) => {}
            Some(known) => known.roles.push(role),
            None => databases.push(database(format!("database of {}", consumer.name), url, role)),
        }
    }
    let broker = broker_check(&args, config)?;
    let mut findings = Vec::new();
    for what in &databases {
        findings.extend(database::check(what).await);
    }
    findings.extend(match &broker {
        Some(what) => broker::check(what).await,
        None => vec![
            Finding::note("broker", "not checked")
                .or("give ONCEBOX_AMQP_URL, --amqp-url or amqp_url in the config file"),
        ],
    });
    findings.sort_by_key(|finding| finding.severity);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&findings)?),
        false => print_table(&findings),
    }
    Ok(if doctor::is_safe(&findings) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn broker_check(args: &DoctorArgs, config: &Config) -> anyhow::Result<Option<BrokerCheck>> {
    let management = config.management(args.management_url.as_deref())?;
    if !config.has_amqp_url() {
        return Ok(None);
    }
    let mut options = RabbitMqOptions::new(config.amqp_url()?);
    options.connection_name = "oncebox doctor".to_owned();
    let broker = RabbitMq::new(options)
        .map_err(|error| ConfigError { setting: "amqp_url".to_owned(), reason: error.to_string() })?;
    let queues = config.consumers.iter().map(|consumer| QueueUse {
        spec: QueueSpec {
            name: consumer.queue.clone(),
            exchange: config.exchange.clone(),
            bindings: consumer.bindings.clone(),
            single_active_consumer: consumer.order != Order::None,
            voids: consumer.order == Order::Stream,
        },
        concurrency: consumer.concurrency,
        batch: consumer.batch,
        handler_timeout: consumer.handler_timeout,
    });
    Ok(Some(BrokerCheck { broker, management, exchange: config.exchange.clone(), queues: queues.collect() }))
}

fn print_table(findings: &[Finding]) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "check", "found", "mend"]);
    for finding in findings {
        let mend = finding.mend.as_deref().unwrap_or_default();
        table.add_row([word(finding.severity), &finding.check, &finding.found, mend]);
    }
    println!("{table}");
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let all = [Severity::Unsafe, Severity::Warning, Severity::Note, Severity::Ok];
    println!("\n{}", all.map(|severity| format!("{} {}", count(severity), word(severity))).join(", "));
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Unsafe => "unsafe",
        Severity::Warning => "warning",
        Severity::Note => "note",
        Severity::Ok => "ok",
    }
}
