/*
 * What every page must hold. A page's value is a function of its number, its generation and the
 * seed. A vCPU rewrites its working set in order, so that `generation` and `position` tell the
 * generation of each of its pages: those before the position are one ahead. Pages outside the
 * working set stay at generation 1.
 */
#include "selfcheck.h"

/* Odd, so that they have inverses: a wrong value tells where it comes from. */
#define PER_PAGE 0x9e3779b97f4a7c15UL
#define PER_GENERATION 0xc2b2ae3d27d4eb4fUL
#define PER_SEED 0x165667b19e3779f9UL
#define WORDS 512

#define START_INFO_MAGIC 0x336ec578
#define MEMORY_RAM 1

struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, cmdline, rsdp, map;
    u32 map_entries, reserved;
};
struct map_entry {
    u64 start, size;
    u32 type, reserved;
};

#define MAX_RANGES 16
static struct {
    u64 start, pages;
} ranges[MAX_RANGES];
static u32 range_count;
static u64 all_pages, held_pages;
/* With `fill` less than all, the pages held are in two halves, at both ends of memory. */
static u64 held_low;

u64 ram_pages(void) { return all_pages; }
u64 memory_pages(void) { return held_pages; }

static void add_range(u64 start, u64 end)
{
    start = (start + PAGE - 1) / PAGE;
    end /= PAGE;
    if (start >= end)
        return;
    if (range_count == MAX_RANGES)
        fail("memory map has more than %u pieces of RAM", (u64)MAX_RANGES);
    ranges[range_count].start = start;
    ranges[range_count++].pages = end - start;
    all_pages += end - start;
}

/* Maps memory above 4 GiB, with page directories taken from behind the image; gives their end. */
static u64 map_high_memory(u64 end)
{
    extern u64 page_pointers[];
    u64 table = (u64)image_end;
    for (u64 gib = 4; gib << 30 < end; gib++, table += PAGE) {
        if (gib == WORDS)
            fail("more than 512 GiB of RAM");
        for (u64 i = 0; i < WORDS; i++)
            ((u64 *)table)[i] = gib << 30 | i << 21 | 0x83;
        page_pointers[gib] = table | 3;
    }
    return table;
}

/* Learns where RAM is: all of it but the lowest 64 KiB and what the program itself has. */
void memory_init(u64 start_info)
{
    struct start_info *info = (void *)start_info;
    struct map_entry *map = (void *)info->map;
    u64 highest = 0;
    if (info->magic != START_INFO_MAGIC || info->version < 1 || !info->map_entries)
        fail("no memory map in the PVH start info");
    for (u32 i = 0; i < info->map_entries; i++)
        if (map[i].type == MEMORY_RAM && map[i].start + map[i].size > highest)
            highest = map[i].start + map[i].size;
    u64 own_start = (u64)image_start, own_end = map_high_memory(highest);
    for (u32 i = 0; i < info->map_entries; i++) {
        u64 start = map[i].start, end = start + map[i].size;
        if (map[i].type != MEMORY_RAM)
            continue;
        if (start < LOWEST)
            start = LOWEST;
        if (start <= own_start && own_end <= end) {
            add_range(start, own_start);
            start = own_end;
        }
        add_range(start, end);
    }
}

/* Gives each vCPU its part of the memory and of the working set. */
void memory_share(void)
{
    u64 n = params.vcpus, writers = params.writers && params.writers < n ? params.writers : n;
    held_pages = params.fill / PAGE < all_pages ? params.fill / PAGE : all_pages;
    if (held_pages < n)
        fail("less than one page for each vCPU: pages=%u vcpus=%u", held_pages, n);
    held_low = held_pages == all_pages ? all_pages : held_pages - held_pages / 2;
    for (u64 i = 0; i < n; i++) {
        struct cpu *cpu = &cpus[i];
        cpu->first = held_pages * i / n;
        cpu->pages = held_pages * (i + 1) / n - cpu->first;
        cpu->set = i < writers
                       ? params.set / PAGE * (i + 1) / writers - params.set / PAGE * i / writers
                       : 0;
        if (cpu->set > cpu->pages)
            cpu->set = cpu->pages;
        cpu->stride = params.spread && cpu->set ? cpu->pages / cpu->set : 1;
        cpu->generation = 1;
    }
}

static u64 least(u64 a, u64 b) { return a < b ? a : b; }

/* The physical number of a vCPU's page, and how many pages follow it in one piece, itself included. */
static u64 number(struct cpu *cpu, u64 page, u64 *in_one_piece)
{
    u64 index = cpu->first + page, left = held_pages - index;
    u32 r = 0;
    if (index < held_low)
        left = held_low - index;
    else
        index += all_pages - held_pages;
    while (index >= ranges[r].pages)
        index -= ranges[r++].pages;
    *in_one_piece = least(left, ranges[r].pages - index);
    return ranges[r].start + index;
}

static u64 value(u64 number, u64 generation)
{
    return number * PER_PAGE + generation * PER_GENERATION + params.seed * PER_SEED;
}

/* Between the first and the last, one word in each half, at places that depend on the page. */
static u64 place1(u64 number) { return number % 256; }
static u64 place2(u64 number) { return 256 + number / 256 % 256; }

static int is_held(u64 number, u64 word)
{
    return params.full || !word || word == WORDS - 1 || word == place1(number) || word == place2(number);
}

/*
 * The loops below are where an interpreting KVM spends its time, so they do little else than touch
 * memory. A run is `count` pages, `stride` apart, from page number `n` on, the first of which holds
 * `v`. Both checking loops give how many pages were right before the first that was wrong.
 */
