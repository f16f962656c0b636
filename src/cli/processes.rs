//! `oncebox relay`, `consume`, `orchestrate`, `serve` and `run`: the same parts, alone or together.

use crate::api::{self, ApiOptions, Tokens};
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions};
use crate::broker::{Broker, Publisher};
use crate::config::{Config, ConfigError, ConsumerConfig, HandlerConfig};
use crate::consumer::{self, ConsumerOptions, Order};
use crate::db;
use crate::inbox::handler::{Handler, SqlHandler};
use crate::inbox::http::HttpHandler;
use crate::janitor::inbox::{self as inbox_janitor, InboxJanitorOptions};
use crate::janitor::outbox::{self as outbox_janitor, OutboxJanitorOptions};
use crate::relay::{self, RelayOptions};
use crate::saga::orchestrator::{self, OrchestratorOptions};
use crate::saga::replies::{self, Replies};
use crate::supervise;
use anyhow::Context;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Which parts a process runs.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    relay: bool,
    consume: bool,
    orchestrate: bool,
    serve: bool,
}

impl Parts {
    /// The relay alone.
    pub const RELAY: Self = Self { relay: true, ..Self::NONE };
    /// The consumers alone.
    pub const CONSUME: Self = Self { consume: true, ..Self::NONE };
    /// The saga orchestrator alone.
    pub const ORCHESTRATE: Self = Self { orchestrate: true, ..Self::NONE };
    /// The REST API alone.
    pub const SERVE: Self = Self { serve: true, ..Self::NONE };
    /// Everything.
    pub const ALL: Self = Self { relay: true, consume: true, orchestrate: true, serve: true };

    const NONE: Self = Self { relay: false, consume: false, orchestrate: false, serve: false };
}

/// Runs the parts until a signal; the first that fails ends all, in order, and the process with an error.
pub async fn run(config: Config, parts: Parts) -> anyhow::Result<()> {
    let database_url = config.database_url()?.to_owned();
    if parts.relay || parts.consume || parts.orchestrate {
        config.amqp_url()?;
    }
    // Asked for by its own name it runs whatever the file says.
    let orchestrate = parts.orchestrate && (config.saga.enabled || !parts.serve);
    if parts.consume && !parts.serve && config.consumers.is_empty() {
        let reason = "there is none: give a config file with at least one [[consumer]]".to_owned();
        return Err(ConfigError { setting: "consumer".to_owned(), reason }.into());
    }
    let api = if parts.serve { Some(api_options(&config, &database_url)?) } else { None };
    let shutdown = supervise::shutdown_on_signal()?;
    let Some(conn) = supervise::wait_for_database(&database_url, &shutdown).await? else { return Ok(()) };
    db::close(conn).await;

    let mut tasks = JoinSet::new();
    let mut inboxes = BTreeSet::new();
    if let Some(api) = api {
        let listener = tokio::net::TcpListener::bind(config.listen).await;
        let listener = listener.with_context(|| format!("listen: cannot listen on {}", config.listen))?;
        tracing::info!(address = %config.listen, "serving");
        tasks.spawn(serve(listener, api, shutdown.clone()));
    }
    if parts.relay {
        tasks.spawn(run_relay(config.clone(), database_url.clone(), shutdown.clone()));
        tasks.spawn(run_outbox_janitor(database_url.clone(), shutdown.clone()));
    }
    if parts.consume {
        for consumer in &config.consumers {
            tasks.spawn(run_consumer(config.clone(), consumer.clone(), database_url.clone(), shutdown.clone()));
        }
        let urls = config.consumers.iter().map(|consumer| consumer.database_url.as_ref().unwrap_or(&database_url));
        inboxes.extend(urls.cloned());
    }
    if orchestrate {
        tasks.spawn(run_replies(config.clone(), database_url.clone(), shutdown.clone()));
        tasks.spawn(run_orchestrator(database_url.clone(), shutdown.clone()));
        inboxes.insert(database_url.clone());
    }
    for database_url in inboxes {
        tasks.spawn(run_inbox_janitor(database_url, shutdown.clone()));
    }
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = match ended.context("a part of the process ended unexpectedly") {
            Ok(Ok(())) if !shutdown.is_cancelled() => Err(anyhow::anyhow!("a part of the process ended unexpectedly")),
            Ok(result) => result,
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            shutdown.cancel();
            result = result.and(Err(error));
        }
    }
    result
}

fn rabbitmq(config: &Config, connection_name: &str) -> anyhow::Result<Arc<RabbitMq>> {
    let mut options = RabbitMqOptions::new(config.amqp_url()?);
    options.connection_name = connection_name.to_owned();
    let broker = RabbitMq::new(options)
        .map_err(|error| ConfigError { setting: "amqp_url".to_owned(), reason: error.to_string() })?;
    Ok(Arc::new(broker))
}

