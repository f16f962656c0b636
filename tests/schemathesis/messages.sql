-- What the examples of the description name, so that they meet something: parked messages of both sides, a stream with
-- messages, and pauses.
select oncebox.publish('order.placed', jsonb_build_object('order', i), key => i::text) from generate_series(1, 20) as i;

insert into oncebox.outbox_held (
    lane, seq, plan_n, state, reason, last_error, attempts, source, stream, "offset", ordinal, message_id, topic, key,
    content_type, headers, body, published_at)
select 0, i, 0, 'parked', case when i % 3 = 0 then 'expired' else 'unroutable' end, '312 NO_ROUTE', 1, s.source,
    'order.placed#0', i, i, ('019b8d6e-2b00-7c3a-8f00-' || lpad(i::text, 12, '0'))::uuid, 'order.placed', i::text,
    case i % 3 when 0 then 'application/json' when 1 then 'text/plain' else 'application/octet-stream' end,
    '{"trace": "abc"}', case i % 3 when 2 then '\xff00'::bytea else '{"order": 42}' end, clock_timestamp()
from generate_series(1, 250) as i
cross join (select source from oncebox.outbox_source order by ordinal desc limit 1) as s;

insert into oncebox.inbox_held (
    consumer, message_id, state, reason, last_error, attempts, source, stream, "offset", key, topic, content_type,
    headers, body)
select c, ('019b8d6e-2b00-7c3a-8f00-' || lpad(i::text, 12, '0'))::uuid, 'parked', 'too_many_attempts',
    'no such customer', 5, s.source, 'order.placed#0', i, i::text, 'order.placed', 'application/json', '{}',
    '{"order": 42}'
from generate_series(1, 120) as i
cross join (values ('billing'), ('shipping')) as consumers (c)
cross join (select source from oncebox.outbox_source order by ordinal desc limit 1) as s;

select oncebox.accept('billing', gen_random_uuid(), s.source, 'order.placed#0', i)
from generate_series(1001, 1020) as i
cross join (select source from oncebox.outbox_source order by ordinal desc limit 1) as s;
select oncebox.inbox_fold();

select oncebox.pause(topic => t, why => 'the shop is moved', by => 'ops')
from (values ('order.#'), ('stock.*'), ('pay.charge')) as topics (t);
