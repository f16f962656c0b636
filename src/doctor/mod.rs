//! `oncebox doctor`: what is wrong with the servers, before it costs a message.
//!
//! Each part gathers facts with bounded waits ([`database`], [`sagas`], [`broker`], [`management`]) and judges them by pure
//! functions. A server that cannot be reached is a finding too. Left out on purpose: mending anything.

pub mod broker;
pub mod database;
pub mod management;
pub mod queue;
pub mod sagas;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A promise does not hold, or nothing works at all.
    Unsafe,
    /// It works and holds, until something else goes wrong.
    Warning,
    /// Worth knowing, or not looked at.
    Note,
    /// As it should be.
    Ok,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, e.g. `queue billing: message-ttl`.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, and what follows from it.
    pub found: String,
    /// What mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), severity: Severity::Ok, found: found.into(), mend: None }
    }

    /// Worth knowing.
    pub fn note(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), severity: Severity::Note, found: found.into(), mend: None }
    }

    /// To be mended.
    pub fn bad(
        severity: Severity,
        check: impl Into<String>,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { check: check.into(), severity, found: found.into(), mend: Some(mend.into()) }
    }

    /// Adds what could be done about it.
    pub fn or(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

/// True when nothing found is unsafe.
pub fn is_safe(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.severity != Severity::Unsafe)
}
