//! The faults: a plan that follows from the seed, and its execution.
//!
//! A fault happens once so many orders were placed. Faults of processes and faults of servers run side by side, so
//! that a relay can die while the broker is away.

use super::children::{Children, EACH, Kind};
use super::progress::Progress;
use super::random::Random;
use super::shop::{self, Counter};
use crate::node::{NodeError, Postgres, Rabbit};
use anyhow::Context;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long a relay is frozen: longer than its lease, so that it wakes up after another one has taken over.
const FREEZE: Duration = Duration::from_millis(7_500);

/// Between two faults of a kind, so that each meets work under way.
const PAUSE: Duration = Duration::from_millis(500);
/// Longer than a take-over may take.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(12);

/// How much goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Faults {
    /// Nothing
    None,
    /// Relays, consumers and the broker are killed
    Some,
    /// More of that, a relay frozen beyond its lease, and Postgres killed
    Many,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to the relay that holds the lane.
    KillActiveRelay,
    /// SIGKILL to a relay, whichever it is.
    KillRelay(usize),
    /// SIGKILL to a consumer.
    KillConsumer(usize),
    /// SIGKILL to a saga orchestrator.
    KillOrchestrator(usize),
    /// SIGSTOP to the active relay, SIGCONT when it has lost its lease.
    FreezeRelay,
    /// SIGKILL to the broker, then a restart.
    KillBroker,
    /// SIGKILL to Postgres, then a restart.
    KillPostgres,
}

impl Fault {
    fn is_of_server(self) -> bool {
        matches!(self, Self::KillBroker | Self::KillPostgres)
    }
}

/// A fault and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// After that many orders.
    pub after_orders: u64,
    pub fault: Fault,
}

/// The plan of a seed, by time.
pub fn plan(seed: u64, faults: Faults, orders: u64) -> Vec<Planned> {
    let mut random = Random::new(seed);
    let mut kinds = match faults {
        Faults::None => vec![],
        // Both consumers, since only they know which of them has the queue.
        Faults::Some => vec![
            Fault::KillActiveRelay,
            Fault::KillRelay(random.below(EACH as u64) as usize),
            Fault::KillConsumer(0),
            Fault::KillConsumer(1),
            Fault::KillOrchestrator(0),
            Fault::KillOrchestrator(1),
            Fault::KillBroker,
        ],
        Faults::Many => {
            let mut kinds = vec![Fault::FreezeRelay, Fault::KillBroker, Fault::KillPostgres, Fault::KillBroker];
            kinds.extend([Fault::KillActiveRelay; 3]);
            for index in 0..EACH {
                kinds.extend([Fault::KillRelay(index), Fault::KillConsumer(index), Fault::KillConsumer(index)]);
                kinds.extend([Fault::KillOrchestrator(index); 2]);
            }
            kinds
        }
    };
    for last in (1..kinds.len()).rev() {
        kinds.swap(last, random.below(last as u64 + 1) as usize);
    }
    // One relay dies while the broker is there: it leaves messages in flight, which the next sends again.
    let first = |fault| kinds.iter().position(|kind| *kind == fault);
    if let (Some(relay), Some(broker)) = (first(Fault::KillActiveRelay), first(Fault::KillBroker))
        && broker < relay
    {
        kinds.swap(relay, broker);
    }
    // Spread over the middle, one to each stretch: some orders before the first, some after the last.
    let stretch = orders * 8 / 10 / (kinds.len() as u64).max(1);
    let at = |(index, fault)| {
        let after_orders = orders / 10 + stretch * index as u64 + random.below(stretch);
        Planned { after_orders, fault }
    };
    kinds.into_iter().enumerate().map(at).collect()
}

/// How often each thing has happened.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    pub relays: u32,
    pub active_relays: u32,
    pub consumers: u32,
    pub orchestrators: u32,
    pub brokers: u32,
    pub postgres: u32,
    pub frozen: u32,
}

/// What the faults are done to.
pub struct Targets<'a> {
    pub children: &'a Children,
    pub postgres: &'a Mutex<Postgres>,
    pub rabbit: &'a Mutex<Rabbit>,
    pub database_url: &'a str,
    pub counter: &'a Counter,
    pub progress: &'a Progress,
}

