//! The ceiling: the fastest program there can be for the broker, written for one purpose.
//!
//! Every frame lies ready in memory before the clock starts; then one thread pushes them in large writes, holds back at a
//! window of unconfirmed messages, and counts confirms out of its read buffer. The messages are those that the relay
//! would send, property for property, so that the broker does the same work. No code is shared with oncebox's own
//! publisher: a ceiling must not inherit its faults. Left out: TLS, heartbeats, reconnecting; anything but a confirm
//! ends the measurement.

use super::frames::{Answer, Confirms, FRAME_MAX, Reader, method, write_publish};
use super::scratch::Route;
use crate::config::ConfigError;
use crate::message::Envelope;
use anyhow::{Context, bail, ensure};
use lapin::uri::{AMQPScheme, AMQPUri};
use std::io;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;

/// Most bytes given to the socket at once: large, and still read for confirms in between.
const WRITE_BYTES: usize = 128 * 1024;
/// A broker that confirms nothing for so long is stuck or blocks us.
const SILENCE: Duration = Duration::from_secs(30);

/// How the ceiling publishes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Unconfirmed messages, over all channels.
    pub(super) window: usize,
    /// Channels, which take turns message by message.
    pub(super) channels: u16,
}

/// When the first message was written and the last one confirmed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocked {
    pub(super) first_published: Instant,
    pub(super) last_confirmed: Instant,
}

/// Messages as bytes, ready to be written.
pub(super) struct Prepared {
    bytes: Vec<u8>,
    /// Where each message ends.
    ends: Vec<usize>,
    pace: Pace,
}

/// Makes the frames of all messages.
pub(super) fn prepare(
    envelopes: impl ExactSizeIterator<Item = Envelope>,
    route: &Route,
    pace: Pace,
) -> anyhow::Result<Prepared> {
    let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(envelopes.len()));
    for (index, envelope) in envelopes.enumerate() {
        let channel = channel_of(index, pace.channels);
        write_publish(&mut bytes, channel, route, &envelope)?;
        ends.push(bytes.len());
        if index == 0 {
            bytes.reserve(bytes.len() * ends.capacity());
        }
    }
    Ok(Prepared { bytes, ends, pace })
}

