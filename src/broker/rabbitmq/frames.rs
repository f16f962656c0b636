//! The publisher's frames, as bytes: AMQP 0-9-1 without I/O.
//!
//! Methods of the handshake go through the codec's generator. A message's frames are written straight into the buffer
//! that goes to the socket, and confirms are read out of the one that comes from it: a property list and a table built for
//! each message cost more than all the rest of publishing it. What is written here is what the codec reads as
//! [`wire::properties`]; the tests hold it to that.
//!
//! [`wire::properties`]: super::wire::properties

use super::wire::{PERSISTENT, too_long};
use crate::broker::BrokerError;
use crate::message::{Envelope, Void, header};
use amq_protocol::frame::parsing::parse_content_header;
use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame};
use amq_protocol::protocol::{AMQPClass, constants, parse_class};
use serde_json::Value;
use uuid::Uuid;

/// The one channel.
pub(super) const CHANNEL: u16 = 1;
/// The greeting of AMQP 0-9-1, which is no frame.
pub(super) const PROTOCOL_HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";

/// Bytes of a frame before its payload: type, channel, size.
const HEAD_BYTES: usize = 7;
/// Bytes of a frame that are not its payload: the head, and one that ends it.
const OVERHEAD_BYTES: usize = HEAD_BYTES + 1;

const BASIC: u16 = 60;
const BASIC_PUBLISH: u16 = 40;
const BASIC_ACK: u16 = 80;
const BASIC_NACK: u16 = 120;
const MANDATORY: u8 = 1;
const MULTIPLE: u8 = 1;

/// Flags of the properties in a content header, in their order on the wire.
const CONTENT_TYPE: u16 = 1 << 15;
const HEADERS: u16 = 1 << 13;
const DELIVERY_MODE: u16 = 1 << 12;
const MESSAGE_ID: u16 = 1 << 7;
const TIMESTAMP: u16 = 1 << 6;
const TYPE: u16 = 1 << 5;
const APP_ID: u16 = 1 << 3;

/// A frame of the broker's.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    /// `basic.ack` or `basic.nack` on our channel.
    Confirm { tag: u64, multiple: bool, acked: bool },
    /// Any other method, with its channel.
    Method(u16, Box<AMQPClass>),
    /// The properties of a message handed back.
    Header(u16, Box<AMQPContentHeader>),
    /// So many bytes of its body.
    Body(u16, usize),
    /// The broker lives.
    Heartbeat,
}

/// Writes a message.
///
/// # Errors
/// [`BrokerError::ChannelClosed`] with 406, as a broker would answer, for what AMQP cannot carry: a name over 255 bytes,
/// headers over a frame. Nothing is written then.
pub(super) fn publish(
    out: &mut Vec<u8>,
    exchange: &str,
    envelope: &Envelope,
    frame_max: usize,
) -> Result<(), BrokerError> {
    let (message, position) = (&envelope.message, &envelope.position);
    let content = Content {
        exchange,
        topic: &message.topic,
        mandatory: true,
        content_type: &message.content_type,
        message_id: message.id.0,
        published_at_s: Some(message.published_at_s),
        source: position.source,
        body: &message.body,
    };
    content.write(out, frame_max, |out, source| {
        for (name, value) in &message.headers {
            let ours = match name.as_str() {
                header::SOURCE | header::STREAM | header::OFFSET | header::ORDINAL => true,
                header::KEY => message.key.is_some(),
                _ => false,
            };
            if !ours {
                short(out, name)?;
                put_value(out, value)?;
            }
        }
        put_text(out, header::SOURCE, source);
        put_text(out, header::STREAM, &position.stream);
        put_int(out, header::OFFSET, position.offset);
        put_int(out, header::ORDINAL, envelope.ordinal);
        if let Some(key) = &message.key {
            put_text(out, header::KEY, key);
        }
        Ok(())
    })
}

/// Writes a void notice.
///
/// # Errors
/// As [`publish`].
pub(super) fn publish_void(
    out: &mut Vec<u8>,
    exchange: &str,
    void: &Void,
    frame_max: usize,
) -> Result<(), BrokerError> {
    let content = Content {
        exchange,
        topic: &void.topic,
        mandatory: false,
        content_type: "application/json",
        message_id: void.message_id.0,
        published_at_s: None,
        source: void.position.source,
        body: b"{}",
    };
    content.write(out, frame_max, |out, source| {
        put_text(out, header::SOURCE, source);
        put_text(out, header::STREAM, &void.position.stream);
        put_int(out, header::OFFSET, void.position.offset);
        put_text(out, header::VOID, &void.reason);
        Ok(())
    })
}

