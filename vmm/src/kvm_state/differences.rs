//! For a verified migration: what is different about a section that was received, given to KVM and
//! read again, leaving out what moves by itself while nothing runs.

use arch::msr::KVM_WALL_CLOCK;
use arch::wire;
use devices::isa::rtc::RtcState;
use migration::vmstate::{self, FieldError, SectionId, SliceSource, VmState};
use serde_json::Value;

/// Fields that count time. They are set when the guest starts, not when its state is loaded.
const CLOCKS: [&str; 24] = [
    "tsc",
    "offset",
    "has_offset",
    "deadline",
    "cpu/msr_tscdeadline",
    "cpu_clock_offset",
    "cpu_ticks_offset",
    "clock",
    "realtime",
    "host_tsc",
    "has_host_tsc",
    "stable",
    "initial_count_load_time",
    "next_time",
    "timer_expiry",
    "count_load_time",
    "next_transition_time",
    // The RTC's: it shows the host's time, whatever the machine does.
    "base_rtc",
    "last_update",
    "update_timer",
    "next_alarm_time",
    "periodic_timer",
    "next_periodic_time",
    // Writing it makes the kernel compute the guest's wall clock.
    "wall_clock_msr",
];

/// Registers of the RTC that tell the time: seconds, minutes, hours, day of week, day, month, year,
/// the update bit, the century (MC146818 data sheet, table 2).
const RTC_TIME: [usize; 9] = [0, 2, 4, 6, 7, 8, 9, 10, 0x32];

/// The LAPIC timer's current count in the register page (Intel SDM vol. 3, table 11-1).
const LAPIC_CURRENT_COUNT: std::ops::Range<usize> = 0x390..0x394;

/// The LAPIC's processor priority, which follows from the task's priority and the interrupts in service (Intel
/// SDM vol. 3, 11.8.3.1). KVM computes it when it matters or is read, so what stands in the page may be old.
const LAPIC_PPR: std::ops::Range<usize> = 0xa0..0xa4;

/// The interrupts that a LAPIC has been sent, in its register page (the same table).
const LAPIC_IRR: std::ops::Range<usize> = 0x200..0x280;

/// Whether every bit of `a` is in `b`.
fn within(a: &Value, b: &Value) -> bool {
    a.as_u64().zip(b.as_u64()).is_some_and(|(a, b)| a & !b == 0)
}

/// A redirection entry's bit for a pin that is level-triggered (82093AA data sheet, 3.2.4).
const LEVEL: u64 = 1 << 15;

/// KVM delivers at once what an IOAPIC that it is given has not delivered yet: an edge that came while its
/// pin was masked, or once more while the line was high. It is gone there then, and in a LAPIC. The bit of a
/// level-triggered pin is its line, and stays.
fn put_delivered_back(received: &Value, again: &mut Value) {
    let entries = received["ioredtbl"].as_array().map_or(&[][..], Vec::as_slice);
    let edge = |entry: &Value| entry.as_u64().is_some_and(|entry| entry & LEVEL == 0);
    let edges = (0..32).zip(entries).filter(|(_, entry)| edge(entry));
    let edges = edges.fold(0, |bits, (pin, _)| bits | 1_u64 << pin);
    if let (Some(before), Some(now)) = (received["irr"].as_u64(), again["irr"].as_u64()) {
        again["irr"] = (now | before & edges).into();
    }
}

/// Where what an IOAPIC has delivered is found.
fn is_delivery(section: &str, path: &str, a: &Value, b: &Value) -> bool {
    section == "apic" && path.starts_with(".irr[") && within(a, b)
}

/// The SYSENTER registers that hold addresses, as fields and as MSRs (Intel SDM vol. 4, table 2-2).
const SYSENTER: [&str; 2] = ["sysenter_esp", "sysenter_eip"];
const SYSENTER_MSRS: std::ops::RangeInclusive<u64> = 0x175..=0x176;

