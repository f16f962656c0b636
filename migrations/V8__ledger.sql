-- The fold: rows of the inbox become ranges in the ledger as they come, and go when the dedup window has passed.

-- Which transaction wrote a row tells the fold what it has not seen yet. Rows from before this migration count as
-- frozen: the first fold takes them all.
alter table oncebox.inbox add column xid xid8 not null default '2';
alter table oncebox.inbox alter column xid set default pg_current_xact_id();
-- Serves the fold's look for new rows. (BRIN has no operators for xid8.)
create index inbox_xid on oncebox.inbox (xid);
-- Serves the look for rows of the plain leaf that the window has passed.
create index inbox_16_accepted on oncebox.inbox_16 (accepted_at);

alter table oncebox.inbox_alias add column folded boolean not null default false;
-- Serves the fold.
create index inbox_alias_fresh on oncebox.inbox_alias (seen_at) where not folded;
-- Serves the removal of those whose message is forgotten.
create index inbox_alias_seen on oncebox.inbox_alias (seen_at);

-- What the ledger holds: every row of the inbox whose transaction is visible in `folded`. Whoever folds or clears
-- locks this row first, so there is one at a time.
create table oncebox.inbox_fold (
    only_row boolean primary key default true check (only_row),
    folded pg_snapshot not null default '1:1:',
    cluster_id bigint
);
insert into oncebox.inbox_fold default values;
comment on column oncebox.inbox_fold.cluster_id is
    'system identifier of the cluster whose transactions `folded` speaks of; null before the first fold';

-- Places that two accepted messages claim: offsets were used twice. An operator deletes what was looked into.
create table oncebox.inbox_doubled (
    consumer text not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    found_at timestamptz not null default clock_timestamp(),
    primary key (consumer, source, stream, "offset")
);

-- Both are rewritten every second: room for the new version beside the old keeps them from growing.
alter table oncebox.inbox_ledger
    set (fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0.2);
alter table oncebox.inbox_fold set (fillfactor = 50, autovacuum_vacuum_threshold = 500);

create function oncebox.inbox_fold() returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off as $$
declare
    c_nothing constant pg_snapshot := '1:1:';
    c_last_offset constant bigint := 9223372036854775807;
    v_here constant bigint := (select c.system_identifier from pg_control_system() as c);
    v_cluster_id bigint;
    v_folded pg_snapshot;
    v_began xid8;
    v_running xid8[];
    v_own xid8;
    v_now pg_snapshot;
    v_moved boolean;
    v_rows bigint;
