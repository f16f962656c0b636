//! Participants of sagas: a function in their own database that does what the command's body says, and writes down
//! every call and every effect, none of them unique, so that a double one shows.

use super::{LIMIT, Lab, Process, connect, eventually_number};
use oncebox::saga::definition::Definition;
use oncebox::saga::state::Event;
use oncebox::saga::store::{self, Defined, Definitions};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The body is `{"plan": {step: {"do": [outcome, …], "undo": […]}}}`; the n-th call of a step says the n-th outcome,
/// later ones the last. Beside the outcomes of `saga_reply`: `lost` (as if the command had never come), `silent` (the
/// work is done, and no reply leaves), `raise` (the handler fails). Without a plan everything succeeds.
const SCHEMA: &str = "
    create schema part;
    create table part.call (
        n bigserial primary key, saga uuid not null, step text not null, op text not null, epoch integer not null,
        attempt integer not null, answer text not null, said text not null, headers jsonb not null, body jsonb not null,
        at timestamptz not null default clock_timestamp());
    create table part.effect (
        n bigserial primary key, saga uuid not null, step text not null, op text not null, epoch integer not null,
        at timestamptz not null default clock_timestamp());
    create function part.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
    language plpgsql as $$
    declare
        v_saga uuid := headers ->> 'oncebox-saga';
        v_step text := headers ->> 'oncebox-step';
        v_op text := headers ->> 'oncebox-op';
        v_epoch integer := headers ->> 'oncebox-epoch';
        v_plan jsonb := payload -> 'plan' -> (headers ->> 'oncebox-step') -> (headers ->> 'oncebox-op');
        v_say text;
        v_answer text;
    begin
        select coalesce(v_plan ->> count(*)::integer, v_plan ->> -1, 'succeeded') into v_say
        from part.call as c where c.saga = v_saga and c.step = v_step and c.op = v_op;
        if v_say = 'raise' then raise exception 'this participant cannot'; end if;
        v_answer := case when v_say = 'lost' then 'lost' else oncebox.saga_barrier(v_saga, v_step, v_op, v_epoch) end;
        insert into part.call (saga, step, op, epoch, attempt, answer, said, headers, body)
        values (v_saga, v_step, v_op, v_epoch, (headers ->> 'oncebox-attempt')::integer, v_answer, v_say, headers, payload);
        if v_answer <> 'run' then return; end if;
        if v_say in ('succeeded', 'silent', 'in_progress') then
            insert into part.effect (saga, step, op, epoch) values (v_saga, v_step, v_op, v_epoch);
        end if;
        if v_say <> 'silent' then
            perform oncebox.saga_reply(headers, v_say,
                case when v_say = 'succeeded' then jsonb_build_object('id', v_step || ' ' || v_epoch) end,
                case when v_say in ('failed', 'retry') then v_step || ' says no' end);
        end if;
    end
    $$;";

/// A participant's consumer, by name, for these topics.
pub fn consumer(name: &str, database_url: Option<&str>, bindings: &[&str]) -> String {
    let database = database_url.map(|url| format!("database_url = \"{url}\"\n")).unwrap_or_default();
    format!(
        "[[consumer]]\nname = \"{name}\"\nbindings = {bindings:?}\nhandler = {{ sql = \"part.on_command\" }}\n{database}\
         order = \"none\"\nbatch = 100\nconcurrency = 2\nbackoff_initial = \"20ms\"\nbackoff_cap = \"100ms\"\n\
         max_attempts = 1000\n"
    )
}

/// Makes the participant's tables and function in a database.
pub async fn prepare(database_url: &str) {
    connect(database_url).await.execute(AssertSqlSafe(SCHEMA)).await.expect("the participant's schema");
}

/// Stores a definition.
pub async fn define(lab: &Lab, document: &Value) {
    let parsed = Definition::parse(document).unwrap_or_else(|faults| panic!("{document}: {faults:?}"));
    let defined = store::define(&mut lab.connect().await, &parsed.name, parsed.version, document, None).await;
    assert_eq!(defined.expect("it is stored"), Defined::New);
}

