/* The self-checking guest: parameters, the loop of a vCPU, the commands. See README.md. */
#include "selfcheck.h"

struct params params = {
    .fill = ~0UL,
    .set = 16 << 20,
    .rate = 2000,
    .verify = 4000,
    .hz = 100,
    .vcpus = 1,
    .seed = 1,
    .every = 1000,
    .skew = 1000,
};

static const struct {
    const char *key;
    u64 *value, min, max;
} known[] = {
    { "fill", &params.fill, PAGE, ~0UL },
    { "set", &params.set, 0, ~0UL },
    { "rate", &params.rate, 0, 1UL << 40 },
    { "verify", &params.verify, 0, 1UL << 40 },
    { "spread", &params.spread, 0, 1 },
    { "full", &params.full, 0, 1 },
    { "hz", &params.hz, 10, 1000 },
    { "vcpus", &params.vcpus, 1, MAX_CPUS },
    { "seed", &params.seed, 0, ~0UL },
    { "every", &params.every, 10, 1UL << 40 },
    { "skew", &params.skew, 0, 1UL << 40 },
    { "writers", &params.writers, 0, MAX_CPUS },
    { "disk", &params.disk, 0, 1UL << 20 },
    { "drive", &params.drive, 0, 1 },
    { "msr", &params.msr, 0, ~0U },
    { "msr_value", &params.msr_value, 0, ~0UL },
};

static volatile u32 go, paused;
static u32 log_verified;
static volatile u64 pass_wanted;
static u64 pass_reported, image_sum, next_status, attended, started;

static int same(const char *text, u64 len, const char *word)
{
    u64 i = 0;
    while (i < len && word[i] && text[i] == word[i])
        i++;
    return i == len && !word[i];
}

/* A number with K, M, G behind it, or "all". */
static int number(const char *text, u64 len, u64 *value)
{
    u64 i = 0, v = 0;
    if (same(text, len, "all"))
        return *value = ~0UL, 1;
    for (; i < len && text[i] >= '0' && text[i] <= '9'; i++)
        v = v * 10 + (text[i] - '0');
    if (i && i + 1 == len) {
        u32 shift = text[i] == 'K' ? 10 : text[i] == 'M' ? 20 : text[i] == 'G' ? 30 : 0;
        v <<= shift;
        i += !!shift;
    }
    *value = v;
    return len && i == len;
}

static int separator(char c) { return c == ' ' || c == ',' || c == '\n' || !c; }

static void parse(const char *s)
{
    while (*s) {
        u64 key = 0, end, v, k;
        if (separator(*s)) {
            s++;
            continue;
        }
        while (!separator(s[key]) && s[key] != '=')
            key++;
        for (end = key; !separator(s[end]);)
            end++;
        u64 from = s[key] == '=' ? key + 1 : end;
        for (k = 0; k < sizeof known / sizeof *known; k++)
            if (same(s, key, known[k].key))
                break;
        if (k == sizeof known / sizeof *known)
            fail("unknown parameter at \"%s\"", s);
        if (!number(s + from, end - from, &v) || v < known[k].min || v > known[k].max)
            fail("bad value of parameter at \"%s\"", s);
        *known[k].value = v;
        s += end;
    }
}

/* The sum of the program's code and constants, which nothing may change. */
static u64 sum_image(void)
{
    u64 sum = 0;
    for (u64 *word = (u64 *)image_start; word < (u64 *)image_constant_end; word++)
        sum = (sum ^ *word) * 3;
    return sum;
}

static u64 total(u64 offset)
{
    u64 sum = 0;
    for (u64 i = 0; i < params.vcpus; i++)
        sum += *(volatile u64 *)((char *)&cpus[i] + offset);
    return sum;
}

static u64 highest(u64 offset)
{
    u64 max = 0;
    for (u64 i = 0; i < params.vcpus; i++) {
        u64 v = *(volatile u64 *)((char *)&cpus[i] + offset);
        max = v > max ? v : max;
    }
    return max;
}

#define TOTAL(field) total(__builtin_offsetof(struct cpu, field))
#define HIGHEST(field) highest(__builtin_offsetof(struct cpu, field))

