-- Sagas: their tables. Who moves a saga writes its rows, its history and its commands in one transaction.

do $$
begin
    if not exists (select from pg_roles where rolname = 'oncebox_orchestrator') then
        begin
            execute 'create role oncebox_orchestrator nologin';
        exception when duplicate_object or unique_violation then
            null;
        end;
    end if;
end
$$;
grant usage on schema oncebox to oncebox_orchestrator;
grant select on oncebox.schema_history, oncebox.setting to oncebox_orchestrator;

-- A definition never changes under its version; another one is another version.
create table oncebox.saga_definition (
    name text not null check (octet_length(name) between 1 and 100),
    version integer not null check (version >= 1),
    document jsonb not null check (jsonb_typeof(document) = 'object'),
    hash bytea not null,
    steps text[] not null,
    pivot text,
    signals text[] not null,
    deadline_ms bigint,
    created_at timestamptz not null default clock_timestamp(),
    created_by text,
    primary key (name, version)
);
comment on column oncebox.saga_definition.steps is
    'made from the document: ids in the order of saga_step.ordinal, each after those it waits for, else as in the document';
comment on column oncebox.saga_definition.pivot is 'made from the document';
comment on column oncebox.saga_definition.signals is 'made from the document';
comment on column oncebox.saga_definition.deadline_ms is 'made from the document';
comment on column oncebox.saga_definition.hash is 'sha256 of document::text: sagas keep it, so a changed definition shows';

-- One row a saga. seq is that of its newest history row, head that row's hash.
create table oncebox.saga (
    id uuid primary key,
    definition text,
    version integer,
    definition_hash bytea,
    business_key text not null check (octet_length(business_key) between 1 and 255),
    status text not null check (status in (
        'scheduled', 'running', 'completed', 'compensating', 'compensated', 'cancelled', 'stuck', 'terminated')),
    phase text not null default 'forward' check (phase in ('forward', 'backward')),
    paused boolean not null default false,
    cancel text,
    reason text,
    seq bigint not null default 0 check (seq >= 0),
    head bytea not null default '\x',
    input jsonb not null default '{}',
    labels jsonb not null default '{}' check (jsonb_typeof(labels) = 'object'),
    created_at timestamptz not null,
    start_at timestamptz not null,
    deadline timestamptz,
    ended_at timestamptz,
    changed_at timestamptz not null,
    next_due timestamptz,
    foreign key (definition, version) references oncebox.saga_definition (name, version),
    check (num_nulls(definition, version, definition_hash) in (0, 3)),
    check ((ended_at is not null) = (status in ('completed', 'compensated', 'cancelled', 'terminated'))),
    check (ended_at is null or (next_due is null and not paused)),
    check (phase = 'backward' or status not in ('compensating', 'compensated')),
    check (phase = 'forward' or status not in ('scheduled', 'running', 'completed', 'cancelled'))
) with (fillfactor = 70);
-- One saga a business key and definition; those without a definition share one space of keys.
create unique index saga_business_key on oncebox.saga (coalesce(definition, ''), business_key);
-- Serves the orchestrator's look for what is due.
create index saga_due on oncebox.saga (next_due, id) where next_due is not null;
-- Serves lists: ids are UUIDv7, so their order is that of making.
create index saga_status on oncebox.saga (status, id);
create index saga_labels on oncebox.saga using gin (labels jsonb_path_ops);
-- Serves the removal of what ended long ago.
create index saga_ended on oncebox.saga (ended_at) where ended_at is not null;
-- Serves the foreign key.
create index saga_definition_version on oncebox.saga (definition, version);

comment on column oncebox.saga.definition is 'null: opened without a definition, by saga_open';
comment on column oncebox.saga.cancel is 'why it is to be cancelled, while that waits for the outcome of the pivot';
comment on column oncebox.saga.reason is 'why it is compensating, cancelled, stuck or terminated';
comment on column oncebox.saga.next_due is 'when the orchestrator must look at it: start, timeout, retry, deadline; null: when something arrives';

create table oncebox.saga_step (
    saga_id uuid not null references oncebox.saga on delete cascade,
    step text not null check (octet_length(step) between 1 and 100),
    ordinal integer not null check (ordinal >= 0),
    pivot boolean not null default false,
    status text not null default 'pending' check (status in (
        'pending', 'dispatched', 'skipped', 'succeeded', 'failed', 'backoff', 'unknown',
        'undoing', 'undone', 'undo_noop', 'undo_backoff', 'undo_stuck', 'undo_skipped')),
    epoch integer not null default 0 check (epoch >= 0),
    attempt integer not null default 0 check (attempt >= 0),
    message_id uuid,
    due_at timestamptz,
    output jsonb,
    error text,
    dispatched_at timestamptz,
    changed_at timestamptz not null,
    primary key (saga_id, step),
    unique (saga_id, ordinal)
) with (fillfactor = 70);
comment on column oncebox.saga_step.epoch is '0: never dispatched; rises when a step that failed for good runs again';
comment on column oncebox.saga_step.attempt is 'commands sent for the present op since an operator last asked for it';
comment on column oncebox.saga_step.message_id is 'the newest command';
comment on column oncebox.saga_step.due_at is 'end of the wait for a reply, or time of the next attempt';

