//! State of one vCPU: read from the kernel, written down, read back, set.
//!
//! # Sections, in this order
//! | tag | what | when it is empty |
//! |---|---|---|
//! | `CPID` | CPUID as the vCPU was told, 40 bytes an entry | never |
//! | `TSCK` | frequency of the time-stamp counter, kHz, 4 bytes | the host cannot say |
//! | `SREG` | `kvm_sregs` | never |
//! | `REGS` | `kvm_regs` | never |
//! | `XCRS` | `kvm_xcrs` | the host has none |
//! | `XSAV` | the XSAVE area, at least 4 KiB | never |
//! | `DREG` | `kvm_debugregs` | never |
//! | `MSRS` | `kvm_msr_entry`, 16 bytes each; the time-stamp counter is one of them | never |
//! | `EVNT` | `kvm_vcpu_events` | never |
//! | `MPST` | multiprocessing state, 4 bytes | never |
//!
//! # Order of loading
//! That of the sections: CPUID decides which bits of the others are legal; special registers set
//! the mode under which the general ones mean something; XCR0 before the area it masks; MSRs after
//! the mode; pending events last but for whether the vCPU runs at all. Everything is decoded and
//! checked before the first register is set.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::{HostCpu, Told, calls::Calls, cpuid, msrs};
use crate::backend::{
    BackendError,
    cpu::x86_64::TSC_TOLERANCE,
    kvm::{
        state::{StateReader, StateWriter, bad},
        vcpu_error::{load, read},
    },
};

/// Largest XSAVE area that is decoded; today's are under 12 KiB.
const MAX_XSAVE: usize = 64 << 10;

/// Kernel structures that are plain bytes.
///
/// # Safety
/// No padding, no pointers, every bit pattern valid.
unsafe trait Plain: Copy + Default {}
// SAFETY: integers and arrays of them, with padding spelt out as fields (the bindings' layout tests
// fix the sizes).
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: as above.
unsafe impl Plain for kvm_cpuid_entry2 {}

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `T` is plain bytes without padding, so all of them are initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn value_of<T: Plain>(what: &str, bytes: &[u8]) -> Result<T, BackendError> {
    if bytes.len() != size_of::<T>() {
        return Err(bad(format!(
            "{what} of {} bytes; {} are needed",
            bytes.len(),
            size_of::<T>()
        )));
    }
    let mut value = T::default();
    // SAFETY: the lengths are equal, the ranges disjoint, and every bit pattern is a valid `T`.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            (&raw mut value).cast::<u8>(),
            size_of::<T>(),
        );
    }
    Ok(value)
}

fn list_of<T: Plain>(what: &str, bytes: &[u8], most: usize) -> Result<Vec<T>, BackendError> {
    if !bytes.len().is_multiple_of(size_of::<T>()) || bytes.len() > most * size_of::<T>() {
        return Err(bad(format!(
            "{what} of {} bytes; at most {most} entries of {} are possible",
            bytes.len(),
            size_of::<T>()
        )));
    }
    bytes
        .chunks_exact(size_of::<T>())
        .map(|entry| value_of(what, entry))
        .collect()
}

fn optional<T>(
    bytes: &[u8],
    read: impl FnOnce(&[u8]) -> Result<T, BackendError>,
) -> Result<Option<T>, BackendError> {
    (!bytes.is_empty()).then(|| read(bytes)).transpose()
}

fn u32_of(what: &str, bytes: &[u8]) -> Result<u32, BackendError> {
    bytes
        .try_into()
        .map(u32::from_le_bytes)
        .map_err(|_| bad(format!("{what} of {} bytes; 4 are needed", bytes.len())))
}

/// State of one vCPU.
#[derive(Clone, Debug)]
pub(in crate::backend::kvm) struct VcpuState {
    told: Told,
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: Option<kvm_xcrs>,
    xsave: Vec<u8>,
    debug: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: u32,
}

