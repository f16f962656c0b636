//! `oncebox saga define|validate|definitions|undefine`.

use super::operate::caller;
use super::text::clean;
use crate::db;
use crate::saga::definition::{Definition, Fault, document_from_text};
use crate::saga::read::{self, DefinitionSummary};
use crate::saga::store::{Defined, Undefined, define as store_define, undefine as store_undefine};
use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets};
use serde_json::{Value, json};
use sqlx::PgConnection;
use std::io::Read;
use std::process::ExitCode;

/// Definitions that are listed.
const LISTED: i64 = 1_000;

/// Arguments of `oncebox saga define`.
#[derive(Debug, Args)]
pub(super) struct DefineArgs {
    /// YAML or JSON; - for stdin
    file: String,
    /// Who stores it; default: $USER, or user@host
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `oncebox saga validate`.
#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// YAML or JSON; - for stdin
    file: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `oncebox saga definitions`.
#[derive(Debug, Args)]
pub(super) struct DefinitionsArgs {
    /// Only this one
    name: Option<String>,
    /// Print the document of this version
    #[arg(long, value_name = "N", requires = "name")]
    version: Option<i32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `oncebox saga undefine`.
#[derive(Debug, Args)]
pub(super) struct UndefineArgs {
    /// Its name
    name: String,
    /// Its version
    version: i32,
}

/// The document and what it means; otherwise every fault of it is printed.
fn checked(file: &str, json: bool) -> anyhow::Result<Option<(Value, Definition)>> {
    let text = match file {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("stdin")?;
            text
        }
        file => std::fs::read_to_string(file).with_context(|| file.to_owned())?,
    };
    let checked = document_from_text(&text).and_then(|document| {
        let definition = Definition::parse(&document)?;
        Ok((document, definition))
    });
    match checked {
        Ok(checked) => Ok(Some(checked)),
        Err(faults) => {
            print_faults(file, &faults, json)?;
            Ok(None)
        }
    }
}

fn print_faults(file: &str, faults: &[Fault], json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(&json!({ "valid": false, "faults": faults }))?);
    } else {
        faults.iter().for_each(|fault| eprintln!("{file}: {}", clean(&fault.to_string())));
    }
    Ok(())
}

/// Says whether a document is a definition; needs no database.
pub(super) fn validate(args: &ValidateArgs) -> anyhow::Result<ExitCode> {
    let Some((_, definition)) = checked(&args.file, args.json)? else { return Ok(ExitCode::from(2)) };
    let Definition { name, version, steps, .. } = &definition;
    let ids: Vec<&str> = steps.iter().map(|step| step.id.as_str()).collect();
    match args.json {
        true => println!("{}", json!({ "valid": true, "name": name, "version": version, "steps": ids })),
        false => println!("{name} version {version}: {}", ids.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Stores a definition for good.
pub(super) async fn define(conn: &mut PgConnection, args: DefineArgs) -> anyhow::Result<ExitCode> {
    let Some((document, definition)) = checked(&args.file, args.json)? else { return Ok(ExitCode::from(2)) };
    let Definition { name, version, .. } = &definition;
    let by = args.by.unwrap_or_else(caller);
    let defined = store_define(conn, name, *version, &document, Some(&by)).await.map_err(super::said)?;
    if defined == Defined::Conflict {
        anyhow::bail!(
            "{name} version {version} is there already, with another document: give this one another version"
        );
    }
    let is_new = defined == Defined::New;
    match (args.json, is_new) {
        (true, _) => println!("{}", json!({ "name": name, "version": version, "new": is_new })),
        (false, true) => println!("defined {name} version {version}"),
        (false, false) => println!("{name} version {version} is there already, the same"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists definitions, or prints the document of one.
pub(super) async fn definitions(conn: &mut PgConnection, args: DefinitionsArgs) -> anyhow::Result<()> {
    let found = match (&args.name, args.version) {
        (Some(name), Some(version)) => {
            let document = read::document(conn, name, version).await?;
            let document = document.with_context(|| format!("there is no definition {name} version {version}"))?;
            let document: Value = serde_json::from_str(document.document.get())?;
            println!("{}", serde_json::to_string_pretty(&document)?);
            return Ok(());
        }
        (Some(name), None) => {
            vec![read::definition(conn, name).await?.with_context(|| format!("there is no definition {name}"))?]
        }
        (None, _) => read::definitions(conn, None, LISTED).await?,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else if found.is_empty() {
        println!("no definition");
    } else {
        println!("{}", table(&found));
    }
    Ok(())
}

fn table(found: &[DefinitionSummary]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["definition", "version", "hash", "created", "by"]);
    for definition in found {
        for version in &definition.versions {
            table.add_row([
                definition.name.clone(),
                version.version.to_string(),
                version.hash.chars().take(12).collect(),
                version.created_at.clone(),
                clean(version.created_by.as_deref().unwrap_or_default()),
            ]);
        }
    }
    table
}

/// Removes one that no saga follows.
pub(super) async fn undefine(conn: &mut PgConnection, args: UndefineArgs) -> anyhow::Result<()> {
    let UndefineArgs { name, version } = args;
    match store_undefine(conn, &name, version).await {
        Ok(Undefined::Removed) => println!("removed {name} version {version}"),
        Ok(Undefined::NotThere) => anyhow::bail!("there is no definition {name} version {version}"),
        Ok(Undefined::InUse(why)) => anyhow::bail!(why),
        Err(db::DbError::Sqlx(error)) => return Err(super::said(error.into())),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
