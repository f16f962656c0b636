//! `oncebox pause` and `oncebox resume`.

use crate::config::{Config, ConfigError};
use crate::db::{self, DbError};
use crate::outbox::pause::{self, PauseEntry};
use clap::Args;
use comfy_table::{Table, presets};
use sqlx::PgConnection;
use std::process::ExitCode;
use std::time::Duration;

/// Longest statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// What to pause.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// Topics that match this pattern: `*` stands for one word, `#` for any number of words
    #[arg(long, value_name = "PATTERN", required_unless_present_any = ["lane", "all", "list"])]
    topic: Option<String>,
    /// This lane; together with --topic, those topics in this lane
    #[arg(long, value_name = "N")]
    lane: Option<i32>,
    /// Everything
    #[arg(long, conflicts_with_all = ["topic", "lane"])]
    all: bool,
    /// Why, for those who find it paused
    #[arg(long, value_name = "TEXT", required_unless_present = "list")]
    why: Option<String>,
    /// By whom; default: the database user
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Show the pauses in force, change nothing
    #[arg(long, conflicts_with_all = ["topic", "lane", "all", "why", "by"])]
    list: bool,
    /// The list as JSON
    #[arg(long, requires = "list", conflicts_with_all = ["topic", "lane", "all", "why", "by"])]
    json: bool,
}

/// What to resume: the same words as it was paused with.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The pause of this pattern
    #[arg(long, value_name = "PATTERN", required_unless_present_any = ["lane", "all", "every"])]
    topic: Option<String>,
    /// The pause of this lane; together with --topic, the one of both
    #[arg(long, value_name = "N")]
    lane: Option<i32>,
    /// The pause of everything; those of topics and lanes stay in force
    #[arg(long, conflicts_with_all = ["topic", "lane", "every"])]
    all: bool,
    /// Every pause there is
    #[arg(long, conflicts_with_all = ["topic", "lane"])]
    every: bool,
}

/// Pauses, or lists the pauses.
pub async fn pause(config: &Config, args: &PauseArgs) -> anyhow::Result<()> {
    let mut conn = connect(config).await?;
    if args.list {
        let pauses = pause::list(&mut conn).await?;
        if args.json {
            println!("{}", serde_json::to_string_pretty(&pauses)?);
        } else if pauses.is_empty() {
            println!("nothing is paused");
        } else {
            println!("{}", table(&pauses));
        }
    } else {
        let why = args.why.as_deref().unwrap_or_default();
        let paused = pause::pause(&mut conn, args.topic.as_deref(), args.lane, why, args.by.as_deref()).await;
        paused.map_err(usage)?;
        println!("paused {}; relays heed it within about a second", shown(args.topic.as_deref(), args.lane));
    }
    db::close(conn).await;
    Ok(())
}

/// Resumes; exit 1 when there was nothing to resume.
pub async fn resume(config: &Config, args: &ResumeArgs) -> anyhow::Result<ExitCode> {
    let mut conn = connect(config).await?;
    let lifted = match args.every {
        true => pause::resume_all(&mut conn).await?,
        false => pause::resume(&mut conn, args.topic.as_deref(), args.lane).await?,
    };
    let left = pause::list(&mut conn).await?;
    db::close(conn).await;
    match (lifted, args.every) {
        (0, true) => println!("nothing is paused"),
        (0, false) => {
            eprintln!("oncebox: {} is not paused by a pause of its own", shown(args.topic.as_deref(), args.lane))
        }
        (_, true) => println!("resumed: {lifted} pauses lifted"),
        (_, false) => println!("resumed {}", shown(args.topic.as_deref(), args.lane)),
    }
    if !left.is_empty() {
        let left: Vec<String> = left.iter().map(|p| shown(p.topic.as_deref(), p.lane.map(i32::from))).collect();
        println!("still paused: {}", left.join(", "));
    }
    Ok(if lifted == 0 && !args.every { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn shown(topic: Option<&str>, lane: Option<i32>) -> String {
    match (topic, lane) {
        (None, None) => "everything".to_owned(),
        (None, Some(lane)) => format!("lane {lane}"),
        (Some(topic), None) => format!("topics {topic}"),
        (Some(topic), Some(lane)) => format!("topics {topic} in lane {lane}"),
    }
}

fn table(pauses: &[PauseEntry]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["id", "what", "held", "since", "by", "why"]);
    for pause in pauses {
        table.add_row([
            pause.id.to_string(),
            shown(pause.topic.as_deref(), pause.lane.map(i32::from)),
            pause.held.to_string(),
            pause.paused_at.clone(),
            pause.paused_by.clone(),
            pause.why.clone().unwrap_or_default(),
        ]);
    }
    table
}

/// What the function refuses is wrong usage of the flag it names.
fn usage(error: DbError) -> anyhow::Error {
    if let DbError::Sqlx(sql) = &error
        && db::sqlstate(sql).as_deref() == Some("22023")
        && let Some(message) = sql.as_database_error().map(|error| error.message())
    {
        let (argument, reason) = message.split_once(": ").unwrap_or(("topic", message));
        return ConfigError { setting: format!("--{argument}"), reason: reason.to_owned() }.into();
    }
    error.into()
}

async fn connect(config: &Config) -> anyhow::Result<PgConnection> {
    let session = db::SessionOptions {
        application_name: "oncebox pause",
        statement_timeout: STATEMENT_TIMEOUT,
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(config.database_url()?, session).await?;
    crate::migrate::check(&mut conn).await?;
    Ok(conn)
}
