-- The store of sagas: the functions that write their tables, and triggers that refuse what no transition may do.
-- Rows are found by key whatever the statistics say, and statements are planned once a session: planning them for each
-- call would take longer than a transition.

-- Times travel to the processes and back as milliseconds since the Unix epoch.
create function oncebox.saga_ms(at timestamptz) returns bigint
language sql stable strict parallel safe
return (extract(epoch from at) * 1000)::bigint;

create function oncebox.saga_time(ms bigint) returns timestamptz
language sql immutable strict parallel safe
return to_timestamp(ms / 1000.0);

create function oncebox.saga_now() returns timestamptz
language sql volatile
return date_trunc('milliseconds', clock_timestamp());

-- The hash of a history row, over the one before it. Every part has its length or a fixed one, so no two rows share an
-- encoding; none of them depends on a setting of the session.
create function oncebox.saga_history_hash(
    prev bytea, saga_id uuid, seq bigint, at timestamptz, event text, detail jsonb, changes jsonb, cause uuid
) returns bytea
language sql immutable parallel safe
return sha256(
    int4send(octet_length(prev)) || prev
    || uuid_send(saga_id) || int8send(seq) || timestamptz_send(at)
    || int4send(octet_length(convert_to(event, 'UTF8'))) || convert_to(event, 'UTF8')
    || int4send(octet_length(convert_to(detail::text, 'UTF8'))) || convert_to(detail::text, 'UTF8')
    || int4send(octet_length(convert_to(changes::text, 'UTF8'))) || convert_to(changes::text, 'UTF8')
    || coalesce(uuid_send(cause), ''));

-- The first row of a saga's history that does not follow from those before it, or the saga's seq if its newest row is
-- not the one it should be; null if all is well.
create function oncebox.saga_history_broken(saga_id uuid) returns bigint
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with history as (
        select
            h.seq, h.hash, row_number() over w as n,
            oncebox.saga_history_hash(
                lag(h.hash, 1, '\x') over w, h.saga_id, h.seq, h.at, h.event, h.detail, h.changes, h.cause) as expected
        from oncebox.saga_history as h
        where h.saga_id = saga_history_broken.saga_id
        window w as (order by h.seq)
    )
    select coalesce(
        (select min(h.seq) from history as h where h.seq <> h.n or h.hash <> h.expected),
        (
            select s.seq from oncebox.saga as s
            where s.id = saga_history_broken.saga_id and not exists (
                select from history as h where h.seq = s.seq and h.hash = s.head
                    and not exists (select from history as later where later.seq > h.seq))
        ));
end;
comment on function oncebox.saga_history_broken is
    'The number of the first history row that is missing before, changed or out of place; null: the chain is whole.';

-- What one transaction may do to a saga, a step and a compensation: the same as the program's `may_become`.

create function oncebox.saga_may_become(was text, becomes text, phase text) returns boolean
language sql immutable parallel safe
return case was
    when 'scheduled' then becomes in ('running', 'cancelled')
    when 'running' then becomes in ('completed', 'compensating', 'stuck')
    when 'compensating' then becomes in ('compensated', 'stuck')
    when 'stuck' then
        becomes = 'terminated' or (becomes = 'running' and phase = 'forward')
        or (becomes = 'compensating' and phase = 'backward')
    else false
end;

create function oncebox.saga_step_may_become(was text, becomes text) returns boolean
language sql immutable parallel safe
return case was
    when 'pending' then becomes in ('dispatched', 'skipped', 'failed')
    when 'dispatched' then becomes in ('succeeded', 'failed', 'backoff', 'unknown')
    when 'backoff' then becomes in ('dispatched', 'succeeded', 'failed', 'unknown', 'undoing', 'undo_stuck')
    when 'unknown' then becomes in ('backoff', 'succeeded', 'failed', 'undoing', 'undo_stuck')
    when 'failed' then becomes in ('dispatched', 'skipped', 'succeeded')
    when 'succeeded' then becomes in ('undoing', 'undo_stuck')
    when 'undoing' then becomes in ('undone', 'undo_noop', 'undo_backoff', 'undo_stuck', 'undo_skipped')
    when 'undo_backoff' then becomes in ('undoing', 'undone', 'undo_noop')
    when 'undo_stuck' then becomes in ('undoing', 'undone', 'undo_noop', 'undo_skipped')
    else false
end;

create function oncebox.saga_compensation_may_become(was text, becomes text) returns boolean
language sql immutable parallel safe
return case was
    when 'recorded' then becomes in ('ready', 'sent', 'stuck', 'released')
    when 'ready' then becomes in ('sent', 'released')
    when 'sent' then becomes in ('undone', 'noop', 'stuck', 'skipped')
    when 'stuck' then becomes in ('sent', 'undone', 'noop', 'skipped')
    else false
end;

create function oncebox.saga_is_final(status text) returns boolean
language sql immutable parallel safe
return status in ('completed', 'compensated', 'cancelled', 'terminated');

