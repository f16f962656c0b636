-- What takes part in a saga calls: the barrier before its work, the reply after it; and sagas without a definition.

-- At most so many bytes of a text, whole characters.
create function oncebox.saga_cut(words text, at_most_bytes integer) returns text
language plpgsql immutable strict parallel safe as $$
declare
    v_cut text := left(words, at_most_bytes);
begin
    while octet_length(v_cut) > at_most_bytes loop
        -- At most four bytes a character.
        v_cut := left(v_cut, -((octet_length(v_cut) - at_most_bytes + 3) / 4));
    end loop;
    return v_cut;
end
$$;

-- Puts a reply into the outbox of the participant's own transaction.
create function oncebox.saga_answer(saga_id uuid, headers jsonb, outcome text, output jsonb, error text) returns void
language plpgsql volatile as $$
declare
    v_body constant bytea := convert_to(
        jsonb_build_object('outcome', outcome, 'output', output, 'error', error)::text, 'UTF8');
    v_now constant timestamptz := clock_timestamp();
    v_payload_limit_bytes integer;
begin
    select s.payload_limit_bytes into strict v_payload_limit_bytes from oncebox.setting as s;
    if octet_length(v_body) > v_payload_limit_bytes then
        raise exception using errcode = '22023', message = format('output: the reply must be at most %s bytes (setting '
            'payload_limit_bytes), got %s', v_payload_limit_bytes, octet_length(v_body));
    end if;
    perform oncebox.outbox_insert('oncebox.saga.reply', v_body, 'application/json', saga_id::text, headers,
        oncebox.uuid_v7(v_now), v_now, null);
end
$$;

-- A row says that an op was taken up in an epoch, whatever the attempt. A tombstone is the row of a do that had no
-- effect and must never have one: an undo came first, or it failed for good.
create function oncebox.saga_barrier(saga_id uuid, step text, op text, epoch integer) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_tries constant integer := 100;
    v_saga constant uuid := saga_barrier.saga_id;
    v_step constant text := saga_barrier.step;
    v_op constant text := saga_barrier.op;
    v_epoch constant integer := saga_barrier.epoch;
    v_inserted integer;
    v_never_ran boolean;
begin
    if v_saga is null then
        raise exception using errcode = '22023', message = 'saga_id: must not be null';
    elsif v_step is null or octet_length(v_step) not between 1 and 100 then
        raise exception using errcode = '22023', message = 'step: must be 1 to 100 bytes, got '
            || coalesce(octet_length(v_step)::text, 'null');
    elsif v_op is null or v_op not in ('do', 'undo') then
        raise exception using errcode = '22023', message = 'op: must be do or undo, got ' || coalesce(v_op, 'null');
    elsif v_epoch is null or v_epoch < 1 then
        raise exception using errcode = '22023', message = 'epoch: must be at least 1, got '
            || coalesce(v_epoch::text, 'null');
    end if;

    if v_op = 'do' then
        -- Waits for a twin, or an undo, in flight: nothing is inserted if it commits, the row is ours if it rolls back.
        insert into oncebox.saga_barrier (saga_id, step, op, epoch) values (v_saga, v_step, 'do', v_epoch)
        on conflict do nothing;
        get diagnostics v_inserted = row_count;
        if exists (
            select from oncebox.saga_barrier as b
            where b.saga_id = v_saga and b.step = v_step and b.op = 'undo' and b.epoch = v_epoch
        ) then
            return 'void';
        end if;
        return case v_inserted when 1 then 'run' else 'duplicate' end;
    end if;

    -- The do's row first: from here on no do of this epoch gets to run.
    for v_try in 1..c_tries loop
        insert into oncebox.saga_barrier (saga_id, step, op, epoch, tombstone)
        values (v_saga, v_step, 'do', v_epoch, true)
        on conflict do nothing;
        get diagnostics v_inserted = row_count;
        if v_inserted = 1 then
            v_never_ran := true;
            exit;
        end if;
        -- Holds the row against a reply that deletes it; a mere lock would not stop one with an older snapshot. No row:
        -- such a reply was faster.
        update oncebox.saga_barrier as b set tombstone = b.tombstone
        where b.saga_id = v_saga and b.step = v_step and b.op = 'do' and b.epoch = v_epoch
        returning b.tombstone into v_never_ran;
        exit when found;
    end loop;
    if v_never_ran is null then
        raise exception using errcode = '40001', message = 'the action is being taken back again and again: try again';
    end if;

    insert into oncebox.saga_barrier (saga_id, step, op, epoch) values (v_saga, v_step, 'undo', v_epoch)
    on conflict do nothing;
    get diagnostics v_inserted = row_count;
    if v_inserted = 0 then
        return 'duplicate';
    elsif v_never_ran then
        perform oncebox.saga_answer(
            v_saga,
            jsonb_build_object(
                'oncebox-saga', v_saga, 'oncebox-step', v_step, 'oncebox-op', 'undo', 'oncebox-epoch', v_epoch),
            'undo_noop', null, null);
        return 'void';
    end if;
    return 'run';
