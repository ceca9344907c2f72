# Asks a RISC-V hart's G-stage where guest physical addresses lead.
#
# Runs from the start of RAM, without firmware. M-mode opens PMP, delegates all traps and enters HS-mode; HS-mode fills the
# windows of data with patterns, writes hgatp and asks each query by HLV.D, HSV.D or HLVX.WU with vsatp off, so that the
# virtual address is the guest physical one. A trap is an answer: its cause, stval and htval are kept and the instruction is
# skipped. Then everything is printed on the UART and the machine ends.
#
# QUERIES and RESULTS come from the command line; tests/src/oracle/query.rs describes the block of queries and
# tests/src/oracle/answer.rs what is printed.

    .option arch, +h

    .equ UART, 0x10000000
    .equ UART_LSR, 5
    .equ LSR_THRE, 0x20
    .equ FINISHER, 0x100000
    .equ FINISHER_PASS, 0x5555

    .equ HDR_COUNT, 8
    .equ HDR_ROOT, 16
    .equ HDR_FLAGS, 24
    .equ HDR_WINDOWS, 32
    .equ HDR_SIZE, 128
    .equ WINDOWS, 2

    .equ STATUS_STORE_LOST, 0x100

    .text
    .globl _start
_start:
    li      sp, RESULTS - 16        # nothing else is near; the walk over results grows upwards
    la      t0, fatal
    csrw    mtvec, t0
    li      t0, -1
    csrw    pmpaddr0, t0
    li      t0, 0x1f                # NAPOT over everything, RWX
    csrw    pmpcfg0, t0
    li      t0, -1
    csrw    medeleg, t0
    li      t0, QUERIES
    ld      t1, HDR_FLAGS(t0)
    csrs    0x30a, t1               # menvcfg: PBMTE, ADUE
    la      t0, trap
    csrw    stvec, t0
    li      t0, 3 << 11
    csrc    mstatus, t0
    li      t0, 1 << 11             # MPP = S, MPV = 0
    csrs    mstatus, t0
    la      t0, supervisor
    csrw    mepc, t0
    mret

    .balign 4
supervisor:
    li      s7, 0
    csrw    0x280, zero             # vsatp: bare
    li      t0, 1 << 8              # hstatus.SPVP: HLV and HSV act as VS-mode
    csrs    0x600, t0

    li      s0, QUERIES
    addi    t6, s0, HDR_WINDOWS
    li      t5, WINDOWS
next_window:
    ld      t0, 0(t6)
    ld      t1, 8(t6)
    li      t2, 0x9090c300000000b8  # mov eax, imm32; ret; nop; nop
fill:
    bgeu    t0, t1, filled
    srli    t3, t0, 3
    slli    t3, t3, 8
    or      t3, t3, t2
    sd      t3, 0(t0)
    addi    t0, t0, 8
    j       fill
filled:
    addi    t6, t6, 16
    addi    t5, t5, -1
    bnez    t5, next_window

    ld      t0, HDR_ROOT(s0)
    csrw    0x680, t0               # hgatp
    hfence.gvma
    csrr    t1, 0x680
    bne     t0, t1, no_mode

    ld      s1, HDR_COUNT(s0)
    addi    s0, s0, HDR_SIZE
    li      s2, RESULTS
query:
    beqz    s1, print
    hfence.gvma                     # each query walks
    ld      a0, 0(s0)
    ld      a1, 8(s0)
    li      a2, 0
    li      s9, 0
    li      s10, 0
    li      s11, 0
    li      s7, 1                   # traps are answers from here
    li      t0, 1
    beq     a1, t0, write
    bgtu    a1, t0, execute
    hlv.d   a2, (a0)
    j       answered
write:
    hlv.d   a2, (a0)
    li      s9, 0                   # only the store's trap counts
    not     a3, a2
    hsv.d   a3, (a0)
    bnez    s9, answered
    hlv.d   a4, (a0)
    beq     a4, a3, restore
    li      s9, STATUS_STORE_LOST
    j       answered
