//! `oncebox parked list|show|retry|discard`.

use super::since;
use crate::config::{Config, ConfigError};
use crate::db::{self, SessionOptions};
use crate::migrate;
use crate::parked::{self, Body, Bulk, Detail, Filter, Parked, Side, TopicPattern, Verb};
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use serde_json::json;
use sqlx::PgConnection;
use std::collections::{BTreeMap, HashSet};
use std::process::{Command, ExitCode};
use std::time::Duration;
use uuid::Uuid;

/// Messages of one id that `show` shows: more consumers than anybody has.
const SHOW_AT_MOST: i64 = 1_000;
/// Messages that a dry run names.
const DRY_RUN_SHOWS: i64 = 20;
/// Longest error in the table of `list`; `show` has all of it.
const ERROR_CHARS: usize = 60;

/// Arguments of `oncebox parked`.
#[derive(Debug, Args)]
pub struct ParkedArgs {
    #[command(subcommand)]
    verb: ParkedVerb,
}

#[derive(Debug, Subcommand)]
enum ParkedVerb {
    /// Show which messages are parked, longest parked first
    List {
        #[command(flatten)]
        which: Which,
        /// Show at most so many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one message with its headers and its payload
    Show {
        /// Message id
        id: Uuid,
        #[command(flatten)]
        which: Which,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Send messages, or hand them to their handlers, once more, under the same ids and offsets
    Retry {
        #[command(flatten)]
        bulk: BulkArgs,
    },
    /// Give messages up for good; who did it and why is recorded with them
    Discard {
        #[command(flatten)]
        bulk: BulkArgs,
        /// Why, for those who ask later
        #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        why: String,
        /// Who decided; default: user@host
        #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        by: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SideArg {
    Outbox,
    Inbox,
}

#[derive(Debug, Args)]
struct Which {
    /// Only what the relay could not send, or only what a consumer could not apply; default: both
    #[arg(long, value_enum, value_name = "SIDE")]
    side: Option<SideArg>,
    /// Only for this reason, e.g. unroutable or too_many_attempts
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Only topics that match, as a binding does: order.*, order.#
    #[arg(long, value_name = "PATTERN")]
    topic: Option<String>,
    /// Only this consumer's
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,
    /// Only what was parked since: 15m, 2h, 3d, or a time
    #[arg(long, value_name = "DURATION|TIME")]
    since: Option<String>,
}

#[derive(Debug, Args)]
struct BulkArgs {
    /// Message ids
    ids: Vec<Uuid>,
    #[command(flatten)]
    which: Which,
    /// Every parked message of the side
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs one verb.
///
/// # Errors
/// The database's, and ids that are not parked.
pub async fn run(args: ParkedArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let url = config.database_url()?;
    if let ParkedVerb::Retry { bulk } | ParkedVerb::Discard { bulk, .. } = &args.verb {
        bulk.check()?;
    }
    let session = SessionOptions {
        application_name: "oncebox parked",
        statement_timeout: Duration::from_secs(60),
        idle_timeout: db::IDLE_TIMEOUT,
        plain_index_plans: false,
    };
    let mut conn = db::connect(url, session).await?;
    migrate::check(&mut conn).await?;
    let code = match args.verb {
        ParkedVerb::List { which, limit, json } => {
            let filter = which.filter(&mut conn, None).await?;
            list(&mut conn, &filter, limit, json).await?;
            ExitCode::SUCCESS
        }
        ParkedVerb::Show { id, which, json } => {
            let filter = which.filter(&mut conn, Some(vec![id])).await?;
            let details = parked::show(&mut conn, &filter, SHOW_AT_MOST).await?;
            anyhow::ensure!(!details.is_empty(), "{id} is not parked");
            show(&details, json)?;
            ExitCode::SUCCESS
        }
        ParkedVerb::Retry { bulk } => work(&mut conn, bulk, Verb::Retry).await?,
        ParkedVerb::Discard { bulk, why, by } => {
            let why = said("--why", why)?;
            let by = said("--by", by.unwrap_or_else(user_at_host))?;
            work(&mut conn, bulk, Verb::Discard { why, by }).await?
        }
    };
    db::close(conn).await;
    Ok(code)
}

impl BulkArgs {
    fn check(&self) -> Result<(), ConfigError> {
        let Which { reason, topic, consumer, since, .. } = &self.which;
        let narrowed = [reason, topic, consumer, since].iter().any(|filter| filter.is_some());
        if self.all || narrowed || !self.ids.is_empty() {
            return Ok(());
        }
        let reason = "say which: message ids, --reason, --topic, --consumer, --since, or --all".to_owned();
        Err(ConfigError { setting: "parked".to_owned(), reason })
    }
}

impl Which {
    async fn filter(&self, conn: &mut PgConnection, ids: Option<Vec<Uuid>>) -> anyhow::Result<Filter> {
        let since_s = match &self.since {
            Some(text) => Some(since::resolve(conn, text).await?),
            None => None,
        };
        Ok(Filter {
            side: self.side.map(|side| match side {
                SideArg::Outbox => Side::Outbox,
                SideArg::Inbox => Side::Inbox,
            }),
            ids,
            reason: self.reason.clone(),
            topic: self.topic.as_deref().map(TopicPattern::new),
            consumer: self.consumer.clone(),
            since_s,
        })
    }
}

fn said(flag: &str, text: String) -> Result<String, ConfigError> {
    if text.trim().is_empty() {
        return Err(ConfigError { setting: flag.to_owned(), reason: "must not be empty".to_owned() });
    }
    Ok(text)
}

/// Who runs this, as the system says.
pub(super) fn user_at_host() -> String {
    let answer = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().ok().filter(|output| output.status.success())?;
        String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let unknown = || "unknown".to_owned();
    format!("{}@{}", answer("id", "-un").unwrap_or_else(unknown), answer("uname", "-n").unwrap_or_else(unknown))
}

async fn list(conn: &mut PgConnection, filter: &Filter, limit: i64, json: bool) -> anyhow::Result<()> {
    let messages = parked::list(conn, filter, limit).await?;
    let total =
        if (messages.len() as i64) < limit { messages.len() as i64 } else { parked::count(conn, filter).await? };
    if json {
        println!("{}", serde_json::to_string_pretty(&json!({ "total": total, "parked": messages }))?);
        return Ok(());
    }
    if messages.is_empty() {
        println!("nothing is parked");
        return Ok(());
    }
    println!("{}", table(&messages));
    if total > messages.len() as i64 {
        println!("{} of {total}: --limit shows more", messages.len());
    }
    Ok(())
}

fn table(messages: &[Parked]) -> Table {
    let mut table = Table::new();
    table.set_header([
        "side",
        "message",
        "topic",
        "key",
        "stream, offset",
        "reason",
        "attempts",
        "parked",
        "last error",
    ]);
    for message in messages {
        let side = match &message.consumer {
            Some(consumer) => format!("inbox of {consumer}"),
            None => message.side.name().to_owned(),
        };
        let place = match (&message.stream, message.offset) {
            (Some(stream), Some(offset)) => format!("{stream}, {offset}"),
            _ => String::new(),
        };
        let error = message.last_error.as_deref().unwrap_or_default();
        let mut short: String = error.chars().take(ERROR_CHARS).collect();
        if short.len() < error.len() {
            short.push('…');
        }
        table.add_row([
            side,
            message.message_id.to_string(),
            message.topic.clone(),
            message.key.clone().unwrap_or_default(),
            place,
            message.reason.clone(),
            message.attempts.to_string(),
            message.last_at.clone(),
            short,
        ]);
    }
    table
}

fn show(details: &[Detail], json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(details)?);
        return Ok(());
    }
    for (index, detail) in details.iter().enumerate() {
        if index > 0 {
            println!();
        }
        let Detail { parked, content_type, published_at, expires_at, headers, body } = detail;
        let line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                println!("{name:14}{value}");
            }
        };
        line("message", Some(parked.message_id.to_string()));
        line("side", Some(parked.side.name().to_owned()));
        line("consumer", parked.consumer.clone());
        line("topic", Some(parked.topic.clone()));
        line("key", parked.key.clone());
        line("source", parked.source.map(|source| source.to_string()));
        line("stream", parked.stream.clone());
        line("offset", parked.offset.map(|offset| offset.to_string()));
        line("lane, seq", parked.lane.zip(parked.seq).map(|(lane, seq)| format!("{lane}, {seq}")));
        line("reason", Some(parked.reason.clone()));
        line("last error", parked.last_error.clone());
        line("attempts", Some(parked.attempts.to_string()));
        line("held", Some(parked.first_at.clone()));
        line("parked", Some(parked.last_at.clone()));
        line("published", published_at.clone());
        line("expires", expires_at.clone());
        line("content type", content_type.clone());
        line("headers", Some(serde_json::to_string(headers)?));
        match body {
            Body::Json(json) => line("JSON", Some(json.get().to_owned())),
            Body::Text(text) => line("text", Some(text.clone())),
            Body::Hex(digits) => line("bytes", Some(digits.clone())),
        }
    }
    Ok(())
}

