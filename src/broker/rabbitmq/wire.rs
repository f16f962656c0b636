//! Messages as AMQP properties and headers, and back.

use crate::broker::BrokerError;
#[cfg(test)]
use crate::message::Void;
use crate::message::{Delivery, Envelope, Headers, header};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, ShortString};
use serde_json::{Number, Value};
use uuid::Uuid;

/// AMQP's `delivery_mode` of a message that survives a restart.
pub(super) const PERSISTENT: u8 = 2;

/// Where a returned message stood: enough to tell it from every other one in flight.
pub(super) type Place = (Uuid, String, i64);

/// The properties and headers of a message of ours.
///
/// # Errors
/// [`BrokerError::ChannelClosed`] with 406, as a broker would answer, for a name AMQP cannot carry.
pub(crate) fn properties(envelope: &Envelope) -> Result<BasicProperties, BrokerError> {
    let (message, position) = (&envelope.message, &envelope.position);
    let source = position.source.to_string();
    let mut headers = FieldTable::default();
    for (name, value) in &message.headers {
        headers.insert(short(name)?, to_amqp(value)?);
    }
    headers.insert(header::SOURCE.into(), AMQPValue::LongString(source.as_str().into()));
    headers.insert(header::STREAM.into(), AMQPValue::LongString(position.stream.as_str().into()));
    headers.insert(header::OFFSET.into(), AMQPValue::LongLongInt(position.offset));
    headers.insert(header::ORDINAL.into(), AMQPValue::LongLongInt(envelope.ordinal));
    if let Some(key) = &message.key {
        headers.insert(header::KEY.into(), AMQPValue::LongString(key.as_str().into()));
    }
    Ok(BasicProperties::default()
        .with_content_type(short(&message.content_type)?)
        .with_headers(headers)
        .with_delivery_mode(PERSISTENT)
        .with_message_id(short(&message.id.to_string())?)
        .with_timestamp(message.published_at_s)
        .with_type(short(&message.topic)?)
        .with_app_id(short(&source)?))
}

/// The properties and headers of a void notice, as a reference for what is written.
#[cfg(test)]
pub(super) fn void_properties(void: &Void) -> Result<BasicProperties, BrokerError> {
    let source = void.position.source.to_string();
    let mut headers = FieldTable::default();
    headers.insert(header::SOURCE.into(), AMQPValue::LongString(source.as_str().into()));
    headers.insert(header::STREAM.into(), AMQPValue::LongString(void.position.stream.as_str().into()));
    headers.insert(header::OFFSET.into(), AMQPValue::LongLongInt(void.position.offset));
    headers.insert(header::VOID.into(), AMQPValue::LongString(void.reason.as_str().into()));
    Ok(BasicProperties::default()
        .with_content_type(short("application/json")?)
        .with_headers(headers)
        .with_delivery_mode(PERSISTENT)
        .with_message_id(short(&void.message_id.to_string())?)
        .with_type(short(&void.topic)?)
        .with_app_id(short(&source)?))
}

/// A short string, or the 406 that a broker answers to what it cannot accept.
fn short(text: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(text).map_err(|_| too_long(text))
}

/// What a text over 255 bytes is refused with where AMQP has a short string.
pub(super) fn too_long(text: &str) -> BrokerError {
    BrokerError::ChannelClosed {
        code: 406,
        text: format!("{} bytes where AMQP allows 255: \"{}…\"", text.len(), text.chars().take(40).collect::<String>()),
    }
}

/// The delivery as the consumer sees it.
pub(super) fn delivery(delivery: lapin::message::Delivery) -> Delivery {
    let properties = &delivery.properties;
    Delivery {
        tag: delivery.delivery_tag,
        message_id: properties.message_id().as_ref().map(ToString::to_string),
        topic: delivery.routing_key.into(),
        content_type: properties.content_type().as_ref().map(ToString::to_string),
        headers: properties.headers().as_ref().map(headers).unwrap_or_default(),
        body: delivery.data,
        redelivered: delivery.redelivered,
    }
}

/// The place of a message the broker handed back, when it is one of ours.
pub(super) fn place(properties: &BasicProperties) -> Option<Place> {
    let headers = properties.headers().as_ref()?.inner();
    match (headers.get(header::SOURCE)?, headers.get(header::STREAM)?, headers.get(header::OFFSET)?) {
        (AMQPValue::LongString(source), AMQPValue::LongString(stream), AMQPValue::LongLongInt(offset)) => {
            Some((Uuid::try_parse_ascii(source.as_bytes()).ok()?, stream.to_string(), *offset))
        }
        _ => None,
    }
}

fn headers(table: &FieldTable) -> Headers {
    table.inner().iter().map(|(name, value)| (name.to_string(), to_json(value))).collect()
}

fn to_amqp(value: &Value) -> Result<AMQPValue, BrokerError> {
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(value) => AMQPValue::Boolean(*value),
        Value::Number(number) => match number.as_i64() {
            Some(int) => AMQPValue::LongLongInt(int),
            None => AMQPValue::Double(number.as_f64().expect("a JSON number is an int64 or has a double")),
        },
        Value::String(text) => AMQPValue::LongString(text.as_str().into()),
        Value::Array(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(to_amqp).collect::<Result<Vec<_>, _>>()?))
        }
        Value::Object(entries) => {
            let mut table = FieldTable::default();
            for (name, value) in entries {
                table.insert(short(name)?, to_amqp(value)?);
            }
            AMQPValue::FieldTable(table)
        }
    })
}

