//! Benchmarks.
/// x
#[derive(Debug, clap::Args)]
pub struct BenchArgs {}
/// x
pub async fn run(_: BenchArgs, _: &crate::config::Config) -> anyhow::Result<()> {
    anyhow::bail!("x")
}
