//! The deliveries: some orders start a saga of three steps, whose participants are SQL functions of three schemas.
//!
//! Reserve, charge, ship: a share of the charges is declined, a share of the parcels cannot be sent, and some participants
//! ask for another attempt. No table of theirs has a unique constraint: a double effect would show. All effects draw from
//! one sequence, so the order of compensations can be read afterwards.

use crate::broker::QueueSpec;
use crate::saga::definition::{Definition, Fault, document_from_text};
use crate::saga::store::define;
use crate::saga::verify;
use serde::Deserialize;
use sqlx::types::Json;
use sqlx::{Executor, PgConnection};

/// What each account holds at the start: enough for every order of a demo.
const BALANCE_CENTS: i64 = 1_000_000_000;
/// Pieces in stock at the start.
const PIECES: i64 = 10_000_000;

const SCHEMA: &str = r#"
create sequence shop.effect;

create schema stock;
create table stock.shelf (pieces bigint not null);
create table stock.movement (n bigint not null default nextval('shop.effect'), saga uuid not null, kind text not null);
create function stock.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
declare
    v_saga constant uuid := headers ->> 'oncebox-saga';
    v_kind constant text := case topic when 'stock.reserve' then 'reserve' else 'release' end;
begin
    if oncebox.saga_barrier(v_saga, headers ->> 'oncebox-step', headers ->> 'oncebox-op',
            (headers ->> 'oncebox-epoch')::integer) <> 'run' then
        return;
    end if;
    insert into stock.movement (saga, kind) values (v_saga, v_kind);
    update stock.shelf set pieces = pieces + case v_kind when 'reserve' then -1 else 1 end;
    perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('shelf', 'a'));
end
$$;

create schema pay;
create table pay.account (customer integer primary key, balance_cents bigint not null);
create table pay.entry (
    n bigint not null default nextval('shop.effect'), saga uuid not null, kind text not null, amount_cents bigint not null);
create function pay.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
declare
    v_saga constant uuid := headers ->> 'oncebox-saga';
    v_amount_cents constant bigint := payload ->> 'amount_cents';
begin
    if oncebox.saga_barrier(v_saga, headers ->> 'oncebox-step', headers ->> 'oncebox-op',
            (headers ->> 'oncebox-epoch')::integer) <> 'run' then
        return;
    end if;
    if topic = 'pay.refund' then
        update pay.account set balance_cents = balance_cents + v_amount_cents
        where customer = (payload ->> 'customer')::integer;
        insert into pay.entry (saga, kind, amount_cents) values (v_saga, 'refund', v_amount_cents);
        perform oncebox.saga_reply(headers, 'succeeded');
        return;
    end if;
    -- A refusal rolls back to the savepoint of this block; the barrier's row and the reply stay.
    begin
        update pay.account set balance_cents = balance_cents - v_amount_cents
        where customer = (payload ->> 'customer')::integer;
        insert into pay.entry (saga, kind, amount_cents) values (v_saga, 'charge', v_amount_cents);
        if payload ->> 'fate' = 'declined' then
            raise 'the card was declined';
        end if;
    exception when raise_exception then
        perform oncebox.saga_reply(headers, 'failed', error => sqlerrm);
        return;
    end;
    perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('amount_cents', v_amount_cents));
end
$$;

create schema ship;
create table ship.parcel (n bigint not null default nextval('shop.effect'), saga uuid not null);
create function ship.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
declare
    v_saga constant uuid := headers ->> 'oncebox-saga';
    v_fate constant text := payload ->> 'fate';
begin
    if oncebox.saga_barrier(v_saga, headers ->> 'oncebox-step', headers ->> 'oncebox-op',
            (headers ->> 'oncebox-epoch')::integer) <> 'run' then
        return;
    elsif v_fate = 'unreachable' then
        perform oncebox.saga_reply(headers, 'failed', error => 'nobody lives there');
        return;
    elsif v_fate = 'busy' and (headers ->> 'oncebox-attempt')::integer = 1 then
        perform oncebox.saga_reply(headers, 'retry', error => 'no van');
        return;
    end if;
    insert into ship.parcel (saga) values (v_saga);
    perform oncebox.saga_reply(headers, 'succeeded');
