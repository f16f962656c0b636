-- Retention: the ring turns to an empty slot, and slots that are settled and old enough are truncated, with the part
-- of the journal that no row needs any more. Every step is a function of its own transaction, so that `oncebox relay`
-- and a cron job can call them, any number at a time; none of them makes a producer wait.

alter table oncebox.setting add column retention interval not null default '1 day'
    check (retention between interval '1 second' and interval '366 days');
comment on column oncebox.setting.retention is 'settled messages stay in the log at least this long, to be replayed';

alter table oncebox.outbox_ring add column turned_at timestamptz not null default clock_timestamp();
comment on column oncebox.outbox_ring.turned_at is 'since when new messages go to this slot';

create table oncebox.outbox_slot (
    slot smallint primary key check (slot between 0 and 7),
    closed_at timestamptz not null default '-infinity',
    cleared_at timestamptz
);
insert into oncebox.outbox_slot (slot) select s from generate_series(0, 7) as s;
comment on column oncebox.outbox_slot.closed_at is 'when the ring last turned from this slot to another';

-- Where the next trim of a lane's journal begins: looking for the lowest plan would walk over all that were deleted,
-- for as long as an old snapshot keeps them from being vacuumed.
create table oncebox.outbox_trim (
    lane smallint primary key,
    below_n bigint not null default 0
);
comment on column oncebox.outbox_trim.below_n is 'no plan with a lower number is there any more';

-- Rows of a leaf are truncated or stay: vacuuming them because they are many would be for nothing.
do $$
begin
    for slot in 0..7 loop
        execute format('alter table oncebox.outbox_%s set (autovacuum_vacuum_insert_threshold = -1)', slot);
    end loop;
end
$$;
-- A few thousand plans of any number are worth a vacuum: their pages are used again at once.
alter table oncebox.outbox_plan set (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_threshold = -1,
    autovacuum_analyze_scale_factor = 0.1, autovacuum_analyze_threshold = 10000,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000);

-- How far each lane is settled: everything visible in the snapshot is confirmed, held or parked, and its offsets are
-- recorded. The window of the settled place lies beyond it, also when it is settled to its end: a relay that takes
-- over counts its rows. No snapshot: unknown.
create function oncebox.outbox_settled(
    out lane smallint, out n bigint, out seq bigint, out newest_n bigint, out snapshot pg_snapshot
) returns setof record
language sql stable
begin atomic
    select
        l.lane, s.n, s.seq, p.n,
        (select e.s1 from oncebox.outbox_plan as e where e.lane = l.lane and e.n = least(s.n, p.n))
    from oncebox.outbox_lease as l
    left join lateral (
        select q.n, q.settled_n, q.settled_seq
        from oncebox.outbox_plan as q where q.lane = l.lane order by q.n desc limit 1
    ) as p on true
    left join lateral (
        select v.n, v.seq
        from (values (p.settled_n, p.settled_seq), (l.settled_n, l.settled_seq)) as v (n, seq)
        order by v.n desc nulls last, v.seq desc limit 1
    ) as s on true
    order by l.lane;
end;

-- What keeps a slot from being cleared: `current`, `young` (it was closed, or a row was published, within the
-- retention), `unsettled`, or nothing: `clearable`, or `empty` already. A few index probes, whatever it holds.
create function oncebox.outbox_slot_state(slot smallint) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    v_slot constant smallint := outbox_slot_state.slot;
    v_leaf constant text := 'oncebox.outbox_' || v_slot;
    v_young_since timestamptz;
    v_closed_at timestamptz;
    v_young boolean;
    v_unsettled boolean;