async fn run_relay(config: Config, database_url: String, shutdown: CancellationToken) -> anyhow::Result<()> {
    let broker = rabbitmq(&config, "oncebox relay")?;
    // What no waiting can mend is said at once, not in a log that repeats itself.
    match broker.publisher(&config.exchange).await {
        Ok(publisher) => publisher.close().await,
        Err(error) if error.is_transient() => tracing::warn!(%error, "the broker is not there yet"),
        Err(error) => return Err(error.into()),
    }
    let options = RelayOptions {
        database_url,
        exchange: config.exchange,
        key_window: config.key_window,
        drain_deadline: config.drain_deadline,
        unroutable_probe: config.unroutable_probe,
    };
    Ok(relay::run(broker, options, shutdown).await?)
}

async fn run_outbox_janitor(database_url: String, shutdown: CancellationToken) -> anyhow::Result<()> {
    outbox_janitor::run(OutboxJanitorOptions { database_url }, shutdown).await;
    Ok(())
}

async fn run_consumer(
    config: Config,
    consumer: ConsumerConfig,
    database_url: String,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let name = format!("consumer \"{}\"", consumer.name);
    let broker = rabbitmq(&config, &format!("oncebox consume {}", consumer.name))?;
    let outbox_url = Some(database_url.clone());
    let database_url = consumer.database_url.unwrap_or(database_url);
    let conn = supervise::wait_for_database(&database_url, &shutdown).await.with_context(|| name.clone())?;
    let Some(mut conn) = conn else { return Ok(()) };
    let handler: Arc<dyn Handler> = match consumer.handler {
        HandlerConfig::Sql(function) => {
            let handler = SqlHandler::new(&function).with_context(|| name.clone())?;
            let checked = handler.check(&mut conn).await.with_context(|| format!("{name}: handler"))?;
            checked.with_context(|| format!("{name}: handler"))?;
            Arc::new(handler)
        }
        // Whether the endpoint is there is seen with the first message, and waited for then.
        HandlerConfig::Http { endpoint, headers } => Arc::new(
            HttpHandler::new(endpoint, headers, consumer.handler_timeout)
                .with_context(|| format!("{name}: handler"))?,
        ),
    };
    db::close(conn).await;
    let options = ConsumerOptions {
        name: consumer.name,
        database_url,
        outbox_url,
        queue: consumer.queue,
        exchange: config.exchange,
        bindings: consumer.bindings,
        concurrency: consumer.concurrency,
        batch: consumer.batch,
        max_attempts: consumer.max_attempts,
        order: consumer.order,
        backoff: consumer.backoff,
        handler_timeout: consumer.handler_timeout,
        drain_deadline: config.drain_deadline,
    };
    consumer::run(broker, handler, options, shutdown).await.with_context(|| name)
}

/// Replies come like any other message: through the inbox.
async fn run_replies(config: Config, database_url: String, shutdown: CancellationToken) -> anyhow::Result<()> {
    let broker = rabbitmq(&config, "oncebox orchestrate")?;
    let options = ConsumerOptions {
        name: replies::CONSUMER.to_owned(),
        database_url: database_url.clone(),
        outbox_url: Some(database_url),
        queue: config.saga.queue,
        exchange: config.exchange,
        bindings: vec![replies::TOPIC.to_owned()],
        concurrency: replies::CONCURRENCY,
        batch: replies::BATCH,
        max_attempts: replies::MAX_ATTEMPTS,
        order: Order::None,
        backoff: replies::BACKOFF,
        handler_timeout: replies::TIMEOUT,
        drain_deadline: config.drain_deadline,
    };
    consumer::run(broker, Arc::new(Replies::default()), options, shutdown).await.context("replies to sagas")
}

async fn run_orchestrator(database_url: String, shutdown: CancellationToken) -> anyhow::Result<()> {
    orchestrator::run(OrchestratorOptions { database_url }, shutdown).await;
    Ok(())
}

async fn run_inbox_janitor(database_url: String, shutdown: CancellationToken) -> anyhow::Result<()> {
    inbox_janitor::run(InboxJanitorOptions { database_url }, shutdown).await;
    Ok(())
}

fn api_options(config: &Config, database_url: &str) -> anyhow::Result<ApiOptions> {
    let error = |setting: &str, reason: String| ConfigError { setting: setting.to_owned(), reason };
    let tokens = match &config.api.tokens {
        Some(path) => Tokens::read(path).map_err(|reason| error("api.tokens", reason.to_string()))?,
        None => Tokens::default(),
    };
    let token = match std::env::var(api::ENVIRONMENT) {
        Ok(token) => Some(token),
        Err(std::env::VarError::NotPresent) => None,
        Err(wrong) => return Err(error(api::ENVIRONMENT, wrong.to_string()).into()),
    };
    let tokens = tokens.with_environment(token.as_deref());
    Ok(ApiOptions {
        database_url: database_url.to_owned(),
        consumer_database_urls: config.consumers.iter().filter_map(|consumer| consumer.database_url.clone()).collect(),
        tokens: tokens.map_err(|reason| error(api::ENVIRONMENT, reason.to_string()))?,
        metrics_are_open: config.api.metrics_are_open,
    })
}

async fn serve(
    listener: tokio::net::TcpListener,
    options: ApiOptions,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    api::serve(listener, options, shutdown).await;
    Ok(())
}
