//! PICs, IOAPIC, PIT and kvmclock as sections, and back.

use kvm_bindings::{kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2};
use migration::vmstate::{Audience, FieldError, Pad};

use super::hex;
use super::platform::{
    ClockIsReliable, I8254, I8254Subs, I8259, Ioapic, Kvmclock, KvmclockSubs, MiniClock,
    PitChannel, PitFlags,
};
use crate::clock::ClockState;
use crate::irqchip::{ELCR_MASK, IoapicState, IrqchipState};

/// The sections of the chips that KVM emulates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IrqchipWire {
    /// Sections `i8259`: master (instance 0) and slave (1).
    pub pic: [I8259; 2],
    /// Section `ioapic`.
    pub ioapic: Ioapic,
    /// Section `i8254`.
    pub pit: I8254,
}

impl IrqchipWire {
    /// The sections for captured chips. Now it is `virtual_ns` on the virtual clock and
    /// `monotonic_ns` on the host's ([`monotonic_ns`](crate::irqchip::monotonic_ns)).
    pub fn from_state(
        state: &IrqchipState,
        audience: Audience,
        virtual_ns: i64,
        monotonic_ns: i64,
    ) -> Self {
        let to_virtual = virtual_ns.wrapping_sub(monotonic_ns);
        Self {
            pic: state.pic.map(pic_to_wire),
            ioapic: Ioapic {
                id: state.ioapic.id as u8,
                ioregsel: state.ioapic.select as u8,
                unused: Pad,
                irr: state.ioapic.irr,
                ioredtbl: state.ioapic.redirection,
            },
            pit: pit_to_wire(&state.pit, audience, to_virtual),
        }
    }

    /// The chips that the sections describe, on a host where it is `monotonic_ns` and on whose
    /// virtual clock it is `virtual_ns`.
    pub fn to_state(&self, virtual_ns: i64, monotonic_ns: i64) -> Result<IrqchipState, FieldError> {
        let to_monotonic = monotonic_ns.wrapping_sub(virtual_ns);
        Ok(IrqchipState {
            pic: [
                pic_from_wire("i8259[0]", &self.pic[0], ELCR_MASK[0])?,
                pic_from_wire("i8259[1]", &self.pic[1], ELCR_MASK[1])?,
            ],
            ioapic: IoapicState {
                select: self.ioapic.ioregsel.into(),
                id: self.ioapic.id.into(),
                irr: self.ioapic.irr & 0xff_ffff,
                redirection: self.ioapic.ioredtbl,
            },
            pit: pit_from_wire(&self.pit, to_monotonic)?,
        })
    }
}

fn pic_to_wire(p: kvm_pic_state) -> I8259 {
    I8259 {
        last_irr: p.last_irr,
        irr: p.irr,
        imr: p.imr,
        isr: p.isr,
        priority_add: p.priority_add,
        irq_base: p.irq_base,
        read_reg_select: p.read_reg_select,
        poll: p.poll,
        special_mask: p.special_mask,
        init_state: p.init_state,
        auto_eoi: p.auto_eoi,
        rotate_on_auto_eoi: p.rotate_on_auto_eoi,
        special_fully_nested_mode: p.special_fully_nested_mode,
        init4: p.init4,
        single_mode: 0,
        elcr: p.elcr,
    }
}

fn pic_from_wire(name: &str, p: &I8259, elcr_mask: u8) -> Result<kvm_pic_state, FieldError> {
    if p.single_mode != 0 {
        return Err(FieldError::new(
            format!("{name}.single_mode"),
            "0 (the board has two PICs)",
            p.single_mode,
        ));
    }
    if p.priority_add > 7 {
        return Err(FieldError::new(format!("{name}.priority_add"), "0 to 7", p.priority_add));
    }
    if p.init_state > 3 {
        return Err(FieldError::new(format!("{name}.init_state"), "0 to 3", p.init_state));
    }
    Ok(kvm_pic_state {
        last_irr: p.last_irr,
        irr: p.irr,
        imr: p.imr,
        isr: p.isr,
        priority_add: p.priority_add,
        irq_base: p.irq_base,
        read_reg_select: p.read_reg_select,
        poll: p.poll,
        special_mask: p.special_mask,
        init_state: p.init_state,
        auto_eoi: p.auto_eoi,
        rotate_on_auto_eoi: p.rotate_on_auto_eoi,
        special_fully_nested_mode: p.special_fully_nested_mode,
        init4: p.init4,
        elcr: p.elcr,
        elcr_mask,
    })
}