begin
    select clock_timestamp() - g.retention, s.closed_at into v_young_since, v_closed_at
    from oncebox.outbox_slot as s, oncebox.setting as g
    where s.slot = v_slot;
    if not found then
        raise exception using errcode = '22023', message = format('slot: must be 0 to 7, got %s', coalesce(v_slot::text, 'null'));
    end if;
    if exists (select from oncebox.outbox_ring as r where r.slot = v_slot) then
        return 'current';
    -- Rows of open and of rolled-back transactions count: a slot is empty when nothing was written since its truncation.
    elsif pg_relation_size(v_leaf::regclass) = 0 then
        return 'empty';
    elsif v_closed_at > v_young_since then
        return 'young';
    end if;
    -- Not visible in a snapshot: begun after it, or listed as open. Probing for these two looks at no other row.
    execute format(
        'select
            exists (
                select from oncebox.outbox_settled() as s
                where s.snapshot is null
                    or exists (
                        select from %1$s as o where o.lane = s.lane and o.xid >= pg_snapshot_xmax(s.snapshot))
                    or exists (
                        select from pg_snapshot_xip(s.snapshot) as open (xid)
                        join %1$s as o on o.lane = s.lane and o.xid = open.xid))
            or exists (
                select from %1$s as o where o.lane > (select max(l.lane) from oncebox.outbox_lease as l)),
            exists (
                select from oncebox.outbox_lease as l
                cross join lateral (
                    select o.published_at from %1$s as o where o.lane = l.lane order by o.seq desc limit 1) as newest
                where newest.published_at > $1)',
        v_leaf)
    into v_unsettled, v_young using v_young_since;
    return case when v_unsettled then 'unsettled' when v_young then 'young' else 'clearable' end;
end
$$;
comment on function oncebox.outbox_slot_state is
    'Why a slot of the log is not cleared: current, empty, young, unsettled; or clearable.';

-- Turns the ring if its slot has taken messages for a sixth of the retention: of eight slots one is then needed again
-- a retention and a sixth after it was closed. Slots that cannot be cleared yet are passed over.
create function oncebox.outbox_turn(out outcome text, out slot smallint, out since timestamptz)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_now constant timestamptz := clock_timestamp();
    v_next smallint;
begin
    -- Producers read this row and never lock it.
    select 'young', r.slot, r.turned_at into outcome, slot, since
    from oncebox.outbox_ring as r for update skip locked;
    if not found then
        select 'busy', r.slot, r.turned_at into outcome, slot, since from oncebox.outbox_ring as r;
        return;
    elsif since > v_now - (select s.retention / 6 from oncebox.setting as s) then
        return;
    elsif pg_relation_size(('oncebox.outbox_' || slot)::regclass) = 0 then
        outcome := 'empty';
        return;
    end if;
    select s.slot into v_next
    from oncebox.outbox_slot as s
    where s.slot <> outbox_turn.slot and pg_relation_size(('oncebox.outbox_' || s.slot)::regclass) = 0
    order by (s.slot - outbox_turn.slot + 8) % 8 limit 1
    for update skip locked;
    if not found then
        outcome := 'full';
        return;
    end if;
    update oncebox.outbox_slot as s set closed_at = v_now where s.slot = outbox_turn.slot;
    update oncebox.outbox_ring as r set slot = v_next, turned_at = v_now;
    select 'turned', v_next, v_now into outcome, slot, since;
end
$$;
comment on function oncebox.outbox_turn is
    'Lets new messages go to another slot when it is time: turned; young or empty: not yet; full: no slot is free, the
current one grows; busy: somebody else is at it. With the current slot, and since when.';

-- Clears a slot, or says why not: what outbox_slot_state says, `in_use` (an open or prepared transaction has written
-- to it), `locked` (somebody reads it, e.g. a dump), `busy` (somebody else is at it).
create function oncebox.outbox_clear(slot smallint) returns text
language plpgsql volatile security definer
-- Relays that read the log queue behind the waiting lock for so long at most.
set search_path = pg_catalog, pg_temp set lock_timeout = '100ms' as $$
declare
    v_slot constant smallint := outbox_clear.slot;
    v_state text;
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception using errcode = '25001',
            message = 'outbox_clear: an older snapshot does not show every row: call it in read committed';
    end if;
    v_state := oncebox.outbox_slot_state(v_slot);
    if v_state <> 'clearable' then
        return v_state;
    end if;
    perform from oncebox.outbox_slot as s where s.slot = v_slot for update skip locked;
    if not found then
        return 'busy';
    elsif exists (
        -- Writers end in their own time: no need to make anybody queue behind a lock that would not be granted.
        select from pg_locks as k
        where k.locktype = 'relation' and k.relation = ('oncebox.outbox_' || v_slot)::regclass
            and k.database = (select d.oid from pg_database as d where d.datname = current_database())
            and k.granted and k.mode = 'RowExclusiveLock'
    ) then
        return 'in_use';
    end if;
    begin
        execute format('lock table oncebox.outbox_%s in access exclusive mode', v_slot);
        -- An older snapshot may have written here a moment ago; from now on nobody can.
        v_state := oncebox.outbox_slot_state(v_slot);
        if v_state = 'clearable' then
            execute format('truncate table oncebox.outbox_%s', v_slot);
            update oncebox.outbox_slot as s set cleared_at = clock_timestamp() where s.slot = v_slot;
            -- The lock must not be kept while a standby is waited for: it gets this after all it rests on.
            if current_setting('synchronous_commit') <> 'off' then
                perform set_config('synchronous_commit', 'local', true);
            end if;
            v_state := 'cleared';
        end if;
    exception when lock_not_available then
        v_state := 'locked';
    end;
    return v_state;