-- What undoes a step: written with its command, its body completed from the reply.
create table oncebox.saga_compensation (
    saga_id uuid not null,
    step text not null,
    ordinal integer not null,
    topic text not null check (octet_length(topic) between 1 and 255),
    payload jsonb,
    status text not null default 'recorded' check (status in (
        'recorded', 'ready', 'sent', 'undone', 'noop', 'stuck', 'skipped', 'released')),
    recorded_at timestamptz not null,
    changed_at timestamptz not null,
    primary key (saga_id, step),
    foreign key (saga_id, step) references oncebox.saga_step on delete cascade
) with (fillfactor = 70);
comment on column oncebox.saga_compensation.status is 'recorded: the command is out, the body waits for its reply; ready: the body is complete; sent: '
    'the undo is out; released: never needed, the saga completed or the step failed';

-- Append-only; each row holds the hash of everything before it.
create table oncebox.saga_history (
    saga_id uuid not null references oncebox.saga on delete cascade,
    seq bigint not null check (seq >= 1),
    at timestamptz not null,
    event text not null,
    detail jsonb not null,
    changes jsonb not null,
    cause uuid,
    hash bytea not null,
    primary key (saga_id, seq)
);
comment on column oncebox.saga_history.detail is 'what happened: with the definition, enough to compute every state again';
comment on column oncebox.saga_history.changes is 'what became of it: {"saga": {"from", "to"}, "steps": [...], "commands": [...]}';
comment on column oncebox.saga_history.cause is 'the message that brought it';

create table oncebox.saga_signal (
    saga_id uuid not null references oncebox.saga on delete cascade,
    name text not null check (octet_length(name) between 1 and 100),
    payload jsonb,
    sent_at timestamptz not null,
    state text not null default 'new' check (state in ('new', 'kept', 'taken')),
    look_at timestamptz,
    primary key (saga_id, name)
);
-- Serves the orchestrator's look for signals it has not seen.
create index saga_signal_new on oncebox.saga_signal ((coalesce(look_at, sent_at)), saga_id) where state = 'new';
comment on column oncebox.saga_signal.look_at is 'not before: the orchestrator could not work on its saga; null: at once';
comment on column oncebox.saga_signal.state is 'new: the orchestrator has not seen it; kept: no step waits for it yet; taken: a step has it';

-- At the participant: which actions and compensations ran. A row of a do that never ran is a tombstone: it must not run.
create table oncebox.saga_barrier (
    saga_id uuid not null,
    step text not null,
    op text not null check (op in ('do', 'undo')),
    epoch integer not null,
    tombstone boolean not null default false,
    at timestamptz not null default clock_timestamp(),
    primary key (saga_id, step, op, epoch)
);
-- Serves the removal of old rows.
create index saga_barrier_at on oncebox.saga_barrier using brin (at);

-- Sagas that were removed after their retention: asked for, they are gone, not unknown.
create table oncebox.saga_purged (
    id uuid primary key,
    status text not null,
    ended_at timestamptz not null,
    purged_at timestamptz not null default clock_timestamp()
);

-- A request that starts a saga, by its Idempotency-Key: repeated, it gets the same saga.
create table oncebox.saga_request (
    idempotency_key text primary key check (octet_length(idempotency_key) between 1 and 255),
    request_hash bytea not null,
    saga_id uuid not null,
    at timestamptz not null default clock_timestamp()
);
create index saga_request_at on oncebox.saga_request using brin (at);

alter table oncebox.setting
    add column saga_retention interval not null default '90 days'
        check (saga_retention between interval '1 hour' and interval '3650 days'),
    add column barrier_retention interval not null default '60 days'
        check (barrier_retention between interval '1 day' and interval '3650 days');
comment on column oncebox.setting.saga_retention is 'sagas that ended longer ago are removed';
comment on column oncebox.setting.barrier_retention is 'barrier rows are kept for this long: longer than any command can be under way';

grant select on
    oncebox.saga_definition, oncebox.saga, oncebox.saga_step, oncebox.saga_compensation, oncebox.saga_history,
    oncebox.saga_signal, oncebox.saga_barrier, oncebox.saga_purged
to oncebox_orchestrator, oncebox_admin;
grant select, insert, delete on oncebox.saga_definition to oncebox_admin;
grant select, insert, delete on oncebox.saga_request to oncebox_admin;