fn pit_to_wire(pit: &kvm_pit_state2, audience: Audience, to_virtual: i64) -> I8254 {
    let mut channels = pit.channels.each_ref().map(|c| PitChannel {
        count: if c.count == 0 { 0x10000 } else { c.count as i32 },
        latched_count: c.latched_count,
        count_latched: c.count_latched,
        status_latched: c.status_latched,
        status: c.status,
        read_state: c.read_state,
        write_state: c.write_state,
        write_latch: c.write_latch,
        rw_mode: c.rw_mode,
        mode: c.mode,
        bcd: c.bcd,
        gate: c.gate,
        count_load_time: c.count_load_time.wrapping_add(to_virtual),
        next_transition_time: 0,
    });
    // Only channel 0 raises interrupts. The kernel schedules its next one itself, so QEMU on KVM
    // writes a moment that is past, and so do we.
    channels[0].next_transition_time = channels[0].count_load_time.wrapping_add(1);
    I8254 {
        irq_disabled: pit.flags & kvm_bindings::KVM_PIT_FLAGS_HPET_LEGACY,
        next_transition_time: channels[0].next_transition_time,
        channels,
        subs: I8254Subs {
            mini: (audience != Audience::Qemu).then_some(PitFlags { flags: pit.flags }),
        },
    }
}

fn pit_from_wire(pit: &I8254, to_monotonic: i64) -> Result<kvm_pit_state2, FieldError> {
    let mut channels = [kvm_pit_channel_state::default(); 3];
    for (n, (slot, c)) in channels.iter_mut().zip(&pit.channels).enumerate() {
        let wrong = |field: &str, expected: &str, found: String| {
            Err(FieldError::new(format!("channels[{n}].{field}"), expected, found))
        };
        // 0 is how the chip is told 0x10000; QEMU writes the latter.
        if !(0..=0x10000).contains(&c.count) {
            return wrong("count", "0 to 0x10000", hex(c.count));
        }
        // A channel that nobody has programmed since power-on has mode 255 (Linux, kvm_pit_reset).
        if c.mode > 5 && c.mode != u8::MAX {
            return wrong("mode", "0 to 5, or 255", c.mode.to_string());
        }
        for (field, value) in [
            ("read_state", c.read_state),
            ("write_state", c.write_state),
            ("rw_mode", c.rw_mode),
            ("count_latched", c.count_latched),
        ] {
            if value > 4 {
                return wrong(field, "0 to 4", value.to_string());
            }
        }
        *slot = kvm_pit_channel_state {
            count: c.count as u32,
            latched_count: c.latched_count,
            count_latched: c.count_latched,
            status_latched: c.status_latched,
            status: c.status,
            read_state: c.read_state,
            write_state: c.write_state,
            write_latch: c.write_latch,
            rw_mode: c.rw_mode,
            mode: c.mode,
            bcd: c.bcd,
            gate: c.gate,
            count_load_time: c.count_load_time.wrapping_add(to_monotonic),
        };
    }
    let disabled = if pit.irq_disabled != 0 { kvm_bindings::KVM_PIT_FLAGS_HPET_LEGACY } else { 0 };
    let flags = match pit.subs.mini {
        None => disabled,
        Some(PitFlags { flags }) => {
            let known = kvm_bindings::KVM_PIT_FLAGS_HPET_LEGACY
                | kvm_bindings::KVM_PIT_FLAGS_SPEAKER_DATA_ON;
            if flags & !known != 0 {
                return Err(FieldError::new("mini-vmm/pit.flags", hex(known), hex(flags)));
            }
            flags
        }
    };
    Ok(kvm_pit_state2 { channels, flags, ..Default::default() })
}

impl Kvmclock {
    /// The section for a captured clock.
    pub fn from_state(state: &ClockState, audience: Audience) -> Self {
        Self {
            clock: state.clock,
            subs: KvmclockSubs {
                reliable: Some(ClockIsReliable { clock_is_reliable: true }),
                mini: state.realtime.filter(|_| audience != Audience::Qemu).map(|realtime| {
                    MiniClock {
                        realtime,
                        has_host_tsc: state.host_tsc.is_some(),
                        host_tsc: state.host_tsc.unwrap_or(0),
                        stable: state.stable,
                    }
                }),
            },
        }
    }

    /// The clock that the section describes.
    pub fn to_state(&self) -> ClockState {
        let mini = self.subs.mini.as_ref();
        ClockState {
            clock: self.clock,
            realtime: mini.map(|mini| mini.realtime),
            host_tsc: mini.filter(|mini| mini.has_host_tsc).map(|mini| mini.host_tsc),
            stable: mini.is_some_and(|mini| mini.stable),
        }
    }
}
