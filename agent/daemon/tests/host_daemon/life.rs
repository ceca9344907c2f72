//! VMs made, found again, lost and deleted; admission; metrics.

use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use slat_daemon::HostError;
use slat_proto::{Reason, v1};

use crate::rig::{MIB, Rig, SOON, answer, freeze, kill, reason, until};

#[tokio::test]
async fn a_vm_is_made_listed_and_deleted() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    assert_eq!(made.state(), v1::vm::State::Created);
    assert_eq!(made.host, "hosts/a");
    let pid = rustix::process::Pid::from_raw(made.pid.cast_signed()).unwrap();
    let session = rustix::process::getsid(Some(pid)).unwrap();
    assert_eq!(
        session, pid,
        "a signal to the agent's terminal does not reach it"
    );
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    rig.create("db", 16 * MIB).await.unwrap();
    assert_eq!(rig.names().await, ["vms/db", "vms/web"]);
    assert_eq!(rig.used().await, 32 * MIB);

    let page = v1::ListVmsRequest {
        page_size: 1,
        ..Default::default()
    };
    let first = answer(rig.vms().list_vms(page.clone()).await).unwrap();
    let second = v1::ListVmsRequest {
        page_token: first.next_page_token,
        ..page
    };
    let second = answer(rig.vms().list_vms(second).await).unwrap();
    assert_eq!(
        (first.vms[0].name.as_str(), second.vms[0].name.as_str()),
        ("vms/db", "vms/web")
    );
    assert_eq!(second.next_page_token, "");

    let started = answer(
        rig.vms()
            .start_vm(v1::StartVmRequest {
                name: "vms/web".into(),
                ..Default::default()
            })
            .await,
    )
    .unwrap();
    assert_eq!(started.state(), v1::vm::State::Running);
    let resumed = rig
        .vms()
        .resume_vm(v1::ResumeVmRequest {
            name: "vms/web".into(),
            ..Default::default()
        })
        .await;
    assert_eq!(
        reason(answer(resumed)),
        Reason::StaleEpoch,
        "the VM's own refusal is passed on"
    );

    rig.delete("web").await.unwrap();
    assert!(
        !rig.path("web").exists(),
        "the directory is gone when DeleteVm returns"
    );
    assert!(
        rustix::process::test_kill_process(pid).is_err(),
        "and the process"
    );
    assert_eq!(reason(rig.get("web").await), Reason::NoSuchVm);
    assert_eq!(reason(rig.delete("web").await), Reason::NoSuchVm);
    assert_eq!(rig.used().await, 16 * MIB);
    rig.create("web", 16 * MIB).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_made_leaves_nothing() {
    let rig = Rig::started().await;
    let error = rig.create("quits", 16 * MIB).await.unwrap_err();
    assert_eq!(error.reason, Reason::Internal);
    assert!(
        error.message.contains("no KVM here, says the fake"),
        "{error}"
    );
    assert!(error.message.contains("it exited with code 3"), "{error}");
    let error = rig.create("dies", 16 * MIB).await.unwrap_err();
    assert_eq!(error.reason, Reason::VmProcessDied);
    assert!(
        error.message.ends_with(
            "ended while the VM was made: it ended by signal 9 (SIGKILL); its log ends with: too much, says the fake"
        ),
        "{error}"
    );
    assert_eq!(error.metadata["signal"], "9");
    assert!(error.metadata["log"].contains("too much"), "{error}");
    assert!(!error.metadata["advice"].contains("delete"), "{error}");
    let error = rig.prepare("m1", "dies", 16 * MIB).await.unwrap_err();
    assert!(
        error
            .message
            .contains("ended while the VM was announced: it ended by signal 9"),
        "{error}"
    );
    assert_eq!(
        reason(rig.create("refuses", 16 * MIB).await),
        Reason::KvmIoctl
    );
    assert_eq!(
        reason(rig.create("Bad_Name", 16 * MIB).await),
        Reason::BadParameter
    );
    assert_eq!(
        reason(rig.create("odd", 16 * MIB + 1).await),
        Reason::BadParameter
    );
    assert_eq!(
        std::fs::read_dir(rig.path("x").parent().unwrap())
            .unwrap()
            .count(),
        0
    );
    assert_eq!(rig.used().await, 0);
    assert!(rig.names().await.is_empty());
}

