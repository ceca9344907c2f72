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
        disk_up: true,
        fenced: false,
        huge_pages: Some(&v1::HugePages {
            pools: vec![v1::HugePagePool {
                page_bytes: 2 << 20,
                node: Some(1),
                total_pages: 9,
                free_pages: 4,
            }],
        }),
    })
}

#[test]
fn flushes_are_told_apart_by_cause_and_scope() {
    let stats = v1::MmuStats {
        huge_pages_split: Some(3),
        read_only_writes: Some(2),
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
        "slat_huge_pages_split_total{vm=\"a\",backend=\"software\",source=\"unknown\"} 3",
        "slat_read_only_writes_total{vm=\"a\",backend=\"software\"} 2",
        "slat_mmu_flushes_total{vm=\"a\",backend=\"software\",source=\"unknown\",cause=\"dirty_log\",scope=\"range\"} 5",
        "slat_mmu_flushes_total{vm=\"a\",backend=\"software\",source=\"unknown\",cause=\"dirty_log\",scope=\"all\"} 0",
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
        source: v1::CounterSource::KvmStatistics.into(),
        gaps: vec![v1::CounterGap::RangeFlushes.into()],
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Kvm, stats)], &[]);
    for line in [
        "slat_page_faults_total{vm=\"a\",backend=\"kvm\",source=\"kvm_statistics\",type=\"taken\"} 7",
        "kvm_page_faults_total{vm=\"a\",type=\"taken\"} 7",
        "slat_counter_gap{vm=\"a\",backend=\"kvm\",source=\"kvm_statistics\",gap=\"range_flushes\"} 1",
        "kvm_remote_tlb_flushes_total{vm=\"a\"} 0",
        "kvm_stat_supported{vm=\"a\",stat=\"pf_taken\"} 1",
        "kvm_stat_supported{vm=\"a\",stat=\"pf_fixed\"} 0",
        "slat_vm_info{vm=\"a\",state=\"running\",backend=\"kvm\"} 1",
        "slat_host_memory_bytes{kind=\"free\"} 6",
        "slat_host_huge_pages{kind=\"total\",node=\"1\",page_bytes=\"2097152\"} 9",
        "slat_host_huge_pages{kind=\"free\",node=\"1\",page_bytes=\"2097152\"} 4",
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
fn what_a_tracepoint_counted_is_labelled_and_is_no_statistic_of_kvms() {
    let stats = v1::MmuStats {
        faults_taken: Some(7),
        exits: Some(9),
        source: v1::CounterSource::KvmStatistics.into(),
        faults_source: v1::CounterSource::Tracepoint.into(),
        gaps: vec![v1::CounterGap::FaultOutcomes.into()],
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Kvm, stats)], &[]);
    for line in [
        "slat_page_faults_total{vm=\"a\",backend=\"kvm\",source=\"tracepoint\",type=\"taken\"} 7",
        "slat_vm_exits_total{vm=\"a\",backend=\"kvm\",source=\"kvm_statistics\"} 9",
        "slat_counter_gap{vm=\"a\",backend=\"kvm\",source=\"kvm_statistics\",gap=\"fault_outcomes\"} 1",
        "kvm_stat_supported{vm=\"a\",stat=\"pf_taken\"} 0",
    ] {
        assert!(text.lines().any(|seen| seen == line), "{line} in\n{text}");
    }
    assert!(!text.contains("kvm_page_faults_total{"), "{text}");
}

#[test]
fn software_vms_have_no_kvm_families() {
    let stats = v1::MmuStats {
        faults_taken: Some(7),
        table_pages: Some(3),
        source: v1::CounterSource::SoftwareMmu.into(),
        ..Default::default()
    };
    let text = text(&[vm(v1::Backend::Software, stats)], &[]);
    assert!(
        text.contains("slat_table_pages{vm=\"a\",backend=\"software\",source=\"software_mmu\"} 3")
    );
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
