/* The self-checking guest: types, instructions, and what its parts know of each other. */
#ifndef SELFCHECK_H
#define SELFCHECK_H

#include "tick.h"

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int s32;
typedef unsigned long u64;
typedef long s64;

#define MAX_CPUS 64
#define PAGE 4096UL
/* The page to which a SIPI sends a vCPU. Memory below LOWEST is left to the loader and to it. */
#define TRAMPOLINE 0x8000UL
#define LOWEST 0x10000UL

static inline void out8(u16 port, u8 v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out16(u16 port, u16 v) { asm volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out32(u16 port, u32 v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static inline u16 in16(u16 port)
{
    u16 v;
    asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u32 in32(u16 port)
{
    u32 v;
    asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u8 in8(u16 port)
{
    u8 v;
    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}
static inline void wrmsr(u32 msr, u64 v)
{
    asm volatile("wrmsr" ::"c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}
static inline void cpuid(u32 leaf, u32 out[4])
{
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(0));
}
static inline void barrier(void) { asm volatile("" ::: "memory"); }
static inline void pause(void) { asm volatile("pause" ::: "memory"); }
static inline void interrupts_off(void) { asm volatile("cli" ::: "memory"); }
static inline void interrupts_on(void) { asm volatile("sti" ::: "memory"); }
/* No interrupt comes between the two instructions. */
static inline void interrupts_on_and_halt(void) { asm volatile("sti; hlt" ::: "memory"); }

#define PCI_COMMAND 0x04
#define PCI_IO_MEMORY_MASTER 7
#define PCI_BAR0 0x10

/* A dword of the configuration space of function 0 of a slot on bus 0. */
static inline u32 pci_read(u32 slot, u32 reg)
{
    out32(0xcf8, 1u << 31 | slot << 11 | reg);
    return in32(0xcfc);
}
static inline void pci_write(u32 slot, u32 reg, u32 value)
{
    out32(0xcf8, 1u << 31 | slot << 11 | reg);
    out32(0xcfc, value);
}

#define VIRTIO_BLK 0x10011af4 /* the transitional device */
/* Legacy registers, from BAR 0 on; the vectors are there with MSI-X switched on. */
#define VIRTIO_HOST_FEATURES 0
#define VIRTIO_GUEST_FEATURES 4
#define VIRTIO_QUEUE_PAGE 8
#define VIRTIO_QUEUE_SIZE 12
#define VIRTIO_QUEUE_SELECT 14
#define VIRTIO_QUEUE_NOTIFY 16
#define VIRTIO_STATUS 18
#define VIRTIO_CONFIG_VECTOR 20
#define VIRTIO_QUEUE_VECTOR 22
#define VIRTIO_HAS_DRIVER 3
#define VIRTIO_DRIVER_OK 7

/* What KVM writes for a vCPU to compute its clock from the TSC (KVM's documentation, "msr.rst"). */
struct pvclock {
    volatile u32 version;
    u32 pad0;
    volatile u64 tsc;
    volatile u64 system_ns;
    volatile u32 multiplier;
    volatile s8 shift;
    volatile u8 flags;
    u8 pad[2];
};

/* All that a vCPU owns. Only it writes here, but for the starter and the command `r`. */
struct cpu {
    struct pvclock pvclock;
    u32 index;
    volatile u32 alive;

    /* Its ticks: how many there were, and the TSC at the last one. Of the last that went the whole way (boot.S): what
     * was to be added to the clock for the host's real time, what the clock was computed from, and what it said; so
     * many of the next ones may go the quick way. */
    volatile u64 ticks;
    u64 tick_tsc, tick_wall;
    struct pvclock tick_pvclock;
    s32 quick;
    u64 tick_now;

    /* Its time, written with interrupts off only. */
    volatile u64 last_tsc, last_clock;
    volatile u64 gap, max_gap;           /* ns between ticks by the guest's clock */
    volatile u64 real_gap, max_real_gap; /* by the host's real time */
    volatile u64 skew_ns;

    /* Its memory: pages first .. first + pages of all, of which `set`, `stride` apart, are rewritten. */
    u64 first, pages, set, stride;
    volatile u64 generation, position;
    volatile u64 roll;
    volatile u64 filled, rewritten, verified;

    /* Its work. */
    u64 seen_ticks, rewrite_credit, verify_credit;
    volatile u64 pass, pass_position; /* the complete verification it has done or is doing */
} __attribute__((aligned(64)));

struct params {
    u64 fill, set, rate, verify, spread, full, hz, vcpus, seed, every, skew, writers, disk, drive,
        msr, msr_value;
};

extern struct params params;
extern struct cpu cpus[MAX_CPUS];
extern volatile u32 failed;
extern char image_start[], image_constant_end[], image_end[];

/* The vCPU that executes this: known by its stack. */
static inline struct cpu *this_cpu(void)
{
    extern char stacks[];
    u64 sp;
    asm("mov %%rsp, %0" : "=r"(sp));
    return &cpus[(sp - (u64)stacks) / PAGE];
}

/* console.c: %s string, %u decimal u64, %x hexadecimal u64 */
void console_init(void);
void print(const char *format, ...);
int console_read(void);
/* Prints "selfcheck: FAIL " and the rest, once for all vCPUs, and halts. */
__attribute__((noreturn)) void fail(const char *format, ...);
__attribute__((noreturn)) void halt_for_ever(void);

/* clock.c: all times in ns */
void clock_init(void);
void clock_init_cpu(struct cpu *cpu);
u64 clock_now(struct cpu *cpu);
u64 clock_wall(void);
u64 clock_then(const struct pvclock *params, u64 tsc);
void clock_wait(struct cpu *cpu, u64 ns);
void clock_calibrate(struct cpu *cpu);
u64 clock_check(struct cpu *cpu);
extern u32 clock_is_kvm, clock_has_real;
extern u64 tsc_khz, timer_khz;

/* cpus.c */
#define VECTOR_DEVICE 0x41 /* passed over, whoever sends it */
#define GAPS 32
extern struct gap {
    volatile u64 ns, end; /* its length, and the host's real time at its end */
} gaps[GAPS];
void gaps_forget(void);
void cpus_init(void);
void cpu_init(struct cpu *cpu);
void cpus_start(void);
void timer_start(void);
u32 timer_count(void);
void timer_free_run(void);

/* memory.c */
void memory_init(u64 start_info);
void memory_share(void);
u64 memory_pages(void);
u64 ram_pages(void);
void memory_fill(struct cpu *cpu, void (*meanwhile)(struct cpu *));
void memory_rewrite(struct cpu *cpu, u64 count);
void memory_verify(struct cpu *cpu, u64 page, u64 count);
u64 memory_corrupt(struct cpu *cpu);

/* disk.c */
void disk_init(void);
int disk_work(u64 ticks, u64 up_ms, int verify);
u64 disk_records(void);
u64 disk_errors(void);

/* drivers.c */
u64 drivers_init(void);

#endif