/// Doubles that JSON has no word for (NaN, infinities) become null.
fn to_json(value: &AMQPValue) -> Value {
    let double = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    match value {
        AMQPValue::Boolean(value) => Value::Bool(*value),
        AMQPValue::ShortShortInt(value) => (*value).into(),
        AMQPValue::ShortShortUInt(value) => (*value).into(),
        AMQPValue::ShortInt(value) => (*value).into(),
        AMQPValue::ShortUInt(value) => (*value).into(),
        AMQPValue::LongInt(value) => (*value).into(),
        AMQPValue::LongUInt(value) => (*value).into(),
        AMQPValue::LongLongInt(value) => (*value).into(),
        AMQPValue::Timestamp(value) => (*value).into(),
        AMQPValue::Float(value) => double(f64::from(*value)),
        AMQPValue::Double(value) => double(*value),
        AMQPValue::DecimalValue(value) => double(f64::from(value.value) / 10f64.powi(i32::from(value.scale))),
        AMQPValue::ShortString(value) => Value::String(value.to_string()),
        AMQPValue::LongString(value) => Value::String(String::from_utf8_lossy(value.as_bytes()).into_owned()),
        AMQPValue::ByteArray(value) => Value::String(String::from_utf8_lossy(value.as_slice()).into_owned()),
        AMQPValue::FieldArray(values) => Value::Array(values.as_slice().iter().map(to_json).collect()),
        AMQPValue::FieldTable(table) => Value::Object(headers(table)),
        AMQPValue::Void => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Message, MessageId, Position};
    use lapin::types::{DecimalValue, LongString};
    use serde_json::json;

    fn envelope(headers: Value) -> Envelope {
        Envelope {
            message: Message {
                id: MessageId(Uuid::from_u128(7)),
                topic: "order.placed".to_owned(),
                key: Some("k".to_owned()),
                content_type: "application/json".to_owned(),
                headers: headers.as_object().expect("an object").clone(),
                body: Vec::new(),
                published_at_s: 1_700_000_000,
            },
            position: Position { source: Uuid::from_u128(9), stream: "order.placed#0".to_owned(), offset: 3 },
            ordinal: 7,
        }
    }

    // Goal: every property of the contract is on the wire with its AMQP type.
    #[test]
    fn properties_follow_the_contract() {
        let headers = json!({"s": "é", "i": -5, "d": 1.5, "b": true, "whole": 2.0, "max": i64::MAX});
        let properties = properties(&envelope(headers)).expect("it fits");
        assert_eq!(properties.message_id().as_ref().map(ShortString::as_str), Some(&*Uuid::from_u128(7).to_string()));
        assert_eq!(properties.content_type().as_ref().map(ShortString::as_str), Some("application/json"));
        assert_eq!(properties.kind().as_ref().map(ShortString::as_str), Some("order.placed"));
        assert_eq!(properties.app_id().as_ref().map(ShortString::as_str), Some(&*Uuid::from_u128(9).to_string()));
        assert_eq!((*properties.timestamp(), *properties.delivery_mode()), (Some(1_700_000_000), Some(2)));
        let table = properties.headers().as_ref().expect("headers").inner();
        assert_eq!(table["s"], AMQPValue::LongString("é".into()));
        assert_eq!(table["i"], AMQPValue::LongLongInt(-5));
        assert_eq!(table["max"], AMQPValue::LongLongInt(i64::MAX));
        assert_eq!(table["d"], AMQPValue::Double(1.5));
        assert_eq!(table["whole"], AMQPValue::Double(2.0));
        assert_eq!(table["b"], AMQPValue::Boolean(true));
        assert_eq!(table[header::OFFSET], AMQPValue::LongLongInt(3));
        assert_eq!(table[header::ORDINAL], AMQPValue::LongLongInt(7));
        assert_eq!(table[header::KEY], AMQPValue::LongString("k".into()));
        assert_eq!(place(&properties), Some((Uuid::from_u128(9), "order.placed#0".to_owned(), 3)));
    }

    // Goal: what AMQP cannot carry is refused as a broker refuses it, where lapin would panic.
    #[test]
    fn a_name_over_255_bytes_is_refused() {
        let mut long = envelope(json!({}));
        long.message.content_type = "x".repeat(256);
        assert!(matches!(properties(&long), Err(BrokerError::ChannelClosed { code: 406, .. })));
    }

    // Goal: headers of other producers arrive as JSON, whatever their type.
    #[test]
    fn foreign_headers_become_json() {
        let mut inner = FieldTable::default();
        inner.insert("n".into(), AMQPValue::LongUInt(7));
        let all = [
            (AMQPValue::Timestamp(5), json!(5)),
            (AMQPValue::Void, json!(null)),
            (AMQPValue::Double(f64::NAN), json!(null)),
            (AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 125 }), json!(1.25)),
            (AMQPValue::LongString(LongString::from(vec![b'a', 0xff])), json!("a\u{fffd}")),
            (AMQPValue::FieldTable(inner), json!({"n": 7})),
            (AMQPValue::FieldArray(vec![AMQPValue::Boolean(false)].into()), json!([false])),
        ];
        for (value, expected) in all {
            assert_eq!(to_json(&value), expected);
        }
    }
}