end
$$;
"#;

/// Patient enough for restarts of the servers: only a participant's own refusal turns a saga back.
const DEFINITION: &str = r#"
name: delivery
version: 1
steps:
- id: reserve
  do:   {topic: stock.reserve, body: {order: $.input.order}}
  undo: {topic: stock.release, body: {shelf: $.steps.reserve.output.shelf}}
  timeout: 30s
- id: charge
  do:   {topic: pay.charge, body: {customer: $.input.customer, amount_cents: $.input.amount_cents, fate: $.input.fate}}
  undo: {topic: pay.refund, body: {customer: $.input.customer, amount_cents: $.steps.charge.output.amount_cents}}
  timeout: 30s
- id: ship
  do:   {topic: ship.send, body: {order: $.input.order, fate: $.input.fate}}
  timeout: 30s
  retry: {max: 5, initial: 200ms}
"#;

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Every step succeeds.
    Smooth,
    /// Shipping asks for another attempt.
    Busy,
    /// The charge fails.
    Declined,
    /// Shipping fails.
    Unreachable,
}

impl Fate {
    /// One of eight.
    pub fn of(number: u64) -> Self {
        match number {
            0 | 1 => Self::Declined,
            2 => Self::Unreachable,
            3 => Self::Busy,
            _ => Self::Smooth,
        }
    }

    /// As in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Smooth => "smooth",
            Self::Busy => "busy",
            Self::Declined => "declined",
            Self::Unreachable => "unreachable",
        }
    }
}

/// The participants' queues, as their consumers declare them.
pub fn queues(exchange: &str) -> impl Iterator<Item = QueueSpec> {
    let queue = |name: &str, binding: &str, single_active_consumer| QueueSpec {
        name: name.to_owned(),
        exchange: exchange.to_owned(),
        bindings: vec![binding.to_owned()],
        single_active_consumer,
        voids: false,
    };
    [
        queue("stock", "stock.*", true),
        queue("pay", "pay.*", true),
        queue("ship", "ship.*", true),
        queue("oncebox.saga", "oncebox.saga.reply", false),
    ]
    .into_iter()
}

/// Makes the participants' schemas, an account for each of so many customers, the stock, and the definition.
pub async fn open(conn: &mut PgConnection, customers: i32) -> anyhow::Result<()> {
    conn.execute(SCHEMA).await?;
    sqlx::query("insert into pay.account (customer, balance_cents) select id, $1 from generate_series(1, $2) as id")
        .bind(BALANCE_CENTS)
        .bind(customers)
        .execute(&mut *conn)
        .await?;
    sqlx::query("insert into stock.shelf (pieces) values ($1)").bind(PIECES).execute(&mut *conn).await?;
    let faults = |faults: Vec<Fault>| anyhow::anyhow!("the definition of the demo: {faults:?}");
    let document = document_from_text(DEFINITION).map_err(faults)?;
    let definition = Definition::parse(&document).map_err(faults)?;
    define(conn, &definition.name, definition.version, &document, Some("oncebox demo")).await?;
    Ok(())
}

/// Starts the delivery of an order, in the order's transaction.
pub async fn start(
    conn: &mut PgConnection,
    order: u64,
    customer: i32,
    amount_cents: i64,
    fate: Fate,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "select oncebox.saga_start('delivery', 'order-' || $1,
            jsonb_build_object('order', $1, 'customer', $2, 'amount_cents', $3, 'fate', $4))",
    )
    .bind(order as i64)
    .bind(customer)
    .bind(amount_cents)
    .bind(fate.name())
    .execute(conn)
    .await?;
    Ok(())
}

