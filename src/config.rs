//! Configuration: flags over environment over file over defaults, each value checked once, at the start.
//!
//! Every error names the setting. Left out on purpose: reloading; a restart is cheap and loses nothing.

use crate::backoff::Backoff;
use crate::consumer::Order;
use crate::http::{Endpoint, HeaderMap, HeaderName, HeaderValue};
use crate::saga::replies;
use serde::Deserialize;
use sqlx::postgres::PgConnectOptions;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most messages of one transaction unless configured: from here on, more save little and hold locks for longer.
const DEFAULT_BATCH: usize = 100;

/// A setting is missing or wrong; one line, which names it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct ConfigError {
    /// Name of the setting, as in the file.
    pub setting: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl ConfigError {
    fn new(setting: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { setting: setting.into(), reason: reason.into() }
    }
}

/// What flags and environment give; they win over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--database-url`, `ONCEBOX_DATABASE_URL`
    pub database_url: Option<String>,
    /// `--amqp-url`, `ONCEBOX_AMQP_URL`
    pub amqp_url: Option<String>,
    /// `--listen`, `ONCEBOX_LISTEN`
    pub listen: Option<String>,
}

/// Everything the processes are told.
#[derive(Debug, Clone)]
pub struct Config {
    database_url: Option<String>,
    amqp_url: Option<String>,
    management_url: Option<String>,
    /// Where the REST API listens.
    pub listen: SocketAddr,
    /// Topic exchange.
    pub exchange: String,
    /// How long a stopping process waits for what is in flight.
    pub drain_deadline: Duration,
    /// Unconfirmed messages of one key.
    pub key_window: usize,
    /// How often topics that no queue was bound for are tried again, if at all.
    pub unroutable_probe: Option<Duration>,
    /// Sagas.
    pub saga: SagaConfig,
    /// The REST API.
    pub api: ApiConfig,
    /// Consumers, in the order of the file.
    pub consumers: Vec<ConsumerConfig>,
}

/// `[saga]`.
#[derive(Debug, Clone)]
pub struct SagaConfig {
    /// Whether `oncebox run` is an orchestrator too.
    pub enabled: bool,
    /// Queue of the replies.
    pub queue: String,
}

/// `[api]`
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// File of token hashes.
    pub tokens: Option<PathBuf>,
    /// `/metrics` needs no token.
    pub metrics_are_open: bool,
}

/// One `[[consumer]]`.
#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    /// Name of the logical consumer.
    pub name: String,
    /// Database of inbox and effects, if not the one of the whole.
    pub database_url: Option<String>,
    /// Queue.
    pub queue: String,
    /// Topic patterns.
    pub bindings: Vec<String>,
    /// What handles messages.
    pub handler: HandlerConfig,
    /// Handlers at a time.
    pub concurrency: usize,
    /// Most messages of one transaction.
    pub batch: usize,
    /// Failures after which a message is parked.
    pub max_attempts: u32,
    /// Order of effects.
    pub order: Order,
    /// Delay between attempts.
    pub backoff: Backoff,
    /// Longest run of a handler.
    pub handler_timeout: Duration,
}

