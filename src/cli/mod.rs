//! The command line: what the words mean, and which exit code an end has. One file a command with work of its own.

mod audit;
mod doctor;
mod migrate;
mod node;
mod parked;
mod pause;
mod processes;
mod replay;
pub mod saga;
pub mod since;
mod status;
mod token;

use crate::config::{Config, ConfigError, Overrides};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Exactly-once messaging for Postgres and RabbitMQ.
#[derive(Debug, Parser)]
#[command(name = "oncebox", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// Config file (TOML)
    #[arg(long, global = true, env = "ONCEBOX_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Postgres with the schema `oncebox`
    #[arg(long, global = true, env = "ONCEBOX_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,
    /// RabbitMQ, with the vhost in the path
    #[arg(long, global = true, env = "ONCEBOX_AMQP_URL", value_name = "URL", hide_env_values = true)]
    amqp_url: Option<String>,
    /// What to log: error, warn, info, debug, or a filter as for tracing-subscriber
    #[arg(long, global = true, env = "ONCEBOX_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Apply the migrations; safe to run from many places at once
    Migrate {
        /// Show which migrations are applied, change nothing
        #[arg(long)]
        status: bool,
    },
    /// Publish the outbox to the broker; any number may run
    Relay,
    /// Run the consumers of the config file
    Consume,
    /// Move sagas: take the replies to their commands, and do what is due; any number may run
    Orchestrate,
    /// Serve the REST API
    Serve {
        #[command(flatten)]
        listen: Listen,
    },
    /// Relay, consumers, saga orchestrator and REST API in one process
    Run {
        #[command(flatten)]
        listen: Listen,
    },
    /// Hold what was produced against what each consumer applied; exit 1 if anything is missing or doubled
    Audit(audit::AuditArgs),
    /// Look at parked messages, retry or discard them
    Parked(parked::ParkedArgs),
    /// Look at sagas, start them, act on those that need an operator
    Saga(saga::SagaArgs),
    /// Send retained messages again under the same ids and offsets
    Replay(replay::ReplayArgs),
    /// Stop sending: topics by pattern, a lane, or everything; kept until resumed
    Pause(pause::PauseArgs),
    /// Send again what was paused
    Resume(pause::ResumeArgs),
    /// Check databases and broker: what is wrong, and what mends it; exit code 1 if anything is unsafe
    Doctor(doctor::DoctorArgs),
    /// Lag, parked messages, lanes, consumers, the log and the oldest transaction
    Status(status::StatusArgs),
    /// Make a token for the REST API
    Token(token::TokenArgs),
    /// Print the API description
    Openapi,
    /// The main job end to end on private servers, with faults, and its reconciliation
    Demo(crate::demo::DemoArgs),
    /// The benchmarks, with ceilings measured in the same run
    Bench(crate::bench::BenchArgs),
    #[command(hide = true)]
    Node(node::NodeArgs),
}

#[derive(Debug, Args)]
struct Listen {
    /// Address and port of the REST API
    #[arg(long, env = "ONCEBOX_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<String>,
}

/// A reader that has seen enough, such as `head`, is no error worth a panic: printing to it ends the process, as SIGPIPE
/// would in other programs.
pub fn end_quietly_without_a_reader() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>();
        if text.is_some_and(|text| text.starts_with("failed printing to stdout: Broken pipe")) {
            std::process::exit(141);
        }
        others(panic);
    }));
}

/// Runs what the command line says: 0 done, 1 failed, 2 wrong usage or config.
pub async fn run(cli: Cli) -> ExitCode {
    match execute(cli).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("oncebox: {}", one_line(&error));
            if error.downcast_ref::<ConfigError>().is_some() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// The whole chain on one line; what a cause repeats of its outer error is said once.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}

async fn execute(cli: Cli) -> anyhow::Result<ExitCode> {
    crate::telemetry::start(&cli.common.log)?;
    let Common { config, database_url, amqp_url, .. } = cli.common;
    let load = |listen: Option<String>| {
        Config::load(
            config.as_deref(),
            Overrides { database_url: database_url.clone(), amqp_url: amqp_url.clone(), listen },
        )
    };
    match cli.command {
        Command::Migrate { status } => migrate::run(&load(None)?, status).await?,
        Command::Relay => processes::run(load(None)?, processes::Parts::RELAY).await?,
        Command::Consume => processes::run(load(None)?, processes::Parts::CONSUME).await?,
        Command::Orchestrate => processes::run(load(None)?, processes::Parts::ORCHESTRATE).await?,
        Command::Serve { listen } => processes::run(load(listen.listen)?, processes::Parts::SERVE).await?,
        Command::Run { listen } => processes::run(load(listen.listen)?, processes::Parts::ALL).await?,
        Command::Audit(args) => return audit::run(&load(None)?, args).await,
        Command::Parked(args) => return parked::run(args, &load(None)?).await,
        Command::Saga(args) => return saga::run(args, &load(None)?).await,
        Command::Replay(args) => return replay::run(args, &load(None)?).await,
        Command::Pause(args) => pause::pause(&load(None)?, &args).await?,
        Command::Resume(args) => return pause::resume(&load(None)?, &args).await,
        Command::Doctor(args) => return doctor::run(args, &load(None)?).await,
        Command::Status(args) => status::run(args, &load(None)?).await?,
        Command::Token(args) => token::run(&args)?,
        Command::Openapi => print!("{}", crate::api::openapi_yaml()),
        Command::Demo(args) => return crate::demo::run(args).await,
        Command::Bench(args) => return crate::bench::run(args, &load(None)?).await,
        Command::Node(args) => node::run(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}
