/*
 * Clocks: the TSC, the guest's clock (kvmclock where there is KVM, else the TSC measured against
 * the PIT), and the host's real time (KVM's wall clock). Reading them, and judging them: a vCPU's
 * own TSC and clock never go back, and no vCPU's is behind another's by more than `skew`.
 */
#include "selfcheck.h"

#define MSR_KVM_WALL_CLOCK 0x4b564d00
#define MSR_KVM_SYSTEM_TIME 0x4b564d01
#define KVM_FEATURE_CLOCKSOURCE2 (1 << 3)
#define PIT_HZ 1193182UL

u32 clock_is_kvm, clock_has_real;
u64 tsc_khz, timer_khz;

static struct {
    volatile u32 version, seconds, ns;
} wall __attribute__((aligned(64)));

void clock_init(void)
{
    u32 r[4];
    for (u32 base = 0x40000000; base < 0x40000400 && !clock_is_kvm; base += 0x100) {
        cpuid(base, r);
        if (r[1] == 0x4b4d564b && r[2] == 0x564b4d56 && r[3] == 0x4d) { /* "KVMKVMKVM" */
            cpuid(base + 1, r);
            clock_is_kvm = clock_has_real = !!(r[0] & KVM_FEATURE_CLOCKSOURCE2);
        }
    }
}

void clock_init_cpu(struct cpu *cpu)
{
    if (clock_is_kvm)
        wrmsr(MSR_KVM_SYSTEM_TIME, (u64)&cpu->pvclock | 1);
}

/* What the clock said at a TSC, by what it is computed from. */
static inline u64 ns_at(const struct pvclock *clock, u64 tsc)
{
    u64 delta = tsc - clock->tsc;
    s8 shift = clock->shift;
    delta = shift < 0 ? delta >> -shift : delta << shift;
    return clock->system_ns + (u64)((unsigned __int128)delta * clock->multiplier >> 32);
}

static inline u64 kvmclock(const struct pvclock *clock, u64 *tsc)
{
    u64 ns;
    u32 version;
    do {
        version = clock->version;
        barrier();
        *tsc = rdtsc();
        ns = ns_at(clock, *tsc);
        barrier();
    } while (version & 1 || version != clock->version);
    return ns;
}

/* The guest's own clock, and the TSC that says so. */
static inline u64 clock_at(struct cpu *cpu, u64 *tsc)
{
    if (clock_is_kvm)
        return kvmclock(&cpu->pvclock, tsc);
    *tsc = rdtsc();
    if (!tsc_khz)
        return 0;
    u64 ns, high; /* of the 128-bit product; the compiler would want a library for this division */
    asm("mulq %3; divq %4" : "=&a"(ns), "=&d"(high) : "0"(*tsc), "r"(1000000UL), "r"(tsc_khz) : "cc");
    return ns;
}

u64 clock_now(struct cpu *cpu)
{
    u64 tsc;
    return clock_at(cpu, &tsc);
}

/* What the guest's clock said when the TSC was that and the clock was computed from these. */
u64 clock_then(const struct pvclock *params, u64 tsc)
{
    return ns_at(params, tsc);
}

/* What is to be added to the guest's clock for the host's real time: KVM says anew, at each writing of the MSR, what
 * time it was at clock 0. */
u64 clock_wall(void)
{
    if (!clock_has_real)
        return 0;
    wrmsr(MSR_KVM_WALL_CLOCK, (u64)&wall);
    return wall.seconds * 1000000000UL + wall.ns;
}

void clock_wait(struct cpu *cpu, u64 ns)
{
    u64 start = clock_now(cpu);
    while (clock_now(cpu) - start < ns)
        pause();
}

/* Waits about 10 ms, by the PIT's channel 2, and gives how long it was. */
static u64 pit_wait(void)
{
    u32 count = PIT_HZ / 100;
    out8(0x61, (in8(0x61) & ~2) | 1); /* gate on, speaker off */
    out8(0x43, 0xb0);                 /* channel 2, mode 0: output rises at the end */
    out8(0x42, count & 0xff);
    out8(0x42, count >> 8);
    while (!(in8(0x61) & 0x20))
        ;
    return count * 1000000000UL / PIT_HZ;
}

/* Learns the frequencies of the TSC and of the local APIC's timer. */
void clock_calibrate(struct cpu *cpu)
{
    u64 ns, start = clock_now(cpu);
    timer_free_run();
    u32 timer = timer_count();
    u64 tsc = rdtsc();
    if (clock_is_kvm) {
        clock_wait(cpu, 10000000);
        ns = clock_now(cpu) - start;
    } else {
        ns = pit_wait();
    }
    tsc_khz = (rdtsc() - tsc) * 1000000 / ns;
    timer_khz = (u64)(timer - timer_count()) * 1000000 / ns;
    if (!tsc_khz || !timer_khz)
        fail("clock does not run: tsc_khz=%u timer_khz=%u", tsc_khz, timer_khz);
}

__attribute__((noinline, noreturn, cold)) static void went_back(struct cpu *cpu, const char *what, u64 least,
                                                                u64 found, int of_other)
{
    fail(of_other ? "%s vcpu=%u expected>=%x found=%x (another vCPU's, less the skew allowed)"
                  : "%s vcpu=%u expected>=%x found=%x",
         what, (u64)cpu->index, least, found);
}

/* Judges this vCPU's TSC and clock; interrupts are off. Gives the clock. */
u64 clock_check(struct cpu *cpu)
{
    u64 other_tsc = 0, other_clock = 0, tsc;
    int others = params.vcpus > 1;
    if (others) {
        struct cpu *other = &cpus[cpu->index + 1 < params.vcpus ? cpu->index + 1 : 0];
        other_tsc = other->last_tsc, other_clock = other->last_clock;
        barrier();
    }
    u64 now = clock_at(cpu, &tsc);
    if (tsc < cpu->last_tsc)
        went_back(cpu, "tsc", cpu->last_tsc, tsc, 0);
    if (now < cpu->last_clock)
        went_back(cpu, "clock", cpu->last_clock, now, 0);
    if (others) {
        u64 skew_tsc = params.skew * tsc_khz / 1000, skew_ns = params.skew * 1000;
        if (tsc < other_tsc && other_tsc - tsc > skew_tsc)
            went_back(cpu, "tsc", other_tsc - skew_tsc, tsc, 1);
        if (now < other_clock && other_clock - now > skew_ns)
            went_back(cpu, "clock", other_clock - skew_ns, now, 1);
        if (now < other_clock && other_clock - now > cpu->skew_ns)
            cpu->skew_ns = other_clock - now;
    }
    cpu->last_tsc = tsc;
    cpu->last_clock = now;
    return now;
}
