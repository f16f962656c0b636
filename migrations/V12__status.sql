-- What `oncebox status` and `/metrics` ask for and no plain select answers cheaply.

-- Transactions of a lane's rows that were open at a snapshot: those it lists, and those between its xmax and the
-- transaction that recorded it. One index probe for each, as in the relay's own reads.
create function oncebox.outbox_open_then(lane smallint, snapshot pg_snapshot, recorded_by xid8) returns setof xid8
language sql stable
begin atomic
    with recursive beyond (xid) as (
        (select o.xid from oncebox.outbox as o
        where o.lane = outbox_open_then.lane and o.xid >= pg_snapshot_xmax(snapshot) and o.xid <= recorded_by
        order by o.xid limit 1)
        union all
        select (
            select o.xid from oncebox.outbox as o
            where o.lane = outbox_open_then.lane and o.xid > beyond.xid and o.xid <= recorded_by
            order by o.xid limit 1)
        from beyond where beyond.xid is not null
    )
    select pg_snapshot_xip(snapshot)
    union all
    select b.xid from beyond as b where b.xid is not null;
end;

-- Committed messages of a lane that are not settled, counted up to a bound, and when the oldest of those counted was
-- published. The rest of the settled place's window, then whatever came after it, each by the ranges of the indexes
-- that a relay would read.
create function oncebox.outbox_lag(
    lane smallint, at_most integer default 100000, out messages bigint, out oldest timestamptz
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    v_lane constant smallint := outbox_lag.lane;
    v_plan record;
    v_settled record;
begin
    select s.n, s.seq, s.newest_n into v_settled from oncebox.outbox_settled() as s where s.lane = v_lane;
    select p.s1, p.p1, p.q1, p.s2, p.p2, p.q2, p.q_top into v_plan
    from oncebox.outbox_plan as p
    where p.lane = v_lane and p.n = least(v_settled.n, v_settled.newest_n);
    if not found then
        return;
    end if;
    if v_settled.n > v_settled.newest_n then
        v_settled.seq := v_plan.q_top;
    end if;
    select count(*), min(u.published_at) into messages, oldest
    from (
        (select o.published_at from oncebox.outbox as o
        where o.lane = v_lane and o.seq > greatest(v_plan.q1, v_settled.seq) and o.seq <= v_plan.q_top
            and pg_visible_in_snapshot(o.xid, v_plan.s2) and not pg_visible_in_snapshot(o.xid, v_plan.s1)
        order by o.seq limit at_most)
        union all
        (select o.published_at
        from oncebox.outbox_open_then(v_lane, v_plan.s1, v_plan.p1) as t (xid)
        cross join lateral (
            select i.published_at from oncebox.outbox as i
            where i.lane = v_lane and i.xid = t.xid and i.seq > v_settled.seq and i.seq <= v_plan.q1
            order by i.seq limit at_most) as o
        where pg_visible_in_snapshot(t.xid, v_plan.s2)
        limit at_most)
        union all
        (select o.published_at from oncebox.outbox as o
        where o.lane = v_lane and o.seq > v_plan.q2 and not pg_visible_in_snapshot(o.xid, v_plan.s2)
        order by o.seq limit at_most)
        union all
        (select o.published_at
        from oncebox.outbox_open_then(v_lane, v_plan.s2, v_plan.p2) as t (xid)
        cross join lateral (
            select i.published_at from oncebox.outbox as i
            where i.lane = v_lane and i.xid = t.xid and i.seq <= v_plan.q2
            order by i.seq limit at_most) as o
        limit at_most)
    ) as u;
    messages := least(messages, at_most);
end
$$;
comment on function oncebox.outbox_lag is
    'Committed messages of a lane that are not settled, counted up to at_most, and when the oldest of them was published.';

-- Every consumer this database knows: one index probe for each of them in each leaf, not one for each message.
create function oncebox.inbox_consumers() returns setof text
language sql stable security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off as $$
    with recursive of_ledger (name) as (
        (select l.consumer from oncebox.inbox_ledger as l order by l.consumer limit 1)
        union all
        select (
            select l.consumer from oncebox.inbox_ledger as l where l.consumer > o.name order by l.consumer limit 1)
        from of_ledger as o where o.name is not null
    ), of_held (name) as (
        (select h.consumer from oncebox.inbox_held as h order by h.consumer limit 1)
        union all
        select (select h.consumer from oncebox.inbox_held as h where h.consumer > o.name order by h.consumer limit 1)
        from of_held as o where o.name is not null
    ), of_leaf (leaf, name) as (
        select g.leaf, (
            select i.consumer from oncebox.inbox as i where i.leaf = g.leaf order by i.consumer limit 1)
        from (select l::smallint as leaf from generate_series(0, 16) as l) as g
        union all
        select o.leaf, (
            select i.consumer from oncebox.inbox as i
            where i.leaf = o.leaf and i.consumer > o.name order by i.consumer limit 1)
        from of_leaf as o where o.name is not null
    )
    select a.name
    from (select name from of_ledger union select name from of_held union select name from of_leaf) as a
    where a.name is not null
    order by a.name
$$;
comment on function oncebox.inbox_consumers is 'Every consumer that has accepted or holds a message in this database.';

-- Who has been in a transaction for longest, in any database of the cluster: it keeps its own messages from being
-- published, slots it has written to from being cleared, and old row versions from being vacuumed. Shows what the
-- schema's owner may see: everything if that is a superuser or in pg_read_all_stats.
create function oncebox.oldest_transaction(
    out pid integer, out gid text, out database text, out role text, out application text, out state text,
    out xid bigint, out since timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select t.pid, t.gid, t.database, t.role, t.application, t.state, t.xid::text::bigint, t.since
    from (
        select a.pid, null as gid, a.datname::text as database, a.usename::text as role,
            a.application_name as application, a.state, coalesce(a.backend_xid, a.backend_xmin) as xid,
            a.xact_start as since
        from pg_stat_activity as a
        where a.pid <> pg_backend_pid() and a.backend_type is distinct from 'autovacuum worker'
            and (a.xact_start is not null or a.backend_xid is not null or a.backend_xmin is not null)
        union all
        select null, p.gid, p.database::text, p.owner::text, null, 'prepared', p.transaction, p.prepared
        from pg_prepared_xacts as p
    ) as t
    order by t.since nulls last, age(t.xid) desc nulls last
    limit 1
$$;
comment on function oncebox.oldest_transaction is 'Who in the cluster has been in a transaction for longest.';

revoke all on function
    oncebox.outbox_open_then(smallint, pg_snapshot, xid8), oncebox.outbox_lag(smallint, integer),
    oncebox.inbox_consumers(), oncebox.oldest_transaction()
from public;
grant execute on function
    oncebox.outbox_settled(), oncebox.outbox_lag(smallint, integer), oncebox.inbox_consumers(),
    oncebox.oldest_transaction()
to oncebox_admin;