/// What handles a consumer's messages.
#[derive(Debug, Clone)]
pub enum HandlerConfig {
    /// A function in its database, by name.
    Sql(String),
    /// An HTTP endpoint.
    Http {
        /// Where messages are posted.
        endpoint: Endpoint,
        /// Fields of every request; never shown.
        headers: HeaderMap,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    database_url: Option<String>,
    amqp_url: Option<String>,
    management_url: Option<String>,
    listen: Option<String>,
    exchange: Option<String>,
    drain_deadline: Option<String>,
    #[serde(default)]
    relay: RelayTable,
    #[serde(default)]
    saga: SagaTable,
    #[serde(default)]
    api: ApiTable,
    #[serde(default)]
    consumer: Vec<ConsumerTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RelayTable {
    key_window: Option<usize>,
    unroutable_probe: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SagaTable {
    enabled: Option<bool>,
    queue: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiTable {
    tokens: Option<PathBuf>,
    metrics: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsumerTable {
    name: String,
    database_url: Option<String>,
    queue: Option<String>,
    #[serde(default)]
    bindings: Vec<String>,
    handler: HandlerTable,
    concurrency: Option<usize>,
    batch: Option<usize>,
    max_attempts: Option<u32>,
    order: Option<String>,
    backoff_initial: Option<String>,
    backoff_cap: Option<String>,
    handler_timeout: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HandlerTable {
    sql: Option<String>,
    http: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

impl Config {
    /// Reads the file, if one is given, and lays the overrides over it.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let text = match path {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| ConfigError::new("--config", format!("{}: {error}", path.display())))?,
            None => String::new(),
        };
        Self::parse(&text, overrides)
    }

    /// Reads the text of a file and lays the overrides over it.
    pub fn parse(text: &str, overrides: Overrides) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| syntax_error(text, &error))?;
        let listen = overrides.listen.or(file.listen).unwrap_or_else(|| "127.0.0.1:7077".to_owned());
        let consumers = file.consumer.into_iter().map(consumer).collect::<Result<Vec<_>, _>>()?;
        for (index, consumer) in consumers.iter().enumerate() {
            if consumers[..index].iter().any(|earlier| earlier.name == consumer.name) {
                return Err(ConfigError::new("consumer.name", format!("\"{}\" is there twice", consumer.name)));
            }
        }
        Ok(Self {
            database_url: overrides.database_url.or(file.database_url),
            amqp_url: overrides.amqp_url.or(file.amqp_url),
            management_url: file.management_url,
            listen: listen
                .parse()
                .map_err(|_| ConfigError::new("listen", format!("\"{listen}\" is no address:port")))?,
            exchange: short("exchange", file.exchange.unwrap_or_else(|| "oncebox".to_owned()))?,
            drain_deadline: duration("drain_deadline", file.drain_deadline, Duration::from_secs(10))?,
            key_window: at_least_one("relay.key_window", file.relay.key_window.unwrap_or(1), 10_000)?,
            unroutable_probe: match file.relay.unroutable_probe.as_deref() {
                Some("off") => None,
                _ => Some(duration("relay.unroutable_probe", file.relay.unroutable_probe, Duration::from_secs(30))?),
            },
            saga: SagaConfig {
                enabled: file.saga.enabled.unwrap_or(true),
                queue: short("saga.queue", file.saga.queue.unwrap_or_else(|| replies::CONSUMER.to_owned()))?,
            },
            api: ApiConfig {
                tokens: file.api.tokens,
                metrics_are_open: match file.api.metrics.as_deref() {
                    None | Some("open") => true,
                    Some("token") => false,
                    Some(other) => {
                        let reason = format!("\"{other}\" is neither \"open\" nor \"token\"");
                        return Err(ConfigError::new("api.metrics", reason));
                    }
                },
            },
            consumers,
        })
    }

    /// The database, which nearly every command needs.
    pub fn database_url(&self) -> Result<&str, ConfigError> {
        let url = self.database_url.as_deref().ok_or_else(|| {
            let reason = "is not set: give ONCEBOX_DATABASE_URL, --database-url or database_url in the config file";
            ConfigError::new("database_url", reason)
        })?;
        postgres_url("database_url", url)?;
        Ok(url)
    }

    /// The broker.
    pub fn amqp_url(&self) -> Result<&str, ConfigError> {
        let url = self.amqp_url.as_deref().ok_or_else(|| {
            let reason = "is not set: give ONCEBOX_AMQP_URL, --amqp-url or amqp_url in the config file";
            ConfigError::new("amqp_url", reason)
        })?;
        if url.starts_with("amqp://") || url.starts_with("amqps://") {
            Ok(url)
        } else {
            Err(ConfigError::new("amqp_url", "must begin with amqp:// or amqps://"))
        }
    }

    /// Whether there is a database at all.
    pub fn has_database_url(&self) -> bool {
        self.database_url.is_some()
    }

    /// Whether there is a broker at all.
    pub fn has_amqp_url(&self) -> bool {
        self.amqp_url.is_some()
    }

    /// RabbitMQ's management API, by flag or environment (`over`) or the file.
    pub fn management(&self, over: Option<&str>) -> Result<Option<Endpoint>, ConfigError> {
        let url = over.or(self.management_url.as_deref());
        url.map(|url| Endpoint::parse(url).map_err(|error| ConfigError::new("management_url", error.to_string())))
            .transpose()
    }
}

fn consumer(table: ConsumerTable) -> Result<ConsumerConfig, ConfigError> {
    let name = short("consumer.name", table.name)?;
    if name == replies::CONSUMER {
        return Err(ConfigError::new("consumer.name", format!("\"{name}\" is the saga orchestrator's")));
    }
    let setting = |field: &str| format!("consumer \"{name}\": {field}");
    let handler = handler(table.handler, &setting)?;
    let order = match table.order.as_deref() {
        None | Some("key") => Order::Key,
        Some("none") => Order::None,
        Some("stream") => Order::Stream,
        Some(other) => {
            let reason = format!("\"{other}\" is neither \"key\", \"stream\" nor \"none\"");
            return Err(ConfigError::new(setting("order"), reason));
        }
    };
    if let Some(url) = &table.database_url {
        postgres_url(&setting("database_url"), url)?;
    }
    for binding in &table.bindings {
        short(&setting("bindings"), binding.clone())?;
    }
    let one_by_one = order == Order::Stream || matches!(handler, HandlerConfig::Http { .. });
    let batch = table.batch.unwrap_or(if one_by_one { 1 } else { DEFAULT_BATCH });
    let batch = at_least_one(&setting("batch"), batch, 1_000)?;
    if batch > 1 && one_by_one {
        return Err(ConfigError::new(setting("batch"), "is for SQL handlers with order \"key\" or \"none\""));
    }
    let max_attempts = table.max_attempts.unwrap_or(5);
    Ok(ConsumerConfig {
        queue: short(&setting("queue"), table.queue.unwrap_or_else(|| name.clone()))?,
        database_url: table.database_url,
        handler,
        concurrency: at_least_one(&setting("concurrency"), table.concurrency.unwrap_or(8), 256)?,
        batch,
        max_attempts: at_least_one(&setting("max_attempts"), max_attempts as usize, 1_000_000)? as u32,
        order,
        backoff: Backoff {
            initial: duration(&setting("backoff_initial"), table.backoff_initial, Duration::from_secs(1))?,
            cap: duration(&setting("backoff_cap"), table.backoff_cap, Duration::from_secs(300))?,
        },
        handler_timeout: duration(&setting("handler_timeout"), table.handler_timeout, Duration::from_secs(30))?,
        bindings: table.bindings,
        name,
    })
}

fn handler(table: HandlerTable, setting: &dyn Fn(&str) -> String) -> Result<HandlerConfig, ConfigError> {
    match (table.sql, table.http) {
        (Some(_), None) if !table.headers.is_empty() => {
            Err(ConfigError::new(setting("handler.headers"), "go with handler.http only"))
        }
        (Some(sql), None) => {
            crate::inbox::handler::SqlHandler::new(&sql)
                .map_err(|error| ConfigError::new(setting("handler.sql"), error.to_string()))?;
            Ok(HandlerConfig::Sql(sql))
        }
        (None, Some(url)) => {
            let endpoint =
                Endpoint::parse(&url).map_err(|error| ConfigError::new(setting("handler.http"), error.to_string()))?;
            let mut headers = HeaderMap::new();
            for (name, value) in &table.headers {
                let (name, value) = field(name, value)
                    .map_err(|reason| ConfigError::new(setting(&format!("handler.headers.{name}")), reason))?;
                if headers.insert(&name, value).is_some() {
                    return Err(ConfigError::new(setting("handler.headers"), format!("{name} is there twice")));
                }
            }
            if endpoint.has_credentials() && headers.contains_key("authorization") {
                let reason = "and credentials in handler.http: give one of them";
                return Err(ConfigError::new(setting("handler.headers.Authorization"), reason));
            }
            Ok(HandlerConfig::Http { endpoint, headers })
        }
        _ => Err(ConfigError::new(
            setting("handler"),
            "must be { sql = \"schema.function\" } or { http = \"http://host/path\" }",
        )),
    }
}

/// A field of every request; its value may be a secret, so nothing shows it.
fn field(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), &'static str> {
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| "is no name of an HTTP field")?;
    if !crate::inbox::http::may_be_fixed(name.as_str()) {
        return Err("is not for the config to set");
    }
    let mut value = HeaderValue::from_str(value).map_err(|_| "must be visible ASCII")?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// Refuses what is no URL of a Postgres: the driver takes other schemes too, and its words do not quote the password.
pub fn postgres_url(setting: &str, url: &str) -> Result<(), ConfigError> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err(ConfigError::new(setting, "must begin with postgres:// or postgresql://"));
    }
    match url.parse::<PgConnectOptions>() {
        Ok(_) => Ok(()),
        Err(error) => Err(ConfigError::new(setting, format!("is not valid: {error}"))),
    }
}

