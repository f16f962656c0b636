//! Goal: a thousand sagas over two databases, while orchestrators, relays and participants are killed again and again,
//! at random and at each named step: every saga ends, money and stock are conserved, nothing happens twice, what is
//! undone is undone in reverse, and nothing is left behind.

use crate::support::participant::define;
use crate::support::wire::Tap;
use crate::support::{LIMIT, Lab, Process, connect, eventually, eventually_number, number};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use std::time::{Duration, Instant};

const SAGAS: i64 = 1_000;
const ITEMS: i64 = 20;
const STOCK: i64 = 45;
const ACCOUNTS: i64 = 50;
const MONEY: i64 = 10_000;

/// Where sagas, stock and parcels are. Nothing is unique: what happens twice is there twice. Some calls fail, every
/// 13th asks for another attempt, after its work.
const STOCK_SCHEMA: &str = "
    create schema part;
    create sequence part.calls;
    create table part.level (item bigint primary key, free bigint not null);
    create table part.effect (n bigserial, saga uuid, step text, op text, epoch integer, amount bigint,
        at timestamptz default clock_timestamp());
    create function part.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    declare
        v_saga uuid := headers ->> 'oncebox-saga';
        v_step text := headers ->> 'oncebox-step';
        v_op text := headers ->> 'oncebox-op';
        v_epoch integer := headers ->> 'oncebox-epoch';
        v_call bigint := nextval('part.calls');
    begin
        if v_call % 101 = 0 then raise exception 'some calls fail'; end if;
        if oncebox.saga_barrier(v_saga, v_step, v_op, v_epoch) <> 'run' then return; end if;
        if v_call % 13 = 0 then perform oncebox.saga_reply(headers, 'retry'); return; end if;
        if v_step = 'reserve' then
            update part.level set free = free + case v_op when 'do' then -1 else 1 end
            where item = (payload ->> 'item')::bigint and (v_op = 'undo' or free > 0);
        else
            perform from part.level where (payload ->> 'ship')::boolean limit 1;
        end if;
        if not found then
            perform oncebox.saga_reply(headers, 'failed', error => 'not today');
            return;
        end if;
        insert into part.effect (saga, step, op, epoch) values (v_saga, v_step, v_op, v_epoch);
        perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('done', v_step));
    end
    $$;";

/// Where the money is: it goes from an account into the till, or not.
const BANK_SCHEMA: &str = "
    create schema part;
    create sequence part.calls;
    create table part.account (id bigint primary key, balance bigint not null check (balance >= 0));
    create table part.effect (n bigserial, saga uuid, step text, op text, epoch integer, amount bigint,
        at timestamptz default clock_timestamp());
    create function part.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    declare
        v_saga uuid := headers ->> 'oncebox-saga';
        v_step text := headers ->> 'oncebox-step';
        v_op text := headers ->> 'oncebox-op';
        v_epoch integer := headers ->> 'oncebox-epoch';
        v_amount bigint := payload ->> 'amount';
        v_call bigint := nextval('part.calls');
    begin
        if v_call % 101 = 0 then raise exception 'some calls fail'; end if;
        if oncebox.saga_barrier(v_saga, v_step, v_op, v_epoch) <> 'run' then return; end if;
        if v_call % 13 = 0 then perform oncebox.saga_reply(headers, 'retry'); return; end if;
        if v_op = 'do' and v_amount > 500 then
            perform oncebox.saga_reply(headers, 'failed', error => 'no money');
            return;
        end if;
        if v_op = 'undo' then v_amount := -v_amount; end if;
        update part.account set balance = balance - v_amount where id = (payload ->> 'account')::bigint;
        update part.account set balance = balance + v_amount where id = 0;
        insert into part.effect (saga, step, op, epoch, amount) values (v_saga, v_step, v_op, v_epoch, v_amount);
        perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('amount', abs(v_amount)));
    end
    $$;";

