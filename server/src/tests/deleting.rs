//! A host comes back while it is being deleted: its agent is refused from the order's check until
//! the order has ended or nobody waits for it any more.

use std::{net::SocketAddr, time::Duration};

use slat_proto::{
    ApiError, Reason,
    transport::{TracedChannel, connect},
    v1::{
        self, MigrationPhase as Phase, fleet_service_client::FleetServiceClient,
        host_service_client::HostServiceClient,
    },
};
use slat_test_dir::TestDir;
use tokio::{runtime::Handle, sync::watch, task::JoinHandle, time::timeout};

use super::LONG;
use crate::{
    Server, ServerConfig,
    store::{
        BlockingStore, FleetStore, ListQuery, Prune, SeenChanges, SeenFleet, SourceStart, Store,
        StoreError, StoredMigration,
    },
};

/// A store with hosts a and b and a migration from one to the other. That b's side of it is given
/// up is written when the test lets it.
#[derive(Clone)]
struct Held {
    open: watch::Sender<bool>,
    /// Such a write has begun.
    writing: watch::Sender<bool>,
}

fn host(name: &str) -> v1::Host {
    v1::Host {
        name: name.into(),
        uid: format!("agent-of-{name}"),
        address: "127.0.0.1:1".into(),
        incarnation: "1".into(),
        ..Default::default()
    }
}

impl Store for Held {
    fn put_migration(&self, record: &StoredMigration) -> Result<(), StoreError> {
        if record.destination_released {
            self.writing.send_replace(true);
            let mut open = self.open.subscribe();
            // Its sender is this store's own.
            drop(Handle::current().block_on(open.wait_for(|open| *open)));
        }
        Ok(())
    }

    fn migration(&self, _: &str) -> Result<Option<StoredMigration>, StoreError> {
        Ok(None)
    }

    fn migrations(&self, _: &ListQuery) -> Result<Vec<StoredMigration>, StoreError> {
        Ok(Vec::new())
    }

    fn open_migrations(&self) -> Result<Vec<StoredMigration>, StoreError> {
        Ok(vec![StoredMigration {
            migration: Some(v1::Migration {
                name: "migrations/m".into(),
                vm: "vms/web".into(),
                vm_uid: "u".into(),
                source: "hosts/a".into(),
                destination: "hosts/b".into(),
                params: Some(v1::MigrationParams::default()),
                phase: Phase::PrecopyActive.into(),
                vm_location: v1::VmLocation::Source.into(),
                epoch: 1,
                create_time: Some(slat_proto::model::now()),
                ..Default::default()
            }),
            source_released: false,
            destination_released: false,
            source_start: SourceStart::Once.into(),
            ..Default::default()
        }])
    }

    fn prune_migrations(&self, _: &Prune) -> Result<usize, StoreError> {
        Ok(0)
    }

    fn put_host(&self, _: &str, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn probe(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl FleetStore for Held {
    fn put_seen(&self, _: &SeenChanges) -> Result<(), StoreError> {
        Ok(())
    }

    fn seen(&self) -> Result<SeenFleet, StoreError> {
        Ok(SeenFleet {
            hosts: vec![host("hosts/a"), host("hosts/b")],
            ..SeenFleet::default()
        })
    }
}

/// Lets a store write when a test has failed: its runtime waits for that.
struct Opens(watch::Sender<bool>);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

/// A server whose host b is being deleted: what that gives up is being written.
struct Rig {
    server: Server,
    store: Held,
    channel: TracedChannel,
    deleting: JoinHandle<Result<(), ApiError>>,
    _opens: Opens,
    _directory: TestDir,
}

impl Rig {
    async fn start() -> Self {
        let directory = TestDir::new();
        let store = Held {
            open: watch::channel(false).0,
            writing: watch::channel(false).0,
        };
        let opens = Opens(store.open.clone());
        let config = ServerConfig {
            credentials: None,
            access: slat_proto::transport::Access::default(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            state_dir: directory.path().to_owned(),
            report_interval: Duration::from_secs(1),
            host_silence: None,
            render: None,
            version: "test".to_owned(),
            retention: crate::Retention::default(),
            fence: None,
        };
        let server = Server::start_on(config, BlockingStore::new(store.clone()));
        let server = server.await.unwrap();
        let channel = connect(&server.address().to_string().parse().unwrap()).unwrap();
        let mut hosts = HostServiceClient::new(channel.clone());
        let deleting = tokio::spawn(async move {
            let request = v1::DeleteHostRequest {
                name: "hosts/b".into(),
                give_up_vms: true,
            };
            let answer = hosts.delete_host(request).await;
            answer.map(drop).map_err(ApiError::from)
        });
        let mut writing = store.writing.subscribe();
        let begun = timeout(LONG, writing.wait_for(|writing| *writing)).await;
        begun.expect("b's side is given up").unwrap();
        Self {
            server,
            store,
            channel,
            deleting,
            _opens: opens,
            _directory: directory,
        }
    }

    async fn register(&self) -> Result<(), ApiError> {
        let request = v1::RegisterHostRequest {
            host: Some(host("hosts/b")),
        };
        let answer = FleetServiceClient::new(self.channel.clone())
            .register_host(request)
            .await;
        answer.map(drop).map_err(ApiError::from)
    }

    async fn report(&self) -> Result<(), ApiError> {
        let request = v1::ReportHostRequest {
            host: "hosts/b".into(),
            incarnation: "1".into(),
            ..Default::default()
        };
        let answer = FleetServiceClient::new(self.channel.clone())
            .report_host(request)
            .await;
        answer.map(drop).map_err(ApiError::from)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_back_is_refused_until_its_host_is_deleted() {
    let mut rig = Rig::start().await;
    let refused = [rig.register().await, rig.report().await];
    rig.store.open.send_replace(true);
    // What the migration was told stands, so the order must be carried out.
    (&mut rig.deleting).await.unwrap().unwrap();
    for refused in [&rig.register().await, &rig.report().await] {
        assert!(refused.is_ok(), "the host is new again: {refused:?}");
    }
    for refused in refused {
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason, Reason::HostDeleted, "{refused}");
        assert_eq!(refused.metadata["host"], "hosts/b");
    }
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_taken_again_when_nobody_waits_for_the_deletion_any_more() {
    let rig = Rig::start().await;
    let refused = rig.register().await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostDeleted, "{refused}");
    rig.deleting.abort();
    // The server hears of it soon, as an agent does.
    let registered = async {
        while rig.register().await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let again = timeout(LONG, registered).await;
    assert!(again.is_ok(), "it is refused for ever");
    assert!(!*rig.store.open.borrow(), "the write has not ended");
    rig.report().await.unwrap();
    rig.store.open.send_replace(true);
    rig.server.stop().await;
}
