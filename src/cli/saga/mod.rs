//! `oncebox saga …`: what operators see of sagas, and what they do to them.
//!
//! `list` and `show` look, `operate` acts, each act with its who and why in the history; `start` begins sagas and
//! sends them signals, `define` keeps their definitions, `verify` holds what is recorded against itself. Everything
//! here is also a SQL statement or a request of the REST API; this puts words to it. A saga is named by its id, or as
//! `DEFINITION/BUSINESS_KEY`; without a definition, as `/BUSINESS_KEY`.

mod conformance;
mod define;
mod draw;
pub mod list;
mod operate;
mod show;
pub mod start;
mod text;
mod verify;
mod view;

use crate::config::Config;
use crate::db::{self, DbError, SessionOptions};
use crate::migrate;
use crate::saga::decide::{Action, allowed_actions, allowed_step_actions};
use crate::saga::definition::Definition;
use crate::saga::read;
use crate::saga::state::Saga;
use anyhow::Context;
use clap::{Args, Subcommand};
use draw::Style;
use operate::Verb;
use sqlx::PgConnection;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(10);
/// Columns where the terminal does not say.
const WIDTH: usize = 100;

/// Arguments of `oncebox saga`.
#[derive(Debug, Args)]
pub struct SagaArgs {
    #[command(subcommand)]
    verb: SagaVerb,
}

#[derive(Debug, Subcommand)]
enum SagaVerb {
    /// Show which sagas there are, the newest first; those that need an operator: --status stuck
    List(list::ListArgs),
    /// Show one saga as a tree: each step with its times, what undoes it, what is waited for, what you may do
    Show(show::ShowArgs),
    /// Print what happens to a saga as it happens, until it ends
    Watch(show::WatchArgs),
    /// Start a saga; prints its id
    #[command(disable_version_flag = true)]
    Start(start::StartArgs),
    /// Send a signal that a step waits for
    Signal(start::SignalArgs),
    /// Turn back: undo what is done; before the pivot only
    Cancel(operate::Whole),
    /// Send nothing new until resumed; what comes in is recorded
    Pause(operate::Whole),
    /// Go on
    Resume(operate::Whole),
    /// Try what is stuck again
    Retry(operate::RetryArgs),
    /// Go on without a step, or without undoing one that is stuck
    Skip(operate::SkipArgs),
    /// Say what became of a step, as you found out
    Resolve(operate::ResolveArgs),
    /// Give up a stuck saga as it stands
    Terminate(operate::Whole),
    /// Hold what is recorded of sagas against itself, the outbox and the barrier; exit 1 if anything does not fit
    Verify(verify::VerifyArgs),
    /// Store a definition, for good; what is wrong with it: exit 2
    Define(define::DefineArgs),
    /// Show which definitions there are, or the document of one
    #[command(disable_version_flag = true)]
    Definitions(define::DefinitionsArgs),
    /// Say everything that is wrong with a definition; needs no database
    Validate(define::ValidateArgs),
    /// Remove a definition that no saga follows
    #[command(disable_version_flag = true)]
    Undefine(define::UndefineArgs),
    /// Check that a participant keeps to the rules of sagas: sends its queue commands twice, late and out of order
    Conformance(conformance::ConformanceArgs),
}

