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
    u64 n = params.vcpus;
    held_pages = params.fill / PAGE < all_pages ? params.fill / PAGE : all_pages;
    for (u64 i = 0; i < n; i++) {
        struct cpu *cpu = &cpus[i];
        cpu->first = held_pages * i / n;
        cpu->pages = held_pages * (i + 1) / n - cpu->first;
        cpu->set = params.set / PAGE * (i + 1) / n - params.set / PAGE * i / n;
        if (cpu->set > cpu->pages)
            cpu->set = cpu->pages;
        cpu->stride = params.spread && cpu->set ? cpu->pages / cpu->set : 1;
        cpu->generation = 1;
    }
}

/* The physical page number of a vCPU's page. */
static u64 number(struct cpu *cpu, u64 page)
{
    u64 index = cpu->first + page;
    u32 r = 0;
    while (index >= ranges[r].pages)
        index -= ranges[r++].pages;
    return ranges[r].start + index;
}

static u64 value(u64 number, u64 generation)
{
    return number * PER_PAGE + generation * PER_GENERATION + params.seed * PER_SEED;
}

/* Two words between the first and the last, at places that depend on the page. */
static u64 place1(u64 number) { return 1 + number % 256; }
static u64 place2(u64 number) { return 257 + number / 2 % 254; }

static void write_page(u64 number, u64 v)
{
    u64 *page = (u64 *)(number * PAGE);
    if (params.full) {
        u64 count = WORDS;
        asm volatile("rep stosq" : "+D"(page), "+c"(count) : "a"(v) : "memory");
    } else {
        page[0] = page[place1(number)] = page[place2(number)] = page[WORDS - 1] = v;
    }
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

__attribute__((noreturn)) static void mismatch(struct cpu *cpu, u64 number, u64 word,
                                               u64 generation, u64 expected)
{
    u64 found = ((volatile u64 *)(number * PAGE))[word];
    u64 older = (expected - found) * inverse(PER_GENERATION), newer = -older;
    u64 page = number + (found - expected) * inverse(PER_PAGE), n = 0;
#define WRONG "page=%x offset=%x expected=%x found=%x gen=%u vcpu=%u hint="
    const char *format = WRONG "unknown";
    if (found == 0)
        format = WRONG "zero";
    else if (older < 1UL << 32)
        format = WRONG "stale:%u", n = older;
    else if (newer < 1UL << 32)
        format = WRONG "ahead:%u", n = newer;
    else if (page < 1UL << 40)
        format = WRONG "page:%x", n = page;
    fail(format, number, word * 8, expected, found, generation, (u64)cpu->index, n);
}

static void verify_page(struct cpu *cpu, u64 number, u64 generation)
{
    volatile u64 *page = (u64 *)(number * PAGE);
    u64 v = value(number, generation), word;
    if (params.full) {
        u64 *at = (u64 *)page, left = WORDS;
        u8 same;
        asm volatile("repe scasq; sete %2"
                     : "+D"(at), "+c"(left), "=r"(same)
                     : "a"(v)
                     : "memory", "cc");
        if (!same)
            mismatch(cpu, number, WORDS - left - 1, generation, v);
    } else if (page[word = 0] != v || page[word = place1(number)] != v ||
               page[word = place2(number)] != v || page[word = WORDS - 1] != v) {
        mismatch(cpu, number, word, generation, v);
    }
    cpu->verified++;
}

void memory_verify(struct cpu *cpu, u64 page)
{
    verify_page(cpu, number(cpu, page), generation_of(cpu, page));
}

void memory_fill(struct cpu *cpu, void (*meanwhile)(struct cpu *))
{
    for (u64 page = 0; page < cpu->pages; page++) {
        u64 n = number(cpu, page);
        write_page(n, value(n, 1));
        cpu->filled = page + 1;
        if (page % 512 == 0)
            meanwhile(cpu);
    }
}

/* Verifies the next page of the working set and gives it its next generation. */
void memory_rewrite_next(struct cpu *cpu)
{
    u64 n = number(cpu, cpu->position * cpu->stride);
    verify_page(cpu, n, cpu->generation);
    write_page(n, value(n, cpu->generation + 1));
    cpu->rewritten++;
    if (++cpu->position == cpu->set) {
        cpu->position = 0;
        cpu->generation++;
    }
}

/* Flips a bit in the last page of this vCPU; gives the page's number. */
u64 memory_corrupt(struct cpu *cpu)
{
    u64 n = number(cpu, cpu->pages - 1);
    *(volatile u64 *)(n * PAGE) ^= 1;
    return n;
}
