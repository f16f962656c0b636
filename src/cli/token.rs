//! `oncebox token`: a fresh token for the API, and its line for the token file.

use crate::api::{self, Scope};
use crate::config::ConfigError;
use anyhow::Context;
use clap::{Args, ValueEnum};
use std::fs::File;
use std::io::Read;

/// Randomness of a token.
const TOKEN_BYTES: usize = 32;

/// Arguments of `oncebox token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Name that the token's actions are recorded under
    name: String,
    /// What it may do: look, or look and change
    #[arg(long, value_enum, value_name = "SCOPE")]
    scope: ScopeArg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScopeArg {
    Read,
    Operate,
}

/// Prints both: the token is kept nowhere.
pub fn run(args: &TokenArgs) -> anyhow::Result<()> {
    api::check_name(&args.name)
        .map_err(|error| ConfigError { setting: "NAME".to_owned(), reason: error.to_string() })?;
    let scope = match args.scope {
        ScopeArg::Read => Scope::Read,
        ScopeArg::Operate => Scope::Operate,
    };
    let mut random = [0; TOKEN_BYTES];
    // The system's generator, without a crate for what is one read.
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).context("/dev/urandom")?;
    let token = api::hex(&random);
    println!("{}", api::line(&args.name, scope, &token));
    eprintln!("The line above is for the token file ([api] tokens). The token itself is shown this once:");
    eprintln!("{token}");
    Ok(())
}
