//! What guest memory is made of, end to end: asked for, refused by name, reported, and carried by a
//! migration.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, MemoryBacking, MigrationPhase, migration_params::Verify},
};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, patient, usual, verified},
    reserved::Reserved,
    scene,
    slots::{create, delete, discard, update},
    wait::eventually,
};

use super::cli::slat;

slat_tests::on_each_backend!(
    the_usual_memory_says_what_it_is_made_of,
    small_memory_stays_small_wherever_it_goes,
    thp_is_had_or_refused_as_the_host_is_set,
    memory_is_populated_before_the_vm_starts,
    a_node_goes_along_and_one_that_is_not_there_is_refused,
);

/// Runs a test that takes reserved pages of so many KiB, or says why not.
fn with_pages(
    backend: Backend,
    (kib, pages): (u64, u64),
    test: impl AsyncFnOnce(&mut Fleet, &Reserved) -> anyhow::Result<()>,
) {
    // Outside the fleet: its processes are gone before the pages are.
    match Reserved::take(kib, pages) {
        Ok(reserved) => scene::run(Layout::two(backend), async |fleet: &mut Fleet| {
            test(fleet, &reserved).await
        }),
        Err(why) => println!("SKIPPED: {why:#}"),
    }
}

macro_rules! with_reserved_pages {
    ($($name:ident: $pages:literal;)*) => {
        mod reserved_kvm {
            $(#[test]
            fn $name() {
                super::with_pages(slat_proto::v1::Backend::Kvm, (2048, $pages), super::$name);
            })*
        }
        mod reserved_software {
            $(#[test]
            fn $name() {
                super::with_pages(slat_proto::v1::Backend::Software, (2048, $pages), super::$name);
            })*
        }
    };
}

with_reserved_pages! {
    reserved_memory_moves_both_ways: 64;
    too_few_pages_are_refused_before_anything_moves: 40;
    slots_are_of_the_vms_pages: 36;
}

#[test]
fn a_vm_of_giant_pages_runs_and_a_second_is_refused() {
    let backend = scene::best_backend();
    with_pages(backend, (1 << 20, 1), async |fleet, reserved| {
        let spec = v1::VmSpec {
            memory_bytes: 1 << 30,
            backing: MemoryBacking::Hugetlb1g.into(),
            guest: None,
            ..usual(fleet.backend())
        };
        let vm = fleet.run_vm("web", "host-a", spec.clone()).await?;
        ensure!(pages(&vm) == (0, 0, 1 << 30), "{vm:#?}");
        ensure!(reserved.free() == 0, "{} are free", reserved.free());
        let error = make(fleet, "two", spec)
            .await
            .err()
            .context("there is none")?;
        ensure!(error.reason == Reason::NoHugePages, "{error:?}");
        ensure!(
            error.metadata["page_bytes"] == (1_u64 << 30).to_string(),
            "{error:?}"
        );
        fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
    });
}

/// 64 MiB of it.
fn of(backend: Backend, backing: MemoryBacking) -> v1::VmSpec {
    v1::VmSpec {
        backing: backing.into(),
        ..usual(backend)
    }
}

/// Bytes in pages of 4 KiB, 2 MiB and 1 GiB.
fn pages(vm: &v1::Vm) -> (u64, u64, u64) {
    let stats = vm.mmu_stats.clone().unwrap_or_default();
    (
        stats.backing_4k_bytes.unwrap_or(u64::MAX),
        stats.backing_2m_bytes.unwrap_or(u64::MAX),
        stats.backing_1g_bytes.unwrap_or(u64::MAX),
    )
}

fn made_of(vm: &v1::Vm) -> MemoryBacking {
    vm.spec
        .as_ref()
        .map_or(MemoryBacking::Unspecified, v1::VmSpec::backing)
}

