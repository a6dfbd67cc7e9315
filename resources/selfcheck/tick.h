/* Where struct cpu has what the quick way of a tick needs, for boot.S; cpus.c checks it. */
#define CPU_SIZE 320
#define CPU_CLOCK_VERSION 0
#define CPU_TICKS 40
#define CPU_TICK_TSC 48
#define CPU_TICK_VERSION 64
#define CPU_QUICK 96
#define LAPIC_EOI 0xfee000b0
