//! The demo's own relays, consumers and orchestrators: processes of this program, with a log file each, replaced when they are killed.

use anyhow::Context;
use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

/// Each kind is there twice: one relay has the lane, one consumer the queue, and the other stands by.
pub const EACH: usize = 2;
/// Longer than the processes' own drain deadline.
const STOP_LIMIT: Duration = Duration::from_secs(12);
/// A process that keeps ending by itself is not started for ever.
const UNEXPECTED_LIMIT: usize = 10;

/// What a child runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Relay,
    Consumer,
    Orchestrator,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Consumer => "consumer",
            Self::Orchestrator => "orchestrator",
        }
    }
}

struct Slot {
    kind: Kind,
    index: usize,
    child: Child,
}

/// All children. Dropping it kills them.
pub struct Children {
    program: PathBuf,
    environment: Vec<(&'static str, String)>,
    config: PathBuf,
    logs: PathBuf,
    slots: Mutex<Vec<Slot>>,
    unexpected: Mutex<Vec<String>>,
}

impl Children {
    /// Starts two of each kind, with logs in `logs`.
    pub async fn start(logs: &Path, config: &Path, database_url: &str, amqp_url: &str) -> anyhow::Result<Self> {
        let environment =
            vec![("ONCEBOX_DATABASE_URL", database_url.to_owned()), ("ONCEBOX_AMQP_URL", amqp_url.to_owned())];
        let children = Self {
            program: std::env::current_exe().context("the path of this program")?,
            environment,
            config: config.to_owned(),
            logs: logs.to_owned(),
            slots: Mutex::default(),
            unexpected: Mutex::default(),
        };
        for (kind, index) in [Kind::Relay, Kind::Consumer, Kind::Orchestrator]
            .into_iter()
            .flat_map(|kind| (0..EACH).map(move |i| (kind, i)))
        {
            File::create(children.log(kind, index)).context("a log file")?;
            let child = children.spawn(kind, index)?;
            children.slots.lock().await.push(Slot { kind, index, child });
        }
        Ok(children)
    }

    fn log(&self, kind: Kind, index: usize) -> PathBuf {
        self.logs.join(format!("{}-{}.log", kind.name(), index + 1))
    }

    fn spawn(&self, kind: Kind, index: usize) -> anyhow::Result<Child> {
        let path = self.log(kind, index);
        let log = OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        let mut command = std::process::Command::new(&self.program);
        // What the user's environment says about oncebox is about other servers.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEBOX_")) {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        match kind {
            Kind::Relay => command.arg("relay"),
            Kind::Consumer => command.arg("consume").arg("--config").arg(&self.config),
            Kind::Orchestrator => command.arg("orchestrate"),
        };
        // Ctrl-C is for the demo: it ends its children itself, and in order.
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let spawned = Command::from(command).kill_on_drop(true).spawn();
        spawned.with_context(|| format!("cannot start {}", self.program.display()))
    }

    /// SIGKILL, and a new process in its place. Returns the pid of the dead.
    pub async fn kill(&self, kind: Kind, index: usize) -> anyhow::Result<u32> {
        let mut slots = self.slots.lock().await;
        let slot = slots.iter_mut().find(|slot| slot.kind == kind && slot.index == index);
        let slot = slot.context("there is no such child any more")?;
        let pid = slot.child.id().unwrap_or_default();
        slot.child.kill().await?;
        slot.child = self.spawn(kind, index)?;
        Ok(pid)
    }

    /// Which child has that pid.
    pub async fn index_of(&self, kind: Kind, pid: u32) -> Option<usize> {
        let slots = self.slots.lock().await;
        slots.iter().find(|slot| slot.kind == kind && slot.child.id() == Some(pid)).map(|slot| slot.index)
    }

    /// Sends a signal, e.g. `STOP`.
    pub async fn signal(&self, kind: Kind, index: usize, signal: &str) {
        let slots = self.slots.lock().await;
        if let Some(slot) = slots.iter().find(|slot| slot.kind == kind && slot.index == index) {
            send(signal, slot.child.id()).await;
        }
    }

    /// Replaces children that ended by themselves, which none should: says which.
    pub async fn replace_ended(&self) -> anyhow::Result<Vec<String>> {
        let mut ended = Vec::new();
        for slot in self.slots.lock().await.iter_mut() {
            if let Some(status) = slot.child.try_wait()? {
                let (kind, number) = (slot.kind.name(), slot.index + 1);
                ended.push(format!("{kind} {number} ended by itself ({status}): see {kind}-{number}.log"));
                slot.child = self.spawn(slot.kind, slot.index)?;
            }
        }
        let mut unexpected = self.unexpected.lock().await;
        unexpected.extend(ended.iter().cloned());
        let often = unexpected.len() > UNEXPECTED_LIMIT;
        anyhow::ensure!(!often, "{} (and {} times before)", unexpected[unexpected.len() - 1], unexpected.len() - 1);
        Ok(ended)
    }

    /// Every end that was not ours.
    pub async fn unexpected(&self) -> Vec<String> {
        self.unexpected.lock().await.clone()
    }

    /// SIGTERM to all of a kind; what is still there after the drain deadline is killed, and named.
    pub async fn stop(&self, kind: Kind) -> anyhow::Result<()> {
        let mut slots = self.slots.lock().await;
        let (mut stopping, rest): (Vec<Slot>, Vec<Slot>) = slots.drain(..).partition(|slot| slot.kind == kind);
        *slots = rest;
        for slot in &stopping {
            send("TERM", slot.child.id()).await;
        }
        for Slot { kind, index, child } in &mut stopping {
            let name = format!("{} {}", kind.name(), *index + 1);
            let problem = match tokio::time::timeout(STOP_LIMIT, child.wait()).await {
                Ok(Ok(status)) if status.success() => continue,
                Ok(status) => format!("{name} ended with {} at SIGTERM", status?),
                Err(_) => format!("{name} did not end within {} s of SIGTERM", STOP_LIMIT.as_secs()),
            };
            self.unexpected.lock().await.push(problem);
            child.kill().await?;
        }
        Ok(())
    }
}

/// The shell's own `kill`: a call to libc would be unsafe code.
async fn send(signal: &str, pid: Option<u32>) {
    if let Some(pid) = pid {
        // A process that has just ended is no error.
        let _ = Command::new("/bin/sh")
            .args(["-c", r#"kill -s "$1" "$2" 2>/dev/null"#, "kill", signal, &pid.to_string()])
            .status()
            .await;
    }
}
