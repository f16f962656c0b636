//! `oncebox saga start|signal`.

use super::list::{label, labels};
use super::{LIMIT, find, said, text};
use crate::cli::since;
use crate::config::ConfigError;
use crate::db::{self, DbError};
use crate::saga::read;
use crate::saga::state::SagaStatus;
use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use sqlx::PgConnection;
use sqlx::types::Json;
use std::io::Read;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Between two looks while waiting for a saga's end.
const POLL: Duration = Duration::from_millis(100);

/// Arguments of `oncebox saga start`.
#[derive(Debug, Args)]
pub(super) struct StartArgs {
    /// Name of the definition
    definition: String,
    /// What the saga is about; the same key again, with the same input, is the same saga
    business_key: String,
    /// What its commands are made of: JSON, or @FILE, or @- for stdin
    #[arg(long, value_name = "JSON|@FILE")]
    input: Option<String>,
    /// Version of the definition; default: the newest
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    version: Option<i32>,
    /// When it begins: in 15m, 2h, 3d, or at a time
    #[arg(long, value_name = "DURATION|TIME")]
    start_at: Option<String>,
    /// How long it may take until it turns back; default: as the definition says
    #[arg(long, value_name = "DURATION")]
    deadline: Option<String>,
    /// What it can be found by; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Wait for its end: exit 1 unless it completes in time
    #[arg(long, value_name = "DURATION")]
    wait: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `oncebox saga signal`.
#[derive(Debug, Args)]
pub(super) struct SignalArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// What a step waits for
    name: String,
    /// Becomes the step's output: JSON, or @FILE, or @- for stdin
    #[arg(long, value_name = "JSON|@FILE")]
    payload: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const START: &str = "
    select oncebox.saga_start($1, $2, $3, $4,
        coalesce($5::text::timestamptz, clock_timestamp() + make_interval(secs => $6)),
        make_interval(secs => $7), $8)";
const SIGNAL: &str = "select oncebox.saga_signal($1, $2, $3)";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[START, SIGNAL];

/// JSON of the command line, or of a file that it names.
pub(super) fn json_of(flag: &str, text: &str) -> anyhow::Result<Value> {
    let text = match text.strip_prefix('@') {
        None => text.to_owned(),
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("stdin")?;
            text
        }
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("{flag}: {file}"))?,
    };
    let value = serde_json::from_str(&text);
    value.map_err(|error| ConfigError { setting: flag.to_owned(), reason: format!("is no JSON: {error}") }.into())
}

fn seconds(flag: &str, text: &str) -> Result<f64, ConfigError> {
    since::seconds(text).filter(|seconds| *seconds > 0.0).ok_or_else(|| {
        let reason = format!("\"{text}\" is no duration: write 250ms, 90s, 15m, 2h or 3d");
        ConfigError { setting: flag.to_owned(), reason }
    })
}

/// Starts one; prints its id.
pub(super) async fn start(conn: &mut PgConnection, args: StartArgs) -> anyhow::Result<ExitCode> {
    let input = args.input.as_deref().map_or(Ok(json!({})), |text| json_of("--input", text))?;
    let deadline_s = args.deadline.as_deref().map(|text| seconds("--deadline", text)).transpose()?;
    let wait_s = args.wait.as_deref().map(|text| seconds("--wait", text)).transpose()?;
    let (at, in_s) = match args.start_at {
        None => (None, None),
        Some(text) => match since::seconds(&text) {
            Some(seconds) => (None, Some(seconds)),
            None => (Some(text), None),
        },
    };
    let query = sqlx::query_scalar(START)
        .bind(&args.definition)
        .bind(&args.business_key)
        .bind(Json(input))
        .bind(args.version)
        .bind(&at)
        .bind(in_s)
        .bind(deadline_s)
        .bind(Json(labels(args.label)?));
    let id: Uuid = match db::bounded("the saga", LIMIT, query.fetch_one(&mut *conn)).await {
        Err(DbError::Sqlx(error))
            if db::sqlstate(&error).is_some_and(|code| matches!(&*code, "22007" | "22008")) && at.is_some() =>
        {
            let reason = format!("\"{}\" is neither a duration nor a time", at.unwrap_or_default());
            return Err(ConfigError { setting: "--start-at".to_owned(), reason }.into());
        }
        started => started.map_err(said)?,
    };
    let limit = wait_s.map(Duration::try_from_secs_f64).transpose().context("--wait")?;
    let status = match limit {
        Some(limit) => Some(wait(conn, id, limit).await?),
        None => None,
    };
    match (args.json, status) {
        (true, status) => println!("{}", json!({ "id": id, "status": status })),
        (false, None) => println!("{id}"),
        (false, Some(status)) => println!("{id} {}", status.as_str()),
    }
    Ok(match status {
        None | Some(SagaStatus::Completed) => ExitCode::SUCCESS,
        Some(status) => {
            if !status.is_final() {
                eprintln!("oncebox: still {} after {}", status.as_str(), args.wait.unwrap_or_default());
            }
            ExitCode::FAILURE
        }
    })
}

/// Where the saga stands at its end, when it needs an operator, or when the time is up.
async fn wait(conn: &mut PgConnection, id: Uuid, limit: Duration) -> anyhow::Result<SagaStatus> {
    let began = Instant::now();
    loop {
        let standing = read::standings(conn, &[id]).await?.into_iter().next();
        let Some(standing) = standing else { return Err(super::missing(conn, id).await) };
        let is_over = standing.status.is_final() || standing.status == SagaStatus::Stuck;
        if is_over || began.elapsed() >= limit {
            return Ok(standing.status);
        }
        tokio::time::sleep(POLL.min(limit.saturating_sub(began.elapsed()))).await;
    }
}

/// Sends one.
pub(super) async fn signal(conn: &mut PgConnection, args: SignalArgs) -> anyhow::Result<()> {
    let payload = args.payload.as_deref().map(|text| json_of("--payload", text)).transpose()?;
    let id = find(conn, &args.saga).await?;
    let query = sqlx::query(SIGNAL).bind(id).bind(&args.name).bind(payload.map(Json));
    db::bounded("the signal", LIMIT, query.execute(conn)).await.map_err(said)?;
    match args.json {
        true => println!("{}", json!({ "id": id, "signal": args.name })),
        false => println!("sent signal {} to {id}", text::clean(&args.name)),
    }
    Ok(())
}