create function oncebox.saga_guard() returns trigger
language plpgsql volatile as $$
begin
    if tg_op = 'INSERT' then
        if new.status <> 'scheduled' and not (new.status = 'running' and new.definition is null) then
            raise exception using errcode = '23514', message = format('saga %s cannot begin as %s', new.id, new.status);
        elsif new.seq <> 0 or new.head <> '' then
            raise exception using errcode = '23514', message = format('saga %s: seq must begin at 0', new.id);
        end if;
        return new;
    end if;
    if new.seq not in (old.seq, old.seq + 1) then
        raise exception using errcode = '23514',
            message = format('saga %s: seq must rise by 1, not from %s to %s', new.id, old.seq, new.seq);
    end if;
    if new.seq = old.seq
        and (new.status, new.phase, new.paused, new.cancel, new.reason, new.head, new.ended_at)
            is distinct from (old.status, old.phase, old.paused, old.cancel, old.reason, old.head, old.ended_at) then
        raise exception using errcode = '23514',
            message = format('saga %s: its state cannot change without a row in its history', new.id);
    end if;
    if oncebox.saga_is_final(old.status)
        and (new.status, new.phase, new.cancel, new.reason, new.ended_at)
            is distinct from (old.status, old.phase, old.cancel, old.reason, old.ended_at) then
        raise exception using errcode = '23514',
            message = format('saga %s is %s: it cannot change any more', new.id, old.status);
    end if;
    if new.status <> old.status then
        if not oncebox.saga_may_become(old.status, new.status, old.phase) then
            raise exception using errcode = '23514',
                message = format('saga %s: %s cannot become %s', new.id, old.status, new.status);
        elsif old.status = 'running' and new.status = 'compensating' and exists (
            select from oncebox.saga_step as k
            where k.saga_id = new.id and k.pivot and k.status in ('dispatched', 'backoff', 'unknown', 'succeeded')
        ) then
            raise exception using errcode = '23514',
                message = format('saga %s: it cannot turn back, its pivot is done or may be', new.id);
        end if;
    end if;
    if new.phase <> old.phase and not (old.status = 'running' and new.status = 'compensating') then
        raise exception using errcode = '23514',
            message = format('saga %s: its phase changes only when it turns back', new.id);
    end if;
    return new;
end
$$;
create trigger saga_guard before insert or update on oncebox.saga
for each row execute function oncebox.saga_guard();

-- A change of the final saga is refused first: its status does not say so in the row of the step.
create function oncebox.saga_step_guard() returns trigger
language plpgsql volatile as $$
declare
    v_saga record;
begin
    if tg_op = 'UPDATE' then
        if new.status <> old.status and not oncebox.saga_step_may_become(old.status, new.status) then
            raise exception using errcode = '23514', message = format(
                'saga %s, step "%s": %s cannot become %s', new.saga_id, new.step, old.status, new.status);
        elsif new.epoch < old.epoch then
            raise exception using errcode = '23514', message = format(
                'saga %s, step "%s": epoch cannot fall from %s to %s', new.saga_id, new.step, old.epoch, new.epoch);
        end if;
    end if;
    select s.status, s.definition into v_saga from oncebox.saga as s where s.id = new.saga_id;
    if oncebox.saga_is_final(v_saga.status) then
        raise exception using errcode = '23514', message = format(
            'saga %s is %s: its step "%s" cannot change any more', new.saga_id, v_saga.status, new.step);
    elsif tg_op = 'INSERT' and new.status <> 'pending'
        and not (new.status = 'succeeded' and v_saga.definition is null) then
        raise exception using errcode = '23514',
            message = format('saga %s, step "%s" cannot begin as %s', new.saga_id, new.step, new.status);
    end if;
    return new;
end
$$;
create trigger saga_step_guard before insert or update on oncebox.saga_step
for each row execute function oncebox.saga_step_guard();

create function oncebox.saga_compensation_guard() returns trigger
language plpgsql volatile as $$
declare
    v_status text;
begin
    if tg_op = 'INSERT' then
        if new.status not in ('recorded', 'ready') then
            raise exception using errcode = '23514', message = format(
                'saga %s, compensation of "%s" cannot begin as %s', new.saga_id, new.step, new.status);
        end if;
    elsif new.status <> old.status and not oncebox.saga_compensation_may_become(old.status, new.status) then
        raise exception using errcode = '23514', message = format(
            'saga %s, compensation of "%s": %s cannot become %s', new.saga_id, new.step, old.status, new.status);
    end if;
    select s.status into v_status from oncebox.saga as s where s.id = new.saga_id;
    if oncebox.saga_is_final(v_status) then
        raise exception using errcode = '23514', message = format(
            'saga %s is %s: the compensation of "%s" cannot change any more', new.saga_id, v_status, new.step);
    end if;
    return new;
end
$$;
create trigger saga_compensation_guard before insert or update on oncebox.saga_compensation
for each row execute function oncebox.saga_compensation_guard();

-- A history row is the one its saga's head speaks of.
create function oncebox.saga_history_guard() returns trigger
language plpgsql volatile as $$
begin
    if not exists (
        select from oncebox.saga as s where s.id = new.saga_id and s.seq = new.seq and s.head = new.hash
    ) then
        raise exception using errcode = '23514',
            message = format('saga %s: row %s does not follow its history', new.saga_id, new.seq);
    end if;
    return new;
end
$$;
create trigger saga_history_guard before insert on oncebox.saga_history
for each row execute function oncebox.saga_history_guard();