/// A lab where sagas run: an orchestrator, a relay, and a participant for the topics `do.*` and `undo.*`.
pub struct Shop {
    pub lab: Lab,
    orchestrator: Process,
    _others: [Process; 2],
}

impl Shop {
    pub async fn open() -> Self {
        Self::with("").await
    }

    /// With more consumers.
    pub async fn with(consumers: &str) -> Self {
        Self::made(consumers, None).await
    }

    /// With an orchestrator that logs in as a role of this name, which has no rights but an orchestrator's.
    pub async fn run_by(role: &str) -> Self {
        Self::made("", Some(role)).await
    }

    async fn made(consumers: &str, role: Option<&str>) -> Self {
        let lab = Lab::shared().await;
        prepare(&lab.database_url).await;
        let config = lab.config(&(consumer("part", None, &["do.*", "undo.*"]) + consumers));
        let mut command = lab.command(&["orchestrate"]);
        if let Some(role) = role {
            lab.sql(&format!("create role {role} login in role oncebox_orchestrator, oncebox_consumer")).await;
            command.env("ONCEBOX_DATABASE_URL", lab.database_url.replace("oncebox@", &format!("{role}@")));
        }
        let orchestrator = Process::spawn(command);
        orchestrator.wait_for_log("consuming").await;
        let consume = lab.consume(&config).await;
        let relay = lab.relay().await;
        Self { lab, orchestrator, _others: [consume, relay] }
    }

    /// One more.
    pub async fn orchestrator(&self) -> Process {
        let orchestrator = self.lab.spawn(&["orchestrate"]);
        orchestrator.wait_for_log("consuming").await;
        orchestrator
    }

    /// A signal, by name, for the orchestrator.
    pub fn signal_orchestrator(&self, signal: &str) {
        self.orchestrator.signal(signal);
    }

    /// What the orchestrator has said.
    pub fn log(&self) -> String {
        self.orchestrator.log()
    }

    pub async fn define(&self, document: Value) {
        define(&self.lab, &document).await;
    }

    /// An operator's action; the refusal in words.
    pub async fn act(&self, saga: Uuid, event: Event) -> Result<(), String> {
        let acted = store::act(&mut self.lab.connect().await, &Definitions::default(), saga, &event, None).await;
        acted.map(drop).map_err(|error| error.to_string())
    }

    pub async fn start(&self, definition: &str, key: &str, input: Value) -> Uuid {
        self.started(&format!("select oncebox.saga_start('{definition}', '{key}', '{input}')")).await
    }

    /// The saga that a statement starts.
    pub async fn started(&self, statement: &str) -> Uuid {
        self.value(statement).await
    }