/// On AMD's processors KVM gives what the guest wrote to such a register, but keeps only the lower half
/// of what it is given for one: there is no SYSENTER in long mode there (AMD APM volume 3), so nothing
/// reads the upper half, which Linux writes all the same.
fn is_cut(received: &Value, again: &Value) -> bool {
    let halves = received.as_u64().map(|value| value & u64::from(u32::MAX));
    halves.is_some() && halves == again.as_u64()
}

/// The differences, field by field where the section's fields are known here, else by byte.
pub(super) fn find(section: &SectionId, received: &[u8], again: &[u8]) -> Vec<FieldError> {
    let found = match section.idstr.as_str() {
        "timer" => compare::<wire::TimerSection>(section, received, again),
        "cpu" => compare::<wire::Cpu>(section, received, again),
        "cpu_common" => compare::<wire::CpuCommon>(section, received, again),
        "apic" => compare::<wire::Apic>(section, received, again),
        "kvmclock" => compare::<wire::Kvmclock>(section, received, again),
        "i8259" => compare::<wire::I8259>(section, received, again),
        "ioapic" => compare::<wire::Ioapic>(section, received, again),
        "i8254" => compare::<wire::I8254>(section, received, again),
        "mc146818rtc" => compare::<RtcState>(section, received, again),
        _ => {
            let at = received.iter().zip(again).position(|(a, b)| a != b);
            let at = at.unwrap_or(received.len().min(again.len()));
            let show = |bytes: &[u8]| {
                let from = bytes.get(at..).unwrap_or_default();
                format!("{:02x?}, {} bytes in all", from.get(..8).unwrap_or(from), bytes.len())
            };
            return vec![FieldError::new(format!("byte {at}"), show(received), show(again))];
        }
    };
    found.unwrap_or_else(|e| vec![FieldError::new("the whole section", "one that can be read", e)])
}

fn compare<T: VmState>(
    section: &SectionId,
    received: &[u8],
    again: &[u8],
) -> Result<Vec<FieldError>, String> {
    let read = |bytes: &[u8]| {
        let state: T = vmstate::from_source(section, T::VERSION, &mut SliceSource::new(bytes))
            .map_err(|e| e.to_string())?;
        serde_json::to_value(state).map_err(|e| e.to_string())
    };
    let mut differences = Vec::new();
    let (received, mut again) = (read(received)?, read(again)?);
    if section.idstr == "ioapic" {
        put_delivered_back(&received, &mut again);
    }
    walk(&section.idstr, "", &received, &again, &mut differences);
    Ok(differences)
}