async fn work(conn: &mut PgConnection, args: BulkArgs, verb: Verb) -> anyhow::Result<ExitCode> {
    let ids = (!args.ids.is_empty()).then(|| args.ids.clone());
    let filter = args.which.filter(conn, ids).await?;
    let (present, past) = match &verb {
        Verb::Retry => ("retry", "retried"),
        Verb::Discard { .. } => ("discard", "discarded"),
    };
    if args.dry_run {
        let messages = parked::list(conn, &filter, DRY_RUN_SHOWS).await?;
        let total = parked::count(conn, &filter).await?;
        if args.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&json!({ "dry_run": true, (present): total, "parked": messages }))?
            );
        } else {
            if !messages.is_empty() {
                println!("{}", table(&messages));
            }
            println!("would {present} {total}");
        }
        return Ok(ExitCode::SUCCESS);
    }

    let mut bulk = Bulk::new(conn, filter, verb).await?;
    let (mut missing, mut counts) = (args.ids.iter().copied().collect::<HashSet<_>>(), BTreeMap::<String, u64>::new());
    let (mut done, mut passed) = (0u64, 0u64);
    while let Some(batch) = bulk.next(conn).await.with_context(|| format!("{past} {done} before"))? {
        for message in batch {
            if message.done {
                missing.remove(&message.message_id.0);
                done += 1;
                let place = message.consumer.map_or("outbox".to_owned(), |consumer| format!("inbox of {consumer}"));
                *counts.entry(place).or_default() += 1;
            } else {
                passed += 1;
            }
        }
    }
    // As they were given.
    let missing: Vec<Uuid> = args.ids.iter().copied().filter(|id| missing.contains(id)).collect();
    if args.json {
        let summary = json!({ (past): done, "by_place": counts, "gone_meanwhile": passed, "not_parked": missing });
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        for (place, count) in &counts {
            println!("{past} {count} of the {place}");
        }
        if done == 0 && missing.is_empty() {
            println!("nothing to {present}");
        }
    }
    if missing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let ids: Vec<String> = missing.iter().map(Uuid::to_string).collect();
    eprintln!("oncebox: not parked: {}", ids.join(", "));
    Ok(ExitCode::FAILURE)
}
