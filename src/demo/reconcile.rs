//! The reconciliation: books, wire and the clients' story side by side, as a table and a verdict.

use super::books::{Books, Compared};
use super::deliveries::Deliveries;
use super::faults::Done;
use super::shop::CUSTOMERS;
use super::wire::Wire;
use comfy_table::{Cell, CellAlignment, Table, presets};

/// Everything there is to judge by.
pub struct Evidence {
    /// Orders that clients saw committed, and rolled back.
    pub committed: u64,
    pub rolled_back: u64,
    pub books: Books,
    pub compared: Compared,
    pub deliveries: Deliveries,
    pub wire: Wire,
    pub done: Done,
    /// What went wrong with the processes, in words.
    pub troubles: Vec<String>,
}

/// The table, and what does not add up.
pub struct Report {
    table: Table,
    /// One phrase each; empty when everything adds up.
    pub problems: Vec<String>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.table.fmt(f)
    }
}

impl Report {
    fn new() -> Self {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["reconciliation", "counted", "expected", ""]);
        for index in [1, 2] {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self { table, problems: Vec::new() }
    }

    fn row(&mut self, what: &str, counted: String, expected: String, mark: &str) {
        self.table.add_row([what, &counted, &expected, mark].map(Cell::new));
    }

    /// A count that nothing is expected of.
    fn tell(&mut self, what: &str, counted: impl Into<String>) {
        self.row(what, counted.into(), String::new(), "");
    }

    /// A count that must be as expected.
    fn equal(&mut self, what: &str, counted: u64, expected: u64, show: fn(u64) -> String) {
        let right = counted == expected;
        self.row(what, show(counted), show(expected), if right { "ok" } else { "WRONG" });
        if !right {
            self.problems.push(format!("{}: {}, expected {}", what.trim_start(), show(counted), show(expected)));
        }
    }

    /// A count that must be 0; the complaint names some of them.
    fn none(&mut self, what: &str, counted: u64, examples: &[i64]) {
        self.row(what, number(counted), "0".to_owned(), if counted == 0 { "ok" } else { "WRONG" });
        if counted > 0 {
            let named: Vec<String> = examples.iter().map(|id| format!("order {id}")).collect();
            let named = if named.is_empty() { String::new() } else { format!(" ({})", named.join(", ")) };
            self.problems.push(format!("{}: {}{named}", what.trim_start(), number(counted)));
        }
    }

    fn none_shown_if_any(&mut self, what: &str, counted: u64, examples: &[u64]) {
        if counted > 0 {
            let examples: Vec<i64> = examples.iter().take(5).map(|id| *id as i64).collect();
            self.none(what, counted, &examples);
        }
    }
}

