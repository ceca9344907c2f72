//! All that is x86-64: what the host's CPU offers, how a vCPU starts, how its state is saved and
//! loaded.
//!
//! There is no in-kernel interrupt controller, so a vCPU has no LAPIC state; its base register
//! travels with the special registers.

mod calls;
mod cpuid;
mod exit;
#[cfg(any(test, feature = "fuzz"))]
mod fuzzed;
mod msrs;
mod vcpu_state;

use kvm_bindings::{
    CpuId, KVM_CAP_XSAVE2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs, kvm_segment,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use self::calls::Calls;
#[cfg(feature = "fuzz")]
pub(crate) use self::fuzzed::FUZZED;
pub(in crate::backend::kvm) use self::{exit::run, vcpu_state::VcpuState};
use crate::{
    backend::{
        BackendError,
        cpu::CpuFact,
        kvm::{
            device::{create_vm, uninterrupted},
            refuse::failed,
            stats::Truth,
            tracepoint::Tracepoint,
            vcpu_error::{read, set},
        },
    },
    guest::BootEntry,
};

/// In saved state.
pub(in crate::backend::kvm) const ARCH: u32 = 1;
/// Of a pager's mirror, whatever the processor walks.
pub(in crate::backend::kvm) const MIRROR: slat_arch::GuestStage = slat_arch::GuestStage::Ept4;
/// Beside what every architecture needs.
pub(in crate::backend::kvm) const NEEDED: [(Cap, &str); 4] = [
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
];

/// Beside requests for a flush the kernel counts those that made a vCPU leave the guest. A range is
/// flushed as all is, and counted.
pub(in crate::backend::kvm) const COUNTED: Truth = Truth {
    remote_flushes: true,
    ranges: true,
};

/// Page faults are in the statistics.
pub(in crate::backend::kvm) const FAULTS: Option<Tracepoint> = None;

/// Real-mode helper pages that VMX wants to know about; in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NX: u64 = 1 << 11;
/// Always set.
const RFLAGS_FIXED: u64 = 1 << 1;
/// I/O from CPL 3.
const RFLAGS_IOPL_3: u64 = 3 << 12;

/// It can, wherever `/dev/kvm` opens.
pub(in crate::backend::kvm) fn supported() -> Result<(), BackendError> {
    Ok(())
}

/// What this host's KVM gives guests: CPUID, and the frequency of a new vCPU's time-stamp counter.
///
/// # Errors
/// `Ioctl` when no vCPU can be made to ask.
pub(in crate::backend::kvm) fn host_facts(kvm: &Kvm) -> Result<Vec<CpuFact>, BackendError> {
    let vm = create_vm(kvm)?;
    let host = HostCpu::new(kvm, &vm)?;
    let vcpu = set("KVM_CREATE_VCPU", "a new one", || vm.create_vcpu(0))?;
    let told = Told {
        cpuid: host.supported.as_slice().to_vec(),
        tsc_khz: host.tsc_khz_of(&vcpu)?,
    };
    Ok(told.facts(&host))
}

/// What a vCPU was told of its CPU.
#[derive(Clone, Debug)]
pub(in crate::backend::kvm) struct Told {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// `None` where the host cannot say.
    tsc_khz: Option<u32>,
}

impl Told {
    /// The same for the handover's preamble, with whether `host` scales the time-stamp counter.
    pub(in crate::backend::kvm) fn facts(&self, host: &HostCpu) -> Vec<CpuFact> {
        let mut facts = cpuid::facts(&self.cpuid);
        facts.extend(self.tsc_khz.map(|khz| CpuFact::new("x86.tsc_khz", khz)));
        let scaling = if host.tsc_control { "yes" } else { "no" };
        facts.push(CpuFact::new("x86.tsc_scaling", scaling));
        facts
    }
}

/// What the host offers to every VM.
#[derive(Debug)]
pub(in crate::backend::kvm) struct HostCpu {
    supported: CpuId,
    msrs: Vec<u32>,
    xcrs: bool,
    tsc_khz: bool,
    tsc_control: bool,
    /// Bytes of a vCPU's XSAVE area.
    xsave_bytes: usize,
}

impl HostCpu {
    pub(in crate::backend::kvm) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, BackendError> {
        let supported = uninterrupted(|| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = uninterrupted(|| kvm.get_msr_index_list())
            .map_err(failed("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .to_vec();
        let xsave = usize::try_from(vm.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0);
        Ok(Self {
            supported,
            msrs,
            xcrs: vm.check_extension(Cap::Xcrs),
            tsc_khz: vm.check_extension(Cap::GetTscKhz),
            tsc_control: vm.check_extension(Cap::TscControl),
            xsave_bytes: xsave.max(size_of::<kvm_xsave>()),
        })
    }

    /// Frequency of a vCPU's time-stamp counter, where the host can say.
    fn tsc_khz_of(&self, vcpu: &impl Calls) -> Result<Option<u32>, BackendError> {
        self.tsc_khz
            .then(|| read("KVM_GET_TSC_KHZ", "TSC frequency", || vcpu.get_tsc_khz()))
            .transpose()
    }

    /// First guest frame that the CPU cannot address.
    pub(in crate::backend::kvm) fn end_gfn(&self) -> u64 {
        1 << (cpuid::physical_bits(self.supported.as_slice()).clamp(32, 52) - 12)
    }
}

/// What must be so before vCPUs run: nothing. Instruction caches follow stores.
pub(in crate::backend::kvm) fn before_run() -> Result<(), BackendError> {
    Ok(())
}

/// What a new VM needs before it has slots.
pub(in crate::backend::kvm) fn prepare_vm(vm: &VmFd) -> Result<(), BackendError> {
    if vm.check_extension(Cap::SetTssAddr) {
        uninterrupted(|| vm.set_tss_address(TSS_ADDRESS)).map_err(failed("KVM_SET_TSS_ADDR"))?;
    }
    Ok(())
}

/// Makes a new vCPU ready to enter the guest: CPUID, 64-bit mode at CPL 3 with IOPL 3, the entry's
/// registers. CPUID comes first: the kernel checks the control registers by it. Returns what the
/// vCPU was told.
pub(in crate::backend::kvm) fn prepare_vcpu(
    host: &HostCpu,
    vcpu: &VcpuFd,
    index: u32,
    entry: BootEntry,
) -> Result<Told, BackendError> {
    prepare(host, vcpu, index, entry)
}

fn prepare(
    host: &HostCpu,
    vcpu: &impl Calls,
    index: u32,
    entry: BootEntry,
) -> Result<Told, BackendError> {
    let cpuid = cpuid::for_vcpu(&host.supported, index);
    set("KVM_SET_CPUID2", "CPUID", || vcpu.set_cpuid(&cpuid))?;
    let mut sregs = read("KVM_GET_SREGS", "special registers", || vcpu.get_sregs())?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x1b,
        type_: 3, // data, writable, accessed
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x23,
        type_: 11, // code, readable, accessed
        db: 0,
        l: 1,
        ..data
    };
    for segment in [
        &mut sregs.ss,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = data;
    }
    // VMX demands a busy 64-bit task segment, although nothing ever uses it.
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x28,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt.limit = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = entry.support;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    sregs.efer = EFER_LME | EFER_LMA | EFER_NX;
    set("KVM_SET_SREGS", "special registers", || {
        vcpu.set_sregs(&sregs)
    })?;
    let regs = kvm_regs {
        rip: entry.pc,
        rsp: entry.sp,
        rdi: entry.argument,
        rflags: RFLAGS_FIXED | RFLAGS_IOPL_3,
        ..Default::default()
    };
    set("KVM_SET_REGS", "registers", || vcpu.set_regs(&regs))?;
    Ok(Told {
        cpuid: cpuid.as_slice().to_vec(),
        tsc_khz: host.tsc_khz_of(vcpu)?,
    })
}

/// Instruction pointer, for messages.
pub(in crate::backend::kvm) fn program_counter(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map_or_else(
        |error| format!("rip unknown ({error})"),
        |regs| format!("rip {:#x}", regs.rip),
    )
}
