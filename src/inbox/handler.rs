//! What runs when a message is new: a Rust value, or a function in the consumer's database.

use super::Received;
use super::at_once::AtOnce;
use sqlx::{AssertSqlSafe, PgConnection};
use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

/// Why a handler did not apply a message. Its transaction is rolled back in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandlerError {
    /// Try again later, at most as often as the consumer's `max_attempts`.
    #[error("{0}")]
    Failed(String),
    /// No attempt will succeed: park it at once.
    #[error("{0}")]
    Park(String),
    /// What the handler depends on is not there: no fault of the message. Tried again after a pause, without counting.
    #[error("{reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
        /// How long to wait, if something is known about that.
        retry_after: Option<Duration>,
    },
    /// The database said no. Errors of the connection, the server's state or a conflict are retried without
    /// counting; any other counts like [`Failed`](Self::Failed).
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// The future a handler returns.
pub type Handling<'a> = Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send + 'a>>;

/// Applies a message inside the transaction that accepted it.
pub trait Handler: Send + Sync + 'static {
    /// Does the work on `conn`, which is inside the transaction of `accept`: do not commit or roll it back. What is
    /// written there, outbox rows included, happens exactly once; any other effect may happen again after a crash.
    ///
    /// A panic, and a statement that failed and was passed over, count as [`HandlerError::Failed`].
    fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a>;

    /// True when [`call_out`](Self::call_out) does the work, and [`handle`](Self::handle) at most records it. Such a
    /// handler runs message by message.
    fn works_outside(&self) -> bool {
        false
    }

    /// Work that waits for something else than the database, done outside every transaction and before the one that
    /// accepts the message. It is called for a message that looks new and is not held up, and may be called for the same
    /// message again, also by two processes at a time: its effect is at-least-once, with the message's id as the key.
    fn call_out<'a>(&'a self, message: &'a Received) -> Handling<'a> {
        let _ = message;
        Box::pin(async { Ok(()) })
    }

    /// True when handling is at most one statement and nothing else: then nothing but the database is waited for inside the
    /// transaction, and no error can be passed over.
    fn is_one_statement(&self) -> bool {
        false
    }

    /// The SQL function it is, if it is nothing else: accepting a message and calling it are one statement then.
    fn as_function(&self) -> Option<&SqlHandler> {
        None
    }

    /// How it handles many messages together, if it can.
    fn batches(&self) -> Option<&dyn BatchHandler> {
        None
    }
}

/// Applies many messages in one statement, or a few for all of them, inside the one transaction that accepted them all.
pub trait BatchHandler: Send + Sync {
    /// Does the work of all, in this order. If one of them cannot be applied, none is: the caller rolls back and hands
    /// them to [`Handler::handle`] one by one. It waits for nothing but the database; what
    /// [`Handler::is_one_statement`] says holds here too.
    fn handle_all<'a>(&'a self, conn: &'a mut PgConnection, messages: &'a [&'a Received]) -> Handling<'a>;

    /// True when many together are less work than each alone, as for statements that take them all. False when it is the
    /// same work one after the other: where that is slow, the consumer tries whether workers side by side are faster.
    fn shares_its_work(&self) -> bool {
        true
    }
}

/// Calls `f(message_id uuid, topic text, payload jsonb, headers jsonb) returns void`; raising means failed.
#[derive(Debug, Clone)]
pub struct SqlHandler {
    signature: String,
    /// One call, a statement of its own.
    call: String,
    /// A call for each of many.
    call_all: String,
    pub(super) at_once: AtOnce,
    /// The version of the function that no planner puts in the place of its call, once there is known to be one.
    opaque: OnceLock<String>,
}

/// A call in a statement that does more. As it stands while the function is the version that `known` gives; any other
/// is called with a snapshot of its own, as it must be where the planner may inline it.
#[derive(Debug)]
pub(super) struct Call {
    quoted: String,
    signature: String,
}

impl Call {
    /// The text of the call with these arguments.
    pub(super) fn of(&self, arguments: &str, known: &str) -> String {
        let Self { quoted, signature } = self;
        let literal = |text: &str| format!("'{}'", text.replace('\'', "''"));
        let (name, signature) = (literal(quoted), literal(signature));
        format!(
            "case when (
                select p.oid || '/' || p.xmin = {known}::text from pg_proc as p where p.oid = {signature}::regprocedure
            ) then {quoted}({arguments}) else oncebox.inbox_call({name}, {arguments}) end"
        )
    }
}

