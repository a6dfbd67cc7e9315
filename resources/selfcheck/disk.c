/*
 * A log on the first virtio-blk disk (virtio 1.2, 5.2, by its legacy registers, 4.1.4.8): one sector
 * for each record, written once and never again. Only the first vCPU is here.
 *
 * Before a record is written its sector must be blank, and afterwards, flushed, the sector is read
 * back. So a second copy of this guest that runs, or one that has been put back in time over a disk
 * that went on, finds a sector that is not as it left it. The nonce of a record is of its moment, so
 * that two copies don't write the same, and each record names the nonce of the one before it.
 */
#include "selfcheck.h"

#define CAPACITY 20 /* behind the legacy registers without MSI-X */
#define FEATURE_FLUSH (1 << 9)

#define MOST_ENTRIES 256
#define NEXT 1
#define DEVICE_WRITES 2
#define NO_INTERRUPT 1

#define REQUEST_IN 0
#define REQUEST_OUT 1
#define REQUEST_FLUSH 4

#define SECTOR 512UL
#define WORDS (SECTOR / 8)
/* Sectors in one request when all of the log is read. */
#define CHUNK 8UL
#define MAGIC 0x4452434b434c4553UL /* "SELCKCRD" */

/* A sector of the log. The words behind `up_ms` hold a value of their own each. */
struct record {
    u64 magic, seq, nonce, before, up_ms;
    u64 rest[WORDS - 6];
    u64 sum;
};

static struct {
    struct {
        u64 address;
        u32 len;
        u16 flags, next;
    } descriptors[MOST_ENTRIES];
    /* Available: flags, index, ring; used, from the next page on: flags, index, ring of pairs. */
    u8 rings[4 * PAGE];
} __attribute__((aligned(4096))) queue;

static struct {
    u32 type, reserved;
    u64 sector;
} header;
static volatile u8 result;
static struct record record, buffer[CHUNK] __attribute__((aligned(512)));

static u16 ports, entries, requests;
static u64 capacity, seq, nonce, errors, credit, ticks;
static u64 passed_nonce, pass_position; /* of the complete reading that is under way */

/* What the request under way is for. */
static enum { IDLE, LOOKING, WRITING, FLUSHING, READING, PASSING } doing;
/* The step of a record that failed last, to be tried again; whether the last reading failed. */
static u32 again, pass_failed;

u64 disk_records(void) { return seq; }
u64 disk_errors(void) { return errors; }

/* Finds the disk and takes it into use. */
void disk_init(void)
{
    u32 slot = 0;
    if (!params.disk)
        return;
    while (slot < 32 && pci_read(slot, 0) != VIRTIO_BLK)
        slot++;
    if (slot == 32)
        fail("disk=%u, but there is no virtio-blk disk", params.disk);
    pci_write(slot, PCI_COMMAND, pci_read(slot, PCI_COMMAND) | PCI_IO_MEMORY_MASTER);
    ports = pci_read(slot, PCI_BAR0) & 0xfffc;
    out8(ports + VIRTIO_STATUS, 0);
    out8(ports + VIRTIO_STATUS, VIRTIO_HAS_DRIVER);
    out32(ports + VIRTIO_GUEST_FEATURES, in32(ports + VIRTIO_HOST_FEATURES) & FEATURE_FLUSH);
    out16(ports + VIRTIO_QUEUE_SELECT, 0);
    entries = in16(ports + VIRTIO_QUEUE_SIZE);
    if (!entries || entries > MOST_ENTRIES)
        fail("disk queue size=%u", (u64)entries);
    out32(ports + VIRTIO_QUEUE_PAGE, (u64)&queue / PAGE);
    out8(ports + VIRTIO_STATUS, VIRTIO_DRIVER_OK);
    capacity = in32(ports + CAPACITY) | (u64)in32(ports + CAPACITY + 4) << 32;
}

/* The rings' places follow from the number of entries, which the device decides. */
static volatile u16 *available(void) { return (u16 *)((u64)&queue + 16UL * entries); }
static volatile u16 *used(void)
{
    u64 end = (u64)&queue + 16UL * entries + 6 + 2UL * entries;
    return (u16 *)((end + PAGE - 1) & ~(PAGE - 1));
}

static void describe(u32 at, volatile void *what, u32 len, u16 flags)
{
    queue.descriptors[at].address = (u64)what;
    queue.descriptors[at].len = len;
    queue.descriptors[at].flags = flags;
    queue.descriptors[at].next = at + 1;
}

static void request(u32 what, u32 type, u64 sector, volatile void *data, u32 len)
{
    u32 last = 1;
    header.type = type;
    header.sector = sector;
    result = 0xff;
    describe(0, &header, sizeof header, NEXT);
    if (len)
        describe(last++, data, len, NEXT | (type == REQUEST_IN ? DEVICE_WRITES : 0));
    describe(last, &result, 1, DEVICE_WRITES);
    available()[0] = NO_INTERRUPT;
    available()[2 + requests % entries] = 0;
    barrier();
    available()[1] = ++requests;
    barrier();
    out16(ports + VIRTIO_QUEUE_NOTIFY, 0);
    doing = what;
}

