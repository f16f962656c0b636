-- Where each consumer begins in each stream: what the audit may expect of it. Kept beside the outbox, whose offsets it
-- names; the consumer's own database may be another one.

create table oncebox.consumer_binding (
    consumer text not null,
    binding text not null,
    bound_at timestamptz not null default clock_timestamp(),
    primary key (consumer, binding)
);
create table oncebox.consumer_start (
    consumer text not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    primary key (consumer, source, stream)
);
comment on table oncebox.consumer_start is
    'the first offset a consumer is sure to get; streams that are not listed came up after its binding, and begin at 1';

-- The topic of a stream: what stands before its last #.
create function oncebox.stream_topic(stream text) returns text
language sql immutable strict parallel safe
return regexp_replace(stream, '#[0-9]+$', '');

-- Records what a consumer's queue is bound to. Call it once the bindings are made: offsets that are assigned already
-- may have been published before. Bindings recorded earlier stay; returns how many are new.
create function oncebox.consumer_register(consumer text, bindings text[]) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_consumer constant text := consumer_register.consumer;
    v_new text[];
begin
    if v_consumer is null or octet_length(v_consumer) not between 1 and 255 then
        raise exception using errcode = '22023', message = 'consumer: must be 1 to 255 bytes, got '
            || coalesce(octet_length(v_consumer)::text, 'null');
    elsif bindings is null or exists (
        select from unnest(bindings) as b (binding) where b.binding is null or octet_length(b.binding) not between 1 and 255
    ) then
        raise exception using errcode = '22023', message = 'bindings: must be topic patterns of 1 to 255 bytes';
    end if;
    -- Two processes of one consumer: the second one's later offsets must not be recorded.
    lock table oncebox.consumer_binding in share row exclusive mode;
    select array_agg(distinct b.binding) into v_new
    from unnest(bindings) as b (binding)
    where not exists (
        select from oncebox.consumer_binding as k where k.consumer = v_consumer and k.binding = b.binding);
    if v_new is null then
        return 0;
    end if;
    insert into oncebox.consumer_start (consumer, source, stream, "offset")
    select v_consumer, c.source, c.stream, c.next_offset
    from (
        select n.source, n.stream, n.next_offset from oncebox.outbox_counters() as n
        union all
        select e.source, e.stream, e.next_offset from oncebox.outbox_source_end as e
        where e.stream <> '#' || e.lane and e.stream <> '*#' || e.lane
    ) as c
    where c.next_offset > 1
        and exists (
            select from unnest(v_new) as b (binding)
            where oncebox.topic_matches(b.binding, oncebox.stream_topic(c.stream)))
        and not exists (
            select from oncebox.consumer_binding as k
            where k.consumer = v_consumer and oncebox.topic_matches(k.binding, oncebox.stream_topic(c.stream)))
    on conflict do nothing;
    insert into oncebox.consumer_binding (consumer, binding)
    select v_consumer, b.binding from unnest(v_new) as b (binding);
    return cardinality(v_new);
end
$$;
comment on function oncebox.consumer_register is
    'Tells the audit what a consumer''s queue is bound to, and from which offsets on it must apply everything.';

-- For a consumer that is no more: the audit expects nothing of it any longer.
create function oncebox.consumer_forget(consumer text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_deleted integer;
begin
    delete from oncebox.consumer_start as s where s.consumer = consumer_forget.consumer;
    delete from oncebox.consumer_binding as b where b.consumer = consumer_forget.consumer;
    get diagnostics v_deleted = row_count;
    return v_deleted > 0;
end
$$;
comment on function oncebox.consumer_forget is 'Ends what the audit expects of a consumer; false if it was not known.';

revoke all on function oncebox.stream_topic(text), oncebox.consumer_register(text, text[]), oncebox.consumer_forget(text)
from public;
grant execute on function oncebox.consumer_register(text, text[]) to oncebox_consumer, oncebox_admin;
grant execute on function oncebox.consumer_forget(text), oncebox.stream_topic(text) to oncebox_admin;
grant select on oncebox.consumer_binding, oncebox.consumer_start to oncebox_admin;