/// The handler of the config file cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum HandlerSetupError {
    /// The name is not `function` or `schema.function`.
    #[error("\"{0}\" is no function name: write schema.function")]
    Name(String),
    /// No function with that name and these arguments.
    #[error("the function {0} does not exist in the consumer's database")]
    Missing(String),
    /// It exists, and the consumer's role may not call it.
    #[error("role {role} may not call {signature}: grant execute on function {signature} to {role}")]
    Forbidden {
        /// Name and arguments.
        signature: String,
        /// The role of the consumer's connection.
        role: String,
    },
    /// It exists, and cannot be a handler.
    #[error("the function {signature} {reason}")]
    Unfit {
        /// Name and arguments.
        signature: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

// A function in SQL with neither `security definer` nor `set` may be inlined.
const FOUND: &str = "
    select has_function_privilege(p.oid, 'execute'), current_user::text, p.prokind = 'f', p.provolatile = 'v', p.proretset,
        case when l.lanname <> 'sql' or p.prosecdef or p.proconfig is not null then p.oid || '/' || p.xmin end
    from pg_proc as p join pg_language as l on l.oid = p.prolang
    where p.oid = to_regprocedure($1)";

/// Every statement of this file, for the test that prepares them all.
pub const STATEMENTS: &[&str] = &[FOUND];

impl SqlHandler {
    /// A handler that calls the function `name`, given as `function` or `schema.function`.
    pub fn new(name: &str) -> Result<Self, HandlerSetupError> {
        let parts: Vec<&str> = name.split('.').collect();
        if parts.len() > 2 || parts.iter().any(|part| part.trim().is_empty() || part.contains('\0')) {
            return Err(HandlerSetupError::Name(name.to_owned()));
        }
        let quoted: Vec<String> = parts.iter().map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
        let quoted = quoted.join(".");
        let signature = format!("{quoted}(uuid, text, jsonb, jsonb)");
        let single = format!("select {quoted}($1, $2, $3::text::jsonb, $4::text::jsonb)");
        let call = Call { quoted, signature: signature.clone() };
        Ok(Self {
            signature,
            call: single,
            // A volatile function in the list is evaluated after the sort: in the order of n.
            call_all: format!(
                "select {}
                from unnest($1::uuid[], $2::text[], $3::text[], $4::text[])
                    with ordinality as m(id, topic, payload, headers, n)
                order by m.n",
                call.of("m.id, m.topic, m.payload::jsonb, m.headers::jsonb", "$5")
            ),
            at_once: AtOnce::of(&call),
            opaque: OnceLock::new(),
        })
    }

    /// What a statement that calls it is told: the version of it that may be called as it stands.
    pub(super) fn known(&self) -> Option<&str> {
        self.opaque.get().map(String::as_str)
    }

    /// Fails unless the function is there, may be called and can be a handler; learns how it is best called.
    pub async fn check(&self, conn: &mut PgConnection) -> Result<Result<(), HandlerSetupError>, sqlx::Error> {
        let found: Option<(bool, String, bool, bool, bool, Option<String>)> =
            sqlx::query_as(FOUND).bind(&self.signature).fetch_optional(conn).await?;
        let signature = self.signature.clone();
        let unfit = |reason| Err(HandlerSetupError::Unfit { signature: signature.clone(), reason });
        let Some((callable, role, is_function, is_volatile, returns_set, opaque)) = found else {
            return Ok(Err(HandlerSetupError::Missing(signature)));
        };
        Ok(match () {
            () if !callable => Err(HandlerSetupError::Forbidden { signature, role }),
            () if !is_function => unfit("is a procedure or an aggregate, and no function"),
            () if !is_volatile => unfit("is declared stable or immutable: a handler writes, so make it volatile"),
            () if returns_set => unfit("returns a set: a handler returns void"),
            () => {
                // A second look changes nothing: a session may have planned a call of the version between the two.
                opaque.map(|version| self.opaque.set(version));
                Ok(())
            }
        })
    }
}

impl Handler for SqlHandler {
    fn is_one_statement(&self) -> bool {
        true
    }

    fn handle<'a>(&'a self, conn: &'a mut PgConnection, message: &'a Received) -> Handling<'a> {
        Box::pin(async move {
            let (payload, headers) = arguments(message)?;
            // The function's name was quoted when the handler was made.
            sqlx::query(AssertSqlSafe(self.call.as_str()))
                .bind(message.id.0)
                .bind(&message.topic)
                .bind(payload)
                .bind(headers)
                .execute(conn)
                .await?;
            Ok(())
        })
    }

    fn as_function(&self) -> Option<&SqlHandler> {
        Some(self)
    }

    fn batches(&self) -> Option<&dyn BatchHandler> {
        Some(self)
    }
}

