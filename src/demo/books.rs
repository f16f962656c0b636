//! The books: what the databases hold after the run.

use super::shop;
use super::wire::Wire;
use serde::Deserialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use std::collections::BTreeSet;

/// Counts of the tables of shop, outbox, inbox and billing.
#[derive(Debug, Default, Clone, Deserialize)]
pub struct Books {
    pub orders: i64,
    pub ordered_cents: i64,
    pub messages: i64,
    /// Those of orders and customers alone.
    pub shop_messages: i64,
    /// Orders without a message in the outbox.
    pub unpublished: i64,
    /// Messages of orders that are not there.
    pub unfounded_messages: i64,
    pub invoices: i64,
    pub invoiced_cents: i64,
    /// Orders without an invoice; some of them.
    pub lost: i64,
    pub lost_orders: Vec<i64>,
    /// Invoices beyond the first of their order; some of the orders.
    pub doubled: i64,
    pub doubled_orders: Vec<i64>,
    /// Invoices of orders that are not there.
    pub unfounded_invoices: i64,
    /// Invoices that differ from their order.
    pub wrong_invoices: i64,
    /// Invoices that came after one of a later order of the same customer; some of the orders.
    pub out_of_order: i64,
    pub out_of_order_orders: Vec<i64>,
    /// Final statements that agree with the shop, and how many there are in all.
    pub right_statements: i64,
    pub statements: i64,
    pub outbox_parked: i64,
    pub inbox_parked: i64,
    /// Held for another attempt, on both sides.
    pub waiting: i64,
}

const BOOKS: &str = r#"
with
lost as (
    select o.id from shop.orders as o where not exists (select from billing.invoice as i where i.order_id = o.id)
), doubled as (
    select order_id as id, count(*) - 1 as times from billing.invoice group by order_id having count(*) > 1
), in_turn as (
    select i.order_id as id, i.order_number, max(i.order_number) over (
        partition by i.customer order by i.id rows between unbounded preceding and 1 preceding) as highest_before
    from billing.invoice as i
), late as (
    select id from in_turn where order_number < highest_before
), published as (
    select (convert_from(body, 'UTF8')::jsonb ->> 'order')::bigint as id from oncebox.outbox where topic = 'order.placed'
), due as (
    select c.id as customer, count(o.id) as invoices, coalesce(sum(o.amount_cents), 0) as amount_cents
    from shop.customer as c left join shop.orders as o on o.customer = c.id group by c.id
)
select to_jsonb(books) from (select
    (select count(*) from shop.orders) as orders,
    (select coalesce(sum(amount_cents), 0)::bigint from shop.orders) as ordered_cents,
    (select count(*) from oncebox.outbox) as messages,
    (select count(*) from oncebox.outbox where topic in ('order.placed', 'customer.closed')) as shop_messages,
    (select count(*) from shop.orders as o where not exists (select from published as p where p.id = o.id)) as unpublished,
    (select count(*) from published as p where not exists (select from shop.orders as o where o.id = p.id))
        as unfounded_messages,
    (select count(*) from billing.invoice) as invoices,
    (select coalesce(sum(amount_cents), 0)::bigint from billing.invoice) as invoiced_cents,
    (select count(*) from lost) as lost,
    array(select id from lost order by id limit 5) as lost_orders,
    (select coalesce(sum(times), 0)::bigint from doubled) as doubled,
    array(select id from doubled order by id limit 5) as doubled_orders,
    (select count(*) from billing.invoice as i where not exists (select from shop.orders as o where o.id = i.order_id))
        as unfounded_invoices,
    (select count(*) from billing.invoice as i join shop.orders as o on o.id = i.order_id
        where (i.customer, i.order_number, i.amount_cents) is distinct from (o.customer, o.number, o.amount_cents))
        as wrong_invoices,
    (select count(*) from late) as out_of_order,
    array(select id from late order by id limit 5) as out_of_order_orders,
    (select count(*) from due join billing.statement as s using (customer, invoices, amount_cents)) as right_statements,
    (select count(*) from billing.statement) as statements,
    (select count(*) from oncebox.outbox_held where state = 'parked') as outbox_parked,
    (select count(*) from oncebox.inbox_held where state = 'parked') as inbox_parked,
    (select count(*) from oncebox.outbox_held where state = 'waiting')
        + (select count(*) from oncebox.inbox_held where state = 'waiting') as waiting) as books
