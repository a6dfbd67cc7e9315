/*
 * Work for a Linux guest that is being migrated, and the checks of that work.
 *
 * Every subcommand tells what it has done in lines that begin with its name, once a second and at its
 * end, and ends with status 1 and a line "NAME: WRONG ..." at the first thing that is not as it must
 * be. It is linked statically, so the same file runs in a guest and beside it.
 *
 *   memory MIB [PAGES_PER_SECOND]   keeps checking and rewriting memory
 *   disk FILE [RECORDS_PER_SECOND]  keeps writing numbered records, each durable before the next
 *   disk-check FILE [LAST]          checks the records there; LAST must be among them
 *   tcp-server PORT                 checks what clients send and sends it back
 *   tcp-client ADDRESS PORT SECONDS [BYTES_PER_SECOND]   sends, and checks what comes back
 *   clock [SECONDS]                 keeps reading the clocks, none of which may go back
 *   fpu [SECONDS]                   keeps values in the vector registers, which must stay
 *
 * Rates of 0, the default, mean "as fast as possible".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { PAGE = 4096, WORDS = PAGE / 8, CHUNK = 16 * 1024, BATCH = 256 };
#define NS 1000000000ull

static const char *name;

static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int length = snprintf(line, sizeof line, "%s: ", name);

	va_start(args, format);
	length += vsnprintf(line + length, sizeof line - length - 1, format, args);
	va_end(args);
	if (length > (int)sizeof line - 2)
		length = sizeof line - 2;
	line[length++] = '\n';
	/* One write, so that lines of several processes don't mix. */
	if (write(STDOUT_FILENO, line, length) != length)
		exit(1);
}

#define wrong(...) do { say("WRONG " __VA_ARGS__); exit(1); } while (0)
#define wrong_errno(what) wrong("%s: %s", what, strerror(errno))

static uint64_t number(const char *text)
{
	char *end;
	errno = 0;
	uint64_t value = strtoull(text, &end, 0);
	if (errno || *end || end == text)
		wrong("number: %s", text);
	return value;
}

static uint64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * NS + t.tv_nsec;
}

/* The finaliser of SplitMix64: each number gives another that looks unrelated. */
static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

/* A loop that runs at a given rate, notes its longest standstill, and reports once a second. */
struct pace {
	uint64_t rate, start, last, reported, gap, steps;
};

static struct pace pace_start(uint64_t rate)
{
	uint64_t t = now(CLOCK_MONOTONIC);
	return (struct pace){ .rate = rate, .start = t, .last = t, .reported = t };
}

/* Returns whether it is time for a report. */
static int pace_step(struct pace *p, uint64_t units)
{
	uint64_t t = now(CLOCK_MONOTONIC);

	if (t - p->last > p->gap)
		p->gap = t - p->last;
	p->steps += units;
	if (p->rate) {
		uint64_t due = p->start + (uint64_t)((double)p->steps / p->rate * NS);
		/* After a standstill it goes on at its rate; it does not catch up. */
		if (t > due + NS)
			p->start += t - due;
		if (t < due) {
			struct timespec until = { due / NS, due % NS };
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
			t = now(CLOCK_MONOTONIC);
		}
	}
	p->last = t;
	if (t - p->reported < NS)
		return 0;
	p->reported = t;
	return 1;
}

static unsigned gap_ms(const struct pace *p)
{
	return p->gap / 1000000;
}

/* ---- memory ---- */

static void memory(uint64_t mib, uint64_t rate)
{
	uint64_t pages = mib * 256, verified = 0;
	uint64_t *base = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!pages || base == MAP_FAILED)
		wrong_errno("mmap");
	for (uint64_t page = 0; page < pages; page++)
		for (unsigned word = 0; word < WORDS; word++)
			base[page * WORDS + word] = mix(page << 16 | word);
	say("%" PRIu64 " pages filled", pages);

	struct pace pace = pace_start(rate);
	for (uint64_t generation = 1;; generation++) {
		for (uint64_t page = 0; page < pages; page++) {
			volatile uint64_t *at = base + page * WORDS;
			for (unsigned word = 0; word < WORDS; word++) {
				uint64_t expected = mix((generation - 1) << 40 ^ (page << 16 | word));
				uint64_t found = at[word];
				if (found != expected)
					wrong("page %" PRIu64 " word %u generation %" PRIu64
					      ": expected %016" PRIx64 ", found %016" PRIx64,
					      page, word, generation - 1, expected, found);
				at[word] = mix(generation << 40 ^ (page << 16 | word));
			}
			verified++;
			if (pace_step(&pace, 1))
				say("generation %" PRIu64 ", %" PRIu64 " pages verified, longest gap %u ms",
				    generation, verified, gap_ms(&pace));
		}
	}
}

