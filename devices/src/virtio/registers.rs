//! The registers that drivers see: legacy (virtio 1.2, 4.1.4.10) and modern (4.1.4.3).
//!
//! Values of registers that are read or written in parts, or that are not there, are those of the
//! whole register cut to size, or zero: no driver does that.

use super::core::status;
use super::features;
use super::pci::{LEGACY_HEADER, ModernQueue, NOTIFY_MULTIPLIER, VirtioPci};
use super::queue::{NO_VECTOR, RingAddresses};

/// Legacy registers, offsets in BAR 0.
mod legacy {
    pub(super) const DEVICE_FEATURES: u64 = 0;
    pub(super) const DRIVER_FEATURES: u64 = 4;
    pub(super) const QUEUE_PFN: u64 = 8;
    pub(super) const QUEUE_SIZE: u64 = 12;
    pub(super) const QUEUE_SELECT: u64 = 14;
    pub(super) const QUEUE_NOTIFY: u64 = 16;
    pub(super) const STATUS: u64 = 18;
    pub(super) const ISR: u64 = 19;
    pub(super) const CONFIG_VECTOR: u64 = 20;
    pub(super) const QUEUE_VECTOR: u64 = 22;
    /// Ring addresses are given in pages.
    pub(super) const PAGE_SHIFT: u32 = 12;
}

/// Modern common configuration, offsets in its area.
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const DESC_LOW: u64 = 0x20;
    pub(super) const DESC_HIGH: u64 = 0x24;
    pub(super) const AVAIL_LOW: u64 = 0x28;
    pub(super) const AVAIL_HIGH: u64 = 0x2c;
    pub(super) const USED_LOW: u64 = 0x30;
    pub(super) const USED_HIGH: u64 = 0x34;
    pub(super) const QUEUE_RESET: u64 = 0x3a;
}

/// The areas of BAR 4, numbered by page.
mod area {
    pub(super) const COMMON: u64 = 0;
    pub(super) const ISR: u64 = 1;
    pub(super) const DEVICE: u64 = 2;
    pub(super) const NOTIFY: u64 = 3;
    pub(super) const SHIFT: u32 = 12;
    pub(super) const MASK: u64 = 0xfff;
}