/// What the tables of sagas and participants hold after the run.
#[derive(Debug, Default, Clone, Deserialize)]
pub struct Deliveries {
    pub sagas: i64,
    /// Orders with a fate.
    pub orders_to_deliver: i64,
    pub completed: i64,
    pub to_complete: i64,
    pub compensated: i64,
    pub to_compensate: i64,
    /// Sagas whose end is not the one of their order's fate; some of the orders.
    pub wrong_end: i64,
    pub examples: Vec<i64>,
    /// Effects beyond the first of their saga and kind.
    pub doubled: i64,
    /// Sagas whose effects are not those of their end.
    pub wrong_effects: i64,
    /// Sagas that were refunded after what they had reserved was released, or undone before they were done.
    pub out_of_order: i64,
    /// Balances, and what was charged less what was refunded.
    pub money_cents: i64,
    pub money_before_cents: i64,
    /// Pieces on the shelf, and those reserved for parcels that were sent.
    pub pieces: i64,
    pub pieces_before: i64,
    /// Sagas whose history does not lead to where they stand.
    #[serde(skip)]
    pub unverified: i64,
}

const DELIVERIES: &str = r#"
with
effect as (
    select saga, kind, n from stock.movement
    union all select saga, kind, n from pay.entry
    union all select saga, 'ship', n from ship.parcel
), had as (
    select s.id, s.status, o.id as order_id, o.fate,
        case when o.fate in ('smooth', 'busy') then 'completed' else 'compensated' end as must_be,
        case o.fate when 'declined' then 'release reserve' when 'unreachable' then 'charge refund release reserve'
            else 'charge reserve ship' end as must_have,
        coalesce((select string_agg(distinct e.kind, ' ' order by e.kind) from effect as e where e.saga = s.id), '') as has
    from oncebox.saga as s left join shop.orders as o on s.business_key = 'order-' || o.id
), wrong_end as (
    select id, order_id from had where status is distinct from must_be or fate is null
), turned as (
    select saga,
        min(n) filter (where kind = 'reserve') as reserved, min(n) filter (where kind = 'charge') as charged,
        max(n) filter (where kind = 'refund') as refunded, max(n) filter (where kind = 'release') as released
    from effect group by saga
)
select to_jsonb(deliveries) from (select
    (select count(*) from oncebox.saga) as sagas,
    (select count(*) from shop.orders where fate is not null) as orders_to_deliver,
    (select count(*) from oncebox.saga where status = 'completed') as completed,
    (select count(*) from shop.orders where fate in ('smooth', 'busy')) as to_complete,
    (select count(*) from oncebox.saga where status = 'compensated') as compensated,
    (select count(*) from shop.orders where fate in ('declined', 'unreachable')) as to_compensate,
    (select count(*) from wrong_end) as wrong_end,
    array(select order_id from wrong_end where order_id is not null order by order_id limit 5) as examples,
    (select coalesce(sum(times - 1), 0)::bigint from (select count(*) as times from effect group by saga, kind) as e) as doubled,
    (select count(*) from had where array(select unnest(string_to_array(has, ' ')) order by 1)
        is distinct from array(select unnest(string_to_array(must_have, ' ')) order by 1)) as wrong_effects,
    (select count(*) from turned where released < refunded or released < reserved or refunded < charged
        or charged < reserved) as out_of_order,
    (select sum(balance_cents)::bigint from pay.account) + (select coalesce(sum(
        case kind when 'charge' then amount_cents else -amount_cents end), 0)::bigint from pay.entry) as money_cents,
    $1 * (select count(*) from pay.account) as money_before_cents,
    (select pieces from stock.shelf) + (select count(*) from ship.parcel) as pieces,
    $2 as pieces_before) as deliveries
"#;

impl Deliveries {
    pub async fn read(conn: &mut PgConnection) -> anyhow::Result<Self> {
        let Json(mut deliveries): Json<Self> =
            sqlx::query_scalar(DELIVERIES).bind(BALANCE_CENTS).bind(PIECES).fetch_one(&mut *conn).await?;
        // One demo is small: all of them at once.
        for (id, _) in verify::finished(conn, None, i64::MAX).await? {
            let report = verify::verify(conn, id).await?;
            deliveries.unverified += i64::from(report.is_none_or(|report| !report.is_clean()));
        }
        Ok(deliveries)
    }
}
