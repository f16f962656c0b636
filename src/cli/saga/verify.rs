//! `oncebox saga verify`.

use super::text::clean;
use super::{find, missing, name_of};
use crate::config::ConfigError;
use crate::saga::verify::{self, Finding, Report};
use clap::Args;
use serde_json::json;
use sqlx::PgConnection;
use std::process::ExitCode;

/// Sagas of one statement.
const PAGE: i64 = 500;

/// Arguments of `oncebox saga verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Ids, or DEFINITION/BUSINESS_KEY
    sagas: Vec<String>,
    /// Every saga that has ended; those in which all fits are counted only
    #[arg(long, conflicts_with = "sagas")]
    all_finished: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Verifies; the exit code says whether anything does not fit.
pub(super) async fn verify(conn: &mut PgConnection, args: VerifyArgs) -> anyhow::Result<ExitCode> {
    if args.sagas.is_empty() && !args.all_finished {
        let reason = "say which: ids, DEFINITION/BUSINESS_KEY, or --all-finished".to_owned();
        return Err(ConfigError { setting: "verify".to_owned(), reason }.into());
    }
    let mut reports: Vec<Report> = Vec::new();
    let (mut sagas, mut findings) = (0u64, 0usize);
    for name in &args.sagas {
        let id = find(conn, name).await?;
        let Some(report) = verify::verify(conn, id).await? else { return Err(missing(conn, id).await) };
        (sagas, findings) = (sagas + 1, findings + report.findings.len());
        if !args.json {
            print(&report);
        }
        reports.push(report);
    }
    let mut after = None;
    let mut more = args.all_finished;
    while more {
        let page = verify::finished(conn, after.as_ref(), PAGE).await?;
        for (id, _) in &page {
            // One that was removed meanwhile has nothing left to verify.
            let Some(report) = verify::verify(conn, *id).await? else { continue };
            (sagas, findings) = (sagas + 1, findings + report.findings.len());
            if report.is_clean() {
                continue;
            }
            match args.json {
                true => reports.push(report),
                false => print(&report),
            }
        }
        after = page.last().cloned();
        more = page.len() as i64 >= PAGE;
    }
    if args.json {
        let value = json!({ "sagas": sagas, "findings": findings, "reports": reports });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else if args.all_finished {
        println!("{sagas} sagas, {findings} findings");
    }
    Ok(if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report) {
    let name = clean(&name_of(report.definition.as_deref(), &report.business_key));
    let Report { id, rows, commands, messages, barrier_rows, .. } = report;
    println!(
        "{name}  {id}  {}: {rows} rows computed again, {messages} of {commands} commands and {barrier_rows} rows of \
         the barrier compared, {}",
        report.status.as_str(),
        match report.findings.len() {
            0 => "all fits".to_owned(),
            1 => "1 finding".to_owned(),
            n => format!("{n} findings"),
        }
    );
    for Finding { check, seq, step, detail } in &report.findings {
        let seq = seq.map_or(String::new(), |seq| format!(", row {seq}"));
        let step = step.as_ref().map_or(String::new(), |step| format!(", step \"{step}\""));
        println!("  {}{seq}{step}: {}", check.as_str(), clean(detail));
    }
}