-- For columns, and tables, that never change.
create function oncebox.saga_refuse_update() returns trigger
language plpgsql volatile as $$
begin
    if new is distinct from old then
        raise exception using errcode = '23514',
            message = format('%I.%I: %s never changes', tg_table_schema, tg_table_name, tg_argv[0]);
    end if;
    return new;
end
$$;
create trigger saga_fixed before update of
    id, definition, version, definition_hash, business_key, input, labels, created_at, start_at, deadline on oncebox.saga
for each row when ((
    new.id, new.definition, new.version, new.definition_hash, new.business_key, new.input, new.labels, new.created_at,
    new.start_at, new.deadline) is distinct from (
    old.id, old.definition, old.version, old.definition_hash, old.business_key, old.input, old.labels, old.created_at,
    old.start_at, old.deadline))
execute function oncebox.saga_refuse_update('what a saga was started with');
create trigger saga_step_fixed before update of saga_id, step, ordinal, pivot on oncebox.saga_step
for each row when (
    (new.saga_id, new.step, new.ordinal, new.pivot) is distinct from (old.saga_id, old.step, old.ordinal, old.pivot))
execute function oncebox.saga_refuse_update('a step''s place');
create trigger saga_compensation_fixed before update of saga_id, step, ordinal, topic, recorded_at
on oncebox.saga_compensation
for each row when (
    (new.saga_id, new.step, new.ordinal, new.topic, new.recorded_at)
    is distinct from (old.saga_id, old.step, old.ordinal, old.topic, old.recorded_at))
execute function oncebox.saga_refuse_update('where a compensation goes');
create trigger saga_history_fixed before update on oncebox.saga_history
for each row execute function oncebox.saga_refuse_update('history');
create trigger saga_definition_fixed before update on oncebox.saga_definition
for each row execute function oncebox.saga_refuse_update('a definition; another one is another version:');

-- Only the purge removes a saga, once it has ended: it notes first that it did.
create function oncebox.saga_guard_delete() returns trigger
language plpgsql volatile as $$
begin
    if not oncebox.saga_is_final(old.status) or not exists (
        select from oncebox.saga_purged as p where p.id = old.id
    ) then
        raise exception using errcode = '23514',
            message = format('saga %s: only saga_purge removes a saga, after its end and its retention', old.id);
    end if;
    return old;
end
$$;
create trigger saga_guard_delete before delete on oncebox.saga
for each row execute function oncebox.saga_guard_delete();

-- What belongs to a saga goes with it, not before it.
create function oncebox.saga_guard_part() returns trigger
language plpgsql volatile as $$
begin
    if exists (select from oncebox.saga as s where s.id = old.saga_id) then
        raise exception using errcode = '23514',
            message = format('%I.%I: a row goes with its saga only', tg_table_schema, tg_table_name);
    end if;
    return old;
end
$$;
create trigger saga_step_guard_delete before delete on oncebox.saga_step
for each row execute function oncebox.saga_guard_part();
create trigger saga_compensation_guard_delete before delete on oncebox.saga_compensation
for each row execute function oncebox.saga_guard_part();
create trigger saga_history_guard_delete before delete on oncebox.saga_history
for each row execute function oncebox.saga_guard_part();

create function oncebox.saga_refuse_truncate() returns trigger
language plpgsql volatile as $$
begin
    raise exception using errcode = '23514',
        message = format('%I.%I: history is not truncated', tg_table_schema, tg_table_name);
end
$$;
create trigger saga_history_guard_truncate before truncate on oncebox.saga_history
for each statement execute function oncebox.saga_refuse_truncate();

-- `500ms`, `30s`, `5m`, `24h` or `7d` as milliseconds.
create function oncebox.saga_duration_ms(duration text) returns bigint
language sql immutable strict parallel safe
return (
    select (p[1]::numeric * case p[2] when 'ms' then 1 when 's' then 1000 when 'm' then 60000 when 'h' then 3600000
        when 'd' then 86400000 end)::bigint
    from regexp_match(duration, '^([0-9]+)(ms|s|m|h|d)$') as p
);

-- Makes what starting and signalling need of the document.
create function oncebox.saga_definition_guard() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_steps jsonb;
    v_next text;
    v_sagas bigint;