static inline void write_page(u64 n, u64 v, u64 full)
{
    u64 *page = (u64 *)(n * PAGE);
    if (full) {
        u64 left = WORDS;
        asm volatile("rep stosq" : "+D"(page), "+c"(left) : "a"(v) : "memory");
        return;
    }
    page[0] = v;
    page[place1(n)] = v;
    page[place2(n)] = v;
    page[WORDS - 1] = v;
}

static inline int page_holds(u64 n, u64 v, u64 full)
{
    u64 *page = (u64 *)(n * PAGE);
    if (full) {
        u64 left = WORDS;
        u8 same;
        asm volatile("repe scasq; sete %2"
                     : "+D"(page), "+c"(left), "=r"(same)
                     : "a"(v)
                     : "memory", "cc");
        return same;
    }
    barrier(); /* read anew, but by the instruction that compares: `volatile` would have one to load */
    return page[0] == v && page[place1(n)] == v && page[place2(n)] == v && page[WORDS - 1] == v;
}

/* Each is compiled once for `full` and once for not. */
static inline void write_each(u64 n, u64 count, u64 v, u64 full)
{
    for (; count; count--, n++, v += PER_PAGE)
        write_page(n, v, full);
}

static inline u64 verify_each(u64 n, u64 count, u64 v, u64 full)
{
    u64 left = count;
    for (; left && page_holds(n, v, full); left--, n++)
        v += PER_PAGE;
    return count - left;
}

static void write_run(u64 n, u64 count, u64 v)
{
    if (params.full)
        write_each(n, count, v, 1);
    else
        write_each(n, count, v, 0);
}

static u64 verify_run(u64 n, u64 count, u64 v)
{
    return params.full ? verify_each(n, count, v, 1) : verify_each(n, count, v, 0);
}

static u64 rewrite_run(u64 n, u64 count, u64 stride, u64 v)
{
    u64 left = count, full = params.full;
    for (; left && page_holds(n, v, full); left--) {
        write_page(n, v + PER_GENERATION, full);
        n += stride;
        v += stride * PER_PAGE;
    }
    return count - left;
}

static u64 generation_of(struct cpu *cpu, u64 page)
{
    u64 in_set = page;
    if (cpu->stride > 1) {
        if (page % cpu->stride)
            return 1;
        in_set = page / cpu->stride;
    }
    return in_set >= cpu->set ? 1 : cpu->generation + (in_set < cpu->position);
}

static u64 inverse(u64 odd)
{
    u64 x = odd;
    for (u32 i = 0; i < 6; i++)
        x *= 2 - odd * x;
    return x;
}

__attribute__((noreturn)) static void mismatch(struct cpu *cpu, u64 number, u64 generation)
{
    volatile u64 *page = (u64 *)(number * PAGE);
    u64 expected = value(number, generation), word = 0;
    while (word < WORDS - 1 && (!is_held(number, word) || page[word] == expected))
        word++;
    u64 found = page[word];
    u64 older = (expected - found) * inverse(PER_GENERATION), newer = -older;
    u64 other = number + (found - expected) * inverse(PER_PAGE), n = 0;
#define WRONG "page=%x offset=%x expected=%x found=%x gen=%u vcpu=%u hint="
    const char *format = WRONG "unknown";
    if (found == 0)
        format = WRONG "zero";
    else if (older < 1UL << 32)
        format = WRONG "stale:%u", n = older;
    else if (newer < 1UL << 32)
        format = WRONG "ahead:%u", n = newer;
    else if (other < 1UL << 40)
        format = WRONG "page:%x", n = other;
    fail(format, number, word * 8, expected, found, generation, (u64)cpu->index, n);
}

/* Verifies `count` pages from a vCPU's page `page` on. */
void memory_verify(struct cpu *cpu, u64 page, u64 count)
{
    while (count) {
        u64 piece, n = number(cpu, page, &piece), generation = generation_of(cpu, page);
        u64 run = least(count, piece);
        /* The generation changes at most at the position and at the working set's end. */
        if (cpu->stride > 1)
            run = 1;
        else if (page < cpu->position)
            run = least(run, cpu->position - page);
        else if (page < cpu->set)
            run = least(run, cpu->set - page);
        u64 right = verify_run(n, run, value(n, generation));
        if (right < run)
            mismatch(cpu, n + right, generation);
        cpu->verified += run;
        page += run;
        count -= run;
    }
}

/* Verifies the next pages of the working set and gives them their next generation. */
void memory_rewrite(struct cpu *cpu, u64 count)
{
    u64 piece, n = number(cpu, cpu->position * cpu->stride, &piece);
    u64 run = least(count, least(cpu->set - cpu->position, (piece - 1) / cpu->stride + 1));
    u64 right = rewrite_run(n, run, cpu->stride, value(n, cpu->generation));
    if (right < run)
        mismatch(cpu, n + right * cpu->stride, cpu->generation);
    cpu->verified += run;
    cpu->rewritten += run;
    cpu->position += run;
    if (cpu->position == cpu->set) {
        cpu->position = 0;
        cpu->generation++;
    }
    if (run < count)
        memory_rewrite(cpu, count - run);
}

void memory_fill(struct cpu *cpu, void (*meanwhile)(struct cpu *))
{
    while (cpu->filled < cpu->pages) {
        u64 piece, n = number(cpu, cpu->filled, &piece);
        u64 run = least(512, least(piece, cpu->pages - cpu->filled));
        write_run(n, run, value(n, 1));
        cpu->filled += run;
        meanwhile(cpu);
    }
}

/* Flips a bit in the last page of this vCPU; gives the page's number. */
u64 memory_corrupt(struct cpu *cpu)
{
    u64 piece, n = number(cpu, cpu->pages - 1, &piece);
    *(volatile u64 *)(n * PAGE) ^= 1;
    return n;
}
