-- What the examples of the description name, so that they meet something: a definition, and sagas in several states.
insert into oncebox.saga_definition (name, version, document, created_by) values
    ('order', 1, '{"name": "order", "version": 1, "steps": [{"id": "charge", "do": {"topic": "pay.charge", "body": {}}}]}', 'deploy'),
    ('order', 3, '{"name": "order", "version": 3, "deadline": "10m", "steps": [
        {"id": "reserve", "do": {"topic": "stock.reserve", "body": {"sku": "$.input.sku"}},
            "undo": {"topic": "stock.release", "body": {"id": "$.steps.reserve.output.id"}}},
        {"id": "approve", "wait": {"signal": "approved", "timeout": "24h"}},
        {"id": "charge", "pivot": true, "do": {"topic": "pay.charge", "body": {"order": "$.business_key"}}}]}', 'deploy');

-- The saga of the examples, under their id: else as saga_start makes one.
insert into oncebox.saga (
    id, definition, version, definition_hash, business_key, status, input, labels, created_at, start_at, changed_at,
    next_due)
select '01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f10', d.name, d.version, d.hash, 'order-1', 'scheduled', '{"sku": "a-1"}',
    '{"customer": "17"}', n.at, n.at, n.at, n.at
from oncebox.saga_definition as d, (select oncebox.saga_now() as at) as n
where (d.name, d.version) = ('order', 3);
insert into oncebox.saga_step (saga_id, step, ordinal, pivot, changed_at)
select s.id, w.step, w.n - 1, w.step = 'charge', s.changed_at
from oncebox.saga as s, unnest(array['reserve', 'approve', 'charge']) with ordinality as w (step, n);
select oncebox.saga_record(
    s.id, 'created', jsonb_build_object('input', s.input, 'labels', s.labels,
        'start_at', oncebox.saga_ms(s.start_at), 'deadline', null), '{}', s.created_at)
from oncebox.saga as s;

select oncebox.saga_start('order', 'order-' || i, '{"sku": "a-1"}', labels => jsonb_build_object('customer', i::text))
from generate_series(2, 60) as i;
insert into oncebox.saga_purged (id, status, ended_at)
values ('01932c07-4ae1-7cc3-a3bf-0e7a1b5d3f11', 'completed', clock_timestamp());
