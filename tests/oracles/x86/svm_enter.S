# svm_run(registers, vmcb): enters the guest and comes back when it left. The processor keeps rax, rsp, rip and rflags.

    .include "registers.inc"

    .text
    .globl svm_run
svm_run:
    push_own
    pushq   %rdi
    movq    %rsi, %rax
    each    load
    movq    32(%rdi), %rdi
    vmrun   %rax
    movq    (%rsp), %rax
    each    keep
    movq    %rdi, 32(%rax)
    popq    %rdi
    pop_own
    ret

    .section .note.GNU-stack, "", @progbits