/* ---- disk ---- */

static const uint64_t MAGIC = 0x6d696e69766d6d31;

static uint64_t slots_of(int fd)
{
	struct stat st;
	uint64_t size;

	if (fstat(fd, &st))
		wrong_errno("fstat");
	if (S_ISBLK(st.st_mode)) {
		if (ioctl(fd, BLKGETSIZE64, &size))
			wrong_errno("BLKGETSIZE64");
	} else {
		size = st.st_size;
	}
	if (size < PAGE)
		wrong("size: %" PRIu64 " bytes hold no record", size);
	return size / PAGE;
}

/* Record 0 does not exist: a slot without a record has none of these words. */
static void record_make(uint64_t *record, uint64_t sequence)
{
	record[0] = MAGIC;
	record[1] = sequence;
	for (unsigned word = 2; word < WORDS; word++)
		record[word] = mix(sequence << 9 | word);
}

/* Returns the record's number, 0 for none. */
static uint64_t record_check(const uint64_t *record, uint64_t slot, uint64_t slots)
{
	if (record[0] != MAGIC)
		return 0;
	uint64_t sequence = record[1];
	if (sequence % slots != slot)
		wrong("slot %" PRIu64 " holds record %" PRIu64 ", which belongs elsewhere", slot, sequence);
	for (unsigned word = 2; word < WORDS; word++)
		if (record[word] != mix(sequence << 9 | word))
			wrong("record %" PRIu64 " is torn at word %u", sequence, word);
	return sequence;
}

static uint64_t *record_buffer(size_t records)
{
	void *buffer;
	if (posix_memalign(&buffer, PAGE, records * PAGE))
		wrong("memory: none for %zu records", records);
	return buffer;
}

/* Reads every slot; returns the newest record's number. */
static uint64_t disk_newest(int fd, uint64_t *numbers, uint64_t slots)
{
	uint64_t newest = 0, *records = record_buffer(BATCH);
	for (uint64_t first = 0; first < slots; first += BATCH) {
		uint64_t count = slots - first < BATCH ? slots - first : BATCH;
		if (pread(fd, records, count * PAGE, first * PAGE) != (ssize_t)(count * PAGE))
			wrong_errno("read");
		for (uint64_t i = 0; i < count; i++) {
			uint64_t number = record_check(records + i * WORDS, first + i, slots);
			numbers[first + i] = number;
			if (number > newest)
				newest = number;
		}
	}
	free(records);
	return newest;
}

static int disk_open(const char *path, int flags)
{
	/* Past the page cache where that is possible: what is checked is the disk. */
	int fd = open(path, flags | O_DIRECT | O_CLOEXEC);
	if (fd < 0 && errno == EINVAL)
		fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		wrong_errno(path);
	return fd;
}

static void disk_check(const char *path, uint64_t last)
{
	int fd = disk_open(path, O_RDONLY);
	uint64_t slots = slots_of(fd);
	uint64_t *numbers = calloc(slots, sizeof *numbers);
	if (!numbers)
		wrong_errno("memory");
	uint64_t newest = disk_newest(fd, numbers, slots);
	if (newest < last)
		wrong("record %" PRIu64 " is lost: the newest is %" PRIu64, last, newest);
	/* Each slot must hold the newest number that belongs there. */
	for (uint64_t n = newest; n > 0 && n + slots > newest; n--)
		if (numbers[n % slots] != n)
			wrong("record %" PRIu64 " is lost: its slot holds %" PRIu64, n, numbers[n % slots]);
	say("records up to %" PRIu64 " are there", newest);
}

static void disk(const char *path, uint64_t rate)
{
	int fd = disk_open(path, O_RDWR);
	uint64_t slots = slots_of(fd), *record = record_buffer(1);
	uint64_t *numbers = calloc(slots, sizeof *numbers);
	if (!numbers)
		wrong_errno("memory");
	uint64_t sequence = disk_newest(fd, numbers, slots);
	free(numbers);
	say("goes on after record %" PRIu64, sequence);
	struct pace pace = pace_start(rate);
	for (;;) {
		sequence++;
		record_make(record, sequence);
		if (pwrite(fd, record, PAGE, sequence % slots * PAGE) != PAGE)
			wrong_errno("write");
		if (fsync(fd))
			wrong_errno("fsync");
		if (pace_step(&pace, 1))
			say("record %" PRIu64 " is durable, longest gap %u ms", sequence, gap_ms(&pace));
	}
}

