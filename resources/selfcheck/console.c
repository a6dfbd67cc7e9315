/* Serial port (16550 at 0x3f8, polled) and printing. */
#include "selfcheck.h"

#define COM1 0x3f8
#define LSR_DATA 0x01
#define LSR_ROOM 0x20

volatile u32 failed;
static volatile u32 busy;

void console_init(void)
{
    out8(COM1 + 1, 0);    /* no interrupts */
    out8(COM1 + 3, 0x80); /* divisor: 115200 */
    out8(COM1 + 0, 1);
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 0x03); /* 8n1 */
    out8(COM1 + 2, 0x01); /* FIFOs */
    out8(COM1 + 4, 0x03);
}

int console_read(void) { return in8(COM1 + 5) & LSR_DATA ? in8(COM1) : -1; }

static void put(char c)
{
    /* A host that does not read must not stop us: give up after a while. */
    for (u32 tries = 0; !(in8(COM1 + 5) & LSR_ROOM) && tries < 20000; tries++)
        pause();
    out8(COM1, c);
}

static void put_number(u64 v, u32 base)
{
    char digits[20];
    u32 n = 0;
    do
        digits[n++] = "0123456789abcdef"[v % base];
    while (v /= base);
    while (n)
        put(digits[--n]);
}

static void put_all(const char *format, __builtin_va_list args)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *s = __builtin_va_arg(args, const char *); *s; s++)
                put(*s);
            break;
        case 'u': put_number(__builtin_va_arg(args, u64), 10); break;
        case 'x': put('0'), put('x'), put_number(__builtin_va_arg(args, u64), 16); break;
        }
    }
    put('\r'), put('\n');
}

/* One line at a time; whoever fails has the last word. */
void print(const char *format, ...)
{
    __builtin_va_list args;
    while (__sync_lock_test_and_set(&busy, 1))
        pause();
    if (!failed) {
        __builtin_va_start(args, format);
        put_all(format, args);
        __builtin_va_end(args);
    }
    __sync_lock_release(&busy);
}

void fail(const char *format, ...)
{
    __builtin_va_list args;
    struct cpu *self = this_cpu();
    interrupts_off();
    if (__sync_lock_test_and_set(&failed, 1))
        halt_for_ever();
    /* Wait for another's line to end; our own, cut short by an exception, never will. */
    for (u32 tries = 0; busy && tries < 1000000 && self != &cpus[0]; tries++)
        pause();
    put('\r'), put('\n');
    for (const char *s = "selfcheck: FAIL "; *s; s++)
        put(*s);
    __builtin_va_start(args, format);
    put_all(format, args);
    __builtin_va_end(args);
    halt_for_ever();
}

void halt_for_ever(void)
{
    for (;;)
        asm volatile("cli; hlt");
}