begin
    -- An idle look takes no lock and writes nothing.
    select f.folded, f.cluster_id into strict v_folded, v_cluster_id from oncebox.inbox_fold as f where f.only_row;
    v_began := pg_snapshot_xmax(v_folded);
    v_running := array(select pg_snapshot_xip(v_folded));
    if v_cluster_id = v_here and v_began <= pg_snapshot_xmax(pg_current_snapshot())
        and not exists (select from oncebox.inbox as i where i.xid >= v_began)
        and not exists (select from oncebox.inbox as i where i.xid = any (v_running))
        and not exists (select from oncebox.inbox_alias as a where not a.folded)
    then
        return 0;
    end if;

    select f.folded, f.cluster_id into strict v_folded, v_cluster_id
    from oncebox.inbox_fold as f where f.only_row for update;
    -- This transaction counts as running: it may roll back to a savepoint, or accept more after this.
    v_own := pg_current_xact_id();
    v_now := pg_current_snapshot();
    if pg_visible_in_snapshot(v_own, v_now) then
        v_now := format('%s:%s:%s', least(pg_snapshot_xmin(v_now), v_own), pg_snapshot_xmax(v_now), (
            select string_agg(x.xid::text, ',' order by x.xid)
            from (select pg_snapshot_xip(v_now) as xid union select v_own) as x
        ))::pg_snapshot;
    end if;
    -- In a restored database the rows' transactions are another cluster's: all are folded anew, which adds nothing
    -- to what is in the ledger, and none is mistaken for a later one of this cluster.
    v_moved := coalesce(v_cluster_id <> v_here, false)
        or pg_snapshot_xmax(v_folded) > pg_snapshot_xmax(v_now);
    if v_moved then
        update oncebox.inbox as i set xid = '2' where i.xid >= pg_snapshot_xmax(v_now);
        v_folded := c_nothing;
    end if;
    v_began := pg_snapshot_xmax(v_folded);
    v_running := array(select pg_snapshot_xip(v_folded));

    -- Rows are taken by the snapshot that is kept, not by this statement's: one that is committed between the two is
    -- the next fold's.
    with fresh as materialized (
        select i.consumer, i.source, i.stream, i."offset"
        from oncebox.inbox as i
        where i.xid >= v_began and pg_visible_in_snapshot(i.xid, v_now)
        union all
        select i.consumer, i.source, i.stream, i."offset"
        from oncebox.inbox as i
        where i.xid = any (v_running) and pg_visible_in_snapshot(i.xid, v_now)
    ), alias as (
        update oncebox.inbox_alias as a set folded = true where not a.folded
        returning a.consumer, a.source, a.stream, a."offset"
    ), place as (
        select f.consumer, f.source, f.stream, f."offset"
        from fresh as f where f."offset" is not null and octet_length(f.stream) <= 1024
        union all
        select a.consumer, a.source, a.stream, a."offset" from alias as a
    ), ranked as materialized (
        -- Neighbours have the same difference, so memory grows with gaps, not with rows.
        select p.consumer, p.source, p.stream, p."offset", p."offset" - dense_rank() over w as island,
            p."offset" is not distinct from lag(p."offset") over w as again
        from place as p
        window w as (partition by p.consumer, p.source, p.stream order by p."offset")
    ), part as materialized (
        select n.consumer, n.source, n.stream, range_agg(n.offsets) as offsets
        from (
            select r.consumer, r.source, r.stream,
                int8range(min(r."offset"), nullif(max(r."offset"), c_last_offset) + 1) as offsets
            from ranked as r
            group by r.consumer, r.source, r.stream, r.island
        ) as n
        group by n.consumer, n.source, n.stream
    ), doubled as (
        insert into oncebox.inbox_doubled (consumer, source, stream, "offset")
        select r.consumer, r.source, r.stream, r."offset" from ranked as r where r.again and not v_moved
        union
        select p.consumer, p.source, p.stream, o.n
        from part as p
        join oncebox.inbox_ledger as l using (consumer, source, stream)
        cross join unnest(l.offsets * p.offsets) as both_ranges (r)
        cross join generate_series(lower(r), coalesce(upper(r) - 1, c_last_offset)) as o (n)
        where not v_moved
        on conflict do nothing
    ), ledger as (
        insert into oncebox.inbox_ledger as l (consumer, source, stream, offsets)
        select p.consumer, p.source, p.stream, p.offsets from part as p
        on conflict (consumer, source, stream) do update set offsets = l.offsets + excluded.offsets
    )
    select count(*) into strict v_rows from fresh;

    update oncebox.inbox_fold as f set folded = v_now, cluster_id = v_here where f.only_row;
    return v_rows;
end
$$;
comment on function oncebox.inbox_fold is
    'Folds every committed row of the inbox into the ledger; returns how many rows. Any number of callers.';

-- The newest UUIDv7 of a leaf, as milliseconds; null if there is none. One probe a consumer: ids sort by time.
create function oncebox.inbox_newest_ms(leaf smallint) returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off as $$
begin
    return (
        with recursive known (consumer) as (
            (select i.consumer from oncebox.inbox as i where i.leaf = inbox_newest_ms.leaf order by i.consumer limit 1)
            union all
            select (
                select i.consumer from oncebox.inbox as i
                where i.leaf = inbox_newest_ms.leaf and i.consumer > k.consumer
                order by i.consumer limit 1)
            from known as k where k.consumer is not null
        )
        select max(oncebox.uuid_v7_ms((
            select i.message_id from oncebox.inbox as i
            where i.leaf = inbox_newest_ms.leaf and i.consumer = k.consumer
            order by i.message_id desc limit 1)))
        from known as k where k.consumer is not null
    );
end
$$;

