//! What the guest waits for beside the last pages: the state of vCPUs and devices, which is read, sent and
//! loaded, and the answers of both sides. Pure arithmetic.
//!
//! It belongs to every estimate of a downtime: to the one that decides when to stop the guest, and to what is
//! said before and during a migration.

use std::time::Duration;

use crate::guest::Machine;
use crate::vmstate::Audience;

/// Of the smallest guest, without round trips. This and the next two were measured over loopback
/// (docs/performance.md, "The pause").
const SMALLEST: Duration = Duration::from_millis(2);
/// A vCPU's state is read, set, and its thread woken.
const VCPU: Duration = Duration::from_micros(500);
/// A virtio device's state is written, read, and its queues looked at.
const VIRTIO_DEVICE: Duration = Duration::from_micros(200);
/// Bytes of a vCPU's sections.
const VCPU_BYTES: u64 = 8 << 10;
/// Bytes of a virtio device's section: it has 45 bytes for each of QEMU's 1024 possible queues,
const VIRTIO_BYTES: u64 = 46 << 10;
/// or those that there are.
const SHORT_VIRTIO_BYTES: u64 = 1 << 10;
/// Bytes of all other sections together.
const OTHER_BYTES: u64 = 24 << 10;
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
    /// Of this machine, whose sections are for `audience`, where an answer takes `round_trip`: zero where nobody
    /// answers.
    pub fn of(machine: &(impl Machine + ?Sized), audience: Audience, round_trip: Duration) -> Self {
        let is_virtio = |name: &str| name.contains("virtio");
        let sections = machine.sections();
        let virtio = sections.iter().filter(|section| is_virtio(&section.id().idstr)).count();
        let (vcpus, virtio) = (machine.vcpus(), u32::try_from(virtio).unwrap_or(u32::MAX));
        let state = VCPU.saturating_mul(vcpus).saturating_add(VIRTIO_DEVICE.saturating_mul(virtio));
        let bytes = |count: u32, each: u64| u64::from(count).saturating_mul(each);
        let virtio_bytes = match audience {
            Audience::MiniVmm => SHORT_VIRTIO_BYTES,
            Audience::Restore | Audience::Qemu => VIRTIO_BYTES,
        };
        Self {
            fixed: SMALLEST
                .saturating_add(state)
                .saturating_add(round_trip.saturating_mul(ROUND_TRIPS)),
            bytes: OTHER_BYTES
                .saturating_add(bytes(vcpus, VCPU_BYTES))
                .saturating_add(bytes(virtio, virtio_bytes)),
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
