/*
 * The boot sector of the tests' disks, for a PC BIOS: it loads a Linux kernel and its initrd, or counts
 * how often it was started.
 *
 * The BIOS loads the first sector to 0x7c00; that loads the next four, of which the last says what there
 * is to do (tests/src/bootdisk.rs writes it). All disk access is by the BIOS (int 13h, functions 42h and
 * 43h: Phoenix, Enhanced Disk Drive Specification 1.1), the copy to above 1 MiB too (int 15h, 87h).
 */
        .code16
        .set    STAGE2, 0x7e00
        .set    TASK, 0x8400            /* sector 4 */
        .set    BUFFER, 0x20000         /* what is on its way above 1 MiB */
        .set    CHUNK, 64               /* sectors in one step */
        .set    SETUP, 0x10000          /* the kernel's real-mode part */
        .set    KERNEL, 0x100000
        .set    INITRD, 0x8000000       /* 128 MiB: behind all that the kernel needs to unpack itself */
        .set    CMDLINE, 0x1e000

        .globl  _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7c00, %sp
        sti
        ljmp    $0, $1f
1:      mov     %dl, drive
        movw    $4, packet_count
        movl    $1, packet_lba
        movw    $STAGE2 & 15, packet_offset
        movw    $STAGE2 >> 4, packet_segment
        mov     $0x42, %ah
        call    disk
        jmp     stage2

/* Reads (ah = 42h) or writes (43h) what the packet says. */
disk:   mov     drive, %dl
        mov     $packet, %si
        xor     %al, %al
        int     $0x13
        jc      1f
        ret
1:      mov     $disk_failed, %si
        call    puts
2:      hlt
        jmp     2b

putc:   mov     $0x0e, %ah
        mov     $7, %bx
        int     $0x10
        ret

puts:   lodsb
        test    %al, %al
        jz      1f
        call    putc
        jmp     puts
1:      ret

drive:  .byte   0
disk_failed:
        .asciz  "DISK FAILED\r\n"
        .balign 4
packet: .byte   16, 0
packet_count:   .word 0
packet_offset:  .word 0
packet_segment: .word 0
packet_lba:     .long 0, 0

        .org    510
        .byte   0x55, 0xaa

/* From here on at 0x7e00. */
stage2: cmpl    $0, TASK + 0            /* the kernel's first sector */
        jne     load_linux

/* Count: the number of starts is kept in the last word of sector 4. */
        incw    TASK + 508
        movl    $4, packet_lba
        movw    $1, packet_count
        movw    $TASK & 15, packet_offset
        movw    $TASK >> 4, packet_segment
        mov     $0x43, %ah
        call    disk
        mov     $started, %si
        call    puts
        mov     TASK + 508, %ax
        add     $'0', %al
        call    putc
        mov     $newline, %si
        call    puts
        mov     $4, %cx                 /* SeaBIOS holds characters back until the timer ticks */
1:      hlt
        loop    1b
        mov     TASK + 508, %ax
        cmp     TASK + 4, %ax           /* the last start */
        jae     off
        cmpw    $0, TASK + 6            /* wait here for somebody else's reset */
        jne     wait
        mov     $0xcf9, %dx
        mov     $2, %al
        out     %al, %dx
        mov     $6, %al
        out     %al, %dx
wait:   hlt
        jmp     wait
off:    mov     $0x604, %dx             /* PM1a control: S5 and the enable bit */
        mov     $0x2000, %ax
        out     %ax, %dx
        jmp     wait

/* Loads and starts Linux by its 16-bit boot protocol (the kernel's Documentation/arch/x86/boot.rst). */
load_linux:
        mov     $loading, %si
        call    puts
        mov     TASK + 0, %eax          /* the real-mode part goes to its place at once */
        mov     %eax, packet_lba
        mov     TASK + 4, %ax
        mov     %ax, packet_count
        movw    $0, packet_offset
        movw    $SETUP >> 4, packet_segment
        mov     $0x42, %ah
        call    disk
        movzwl  TASK + 4, %eax          /* the rest follows it */
        add     TASK + 0, %eax
        mov     TASK + 8, %ecx
        mov     $KERNEL, %edi
        call    load_high
        mov     TASK + 12, %eax
        mov     TASK + 16, %ecx
        mov     $INITRD, %edi
        call    load_high

        mov     $CMDLINE >> 4, %ax
        mov     %ax, %es
        xor     %di, %di
        mov     $TASK + 32, %si
        mov     $400, %cx
        rep movsb
        mov     $SETUP >> 4, %ax
        mov     %ax, %es
        movb    $0xff, %es:0x210        /* type_of_loader: none that is registered */
        orb     $0x80, %es:0x211        /* loadflags: there is a heap */
        movl    $INITRD, %es:0x218
        mov     TASK + 20, %eax
        mov     %eax, %es:0x21c
        movw    $0xe000 - 0x200, %es:0x224
        movl    $CMDLINE, %es:0x228
        cli
        mov     $SETUP >> 4, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %fs
        mov     %ax, %gs
        mov     %ax, %ss
        mov     $0xe000, %sp
        ljmp    $(SETUP >> 4) + 0x20, $0

/* Loads ecx sectors from eax on to edi. */
load_high:
        mov     %eax, packet_lba
1:      test    %ecx, %ecx
        jz      3f
        mov     $CHUNK, %edx
        cmp     %edx, %ecx
        jae     2f
        mov     %ecx, %edx
2:      mov     %dx, packet_count
        movw    $0, packet_offset
        movw    $BUFFER >> 4, packet_segment
        pushal
        mov     $0x42, %ah
        call    disk
        popal
        mov     %di, to_low
        push    %edi
        shr     $16, %edi
        mov     %edi, %eax
        mov     %al, to_middle
        mov     %ah, to_high
        pop     %edi
        pushal
        mov     %dx, %cx
        shl     $8, %cx                 /* words */
        mov     $descriptors, %si
        xor     %ax, %ax
        mov     %ax, %es
        mov     $0x87, %ah
        int     $0x15
        popal
        jc      4f
        movzwl  %dx, %edx
        add     %edx, packet_lba
        sub     %edx, %ecx
        shl     $9, %edx
        add     %edx, %edi
        jmp     1b
3:      ret
4:      mov     $copy_failed, %si
        call    puts
        jmp     wait

started:        .asciz "BOOT "
newline:        .asciz "\r\n"
loading:        .asciz "loading\r\n"
copy_failed:    .asciz "COPY FAILED\r\n"
        .balign 8
/* What int 15h, 87h is told: two descriptors of its own, source, target, two of its own. */
descriptors:
        .fill   16, 1, 0
        .word   0xffff, BUFFER & 0xffff
        .byte   BUFFER >> 16, 0x93, 0, 0
        .word   0xffff
to_low: .word   0
to_middle: .byte 0
        .byte   0x93, 0
to_high: .byte  0
        .fill   16, 1, 0
        .org    2048
