//! The few frames of AMQP 0-9-1 that the ceiling needs. Pure.
//!
//! Source: the protocol's specification 0-9-1, chapters 2.3 and 4.2, and RabbitMQ's extension `confirm` (class 85).

use super::scratch::Route;
use crate::broker::rabbitmq::properties;
use crate::message::Envelope;
use anyhow::{Context, bail, ensure};
use lapin::protocol::basic::gen_properties;
use std::collections::VecDeque;

/// The largest frame that is written, which is RabbitMQ's own limit by default.
pub(super) const FRAME_MAX: u32 = 131_072;
/// Type, channel and size before a payload, and the end after it.
const FRAME_BYTES: usize = 8;
const END: u8 = 0xce;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// The class of publishing.
const BASIC: u16 = 60;
/// Read at once.
const READ_BYTES: usize = 64 * 1024;

/// Methods as frames.
pub(super) mod method {
    use super::*;

    pub(in super::super) fn start_ok(user: &str, password: &str) -> Vec<u8> {
        let mut arguments = 0_u32.to_be_bytes().to_vec();
        short(&mut arguments, "PLAIN");
        let response = format!("\0{user}\0{password}");
        arguments.extend((response.len() as u32).to_be_bytes());
        arguments.extend(response.as_bytes());
        short(&mut arguments, "en_US");
        frame(0, (10, 11), &arguments)
    }

    /// The answer to the broker's limits, and its frame_max; without heartbeats, which the confirms stand for.
    pub(in super::super) fn tune_ok(tune: &[u8]) -> anyhow::Result<(Vec<u8>, u32)> {
        let frame_max = tune.get(2..6).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        let (limits, frame_max) = (tune.get(..6).zip(frame_max)).context("a Tune of the wrong length")?;
        Ok((frame(0, (10, 31), &[limits, &[0, 0]].concat()), frame_max))
    }

    pub(in super::super) fn open(vhost: &str) -> Vec<u8> {
        let mut arguments = Vec::new();
        short(&mut arguments, vhost);
        arguments.extend([0, 0]);
        frame(0, (10, 40), &arguments)
    }

    pub(in super::super) fn channel_open(channel: u16) -> Vec<u8> {
        frame(channel, (20, 10), &[0])
    }

    pub(in super::super) fn confirm_select(channel: u16) -> Vec<u8> {
        frame(channel, (85, 10), &[0])
    }

    pub(in super::super) fn close() -> Vec<u8> {
        let mut arguments = 200_u16.to_be_bytes().to_vec();
        short(&mut arguments, "done");
        arguments.extend([0; 4]);
        frame(0, (10, 50), &arguments)
    }

    fn frame(channel: u16, id: (u16, u16), arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let id = [id.0.to_be_bytes(), id.1.to_be_bytes()].concat();
        write_frame(&mut bytes, METHOD, channel, &[&id, arguments].concat());
        bytes
    }
}

/// A text of at most 255 bytes, which names and logins of AMQP are.
fn short(bytes: &mut Vec<u8>, text: &str) {
    let text = &text.as_bytes()[..text.len().min(255)];
    bytes.push(text.len() as u8);
    bytes.extend(text);
}

fn write_frame(bytes: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    bytes.push(kind);
    bytes.extend(channel.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes.push(END);
}

/// Appends the frames of a mandatory, persistent message with the properties that the relay gives it.
pub(super) fn write_publish(
    bytes: &mut Vec<u8>,
    channel: u16,
    route: &Route,
    envelope: &Envelope,
) -> anyhow::Result<()> {
    let mut publish = Vec::with_capacity(64);
    for number in [BASIC, 40, 0] {
        publish.extend(number.to_be_bytes());
    }
    short(&mut publish, &route.exchange);
    short(&mut publish, &route.routing_key);
    const MANDATORY: u8 = 1;
    publish.push(MANDATORY);
    write_frame(bytes, METHOD, channel, &publish);

    let body = &envelope.message.body;
    let mut header = Vec::with_capacity(512);
    header.extend(BASIC.to_be_bytes());
    header.extend(0_u16.to_be_bytes());
    header.extend((body.len() as u64).to_be_bytes());
    let properties = properties(envelope)?;
    let written =
        gen_properties(&properties)(header.into()).map_err(|error| anyhow::anyhow!("properties: {error:?}"))?;
    write_frame(bytes, HEADER, channel, &written.into_inner().0);
    for part in body.chunks(FRAME_MAX as usize - FRAME_BYTES) {
        write_frame(bytes, BODY, channel, part);
    }
    Ok(())
}

/// What the broker says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Ack {
        channel: u16,
        tag: u64,
        multiple: bool,
    },
    Nack {
        tag: u64,
    },
    Returned {
        code: u16,
        text: String,
    },
    Closed {
        code: u16,
        text: String,
    },
    /// Any other method.
    Method {
        id: (u16, u16),
        arguments: Vec<u8>,
    },
    /// A heartbeat, or a part of a message that came back.
    Other,
}

