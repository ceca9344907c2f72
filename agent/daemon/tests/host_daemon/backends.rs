//! KVM that comes and goes while the agent runs: the host, dry runs and new VMs follow it.

use std::sync::atomic::{AtomicBool, Ordering};

use slat_proto::{ApiError, Reason, model::BackendKind, v1};

use crate::fake;
use crate::rig::{MIB, Rig, answer, until};

async fn host(rig: &Rig) -> v1::Host {
    let list = answer(
        rig.hosts()
            .list_hosts(v1::ListHostsRequest::default())
            .await,
    );
    list.unwrap().hosts.remove(0)
}

async fn create(rig: &Rig, vm: &str, backend: v1::Backend, dry: bool) -> Result<v1::Vm, ApiError> {
    let spec = v1::VmSpec {
        memory_bytes: 16 * MIB,
        vcpus: 1,
        backend: backend.into(),
        ..Default::default()
    };
    let request = v1::CreateVmRequest {
        vm_id: vm.into(),
        spec: Some(spec),
        validate_only: dry,
        ..Default::default()
    };
    answer(rig.vms().create_vm(request).await)
}

#[tokio::test]
async fn kvm_that_comes_and_goes_is_said_and_taken() {
    static KVM: AtomicBool = AtomicBool::new(false);
    let mut rig = Rig::new();
    let mut config = rig.config();
    config.dirty_rings = || true;
    config.paging = || match KVM.load(Ordering::Relaxed) {
        true => fake::paging(),
        false => v1::HostPaging {
            message: "no userfaultfd".to_owned(),
            ..Default::default()
        },
    };
    config.backends = || match KVM.load(Ordering::Relaxed) {
        true => (vec![BackendKind::Kvm, BackendKind::Software], None),
        false => (vec![BackendKind::Software], Some("not there".to_owned())),
    };
    rig.start_with(config).await.unwrap();
    let (kvm, any) = (v1::Backend::Kvm, v1::Backend::Unspecified);
    let refused = create(&rig, "web", kvm, true).await.unwrap_err();
    assert_eq!(refused.reason, Reason::CapabilityMissing);
    assert!(refused.message.contains("not there"), "{refused}");
    let first = host(&rig).await;
    assert!(!first.dirty_rings);
    let paging = first.paging.unwrap();
    assert!(
        !paging.can_watch && paging.message == "no userfaultfd",
        "{paging:?}"
    );
    let soft = create(&rig, "soft", any, false).await.unwrap();
    assert_eq!(soft.spec.unwrap().backend(), v1::Backend::Software);

    KVM.store(true, Ordering::Relaxed);
    let now = until(async || Some(host(&rig).await).filter(|host| host.backends.len() == 2)).await;
    assert!(now.dirty_rings && now.backend_message.is_empty(), "{now:?}");
    assert_eq!(now.paging, Some(fake::paging()), "it was looked at again");
    create(&rig, "web", kvm, true).await.unwrap();
    // The agent chooses, and its VM's process is told what.
    let web = create(&rig, "web", any, false).await.unwrap();
    assert_eq!(web.spec.unwrap().backend(), kvm);

    KVM.store(false, Ordering::Relaxed);
    // A request looks, though the device's file, which is the machine's own, stays as it is.
    let refused = until(async || create(&rig, "more", kvm, true).await.err()).await;
    assert_eq!(refused.reason, Reason::CapabilityMissing);
    let now = host(&rig).await;
    assert_eq!(now.backends().collect::<Vec<_>>(), [v1::Backend::Software]);
    assert_eq!(now.backend_message, "not there");
    let soft = create(&rig, "more", any, false).await.unwrap();
    assert_eq!(soft.spec.unwrap().backend(), v1::Backend::Software);
}
