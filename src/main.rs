//! The program `oncebox`: parse, run, exit code.

use clap::Parser;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    oncebox::cli::run(oncebox::cli::Cli::parse()).await
}
