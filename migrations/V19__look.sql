-- A relay's look at its lane in one round trip: what was committed since its newest plan, the next plan if there is
-- something, and the first rows of its window.

-- Transactions that were open at a snapshot: those it lists, and those from its xmax to the transaction that recorded
-- it. The second kind are every xid in between, or, where those are many, the ones in the lane's index.
create or replace function oncebox.outbox_open_then(lane smallint, snapshot pg_snapshot, recorded_by xid8)
returns setof xid8
language plpgsql stable rows 10 as $$
declare
    -- Each xid costs its caller a probe in every leaf. xmax moves only when a transaction ends, so savepoints, or the
    -- wait for the lease, can put millions between: the walk costs a probe only for those that wrote to the lane.
    c_few constant bigint := 1000;
    v_xmax constant bigint := pg_snapshot_xmax(snapshot)::text::bigint;
    v_last constant bigint := recorded_by::text::bigint;
begin
    return query select pg_snapshot_xip(snapshot);
    if v_last - v_xmax <= c_few then
        return query select x::text::xid8 from generate_series(v_xmax, v_last) as x;
        return;
    end if;
    -- From one transaction that is still open to the next: their rows, which nobody sees, can be many.
    return query
        with recursive gap (above, below) as (
            select lag(e.xid, 1, (v_xmax - 1)::text::xid8) over (order by e.xid), e.xid
            from (
                select r.xid from pg_snapshot_xip(pg_current_snapshot()) as r (xid)
                where r.xid >= pg_snapshot_xmax(snapshot) and r.xid <= recorded_by
                union all
                select (v_last + 1)::text::xid8
            ) as e (xid)
        ), beyond (xid, below) as (
            select f.xid, g.below
            from gap as g cross join lateral (
                select o.xid from oncebox.outbox as o
                where o.lane = outbox_open_then.lane and o.xid > g.above and o.xid < g.below
                order by o.xid limit 1) as f
            union all
            select f.xid, b.below
            from beyond as b cross join lateral (
                select o.xid from oncebox.outbox as o
                where o.lane = outbox_open_then.lane and o.xid > b.xid and o.xid < b.below
                order by o.xid limit 1) as f
        )
        select b.xid from beyond as b;
end
$$;
grant execute on function oncebox.outbox_open_then(smallint, pg_snapshot, xid8) to oncebox_relay, oncebox_admin;

-- Each statement takes its own snapshot, so that the sequence is read before the plan's snapshot is taken, and that
-- before its xid exists. The lease is locked until the statement that calls this has committed: what is returned must
-- fit into the sockets' buffers, or a caller that is frozen would keep the lock. Returns the rows in order, then one
-- with q in it; nothing of it may be used before the commit is known to be durable.
create function oncebox.outbox_look(
    of_lane smallint,
    held_epoch bigint,
    newest_n bigint,
    newest_s text,
    newest_p text,
    newest_q bigint,
    ended_calm boolean,
    forced boolean,
    settled_n bigint,
    settled_seq bigint,
    keyframe boolean,
    streams text[],
    bases bigint[],
    max_rows bigint,
    max_bytes bigint
) returns table (
    seq bigint,
    message_id uuid,
    topic text,
    key text,
    content_type text,
    headers text,
    body bytea,
    published_at timestamptz,
    expires_in_s float8,
    q bigint,
    opened boolean,
    s2 text,
    p2 text,
    q_top bigint,
    planned_at_us bigint,
    complete boolean
)
language plpgsql volatile as $$
#variable_conflict use_variable
declare
    v_s1 constant pg_snapshot := newest_s;
    v_p1 constant xid8 := newest_p;
    v_q bigint;
    v_s2 pg_snapshot;
    v_p2 xid8;
    v_q_top bigint;
    v_planned_at timestamptz;
    v_open xid8[];
    v_rows bigint := 0;
    v_bytes bigint := 0;
    v_complete boolean := true;
    v_row record;
