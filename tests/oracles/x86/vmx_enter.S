# vmx_run(registers, launched): enters the guest and comes back with 0 when it left, with 1 if it was never entered. The
# processor keeps rsp, rip and rflags; the guest does not need its rax kept.

    .include "registers.inc"

    .equ HOST_RSP, 0x6c14
    .equ HOST_RIP, 0x6c16

    .text
    .globl vmx_run
vmx_run:
    push_own
    pushq   %rdi
    movl    $HOST_RSP, %eax
    vmwrite %rsp, %rax
    movl    $HOST_RIP, %eax
    leaq    left(%rip), %rdx
    vmwrite %rdx, %rax
    testl   %esi, %esi
    jnz     resume
    each    load
    movq    32(%rdi), %rdi
    vmlaunch
    jmp     refused
resume:
    each    load
    movq    32(%rdi), %rdi
    vmresume
refused:
    popq    %rdi
    movl    $1, %eax
    pop_own
    ret
left:
    movq    (%rsp), %rax
    each    keep
    movq    %rdi, 32(%rax)
    popq    %rdi
    xorl    %eax, %eax
    pop_own
    ret

    .section .note.GNU-stack, "", @progbits
