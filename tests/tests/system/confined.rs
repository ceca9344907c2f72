//! VM processes as the kernel shows them: no privileges, a filter on every thread, files and
//! cgroups that are their own; also after a migration, and with everything killed.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, MigrationPhase, vm_confinement::Seccomp};
use slat_tests::{
    Fleet, Layout,
    guest::{fast, usual},
    scene,
    wait::eventually,
};

slat_tests::on_each_backend!(every_thread_of_a_vm_process_is_confined);

/// A field of a `/proc/.../status`.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim()
}

/// Every thread of a process has no privileges and a filter. Threads come and go meanwhile.
fn confined(pid: u32) -> anyhow::Result<()> {
    let root = rustix::process::geteuid().is_root();
    let mut vcpus = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else {
            continue;
        };
        let name = field(&status, "Name:");
        ensure!(field(&status, "NoNewPrivs:") == "1", "{name}: {status}");
        ensure!(field(&status, "Seccomp:") == "2", "{name}: {status}");
        let mut sets = vec!["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"];
        if root {
            sets.push("CapBnd:");
        }
        for set in sets {
            ensure!(
                field(&status, set) == "0000000000000000",
                "{name}: {status}"
            );
        }
        let filters: u32 = field(&status, "Seccomp_filters:").parse().unwrap_or(0);
        // Four of the process's, two more of its role's. Linux tells since 5.9.
        if name.starts_with("vcpu") && filters > 0 {
            ensure!(filters == 6, "{name}: {status}");
            vcpus += 1;
        }
    }
    ensure!(
        vcpus > 0 || !has_filter_counts(pid)?,
        "no vCPU thread was seen"
    );
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core"));
    let zeroes = core.unwrap_or_default().split_whitespace();
    ensure!(zeroes.filter(|word| *word == "0").count() == 2, "{limits}");
    Ok(())
}

fn has_filter_counts(pid: u32) -> anyhow::Result<bool> {
    Ok(fs::read_to_string(format!("/proc/{pid}/status"))?.contains("Seccomp_filters:"))
}

/// Nobody but the owner enters a VM's directory, or reads or writes what its process makes there.
fn private(dir: &Path) -> anyhow::Result<()> {
    ensure!(
        fs::metadata(dir)?.permissions().mode() & 0o77 == 0,
        "{}",
        dir.display()
    );
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Ok(found) = fs::metadata(&path) else {
            continue;
        };
        // The agent makes these two: the log before there is a process, and what it saw last.
        if !path.ends_with("log") && !path.ends_with("seen.pb") {
            let mode = found.permissions().mode();
            ensure!(mode & 0o77 == 0, "{} has mode {mode:o}", path.display());
        }
    }
    Ok(())
}

async fn every_thread_of_a_vm_process_is_confined(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let process = fleet.vm_process("host-a", &vm.name)?;
    confined(process.pid())?;
    private(&fleet.vm_dir("host-a", &vm.name))?;
    for endpoint in [fleet.agent("host-a"), fleet.server()] {
        let name = "hosts/host-a".to_owned();
        let request = v1::GetHostRequest { name };
        let host = fleet.hosts(&endpoint).get_host(request).await?.into_inner();
        let told = host.vm_confinement.context("the host does not say")?;
        // As the harness asked.
        ensure!(
            told.seccomp() == Seccomp::Kill && !told.core_dumps,
            "{told:?}"
        );
        ensure!(
            told.cgroup.is_empty() != told.cgroup_message.is_empty(),
            "{told:?}"
        );
    }
    let log = fs::read_to_string(fleet.vm_dir("host-a", &vm.name).join("log"))?;
    ensure!(log.contains("\"message\":\"confined\""), "{log}");

    let done = fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    ensure!(done.phase() == MigrationPhase::Completed, "{done:#?}");
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    confined(fleet.vm_process("host-b", &vm.name)?.pid())?;
    private(&fleet.vm_dir("host-b", &vm.name))
}

/// A cgroup that this test may use; `None`, said aloud, where it may make none.
fn own_cgroup() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    let root = mounts.find_map(|mut fields| {
        let point = fields.nth(1)?.to_owned();
        (fields.next() == Some("cgroup2")).then_some(point)
    });
    let Some(root) = root else {
        println!("SKIPPED: no cgroups of version 2 are mounted");
        return None;
    };
    let made = Path::new(&root).join(format!("slat-system-{}", std::process::id()));
    match fs::create_dir(&made) {
        Ok(()) => Some(made),
        Err(error) => {
            println!("SKIPPED: {}: {error}", made.display());
            None
        }
    }
}

#[test]
fn a_vm_has_a_cgroup_of_its_own_that_goes_with_it_whoever_is_killed() {
    let Some(base) = own_cgroup() else { return };
    let layout = Layout {
        backend: scene::best_backend(),
        hosts: vec![("host-a", 512)],
        own_clocks: false,
    };
    let cgroups = base.clone();
    scene::run(layout, async |fleet: &mut Fleet| {
        let path = cgroups.display().to_string();
        fleet
            .add_host("host-b", 512, &["--vm-cgroup", &path])
            .await?;
        let vm = fleet
            .run_vm("web", "host-b", usual(fleet.backend()))
            .await?;
        let own = cgroups.join(&vm.uid);
        let inside = fs::read_to_string(own.join("cgroup.procs"))?;
        ensure!(
            inside.trim() == vm.pid.to_string(),
            "{inside} is not {}",
            vm.pid
        );
        let used = fs::read_to_string(own.join("cpu.stat"))?;
        ensure!(used.starts_with("usage_usec "), "{used}");

        // The agent, then its VM while there is no agent: the next one finds and removes all.
        fleet.kill_agent("host-b");
        ensure!(own.exists(), "an agent's end is no VM's end");
        fleet.vm_process("host-b", &vm.name)?.kill()?;
        fleet.start_agent("host-b")?;
        gone(&own).await?;
        delete(fleet, &vm.name).await?;

        // And the VM alone, under an agent that lives.
        let vm = fleet.run_vm("db", "host-b", usual(fleet.backend())).await?;
        fleet.vm_process("host-b", &vm.name)?.kill()?;
        gone(&cgroups.join(&vm.uid)).await?;
        delete(fleet, &vm.name).await
    });
    fs::remove_dir(&base).expect("it is empty");
}

/// A VM that is LOST by now.
async fn delete(fleet: &Fleet, name: &str) -> anyhow::Result<()> {
    eventually("a lost VM is deleted", || async {
        let request = v1::DeleteVmRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(request).await?;
        Ok(())
    })
    .await
}

async fn gone(cgroup: &Path) -> anyhow::Result<()> {
    eventually("the cgroup goes", || async {
        ensure!(!cgroup.exists(), "{} is there", cgroup.display());
        Ok(())
    })
    .await
}
