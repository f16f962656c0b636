//! The demo.
/// x
#[derive(Debug, clap::Args)]
pub struct DemoArgs {}
/// x
pub async fn run(_: DemoArgs) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("x")
}
