-- The outbox: an append-only log that apps insert into and relays read by snapshot windows.

-- Where messages say they come from. A database restored to an earlier point must not reuse offsets: it gets a
-- new source, and the latest row is the one in force.
create table oncebox.outbox_source (
    ordinal integer primary key generated always as identity,
    source uuid not null unique default gen_random_uuid(),
    made_at timestamptz not null default clock_timestamp()
);
insert into oncebox.outbox_source default values;

-- Cache 1: two calls of one session, and of sessions after one another, take rising numbers.
create sequence oncebox.outbox_seq as bigint cache 1;

-- The ring: which partition new messages go to. Clearing one is a TRUNCATE of a leaf nobody writes to.
create table oncebox.outbox_ring (
    only_row boolean primary key default true check (only_row),
    slot smallint not null default 0 check (slot between 0 and 7)
);
insert into oncebox.outbox_ring default values;

create table oncebox.outbox (
    slot smallint not null,
    lane smallint not null,
    seq bigint not null,
    xid xid8 not null,
    message_id uuid not null,
    topic text not null,
    key text,
    content_type text not null,
    headers jsonb not null,
    body bytea not null,
    published_at timestamptz not null,
    expires_at timestamptz
) partition by list (slot);

create table oncebox.outbox_0 partition of oncebox.outbox for values in (0);
create table oncebox.outbox_1 partition of oncebox.outbox for values in (1);
create table oncebox.outbox_2 partition of oncebox.outbox for values in (2);
create table oncebox.outbox_3 partition of oncebox.outbox for values in (3);
create table oncebox.outbox_4 partition of oncebox.outbox for values in (4);
create table oncebox.outbox_5 partition of oncebox.outbox for values in (5);
create table oncebox.outbox_6 partition of oncebox.outbox for values in (6);
create table oncebox.outbox_7 partition of oncebox.outbox for values in (7);

-- Serves the window's rows beyond the sequence number its predecessor had seen.
create index outbox_lane_seq on oncebox.outbox (lane, seq);
-- Serves the window's rows of transactions that were open when its predecessor was taken.
create index outbox_lane_xid_seq on oncebox.outbox (lane, xid, seq);

comment on table oncebox.outbox is 'Messages as published. Append-only: insert through oncebox.publish, never update or delete.';
comment on column oncebox.outbox.xid is 'the inserting transaction, taken before seq';

-- One row a lane: who publishes it. Every write of a relay names the epoch it holds.
create table oncebox.outbox_lease (
    lane smallint primary key,
    epoch bigint not null default 0,
    owner uuid,
    owner_name text,
    acquired_at timestamptz,
    expires_at timestamptz not null default '-infinity',
    settled_n bigint not null default 0,
    settled_seq bigint not null default 0
) with (fillfactor = 50);

-- The journal: which snapshot windows were opened, append-only, so that any relay reads the same windows, in the
-- same order, with the same offsets. Window n holds what is visible in s2 and was not in s1.
create table oncebox.outbox_plan (
    lane smallint not null,
    n bigint not null,
    source uuid not null,
    s1 pg_snapshot not null,
    p1 xid8 not null,
    q1 bigint not null,
    s2 pg_snapshot not null,
    p2 xid8 not null,
    q2 bigint not null,
    q_top bigint not null,
    settled_n bigint not null,
    settled_seq bigint not null,
    keyframe boolean not null,
    streams text[] not null,
    bases bigint[] not null,
    planned_at timestamptz not null,
    primary key (lane, n)
);
-- Serves a take-over: the newest plan that holds every stream's counter.
create index outbox_plan_keyframe on oncebox.outbox_plan (lane, n) where keyframe;

comment on column oncebox.outbox_plan.p1 is 'xid of the transaction that recorded s1';
comment on column oncebox.outbox_plan.q1 is 'last value of outbox_seq, read before p1 was assigned';
comment on column oncebox.outbox_plan.q_top is 'no row of the window has a higher seq: last value of outbox_seq, read after s2';
comment on column oncebox.outbox_plan.settled_n is 'every row of earlier windows, and of this one up to settled_seq, is confirmed, held or parked; the lease may know more';
comment on column oncebox.outbox_plan.streams is 'streams, and #lane for the counter of the whole lane';
comment on column oncebox.outbox_plan.keyframe is 'true: streams and bases hold every stream; false: those the previous window touched';
comment on column oncebox.outbox_plan.bases is 'offset the next message of the stream gets at the start of this window';

