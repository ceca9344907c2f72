//! One test on one backend: a fleet, the test's body, the proof that nothing is left, and every log
//! when something failed.

use std::{fs::OpenOptions, time::Duration};

use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, DirtyEngine},
};

use crate::{
    Fleet, Layout,
    fleet::Protection,
    guest::{asking, usual},
};

/// Longest time one test may take.
const LIMIT: Duration = Duration::from_secs(240);

/// Why KVM tests cannot run here; `None` when they can.
#[must_use]
pub fn kvm_missing() -> Option<String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .err()
        .map(|error| format!("/dev/kvm: {error}"))
}

/// Why guests on KVM cannot be watched here; `None` when they can.
#[must_use]
pub fn paging_missing() -> Option<String> {
    let offer = || slat_paging::uffd::Uffd::offer().err();
    kvm_missing().or_else(|| offer().map(|error| error.to_string()))
}

/// Whether pages of a watched guest can be protected here.
#[must_use]
pub fn protects_pages() -> bool {
    slat_paging::uffd::Uffd::offer().is_ok_and(|offer| offer.protect)
}

/// As [`run`], on KVM where its guests can be watched; SKIPPED elsewhere.
///
/// # Panics
/// As [`run`].
pub fn paged(test: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<()>) {
    match paging_missing() {
        Some(why) => println!("SKIPPED: {why}"),
        None => run(Layout::two(Backend::Kvm), test),
    }
}

/// KVM where it is, software elsewhere.
#[must_use]
pub fn best_backend() -> Backend {
    if kvm_missing().is_none() {
        Backend::Kvm
    } else {
        Backend::Software
    }
}

/// Runs `test` in a fleet of `layout`, then [`Fleet::finish`]. Prints `SKIPPED: <why>` instead when
/// KVM is asked for and missing.
///
/// # Panics
/// When the test fails, after printing the logs of all processes.
pub fn run(layout: Layout, test: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<()>) {
    run_by(layout, Protection::default(), test);
}

/// The same in a fleet that is protected so.
///
/// # Panics
/// As [`run`].
pub fn run_by(
    layout: Layout,
    protection: Protection,
    test: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<()>,
) {
    if let Some(why) = kvm_missing().filter(|_| layout.backend == Backend::Kvm) {
        println!("SKIPPED: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let fleet = Fleet::start_by(layout, protection).await;
        let mut fleet = fleet.expect("a fleet");
        let result = tokio::time::timeout(LIMIT, async {
            test(&mut fleet).await?;
            fleet.finish().await
        })
        .await;
        let failure = match result {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => format!("not done after {} s", LIMIT.as_secs()),
        };
        // The fleet's drop prints the logs, because this thread panics.
        panic!("{failure}");
    });
}

/// Runs `test` on KVM where VMs can have dirty rings; SKIPPED elsewhere.
///
/// # Panics
/// As [`run`].
pub fn by_rings(test: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<()>) {
    run(Layout::two(Backend::Kvm), async |fleet| {
        let request = probe(asking(usual(Backend::Kvm), DirtyEngine::Ring));
        match fleet.vms(&fleet.server()).create_vm(request).await {
            Ok(_) => test(fleet).await,
            Err(status) => {
                let error = ApiError::from(status);
                anyhow::ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
                println!("SKIPPED: {error}");
                Ok(())
            }
        }
    });
}

/// Checks whether such a VM can be, and makes none.
#[must_use]
pub fn probe(spec: v1::VmSpec) -> v1::CreateVmRequest {
    v1::CreateVmRequest {
        vm_id: "probe".into(),
        spec: Some(spec),
        host: "hosts/host-a".into(),
        validate_only: true,
    }
}

/// Makes each named `async fn(&mut Fleet) -> anyhow::Result<()>` a test on KVM and one on the
/// software backend, on two hosts.
#[macro_export]
macro_rules! on_each_backend {
    ($($name:ident),* $(,)?) => {
        mod kvm {
            $(#[test]
            fn $name() {
                $crate::scene::run($crate::Layout::two(slat_proto::v1::Backend::Kvm), super::$name);
            })*
        }
        mod software {
            $(#[test]
            fn $name() {
                $crate::scene::run($crate::Layout::two(slat_proto::v1::Backend::Software), super::$name);
            })*
        }
    };
}