/// Takes answers out of what was read.
#[derive(Debug, Default)]
pub(super) struct Reader {
    bytes: Vec<u8>,
    /// Bytes that were taken already.
    taken: usize,
}

impl Reader {
    /// Where to read to.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.reserve(READ_BYTES);
        &mut self.bytes
    }

    /// The next whole answer, if there is one.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Answer>> {
        let rest = &self.bytes[self.taken..];
        let Some(head) = rest.first_chunk::<7>() else { return Ok(None) };
        let channel = u16::from_be_bytes([head[1], head[2]]);
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        ensure!(size <= FRAME_MAX as usize, "a frame of {size} bytes");
        let Some(frame) = rest.get(..size + FRAME_BYTES) else { return Ok(None) };
        ensure!(frame[size + 7] == END, "a frame without its end");
        let answer = if head[0] == METHOD { answer(channel, &frame[7..size + 7])? } else { Answer::Other };
        self.taken += size + FRAME_BYTES;
        Ok(Some(answer))
    }
}

fn answer(channel: u16, payload: &[u8]) -> anyhow::Result<Answer> {
    let word = |at: usize| Some(u16::from_be_bytes(*payload.get(at..)?.first_chunk()?));
    let tag = || Some(u64::from_be_bytes(*payload.get(4..)?.first_chunk()?));
    let text = |at: usize| {
        let length = usize::from(*payload.get(at)?);
        Some(String::from_utf8_lossy(payload.get(at + 1..at + 1 + length)?).into_owned())
    };
    let coded = || Some((word(4)?, text(6)?));
    let id = word(0).zip(word(2)).context("a method without its number")?;
    let answer = match id {
        (BASIC, 80) => {
            tag().zip(payload.get(12)).map(|(tag, bits)| Answer::Ack { channel, tag, multiple: bits & 1 == 1 })
        }
        (BASIC, 120) => tag().map(|tag| Answer::Nack { tag }),
        (BASIC, 50) => coded().map(|(code, text)| Answer::Returned { code, text }),
        (20, 40) | (10, 50) => coded().map(|(code, text)| Answer::Closed { code, text }),
        _ => Some(Answer::Method { id, arguments: payload[4..].to_vec() }),
    };
    match answer {
        Some(answer) => Ok(answer),
        None => bail!("method {id:?} is cut short"),
    }
}

/// Which messages of a channel are confirmed; tags count from 1.
#[derive(Debug, Clone, Default)]
pub(super) struct Confirms {
    /// All up to this one are.
    low: u64,
    /// Whether each of those after it is.
    above: VecDeque<bool>,
}

impl Confirms {
    /// Notes a confirm; gives how many messages it is news of.
    pub(super) fn confirm(&mut self, tag: u64, multiple: bool) -> usize {
        if tag <= self.low {
            return 0;
        }
        let index = (tag - self.low - 1) as usize;
        if multiple {
            let known = self.above.iter().take(index + 1).filter(|known| **known).count();
            self.above.drain(..(index + 1).min(self.above.len()));
            self.low = tag;
            self.settle();
            return index + 1 - known;
        }
        if index >= self.above.len() {
            self.above.resize(index + 1, false);
        }
        let news = !std::mem::replace(&mut self.above[index], true);
        self.settle();
        usize::from(news)
    }

