//! The shop and its billing: two schemas, and the writers that place orders.
//!
//! Each order is a pure function of seed and number, so the reconciliation knows without asking which orders were
//! rolled back. Billing has neither a unique constraint nor `on conflict`: a double effect would show.

use super::deliveries::{self, Fate};
use super::random::Random;
use crate::db::{self, DbError, SessionOptions};
use anyhow::Context;
use sqlx::{Connection, Executor, PgConnection};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Concurrent writers, each with a session of its own.
const WRITERS: usize = 8;
/// Few enough that customers have many orders whose order can be checked.
pub const CUSTOMERS: i32 = 100;
/// Orders come in waves, so that a fault finds many messages in flight.
const WAVES: u64 = 40;
/// Longest wait for one order; a crashed server answers sooner, by a reset.
const ORDER_LIMIT: Duration = Duration::from_secs(20);
/// Before a writer looks again whether the server is back.
const RECONNECT: Duration = Duration::from_millis(200);

const SCHEMA: &str = r#"
create schema shop;
create table shop.customer (id integer primary key, orders integer not null default 0);
create table shop.orders (
    id bigint primary key,
    customer integer not null references shop.customer,
    number integer not null,
    amount_cents bigint not null,
    fate text
);

create schema billing;
create table billing.invoice (
    id bigint primary key generated always as identity,
    customer integer not null,
    order_id bigint not null,
    order_number integer not null,
    invoice_number integer not null,
    amount_cents bigint not null,
    message_id uuid not null
);
create index invoice_customer_number on billing.invoice (customer, invoice_number);
create table billing.statement (
    id bigint primary key generated always as identity,
    customer integer not null,
    invoices bigint not null,
    amount_cents bigint not null
);
create function billing.on_message(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
declare
    v_customer constant integer := (payload ->> 'customer')::integer;
begin
    if topic = 'customer.closed' then
        insert into billing.statement (customer, invoices, amount_cents)
        select v_customer, count(*), coalesce(sum(amount_cents), 0)
        from billing.invoice where customer = v_customer;
        return;
    end if;
    insert into billing.invoice (customer, order_id, order_number, invoice_number, amount_cents, message_id)
    values (
        v_customer, (payload ->> 'order')::bigint, (payload ->> 'number')::integer,
        (select coalesce(max(invoice_number), 0) + 1 from billing.invoice where customer = v_customer),
        (payload ->> 'amount_cents')::bigint, on_message.message_id);
end
$$;
"#;

/// The consumer's config file, for `oncebox consume`.
pub const CONSUMER_CONFIG: &str = r#"# Written by `oncebox demo`.
[[consumer]]
name = "billing"
queue = "billing"
bindings = ["order.placed", "customer.closed"]
handler = { sql = "billing.on_message" }

# Participants of the delivery sagas.
[[consumer]]
name = "stock"
bindings = ["stock.*"]
handler = { sql = "stock.on_command" }

[[consumer]]
name = "pay"
bindings = ["pay.*"]
handler = { sql = "pay.on_command" }

[[consumer]]
name = "ship"
bindings = ["ship.*"]
handler = { sql = "ship.on_command" }
"#;

/// An order as its customer wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub id: u64,
    customer: i32,
    amount_cents: i64,
    /// The transaction is rolled back after `publish`.
    pub regretted: bool,
    /// Committed with `synchronous_commit = off`: a crash of Postgres may forget it, message and all.
    pub lazy: bool,
    /// What becomes of its delivery, if it is to be delivered: a saga.
    pub fate: Option<Fate>,
}

/// The order of that number, from 1.
pub fn order(seed: u64, id: u64) -> Order {
    let mut random = Random::new(seed ^ id.wrapping_mul(0x9e37_79b9));
    Order {
        id,
        customer: 1 + random.below(CUSTOMERS as u64) as i32,
        amount_cents: 100 + random.below(20_000) as i64,
        regretted: random.below(10) == 0,
        lazy: random.below(3) == 0,
        fate: (random.below(8) == 0).then(|| Fate::of(random.below(8))),
    }
}

/// What the writers know: the clients' side of the story.
#[derive(Debug)]
pub struct Counter {
    /// Orders done with, one way or another.
    pub placed: watch::Sender<u64>,
    pub committed: AtomicU64,
    pub rolled_back: AtomicU64,
    /// Orders whose commit was never answered: the database knows.
    pub unanswered: Mutex<BTreeSet<u64>>,
}

impl Default for Counter {
    fn default() -> Self {
        let placed = watch::Sender::new(0);
        Self { placed, committed: 0.into(), rolled_back: 0.into(), unanswered: Mutex::default() }
    }
}

impl Counter {
    pub fn unanswered(&self) -> BTreeSet<u64> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, order: Order, end: End) {
        match end {
            End::Committed => drop(self.committed.fetch_add(1, Ordering::Relaxed)),
            End::RolledBack => drop(self.rolled_back.fetch_add(1, Ordering::Relaxed)),
            End::Unanswered => {
                self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).insert(order.id);
            }
        }
        self.placed.send_modify(|placed| *placed += 1);
    }
}

enum End {
    Committed,
    RolledBack,
    Unanswered,
}

/// A session of the demo.
pub async fn connect(url: &str) -> Result<PgConnection, DbError> {
    let statement_timeout = Duration::from_secs(15);
    db::connect(
        url,
        SessionOptions {
            application_name: "oncebox demo",
            statement_timeout,
            idle_timeout: db::IDLE_TIMEOUT,
            plain_index_plans: false,
        },
    )
    .await
}

