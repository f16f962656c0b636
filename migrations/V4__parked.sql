-- What operators do with parked messages: look, retry, discard. A discarded message stays here, whole, with who and why.

create table oncebox.outbox_discarded (
    lane smallint not null,
    seq bigint not null,
    plan_n bigint not null,
    reason text not null,
    last_error text,
    attempts integer not null,
    held_at timestamptz not null,
    changed_at timestamptz not null,
    source uuid not null,
    stream text not null,
    "offset" bigint not null,
    ordinal bigint not null,
    message_id uuid not null,
    topic text not null,
    key text,
    content_type text not null,
    headers jsonb not null,
    body bytea not null,
    published_at timestamptz not null,
    expires_at timestamptz,
    discarded_at timestamptz not null default clock_timestamp(),
    discarded_by text not null,
    why text not null,
    primary key (lane, seq)
);
-- Serves a take-over: which rows beyond the settled place are not to be sent.
create index outbox_discarded_place on oncebox.outbox_discarded (lane, plan_n, seq);

comment on table oncebox.outbox_discarded is 'Messages an operator gave up; nothing sends them again.';

create table oncebox.inbox_discarded (
    n bigint primary key generated always as identity,
    consumer text not null,
    message_id uuid not null,
    reason text not null,
    last_error text,
    attempts integer not null,
    held_at timestamptz not null,
    changed_at timestamptz not null,
    source uuid,
    stream text,
    "offset" bigint,
    key text,
    topic text not null,
    content_type text,
    headers jsonb not null,
    body bytea not null,
    discarded_at timestamptz not null default clock_timestamp(),
    discarded_by text not null,
    why text not null
);
-- Serves the question what became of a message.
create index inbox_discarded_message on oncebox.inbox_discarded (consumer, message_id);

comment on table oncebox.inbox_discarded is
    'Deliveries an operator gave up; to the inbox they are done. One whose id the inbox could not keep may come twice.';

-- Serve the look for one message, and bulk work in the order of the log and of the inbox.
create index outbox_held_parked on oncebox.outbox_held (lane, seq) where state = 'parked';
create index outbox_held_parked_message on oncebox.outbox_held (message_id) where state = 'parked';
create index inbox_held_parked on oncebox.inbox_held (consumer, message_id) where state = 'parked';
create index inbox_held_parked_message on oncebox.inbox_held (message_id) where state = 'parked';

create view oncebox.parked (
    side, consumer, message_id, lane, seq, source, stream, "offset", topic, key, reason, last_error, attempts,
    first_at, last_at
) as
select
    'outbox', null::text, h.message_id, h.lane, h.seq, h.source, h.stream, h."offset", h.topic, h.key, h.reason,
    h.last_error, h.attempts, h.held_at, h.changed_at
from oncebox.outbox_held as h where h.state = 'parked'
union all
select
    'inbox', h.consumer, h.message_id, null, null, h.source, h.stream, h."offset", h.topic, h.key, h.reason,
    h.last_error, h.attempts, h.held_at, h.changed_at
from oncebox.inbox_held as h where h.state = 'parked';

comment on view oncebox.parked is 'Messages that wait for an operator: of the outbox by lane and seq, of the inbox by consumer and message_id.';
comment on column oncebox.parked.first_at is 'when it was first held';
comment on column oncebox.parked.last_at is 'when it was parked';

-- The relay looks at waiting messages every second. An operator who retries an expired message wants it sent although
-- its time has passed.
create function oncebox.outbox_retry(lane integer, seq bigint) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    update oncebox.outbox_held as h
    set state = 'waiting', next_at = clock_timestamp(), changed_at = clock_timestamp(),
        expires_at = case when h.reason <> 'expired' then h.expires_at end
    where h.lane = outbox_retry.lane and h.seq = outbox_retry.seq and h.state = 'parked';
    return found;
end
$$;
comment on function oncebox.outbox_retry is
    'Sends a parked message again under its own id and offset, also one that has expired; false if it is not parked.';