/// Publishes everything, on a thread and an event loop of its own: nothing else of this process takes turns there.
pub(super) async fn publish(amqp_url: &str, prepared: Prepared) -> anyhow::Result<Clocked> {
    let uri: AMQPUri = amqp_url.parse().map_err(|_| refused("is no AMQP URL"))?;
    if uri.scheme != AMQPScheme::AMQP {
        return Err(refused("the ceiling speaks plain amqp:// only").into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Not a thread of the runtime's, which would be waited for when the measurement is given up.
    std::thread::spawn(move || {
        let _ = sender.send(runtime.block_on(async { Session::open(&uri, &prepared).await?.run().await }));
    });
    receiver.await.context("the ceiling's thread ended")?
}

fn refused(reason: &str) -> ConfigError {
    ConfigError { setting: "amqp_url".to_owned(), reason: reason.to_owned() }
}

/// Channels are counted from 1.
fn channel_of(index: usize, channels: u16) -> u16 {
    (index % usize::from(channels)) as u16 + 1
}

struct Session<'a> {
    stream: TcpStream,
    reader: Reader,
    prepared: &'a Prepared,
}

impl<'a> Session<'a> {
    /// Connects, logs in and puts every channel into confirm mode.
    async fn open(uri: &AMQPUri, prepared: &'a Prepared) -> anyhow::Result<Self> {
        let authority = &uri.authority;
        let connect = TcpStream::connect((authority.host.as_str(), authority.port));
        let stream = tokio::time::timeout(SILENCE, connect).await.context("connecting took too long")??;
        stream.set_nodelay(true)?;
        let mut session = Self { stream, reader: Reader::default(), prepared };
        session.stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        session.expect((10, 10)).await?;
        let login = &authority.userinfo;
        session.stream.write_all(&method::start_ok(&login.username, &login.password)).await?;
        let tune = session.expect((10, 30)).await.context("does the broker take the login?")?;
        let (tune_ok, frame_max) = method::tune_ok(&tune)?;
        ensure!(frame_max == 0 || frame_max >= FRAME_MAX, "the broker's frame_max is only {frame_max}");
        session.stream.write_all(&tune_ok).await?;
        session.stream.write_all(&method::open(&uri.vhost)).await?;
        session.expect((10, 41)).await.context("may the user enter the vhost?")?;
        for channel in 1..=prepared.pace.channels {
            session.stream.write_all(&method::channel_open(channel)).await?;
            session.expect((20, 11)).await?;
            session.stream.write_all(&method::confirm_select(channel)).await?;
            session.expect((85, 11)).await?;
        }
        Ok(session)
    }

    /// Waits for a method of the handshake and gives its arguments.
    async fn expect(&mut self, wanted: (u16, u16)) -> anyhow::Result<Vec<u8>> {
        loop {
            if let Some(answer) = self.reader.next()? {
                match answer {
                    Answer::Method { id, arguments } if id == wanted => return Ok(arguments),
                    Answer::Other => {}
                    answer => bail!("the broker said {answer:?}"),
                }
                continue;
            }
            let read = tokio::time::timeout(SILENCE, self.stream.read_buf(self.reader.buffer()));
            if read.await.context("the broker says nothing")?? == 0 {
                bail!("the broker closed the connection");
            }
        }
    }

    /// Publishes and waits until the last message is confirmed.
    async fn run(mut self) -> anyhow::Result<Clocked> {
        let Prepared { bytes, ends, pace } = self.prepared;
        let mut confirms = vec![Confirms::default(); usize::from(pace.channels)];
        let (mut confirmed, mut written) = (0, 0);
        let first_published = Instant::now();
        while confirmed < ends.len() {
            // What may be written: up to the last message of the window.
            let allowed = (confirmed + pace.window).min(ends.len());
            let until = ends[allowed - 1].min(written + WRITE_BYTES);
            let wanted = if written < until { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            let ready = tokio::time::timeout(SILENCE, self.stream.ready(wanted)).await;
            let ready = ready.with_context(|| format!("no confirm for {SILENCE:?} after {confirmed} messages"))??;
            if ready.is_writable() && written < until {
                written += unless_blocked(self.stream.try_write(&bytes[written..until]))?.unwrap_or(0);
            }
            if ready.is_readable() && unless_blocked(self.stream.try_read_buf(self.reader.buffer()))? == Some(0) {
                bail!("the broker closed the connection");
            }
            while let Some(answer) = self.reader.next()? {
                match answer {
                    Answer::Ack { channel, tag, multiple } => {
                        let of = usize::from(channel).checked_sub(1).and_then(|index| confirms.get_mut(index));
                        confirmed += of.context("a confirm on a channel of nobody")?.confirm(tag, multiple);
                    }
                    Answer::Other => {}
                    answer => bail!("not confirmed: {answer:?}"),
                }
            }
        }
        let last_confirmed = Instant::now();
        self.stream.write_all(&method::close()).await?;
        self.expect((10, 51)).await?;
        Ok(Clocked { first_published, last_confirmed })
    }
}

fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::scratch::{body, envelope};

    /// Goal: messages lie one after the other, on channels that take turns.
    #[test]
    fn messages_are_prepared_in_turn() {
        let route = Route { exchange: "x".to_owned(), routing_key: "k".to_owned() };
        let envelopes = (1..=5).map(|ordinal| envelope(ordinal, &body(32), 0)).collect::<Vec<_>>();
        let prepared = prepare(envelopes.into_iter(), &route, Pace { window: 10, channels: 2 }).expect("fits");
        assert_eq!(prepared.ends.last(), Some(&prepared.bytes.len()));
        let starts = std::iter::once(0).chain(prepared.ends.iter().copied());
        let channels: Vec<u8> = starts.take(5).map(|start| prepared.bytes[start + 2]).collect();
        assert_eq!(channels, [1, 2, 1, 2, 1]);
    }
}
