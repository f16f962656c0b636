//! Where a report goes: the table to stdout, JSON and page to files.

use super::report::Report;
use super::{page, table};
use crate::config::ConfigError;
use clap::Args;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Folder of pages in a checkout.
const PAGES: &str = "target/bench";

#[derive(Debug, Args)]
pub(super) struct OutputOptions {
    /// Also write the figures as JSON to this file; - for stdout, where the table then goes to stderr
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The page with plots [default: target/bench/<WHAT>.html in a checkout, oncebox-bench-<WHAT>.html elsewhere]
    #[arg(long, global = true, value_name = "FILE")]
    page: Option<PathBuf>,
}

/// Files that were found writable before anything was measured.
pub(super) struct Output {
    json: Option<PathBuf>,
    page: PathBuf,
}

impl OutputOptions {
    /// Checks that the report of `what` can be written: not after an hour of measuring.
    pub(super) fn open(&self, what: &str) -> Result<Output, ConfigError> {
        let checkout = Path::new("Cargo.toml").exists() || Path::new("target").is_dir();
        let usual = || {
            if checkout {
                Path::new(PAGES).join(format!("{what}.html"))
            } else {
                format!("oncebox-bench-{what}.html").into()
            }
        };
        let page = self.page.clone().unwrap_or_else(usual);
        if self.page.is_none() && checkout {
            fs::create_dir_all(PAGES).map_err(refused("--page", Path::new(PAGES)))?;
        }
        let json = self.json.clone().filter(|path| path.as_os_str() != "-");
        for (option, path) in [("--page", Some(&page)), ("--json", json.as_ref())] {
            if let Some(path) = path {
                let new = !path.exists();
                File::options().append(true).create(true).open(path).map_err(refused(option, path))?;
                // A measurement that fails leaves no empty report.
                if new {
                    fs::remove_file(path).map_err(refused(option, path))?;
                }
            }
        }
        Ok(Output { json: self.json.clone(), page })
    }
}

impl Output {
    /// Writes the report.
    pub(super) fn write(&self, report: &Report) -> anyhow::Result<()> {
        fs::write(&self.page, page::render(report)).map_err(refused("--page", &self.page))?;
        let json = format!("{}\n", serde_json::to_string_pretty(report)?);
        let table = table::render(report);
        match &self.json {
            Some(path) if path.as_os_str() == "-" => {
                eprintln!("{table}");
                print!("{json}");
            }
            path => {
                println!("{table}");
                if let Some(path) = path {
                    fs::write(path, json).map_err(refused("--json", path))?;
                    eprintln!("JSON: {}", path.display());
                }
            }
        }
        let absolute = self.page.canonicalize();
        eprintln!("page: {}", absolute.as_deref().unwrap_or(&self.page).display());
        Ok(())
    }
}

fn refused(option: &str, path: &Path) -> impl FnOnce(io::Error) -> ConfigError {
    let (setting, path) = (option.to_owned(), path.display().to_string());
    move |error| ConfigError { setting, reason: format!("{path}: {error}") }
}