/// Judges the evidence.
pub fn judge(evidence: Evidence) -> Report {
    let Evidence { committed, rolled_back, books, compared, deliveries, wire, done, troubles } = evidence;
    let mut report = Report::new();
    let forgotten_lazily = compared.forgotten_lazily.len() as u64;
    // A crash may forget what was committed with synchronous_commit = off, and nothing else.
    let excused = if done.postgres > 0 { forgotten_lazily } else { 0 };
    let expected = (committed + compared.unanswered_but_committed).saturating_sub(excused);
    report.equal("orders committed", count(books.orders), expected, number);
    report.tell("orders rolled back", number(rolled_back));
    if compared.unanswered > 0 {
        let text = format!("{} of {}", compared.unanswered_but_committed, compared.unanswered);
        report.tell("  commits whose answer was lost, and that happened", text);
    }
    if excused > 0 {
        report.tell("  forgotten by the crash (synchronous_commit = off)", number(excused));
    } else {
        report.none_shown_if_any("committed orders forgotten", forgotten_lazily, &compared.forgotten_lazily);
    }
    let forgotten = &compared.forgotten;
    report.none_shown_if_any("committed orders forgotten", forgotten.len() as u64, forgotten);
    report.none_shown_if_any("rolled back, and there", compared.risen.len() as u64, &compared.risen);

    let closings = CUSTOMERS as u64;
    report.equal(
        "messages of orders in the outbox",
        count(books.shop_messages),
        count(books.orders) + closings,
        number,
    );
    report.none_shown_if_any("orders without a message", count(books.unpublished), &[]);
    report.none_shown_if_any("messages without an order", count(books.unfounded_messages), &[]);
    report.equal("messages on the wire", wire.distinct(), count(books.messages), number);
    report.none_shown_if_any("messages never on the wire", compared.not_on_wire, &[]);
    report.none_shown_if_any("messages on the wire and not in the outbox", compared.only_on_wire, &[]);
    report.none_shown_if_any("foreign messages on the wire", wire.foreign, &[]);
    report.tell("  duplicates of them", number(wire.duplicates));
    report.none("  same offset, another message", wire.changed, &[]);
    let (streams, gaps) = wire.streams_and_gaps();
    report.none(&format!("  gaps in the offsets of {streams} streams"), gaps, &[]);
    report.none("  messages out of a customer's order", wire.out_of_order, &[]);

    report.equal("invoices", count(books.invoices), count(books.orders), number);
    report.none("  invoices lost", count(books.lost), &books.lost_orders);
    report.none("  invoices doubled", count(books.doubled), &books.doubled_orders);
    report.none("  invoices out of a customer's order", count(books.out_of_order), &books.out_of_order_orders);
    report.none_shown_if_any("invoices without an order", count(books.unfounded_invoices), &[]);
    report.none_shown_if_any("invoices unlike their order", count(books.wrong_invoices), &[]);
    report.none("parked messages", count(books.outbox_parked) + count(books.inbox_parked), &[]);
    report.none_shown_if_any("messages still waiting for another attempt", count(books.waiting), &[]);
    report.equal("final statements, one a customer", count(books.statements), closings, number);
    report.equal("  statements that agree with the shop", count(books.right_statements), closings, number);
    report.equal("money invoiced", count(books.invoiced_cents), count(books.ordered_cents), money);

    judge_deliveries(&mut report, &deliveries);

    let Done { relays, active_relays, consumers, orchestrators, brokers, postgres, frozen } = done;
    for (what, times) in [
        ("kill -9 of relays at work", active_relays),
        ("kill -9 of relays standing by", relays - active_relays),
        ("kill -9 of consumers", consumers),
        ("kill -9 of orchestrators", orchestrators),
        ("kill -9 of RabbitMQ", brokers),
        ("kill -9 of PostgreSQL", postgres),
        ("relays frozen beyond their lease", frozen),
    ] {
        if times > 0 {
            report.tell(what, times.to_string());
        }
    }
    report.problems.extend(troubles);
    report
}

/// The sagas: each ended as it had to, and what was done or undone is what that end means.
fn judge_deliveries(report: &mut Report, deliveries: &Deliveries) {
    let Deliveries { sagas, orders_to_deliver, examples, .. } = deliveries;
    report.equal("delivery sagas", count(*sagas), count(*orders_to_deliver), number);
    report.equal("  completed", count(deliveries.completed), count(deliveries.to_complete), number);
    report.equal("  compensated", count(deliveries.compensated), count(deliveries.to_compensate), number);
    report.none("  that ended otherwise than they had to, or not", count(deliveries.wrong_end), examples);
    report.none("  actions or compensations doubled", count(deliveries.doubled), &[]);
    report.none("  effects that do not fit the end", count(deliveries.wrong_effects), &[]);
    report.none("  compensations out of reverse order", count(deliveries.out_of_order), &[]);
    report.none("  whose history does not add up", count(deliveries.unverified), &[]);
    report.equal(
        "money of accounts and takings",
        count(deliveries.money_cents),
        count(deliveries.money_before_cents),
        money,
    );
    report.equal("pieces in stock and delivered", count(deliveries.pieces), count(deliveries.pieces_before), number);
}

/// Counts of rows are never negative.
fn count(rows: i64) -> u64 {
    u64::try_from(rows).unwrap_or_default()
}

/// 1234567 as 1,234,567.
pub fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn money(cents: u64) -> String {
    format!("{}.{:02}", number(cents / 100), cents % 100)
}

#[cfg(test)]
mod tests {
    use super::super::wire::tests::delivery;
    use super::*;

    /// Three orders, and as many closing messages as there are customers.
    fn evidence() -> Evidence {
        let closings = i64::from(CUSTOMERS);
        let books = Books {
            orders: 3,
            ordered_cents: 1_000,
            messages: 3 + closings,
            shop_messages: 3 + closings,
            invoices: 3,
            invoiced_cents: 1_000,
            right_statements: closings,
            statements: closings,
            ..Books::default()
        };
        let mut wire = Wire::default();
        for offset in 1..=books.messages {
            wire.observe(&delivery(&offset.to_string(), offset, "k", offset));
        }
        let compared = Compared::default();
        let deliveries = Deliveries::default();
        let done = Done::default();
        Evidence { committed: 3, rolled_back: 1, books, compared, deliveries, wire, done, troubles: vec![] }
    }

