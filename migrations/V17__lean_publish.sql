-- Publishing, in fewer steps. In a transaction that publishes once, plpgsql prepares every expression of the call
-- anew and every statement opens and locks its tables anew: an ordinary message now takes one statement and few
-- expressions. No publisher is held up: no table that it reads or writes is locked against it, and open transactions
-- may go on with the texts from before.

-- Until the commit no settings change and the ring does not turn, or the copy below could miss it.
lock table oncebox.setting, oncebox.outbox_ring in share row exclusive mode;

-- What an insert into the log must know, in one row: a copy of the ring's slot and of settings. Triggers keep it, so that
-- it changes with its originals, in their transactions. Nothing else writes it.
create table oncebox.outbox_current (
    only_row boolean primary key default true check (only_row),
    slot smallint not null,
    lanes smallint not null,
    payload_limit_bytes integer not null,
    dedup_window interval not null
);
comment on table oncebox.outbox_current is 'What publish reads: a copy of outbox_ring and setting that triggers keep; change those.';
insert into oncebox.outbox_current (slot, lanes, payload_limit_bytes, dedup_window)
select r.slot, s.lanes, s.payload_limit_bytes, s.dedup_window
from oncebox.setting as s, oncebox.outbox_ring as r;
-- One row, one page: without it a plan would go through the index.
analyze oncebox.outbox_current;

create function oncebox.setting_to_current() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'DELETE' then
        delete from oncebox.outbox_current;
    else
        insert into oncebox.outbox_current as c (slot, lanes, payload_limit_bytes, dedup_window)
        select r.slot, new.lanes, new.payload_limit_bytes, new.dedup_window
        from oncebox.outbox_ring as r
        -- The slot is not this function's to change: the ring may have turned since the snapshot.
        on conflict (only_row) do update
        set lanes = new.lanes, payload_limit_bytes = new.payload_limit_bytes, dedup_window = new.dedup_window;
    end if;
    return null;
end
$$;
create trigger setting_to_current after insert or update or delete on oncebox.setting
for each row execute function oncebox.setting_to_current();

create function oncebox.outbox_ring_to_current() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    update oncebox.outbox_current set slot = new.slot;
    return null;
end
$$;
create trigger outbox_ring_to_current after update of slot on oncebox.outbox_ring
for each row execute function oncebox.outbox_ring_to_current();

-- The lane of a message: of its key if it has one.
create function oncebox.outbox_lane(key text, message_id uuid, lanes smallint) returns smallint
language sql immutable parallel safe
return case
    when lanes > 1
    then (('x' || substr(md5(coalesce(key, message_id::text)), 1, 8))::bit(32)::bigint % lanes)::smallint
    else 0::smallint
end;

-- As before; date_part reckons in double precision, which holds milliseconds until long after the year 9999.
create or replace function oncebox.uuid_v7(at timestamptz) returns uuid
language sql volatile parallel safe
return encode(
    set_bit(
        set_bit(
            overlay(
                uuid_send(gen_random_uuid())
                placing substring(int8send((date_part('epoch', at) * 1000)::bigint) from 3)
                from 1 for 6),
            52, 1),
        53, 1),
    'hex')::uuid;

-- As before, and not `strict`: that kept the planner from inlining it, and each call was parsed and planned anew.
create or replace function oncebox.uuid_v7_ms(id uuid) returns bigint
language sql immutable parallel safe
return case
    when substr(id::text, 15, 1) = '7' and substr(id::text, 20, 1) in ('8', '9', 'a', 'b')
    then ('x' || substr(id::text, 1, 8) || substr(id::text, 10, 4))::bit(48)::bigint
end;

-- Appends a checked message to the log. The insert is outbox_append's but for the limits: change both.
create or replace function oncebox.outbox_insert(
    topic text,
    body bytea,
    content_type text,
    key text,
    headers jsonb,
    message_id uuid,
    published_at timestamptz,
    expires_at timestamptz
) returns void
language plpgsql volatile as $$
declare
    v_xid xid8;
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        -- An older snapshot shows the lanes from before a change: 40001 instead.
        perform from oncebox.setting for share;
    end if;
    -- The xid before the sequence number: the other way round a window could pass over this row for ever.
    v_xid := pg_current_xact_id();
    -- A statement locks its tables before it takes its snapshot: a change of the lanes ends before this one looks at
    -- them, or begins after its transaction.
    insert into oncebox.outbox (
        slot, lane, seq, xid, message_id, topic, key, content_type, headers, body, published_at, expires_at)
    select
        c.slot, oncebox.outbox_lane(key, message_id, c.lanes), nextval('oncebox.outbox_seq'), v_xid, message_id, topic,
        key, content_type, headers, body, published_at, expires_at
    from oncebox.outbox_current as c
    where c.only_row;
    if not found then
        -- A snapshot from before this table had its row sees none: 40001 there, for the next attempt succeeds.
        raise exception using message = 'oncebox.setting holds no row', errcode = case
            when current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then 'P0002'
            else '40001' end;
    end if;
end
$$;

