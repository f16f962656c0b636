//! A saga as a tree of its steps, in text: pure, so that it can be held against fixed drawings.
//!
//! ```text
//! ├─ ✓ reserve        succeeded    13:40:02.120  392 ms     1/5
//! │  └─ ↶ stock.release  ready
//! └─ ◐ charge ◆       dispatched   13:40:02.520  57.3 s …   2/5    until 13:43:35.000
//! ```

use super::text::{clean, cut, date_time, duration, wrap};
use super::view::{HistoryLine, Sent, StepView, View};
use crate::saga::state::{CompensationStatus, Millis, SagaStatus, StepStatus};
use serde_json::Value;

/// Narrowest and widest drawing: below a line breaks, beyond it the eye does.
const WIDTHS: (usize, usize) = (80, 120);
/// Longest name of a step in its column; the rest of it is an ellipsis.
const NAME_CHARS: usize = 26;
const STATUS_CHARS: usize = 12;
const TOOK_CHARS: usize = 10;
const TRIES_CHARS: usize = 5;
/// Lines of one error; the JSON has all of it.
const ERROR_LINES: usize = 4;

/// How to draw.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Columns of the terminal.
    pub width: usize,
    /// With colours.
    pub colour: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    Plain,
    Faint,
    Good,
    Moving,
    Bad,
    Back,
    Bold,
}

impl Ink {
    pub(super) fn of_saga(status: SagaStatus) -> Self {
        match status {
            SagaStatus::Completed => Self::Good,
            SagaStatus::Scheduled | SagaStatus::Running => Self::Moving,
            SagaStatus::Compensating | SagaStatus::Compensated => Self::Back,
            SagaStatus::Stuck | SagaStatus::Terminated => Self::Bad,
            SagaStatus::Cancelled => Self::Faint,
        }
    }

    fn of_step(status: StepStatus) -> Self {
        use StepStatus::*;
        match status {
            Pending | Skipped | UndoSkipped => Self::Faint,
            Succeeded => Self::Good,
            Dispatched | Backoff => Self::Moving,
            Failed | Unknown | UndoStuck => Self::Bad,
            Undoing | UndoBackoff | Undone | UndoNoop => Self::Back,
        }
    }

    fn of_undo(status: CompensationStatus) -> Self {
        use CompensationStatus::*;
        match status {
            Recorded | Ready | Released | Skipped => Self::Faint,
            Sent | Undone | Noop => Self::Back,
            Stuck => Self::Bad,
        }
    }
}