impl VcpuState {
    /// Reads a vCPU that does not run, has no I/O to complete and was `told` that. The kernel's
    /// own copy will not do: it mixes in what it changed on its own account, which another host may
    /// not take back.
    pub(in crate::backend::kvm) fn save(
        host: &HostCpu,
        vcpu: &impl Calls,
        told: &Told,
    ) -> Result<Self, BackendError> {
        Ok(Self {
            told: told.clone(),
            // Before the events: reading it may raise an interrupt that they then hold.
            mp_state: read("KVM_GET_MP_STATE", "MP state", || vcpu.get_mp_state())?,
            sregs: read("KVM_GET_SREGS", "special registers", || vcpu.get_sregs())?,
            regs: read("KVM_GET_REGS", "registers", || vcpu.get_regs())?,
            xcrs: host
                .xcrs
                .then(|| read("KVM_GET_XCRS", "XCRs", || vcpu.get_xcrs()))
                .transpose()?,
            xsave: save_xsave(host, vcpu)?,
            debug: read("KVM_GET_DEBUGREGS", "debug registers", || vcpu.get_debug())?,
            msrs: msrs::read(vcpu, &host.msrs)?,
            events: read("KVM_GET_VCPU_EVENTS", "events", || vcpu.get_events())?,
        })
    }

    /// Writes it down.
    pub(in crate::backend::kvm) fn write(&self, to: &mut StateWriter) {
        to.section(*b"CPID", bytes_of(&self.told.cpuid));
        let khz = self.told.tsc_khz.map(u32::to_le_bytes);
        to.section(*b"TSCK", khz.as_ref().map_or(&[], |khz| khz));
        to.section(*b"SREG", bytes_of(&[self.sregs]));
        to.section(*b"REGS", bytes_of(&[self.regs]));
        to.section(*b"XCRS", bytes_of(self.xcrs.as_slice()));
        to.section(*b"XSAV", &self.xsave);
        to.section(*b"DREG", bytes_of(&[self.debug]));
        to.section(*b"MSRS", bytes_of(&self.msrs));
        to.section(*b"EVNT", bytes_of(&[self.events]));
        to.section(*b"MPST", &self.mp_state.to_le_bytes());
    }

    /// Reads it back and checks it against this host.
    ///
    /// # Errors
    /// `State` when it is malformed or needs what this host lacks.
    pub(in crate::backend::kvm) fn read(
        from: &mut StateReader<'_>,
        host: &HostCpu,
    ) -> Result<Self, BackendError> {
        let state = Self {
            told: Told {
                cpuid: list_of("CPUID", from.section(*b"CPID")?, KVM_MAX_CPUID_ENTRIES)?,
                tsc_khz: optional(from.section(*b"TSCK")?, |b| u32_of("TSC frequency", b))?,
            },
            sregs: value_of("special registers", from.section(*b"SREG")?)?,
            regs: value_of("registers", from.section(*b"REGS")?)?,
            xcrs: optional(from.section(*b"XCRS")?, |b| value_of("XCRs", b))?,
            xsave: from.section(*b"XSAV")?.to_vec(),
            debug: value_of("debug registers", from.section(*b"DREG")?)?,
            msrs: list_of("MSRs", from.section(*b"MSRS")?, KVM_MAX_MSR_ENTRIES)?,
            events: value_of("events", from.section(*b"EVNT")?)?,
            mp_state: u32_of("MP state", from.section(*b"MPST")?)?,
        };
        cpuid::check(&state.told.cpuid, host.supported.as_slice())?;
        let xsave = &state.xsave;
        if !(size_of::<kvm_xsave>()..=MAX_XSAVE).contains(&xsave.len())
            || !xsave.len().is_multiple_of(4)
        {
            return Err(bad(format!("an XSAVE area of {} bytes", xsave.len())));
        }
        if xsave.iter().skip(host.xsave_bytes).any(|byte| *byte != 0) {
            return Err(bad(format!(
                "an XSAVE area of {} bytes; this host's has {}",
                xsave.len(),
                host.xsave_bytes
            )));
        }
        if state.xcrs.is_some() && !host.xcrs {
            return Err(bad("XCRs; this host has none"));
        }
        Ok(state)
    }

    /// What the vCPU is told.
    pub(in crate::backend::kvm) fn told(&self) -> Told {
        self.told.clone()
    }