end
$$;
comment on function oncebox.saga_barrier is
    'Call it first, in the transaction of the work. run: do the work and reply; duplicate, void: do nothing, commit.';

create function oncebox.saga_reply(
    command_headers jsonb,
    outcome text,
    output jsonb default null,
    error text default null
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_error_bytes constant integer := 4096;
    c_uuid constant text := '^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$';
    v_outcome constant text := saga_reply.outcome;
    v_headers constant jsonb := saga_reply.command_headers;
    v_answer jsonb;
    v_saga uuid;
    v_step text;
    v_op text;
    v_epoch integer;
    v_name text;
begin
    if v_headers is null or jsonb_typeof(v_headers) <> 'object' then
        raise exception using errcode = '22023', message = 'command_headers: must be a JSON object';
    elsif v_outcome is null or v_outcome not in ('succeeded', 'failed', 'retry', 'in_progress') then
        raise exception using errcode = '22023',
            message = 'outcome: must be succeeded, failed, retry or in_progress, got ' || coalesce(v_outcome, 'null');
    end if;
    v_step := v_headers ->> 'oncebox-step';
    v_op := v_headers ->> 'oncebox-op';
    if coalesce(v_headers ->> 'oncebox-saga', '') !~ c_uuid then
        raise exception using errcode = '22023', message = 'command_headers: "oncebox-saga" must be a uuid, got '
            || coalesce(left(v_headers ->> 'oncebox-saga', 100), 'nothing');
    elsif v_step is null or octet_length(v_step) not between 1 and 100 then
        raise exception using errcode = '22023', message = 'command_headers: "oncebox-step" must be 1 to 100 bytes, got '
            || coalesce(octet_length(v_step)::text, 'nothing');
    elsif v_op is null or v_op not in ('do', 'undo') then
        raise exception using errcode = '22023', message = 'command_headers: "oncebox-op" must be do or undo, got '
            || coalesce(left(v_op, 100), 'nothing');
    end if;
    -- Numbers, or strings of digits as a transport without types hands them on.
    foreach v_name in array array['oncebox-epoch', 'oncebox-attempt'] loop
        continue when v_name = 'oncebox-attempt' and v_headers ->> v_name is null;
        if (case when coalesce(v_headers ->> v_name, '') ~ '^0*[1-9][0-9]{0,9}$'
            then (v_headers ->> v_name)::bigint > 2147483647 else true end) then
            raise exception using errcode = '22023', message = format(
                'command_headers: "%s" must be a whole number from 1, got %s',
                v_name, coalesce(left(v_headers ->> v_name, 100), 'nothing'));
        end if;
    end loop;
    v_saga := v_headers ->> 'oncebox-saga';
    v_epoch := v_headers ->> 'oncebox-epoch';
    if saga_reply.output is not null then
        perform oncebox.saga_check_json('output', saga_reply.output);
    end if;

    if v_op = 'undo' and v_outcome in ('retry', 'failed', 'in_progress') then
        -- The next attempt runs again. Work in progress may have died with its participant: whoever does it later calls
        -- the barrier again.
        delete from oncebox.saga_barrier as b
        where b.saga_id = v_saga and b.step = v_step and b.op = 'undo' and b.epoch = v_epoch;
    elsif v_op = 'do' and v_outcome in ('retry', 'in_progress') then
        -- Nothing happened yet. Whoever does the work later calls the barrier again, or meets an undo in its reply.
        -- Waits for an undo in flight before it looks for its row, which keeps this one.
        update oncebox.saga_barrier as b set tombstone = b.tombstone
        where b.saga_id = v_saga and b.step = v_step and b.op = 'do' and b.epoch = v_epoch;
        delete from oncebox.saga_barrier as b
        where b.saga_id = v_saga and b.step = v_step and b.op = 'do' and b.epoch = v_epoch and not b.tombstone
            and not exists (
                select from oncebox.saga_barrier as u
                where u.saga_id = v_saga and u.step = v_step and u.op = 'undo' and u.epoch = v_epoch);
    elsif v_op = 'do' and v_outcome = 'failed' then
        -- Nothing happened, and nothing may: neither an undo that is on its way, since nobody waited long enough for this
        -- reply, nor another attempt must run. A do that was in progress has no row.
        insert into oncebox.saga_barrier as b (saga_id, step, op, epoch, tombstone)
        values (v_saga, v_step, 'do', v_epoch, true)
        on conflict on constraint saga_barrier_pkey do update set tombstone = true where not b.tombstone;
    elsif v_op = 'do' and v_outcome = 'succeeded' then
        -- A do that was in progress has no row until its work is done: from here on an undo has something to undo.
        -- Waits for an undo in flight.
        insert into oncebox.saga_barrier (saga_id, step, op, epoch)
        select v_saga, v_step, 'do', v_epoch
        where not exists (
            select from oncebox.saga_barrier as b
            where b.saga_id = v_saga and b.step = v_step and b.op = 'do' and b.epoch = v_epoch)
        on conflict do nothing;
        if exists (
            select from oncebox.saga_barrier as b
            where b.saga_id = v_saga and b.step = v_step and b.op = 'do' and b.epoch = v_epoch and b.tombstone
        ) then
            raise exception using errcode = '55000',
                message = format('outcome: step "%s" of saga %s must not run in epoch %s: an undo came first, or it has '
                    'failed', v_step, v_saga, v_epoch),
                hint = 'Work only when saga_barrier answers run.';
        end if;
    elsif v_op = 'undo' and v_outcome = 'succeeded' then
        -- An undo that was in progress has no row until its work is done.
        insert into oncebox.saga_barrier (saga_id, step, op, epoch) values (v_saga, v_step, 'undo', v_epoch)
        on conflict do nothing;
    end if;

    v_answer := jsonb_build_object(
        'oncebox-saga', v_saga, 'oncebox-step', v_step, 'oncebox-op', v_op, 'oncebox-epoch', v_epoch);
    if v_headers ->> 'oncebox-attempt' is not null then
        v_answer := v_answer || jsonb_build_object('oncebox-attempt', (v_headers ->> 'oncebox-attempt')::integer);
    end if;
    perform oncebox.saga_answer(v_saga, v_answer, v_outcome, saga_reply.output,
        oncebox.saga_cut(saga_reply.error, c_error_bytes));
end
$$;
comment on function oncebox.saga_reply is
    'Answers a saga''s command when the calling transaction commits: its headers as they came, and the outcome.';

-- Sagas without a definition: an app opens one, those who did something say how it is undone, and the app completes or
-- aborts it. What they call, they call in the transactions of their own work.

create function oncebox.saga_open(business_key text, deadline interval default null) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_tries constant integer := 3;
    v_now constant timestamptz := oncebox.saga_now();
    v_key constant text := saga_open.business_key;
    -- An interval's months and days have no length of their own: 30 days, 24 hours.
    v_length constant interval :=
        ceil(extract(epoch from saga_open.deadline) * 1000)::bigint * interval '1 millisecond';
    v_id uuid;
    v_other record;
begin
    if v_key is null or octet_length(v_key) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'business_key: must be 1 to 255 bytes, got '
            || coalesce(octet_length(v_key)::text, 'null');
    elsif saga_open.deadline <= interval '0' or saga_open.deadline > interval '3650 days' then
        raise exception using errcode = '22023',
            message = format('deadline: must be positive and at most 3650 days, got %s', saga_open.deadline);
    end if;
    for v_try in 1..c_tries loop
        -- Another one that is being opened under the same key is waited for.
        insert into oncebox.saga (id, business_key, status, created_at, start_at, deadline, changed_at, next_due)
        values (
            oncebox.uuid_v7(v_now), v_key, 'running', v_now, v_now, v_now + v_length, v_now, v_now + v_length)
        on conflict (coalesce(definition, ''), business_key) do nothing
        returning id into v_id;
        exit when v_id is not null;

        select s.id, s.status, s.created_at, s.deadline into v_other
        from oncebox.saga as s
        where coalesce(s.definition, '') = '' and s.business_key = v_key;
        if found then
            if v_other.status = 'running' and v_other.deadline is not distinct from v_other.created_at + v_length then
                return v_other.id;
            end if;
            raise exception using errcode = '23505', constraint = 'saga_business_key', message = format(
                'business_key: "%s" belongs to saga %s, which %s', v_key, v_other.id, case v_other.status
                    when 'running' then 'was opened with another deadline' else 'is ' || v_other.status end);
        end if;
        -- It was removed in between.
    end loop;
    if v_id is null then
        raise exception using errcode = '40001', message = 'business_key: it is being used and removed at this moment';
    end if;
    perform oncebox.saga_record(
        v_id, 'opened', jsonb_build_object('business_key', v_key, 'deadline', oncebox.saga_ms(v_now + v_length)), '{}',
        v_now);
    return v_id;
end
$$;
comment on function oncebox.saga_open is
    'Opens a saga without a definition; returns its id. The same call again returns the same id for as long as it runs.';

-- Locks a saga that was opened without a definition, and says where it stands; removed ones are known for some time.
create function oncebox.saga_take(saga_id uuid, out status text, out phase text)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    v_definition text;
begin
    if saga_take.saga_id is null then
        raise exception using errcode = '22023', message = 'saga_id: must not be null';
    end if;
    select s.status, s.phase, s.definition into status, phase, v_definition
    from oncebox.saga as s where s.id = saga_take.saga_id for no key update;
    if not found then
        select p.status into status from oncebox.saga_purged as p where p.id = saga_take.saga_id;
        if not found then
            raise exception using errcode = '22023',
                message = format('saga_id: this database has no saga %s', saga_take.saga_id),
                hint = 'saga_open, saga_compensate_with, saga_complete and saga_abort work in the orchestrator''s database only.';
        end if;
    elsif v_definition is not null then
        raise exception using errcode = '22023', message = format(
            'saga_id: saga %s goes by definition "%s", not by those who enlist', saga_take.saga_id, v_definition);
    end if;
end
$$;

create function oncebox.saga_compensate_with(saga_id uuid, step text, topic text, payload jsonb) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_max_steps constant integer := 1000;
    v_now constant timestamptz := oncebox.saga_now();
    v_saga_id constant uuid := saga_compensate_with.saga_id;
    v_step constant text := saga_compensate_with.step;
    v_topic constant text := saga_compensate_with.topic;
    v_payload constant jsonb := saga_compensate_with.payload;
    v_saga record;
    v_other record;
    v_ordinal integer;
begin
    if v_step is null or octet_length(v_step) not between 1 and 100 then
        raise exception using errcode = '22023', message = 'step: must be 1 to 100 bytes, got '
            || coalesce(octet_length(v_step)::text, 'null');
    elsif v_topic is null or octet_length(v_topic) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'topic: must be 1 to 255 bytes, got '
            || coalesce(octet_length(v_topic)::text, 'null');
    elsif v_payload is null then
        raise exception using errcode = '22023', message = 'payload: must not be null';
    end if;
    perform oncebox.saga_check_json('payload', v_payload);
    v_saga := oncebox.saga_take(v_saga_id);
    if v_saga.status <> 'running' then
        raise exception using errcode = '55000',
            message = format('saga_id: saga %s is %s: nothing may be done for it any more', v_saga_id, v_saga.status);
    end if;
    select c.topic, c.payload into v_other
    from oncebox.saga_compensation as c where c.saga_id = v_saga_id and c.step = v_step;
    if found then
        if v_other.topic = v_topic and v_other.payload = v_payload then
            return;
        end if;
        raise exception using errcode = '23505', constraint = 'saga_compensation_pkey', message = format(
            'step: "%s" of saga %s is recorded with another topic or payload', v_step, v_saga_id);
    end if;
    select coalesce(max(k.ordinal) + 1, 0) into v_ordinal from oncebox.saga_step as k where k.saga_id = v_saga_id;
    if v_ordinal >= c_max_steps then
        raise exception using errcode = '22023',
            message = format('step: a saga has at most %s, and saga %s has them', c_max_steps, v_saga_id);
    end if;

    insert into oncebox.saga_step (saga_id, step, ordinal, status, epoch, changed_at)
    values (v_saga_id, v_step, v_ordinal, 'succeeded', 1, v_now);
    insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, payload, status, recorded_at, changed_at)
    values (v_saga_id, v_step, v_ordinal, v_topic, v_payload, 'ready', v_now, v_now);
    -- It was done, so that its undo runs.
    insert into oncebox.saga_barrier (saga_id, step, op, epoch) values (v_saga_id, v_step, 'do', 1)
    on conflict do nothing;
    perform oncebox.saga_record(
        v_saga_id, 'enlisted', jsonb_build_object('step', v_step, 'topic', v_topic, 'payload', v_payload),
        jsonb_build_object('steps', jsonb_build_array(jsonb_build_object(
            'step', v_step, 'from', 'pending', 'to', 'succeeded', 'epoch', 1, 'attempt', 0))),
        v_now);
