//! Raw images: what runs one, whatever it is made of.

use super::*;

pub(super) fn run(image: &[u8], vcpus: u32) -> (GuestEvent, Vec<u8>) {
    let dir = slat_test_dir::TestDir::new();
    let console = dir.path().join("console");
    let spec = VmSpec {
        memory_bytes: 8 << 20,
        vcpus,
        backend: Some(BackendKind::Kvm),
        format: None,
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::RawImage(image.to_vec().into()),
        labels: slat_proto::model::Labels::default(),
    };
    let memory = memory(spec.memory_bytes);
    guest::install(&memory.table(), &spec).unwrap();
    let vm = Vm::over(memory, spec, Some(&console));
    vm.backend.run().unwrap();
    let event = vm.events.recv_timeout(LIMIT).unwrap();
    vm.backend.pause().unwrap();
    assert!(matches!(vm.backend.run(), Err(BackendError::Vcpu { .. })));
    assert!(vm.events.try_recv().is_err(), "reported once");
    (event, std::fs::read(console).unwrap())
}

/// Runs an image that fails, and looks for words in why.
pub(super) fn failed(image: &[u8], says: &[&str]) {
    let (event, _) = run(image, 1);
    let GuestEvent::Failed(failure) = event else {
        panic!("{event:?}");
    };
    let words = failure.to_string();
    for say in says {
        assert!(words.contains(say), "{words}");
    }
}

#[test]
fn an_image_that_does_not_fit_is_refused() {
    let memory = memory(8 << 20);
    let spec = VmSpec {
        memory_bytes: 8 << 20,
        vcpus: 1,
        backend: None,
        format: None,
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::RawImage(vec![0; 6 << 20].into()),
        labels: slat_proto::model::Labels::default(),
    };
    let error = guest::install(&memory.table(), &spec).unwrap_err();
    assert!(matches!(error, guest::GuestError::ImageTooLarge { .. }));
}