/// Writes a method.
pub(super) fn method(out: &mut Vec<u8>, channel: u16, class: AMQPClass) {
    frame(out, &AMQPFrame::Method(channel, class));
}

/// Writes a heartbeat.
pub(super) fn heartbeat(out: &mut Vec<u8>) {
    frame(out, &AMQPFrame::Heartbeat);
}

fn frame(out: &mut Vec<u8>, frame: &AMQPFrame) {
    let written = gen_frame(frame)(WriteContext::from(Vec::new()));
    out.extend(written.expect("a vector takes every frame").into_inner().0);
}

/// Reads the first frame of what the broker sent, and how many bytes it took; none if it is not all there.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn read(input: &[u8], frame_max: usize) -> Result<Option<(Frame, usize)>, String> {
    let Some((head, rest)) = input.split_first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let kinds = [constants::FRAME_METHOD, constants::FRAME_HEADER, constants::FRAME_BODY, constants::FRAME_HEARTBEAT];
    if !kinds.contains(&head[0]) {
        return Err(format!("the broker sent a frame of the unknown type {}: it does not speak AMQP 0-9-1", head[0]));
    }
    let channel = u16::from_be_bytes([head[1], head[2]]);
    let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
    if size.saturating_add(OVERHEAD_BYTES) > frame_max {
        return Err(format!("the broker sent a frame of {size} bytes, over the {frame_max} agreed on"));
    }
    if rest.len() <= size {
        return Ok(None);
    }
    let (payload, end) = (&rest[..size], rest[size]);
    if end != constants::FRAME_END {
        return Err("the broker sent a frame without its end".to_owned());
    }
    let frame = match head[0] {
        constants::FRAME_METHOD => match confirm(payload).filter(|_| channel == CHANNEL) {
            Some(confirm) => confirm,
            None => match parse_class(payload) {
                Ok(([], class)) => Frame::Method(channel, Box::new(class)),
                _ => return Err("the broker sent a method that cannot be read".to_owned()),
            },
        },
        constants::FRAME_HEADER => match parse_content_header(payload) {
            Ok(([], header)) => Frame::Header(channel, Box::new(header)),
            _ => return Err("the broker sent properties that cannot be read".to_owned()),
        },
        constants::FRAME_BODY => Frame::Body(channel, size),
        _ => Frame::Heartbeat,
    };
    Ok(Some((frame, size + OVERHEAD_BYTES)))
}

/// A confirm, if the method is one: class, method, delivery tag, flags.
fn confirm(payload: &[u8]) -> Option<Frame> {
    let (head, rest) = payload.split_first_chunk::<4>()?;
    let (tag, flags) = rest.split_first_chunk::<8>()?;
    let [flags] = flags else { return None };
    let acked = match (u16::from_be_bytes([head[0], head[1]]), u16::from_be_bytes([head[2], head[3]])) {
        (BASIC, BASIC_ACK) => true,
        (BASIC, BASIC_NACK) => false,
        _ => return None,
    };
    Some(Frame::Confirm { tag: u64::from_be_bytes(*tag), multiple: flags & MULTIPLE != 0, acked })
}

/// What messages and notices have in common on the wire.
struct Content<'a> {
    exchange: &'a str,
    topic: &'a str,
    mandatory: bool,
    content_type: &'a str,
    message_id: Uuid,
    published_at_s: Option<u64>,
    source: Uuid,
    body: &'a [u8],
}

