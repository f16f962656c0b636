-- Relays that share the lanes, operators' pauses, and the way back of unroutable messages.

-- One row a live relay, by the database's clock: the others share the lanes with it. Deleted at an orderly end;
-- rows not seen for long are removed by any relay.
create table oncebox.outbox_relay (
    owner uuid primary key,
    name text not null,
    ready boolean not null,
    started_at timestamptz not null,
    seen_at timestamptz not null
) with (fillfactor = 50);

comment on table oncebox.outbox_relay is 'Relays that run, or ended within the last minute without a word.';
comment on column oncebox.outbox_relay.owner is 'a UUIDv7 of its start: older relays sort first; also outbox_lease.owner';
comment on column oncebox.outbox_relay.ready is 'it reaches the broker: relays that do not get no share while others do';

-- What operators have stopped. A row without a pattern stops its lane, or everything; one with a pattern stops the
-- topics that match, in its lane or in all.
create table oncebox.outbox_pause (
    id bigint primary key generated always as identity,
    topic_pattern text,
    lane smallint,
    paused_at timestamptz not null default clock_timestamp(),
    paused_by text not null,
    why text
);
-- Pausing twice is one pause.
create unique index outbox_pause_what on oncebox.outbox_pause (coalesce(topic_pattern, ''), coalesce(lane, -1));

comment on table oncebox.outbox_pause is 'Pauses in force; made and lifted by oncebox.pause and oncebox.resume.';

-- As before, but what is known without a lock refuses at once: waiting for an open transaction of a publisher would hold
-- up all later ones. The sequence knows of every message there ever was; a plan may be of an idle relay.
create or replace function oncebox.setting_guard_lanes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    for v_look in 1..2 loop
        if exists (select from oncebox.outbox) or exists (select from oncebox.outbox_scheduled)
            or (select q.is_called from oncebox.outbox_seq as q) then
            raise exception using errcode = '55000',
                message = 'lanes: cannot be changed after the first message was published';
        end if;
        if v_look = 1 then
            -- Keeps publishers out between the second look and the commit.
            lock table oncebox.outbox in share mode;
        end if;
    end loop;
    if new.lanes < old.lanes then
        delete from oncebox.outbox_plan where lane >= new.lanes;
        delete from oncebox.outbox_lease where lane >= new.lanes;
    end if;
    perform oncebox.outbox_make_lanes(new.lanes);
    return new;
end
$$;

-- True when the broker's topic exchange would route the topic by the pattern: `*` stands for one word, `#` for any
-- number of words, none included. The pure twin is outbox::pause::topic_matches in Rust.
create function oncebox.topic_matches(pattern text, topic text) returns boolean
language plpgsql immutable strict parallel safe set search_path = pg_catalog, pg_temp as $$
declare
    v_pattern constant text[] := string_to_array(pattern, '.');
    v_topic constant text[] := string_to_array(topic, '.');
    v_patterns constant integer := cardinality(v_pattern);
    v_topics constant integer := cardinality(v_topic);
    v_p integer := 1;
    v_t integer := 1;
    -- The last # that was passed, and where in the topic what follows it was tried.
    v_hash integer;
    v_tried integer;
begin
    while v_t <= v_topics loop
        if v_p <= v_patterns and v_pattern[v_p] = '#' then
            v_hash := v_p;
            v_tried := v_t;
            v_p := v_p + 1;
        elsif v_p <= v_patterns and (v_pattern[v_p] = '*' or v_pattern[v_p] = v_topic[v_t]) then
            v_p := v_p + 1;
            v_t := v_t + 1;
        elsif v_hash is not null then
            v_tried := v_tried + 1;
            v_t := v_tried;
            v_p := v_hash + 1;
        else
            return false;
        end if;
    end loop;
    while v_p <= v_patterns and v_pattern[v_p] = '#' loop
        v_p := v_p + 1;
    end loop;
    return v_p > v_patterns;
end
$$;

-- A lane is an integer here, so that callers need no cast.
create function oncebox.pause(
    topic text default null,
    lane integer default null,
    why text default null,
    by text default session_user
) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_topic constant text := pause.topic;
    v_lane constant integer := pause.lane;
    v_lanes smallint;
    v_word text;
    v_id bigint;
begin
    if octet_length(v_topic) not between 1 and 255 then
        raise exception using errcode = '22023',
            message = format('topic: a pattern must be 1 to 255 bytes, got %s', octet_length(v_topic));
    end if;
    foreach v_word in array coalesce(string_to_array(v_topic, '.'), '{}') loop
        -- The broker takes such a word as it stands, which is hardly what its writer meant.
        if length(v_word) > 1 and v_word ~ '[*#]' then
            raise exception using errcode = '22023',
                message = format('topic: "%s" is no wildcard: * and # must be words of their own', v_word);
        end if;
    end loop;
    select s.lanes into strict v_lanes from oncebox.setting as s;
    if v_lane not between 0 and v_lanes - 1 then
        raise exception using errcode = '22023',
            message = format('lane: must be between 0 and %s, got %s', v_lanes - 1, v_lane);
    end if;
    insert into oncebox.outbox_pause (topic_pattern, lane, paused_by, why)
    values (v_topic, v_lane, coalesce(pause.by, session_user), pause.why)
    on conflict do nothing;
    select p.id into v_id from oncebox.outbox_pause as p
    where coalesce(p.topic_pattern, '') = coalesce(v_topic, '') and coalesce(p.lane, -1) = coalesce(v_lane, -1);
    return v_id;
end
$$;
comment on function oncebox.pause is
    'Stops sending: topics that match a pattern, a lane, or (without either) everything. Returns the id of the pause.';

create function oncebox.resume(topic text default null, lane integer default null) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_lifted integer;
begin
    delete from oncebox.outbox_pause as p
    where p.topic_pattern is not distinct from resume.topic and p.lane is not distinct from resume.lane;
    get diagnostics v_lifted = row_count;
    return v_lifted;
end
$$;
comment on function oncebox.resume is
    'Lifts the one pause that was made with the same arguments; returns how many that were. Others stay in force.';

create function oncebox.resume_all() returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_lifted integer;
begin
    delete from oncebox.outbox_pause;
    get diagnostics v_lifted = row_count;
    return v_lifted;
end
$$;
comment on function oncebox.resume_all is 'Lifts every pause; returns how many there were.';

-- Serves the probe of topics that no queue was bound for, and the release of their messages in order.
create index outbox_held_unroutable on oncebox.outbox_held (lane, topic, state, seq) where reason = 'unroutable';

comment on column oncebox.outbox_held.reason is 'nacked, behind_key, paused, unroutable, refused or expired';
comment on column oncebox.outbox_held.next_at is 'not sent before; infinity while its topic is paused';

revoke all on function
    oncebox.topic_matches(text, text),
    oncebox.pause(text, integer, text, text),
    oncebox.resume(text, integer),
    oncebox.resume_all()
from public;
grant execute on function
    oncebox.pause(text, integer, text, text), oncebox.resume(text, integer), oncebox.resume_all()
to oncebox_admin;
grant execute on function oncebox.topic_matches(text, text) to oncebox_relay, oncebox_admin;

grant select, insert, update, delete on oncebox.outbox_relay to oncebox_relay;
grant select on oncebox.outbox_pause to oncebox_relay;
grant select on oncebox.outbox_relay, oncebox.outbox_pause to oncebox_admin;