/// What a guest has written, as a number.
fn number(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The low bits of a register that is 16 bits wide.
fn low16(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Gives a register's value to a guest; what is wider than it reads as zero.
fn answer(value: u32, data: &mut [u8]) {
    data.fill(0);
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

fn join([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

impl ModernQueue {
    /// Where the driver says the ring is.
    pub(super) fn addresses(&self) -> RingAddresses {
        RingAddresses { desc: join(self.desc), avail: join(self.avail), used: join(self.used) }
    }
}

impl VirtioPci {
    fn selected(&self) -> usize {
        self.queue_select.into()
    }

    fn queue_vector(&self) -> u16 {
        self.core.queue(self.selected()).map_or(NO_VECTOR, |queue| queue.vector)
    }

    fn set_queue_vector(&mut self, vector: u16) {
        let vector = self.valid_vector(vector);
        if let Some(mut queue) = self.core.queue(self.selected()) {
            queue.vector = vector;
        }
    }

    fn set_config_vector(&mut self, vector: u16) {
        let vector = self.valid_vector(vector);
        self.core.interrupts().lock().config_vector = vector;
    }

    fn config_vector(&self) -> u16 {
        self.core.interrupts().lock().config_vector
    }

    fn take_isr(&mut self) -> u8 {
        self.core.interrupts().lock().take_isr()
    }

    fn device_config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.get(start..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn device_config_write(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(data.len());
        if end <= self.device.config().len() {
            self.device.write_config(start, data);
        }
    }

    pub(super) fn legacy_read(&mut self, offset: u64, data: &mut [u8]) {
        let msix = self.msix_enabled();
        let value = match offset {
            legacy::DEVICE_FEATURES => low32(self.offer(false)),
            legacy::DRIVER_FEATURES => low32(self.core.features()),
            legacy::QUEUE_PFN => {
                let at = self.core.queue(self.selected()).map(|queue| queue.addresses().desc);
                low32(at.unwrap_or(0) >> legacy::PAGE_SHIFT)
            }
            legacy::QUEUE_SIZE => {
                self.core.queue(self.selected()).map_or(0, |queue| queue.size().into())
            }
            legacy::QUEUE_SELECT => self.queue_select.into(),
            legacy::STATUS => self.core.status().into(),
            legacy::ISR => self.take_isr().into(),
            legacy::CONFIG_VECTOR if msix => self.config_vector().into(),
            legacy::QUEUE_VECTOR if msix => self.queue_vector().into(),
            _ => {
                match offset.checked_sub(LEGACY_HEADER[usize::from(!msix)]) {
                    Some(offset) => self.device_config_read(offset, data),
                    None => data.fill(0),
                }
                return;
            }
        };
        answer(value, data);
    }

    pub(super) fn legacy_write(&mut self, offset: u64, data: &[u8]) {
        let value = number(data);
        let msix = self.msix_enabled();
        match offset {
            legacy::DRIVER_FEATURES => self.set_features(value.into()),
            legacy::QUEUE_PFN if value == 0 => self.reset_device(),
            legacy::QUEUE_PFN => {
                let queue = self.selected();
                let size = self.core.queue(queue).map_or(0, |queue| queue.size());
                let desc = u64::from(value) << legacy::PAGE_SHIFT;
                self.enable_queue(queue, RingAddresses::legacy(desc, size));
            }
            legacy::QUEUE_SELECT => self.queue_select = low16(value),
            legacy::QUEUE_NOTIFY => self.core.kick(low16(value).into()),
            legacy::STATUS => self.set_status(value.to_le_bytes()[0]),
            legacy::CONFIG_VECTOR if msix => self.set_config_vector(low16(value)),
            legacy::QUEUE_VECTOR if msix => self.set_queue_vector(low16(value)),
            _ => {
                if let Some(offset) = offset.checked_sub(LEGACY_HEADER[usize::from(!msix)]) {
                    self.device_config_write(offset, data);
                }
            }
        }
    }

    pub(super) fn modern_read(&mut self, offset: u64, data: &mut [u8]) {
        let inside = offset & area::MASK;
        match offset >> area::SHIFT {
            area::COMMON => answer(self.common_read(inside), data),
            area::ISR if inside == 0 => answer(self.take_isr().into(), data),
            area::DEVICE => self.device_config_read(inside, data),
            _ => data.fill(0),
        }
    }

    pub(super) fn modern_write(&mut self, offset: u64, data: &[u8]) {
        let inside = offset & area::MASK;
        match offset >> area::SHIFT {
            area::COMMON => self.common_write(inside, number(data)),
            area::DEVICE => self.device_config_write(inside, data),
            area::NOTIFY => {
                let queue = inside / u64::from(NOTIFY_MULTIPLIER);
                self.core.kick(usize::try_from(queue).unwrap_or(usize::MAX));
            }
            _ => {}
        }
    }

    fn common_read(&self, offset: u64) -> u32 {
        let queue = self.modern.get(self.selected()).copied().unwrap_or_default();
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select,
            common::DEVICE_FEATURE => half(self.offer(true), self.device_feature_select),
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select,
            common::DRIVER_FEATURE => usize::try_from(self.driver_feature_select)
                .ok()
                .and_then(|half| self.driver_features.get(half))
                .copied()
                .unwrap_or(0),
            common::CONFIG_VECTOR => self.config_vector().into(),
            common::NUM_QUEUES => u32::try_from(self.core.len()).unwrap_or(0),
            common::STATUS => self.core.status().into(),
            common::GENERATION => self.core.interrupts().lock().generation.into(),
            common::QUEUE_SELECT => self.queue_select.into(),
            common::QUEUE_SIZE => {
                self.core.queue(self.selected()).map_or(0, |queue| queue.size().into())
            }
            common::QUEUE_VECTOR => self.queue_vector().into(),
            common::QUEUE_ENABLE => queue.enabled.into(),
            common::QUEUE_NOTIFY_OFF => self.queue_select.into(),
            common::DESC_LOW => queue.desc[0],
            common::DESC_HIGH => queue.desc[1],
            common::AVAIL_LOW => queue.avail[0],
            common::AVAIL_HIGH => queue.avail[1],
            common::USED_LOW => queue.used[0],
            common::USED_HIGH => queue.used[1],
            // A queue is reset before the write that asks for it returns.
            _ => 0,
        }
    }

    fn common_write(&mut self, offset: u64, value: u32) {
        let index = self.selected();
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE => self.driver_feature(value),
            common::CONFIG_VECTOR => self.set_config_vector(low16(value)),
            common::STATUS => {
                let [byte, ..] = value.to_le_bytes();
                self.set_status(byte);
            }
            common::QUEUE_SELECT => self.queue_select = low16(value),
            common::QUEUE_VECTOR => self.set_queue_vector(low16(value)),
            common::QUEUE_ENABLE if value == 1 => self.modern_enable(index),
            common::QUEUE_RESET if value == 1 && self.core.has(features::RING_RESET) => {
                self.reset_queue(index);
                if let Some(queue) = self.modern.get_mut(index) {
                    *queue = ModernQueue::default();
                }
            }
            _ => self.modern_queue_write(index, offset, value),
        }
    }

    fn driver_feature(&mut self, value: u32) {
        // The choice is final once it was confirmed.
        if self.core.status() & status::FEATURES_OK != 0 {
            return;
        }
        let half = usize::try_from(self.driver_feature_select).unwrap_or(usize::MAX);
        if let Some(half) = self.driver_features.get_mut(half) {
            *half = value;
            self.set_features(join(self.driver_features));
        }
    }

    fn modern_queue_write(&mut self, index: usize, offset: u64, value: u32) {
        let Some(queue) = self.modern.get_mut(index) else { return };
        match offset {
            common::QUEUE_SIZE => {
                queue.size = low16(value);
                if let Some(mut live) = self.core.queue(index) {
                    live.set_size(low16(value));
                }
            }
            common::DESC_LOW => queue.desc[0] = value,
            common::DESC_HIGH => queue.desc[1] = value,
            common::AVAIL_LOW => queue.avail[0] = value,
            common::AVAIL_HIGH => queue.avail[1] = value,
            common::USED_LOW => queue.used[0] = value,
            common::USED_HIGH => queue.used[1] = value,
            _ => {}
        }
    }

    fn modern_enable(&mut self, index: usize) {
        let Some(queue) = self.modern.get_mut(index) else { return };
        queue.enabled = true;
        let at = queue.addresses();
        self.enable_queue(index, at);
    }
}

fn low32(value: u64) -> u32 {
    half(value, 0)
}

/// Bits 0 to 31 or 32 to 63; there are no others.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
