//! What is rendered of VMs and sides, and what is left out.

use super::*;

fn vm(backend: v1::Backend, stats: v1::MmuStats) -> v1::Vm {
    v1::Vm {
        name: "vms/a".into(),
        state: v1::vm::State::Running.into(),
        spec: Some(v1::VmSpec {
            backend: backend.into(),
            ..Default::default()
        }),
        mmu_stats: Some(stats),
        ..Default::default()
    }
}

fn text(vms: &[v1::Vm], transfers: &[v1::Transfer]) -> String {
    render(&Seen {
        version: "1.2.3",
        memory_total: 10,
        memory_used: 4,
        vms,
        transfers,
        used: &BTreeMap::new(),
    })
}

#[test]
fn flushes_are_told_apart_by_cause_and_scope() {
    let stats = v1::MmuStats {
        huge_pages_split: Some(3),
        flushes: vec![v1::TlbFlushCount {
            cause: "dirty_log".into(),
            ranges: 5,
            range_pages: 99,
            alls: 0,
        }],
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Software, stats)], &[]);
    for line in [
        "slat_huge_pages_split_total{vm=\"a\",backend=\"software\"} 3",
        "slat_mmu_flushes_total{vm=\"a\",backend=\"software\",cause=\"dirty_log\",scope=\"range\"} 5",
        "slat_mmu_flushes_total{vm=\"a\",backend=\"software\",cause=\"dirty_log\",scope=\"all\"} 0",
    ] {
        assert!(text.lines().any(|seen| seen == line), "{line} in\n{text}");
    }
    assert!(!text.contains("slat_huge_pages_recovered_total"));
}

#[test]
fn what_is_not_offered_is_absent_and_said_to_be() {
    let stats = v1::MmuStats {
        faults_taken: Some(7),
        remote_tlb_flushes: Some(0),
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Kvm, stats)], &[]);
    for line in [
        "slat_page_faults_total{vm=\"a\",backend=\"kvm\",type=\"taken\"} 7",
        "kvm_page_faults_total{vm=\"a\",type=\"taken\"} 7",
        "kvm_remote_tlb_flushes_total{vm=\"a\"} 0",
        "kvm_stat_supported{vm=\"a\",stat=\"pf_taken\"} 1",
        "kvm_stat_supported{vm=\"a\",stat=\"pf_fixed\"} 0",
        "slat_vm_info{vm=\"a\",state=\"running\",backend=\"kvm\"} 1",
        "slat_host_memory_bytes{kind=\"free\"} 6",
        "slat_build_info{version=\"1.2.3\"} 1",
    ] {
        assert!(
            text.lines().any(|seen| seen == line),
            "{line} is not in\n{text}"
        );
    }
    for absent in [
        "type=\"fixed\"",
        "kvm_exits_total",
        "slat_table_pages",
        "memstress",
        "slat_migration",
    ] {
        assert!(!text.contains(absent), "{absent} is in\n{text}");
    }
}

#[test]
fn software_vms_have_no_kvm_families() {
    let stats = v1::MmuStats {
        faults_taken: Some(7),
        table_pages: Some(3),
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Software, stats)], &[]);
    assert!(text.contains("slat_table_pages{vm=\"a\",backend=\"software\"} 3"));
    assert!(!text.contains("kvm_"), "{text}");
}

#[test]
fn each_family_is_announced_once_and_stays_together() {
    let stats = v1::MmuStats {
        faults_taken: Some(1),
        faults_fixed: Some(2),
        ..Default::default()
    };
    let mut other = vm(v1::Backend::Kvm, stats.clone());
    other.name = "vms/b".into();
    let text = text(&[vm(v1::Backend::Kvm, stats), other], &[]);
    let mut announced = std::collections::BTreeSet::new();
    let mut current = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            current = rest.split(' ').next().unwrap();
            assert!(announced.insert(current), "{current} twice");
        } else if !line.starts_with('#') {
            assert_eq!(line.split(['{', ' ']).next().unwrap(), current);
        }
    }
    assert!(announced.contains("slat_page_faults_total"));
}

#[test]
fn only_running_sides_are_shown() {
    let progress = v1::MigrationProgress {
        remaining_bytes: 5,
        pages_zero: 2,
        iteration: 3,
        ..Default::default()
    };
    let side = |phase: v1::TransferPhase| v1::Transfer {
        vm: "vms/a".into(),
        migration: "migrations/m".into(),
        role: v1::TransferRole::Source.into(),
        phase: phase.into(),
        progress: Some(progress.clone()),
        ..Default::default()
    };
    let running = text(&[], &[side(v1::TransferPhase::Precopy)]);
    assert!(
        running.contains("slat_migration_remaining_bytes{vm=\"a\",direction=\"out\"} 5"),
        "{running}"
    );
    assert!(
        running
            .contains("slat_migration_bytes_total{vm=\"a\",direction=\"out\",kind=\"zero\"} 8192")
    );
    assert!(!running.contains("expected_downtime"), "unset is absent");
    assert!(!text(&[], &[side(v1::TransferPhase::Failed)]).contains("slat_migration"));
}