fn walk(section: &str, path: &str, a: &Value, b: &Value, out: &mut Vec<FieldError>) {
    if a == b {
        return;
    }
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                if !CLOCKS.contains(&key.as_str()) {
                    let missing = &Value::Null;
                    let below = format!("{path}.{key}");
                    let (a, b) = (a.get(key).unwrap_or(missing), b.get(key).unwrap_or(missing));
                    if !(SYSENTER.contains(&key.as_str()) && is_cut(a, b)) {
                        walk(section, &below, a, b, out);
                    }
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let lapic_page = path.ends_with(".page");
            let msrs = path.ends_with(".msrs");
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                let counts = (lapic_page
                    && (LAPIC_CURRENT_COUNT.contains(&n) || LAPIC_PPR.contains(&n)))
                    || (path.ends_with(".cmos_data") && RTC_TIME.contains(&n));
                let sent = lapic_page && LAPIC_IRR.contains(&n) && within(a, b);
                let wall_clock = msrs && a.get("index") == Some(&Value::from(KVM_WALL_CLOCK));
                let sysenter = msrs
                    && a.get("index") == b.get("index")
                    && a.get("index")
                        .and_then(Value::as_u64)
                        .is_some_and(|index| SYSENTER_MSRS.contains(&index))
                    && is_cut(&a["value"], &b["value"]);
                if !counts && !sent && !wall_clock && !sysenter {
                    walk(section, &format!("{path}[{n}]"), a, b, out);
                }
            }
        }
        _ if is_delivery(section, path, a, b) => {}
        _ => out.push(FieldError::new(path.trim_start_matches('.'), a, b)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn differences(a: &Value, b: &Value) -> Vec<String> {
        differences_of("cpu", a, b)
    }

    fn differences_of(section: &str, a: &Value, b: &Value) -> Vec<String> {
        let mut out = Vec::new();
        walk(section, "", a, b, &mut out);
        out.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_upper_half_of_a_sysenter_address_may_be_lost_and_nothing_else() {
        const FULL: u64 = 0xffff_c900_0000_3000;
        let state = |esp: u64, index: u64, value: u64, lstar: u64| {
            json!({
                "sysenter_esp": esp,
                "lstar": lstar,
                "msrs": [{ "index": index, "value": value }],
            })
        };
        let whole = state(FULL, 0x175, FULL, FULL);
        assert!(differences(&whole, &state(0x3000, 0x175, 0x3000, FULL)).is_empty());
        assert_eq!(differences(&whole, &state(0x3001, 0x175, FULL, FULL)).len(), 1);
        assert_eq!(differences(&whole, &state(FULL, 0x175, 0x3001, FULL)).len(), 1);
        assert_eq!(differences(&whole, &state(FULL, 0x175, FULL, 0x3000)).len(), 1);
        let lstar = 0xc000_0082;
        let other = |value| state(FULL, lstar, value, FULL);
        assert_eq!(differences(&other(FULL), &other(0x3000)).len(), 1);
        // A timer's deadline may pass while nothing runs.
        let with = json!({ "subs": { "cpu/msr_tscdeadline": { "value": 7 } } });
        assert!(differences(&with, &json!({ "subs": {} })).is_empty());
        // The other way round it is no loss but another value.
        assert_eq!(differences(&state(0x3000, 0x175, 0x3000, FULL), &whole).len(), 2);
    }
    #[test]
    fn an_interrupt_may_have_been_delivered_and_none_may_be_lost() {
        let ioapic = |irr: u32| wire::Ioapic {
            irr,
            // Pin 4 is edge-triggered, and pin 5 level-triggered.
            ioredtbl: std::array::from_fn(|pin| if pin == 5 { LEVEL } else { 0 }),
            ..wire::Ioapic::default()
        };
        let id = SectionId::new("ioapic", 0);
        let of = |a: u32, b: u32| {
            let bytes = |irr| vmstate::to_bytes(&id, &ioapic(irr)).unwrap();
            find(&id, &bytes(a), &bytes(b)).len()
        };
        assert_eq!((of(0x30, 0x20), of(0x30, 0x10), of(0x10, 0x30)), (0, 1, 1));
        let irr = |bits: u64| json!({ "irr": bits, "id": 0 });
        assert_eq!(differences_of("i8259", &irr(0x10), &irr(0)).len(), 1);
        let words = |bits: u64| json!({ "irr": [0, bits], "isr": [0, 0] });
        assert!(differences_of("apic", &words(1), &words(0x11)).is_empty());
        assert_eq!(differences_of("apic", &words(0x11), &words(1)).len(), 1);
        let page = |at: usize, bits: u8| {
            let mut page = vec![0_u8; 1024];
            page[at] = bits;
            json!({ "page": page })
        };
        assert!(differences(&page(0x204, 1), &page(0x204, 3)).is_empty());
        assert_eq!(differences(&page(0x204, 3), &page(0x204, 1)).len(), 1);
        assert_eq!(differences(&page(0x104, 1), &page(0x104, 3)).len(), 1, "in service");
        assert!(differences(&page(0xa0, 0x40), &page(0xa0, 0)).is_empty(), "follows from those");
        assert_eq!(differences(&page(0x80, 0x40), &page(0x80, 0)).len(), 1, "the task's");
    }
}