create function oncebox.inbox_clear(max_rows integer default 10000) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off set lock_timeout = '100ms' as $$
declare
    c_plain constant smallint := 16;
    c_day_ms constant bigint := 86400000;
    v_window constant interval := (select s.dedup_window from oncebox.setting as s where s.only_row);
    v_forgets_before constant timestamptz := clock_timestamp() - v_window;
    -- Ids of days before this one are older than the window.
    v_day constant bigint := floor(extract(epoch from v_forgets_before) / 86400);
    v_horizon constant timestamptz := to_timestamp(v_day * 86400);
    v_own_day bigint;
    v_due smallint[] := '{}';
    v_leaf smallint;
    v_folded pg_snapshot;
    v_rows tid[];
    v_count bigint;
begin
    -- With an older snapshot, rows that were committed since would go without having been folded.
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception using errcode = '25001', message = 'inbox_clear needs the isolation level read committed';
    end if;
    -- First of all: whatever is locked after this is so by consumers and readers, not by another clear.
    perform from oncebox.inbox_fold as f where f.only_row for update skip locked;
    if not found then
        return false;
    end if;
    for v_leaf in 0..15 loop
        -- The last day of this leaf that is over. An old message that comes after its leaf was cleared waits for the
        -- next time, 16 days later: each of them would empty the leaf anew.
        v_own_day := v_day - 1 - (v_day - 1 - v_leaf) % 16;
        if exists (
            select from (
                select i.accepted_at from oncebox.inbox as i where i.leaf = v_leaf order by i.xid limit 100
            ) as first
            where first.accepted_at < to_timestamp((v_own_day + 1) * 86400) + v_window
        ) then
            v_due := v_due || v_leaf;
        end if;
    end loop;
    if exists (
        select from oncebox.inbox_16 as i
        where i.accepted_at < v_forgets_before and coalesce(oncebox.uuid_v7_ms(i.message_id) < v_day * c_day_ms, true)
    ) then
        v_due := v_due || c_plain;
    end if;

    foreach v_leaf in array v_due loop
        begin
            -- Readers of the whole inbox wait for the last statement only.
            if v_leaf <> c_plain then
                execute format('lock table oncebox.inbox_%s in share row exclusive mode', v_leaf);
                if oncebox.inbox_newest_ms(v_leaf) < v_day * c_day_ms then
                    perform oncebox.inbox_fold();
                    select f.folded into strict v_folded from oncebox.inbox_fold as f where f.only_row;
                    if exists (
                        select from oncebox.inbox as i
                        where i.leaf = v_leaf and i.xid >= pg_snapshot_xmin(v_folded)
                            and not pg_visible_in_snapshot(i.xid, v_folded)
                    ) then
                        raise exception using errcode = '25001',
                            message = 'inbox_clear needs a transaction in which nothing was accepted';
                    end if;
                    update oncebox.inbox_horizon as h set folded_until = greatest(h.folded_until, v_horizon)
                    where h.only_row;
                    execute format('truncate oncebox.inbox_%s', v_leaf);
                    return true;
                end if;
            end if;
        exception when lock_not_available or deadlock_detected then
            -- Somebody writes there, or reads: another time.
            continue;
        end;
        -- Rows of other days are among them, so they go one by one.
        begin
            if v_leaf = c_plain then
                v_rows := array(
                    select i.ctid from oncebox.inbox_16 as i
                    where i.accepted_at < v_forgets_before
                        and coalesce(oncebox.uuid_v7_ms(i.message_id) < v_day * c_day_ms, true)
                    order by i.accepted_at limit max_rows for update skip locked);
            else
                v_rows := array(
                    select i.ctid from oncebox.inbox as i
                    where i.leaf = v_leaf and oncebox.uuid_v7_ms(i.message_id) < v_day * c_day_ms
                    limit max_rows for update skip locked);
            end if;
            perform oncebox.inbox_fold();
            select f.folded into strict v_folded from oncebox.inbox_fold as f where f.only_row;
            update oncebox.inbox_horizon as h set folded_until = greatest(h.folded_until, v_horizon) where h.only_row;
            delete from oncebox.inbox as i
            where i.leaf = v_leaf and i.ctid = any (v_rows) and pg_visible_in_snapshot(i.xid, v_folded);
            get diagnostics v_count = row_count;
            if v_count > 0 then
                return true;
            end if;
        exception when lock_not_available or deadlock_detected then
            continue;
        end;
    end loop;

    -- An alias outlives its message's row: a copy that comes while the row is there would be remembered anew.
    delete from oncebox.inbox_alias as a
    where (a.consumer, a.source, a.stream, a."offset") in (
        select b.consumer, b.source, b.stream, b."offset"
        from oncebox.inbox_alias as b
        where b.folded and b.seen_at < v_forgets_before and not exists (
            select from oncebox.inbox as i
            where i.leaf = any (array[oncebox.inbox_day_leaf(b.message_id), c_plain])
                and i.consumer = b.consumer and i.message_id = b.message_id)
        order by b.seen_at limit max_rows);
    return found;