-- Messages taken out of the log's order: nacked ones and those of the same key behind them (waiting), and those
-- that need an operator (parked). A parked message holds up nobody.
create table oncebox.outbox_held (
    lane smallint not null,
    seq bigint not null,
    plan_n bigint not null,
    state text not null check (state in ('waiting', 'parked')),
    reason text not null,
    last_error text,
    attempts integer not null default 0,
    next_at timestamptz,
    held_at timestamptz not null default clock_timestamp(),
    changed_at timestamptz not null default clock_timestamp(),
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    ordinal bigint not null,
    message_id uuid not null,
    topic text not null,
    key text,
    content_type text not null,
    headers jsonb not null,
    body bytea not null,
    published_at timestamptz not null,
    expires_at timestamptz,
    primary key (lane, seq)
);
-- Serves the relay's look for due heads of keys.
create index outbox_held_waiting on oncebox.outbox_held (lane, key, seq) where state = 'waiting';
-- Serves a take-over: which rows beyond the settled place are held already.
create index outbox_held_place on oncebox.outbox_held (lane, plan_n, seq);

comment on column oncebox.outbox_held.plan_n is 'the window it came from: a replay of that window passes over it';
comment on column oncebox.outbox_held.reason is 'nacked, behind_key, unroutable, refused or expired';

-- Messages not to be sent yet; the relay moves them into the log when they are due.
create table oncebox.outbox_scheduled (
    id bigint primary key generated always as identity,
    deliver_at timestamptz not null,
    message_id uuid not null,
    topic text not null,
    key text,
    content_type text not null,
    headers jsonb not null,
    body bytea not null,
    expires_at timestamptz
);
create index outbox_scheduled_due on oncebox.outbox_scheduled (deliver_at, id);

-- A lane begins with an empty window, before any transaction: what was published earlier is in the next one.
create function oncebox.outbox_make_lanes(lanes smallint) returns void
language sql volatile
begin atomic
    insert into oncebox.outbox_lease (lane)
    select l from generate_series(0, lanes - 1) as l
    on conflict do nothing;
    insert into oncebox.outbox_plan (
        lane, n, source, s1, p1, q1, s2, p2, q2, q_top, settled_n, settled_seq, keyframe, streams, bases, planned_at)
    select
        l, 0, (select source from oncebox.outbox_source order by ordinal desc limit 1),
        '3:3:', '3', 0, '3:3:', '3', 0, 0, 0, 0, true, '{}', '{}', clock_timestamp()
    from generate_series(0, lanes - 1) as l
    on conflict do nothing;
end;
select oncebox.outbox_make_lanes(1::smallint);

-- A key's lane must never change, or its order is lost.
create function oncebox.setting_guard_lanes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    -- Keeps publishers out between the look and the commit.
    lock table oncebox.outbox in share mode;
    if exists (select from oncebox.outbox) or exists (select from oncebox.outbox_plan where n > 0)
        or exists (select from oncebox.outbox_scheduled) then
        raise exception using errcode = '55000',
            message = 'lanes: cannot be changed after the first message was published';
    end if;
    if new.lanes < old.lanes then
        delete from oncebox.outbox_plan where lane >= new.lanes;
        delete from oncebox.outbox_lease where lane >= new.lanes;
    end if;
    perform oncebox.outbox_make_lanes(new.lanes);
    return new;
end
$$;
create trigger setting_guard_lanes before update of lanes on oncebox.setting
for each row when (old.lanes is distinct from new.lanes)
execute function oncebox.setting_guard_lanes();

-- Refuses headers that the broker or a consumer could not carry; callers pass non-empty objects only.
create function oncebox.outbox_check_headers(headers jsonb) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp set extra_float_digits = 1 as $$
declare
    v_name text;
    v_value jsonb;
    v_number numeric;
