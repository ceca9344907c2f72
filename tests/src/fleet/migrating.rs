//! Migrations: asked for, followed, waited for.

use std::time::Duration;

use anyhow::bail;
use slat_proto::{
    ApiError,
    v1::{self, MigrationPhase},
};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt as _;
use tonic::Code;

use super::{Fleet, ended};
use crate::wait::{PATIENCE, eventually};

/// Before a broken watch is opened again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Fleet {
    /// Asks for a migration.
    ///
    /// # Errors
    /// What the server answers.
    pub async fn migrate(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> Result<v1::Migration, ApiError> {
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: vm.into(),
                destination: format!("hosts/{host}"),
                params: Some(params),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(self
            .migrations()
            .create_migration(request)
            .await?
            .into_inner())
    }

    /// Asks for a migration and waits until pages flow.
    ///
    /// # Errors
    /// When it ends before, or does not begin.
    pub async fn migrate_until_precopy(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> anyhow::Result<v1::Migration> {
        let migration = self.migrate(vm, host, params).await?;
        self.migration_until(&migration.name, "pages flow", |migration| {
            migration.phase() == MigrationPhase::PrecopyActive
                && migration
                    .progress
                    .as_ref()
                    .is_some_and(|progress| progress.bytes_transferred > 1 << 20)
        })
        .await
    }

    /// Waits until the server knows a migration that somebody else asks for, and pages flow.
    ///
    /// # Errors
    /// When it does not show up or ends before.
    pub async fn migration_until_exists(&self, name: &str) -> anyhow::Result<v1::Migration> {
        eventually(&format!("{name} exists"), || async {
            let request = v1::GetMigrationRequest { name: name.into() };
            self.migrations().get_migration(request).await?;
            Ok(())
        })
        .await?;
        self.migration_until(name, "pages flow", |migration| {
            migration.phase() == MigrationPhase::PrecopyActive
        })
        .await
    }

    /// Watches a migration until `found`; watches again when the server goes away and comes back.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub async fn migration_until(
        &self,
        name: &str,
        what: &str,
        mut found: impl FnMut(&v1::Migration) -> bool,
    ) -> anyhow::Result<v1::Migration> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = None;
        let watch = async {
            loop {
                let request = v1::WatchMigrationRequest { name: name.into() };
                let mut stream = match self.migrations().watch_migration(request).await {
                    Ok(stream) => stream.into_inner(),
                    Err(status) if status.code() == Code::Unavailable => {
                        tokio::time::sleep(LOOK_AGAIN).await;
                        continue;
                    }
                    Err(status) => return Err(status.into()),
                };
                while let Some(item) = stream.next().await {
                    let Ok(migration) = item else { break };
                    if found(&migration) {
                        return Ok(migration);
                    }
                    let over = ended(migration.phase());
                    last = Some(migration);
                    if over {
                        bail!("it ended otherwise");
                    }
                }
            }
        };
        match timeout_at(deadline, watch).await {
            Ok(Ok(migration)) => Ok(migration),
            Ok(Err(error)) => {
                Err(error.context(format!("{name}, until {what}: last was {last:#?}")))
            }
            Err(_) => bail!(
                "{name}: after {} s still not: {what}: {last:#?}",
                PATIENCE.as_secs()
            ),
        }
    }

    /// Waits for a migration's end in `phase`.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub async fn migration_ends(
        &self,
        name: &str,
        phase: MigrationPhase,
    ) -> anyhow::Result<v1::Migration> {
        self.migration_until(name, &format!("{phase:?}"), |migration| {
            migration.phase() == phase
        })
        .await
    }

    /// Migrates and waits for COMPLETED.
    ///
    /// # Errors
    /// When it does not complete.
    pub async fn migrate_and_wait(
        &self,
        vm: &str,
        host: &str,
        params: v1::MigrationParams,
    ) -> anyhow::Result<v1::Migration> {
        let migration = self.migrate(vm, host, params).await?;
        self.migration_ends(&migration.name, MigrationPhase::Completed)
            .await
    }

    /// Every migration that the server has.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn all_migrations(&self) -> anyhow::Result<Vec<v1::Migration>> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListMigrationsRequest {
                page_size: 1000,
                page_token,
                ..Default::default()
            };
            let list = self.migrations().list_migrations(request).await?;
            let list = list.into_inner();
            all.extend(list.migrations);
            page_token = list.next_page_token;
            if page_token.is_empty() {
                return Ok(all);
            }
        }
    }
}