end
$$;
comment on function oncebox.inbox_clear is
    'Forgets one leaf, or at most max_rows rows, that the dedup window has passed; true: call again.';

create or replace function oncebox.accept(
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
    v_seen_elsewhere boolean := false;
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
    elsif octet_length(v_stream) > 1024 then
        raise exception using errcode = '22023',
            message = format('stream: must be at most 1024 bytes, got %s', octet_length(v_stream));
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

    -- A row that this transaction's snapshot shows no more, or whose ledger entry it does not show yet, is a conflict:
    -- who takes rows away changes the horizon with them. A statement's own snapshot needs no such lock.
    if v_inserted = 1 and current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        perform from oncebox.inbox_horizon as h where h.only_row for share;
    end if;

    -- It may have come when it lay more than a day ahead and does no longer, or by a clock that was set back.
    if v_inserted = 1 and v_other = c_plain then
        -- Not through the parent: a plan for it locks every leaf, and no leaf could be cleared under long handlers.
        v_seen_elsewhere := exists (
            select from oncebox.inbox_16 as i
            where i.leaf = c_plain and i.consumer = v_consumer and i.message_id = v_id
        );
    elsif v_inserted = 1 and v_other is not null then
        v_seen_elsewhere := exists (
            select from oncebox.inbox as i
            where i.leaf = v_other and i.consumer = v_consumer and i.message_id = v_id
        );
    end if;
    if v_seen_elsewhere then
        delete from oncebox.inbox as i
        where i.leaf = v_leaf and i.consumer = v_consumer and i.message_id = v_id;
        v_inserted := 0;
        v_leaf := v_other;
    end if;

    if v_inserted = 1 then
        -- Rows may be folded away up to the window or, if that was made longer since, up to the horizon; rows of the
        -- plain leaf by their age, which the id does not tell.
        if v_leaf <> c_plain then
            select extract(epoch from clock_timestamp() - s.dedup_window) * 1000
            into strict v_forgotten_ms
            from oncebox.setting as s where s.only_row;
            select greatest(v_forgotten_ms, extract(epoch from nullif(h.folded_until, '-infinity')) * 1000)
            into strict v_forgotten_ms
            from oncebox.inbox_horizon as h where h.only_row;
        end if;
        if v_leaf = c_plain or v_id_ms < v_forgotten_ms + c_hour_ms then
            -- Insert first, look second: the other way round, a row that goes between the two would make an applied
            -- message look new. The insert waits for whoever takes the row away.
            if v_offset is not null and exists (
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
        -- The row stays until this place is known: who takes rows away passes by those that are locked.
        perform from oncebox.inbox as i
        where i.leaf = v_leaf and i.consumer = v_consumer and i.message_id = v_id
            and (i.source, i.stream, i."offset") is distinct from (v_source, v_stream, v_offset)
        for key share;
        if found then
            insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
            values (v_consumer, v_source, v_stream, v_offset, v_id, clock_timestamp())
            on conflict do nothing;
        end if;
    end if;
    return v_inserted = 1;
end
$$;

revoke all on function oncebox.inbox_fold(), oncebox.inbox_newest_ms(smallint), oncebox.inbox_clear(integer)
    from public;
grant execute on function oncebox.inbox_fold(), oncebox.inbox_clear(integer) to oncebox_consumer, oncebox_admin;
grant select on oncebox.inbox_fold to oncebox_admin;
grant select, delete on oncebox.inbox_doubled to oncebox_admin;
