//! Named points at which a process ends itself at once, as by kill -9, for the crash tests.
//!
//! Without the feature `failpoints` every call is empty. With it, `ONCEBOX_FAILPOINT=<name>=<n>` ends the process
//! at the n-th time it passes the point.

/// Every point there is, in the order the data passes them; the crash test walks this list.
pub const ALL: &[&str] = &[
    "relay.lease_taken",
    "relay.planned",
    "relay.window_read",
    "relay.published",
    "relay.confirmed",
    "relay.held",
    "relay.voids_read",
    "relay.before_release",
    "relay.source_finished",
    "relay.source_moved",
    "consumer.delivered",
    "consumer.accepted",
    "consumer.handled",
    "consumer.committed",
    "consumer.batch_accepted",
    "consumer.batch_handled",
    "consumer.batch_committed",
    "consumer.acknowledged",
    "consumer.failure_recorded",
    "consumer.retry_started",
    "consumer.retry_handled",
    "consumer.retry_committed",
    "saga.replied",
    "saga.decided",
    "saga.applied",
    "saga.due_found",
    "saga.due_decided",
    "saga.due_applied",
    "saga.due_committed",
];

/// True if one of these points is armed: what is otherwise one statement is then done in steps, so that the process can
/// end between them.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn armed(_names: &[&'static str]) -> bool {
    false
}

/// True if one of these points is armed: what is otherwise one statement is then done in steps, so that the process can
/// end between them.
#[cfg(feature = "failpoints")]
pub fn armed(names: &[&'static str]) -> bool {
    use std::sync::LazyLock;

    static ARMED: LazyLock<String> = LazyLock::new(|| std::env::var("ONCEBOX_FAILPOINT").unwrap_or_default());
    names.contains(&ARMED.split('=').next().unwrap_or_default())
}

/// Passes a point.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn pass(_name: &'static str) {}

/// Passes a point; ends the process there if the environment says so.
#[cfg(feature = "failpoints")]
pub fn pass(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static ARMED: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let value = std::env::var("ONCEBOX_FAILPOINT").ok()?;
        let (name, count) = value.split_once('=').unwrap_or((&value, "1"));
        assert!(ALL.contains(&name), "ONCEBOX_FAILPOINT names no failpoint: {name}");
        let count = count.parse().expect("ONCEBOX_FAILPOINT is <name>=<number>");
        Some((name.to_owned(), AtomicU64::new(count)))
    });

    debug_assert!(ALL.contains(&name), "{name} is not listed in failpoints::ALL");
    if let Some((armed, left)) = &*ARMED
        && armed == name
        && left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        eprintln!("failpoint {name}");
        std::process::abort();
    }
}
