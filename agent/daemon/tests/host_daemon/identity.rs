//! A VM is its uid: directories of both layouts, names that collide, what a call means.

use slat_proto::{
    ApiError, Reason,
    transport::{Address, connect},
    v1::{self, TransferPhase as Phase, TransferRole as Role, vm_service_client::VmServiceClient},
};
use slat_record::journal::{Entry, Journal};

use crate::rig::{MIB, Rig, answer, kill, reason, until};

fn by_uid(uid: &str) -> v1::GetVmRequest {
    v1::GetVmRequest {
        uid: uid.into(),
        ..Default::default()
    }
}

impl Rig {
    async fn get_uid(&self, uid: &str) -> Result<v1::Vm, ApiError> {
        answer(self.vms().get_vm(by_uid(uid)).await)
    }

    async fn delete_uid(&self, uid: &str) -> Result<(), ApiError> {
        let request = v1::DeleteVmRequest {
            uid: uid.into(),
            ..Default::default()
        };
        answer(self.vms().delete_vm(request).await).map(drop)
    }

    async fn uids(&self) -> Vec<String> {
        let list = answer(self.vms().list_vms(v1::ListVmsRequest::default()).await).unwrap();
        list.vms.into_iter().map(|vm| vm.uid).collect()
    }

    /// A VM that was given away, whose process keeps the frozen copy.
    pub(crate) async fn given_away(&self, vm: &str, migration: &str) -> v1::Vm {
        let made = self.create(vm, 16 * MIB).await.unwrap();
        let side = self.send(migration, vm).await.unwrap();
        assert_eq!(side.phase(), Phase::Relinquished);
        until(async || {
            let seen = self.get_uid(&made.uid).await.unwrap();
            (seen.state() == v1::vm::State::Relinquished).then_some(())
        })
        .await;
        // What a create goes by is the last word heard, not the last one said.
        let source = async || {
            self.leftovers()
                .await
                .iter()
                .any(|left| left.uid == made.uid)
        };
        until(async || source().await.then_some(())).await;
        made
    }
}

/// Directories that dead processes of one name left.
fn leave_lost(rig: &Rig, folder: &str, vm: &str, uid: &str) {
    let dir = rig.dead_dir(folder);
    let mut journal = Journal::open(&dir.journal()).unwrap();
    let created = Entry::Created {
        vm: vm.into(),
        uid: uid.into(),
        epoch: 1,
    };
    journal.append(&created).unwrap();
}