begin
    if octet_length(headers::text) > 8192 then
        raise exception using errcode = '22023',
            message = format('headers: must be at most 8192 bytes together, got %s', octet_length(headers::text));
    end if;
    for v_name, v_value in select e.key, e.value from jsonb_each(headers) as e loop
        if octet_length(v_name) not between 1 and 255 then
            raise exception using errcode = '22023',
                message = format('headers: a name must be 1 to 255 bytes, "%s…" is %s', left(v_name, 40), octet_length(v_name));
        elsif v_name in ('CC', 'BCC') or starts_with(v_name, 'x-') or starts_with(v_name, 'oncebox-') then
            raise exception using errcode = '22023',
                message = format('headers: the name "%s" is reserved', v_name);
        end if;
        case jsonb_typeof(v_value)
            when 'string', 'boolean' then
                null;
            when 'number' then
                v_number := v_value::numeric;
                -- The test order matters: the cast to float8 raises its own error outside this range.
                if v_number = trunc(v_number) and v_number between -9223372036854775808 and 9223372036854775807 then
                    null;
                elsif abs(v_number) not between 2.3e-308 and 1.79e308
                    or v_number::float8::text::numeric <> v_number then
                    raise exception using errcode = '22023',
                        message = format('headers: the number of "%s" is neither an int64 nor exact as a double', v_name);
                end if;
            else
                raise exception using errcode = '22023',
                    message = format('headers: the value of "%s" must be a string, number or boolean, not %s',
                        v_name, jsonb_typeof(v_value));
        end case;
    end loop;
end
$$;