begin
    if pg_current_xact_id_if_assigned() is not null then
        raise exception using errcode = '25001', message = 'outbox_look: must be the first write of its transaction';
    end if;
    -- An unused sequence says last_value 1 before it gives out 1.
    select case when s.is_called then s.last_value else s.last_value - 1 end into v_q from oncebox.outbox_seq as s;
    if not forced and not exists (
        select from oncebox.outbox as o
        where o.lane = of_lane and o.seq > newest_q and not pg_visible_in_snapshot(o.xid, v_s1)
        order by o.seq limit 1)
    then
        if not ended_calm then
            -- Which of those that were open have ended: most often none.
            select array_agg(t.xid) into v_open
            from oncebox.outbox_open_then(of_lane, v_s1, v_p1) as t (xid)
            where pg_visible_in_snapshot(t.xid, pg_current_snapshot());
        end if;
        if v_open is null or not exists (
            select from unnest(v_open) as t (xid) cross join lateral (
                select from oncebox.outbox as o
                where o.lane = of_lane and o.xid = t.xid and o.seq <= newest_q
                order by o.seq limit 1) as o)
        then
            q := v_q;
            return next;
            return;
        end if;
    end if;

    -- The lease row is locked, so that a take-over waits for this commit or makes it insert nothing.
    with lease as (
        select l.lane from oncebox.outbox_lease as l where l.lane = of_lane and l.epoch = held_epoch for update
    )
    insert into oncebox.outbox_plan as made (
        lane, n, source, s1, p1, q1, s2, p2, q2, q_top, settled_n, settled_seq, keyframe, streams, bases, planned_at)
    select
        p.lane, p.n + 1, p.source, p.s2, p.p2, p.q2, pg_current_snapshot(), pg_current_xact_id(), v_q,
        (select s.last_value from oncebox.outbox_seq as s), settled_n, settled_seq, keyframe, streams, bases,
        clock_timestamp()
    from lease join oncebox.outbox_plan as p on p.lane = lease.lane
    where p.n = newest_n and p.source = oncebox.outbox_source_in_force()
    returning made.s2, made.p2, made.q_top, made.planned_at into v_s2, v_p2, v_q_top, v_planned_at;
    if not found then
        q := v_q;
        opened := false;
        return next;
        return;
    end if;

    v_open := null;
    if not ended_calm then
        select array_agg(t.xid) into v_open
        from oncebox.outbox_open_then(of_lane, v_s1, v_p1) as t (xid)
        where pg_visible_in_snapshot(t.xid, v_s2);
    end if;
    for v_row in
        (select o.seq, o.message_id, o.topic, o.key, o.content_type,
            case when o.headers = '{}' then null else o.headers::text end as headers, o.body, o.published_at,
            date_part('epoch', o.expires_at - statement_timestamp()) as expires_in_s
        from oncebox.outbox as o
        where o.lane = of_lane and o.seq > newest_q and o.seq <= v_q_top
            and pg_visible_in_snapshot(o.xid, v_s2) and not pg_visible_in_snapshot(o.xid, v_s1)
        order by o.seq limit max_rows)
        union all
        (select o.* from unnest(v_open) as t (xid) cross join lateral (
            select o.seq, o.message_id, o.topic, o.key, o.content_type,
                case when o.headers = '{}' then null else o.headers::text end, o.body, o.published_at,
                date_part('epoch', o.expires_at - statement_timestamp())
            from oncebox.outbox as o
            where o.lane = of_lane and o.xid = t.xid and o.seq <= newest_q
            order by o.seq limit max_rows) as o)
        order by 1 limit max_rows
    loop
        v_rows := v_rows + 1;
        -- 150: a row's other columns, and what the protocol adds.
        v_bytes := v_bytes + 150 + octet_length(v_row.topic) + coalesce(octet_length(v_row.key), 0)
            + octet_length(v_row.content_type) + coalesce(octet_length(v_row.headers), 0) + octet_length(v_row.body);
        if v_bytes > max_bytes then
            v_complete := false;
            exit;
        end if;
        seq := v_row.seq;
        message_id := v_row.message_id;
        topic := v_row.topic;
        key := v_row.key;
        content_type := v_row.content_type;
        headers := v_row.headers;
        body := v_row.body;
        published_at := v_row.published_at;
        expires_in_s := v_row.expires_in_s;
        return next;
    end loop;
    seq := null;
    body := null;
    q := v_q;
    opened := true;
    s2 := v_s2::text;
    p2 := v_p2::text;
    q_top := v_q_top;
    planned_at_us := (extract(epoch from v_planned_at) * 1000000)::bigint;
    complete := v_complete and v_rows < max_rows;
    return next;
end
$$;
comment on function oncebox.outbox_look is 'A relay''s look at its lane, and the next window if there is something. Relays only.';

revoke all on function oncebox.outbox_look(
    smallint, bigint, bigint, text, text, bigint, boolean, boolean, bigint, bigint, boolean, text[], bigint[], bigint, bigint)
from public;
grant execute on function oncebox.outbox_look(
    smallint, bigint, bigint, text, text, bigint, boolean, boolean, bigint, bigint, boolean, text[], bigint[], bigint, bigint)
to oncebox_relay;
