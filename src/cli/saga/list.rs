//! `oncebox saga list`.

use super::draw::{Ink, Style};
use super::text::{clean, cut, date_time, duration};
use super::{name_of, style};
use crate::config::ConfigError;
use crate::db::{self, DbError};
use crate::saga::read::{self, Filter, Summary};
use crate::saga::snapshot::millis;
use crate::saga::state::SagaStatus;
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use std::collections::HashMap;
use std::time::Duration;
use uuid::Uuid;

/// Longest wait for one statement.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest reason in the table; `show` has all of it.
const REASON_CHARS: usize = 60;

/// Arguments of `oncebox saga list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only in these statuses, e.g. stuck,compensating
    #[arg(long, value_name = "STATUS", value_delimiter = ',', value_parser = status)]
    status: Vec<SagaStatus>,
    /// Only of this definition, in any version
    #[arg(long, value_name = "NAME")]
    definition: Option<String>,
    /// Only with this business key
    #[arg(long, value_name = "KEY")]
    business_key: Option<String>,
    /// Only with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Show at most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=100_000))]
    limit: i64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn status(text: &str) -> Result<SagaStatus, String> {
    SagaStatus::ALL.into_iter().find(|status| status.as_str() == text).ok_or_else(|| {
        let known: Vec<&str> = SagaStatus::ALL.iter().map(|status| status.as_str()).collect();
        format!("no status; they are {}", known.join(", "))
    })
}

/// `name=value`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}

/// Labels as sagas keep them; a name that comes twice is an error of the command line.
pub(super) fn labels(pairs: Vec<(String, String)>) -> Result<Map<String, Value>, ConfigError> {
    let mut labels = Map::new();
    for (name, value) in pairs {
        if labels.insert(name.clone(), Value::String(value)).is_some() {
            return Err(ConfigError { setting: "--label".to_owned(), reason: format!("\"{name}\" is there twice") });
        }
    }
    Ok(labels)
}

// Later changes of a stuck saga, such as a pause, do not make it younger.
const STUCK_SINCE: &str = "
    select i.id, (
        select (extract(epoch from h.at) * 1000)::bigint from oncebox.saga_history as h
        where h.saga_id = i.id and h.changes -> 'saga' ->> 'to' = 'stuck' order by h.seq desc limit 1)
    from unnest($1::uuid[]) as i (id)
    order by i.id";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[STUCK_SINCE];

/// When each became stuck.
async fn stuck_since(conn: &mut PgConnection, ids: Vec<Uuid>) -> Result<HashMap<Uuid, i64>, DbError> {
    let query = sqlx::query_as(STUCK_SINCE).bind(ids);
    let rows: Vec<(Uuid, Option<i64>)> = db::bounded("since when they are stuck", LIMIT, query.fetch_all(conn)).await?;
    Ok(rows.into_iter().filter_map(|(id, at)| Some((id, at?))).collect())
}

/// The newest first.
pub(super) async fn list(conn: &mut PgConnection, args: ListArgs) -> anyhow::Result<()> {
    let filter = Filter {
        statuses: args.status,
        definition: args.definition,
        business_key: args.business_key,
        labels: labels(args.label)?,
        created_after_us: None,
    };
    // One more tells whether there are more.
    let mut sagas = read::list(conn, &filter, None, args.limit + 1).await?;
    let more = sagas.len() as i64 > args.limit;
    sagas.truncate(args.limit as usize);
    let stuck = sagas.iter().filter(|saga| saga.status == SagaStatus::Stuck).map(|saga| saga.id).collect();
    let stuck = stuck_since(conn, stuck).await?;
    if args.json {
        let sagas = sagas.iter().map(|saga| {
            let mut value = serde_json::to_value(saga)?;
            if let Some(&at) = stuck.get(&saga.id) {
                value["stuck_since"] = json!(date_time(at).replacen(' ', "T", 1) + "Z");
            }
            Ok(value)
        });
        let sagas = sagas.collect::<Result<Vec<_>, serde_json::Error>>()?;
        println!("{}", serde_json::to_string_pretty(&json!({ "more": more, "sagas": sagas }))?);
        return Ok(());
    }
    if sagas.is_empty() {
        println!("no saga matches");
        return Ok(());
    }
    println!("{}", table(&sagas, &stuck, super::now(conn).await?, style()));
    if more {
        println!("the newest {}: --limit shows more", sagas.len());
    }
    Ok(())
}

/// For how long it has been as it is: stuck, or ended; else since it was made.
fn age_ms(saga: &Summary, stuck: &HashMap<Uuid, i64>, now: i64) -> i64 {
    let since = match saga.status {
        SagaStatus::Stuck => stuck.get(&saga.id).copied().unwrap_or_else(|| millis(&saga.changed_at)),
        _ => millis(saga.ended_at.as_deref().unwrap_or(&saga.created_at)),
    };
    now - since
}

fn table(sagas: &[Summary], stuck: &HashMap<Uuid, i64>, now: i64, style: Style) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["saga", "id", "status", "age", "reason"]);
    for saga in sagas {
        let status = format!("{}{}", saga.status.as_str(), if saga.paused { ", paused" } else { "" });
        table.add_row([
            clean(&name_of(saga.definition.as_deref(), &saga.business_key)),
            saga.id.to_string(),
            style.paint(&status, Ink::of_saga(saga.status)),
            duration(age_ms(saga, stuck, now)),
            cut(&clean(saga.reason.as_deref().unwrap_or_default()), REASON_CHARS),
        ]);
    }
    table
}
