-- Order by stream: each consumer's place in each stream, the offsets that will never come, and their announcement.

-- How far a consumer that applies streams in order has come: everything below next_offset is applied, parked, void,
-- or from before it was bound. Rewritten with each message, so its pages have room for that.
create table oncebox.inbox_stream (
    consumer text not null,
    source uuid not null,
    stream text not null,
    next_offset bigint not null check (next_offset >= 1),
    primary key (consumer, source, stream)
) with (fillfactor = 50);

-- Offsets at or beyond next_offset that are not waited for. They go when next_offset passes them.
create table oncebox.inbox_void (
    consumer text not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    reason text not null,
    seen_at timestamptz not null,
    primary key (consumer, source, stream, "offset")
);

-- Since when a consumer gets what a pattern matches. What a stream held before that is not waited for.
create table oncebox.inbox_binding (
    consumer text not null,
    source uuid not null,
    pattern text not null,
    begun_at timestamptz not null,
    primary key (consumer, source, pattern)
);

-- Serves the look for the delivery whose turn it is in a stream, however many wait behind it.
create index inbox_held_stream on oncebox.inbox_held (consumer, source, stream, "offset") where state = 'waiting';

comment on table oncebox.inbox_stream is
    'Consumers with order = "stream": deliveries beyond next_offset wait in inbox_held, reason gap or behind_stream';
comment on table oncebox.inbox_void is 'Offsets beyond inbox_stream.next_offset that will be passed without a message';

-- Offsets that an operator has given up, for the audit.
create table oncebox.inbox_given_up (
    consumer text not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    reason text not null,
    given_up_by text not null,
    given_up_at timestamptz not null default clock_timestamp(),
    primary key (consumer, source, stream, "offset")
);

-- Streams that wait for an offset nobody holds: what is missing, how much waits behind it, and since when.
create view oncebox.inbox_gap as
select s.consumer, s.source, s.stream, s.next_offset as missing_offset, w.waiting, w.since
from oncebox.inbox_stream as s
cross join lateral (
    select count(*) as waiting, min(h.held_at) as since
    from oncebox.inbox_held as h
    where h.consumer = s.consumer and h.source = s.source and h.stream = s.stream and h.state = 'waiting'
        and h."offset" > s.next_offset
) as w
where w.waiting > 0 and not exists (
    select from oncebox.inbox_held as h
    where h.consumer = s.consumer and h.source = s.source and h.stream = s.stream and h.state = 'waiting'
        and h."offset" = s.next_offset);

-- Locks a stream of a consumer until the transaction ends, and says which offset is next. One not seen before begins
-- at 1: those that were longer when the consumer was bound have got their row by then.
create function oncebox.inbox_lock_stream(consumer text, source uuid, stream text) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_next bigint;
begin
    loop
        select s.next_offset into v_next from oncebox.inbox_stream as s
        where s.consumer = inbox_lock_stream.consumer and s.source = inbox_lock_stream.source
            and s.stream = inbox_lock_stream.stream
        for update;
        if v_next is not null then
            return v_next;
        end if;
        insert into oncebox.inbox_stream (consumer, source, stream, next_offset)
        values (inbox_lock_stream.consumer, inbox_lock_stream.source, inbox_lock_stream.stream, 1)
        on conflict do nothing;
    end loop;
end
$$;

