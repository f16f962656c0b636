//! `oncebox saga show|watch`.

use super::draw::{self, draw};
use super::view::{self, Parts, View};
use super::{find, missing, now, style, text};
use crate::config;
use crate::saga::definition::Definition;
use crate::saga::read::{self, Compensation, Detail, HistoryRow};
use crate::saga::snapshot;
use clap::Args;
use serde_json::json;
use sqlx::PgConnection;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// History rows of one statement.
const PAGE: i64 = 1_000;
/// History rows that are looked at in all: a saga with more retries for days, and its newest rows tell nothing new.
const ROWS: usize = 20_000;
/// A saga that changes faster than it can be read is shown as it is.
const TRIES: usize = 20;
/// Between two looks of `watch`.
const POLL: Duration = Duration::from_millis(200);

/// Arguments of `oncebox saga show`.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// With its history
    #[arg(long)]
    history: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `oncebox saga watch`.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Id, or DEFINITION/BUSINESS_KEY
    saga: String,
    /// Give up after so long: exit 1
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
    /// Print JSON, a history row a line
    #[arg(long)]
    json: bool,
}

/// Everything that is read of one saga.
pub(super) struct Read {
    pub detail: Detail,
    pub compensations: Vec<Compensation>,
    pub history: Vec<HistoryRow>,
    pub definition: Option<Definition>,
    pub actions: Vec<String>,
    pub now: i64,
}

impl Read {
    fn view(&self, with_history: bool) -> View {
        View::new(Parts {
            now: self.now,
            detail: &self.detail,
            compensations: &self.compensations,
            history: &self.history,
            definition: self.definition.as_ref(),
            actions: self.actions.clone(),
            with_history,
        })
    }
}

/// Reads a saga again when a change came between: its parts are several statements.
pub(super) async fn read_whole(conn: &mut PgConnection, id: Uuid) -> anyhow::Result<Read> {
    for tries in 1.. {
        let Some(detail) = read::show(conn, id).await? else { return Err(missing(conn, id).await) };
        let compensations = read::compensations(conn, id).await?.unwrap_or_default();
        let history = history(conn, id, 0).await?;
        let seq = detail.summary.seq;
        let settled = history.last().is_none_or(|row| row.seq == seq) || history.len() >= ROWS;
        let now_at = read::standings(conn, &[id]).await?.first().map(|standing| standing.seq);
        if settled && now_at == Some(seq) || tries >= TRIES {
            let state = snapshot::state(&detail, &compensations);
            let definition = super::definition_of(conn, &state).await?;
            let actions = super::allowed(&state, definition.as_ref());
            let now = now(conn).await?;
            return Ok(Read { detail, compensations, history, definition, actions, now });
        }
    }
    unreachable!("the last try returns")
}

async fn history(conn: &mut PgConnection, id: Uuid, mut after: i64) -> anyhow::Result<Vec<HistoryRow>> {
    let mut rows = Vec::new();
    while rows.len() < ROWS {
        let Some(part) = read::history(conn, id, after, PAGE).await? else { break };
        let Some(last) = part.rows.last() else { break };
        after = last.seq;
        let is_whole = (part.rows.len() as i64) < PAGE;
        rows.extend(part.rows);
        if is_whole {
            break;
        }
    }
    Ok(rows)
}

/// Draws one saga.
pub(super) async fn show(conn: &mut PgConnection, args: ShowArgs) -> anyhow::Result<()> {
    let id = find(conn, &args.saga).await?;
    let read = read_whole(conn, id).await?;
    if !args.json {
        print!("{}", draw(&read.view(args.history), style()));
        return Ok(());
    }
    let mut value = serde_json::to_value(&read.detail)?;
    value["compensations"] = serde_json::to_value(&read.compensations)?;
    value["waits_for"] = json!(read.view(false).waits);
    value["allowed_actions"] = json!(read.actions);
    if args.history {
        value["history"] = serde_json::to_value(&read.history)?;
    }
    println!("{}", serde_json::to_string_pretty(&value)?);
    Ok(())
}

/// Prints history rows as they come.
pub(super) async fn watch(conn: &mut PgConnection, args: WatchArgs) -> anyhow::Result<ExitCode> {
    let limit = args.timeout.map(|text| config::duration("--timeout", Some(text), Duration::MAX)).transpose()?;
    let id = find(conn, &args.saga).await?;
    let began = Instant::now();
    let (style, read) = (style(), read_whole(conn, id).await?);
    let view = read.view(false);
    let mut after = 0;
    loop {
        let Some(part) = read::history(conn, id, after, PAGE).await? else { return Err(missing(conn, id).await) };
        let mut text = String::new();
        for row in &part.rows {
            after = row.seq;
            if args.json {
                text += &format!("{}\n", serde_json::to_string(row)?);
            } else {
                let lines = draw::history_lines(&view::history_line(row), &view, style);
                lines.iter().for_each(|line| text += &format!("{}\n", line.trim_end()));
            }
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            // Whoever read the output has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            written => written?,
        }
        drop(stdout);
        if part.status.is_final() && after >= part.seq {
            if !args.json {
                println!("{}", part.status.as_str());
            }
            return Ok(ExitCode::SUCCESS);
        }
        if limit.is_some_and(|limit| began.elapsed() >= limit) {
            eprintln!(
                "oncebox: still {} after {}",
                part.status.as_str(),
                text::duration(began.elapsed().as_millis() as i64)
            );
            return Ok(ExitCode::FAILURE);
        }
        if after >= part.seq {
            tokio::time::sleep(POLL).await;
        }
    }
}
