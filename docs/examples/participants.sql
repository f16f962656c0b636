-- Four participants of the example, for a database with oncebox's schema. Each could have a database of its own.

-- Whether a command is to be carried out: not if it is a copy, or its undo came first.
create function public.saga_is_to_run(headers jsonb) returns boolean
language sql as $$
    select oncebox.saga_barrier((headers ->> 'oncebox-saga')::uuid, headers ->> 'oncebox-step',
        headers ->> 'oncebox-op', (headers ->> 'oncebox-epoch')::int) = 'run'
$$;

create schema stock;
create table stock.item (sku text primary key, left_over int not null check (left_over >= 0));
insert into stock.item values ('A1', 10);

create function stock.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
begin
    if not public.saga_is_to_run(headers) then
        return;
    end if;
    begin  -- a savepoint, after the barrier: a failure rolls back to it and still replies
        update stock.item set left_over = left_over + case topic when 'stock.reserve' then -1 else 1 end
        where sku = payload ->> 'sku';
        if not found then
            raise check_violation;
        end if;
        perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('sku', payload ->> 'sku'));
    exception when check_violation then
        perform oncebox.saga_reply(headers, 'failed', error => 'sold out');
    end;
end $$;

create schema pay;
create table pay.account (balance numeric not null check (balance >= 0));
insert into pay.account values (100);

create function pay.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
begin
    if not public.saga_is_to_run(headers) then
        return;
    end if;
    begin
        update pay.account set balance = balance
            + case topic when 'pay.charge' then -1 else 1 end * (payload ->> 'amount')::numeric;
        perform oncebox.saga_reply(headers, 'succeeded', jsonb_build_object('receipt', message_id));
    exception when check_violation then
        perform oncebox.saga_reply(headers, 'failed', error => 'not enough money');
    end;
end $$;

create schema ship;
create table ship.parcel (order_key text primary key, address text);
create table ship.truck (is_broken boolean not null);
insert into ship.truck values (false);

create function ship.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
begin
    if not public.saga_is_to_run(headers) then
        return;
    end if;
    if (select is_broken from ship.truck) then
        perform oncebox.saga_reply(headers, 'failed', error => 'the truck is broken');
        return;
    end if;
    insert into ship.parcel values (payload ->> 'order', payload ->> 'address');
    perform oncebox.saga_reply(headers, 'succeeded');
end $$;

create schema mail;
create table mail.sent (recipient text, receipt uuid);

create function mail.on_command(message_id uuid, topic text, payload jsonb, headers jsonb) returns void
language plpgsql as $$
begin
    if not public.saga_is_to_run(headers) then
        return;
    end if;
    insert into mail.sent values (payload ->> 'to', (payload -> 'receipt' ->> 'receipt')::uuid);
    perform oncebox.saga_reply(headers, 'succeeded');
end $$;
