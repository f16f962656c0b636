-- What a consumer does with a delivery, decided in one call inside the handler's transaction.

-- 'new': first time, do the work. 'done': applied already. 'held': waits or is parked already. 'behind_key': an earlier
-- message of its key waits; the caller holds this one too. The table decides, not a process's memory.
create function oncebox.inbox_receive(
    consumer text,
    message_id uuid,
    source uuid,
    stream text,
    "offset" bigint,
    key text
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_consumer constant text := inbox_receive.consumer;
    v_id constant uuid := inbox_receive.message_id;
    v_source constant uuid := inbox_receive.source;
    v_stream constant text := inbox_receive.stream;
    v_offset constant bigint := inbox_receive."offset";
    v_key constant text := inbox_receive.key;
    v_held record;
begin
    select h.source, h.stream, h."offset" into v_held
    from oncebox.inbox_held as h
    where h.consumer = v_consumer and h.message_id = v_id;
    if found then
        -- The same message under another place: nobody will see this place again, so it is settled here.
        if v_offset is not null
            and (v_held.source, v_held.stream, v_held."offset") is distinct from (v_source, v_stream, v_offset) then
            insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
            values (v_consumer, v_source, v_stream, v_offset, v_id, clock_timestamp())
            on conflict do nothing;
        end if;
        return 'held';
    elsif v_key is not null and exists (
        select from oncebox.inbox_held as h
        where h.consumer = v_consumer and h.key = v_key and h.state = 'waiting'
    ) then
        return 'behind_key';
    elsif oncebox.accept(v_consumer, v_id, v_source, v_stream, v_offset) then
        return 'new';
    end if;
    return 'done';
end
$$;
comment on function oncebox.inbox_receive is
    'Accepts a delivery unless it is held, or an earlier message of its key (null: no order) is.';

-- inbox_receive of many, in this order; an answer each. Recent ids of which nothing is known are inserted by one
-- statement; if any is special in any way, all go one by one.
create function oncebox.inbox_receive_all(
    consumer text,
    message_ids uuid[],
    sources uuid[],
    streams text[],
    offsets bigint[],
    keys text[]
) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    c_hour_ms constant bigint := 3600000;
    c_day_ms constant bigint := 86400000;
    v_consumer constant text := inbox_receive_all.consumer;
    v_now_ms constant bigint := extract(epoch from clock_timestamp()) * 1000;
    v_forgotten_ms bigint;
    v_special boolean;
    v_answers text[];
begin
    select extract(epoch from clock_timestamp() - s.dedup_window) * 1000 into strict v_forgotten_ms
    from oncebox.setting as s where s.only_row;
    select greatest(v_forgotten_ms, extract(epoch from nullif(h.folded_until, '-infinity')) * 1000)
    into strict v_forgotten_ms
    from oncebox.inbox_horizon as h where h.only_row;
    v_special := current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
        or v_consumer is null or octet_length(v_consumer) not between 1 and 255
        or exists (
            select from unnest(message_ids, sources, streams, offsets) as r (id, source, stream, "offset")
            -- Between those whose rows may be forgotten and those that may go to the plain leaf, with room to spare.
            where coalesce(
                oncebox.uuid_v7_ms(r.id) not between v_forgotten_ms + c_hour_ms and v_now_ms + c_day_ms - 2 * c_hour_ms
                    or num_nulls(r.source, r.stream, r."offset") not in (0, 3)
                    or r."offset" < 1 or octet_length(r.stream) > 1024,
                r.id is null or oncebox.uuid_v7_ms(r.id) is null))
        or (select count(distinct r.id) < count(*) from unnest(message_ids) as r (id))
        or exists (
            select from oncebox.inbox_held as h where h.consumer = v_consumer and h.message_id = any (message_ids))
        or exists (
            select from oncebox.inbox_held as h
            where h.consumer = v_consumer and h.state = 'waiting' and h.key = any (keys))
        or exists (
            select from oncebox.inbox_16 as i
            where i.leaf = 16 and i.consumer = v_consumer and i.message_id = any (message_ids));
    if v_special then
        for v_n in 1..cardinality(message_ids) loop
            v_answers[v_n] := oncebox.inbox_receive(
                v_consumer, message_ids[v_n], sources[v_n], streams[v_n], offsets[v_n], keys[v_n]);
        end loop;
        return v_answers;
    end if;

    with inserted as (
        insert into oncebox.inbox (leaf, consumer, message_id, source, stream, "offset", accepted_at)
        select oncebox.inbox_day_leaf(r.id), v_consumer, r.id, r.source, r.stream, r."offset", clock_timestamp()
        from unnest(message_ids, sources, streams, offsets) with ordinality as r (id, source, stream, "offset", n)
        order by r.n
        on conflict do nothing
        returning message_id
    )
    select array_agg(case when i.message_id is not null then 'new' end order by r.n) into v_answers
    from unnest(message_ids) with ordinality as r (id, n)
    left join inserted as i on i.message_id = r.id;
    -- Those that were there already: accept knows whether their place is another one.
    for v_n in 1..cardinality(message_ids) loop
        if v_answers[v_n] is null then
            v_answers[v_n] := case
                when oncebox.accept(v_consumer, message_ids[v_n], sources[v_n], streams[v_n], offsets[v_n]) then 'new'
                else 'done' end;
        end if;
    end loop;
    return v_answers;
end
$$;
comment on function oncebox.inbox_receive_all is 'inbox_receive of many, in this order; an answer each.';

revoke all on function
    oncebox.inbox_receive(text, uuid, uuid, text, bigint, text),
    oncebox.inbox_receive_all(text, uuid[], uuid[], text[], bigint[], text[])
from public;
grant execute on function
    oncebox.inbox_receive(text, uuid, uuid, text, bigint, text),
    oncebox.inbox_receive_all(text, uuid[], uuid[], text[], bigint[], text[])
to oncebox_consumer, oncebox_admin;

comment on column oncebox.inbox_held.reason is 'waiting: failed, behind_key, redelivered, started or started_alone (a run has '
    'begun and its end was not recorded yet); parked: too_many_attempts, rejected or no_message_id';
comment on column oncebox.inbox_held.attempts is 'runs that have begun';
