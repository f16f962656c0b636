//! A saga as a graph: its steps, which waits for which, and where each stands. Pure; for pictures.

use super::definition::{Definition, Work};
use super::read::Detail;
use super::state::{CompensationStatus, SagaStatus, StepStatus};
use serde::Serialize;
use std::fmt::Write;
use utoipa::ToSchema;
use uuid::Uuid;

/// A saga's steps and their order.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Graph {
    /// The saga.
    #[schema(example = "01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10")]
    pub id: Uuid,
    /// Where it stands.
    pub status: SagaStatus,
    /// Of the newest change that is shown.
    #[schema(example = 7)]
    pub seq: i64,
    /// The steps, in the order of the definition.
    pub nodes: Vec<Node>,
    /// Which step waits for which.
    pub edges: Vec<Edge>,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// Sends a command.
    Command,
    /// Waits for a signal.
    Wait,
    /// Was done by a participant that enlisted it.
    Enlisted,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Node {
    /// Its id in the definition.
    #[schema(example = "reserve")]
    pub id: String,
    /// What it does.
    pub kind: NodeKind,
    /// Where its command goes.
    #[schema(example = "stock.reserve")]
    pub topic: Option<String>,
    /// The signal it waits for.
    pub signal: Option<String>,
    /// Where the command goes that undoes it.
    #[schema(example = "stock.release")]
    pub undo_topic: Option<String>,
    /// When it succeeded there is no way back.
    pub pivot: bool,
    /// Where it stands.
    pub status: StepStatus,
    /// Where its compensation stands.
    pub compensation: Option<CompensationStatus>,
}

/// One step waits for another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Edge {
    /// The one that comes first.
    #[schema(example = "reserve")]
    pub from: String,
    /// The one that waits for it.
    #[schema(example = "charge")]
    pub to: String,
}

impl Graph {
    /// The graph of a saga; without a definition its steps were enlisted, each after the one before.
    pub fn new(saga: &Detail, definition: Option<&Definition>) -> Self {
        let mut nodes = Vec::with_capacity(saga.steps.len());
        let mut edges = Vec::new();
        for (place, step) in saga.steps.iter().enumerate() {
            let defined = definition.and_then(|definition| definition.steps.iter().find(|other| other.id == step.id));
            let (kind, topic, signal) = match defined.map(|defined| &defined.work) {
                Some(Work::Command(command)) => (NodeKind::Command, Some(command.topic.clone()), None),
                Some(Work::Wait { signal, .. }) => (NodeKind::Wait, None, Some(signal.clone())),
                None => (NodeKind::Enlisted, None, None),
            };
            nodes.push(Node {
                id: step.id.clone(),
                kind,
                topic,
                signal,
                undo_topic: defined.and_then(|defined| Some(defined.undo.as_ref()?.topic.clone())),
                pivot: step.pivot,
                status: step.status,
                compensation: step.compensation,
            });
            let before: Vec<&str> = match (definition, defined) {
                (Some(definition), Some(defined)) => {
                    defined.after.iter().filter_map(|at| Some(definition.steps.get(*at)?.id.as_str())).collect()
                }
                _ => place.checked_sub(1).map(|at| saga.steps[at].id.as_str()).into_iter().collect(),
            };
            edges.extend(before.into_iter().map(|from| Edge { from: from.to_owned(), to: step.id.clone() }));
        }
        Self { id: saga.summary.id, status: saga.summary.status, seq: saga.summary.seq, nodes, edges }
    }

