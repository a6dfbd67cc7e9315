//! The sections of clocks, interrupt controllers and PIT, and a QEMU option ROM's.

use migration::vmstate::{Pad, VmState, Word, Words};
use serde::{Deserialize, Serialize};

/// Section `timer`, version 2: QEMU's virtual clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerSection {
    /// A tick counter based on the host's TSC when the VM stopped.
    pub cpu_ticks_offset: i64,
    /// Once a clock of its own.
    pub unused: Pad<8>,
    /// The virtual clock in nanoseconds when the VM stopped: the base of PM timer, PIT, LAPIC and
    /// serial timers on the wire.
    pub cpu_clock_offset: i64,
}

impl VmState for TimerSection {
    const VERSION: u32 = 2;
}

/// Section `kvmclock`, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kvmclock {
    /// `KVM_GET_CLOCK` in nanoseconds when the VM stopped.
    pub clock: u64,
    /// What came later.
    pub subs: KvmclockSubs,
}

impl VmState for Kvmclock {
    const VERSION: u32 = 1;
}

/// Subsections of `kvmclock`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub struct KvmclockSubs {
    /// Always sent by this machine.
    #[serde(rename = "kvmclock/clock_is_reliable")]
    pub reliable: Option<ClockIsReliable>,
    /// The same moment in other clocks.
    #[serde(rename = "mini-vmm/clock")]
    pub mini: Option<MiniClock>,
}

/// `kvmclock/clock_is_reliable`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockIsReliable {
    /// `clock` was read from the kernel, not computed.
    pub clock_is_reliable: bool,
}

/// `mini-vmm/clock`: what `KVM_GET_CLOCK` tells beside the clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MiniClock {
    /// The source host's wall clock, nanoseconds since 1970.
    pub realtime: u64,
    /// The kernel has told `host_tsc`.
    pub has_host_tsc: bool,
    /// The source host's TSC.
    pub host_tsc: u64,
    /// All processors share one TSC.
    pub stable: bool,
}

/// Section `i8259`, version 1: instance 0 is the master, 1 the slave. Registers of one byte each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct I8259 {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub single_mode: u8,
    pub elcr: u8,
}

impl VmState for I8259 {
    const VERSION: u32 = 1;
}

/// Section `ioapic`, version 3.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ioapic {
    /// Identification.
    pub id: u8,
    /// The selected register.
    pub ioregsel: u8,
    /// Once a base address.
    pub unused: Pad<8>,
    /// Asserted lines.
    pub irr: u32,
    /// The redirection table.
    pub ioredtbl: [u64; 24],
}

impl VmState for Ioapic {
    const VERSION: u32 = 3;
}

/// Section `i8254`, version 3: the PIT. Times are nanoseconds of the virtual clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8254 {
    /// Channel 0 raises no interrupt (the HPET does, on machines that have one).
    pub irq_disabled: u32,
    /// The three channels.
    pub channels: [PitChannel; 3],
    /// When channel 0's output changes next.
    pub next_transition_time: i64,
    /// Between mini-vmms: the rest of the kernel's state.
    pub subs: I8254Subs,
}

impl VmState for I8254 {
    const VERSION: u32 = 3;
    const MIN_VERSION: u32 = 3;
    const WORDS: Words = Words {
        prefix: "",
        fields: &[&[
            Word::new("i8254", "irq_disabled", "channels[0].irq_disabled"),
            Word::new("i8254", "next_transition_time", "channels[0].next_transition_time"),
        ]],
    };
}

/// One channel of the PIT.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(rename = "pit channel@2")]
pub struct PitChannel {
    /// 1 to 0x10000.
    pub count: i32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    pub count_load_time: i64,
    pub next_transition_time: i64,
}

/// Subsections of `i8254`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub struct I8254Subs {
    /// `KVM_PIT_FLAGS_*`: the speaker's data bit, which QEMU keeps in `pcspk`.
    #[serde(rename = "mini-vmm/pit")]
    pub mini: Option<PitFlags>,
}

/// `mini-vmm/pit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitFlags {
    /// As in `struct kvm_pit_state2`.
    pub flags: u32,
}

/// Section `kvm-tpr-opt`, version 1: QEMU's option ROM that patches old Windows kernels. mini-vmm
/// has no such ROM: it does not send the section, reads it, and forgets it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct KvmTprOpt {
    pub rom_state: TprRomState,
    /// 0 inactive, 1 active, 2 standby.
    pub state: u32,
    pub real_tpr_addr: u32,
    pub rom_state_vaddr: u32,
    pub vapic_paddr: u32,
    pub rom_state_paddr: u32,
}

impl VmState for KvmTprOpt {
    const VERSION: u32 = 1;
}

/// The ROM's own table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TprRomState {
    pub signature: Pad<8>,
    pub vaddr: u32,
    pub fixup_start: u32,
    pub fixup_end: u32,
    pub vapic_vaddr: u32,
    pub vapic_size: u32,
    pub vcpu_shift: u32,
    pub real_tpr_addr: u32,
    pub handlers: [TprHandlers; 2],
}

/// Addresses of the ROM's routines, for one processor and for several.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TprHandlers {
    pub set_tpr: u32,
    pub set_tpr_eax: u32,
    pub get_tpr: [u32; 8],
    pub get_tpr_stack: u32,
}
