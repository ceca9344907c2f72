//! Users who are limited by labels, in a fleet of two hosts and a VM each.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    transport::TracedChannel,
    v1::{
        self, Backend, MigrationPhase, host_service_client::HostServiceClient,
        memory_service_client::MemoryServiceClient,
        migration_service_client::MigrationServiceClient, save::State as SaveState,
        snapshot_service_client::SnapshotServiceClient, vm_service_client::VmServiceClient,
    },
};
use slat_tests::{
    fleet::ended,
    guest::{fast, usual},
    wait::eventually,
};
use slat_trust::Credentials;
use tonic::{Response, Status};

use super::rig::Secured;

const USERS: &str = "users:
  admin: {role: admin, vms: all}
  bob: {role: operator, vms: {team: web}}
  carol: {role: operator, hosts: {rack: r1}}
  rita: {role: admin, vms: {team: web}}
";

/// One user's ways to the server.
#[derive(Clone)]
struct User {
    vms: VmServiceClient<TracedChannel>,
    hosts: HostServiceClient<TracedChannel>,
    memory: MemoryServiceClient<TracedChannel>,
    migrations: MigrationServiceClient<TracedChannel>,
    saves: SnapshotServiceClient<TracedChannel>,
}

impl User {
    fn at(fleet: &Secured, end: &str, credentials: &Credentials) -> anyhow::Result<Self> {
        let channel = fleet.channel(end, credentials)?;
        Ok(Self {
            vms: VmServiceClient::new(channel.clone()),
            hosts: HostServiceClient::new(channel.clone()),
            memory: MemoryServiceClient::new(channel.clone()),
            migrations: MigrationServiceClient::new(channel.clone()),
            saves: SnapshotServiceClient::new(channel),
        })
    }

    async fn create(
        &mut self,
        id: &str,
        labels: &[(&str, &str)],
        host: &str,
    ) -> Result<v1::Vm, ApiError> {
        let labels = labels.iter().map(|(key, value)| {
            let (key, value) = (*key, *value);
            (key.to_owned(), value.to_owned())
        });
        let request = v1::CreateVmRequest {
            vm_id: id.to_owned(),
            spec: Some(v1::VmSpec {
                labels: labels.collect(),
                ..usual(Backend::Software)
            }),
            host: host.to_owned(),
            validate_only: false,
        };
        heard(self.vms.create_vm(request).await)
    }

    async fn migrate(&mut self, vm: &str, to: &str) -> Result<v1::Migration, ApiError> {
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: vm.to_owned(),
                destination: to.to_owned(),
                params: Some(fast()),
                ..Default::default()
            }),
            ..Default::default()
        };
        heard(self.migrations.create_migration(request).await)
    }

    /// Names of all VMs, one a page.
    async fn list(&mut self) -> anyhow::Result<Vec<String>> {
        let mut request = v1::ListVmsRequest {
            page_size: 1,
            ..Default::default()
        };
        let mut names = Vec::new();
        loop {
            let page = self.vms.list_vms(request.clone()).await?.into_inner();
            names.extend(page.vms.into_iter().map(|vm| vm.name));
            if page.next_page_token.is_empty() {
                return Ok(names);
            }
            request.page_token = page.next_page_token;
        }
    }

    async fn save(&mut self, vm: &str, id: &str) -> anyhow::Result<String> {
        let request = v1::CreateSaveRequest {
            vm: vm.to_owned(),
            save_id: id.to_owned(),
            ..Default::default()
        };
        let name = self.saves.create_save(request).await?.into_inner().name;
        let get = || {
            let (mut saves, name) = (self.saves.clone(), name.clone());
            async move {
                let save = saves.get_save(v1::GetSaveRequest { name }).await?;
                let save = save.into_inner();
                ensure!(save.state() == SaveState::Written, "{save:?}");
                Ok(())
            }
        };
        eventually("the save is written", get).await?;
        Ok(name)
    }
}

fn heard<T>(answer: Result<Response<T>, Status>) -> Result<T, ApiError> {
    answer.map(Response::into_inner).map_err(ApiError::from)
}

/// A refusal for this reason, and nothing else.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, ApiError>, reason: Reason) -> ApiError {
    let error = answer.unwrap_err();
    assert_eq!(error.reason, reason, "{error:?}");
    error
}

fn get(name: &str) -> v1::GetVmRequest {
    v1::GetVmRequest {
        name: name.to_owned(),
        ..Default::default()
    }
}