begin
    if tg_op = 'INSERT' then
        v_steps := new.document -> 'steps';
        if new.document ->> 'name' is distinct from new.name
            or new.document ->> 'version' is distinct from new.version::text then
            raise exception using errcode = '22023', message = format(
                'document: it says %s version %s, the row %s version %s', new.document -> 'name',
                new.document -> 'version', to_json(new.name), new.version);
        elsif jsonb_typeof(v_steps) is distinct from 'array' then
            raise exception using errcode = '22023', message = 'document: steps must be an array';
        end if;
        new.hash := sha256(convert_to(new.document::text, 'UTF8'));
        new.deadline_ms := oncebox.saga_duration_ms(new.document ->> 'deadline');
        select
            min(e.step ->> 'id') filter (where e.step -> 'pivot' = 'true'),
            coalesce(array_agg(e.step -> 'wait' ->> 'signal' order by e.n) filter (where e.step ? 'wait'), '{}')
        into new.pivot, new.signals
        from jsonb_array_elements(v_steps) with ordinality as e (step, n);
        new.steps := '{}';
        while cardinality(new.steps) < jsonb_array_length(v_steps) loop
            select e.step ->> 'id' into v_next
            from jsonb_array_elements(v_steps) with ordinality as e (step, n)
            where e.step ->> 'id' <> all (new.steps) and case
                when e.step ? 'after' then not exists (
                    select from jsonb_array_elements_text(e.step -> 'after') as a (id) where a.id <> all (new.steps))
                else e.n = 1 or v_steps -> (e.n::integer - 2) ->> 'id' = any (new.steps)
            end
            order by e.n limit 1;
            if not found then
                raise exception using errcode = '22023',
                    message = 'document: steps need ids of their own, and an order in which each follows those it waits for';
            end if;
            new.steps := new.steps || v_next;
        end loop;
        return new;
    end if;
    select count(*) into v_sagas from (
        select from oncebox.saga as s
        where (s.definition, s.version) = (old.name, old.version)
        limit 1000) as s;
    if v_sagas > 0 then
        raise exception using errcode = '23503', message = format(
            'definition "%s" version %s is in use by %s: they must have ended and been removed first', old.name,
            old.version, case v_sagas when 1 then '1 saga' when 1000 then '1000 sagas or more' else v_sagas || ' sagas' end);
    end if;
    return old;
end
$$;
create trigger saga_definition_guard before insert or delete on oncebox.saga_definition
for each row execute function oncebox.saga_definition_guard();

-- Appends a row to a saga's history. What is null stays as it is, of the saga too. Callers hold a lock on the saga's row.
create function oncebox.saga_record(
    saga_id uuid,
    event text,
    detail jsonb,
    changes jsonb,
    at timestamptz,
    cause uuid default null,
    status text default null,
    phase text default null,
    reason text default null,
    next_due timestamptz default null
) returns bigint
language plpgsql volatile as $$
#variable_conflict use_column
declare
    v_seq bigint;
    v_head bytea;
begin
    update oncebox.saga as s
    set seq = s.seq + 1,
        head = oncebox.saga_history_hash(
            s.head, s.id, s.seq + 1, saga_record.at, saga_record.event, saga_record.detail, saga_record.changes,
            saga_record.cause),
        status = coalesce(saga_record.status, s.status),
        phase = coalesce(saga_record.phase, s.phase),
        reason = coalesce(saga_record.reason, s.reason),
        paused = s.paused and not oncebox.saga_is_final(coalesce(saga_record.status, s.status)),
        ended_at = case
            when oncebox.saga_is_final(coalesce(saga_record.status, s.status)) then coalesce(s.ended_at, saga_record.at)
        end,
        next_due = case
            when not oncebox.saga_is_final(coalesce(saga_record.status, s.status)) then
                coalesce(saga_record.next_due, s.next_due)
        end,
        changed_at = saga_record.at
    where s.id = saga_record.saga_id
    returning s.seq, s.head into strict v_seq, v_head;
    insert into oncebox.saga_history (saga_id, seq, at, event, detail, changes, cause, hash)
    values (
        saga_record.saga_id, v_seq, saga_record.at, saga_record.event, saga_record.detail, saga_record.changes,
        saga_record.cause, v_head);
    return v_seq;
end
$$;