/// Times that a loaded machine can keep; the copies come from those that died.
fn order() -> Value {
    let step = |id: &str, topic: &str, body: Value| {
        json!({
            "id": id, "do": {"topic": format!("{topic}.do"), "body": body}, "timeout": "40s",
            "retry": {"max": 30, "initial": "50ms", "factor": 2, "cap": "500ms"},
            "undo_retry": {"max": 100, "initial": "50ms", "factor": 2, "cap": "500ms"},
        })
    };
    let mut reserve = step("reserve", "stock", json!({"item": "$.input.item"}));
    reserve["undo"] = json!({"topic": "stock.undo", "body": {"item": "$.input.item"}});
    let mut charge = step("charge", "bank", json!({"account": "$.input.account", "amount": "$.input.amount"}));
    charge["undo"] =
        json!({"topic": "bank.undo", "body": {"account": "$.input.account", "amount": "$.steps.charge.output.amount"}});
    json!({"name": "order", "version": 1, "steps": [reserve, charge, step("ship", "stock", json!({"ship": "$.input.ship"}))]})
}

/// Where an orchestrator ends itself, one after the other.
const POINTS: &[&str] = &[
    "saga.replied",
    "saga.decided",
    "saga.applied",
    "saga.due_found",
    "saga.due_decided",
    "saga.due_applied",
    "saga.due_committed",
    "consumer.batch_accepted",
    "consumer.batch_handled",
    "consumer.batch_committed",
];

/// The place of the shop's relay among the crew.
const RELAY: usize = 2;

/// The processes, each of which can be killed and started again.
struct Crew {
    shop: Lab,
    bank: Lab,
    config: String,
    members: Vec<(&'static str, Process)>,
    kills: u32,
}

impl Crew {
    fn spawn(&self, member: &str, failpoint: Option<&str>) -> Process {
        let mut command = match member {
            "relay" | "bank's relay" => self.shop.command(&["relay"]),
            "participants" => self.shop.command(&["consume", "--config", &self.config]),
            _ => self.shop.command(&["orchestrate"]),
        };
        if member == "bank's relay" {
            command.env("ONCEBOX_DATABASE_URL", &self.bank.database_url);
        }
        if let Some(failpoint) = failpoint {
            command.env("ONCEBOX_FAILPOINT", failpoint);
        }
        Process::spawn(command)
    }

    /// Starts a member in the place of the one before it, which has ended.
    async fn replace(&mut self, place: usize, failpoint: Option<&str>) {
        let member = self.members[place].0;
        // The lease of a relay that has died: nobody has to wait for its end.
        let lab = match member {
            "relay" => Some(&self.shop),
            "bank's relay" => Some(&self.bank),
            _ => None,
        };
        if let Some(lab) = lab {
            lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
        }
        self.members[place].1 = self.spawn(member, failpoint);
    }

    /// Where things are, for who has to find out why they are not where they should be.
    async fn look(&self) -> String {
        let query = "select jsonb_build_object(
            'steps', (select jsonb_object_agg(status, n) from (
                select k.status, count(*) as n from oncebox.saga_step as k group by k.status) as k),
            'held', (select jsonb_object_agg(c, n) from (
                select consumer || ' ' || reason as c, count(*) as n from oncebox.inbox_held group by 1) as h),
            'lag', (select count(*) from oncebox.outbox_held), 'log', (select count(*) from oncebox.outbox),
            'due', (select count(*) from oncebox.saga where next_due < now()))::text";
        let of_shop: String = sqlx::query_scalar(query).fetch_one(&mut self.shop.connect().await).await.expect("reads");
        let of_bank: String = sqlx::query_scalar(query).fetch_one(&mut self.bank.connect().await).await.expect("reads");
        format!("shop {of_shop} bank {of_bank}")
    }

    async fn kill(&mut self, place: usize, failpoint: Option<&str>) {
        self.members[place].1.kill9();
        self.kills += 1;
        self.replace(place, failpoint).await;
    }
}

async fn start(shop: &Lab, from: i64, to: i64) {
    shop.sql(&format!(
        "select oncebox.saga_start('order', 'o' || i, jsonb_build_object(
            'item', i % {ITEMS}, 'account', 1 + i % {ACCOUNTS}, 'amount', case when i % 7 = 0 then 501 else 1 + i % 90 end,
            'ship', i % 5 <> 0))
        from generate_series({from}, {to}) as i"
    ))
    .await;
}

