//! The conversation: commands out, replies in, each sorted to its saga.

use super::checks::{Body, Line};
use super::transcript::{Heard, Transcript, is_final};
use super::{ConformanceError, ConformanceOptions};
use crate::broker::{Broker, BrokerError, Outcome as Sent, Publisher, QueueSpec, Subscription};
use crate::message::{Envelope, Message, MessageId, Position};
use crate::saga::participant::CommandHeaders;
use crate::saga::state::{Op, Outcome};
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;
use uuid::Uuid;

/// Replies under way at a time.
const PREFETCH: u16 = 200;
/// Replies that are kept of one saga: enough to see a storm.
const KEPT: usize = 100;
/// Attempts that are asked for by `retry`, before that counts as no answer.
const ATTEMPTS: i32 = 5;
/// How often `in_progress` may put an answer off.
const PATIENCE: u32 = 5;
/// Longest wait for the broker to take a command.
const CONFIRM_LIMIT: Duration = Duration::from_secs(15);

/// Both sessions, and everything that was heard.
pub(super) struct Talk<B: Broker> {
    publisher: B::Publisher,
    subscription: B::Subscription,
    options: ConformanceOptions,
    /// Where the commands say they come from: an outbox that nobody else has.
    source: Uuid,
    offsets: HashMap<String, i64>,
    sent: u64,
    /// What copies are made of.
    last: HashMap<(Uuid, bool, i32, i32), Envelope>,
    heard: HashMap<Uuid, Vec<Heard>>,
}

impl<B: Broker> Talk<B> {
    pub(super) async fn open(broker: &B, options: ConformanceOptions) -> Result<Self, BrokerError> {
        let source = Uuid::now_v7();
        let replies = QueueSpec {
            name: format!("oncebox.saga.conformance.{source}"),
            exchange: options.exchange.clone(),
            bindings: vec![CommandHeaders::REPLY_TOPIC.to_owned()],
            single_active_consumer: false,
            voids: false,
        };
        let subscription = broker.listen(&replies, PREFETCH).await?;
        let publisher = broker.publisher(&options.exchange).await?;
        Ok(Self {
            publisher,
            subscription,
            options,
            source,
            offsets: HashMap::new(),
            sent: 0,
            last: HashMap::new(),
            heard: HashMap::new(),
        })
    }

    pub(super) async fn close(self) {
        self.publisher.close().await;
        self.subscription.close().await;
    }

    /// Every reply of its saga so far.
    pub(super) fn heard(&self, transcript: &Transcript) -> &[Heard] {
        self.heard.get(&transcript.saga).map_or(&[], Vec::as_slice)
    }

    /// Sends a command.
    pub(super) async fn say(&mut self, transcript: &mut Transcript, line: &Line) -> Result<(), ConformanceError> {
        let id = (transcript.saga, line.op == Op::Do, line.epoch, line.attempt);
        let envelope = match self.last.get(&id).filter(|_| line.is_copy) {
            Some(envelope) => envelope.clone(),
            None => self.envelope(transcript.saga, line),
        };
        transcript.sent.push(*line);
        self.heard.entry(transcript.saga).or_default();
        self.publish(&envelope).await?;
        self.last.insert(id, envelope);
        Ok(())
    }

    /// Sends a command and waits for a final reply; others may ask for another attempt or more time. False if none came.
    pub(super) async fn ask(&mut self, transcript: &mut Transcript, line: &Line) -> Result<bool, ConformanceError> {
        let mut line = *line;
        let mut seen = self.heard(transcript).len();
        self.say(transcript, &line).await?;
        let mut delays = 0;
        let mut until = Instant::now() + self.options.timeout;
        loop {
            if !self.hear(until).await? {
                transcript.silent.push((line.op, line.epoch));
                return Ok(false);
            }
            match self.answer(transcript, &line, seen) {
                Some(Answer::Final) => return Ok(true),
                Some(Answer::Again) if line.attempt < ATTEMPTS => {
                    line = Line { attempt: line.attempt + 1, is_copy: false, ..line };
                    self.say(transcript, &line).await?;
                    until = Instant::now() + self.options.timeout;
                }
                Some(Answer::Wait) if delays < PATIENCE => {
                    delays += 1;
                    until = Instant::now() + self.options.timeout;
                }
                _ => {}
            }
            seen = self.heard(transcript).len();
        }
    }

    /// Hears whatever comes in this time.
    pub(super) async fn listen_for(&mut self, quiet: Duration) -> Result<(), ConformanceError> {
        let until = Instant::now() + quiet;
        while self.hear(until).await? {}
        Ok(())
    }