/// Runs one verb.
///
/// # Errors
/// The database's, a saga that is not there, and what a saga's state does not allow.
pub async fn run(args: SagaArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let verb = match args.verb {
        SagaVerb::Validate(args) => return define::validate(&args),
        SagaVerb::Conformance(args) => return conformance::run(args, config).await,
        verb => verb,
    };
    let session = SessionOptions {
        application_name: "oncebox saga",
        statement_timeout: Duration::from_secs(60),
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(config.database_url()?, session).await?;
    migrate::check(&mut conn).await?;
    let code = execute(&mut conn, verb).await?;
    db::close(conn).await;
    Ok(code)
}

async fn execute(conn: &mut PgConnection, verb: SagaVerb) -> anyhow::Result<ExitCode> {
    match verb {
        SagaVerb::List(args) => list::list(conn, args).await?,
        SagaVerb::Show(args) => show::show(conn, args).await?,
        SagaVerb::Watch(args) => return show::watch(conn, args).await,
        SagaVerb::Start(args) => return start::start(conn, args).await,
        SagaVerb::Signal(args) => start::signal(conn, args).await?,
        SagaVerb::Cancel(args) => operate::whole(conn, Verb::Cancel, args).await?,
        SagaVerb::Pause(args) => operate::whole(conn, Verb::Pause, args).await?,
        SagaVerb::Resume(args) => operate::whole(conn, Verb::Resume, args).await?,
        SagaVerb::Terminate(args) => operate::whole(conn, Verb::Terminate, args).await?,
        SagaVerb::Retry(args) => operate::retry(conn, args).await?,
        SagaVerb::Skip(args) => operate::skip(conn, args).await?,
        SagaVerb::Resolve(args) => operate::resolve(conn, args).await?,
        SagaVerb::Verify(args) => return verify::verify(conn, args).await,
        SagaVerb::Define(args) => return define::define(conn, args).await,
        SagaVerb::Definitions(args) => define::definitions(conn, args).await?,
        SagaVerb::Undefine(args) => define::undefine(conn, args).await?,
        SagaVerb::Validate(_) | SagaVerb::Conformance(_) => unreachable!("they need no database"),
    }
    Ok(ExitCode::SUCCESS)
}

/// What the database's functions say of wrong arguments and states is meant to be read as it stands.
fn said(error: DbError) -> anyhow::Error {
    if let DbError::Sqlx(error) = &error
        && let Some(code) = db::sqlstate(error)
        && matches!(&*code, "22023" | "23505" | "55000" | "P0002")
        && let Some(database) = error.as_database_error()
    {
        return anyhow::anyhow!("{}", database.message());
    }
    error.into()
}

const NOW: &str = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[NOW];

/// The time by the clock that stamped the sagas.
async fn now(conn: &mut PgConnection) -> Result<i64, DbError> {
    db::bounded("the time", LIMIT, sqlx::query_scalar(NOW).fetch_one(conn)).await
}

/// Colours for a terminal whose user has not declined them; its width as it says.
fn style() -> Style {
    let says = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let colour = std::io::stdout().is_terminal() && !says("NO_COLOR");
    let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    Style { width: columns.unwrap_or(WIDTH), colour }
}

/// As the command line takes it.
fn name_of(definition: Option<&str>, business_key: &str) -> String {
    format!("{}/{business_key}", definition.unwrap_or_default())
}

/// The id of a saga that is named by its id or its business key.
async fn find(conn: &mut PgConnection, name: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = name.parse::<Uuid>() {
        return Ok(id);
    }
    let (definition, business_key) = name
        .split_once('/')
        .with_context(|| format!("\"{name}\" names no saga: give its id, or DEFINITION/BUSINESS_KEY"))?;
    let definition = (!definition.is_empty()).then_some(definition);
    let found = read::find(conn, definition, business_key).await?;
    found.map(|standing| standing.id).with_context(|| format!("there is no saga {name}"))
}

/// Why there is no saga of this id.
async fn missing(conn: &mut PgConnection, id: Uuid) -> anyhow::Error {
    match read::purged(conn, id).await {
        Ok(Some(purged)) => anyhow::anyhow!(
            "the saga {id} ended as {} at {} and was removed at {}",
            purged.status.as_str(),
            purged.ended_at,
            purged.purged_at
        ),
        Ok(None) => anyhow::anyhow!("there is no saga {id}"),
        Err(error) => error.into(),
    }
}

/// What the saga should do; none where that cannot be read, which `verify` tells more of.
async fn definition_of(conn: &mut PgConnection, saga: &Saga) -> anyhow::Result<Option<Definition>> {
    let Some((name, version)) = &saga.definition else { return Ok(Some(Definition::enlisted(saga))) };
    let Some(found) = read::document(conn, name, *version).await? else { return Ok(None) };
    let document = serde_json::from_str(found.document.get())?;
    Ok(Definition::parse(&document).ok())
}

/// What an operator may do now, as the command line takes it: `cancel`, `skip ship`.
fn allowed(saga: &Saga, definition: Option<&Definition>) -> Vec<String> {
    let Some(definition) = definition else { return Vec::new() };
    let word = |action: &Action| match action {
        Action::Cancel => "cancel",
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Retry => "retry",
        Action::Terminate => "terminate",
        Action::Skip => "skip",
        Action::Resolve => "resolve",
    };
    let whole = allowed_actions(saga, definition);
    let mut words: Vec<String> = whole.iter().map(|action| word(action).to_owned()).collect();
    for step in &saga.steps {
        let of_step = allowed_step_actions(saga, definition, &step.id);
        words.extend(of_step.iter().map(|action| format!("{} {}", word(action), step.id)));
    }
    words
}