static void print_status(u64 now)
{
    struct cpu *self = &cpus[0];
    print("selfcheck: up_ms=%u gen=%u pages=%u verified=%u rewritten=%u ticks=%u gap_us=%u "
          "max_gap_us=%u guest_gap_us=%u max_guest_gap_us=%u skew_us=%u vcpus=%u records=%u "
          "disk_errors=%u",
          (now - started) / 1000000, self->generation, memory_pages(), TOTAL(verified),
          TOTAL(rewritten), TOTAL(ticks), self->real_gap / 1000, self->max_real_gap / 1000,
          HIGHEST(gap) / 1000, HIGHEST(max_gap) / 1000, HIGHEST(skew_ns) / 1000, params.vcpus,
          disk_records(), disk_errors());
    self->real_gap = 0;
    for (u64 i = 0; i < params.vcpus; i++)
        cpus[i].gap = 0;
}

static void print_gaps(void)
{
    static struct gap now[GAPS]; /* printing takes many ticks */
    interrupts_off();
    for (u32 i = 0; i < GAPS; i++)
        now[i] = gaps[i];
    interrupts_on();
    for (u32 i = 0; i < GAPS; i++)
        print("selfcheck: gap_us=%u end_us=%u", now[i].ns / 1000, now[i].end / 1000);
}

static void obey(int letter, u64 now)
{
    static const struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) no_interrupts = { 0, 0 };
    extern void load_interrupts(const void *);
    switch (letter) {
    case 'r':
        for (u64 i = 0; i < params.vcpus; i++)
            cpus[i].gap = cpus[i].max_gap = cpus[i].real_gap = cpus[i].max_real_gap = 0;
        gaps_forget();
        break;
    case 'h': paused = 1; break;
    case 'g': paused = 0; break;
    case 'v': pass_wanted = pass_reported + 1; return;
    case 's': print_status(now); return;
    case 'l': print_gaps(); break;
    case 'x': print("selfcheck: corrupted page=%x", memory_corrupt(&cpus[0])); return;
    case 'm':
        if (params.msr)
            wrmsr(params.msr, params.msr_value);
        break;
    case 'q': out16(0x604, 1 << 13); return;
    case 'b': out8(0xcf9, 0x06); return;
    case 't':
        load_interrupts(&no_interrupts);
        asm volatile("ud2");
        return;
    default: return;
    }
    char word[2] = { letter, 0 };
    print("selfcheck: ok %s", word);
}

/* What only the first vCPU does, at a tick: listen and tell. */
static void attend(u64 now)
{
    int letter;
    while ((letter = console_read()) >= 0)
        obey(letter, now);
    if (pass_wanted != pass_reported) {
        u64 done = 0;
        while (done < params.vcpus && cpus[done].pass == pass_wanted)
            done++;
        if (done == params.vcpus && (log_verified || !params.disk)) {
            if (sum_image() != image_sum)
                fail("program sum expected=%x found=%x", image_sum, sum_image());
            print("selfcheck: verified all pages=%u ok records=%u", memory_pages(),
                  disk_records());
            pass_reported = pass_wanted;
            log_verified = 0;
        }
    }
    if (now >= next_status) {
        print_status(now);
        next_status = now + params.every * 1000000;
    }
}

/* Credit is counted in pages times `hz` times vCPUs, so that any rate can be kept exactly. */
static u64 spend(u64 *credit, u64 most)
{
    u64 price = params.hz * params.vcpus, pages = *credit / price;
    pages = pages < most ? pages : most;
    *credit -= pages * price;
    return pages;
}

static void earn(u64 *credit, u64 rate, u64 ticks)
{
    u64 price = params.hz * params.vcpus, most = 2 * rate + price;
    *credit += rate * ticks;
    if (*credit > most) /* what could not be done in time is not made up for */
        *credit = most;
}

/* Pages in one round. */
#define BATCH 64UL

/* Verifies up to `count` pages from `*page` on, to this vCPU's last page; moves `*page`. */
static void verify_some(struct cpu *cpu, volatile u64 *page, u64 count)
{
    u64 left = cpu->pages - *page;
    count = count < left ? count : left;
    memory_verify(cpu, *page, count);
    *page += count;
}