#[tokio::test]
async fn a_program_that_is_missing_is_named() {
    let mut rig = Rig::new();
    let mut config = rig.config();
    config.vm_program = vec!["/nonexistent/slat".into(), "vm".into()];
    rig.start_with(config).await.unwrap();
    let error = rig.create("web", 16 * MIB).await.unwrap_err();
    assert!(error.message.contains("/nonexistent/slat"), "{error}");
    assert!(!rig.path("web").exists());
}

#[tokio::test]
async fn a_cgroup_that_was_named_and_cannot_be_had_ends_the_agent() {
    let mut rig = Rig::new();
    let mut config = rig.config();
    config.vm_cgroup = slat_daemon::VmCgroup::At("/nonexistent/slat".into());
    let error = rig.start_with(config).await.unwrap_err();
    assert!(matches!(error, HostError::Config { .. }));
    assert!(error.to_string().contains("/nonexistent/slat: "), "{error}");
    // Nothing holds the state directory.
    rig.start().await;
}

#[tokio::test]
async fn what_the_agent_inherited_stays_with_it() {
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let own = std::fs::read_link(format!("/proc/self/fd/{}", write.as_raw_fd())).unwrap();
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let fds: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", made.pid))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .collect();
    assert!(!fds.is_empty() && !fds.contains(&own), "{own:?} in {fds:?}");
}

#[tokio::test]
async fn memory_is_reserved_before_it_is_used() {
    let rig = Rig::started().await;
    rig.create("web", 200 * MIB).await.unwrap();
    let error = rig.create("db", 100 * MIB).await.unwrap_err();
    assert_eq!(error.reason, Reason::NoMemory);
    assert_eq!(error.metadata["needed_bytes"], (100 * MIB).to_string());
    assert_eq!(error.metadata["free_bytes"], (56 * MIB).to_string());
    assert!(!rig.path("db").exists());

    // Slots added later count as well, and a refused change gives its part back.
    let grow = |mib: u64, expected_generation: u64| {
        let slot = v1::Slot {
            slot: 5,
            base_gfn: 1 << 30,
            pages: mib * 256,
            ..Default::default()
        };
        let create = v1::slot_change::Create { slot: Some(slot) };
        let change = v1::SlotChange {
            change: Some(v1::slot_change::Change::Create(create)),
        };
        let request = v1::UpdateSlotsRequest {
            vm: "vms/web".into(),
            changes: vec![change],
            expected_generation,
            ..Default::default()
        };
        let mut memory = rig.memory();
        async move { answer(memory.update_slots(request).await) }
    };
    assert_eq!(reason(grow(57, 0).await), Reason::NoMemory);
    assert_eq!(reason(grow(40, 9).await), Reason::StaleGeneration);
    assert_eq!(rig.used().await, 200 * MIB);
    grow(40, 0).await.unwrap();
    assert_eq!(rig.used().await, 240 * MIB);

    let mut request = v1::CreateVmRequest {
        vm_id: "db".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 16 * MIB,
            vcpus: 1,
            ..Default::default()
        }),
        validate_only: true,
        ..Default::default()
    };
    answer(rig.vms().create_vm(request.clone()).await).unwrap();
    assert_eq!(
        rig.names().await,
        ["vms/web"],
        "validate_only builds nothing"
    );
    request.vm_id = "web".into();
    assert_eq!(
        reason(answer(rig.vms().create_vm(request).await)),
        Reason::VmExists
    );
}

#[tokio::test]
async fn a_backend_that_is_not_here_is_refused() {
    use slat_proto::model::BackendKind;
    let rig = Rig::started().await;
    let spec = v1::VmSpec {
        memory_bytes: 16 * MIB,
        vcpus: 1,
        backend: BackendKind::Kvm.to_message().into(),
        ..Default::default()
    };
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(spec),
        ..Default::default()
    };
    assert_eq!(
        reason(answer(rig.vms().create_vm(request).await)),
        Reason::CapabilityMissing
    );
}

#[tokio::test]
async fn a_vm_for_another_host_is_refused() {
    let rig = Rig::started().await;
    let mut request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 16 * MIB,
            vcpus: 1,
            ..Default::default()
        }),
        host: "hosts/b".into(),
        ..Default::default()
    };
    let error = answer(rig.vms().create_vm(request.clone()).await).unwrap_err();
    assert_eq!(error.reason, Reason::BadParameter);
    assert_eq!(error.metadata["field"], "host");
    assert_eq!(rig.names().await, [""; 0], "nothing was made");
    request.host = "hosts/a".into();
    request.validate_only = true;
    answer(rig.vms().create_vm(request).await).unwrap();
}

