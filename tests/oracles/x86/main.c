/*
 * Asks an x86 processor's second stage where guest physical addresses lead.
 *
 * Fills the windows of data, makes a guest whose memory is mapped from guest physical address 0 on, and lets it try the
 * queries (guest.S). Second-stage faults come here and are answers. At the end everything is printed on port 0xe9 and the
 * machine is switched off. The block of queries is described in tests/src/oracle/query.rs, the output in answer.rs.
 */

#include "walker.h"

enum { WINDOWS = 2, QUERY_SIZE = 16, RESULT_SIZE = 24, HEADER = 128 };

struct queries {
    u64 magic, count, root, flags;
    struct {
        u64 start, end;
    } windows[WINDOWS];
};

extern const u8 guest_begin[], guest_peek[], guest_store[], guest_skip[], guest_end[];

static void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void text(const char *string)
{
    while (*string)
        out8(0xe9, *string++);
}

static void hex(u64 value)
{
    int shift = 60;
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        out8(0xe9, "0123456789abcdef"[value >> shift & 15]);
}

static void off(void) __attribute__((noreturn));
static void off(void)
{
    out8(0xf4, 0); /* QEMU: isa-debug-exit */
    for (const char *word = "Shutdown"; *word; word++)
        out8(0x8900, *word); /* Bochs */
    for (;;)
        __asm__ volatile("cli; hlt");
}

void stop(const char *why, u64 first, u64 second)
{
    text("stop: ");
    text(why);
    text(" ");
    hex(first);
    text(" ");
    hex(second);
    text("\n");
    off();
}

static void fill(u64 start, u64 end)
{
    for (u64 at = start; at < end; at += 8)
        *(u64 *)at = 0x9090c300000000b8ull | at >> 3 << 8; /* mov eax, at / 8; ret; nop; nop */
}

static u64 guest_address(const u8 *label)
{
    return GUEST_CODE + (u64)(label - guest_begin);
}

static u64 *guest_memory(u64 gpa)
{
    return (u64 *)(GUEST + gpa);
}

/* The guest sees its own 4 MiB one to one, and one page at PROBE that it points anywhere itself. */
static void make_guest(void)
{
    for (u64 gpa = 0; gpa < 0x20000; gpa += 8)
        *guest_memory(gpa) = 0;
    guest_memory(GUEST_PML4)[0] = GUEST_PDPT | 0x63;
    guest_memory(GUEST_PDPT)[0] = GUEST_PD | 0x63;
    guest_memory(GUEST_PDPT)[PROBE >> 30] = GUEST_PROBE_PD | 0x63;
    guest_memory(GUEST_PROBE_PD)[0] = GUEST_PROBE_PT | 0x63;
    guest_memory(GUEST_PD)[0] = 0x000000 | 0xe3;
    guest_memory(GUEST_PD)[1] = 0x200000 | 0xe3;
    u8 *code = (u8 *)guest_memory(GUEST_CODE);
    for (u64 at = 0; at < (u64)(guest_end - guest_begin); at++)
        code[at] = guest_begin[at];
}

static void print(const u64 *results, u64 count)
{
    text("slat-oracle 1 ");
    hex(count);
    text("\n");
    for (; count; count--, results += 3) {
        hex(results[0]);
        text(" ");
        hex(results[1]);
        text(" ");
        hex(results[2]);
        text("\n");
    }
    text("end\n");
}

void main(void)
{
    const struct queries *queries = (const struct queries *)QUERIES;
    for (int at = 0; at < WINDOWS; at++)
        fill(queries->windows[at].start, queries->windows[at].end);
    make_guest();
    extension_init(queries->root);
    struct registers registers = {
        .rsi = QUERIES + HEADER - GUEST,
        .rdi = RESULTS - GUEST,
        .rcx = queries->count,
        .rbx = GUEST_PROBE_PT,
        .r8 = PROBE,
    };
    for (;;) {
        struct leave leave;
        extension_enter(&registers, &leave);
        if (leave.why == LEFT_DONE)
            break;
        if (leave.why == LEFT_OTHER)
            stop("unforeseen exit", leave.status, leave.first);
        if (leave.rip == guest_address(guest_peek)) {
            extension_resume_at(guest_address(guest_store), GUEST_STACK);
            continue;
        }
        u64 *result = guest_memory(registers.rdi);
        result[0] = leave.status;
        result[1] = leave.first;
        result[2] = leave.second;
        /* A fetch left a return address on the stack. */
        extension_resume_at(guest_address(guest_skip), GUEST_STACK);
    }
    print((const u64 *)RESULTS, queries->count);
    off();
}
