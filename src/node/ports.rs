//! Free ports on 127.0.0.1.

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::ops::Range;
use std::sync::Mutex;

use super::NodeError;

/// Below the range the kernel takes outgoing ports from: a client that keeps dialling a killed server on a port of that
/// range can connect to itself and keep the port from the restart.
const RANGE: Range<u64> = 20_000..32_000;

/// Ports given out by this process: a server binds its port only a while later.
static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());

/// A port that nothing listens on and that this process was not given before.
pub(super) fn free() -> Result<u16, NodeError> {
    let mut given = GIVEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for _ in 0..200 {
        let random = RandomState::new().hash_one(0_u8);
        let port = u16::try_from(RANGE.start + random % (RANGE.end - RANGE.start)).map_err(|_| NodeError::NoPort)?;
        if !given.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            given.push(port);
            return Ok(port);
        }
    }
    Err(NodeError::NoPort)
}
