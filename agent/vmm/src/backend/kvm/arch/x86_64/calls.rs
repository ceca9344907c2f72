//! The kernel calls that read and set a vCPU's registers, behind a trait, so that a test can have
//! any of them fail.
//!
//! A method is one call and gives back what the kernel said; what it means is said where the call
//! is made ([`crate::backend::kvm::vcpu_error`]).

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_debugregs, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd};

/// The calls, named as KVM names them.
pub(in crate::backend::kvm) trait Calls {
    fn get_mp_state(&self) -> Result<u32, Error>;
    fn set_mp_state(&self, state: u32) -> Result<(), Error>;
    fn get_sregs(&self) -> Result<kvm_sregs, Error>;
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error>;
    fn get_regs(&self) -> Result<kvm_regs, Error>;
    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error>;
    fn get_xcrs(&self) -> Result<kvm_xcrs, Error>;
    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error>;
    fn get_debug(&self) -> Result<kvm_debugregs, Error>;
    fn set_debug(&self, debug: &kvm_debugregs) -> Result<(), Error>;
    fn get_events(&self) -> Result<kvm_vcpu_events, Error>;
    fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), Error>;
    fn get_tsc_khz(&self) -> Result<u32, Error>;
    fn set_tsc_khz(&self, khz: u32) -> Result<(), Error>;
    fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), Error>;
    /// How many of them, from the first on, were read.
    fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize, Error>;
    /// How many of them, from the first on, were set.
    fn set_msrs(&self, msrs: &Msrs) -> Result<usize, Error>;
    /// The area of no more than a page.
    fn get_xsave(&self) -> Result<kvm_xsave, Error>;
    /// # Safety
    /// `area` has the length that the kernel gave for this VM, and no feature is enabled
    /// dynamically.
    unsafe fn get_xsave2(&self, area: &mut Xsave) -> Result<(), Error>;
    /// # Safety
    /// As [`Calls::get_xsave2`].
    unsafe fn set_xsave2(&self, area: &Xsave) -> Result<(), Error>;
}

impl Calls for VcpuFd {
    fn get_mp_state(&self) -> Result<u32, Error> {
        Ok(self.get_mp_state()?.mp_state)
    }

    fn set_mp_state(&self, mp_state: u32) -> Result<(), Error> {
        self.set_mp_state(kvm_mp_state { mp_state })
    }

    fn get_sregs(&self) -> Result<kvm_sregs, Error> {
        self.get_sregs()
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.set_sregs(sregs)
    }

    fn get_regs(&self) -> Result<kvm_regs, Error> {
        self.get_regs()
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.set_regs(regs)
    }

    fn get_xcrs(&self) -> Result<kvm_xcrs, Error> {
        self.get_xcrs()
    }

    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error> {
        self.set_xcrs(xcrs)
    }

    fn get_debug(&self) -> Result<kvm_debugregs, Error> {
        self.get_debug_regs()
    }

    fn set_debug(&self, debug: &kvm_debugregs) -> Result<(), Error> {
        self.set_debug_regs(debug)
    }

    fn get_events(&self) -> Result<kvm_vcpu_events, Error> {
        self.get_vcpu_events()
    }

    fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.set_vcpu_events(events)
    }

    fn get_tsc_khz(&self) -> Result<u32, Error> {
        self.get_tsc_khz()
    }

    fn set_tsc_khz(&self, khz: u32) -> Result<(), Error> {
        self.set_tsc_khz(khz)
    }

    fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), Error> {
        self.set_cpuid2(cpuid)
    }

    fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize, Error> {
        self.get_msrs(msrs)
    }

    fn set_msrs(&self, msrs: &Msrs) -> Result<usize, Error> {
        self.set_msrs(msrs)
    }

    fn get_xsave(&self) -> Result<kvm_xsave, Error> {
        self.get_xsave()
    }

    unsafe fn get_xsave2(&self, area: &mut Xsave) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.get_xsave2(area) }
    }

    unsafe fn set_xsave2(&self, area: &Xsave) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.set_xsave2(area) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::{Cell, RefCell};

    use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};

    use super::{
        super::{HostCpu, Told, VcpuState},
        *,
    };
    use crate::backend::kvm::vcpu_error::tests::{EVERY, demand};

    /// A vCPU whose registers are 0, and whose one call fails.
    #[derive(Default)]
    struct Failing {
        fails: Cell<Option<(&'static str, i32)>>,
        /// How many MSRs are set; all where it does not say.
        msrs_set: Cell<Option<usize>>,
        made: RefCell<Vec<&'static str>>,
    }

    impl Failing {
        fn call<T: Default>(&self, op: &'static str) -> Result<T, Error> {
            self.made.borrow_mut().push(op);
            match self.fails.get() {
                Some((failing, errno)) if failing == op => Err(Error::new(errno)),
                _ => Ok(T::default()),
            }
        }
    }

    impl Calls for Failing {
        fn get_mp_state(&self) -> Result<u32, Error> {
            self.call("KVM_GET_MP_STATE")
        }
        fn set_mp_state(&self, _: u32) -> Result<(), Error> {
            self.call("KVM_SET_MP_STATE")
        }
        fn get_sregs(&self) -> Result<kvm_sregs, Error> {
            self.call("KVM_GET_SREGS")
        }
        fn set_sregs(&self, _: &kvm_sregs) -> Result<(), Error> {
            self.call("KVM_SET_SREGS")
        }
        fn get_regs(&self) -> Result<kvm_regs, Error> {
            self.call("KVM_GET_REGS")
        }
        fn set_regs(&self, _: &kvm_regs) -> Result<(), Error> {
            self.call("KVM_SET_REGS")
        }
        fn get_xcrs(&self) -> Result<kvm_xcrs, Error> {
            self.call("KVM_GET_XCRS")
        }
        fn set_xcrs(&self, _: &kvm_xcrs) -> Result<(), Error> {
            self.call("KVM_SET_XCRS")
        }
        fn get_debug(&self) -> Result<kvm_debugregs, Error> {
            self.call("KVM_GET_DEBUGREGS")
        }
        fn set_debug(&self, _: &kvm_debugregs) -> Result<(), Error> {
            self.call("KVM_SET_DEBUGREGS")
        }
        fn get_events(&self) -> Result<kvm_vcpu_events, Error> {
            self.call("KVM_GET_VCPU_EVENTS")
        }
        fn set_events(&self, _: &kvm_vcpu_events) -> Result<(), Error> {
            self.call("KVM_SET_VCPU_EVENTS")
        }
        fn get_tsc_khz(&self) -> Result<u32, Error> {
            self.call("KVM_GET_TSC_KHZ")
        }
        fn set_tsc_khz(&self, _: u32) -> Result<(), Error> {
            self.call("KVM_SET_TSC_KHZ")
        }
        fn set_cpuid(&self, _: &CpuId) -> Result<(), Error> {
            self.call("KVM_SET_CPUID2")
        }
        fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize, Error> {
            self.call::<()>("KVM_GET_MSRS")
                .map(|()| msrs.as_slice().len())
        }
        fn set_msrs(&self, msrs: &Msrs) -> Result<usize, Error> {
            self.call::<()>("KVM_SET_MSRS")
                .map(|()| self.msrs_set.get().unwrap_or(msrs.as_slice().len()))
        }
        fn get_xsave(&self) -> Result<kvm_xsave, Error> {
            self.call::<()>("KVM_GET_XSAVE")
                .map(|()| kvm_xsave::default())
        }
        unsafe fn get_xsave2(&self, _: &mut Xsave) -> Result<(), Error> {
            self.call("KVM_GET_XSAVE2")
        }
        unsafe fn set_xsave2(&self, _: &Xsave) -> Result<(), Error> {
            self.call("KVM_SET_XSAVE")
        }
    }

    /// A host that has everything, with an XSAVE area of some bytes beyond a page.
    fn host(more: usize) -> HostCpu {
        HostCpu {
            supported: CpuId::from_entries(&[kvm_cpuid_entry2::default()]).unwrap(),
            msrs: vec![0x10, 0x174],
            xcrs: true,
            tsc_khz: true,
            tsc_control: true,
            xsave_bytes: size_of::<kvm_xsave>() + more,
        }
    }

    fn told() -> Told {
        Told {
            cpuid: vec![kvm_cpuid_entry2::default()],
            tsc_khz: Some(2_000_000),
        }
    }

    #[test]
    fn every_call_of_a_save_that_fails_is_named() {
        let mut named = 0;
        for more in [0, 64] {
            let vcpu = Failing::default();
            VcpuState::save(&host(more), &vcpu, &told()).unwrap();
            let made = vcpu.made.take();
            assert_eq!(made.len(), 8, "{made:?}");
            for op in made {
                for errno in EVERY {
                    vcpu.fails.set(Some((op, errno)));
                    let error = VcpuState::save(&host(more), &vcpu, &told()).unwrap_err();
                    demand(error, op, errno, false);
                    named += 1;
                }
            }
        }
        assert_eq!(named, 16 * EVERY.len());
    }

    #[test]
    fn every_call_of_a_load_that_fails_is_named_and_the_states_fault_told_from_the_hosts() {
        let host = host(0);
        let vcpu = Failing::default();
        let state = VcpuState::save(&host, &vcpu, &told()).unwrap();
        vcpu.made.take();
        state.load(&host, &vcpu).unwrap();
        let made = vcpu.made.take();
        let order = [
            "KVM_SET_CPUID2",
            "KVM_GET_TSC_KHZ",
            "KVM_SET_TSC_KHZ",
            "KVM_SET_SREGS",
            "KVM_SET_REGS",
            "KVM_SET_XCRS",
            "KVM_SET_XSAVE",
            "KVM_SET_DEBUGREGS",
            "KVM_SET_MSRS",
            "KVM_SET_VCPU_EVENTS",
            "KVM_SET_MP_STATE",
        ];
        assert_eq!(made, order);
        for op in order {
            for errno in EVERY {
                vcpu.fails.set(Some((op, errno)));
                let error = state.load(&host, &vcpu).unwrap_err();
                demand(error, op, errno, op.starts_with("KVM_SET"));
            }
        }
    }

    #[test]
    fn every_call_of_a_vcpus_start_that_fails_is_named() {
        let host = host(0);
        let vcpu = Failing::default();
        let entry = || crate::guest::BootEntry {
            pc: 0x1000,
            sp: 0x2000,
            argument: 0,
            support: 0x3000,
        };
        super::super::prepare(&host, &vcpu, 0, entry()).unwrap();
        for op in vcpu.made.take() {
            for errno in EVERY {
                vcpu.fails.set(Some((op, errno)));
                let error = super::super::prepare(&host, &vcpu, 0, entry()).unwrap_err();
                demand(error, op, errno, false);
            }
        }
    }

    #[test]
    fn an_msr_is_named_when_it_is_refused() {
        let value = kvm_msr_entry {
            index: 0x174,
            data: 7,
            ..kvm_msr_entry::default()
        };
        let vcpu = Failing {
            msrs_set: Cell::new(Some(0)),
            ..Failing::default()
        };
        let error = super::super::msrs::write(&vcpu, &[value]).unwrap_err();
        assert!(error.to_string().contains("MSR 0x174 = 0x7"), "{error}");
    }
}