-- Appends a checked message to the log.
create function oncebox.outbox_insert(
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
    v_lanes smallint;
    v_slot smallint;
    v_lane smallint := 0;
    v_xid xid8;
begin
    -- A change of the lanes ends before this row looks at them, or begins after its transaction.
    lock table only oncebox.outbox in row exclusive mode;
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        -- An older snapshot shows the lanes from before the change: 40001 instead.
        perform from oncebox.setting for share;
    end if;
    select s.lanes, r.slot into strict v_lanes, v_slot from oncebox.setting as s, oncebox.outbox_ring as r;
    if v_lanes > 1 then
        v_lane := ('x' || substr(md5(coalesce(key, message_id::text)), 1, 8))::bit(32)::bigint % v_lanes;
    end if;
    -- The xid before the sequence number: the other way round a window could pass over this row for ever.
    v_xid := pg_current_xact_id();
    insert into oncebox.outbox (
        slot, lane, seq, xid, message_id, topic, key, content_type, headers, body, published_at, expires_at)
    values (
        v_slot, v_lane, nextval('oncebox.outbox_seq'), v_xid, message_id, topic, key, content_type, headers, body,
        published_at, expires_at);
end
$$;

-- Checks a message and appends it to the log, or to the schedule. Everything that publishes comes through here.
create function oncebox.outbox_append(
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
    v_id uuid := message_id;
    v_payload_limit_bytes integer;
    v_dedup_window interval;
begin
    select s.payload_limit_bytes, s.dedup_window into strict v_payload_limit_bytes, v_dedup_window
    from oncebox.setting as s;

    if topic is null or octet_length(topic) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'topic: must be 1 to 255 bytes, got '
            || coalesce(octet_length(topic)::text, 'null');
    end if;
    if body is null then
        raise exception using errcode = '22023', message = 'payload: must not be null';
    elsif octet_length(body) > v_payload_limit_bytes then
        raise exception using errcode = '22023', message = format('payload: must be at most %s bytes (setting '
            'payload_limit_bytes), got %s', v_payload_limit_bytes, octet_length(body));
    end if;
    if content_type is null or octet_length(content_type) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'content_type: must be 1 to 255 bytes, got '
            || coalesce(octet_length(content_type)::text, 'null');
    end if;
    if octet_length(key) > 255 then
        raise exception using errcode = '22023',
            message = format('key: must be at most 255 bytes, got %s', octet_length(key));
    end if;
    if headers is null or jsonb_typeof(headers) <> 'object' then
        raise exception using errcode = '22023', message = 'headers: must be a JSON object';
    elsif headers <> '{}' then
        perform oncebox.outbox_check_headers(headers);
    end if;
    if not isfinite(deliver_at) or deliver_at >= '9999-01-01' then
        raise exception using errcode = '22023', message = 'deliver_at: must be a time before the year 9999';
    end if;
    if not isfinite(expires_at) then
        raise exception using errcode = '22023', message = 'expires_at: must be a finite time';
    elsif expires_at <= deliver_at then
        raise exception using errcode = '22023', message = 'expires_at: must lie after deliver_at';
    end if;

    if v_id is null then
        v_id := oncebox.uuid_v7(greatest(v_now, deliver_at));
    elsif oncebox.uuid_v7_ms(v_id) < extract(epoch from v_now - v_dedup_window) * 1000 then
        raise exception using errcode = '22023',
            message = format('message_id: the UUIDv7 %s is older than the dedup window of %s', v_id, v_dedup_window);
    end if;

    if deliver_at > v_now then
        insert into oncebox.outbox_scheduled (
            deliver_at, message_id, topic, key, content_type, headers, body, expires_at)
        values (deliver_at, v_id, topic, key, content_type, headers, body, expires_at);
    else
        perform oncebox.outbox_insert(topic, body, content_type, key, headers, v_id, v_now, expires_at);
    end if;
    return v_id;
end
$$;

create function oncebox.publish(
    topic text,
    payload jsonb,
    key text default null,
    headers jsonb default '{}',
    message_id uuid default null,
    deliver_at timestamptz default null,
    expires_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    return oncebox.outbox_append(
        topic, convert_to(payload::text, 'UTF8'), 'application/json', key, headers, message_id, deliver_at, expires_at);
end
$$;
comment on function oncebox.publish is
    'Publishes a JSON message when the calling transaction commits; returns its message id.';

create function oncebox.publish_bytes(
    topic text,
    payload bytea,
    content_type text,
    key text default null,
    headers jsonb default '{}',
    message_id uuid default null,
    deliver_at timestamptz default null,
    expires_at timestamptz default null
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    return oncebox.outbox_append(
        topic, payload, content_type, key, headers, message_id, deliver_at, expires_at);
end
$$;
comment on function oncebox.publish_bytes is
    'Publishes any bytes when the calling transaction commits; returns the message id.';

-- Moves due messages from the schedule into the log, oldest first; returns how many. Relays call it.
create function oncebox.outbox_release_due(at_most integer) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_due record;
    v_released integer := 0;
begin
    for v_due in
        with due as (
            delete from oncebox.outbox_scheduled
            where id in (
                select s.id from oncebox.outbox_scheduled as s
                where s.deliver_at <= clock_timestamp()
                order by s.deliver_at, s.id limit at_most
                for update skip locked)
            returning *)
        select * from due order by deliver_at, id
    loop
        perform oncebox.outbox_insert(
            v_due.topic, v_due.body, v_due.content_type, v_due.key, v_due.headers, v_due.message_id,
            clock_timestamp(), v_due.expires_at);
        v_released := v_released + 1;
    end loop;
    return v_released;
end
$$;

-- Functions are executable by PUBLIC when made: nothing here may be.
revoke all on all functions in schema oncebox from public;

grant execute on function
    oncebox.publish(text, jsonb, text, jsonb, uuid, timestamptz, timestamptz),
    oncebox.publish_bytes(text, bytea, text, text, jsonb, uuid, timestamptz, timestamptz)
to oncebox_producer, oncebox_admin;

grant select on oncebox.outbox, oncebox.outbox_source, oncebox.outbox_seq to oncebox_relay, oncebox_admin;
grant select, insert on oncebox.outbox_plan to oncebox_relay;
grant select, update on oncebox.outbox_lease to oncebox_relay;
grant select, insert, update, delete on oncebox.outbox_held to oncebox_relay;
grant execute on function oncebox.outbox_release_due(integer) to oncebox_relay;

grant select on oncebox.outbox_plan, oncebox.outbox_lease, oncebox.outbox_scheduled, oncebox.outbox_ring to oncebox_admin;
grant select, update, delete on oncebox.outbox_held to oncebox_admin;