end
$$;
comment on function oncebox.saga_compensate_with is
    'Records, in the transaction of a step''s work, how it is undone if the saga aborts. The same again does nothing.';

create function oncebox.saga_complete(saga_id uuid) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := oncebox.saga_now();
    v_saga record;
begin
    v_saga := oncebox.saga_take(saga_complete.saga_id);
    if v_saga.status = 'completed' then
        return;
    elsif v_saga.status <> 'running' then
        raise exception using errcode = '55000',
            message = format('saga_id: saga %s is %s: it cannot complete', saga_complete.saga_id, v_saga.status);
    end if;
    -- Before the saga has ended: then nothing of it changes.
    update oncebox.saga_compensation as c set status = 'released', changed_at = v_now
    where c.saga_id = saga_complete.saga_id;
    perform oncebox.saga_record(
        saga_complete.saga_id, 'completed', '{}', '{"saga": {"from": "running", "to": "completed"}}', v_now,
        status => 'completed');
end
$$;
comment on function oncebox.saga_complete is
    'Ends a saga without a definition: nothing of it is undone. Again does nothing.';

create function oncebox.saga_abort(saga_id uuid, reason text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_reason_bytes constant integer := 4096;
    v_now constant timestamptz := oncebox.saga_now();
    v_reason constant text := oncebox.saga_cut(saga_abort.reason, c_reason_bytes);
    v_saga record;
begin
    if v_reason is null then
        raise exception using errcode = '22023', message = 'reason: must not be null';
    end if;
    v_saga := oncebox.saga_take(saga_abort.saga_id);
    if v_saga.status in ('compensating', 'compensated') or (v_saga.status = 'stuck' and v_saga.phase = 'backward') then
        return;
    elsif v_saga.status <> 'running' then
        raise exception using errcode = '55000',
            message = format('saga_id: saga %s is %s: it cannot be undone', saga_abort.saga_id, v_saga.status);
    end if;
    perform oncebox.saga_record(
        saga_abort.saga_id, 'aborted', jsonb_build_object('reason', v_reason),
        '{"saga": {"from": "running", "to": "compensating"}}', v_now,
        status => 'compensating', phase => 'backward', reason => v_reason,
        next_due => v_now);
end
$$;
comment on function oncebox.saga_abort is
    'Has what was recorded undone, newest first, each after the one before was answered. Again does nothing.';

revoke all on function
    oncebox.saga_cut(text, integer),
    oncebox.saga_answer(uuid, jsonb, text, jsonb, text),
    oncebox.saga_barrier(uuid, text, text, integer),
    oncebox.saga_reply(jsonb, text, jsonb, text),
    oncebox.saga_open(text, interval),
    oncebox.saga_take(uuid),
    oncebox.saga_compensate_with(uuid, text, text, jsonb),
    oncebox.saga_complete(uuid),
    oncebox.saga_abort(uuid, text)
from public;
grant execute on function
    oncebox.saga_barrier(uuid, text, text, integer),
    oncebox.saga_reply(jsonb, text, jsonb, text),
    oncebox.saga_open(text, interval),
    oncebox.saga_compensate_with(uuid, text, text, jsonb),
    oncebox.saga_complete(uuid),
    oncebox.saga_abort(uuid, text)
to oncebox_producer, oncebox_consumer, oncebox_admin;
