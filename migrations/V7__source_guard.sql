-- Which database a source belongs to. Offsets are counted per source: a database that was restored, reset, copied or
-- promoted may count from an earlier point, so its relays move every lane to a new source.

-- The cluster, its timeline, the database, and the table itself: a restored dump has another cluster or another table,
-- a promoted standby another timeline, a copied database another oid.
create function oncebox.outbox_identity() returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    return format('%s/%s/%s/%s',
        (select c.system_identifier from pg_control_system() as c),
        left(pg_walfile_name(pg_current_wal_insert_lsn()), 8),
        (select d.oid from pg_database as d where d.datname = current_database()),
        'oncebox.outbox_source'::regclass::oid);
end
$$;

alter table oncebox.outbox_source add column identity text, add column reason text;
update oncebox.outbox_source set identity = oncebox.outbox_identity(), reason = 'made with the schema';
alter table oncebox.outbox_source alter column identity set not null, alter column reason set not null;

comment on column oncebox.outbox_source.identity is
    'the database it belongs to: system identifier, timeline, oid of the database, oid of this table';
comment on column oncebox.outbox_source.reason is 'why it was made';

-- Where each source ended, for the audit. What consumers have of it at or beyond next_offset was published by a server
-- that had more than this one, and lost with that server.
create table oncebox.outbox_source_end (
    source uuid not null,
    lane smallint not null,
    stream text not null,
    next_offset bigint not null,
    ended_at timestamptz not null default clock_timestamp(),
    primary key (source, lane, stream)
);
comment on column oncebox.outbox_source_end.stream is 'as in outbox_plan: #lane is the counter of the whole lane';

-- The source that plans may carry here and now; null where the newest one belongs to another database. Each plan asks:
-- in plpgsql, whose statements are planned once a session.
create function oncebox.outbox_source_in_force() returns uuid
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    return (
        select s.source
        from (select source, identity from oncebox.outbox_source order by ordinal desc limit 1) as s
        where s.identity = oncebox.outbox_identity());
end
$$;

-- The source in force, made first if the newest one belongs to another database or is `distrusted`. Lanes that ask
-- at the same time get the same one.
create function oncebox.outbox_adopt_source(distrusted uuid, why text) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_here constant text := oncebox.outbox_identity();
    v_in_force uuid := oncebox.outbox_source_in_force();
    v_there text;
    v_reason text := why;
begin
    if v_in_force is distinct from distrusted and v_in_force is not null then
        return v_in_force;
    end if;
    lock table oncebox.outbox_source in share row exclusive mode;
    -- Another lane may have made it while this one waited.
    v_in_force := oncebox.outbox_source_in_force();
    if v_in_force is distinct from distrusted and v_in_force is not null then
        return v_in_force;
    end if;
    select s.identity into strict v_there from oncebox.outbox_source as s order by s.ordinal desc limit 1;
    if v_there <> v_here then
        v_reason := case
            when split_part(v_there, '/', 1) <> split_part(v_here, '/', 1) then 'another cluster'
            when split_part(v_there, '/', 3) <> split_part(v_here, '/', 3) then 'another database'
            when split_part(v_there, '/', 4) <> split_part(v_here, '/', 4) then 'restored tables'
            else 'another timeline'
        end || ' than ' || v_there;
    end if;
    insert into oncebox.outbox_source (identity, reason) values (v_here, v_reason) returning source into v_in_force;
    return v_in_force;
end
$$;

-- For operators: what no look at the database can tell, such as a file system snapshot that was put back.
create function oncebox.outbox_renew_source(reason text) returns uuid
language sql volatile security definer set search_path = pg_catalog, pg_temp
as $$
    insert into oncebox.outbox_source (identity, reason)
    values (oncebox.outbox_identity(), coalesce(reason, 'an operator asked for it'))
    returning source
$$;
comment on function oncebox.outbox_renew_source is
    'Makes a new source; the relays finish the windows of the old one and go on with offsets from 1.';

-- Moves a lane whose plans, the newest is `n`, are all settled, to the source in force: plan n + 1 is an empty window
-- that carries it, and what was not planned is in the windows behind it. Returns how many rows were rewritten.
--
-- Snapshots and xids of another cluster say nothing here, so rows are told apart by the newest plan first: planned are
-- those it or an earlier one covers. Planned rows get an xid that every snapshot shows as done, all others the xid of
-- this transaction, which the new plan's snapshot does not show. Rows not yet committed have xids of this cluster.
create function oncebox.outbox_rebase(lane smallint, epoch bigint, n bigint, streams text[], next_offsets bigint[])
returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set enable_seqscan = on as $$
#variable_conflict use_column
declare
    v_lane constant smallint := outbox_rebase.lane;
    v_epoch constant bigint := outbox_rebase.epoch;
    v_n constant bigint := outbox_rebase.n;
    v_source constant uuid := oncebox.outbox_source_in_force();
    v_old oncebox.outbox_plan;
    v_same_xids boolean;
    v_q bigint;
    v_rewritten bigint := 0;
