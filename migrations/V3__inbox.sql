-- The inbox: what a consumer has applied. accept runs inside the handler's own transaction.

-- One row an accepted message. Leaves 0 to 15: the day of a UUIDv7, mod 16. Leaf 16: ids that are no UUIDv7, and
-- UUIDv7 that lay more than a day ahead when they came. The leaf is part of the key because it partitions.
create table oncebox.inbox (
    leaf smallint not null,
    consumer text not null,
    message_id uuid not null,
    source uuid,
    stream text,
    "offset" bigint,
    accepted_at timestamptz not null,
    primary key (leaf, consumer, message_id)
) partition by list (leaf);

do $$
begin
    for leaf in 0..16 loop
        execute format('create table oncebox.inbox_%s partition of oncebox.inbox for values in (%s)', leaf, leaf);
    end loop;
end
$$;

-- The leaf of a UUIDv7's day; null for any other id.
create function oncebox.inbox_day_leaf(id uuid) returns smallint
language sql immutable strict parallel safe
return (oncebox.uuid_v7_ms(id) / 86400000 % 16)::smallint;

-- What was applied before the rows' window: ranges of offsets. Never forgets, and grows with gaps, not messages.
create table oncebox.inbox_ledger (
    consumer text not null,
    source uuid not null,
    stream text not null,
    offsets int8multirange not null,
    primary key (consumer, source, stream)
);

-- Whoever folds rows into the ledger updates this row in the same transaction; accept reads the ledger under a
-- share lock on it, so that it sees a row or its ledger entry, never neither.
create table oncebox.inbox_horizon (
    only_row boolean primary key default true check (only_row),
    folded_until timestamptz not null default '-infinity'
);
insert into oncebox.inbox_horizon default values;

-- The same message id published under two places: applied once, and both places are settled.
create table oncebox.inbox_alias (
    consumer text not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    message_id uuid not null,
    seen_at timestamptz not null,
    primary key (consumer, source, stream, "offset")
);

-- Deliveries that wait for another attempt, deliveries behind them of the same key, and parked ones. Each was
-- acknowledged to the broker after it was written here.
create table oncebox.inbox_held (
    consumer text not null,
    message_id uuid not null,
    n bigint not null generated always as identity,
    state text not null check (state in ('waiting', 'parked')),
    reason text not null,
    last_error text,
    attempts integer not null default 0,
    next_at timestamptz not null default clock_timestamp(),
    held_at timestamptz not null default clock_timestamp(),
    changed_at timestamptz not null default clock_timestamp(),
    source uuid,
    stream text,
    "offset" bigint,
    key text,
    topic text not null,
    content_type text,
    headers jsonb not null,
    body bytea not null,
    primary key (consumer, message_id)
);
-- Serves the look for a waiting delivery of a key, and for the head of each key.
create index inbox_held_key on oncebox.inbox_held (consumer, key, n) where state = 'waiting';
-- Serves the look for due deliveries of consumers without order.
create index inbox_held_due on oncebox.inbox_held (consumer, next_at) where state = 'waiting';

comment on column oncebox.inbox_held.reason is 'failed, behind_key, too_many_attempts, rejected or no_message_id';

