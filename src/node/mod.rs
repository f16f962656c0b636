//! Private PostgreSQL and RabbitMQ nodes for `./dev`, the demo, the benchmarks and the tests.
//!
//! Each node has its own data folder and its own ports on 127.0.0.1, is started directly (no `pg_ctl`, no service
//! wrapper, so that its pid is known) and can be killed, frozen and restarted on the same port and data. [`Postgres::start`]
//! and [`Rabbit::start`] give nodes that end, data included, when they are dropped; [`Postgres::up`] and [`Rabbit::up`]
//! give nodes that outlive the process, found again through a state file in their folder.
//!
//! Left out on purpose: TLS, passwords, broker clusters, containers, and installing the servers (`./dev` does).
//! No signal is ever sent to a process whose command line does not name our own folder or node.

mod ports;
mod postgres;
mod process;
mod rabbitmq;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Serialize, de::DeserializeOwned};

pub use postgres::{Postgres, PostgresOptions};
pub use rabbitmq::{Rabbit, RabbitOptions};

/// How often a wait looks again: far below any start time, cheap enough for two cores.
const POLL: Duration = Duration::from_millis(20);

/// Why a node could not be started, reached or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The server's programs were found nowhere.
    #[error("{product} is not installed ({program} was not found): ./dev installs it")]
    Missing {
        /// The server.
        product: &'static str,
        /// The program that was looked for.
        program: &'static str,
    },
    /// PostgreSQL refuses to run as root, and there is no account to run it under.
    #[error("PostgreSQL does not run as root, and there is no user `postgres` to run it as")]
    NoUser,
    /// The server ended or never answered; the end of its log says why.
    #[error("{product} {what}; the end of {log}:\n{tail}")]
    NotUp {
        /// The server.
        product: &'static str,
        /// What went wrong, e.g. `ended while starting`.
        what: &'static str,
        /// Its log file.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// A helper program failed or took too long.
    #[error("{program} failed: {output}")]
    Command {
        /// The program.
        program: String,
        /// What it said.
        output: String,
    },
    /// The node is not running.
    #[error("{0} is not running")]
    Down(&'static str),
    /// No free port was found on 127.0.0.1.
    #[error("no free port on 127.0.0.1")]
    NoPort,
    /// Another process kept the folder's lock.
    #[error("{0} is locked by another process")]
    Locked(PathBuf),
    /// A file or folder could not be used.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl NodeError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> NodeError + '_ {
        move |source| NodeError::Io { path: path.to_owned(), source }
    }

    fn not_up(product: &'static str, what: &'static str, log: &Path) -> NodeError {
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        NodeError::NotUp { product, what, log: log.to_owned(), tail }
    }

    /// Another program took the port between its choice and its use.
    fn is_port_clash(&self) -> bool {
        let words = ["already in use", "eaddrinuse", "eaddrnotavail"];
        matches!(self, NodeError::NotUp { tail, .. } if words.iter().any(|w| tail.to_lowercase().contains(w)))
    }
}

/// Creates the folder and gives its absolute path, since the nodes run in other working folders.
fn folder(path: &Path) -> Result<PathBuf, NodeError> {
    fs::create_dir_all(path).and_then(|()| path.canonicalize()).map_err(NodeError::io(path))
}

/// A command with nothing of the caller's environment but the path: `PG*`, `RABBITMQ_*` and `ERL_*` variables would
/// lead it to other servers.
fn command(program: &Path, cwd: &Path) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env_clear().env("PATH", format!("{path}:/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin"));
    command.env("LC_ALL", "C").current_dir(cwd).stdin(Stdio::null());
    command
}

/// Runs a helper to its end and gives its standard output.
async fn output(command: Command, within: Duration) -> Result<String, NodeError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let running = tokio::process::Command::from(command).kill_on_drop(true).output();
    let output = match tokio::time::timeout(within, running).await {
        Err(_) => format!("no end within {} s", within.as_secs()),
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(done)) if done.status.success() => {
            return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
        }
        Ok(Ok(done)) => {
            let said = [done.stderr, done.stdout].concat();
            format!("{}: {}", done.status, String::from_utf8_lossy(&said).trim())
        }
    };
    Err(NodeError::Command { program, output })
}

/// The first of the folders, then of those in `PATH`, that holds all the programs.
fn find(folders: Vec<PathBuf>, programs: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has_all = |folder: &PathBuf| programs.iter().all(|program| folder.join(program).is_file());
    folders.into_iter().chain(std::env::split_paths(&path)).find(has_all)
}

/// Waits until the server takes connections: `greets` says so, and `runs` tells a slow server from one that has ended.
async fn answers(
    (product, log, within): (&'static str, &Path, Duration),
    mut runs: impl FnMut() -> bool,
    greets: impl AsyncFn() -> io::Result<bool>,
) -> Result<(), NodeError> {
    // A frozen or half-started server takes the connection and says nothing.
    const SILENCE: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    while begun.elapsed() < within {
        if !runs() {
            return Err(NodeError::not_up(product, "ended while starting", log));
        }
        if let Ok(Ok(true)) = tokio::time::timeout(SILENCE, greets()).await {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
    Err(NodeError::not_up(product, "did not answer in time", log))
}

/// A new log file; the one of the run before, which is what explains a crash, is kept beside it.
fn log_file(log: &Path) -> Result<File, NodeError> {
    let _ = fs::rename(log, log.with_extension("log.1"));
    File::create(log).map_err(NodeError::io(log))
}

/// One writer at a time for the state files of a folder; released when the file is dropped.
async fn lock(dir: &Path) -> Result<File, NodeError> {
    // Two slow starts one after the other, and some.
    const PATIENCE: Duration = Duration::from_secs(200);
    let path = dir.join("lock");
    let file = File::create(&path).map_err(NodeError::io(&path))?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(NodeError::io(&path)(error)),
            Err(TryLockError::WouldBlock) if begun.elapsed() > PATIENCE => {
                return Err(NodeError::Locked(path));
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Writes a state file whole or not at all: a torn one would orphan the node it describes.
fn save(path: &Path, state: &impl Serialize) -> Result<(), NodeError> {
    let json = serde_json::to_vec_pretty(state).map_err(io::Error::other).map_err(NodeError::io(path))?;
    let new = path.with_extension("new");
    fs::write(&new, json).and_then(|()| fs::rename(&new, path)).map_err(NodeError::io(path))
}

fn load<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
