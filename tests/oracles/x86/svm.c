/* AMD SVM with nested paging (AMD APM vol. 2, chapter 15). */

#include "walker.h"

enum {
    MSR_EFER = 0xc0000080,
    MSR_HSAVE_PA = 0xc0010117,
    EFER_LME_LMA = 0x500,
    EFER_SVME = 0x1000,

    EXIT_HLT = 0x78,
    EXIT_NPF = 0x400,
};

/* Offsets of the VMCB (appendix B). */
enum {
    INTERCEPT_EXCEPTIONS = 0x008,
    INTERCEPT_1 = 0x00c,
    INTERCEPT_2 = 0x010,
    ASID = 0x058,
    TLB_CONTROL = 0x05c,
    EXITCODE = 0x070,
    EXITINFO1 = 0x078,
    EXITINFO2 = 0x080,
    NP_ENABLE = 0x090,
    N_CR3 = 0x0b0,
    SAVE = 0x400,
};
enum {
    S_ES = 0x00, S_CS = 0x10, S_SS = 0x20, S_DS = 0x30, S_FS = 0x40, S_GS = 0x50, S_TR = 0x90,
    S_EFER = 0xd0,
    S_CR4 = 0x148, S_CR3 = 0x150, S_CR0 = 0x158, S_DR7 = 0x160, S_DR6 = 0x168,
    S_RFLAGS = 0x170, S_RIP = 0x178, S_RSP = 0x1d8, S_RAX = 0x1f8, S_PAT = 0x268,
};

static u8 vmcb[4096] __attribute__((aligned(4096)));
static u8 host_save[4096] __attribute__((aligned(4096)));

void svm_run(struct registers *registers, u64 vmcb);

static void set32(u32 offset, u32 value) { *(u32 *)(vmcb + offset) = value; }
static void set64(u32 offset, u64 value) { *(u64 *)(vmcb + offset) = value; }
static u64 get64(u32 offset) { return *(u64 *)(vmcb + offset); }
static void save64(u32 offset, u64 value) { set64(SAVE + offset, value); }

static void segment(u32 offset, u16 selector, u16 attributes, u32 limit)
{
    *(u16 *)(vmcb + SAVE + offset) = selector;
    *(u16 *)(vmcb + SAVE + offset + 2) = attributes;
    set32(SAVE + offset + 4, limit);
    save64(offset + 8, 0);
}

void extension_init(u64 root)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_HSAVE_PA, (u64)host_save);
    set32(INTERCEPT_EXCEPTIONS, ~0u);
    set32(INTERCEPT_1, 1u << 24 | 1u << 31); /* HLT, shutdown */
    set32(INTERCEPT_2, 1);                   /* VMRUN, which must be intercepted */
    set32(ASID, 1);
    set32(TLB_CONTROL, 1);
    set64(NP_ENABLE, 1);
    set64(N_CR3, root);
    segment(S_CS, 0x18, 0x29b, ~0u);
    const u32 data[] = {S_ES, S_SS, S_DS, S_FS, S_GS};
    for (unsigned at = 0; at < sizeof data / sizeof *data; at++)
        segment(data[at], 0x10, 0xc93, ~0u);
    segment(S_TR, 0x20, 0x8b, 0x67);
    save64(S_EFER, EFER_LME_LMA | EFER_SVME);
    save64(S_CR0, 0x80010033); /* PG, WP, NE, ET, MP, PE */
    save64(S_CR3, GUEST_PML4);
    save64(S_CR4, 0x20); /* PAE; four levels whatever the host has */
    save64(S_DR6, 0xffff0ff0);
    save64(S_DR7, 0x400);
    save64(S_PAT, 0x0007040600070406ull);
    extension_resume_at(GUEST_CODE, GUEST_STACK);
}

void extension_resume_at(u64 rip, u64 rsp)
{
    save64(S_RFLAGS, 2);
    save64(S_RIP, rip);
    save64(S_RSP, rsp);
}

void extension_enter(struct registers *registers, struct leave *leave)
{
    svm_run(registers, (u64)vmcb);
    set32(TLB_CONTROL, 0);
    u64 code = get64(EXITCODE);
    leave->status = code;
    leave->first = get64(EXITINFO1);
    leave->second = get64(EXITINFO2);
    leave->rip = get64(SAVE + S_RIP);
    leave->why = code == EXIT_NPF || (code >= EXCEPTION && code < EXCEPTION + 32) ? LEFT_FAULT : code == EXIT_HLT ? LEFT_DONE : LEFT_OTHER;
}
