/* What svm.c and vmx.c share with main.c: a guest, how it is entered, and what made it leave. */

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* The guest's physical memory begins at GUEST of ours. Within it: */
enum {
    GUEST_PML4 = 0x1000,
    GUEST_PDPT = 0x2000,
    GUEST_PD = 0x3000,
    GUEST_PROBE_PD = 0x4000,
    GUEST_PROBE_PT = 0x5000,
    GUEST_CODE = 0x8000,
    GUEST_STACK = 0x10000,
};
#define PROBE 0x40000000ull

/* The guest's registers that the processor does not keep by itself, in the order of registers.inc. */
struct registers {
    u64 rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15;
};

/* Status of a query that raised an exception in the guest, with its vector added: SVM's own exit codes. */
#define EXCEPTION 0x40

/* Why the guest left. */
struct leave {
    enum { LEFT_DONE, LEFT_FAULT, LEFT_OTHER } why;
    u64 status, first, second, rip;
};

/* Each extension: switch it on and make the guest; enter the guest until it leaves; let it go on at rip. */
void extension_init(u64 root);
void extension_enter(struct registers *registers, struct leave *leave);
void extension_resume_at(u64 rip, u64 rsp);

/* Gives up, saying why. */
void stop(const char *why, u64 first, u64 second) __attribute__((noreturn));

static inline u64 rdmsr(u32 msr)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 msr, u64 value)
{
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline u64 read_cr0(void)
{
    u64 value;
    __asm__ volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}

static inline u64 read_cr3(void)
{
    u64 value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

static inline u64 read_cr4(void)
{
    u64 value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

static inline void write_cr4(u64 value)
{
    __asm__ volatile("mov %0, %%cr4" : : "r"(value) : "memory");
}