    /// Sets a vCPU that never ran.
    ///
    /// # Errors
    /// `State`, or `VcpuCall` naming what the kernel refuses.
    pub(in crate::backend::kvm) fn load(
        &self,
        host: &HostCpu,
        vcpu: &impl Calls,
    ) -> Result<(), BackendError> {
        let cpuid = CpuId::from_entries(&self.told.cpuid)
            .map_err(|_| bad(format!("{} CPUID entries", self.told.cpuid.len())))?;
        load("KVM_SET_CPUID2", "CPUID", || vcpu.set_cpuid(&cpuid))?;
        self.load_tsc_khz(host, vcpu)?;
        load("KVM_SET_SREGS", "special registers", || {
            vcpu.set_sregs(&self.sregs)
        })?;
        load("KVM_SET_REGS", "registers", || vcpu.set_regs(&self.regs))?;
        if let Some(xcrs) = &self.xcrs {
            load("KVM_SET_XCRS", "XCRs", || vcpu.set_xcrs(xcrs))?;
        }
        self.load_xsave(host, vcpu)?;
        load("KVM_SET_DEBUGREGS", "debug registers", || {
            vcpu.set_debug(&self.debug)
        })?;
        msrs::write(vcpu, &self.msrs)?;
        load("KVM_SET_VCPU_EVENTS", "events", || {
            vcpu.set_events(&self.events)
        })?;
        load("KVM_SET_MP_STATE", "MP state", || {
            vcpu.set_mp_state(self.mp_state)
        })
    }

    fn load_tsc_khz(&self, host: &HostCpu, vcpu: &impl Calls) -> Result<(), BackendError> {
        let Some(wanted) = self.told.tsc_khz else {
            return Ok(());
        };
        if let Some(here) = host.tsc_khz_of(vcpu)?
            && u64::from(here.abs_diff(wanted)) <= u64::from(here) / TSC_TOLERANCE
        {
            return Ok(());
        }
        if !host.tsc_control {
            return Err(bad(format!(
                "a time-stamp counter of {wanted} kHz; this host cannot scale its own to that"
            )));
        }
        load("KVM_SET_TSC_KHZ", "TSC frequency", || {
            vcpu.set_tsc_khz(wanted)
        })
    }

    fn load_xsave(&self, host: &HostCpu, vcpu: &impl Calls) -> Result<(), BackendError> {
        let mut area = new_xsave(host)?;
        let mut words = self
            .xsave
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word));
        // SAFETY: the extra words stay as many as they were.
        let area_mut = unsafe { area.as_mut_fam_struct() };
        for (into, word) in area_mut.xsave.region.iter_mut().zip(&mut words) {
            *into = word;
        }
        for (into, word) in area.as_mut_slice().iter_mut().zip(&mut words) {
            *into = word;
        }
        load("KVM_SET_XSAVE", "XSAVE area", || {
            // SAFETY: `area` has the length the kernel gave for this VM, and no feature is enabled
            // dynamically.
            unsafe { vcpu.set_xsave2(&area) }
        })
    }
}

fn new_xsave(host: &HostCpu) -> Result<Xsave, BackendError> {
    let extra = (host.xsave_bytes - size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(extra).map_err(|_| bad("no memory for the XSAVE area"))
}

fn save_xsave(host: &HostCpu, vcpu: &impl Calls) -> Result<Vec<u8>, BackendError> {
    let mut area = new_xsave(host)?;
    if host.xsave_bytes > size_of::<kvm_xsave>() {
        read("KVM_GET_XSAVE2", "XSAVE area", || {
            // SAFETY: `area` has the length the kernel gave for this VM, and no feature is enabled
            // dynamically.
            unsafe { vcpu.get_xsave2(&mut area) }
        })?;
    } else {
        let plain = read("KVM_GET_XSAVE", "XSAVE area", || vcpu.get_xsave())?;
        // SAFETY: the extra words stay as many as they were: none.
        unsafe { area.as_mut_fam_struct() }.xsave.region = plain.region;
    }
    let fixed = area.as_fam_struct_ref().xsave.region.iter();
    Ok(fixed
        .chain(area.as_slice())
        .flat_map(|word| word.to_le_bytes())
        .collect())
}
