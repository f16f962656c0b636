//! `oncebox node`: the private servers of `./dev`, kept under one folder.
//!
//! Hidden from the help, since it is for work on oncebox itself. The environment file it writes (`env` in that folder)
//! is what `./dev` and the demo read.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::node::{Postgres, PostgresOptions, Rabbit, RabbitOptions};

/// The database that `./dev` works on.
const DATABASE: &str = "oncebox";

/// Arguments of `oncebox node`.
#[derive(Debug, Args)]
pub struct NodeArgs {
    #[command(subcommand)]
    verb: Verb,
    /// Folder of the servers' state.
    #[arg(long, global = true, default_value = ".dev", value_name = "FOLDER")]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make sure that PostgreSQL and RabbitMQ run
    Up {
        /// Enable RabbitMQ's management plugin on a new broker
        #[arg(long)]
        management: bool,
    },
    /// Stop both; their data stay
    Down,
    /// Like `up`; stops both and removes the folder when standard input ends, as it does however the caller ends
    Hold,
    /// Print the export lines of both URLs
    Env,
    /// Open psql on the database
    Psql {
        /// Arguments for psql
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Runs one verb.
///
/// # Errors
/// A server is missing, does not come up, or is not running.
pub async fn run(args: NodeArgs) -> anyhow::Result<()> {
    match args.verb {
        Verb::Up { management } => up(&args.dir, management).await,
        Verb::Down => down(&args.dir).await,
        Verb::Hold => hold(&args.dir).await,
        Verb::Env => env(&args.dir),
        Verb::Psql { args: rest } => psql(&args.dir, &rest).await,
    }
}

async fn up(dir: &Path, management: bool) -> anyhow::Result<()> {
    let (postgres, rabbit) = (Postgres::attach(dir).await, Rabbit::attach(dir).await);
    if postgres.is_none() || rabbit.is_none() {
        eprintln!("starting PostgreSQL and RabbitMQ in {} …", dir.display());
    }
    let postgres = Postgres::up(dir, PostgresOptions::default()).await?;
    postgres.create_database(DATABASE).await?;
    eprintln!("PostgreSQL  {}", postgres.url(DATABASE));
    let rabbit = Rabbit::up(dir, RabbitOptions { management, ..RabbitOptions::default() }).await?;
    eprintln!("RabbitMQ    {}", rabbit.url("/"));
    if let Some(url) = rabbit.management_url() {
        eprintln!("management  {url}");
    }
    let file = dir.join("env");
    let (database, amqp) = (postgres.url(DATABASE), rabbit.url("/"));
    let text = format!("ONCEBOX_DATABASE_URL={database}\nONCEBOX_AMQP_URL={amqp}\n");
    fs::write(&file, text).with_context(|| file.display().to_string())
}

async fn down(dir: &Path) -> anyhow::Result<()> {
    let broker = match Rabbit::attach(dir).await {
        Some(mut rabbit) => rabbit.stop().await.map(|()| "RabbitMQ is stopped"),
        None => Ok("RabbitMQ was not running"),
    };
    // Whatever became of the broker, the database stops too.
    let database = match Postgres::attach(dir).await {
        Some(mut postgres) => postgres.stop().await.map(|()| "PostgreSQL is stopped"),
        None => Ok("PostgreSQL was not running"),
    };
    // Without it nobody takes the URLs of a stopped server for good ones.
    let _ = fs::remove_file(dir.join("env"));
    // The caller may be gone: servers that are held stop then.
    for text in [&broker, &database].into_iter().flatten() {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
    broker?;
    database?;
    Ok(())
}

async fn hold(dir: &Path) -> anyhow::Result<()> {
    up(dir, false).await?;
    println!("ready");
    // Interrupts reach the whole process group: the caller ends by them, and then the input does.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut stdin = tokio::io::stdin();
    let mut input = [0; 64];
    loop {
        tokio::select! {
            read = stdin.read(&mut input) => if read.unwrap_or(0) == 0 { break },
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
    down(dir).await?;
    // Postgres' data may lie elsewhere, behind a link.
    if let Ok(elsewhere) = fs::canonicalize(dir.join("postgres")) {
        let _ = fs::remove_dir_all(elsewhere);
    }
    fs::remove_dir_all(dir).with_context(|| dir.display().to_string())
}

fn env(dir: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(dir.join("env")).context("nothing runs here: ./dev up starts the servers")?;
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
        println!("export {name}='{value}'");
    }
    Ok(())
}

async fn psql(dir: &Path, args: &[String]) -> anyhow::Result<()> {
    let Some(postgres) = Postgres::attach(dir).await else {
        bail!("PostgreSQL is not running: ./dev up starts it");
    };
    // Returns only if it fails.
    let error = Command::new(postgres.program("psql")).arg(postgres.url(DATABASE)).args(args).exec();
    Err(error).context("psql")
}
