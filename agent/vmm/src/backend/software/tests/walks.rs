//! A walk inside the guest waits for no flush.

use super::*;

/// A host whose flushes wait until a vCPU that is inside the guest has walked once more.
#[derive(Debug, Default)]
struct Walks {
    ask: Mutex<Option<std::sync::mpsc::Sender<()>>>,
    walked: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
    stuck: AtomicBool,
}

impl slat_mmu::Host for Walks {
    fn flush(&self, _: &slat_mmu::FlushRequest) {
        if let Some(ask) = &*self.ask.lock().unwrap() {
            ask.send(()).unwrap();
            let walked = self.walked.lock().unwrap();
            let in_time = walked.as_ref().unwrap().recv_timeout(PATIENCE / 30);
            self.stuck.store(in_time.is_err(), Relaxed);
        }
    }
}

#[test]
fn a_walk_inside_the_guest_waits_for_nobody_while_roots_are_withdrawn() {
    for format in Format::ALL {
        let host = Arc::new(Walks::default());
        let tables = slat_mmu::Arena::new(Pfn(0x100), 64);
        let stage = stage(format).unwrap();
        let mmu = stage.build(tables, Arc::clone(&host), MmuConfig::default());
        let slot = slat_mmu::SlotSpec::new(SlotId::default(), Gfn(0), 512, Pfn(0x1000));
        mmu.create_slot(slot).unwrap();
        let (ask, asked) = std::sync::mpsc::channel();
        let (tell, walked) = std::sync::mpsc::channel();
        *host.walked.lock().unwrap() = Some(walked);
        thread::scope(|scope| {
            scope.spawn(|| {
                let asked = asked;
                let mut vcpu = mmu.vcpu();
                let mapped = mmu.fault(
                    &mut vcpu,
                    slat_mmu::Fault::new(Gfn(3), slat_mmu::Access::Read),
                );
                assert!(matches!(mapped, slat_mmu::FaultOutcome::Fixed { .. }));
                tell.send(()).unwrap();
                while asked.recv().is_ok() {
                    let _ = mmu.access(&mut vcpu, Gfn(3), slat_mmu::Access::Read);
                    tell.send(()).unwrap();
                }
            });
            host.walked
                .lock()
                .unwrap()
                .as_ref()
                .unwrap()
                .recv()
                .unwrap();
            *host.ask.lock().unwrap() = Some(ask);
            mmu.zap_all();
            *host.ask.lock().unwrap() = None;
        });
        assert!(
            !host.stuck.load(Relaxed),
            "{format}: the walk waited for the flush"
        );
    }
}