/// What is not of team web is not there for one who sees that team's VMs alone.
async fn by_vms(bob: &mut User, db: &v1::Vm, web: &v1::Vm) -> anyhow::Result<()> {
    ensure!(bob.list().await? == ["vms/web"]);
    let gone = Reason::NoSuchVm;
    let (name, uid) = (db.name.clone(), db.uid.clone());
    for (name, uid) in [(name.clone(), String::new()), (String::new(), uid.clone())] {
        let host = String::new();
        let request = v1::GetVmRequest {
            name: name.clone(),
            uid: uid.clone(),
            host: host.clone(),
        };
        let error = refused(heard(bob.vms.get_vm(request).await), gone);
        let said = format!("{error:?}");
        assert!(!said.contains("host-"), "{said}");
        let request = v1::WatchVmRequest {
            name: name.clone(),
            uid: uid.clone(),
            host: host.clone(),
        };
        let watch = bob.vms.watch_vm(request).await.map(drop);
        assert_eq!(ApiError::from(watch.unwrap_err()).reason, gone);
        let request = v1::StartVmRequest {
            name: name.clone(),
            uid: uid.clone(),
            host: host.clone(),
        };
        refused(heard(bob.vms.start_vm(request).await), gone);
        let request = v1::DeleteVmRequest {
            name: name.clone(),
            uid: uid.clone(),
            ..Default::default()
        };
        refused(heard(bob.vms.delete_vm(request).await), gone);
        let request = v1::ListSlotsRequest {
            vm: name,
            uid,
            host,
        };
        refused(heard(bob.memory.list_slots(request).await), gone);
    }
    refused(bob.migrate("vms/db", "hosts/host-a").await, gone);
    let request = v1::CreateSaveRequest {
        vm: db.name.clone(),
        save_id: "mine".to_owned(),
        ..Default::default()
    };
    refused(heard(bob.saves.create_save(request).await), gone);

    let seen = heard(bob.vms.get_vm(get("vms/web")).await)?;
    ensure!(seen.uid == web.uid, "{seen:?}");
    let request = v1::WatchVmRequest {
        name: "vms/web".to_owned(),
        ..Default::default()
    };
    let mut watch = heard(bob.vms.watch_vm(request).await)?;
    let first = watch.message().await?.context("it ends")?;
    ensure!(first.uid == web.uid, "{first:?}");
    drop(watch);

    // What it makes has to be its own, and a name that is taken is all it hears of another's.
    refused(bob.create("new", &[], "").await, Reason::Permission);
    refused(
        bob.create("new", &[("team", "db")], "").await,
        Reason::Permission,
    );
    let error = refused(
        bob.create("db", &[("team", "web")], "").await,
        Reason::VmExists,
    );
    let said = format!("{error:?}");
    assert!(!said.contains("host-") && !said.contains(&db.uid), "{said}");
    let made = bob
        .create("web2", &[("team", "web"), ("tier", "x")], "")
        .await;
    made?;
    ensure!(bob.list().await? == ["vms/web", "vms/web2"]);
    let request = v1::DeleteVmRequest {
        name: "vms/web2".to_owned(),
        ..Default::default()
    };
    bob.vms.delete_vm(request).await?;
    Ok(())
}

/// What is not on rack r1 is not there for one who sees that rack alone.
async fn by_hosts(carol: &mut User) -> anyhow::Result<()> {
    let hosts = carol
        .hosts
        .list_hosts(v1::ListHostsRequest::default())
        .await?;
    let hosts = hosts.into_inner().hosts.into_iter().map(|host| host.name);
    ensure!(hosts.collect::<Vec<_>>() == ["hosts/host-a"]);
    let get = |name: &str| v1::GetHostRequest {
        name: name.to_owned(),
    };
    carol.hosts.get_host(get("hosts/host-a")).await?;
    let there = carol.hosts.get_host(get("hosts/host-b")).await;
    refused(heard(there), Reason::NoSuchHost);
    ensure!(carol.list().await? == ["vms/web"]);
    let elsewhere = carol.create("far", &[], "hosts/host-b").await;
    refused(elsewhere, Reason::NoSuchHost);
    refused(
        carol.migrate("vms/web", "hosts/host-b").await,
        Reason::NoSuchHost,
    );
    // The other host has more memory, and would be taken.
    let made = carol.create("near", &[], "").await?;
    ensure!(made.host == "hosts/host-a", "{made:?}");
    let request = v1::DeleteVmRequest {
        uid: made.uid,
        ..Default::default()
    };
    carol.vms.delete_vm(request).await?;
    Ok(())
}