/* One round of a vCPU's work; gives 0 when there is nothing to do before the next tick. */
static int work(struct cpu *cpu)
{
    u64 pages, wanted = pass_wanted;
    int more = 0;
    if (cpu->set && !paused) {
        pages = params.rate ? spend(&cpu->rewrite_credit, BATCH) : BATCH;
        memory_rewrite(cpu, pages);
        more |= pages == BATCH;
    }
    if (params.verify) {
        pages = spend(&cpu->verify_credit, BATCH);
        verify_some(cpu, &cpu->roll, pages);
        if (cpu->roll == cpu->pages)
            cpu->roll = 0;
        more |= pages == BATCH;
    }
    if (cpu->pass != wanted) {
        verify_some(cpu, &cpu->pass_position, 4 * BATCH);
        if (cpu->pass_position == cpu->pages) {
            cpu->pass_position = 0;
            cpu->pass = wanted;
        }
        more = 1;
    }
    return more;
}

__attribute__((noreturn)) static void run(struct cpu *cpu)
{
    for (;;) {
        if (failed)
            halt_for_ever();
        u64 ticks = cpu->ticks - cpu->seen_ticks;
        if (ticks) {
            cpu->seen_ticks += ticks;
            if (cpu->set)
                earn(&cpu->rewrite_credit, params.rate, ticks);
            if (params.verify)
                earn(&cpu->verify_credit, params.verify, ticks);
            if (!cpu->index && cpu->tick_now != attended) /* its last tick was no quick one */
                attend(attended = cpu->tick_now);
        }
        int more = work(cpu);
        if (!cpu->index && params.disk)
            log_verified |= disk_work(cpu->seen_ticks, (clock_now(cpu) - started) / 1000000,
                                      pass_wanted != pass_reported && !log_verified);
        interrupts_off();
        if (more) /* else the next tick does */
            clock_check(cpu);
        if (more || cpu->ticks != cpu->seen_ticks)
            interrupts_on();
        else
            interrupts_on_and_halt();
    }
}

static void during_fill(struct cpu *cpu)
{
    u64 now;
    if (failed)
        halt_for_ever();
    if (cpu->index || (now = clock_now(cpu)) < next_status)
        return;
    print("selfcheck: fill pages=%u of=%u", TOTAL(filled), memory_pages());
    next_status = now + params.every * 1000000;
}

static void begin(struct cpu *cpu)
{
    timer_start();
    memory_fill(cpu, during_fill);
}

void ap_main(u64 index)
{
    struct cpu *cpu = &cpus[index];
    cpu_init(cpu);
    cpu->alive = 1;
    while (!go)
        pause();
    begin(cpu);
    run(cpu);
}

void main(u64 start_info)
{
    struct cpu *cpu = &cpus[0];
    const char *cmdline = (const char *)((u64 *)start_info)[3];
    console_init();
    if (cmdline)
        parse(cmdline);
    cpus_init();
    memory_init(start_info);
    memory_share();
    print("selfcheck: start vcpus=%u ram_pages=%u", params.vcpus, ram_pages());
    image_sum = sum_image();
    clock_init();
    cpu_init(cpu);
    clock_calibrate(cpu);
    u64 driven = drivers_init();
    disk_init();
    cpus_start();
    started = clock_now(cpu);
    next_status = started + params.every * 1000000;
    go = 1;
    begin(cpu);
    while (TOTAL(filled) != memory_pages())
        during_fill(cpu);
    u64 now = clock_now(cpu);
    print("selfcheck: ready pages=%u set=%u rate=%u hz=%u vcpus=%u full=%u clock=%s real=%s "
          "tsc_khz=%u fill_ms=%u driven=%u",
          memory_pages(), TOTAL(set), params.rate, params.hz, params.vcpus, params.full,
          clock_is_kvm ? "kvm" : "tsc", clock_has_real ? "wall" : "none", tsc_khz,
          (now - started) / 1000000, driven);
    next_status = now + params.every * 1000000;
    run(cpu);
}

/* What the compiler may call of its own accord. */
void *memset(void *to, int byte, u64 len)
{
    void *at = to;
    asm volatile("rep stosb" : "+D"(at), "+c"(len) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, u64 len)
{
    void *at = to;
    asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(len)::"memory");
    return to;
}