end
$$;
comment on function oncebox.outbox_clear is
    'Clears a slot of the log if everything in it is settled and older than the retention; returns cleared, or why not.';

-- Deletes the oldest plans of a lane that no row in the log needs; returns how many. Whoever reads retained rows again
-- begins at a plan with all counters, a keyframe, at or before their first window: everything before that one may go.
create function oncebox.outbox_trim_journal(lane smallint, at_most integer default 5000) returns integer
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    v_lane constant smallint := outbox_trim_journal.lane;
    v_from bigint;
    v_settled_n bigint;
    v_oldest xid8;
    v_keep bigint;
    v_deleted integer;
begin
    if at_most is null or at_most not between 1 and 100000 then
        raise exception using errcode = '22023',
            message = format('at_most: must be 1 to 100000, got %s', coalesce(at_most::text, 'null'));
    end if;
    select s.n into v_settled_n from oncebox.outbox_settled() as s where s.lane = v_lane;
    if not found then
        raise exception using errcode = '22023', message = format('lane: there is no lane %s', coalesce(v_lane::text, 'null'));
    end if;
    insert into oncebox.outbox_trim (lane) values (v_lane) on conflict do nothing;
    select t.below_n into v_from from oncebox.outbox_trim as t where t.lane = v_lane for update skip locked;
    if not found then
        return 0;
    end if;
    select o.xid into v_oldest from oncebox.outbox as o where o.lane = v_lane order by o.xid limit 1;
    -- A row of a window before k is visible in the snapshot k begins with: its xid is below that one's xmax.
    select max(k.n) into v_keep
    from (
        select p.n, p.s1 from oncebox.outbox_plan as p
        where p.lane = v_lane and p.keyframe and p.n >= v_from and p.n <= v_settled_n
        order by p.n limit 100
    ) as k
    where v_oldest is null or pg_snapshot_xmax(k.s1) <= v_oldest;
    -- None where rows were rewritten when the lane moved to a new source: they lie before every snapshot.
    if v_keep is null or v_keep <= v_from then
        return 0;
    end if;
    v_keep := least(v_keep, v_from + at_most);
    delete from oncebox.outbox_plan as p where p.lane = v_lane and p.n >= v_from and p.n < v_keep;
    get diagnostics v_deleted = row_count;
    update oncebox.outbox_trim as t set below_n = v_keep where t.lane = v_lane;
    return v_deleted;
end
$$;
comment on function oncebox.outbox_trim_journal is
    'Deletes at most so many plans of a lane that no message in the log needs any more; returns how many.';

revoke all on function
    oncebox.outbox_settled(), oncebox.outbox_slot_state(smallint), oncebox.outbox_turn(),
    oncebox.outbox_clear(smallint), oncebox.outbox_trim_journal(smallint, integer)
from public;
grant execute on function
    oncebox.outbox_slot_state(smallint), oncebox.outbox_turn(),
    oncebox.outbox_clear(smallint), oncebox.outbox_trim_journal(smallint, integer)
to oncebox_relay, oncebox_admin;
grant select on oncebox.outbox_slot to oncebox_relay, oncebox_admin;
grant select on oncebox.outbox_trim to oncebox_admin;
