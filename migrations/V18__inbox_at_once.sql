-- A delivery, or a batch of them, accepted and applied in one statement: the consumer calls these beside the handler.

-- As before, and not `strict`: that kept the planner from inlining it, and its text was read and planned anew in each
-- transaction.
create or replace function oncebox.inbox_day_leaf(id uuid) returns smallint
language sql immutable parallel safe
return (oncebox.uuid_v7_ms(id) / 86400000 % 16)::smallint;

-- As before, and one statement for a message that is neither held nor in any way special: in a transaction that accepts
-- one message, plpgsql prepares every expression anew and every statement opens and locks its tables anew. An id of the
-- last hour and of no folded day is older than no dedup window (2 hours at least), whatever the setting becomes
-- meanwhile, and younger than all that goes to the plain leaf, with room to spare. Whatever that statement does not
-- insert is looked at step by step.
create or replace function oncebox.inbox_receive(
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
    v_held record;
begin
    -- Two statements but for the last look: one that has both is planned anew for each message without a key, for that
    -- seems cheaper than the plan for all.
    if inbox_receive.key is null then
        insert into oncebox.inbox (leaf, consumer, message_id, source, stream, "offset", accepted_at)
        select t.ms / 86400000 % 16, inbox_receive.consumer, inbox_receive.message_id, inbox_receive.source,
            inbox_receive.stream, inbox_receive."offset", clock_timestamp()
        from (
            select oncebox.uuid_v7_ms(inbox_receive.message_id) as ms, date_part('epoch', clock_timestamp()) as now,
                date_part('epoch', (select h.folded_until from oncebox.inbox_horizon as h)) as folded
            offset 0
        ) as t
        where t.ms between greatest(t.now - 3600, t.folded + 3600) * 1000 and (t.now + 79200) * 1000
            and octet_length(inbox_receive.consumer) between 1 and 255
            and num_nulls(inbox_receive.source, inbox_receive.stream, inbox_receive."offset") in (0, 3)
            and coalesce(inbox_receive."offset" >= 1 and octet_length(inbox_receive.stream) <= 1024, true)
            and current_setting('transaction_isolation') = 'read committed'
            and not exists (
                select from oncebox.inbox_held as h
                where h.consumer = inbox_receive.consumer and h.message_id = inbox_receive.message_id)
            and not exists (
                select from oncebox.inbox_16 as i
                where i.leaf = 16 and i.consumer = inbox_receive.consumer and i.message_id = inbox_receive.message_id)
        on conflict do nothing;
    else
        insert into oncebox.inbox (leaf, consumer, message_id, source, stream, "offset", accepted_at)
        select t.ms / 86400000 % 16, inbox_receive.consumer, inbox_receive.message_id, inbox_receive.source,
            inbox_receive.stream, inbox_receive."offset", clock_timestamp()
        from (
            select oncebox.uuid_v7_ms(inbox_receive.message_id) as ms, date_part('epoch', clock_timestamp()) as now,
                date_part('epoch', (select h.folded_until from oncebox.inbox_horizon as h)) as folded
            offset 0
        ) as t
        where t.ms between greatest(t.now - 3600, t.folded + 3600) * 1000 and (t.now + 79200) * 1000
            and octet_length(inbox_receive.consumer) between 1 and 255
            and num_nulls(inbox_receive.source, inbox_receive.stream, inbox_receive."offset") in (0, 3)
            and coalesce(inbox_receive."offset" >= 1 and octet_length(inbox_receive.stream) <= 1024, true)
            and current_setting('transaction_isolation') = 'read committed'
            and not exists (
                select from oncebox.inbox_held as h
                where h.consumer = inbox_receive.consumer and h.message_id = inbox_receive.message_id)
            and not exists (
                select from oncebox.inbox_16 as i
                where i.leaf = 16 and i.consumer = inbox_receive.consumer and i.message_id = inbox_receive.message_id)
            and not exists (
                select from oncebox.inbox_held as h
                where h.consumer = inbox_receive.consumer and h.key = inbox_receive.key and h.state = 'waiting')
        on conflict do nothing;
    end if;
    if found then
        return 'new';
    end if;

    select h.source, h.stream, h."offset" into v_held
    from oncebox.inbox_held as h
    where h.consumer = inbox_receive.consumer and h.message_id = inbox_receive.message_id;
    if found then
        -- The same message under another place: nobody will see this place again, so it is settled here.
        if inbox_receive."offset" is not null and (v_held.source, v_held.stream, v_held."offset") is distinct from
            (inbox_receive.source, inbox_receive.stream, inbox_receive."offset")
        then
            insert into oncebox.inbox_alias (consumer, source, stream, "offset", message_id, seen_at)
            values (
                inbox_receive.consumer, inbox_receive.source, inbox_receive.stream, inbox_receive."offset",
                inbox_receive.message_id, clock_timestamp())
            on conflict do nothing;
        end if;
        return 'held';
    elsif inbox_receive.key is not null and exists (
        select from oncebox.inbox_held as h
        where h.consumer = inbox_receive.consumer and h.key = inbox_receive.key and h.state = 'waiting'
    ) then
        return 'behind_key';
    elsif oncebox.accept(
        inbox_receive.consumer, inbox_receive.message_id, inbox_receive.source, inbox_receive.stream,
        inbox_receive."offset")
    then
        return 'new';
    end if;
    return 'done';
end
$$;

-- As before, and a key that is once found held up in a batch stays so until its end: the message that waited may be
-- applied between two looks, and a later one of its key would run before an earlier one.
create or replace function oncebox.inbox_receive_all(
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
    v_behind text[] := '{}';
    v_inserted bigint;
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
            if keys[v_n] = any (v_behind) and not exists (
                select from oncebox.inbox_held as h
                where h.consumer = v_consumer and h.message_id = message_ids[v_n]
            ) then
                v_answers[v_n] := 'behind_key';
            else
                v_answers[v_n] := oncebox.inbox_receive(
                    v_consumer, message_ids[v_n], sources[v_n], streams[v_n], offsets[v_n], keys[v_n]);
                if v_answers[v_n] = 'behind_key' then
                    v_behind := v_behind || keys[v_n];
                end if;
            end if;
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
    select array_agg(i.message_id is not null order by r.n)::text[], count(i.message_id)
    into v_answers, v_inserted
    from unnest(message_ids) with ordinality as r (id, n)
    left join inserted as i on i.message_id = r.id;
    if v_inserted = cardinality(message_ids) then
        return array_fill('new'::text, array[cardinality(message_ids)]);
    end if;
    -- Those that were there already: accept knows whether their place is another one.
    for v_n in 1..cardinality(message_ids) loop
        v_answers[v_n] := case
            when v_answers[v_n] = 'true' then 'new'
            when oncebox.accept(v_consumer, message_ids[v_n], sources[v_n], streams[v_n], offsets[v_n]) then 'new'
            else 'done' end;
    end loop;
    return v_answers;
end
$$;

-- inbox_receive_all while no other batch of the consumer is in a transaction, over all its processes: two that touch the
-- same rows in different orders would end each other again and again. It says from when to when it
-- worked, without the wait for that.
create function oncebox.inbox_receive_batch(
    consumer text,
    message_ids uuid[],
    sources uuid[],
    streams text[],
    offsets bigint[],
    keys text[],
    out answers text[],
    out began timestamptz,
    out ended timestamptz
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('oncebox batch ' || inbox_receive_batch.consumer, 0));
    began := clock_timestamp();
    answers := oncebox.inbox_receive_all(
        inbox_receive_batch.consumer, inbox_receive_batch.message_ids, inbox_receive_batch.sources,
        inbox_receive_batch.streams, inbox_receive_batch.offsets, inbox_receive_batch.keys);
    ended := clock_timestamp();
end
$$;
comment on function oncebox.inbox_receive_batch is
    'inbox_receive_all, one batch of a consumer at a time; and from when to when it worked.';

revoke all on function oncebox.inbox_receive_batch(text, uuid[], uuid[], text[], bigint[], text[]) from public;
grant execute on function oncebox.inbox_receive_batch(text, uuid[], uuid[], text[], bigint[], text[])
to oncebox_consumer, oncebox_admin;

-- Calls a handler that is written in SQL. The planner may put such a function's text in the place of its call, and what it
-- reads would then be as old as the statement around it, from before the message ahead of it: a statement of its own is not.
create function oncebox.inbox_call(handler text, message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql volatile as $$
begin
    execute 'select ' || handler || '($1, $2, $3, $4)' using message_id, topic, payload, headers;
end
$$;
comment on function oncebox.inbox_call is 'Calls a handler by its quoted name, with a snapshot of its own and the caller''s rights.';

revoke all on function oncebox.inbox_call(text, uuid, text, jsonb, jsonb) from public;
grant execute on function oncebox.inbox_call(text, uuid, text, jsonb, jsonb) to oncebox_consumer, oncebox_admin;