-- Refuses JSON that commands could not be made of without changing it, or that processes could not read.
create function oncebox.saga_check_json(argument text, value jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp set extra_float_digits = 1 as $$
declare
    v_limit constant integer := (select s.payload_limit_bytes from oncebox.setting as s where s.only_row);
    v_number numeric;
begin
    if octet_length(value::text) > v_limit then
        raise exception using errcode = '22023', message = format('%s: must be at most %s bytes (setting '
            'payload_limit_bytes), got %s', argument, v_limit, octet_length(value::text));
    -- With a body around it, and the saga around that, it is not as deep as the processes read: 128 levels.
    elsif jsonb_path_exists(value, 'strict $.**{64}') then
        raise exception using errcode = '22023',
            message = format('%s: must be nested at most 64 levels deep', argument);
    end if;
    for v_number in
        select n.number::numeric
        from jsonb_path_query(value, 'strict $.** ? (@.type() == "number")') as n (number)
    loop
        if v_number = trunc(v_number) and v_number between -9223372036854775808 and 9223372036854775807 then
            null;
        -- The test order matters: the cast to float8 raises its own error outside this range.
        elsif abs(v_number) not between 2.3e-308 and 1.79e308 or v_number::float8::text::numeric <> v_number then
            raise exception using errcode = '22023', message = format(
                '%s: the number %s is neither an int64 nor exact as a double', argument, left(v_number::text, 60));
        end if;
    end loop;
end
$$;

create function oncebox.saga_start(
    definition text,
    business_key text,
    input jsonb,
    version integer default null,
    start_at timestamptz default null,
    deadline interval default null,
    labels jsonb default '{}'
) returns uuid
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := oncebox.saga_now();
    v_input constant jsonb := coalesce(input, '{}');
    v_labels constant jsonb := coalesce(labels, '{}');
    v_start constant timestamptz := coalesce(date_trunc('milliseconds', start_at), v_now);
    v_deadline_ms bigint;
    v_deadline timestamptz;
    v_definition record;
    v_id uuid;
    v_other record;
begin
    if definition is null then
        raise exception using errcode = '22023', message = 'definition: must not be null';
    elsif business_key is null or octet_length(business_key) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'business_key: must be 1 to 255 bytes, got '
            || coalesce(octet_length(business_key)::text, 'null');
    elsif not isfinite(start_at) or start_at >= '9999-01-01' or start_at < '1970-01-01' then
        raise exception using errcode = '22023', message = 'start_at: must be a time between 1970 and 9999';
    elsif deadline <= interval '0' or deadline > interval '3650 days' then
        raise exception using errcode = '22023',
            message = format('deadline: must be positive and at most 3650 days, got %s', deadline);
    elsif jsonb_typeof(v_labels) <> 'object' then
        raise exception using errcode = '22023', message = 'labels: must be a JSON object';
    elsif octet_length(v_labels::text) > 4096 then
        raise exception using errcode = '22023',
            message = format('labels: must be at most 4096 bytes together, got %s', octet_length(v_labels::text));
    elsif (select count(*) from jsonb_object_keys(v_labels)) > 32 then
        raise exception using errcode = '22023', message = 'labels: must be at most 32';
    elsif exists (select from jsonb_each(v_labels) as l where jsonb_typeof(l.value) <> 'string') then
        raise exception using errcode = '22023', message = 'labels: every value must be a string';
    end if;
    perform oncebox.saga_check_json('input', v_input);

    select d.version, d.hash, d.steps, d.pivot, d.deadline_ms into v_definition
    from oncebox.saga_definition as d
    where d.name = saga_start.definition and d.version = coalesce(saga_start.version, d.version)
    order by d.version desc limit 1;
    if not found then
        if version is not null
            and exists (select from oncebox.saga_definition as d where d.name = saga_start.definition) then
            raise exception using errcode = '22023',
                message = format('version: definition "%s" has no version %s', left(definition, 100), version);
        end if;
        raise exception using errcode = '22023',
            message = format('definition: there is no definition "%s"', left(definition, 100));
    end if;

    -- An interval's months and days have no length of their own: 30 days, 24 hours.
    v_deadline_ms := coalesce(
        ceil(extract(epoch from deadline) * 1000)::bigint, v_definition.deadline_ms);
    v_deadline := v_start + v_deadline_ms * interval '1 millisecond';

    -- Another one that is being started under the same key is waited for.
    for attempt in 1..3 loop
        insert into oncebox.saga (
            id, definition, version, definition_hash, business_key, status, input, labels, created_at, start_at,
            deadline, changed_at, next_due)
        values (
            oncebox.uuid_v7(v_now), saga_start.definition, v_definition.version, v_definition.hash,
            saga_start.business_key, 'scheduled', v_input, v_labels, v_now, v_start, v_deadline, v_now, v_start)
        on conflict (coalesce(definition, ''), business_key) do nothing
        returning id into v_id;
        exit when v_id is not null;

        select s.id, s.version, s.input, s.labels, s.created_at, s.start_at, s.deadline, d.deadline_ms into v_other
        from oncebox.saga as s
        join oncebox.saga_definition as d on d.name = s.definition and d.version = s.version
        where coalesce(s.definition, '') = saga_start.definition and s.business_key = saga_start.business_key;
        if found then
            -- Compared is what was asked for, so that the same call gets the same saga after a new version of the
            -- definition as well.
            if v_other.version = coalesce(saga_start.version, v_other.version)
                and v_other.input = v_input and v_other.labels = v_labels
                and v_other.start_at = coalesce(date_trunc('milliseconds', saga_start.start_at), v_other.created_at)
                and v_other.deadline is not distinct from v_other.start_at + interval '1 millisecond' * coalesce(
                    ceil(extract(epoch from saga_start.deadline) * 1000)::bigint, v_other.deadline_ms)
            then
                return v_other.id;
            end if;
            raise exception using errcode = '23505', constraint = 'saga_business_key', message = format(
                'business_key: "%s" of definition "%s" belongs to saga %s, which was started otherwise',
                business_key, definition, v_other.id);
        end if;
        -- It was removed in between.
    end loop;
    if v_id is null then
        raise exception using errcode = '40001', message = 'business_key: it is being used and removed at this moment';
    end if;

    insert into oncebox.saga_step (saga_id, step, ordinal, pivot, changed_at)
    select v_id, k.step, k.n - 1, k.step is not distinct from v_definition.pivot, v_now
    from unnest(v_definition.steps) with ordinality as k (step, n);
    perform oncebox.saga_record(
        v_id, 'created', jsonb_build_object(
            'definition', saga_start.definition, 'version', v_definition.version,
            'definition_hash', encode(v_definition.hash, 'hex'), 'business_key', saga_start.business_key,
            'input', v_input, 'labels', v_labels, 'start_at', oncebox.saga_ms(v_start),
            'deadline', oncebox.saga_ms(v_deadline)),
        '{}', v_now);
    return v_id;
end
$$;
comment on function oncebox.saga_start is
    'Starts a saga when the calling transaction commits; returns its id. The same call again returns the same id.';

create function oncebox.saga_signal(saga_id uuid, name text, payload jsonb default null) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    v_saga record;
    v_payload jsonb;
begin
    if saga_id is null then
        raise exception using errcode = '22023', message = 'saga_id: must not be null';
    elsif name is null or octet_length(name) not between 1 and 100 then
        raise exception using errcode = '22023', message = 'name: must be 1 to 100 bytes, got '
            || coalesce(octet_length(name)::text, 'null');
    elsif payload is not null then
        perform oncebox.saga_check_json('payload', payload);
    end if;
    -- Keeps the saga from being removed, and neither waits for the orchestrator nor keeps it waiting.
    select s.status, s.definition, s.version into v_saga
    from oncebox.saga as s where s.id = saga_signal.saga_id for key share;
    if not found then
        raise exception using errcode = 'P0002', message = format('saga_id: there is no saga %s', saga_id);
    elsif v_saga.definition is null then
        raise exception using errcode = '55000',
            message = format('saga_id: saga %s has no definition, so none of its steps waits for a signal', saga_id);
    elsif not exists (
        select from oncebox.saga_definition as d
        where d.name = v_saga.definition and d.version = v_saga.version and saga_signal.name = any (d.signals)
    ) then
        raise exception using errcode = '22023',
            message = format('name: no step of definition "%s" version %s waits for a signal "%s"',
                v_saga.definition, v_saga.version, name);
    end if;
    -- The same again is fine after the end as well.
    if not oncebox.saga_is_final(v_saga.status) then
        insert into oncebox.saga_signal as g (saga_id, name, payload, sent_at)
        values (saga_signal.saga_id, saga_signal.name, saga_signal.payload, oncebox.saga_now())
        on conflict on constraint saga_signal_pkey do nothing;
        if found then
            return;
        end if;
    end if;
    select g.payload into v_payload
    from oncebox.saga_signal as g where g.saga_id = saga_signal.saga_id and g.name = saga_signal.name;
    if not found then
        raise exception using errcode = '55000',
            message = format('saga_id: saga %s has ended, it is %s', saga_id, v_saga.status);
    elsif v_payload is distinct from payload then
        raise exception using errcode = '23505', constraint = 'saga_signal_pkey', message = format(
            'payload: signal "%s" was sent to saga %s already, with another payload', name, saga_id);
    end if;
end
$$;
comment on function oncebox.saga_signal is
    'Sends a signal to a saga when the calling transaction commits; the same again does nothing.';

-- Locks sagas in the order of their ids, and reads them as the program does.
create function oncebox.saga_load(ids uuid[]) returns table (id uuid, state jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
    perform from oncebox.saga as s where s.id = any (ids) order by s.id for no key update;
    -- A statement of its own: it sees what was committed while the locks were waited for.
    return query
    select s.id, jsonb_build_object(
        'id', s.id,
        'definition', case when s.definition is not null then jsonb_build_array(s.definition, s.version) end,
        'business_key', s.business_key,
        'status', s.status,
        'phase', s.phase,
        'paused', s.paused,
        'cancel', s.cancel,
        'reason', s.reason,
        'seq', s.seq,
        'input', s.input,
        'labels', s.labels,
        'start_at', oncebox.saga_ms(s.start_at),
        'deadline', oncebox.saga_ms(s.deadline),
        'next_due', oncebox.saga_ms(s.next_due),
        'steps', k.steps,
        'signals', g.signals)
    from oncebox.saga as s
    cross join lateral (
        select coalesce(jsonb_agg(jsonb_build_object(
            'id', k.step,
            'status', k.status,
            'epoch', k.epoch,
            'attempt', k.attempt,
            'message_id', k.message_id,
            'due_at', oncebox.saga_ms(k.due_at),
            'output', k.output,
            'error', k.error,
            'compensation', case when c.step is not null then jsonb_build_object(
                'topic', c.topic, 'payload', c.payload, 'status', c.status) end
            ) order by k.ordinal), '[]') as steps
        from oncebox.saga_step as k
        left join oncebox.saga_compensation as c on c.saga_id = k.saga_id and c.step = k.step
        where k.saga_id = s.id
    ) as k
    cross join lateral (
        select coalesce(jsonb_agg(jsonb_build_object('name', g.name, 'payload', g.payload)
            order by g.sent_at, g.name), '[]') as signals
        from oncebox.saga_signal as g where g.saga_id = s.id and g.state = 'kept'
    ) as g
    where s.id = any (ids)
    order by s.id;
end
$$;
comment on function oncebox.saga_load is
    'Locks sagas for a transition and reads their state. Signals are those kept; new ones come from saga_due.';

-- Locks sagas whose time has come or that have new signals, and that nobody else works on.
create function oncebox.saga_due(at_most integer) returns table (id uuid, due boolean, signals jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := clock_timestamp();
    v_ids uuid[];
begin
    -- Half at most for signals, so that neither kind waits for the other to end.
    v_ids := array(
        select s.id from oncebox.saga_signal as g
        join oncebox.saga as s on s.id = g.saga_id
        where g.state = 'new' and coalesce(g.look_at, g.sent_at) <= v_now
        order by coalesce(g.look_at, g.sent_at), g.saga_id limit (at_most + 1) / 2
        for no key update of s skip locked);
    v_ids := v_ids || array(
        select s.id from oncebox.saga as s
        where s.next_due <= v_now
        order by s.next_due, s.id limit at_most - cardinality(v_ids)
        for no key update skip locked);
    -- A statement of its own: another orchestrator may have worked on them before they were locked.
    return query
    select s.id, coalesce(s.next_due <= v_now, false), g.signals
    from oncebox.saga as s
    cross join lateral (
        select coalesce(jsonb_agg(jsonb_build_object('name', g.name, 'payload', g.payload)
            order by g.sent_at, g.name), '[]') as signals
        from oncebox.saga_signal as g
        where g.saga_id = s.id and g.state = 'new' and coalesce(g.look_at, g.sent_at) <= v_now
    ) as g
    where s.id = any (v_ids) and (s.next_due <= v_now or g.signals <> '[]')
    order by s.id;
end
$$;
comment on function oncebox.saga_due is
    'Locks sagas whose time has come, and those with new signals, which it returns; others'' are passed over.';

-- Sets sagas aside for a while: their definition cannot be read, or the database refuses what is to become of them.
create function oncebox.saga_put_off(ids uuid[], put_off_for interval) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
    v_until constant timestamptz := clock_timestamp() + put_off_for;
begin
    update oncebox.saga as s set next_due = v_until where s.id = any (ids) and s.next_due < v_until;
    update oncebox.saga_signal as g set look_at = v_until where g.saga_id = any (ids) and g.state = 'new';
end
$$;
comment on function oncebox.saga_put_off is
    'Has the orchestrator look at sagas later: it cannot work on them now. Their replies are taken as ever.';

-- Writes transitions: an array of {id, seq, at, event, detail, changes, cause, status, phase, paused, cancel, reason,
-- next_due, steps, recorded, compensations, signals, commands}, one a saga. seq is the new one; the lists hold what
-- changed. Times are milliseconds. 40001: a saga has moved on since it was read.
create function oncebox.saga_apply(transitions jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    v_expected bigint;
    v_found bigint;
begin
    select count(*) into v_found from (
        select s.id
        from jsonb_to_recordset(transitions) as t (id uuid, seq bigint)
        join oncebox.saga as s on s.id = t.id
        where s.seq = t.seq - 1
        order by s.id
        for no key update of s) as s;
    if v_found <> jsonb_array_length(transitions) then
        raise exception using errcode = '40001', message = 'a saga has moved on since it was read';
    end if;

    -- Steps before their saga: once it has ended they cannot change, and the pivot decides whether it may turn back.
    update oncebox.saga_step as k
    set status = r.status, epoch = r.epoch, attempt = r.attempt, message_id = coalesce(r.message_id, k.message_id),
        due_at = oncebox.saga_time(r.due_at), output = r.output, error = r.error,
        dispatched_at = case
            when r.message_id <> k.message_id or (r.message_id is not null and k.message_id is null)
                or (r.status = 'dispatched' and k.status <> r.status) then
                oncebox.saga_time(t.at)
            else k.dispatched_at
        end,
        changed_at = oncebox.saga_time(t.at)
    from jsonb_to_recordset(transitions) as t (id uuid, at bigint, steps jsonb)
    cross join lateral jsonb_to_recordset(t.steps) as r (
        step text, status text, epoch integer, attempt integer, message_id uuid, due_at bigint, output jsonb, error text)
    where k.saga_id = t.id and k.step = r.step;
    get diagnostics v_found = row_count;
    select sum(jsonb_array_length(t.steps)) into v_expected from jsonb_to_recordset(transitions) as t (steps jsonb);
    if v_found <> v_expected then
        raise exception using errcode = '22023', message = 'steps: a saga has no such step';
    end if;

    insert into oncebox.saga_compensation (saga_id, step, ordinal, topic, payload, status, recorded_at, changed_at)
    select
        t.id, r.step, k.ordinal, r.topic, r.payload, r.status, oncebox.saga_time(t.at), oncebox.saga_time(t.at)
    from jsonb_to_recordset(transitions) as t (id uuid, at bigint, recorded jsonb)
    cross join lateral jsonb_to_recordset(t.recorded) as r (step text, topic text, payload jsonb, status text)
    join oncebox.saga_step as k on k.saga_id = t.id and k.step = r.step;

    update oncebox.saga_compensation as c
    set status = r.status, payload = r.payload, changed_at = oncebox.saga_time(t.at)
    from jsonb_to_recordset(transitions) as t (id uuid, at bigint, compensations jsonb)
    cross join lateral jsonb_to_recordset(t.compensations) as r (step text, payload jsonb, status text)
    where c.saga_id = t.id and c.step = r.step;
    get diagnostics v_found = row_count;
    select sum(jsonb_array_length(t.compensations)) into v_expected
    from jsonb_to_recordset(transitions) as t (compensations jsonb);
    if v_found <> v_expected then
        raise exception using errcode = '22023', message = 'compensations: a step has none';
    end if;

    update oncebox.saga as s
    set status = t.status, phase = t.phase, paused = t.paused, cancel = t.cancel, reason = t.reason, seq = t.seq,
        head = oncebox.saga_history_hash(
            s.head, s.id, t.seq, oncebox.saga_time(t.at), t.event, t.detail, t.changes, t.cause),
        ended_at = case
            when oncebox.saga_is_final(t.status) then coalesce(s.ended_at, oncebox.saga_time(t.at))
        end,
        next_due = oncebox.saga_time(t.next_due), changed_at = oncebox.saga_time(t.at)
    from jsonb_to_recordset(transitions) as t (
        id uuid, seq bigint, at bigint, event text, detail jsonb, changes jsonb, cause uuid, status text, phase text,
        paused boolean, cancel text, reason text, next_due bigint)
    where s.id = t.id;
    get diagnostics v_found = row_count;
    if v_found <> jsonb_array_length(transitions) then
        raise exception using errcode = '22023', message = 'transitions: must be one a saga';
    end if;

    insert into oncebox.saga_history (saga_id, seq, at, event, detail, changes, cause, hash)
    select s.id, s.seq, oncebox.saga_time(t.at), t.event, t.detail, t.changes, t.cause, s.head
    from jsonb_to_recordset(transitions) as t (
        id uuid, at bigint, event text, detail jsonb, changes jsonb, cause uuid)
    join oncebox.saga as s on s.id = t.id;

    update oncebox.saga_signal as g
    set state = r.state
    from jsonb_to_recordset(transitions) as t (id uuid, signals jsonb)
    cross join lateral jsonb_to_recordset(t.signals) as r (name text, state text)
    where g.saga_id = t.id and g.name = r.name and g.state <> 'taken';

    perform oncebox.outbox_insert(
        c.topic, convert_to(c.body, 'UTF8'), 'application/json', c.id::text, jsonb_build_object(
            'oncebox-saga', c.id, 'oncebox-step', c.step, 'oncebox-op', c.op, 'oncebox-epoch', c.epoch,
            'oncebox-attempt', c.attempt, 'oncebox-deadline', to_char(
                oncebox.saga_time(c.deadline) at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')),
        c.message_id, clock_timestamp(), null)
    from (
        select o.id, r.step, r.op, r.epoch, r.attempt, r.topic, r.body, r.deadline, r.message_id
        from rows from (jsonb_to_recordset(transitions) as (id uuid, commands jsonb)) with ordinality
            as o (id, commands, n)
        cross join lateral rows from (jsonb_to_recordset(o.commands) as (
            step text, op text, epoch integer, attempt integer, topic text, body text, deadline bigint, message_id uuid)
        ) with ordinality as r (step, op, epoch, attempt, topic, body, deadline, message_id, n)
        order by o.n, r.n
    ) as c;
end
$$;
comment on function oncebox.saga_apply is
    'Writes what events made of sagas: states, history, and commands into the outbox. Only the program calls it.';

-- Sets a new signal aside that the saga cannot take, so that it is not looked at again; false if it is not new.
create function oncebox.saga_keep_signal(saga_id uuid, name text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    update oncebox.saga_signal as g set state = 'kept'
    where g.saga_id = saga_keep_signal.saga_id and g.name = saga_keep_signal.name and g.state = 'new';
    return found;
end
$$;

revoke all on function
    oncebox.saga_ms(timestamptz),
    oncebox.saga_time(bigint),
    oncebox.saga_now(),
    oncebox.saga_history_hash(bytea, uuid, bigint, timestamptz, text, jsonb, jsonb, uuid),
    oncebox.saga_history_broken(uuid),
    oncebox.saga_may_become(text, text, text),
    oncebox.saga_step_may_become(text, text),
    oncebox.saga_compensation_may_become(text, text),
    oncebox.saga_is_final(text),
    oncebox.saga_guard(),
    oncebox.saga_step_guard(),
    oncebox.saga_compensation_guard(),
    oncebox.saga_history_guard(),
    oncebox.saga_refuse_update(),
    oncebox.saga_guard_delete(),
    oncebox.saga_guard_part(),
    oncebox.saga_refuse_truncate(),
    oncebox.saga_definition_guard(),
    oncebox.saga_record(uuid, text, jsonb, jsonb, timestamptz, uuid, text, text, text, timestamptz),
    oncebox.saga_check_json(text, jsonb),
    oncebox.saga_duration_ms(text),
    oncebox.saga_start(text, text, jsonb, integer, timestamptz, interval, jsonb),
    oncebox.saga_signal(uuid, text, jsonb),
    oncebox.saga_load(uuid[]),
    oncebox.saga_due(integer),
    oncebox.saga_put_off(uuid[], interval),
    oncebox.saga_apply(jsonb),
    oncebox.saga_keep_signal(uuid, text)
from public;

grant execute on function
    oncebox.saga_start(text, text, jsonb, integer, timestamptz, interval, jsonb),
    oncebox.saga_signal(uuid, text, jsonb)
to oncebox_producer, oncebox_consumer, oncebox_orchestrator, oncebox_admin;
grant execute on function
    oncebox.saga_load(uuid[]),
    oncebox.saga_due(integer),
    oncebox.saga_put_off(uuid[], interval),
    oncebox.saga_apply(jsonb),
    oncebox.saga_keep_signal(uuid, text),
    oncebox.saga_history_broken(uuid)
to oncebox_orchestrator, oncebox_admin;
