//! `oncebox replay`.

use super::since;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::config::{Config, ConfigError};
use crate::db;
use crate::ranges::Ranges;
use crate::replay::{self, ReplayError, ReplayOptions, Selection, Spans, Summary};
use crate::supervise;
use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// Ranges of offsets named in the text; `--json` has them all.
const RANGES_SHOWN: usize = 20;

/// Arguments of `oncebox replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// Stream, as in the header oncebox-stream: order.placed#0
    #[arg(long, value_name = "TOPIC#LANE", required_unless_present = "since")]
    stream: Option<String>,
    /// First offset of the stream
    #[arg(long, value_name = "N", requires = "stream", conflicts_with = "since",
          value_parser = clap::value_parser!(i64).range(1..))]
    from_offset: Option<i64>,
    /// Last offset of the stream; default: all there is
    #[arg(long, value_name = "N", requires = "stream", conflicts_with = "since",
          value_parser = clap::value_parser!(i64).range(1..))]
    to_offset: Option<i64>,
    /// What was published since, in the stream or in all: 15m, 2h, 3d, or a time
    #[arg(long, value_name = "DURATION|TIME")]
    since: Option<String>,
    /// Messages a second at most
    #[arg(long, value_name = "N/s", default_value = "1000/s", value_parser = rate)]
    rate: u32,
    /// Count what would be sent, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

fn rate(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix("/s").unwrap_or(text).parse().ok();
    number.filter(|rate| (1..=1_000_000).contains(rate)).ok_or_else(|| "must be 1/s to 1000000/s".to_owned())
}

/// Sends, or counts, and says what became of it: exit 1 if it was stopped, or nothing of what was asked for could be sent.
pub async fn run(args: ReplayArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let database_url = config.database_url()?.to_owned();
    if !args.dry_run {
        config.amqp_url()?;
    }
    if let (Some(from), Some(to)) = (args.from_offset, args.to_offset)
        && from > to
    {
        let reason = format!("{to} lies before --from-offset {from}");
        return Err(ConfigError { setting: "--to-offset".to_owned(), reason }.into());
    }
    let shutdown = supervise::shutdown_on_signal()?;
    let Some(mut conn) = supervise::wait_for_database(&database_url, &shutdown).await? else {
        return Ok(ExitCode::FAILURE);
    };
    let selection = match &args.since {
        Some(text) => Selection::Since { at_s: since::resolve(&mut conn, text).await?, stream: args.stream.clone() },
        None => {
            let stream = args.stream.clone().context("a stream or a time is required")?;
            let ranges = Ranges::of(args.from_offset.unwrap_or(1), args.to_offset.unwrap_or(i64::MAX));
            Selection::Offsets { source: None, streams: BTreeMap::from([(stream, ranges)]) }
        }
    };
    db::close(conn).await;

    let result = if args.dry_run {
        replay::count(&database_url, &selection, &shutdown).await
    } else {
        let mut options = RabbitMqOptions::new(config.amqp_url()?);
        options.connection_name = "oncebox replay".to_owned();
        let broker = RabbitMq::new(options)
            .map_err(|error| ConfigError { setting: "amqp_url".to_owned(), reason: error.to_string() })?;
        let mut progress = Progress::new(selection.count());
        let options = ReplayOptions {
            database_url,
            exchange: config.exchange.clone(),
            selection,
            rate: args.rate,
            drain_deadline: config.drain_deadline,
        };
        let result = replay::run(&broker, &options, |summary| progress.show(summary), shutdown).await;
        progress.end();
        result.inspect_err(|_| eprintln!("sent before it failed: {}", progress.sent))
    };
    let summary = match result {
        Err(error @ ReplayError::NoSuchStream(_)) => {
            return Err(ConfigError { setting: "--stream".to_owned(), reason: error.to_string() }.into());
        }
        result => result?,
    };
    let failed = [&summary.unroutable, &summary.refused, &summary.not_retained].iter().any(|spans| !spans.is_empty());
    let nothing_to_send = args.since.is_some() && !failed;
    let complete = !summary.interrupted && (summary.sent > 0 || nothing_to_send);
    if args.json {
        let mut text = serde_json::to_value(&summary)?;
        text["dry_run"] = json!(args.dry_run);
        println!("{}", serde_json::to_string_pretty(&text)?);
    } else {
        say(&summary, args.dry_run);
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn say(summary: &Summary, dry_run: bool) {
    println!("{} {}", if dry_run { "would send" } else { "sent" }, summary.sent);
    for (count, what) in [
        (summary.held, "passed over, held by the relay"),
        (summary.discarded, "passed over, discarded"),
        (summary.expired, "passed over, expired"),
    ] {
        if count > 0 {
            println!("{count} {what}");
        }
    }
    for (spans, what) in [
        (&summary.unroutable, "unroutable: no queue is bound for them"),
        (&summary.refused, "refused by the broker"),
        (&summary.not_retained, "not sent, no longer retained"),
        (&summary.not_settled, "not sent, beyond what the relay has settled"),
        (&summary.not_reached, "not sent, stopped before"),
    ] {
        if !spans.is_empty() {
            println!("{} {what}:{}", spans.count(), ranges(spans));
        }
    }
    if summary.interrupted {
        println!("stopped before the end");
    }
}

/// `topic#0 5-9, 12`, a stream a line.
fn ranges(spans: &Spans) -> String {
    let mut text = String::new();
    let mut last = "";
    for (stream, from, to) in spans.iter().take(RANGES_SHOWN) {
        text.push_str(if stream == last { ", " } else { "\n  " });
        if stream != last {
            text.push_str(stream);
            text.push(' ');
        }
        text.push_str(&if from == to { from.to_string() } else { format!("{from}-{to}") });
        last = stream;
    }
    if spans.iter().nth(RANGES_SHOWN).is_some() {
        text.push_str(", … (--json has all)");
    }
    text
}

/// A bar at a terminal, a line every two seconds elsewhere; on stderr.
struct Progress {
    bar: ProgressBar,
    line_at: Instant,
    sent: u64,
}

impl Progress {
    fn new(total: Option<u64>) -> Self {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(
                ProgressStyle::with_template("  {bar:40} {pos}/{len}  {per_sec}  {eta}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            ),
            None => ProgressBar::no_length().with_style(
                ProgressStyle::with_template("  {spinner} {pos}  {per_sec}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            ),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        Self { bar, line_at: Instant::now(), sent: 0 }
    }

    fn show(&mut self, summary: &Summary) {
        self.sent = summary.sent;
        self.bar.set_position(summary.seen());
        if self.bar.is_hidden() && self.line_at.elapsed() >= LINE_EVERY {
            self.line_at = Instant::now();
            tracing::info!(sent = summary.sent, seen = summary.seen(), "replaying");
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what was not sent is named compactly, and completely or with a word that it is not.
    #[test]
    fn ranges_are_named() {
        let mut spans = Spans::default();
        spans.add("a#0", 1, 3);
        spans.add("a#0", 7, 7);
        spans.add("b#1", 2, 2);
        assert_eq!(ranges(&spans), "\n  a#0 1-3, 7\n  b#1 2");
        for offset in 1..=30 {
            spans.add("c#0", 2 * offset, 2 * offset);
        }
        assert!(ranges(&spans).ends_with("(--json has all)"));
    }
}