    fn settle(&mut self) {
        while self.above.front() == Some(&true) {
            self.above.pop_front();
            self.low += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::scratch::{body, envelope};
    use lapin::protocol::basic::parse_properties;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ack(tag: u64, multiple: bool) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 80];
        payload.extend(tag.to_be_bytes());
        payload.push(u8::from(multiple));
        let mut bytes = Vec::new();
        write_frame(&mut bytes, METHOD, 3, &payload);
        bytes
    }

    /// Goal: answers are found in bytes cut anywhere.
    #[test]
    fn answers_are_read_from_pieces() {
        let mut stream = ack(7, true);
        write_frame(&mut stream, 8, 0, &[]);
        stream.extend(ack(9, false));
        let mut returned = vec![0, 60, 0, 50, 1, 56, 8];
        returned.extend(b"NO_ROUTE");
        write_frame(&mut stream, METHOD, 1, &returned);
        for size in 1..=stream.len() {
            let (mut reader, mut answers) = (Reader::default(), Vec::new());
            for piece in stream.chunks(size) {
                reader.buffer().extend(piece);
                while let Some(answer) = reader.next().expect("valid") {
                    answers.push(answer);
                }
            }
            let expected = [
                Answer::Ack { channel: 3, tag: 7, multiple: true },
                Answer::Other,
                Answer::Ack { channel: 3, tag: 9, multiple: false },
                Answer::Returned { code: 312, text: "NO_ROUTE".to_owned() },
            ];
            assert_eq!(answers, expected, "in pieces of {size}");
        }
    }

    /// Goal: what is no frame ends the measurement instead of being skipped.
    #[test]
    fn broken_frames_are_refused() {
        for bytes in
            [&[1, 0, 0, 0, 0, 0, 1, 0, 0][..], &[1, 0, 0, 0xff, 0, 0, 0], &[1, 0, 1, 0, 0, 0, 4, 0, 60, 0, 80, END]]
        {
            let mut reader = Reader::default();
            reader.buffer().extend(bytes);
            assert!(reader.next().is_err(), "{bytes:?}");
        }
    }

    /// Goal: a message's frames hold the route, the relay's properties and the whole body, in parts if need be.
    #[test]
    fn a_message_is_framed_whole() {
        let route = Route { exchange: "ex".to_owned(), routing_key: "key".to_owned() };
        let envelope = envelope(5, &body(300_000), 10);
        let mut bytes = Vec::new();
        write_publish(&mut bytes, 2, &route, &envelope).expect("fits");
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let size = u32::from_be_bytes(rest[3..7].try_into().expect("four")) as usize;
            assert!(size + FRAME_BYTES <= FRAME_MAX as usize);
            assert_eq!((rest[1], rest[2], rest[size + 7]), (0, 2, END));
            frames.push((rest[0], &rest[7..size + 7]));
            rest = &rest[size + FRAME_BYTES..];
        }
        assert_eq!(frames.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [METHOD, HEADER, BODY, BODY, BODY]);
        assert_eq!(frames[0].1, b"\0\x3c\0\x28\0\0\x02ex\x03key\x01");
        let (header, read) = (frames[1].1, parse_properties(&frames[1].1[12..]));
        assert_eq!(header[4..12], 300_000_u64.to_be_bytes());
        assert_eq!(read.expect("readable").1, properties(&envelope).expect("valid"));
        let sent: Vec<u8> = frames[2..].iter().flat_map(|(_, part)| part.iter().copied()).collect();
        assert_eq!(sent, envelope.message.body);
    }

    proptest! {
        /// Goal: confirms in any order, single or multiple, count every message once.
        #[test]
        fn confirms_count_each_message_once(confirms in prop::collection::vec((1_u64..60, any::<bool>()), 0..80)) {
            let (mut ours, mut model) = (Confirms::default(), BTreeSet::new());
            for (tag, multiple) in confirms {
                let before = model.len();
                model.extend(if multiple { 1..=tag } else { tag..=tag });
                prop_assert_eq!(ours.confirm(tag, multiple), model.len() - before);
            }
        }
    }
}
