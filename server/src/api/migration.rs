//! MigrationService: checks the fields, the registry does the rest.

use std::pin::Pin;

use slat_proto::{
    ApiError,
    model::{HostName, MigrationName, MigrationParams, VmName, VmRef},
    v1::{self, migration_service_server::MigrationService},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::services::Services;
use crate::migration::NewMigration;

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

#[tonic::async_trait]
impl MigrationService for Services {
    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let request = request.into_inner();
        let wanted = request
            .migration
            .ok_or_else(|| ApiError::bad_parameter("migration", "is missing"))?;
        let name = if request.migration_id.is_empty() {
            None
        } else {
            Some(MigrationName::from_id(&request.migration_id)?)
        };
        let wanted = NewMigration {
            name,
            vm: wanted_vm(&wanted)?,
            destination: HostName::parse(&wanted.destination)?,
            params: MigrationParams::from_message(wanted.params.as_ref())?,
            validate_only: request.validate_only,
        };
        Ok(Response::new(self.migrations.create(wanted).await?))
    }

    async fn get_migration(
        &self,
        request: Request<v1::GetMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let name = MigrationName::parse(&request.into_inner().name)?;
        Ok(Response::new(self.migrations.get(&name).await?))
    }

    async fn list_migrations(
        &self,
        request: Request<v1::ListMigrationsRequest>,
    ) -> Result<Response<v1::ListMigrationsResponse>, Status> {
        let request = request.into_inner();
        let vm = if request.vm.is_empty() {
            None
        } else {
            Some(VmName::parse(&request.vm)?.to_string())
        };
        let vm_uid = (!request.vm_uid.is_empty()).then_some(request.vm_uid);
        let (migrations, next_page_token) = self
            .migrations
            .list(request.page_size, &request.page_token, vm, vm_uid)
            .await?;
        Ok(Response::new(v1::ListMigrationsResponse {
            migrations,
            next_page_token,
        }))
    }

    type WatchMigrationStream = Pin<Box<dyn Stream<Item = Result<v1::Migration, Status>> + Send>>;

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let name = MigrationName::parse(&request.into_inner().name)?;
        let updates = self.migrations.watch(&name).await?;
        Ok(Response::new(Box::pin(updates)))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::Migration>, Status> {
        let name = MigrationName::parse(&request.into_inner().name)?;
        Ok(Response::new(self.migrations.cancel(&name).await?))
    }
}