/* ---- tcp ---- */

/* The stream that both ends know: bytes `at` and on. */
static void stream_fill(uint8_t *to, uint64_t at, size_t length)
{
	for (size_t i = 0; i < length; i++, at++)
		to[i] = mix(at / 8) >> (at % 8 * 8);
}

static void stream_check(const uint8_t *found, uint64_t at, size_t length)
{
	static uint8_t expected[CHUNK];
	stream_fill(expected, at, length);
	for (size_t i = 0; i < length; i++)
		if (found[i] != expected[i])
			wrong("byte %" PRIu64 ": expected %02x, found %02x", at + i, expected[i], found[i]);
}

static void serve(int fd)
{
	static uint8_t buffer[CHUNK];
	uint64_t at = 0;
	struct pace pace = pace_start(0);
	ssize_t length;

	while ((length = read(fd, buffer, sizeof buffer)) > 0) {
		stream_check(buffer, at, length);
		for (ssize_t done = 0, count; done < length; done += count)
			if ((count = write(fd, buffer + done, length - done)) < 0)
				wrong_errno("write");
		at += length;
		if (pace_step(&pace, length))
			say("%" PRIu64 " bytes echoed, longest gap %u ms", at, gap_ms(&pace));
	}
	if (length < 0)
		wrong_errno("read");
	say("ended after %" PRIu64 " bytes, all right", at);
}

static void tcp_server(uint64_t port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
		wrong_errno("listen");
	signal(SIGCHLD, SIG_IGN);
	say("listens on port %" PRIu64, port);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		if (fd < 0)
			wrong_errno("accept");
		pid_t child = fork();
		if (child < 0)
			wrong_errno("fork");
		if (child == 0) {
			serve(fd);
			exit(0);
		}
		close(fd);
	}
}

static void tcp_client(const char *host, uint64_t port, uint64_t seconds, uint64_t rate)
{
	static uint8_t out[CHUNK], in[CHUNK];
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	uint64_t sent = 0, echoed = 0;
	int open = 1;

	if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
		wrong("address: %s", host);
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		wrong_errno("connect");
	fcntl(fd, F_SETFL, O_NONBLOCK);
	/* At a given rate it sends small pieces, a hundred a second at most. */
	size_t piece = !rate || rate / 100 > CHUNK ? CHUNK : rate / 100 + 1;
	struct pace pace = pace_start(0);
	uint64_t start = now(CLOCK_MONOTONIC), end = start + seconds * NS;

	for (;;) {
		uint64_t t = now(CLOCK_MONOTONIC);
		if (open && t >= end) {
			shutdown(fd, SHUT_WR);
			open = 0;
		}
		int may_send = open && sent - echoed < 1 << 20 &&
			       (!rate || sent < (uint64_t)((double)(t - start) / NS * rate));
		struct pollfd p = { .fd = fd, .events = POLLIN | (may_send ? POLLOUT : 0) };
		if (poll(&p, 1, 10) < 0)
			wrong_errno("poll");
		if (may_send && p.revents & POLLOUT) {
			stream_fill(out, sent, piece);
			ssize_t count = write(fd, out, piece);
			if (count < 0 && errno != EAGAIN)
				wrong_errno("write");
			sent += count > 0 ? count : 0;
		}
		if (p.revents & (POLLIN | POLLHUP | POLLERR)) {
			ssize_t count = read(fd, in, sizeof in);
			if (count < 0 && errno != EAGAIN)
				wrong_errno("read");
			if (count == 0)
				break;
			if (count > 0) {
				stream_check(in, echoed, count);
				echoed += count;
				if (pace_step(&pace, count))
					say("%" PRIu64 " bytes came back, longest gap %u ms", echoed, gap_ms(&pace));
			}
		}
	}
	if (open || sent != echoed)
		wrong("end: %" PRIu64 " bytes sent, %" PRIu64 " came back", sent, echoed);
	say("ended after %" PRIu64 " bytes, all right, longest gap %u ms", echoed, gap_ms(&pace));
}

/* ---- clock ---- */

