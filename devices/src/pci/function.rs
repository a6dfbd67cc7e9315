//! What a device is to the PCI bus.

use super::PciConfig;

/// One function of a slot. The bus keeps it in a mutex and calls it with that mutex held.
pub trait PciFunction: Send {
    /// The name for logs, for example `virtio-blk`.
    fn name(&self) -> &str;

    /// Its configuration space; the bus looks here for where the BARs are.
    fn config(&self) -> &PciConfig;

    /// A guest's read of 1, 2 or 4 bytes of configuration space: [`PciConfig::read`], unless there
    /// are registers that have to be computed.
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// A guest's write of 1, 2 or 4 bytes of configuration space: [`PciConfig::write`], and what
    /// follows from it. BARs are looked after by the bus.
    fn config_write(&mut self, offset: usize, data: &[u8]);

    /// A guest's read inside of a mapped BAR.
    fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// A guest's write inside of a mapped BAR.
    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}

    /// BAR `bar` is mapped at `base` from now on, or (`None`) not mapped any more.
    fn bar_mapped(&mut self, _bar: usize, _base: Option<u64>) {}

    /// Back to the state after power-on, [`PciConfig::reset`] included. All vCPUs are stopped.
    fn reset(&mut self);
}
