-- Removal of sagas that ended long ago, and of what was kept for those who ask twice.

-- Barrier rows lie at the participant, which may have no sagas of its own: who keeps the inbox small calls this too.
-- Those of sagas that are here and under way stay.
create function oncebox.saga_barrier_clear(at_most integer) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set enable_seqscan = off as $$
declare
    v_barrier_retention interval;
    v_removed bigint;
begin
    select s.barrier_retention into strict v_barrier_retention from oncebox.setting as s where s.only_row;
    delete from oncebox.saga_barrier as b
    where b.ctid = any (array(
        select o.ctid from oncebox.saga_barrier as o
        where o.at < clock_timestamp() - v_barrier_retention
            -- As far as this database knows: an undo would take what was done for what never ran.
            and not exists (select from oncebox.saga as s where s.id = o.saga_id and s.ended_at is null)
        limit at_most
        for update skip locked));
    get diagnostics v_removed = row_count;
    return v_removed;
end
$$;
comment on function oncebox.saga_barrier_clear is 'Removes barrier rows past their retention, so many at most; returns how many.';

create function oncebox.saga_purge(at_most integer default 1000) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set jit = off set enable_seqscan = off
set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    v_saga_retention interval;
    v_now constant timestamptz := clock_timestamp();
    v_ids uuid[];
    v_rows bigint;
    v_removed bigint;
begin
    select s.saga_retention into strict v_saga_retention
    from oncebox.setting as s where s.only_row;

    -- For update: a signal or a reply that is being recorded keeps its saga until the next time.
    v_ids := array(
        select s.id from oncebox.saga as s
        where s.ended_at < v_now - v_saga_retention
        order by s.ended_at, s.id limit at_most
        for update skip locked);
    v_removed := cardinality(v_ids);
    -- The note comes first: the triggers let nobody remove a saga without it.
    insert into oncebox.saga_purged (id, status, ended_at)
    select s.id, s.status, s.ended_at from oncebox.saga as s where s.id = any (v_ids) order by s.id
    on conflict do nothing;
    delete from oncebox.saga as s where s.id = any (v_ids);

    v_removed := v_removed + oncebox.saga_barrier_clear(at_most);

    delete from oncebox.saga_request as r
    where r.ctid = any (array(
        select o.ctid from oncebox.saga_request as o
        where o.at < v_now - v_saga_retention
        limit at_most
        for update skip locked));
    get diagnostics v_rows = row_count;
    return v_removed + v_rows;
end
$$;
comment on function oncebox.saga_purge is
    'Removes sagas, barrier rows and requests past their retention, of each kind so many at most; returns how many rows.';

revoke all on function oncebox.saga_purge(integer), oncebox.saga_barrier_clear(integer) from public;
grant execute on function oncebox.saga_purge(integer) to oncebox_orchestrator, oncebox_admin;
grant execute on function oncebox.saga_barrier_clear(integer) to oncebox_consumer, oncebox_admin;