    fn problems(change: impl Fn(&mut Evidence)) -> String {
        let mut evidence = evidence();
        change(&mut evidence);
        judge(evidence).problems.join("; ")
    }

    /// Goal: a good run is found good, duplicates on the wire included.
    #[test]
    fn a_good_run_adds_up() {
        assert_eq!(problems(|_| {}), "");
        assert_eq!(problems(|e| e.wire.observe(&delivery("1", 1, "k", 1))), "");
    }

    /// Goal: nothing that is wrong passes.
    #[test]
    fn whatever_is_wrong_is_named() {
        let named = |change: fn(&mut Evidence), expected: &str| {
            let problems = problems(change);
            assert!(problems.contains(expected), "{problems:?} does not say {expected:?}");
        };
        named(|e| e.committed = 4, "orders committed: 3, expected 4");
        named(|e| e.compared.risen = vec![9], "rolled back, and there: 1 (order 9)");
        named(|e| e.compared.forgotten = vec![8], "committed orders forgotten: 1 (order 8)");
        named(|e| e.compared.forgotten_lazily = vec![8], "committed orders forgotten: 1 (order 8)");
        named(|e| e.books.shop_messages += 1, "messages of orders in the outbox: 104, expected 103");
        named(|e| e.books.messages += 1, "messages on the wire: 103, expected 104");
        named(|e| e.books.unpublished = 1, "orders without a message: 1");
        named(|e| e.compared.not_on_wire = 1, "messages never on the wire: 1");
        named(|e| e.wire.observe(&delivery("x", 1, "k", 1)), "same offset, another message: 1");
        named(|e| e.wire.observe(&delivery("x", 199, "k", 199)), "gaps in the offsets of 1 streams: 95");
        named(|e| e.wire.observe(&delivery("x", 104, "k", 1)), "messages out of a customer's order: 1");
        named(|e| (e.books.lost, e.books.lost_orders) = (1, vec![17]), "lost: 1 (order 17)");
        named(|e| (e.books.doubled, e.books.doubled_orders) = (2, vec![5, 6]), "doubled: 2 (order 5, order 6)");
        named(|e| e.books.out_of_order = 1, "invoices out of a customer's order: 1");
        named(|e| e.books.wrong_invoices = 1, "invoices unlike their order: 1");
        named(|e| e.books.inbox_parked = 1, "parked messages: 1");
        named(|e| e.books.waiting = 1, "waiting for another attempt: 1");
        named(|e| e.books.right_statements -= 1, "that agree with the shop: 99, expected 100");
        named(|e| e.books.invoiced_cents = 999, "money invoiced: 9.99, expected 10.00");
        named(|e| e.deliveries.sagas = 1, "delivery sagas: 1, expected 0");
        named(|e| e.deliveries.to_compensate = 1, "compensated: 0, expected 1");
        named(|e| (e.deliveries.wrong_end, e.deliveries.examples) = (1, vec![4]), "or not: 1 (order 4)");
        named(|e| e.deliveries.doubled = 1, "compensations doubled: 1");
        named(|e| e.deliveries.wrong_effects = 1, "do not fit the end: 1");
        named(|e| e.deliveries.out_of_order = 1, "out of reverse order: 1");
        named(|e| e.deliveries.unverified = 1, "history does not add up: 1");
        named(|e| e.deliveries.money_cents = 1, "money of accounts and takings: 0.01, expected 0.00");
        named(|e| e.troubles = vec!["relay 1 ended".to_owned()], "relay 1 ended");
    }

    /// Goal: only a crash of Postgres excuses a forgotten commit, and only one that did not wait for the disk.
    #[test]
    fn a_crash_excuses_lazy_commits_only() {
        let killed = |e: &mut Evidence| {
            e.done.postgres = 1;
            e.committed = 4;
        };
        let lazy = |e: &mut Evidence| e.compared.forgotten_lazily = vec![8];
        assert_eq!(problems(|e| (killed(e), lazy(e)).0), "");
        assert_ne!(problems(killed), "");
    }

    /// Goal: large numbers can be read.
    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(number), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(money(123_456), "1,234.56");
    }
}