create function oncebox.inbox_retry(consumer text, message_id uuid) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    update oncebox.inbox_held as h
    set state = 'waiting', attempts = 0, next_at = clock_timestamp(), changed_at = clock_timestamp()
    where h.consumer = inbox_retry.consumer and h.message_id = inbox_retry.message_id and h.state = 'parked';
    return found;
end
$$;
comment on function oncebox.inbox_retry is
    'Hands a parked delivery to its handler again, with all its attempts anew; false if it is not parked.';

create function oncebox.parked_check_discard(why text, "by" text) returns void
language plpgsql immutable as $$
begin
    if coalesce(why !~ '\S', true) then
        raise exception using errcode = '22023', message = 'why: must not be empty';
    elsif coalesce("by" !~ '\S', true) then
        raise exception using errcode = '22023', message = 'by: must not be empty';
    end if;
end
$$;

create function oncebox.outbox_discard(
    lane integer,
    seq bigint,
    why text,
    "by" text default session_user
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform oncebox.parked_check_discard(why, "by");
    with gone as (
        delete from oncebox.outbox_held as h
        where h.lane = outbox_discard.lane and h.seq = outbox_discard.seq and h.state = 'parked'
        returning *
    )
    insert into oncebox.outbox_discarded (
        lane, seq, plan_n, reason, last_error, attempts, held_at, changed_at, source, stream, "offset", ordinal,
        message_id, topic, key, content_type, headers, body, published_at, expires_at, discarded_by, why)
    select
        g.lane, g.seq, g.plan_n, g.reason, g.last_error, g.attempts, g.held_at, g.changed_at, g.source, g.stream,
        g."offset", g.ordinal, g.message_id, g.topic, g.key, g.content_type, g.headers, g.body, g.published_at,
        g.expires_at, outbox_discard."by", outbox_discard.why
    from gone as g;
    return found;
end
$$;
comment on function oncebox.outbox_discard is
    'Gives a parked message up: nothing sends it any more. Recorded in outbox_discarded; false if it is not parked.';

create function oncebox.inbox_discard(
    consumer text,
    message_id uuid,
    why text,
    "by" text default session_user
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_source uuid;
    v_stream text;
    v_offset bigint;
begin
    perform oncebox.parked_check_discard(why, "by");
    with gone as (
        delete from oncebox.inbox_held as h
        where h.consumer = inbox_discard.consumer and h.message_id = inbox_discard.message_id and h.state = 'parked'
        returning *
    )
    insert into oncebox.inbox_discarded as d (
        consumer, message_id, reason, last_error, attempts, held_at, changed_at, source, stream, "offset", key, topic,
        content_type, headers, body, discarded_by, why)
    select
        g.consumer, g.message_id, g.reason, g.last_error, g.attempts, g.held_at, g.changed_at, g.source, g.stream,
        g."offset", g.key, g.topic, g.content_type, g.headers, g.body, inbox_discard."by", inbox_discard.why
    from gone as g
    returning d.source, d.stream, d."offset" into v_source, v_stream, v_offset;
    if not found then
        return false;
    end if;
    begin
        -- A later copy is done already.
        perform oncebox.accept(inbox_discard.consumer, inbox_discard.message_id, v_source, v_stream, v_offset);
    exception when sqlstate 'OB001' then
        -- Too old to be accepted, so a later copy is refused anyway.
        null;
    end;
    return true;
end
$$;
comment on function oncebox.inbox_discard is
    'Gives a parked delivery up: to the inbox it is done. Recorded in inbox_discarded; false if it is not parked.';

revoke all on function
    oncebox.outbox_retry(integer, bigint),
    oncebox.inbox_retry(text, uuid),
    oncebox.parked_check_discard(text, text),
    oncebox.outbox_discard(integer, bigint, text, text),
    oncebox.inbox_discard(text, uuid, text, text)
from public;
grant execute on function
    oncebox.outbox_retry(integer, bigint),
    oncebox.inbox_retry(text, uuid),
    oncebox.outbox_discard(integer, bigint, text, text),
    oncebox.inbox_discard(text, uuid, text, text)
to oncebox_admin;
grant select on oncebox.parked, oncebox.outbox_discarded, oncebox.inbox_discarded to oncebox_admin;
grant select on oncebox.outbox_discarded to oncebox_relay;
