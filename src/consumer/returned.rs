//! What the broker hands back at the beginning of a session, put in order.
//!
//! RabbitMQ queues returned messages behind those returned earlier: after a consumer that held 1 to 4 and one that
//! held 1, the third gets 2, 3, 4, 1. All of them come before any message that was never delivered, and they are no
//! more than a prefetch. So nothing is handled before they are complete, and then they are sorted.

use crate::broker::{BrokerError, Subscription};
use crate::message::Delivery;
use std::time::Duration;

/// After such a pause the broker is asked whether more is to come.
const PAUSE: Duration = Duration::from_millis(200);
/// Pauses after which the session is given up: the next one begins anew.
const MAX_PAUSES: u32 = 25;

/// Collects what follows a session's first delivery for as long as it may be out of order, and puts it in order.
pub(super) async fn collect<S: Subscription>(
    subscription: &mut S,
    first: Delivery,
    prefetch: usize,
) -> Result<Vec<Delivery>, BrokerError> {
    let mut deliveries = vec![first];
    let mut pauses = 0;
    while deliveries.last().is_some_and(|last| last.redelivered) && deliveries.len() < prefetch {
        match tokio::time::timeout(PAUSE, subscription.next()).await {
            Ok(delivery) => deliveries.push(delivery?),
            Err(_) if subscription.ready().await? == 0 => break,
            Err(_) if pauses == MAX_PAUSES => {
                let limit = PAUSE * MAX_PAUSES;
                return Err(BrokerError::TimedOut { what: "the rest of the returned messages", limit });
            }
            Err(_) => pauses += 1,
        }
    }
    Ok(in_order(deliveries))
}

/// By the place in their lane; what other producers sent keeps its order, first.
fn in_order(mut deliveries: Vec<Delivery>) -> Vec<Delivery> {
    deliveries.sort_by(|a, b| a.lane_place().cmp(&b.lane_place()));
    deliveries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::header;
    use serde_json::json;

    fn delivery(tag: u64, ordinal: Option<i64>) -> Delivery {
        let headers = match ordinal {
            Some(ordinal) => json!({header::SOURCE: "s", header::STREAM: "t#0", header::ORDINAL: ordinal}),
            None => json!({}),
        };
        Delivery {
            tag,
            message_id: None,
            topic: "t".to_owned(),
            content_type: None,
            headers: headers.as_object().expect("an object").clone(),
            body: Vec::new(),
            redelivered: true,
        }
    }

    /// Goal: ours in the order of their lane, others in the order in which they came.
    #[test]
    fn returned_messages_are_sorted() {
        let came = [(1, Some(2)), (2, None), (3, Some(3)), (4, Some(1)), (5, None)];
        let sorted = in_order(came.into_iter().map(|(tag, ordinal)| delivery(tag, ordinal)).collect());
        let tags: Vec<u64> = sorted.iter().map(|delivery| delivery.tag).collect();
        assert_eq!(tags, [2, 5, 4, 1, 3]);
    }
}