static void clocks(uint64_t seconds)
{
	static const struct { const char *name; clockid_t id; } watched[] = {
		{ "realtime", CLOCK_REALTIME }, { "monotonic", CLOCK_MONOTONIC }, { "boottime", CLOCK_BOOTTIME },
	};
	enum { COUNT = sizeof watched / sizeof *watched };
	uint64_t last[COUNT] = { 0 }, last_tsc = 0;
	struct pace pace = pace_start(0);
	uint64_t end = now(CLOCK_MONOTONIC) + seconds * NS;

	do {
		for (unsigned i = 0; i < COUNT; i++) {
			uint64_t t = now(watched[i].id);
			if (t < last[i])
				wrong("%s went back by %" PRIu64 " ns", watched[i].name, last[i] - t);
			last[i] = t;
		}
		uint64_t tsc = __rdtsc();
		if (tsc < last_tsc)
			wrong("tsc went back by %" PRIu64 " ticks", last_tsc - tsc);
		last_tsc = tsc;
		if (pace_step(&pace, 1))
			say("realtime %.3f monotonic %.3f boottime %.3f, longest gap %u ms",
			    (double)last[0] / NS, (double)last[1] / NS, (double)last[2] / NS, gap_ms(&pace));
	} while (!seconds || last[1] < end);
	say("ended, none went back, longest gap %u ms", gap_ms(&pace));
}

/* ---- fpu ---- */

/* Fills the 16 registers with `in`, lets time pass, and stores them to `out`. */
static void hold_sse(const uint8_t *in, uint8_t *out, uint64_t spins)
{
#define EACH(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define LOAD_SSE(n) "movdqu 32*" #n "(%1), %%xmm" #n ";"
#define STORE_SSE(n) "movdqu %%xmm" #n ", 32*" #n "(%2);"
	asm volatile(EACH(LOAD_SSE) "1: dec %0; jnz 1b;" EACH(STORE_SSE)
		     : "+r"(spins) : "r"(in), "r"(out)
		     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
		       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

static void hold_avx(const uint8_t *in, uint8_t *out, uint64_t spins)
{
#define LOAD_AVX(n) "vmovdqu 32*" #n "(%1), %%ymm" #n ";"
#define STORE_AVX(n) "vmovdqu %%ymm" #n ", 32*" #n "(%2);"
	asm volatile(EACH(LOAD_AVX) "1: dec %0; jnz 1b;" EACH(STORE_AVX) "vzeroupper;"
		     : "+r"(spins) : "r"(in), "r"(out)
		     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
		       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

static void fpu(uint64_t seconds)
{
	/* Whether the operating system has enabled AVX is part of what the compiler's test asks. */
	int avx = __builtin_cpu_supports("avx");
	unsigned used = avx ? 32 : 16;
	uint8_t in[16 * 32], out[16 * 32];
	/* Others have work too, on an emulated processor that all share. */
	struct pace pace = pace_start(20);
	uint64_t end = now(CLOCK_MONOTONIC) + seconds * NS, seed = mix(getpid());

	do {
		seed = mix(seed);
		stream_fill(in, seed & 0xffffffff, sizeof in);
		(avx ? hold_avx : hold_sse)(in, out, 500000);
		for (unsigned i = 0; i < 16; i++)
			if (memcmp(in + i * 32, out + i * 32, used))
				wrong("vector register %u (of %u bytes) has changed", i, used);
		if (pace_step(&pace, 1))
			say("%" PRIu64 " rounds with registers of %u bytes, all right", pace.steps, used);
	} while (!seconds || now(CLOCK_MONOTONIC) < end);
	say("ended after %" PRIu64 " rounds, all right", pace.steps);
}

int main(int argc, char **argv)
{
	name = argc > 1 ? argv[1] : "guest-tool";
	signal(SIGPIPE, SIG_IGN);
#define IS(word, least, most) (!strcmp(name, word) && argc >= 2 + least && argc <= 2 + most)
#define OPTION(index) (argc > 2 + index ? number(argv[2 + index]) : 0)
	if (IS("memory", 1, 2))
		memory(number(argv[2]), OPTION(1));
	else if (IS("disk", 1, 2))
		disk(argv[2], OPTION(1));
	else if (IS("disk-check", 1, 2))
		disk_check(argv[2], OPTION(1));
	else if (IS("tcp-server", 1, 1))
		tcp_server(number(argv[2]));
	else if (IS("tcp-client", 3, 4))
		tcp_client(argv[2], number(argv[3]), number(argv[4]), OPTION(3));
	else if (IS("clock", 0, 1))
		clocks(OPTION(0));
	else if (IS("fpu", 0, 1))
		fpu(OPTION(0));
	else {
		fprintf(stderr, "guest-tool: see the head of guest-tool.c for its subcommands\n");
		return 2;
	}
	return 0;
}
