//! What the guest waits for beside the last pages: the state of vCPUs and devices, which is read, sent and
//! loaded, and the answers of both sides. Pure arithmetic, but that each section is asked how long it is.
//!
//! It belongs to every estimate of a downtime: to the one that decides when to stop the guest, and to what is
//! said before and during a migration.

use std::time::Duration;

use crate::vmstate::{Audience, Section};

/// Of the smallest guest, without round trips. This and the next two were measured over loopback
/// (docs/performance.md, "The pause").
const SMALLEST: Duration = Duration::from_millis(1);
/// A vCPU's state is read, set, and its thread woken.
const VCPU: Duration = Duration::from_micros(300);
/// A virtio device's state is written, read, and its queues looked at.
const VIRTIO_DEVICE: Duration = Duration::from_micros(50);
/// The name of a vCPU's largest section.
const CPU: &str = "cpu";
/// Its bytes, which can't be known before its vCPU stands still: to a mini-vmm with all of its
/// registers,
const CPU_BYTES: u64 = 8700;
/// and as QEMU has it.
const QEMU_CPU_BYTES: u64 = 2100;
/// Bytes of another that KVM has the state of, like those of its chips.
const KVM_BYTES: u64 = 200;
/// Bytes of a section's header and footer, without its name.
const FRAME_BYTES: u64 = 19;
/// Round trips with the guest stopped: one for the last pages, PREPARED, and COMMIT.
const ROUND_TRIPS: u32 = 3;

/// What the hand-over of one VM over one connection takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandOver {
    /// Whatever the rate.
    pub fixed: Duration,
    /// Bytes of state that travel.
    pub bytes: u64,
}

impl HandOver {
    /// Of a machine with these sections, which are for `audience`, where an answer takes `round_trip`: zero where
    /// nobody answers. The guest may run.
    pub fn of(sections: &[Box<dyn Section>], audience: Audience, round_trip: Duration) -> Self {
        let count = |is: fn(&str) -> bool| {
            let found = sections.iter().filter(|section| is(&section.id().idstr)).count();
            u32::try_from(found).unwrap_or(u32::MAX)
        };
        let (vcpus, virtio) = (count(|name| name == CPU), count(|name| name.contains("virtio")));
        let state = VCPU.saturating_mul(vcpus).saturating_add(VIRTIO_DEVICE.saturating_mul(virtio));
        Self {
            fixed: SMALLEST
                .saturating_add(state)
                .saturating_add(round_trip.saturating_mul(ROUND_TRIPS)),
            bytes: sections
                .iter()
                .fold(0, |sum, section| sum.saturating_add(bytes_of(section.as_ref(), audience))),
        }
    }

    /// How long it takes at so many bytes per second; without its bytes where that is unknown.
    pub fn at(&self, bytes_per_s: Option<f64>) -> Duration {
        let sending = bytes_per_s
            .and_then(|rate| Duration::try_from_secs_f64(self.bytes as f64 / rate).ok())
            .unwrap_or_default();
        self.fixed.saturating_add(sending)
    }
}

/// What a section adds to the stream, as its device is now: a device's state takes much the same room whatever it is.
fn bytes_of(section: &dyn Section, audience: Audience) -> u64 {
    let id = section.id().idstr;
    let len = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    let body = match audience {
        Audience::MiniVmm | Audience::Restore => section.save(audience).map(|body| len(body.len())),
        // With its part of the description at the stream's end, which is the larger one for most.
        Audience::Qemu => section.save_described(audience).and_then(|(body, describe)| {
            let description = describe()?.to_string();
            Ok(len(body.len()).saturating_add(len(description.len())))
        }),
    };
    let body = body.unwrap_or(match (id.as_str(), audience) {
        (CPU, Audience::MiniVmm) => CPU_BYTES,
        (CPU, _) => QEMU_CPU_BYTES,
        _ => KVM_BYTES,
    });
    body.saturating_add(FRAME_BYTES).saturating_add(len(id.len()))
}

/// How long the last pages may take if the guest may stand still for `limit` and the hand-over takes
/// `hand_over` of that. Half of it is theirs in any case: a limit that no hand-over keeps would hold the guest
/// here for ever otherwise, and is exceeded by no more than what the hand-over takes.
pub fn left_for_pages(limit: Duration, hand_over: Duration) -> Duration {
    limit.saturating_sub(hand_over).max(limit / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_slow_link_takes_long_for_the_state_too() {
        let hand_over = HandOver { fixed: 5 * MS, bytes: 1_000_000 };
        assert_eq!(hand_over.at(Some(1e6)), 1005 * MS);
        assert_eq!(hand_over.at(Some(1e9)), 6 * MS);
        assert_eq!(hand_over.at(None), 5 * MS);
        assert_eq!(hand_over.at(Some(0.0)), 5 * MS, "no time that could be said");
    }

    #[test]
    fn the_hand_over_is_a_part_of_the_limit_and_leaves_half_of_it() {
        assert_eq!(left_for_pages(300 * MS, 10 * MS), 290 * MS);
        assert_eq!(left_for_pages(20 * MS, 10 * MS), 10 * MS);
        assert_eq!(left_for_pages(12 * MS, 10 * MS), 6 * MS);
        assert_eq!(left_for_pages(6 * MS, 10 * MS), 3 * MS);
        assert_eq!(left_for_pages(Duration::ZERO, 10 * MS), Duration::ZERO);
    }
}
