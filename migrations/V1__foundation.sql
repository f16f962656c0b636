-- Roles, settings and what outbox and inbox share. The schema itself is made by the migrator, before this file.

-- Roles belong to the cluster, not to the database: another database may have made them, perhaps at this moment.
do $$
declare
    role_name text;
begin
    foreach role_name in array array['oncebox_producer', 'oncebox_consumer', 'oncebox_relay', 'oncebox_admin'] loop
        if not exists (select from pg_roles where rolname = role_name) then
            begin
                execute format('create role %I nologin', role_name);
            exception when duplicate_object or unique_violation then
                null;
            end;
        end if;
    end loop;
end
$$;

grant usage on schema oncebox to oncebox_producer, oncebox_consumer, oncebox_relay, oncebox_admin;
-- Processes read which version of the schema they meet.
grant select on oncebox.schema_history to oncebox_consumer, oncebox_relay, oncebox_admin;

-- Settings that SQL needs as well as the processes: one row, typed and checked.
create table oncebox.setting (
    only_row boolean primary key default true check (only_row),
    payload_limit_bytes integer not null default 1048576
        check (payload_limit_bytes between 1 and 134217728),
    dedup_window interval not null default '7 days'
        check (dedup_window between interval '2 hours' and interval '14 days'),
    lanes smallint not null default 1 check (lanes between 1 and 64)
);
insert into oncebox.setting default values;

comment on table oncebox.setting is 'Settings of the SQL functions; one row. Change it with UPDATE as oncebox_admin.';
comment on column oncebox.setting.payload_limit_bytes is 'publish refuses larger payloads (SQLSTATE 22023)';
comment on column oncebox.setting.dedup_window is 'accept keeps one row a message for this long; at most 14 days, the day partitions wrap at 16';
comment on column oncebox.setting.lanes is 'parts of the log that relays can hold apart; changeable only before the first message';

-- A UUIDv7 of the given time: 48 bits of milliseconds, the rest random. Bits 52 and 53 turn version 4 into 7.
create function oncebox.uuid_v7(at timestamptz) returns uuid
language sql volatile parallel safe
return encode(
    set_bit(
        set_bit(
            overlay(
                uuid_send(gen_random_uuid())
                placing substring(int8send((extract(epoch from at) * 1000)::bigint) from 3)
                from 1 for 6),
            52, 1),
        53, 1),
    'hex')::uuid;

-- The milliseconds of a UUIDv7; null for any other uuid.
create function oncebox.uuid_v7_ms(id uuid) returns bigint
language sql immutable strict parallel safe
return case
    when substr(id::text, 15, 1) = '7' and substr(id::text, 20, 1) in ('8', '9', 'a', 'b')
    then ('x' || substr(id::text, 1, 8) || substr(id::text, 10, 4))::bit(48)::bigint
end;

grant select on oncebox.setting to oncebox_relay, oncebox_consumer, oncebox_admin;
grant update on oncebox.setting to oncebox_admin;
revoke all on function oncebox.uuid_v7(timestamptz), oncebox.uuid_v7_ms(uuid) from public;