/// Names on the broker are short strings.
fn short(setting: &str, value: String) -> Result<String, ConfigError> {
    if (1..=255).contains(&value.len()) && !value.contains('\0') {
        Ok(value)
    } else {
        Err(ConfigError::new(setting, "must be 1 to 255 bytes without NUL"))
    }
}

fn at_least_one(setting: &str, value: usize, at_most: usize) -> Result<usize, ConfigError> {
    if (1..=at_most).contains(&value) {
        Ok(value)
    } else {
        Err(ConfigError::new(setting, format!("must be 1 to {at_most}, got {value}")))
    }
}

/// Durations are a number and a unit: 250ms, 10s, 5m, 2h.
pub fn duration(setting: &str, text: Option<String>, default: Duration) -> Result<Duration, ConfigError> {
    let Some(text) = text else { return Ok(default) };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit_ms = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    let ms = text[..digits].parse::<u64>().ok().and_then(|number| number.checked_mul(unit_ms)).unwrap_or(0);
    // A day: longer is a typing error, and timers have their limits.
    if ms == 0 || ms > 86_400_000 {
        let reason = format!("\"{text}\" is no duration between 1ms and 24h: write 250ms, 10s, 5m or 2h");
        return Err(ConfigError::new(setting, reason));
    }
    Ok(Duration::from_millis(ms))
}