    /// What was said to a command since so many replies.
    fn answer(&self, transcript: &Transcript, line: &Line, since: usize) -> Option<Answer> {
        let is_known = |command: &CommandHeaders| {
            transcript.sent.iter().any(|sent| (sent.op, sent.epoch) == (command.op, command.epoch))
        };
        self.heard(transcript).iter().skip(since).rev().find_map(|heard| match heard {
            Heard::Reply { command, outcome } if (command.op, command.epoch) == (line.op, line.epoch) => {
                Some(match outcome {
                    outcome if is_final(line.op, *outcome) => Answer::Final,
                    Outcome::InProgress => Answer::Wait,
                    _ => Answer::Again,
                })
            }
            Heard::Reply { command, .. } if is_known(command) => None,
            // Not worth waiting any longer: it answers, and wrongly.
            _ => Some(Answer::Final),
        })
    }

    /// Takes one reply; false if none came in time.
    async fn hear(&mut self, until: Instant) -> Result<bool, ConformanceError> {
        let mut outcomes = Vec::new();
        let delivery = tokio::select! {
            delivery = self.subscription.next() => delivery?,
            // Nothing is unconfirmed: this keeps the session alive.
            result = self.publisher.outcomes(&mut outcomes) => return Ok(result.map(|()| true)?),
            () = tokio::time::sleep_until(until) => return Ok(false),
        };
        self.subscription.ack(delivery.tag).await?;
        // Replies to other sagas come too.
        if let Some((saga, heard)) = Heard::of(&delivery)
            && let Some(of_saga) = self.heard.get_mut(&saga)
            && of_saga.len() < KEPT
        {
            of_saga.push(heard);
        }
        Ok(true)
    }

    fn envelope(&mut self, saga: Uuid, line: &Line) -> Envelope {
        let options = &self.options;
        let topic = match line.op {
            Op::Do => options.topic.clone(),
            Op::Undo => options.undo_topic.clone(),
        };
        let body = match (line.body, &options.failing_body) {
            (Body::Malformed, _) => "{\"oncebox\": ".to_owned(),
            (Body::Failing, Some(failing)) => failing.to_string(),
            _ => options.body.to_string(),
        };
        let now = SystemTime::now();
        let command = CommandHeaders {
            saga,
            step: options.step.clone(),
            op: line.op,
            epoch: line.epoch,
            attempt: Some(line.attempt),
            deadline: rfc3339(now + options.timeout),
        };
        // Dense, as from an outbox: a consumer in the order of streams waits for what is left out.
        let stream = format!("{topic}#0");
        let offset = self.offsets.entry(stream.clone()).or_insert(0);
        *offset += 1;
        self.sent += 1;
        Envelope {
            message: Message {
                id: MessageId(Uuid::now_v7()),
                topic,
                key: Some(saga.to_string()),
                content_type: "application/json".to_owned(),
                headers: command.to_headers(),
                body: body.into_bytes(),
                published_at_s: now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            },
            position: Position { source: self.source, stream, offset: *offset },
            ordinal: self.sent as i64,
        }
    }

    async fn publish(&mut self, envelope: &Envelope) -> Result<(), ConformanceError> {
        let publisher = &mut self.publisher;
        let confirmed = async {
            let mut outcomes = Vec::new();
            publisher.publish(self.sent, envelope).await?;
            while outcomes.is_empty() {
                publisher.outcomes(&mut outcomes).await?;
            }
            Ok::<_, BrokerError>(outcomes)
        };
        let Ok(outcomes) = tokio::time::timeout(CONFIRM_LIMIT, confirmed).await else {
            return Err(BrokerError::TimedOut { what: "a command", limit: CONFIRM_LIMIT }.into());
        };
        let topic = envelope.message.topic.clone();
        match outcomes?.first() {
            Some((_, Sent::Returned { .. })) => {
                Err(ConformanceError::Unroutable { exchange: self.options.exchange.clone(), topic })
            }
            Some((_, Sent::Nacked)) => Err(ConformanceError::Refused(topic)),
            Some((_, Sent::Confirmed)) | None => Ok(()),
        }
    }
}

/// What a reply means for the one who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Final,
    Again,
    Wait,
}

/// To the millisecond, as the orchestrator writes it.
fn rfc3339(at: SystemTime) -> Option<String> {
    let at_ms = at.duration_since(UNIX_EPOCH).ok()?.as_millis() as i128;
    OffsetDateTime::from_unix_timestamp_nanos(at_ms * 1_000_000).ok()?.format(&Rfc3339).ok()
}
