/* Intel VMX with extended page tables (Intel SDM vol. 3, chapters 25 to 30). */

#include "walker.h"

enum {
    MSR_FEATURE_CONTROL = 0x3a,
    MSR_BASIC = 0x480,
    MSR_PINBASED = 0x481,
    MSR_PROCBASED = 0x482,
    MSR_EXIT = 0x483,
    MSR_ENTRY = 0x484,
    MSR_PROCBASED2 = 0x48b,
    MSR_EPT_CAPABILITIES = 0x48c,
    MSR_EFER = 0xc0000080,

    REASON_EXCEPTION = 0,
    REASON_HLT = 12,
    REASON_VIOLATION = 48,
    REASON_MISCONFIGURATION = 49,
};

/* VMCS fields (appendix B). */
enum {
    PINBASED = 0x4000, PROCBASED = 0x4002, EXCEPTIONS = 0x4004, EXIT_CONTROLS = 0x400c, ENTRY_CONTROLS = 0x4012,
    PROCBASED2 = 0x401e, EPTP = 0x201a, LINK = 0x2800,
    GUEST_EFER = 0x2806, HOST_EFER = 0x2c02,
    GUEST_ES = 0x800, GUEST_ES_LIMIT = 0x4800, GUEST_ES_RIGHTS = 0x4814, GUEST_ES_BASE = 0x6806,
    GUEST_GDTR_LIMIT = 0x4810, GUEST_IDTR_LIMIT = 0x4812, GUEST_GDTR_BASE = 0x6816, GUEST_IDTR_BASE = 0x6818,
    GUEST_INTERRUPTIBILITY = 0x4824, GUEST_ACTIVITY = 0x4826,
    GUEST_CR0 = 0x6800, GUEST_CR3 = 0x6802, GUEST_CR4 = 0x6804,
    GUEST_DR7 = 0x681a, GUEST_RSP = 0x681c, GUEST_RIP = 0x681e, GUEST_RFLAGS = 0x6820,
    HOST_ES = 0xc00, HOST_CS = 0xc02, HOST_TR = 0xc0c,
    HOST_CR0 = 0x6c00, HOST_CR3 = 0x6c02, HOST_CR4 = 0x6c04, HOST_FS_BASE = 0x6c06, HOST_GDTR_BASE = 0x6c0c,
    HOST_IDTR_BASE = 0x6c0e,
    ERROR = 0x4400, REASON = 0x4402, INTERRUPTION = 0x4404, QUALIFICATION = 0x6400, GUEST_PHYSICAL = 0x2400,
};

/* What does not matter here but is there: CR3 targets, page-fault masks, lists of MSRs, an event to inject, CR masks and
 * shadows, debugging, SYSENTER of guest and host. */
static const u16 unused[] = {
    0x400a, 0x4006, 0x4008, 0x400e, 0x4010, 0x4014, 0x4016, 0x6000, 0x6002, 0x6004, 0x6006, 0x2802, 0x6822,
    0x482a, 0x6824, 0x6826, 0x4c00, 0x6c10, 0x6c12,
};

static u8 vmxon_region[4096] __attribute__((aligned(4096)));
static u8 vmcs[4096] __attribute__((aligned(4096)));
static int launched;

/* 0 when the guest ran; otherwise the instruction failed. */
int vmx_run(struct registers *registers, int launched);

static u64 vmread(u64 field)
{
    u64 value;
    __asm__ volatile("vmread %1, %0" : "=r"(value) : "r"(field) : "cc");
    return value;
}

static void vmwrite(u64 field, u64 value)
{
    u8 failed;
    __asm__ volatile("vmwrite %2, %1; setna %0" : "=q"(failed) : "r"(field), "r"(value) : "cc");
    if (failed)
        stop("vmwrite failed", field, value);
}

/* What is wanted of a set of controls, with those that must be on; none may be wanted that must be off. */
static void controls(u64 field, u32 msr, u32 wanted)
{
    u64 allowed = rdmsr(msr);
    if (wanted & ~(u32)(allowed >> 32))
        stop("a control that must be off", field, allowed);
    vmwrite(field, wanted | (u32)allowed);
}

static void segment(int index, u16 selector, u32 rights, u32 limit)
{
    vmwrite(GUEST_ES + 2 * index, selector);
    vmwrite(GUEST_ES_LIMIT + 2 * index, limit);
    vmwrite(GUEST_ES_RIGHTS + 2 * index, rights);
    vmwrite(GUEST_ES_BASE + 2 * index, 0);
}

