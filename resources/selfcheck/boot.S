/* From the 32-bit PVH entry, and from a SIPI, to 64-bit C; and the interrupt entries. */

#include "tick.h"

#define CODE32 0x08
#define CODE64 0x10
#define DATA   0x18
#define STACK_SIZE 4096

    /* Type 18, XEN_ELFNOTE_PHYS32_ENTRY. QEMU reads eight bytes of address, others four. */
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad start32

    .text
    .code32
    .globl start32
start32:                            /* EBX: hvm_start_info; flat segments, paging off */
    cli
    cld
    lgdt gdt_pointer
    ljmp $CODE32, $1f
1:  mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss

    mov $bss_start, %edi            /* a loader may leave what a former guest had there */
    mov $bss_end, %ecx
    sub %edi, %ecx
    shr $2, %ecx
    xor %eax, %eax
    rep stosl

    movl $page_pointers + 3, page_root
    mov $page_pointers, %edi        /* four page directories ... */
    mov $page_directories + 3, %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $4096, %eax
    loop 1b
    mov $page_directories, %edi     /* ... map 4 GiB to themselves in pages of 2 MiB */
    mov $0x83, %eax
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 1b

    mov $stacks + STACK_SIZE, %esp
    mov $main, %ebp
    mov %ebx, %esi                  /* the argument of main */
    jmp enter_long_mode

ap32:                               /* another vCPU; its stack is that of its APIC id */
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $1, %eax
    cpuid
    mov %ebx, %esi
    shr $24, %esi                   /* the argument of ap_main */
    mov %esi, %esp
    shl $12, %esp
    add $stacks + STACK_SIZE, %esp
    mov $ap_main, %ebp

enter_long_mode:                    /* EBP: where to, ESI: with what argument */
    mov $0x20, %eax                 /* PAE */
    mov %eax, %cr4
    mov $page_root, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx           /* EFER: LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80010031, %eax           /* PG, WP, NE, ET, PE; caches on */
    mov %eax, %cr0
    ljmp $CODE64, $1f
    .code64
1:  mov %esi, %edi
    mov %ebp, %eax
    xor %ebp, %ebp
    call *%rax
2:  cli
    hlt
    jmp 2b

    /* Copied to TRAMPOLINE; real mode, CS = its segment. */
    .code16
    .globl trampoline, trampoline_end
trampoline:
    cli
    cld
    lgdtl %cs:gdt_pointer16 - trampoline
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $ap32
gdt_pointer16:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code64
    /* void load_interrupts(const void *pointer) */
    .globl load_interrupts
load_interrupts:
    lidt (%rdi)
    ret

    /* A tick that comes in time, by the TSC and with the clock's parameters as they were, is counted, and no more: a
     * guest that is idle must be so where each instruction is interpreted. Whatever else it is, and each so many-th,
     * goes the whole way. */
    .globl tick_entry
tick_entry:
    push %rax
    push %rcx
    push %rdx
    mov %rsp, %rcx                  /* this vCPU's struct, as this_cpu() finds it */
    sub $stacks, %rcx
    shr $12, %rcx
    imul $CPU_SIZE, %rcx, %rcx
    decl cpus + CPU_QUICK(%rcx)
    js whole_tick
    mov cpus + CPU_CLOCK_VERSION(%rcx), %eax
    cmp cpus + CPU_TICK_VERSION(%rcx), %eax
    jne whole_tick
    rdtsc
    shl $32, %rdx
    or %rax, %rdx
    mov %rdx, %rax
    sub cpus + CPU_TICK_TSC(%rcx), %rax
    cmp quick_limit, %rax           /* unsigned: a TSC that went back is no quick tick */
    jae whole_tick
    mov %rdx, cpus + CPU_TICK_TSC(%rcx)
    incq cpus + CPU_TICKS(%rcx)
    mov $LAPIC_EOI, %eax
    movl $0, (%rax)
    pop %rdx
    pop %rcx
    pop %rax
    iretq
whole_tick:
    .irp reg, rsi, rdi, r8, r9, r10, r11
    push %\reg
    .endr
    sub $8, %rsp
    cld
    call on_tick
    add $8, %rsp
    .irp reg, r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax
    pop %\reg
    .endr
    iretq

    .globl device_entry
device_entry:                       /* nothing but the end of the interrupt */
    push %rax
    mov $LAPIC_EOI, %eax
    movl $0, (%rax)
    pop %rax
    iretq

    .globl spurious_entry
spurious_entry:
    iretq

    /* Exceptions do not come back. The stubs are 16 bytes apart. */
    .balign 16
    .globl exception_entries
exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector >= 29 && vector <= 30)
    push $0                         /* where the processor pushes no error code */
    .endif
    push $vector
    jmp exception
    .set vector, vector + 1
    .endr
exception:
    mov %rsp, %rdi                  /* vector, error code, RIP, ... */
    and $-16, %rsp
    cld
    call on_exception

    .section .rodata
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* 32-bit code */
    .quad 0x00af9b000000ffff        /* 64-bit code */
    .quad 0x00cf93000000ffff        /* data */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .bss
    .balign 4096
    .globl page_pointers
page_root: .skip 4096
page_pointers: .skip 4096

    .section .uncleared, "aw", @nobits
    .balign 4096
    .globl stacks
page_directories: .skip 4 * 4096
stacks: .skip 64 * STACK_SIZE

    .section .note.GNU-stack, "", @progbits
