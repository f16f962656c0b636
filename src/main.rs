//! The program `oncebox`: parse, run, exit code.

use clap::Parser;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    oncebox::cli::end_quietly_without_a_reader();
    oncebox::cli::run(oncebox::cli::Cli::parse()).await
}