-- Moves a locked stream past the offset that was next, and past the voids that follow it.
create function oncebox.inbox_advance_stream(consumer text, source uuid, stream text, passed bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_next bigint := passed + 1;
begin
    loop
        delete from oncebox.inbox_void as v
        where v.consumer = inbox_advance_stream.consumer and v.source = inbox_advance_stream.source
            and v.stream = inbox_advance_stream.stream and v."offset" = v_next;
        exit when not found;
        v_next := v_next + 1;
    end loop;
    update oncebox.inbox_stream as s set next_offset = v_next
    where s.consumer = inbox_advance_stream.consumer and s.source = inbox_advance_stream.source
        and s.stream = inbox_advance_stream.stream;
end
$$;

-- Nobody is to wait for this offset: passes it if it is next, and remembers it if its turn has yet to come. Nothing
-- for consumers that do not apply the stream in order.
create function oncebox.inbox_pass_stream(consumer text, source uuid, stream text, "offset" bigint, reason text)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_next bigint;
begin
    select s.next_offset into v_next from oncebox.inbox_stream as s
    where s.consumer = inbox_pass_stream.consumer and s.source = inbox_pass_stream.source
        and s.stream = inbox_pass_stream.stream
    for update;
    if inbox_pass_stream."offset" = v_next then
        perform oncebox.inbox_advance_stream(
            inbox_pass_stream.consumer, inbox_pass_stream.source, inbox_pass_stream.stream, v_next);
    elsif inbox_pass_stream."offset" > v_next then
        insert into oncebox.inbox_void (consumer, source, stream, "offset", reason, seen_at)
        values (
            inbox_pass_stream.consumer, inbox_pass_stream.source, inbox_pass_stream.stream,
            inbox_pass_stream."offset", inbox_pass_stream.reason, clock_timestamp())
        on conflict do nothing;
    end if;
end
$$;

-- A void notice, or an operator's word that an offset will never come: passes it, unless its message is in hand.
create function oncebox.inbox_void_stream(consumer text, source uuid, stream text, "offset" bigint, reason text)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    -- What the relay announces is accounted for on its side; what an operator gives up is nowhere else.
    if inbox_void_stream.reason not in ('expired', 'refused', 'discarded') then
        insert into oncebox.inbox_given_up (consumer, source, stream, "offset", reason, given_up_by)
        values (
            inbox_void_stream.consumer, inbox_void_stream.source, inbox_void_stream.stream, inbox_void_stream."offset",
            inbox_void_stream.reason, session_user)
        on conflict do nothing;
    end if;
    perform oncebox.inbox_lock_stream(
        inbox_void_stream.consumer, inbox_void_stream.source, inbox_void_stream.stream);
    if not exists (
        select from oncebox.inbox_held as h
        where h.consumer = inbox_void_stream.consumer and h.source = inbox_void_stream.source
            and h.stream = inbox_void_stream.stream and h."offset" = inbox_void_stream."offset"
            and h.state = 'waiting'
    ) then
        perform oncebox.inbox_pass_stream(
            inbox_void_stream.consumer, inbox_void_stream.source, inbox_void_stream.stream,
            inbox_void_stream."offset", inbox_void_stream.reason);
    end if;
end
$$;
comment on function oncebox.inbox_void_stream is
    'Tells a consumer with order = "stream" that an offset will never come, so that the stream goes on past it.';

-- Accepts a delivery if it is the next of its stream, or late. In the handler's transaction, like accept:
-- new: do the work; done: applied already; held: in inbox_held already; gap, behind_stream: it came early, hold it.
create function oncebox.inbox_receive_stream(
    consumer text,
    message_id uuid,
    source uuid,
    stream text,
    "offset" bigint
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_consumer constant text := inbox_receive_stream.consumer;
    v_id constant uuid := inbox_receive_stream.message_id;
    v_source constant uuid := inbox_receive_stream.source;
    v_stream constant text := inbox_receive_stream.stream;
    v_offset constant bigint := inbox_receive_stream."offset";
    v_next bigint;
    v_held record;
    v_new boolean;
begin
    -- Copies of what is held or passed need no lock, and so no flush at the commit: next_offset only grows.
    select h.state, h.source, h.stream, h."offset" into v_held
    from oncebox.inbox_held as h where h.consumer = v_consumer and h.message_id = v_id;
    if found then
        if (v_held.source, v_held.stream, v_held."offset") is not distinct from (v_source, v_stream, v_offset) then
            return 'held';
        end if;
    elsif exists (
        select from oncebox.inbox_stream as s
        where s.consumer = v_consumer and s.source = v_source and s.stream = v_stream and s.next_offset > v_offset
    ) then
        return case when oncebox.accept(v_consumer, v_id, v_source, v_stream, v_offset) then 'new' else 'done' end;
    end if;

    v_next := oncebox.inbox_lock_stream(v_consumer, v_source, v_stream);
    select h.state, h.source, h.stream, h."offset" into v_held
    from oncebox.inbox_held as h where h.consumer = v_consumer and h.message_id = v_id;
    if found and (v_held.source, v_held.stream, v_held."offset") is not distinct from (v_source, v_stream, v_offset) then
        return 'held';
    elsif found and v_held.state = 'waiting' and (v_held.source, v_held.stream) = (v_source, v_stream)
        and v_held."offset" > v_offset then
        -- One message published twice, and the later place came first: the effect belongs to the earlier one. The
        -- trigger makes the later offset void.
        delete from oncebox.inbox_held as h where h.consumer = v_consumer and h.message_id = v_id;
        insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
        values (v_consumer, v_source, v_stream, v_held."offset", v_id, clock_timestamp())
        on conflict do nothing;
    elsif found then
        perform oncebox.inbox_pass_twin(v_consumer, v_id, v_source, v_stream, v_offset);
        return 'held';
    end if;

    if v_offset > v_next then
        if exists (
            select from oncebox.inbox as i
            where i.leaf = any (array[oncebox.inbox_day_leaf(v_id), 16]) and i.consumer = v_consumer
                and i.message_id = v_id
        ) or exists (
            select from oncebox.inbox_ledger as l
            where l.consumer = v_consumer and l.source = v_source and l.stream = v_stream and l.offsets @> v_offset
        ) then
            perform oncebox.inbox_pass_twin(v_consumer, v_id, v_source, v_stream, v_offset);
            return 'done';
        elsif exists (
            select from oncebox.inbox_held as h
            where h.consumer = v_consumer and h.source = v_source and h.stream = v_stream and h."offset" = v_next
                and h.state = 'waiting'
        ) then
            return 'behind_stream';
        else
            return 'gap';
        end if;
    end if;

    v_new := oncebox.accept(v_consumer, v_id, v_source, v_stream, v_offset);
    if v_offset = v_next then
        perform oncebox.inbox_advance_stream(v_consumer, v_source, v_stream, v_next);
    end if;
    return case when v_new then 'new' else 'done' end;
end
$$;

-- Locks the stream of a held delivery until the transaction ends, and says whether the delivery may run: it is next,
-- late, or of no stream that is kept in order.
create function oncebox.inbox_turn(consumer text, message_id uuid) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_held record;
begin
    select h.source, h.stream, h."offset" into v_held
    from oncebox.inbox_held as h where h.consumer = inbox_turn.consumer and h.message_id = inbox_turn.message_id;
    return coalesce(
        v_held."offset" is null or starts_with(v_held.stream, '*#')
            or v_held."offset" <= oncebox.inbox_lock_stream(inbox_turn.consumer, v_held.source, v_held.stream),
        true);
end
$$;

-- After a delivery was to be held: if it is not, because the same message is applied or held under another place,
-- nothing will ever run at this one.
create function oncebox.inbox_pass_twin(consumer text, message_id uuid, source uuid, stream text, "offset" bigint)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_consumer constant text := inbox_pass_twin.consumer;
    v_id constant uuid := inbox_pass_twin.message_id;
    v_source constant uuid := inbox_pass_twin.source;
    v_stream constant text := inbox_pass_twin.stream;
    v_offset constant bigint := inbox_pass_twin."offset";
begin
    if exists (
        select from oncebox.inbox_held as h
        where h.consumer = v_consumer and h.message_id = v_id
            and (h.source, h.stream, h."offset") is not distinct from (v_source, v_stream, v_offset)
    ) then
        return;
    end if;
    insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
    select v_consumer, v_source, v_stream, v_offset, v_id, clock_timestamp()
    where not exists (
        select from oncebox.inbox as i
        where i.leaf = any (array[oncebox.inbox_day_leaf(v_id), 16]) and i.consumer = v_consumer
            and i.message_id = v_id
            and (i.source, i.stream, i."offset") is not distinct from (v_source, v_stream, v_offset)
    ) and not exists (
        select from oncebox.inbox_ledger as l
        where l.consumer = v_consumer and l.source = v_source and l.stream = v_stream and l.offsets @> v_offset
    )
    on conflict do nothing;
    perform oncebox.inbox_pass_stream(v_consumer, v_source, v_stream, v_offset, 'duplicate');
end
$$;

-- Whoever parks, discards or applies a waiting delivery lets its stream go on by that, in the same transaction; one
-- that is set to waiting is waited for, if its turn has not passed.
create function oncebox.inbox_held_stream() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'DELETE' then
        perform oncebox.inbox_pass_stream(old.consumer, old.source, old.stream, old."offset", 'discarded');
    elsif new.state = 'parked' then
        perform oncebox.inbox_pass_stream(new.consumer, new.source, new.stream, new."offset", 'parked');
    else
        delete from oncebox.inbox_void as v
        where v.consumer = new.consumer and v.source = new.source and v.stream = new.stream
            and v."offset" = new."offset";
    end if;
    return null;
end
$$;
create trigger inbox_held_stream_insert after insert on oncebox.inbox_held
for each row when (new."offset" is not null) execute function oncebox.inbox_held_stream();
create trigger inbox_held_stream_update after update of state on oncebox.inbox_held
for each row when (new."offset" is not null and old.state <> new.state) execute function oncebox.inbox_held_stream();
create trigger inbox_held_stream_delete after delete on oncebox.inbox_held
for each row when (old."offset" is not null and old.state = 'waiting') execute function oncebox.inbox_held_stream();

-- Where a stream begins for a consumer, unless that is known.
create function oncebox.inbox_begin_stream(consumer text, source uuid, stream text, next_offset bigint) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into oncebox.inbox_stream (consumer, source, stream, next_offset)
    values (consumer, source, stream, next_offset)
    on conflict do nothing;
end;
comment on function oncebox.inbox_begin_stream is
    'The first offset a consumer with order = "stream" waits for; nothing if the stream has begun for it.';

-- Records that the patterns are bound, and where the streams they match begin; nothing if another process was first.
create function oncebox.inbox_begin(
    consumer text,
    source uuid,
    patterns text[],
    streams text[],
    next_offsets bigint[]
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    insert into oncebox.inbox_binding (consumer, source, pattern, begun_at)
    select inbox_begin.consumer, inbox_begin.source, p.pattern, clock_timestamp()
    from unnest(inbox_begin.patterns) as p (pattern)
    on conflict do nothing;
    if found then
        -- Another process may have got a message since the binding was made, and waits from 1 on.
        insert into oncebox.inbox_stream as k (consumer, source, stream, next_offset)
        select inbox_begin.consumer, inbox_begin.source, s.stream, s.next_offset
        from unnest(inbox_begin.streams, inbox_begin.next_offsets) as s (stream, next_offset)
        order by s.stream
        on conflict on constraint inbox_stream_pkey do update set next_offset = excluded.next_offset
        where k.next_offset = 1;
        delete from oncebox.inbox_void as v using oncebox.inbox_stream as k
        where v.consumer = inbox_begin.consumer and v.source = inbox_begin.source
            and (k.consumer, k.source, k.stream) = (v.consumer, v.source, v.stream)
            and v."offset" < k.next_offset;
    end if;
end
$$;

-- The offset the next message of each stream will get, as of the newest window of each lane: the counters recorded
-- since the last keyframe, the newest of each stream, and the rows of that window.
create function oncebox.outbox_counters() returns table (source uuid, lane smallint, stream text, next_offset bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with newest as (
        select p.lane, p.n, p.source, p.s1, p.s2
        from oncebox.outbox_lease as l
        cross join lateral (
            select p.lane, p.n, p.source, p.s1, p.s2 from oncebox.outbox_plan as p
            where p.lane = l.lane
            order by p.n desc limit 1
        ) as p
    ), keyframe as (
        select w.lane, (
            select max(p.n) from oncebox.outbox_plan as p where p.lane = w.lane and p.keyframe and p.source = w.source
        ) as n
        from newest as w
    ), recorded as (
        select distinct on (w.lane, c.stream) w.lane, c.stream, c.base
        from newest as w
        join keyframe as k on k.lane = w.lane
        join oncebox.outbox_plan as p on p.lane = w.lane and p.n between k.n and w.n and p.source = w.source
        cross join lateral unnest(p.streams, p.bases) as c (stream, base)
        order by w.lane, c.stream, p.n desc
    ), counted as (
        select w.lane, o.topic || '#' || w.lane as stream, count(*) as rows
        from newest as w
        join oncebox.outbox as o
            on o.lane = w.lane and o.xid >= pg_snapshot_xmin(w.s1) and pg_visible_in_snapshot(o.xid, w.s2)
                and not pg_visible_in_snapshot(o.xid, w.s1)
        group by w.lane, o.topic
    )
    -- Not the counter of the whole lane, nor what topics beyond a lane's limit share: nobody gets those in order.
    select w.source, w.lane, c.stream, c.base
    from newest as w
    join (
        select lane, stream, coalesce(r.base, 1) + coalesce(c.rows, 0) as base
        from recorded as r full join counted as c using (lane, stream)
    ) as c on c.lane = w.lane
    where c.stream <> '#' || w.lane and c.stream <> '*#' || w.lane
    order by w.lane, c.stream;
end;
comment on function oncebox.outbox_counters is 'The offset that the next message of each stream gets.';

-- Offsets whose messages never reached the broker, to be announced by the relay of the lane.
create table oncebox.outbox_void (
    lane smallint not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    message_id uuid not null,
    topic text not null,
    reason text not null,
    made_at timestamptz not null,
    primary key (lane, source, stream, "offset")
);

comment on table oncebox.outbox_void is 'Void notices not yet sent: expired, refused and discarded messages';

-- For tables with the columns source, stream, offset and message_id; the reason is its argument or column.
create function oncebox.outbox_note_void() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_reason text;
begin
    -- What many topics share is not applied in order.
    if new."offset" is null or starts_with(new.stream, '*#') then
        return null;
    end if;
    if tg_nargs > 0 then
        v_reason := tg_argv[0];
    else
        v_reason := new.reason;
    end if;
    insert into oncebox.outbox_void (lane, source, stream, "offset", message_id, topic, reason, made_at)
    values (
        substring(new.stream from '#([0-9]+)$')::smallint, new.source, new.stream, new."offset", new.message_id,
        regexp_replace(new.stream, '#[0-9]+$', ''), v_reason, clock_timestamp())
    on conflict do nothing;
    return null;
end
$$;

create function oncebox.outbox_unnote_void() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    delete from oncebox.outbox_void as v
    where v.lane = new.lane and v.source = new.source and v.stream = new.stream and v."offset" = new."offset";
    return null;
end
$$;

create trigger outbox_void_insert after insert on oncebox.outbox_held
for each row when (new.state = 'parked' and new.reason in ('expired', 'refused'))
execute function oncebox.outbox_note_void();
create trigger outbox_void_update after update of state, reason on oncebox.outbox_held
for each row when (new.state = 'parked' and new.reason in ('expired', 'refused')
    and (old.state, old.reason) is distinct from (new.state, new.reason))
execute function oncebox.outbox_note_void();
-- A discarded message may have been waiting, or parked for another reason.
do $$
begin
    if to_regclass('oncebox.outbox_discarded') is not null then
        create trigger outbox_void_discard after insert on oncebox.outbox_discarded
        for each row execute function oncebox.outbox_note_void('discarded');
    end if;
end
$$;
-- An operator's retry: the message itself is on its way.
create trigger outbox_void_retry after update of state on oncebox.outbox_held
for each row when (old.state = 'parked' and new.state = 'waiting')
execute function oncebox.outbox_unnote_void();

-- Announces an offset that a replay passes over for good, so that a stream waits for it no longer: discarded, parked as
-- expired or refused, or, if `is_expired`, sent in time and expired since.
create function oncebox.outbox_announce(source uuid, stream text, "offset" bigint, topic text, message_id uuid, is_expired boolean)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_lane constant smallint := substring(outbox_announce.stream from '#([0-9]+)$')::smallint;
    v_reason text;
begin
    select 'discarded' into v_reason
    from oncebox.outbox_discarded as d
    where d.lane = v_lane and d.source = outbox_announce.source and d.stream = outbox_announce.stream
        and d."offset" = outbox_announce."offset"
    limit 1;
    if v_reason is null then
        select case when h.state = 'parked' and h.reason in ('expired', 'refused') then h.reason else 'held' end
        into v_reason
        from oncebox.outbox_held as h
        where h.lane = v_lane and h.source = outbox_announce.source and h.stream = outbox_announce.stream
            and h."offset" = outbox_announce."offset"
        limit 1;
    end if;
    if v_reason is null and is_expired then
        v_reason := 'expired';
    end if;
    if v_reason <> 'held' then
        insert into oncebox.outbox_void (lane, source, stream, "offset", message_id, topic, reason, made_at)
        values (
            v_lane, outbox_announce.source, outbox_announce.stream, outbox_announce."offset",
            outbox_announce.message_id, outbox_announce.topic, v_reason, clock_timestamp())
        on conflict do nothing;
    end if;
end
$$;
revoke all on function oncebox.outbox_announce(uuid, text, bigint, text, uuid, boolean) from public;
grant execute on function oncebox.outbox_announce(uuid, text, bigint, text, uuid, boolean) to oncebox_admin;

revoke all on function
    oncebox.inbox_lock_stream(text, uuid, text),
    oncebox.inbox_advance_stream(text, uuid, text, bigint),
    oncebox.inbox_pass_stream(text, uuid, text, bigint, text),
    oncebox.inbox_void_stream(text, uuid, text, bigint, text),
    oncebox.inbox_receive_stream(text, uuid, uuid, text, bigint),
    oncebox.inbox_turn(text, uuid),
    oncebox.inbox_pass_twin(text, uuid, uuid, text, bigint),
    oncebox.inbox_held_stream(),
    oncebox.inbox_begin_stream(text, uuid, text, bigint),
    oncebox.inbox_begin(text, uuid, text[], text[], bigint[]),
    oncebox.outbox_counters(),
    oncebox.outbox_note_void(),
    oncebox.outbox_unnote_void()
from public;

grant select on oncebox.inbox_stream, oncebox.inbox_binding to oncebox_consumer, oncebox_admin;
grant select on oncebox.inbox_void, oncebox.inbox_gap, oncebox.inbox_given_up to oncebox_admin;
grant select on oncebox.outbox_source to oncebox_consumer;
grant select, delete on oncebox.outbox_void to oncebox_relay;
grant select on oncebox.outbox_void to oncebox_admin;
grant execute on function
    oncebox.inbox_void_stream(text, uuid, text, bigint, text),
    oncebox.inbox_begin_stream(text, uuid, text, bigint)
to oncebox_consumer, oncebox_admin;
grant execute on function
    oncebox.inbox_receive_stream(text, uuid, uuid, text, bigint),
    oncebox.inbox_turn(text, uuid),
    oncebox.inbox_pass_twin(text, uuid, uuid, text, bigint),
    oncebox.inbox_begin(text, uuid, text[], text[], bigint[])
to oncebox_consumer;
grant execute on function oncebox.outbox_counters() to oncebox_consumer, oncebox_admin;