-- Checks a message and appends it to the log, or to the schedule. Everything that publishes comes through here.
create or replace function oncebox.outbox_append(
    topic text,
    body bytea,
    content_type text,
    key text,
    headers jsonb,
    message_id uuid,
    deliver_at timestamptz,
    expires_at timestamptz
) returns uuid
language plpgsql volatile as $$
declare
    v_now constant timestamptz := clock_timestamp();
    v_id uuid;
    v_xid xid8;
    v_payload_limit_bytes integer;
    v_dedup_window interval;
begin
    -- One expression instead of a dozen for the ordinary message; whatever is not plainly right is looked at below.
    if (octet_length(topic) between 1 and 255 and octet_length(content_type) between 1 and 255
        and (key is null or octet_length(key) <= 255) and body is not null and deliver_at is null
        and (expires_at is null or isfinite(expires_at))
        and current_setting('transaction_isolation') = 'read committed') is not true
    then
        if topic is null or octet_length(topic) not between 1 and 255 then
            raise exception using errcode = '22023', message = 'topic: must be 1 to 255 bytes, got '
                || coalesce(octet_length(topic)::text, 'null');
        end if;
        if body is null then
            raise exception using errcode = '22023', message = 'payload: must not be null';
        end if;
        if content_type is null or octet_length(content_type) not between 1 and 255 then
            raise exception using errcode = '22023', message = 'content_type: must be 1 to 255 bytes, got '
                || coalesce(octet_length(content_type)::text, 'null');
        end if;
        if octet_length(key) > 255 then
            raise exception using errcode = '22023',
                message = format('key: must be at most 255 bytes, got %s', octet_length(key));
        end if;
        if not isfinite(deliver_at) or deliver_at >= '9999-01-01' then
            raise exception using errcode = '22023', message = 'deliver_at: must be a time before the year 9999';
        end if;
        if not isfinite(expires_at) then
            raise exception using errcode = '22023', message = 'expires_at: must be a finite time';
        elsif expires_at <= deliver_at then
            raise exception using errcode = '22023', message = 'expires_at: must lie after deliver_at';
        end if;
        if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
            -- An older snapshot shows the lanes from before a change: 40001 instead.
            perform from oncebox.setting for share;
        end if;
    end if;

    if headers is distinct from '{}' then
        if headers is null or jsonb_typeof(headers) <> 'object' then
            raise exception using errcode = '22023', message = 'headers: must be a JSON object';
        end if;
        perform oncebox.outbox_check_headers(headers);
    end if;

    v_id := coalesce(message_id, oncebox.uuid_v7(greatest(v_now, deliver_at)));
    if deliver_at > v_now then
        insert into oncebox.outbox_scheduled (
            deliver_at, message_id, topic, key, content_type, headers, body, expires_at)
        select deliver_at, v_id, topic, key, content_type, headers, body, expires_at
        from oncebox.outbox_current as c
        where c.only_row and octet_length(body) <= c.payload_limit_bytes
            and (message_id is null
                or (oncebox.uuid_v7_ms(message_id) < extract(epoch from v_now - c.dedup_window) * 1000) is not true);
    else
        -- The xid before the sequence number: the other way round a window could pass over this row for ever.
        v_xid := pg_current_xact_id();
        -- A statement locks its tables before it takes its snapshot: a change of the lanes ends before this one looks
        -- at them, or begins after its transaction.
        insert into oncebox.outbox (
            slot, lane, seq, xid, message_id, topic, key, content_type, headers, body, published_at, expires_at)
        select
            c.slot, oncebox.outbox_lane(key, v_id, c.lanes), nextval('oncebox.outbox_seq'), v_xid, v_id, topic, key,
            content_type, headers, body, v_now, expires_at
        from oncebox.outbox_current as c
        where c.only_row and octet_length(body) <= c.payload_limit_bytes
            and (message_id is null
                or (oncebox.uuid_v7_ms(message_id) < extract(epoch from v_now - c.dedup_window) * 1000) is not true);
    end if;
    if found then
        return v_id;
    end if;

    -- Nothing was appended: a limit refuses it.
    select c.payload_limit_bytes, c.dedup_window into v_payload_limit_bytes, v_dedup_window
    from oncebox.outbox_current as c;
    if not found then
        -- A snapshot from before this table had its row sees none: 40001 there, for the next attempt succeeds.
        raise exception using message = 'oncebox.setting holds no row', errcode = case
            when current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then 'P0002'
            else '40001' end;
    elsif octet_length(body) > v_payload_limit_bytes then
        raise exception using errcode = '22023', message = format('payload: must be at most %s bytes (setting '
            'payload_limit_bytes), got %s', v_payload_limit_bytes, octet_length(body));
    elsif oncebox.uuid_v7_ms(message_id) < extract(epoch from v_now - v_dedup_window) * 1000 then
        raise exception using errcode = '22023',
            message = format('message_id: the UUIDv7 %s is older than the dedup window of %s', message_id, v_dedup_window);
    end if;
    raise exception using errcode = '40001', message = 'the settings changed while a message was checked against them';
end
$$;

revoke all on function
    oncebox.setting_to_current(),
    oncebox.outbox_ring_to_current(),
    oncebox.outbox_lane(text, uuid, smallint)
from public;
