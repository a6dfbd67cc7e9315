/* Interrupts, the local APIC and its timer, and starting the other vCPUs. */
#include "selfcheck.h"

#define VECTOR_TICK 0x40
#define VECTOR_SPURIOUS 0xff
#define CODE64 0x10
#define INTERRUPT_GATE 0x8e

/* Local APIC registers (Intel SDM vol. 3, 11.4.1). */
#define LAPIC 0xfee00000UL
#define EOI (LAPIC_EOI - LAPIC)
#define SPURIOUS 0xf0
#define COMMAND 0x300
#define COMMAND_HIGH 0x310
#define LVT_TIMER 0x320
#define TIMER_INITIAL 0x380
#define TIMER_CURRENT 0x390
#define TIMER_DIVIDE 0x3e0
#define TIMER_PERIODIC (1 << 17)
#define TIMER_MASKED (1 << 16)
#define DIVIDE_BY_1 0xb
#define COMMAND_INIT 0x4500
#define COMMAND_STARTUP 0x4600
#define COMMAND_PENDING (1 << 12)

/* So often in a second, at least, a tick goes the whole way, if there are as many: the clocks are judged and the serial
 * port is read. All do with a clock that is not KVM's. */
#define WHOLE_HZ 125

struct cpu cpus[MAX_CPUS];
/* A tick that comes later than this after the last one, by the TSC, is no quick one: a quarter more than a period. 0
 * until the timer is started. */
u64 quick_limit;

_Static_assert(sizeof(struct cpu) == CPU_SIZE, "tick.h");
#define AT(field, offset) _Static_assert(__builtin_offsetof(struct cpu, field) == offset, "tick.h")
AT(pvclock.version, CPU_CLOCK_VERSION);
AT(ticks, CPU_TICKS);
AT(tick_tsc, CPU_TICK_TSC);
AT(tick_pvclock.version, CPU_TICK_VERSION);
AT(quick, CPU_QUICK);

static struct {
    u16 offset0, selector;
    u8 stack, type;
    u16 offset1;
    u32 offset2, zero;
} gates[256];

static u32 lapic(u32 reg) { return *(volatile u32 *)(LAPIC + reg); }
static void lapic_set(u32 reg, u32 value) { *(volatile u32 *)(LAPIC + reg) = value; }

static void gate(u32 vector, char *entry)
{
    gates[vector].offset0 = (u64)entry;
    gates[vector].offset1 = (u64)entry >> 16;
    gates[vector].selector = CODE64;
    gates[vector].type = INTERRUPT_GATE;
}

/* Once for all: the interrupt table, and no interrupts from the PICs. */
void cpus_init(void)
{
    extern char exception_entries[], tick_entry[], device_entry[], spurious_entry[];
    for (u32 vector = 0; vector < 32; vector++)
        gate(vector, exception_entries + 16 * vector);
    gate(VECTOR_TICK, tick_entry);
    gate(VECTOR_DEVICE, device_entry);
    gate(VECTOR_SPURIOUS, spurious_entry);
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
}

void cpu_init(struct cpu *cpu)
{
    extern void load_interrupts(const void *);
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) pointer = { sizeof gates - 1, (u64)gates };
    load_interrupts(&pointer);
    cpu->index = cpu - cpus;
    lapic_set(SPURIOUS, 0x100 | VECTOR_SPURIOUS);
    clock_init_cpu(cpu);
}

static void command(u32 apic_id, u32 what)
{
    lapic_set(COMMAND_HIGH, apic_id << 24);
    lapic_set(COMMAND, what);
    while (lapic(COMMAND) & COMMAND_PENDING)
        pause();
}