impl Targets<'_> {
    /// Executes the plan; returns when the last fault is over and its victim is back.
    pub async fn execute(&self, plan: &[Planned]) -> anyhow::Result<Done> {
        let done = Mutex::new(Done::default());
        let (servers, processes): (Vec<Planned>, Vec<Planned>) =
            plan.iter().partition(|planned| planned.fault.is_of_server());
        tokio::try_join!(self.in_turn(&servers, &done), self.in_turn(&processes, &done))?;
        Ok(done.into_inner())
    }

    async fn in_turn(&self, plan: &[Planned], done: &Mutex<Done>) -> anyhow::Result<()> {
        let mut placed = self.counter.placed.subscribe();
        for Planned { after_orders, fault } in plan {
            placed.wait_for(|placed| placed >= after_orders).await.context("the writers are gone")?;
            self.inflict(*fault, done).await?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn inflict(&self, fault: Fault, done: &Mutex<Done>) -> anyhow::Result<()> {
        match fault {
            Fault::KillActiveRelay => {
                let index = self.relay_at_work().await;
                self.next_wave().await;
                self.kill_relay(index, done, true).await?;
            }
            Fault::KillRelay(index) => {
                let active = self.active_relay().await == Some(index);
                self.kill_relay(index, done, active).await?;
            }
            Fault::KillConsumer(index) => {
                self.children.kill(Kind::Consumer, index).await?;
                done.lock().await.consumers += 1;
                self.progress.note(&format!("kill -9 consumer {}", index + 1));
            }
            Fault::KillOrchestrator(index) => {
                self.children.kill(Kind::Orchestrator, index).await?;
                done.lock().await.orchestrators += 1;
                self.progress.note(&format!("kill -9 orchestrator {}", index + 1));
            }
            Fault::FreezeRelay => {
                let index = self.relay_at_work().await;
                self.children.signal(Kind::Relay, index, "STOP").await;
                done.lock().await.frozen += 1;
                self.progress.note(&format!("freeze relay {} (SIGSTOP)", index + 1));
                tokio::time::sleep(FREEZE).await;
                self.children.signal(Kind::Relay, index, "CONT").await;
                self.progress.note(&format!("relay {} wakes up (SIGCONT)", index + 1));
            }
            Fault::KillBroker => {
                let mut rabbit = self.rabbit.lock().await;
                self.progress.note("kill -9 RabbitMQ");
                rabbit.kill9();
                done.lock().await.brokers += 1;
                self.restart("RabbitMQ", rabbit.restart()).await?;
            }
            Fault::KillPostgres => {
                let mut postgres = self.postgres.lock().await;
                self.progress.note("kill -9 PostgreSQL");
                postgres.kill9();
                done.lock().await.postgres += 1;
                self.restart("PostgreSQL", postgres.restart()).await?;
            }
        }
        Ok(())
    }

    async fn kill_relay(&self, index: usize, done: &Mutex<Done>, active: bool) -> anyhow::Result<()> {
        self.children.kill(Kind::Relay, index).await?;
        let mut done = done.lock().await;
        done.relays += 1;
        done.active_relays += u32::from(active);
        let which = if active { "has the lane" } else { "stands by" };
        self.progress.note(&format!("kill -9 relay {} ({which})", index + 1));
        Ok(())
    }

    async fn restart(&self, what: &str, restart: impl Future<Output = Result<(), NodeError>>) -> anyhow::Result<()> {
        let began = Instant::now();
        restart.await.with_context(|| format!("{what} did not come back"))?;
        self.progress.note(&format!("{what} is back after {:.1} s", began.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Waits until orders come, and their messages are about to be confirmed; not for ever, since they come to an end.
    async fn next_wave(&self) {
        let mut placed = self.counter.placed.subscribe();
        let _ = tokio::time::timeout(Duration::from_secs(1), placed.changed()).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    /// The relay that has the lane, once one has it again; any if that takes too long, which the drain will show.
    async fn relay_at_work(&self) -> usize {
        let began = Instant::now();
        while began.elapsed() < TAKE_OVER_LIMIT {
            if let Some(index) = self.active_relay().await {
                return index;
            }
            // Long enough for one that has just taken over to get to work.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        0
    }

    /// The relay that the lease names; none while the lease belongs to the dead or the database is away.
    async fn active_relay(&self) -> Option<usize> {
        let mut conn = shop::connect(self.database_url).await.ok()?;
        let owner =
            "select owner_name from oncebox.outbox_lease where expires_at > clock_timestamp() order by lane limit 1";
        let owner: Option<String> = sqlx::query_scalar(owner).fetch_optional(&mut conn).await.ok()??;
        crate::db::close(conn).await;
        self.children.index_of(Kind::Relay, owner?.rsplit_once("pid ")?.1.parse().ok()?).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(plan: &[Planned], is: impl Fn(Fault) -> bool) -> usize {
        plan.iter().filter(|planned| is(planned.fault)).count()
    }

    /// Goal: whatever the seed, the promised faults are in the plan, in time for orders to follow them.
    #[test]
    fn every_seed_has_its_faults() {
        for seed in 0..200 {
            assert_eq!(plan(seed, Faults::None, 2_000), []);
            for (faults, relays, consumers, brokers) in [(Faults::Some, 2, 2, 1), (Faults::Many, 5, 4, 2)] {
                let plan = plan(seed, faults, 2_000);
                let is_relay = |fault| matches!(fault, Fault::KillActiveRelay | Fault::KillRelay(_));
                assert_eq!(count(&plan, is_relay), relays);
                assert!(count(&plan, |fault| fault == Fault::KillActiveRelay) >= 1);
                assert_eq!(count(&plan, |fault| matches!(fault, Fault::KillConsumer(_))), consumers);
                assert_eq!(count(&plan, |fault| fault == Fault::KillBroker), brokers);
                assert_eq!(count(&plan, |fault| fault == Fault::KillPostgres) > 0, faults == Faults::Many);
                assert_eq!(count(&plan, |fault| fault == Fault::FreezeRelay) > 0, faults == Faults::Many);
                let first = |fault| plan.iter().position(|planned| planned.fault == fault);
                assert!(first(Fault::KillActiveRelay) < first(Fault::KillBroker));
                assert!(plan.is_sorted_by_key(|planned| planned.after_orders));
                assert!(plan.iter().all(|planned| (200..1_800).contains(&planned.after_orders)));
            }
        }
    }

    /// Goal: a seed gives the same plan again, another one another; a handful of orders is enough.
    #[test]
    fn plans_follow_from_the_seed() {
        assert_eq!(plan(5, Faults::Many, 2_000), plan(5, Faults::Many, 2_000));
        assert_ne!(plan(5, Faults::Many, 2_000), plan(6, Faults::Many, 2_000));
        assert!(plan(5, Faults::Many, 1).iter().all(|planned| planned.after_orders <= 1));
    }
}