async fn make(fleet: &Fleet, id: &str, spec: v1::VmSpec) -> Result<v1::Vm, ApiError> {
    let request = v1::CreateVmRequest {
        vm_id: id.into(),
        spec: Some(spec),
        host: "hosts/host-a".into(),
        validate_only: false,
    };
    let mut vms = fleet.vms(&fleet.server());
    Ok(vms.create_vm(request).await?.into_inner())
}

async fn the_usual_memory_says_what_it_is_made_of(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    ensure!(made_of(&vm) == MemoryBacking::Auto, "{vm:#?}");
    // The target makes all of it ahead of the data.
    fleet
        .migrate_and_wait(&vm.name, "host-b", patient())
        .await?;
    let there = fleet.runs_soundly_on(&vm.name, "host-b").await?;
    ensure!(made_of(&there) == MemoryBacking::Auto, "{there:#?}");
    let (small, huge, giant) = pages(&there);
    ensure!(small + huge == 64 * MIB && giant == 0, "{there:#?}");
    // A fall-back is said, and nothing is said without one.
    let fell_back = small >= 2 * MIB;
    ensure!(
        fell_back != there.backing_shortfall.is_empty(),
        "{there:#?}"
    );
    if huge == 0 {
        eprintln!(
            "SKIPPED: the kernel gave no huge page: {}",
            there.backing_shortfall
        );
    }
    Ok(())
}

/// The command that makes the VM, as far as these tests are alike.
fn create_web(fleet: &Fleet) -> [&'static str; 7] {
    let backend = match fleet.backend() {
        Backend::Kvm => "kvm",
        _ => "software",
    };
    [
        "create",
        "vm",
        "web",
        "--memory",
        "64MiB",
        "--backend",
        backend,
    ]
}

async fn small_memory_stays_small_wherever_it_goes(fleet: &mut Fleet) -> anyhow::Result<()> {
    let address = fleet.server().to_string();
    let env = [("SLAT_SERVER", address.as_str())];
    let words = create_web(fleet);
    let more = ["--backing", "small", "--host", "host-a"];
    let made = slat(&[&words[..], &more[..]].concat(), &env).await?;
    ensure!(made.status.success(), "{made:?}");
    for host in ["host-a", "host-b"] {
        if host == "host-b" {
            fleet.migrate_and_wait("vms/web", host, patient()).await?;
        }
        let vm = fleet.runs_soundly_on("vms/web", host).await?;
        ensure!(made_of(&vm) == MemoryBacking::Small, "{vm:#?}");
        let (small, huge, giant) = pages(&vm);
        ensure!(small > 0 && huge == 0 && giant == 0, "{vm:#?}");
        ensure!(vm.backing_shortfall.is_empty(), "{vm:#?}");
        if host == "host-b" {
            ensure!(small == 64 * MIB, "populated ahead: {vm:#?}");
        }
    }
    let wide = slat(&["get", "vms", "-o", "wide"], &env).await?;
    let text = String::from_utf8_lossy(&wide.stdout).into_owned();
    ensure!(text.contains("BACKING") && text.contains("small"), "{text}");
    ensure!(text.contains("4K:64 MiB"), "{text}");
    let page = slat(&["get", "vm", "web"], &env).await?;
    let text = String::from_utf8_lossy(&page.stdout).into_owned();
    ensure!(
        text.contains("small of 64 MiB, in pages of 4K:64 MiB"),
        "{text}"
    );
    Ok(())
}

async fn thp_is_had_or_refused_as_the_host_is_set(fleet: &mut Fleet) -> anyhow::Result<()> {
    let file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let setting = std::fs::read_to_string(file).unwrap_or_default();
    let own = std::fs::read_to_string(
        "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled",
    );
    let inherits = own.map_or(true, |own| own.contains("[inherit]"));
    let made = make(fleet, "web", of(fleet.backend(), MemoryBacking::Thp)).await;
    match made {
        Ok(vm) => {
            ensure!(
                !(inherits && setting.contains("[never]")),
                "{setting}: {vm:#?}"
            );
            ensure!(made_of(&vm) == MemoryBacking::Thp, "{vm:#?}");
        }
        Err(error) => {
            ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
            ensure!(
                error
                    .metadata
                    .get("backing")
                    .is_some_and(|word| word == "thp"),
                "{error:?}"
            );
            let named = setting.is_empty() || error.metadata.contains_key("file");
            ensure!(
                named && !setting.contains("[force]"),
                "{setting}: {error:?}"
            );
            fleet.memory_used("host-a", 0).await?;
        }
    }
    Ok(())
}