    /// What a query finds.
    pub async fn value<T>(&self, query: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
    {
        let found = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&mut self.lab.connect().await).await;
        found.unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    pub async fn texts(&self, query: &str) -> Vec<String> {
        let found = sqlx::query_scalar(AssertSqlSafe(query)).fetch_all(&mut self.lab.connect().await).await;
        found.unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    /// Waits until a saga has this status.
    pub async fn ends(&self, saga: Uuid, status: &str) {
        let mut conn = self.lab.connect().await;
        let query = format!("select status from oncebox.saga where id = '{saga}'");
        let began = Instant::now();
        loop {
            let found: String =
                sqlx::query_scalar(AssertSqlSafe(&*query)).fetch_one(&mut conn).await.expect("it is there");
            if found == status {
                return;
            }
            if began.elapsed() > LIMIT {
                let history = format!(
                    "select format('%s %s %s %s', seq, event, detail, changes) from oncebox.saga_history
                    where saga_id = '{saga}' order by seq"
                );
                let parked = "select coalesce(last_error, reason) from oncebox.inbox_held order by n";
                panic!(
                    "saga {saga} is {found}, not {status}, after {LIMIT:?}: {}\n{:#?}\n{:#?}",
                    self.steps(saga).await,
                    self.texts(&history).await,
                    self.texts(parked).await
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a step has this status.
    pub async fn step_is(&self, saga: Uuid, step: &str, status: &str) {
        let query = format!(
            "select count(*) from oncebox.saga_step where saga_id = '{saga}' and step = '{step}' and status = '{status}'"
        );
        eventually_number(&mut self.lab.connect().await, &query, 1).await;
    }

    /// Every step and its status, in order.
    pub async fn steps(&self, saga: Uuid) -> String {
        self.value(&format!(
            "select string_agg(step || ' ' || status, ', ' order by ordinal) from oncebox.saga_step where saga_id = '{saga}'"
        ))
        .await
    }

    /// What participants did, in order.
    pub async fn effects(&self, saga: Uuid) -> Vec<String> {
        self.texts(&format!("select step || ' ' || op from part.effect where saga = '{saga}' order by n")).await
    }

    /// Epochs and attempts of the calls of a step.
    pub async fn calls(&self, saga: Uuid, step: &str, op: &str) -> Vec<(i32, i32)> {
        let query = "select epoch, attempt from part.call where saga = $1 and step = $2 and op = $3 order by n";
        let mut conn = self.lab.connect().await;
        sqlx::query_as(query).bind(saga).bind(step).bind(op).fetch_all(&mut conn).await.expect("reads")
    }

    /// The body of a step's newest command.
    pub async fn body(&self, saga: Uuid, step: &str, op: &str) -> Value {
        self.value(&format!(
            "select body from part.call where saga = '{saga}' and step = '{step}' and op = '{op}' order by n desc limit 1"
        ))
        .await
    }

    /// Waits until a participant has worked on a step.
    pub async fn has_done(&self, saga: Uuid, step: &str) {
        let query = format!(
            "select count(*) from (select from part.effect where saga = '{saga}' and step = '{step}' limit 1) as e"
        );
        eventually_number(&mut self.lab.connect().await, &query, 1).await;
    }

    /// A participant's answer to the newest command of a step.
    pub async fn reply(&self, saga: Uuid, step: &str, outcome: &str) {
        self.lab
            .sql(&format!(
                "select oncebox.saga_reply(c.headers, '{outcome}') from part.call as c
                where c.saga = '{saga}' and c.step = '{step}' order by c.n desc limit 1"
            ))
            .await;
    }

    /// A reply that no participant would give.
    pub async fn raw_reply(&self, saga: Uuid, step: &str, op: &str, epoch: i32, body: &str) {
        let headers = json!({"oncebox-saga": saga, "oncebox-step": step, "oncebox-op": op, "oncebox-epoch": epoch});
        self.lab
            .sql(&format!(
                "select oncebox.outbox_insert('oncebox.saga.reply', convert_to('{body}', 'UTF8'), 'application/json',
                    '{saga}', '{headers}', oncebox.uuid_v7(clock_timestamp()), clock_timestamp(), null)"
            ))
            .await;
    }

    pub async fn signal(&self, saga: Uuid, name: &str, payload: Value) {
        self.lab.sql(&format!("select oncebox.saga_signal('{saga}', '{name}', '{payload}')")).await;
    }

    pub async fn seq(&self, saga: Uuid) -> i64 {
        self.value(&format!("select seq from oncebox.saga where id = '{saga}'")).await
    }

    /// A saga that has ended holds nothing open, has a history without gaps, and happened once.
    pub async fn sound(&self, saga: Uuid) {
        let query = format!(
            "select format('seq %s, history %s, open %s, doubled %s, due %s',
                s.seq - (select count(*) from oncebox.saga_history as h where h.saga_id = s.id),
                s.seq - (select max(h.seq) from oncebox.saga_history as h where h.saga_id = s.id),
                (select count(*) from oncebox.saga_compensation as c
                where c.saga_id = s.id and c.status in ('recorded', 'ready', 'sent')),
                (select count(*) - count(distinct (step, op, epoch)) from part.effect as e where e.saga = s.id),
                num_nonnulls(s.next_due))
            from oncebox.saga as s where s.id = '{saga}'"
        );
        assert_eq!(self.value::<String>(&query).await, "seq 0, history 0, open 0, doubled 0, due 0", "saga {saga}");
    }
}