"#;

impl Books {
    pub async fn read(conn: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let Json(books) = sqlx::query_scalar(BOOKS).fetch_one(conn).await?;
        Ok(books)
    }
}

/// What only a comparison one by one can tell.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Compared {
    /// Rolled back, and in the database nevertheless.
    pub risen: Vec<u64>,
    /// Commits that were answered and are not in the database, `synchronous_commit = off` aside.
    pub forgotten: Vec<u64>,
    /// The same with `synchronous_commit = off`: allowed when Postgres was killed.
    pub forgotten_lazily: Vec<u64>,
    /// Commits never answered, and how many of them happened.
    pub unanswered: u64,
    pub unanswered_but_committed: u64,
    /// Messages of the outbox that were never on the wire.
    pub not_on_wire: u64,
    /// Messages on the wire that are not in the outbox.
    pub only_on_wire: u64,
}

/// Lays the clients' story and the wire beside the database, order by order and message by message.
pub async fn compare(
    conn: &mut PgConnection,
    (seed, orders): (u64, u64),
    unanswered: &BTreeSet<u64>,
    wire: &Wire,
) -> Result<Compared, sqlx::Error> {
    let stored: Vec<i64> = sqlx::query_scalar("select id from shop.orders order by id").fetch_all(&mut *conn).await?;
    let stored = stored.into_iter().map(|id| id as u64).collect();
    let mut compared = stories((seed, orders), &stored, unanswered);
    let messages: Vec<String> =
        sqlx::query_scalar("select message_id::text from oncebox.outbox order by seq").fetch_all(conn).await?;
    compared.not_on_wire = messages.iter().filter(|id| !wire.ids.contains(*id)).count() as u64;
    compared.only_on_wire = (wire.ids.len() as u64 + compared.not_on_wire).saturating_sub(messages.len() as u64);
    Ok(compared)
}

fn stories((seed, orders): (u64, u64), stored: &BTreeSet<u64>, unanswered: &BTreeSet<u64>) -> Compared {
    let mut compared = Compared { unanswered: unanswered.len() as u64, ..Compared::default() };
    for order in (1..=orders).map(|id| shop::order(seed, id)) {
        match (stored.contains(&order.id), order.regretted, unanswered.contains(&order.id)) {
            (true, true, _) => compared.risen.push(order.id),
            (there, false, true) => compared.unanswered_but_committed += u64::from(there),
            (false, false, false) if order.lazy => compared.forgotten_lazily.push(order.id),
            (false, false, false) => compared.forgotten.push(order.id),
            _ => {}
        }
    }
    compared
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: each order's story is told apart: risen, forgotten, unanswered.
    #[test]
    fn stories_are_told_apart() {
        let all = || (1..=500).map(|id| shop::order(3, id));
        let kept: BTreeSet<u64> = all().filter(|order| !order.regretted).map(|order| order.id).collect();
        let none = BTreeSet::new();
        assert_eq!(stories((3, 500), &kept, &none), Compared::default());

        let regretted = all().find(|order| order.regretted).expect("a tenth").id;
        let lazy = all().find(|order| order.lazy && !order.regretted).expect("a third").id;
        let mut prompt = all().filter(|order| !order.lazy && !order.regretted).map(|order| order.id);
        let (one, two) = (prompt.next().expect("many"), prompt.next().expect("many"));
        let mut stored = kept.clone();
        stored.insert(regretted);
        stored.retain(|id| ![lazy, one].contains(id));
        let compared = stories((3, 500), &stored, &BTreeSet::from([two]));
        assert_eq!((compared.risen, compared.forgotten), (vec![regretted], vec![one]));
        assert_eq!((compared.forgotten_lazily, compared.unanswered_but_committed), (vec![lazy], 1));
        assert_eq!(stories((3, 500), &stored, &BTreeSet::from([one])).forgotten, Vec::<u64>::new());
    }
}
