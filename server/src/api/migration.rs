//! MigrationService: checks the fields, the registry does the rest.

use std::pin::Pin;

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, MigrationParams, VmName, VmRef},
    transport::Scope,
    v1::{self, migration_service_server::MigrationService},
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{scope::scope_of, services::Services};
use crate::migration::{NewMigration, no_such_migration};

/// The VM that a new migration names.
fn wanted_vm(migration: &v1::Migration) -> Result<VmRef, ApiError> {
    if migration.vm.is_empty() && migration.vm_uid.is_empty() {
        return Err(ApiError::bad_parameter(
            "migration.vm",
            "is missing, and so is migration.vm_uid",
        ));
    }
    VmRef::new(&migration.vm, &migration.vm_uid, &migration.source)
}

/// A migration's name that is taken, without a word about whose it is.
fn taken_unseen(scope: &Scope, error: ApiError) -> ApiError {
    if scope.is_all() || error.reason != Reason::MigrationExists {
        return error;
    }
    ApiError::new(
        Reason::MigrationExists,
        "the name of that migration is taken",
    )
    .with("advice", "name another migration_id")
}

type Watched = Pin<Box<dyn Stream<Item = Result<v1::Migration, Status>> + Send>>;

/// Updates as long as their migration is in scope: its VM may be deleted, or get other labels.
fn seen(
    name: MigrationName,
    updates: impl Stream<Item = Result<v1::Migration, Status>> + Send + 'static,
    mut in_scope: impl FnMut(&v1::Migration) -> bool + Send + 'static,
) -> Watched {
    let mut over = false;
    Box::pin(updates.map_while(move |update| match update {
        _ if over => None,
        Ok(migration) if !in_scope(&migration) => {
            over = true;
            Some(Err(no_such_migration(&name).into()))
        }
        update => Some(update),
    }))
}

impl Services {
    /// A migration that the caller sees.
    async fn migration(
        &self,
        scope: &Scope,
        name: &MigrationName,
    ) -> Result<v1::Migration, ApiError> {
        let found = self.migrations.get(name).await?;
        if self.migration_in(scope, &found) {
            return Ok(found);
        }
        Err(no_such_migration(name))
    }

    async fn check_migration(&self, scope: &Scope, name: &MigrationName) -> Result<(), ApiError> {
        if !scope.is_all() {
            self.migration(scope, name).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl MigrationService for Services {
    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let wanted = request
            .migration
            .ok_or_else(|| ApiError::bad_parameter("migration", "is missing"))?;
        let name = if request.migration_id.is_empty() {
            None
        } else {
            Some(MigrationName::from_id(&request.migration_id)?)
        };
        let mut vm = wanted_vm(&wanted)?;
        if !scope.is_all() {
            // From here on it is this one, whatever else gets its name.
            let found = self.find(&scope, &vm)?;
            vm = VmRef::new(&found.name, &found.uid, "")?;
        }
        let wanted = NewMigration {
            name,
            vm,
            destination: HostName::parse(&wanted.destination)?,
            params: MigrationParams::from_message(wanted.params.as_ref())?,
            validate_only: request.validate_only,
        };
        self.check_host(&scope, &wanted.destination.to_string())?;
        let created = self.migrations.create(wanted).await;
        Ok(Response::new(
            created.map_err(|error| taken_unseen(&scope, error))?,
        ))
    }

    async fn get_migration(
        &self,
        request: Request<v1::GetMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let scope = scope_of(&request);
        let name = MigrationName::parse(&request.into_inner().name)?;
        Ok(Response::new(self.migration(&scope, &name).await?))
    }

    async fn list_migrations(
        &self,
        request: Request<v1::ListMigrationsRequest>,
    ) -> Result<Response<v1::ListMigrationsResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let vm = if request.vm.is_empty() {
            None
        } else {
            Some(VmName::parse(&request.vm)?.to_string())
        };
        let vm_uid = (!request.vm_uid.is_empty()).then_some(request.vm_uid);
        let (migrations, next_page_token) = self
            .migrations
            .list(
                request.page_size,
                &request.page_token,
                vm,
                vm_uid,
                |migration| self.migration_in(&scope, migration),
            )
            .await?;
        Ok(Response::new(v1::ListMigrationsResponse {
            migrations,
            next_page_token,
        }))
    }

    type WatchMigrationStream = Watched;

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let scope = scope_of(&request);
        let name = MigrationName::parse(&request.into_inner().name)?;
        self.check_migration(&scope, &name).await?;
        let updates = self.migrations.watch(&name).await?;
        let services = self.clone();
        Ok(Response::new(seen(name, updates, move |migration| {
            services.migration_in(&scope, migration)
        })))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let scope = scope_of(&request);
        let name = MigrationName::parse(&request.into_inner().name)?;
        self.check_migration(&scope, &name).await?;
        Ok(Response::new(self.migrations.cancel(&name).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_ends_where_its_migration_leaves_the_scope() {
        let update = |vm: &str| {
            Ok(v1::Migration {
                name: "migrations/m".into(),
                vm: vm.into(),
                ..Default::default()
            })
        };
        let updates = ["seen", "seen", "gone", "seen"].map(update);
        let updates = tokio_stream::iter(updates);
        let name = MigrationName::parse("migrations/m").unwrap();
        let told = seen(name, updates, |migration| migration.vm == "seen");
        let told: Vec<_> = told.collect().await;
        assert_eq!(told.len(), 3);
        assert!(told[..2].iter().all(Result::is_ok));
        let error = ApiError::from(told[2].clone().unwrap_err());
        assert_eq!(error.reason, Reason::NoSuchMigration, "{error:?}");
    }
}
