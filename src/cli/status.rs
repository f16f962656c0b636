//! `oncebox status`: tables for people, JSON for programs.

use crate::config::Config;
use crate::db;
use crate::status::sagas::Sagas;
use crate::status::{self, Held, Lane, OldestTransaction, Relay, Ring, Status};
use clap::Args;
use comfy_table::{Table, presets};
use std::io::{self, Write};
use std::time::Duration;

/// Between the two looks that rates are made of.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// Arguments of `oncebox status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// One JSON object, on one line
    #[arg(long)]
    json: bool,
    /// Look again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

/// Looks twice, so that there are rates, and prints; or goes on looking.
pub async fn run(args: StatusArgs, config: &Config) -> anyhow::Result<()> {
    let mut conn = status::connect(config.database_url()?, "oncebox status").await?;
    let mut earlier = status::look(&mut conn).await?;
    tokio::time::sleep(BETWEEN_LOOKS).await;
    loop {
        let mut now = status::look(&mut conn).await?;
        now.compare(&earlier);
        let text = if args.json { serde_json::to_string(&now)? + "\n" } else { tables(&now) };
        match io::stdout().lock().write_all(text.as_bytes()) {
            // Whoever read the output has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        let Some(seconds) = args.watch else { break };
        earlier = now;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
    db::close(conn).await;
    Ok(())
}

fn tables(status: &Status) -> String {
    let mut text = format!("{}  source {}", status.at, status.source.current);
    if status.source.count > 1 {
        text += &format!(" (number {} of this outbox)", status.source.count);
    }
    if let Some(rates) = &status.rates {
        text += &format!(
            "\n{:.0} published/s, {:.0} accepted/s over {:.1} s",
            rates.published_per_s, rates.accepted_per_s, rates.over_s
        );
    }
    text += "\n\n";
    text += &lanes(&status.lanes);
    text += &relays(&status.relays);
    for pause in &status.pauses {
        let what = match (&pause.topic, pause.lane) {
            (None, None) => "everything".to_owned(),
            (None, Some(lane)) => format!("lane {lane}"),
            (Some(topic), None) => format!("topics {topic}"),
            (Some(topic), Some(lane)) => format!("topics {topic} of lane {lane}"),
        };
        let why = pause.why.as_deref().unwrap_or("no reason given");
        text += &format!("paused: {what}, by {} at {}: {why}\n", pause.paused_by, pause.paused_at);
    }
    if !status.source.is_here || status.source.lanes_behind > 0 {
        text +=
            "source: this database is not the one its offsets were counted in; lanes move when a relay takes them\n";
    }
    text += &ring(&status.ring);
    let scheduled = &status.scheduled;
    text += &format!(
        "scheduled: {}{}\n",
        count(scheduled.messages),
        scheduled.next_due.as_ref().map_or(String::new(), |at| format!(", next at {at}"))
    );
    text += &format!("oldest transaction: {}\n\n", oldest(status.oldest_transaction.as_ref()));
    if status.consumers.is_empty() {
        text += "no consumer has accepted anything in this database\n";
    } else {
        let mut table = table(&["consumer", "waiting", "for", "parked"]);
        for consumer in &status.consumers {
            let held = &consumer.held;
            table.add_row([consumer.consumer.clone(), held.waiting.to_string(), waiting_for(held), parked(held)]);
        }
        text += &format!("{table}\n");
    }
    text + &sagas(&status.sagas)
}

fn sagas(sagas: &Sagas) -> String {
    if sagas.by_status.is_empty() {
        return String::new();
    }
    let mut of: Vec<String> = sagas.by_status.iter().map(|(status, n)| format!("{} {status}", count(*n))).collect();
    if sagas.paused.count > 0 {
        of.push(format!("{} paused", count(sagas.paused)));
    }
    let mut text = format!("\nsagas: {}\n", of.join(", "));
    if let Some(age_s) = sagas.oldest_stuck_s {
        text += &format!("stuck: the oldest for {}; see oncebox saga list --status stuck\n", seconds(age_s));
    }
    if sagas.is_neglected() {
        let (overdue, first) = (count(sagas.overdue), seconds(sagas.overdue_s));
        let signal = seconds(sagas.signal_wait_s);
        text += &format!(
            "no orchestrator is at work, or it does not keep up: {overdue} sagas overdue, the first for {first}; \
             the first signal waits for {signal}\n"
        );
    }
    text
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.to_vec());
    table
}

fn lanes(lanes: &[Lane]) -> String {
    let mut table = table(&[
        "lane",
        "relay",
        "epoch",
        "lease",
        "lag",
        "oldest",
        "published",
        "settled",
        "waiting",
        "for",
        "parked",
    ]);
    for lane in lanes {
        let relay = lane.owner_name.as_deref().or(lane.owner.as_deref()).unwrap_or("none");
        table.add_row([
            lane.lane.to_string(),
            relay.to_owned(),
            lane.epoch.to_string(),
            lane.lease_left_s.map_or("-".to_owned(), seconds),
            count(lane.lag),
            if lane.lag.count > 0 { seconds(lane.lag_s) } else { "-".to_owned() },
            lane.published_total.to_string(),
            format!("{}/{}", lane.settled_n, lane.newest_n),
            lane.held.waiting.to_string(),
            waiting_for(&lane.held),
            parked(&lane.held),
        ]);
    }
    format!("{table}\n")
}

fn relays(relays: &[Relay]) -> String {
    if relays.is_empty() {
        return "no relay runs\n".to_owned();
    }
    let mut table = table(&["relay", "up", "heard of", "broker", "lanes"]);
    for relay in relays {
        let lanes: Vec<String> = relay.lanes.iter().map(ToString::to_string).collect();
        table.add_row([
            relay.name.clone(),
            seconds(relay.up_s),
            format!("{} ago", seconds(relay.seen_s_ago)),
            if relay.ready { "reached" } else { "not reached" }.to_owned(),
            if lanes.is_empty() { "none".to_owned() } else { lanes.join(" ") },
        ]);
    }
    format!("{table}\n")
}

fn ring(ring: &Ring) -> String {
    let mut table = table(&["slot", "state", "size", "closed", "cleared"]);
    for slot in &ring.slots {
        table.add_row([
            slot.slot.to_string(),
            slot.state.clone(),
            format!("{:.1} MiB", slot.bytes as f64 / f64::from(1 << 20)),
            slot.closed_at.clone().unwrap_or_else(|| "-".to_owned()),
            slot.cleared_at.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    format!(
        "{table}\nlog: retention {}, oldest message {}, slot {} for {}, {} plans\n",
        seconds(ring.retention_s),
        ring.oldest_s.map_or("-".to_owned(), seconds),
        ring.current,
        seconds(ring.current_for_s),
        ring.plans,
    )
}

fn oldest(oldest: Option<&OldestTransaction>) -> String {
    let Some(oldest) = oldest else { return "none".to_owned() };
    let who = match (oldest.pid, &oldest.gid) {
        (Some(pid), _) => format!("pid {pid}"),
        (None, gid) => format!("prepared \"{}\"", gid.as_deref().unwrap_or_default()),
    };
    let known = |name: &str, value: &Option<String>| {
        value.as_ref().filter(|value| !value.is_empty()).map(|value| format!("{name} {value}"))
    };
    let mut parts = vec![who];
    parts.extend(oldest.age_s.map(|age_s| format!("for {}", seconds(age_s))));
    parts.extend(oldest.state.clone());
    parts.extend(known("application", &oldest.application));
    parts.extend(known("role", &oldest.role));
    parts.extend(known("database", &oldest.database));
    parts.extend(oldest.xid.map(|xid| format!("xid {xid}")));
    parts.join(", ")
}

fn count(count: status::Count) -> String {
    format!("{}{}", if count.at_least { "≥" } else { "" }, count.count)
}

fn waiting_for(held: &Held) -> String {
    held.oldest_waiting_s.map_or("-".to_owned(), seconds)
}

fn parked(held: &Held) -> String {
    if held.parked.is_empty() {
        return "0".to_owned();
    }
    held.parked.iter().map(|(reason, count)| format!("{count} {reason}")).collect::<Vec<_>>().join(", ")
}

/// Two units at most.
fn seconds(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds as u64;
    match (whole / 86_400, whole / 3_600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: times read as people say them.
    #[test]
    fn times_have_two_units() {
        for (given, expected) in
            [(0.04, "0.0 s"), (59.9, "59.9 s"), (61.0, "1 min 1 s"), (86_399.0, "23 h 59 min"), (90_000.0, "1 d 1 h")]
        {
            assert_eq!(seconds(given), expected);
        }
    }
}
