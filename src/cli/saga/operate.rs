//! `oncebox saga cancel|pause|resume|retry|skip|resolve|terminate`: what an operator decides, with who and why.

use super::start::json_of;
use super::{allowed, definition_of, find, missing};
use crate::cli::parked::user_at_host;
use crate::config::ConfigError;
use crate::saga::decide::{Refusal, StepChange};
use crate::saga::read;
use crate::saga::snapshot;
use crate::saga::state::{Event, Operator, Outcome};
use crate::saga::store::{ActError, Acted, Definitions, act};
use clap::{Args, ValueEnum};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

/// Which saga, who and why.
#[derive(Debug, Args)]
pub(super) struct Common {
    /// Why, for those who ask later
    #[arg(long, value_name = "TEXT")]
    why: String,
    /// Who decided; default: $USER, or user@host
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Only if the saga is still where you saw it: its seq
    #[arg(long, value_name = "N")]
    seq: Option<i64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of verbs on a whole saga.
#[derive(Debug, Args)]
pub(super) struct Whole {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `oncebox saga retry`.
#[derive(Debug, Args)]
pub(super) struct RetryArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// One stuck step; default: every stuck one
    step: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `oncebox saga skip`.
#[derive(Debug, Args)]
pub(super) struct SkipArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// Which step is not to run, or not to be undone
    step: String,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `oncebox saga resolve`.
#[derive(Debug, Args)]
pub(super) struct ResolveArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// Which step
    step: String,
    /// What became of it, as you found out; of an undo: succeeded
    #[arg(long, value_enum)]
    outcome: Found,
    /// What it gave: JSON, or @FILE, or @- for stdin
    #[arg(long, value_name = "JSON|@FILE")]
    output: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Found {
    Succeeded,
    Failed,
}

/// What is to be done with a saga as a whole.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verb {
    Cancel,
    Pause,
    Resume,
    Terminate,
}

/// Acts on a saga.
pub(super) async fn whole(conn: &mut PgConnection, verb: Verb, args: Whole) -> anyhow::Result<()> {
    let by = args.common.operator()?;
    let event = match verb {
        Verb::Cancel => Event::Cancel(by),
        Verb::Pause => Event::Pause(by),
        Verb::Resume => Event::Resume(by),
        Verb::Terminate => Event::Terminate(by),
    };
    run(conn, &args.saga, &event, &args.common).await
}

/// Tries what is stuck again.
pub(super) async fn retry(conn: &mut PgConnection, args: RetryArgs) -> anyhow::Result<()> {
    let by = args.common.operator()?;
    let event = match args.step {
        Some(step) => Event::RetryStep { step, by },
        None => Event::Retry(by),
    };
    run(conn, &args.saga, &event, &args.common).await
}

/// Goes on without a step.
pub(super) async fn skip(conn: &mut PgConnection, args: SkipArgs) -> anyhow::Result<()> {
    let event = Event::SkipStep { step: args.step, by: args.common.operator()? };
    run(conn, &args.saga, &event, &args.common).await
}

/// Says what became of a step.
pub(super) async fn resolve(conn: &mut PgConnection, args: ResolveArgs) -> anyhow::Result<()> {
    let output = args.output.as_deref().map(|text| json_of("--output", text)).transpose()?;
    if output.is_some() && args.outcome == Found::Failed {
        let reason = "a step that failed has none".to_owned();
        return Err(ConfigError { setting: "--output".to_owned(), reason }.into());
    }
    let outcome = match args.outcome {
        Found::Succeeded => Outcome::Succeeded,
        Found::Failed => Outcome::Failed,
    };
    let event = Event::ResolveStep { step: args.step, outcome, output, by: args.common.operator()? };
    run(conn, &args.saga, &event, &args.common).await
}

/// Who runs this; containers and cron set no `$USER`.
pub(super) fn caller() -> String {
    let user = std::env::var("USER").ok().filter(|user| !user.trim().is_empty());
    user.unwrap_or_else(user_at_host)
}

impl Common {
    fn operator(&self) -> Result<Operator, ConfigError> {
        let said = |flag: &str, text: &str| match text.trim() {
            "" => Err(ConfigError { setting: flag.to_owned(), reason: "must not be empty".to_owned() }),
            text => Ok(text.to_owned()),
        };
        let who = said("--by", &self.by.clone().unwrap_or_else(caller))?;
        Ok(Operator { who, why: said("--why", &self.why)? })
    }
}

async fn run(conn: &mut PgConnection, saga: &str, event: &Event, common: &Common) -> anyhow::Result<()> {
    let id = find(conn, saga).await?;
    match act(conn, &Definitions::default(), id, event, common.seq).await {
        Ok(acted) => say(&acted, common.json),
        Err(ActError::Refused { refusal, .. }) => Err(refused(conn, id, &refusal).await),
        Err(ActError::NotFound(id) | ActError::Purged(id)) => Err(missing(conn, id).await),
        Err(ActError::Db(error)) => Err(super::said(error)),
        Err(error) => Err(error.into()),
    }
}

fn say(acted: &Acted, json: bool) -> anyhow::Result<()> {
    let (saga, changes) = (&acted.saga, &acted.changes);
    if json {
        let value = json!({ "id": saga.id, "status": saga.status, "paused": saga.paused, "seq": saga.seq,
            "changes": changes });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let mut parts = vec![match &changes.saga {
        Some(change) => format!("{} → {}", change.from.as_str(), change.to.as_str()),
        None => saga.status.as_str().to_owned(),
    }];
    parts.extend(saga.paused.then(|| "paused".to_owned()));
    parts.extend(saga.cancel.as_ref().map(|_| "to be cancelled once its pivot's outcome is known".to_owned()));
    let step = |change: &StepChange| format!("{} {} → {}", change.step, change.from.as_str(), change.to.as_str());
    parts.extend(changes.steps.iter().map(step));
    println!("{}: {}", saga.id, parts.join(", "));
    Ok(())
}

/// One line: why, the saga's state, and what could be done instead.
async fn refused(conn: &mut PgConnection, id: Uuid, refusal: &Refusal) -> anyhow::Error {
    let instead = async {
        let Some(detail) = read::show(conn, id).await? else { return Ok(None) };
        let compensations = read::compensations(conn, id).await?.unwrap_or_default();
        let saga = snapshot::state(&detail, &compensations);
        let definition = definition_of(conn, &saga).await?;
        let allowed = allowed(&saga, definition.as_ref());
        let allowed = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
        let paused = if saga.paused { ", paused" } else { "" };
        Ok::<_, anyhow::Error>(Some(format!("{}{paused}; allowed now: {allowed}", saga.status.as_str())))
    };
    match instead.await {
        Ok(Some(instead)) => anyhow::anyhow!("{refusal} (status {instead})"),
        _ => anyhow::anyhow!("{refusal}"),
    }
}
