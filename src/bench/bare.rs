//! The other publishers that the relay stands beside: the ceiling, bare lapin, and oncebox's own, fed from memory.

use super::ceiling::{self, Clocked, Pace};
use super::cpu::Spent;
use super::scratch::{Route, body, channel, envelope};
use super::servers::Servers;
use crate::broker::rabbitmq::{RabbitMq, RabbitMqOptions, properties};
use crate::broker::{Broker, Outcome, Publisher};
use crate::message::Envelope;
use anyhow::{Context, bail, ensure};
use lapin::Confirmation;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use std::collections::VecDeque;
use std::future::Future;
use std::time::Instant;

/// What is published.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) messages: u64,
    /// Bytes of a payload.
    pub(super) payload: usize,
    /// Ordering keys, 0 for none.
    pub(super) keys: i64,
}

impl Load {
    /// All of it, in memory.
    fn envelopes(&self) -> Vec<Envelope> {
        let body = body(self.payload);
        (1..=self.messages.cast_signed()).map(|ordinal| envelope(ordinal, &body, self.keys)).collect()
    }
}

/// The hand-framed ceiling.
pub(super) async fn ceiling(servers: &Servers, load: &Load, pace: Pace, route: &Route) -> anyhow::Result<Spent> {
    let prepared = ceiling::prepare(load.envelopes().into_iter(), route, pace)?;
    let meter = servers.meter();
    let Clocked { first_published, last_confirmed } = ceiling::publish(servers.amqp_url()?, prepared).await?;
    Ok(meter.spent_between(first_published, last_confirmed))
}

/// lapin on one channel, which makes the properties as it goes, as any program would.
pub(super) async fn lapin(servers: &Servers, load: &Load, window: usize, route: &Route) -> anyhow::Result<Spent> {
    let envelopes = load.envelopes();
    let channel = channel(servers).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let meter = servers.meter();
    let mut confirms = VecDeque::with_capacity(window);
    for envelope in &envelopes {
        if confirms.len() == window {
            confirmed(confirms.pop_front()).await?;
        }
        let (exchange, key) = (route.exchange.as_str().into(), route.routing_key.as_str().into());
        let publish = channel.basic_publish(exchange, key, options, &envelope.message.body, properties(envelope)?);
        confirms.push_back(publish.await?);
    }
    while !confirms.is_empty() {
        confirmed(confirms.pop_front()).await?;
    }
    Ok(meter.spent())
}

async fn confirmed(confirm: Option<impl Future<Output = lapin::Result<Confirmation>>>) -> anyhow::Result<()> {
    match confirm.context("a confirm is awaited")?.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("not confirmed: {other:?}"),
    }
}

/// oncebox's publisher on the port, without relay and database. The exchange is a topic one.
pub(super) async fn own(servers: &Servers, load: &Load, window: usize, route: &Route) -> anyhow::Result<Spent> {
    let envelopes = load.envelopes();
    let options = RabbitMqOptions { max_unconfirmed: window, ..RabbitMqOptions::new(servers.amqp_url()?) };
    let mut publisher = RabbitMq::new(options)?.publisher(&route.exchange).await?;
    let (meter, first) = (servers.meter(), Instant::now());
    let (mut outcomes, mut confirmed) = (Vec::new(), 0);
    let mut left = envelopes.iter().zip(0_u64..);
    while confirmed < envelopes.len() {
        for (envelope, ticket) in left.by_ref().take(publisher.capacity()) {
            publisher.publish(ticket, envelope).await?;
        }
        publisher.outcomes(&mut outcomes).await?;
        let bad = outcomes.iter().find(|(_, outcome)| *outcome != Outcome::Confirmed);
        ensure!(bad.is_none(), "not confirmed: {bad:?}");
        confirmed += outcomes.drain(..).count();
    }
    let spent = meter.spent_between(first, Instant::now());
    publisher.close().await;
    Ok(spent)
}
