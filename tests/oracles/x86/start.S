# A 64 KiB ROM that starts where an x86 processor begins, copies itself into low memory and calls main in 64-bit mode.
#
# Linked to run at RAM_COPY; until it has been copied, everything is found at ROM. Interrupts stay off, paging maps the first
# 4 GiB one to one. With bit 0 of the flags in the block of queries the host uses five levels, which nested paging follows.

    .equ ROM, 0xffff0000
    .equ RAM_COPY, 0x20000
    .equ ROM_SIZE, 0x10000
    .equ STACK, 0x9f000
    .equ PML4, 0x1000
    .equ PDPT, 0x2000
    .equ PML5, 0x3000
    .equ HDR_FLAGS, 24

    .equ CODE32, 0x08
    .equ DATA, 0x10
    .equ CODE64, 0x18

    .section .reset, "ax"
    .code16
start16:
    cli
    lgdtl   %cs:(rom_gdtr - RAM_COPY)
    movl    %cr0, %eax
    orl     $1, %eax
    movl    %eax, %cr0
    ljmpl   $CODE32, $(start32 - RAM_COPY + ROM)

    .code32
start32:
    movl    $DATA, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    cld
    movl    $ROM, %esi
    movl    $RAM_COPY, %edi
    movl    $(ROM_SIZE / 4), %ecx
    rep movsl
    ljmpl   $CODE32, $copied

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 0x08: 32-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00af9b000000ffff        # 0x18: 64-bit code
    .quad 0x00008b0000000067        # 0x20: a TSS that is never used; VMX wants its selector
    .quad 0
gdt_end:
rom_gdtr:
    .word gdt_end - gdt - 1
    .long gdt - RAM_COPY + ROM

    .section .vector, "ax"
    .code16
    jmp     start16
    .balign 16

    .text
    .code32
copied:
    movl    $STACK, %esp
    movl    $PML4, %edi
    xorl    %eax, %eax
    movl    $(0x3000 / 4), %ecx
    rep stosl
    movl    $bss_begin, %edi
    movl    $bss_end, %ecx
    subl    %edi, %ecx
    rep stosb
    movl    $(PDPT | 3), PML4
    movl    $(PML4 | 3), PML5
    movl    $0x00000083, PDPT       # 1 GiB pages
    movl    $0x40000083, PDPT + 8
    movl    $0x80000083, PDPT + 16
    movl    $0xc0000083, PDPT + 24
    movl    $PML4, %ebx
    movl    %cr4, %eax
    orl     $0x20, %eax             # PAE
    testl   $1, QUERIES + HDR_FLAGS
    jz      four_levels
    orl     $0x1000, %eax           # LA57
    movl    $PML5, %ebx
four_levels:
    movl    %eax, %cr4
    movl    %ebx, %cr3
    movl    $0xc0000080, %ecx       # EFER: LME, NXE
    rdmsr
    orl     $0x900, %eax
    wrmsr
    movl    %cr0, %eax
    andl    $0x9fffffff, %eax       # caches on
    orl     $0x80000021, %eax       # PG, NE, PE
    movl    %eax, %cr0
    ljmpl   $CODE64, $long_mode

    .code64
long_mode:
    lgdt    ram_gdtr(%rip)
    xorl    %eax, %eax
    movl    %eax, %fs
    movl    %eax, %gs
    call    main
halt:
    hlt
    jmp     halt

    .balign 8
    .globl ram_gdtr
ram_gdtr:
    .word gdt_end - gdt - 1
    .quad gdt

    .section .note.GNU-stack, "", @progbits