void cpus_start(void)
{
    extern char trampoline[], trampoline_end[];
    struct cpu *self = this_cpu();
    for (u64 i = 0; i < (u64)(trampoline_end - trampoline); i++)
        ((volatile u8 *)TRAMPOLINE)[i] = trampoline[i];
    for (u32 id = 1; id < params.vcpus; id++) {
        command(id, COMMAND_INIT);
        clock_wait(self, 1000000);
        command(id, COMMAND_STARTUP | TRAMPOLINE / PAGE);
        u64 start = clock_now(self);
        while (!cpus[id].alive)
            if (clock_now(self) - start > 10000000000UL)
                fail("vcpu=%u did not start within 10 s", (u64)id);
    }
}

/* The timer counts down, silently, from the highest value. */
void timer_free_run(void)
{
    lapic_set(TIMER_DIVIDE, DIVIDE_BY_1);
    lapic_set(LVT_TIMER, TIMER_MASKED | VECTOR_TICK);
    lapic_set(TIMER_INITIAL, ~0u);
}

u32 timer_count(void) { return lapic(TIMER_CURRENT); }

/* `hz` interrupts in a second on this vCPU. */
void timer_start(void)
{
    lapic_set(TIMER_DIVIDE, DIVIDE_BY_1);
    lapic_set(LVT_TIMER, TIMER_PERIODIC | VECTOR_TICK);
    lapic_set(TIMER_INITIAL, timer_khz * 1000 / params.hz);
    quick_limit = tsc_khz * 1250 / params.hz;
    interrupts_on();
}

static inline void longest(s64 since, volatile u64 *gap, volatile u64 *max)
{
    if (since <= (s64)*gap) /* which is never more than the longest of all */
        return;
    *gap = since;
    if (*gap > *max)
        *max = *gap;
}

/* The longest times between two ticks of the first vCPU, by the host's real time, in no order. */
struct gap gaps[GAPS];
/* The shortest of them, which the next longer one takes the place of, and how long it is. */
static u32 shortest;
static volatile u64 shortest_ns;

void gaps_forget(void)
{
    for (u32 i = 0; i < GAPS; i++)
        gaps[i].ns = 0;
    shortest_ns = 0;
}

__attribute__((noinline)) static void note_gap(u64 ns, u64 end)
{
    gaps[shortest] = (struct gap){ ns, end };
    for (u32 i = 0; i < GAPS; i++)
        if (gaps[i].ns < gaps[shortest].ns)
            shortest = i;
    shortest_ns = gaps[shortest].ns;
}

/* A tick that may be late, or at which it is time to look. The gap is that since the last tick, quick or not: what the
 * clocks said then follows from the TSC then, and from what they were computed from. */
void on_tick(void)
{
    struct cpu *cpu = this_cpu();
    int first = !cpu->tick_tsc;
    u64 last = clock_is_kvm ? clock_then(&cpu->tick_pvclock, cpu->tick_tsc) : cpu->tick_now;
    u64 last_wall = cpu->tick_wall, now;
    u32 version;
    do {
        version = cpu->pvclock.version;
        now = clock_check(cpu);
        cpu->tick_pvclock = cpu->pvclock;
    } while (cpu->pvclock.version != version);
    cpu->tick_tsc = cpu->last_tsc;
    cpu->tick_now = now;
    cpu->quick = clock_is_kvm ? (s32)(params.hz / WHOLE_HZ) - 1 : 0;
    if (!cpu->index)
        cpu->tick_wall = clock_wall();
    if (!first) {
        longest(now - last, &cpu->gap, &cpu->max_gap);
        s64 real = now - last + (cpu->tick_wall - last_wall); /* real time may be set back */
        longest(real, &cpu->real_gap, &cpu->max_real_gap);
        if (!cpu->index && real > (s64)shortest_ns)
            note_gap(real, now + cpu->tick_wall);
    }
    cpu->ticks++;
    lapic_set(EOI, 0);
}

void on_exception(u64 *frame)
{
    u64 cr2;
    asm("mov %%cr2, %0" : "=r"(cr2));
    fail("exception=%u error=%x rip=%x cr2=%x vcpu=%u", frame[0], frame[1], frame[2], cr2,
         (u64)this_cpu()->index);
}
