//! A server process of ours: its pid, its signals, its end.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::POLL;

/// How long the kernel may take to end a process tree after SIGKILL.
const KILL: Duration = Duration::from_secs(10);

/// A process that this one, or an earlier one that wrote it into a state file, has started.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// A part of its command line that no other process has: pids are reused, so no signal goes to a pid without it.
    marker: String,
    /// Kept to reap it. A std child, not a tokio one: the runtime that started it may end first.
    #[serde(skip)]
    child: Option<Child>,
}

impl Process {
    pub(super) fn spawn(command: &mut Command, marker: String) -> io::Result<Process> {
        let child = command.spawn()?;
        Ok(Process { pid: child.id(), marker, child: Some(child) })
    }

    /// Whether it runs (or is frozen); reaps it if it has ended.
    pub(super) fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => command_line(self.pid).contains(&self.marker),
        }
    }

    /// Sends a signal to the process alone.
    pub(super) fn signal(&mut self, signal: &str) {
        if self.is_alive() {
            send(signal, &[self.pid]);
        }
    }

    /// Sends a signal to the process and all its descendants.
    pub(super) fn signal_tree(&mut self, signal: &str) {
        if self.is_alive() {
            send(signal, &tree(self.pid));
        }
    }

    /// Waits for its end; false if it is still there after the time.
    pub(super) async fn ended(&mut self, within: Duration) -> bool {
        let begun = Instant::now();
        while self.is_alive() {
            if begun.elapsed() > within {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }

    /// SIGKILL to it and its descendants; on return all of them are gone. Blocks for some milliseconds, also in `Drop`.
    pub(super) fn kill_tree(&mut self) {
        if !self.is_alive() {
            return;
        }
        // A stopped parent forks no child that the list would miss.
        send("STOP", &[self.pid]);
        let tree = tree(self.pid);
        send("KILL", &tree);
        let begun = Instant::now();
        while (self.is_alive() || tree.iter().any(|pid| is_running(*pid))) && begun.elapsed() < KILL {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// SIGKILL to every process of that name that works in a folder. True if none is left; false where that cannot be told.
pub(super) fn kill_in(folder: &Path, name: &str) -> bool {
    let begun = Instant::now();
    while Path::new("/proc/self/stat").exists() && begun.elapsed() < KILL {
        let works_there = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder);
        let pids = parents().into_iter().map(|(pid, _)| pid).filter(works_there);
        let pids: Vec<u32> = pids.filter(|pid| is_running(*pid) && command_line(*pid).contains(name)).collect();
        if pids.is_empty() {
            return true;
        }
        send("KILL", &pids);
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// The shell's own `kill`: a call to libc is unsafe code, and a minimal Debian has no `/bin/kill`.
fn send(signal: &str, pids: &[u32]) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"s=$1; shift; kill -s "$s" "$@" 2>/dev/null"#, "kill", signal]);
    // A process that has just ended is no error.
    let _ = command.args(pids.iter().map(u32::to_string)).status();
}

fn tree(root: u32) -> Vec<u32> {
    let parents = parents();
    let mut tree = vec![root];
    let mut next = 0;
    while next < tree.len() {
        let parent = tree[next];
        tree.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    tree
}

/// Every process with its parent, from /proc or, where there is none, from `ps`.
fn parents() -> Vec<(u32, u32)> {
    if !Path::new("/proc/self/stat").exists() {
        let listed = Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output().map(|o| o.stdout).unwrap_or_default();
        let pair = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        };
        return String::from_utf8_lossy(&listed).lines().filter_map(pair).collect();
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, stat(pid)?.1))).collect()
}

/// State and parent of a process. The name before them may hold spaces and brackets.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(')')?.1.split_whitespace();
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}

/// A zombie has ended, even if a lazy init never reaps it.
fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// Empty if there is no such process.
fn command_line(pid: u32) -> String {
    let line = match fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(line) => line,
        Err(_) if Path::new("/proc/self/stat").exists() => Vec::new(),
        Err(_) => {
            let listed = Command::new("ps").args(["-ww", "-o", "command=", "-p", &pid.to_string()]).output();
            listed.map(|o| o.stdout).unwrap_or_default()
        }
    };
    String::from_utf8_lossy(&line).replace('\0', " ")
}