impl Style {
    /// Escape sequences around `text`, which is padded before: they have no width.
    pub(super) fn paint(self, text: &str, ink: Ink) -> String {
        let code = match ink {
            Ink::Plain => return text.to_owned(),
            _ if !self.colour || text.trim().is_empty() => return text.to_owned(),
            Ink::Faint => "2",
            Ink::Good => "32",
            Ink::Moving => "33",
            Ink::Bad => "31",
            Ink::Back => "36",
            Ink::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    fn columns(self) -> usize {
        self.width.clamp(WIDTHS.0, WIDTHS.1)
    }
}

fn mark(status: StepStatus) -> char {
    use StepStatus::*;
    match status {
        Pending => '○',
        Dispatched => '◐',
        Skipped | UndoSkipped => '–',
        Succeeded => '✓',
        Failed => '✗',
        Backoff => '◔',
        Unknown => '?',
        Undoing | UndoBackoff => '↶',
        Undone | UndoNoop => '↺',
        UndoStuck => '!',
    }
}

/// The whole drawing, each line ended.
pub fn draw(view: &View, style: Style) -> String {
    let mut lines = header(view, style);
    lines.push(String::new());
    if view.steps.is_empty() {
        lines.push("no steps yet".to_owned());
    }
    let columns = Columns::of(view, style);
    for (place, step) in view.steps.iter().enumerate() {
        step_lines(&columns, step, place + 1 == view.steps.len(), &mut lines);
    }
    if view.steps.iter().any(|step| step.pivot) {
        lines.push(style.paint("◆ the pivot: once it succeeded there is no way back", Ink::Faint));
    }
    lines.push(String::new());
    for (index, wait) in view.waits.iter().enumerate() {
        labelled(if index == 0 { "waits for" } else { "" }, wait, Ink::Plain, style, &mut lines);
    }
    let actions = if view.actions.is_empty() { "nothing: it is over".to_owned() } else { view.actions.join(", ") };
    labelled("you may", &actions, Ink::Plain, style, &mut lines);
    if let Some(history) = &view.history {
        lines.push(String::new());
        history.iter().for_each(|row| lines.extend(history_lines(row, view, style)));
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// One row of the history, and its continuation; also what `watch` prints.
pub(super) fn history_lines(row: &HistoryLine, view: &View, style: Style) -> Vec<String> {
    let head = format!("{:>4}  {}  ", row.seq, view.clock(row.at));
    let indent = head.chars().count();
    let mut lines = Vec::new();
    for (index, part) in wrap(&clean(&row.text), style.columns() - indent).into_iter().enumerate() {
        let start = if index == 0 { head.clone() } else { " ".repeat(indent) };
        lines.push(format!("{}{part}", style.paint(&start, Ink::Faint)));
    }
    lines
}

fn header(view: &View, style: Style) -> Vec<String> {
    let mut title = style.paint(&clean(&view.name()), Ink::Bold);
    let way = match (view.status, view.backward) {
        (SagaStatus::Stuck | SagaStatus::Terminated, true) => ", on its way back",
        (SagaStatus::Stuck | SagaStatus::Terminated, false) => ", on its way forward",
        _ => "",
    };
    title += &format!("  {}", style.paint(&format!("{}{way}", view.status.as_str()), Ink::of_saga(view.status)));
    if view.paused {
        title += &style.paint(", paused", Ink::Moving);
    }
    let mut lines = vec![title];
    let mut line = |name: &str, text: String, ink| labelled(name, &text, ink, style, &mut lines);
    line("id", view.id.to_string(), Ink::Plain);
    if let Some((definition, version)) = &view.definition {
        line("definition", format!("{definition} version {version}"), Ink::Plain);
    }
    if view.start_at > view.created_at {
        line("created", view.when(view.created_at), Ink::Plain);
    }
    match view.ended_at {
        Some(at) if at < view.start_at => line("ended", format!("{}, before it began", view.when(at)), Ink::Plain),
        Some(at) => {
            line("started", view.when(view.start_at), Ink::Plain);
            line("ended", format!("{}, after {}", view.when(at), duration(at - view.start_at)), Ink::Plain);
        }
        None => {
            let began = if view.start_at > view.now { "starts" } else { "started" };
            line(began, view.when(view.start_at), Ink::Plain);
            if let Some(at) = view.deadline {
                line("deadline", view.when(at), Ink::Plain);
            }
        }
    }
    if !view.labels.is_empty() {
        line("labels", view.labels.iter().map(label).collect::<Vec<_>>().join(", "), Ink::Plain);
    }
    if let Some(reason) = &view.reason {
        line("reason", reason.clone(), Ink::of_saga(view.status));
    }
    if let Some(cancel) = &view.cancel {
        line("cancel", format!("once the pivot's outcome is known: {cancel}"), Ink::Moving);
    }
    lines
}

fn label((name, value): (&String, &Value)) -> String {
    format!("{name}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// `  name      text`, the text wrapped.
fn labelled(name: &str, text: &str, ink: Ink, style: Style, lines: &mut Vec<String>) {
    const NAME: usize = 14;
    for (index, part) in wrap(&clean(text), style.columns() - NAME).into_iter().enumerate() {
        let name = if index == 0 { name } else { "" };
        lines.push(format!("{}{}", style.paint(&format!("  {name:<12}"), Ink::Faint), style.paint(&part, ink)));
    }
}

/// Widths that all lines of one tree share.
struct Columns<'v> {
    view: &'v View,
    style: Style,
    name: usize,
    time: usize,
}

impl<'v> Columns<'v> {
    fn of(view: &'v View, style: Style) -> Self {
        let longest = view.steps.iter().map(|step| {
            let own = step.id.chars().count() + if step.pivot { 2 } else { 0 };
            let undo = step.undo.as_ref().map_or(0, |undo| undo.topic.chars().count() + 3);
            own.max(undo)
        });
        let name = longest.max().unwrap_or(0).clamp(8, NAME_CHARS);
        Self { view, style, name, time: view.clock(view.now).chars().count() }
    }

    /// One line without its notes; the room that is left on it.
    fn row(&self, row: Row<'_>) -> (String, usize) {
        let pad = |text: &str, width: usize| " ".repeat(width.saturating_sub(text.chars().count()));
        let width = self.name - row.spent;
        let name = cut(&clean(row.name), width);
        let at = row.sent.at.map_or(String::new(), |at| self.view.clock(at));
        let took = match (row.sent.at, row.sent.answered_at) {
            (Some(from), Some(to)) => duration(to - from),
            (Some(from), None) if row.sent.under_way => format!("{} …", duration(self.view.now - from)),
            _ => String::new(),
        };
        let tries = match (row.sent.attempts, row.sent.max) {
            (0, _) => String::new(),
            (attempts, Some(max)) => format!("{attempts}/{max}"),
            (attempts, None) => attempts.to_string(),
        };
        let mut line =
            format!("{} {} {name}{}", row.branch, self.style.paint(&row.mark.to_string(), row.ink), pad(&name, width));
        line += &format!("  {}{}", self.style.paint(row.status, row.ink), pad(row.status, STATUS_CHARS));
        line += &format!(
            "  {at}{}  {took}{}  {tries}{}",
            pad(&at, self.time),
            pad(&took, TOOK_CHARS),
            pad(&tries, TRIES_CHARS)
        );
        let before_name = row.branch.chars().count() + 3;
        let taken = before_name + width + 2 + STATUS_CHARS + 2 + self.time + 2 + TOOK_CHARS + 2 + TRIES_CHARS;
        (line, self.style.columns().saturating_sub(taken))
    }
}

/// What a line of the tree says in its columns.
struct Row<'r> {
    branch: &'r str,
    mark: char,
    /// Columns that the branch takes beyond that of a step.
    spent: usize,
    name: &'r str,
    ink: Ink,
    status: &'r str,
    sent: &'r Sent,
}

fn step_lines(columns: &Columns<'_>, step: &StepView, is_last: bool, lines: &mut Vec<String>) {
    let style = columns.style;
    let (branch, trunk) = if is_last { ("└─", "   ") } else { ("├─", "│  ") };
    let name = format!("{}{}", step.id, if step.pivot { " ◆" } else { "" });
    let (ink, status) = (Ink::of_step(step.status), step.status.as_str());
    let row = Row { branch, mark: mark(step.status), spent: 0, name: &name, ink, status, sent: &step.sent };
    let (mut line, room) = columns.row(row);
    let below = |text: &str| format!("{trunk}{}{text}", if step.undo.is_some() { "│ " } else { "  " });
    let notes = clean(&step.notes.join(", "));
    if notes.chars().count() + 2 <= room {
        line += &format!("  {notes}");
        lines.push(line);
    } else {
        lines.push(line);
        lines.extend(wrap(&notes, style.columns() - 5).iter().map(|line| below(line)));
    }
    if let Some(error) = &step.error {
        let parts = wrap(&clean(error), style.columns() - 6);
        let more = parts.len() > ERROR_LINES;
        for (index, part) in parts.into_iter().take(ERROR_LINES).enumerate() {
            let end = if more && index + 1 == ERROR_LINES { "…" } else { "" };
            lines.push(below(&style.paint(&format!("{part}{end}"), Ink::Bad)));
        }
    }
    if let Some(undo) = &step.undo {
        let (branch, ink, status) = (format!("{trunk}└─"), Ink::of_undo(undo.status), undo.status.as_str());
        let row = Row { branch: &branch, mark: '↶', spent: 3, name: &undo.topic, ink, status, sent: &undo.sent };
        lines.push(columns.row(row).0);
    }
}

impl View {
    /// The time of day while all of the saga lies within one day, with month and day otherwise.
    pub(super) fn clock(&self, at: Millis) -> String {
        const DAY_MS: Millis = 86_400_000;
        let text = date_time(at);
        let last = self.ended_at.unwrap_or(self.now);
        match self.created_at.div_euclid(DAY_MS) == last.div_euclid(DAY_MS) {
            true => text.get(11..).unwrap_or(&text).to_owned(),
            false => text.get(5..).unwrap_or(&text).to_owned(),
        }
    }

    /// `2026-11-23 13:40:02.120 UTC (3 m 2 s ago)`.
    pub(super) fn when(&self, at: Millis) -> String {
        let text = date_time(at);
        match at > self.now {
            true => format!("{text} UTC (in {})", duration(at - self.now)),
            false => format!("{text} UTC ({} ago)", duration(self.now - at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::{Parts, View};
    use super::*;
    use crate::saga::definition::{CommandTemplate, Definition, Jitter, OnExhausted, Retry, StepDefinition, Work};
    use crate::saga::read::{Compensation, Detail, HistoryRow, Step, Summary};
    use crate::saga::state::Phase;
    use serde_json::value::RawValue;
    use serde_json::{Map, json};
    use uuid::Uuid;

    const PLAIN: Style = Style { width: 100, colour: false };

    const RUNNING: &str = r#"order/A-1042  running
  id          01934f2e-6d1c-7aaa-8bbb-000000000001
  definition  order version 3
  started     2026-11-23 13:40:02.000 UTC (3 m 8 s ago)
  deadline    2026-11-23 13:50:02.000 UTC (in 6 m 52 s)
  labels      region=eu

├─ ✓ reserve           succeeded     13:40:02.120  392 ms      1/5
│  └─ ↶ stock.release  ready
├─ ✓ approve           succeeded     13:40:02.512  2 m 2 s            signal approved
├─ ◐ charge ◆          dispatched    13:42:05.000  1 m 5 s …   2/5
├─ ○ ship              pending
└─ ○ bill              pending                                        after charge
◆ the pivot: once it succeeded there is no way back

  waits for   the reply to "charge", attempt 2 of 5, until 2026-11-23 13:43:35.000 UTC (in 25.0 s)
  you may     cancel, pause, skip ship

   1  13:40:02.100  created
   2  13:40:02.120  time: saga scheduled → running; reserve pending → dispatched; sent stock.reserve
                    (attempt 1)
   3  13:40:02.512  reply to reserve: succeeded: reserve dispatched → succeeded; approve pending →
                    dispatched
   4  13:42:05.000  signal approved: approve dispatched → succeeded; charge pending → dispatched;
                    sent pay.charge (attempt 1)
   5  13:43:05.000  time: charge backoff → dispatched; sent pay.charge (attempt 2)
"#;

    const STUCK: &str = r#"order/A-1042  stuck, on its way back, paused
  id          01934f2e-6d1c-7aaa-8bbb-000000000001
  definition  order version 3
  started     2026-11-23 13:40:02.000 UTC (3 m 8 s ago)
  deadline    2026-11-23 13:50:02.000 UTC (in 6 m 52 s)
  labels      region=eu
  reason      step "reserve" could not be undone

├─ ! reserve           undo_stuck    13:40:02.120  392 ms      1/5
│  │ the warehouse says [2Jno: a long tale of woe a long tale of woe a long
│  │ tale of woe a long tale of woe a long tale of woe a long tale of woe a
│  │ long tale of woe a long tale of woe a long tale of woe a long tale of woe
│  │ a long tale of woe a long tale of woe a long tale of woe a long tale of…
│  └─ ↶ stock.release  stuck         13:41:00.000  1 m 30 s    1/20
├─ ✗ approve           failed        13:40:02.512  57.4 s
│    signal approved
├─ – charge ◆          skipped
├─ – ship              skipped
└─ – bill              skipped
     after charge
◆ the pivot: once it succeeded there is no way back

  waits for   an operator who resumes it; what comes in is recorded, nothing is
              sent
              an operator: "reserve" could not be undone: the warehouse says
              [2Jno: a long tale of woe a long tale of woe a long tale of woe a
              long tale of …
  you may     cancel, pause, skip ship

   1  13:40:02.100  created
   2  13:40:02.120  time: saga scheduled → running; reserve pending →
                    dispatched; sent stock.reserve (attempt 1)
   3  13:40:02.512  reply to reserve: succeeded: reserve dispatched → succeeded;
                    approve pending → dispatched
   4  13:41:00.000  time: saga running → compensating; approve dispatched →
                    failed; reserve succeeded → undoing; sent stock.release
                    (attempt 1)
   5  13:42:30.250  time: reserve undoing → undo_stuck
"#;

    fn raw(value: Value) -> Box<RawValue> {
        serde_json::value::to_raw_value(&value).expect("JSON")
    }

    fn at(time: &str) -> String {
        format!("2026-11-23T{time}Z")
    }

    fn definition() -> Definition {
        let retry = |max| Retry { max, initial_ms: 1_000, factor: 2.0, cap_ms: 60_000, jitter: Jitter::Full };
        let command = |topic: &str| CommandTemplate { topic: topic.to_owned(), body: Value::Null };
        let step = |id: &str, after: Vec<usize>, work, undo: Option<&str>, pivot| StepDefinition {
            id: id.to_owned(),
            after,
            work,
            pivot,
            timeout_ms: 30_000,
            retry: retry(5),
            undo: undo.map(command),
            undo_retry: retry(20),
            on_undo_exhausted: OnExhausted::Stuck,
        };
        let wait = Work::Wait { signal: "approved".to_owned(), timeout_ms: None };
        let send = |topic: &str| Work::Command(command(topic));
        Definition {
            name: "order".to_owned(),
            version: 3,
            deadline_ms: None,
            steps: vec![
                step("reserve", vec![], send("stock.reserve"), Some("stock.release"), false),
                step("approve", vec![0], wait, None, false),
                step("charge", vec![1], send("pay.charge"), None, true),
                step("ship", vec![2], send("ship.order"), None, false),
                step("bill", vec![2], send("bill.send"), None, false),
            ],
        }
    }

    fn row(seq: i64, time: &str, event: &str, detail: Value, changes: Value) -> HistoryRow {
        HistoryRow {
            seq,
            at: at(time),
            event: event.to_owned(),
            detail: raw(detail),
            changes: raw(changes),
            cause: None,
            hash: String::new(),
        }
    }

    fn step(
        id: &str,
        status: StepStatus,
        epoch: i32,
        attempt: i32,
        due: Option<&str>,
        undo: Option<CompensationStatus>,
    ) -> Step {
        Step {
            id: id.to_owned(),
            status,
            pivot: id == "charge",
            epoch,
            attempt,
            message_id: None,
            due_at: due.map(at),
            output: None,
            error: None,
            dispatched_at: None,
            changed_at: at("13:40:00"),
            compensation: undo,
        }
    }

    fn detail(status: SagaStatus, phase: Phase, steps: Vec<Step>) -> Detail {
        let summary = Summary {
            id: Uuid::from_u128(0x0193_4f2e_6d1c_7aaa_8bbb_0000_0000_0001),
            definition: Some("order".to_owned()),
            version: Some(3),
            business_key: "A-1042".to_owned(),
            status,
            phase,
            paused: false,
            cancel: None,
            reason: None,
            seq: 5,
            labels: Map::from_iter([("region".to_owned(), json!("eu"))]),
            created_at: at("13:40:02"),
            start_at: Some(at("13:40:02")),
            deadline: Some(at("13:50:02")),
            changed_at: at("13:40:02"),
            ended_at: None,
            next_due: Some(at("13:43:35")),
        };
        Detail { summary, input: raw(json!({})), steps, signals: Vec::new() }
    }

    fn change(step: &str, from: &str, to: &str) -> Value {
        json!({ "step": step, "from": from, "to": to, "epoch": 1, "attempt": 1 })
    }

    fn sent(step: &str, op: &str, attempt: i32, topic: &str) -> Value {
        json!({ "step": step, "op": op, "epoch": 1, "attempt": attempt, "message_id": null, "topic": topic })
    }

    fn compensation(status: CompensationStatus) -> [Compensation; 1] {
        [Compensation {
            step: "reserve".to_owned(),
            topic: "stock.release".to_owned(),
            payload: None,
            status,
            recorded_at: at("13:40:02"),
            changed_at: at("13:40:02"),
        }]
    }

    fn history() -> Vec<HistoryRow> {
        vec![
            row(1, "13:40:02.100", "created", json!({}), json!({})),
            row(
                2,
                "13:40:02.120",
                "due",
                json!({}),
                json!({ "saga": { "from": "scheduled", "to": "running" }, "steps": [change("reserve", "pending", "dispatched")],
                    "commands": [sent("reserve", "do", 1, "stock.reserve")] }),
            ),
            row(
                3,
                "13:40:02.512",
                "reply",
                json!({ "step": "reserve", "op": "do", "epoch": 1, "outcome": "succeeded", "output": {}, "error": null }),
                json!({ "steps": [change("reserve", "dispatched", "succeeded"), change("approve", "pending", "dispatched")] }),
            ),
            row(
                4,
                "13:42:05.000",
                "signal",
                json!({ "name": "approved", "payload": null }),
                json!({ "steps": [change("approve", "dispatched", "succeeded"), change("charge", "pending", "dispatched")],
                    "commands": [sent("charge", "do", 1, "pay.charge")] }),
            ),
            row(
                5,
                "13:43:05.000",
                "due",
                json!({}),
                json!({ "steps": [change("charge", "backoff", "dispatched")], "commands": [sent("charge", "do", 2, "pay.charge")] }),
            ),
        ]
    }

    fn view(detail: &Detail, undo: CompensationStatus, history: &[HistoryRow], now: &str, with_history: bool) -> View {
        View::new(Parts {
            now: crate::saga::snapshot::millis(&at(now)),
            detail,
            compensations: &compensation(undo),
            history,
            definition: Some(&definition()),
            actions: vec!["cancel".to_owned(), "pause".to_owned(), "skip ship".to_owned()],
            with_history,
        })
    }

    fn running() -> View {
        use StepStatus::*;
        let steps = vec![
            step("reserve", Succeeded, 1, 1, None, Some(CompensationStatus::Ready)),
            step("approve", Succeeded, 1, 0, None, None),
            step("charge", Dispatched, 1, 2, Some("13:43:35"), None),
            step("ship", Pending, 0, 0, None, None),
            step("bill", Pending, 0, 0, None, None),
        ];
        let detail = detail(SagaStatus::Running, Phase::Forward, steps);
        view(&detail, CompensationStatus::Ready, &history(), "13:43:10", true)
    }

    fn stuck_on_its_way_back() -> View {
        use StepStatus::*;
        let mut steps = vec![
            step("reserve", UndoStuck, 1, 20, None, Some(CompensationStatus::Stuck)),
            step("approve", Failed, 1, 0, None, None),
            step("charge", Skipped, 0, 0, None, None),
            step("ship", Skipped, 0, 0, None, None),
            step("bill", Skipped, 0, 0, None, None),
        ];
        steps[0].error = Some(format!("the warehouse says\n\x1b[2Jno: {}", "a long tale of woe ".repeat(30)));
        let mut detail = detail(SagaStatus::Stuck, Phase::Backward, steps);
        detail.summary.reason = Some("step \"reserve\" could not be undone".to_owned());
        detail.summary.paused = true;
        detail.summary.next_due = None;
        let mut rows = history();
        rows.truncate(3);
        rows.push(row(
            4,
            "13:41:00",
            "due",
            json!({}),
            json!({ "saga": { "from": "running", "to": "compensating" },
                "steps": [change("approve", "dispatched", "failed"), change("reserve", "succeeded", "undoing")],
                "commands": [sent("reserve", "undo", 1, "stock.release")] }),
        ));
        rows.push(row(
            5,
            "13:42:30.250",
            "due",
            json!({}),
            json!({ "steps": [change("reserve", "undoing", "undo_stuck")] }),
        ));
        view(&detail, CompensationStatus::Stuck, &rows, "13:43:10", true)
    }

    fn without_escapes(text: &str) -> String {
        let mut parts = text.split("\x1b[");
        let first = parts.next().expect("one at least").to_owned();
        parts.fold(first, |plain, part| plain + part.split_once('m').expect("an escape ends").1)
    }

    /// Goal: a saga under way: what is done with its times, what is under way with its attempt and its end, what undoes
    /// it, the pivot, a fork, and what is waited for.
    #[test]
    fn a_running_saga_is_drawn() {
        let drawn = draw(&running(), PLAIN);
        assert_eq!(drawn, RUNNING, "\n{drawn}");
    }

    /// Goal: a stuck saga says what it needs; an error's control characters and length do no harm.
    #[test]
    fn a_stuck_saga_is_drawn() {
        let drawn = draw(&stuck_on_its_way_back(), Style { width: 80, colour: false });
        assert_eq!(drawn, STUCK, "\n{drawn}");
    }

    /// Goal: a step whose timer rests, as the saga is stuck or paused, is not said to be overdue.
    #[test]
    fn resting_timers_tell_no_time() {
        use StepStatus::*;
        for (status, paused, expected) in [
            (SagaStatus::Running, false, "another attempt of \"bill\", 2026-11-23 13:43:05.000 UTC (5.0 s ago)"),
            (SagaStatus::Running, true, "another attempt of \"bill\"\n"),
            (SagaStatus::Stuck, false, "another attempt of \"bill\"\n"),
        ] {
            let steps = vec![
                step("charge", Succeeded, 1, 1, None, None),
                step("ship", Failed, 1, 1, None, None),
                step("bill", Failed, 1, 1, Some("13:43:05"), None),
            ];
            let mut detail = detail(status, Phase::Forward, steps);
            (detail.summary.paused, detail.summary.next_due) = (paused, None);
            let drawn = draw(&view(&detail, CompensationStatus::Ready, &[], "13:43:10", false), PLAIN);
            assert!(drawn.contains(expected), "{drawn}");
        }
    }

    /// Goal: of a saga that ended nothing is still to come; one that never began took no time.
    #[test]
    fn the_times_of_an_ended_saga_are_past() {
        for (now, start_at, expected) in [
            ("13:43:10", "13:40:02", "  ended       2026-11-23 13:41:02.000 UTC (2 m 8 s ago), after 1 m 0 s\n"),
            ("13:43:10", "13:59:00", "  ended       2026-11-23 13:41:02.000 UTC (2 m 8 s ago), before it began\n"),
        ] {
            let mut detail = detail(SagaStatus::Cancelled, Phase::Forward, Vec::new());
            (detail.summary.start_at, detail.summary.ended_at) = (Some(at(start_at)), Some(at("13:41:02")));
            let drawn = draw(&view(&detail, CompensationStatus::Ready, &[], now, false), PLAIN);
            assert!(drawn.contains(expected) && !drawn.contains("(in "), "{drawn}");
        }
    }

    /// Goal: no line is wider than the terminal, and colours change nothing but the colour.
    #[test]
    fn drawings_fit_their_terminal() {
        for view in [running(), stuck_on_its_way_back()] {
            for width in 80..=120 {
                let plain = draw(&view, Style { width, colour: false });
                let widest = plain.lines().max_by_key(|line| line.chars().count()).expect("lines");
                assert!(widest.chars().count() <= width, "{width}: {widest}");
                assert!(!plain.contains('\x1b'), "{plain}");
                let coloured = draw(&view, Style { width, colour: true });
                assert_eq!(without_escapes(&coloured), plain);
                assert!(coloured.contains("\x1b[32m") || coloured.contains("\x1b[31m"));
            }
        }
    }

    /// Goal: times of a saga that lasted over midnight carry their day.
    #[test]
    fn times_carry_their_day_where_it_matters() {
        let mut view = running();
        assert_eq!(view.clock(view.created_at), "13:40:02.000");
        view.now += 86_400_000;
        assert_eq!(view.clock(view.created_at), "11-23 13:40:02.000");
    }
}
