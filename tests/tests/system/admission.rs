//! A destination that cannot run the VM refuses it before it takes anything, and `slat migrate`
//! says why.
//!
//! The destination is a real agent, in this process, whose description of its host differs in one
//! thing. Server, source and VM are processes as ever.

use std::{ffi::OsString, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use slat_daemon::{Agent, HostConfig};
use slat_proto::{
    model::{BackendKind, HostName},
    v1::{self, Backend},
};
use slat_tests::{Fleet, Layout, binary, guest::usual, scene, wait::eventually};
use slat_vmm::handover::preamble::{admit, describe_host};

/// What is different about the destination.
type Change = fn(&mut v1::Preamble);

/// Longest time the command may take.
const LIMIT: Duration = Duration::from_secs(60);

fn one_host(backend: Backend) -> Layout {
    Layout {
        backend,
        hosts: vec![("host-a", 512)],
        own_clocks: false,
    }
}

/// An agent of `fleet` called `other`, on a host that `change` makes different.
async fn other_host(
    fleet: &Fleet,
    state: &slat_test_dir::TestDir,
    change: Change,
) -> anyhow::Result<Agent> {
    let program: Vec<OsString> = vec![binary::slat()?.into(), "vm".into()];
    let backend = match fleet.backend() {
        Backend::Kvm => BackendKind::Kvm,
        _ => BackendKind::Software,
    };
    let config = HostConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        name: HostName::parse("other")?,
        listen: "127.0.0.1:0".parse()?,
        advertise: None,
        server: Some(fleet.server()),
        state_dir: state.path().to_owned(),
        memory_bytes: 512 << 20,
        data_ip: "127.0.0.1".parse()?,
        vm_program: program,
        pager_program: vec![binary::slat()?.into(), "pager".into()],
        writer_program: vec![binary::slat()?.into(), "save-writer".into()],
        save_dir: None,
        confinement: v1::VmConfinement::default(),
        vm_cgroup: slat_daemon::VmCgroup::None,
        backends: slat_vmm::available_backends,
        dirty_rings: || false,
        paging: slat_vmm::host_paging,
        huge_pages: slat_vmm::huge_page_pools,
        fits: slat_vmm::fits_here,
        admit: Arc::new(move |request| {
            let mut own = describe_host(backend)?;
            change(&mut own);
            admit(&request.preamble.clone().unwrap_or_default(), &own)
        }),
        clock: std::time::SystemTime::now,
        trust: Arc::new(v1::HostTrust::default),
        labels: slat_proto::model::Labels::default(),
        version: "0.0.0".to_owned(),
        render: None,
    };
    let agent = Agent::start(config).await?;
    eventually("the other host is READY", || async {
        let request = v1::GetHostRequest {
            name: "hosts/other".to_owned(),
        };
        let host = fleet.hosts(&fleet.server()).get_host(request).await?;
        let host = host.into_inner();
        ensure!(host.state() == v1::host::State::Ready, "{host:?}");
        Ok(())
    })
    .await?;
    Ok(agent)
}

/// Migrates to the other host and looks at what everybody says.
async fn refuses(
    fleet: &mut Fleet,
    change: Change,
    reason: &str,
    differs: &str,
) -> anyhow::Result<()> {
    let state = slat_test_dir::TestDir::new();
    let agent = other_host(fleet, &state, change).await?;
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let process = fleet.vm_process("host-a", &vm.name)?;

    let mut command = tokio::process::Command::new(binary::slat()?);
    command.env("SLAT_INSECURE_PLAINTEXT", "true");
    let address = fleet.server().to_string();
    command
        .args(["migrate", "web", "--to", "other", "--server", &address])
        .kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output())
        .await
        .context("slat migrate does not end")??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{output:?}");
    ensure!(said.contains(reason), "{reason} is not in:\n{said}");
    ensure!(said.contains(differs), "{differs} is not in:\n{said}");

    // Nothing was taken, nothing was started, and the VM never stopped.
    let hosts = fleet.hosts(&fleet.server());
    let request = v1::GetHostRequest {
        name: "hosts/other".to_owned(),
    };
    let host = hosts.clone().get_host(request).await?.into_inner();
    ensure!(host.memory_used_bytes == 0 && host.vms == 0, "{host:#?}");
    let vms = std::fs::read_dir(state.path().join("vms"))?.count();
    ensure!(vms == 0, "{vms} directories of VMs");
    let after = fleet.runs_soundly_on(&vm.name, "host-a").await?;
    ensure!(after.pid == process.pid() && after.epoch == 1, "{after:#?}");

    // The sides are released before their agent goes.
    eventually("the migration is forgotten by its hosts", || async {
        let left = std::fs::read_dir(state.path().join("transfers"))?.count();
        ensure!(left == 0, "{left} records");
        Ok(())
    })
    .await?;
    agent.stop().await;
    Ok(())
}

macro_rules! refusals {
    ($($name:ident: $reason:literal, $differs:literal, $change:expr;)*) => {
        $(#[test]
        fn $name() {
            scene::run(one_host(scene::best_backend()), async |fleet: &mut Fleet| {
                refuses(fleet, $change, $reason, $differs).await
            });
        })*
    };
}

refusals! {
    another_architecture_is_refused: "ISA_MISMATCH", "architecture",
        |own| own.architecture = "riscv64".to_owned();
    another_page_size_is_refused: "PAGE_SIZE_MISMATCH", "page_bytes",
        |own| own.page_bytes = 65536;
    another_protocol_is_refused: "STATE_VERSION_UNSUPPORTED", "protocol",
        |own| own.protocol = Some(v1::VersionRange { min: 8, max: 9 });
    another_state_is_refused: "STATE_VERSION_UNSUPPORTED", "state",
        |own| own.state = Some(v1::VersionRange { min: 8, max: 9 });
}

#[test]
fn another_cpu_is_refused() {
    scene::run(one_host(Backend::Kvm), async |fleet: &mut Fleet| {
        let lesser: Change = |own| {
            for fact in own
                .cpu
                .iter_mut()
                .filter(|fact| fact.name.contains("cpuid.1.0.ecx"))
            {
                fact.value = "0x0".to_owned();
            }
        };
        refuses(fleet, lesser, "CPU_INCOMPATIBLE", "cpuid.1.0.ecx").await
    });
}