async fn reserved_memory_moves_both_ways(
    fleet: &mut Fleet,
    reserved: &Reserved,
) -> anyhow::Result<()> {
    let spec = of(fleet.backend(), MemoryBacking::Hugetlb2m);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    ensure!(reserved.free() == 32, "{} are free", reserved.free());
    // It is not taken from what the host gives to VMs.
    fleet.memory_used("host-a", 0).await?;
    for host in ["host-b", "host-a"] {
        let params = verified(patient(), Verify::BeforeCommit);
        fleet.migrate_and_wait(&vm.name, host, params).await?;
        let there = fleet.runs_soundly_on(&vm.name, host).await?;
        ensure!(made_of(&there) == MemoryBacking::Hugetlb2m, "{there:#?}");
        ensure!(pages(&there) == (0, 64 * MIB, 0), "{there:#?}");
        ensure!(there.backing_shortfall.is_empty(), "{there:#?}");
        eventually("the source gives its pages back", || async {
            ensure!(reserved.free() == 32, "{} are free", reserved.free());
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn too_few_pages_are_refused_before_anything_moves(
    fleet: &mut Fleet,
    reserved: &Reserved,
) -> anyhow::Result<()> {
    let spec = of(fleet.backend(), MemoryBacking::Hugetlb2m);
    let vm = fleet.run_vm("web", "host-a", spec.clone()).await?;
    let says = |metadata: &dyn Fn(&str) -> Option<String>| -> anyhow::Result<()> {
        for (key, value) in [
            ("needed_pages", "32"),
            ("free_pages", "8"),
            ("page_bytes", "2097152"),
        ] {
            ensure!(
                metadata(key).as_deref() == Some(value),
                "{key}: {:?}",
                metadata(key)
            );
        }
        let file = metadata("file").context("no file")?;
        ensure!(file.ends_with("hugepages-2048kB/nr_hugepages"), "{file}");
        Ok(())
    };
    let error = make(fleet, "two", spec)
        .await
        .err()
        .context("8 pages are enough")?;
    ensure!(error.reason == Reason::NoHugePages, "{error:?}");
    says(&|key| error.metadata.get(key).cloned())?;

    // A trial says it, and so does the migration itself, while the VM runs on.
    let address = fleet.server().to_string();
    let words = ["migrate", "web", "--to", "host-b", "--dry-run"];
    let trial = slat(&words, &[("SLAT_SERVER", &address)]).await?;
    let said = String::from_utf8_lossy(&trial.stderr).into_owned();
    ensure!(
        !trial.status.success() && said.contains("NO_HUGE_PAGES"),
        "{trial:?}"
    );
    let migration = fleet.migrate(&vm.name, "host-b", patient()).await?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    let error = failed.error.clone().unwrap_or_default();
    ensure!(error.reason == "NO_HUGE_PAGES", "{failed:#?}");
    says(&|key| error.metadata.get(key).cloned())?;
    let progress = failed.progress.clone().unwrap_or_default();
    ensure!(progress.bytes_transferred == 0, "{failed:#?}");
    ensure!(reserved.free() == 8, "{} are free", reserved.free());
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn slots_are_of_the_vms_pages(fleet: &mut Fleet, reserved: &Reserved) -> anyhow::Result<()> {
    let spec = of(fleet.backend(), MemoryBacking::Hugetlb2m);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let base = 1 << 20;
    let odd = update(fleet, &vm.name, vec![create(5, base, 4)]).await;
    let error = odd.err().context("16 KiB are no page of 2 MiB")?;
    ensure!(error.reason == Reason::BadSlotTable, "{error:?}");
    ensure!(error.metadata["page_bytes"] == "2097152", "{error:?}");
    let many = update(fleet, &vm.name, vec![create(5, base, 5 * 512)]).await;
    let error = many.err().context("there are 4 pages")?;
    ensure!(error.reason == Reason::NoHugePages, "{error:?}");
    update(fleet, &vm.name, vec![create(5, base, 4 * 512)]).await?;
    ensure!(reserved.free() == 0, "{} are free", reserved.free());
    fleet.memory_used("host-a", 0).await?;
    // What is discarded is zero and stays reserved.
    let discarded = discard(fleet, &vm.name, base + 3, 700).await?;
    ensure!(
        discarded.pages == 700 && discarded.freed_bytes == 0,
        "{discarded:?}"
    );
    ensure!(reserved.free() == 0, "{} are free", reserved.free());
    update(fleet, &vm.name, vec![delete(5)]).await?;
    eventually("the slot's pages are given back", || async {
        ensure!(reserved.free() == 4, "{} are free", reserved.free());
        Ok(())
    })
    .await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn memory_is_populated_before_the_vm_starts(fleet: &mut Fleet) -> anyhow::Result<()> {
    let address = fleet.server().to_string();
    let env = [("SLAT_SERVER", address.as_str())];
    let words = create_web(fleet);
    let more = ["--prefault", "--host", "host-a"];
    // It comes back when the VM runs.
    let made = slat(&[&words[..], &more[..]].concat(), &env).await?;
    ensure!(made.status.success(), "{made:?}");
    let all_there = |vm: &v1::Vm| -> anyhow::Result<()> {
        let prefault = vm.prefault.clone().context("prefault was asked for")?;
        ensure!(
            prefault.done && prefault.populated_bytes == 64 * MIB,
            "{vm:#?}"
        );
        let (small, huge, _) = pages(vm);
        ensure!(small + huge == 64 * MIB, "{vm:#?}");
        Ok(())
    };
    all_there(&fleet.runs_soundly_on("vms/web", "host-a").await?)?;
    fleet
        .migrate_and_wait("vms/web", "host-b", patient())
        .await?;
    all_there(&fleet.runs_soundly_on("vms/web", "host-b").await?)?;
    let page = slat(&["get", "vm", "web"], &env).await?;
    let text = String::from_utf8_lossy(&page.stdout).into_owned();
    ensure!(text.contains("all 64 MiB populated"), "{text}");

    // More than there is on this machine is refused, not tried.
    let spec = v1::VmSpec {
        prefault: true,
        memory_bytes: 2 << 40,
        ..usual(fleet.backend())
    };
    let error = make(fleet, "large", spec).await.err().context("2 TiB")?;
    ensure!(error.reason == Reason::NoMemory, "{error:?}");
    Ok(())
}

async fn a_node_goes_along_and_one_that_is_not_there_is_refused(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let on = |node| v1::VmSpec {
        numa_node: Some(node),
        ..usual(fleet.backend())
    };
    let error = make(fleet, "nowhere", on(1000))
        .await
        .err()
        .context("node 1000")?;
    ensure!(error.reason == Reason::NoSuchNode, "{error:?}");
    ensure!(error.metadata["node"] == "1000", "{error:?}");
    fleet.memory_used("host-a", 0).await?;
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        println!("SKIPPED: this kernel knows no NUMA nodes");
        return Ok(());
    }
    let vm = fleet.run_vm("web", "host-a", on(0)).await?;
    for host in ["host-b", "host-a"] {
        fleet.migrate_and_wait(&vm.name, host, patient()).await?;
        let there = fleet.runs_soundly_on(&vm.name, host).await?;
        let node = there.spec.as_ref().and_then(|spec| spec.numa_node);
        ensure!(node == Some(0), "{there:#?}");
    }
    Ok(())
}
