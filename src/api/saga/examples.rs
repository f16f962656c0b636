//! Examples of what these resources answer, for the description: one for each kind of body.

use serde_json::{Value, json};
use utoipa::Modify;
use utoipa::openapi::{Content, OpenApi, PathItem, RefOr, Schema};

/// Puts an example beside each body that has none.
pub(super) struct Examples;

impl Modify for Examples {
    fn modify(&self, description: &mut OpenApi) {
        for item in description.paths.paths.values_mut() {
            let PathItem { get, put, post, delete, .. } = item;
            for operation in [get, put, post, delete].into_iter().flatten() {
                for response in operation.responses.responses.values_mut() {
                    let RefOr::T(response) = response else { continue };
                    for content in response.content.values_mut() {
                        let RefOr::T(content) = content else { continue };
                        if content.example.is_none() {
                            content.example = schema(content).and_then(example);
                        }
                    }
                }
            }
        }
    }
}

/// Name of the body's schema.
fn schema(content: &Content) -> Option<&str> {
    match content.schema.as_ref()? {
        RefOr::<Schema>::Ref(reference) => reference.ref_location.rsplit('/').next(),
        RefOr::T(_) => None,
    }
}

fn example(schema: &str) -> Option<Value> {
    Some(match schema {
        "Saga" => saga(),
        "Listing_Summary" => {
            let mut summary = saga();
            if let Some(fields) = summary.as_object_mut() {
                fields.retain(|name, _| !["input", "steps", "signals", "allowed_actions"].contains(&name.as_str()));
            }
            json!({ "items": [summary], "next": null })
        }
        "Items_SagaStep" => json!({ "items": saga()["steps"] }),
        "Items_Compensation" => json!({ "items": [{
            "step": "reserve", "topic": "stock.release", "payload": { "id": 17 }, "status": "ready",
            "recorded_at": "2026-01-15T10:00:00.000000Z", "changed_at": "2026-01-15T10:00:00.250000Z",
        }]}),
        "Listing_HistoryRow" => json!({ "items": [{
            "seq": 2, "at": "2026-01-15T10:00:00.000000Z", "event": "due", "detail": {},
            "changes": { "saga": { "from": "scheduled", "to": "running" } }, "cause": null,
            "hash": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
        }], "next": null }),
        "Graph" => json!({
            "id": ID, "status": "running", "seq": 4,
            "nodes": [{
                "id": "reserve", "kind": "command", "topic": "stock.reserve", "signal": null,
                "undo_topic": "stock.release", "pivot": false, "status": "succeeded", "compensation": "ready",
            }, {
                "id": "charge", "kind": "command", "topic": "pay.charge", "signal": null, "undo_topic": null,
                "pivot": true, "status": "dispatched", "compensation": null,
            }],
            "edges": [{ "from": "reserve", "to": "charge" }],
        }),
        "Verified" => json!({
            "is_clean": true, "id": ID, "definition": "order", "business_key": "order-4711", "status": "running",
            "rows": 4, "commands": 2, "messages": 2, "barrier_rows": 1, "findings": [],
        }),
        "DefinitionSummary" => definition(),
        "Listing_DefinitionSummary" => json!({ "items": [definition()], "next": null }),
        "Valid" => json!({ "valid": true, "name": "order", "version": 3, "steps": ["reserve", "charge"] }),
        _ => return None,
    })
}

const ID: &str = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10";

fn definition() -> Value {
    json!({ "name": "order", "versions": [{
        "version": 3, "hash": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
        "created_at": "2026-01-15T09:00:00.000000Z", "created_by": "deploy",
    }]})
}

fn saga() -> Value {
    json!({
        "id": ID, "definition": "order", "version": 3, "business_key": "order-4711", "status": "running",
        "phase": "forward", "paused": false, "cancel": null, "reason": null, "seq": 4,
        "labels": { "customer": "17" }, "created_at": "2026-01-15T10:00:00.000000Z",
        "start_at": "2026-01-15T10:00:00.000000Z", "deadline": "2026-01-15T10:10:00.000000Z",
        "changed_at": "2026-01-15T10:00:00.250000Z", "ended_at": null, "next_due": "2026-01-15T10:00:30.250000Z",
        "input": { "sku": "a-1" },
        "steps": [{
            "id": "reserve", "status": "succeeded", "pivot": false, "epoch": 1, "attempt": 1,
            "message_id": "01932c07-4b00-7000-8000-000000000001", "due_at": null, "output": { "id": 17 },
            "error": null, "dispatched_at": "2026-01-15T10:00:00.000000Z",
            "changed_at": "2026-01-15T10:00:00.250000Z", "compensation": "ready", "allowed_actions": [],
        }, {
            "id": "charge", "status": "dispatched", "pivot": true, "epoch": 1, "attempt": 1,
            "message_id": "01932c07-4bfa-7000-8000-000000000002", "due_at": "2026-01-15T10:00:30.250000Z",
            "output": null, "error": null, "dispatched_at": "2026-01-15T10:00:00.250000Z",
            "changed_at": "2026-01-15T10:00:00.250000Z", "compensation": null, "allowed_actions": [],
        }],
        "signals": [], "allowed_actions": ["cancel", "pause"],
    })
}