/// Goal: as the file says.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_sagas_through_crashes() {
    let (shop, bank) = (Lab::shared().await, Lab::shared().await);
    shop.sql(STOCK_SCHEMA).await;
    shop.sql(&format!("insert into part.level select i, {STOCK} from generate_series(0, {ITEMS} - 1) as i")).await;
    bank.sql(BANK_SCHEMA).await;
    bank.sql(&format!(
        "insert into part.account select i, case i when 0 then 0 else {MONEY} end from generate_series(0, {ACCOUNTS}) as i"
    ))
    .await;
    define(&shop, &order()).await;
    let consumer = |name: &str, database: &str| {
        format!(
            "[[consumer]]\nname = \"{name}\"\nbindings = [\"{name}.*\"]\nhandler = {{ sql = \"part.on_command\" }}\n{database}\
             order = \"none\"\nbatch = 50\nconcurrency = 2\nbackoff_initial = \"20ms\"\nbackoff_cap = \"100ms\"\n\
             max_attempts = 1000\n"
        )
    };
    let config = consumer("stock", "") + &consumer("bank", &format!("database_url = \"{}\"\n", bank.database_url));
    let config = shop.config(&config);
    // Queues before the first message, or it would be unroutable.
    shop.consume(&config).await.stop().await;
    let first = shop.spawn(&["orchestrate"]);
    first.wait_for_log("consuming").await;
    let tap = Tap::on(&shop).await;
    let mut crew = Crew { shop, bank, config, members: vec![("orchestrator", first)], kills: 0 };
    for member in ["another orchestrator", "relay", "bank's relay", "participants"] {
        let process = crew.spawn(member, None);
        crew.members.push((member, process));
    }

    let began = Instant::now();
    let share = SAGAS / POINTS.len() as i64;
    for (n, point) in POINTS.iter().enumerate() {
        // Batches are rare in a storm: what comes again goes alone.
        let hit = format!("{point}={}", if point.starts_with("saga.") { 1 + n % 3 } else { 1 });
        crew.kill(0, Some(&hit)).await;
        // A relay dies with messages that are confirmed and not yet settled: they come twice.
        crew.kill(RELAY, Some("relay.confirmed=1")).await;
        start(&crew.shop, share * n as i64 + 1, share * (n as i64 + 1)).await;
        eventually("the relay dies", async || crew.members[RELAY].1.log().contains("failpoint").then_some(())).await;
        crew.members[RELAY].1.end().await;
        crew.kills += 1;
        crew.replace(RELAY, None).await;
        // Others die one after the other until the first has met its point, one in a phase at least.
        let (waiting, mut next) = (Instant::now(), 0);
        loop {
            let quiet = Instant::now();
            // One at least in each phase; more would leave them no time to come up and work on a loaded machine.
            let wait = Duration::from_secs(if next == 0 { 1 } else { 8 });
            while quiet.elapsed() < wait && (next == 0 || !crew.members[0].1.log().contains("failpoint")) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            if crew.members[0].1.log().contains("failpoint") {
                crew.members[0].1.end().await;
                break;
            }
            assert!(
                waiting.elapsed() < LIMIT,
                "{hit} is not passed: {} {}",
                crew.look().await,
                crew.members[0].1.log()
            );
            // Mixed by the place of the point, so that every member has its turn.
            let victim = 1 + (n * 3 + next) % (crew.members.len() - 1);
            crew.kill(victim, None).await;
            next += 1;
        }
        crew.replace(0, None).await;
    }
    let stormed = began.elapsed();

    let mut conn = crew.shop.connect().await;
    let open = "select count(*) from oncebox.saga where status not in ('completed', 'compensated')";
    let drain = Instant::now();
    while number(&mut conn, open).await > 0 {
        assert!(drain.elapsed() < 2 * LIMIT, "not all ended: {}", crew.look().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ended = began.elapsed();
    eventually_number(&mut conn, "select count(*) from oncebox.inbox_held", 0).await;
    let mut bank = connect(&crew.bank.database_url).await;
    eventually_number(&mut bank, "select count(*) from oncebox.inbox_held", 0).await;

    // The bank's ledger beside the shop's.
    let rows: String = sqlx::query_scalar("select coalesce(jsonb_agg(e), '[]')::text from part.effect as e")
        .fetch_one(&mut bank)
        .await
        .unwrap();
    conn.execute(AssertSqlSafe(format!(
        "create table everything as select saga, step, op, amount, at from part.effect
        union all
        select saga, step, op, amount, at from jsonb_to_recordset($j${rows}$j$::jsonb)
            as e (saga uuid, step text, op text, amount bigint, at timestamptz)"
    )))
    .await
    .unwrap();
    // What each saga did, as its status says it should have.
    let wrong = "with did as (
            select s.id, s.status, s.input,
                array_agg(e.step || ' ' || e.op order by e.at) filter (where e.saga is not null) as did,
                sum(e.amount) as amount
            from oncebox.saga as s left join everything as e on e.saga = s.id group by s.id
        )
        select coalesce(string_agg(format('%s %s %s', id, status, did), E'\\n'), '') from did
        where case status
            when 'completed' then
                did is distinct from array['reserve do', 'charge do', 'ship do']
                or amount <> (input ->> 'amount')::bigint
            else
                coalesce(did, '{}') not in ('{}', '{reserve do,reserve undo}',
                    '{reserve do,charge do,charge undo,reserve undo}')
                or coalesce(amount, 0) <> 0
            end";
    let wrong: String = sqlx::query_scalar(wrong).fetch_one(&mut conn).await.unwrap();
    assert_eq!(wrong, "");
    let sold = "select count(*) from oncebox.saga where status = 'completed'";
    let (sold, total) = (number(&mut conn, sold).await, number(&mut conn, "select count(*) from oncebox.saga").await);
    assert_eq!(total, SAGAS);
    assert!(sold > SAGAS / 3 && sold < SAGAS * 4 / 5, "{sold} of {SAGAS} completed: the test shows little");
    assert_eq!(number(&mut conn, "select sum(free)::bigint from part.level").await, ITEMS * STOCK - sold);
    assert_eq!(number(&mut bank, "select sum(balance)::bigint from part.account").await, ACCOUNTS * MONEY);
    let paid = "select sum((input ->> 'amount')::bigint)::bigint from oncebox.saga where status = 'completed'";
    assert_eq!(number(&mut bank, "select balance from part.account where id = 0").await, number(&mut conn, paid).await);

    // Nothing is left behind, and the histories are whole.
    for (what, query) in [
        ("histories", "select count(*) from oncebox.saga where oncebox.saga_history_broken(id) is not null"),
        ("times", "select count(*) from oncebox.saga where next_due is not null"),
        (
            "compensations",
            "select count(*) from oncebox.saga_compensation where status in ('recorded', 'ready', 'sent')",
        ),
        ("parked", "select count(*) from oncebox.outbox_held"),
        // A tombstone beside an effect, or an effect without its row.
        (
            "barrier",
            "select count(*) from part.effect as e where not exists (
                select from oncebox.saga_barrier as b
                where (b.saga_id, b.step, b.op, b.epoch) = (e.saga, e.step, e.op, e.epoch) and not b.tombstone)",
        ),
    ] {
        assert_eq!(number(&mut conn, query).await, 0, "{what}");
        if matches!(what, "parked" | "barrier") {
            assert_eq!(number(&mut bank, query).await, 0, "{what} at the bank");
        }
    }

    // There was something to survive.
    let mut published = 0;
    for lab in [&crew.shop, &crew.bank] {
        published += lab.number("select count(*) from oncebox.outbox").await;
    }
    let duplicates = tap.read(published as usize).await.duplicates();
    println!(
        "{sold} of {SAGAS} completed; {} kills in {stormed:?}, all ended after {ended:?}; {published} messages, \
         {duplicates} duplicates",
        crew.kills
    );
    assert!(duplicates > 0, "nothing came twice");
    assert!(crew.kills >= POINTS.len() as u32 * 2, "{} kills", crew.kills);
    for (member, mut process) in crew.members {
        assert!(process.stop().await.0.success(), "{member}: {}", process.log());
    }
}