async fn migrations_and_saves(
    admin: &mut User,
    bob: &mut User,
    carol: &mut User,
) -> anyhow::Result<()> {
    let of_db = admin.save("vms/db", "of-db").await?;
    let of_web = admin.save("vms/web", "of-web").await?;
    let gone = Reason::NoSuchSave;
    let name = || of_db.clone();
    let get = bob
        .saves
        .get_save(v1::GetSaveRequest { name: name() })
        .await;
    refused(heard(get), gone);
    let verify = v1::VerifySaveRequest { name: name() };
    refused(heard(bob.saves.verify_save(verify).await), gone);
    let delete = v1::DeleteSaveRequest { name: name() };
    refused(heard(bob.saves.delete_save(delete.clone()).await), gone);
    refused(heard(carol.saves.delete_save(delete).await), gone);
    let restore = v1::RestoreVmRequest {
        save: name(),
        vm_id: "stolen".to_owned(),
        ..Default::default()
    };
    refused(heard(bob.saves.restore_vm(restore).await), gone);
    for user in [&mut *bob, &mut *carol] {
        let list = v1::ListSavesRequest::default();
        let list = user.saves.list_saves(list).await?.into_inner().saves;
        let names: Vec<String> = list.into_iter().map(|save| save.name).collect();
        ensure!(names == [of_web.clone()], "{names:?}");
    }

    let migration = admin.migrate("vms/db", "hosts/host-a").await?.name;
    let get = || v1::GetMigrationRequest {
        name: migration.clone(),
    };
    eventually("the migration has ended", || {
        let (mut admin, get) = (admin.clone(), get());
        async move {
            let migration = admin.migrations.get_migration(get).await?.into_inner();
            ensure!(ended(migration.phase()), "{migration:?}");
            ensure!(
                migration.phase() == MigrationPhase::Completed,
                "{migration:?}"
            );
            Ok(())
        }
    })
    .await?;
    let gone = Reason::NoSuchMigration;
    for user in [&mut *bob, &mut *carol] {
        refused(heard(user.migrations.get_migration(get()).await), gone);
        let cancel = v1::CancelMigrationRequest {
            name: migration.clone(),
        };
        refused(heard(user.migrations.cancel_migration(cancel).await), gone);
        let watch = v1::WatchMigrationRequest {
            name: migration.clone(),
        };
        let watch = user.migrations.watch_migration(watch).await.map(drop);
        assert_eq!(ApiError::from(watch.unwrap_err()).reason, gone);
        let list = v1::ListMigrationsRequest::default();
        let list = user.migrations.list_migrations(list).await?.into_inner();
        ensure!(list.migrations.is_empty(), "{list:?}");
    }
    // It is on the rack now.
    ensure!(carol.list().await? == ["vms/db", "vms/web"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_limited_by_labels_sees_its_part() -> anyhow::Result<()> {
    let mut fleet = Secured::new()?;
    let [admin, bob, carol, rita] = ["admin", "bob", "carol", "rita"].map(|name| fleet.user(name));
    let (admin, bob, carol, rita) = (admin?, bob?, carol?, rita?);
    let hosts = [("host-a", 512, "rack=r1"), ("host-b", 1024, "rack=r2")];
    fleet.start(USERS, &hosts, &admin).await?;
    let mut sees_all = User::at(&fleet, "server", &admin)?;
    let web = sees_all
        .create("web", &[("team", "web")], "hosts/host-a")
        .await?;
    let db = sees_all
        .create("db", &[("team", "db")], "hosts/host-b")
        .await?;
    for vm in [&web, &db] {
        let request = v1::StartVmRequest {
            uid: vm.uid.clone(),
            ..Default::default()
        };
        sees_all.vms.start_vm(request).await?;
    }
    let mut by_team = User::at(&fleet, "server", &bob)?;
    by_vms(&mut by_team, &db, &web).await?;
    let mut by_rack = User::at(&fleet, "server", &carol)?;
    by_hosts(&mut by_rack).await?;
    migrations_and_saves(&mut sees_all, &mut by_team, &mut by_rack).await?;

    // An admin who sees a part deletes and fences no host with more on it.
    let mut part = User::at(&fleet, "server", &rita)?;
    let request = v1::DeleteHostRequest {
        name: "hosts/host-a".to_owned(),
        give_up_vms: true,
    };
    refused(
        heard(part.hosts.delete_host(request).await),
        Reason::Permission,
    );
    // Agents do not know what belongs to whom.
    let mut at_agent = User::at(&fleet, "host-a", &bob)?;
    let list = at_agent.vms.list_vms(v1::ListVmsRequest::default()).await;
    let error = refused(heard(list), Reason::Permission);
    ensure!(error.metadata["advice"].contains("server"), "{error:?}");
    ensure!(sees_all.list().await? == ["vms/db", "vms/web"]);
    fleet.finish(&admin).await
}
