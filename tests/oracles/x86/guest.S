# The guest: tries each query by itself and writes down what it found. A second-stage fault leaves it; the host then writes
# the answer down, and lets it go on at guest_skip with the next query.
#
# It runs in 64-bit mode at guest physical address GUEST_CODE, with the registers main.c gives it:
#
#   rsi  next query     rdi  next result     rcx  queries left
#   rbx  the guest's page-table entry for the probe page    r8  virtual address of the probe page
#
# It ends with hlt.

    .equ STATUS_STORE_LOST, 0x100

    .text
    .code64
    .globl guest_begin, guest_peek, guest_store, guest_skip, guest_end
guest_begin:
    testq   %rcx, %rcx
    jz      done
    movq    0(%rsi), %rax
    movq    8(%rsi), %rdx
    movq    %rax, %r9
    andl    $0xfff, %r9d
    andq    $-0x1000, %rax
    orq     $0x63, %rax             # present, writable, A and D already set
    movq    %rax, (%rbx)
    invlpg  (%r8)
    addq    %r8, %r9
    xorl    %r10d, %r10d
    cmpq    $1, %rdx
    je      write
    ja      fetch
    movq    (%r9), %rax
    jmp     answered
write:
    movabsq $0x0123456789abcdef, %r11
guest_peek:
    movq    (%r9), %rax             # to be put back; that it faults is no answer to a write
guest_store:
    movq    %r11, (%r9)
    movq    (%r9), %r12
    movq    %rax, (%r9)
    cmpq    %r11, %r12
    je      answered
    movl    $STATUS_STORE_LOST, %r10d
    jmp     answered
fetch:
    call    *%r9                    # mov eax, address / 8; ret
    shlq    $8, %rax                # the word that this code is
    movabsq $0x9090c300000000b8, %r11
    orq     %r11, %rax
answered:
    movq    %r10, 0(%rdi)
    movq    %rax, 8(%rdi)
    movq    $0, 16(%rdi)
guest_skip:
    addq    $16, %rsi
    addq    $24, %rdi
    decq    %rcx
    jmp     guest_begin
done:
    hlt
    jmp     done
guest_end:

    .section .note.GNU-stack, "", @progbits
