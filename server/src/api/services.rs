//! What every service works on, and how it reaches a VM's owner.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    transport::Endpoint,
    v1::{
        self, fleet_service_server::FleetServiceServer, host_service_server::HostServiceServer,
        memory_service_server::MemoryServiceServer,
        migration_service_server::MigrationServiceServer,
        paging_service_server::PagingServiceServer, snapshot_service_server::SnapshotServiceServer,
        vm_service_server::VmServiceServer,
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{
    fence::Fences,
    fleet::{Fleet, host_unreachable},
    grants::Grants,
    history::History,
    migration::Migrations,
    store::BlockingStore,
};

/// What the services work on.
#[derive(Clone)]
pub(crate) struct Services {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) migrations: Arc<Migrations>,
    pub(crate) store: BlockingStore,
    pub(crate) history: Arc<History>,
    pub(crate) watches: Watches,
    pub(crate) grants: Arc<Grants>,
    pub(crate) fences: Arc<Fences>,
}

/// Owns the tasks behind WatchVm streams; they end with their listener or with the server.
#[derive(Clone, Default)]
pub(crate) struct Watches {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Watches {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Ends them all.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Services {
    /// Adds every service to an endpoint.
    pub(crate) fn add_to(&self, endpoint: Endpoint) -> Endpoint {
        endpoint
            .service(VmServiceServer::new(self.clone()))
            .service(MemoryServiceServer::new(self.clone()))
            .service(HostServiceServer::new(self.clone()))
            .service(MigrationServiceServer::new(self.clone()))
            .service(FleetServiceServer::new(self.clone()))
            .service(SnapshotServiceServer::new(self.clone()))
            .service(PagingServiceServer::new(self.clone()))
    }
}

impl Services {
    /// With the migration it is part of now, whatever its agent knows of that.
    pub(super) fn with_migration(&self, mut vm: v1::Vm) -> v1::Vm {
        if let Some(migration) = self.migrations.of_vm(&vm) {
            vm.migration = migration;
        }
        vm
    }

    /// Refuses what cannot be done while a VM migrates.
    pub(super) fn refuse_if_migrating(&self, vm: &v1::Vm, what: &str) -> Result<(), ApiError> {
        self.migrations.refuse_if_migrating(vm, what)
    }
}

/// Whether an agent's answer is that nobody answered.
pub(super) fn is_silence(status: &Status) -> bool {
    ApiError::from(status.clone()).reason == Reason::PeerUnreachable
}

/// An agent's refusal as it is; a silence becomes HOST_UNREACHABLE with the host's name.
pub(super) fn forwarded(host: &str, status: Status) -> Status {
    let error = ApiError::from(status.clone());
    if error.reason != Reason::PeerUnreachable {
        return status;
    }
    host_unreachable(host).with("cause", error.message).into()
}