create function oncebox.accept(
    consumer text,
    message_id uuid,
    source uuid default null,
    stream text default null,
    "offset" bigint default null
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_plain constant smallint := 16;
    c_day_ms constant bigint := 86400000;
    c_hour_ms constant bigint := 3600000;
    v_consumer constant text := accept.consumer;
    v_id constant uuid := accept.message_id;
    v_source constant uuid := accept.source;
    v_stream constant text := accept.stream;
    v_offset constant bigint := accept."offset";
    v_now_ms constant bigint := extract(epoch from clock_timestamp()) * 1000;
    v_id_ms constant bigint := oncebox.uuid_v7_ms(accept.message_id);
    v_day_leaf constant smallint := oncebox.inbox_day_leaf(accept.message_id);
    v_forgotten_ms bigint;
    v_leaf smallint := c_plain;
    v_other smallint := v_day_leaf;
    v_inserted integer;
begin
    if v_consumer is null or octet_length(v_consumer) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'consumer: must be 1 to 255 bytes, got '
            || coalesce(octet_length(v_consumer)::text, 'null');
    elsif v_id is null then
        raise exception using errcode = '22023', message = 'message_id: must not be null';
    elsif num_nulls(v_source, v_stream, v_offset) not in (0, 3) then
        raise exception using errcode = '22023',
            message = 'source, stream and offset: must be given together or not at all';
    elsif v_offset < 1 then
        raise exception using errcode = '22023', message = format('offset: must be at least 1, got %s', v_offset);
    end if;

    if v_id_ms <= v_now_ms + c_day_ms then
        v_leaf := v_day_leaf;
        v_other := c_plain;
    end if;
    -- An id just about a day ahead could go to either table: two callers at that moment must not use both.
    if v_id_ms between v_now_ms + c_day_ms - c_hour_ms and v_now_ms + c_day_ms + c_hour_ms then
        perform pg_advisory_xact_lock(hashtextextended(v_consumer || v_id::text, 0));
        -- An insert meets what an older snapshot does not show: 40001 instead of a second `true`.
        insert into oncebox.inbox (leaf, consumer, message_id, accepted_at)
        values (v_other, v_consumer, v_id, clock_timestamp())
        on conflict do nothing;
        get diagnostics v_inserted = row_count;
        if v_inserted = 1 then
            delete from oncebox.inbox as i
            where i.leaf = v_other and i.consumer = v_consumer and i.message_id = v_id;
        end if;
    end if;

    -- Waits for a twin in flight: nothing is inserted if it commits, the row is ours if it rolls back.
    insert into oncebox.inbox (leaf, consumer, message_id, source, stream, "offset", accepted_at)
    values (v_leaf, v_consumer, v_id, v_source, v_stream, v_offset, clock_timestamp())
    on conflict do nothing;
    get diagnostics v_inserted = row_count;

    if v_inserted = 1 and exists (
        -- It may have come when it lay more than a day ahead and does no longer, or by a clock that was set back.
        select from oncebox.inbox as i
        where i.leaf = v_other and i.consumer = v_consumer and i.message_id = v_id
    ) then
        delete from oncebox.inbox as i
        where i.leaf = v_leaf and i.consumer = v_consumer and i.message_id = v_id;
        v_inserted := 0;
        v_leaf := v_other;
    end if;

    if v_inserted = 1 and v_leaf <> c_plain then
        -- Rows may be folded away up to the window or, if that was made longer since, up to the horizon.
        select greatest(extract(epoch from clock_timestamp() - s.dedup_window),
                extract(epoch from nullif(h.folded_until, '-infinity'))) * 1000
        into strict v_forgotten_ms
        from oncebox.setting as s, oncebox.inbox_horizon as h;
        if v_id_ms < v_forgotten_ms + c_hour_ms then
            -- Insert first, look second: the other way round, a fold between the two would make an applied message
            -- look new.
            perform from oncebox.inbox_horizon for share;
            if exists (
                select from oncebox.inbox_ledger as l
                where l.consumer = v_consumer and l.source = v_source and l.stream = v_stream
                    and l.offsets @> v_offset
            ) then
                delete from oncebox.inbox as i
                where i.leaf = v_leaf and i.consumer = v_consumer and i.message_id = v_id;
                return false;
            elsif v_offset is null and v_id_ms < v_forgotten_ms then
                raise exception using errcode = 'OB001',
                    message = format('message %s is older than the dedup window and carries no stream and '
                        'offset: it cannot be proven new', v_id),
                    hint = 'Pass source, stream and offset from the message''s oncebox- headers.';
            end if;
        end if;
    end if;

    if v_inserted = 0 and v_offset is not null then
        insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
        select v_consumer, v_source, v_stream, v_offset, v_id, clock_timestamp()
        from oncebox.inbox as i
        where i.leaf = v_leaf and i.consumer = v_consumer and i.message_id = v_id
            and (i.source, i.stream, i."offset") is distinct from (v_source, v_stream, v_offset)
        on conflict do nothing;
    end if;
    return v_inserted = 1;
end
$$;
comment on function oncebox.accept is
    'True: first time, do the work in this transaction. False: done already, just acknowledge.';

revoke all on all functions in schema oncebox from public;

grant execute on function oncebox.accept(text, uuid, uuid, text, bigint) to oncebox_consumer, oncebox_admin;
-- The consumer finds a message's row by its leaf.
grant execute on function oncebox.inbox_day_leaf(uuid), oncebox.uuid_v7_ms(uuid) to oncebox_consumer;
grant select, insert, update, delete on oncebox.inbox_held to oncebox_consumer, oncebox_admin;
grant select on oncebox.inbox to oncebox_consumer;
grant select on oncebox.inbox, oncebox.inbox_ledger, oncebox.inbox_horizon, oncebox.inbox_alias to oncebox_admin;