#[tokio::test]
async fn a_new_vm_lives_in_the_directory_of_its_uid() {
    let mut rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let dir = rig.path_of(&made.uid);
    assert!(dir.join("vm.sock").exists());
    assert_eq!(rig.get_uid(&made.uid).await.unwrap().name, "vms/web");
    rig.prepare("m1", "db", 16 * MIB).await.unwrap();
    assert!(rig.path_of("u-db").join("vm.sock").exists());
    rig.stop().await;
    rig.start().await;
    assert_eq!(rig.get("web").await.unwrap().pid, made.pid);
    rig.delete_uid(&made.uid).await.unwrap();
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_living_vm_in_a_directory_of_its_name_is_found_again() {
    let mut rig = Rig::new();
    let dir = rig.dead_dir("web");
    let program = crate::fake::program();
    let mut child = tokio::process::Command::new(&program[0])
        .args(&program[1..])
        .arg("--dir")
        .arg(dir.path())
        .args(["--vm", "web", "--host", "a", "--data-ip", "127.0.0.1"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until(async || dir.socket().exists().then_some(())).await;
    let mut process = VmServiceClient::new(connect(&Address::Unix(dir.socket())).unwrap());
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 16 * MIB,
            vcpus: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    let made = answer(process.create_vm(request).await).unwrap();
    assert_eq!(made.uid, "uid-1");

    rig.start().await;
    let found = rig.get_uid("uid-1").await.unwrap();
    assert_eq!((found.pid, found.name.as_str()), (made.pid, "vms/web"));
    assert_eq!(rig.get("web").await.unwrap().uid, "uid-1");
    assert_eq!(rig.used().await, 16 * MIB);
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    rig.delete("web").await.unwrap();
    assert!(!dir.path().exists());
    drop(child.wait().await);
}

#[tokio::test]
async fn what_remains_of_one_vm_stands_in_no_others_way() {
    let mut rig = Rig::started().await;
    let old = rig.given_away("web", "gone-1").await;
    let new = rig.create("web", 16 * MIB).await.unwrap();
    assert_ne!(new.uid, old.uid);
    for _ in 0..2 {
        // By name it is the VM; what was given away is meant only by its uid.
        assert_eq!(rig.get("web").await.unwrap().uid, new.uid);
        let given = rig.get_uid(&old.uid).await.unwrap();
        assert_eq!(given.state(), v1::vm::State::Relinquished);
        let mut uids = rig.uids().await;
        uids.sort();
        let mut both = [old.uid.clone(), new.uid.clone()];
        both.sort();
        assert_eq!(uids, both, "neither hides the other");
        let metrics = rig.scrape("/metrics").await;
        let info = |line: &&str| line.starts_with("slat_vm_info{vm=\"web\"");
        let shown: Vec<&str> = metrics.lines().filter(info).collect();
        assert_eq!(shown.len(), 1, "a series twice is no metric");
        assert!(shown[0].contains("created"), "{shown:?}");
        // Each process may go on, whatever the agent knew.
        rig.stop().await;
        rig.start().await;
    }
    rig.release("gone-1", Role::Source).await.unwrap();
    assert!(!rig.path_of(&old.uid).exists());
    assert_eq!(rig.get("web").await.unwrap().pid, new.pid);
}

#[tokio::test]
async fn a_call_names_one_vm_or_is_refused() {
    let mut rig = Rig::new();
    leave_lost(&rig, "one", "web", "u-1");
    leave_lost(&rig, "u-2", "web", "u-2");
    rig.start().await;
    let conflict = rig.get("web").await.unwrap_err();
    assert_eq!(conflict.reason, Reason::NameConflict);
    assert_eq!(conflict.metadata["uids"], "u-1,u-2");
    assert_eq!(conflict.metadata["hosts"], "hosts/a,hosts/a");
    assert_eq!(reason(rig.delete("web").await), Reason::NameConflict);
    assert_eq!(
        reason(rig.describe("m1", "web", 1).await),
        Reason::NameConflict
    );
    assert_eq!(rig.uids().await, ["u-1", "u-2"], "both are shown");

    let both = v1::GetVmRequest {
        name: "vms/db".into(),
        ..by_uid("u-1")
    };
    let error = answer(rig.vms().get_vm(both).await).unwrap_err();
    assert_eq!(error.reason, Reason::NoSuchVm);
    assert_eq!(error.metadata["vm"], "vms/db");
    assert_eq!(error.metadata["uid"], "u-1");
    assert_eq!(error.metadata["found_vm"], "vms/web");
    assert_eq!(reason(rig.get_uid("u-3").await), Reason::NoSuchVm);
    assert_eq!(reason(rig.get_uid("../u").await), Reason::BadParameter);

    rig.delete_uid("u-1").await.unwrap();
    assert_eq!(rig.get("web").await.unwrap().uid, "u-2");
    let elsewhere = v1::GetVmRequest {
        name: "vms/web".into(),
        host: "hosts/b".into(),
        ..Default::default()
    };
    let elsewhere = answer(rig.vms().get_vm(elsewhere).await);
    assert_eq!(reason(elsewhere), Reason::NoSuchVm);
}

#[tokio::test]
async fn every_answer_and_every_side_says_whose_it_is() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let side = rig.send("m1", "web").await.unwrap();
    assert_eq!(side.vm_uid, made.uid);
    let request = v1::StartOutgoingRequest {
        migration: "migrations/m2".into(),
        vm: "vms/web".into(),
        vm_uid: "another".into(),
        ..Default::default()
    };
    let other = answer(rig.transfers().start_outgoing(request).await);
    assert_eq!(reason(other), Reason::NoSuchVm);
    let request = v1::DescribeOutgoingRequest {
        migration: "migrations/m2".into(),
        vm: "vms/web".into(),
        epoch: 1,
        vm_uid: "another".into(),
    };
    let other = answer(rig.transfers().describe_outgoing(request).await);
    assert_eq!(reason(other), Reason::NoSuchVm);
    // One migration is about one VM.
    rig.create("db", 16 * MIB).await.unwrap();
    let twice = rig.send("m1", "db").await.unwrap_err();
    assert_eq!(twice.reason, Reason::MigrationExists);
    assert_eq!(twice.metadata["uid"], made.uid);

    kill(made.pid);
    rig.becomes("web", v1::vm::State::Lost).await;
    let side = rig.side("m1", Role::Source).await.unwrap();
    assert_eq!((side.phase(), side.vm_uid), (Phase::Failed, made.uid));
}