begin
    if pg_current_xact_id_if_assigned() is not null then
        -- The new plan's snapshot would be older than its xid claims.
        raise exception using errcode = '25001', message = 'outbox_rebase: must be the first write of its transaction';
    end if;
    select p.* into v_old from oncebox.outbox_plan as p
    where p.lane = v_lane and p.n >= v_n order by p.n desc limit 1;
    if v_old.n is distinct from v_n or v_source is null or v_source = v_old.source then
        raise exception using errcode = 'OB010', message = 'outbox_rebase: the lane has moved meanwhile';
    end if;

    -- All that happened since was on this cluster and in this table: on other timelines, or after a rollback.
    select bool_and(split_part(s.identity, '/', i) = split_part(oncebox.outbox_identity(), '/', i))
    into strict v_same_xids
    from oncebox.outbox_source as s cross join unnest(array[1, 3, 4]) as i
    where s.ordinal >= (select o.ordinal from oncebox.outbox_source as o where o.source = v_old.source);
    v_same_xids := coalesce(v_same_xids, false) and v_old.p2 < pg_snapshot_xmax(pg_current_snapshot());

    if v_same_xids then
        insert into oncebox.outbox_plan (
            lane, n, source, s1, p1, q1, s2, p2, q2, q_top, settled_n, settled_seq, keyframe, streams, bases,
            planned_at)
        values (
            v_lane, v_n + 1, v_source, v_old.s2, v_old.p2, v_old.q2, v_old.s2, v_old.p2, v_old.q2, v_old.q_top,
            v_n + 1, 0, true, '{}', '{}', clock_timestamp());
    else
        select case when q.is_called then q.last_value else q.last_value - 1 end
        into strict v_q from oncebox.outbox_seq as q;
        -- One statement: what it rewrites is exactly what the snapshot it records shows.
        with here as materialized (
            select pg_current_snapshot() as s, pg_current_xact_id() as x
        ), rewritten as (
            update oncebox.outbox as o
            set xid = case
                when o.seq <= v_old.q_top and pg_visible_in_snapshot(o.xid, v_old.s2) then '2' else here.x end
            from here
            where o.lane = v_lane
                -- Planned, and done in every snapshot to come: it may stay as it is.
                and not (o.seq <= v_old.q_top and pg_visible_in_snapshot(o.xid, v_old.s2)
                    and o.xid < pg_snapshot_xmin(here.s))
            returning o.seq, o.xid
        ), counted as (
            select count(*) as rows, min(r.seq) filter (where r.xid <> '2') as first from rewritten as r
        ), planned as (
            insert into oncebox.outbox_plan (
                lane, n, source, s1, p1, q1, s2, p2, q2, q_top, settled_n, settled_seq, keyframe, streams, bases,
                planned_at)
            -- q lies below every row that waits: with no transaction open, only numbers beyond q are looked at.
            select v_lane, v_n + 1, v_source, here.s, here.x, q.q, here.s, here.x, q.q,
                (select greatest(v_old.q_top, v_q, case when is_called then last_value end) from oncebox.outbox_seq),
                v_n + 1, 0, true, '{}', '{}', clock_timestamp()
            from here cross join counted cross join lateral (select least(v_q, counted.first - 1)) as q (q)
        )
        select counted.rows into strict v_rewritten from counted;
    end if;

    insert into oncebox.outbox_source_end as e (source, lane, stream, next_offset)
    select v_old.source, v_lane, c.stream, c.next_offset
    from unnest(outbox_rebase.streams, outbox_rebase.next_offsets) as c (stream, next_offset)
    on conflict (source, lane, stream) do update set next_offset = greatest(e.next_offset, excluded.next_offset);

    -- Last, so that the lease can be renewed while rows are rewritten; who has lost it meanwhile changes nothing.
    perform from oncebox.outbox_lease as l where l.lane = v_lane and l.epoch = v_epoch for update;
    if not found then
        raise exception using errcode = 'OB010', message = 'outbox_rebase: the lease was lost meanwhile';
    end if;
    return v_rewritten;
end
$$;

-- As before, and nothing is known to be settled in a lane that has yet to move: its plans' snapshots say nothing of rows
-- that were written here since, so no slot that holds rows of it may be cleared.
create or replace function oncebox.outbox_settled(
    out lane smallint, out n bigint, out seq bigint, out newest_n bigint, out snapshot pg_snapshot
) returns setof record
language sql stable
begin atomic
    select
        l.lane, s.n, s.seq, p.n,
        (select e.s1 from oncebox.outbox_plan as e
        where e.lane = l.lane and e.n = least(s.n, p.n) and p.source = f.source)
    from oncebox.outbox_lease as l
    cross join (select oncebox.outbox_source_in_force() as source) as f
    left join lateral (
        select q.n, q.source, q.settled_n, q.settled_seq
        from oncebox.outbox_plan as q where q.lane = l.lane order by q.n desc limit 1
    ) as p on true
    left join lateral (
        select v.n, v.seq
        from (values (p.settled_n, p.settled_seq), (l.settled_n, l.settled_seq)) as v (n, seq)
        order by v.n desc nulls last, v.seq desc limit 1
    ) as s on true
    order by l.lane;
end;

revoke all on function
    oncebox.outbox_identity(), oncebox.outbox_source_in_force(), oncebox.outbox_adopt_source(uuid, text),
    oncebox.outbox_renew_source(text), oncebox.outbox_rebase(smallint, bigint, bigint, text[], bigint[])
from public;
grant execute on function
    oncebox.outbox_identity(), oncebox.outbox_source_in_force(), oncebox.outbox_adopt_source(uuid, text),
    oncebox.outbox_rebase(smallint, bigint, bigint, text[], bigint[])
to oncebox_relay;
grant execute on function
    oncebox.outbox_identity(), oncebox.outbox_source_in_force(), oncebox.outbox_renew_source(text)
to oncebox_admin;
grant select on oncebox.outbox_source_end to oncebox_relay, oncebox_admin;