/// The parser's message on one line, with the line of the file.
fn syntax_error(text: &str, error: &toml::de::Error) -> ConfigError {
    let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    ConfigError::new(format!("config file, line {line}"), error.message().replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the replies' queue can be named, and their consumer's name is nobody else's.
    #[test]
    fn sagas_have_their_queue() {
        let config = Config::parse("", Overrides::default()).expect("valid");
        assert_eq!((config.saga.enabled, config.saga.queue.as_str()), (true, "oncebox.saga"));
        let config = Config::parse("[saga]\nenabled = false\nqueue = \"q\"", Overrides::default()).expect("valid");
        assert_eq!((config.saga.enabled, config.saga.queue.as_str()), (false, "q"));
        assert!(refused("[saga]\nqueue = \"\"").contains("saga.queue"));
        let taken = "[[consumer]]\nname = \"oncebox.saga\"\nhandler = { sql = \"f\" }";
        assert!(refused(taken).contains("consumer.name"));
    }

    fn refused(text: &str) -> String {
        Config::parse(text, Overrides::default())
            .and_then(|c| c.database_url().map(drop))
            .expect_err("refused")
            .to_string()
    }

    /// Goal: every wrong or missing setting is one line that names it.
    #[test]
    fn errors_name_the_setting() {
        let consumer = |line: &str| format!("[[consumer]]\nname = \"b\"\nhandler = {{ sql = \"f\" }}\n{line}");
        let http = |rest: &str| format!("[[consumer]]\nname = \"b\"\nhandler = {{ http = {rest} }}");
        for (text, expected) in [
            (String::new(), "database_url: is not set"),
            ("databse_url = \"x\"".to_owned(), "config file, line 1: unknown field `databse_url`"),
            ("database_url = \"mysql://x\"".to_owned(), "database_url: must begin with postgres://"),
            ("listen = \"7077\"".to_owned(), "listen: \"7077\" is no address:port"),
            ("drain_deadline = \"10\"".to_owned(), "drain_deadline: \"10\" is no duration"),
            ("[relay]\nkey_window = 0".to_owned(), "relay.key_window: must be 1 to 10000"),
            ("[relay]\nunroutable_probe = \"never\"".to_owned(), "relay.unroutable_probe: \"never\" is no duration"),
            ("exchange = \"\"".to_owned(), "exchange: must be 1 to 255 bytes"),
            ("[api]\nmetrics = \"closed\"".to_owned(), "api.metrics: \"closed\" is neither"),
            ("[[consumer]]\nname = \"b\"".to_owned(), "config file, line 1: missing field `handler`"),
            (consumer("order = \"fifo\""), "consumer \"b\": order: \"fifo\" is neither"),
            (consumer("concurrency = 0"), "consumer \"b\": concurrency: must be 1 to 256"),
            (consumer("batch = 0"), "consumer \"b\": batch: must be 1 to 1000"),
            (consumer("max_attempts = 0"), "consumer \"b\": max_attempts: must be 1"),
            (consumer("backoff_cap = \"1 day\""), "consumer \"b\": backoff_cap: \"1 day\" is no duration"),
            (consumer(&consumer("")), "consumer.name: \"b\" is there twice"),
            (http("\"x\""), "consumer \"b\": handler.http: must begin with http:// or https://"),
            (http("\"ftp://u:se-cret@x/\""), "consumer \"b\": handler.http: must begin with http:// or https://"),
            (http("\"http:///hook\""), "consumer \"b\": handler.http: is no valid URL"),
            (http("\"http://x\", sql = \"f\""), "consumer \"b\": handler: must be { sql ="),
            (http("\"http://x\", headers = { Host = \"y\" }"), "handler.headers.Host: is not for the config to set"),
            (http("\"http://x\", headers = { \"a b\" = \"y\" }"), "handler.headers.a b: is no name of an HTTP field"),
            (http("\"http://x\", headers = { a = \"se-cret\\n\" }"), "handler.headers.a: must be visible ASCII"),
            (http("\"http://x\", headers = { a = \"1\", A = \"2\" }"), "handler.headers: a is there twice"),
            (
                http("\"http://u:se-cret@x\", headers = { authorization = \"Bearer t\" }"),
                "handler.headers.Authorization: and credentials in handler.http",
            ),
            (
                "[[consumer]]\nname = \"b\"\nhandler = { sql = \"f\", headers = { a = \"b\" } }".to_owned(),
                "handler.headers: go with handler.http only",
            ),
            (
                "[[consumer]]\nname = \"b\"\nhandler = { sql = \"a.b.c\" }".to_owned(),
                "handler.sql: \"a.b.c\" is no function",
            ),
        ] {
            let error = refused(&text);
            assert!(error.contains(expected), "{text:?} gave {error:?}, not {expected:?}");
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(!error.contains("se-cret"), "{error}");
        }
    }

    /// Goal: an endpoint's secrets are nowhere in what is printed of a config.
    #[test]
    fn secrets_of_endpoints_are_not_shown() {
        let text = "[[consumer]]\nname = \"b\"\nhandler = { http = \"http://u:se-cret@x/?key=se-cret\", headers = { X-Token = \"se-cret\" } }";
        let config = Config::parse(text, Overrides::default()).expect("valid");
        let HandlerConfig::Http { headers, .. } = &config.consumers[0].handler else { panic!("no HTTP handler") };
        assert_eq!(headers.get("x-token").expect("given"), "se-cret");
        let shown = format!("{config:?}");
        assert!(shown.contains("http://x/") && !shown.contains("se-cret"), "{shown}");
    }

    /// Goal: flags and environment win over the file, the file over defaults.
    #[test]
    fn overrides_win() {
        let file = "database_url = \"postgres://file\"\nlisten = \"127.0.0.1:1\"\n[[consumer]]\nname = \"b\"\n\
                    handler = { sql = \"f\" }";
        let overrides = Overrides { database_url: Some("postgres://flag".to_owned()), ..Overrides::default() };
        let config = Config::parse(file, overrides).expect("valid");
        assert_eq!(config.database_url().expect("set"), "postgres://flag");
        assert_eq!(config.listen.port(), 1);
        assert_eq!((config.exchange.as_str(), config.drain_deadline), ("oncebox", Duration::from_secs(10)));
        let consumer = &config.consumers[0];
        assert_eq!(consumer.batch, 100);
        assert_eq!((consumer.queue.as_str(), consumer.concurrency, consumer.max_attempts), ("b", 8, 5));
        assert_eq!(consumer.order, Order::Key);
    }
}