/// Makes both schemas and the customers.
pub async fn open(url: &str) -> anyhow::Result<()> {
    let mut conn = connect(url).await?;
    conn.execute(SCHEMA).await.context("the demo's own schemas")?;
    deliveries::open(&mut conn, CUSTOMERS).await.context("the participants of the sagas")?;
    let customers = "insert into shop.customer (id) select generate_series(1, $1)";
    sqlx::query(customers).bind(CUSTOMERS).execute(&mut conn).await?;
    db::close(conn).await;
    Ok(())
}

/// Places all orders, in waves over about `span`, through crashes of the server.
///
/// # Errors
/// Any error of the database that waiting cannot mend, or the limit.
pub async fn sell(url: &str, seed: u64, orders: u64, span: Duration, counter: &Arc<Counter>) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(1));
    let began = Instant::now();
    let due = move |id: u64| {
        let wave = (id - 1) * WAVES / orders;
        began + span.mul_f64(wave as f64 / WAVES as f64)
    };
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (url, counter, next) = (url.to_owned(), Arc::clone(counter), Arc::clone(&next));
        writers.spawn(async move {
            let mut conn = None;
            loop {
                let id = next.fetch_add(1, Ordering::Relaxed);
                if id > orders {
                    return anyhow::Ok(());
                }
                tokio::time::sleep_until(due(id)).await;
                let order = order(seed, id);
                let end = persist(&url, &mut conn, order).await.with_context(|| format!("order {id}"))?;
                counter.add(order, end);
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.context("a writer ended unexpectedly")??;
    }
    Ok(())
}

/// Tries an order until it is committed, rolled back, or nobody can tell. An order that failed before its commit was
/// sent has surely left nothing.
async fn persist(url: &str, conn: &mut Option<PgConnection>, order: Order) -> Result<End, DbError> {
    // Twice the longest restart of a server.
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let mut committing = false;
        let attempt = async {
            let mut session = match conn.take() {
                Some(session) => session,
                None => connect(url).await?,
            };
            let end = place(&mut session, order, &mut committing).await?;
            *conn = Some(session);
            Ok(end)
        };
        let timed_out = DbError::TimedOut { what: "an order", limit: ORDER_LIMIT };
        match tokio::time::timeout(ORDER_LIMIT, attempt).await.unwrap_or(Err(timed_out)) {
            Ok(end) => return Ok(end),
            // The server said no, so it knows that nothing was committed; any other end of a commit is unknown.
            Err(error) if committing && !matches!(&error, DbError::Sqlx(sqlx::Error::Database(_))) => {
                return Ok(End::Unanswered);
            }
            Err(error) if error.is_transient() && Instant::now() < deadline => tokio::time::sleep(RECONNECT).await,
            Err(error) => return Err(error),
        }
    }
}

async fn place(conn: &mut PgConnection, order: Order, committing: &mut bool) -> Result<End, DbError> {
    let mut transaction = conn.begin().await?;
    if order.lazy {
        transaction.execute("set local synchronous_commit = off").await?;
    }
    // The customer's row lock comes before the publish: the order of one customer's orders is the order of these.
    let number: i32 = sqlx::query_scalar("update shop.customer set orders = orders + 1 where id = $1 returning orders")
        .bind(order.customer)
        .fetch_one(&mut *transaction)
        .await?;
    sqlx::query("insert into shop.orders (id, customer, number, amount_cents, fate) values ($1, $2, $3, $4, $5)")
        .bind(order.id as i64)
        .bind(order.customer)
        .bind(number)
        .bind(order.amount_cents)
        .bind(order.fate.map(Fate::name))
        .execute(&mut *transaction)
        .await?;
    sqlx::query(
        "select oncebox.publish('order.placed',
            jsonb_build_object('order', $1, 'customer', $2, 'number', $3, 'amount_cents', $4),
            key => 'customer-' || $2)",
    )
    .bind(order.id as i64)
    .bind(order.customer)
    .bind(number)
    .bind(order.amount_cents)
    .execute(&mut *transaction)
    .await?;
    if let Some(fate) = order.fate {
        deliveries::start(&mut transaction, order.id, order.customer, order.amount_cents, fate).await?;
    }
    if order.regretted {
        transaction.rollback().await?;
        return Ok(End::RolledBack);
    }
    *committing = true;
    transaction.commit().await?;
    Ok(End::Committed)
}

/// Publishes each customer's last message. It stands behind all their orders, so its effect, the statement, proves
/// that everything before it has passed.
pub async fn close_accounts(url: &str) -> Result<(), DbError> {
    let mut conn = connect(url).await?;
    sqlx::query(
        "select oncebox.publish('customer.closed', jsonb_build_object('customer', id, 'number', orders + 1),
            key => 'customer-' || id)
        from shop.customer order by id",
    )
    .execute(&mut conn)
    .await?;
    db::close(conn).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: orders can be known again from the seed, and about a tenth and a third of them are what they should be.
    #[test]
    fn orders_follow_from_the_seed() {
        let orders: Vec<Order> = (1..=3_000).map(|id| order(7, id)).collect();
        assert_eq!(orders[41], order(7, 42));
        assert_ne!(orders[41].amount_cents, order(8, 42).amount_cents);
        let share = |is: fn(&&Order) -> bool| orders.iter().filter(is).count();
        assert!((200..400).contains(&share(|order| order.regretted)));
        assert!((850..1_150).contains(&share(|order| order.lazy)));
        let customers: BTreeSet<i32> = orders.iter().map(|order| order.customer).collect();
        assert_eq!(customers.len() as i32, CUSTOMERS);
    }
}