restore:
    hsv.d   a2, (a0)
    j       answered
execute:
    hlvx.wu a2, (a0)
    bnez    s9, answered
    addi    a5, a0, 4
    hlvx.wu a4, (a5)
    slli    a4, a4, 32
    or      a2, a2, a4
answered:
    li      s7, 0
    sd      s9, 0(s2)
    bnez    s9, faulted
    sd      a2, 8(s2)
    sd      zero, 16(s2)
    j       recorded
faulted:
    sd      s10, 8(s2)
    sd      s11, 16(s2)
recorded:
    addi    s0, s0, 16
    addi    s2, s2, 24
    addi    s1, s1, -1
    j       query

print:
    la      a0, begin
    call    text
    li      s0, QUERIES
    ld      s1, HDR_COUNT(s0)
    mv      a0, s1
    call    hex
    li      a0, '\n'
    call    byte
    li      s2, RESULTS
line:
    beqz    s1, finish
    ld      a0, 0(s2)
    call    hex
    li      a0, ' '
    call    byte
    ld      a0, 8(s2)
    call    hex
    li      a0, ' '
    call    byte
    ld      a0, 16(s2)
    call    hex
    li      a0, '\n'
    call    byte
    addi    s2, s2, 24
    addi    s1, s1, -1
    j       line
finish:
    la      a0, end
    call    text
    j       off

no_mode:
    la      a0, hgatp_refused
    call    text
    j       off

    .balign 4
fatal:                              # a trap to M-mode: none is foreseen
    csrr    s3, mcause
    csrr    s4, mepc
    j       unforeseen

    .balign 4
trap:
    beqz    s7, trap_unforeseen
    csrr    s9, scause
    csrr    s10, stval
    csrr    s11, 0x643              # htval
    csrr    t4, sepc
    addi    t4, t4, 4               # HLV and HSV have no short form
    csrw    sepc, t4
    sret
trap_unforeseen:
    csrr    s3, scause
    csrr    s4, sepc
unforeseen:
    la      a0, unforeseen_trap
    call    text
    mv      a0, s3
    call    hex
    li      a0, ' '
    call    byte
    mv      a0, s4
    call    hex
    li      a0, '\n'
    call    byte
off:
    li      t0, FINISHER
    li      t1, FINISHER_PASS
    sw      t1, 0(t0)
    j       off

# Prints the string at a0.
text:
    mv      t6, ra
    mv      t5, a0
text_next:
    lbu     a0, 0(t5)
    beqz    a0, text_done
    call    byte
    addi    t5, t5, 1
    j       text_next
text_done:
    jr      t6

# Prints a0 as hexadecimal without leading zeros.
hex:
    mv      t6, ra
    mv      t5, a0
    li      t4, 60
hex_skip:
    beqz    t4, hex_digit
    srl     t0, t5, t4
    bnez    t0, hex_digit
    addi    t4, t4, -4
    j       hex_skip
hex_digit:
    srl     a0, t5, t4
    andi    a0, a0, 15
    li      t0, 10
    bltu    a0, t0, hex_decimal
    addi    a0, a0, 'a' - '0' - 10
hex_decimal:
    addi    a0, a0, '0'
    call    byte
    addi    t4, t4, -4
    bgez    t4, hex_digit
    jr      t6

# Prints the character in a0.
byte:
    li      t1, UART
byte_wait:
    lbu     t2, UART_LSR(t1)
    andi    t2, t2, LSR_THRE
    beqz    t2, byte_wait
    sb      a0, 0(t1)
    ret

    .section .rodata
begin:
    .asciz "slat-oracle 1 "
end:
    .asciz "end\n"
hgatp_refused:
    .asciz "stop: unsupported: hgatp does not take this mode\n"
unforeseen_trap:
    .asciz "stop: unforeseen trap "