impl Content<'_> {
    /// Writes the frames, or nothing.
    fn write(
        &self,
        out: &mut Vec<u8>,
        frame_max: usize,
        headers: impl FnOnce(&mut Vec<u8>, &str) -> Result<(), BrokerError>,
    ) -> Result<(), BrokerError> {
        let before = out.len();
        let written = self.write_heads(out, frame_max, headers);
        if written.is_err() {
            out.truncate(before);
            return written;
        }
        for part in self.body.chunks(frame_max - OVERHEAD_BYTES) {
            let payload = open(out, constants::FRAME_BODY);
            out.extend_from_slice(part);
            close(out, payload);
        }
        Ok(())
    }

    fn write_heads(
        &self,
        out: &mut Vec<u8>,
        frame_max: usize,
        headers: impl FnOnce(&mut Vec<u8>, &str) -> Result<(), BrokerError>,
    ) -> Result<(), BrokerError> {
        let payload = open(out, constants::FRAME_METHOD);
        put(out, BASIC.to_be_bytes());
        put(out, BASIC_PUBLISH.to_be_bytes());
        // A field of older versions.
        put(out, [0; 2]);
        short(out, self.exchange)?;
        short(out, self.topic)?;
        out.push(if self.mandatory { MANDATORY } else { 0 });
        close(out, payload);

        let timestamp = if self.published_at_s.is_some() { TIMESTAMP } else { 0 };
        let flags = CONTENT_TYPE | HEADERS | DELIVERY_MODE | MESSAGE_ID | timestamp | TYPE | APP_ID;
        let (mut id, mut source) = ([0; 36], [0; 36]);
        let id = self.message_id.hyphenated().encode_lower(&mut id);
        let source = self.source.hyphenated().encode_lower(&mut source);
        let payload = open(out, constants::FRAME_HEADER);
        put(out, BASIC.to_be_bytes());
        // A weight, which AMQP never gave a meaning.
        put(out, [0; 2]);
        put(out, (self.body.len() as u64).to_be_bytes());
        put(out, flags.to_be_bytes());
        short(out, self.content_type)?;
        let table = open_length(out);
        headers(out, source)?;
        close_length(out, table);
        out.push(PERSISTENT);
        short(out, id)?;
        if let Some(seconds) = self.published_at_s {
            put(out, seconds.to_be_bytes());
        }
        short(out, self.topic)?;
        short(out, source)?;
        close(out, payload);
        let bytes = out.len() - payload + HEAD_BYTES;
        if bytes > frame_max {
            let text = format!("headers of {bytes} bytes where the broker takes {frame_max} in a frame");
            return Err(BrokerError::ChannelClosed { code: 406, text });
        }
        Ok(())
    }
}

/// Begins a frame; answers where its payload begins.
fn open(out: &mut Vec<u8>, kind: u8) -> usize {
    out.push(kind);
    put(out, CHANNEL.to_be_bytes());
    open_length(out)
}

fn close(out: &mut Vec<u8>, payload: usize) {
    close_length(out, payload);
    out.push(constants::FRAME_END);
}

/// Leaves room for the length of what follows; answers where that begins.
fn open_length(out: &mut Vec<u8>) -> usize {
    put(out, [0; 4]);
    out.len()
}

fn close_length(out: &mut [u8], start: usize) {
    let length = (out.len() - start) as u32;
    out[start - 4..start].copy_from_slice(&length.to_be_bytes());
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N]) {
    out.extend_from_slice(&bytes);
}