#[tokio::test]
async fn an_agent_that_restarts_finds_its_vms() {
    let mut rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    rig.send("m1", "web").await.unwrap();
    rig.stop().await;
    assert_eq!(
        rig.dir("web").living_pid().unwrap(),
        Some(made.pid),
        "no VM ends with its agent"
    );

    rig.start().await;
    let found = rig.get("web").await.unwrap();
    assert_eq!((found.pid, found.uid), (made.pid, made.uid));
    assert_eq!(rig.used().await, 16 * MIB);
    assert_eq!(
        rig.side("m1", v1::TransferRole::Source)
            .await
            .unwrap()
            .phase(),
        v1::TransferPhase::Precopy
    );

    // The end of a process that another agent started is seen too.
    kill(made.pid);
    let lost = rig.becomes("web", v1::vm::State::Lost).await;
    assert_eq!(lost.spec.unwrap().memory_bytes, 16 * MIB);
    rig.delete("web").await.unwrap();
}

#[tokio::test]
async fn a_killed_vm_is_lost_at_once_and_can_be_deleted() {
    let mut rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let mut watch = rig
        .vms()
        .watch_vm(v1::WatchVmRequest {
            name: "vms/web".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().state(),
        v1::vm::State::Created
    );
    let killed = Instant::now();
    kill(made.pid);
    let lost = rig.becomes("web", v1::vm::State::Lost).await;
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "seen by the process's end, not by a poll"
    );
    assert_eq!((lost.pid, lost.epoch, lost.uid), (0, 1, made.uid));
    assert!(lost.mmu_stats.is_none());
    assert_eq!(
        lost.state_message,
        "its process died, and its memory with it: it ended by signal 9 (SIGKILL)"
    );
    assert_eq!(rig.used().await, 0, "a dead process holds no memory");
    let end = tokio::time::timeout(SOON, watch.message()).await.unwrap();
    assert_eq!(
        reason(end.map_err(slat_proto::ApiError::from)),
        Reason::VmUnreachable
    );
    let started = rig
        .vms()
        .start_vm(v1::StartVmRequest {
            name: "vms/web".into(),
            ..Default::default()
        })
        .await;
    assert_eq!(reason(answer(started)), Reason::VmState);
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    assert_eq!(rig.names().await, ["vms/web"]);

    rig.stop().await;
    rig.start().await;
    let lost = rig.get("web").await.unwrap();
    assert_eq!(lost.state(), v1::vm::State::Lost);
    assert_eq!(
        lost.spec.unwrap().memory_bytes,
        16 * MIB,
        "known over a restart"
    );
    let mut watch = rig
        .vms()
        .watch_vm(v1::WatchVmRequest {
            name: "vms/web".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().state(),
        v1::vm::State::Lost
    );
    rig.delete("web").await.unwrap();
    assert!(!rig.path("web").exists());
    assert!(
        tokio::time::timeout(SOON, watch.message())
            .await
            .unwrap()
            .unwrap()
            .is_none(),
        "ends with the VM"
    );
}

#[tokio::test]
async fn a_silent_vm_holds_nobody_up() {
    let mut rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    rig.create("db", 16 * MIB).await.unwrap();
    let pid = rustix::process::Pid::from_raw(made.pid.cast_signed()).unwrap();
    freeze(made.pid).await;
    assert_eq!(
        rig.names().await,
        ["vms/db", "vms/web"],
        "listed as last seen"
    );
    assert!(
        rig.scrape("/metrics")
            .await
            .contains("slat_vm_info{vm=\"web\"")
    );
    let unknown = rig.side("m1", v1::TransferRole::Source).await;
    assert_eq!(reason(unknown), Reason::NoSuchMigration, "its disk says so");
    let journal = rig.path_of(&made.uid).join("journal");
    let written = std::fs::read(&journal).unwrap();
    rig.stop().await;
    let mut spoiled = written.clone();
    spoiled[3] ^= 1;
    std::fs::write(&journal, spoiled).unwrap();
    rig.start().await;
    let unknown = rig.side("m1", v1::TransferRole::Source).await;
    assert_eq!(
        reason(unknown),
        Reason::VmUnreachable,
        "it may know; nobody says that it does not"
    );
    std::fs::write(&journal, written).unwrap();
    let unknown = rig.side("m1", v1::TransferRole::Source).await;
    assert_eq!(reason(unknown), Reason::NoSuchMigration, "read again");
    assert_eq!(
        rig.used().await,
        32 * MIB,
        "what it was made with is reserved still"
    );
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert_eq!(rig.get("web").await.unwrap().pid, made.pid);
}

#[tokio::test]
async fn a_second_agent_is_refused() {
    let mut rig = Rig::started().await;
    let mut other = Rig::new();
    let refused = other.start_with(rig.config()).await.unwrap_err();
    assert!(
        matches!(refused, HostError::StateDirInUse { pid: Some(pid), .. } if pid == std::process::id()),
        "{refused}"
    );
    rig.stop().await;
    rig.start().await;
}

#[tokio::test]
async fn a_process_that_never_got_its_vm_is_ended() {
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
    rig.start().await;
    assert!(rig.names().await.is_empty());
    assert!(!rig.path("web").exists());
    tokio::time::timeout(SOON, child.wait())
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn metrics_say_what_is_known_and_nothing_else() {
    let mut rig = Rig::new();
    let mut config = rig.config();
    config.render = Some(std::sync::Arc::new(|| "process_metric 1\n".to_owned()));
    rig.start_with(config).await.unwrap();
    rig.create("web", 16 * MIB).await.unwrap();
    rig.send("m1", "web").await.unwrap();
    let text = rig.scrape("/metrics").await;
    for line in [
        "process_metric 1",
        "slat_build_info{version=\"9.9.9\"} 1",
        "slat_page_faults_total{vm=\"web\",backend=\"software\",source=\"unknown\",type=\"taken\"} 7",
        "slat_vm_info{vm=\"web\",state=\"created\",backend=\"software\"} 1",
        "slat_migration_remaining_bytes{vm=\"web\",direction=\"out\"} 77",
        "slat_host_memory_bytes{kind=\"used\"} 16777216",
    ] {
        assert!(
            text.lines().any(|seen| seen == line),
            "{line} is not in\n{text}"
        );
    }
    for absent in ["kvm_", "remote_tlb", "memstress", "type=\"fixed\""] {
        assert!(!text.contains(absent), "{absent} is in\n{text}");
    }
    assert!(rig.scrape("/healthz").await.ends_with("ok\n"));
}

#[tokio::test]
async fn memory_calls_are_passed_on() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    let vm = "vms/web".to_owned();
    let mut memory = rig.memory();
    let slots = answer(
        memory
            .list_slots(v1::ListSlotsRequest {
                vm: vm.clone(),
                ..Default::default()
            })
            .await,
    )
    .unwrap();
    assert_eq!(slots.slots[0].pages, 4096);
    let request = v1::InvalidateMemoryRequest {
        vm: vm.clone(),
        range: None,
        ..Default::default()
    };
    assert_eq!(
        answer(memory.invalidate_memory(request).await)
            .unwrap()
            .pages,
        5
    );
    let request = v1::HarvestDirtyPagesRequest {
        vm: vm.clone(),
        ..Default::default()
    };
    assert_eq!(
        answer(memory.harvest_dirty_pages(request).await)
            .unwrap()
            .batch,
        4
    );
    let request = v1::DeleteDirtyCursorRequest {
        vm: vm.clone(),
        ..Default::default()
    };
    assert_eq!(
        reason(answer(memory.delete_dirty_cursor(request).await)),
        Reason::NoSuchCursor
    );
    assert_eq!(
        answer(
            memory
                .digest_memory(v1::DigestMemoryRequest {
                    vm,
                    ..Default::default()
                })
                .await
        )
        .unwrap()
        .digest,
        "00"
    );
    let request = v1::ListSlotsRequest {
        vm: "vms/none".into(),
        ..Default::default()
    };
    assert_eq!(
        reason(answer(memory.list_slots(request).await)),
        Reason::NoSuchVm
    );
}

#[tokio::test]
async fn a_create_that_fails_where_no_lock_can_be_made_leaves_nothing() {
    let rig = Rig::started().await;
    let failed = rig.create("quits-unlocked", 16 * MIB).await;
    assert_eq!(reason(failed), Reason::Internal);
    let left: Vec<_> = std::fs::read_dir(rig.path_of("x").parent().unwrap())
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(rig.used().await, 0);
}