impl BatchHandler for SqlHandler {
    fn shares_its_work(&self) -> bool {
        false
    }

    fn handle_all<'a>(&'a self, conn: &'a mut PgConnection, messages: &'a [&'a Received]) -> Handling<'a> {
        Box::pin(async move {
            let arguments = messages.iter().map(|message| arguments(message)).collect::<Result<Vec<_>, _>>()?;
            let (payloads, headers): (Vec<&str>, Vec<String>) = arguments.into_iter().unzip();
            sqlx::query(AssertSqlSafe(self.call_all.as_str()))
                .bind(messages.iter().map(|message| message.id.0).collect::<Vec<_>>())
                .bind(messages.iter().map(|message| message.topic.as_str()).collect::<Vec<_>>())
                .bind(payloads)
                .bind(headers)
                .bind(self.known())
                .execute(conn)
                .await?;
            Ok(())
        })
    }
}

/// Payload and headers as the function gets them.
pub(super) fn arguments(message: &Received) -> Result<(&str, String), HandlerError> {
    let payload = jsonb_text(&message.body).map_err(|why| HandlerError::Park(format!("the payload {why}")))?;
    let headers = serde_json::to_string(&message.headers).map_err(|error| HandlerError::Park(error.to_string()))?;
    jsonb_text(headers.as_bytes()).map_err(|why| HandlerError::Park(format!("a header {why}")))?;
    Ok((payload, headers))
}

/// The bytes as text that Postgres takes for `jsonb`: JSON without the NUL character, which it cannot store.
pub(crate) fn jsonb_text(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
    if text.contains("\\u0000") {
        let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
        if has_nul(&value) {
            return Err("holds a NUL character, which jsonb cannot store".to_owned());
        }
    } else {
        serde_json::from_str::<&serde_json::value::RawValue>(text).map_err(|error| format!("is not JSON: {error}"))?;
    }
    Ok(text)
}

fn has_nul(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::String(text) => text.contains('\0'),
        serde_json::Value::Array(values) => values.iter().any(has_nul),
        serde_json::Value::Object(map) => map.iter().any(|(name, value)| name.contains('\0') || has_nul(value)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a name cannot smuggle SQL, and a wrong one is refused.
    #[test]
    fn names_are_quoted() {
        let handler = SqlHandler::new(r#"billing.on"x; drop table y"#).expect("two parts");
        assert_eq!(handler.signature, r#""billing"."on""x; drop table y"(uuid, text, jsonb, jsonb)"#);
        for name in ["", ".", "a.", "a.b.c"] {
            assert!(SqlHandler::new(name).is_err(), "{name}");
        }
    }

    /// Goal: what jsonb cannot hold is told apart from what it can.
    #[test]
    fn payloads_jsonb_cannot_hold_are_refused() {
        assert!(jsonb_text(br#"{"a": "\\u0000"}"#).is_ok());
        assert!(jsonb_text(br#"{"a": "\u0000"}"#).is_err());
        assert!(jsonb_text(br#"{"\u0000": 1}"#).is_err());
        assert!(jsonb_text(b"\xff").is_err());
        assert!(jsonb_text(b"{").is_err());
        assert!(jsonb_text(b"").is_err());
    }
}