void extension_init(u64 root)
{
    u64 at;
    u8 failed;
    if (!(rdmsr(MSR_FEATURE_CONTROL) & 1))
        wrmsr(MSR_FEATURE_CONTROL, 5);
    write_cr4(read_cr4() | 1 << 13);
    *(u32 *)vmxon_region = *(u32 *)vmcs = (u32)rdmsr(MSR_BASIC) & 0x7fffffff;
    at = (u64)vmxon_region;
    __asm__ volatile("vmxon %1; setna %0" : "=q"(failed) : "m"(at) : "cc");
    if (failed)
        stop("vmxon failed", 0, 0);
    at = (u64)vmcs;
    __asm__ volatile("vmclear %1; setna %0" : "=q"(failed) : "m"(at) : "cc");
    __asm__ volatile("vmptrld %1; setna %0" : "=q"(failed) : "m"(at) : "cc");
    if (failed)
        stop("vmptrld failed", 0, 0);

    u64 able = rdmsr(MSR_EPT_CAPABILITIES);
    u64 levels = (root >> 3 & 7) + 1;
    if (!(able & 1 << (levels == 5 ? 7 : 6)))
        stop("unsupported: EPT walks of so many levels are not offered (IA32_VMX_EPT_VPID_CAP, levels):", able, levels);
    if (root & 1 << 6 && !(able & 1 << 21))
        stop("unsupported: Accessed and Dirty flags for EPT are not offered (IA32_VMX_EPT_VPID_CAP, EPTP):", able, root);

    controls(PINBASED, MSR_PINBASED, 0);
    controls(PROCBASED, MSR_PROCBASED, 1u << 7 | 1u << 31); /* HLT exits; secondary controls */
    controls(PROCBASED2, MSR_PROCBASED2, 1 << 1);           /* EPT */
    controls(EXIT_CONTROLS, MSR_EXIT, 1 << 9 | 1 << 21);    /* 64-bit host; load EFER */
    controls(ENTRY_CONTROLS, MSR_ENTRY, 1 << 9 | 1 << 15);  /* 64-bit guest; load EFER */
    for (unsigned at = 0; at < sizeof unused / sizeof *unused; at++)
        vmwrite(unused[at], 0);
    vmwrite(EXCEPTIONS, ~0u);
    vmwrite(EPTP, root);
    vmwrite(LINK, ~0ull);

    for (int index = 0; index < 6; index++)
        segment(index, 0x10, 0xc093, ~0u);
    segment(1, 0x18, 0xa09b, ~0u);   /* CS */
    segment(6, 0, 0x10000, 0);       /* LDTR: unusable */
    segment(7, 0x20, 0x8b, 0x67);    /* TR */
    vmwrite(GUEST_GDTR_LIMIT, 0);
    vmwrite(GUEST_GDTR_BASE, 0);
    vmwrite(GUEST_IDTR_LIMIT, 0);
    vmwrite(GUEST_IDTR_BASE, 0);
    vmwrite(GUEST_INTERRUPTIBILITY, 0);
    vmwrite(GUEST_ACTIVITY, 0);
    vmwrite(GUEST_CR0, 0x80010033);
    vmwrite(GUEST_CR3, GUEST_PML4);
    vmwrite(GUEST_CR4, 0x2020); /* VMXE, PAE; four levels whatever the host has */
    vmwrite(GUEST_DR7, 0x400);
    vmwrite(GUEST_EFER, 0x500);

    for (int index = 0; index < 6; index++)
        vmwrite(HOST_ES + 2 * index, 0x10);
    vmwrite(HOST_CS, 0x18);
    vmwrite(HOST_TR, 0x20);
    vmwrite(HOST_CR0, read_cr0());
    vmwrite(HOST_CR3, read_cr3());
    vmwrite(HOST_CR4, read_cr4());
    vmwrite(HOST_EFER, rdmsr(MSR_EFER));
    for (int index = 0; index < 3; index++)
        vmwrite(HOST_FS_BASE + 2 * index, 0); /* FS, GS, TR */
    extern u8 ram_gdtr[];
    vmwrite(HOST_GDTR_BASE, *(u64 *)(ram_gdtr + 2));
    vmwrite(HOST_IDTR_BASE, 0);
    extension_resume_at(GUEST_CODE, GUEST_STACK);
}

void extension_resume_at(u64 rip, u64 rsp)
{
    vmwrite(GUEST_RFLAGS, 2);
    vmwrite(GUEST_RIP, rip);
    vmwrite(GUEST_RSP, rsp);
}

void extension_enter(struct registers *registers, struct leave *leave)
{
    if (vmx_run(registers, launched))
        stop("the guest cannot be entered", vmread(ERROR), launched);
    launched = 1;
    u64 reason = vmread(REASON);
    leave->status = reason;
    leave->first = vmread(QUALIFICATION);
    leave->second = vmread(GUEST_PHYSICAL);
    leave->rip = vmread(GUEST_RIP);
    leave->why = LEFT_FAULT;
    if (reason == REASON_EXCEPTION) {
        leave->status = EXCEPTION + (vmread(INTERRUPTION) & 0xff);
        return;
    }
    leave->why = reason == REASON_VIOLATION || reason == REASON_MISCONFIGURATION ? LEFT_FAULT
        : reason == REASON_HLT ? LEFT_DONE : LEFT_OTHER;
}