fn short(out: &mut Vec<u8>, text: &str) -> Result<(), BrokerError> {
    let length = u8::try_from(text.len()).map_err(|_| too_long(text))?;
    out.push(length);
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn long(out: &mut Vec<u8>, text: &str) {
    put(out, (text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The name of a header of ours.
fn put_name(out: &mut Vec<u8>, name: &'static str) {
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
}

fn put_text(out: &mut Vec<u8>, name: &'static str, value: &str) {
    put_name(out, name);
    out.push(b'S');
    long(out, value);
}

fn put_int(out: &mut Vec<u8>, name: &'static str, value: i64) {
    put_name(out, name);
    out.push(b'l');
    put(out, value.to_be_bytes());
}

/// A header's value behind the letter of its type.
fn put_value(out: &mut Vec<u8>, value: &Value) -> Result<(), BrokerError> {
    match value {
        Value::Null => out.push(b'V'),
        Value::Bool(value) => put(out, [b't', u8::from(*value)]),
        Value::Number(number) => match number.as_i64() {
            Some(int) => {
                out.push(b'l');
                put(out, int.to_be_bytes());
            }
            None => {
                out.push(b'd');
                put(out, number.as_f64().expect("a JSON number is an int64 or has a double").to_be_bytes());
            }
        },
        Value::String(text) => {
            out.push(b'S');
            long(out, text);
        }
        Value::Array(values) => {
            out.push(b'A');
            let start = open_length(out);
            for value in values {
                put_value(out, value)?;
            }
            close_length(out, start);
        }
        Value::Object(entries) => {
            out.push(b'F');
            let start = open_length(out);
            for (name, value) in entries {
                short(out, name)?;
                put_value(out, value)?;
            }
            close_length(out, start);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::rabbitmq::wire;
    use crate::message::{Headers, Message, MessageId, Position};
    use amq_protocol::frame::parse_frame;
    use amq_protocol::protocol::{BasicProperties, basic, connection};
    use proptest::prelude::*;
    use serde_json::Number;

    const MEDIUM: usize = 4_096;

    /// What the codec reads: the publish, its properties, its body; no frame over the limit.
    fn parse(mut bytes: &[u8], frame_max: usize) -> (basic::Publish, BasicProperties, Vec<u8>) {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).expect("the codec reads it");
            assert!(bytes.len() - rest.len() <= frame_max, "a frame of {} bytes", bytes.len() - rest.len());
            frames.push(frame);
            bytes = rest;
        }
        let mut frames = frames.into_iter();
        let Some(AMQPFrame::Method(CHANNEL, AMQPClass::Basic(basic::AMQPMethod::Publish(publish)))) = frames.next()
        else {
            panic!("no publish")
        };
        let Some(AMQPFrame::Header(CHANNEL, header)) = frames.next() else { panic!("no properties") };
        let mut body = Vec::new();
        for frame in frames {
            let AMQPFrame::Body(CHANNEL, part) = frame else { panic!("{frame:?}") };
            body.extend(part);
        }
        assert_eq!((header.class_id, header.body_size), (BASIC, body.len() as u64));
        (publish, header.properties, body)
    }

    fn text(longest: usize) -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "\\PC{0,12}",
            1 => (0..=longest).prop_map(|length| "x".repeat(length)),
        ]
    }

    fn header_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(|value| Number::from_f64(value).map_or(Value::Null, Value::Number)),
            text(6_000).prop_map(Value::String),
        ];
        leaf.prop_recursive(2, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
                prop::collection::btree_map(text(300), inner, 0..4)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    fn headers() -> impl Strategy<Value = Headers> {
        let ours = prop::sample::select(vec![
            header::SOURCE,
            header::STREAM,
            header::OFFSET,
            header::ORDINAL,
            header::KEY,
            header::VOID,
        ]);
        let name = prop_oneof![6 => text(255), 1 => ours.prop_map(str::to_owned), 1 => text(300)];
        let plain = |name: String, value: Value| match name.starts_with("oncebox-") {
            // What is overwritten is not looked at: nothing in it is refused.
            true => (name, Value::Null),
            false => (name, value),
        };
        prop::collection::btree_map(name, header_value(), 0..6)
            .prop_map(move |headers| headers.into_iter().map(|(name, value)| plain(name, value)).collect())
    }

    prop_compose! {
        fn envelope()(
            (id, source) in any::<(u128, u128)>(),
            topic in text(260),
            key in prop::option::of(text(3_000)),
            content_type in text(260),
            headers in headers(),
            body in (0usize..9_000, any::<u8>()),
            frames in prop_oneof![4 => Just(0), 1 => 0usize..3],
            (offset, ordinal, published_at_s) in any::<(i64, i64, u64)>(),
        ) -> (Envelope, usize) {
            let message = Message {
                id: MessageId(Uuid::from_u128(id)),
                topic: topic.clone(),
                key,
                content_type,
                headers,
                body: vec![body.1; body.0],
                published_at_s,
            };
            let position = Position { source: Uuid::from_u128(source), stream: format!("{topic}#0"), offset };
            (Envelope { message, position, ordinal }, frames)
        }
    }

    proptest! {
        // Goal: whatever the message, the wire says what `wire::properties` says, in frames the broker takes; what AMQP
        // cannot carry is refused as a broker refuses it, and leaves no byte behind.
        #[test]
        fn what_is_written_is_what_the_codec_reads(
            (mut envelope, frames) in envelope(),
            frame_max in prop_oneof![Just(MEDIUM), Just(131_072), MEDIUM..=131_072],
            over in -1i64..=1,
        ) {
            if frames > 0 {
                // Around the edge of a frame.
                let length = (frames * (frame_max - OVERHEAD_BYTES)) as i64 + over;
                envelope.message.body = vec![7; length as usize];
            }
            let mut out = b"before".to_vec();
            let written = publish(&mut out, "oncebox", &envelope, frame_max);
            let expected = wire::properties(&envelope).ok().filter(|properties| {
                let header = AMQPContentHeader { class_id: BASIC, body_size: 0, properties: properties.clone() };
                let mut bytes = Vec::new();
                frame(&mut bytes, &AMQPFrame::Header(CHANNEL, header));
                bytes.len() <= frame_max
            });
            match (written, expected) {
                (Ok(()), Some(expected)) => {
                    let (method, properties, body) = parse(&out[6..], frame_max);
                    prop_assert_eq!(properties, expected);
                    prop_assert_eq!(method.exchange.as_str(), "oncebox");
                    prop_assert_eq!(method.routing_key.as_str(), envelope.message.topic.as_str());
                    prop_assert!(method.mandatory && !method.immediate);
                    prop_assert_eq!(body, envelope.message.body);
                }
                (Err(BrokerError::ChannelClosed { code: 406, .. }), None) => prop_assert_eq!(out, b"before"),
                (written, expected) => prop_assert!(false, "{:?} where {:?}", written, expected),
            }
        }

        // Goal: a void notice likewise; it asks for no return.
        #[test]
        fn a_notice_is_what_the_codec_reads(
            topic in text(260), reason in text(3_000), ids in any::<(u128, u128)>(), offset in any::<i64>(),
        ) {
            let position = Position { source: Uuid::from_u128(ids.0), stream: format!("{topic}#0"), offset };
            let void = Void { position, topic, message_id: MessageId(Uuid::from_u128(ids.1)), reason };
            let mut out = Vec::new();
            match (publish_void(&mut out, "oncebox.void", &void, 131_072), wire::void_properties(&void)) {
                (Ok(()), Ok(expected)) => {
                    let (method, properties, body) = parse(&out, 131_072);
                    prop_assert_eq!((properties, body), (expected, b"{}".to_vec()));
                    prop_assert_eq!((method.exchange.as_str(), method.mandatory), ("oncebox.void", false));
                    prop_assert_eq!(method.routing_key.as_str(), void.topic.as_str());
                }
                (written, expected) => prop_assert!(written.is_err() && expected.is_err() && out.is_empty()),
            }
        }

        // Goal: confirms are read as the codec writes them, and a frame that is not all there is waited for.
        #[test]
        fn confirms_are_read_as_the_codec_writes_them(
            tag in any::<u64>(), multiple in any::<bool>(), requeue in any::<bool>(), acked in any::<bool>(), cut in 0usize..21,
        ) {
            let confirm = match acked {
                true => basic::AMQPMethod::Ack(basic::Ack { delivery_tag: tag, multiple }),
                false => basic::AMQPMethod::Nack(basic::Nack { delivery_tag: tag, multiple, requeue }),
            };
            let mut bytes = Vec::new();
            method(&mut bytes, CHANNEL, AMQPClass::Basic(confirm));
            prop_assert_eq!(bytes.len(), 21);
            prop_assert_eq!(read(&bytes[..cut], MEDIUM), Ok(None));
            heartbeat(&mut bytes);
            prop_assert_eq!(read(&bytes, MEDIUM), Ok(Some((Frame::Confirm { tag, multiple, acked }, 21))));
            prop_assert_eq!(read(&bytes[21..], MEDIUM), Ok(Some((Frame::Heartbeat, 8))));
        }

        // Goal: no bytes make the reader fail otherwise than with an error, or take more than there are.
        #[test]
        fn any_bytes_are_read_or_refused(
            kind in 0u8..10, size in 0u32..40, bytes in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut input = vec![kind, 0, 1];
            input.extend(size.to_be_bytes());
            input.extend(bytes);
            input.push(constants::FRAME_END);
            if let Ok(Some((_, taken))) = read(&input, MEDIUM) {
                prop_assert_eq!(taken, size as usize + OVERHEAD_BYTES);
                prop_assert!(taken <= input.len());
            }
        }
    }

    // Goal: what no AMQP peer sends is named, before it is waited for.
    #[test]
    fn broken_frames_are_named() {
        let mut tune = Vec::new();
        let values = connection::TuneOk { channel_max: 1, frame_max: 4_096, heartbeat: 10 };
        method(&mut tune, 0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(values)));
        assert!(matches!(read(&tune, MEDIUM), Ok(Some((Frame::Method(0, _), _)))));
        let with = |at: usize, byte: u8| {
            let mut broken = tune.clone();
            broken[at] = byte;
            read(&broken, MEDIUM).expect_err("it is broken")
        };
        assert!(with(0, 9).contains("type 9"));
        assert!(with(5, 0x10).contains("over the 4096"), "{}", with(5, 0x10));
        assert!(with(tune.len() - 1, 0).contains("without its end"));
        assert!(with(8, 99).contains("cannot be read"));
        assert!(read(b"HTTP/1.1 400 Bad Request", MEDIUM).is_err());
    }
}
