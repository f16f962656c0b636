//! `oncebox migrate`.

use crate::config::Config;
use crate::migrate::{self, Step};

/// Applies the migrations, or shows them.
pub async fn run(config: &Config, status: bool) -> anyhow::Result<()> {
    let url = config.database_url()?;
    if status {
        for Step { version, name, applied_on } in migrate::status(url).await? {
            println!(
                "V{version} {name}: {}",
                applied_on.map_or("not applied".to_owned(), |at| format!("applied {at}"))
            );
        }
        return Ok(());
    }
    let applied = migrate::migrate(url).await?;
    for Step { version, name, .. } in &applied {
        println!("V{version} {name}: applied");
    }
    if applied.is_empty() {
        println!("the schema is up to date");
    }
    Ok(())
}