/* The words that mean nothing differ from record to record as well. */
static u64 filler(u64 number, u64 at) { return (number << 8 | at) * 0x9e3779b97f4a7c15UL; }

static u64 sum_of(const struct record *r)
{
    const u64 *word = (const u64 *)r;
    u64 sum = 0;
    for (u64 i = 0; i < WORDS - 1; i++)
        sum = (sum ^ word[i]) * 0xc2b2ae3d27d4eb4fUL + i;
    return sum;
}

static void begin(u32 what)
{
    switch (what) {
    case LOOKING: request(what, REQUEST_IN, seq, buffer, SECTOR); break;
    case WRITING: request(what, REQUEST_OUT, seq, &record, SECTOR); break;
    case FLUSHING: request(what, REQUEST_FLUSH, 0, 0, 0); break;
    case READING: request(what, REQUEST_IN, seq, buffer, SECTOR); break;
    case PASSING: {
        u64 left = seq - pass_position;
        request(what, REQUEST_IN, pass_position, buffer, SECTOR * (left < CHUNK ? left : CHUNK));
    }
    }
}

static void must_be_blank(void)
{
    const u64 *word = (const u64 *)buffer;
    for (u64 i = 0; i < WORDS; i++)
        if (word[i])
            fail("disk record=%u is there already: word=%u found=%x found_record=%u", seq, i,
                 word[i], buffer[0].seq);
}

static void compose(u64 up_ms)
{
    record.magic = MAGIC;
    record.seq = seq;
    record.before = nonce;
    record.nonce = rdtsc() ^ (seq + 1) * 0x165667b19e3779f9UL;
    record.up_ms = up_ms;
    for (u64 i = 0; i < WORDS - 6; i++)
        record.rest[i] = filler(seq, i);
    record.sum = sum_of(&record);
}

static void must_be_record(const struct record *r, u64 number, u64 before)
{
    if (r->magic != MAGIC || r->seq != number || r->sum != sum_of(r))
        fail("disk record=%u is not whole: magic=%x seq=%u sum=%x expected=%x", number, r->magic,
             r->seq, r->sum, sum_of(r));
    if (r->before != before)
        fail("disk record=%u is another's: before=%x expected=%x", number, r->before, before);
}

/* The log was read to its end: it is this guest's. */
static int pass_is_over(void)
{
    if (pass_position < seq)
        return 0;
    if (passed_nonce != nonce)
        fail("disk record=%u is another's: nonce=%x expected=%x", seq - 1, passed_nonce, nonce);
    return 1;
}

static void finish(u64 up_ms)
{
    u32 done = doing;
    u32 *failed = done == PASSING ? &pass_failed : &again;
    doing = IDLE;
    *failed = IDLE;
    if (result) {
        if (!errors++)
            print("selfcheck: disk error step=%u record=%u result=%u", (u64)done, seq, (u64)result);
        *failed = done;
        return;
    }
    switch (done) {
    case LOOKING:
        must_be_blank();
        compose(up_ms);
        return begin(WRITING);
    case WRITING: return begin(FLUSHING);
    case FLUSHING: return begin(READING);
    case READING:
        must_be_record(buffer, seq, nonce);
        if (buffer[0].nonce != record.nonce)
            fail("disk record=%u is another's: nonce=%x expected=%x", seq, buffer[0].nonce,
                 record.nonce);
        nonce = record.nonce;
        seq++;
        return;
    case PASSING:
        for (u64 i = 0; i < CHUNK && pass_position < seq; i++) {
            must_be_record(&buffer[i], pass_position++, passed_nonce);
            passed_nonce = buffer[i].nonce;
        }
    }
}

/*
 * Goes on with the log, as far as that is possible without waiting; `now_ticks` pays for records.
 * With `verify` all of the log is read instead; gives 1 when that is done. There is a log with `disk` only.
 */
int disk_work(u64 now_ticks, u64 up_ms, int verify)
{
    u64 passed = now_ticks - ticks;
    ticks = now_ticks;
    credit += passed * params.disk;
    if (credit > 2 * params.hz + params.disk) /* what could not be done in time is not made up for */
        credit = 2 * params.hz + params.disk;
    if (doing) {
        if (used()[1] != requests)
            return 0;
        barrier();
        finish(up_ms);
        if (doing)
            return 0;
    }
    if (verify) {
        if (pass_is_over()) {
            pass_position = passed_nonce = 0;
            return 1;
        }
        /* A disk that fails is asked again at the next tick only. */
        if (!pass_failed || passed)
            begin(PASSING);
        return 0;
    }
    if (again) {
        if (passed)
            begin(again);
    } else if (credit >= params.hz && seq < capacity) {
        credit -= params.hz;
        begin(LOOKING);
    }
    return 0;
}