    /// The same in Graphviz' language.
    pub fn dot(&self) -> String {
        let mut dot =
            format!("digraph {} {{\n  rankdir=LR;\n  node [shape=box, style=filled];\n", quoted(&self.id.to_string()));
        for node in &self.nodes {
            let what = node.topic.as_deref().or(node.signal.as_deref()).unwrap_or_default();
            let label = format!("{}\n{what}\n{}", node.id, node.status.as_str());
            // Writing to a string cannot fail.
            let _ = writeln!(
                dot,
                "  {} [label={}, fillcolor={}{}];",
                quoted(&node.id),
                quoted(&label),
                color(node.status),
                if node.pivot { ", peripheries=2" } else { "" }
            );
        }
        for edge in &self.edges {
            let _ = writeln!(dot, "  {} -> {};", quoted(&edge.from), quoted(&edge.to));
        }
        dot.push_str("}\n");
        dot
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn color(status: StepStatus) -> &'static str {
    use StepStatus::*;
    match status {
        Pending | Skipped => "white",
        Dispatched | Undoing => "lightblue",
        Succeeded => "palegreen",
        Backoff | UndoBackoff => "khaki",
        Failed | Unknown | UndoStuck => "lightsalmon",
        Undone | UndoNoop | UndoSkipped => "lightgray",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saga::definition::{CommandTemplate, DEFAULT_RETRY, DEFAULT_TIMEOUT_MS, DEFAULT_UNDO_RETRY};
    use crate::saga::definition::{OnExhausted, StepDefinition};
    use crate::saga::read::{Step, Summary};
    use crate::saga::state::Phase;
    use serde_json::{Map, Value, value::RawValue};

    fn detail(steps: &[&str]) -> Detail {
        let step = |id: &&str| Step {
            id: (*id).to_owned(),
            status: StepStatus::Succeeded,
            pivot: *id == "pay",
            epoch: 1,
            attempt: 1,
            message_id: None,
            due_at: None,
            output: None,
            error: None,
            dispatched_at: None,
            changed_at: String::new(),
            compensation: None,
        };
        Detail {
            summary: Summary {
                id: Uuid::nil(),
                definition: None,
                version: None,
                business_key: "k".to_owned(),
                status: SagaStatus::Running,
                phase: Phase::Forward,
                paused: false,
                cancel: None,
                reason: None,
                seq: 3,
                labels: Map::new(),
                created_at: String::new(),
                start_at: None,
                deadline: None,
                changed_at: String::new(),
                ended_at: None,
                next_due: None,
            },
            input: RawValue::from_string("{}".to_owned()).expect("JSON"),
            steps: steps.iter().map(step).collect(),
            signals: Vec::new(),
        }
    }

    fn definition() -> Definition {
        let step = |id: &str, after: Vec<usize>, work: Work| StepDefinition {
            id: id.to_owned(),
            after,
            work,
            pivot: id == "pay",
            timeout_ms: DEFAULT_TIMEOUT_MS,
            retry: DEFAULT_RETRY,
            undo: None,
            undo_retry: DEFAULT_UNDO_RETRY,
            on_undo_exhausted: OnExhausted::Stuck,
        };
        let command = |topic: &str| Work::Command(CommandTemplate { topic: topic.to_owned(), body: Value::Null });
        Definition {
            name: "order".to_owned(),
            version: 1,
            deadline_ms: None,
            steps: vec![
                step("a", vec![], command("x.a")),
                step("b\"", vec![], Work::Wait { signal: "go".to_owned(), timeout_ms: None }),
                step("pay", vec![0, 1], command("x.pay")),
            ],
        }
    }

    /// Goal: edges are those of the definition, and a saga without one is a chain.
    #[test]
    fn edges_follow_the_definition() {
        let saga = detail(&["a", "b\"", "pay"]);
        let edges = |graph: &Graph| {
            graph.edges.iter().map(|edge| format!("{}>{}", edge.from, edge.to)).collect::<Vec<_>>().join(" ")
        };
        let graph = Graph::new(&saga, Some(&definition()));
        assert_eq!(edges(&graph), "a>pay b\">pay");
        assert_eq!(graph.nodes[1].signal.as_deref(), Some("go"));
        assert_eq!(graph.nodes[2].topic.as_deref(), Some("x.pay"));
        let chain = Graph::new(&saga, None);
        assert_eq!(edges(&chain), "a>b\" b\">pay");
        assert_eq!(chain.nodes[0].kind, NodeKind::Enlisted);
    }

    /// Goal: no name of a step breaks out of its quotes.
    #[test]
    fn names_stay_in_their_quotes() {
        let dot = Graph::new(&detail(&["a", "b\"", "pay"]), Some(&definition())).dot();
        assert!(dot.contains("  \"b\\\"\" [label=\"b\\\"\\ngo\\nsucceeded\", fillcolor=palegreen];\n"), "{dot}");
        assert!(dot.contains("  \"b\\\"\" -> \"pay\";\n") && dot.contains("peripheries=2"), "{dot}");
    }
}
