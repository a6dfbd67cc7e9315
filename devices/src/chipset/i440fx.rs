//! The host bridge: 82441FX, function 00.0.
//!
//! What the guest programs into the PAM registers is kept and told ([`I440fx::on_pam`]); moving memory
//! is the machine's business. SMRAM is kept only.

use migration::vmstate::{Audience, FieldError, Migratable, Pad, VmState, Words};
use serde::{Deserialize, Serialize};

use super::identity;
use crate::device::Device;
use crate::pci::{PCI_DEVICE_WORDS, PciConfig, PciDeviceState, PciFunction};

/// DRAM control: the value after power-on.
const DRAMC: usize = 0x57;
/// The first of seven registers with two segments each, but for the first one's lower half.
const PAM: usize = 0x59;
/// System management RAM.
const SMRAM: usize = 0x72;

/// The segments that the PAM registers rule, in the registers' order: address and size.
pub const PAM_SEGMENTS: [(u64, u64); 13] = [
    (0xf_0000, 0x1_0000),
    (0xc_0000, 0x4000),
    (0xc_4000, 0x4000),
    (0xc_8000, 0x4000),
    (0xc_c000, 0x4000),
    (0xd_0000, 0x4000),
    (0xd_4000, 0x4000),
    (0xd_8000, 0x4000),
    (0xd_c000, 0x4000),
    (0xe_0000, 0x4000),
    (0xe_4000, 0x4000),
    (0xe_8000, 0x4000),
    (0xe_c000, 0x4000),
];

/// Where a segment's accesses go: to RAM, or else to the PCI bus (that is, to the ROM).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PamAccess {
    /// Reads go to RAM.
    pub read: bool,
    /// Writes go to RAM.
    pub write: bool,
}

/// Called with what is programmed now, in the order of [`PAM_SEGMENTS`].
pub type PamHook = Box<dyn Fn([PamAccess; 13]) + Send>;

/// The host bridge.
pub struct I440fx {
    config: PciConfig,
    changed: Option<PamHook>,
}

impl Default for I440fx {
    fn default() -> Self {
        let mut config = PciConfig::new(identity(0x1237, 2, 0x0600, 0));
        config.set(DRAMC, &[0x02]);
        config.set(SMRAM, &[0x02]);
        Self { config, changed: None }
    }
}

impl I440fx {
    /// The bridge after power-on: all segments to ROM.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has `hook` called whenever the guest has programmed another PAM value. It runs inside of the
    /// access, on the vCPU's thread.
    pub fn on_pam(&mut self, hook: PamHook) {
        self.changed = Some(hook);
    }

    /// What the guest has programmed for all segments.
    pub fn pam_all(&self) -> [PamAccess; 13] {
        let rom = PamAccess { read: false, write: false };
        std::array::from_fn(|segment| self.pam(segment).unwrap_or(rom))
    }

    /// What the guest has programmed for `PAM_SEGMENTS[segment]`; `None` if there is no such one.
    pub fn pam(&self, segment: usize) -> Option<PamAccess> {
        if segment >= PAM_SEGMENTS.len() {
            return None;
        }
        // The first register's lower half is reserved: segment 0 is the second half.
        let nibble = segment + 1;
        let register = self.config.bytes().get(PAM + nibble / 2)?;
        let attributes = register >> (nibble % 2 * 4);
        Some(PamAccess { read: attributes & 1 != 0, write: attributes & 2 != 0 })
    }
}

impl PciFunction for I440fx {
    fn name(&self) -> &str {
        "I440FX"
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        let before = self.pam_all();
        self.config.write(offset, data);
        let now = self.pam_all();
        if let Some(changed) = self.changed.as_ref().filter(|_| now != before) {
            changed(now);
        }
    }

    fn reset(&mut self) {
        self.config.reset_header();
    }
}

/// A reset leaves the chip's own registers, PAM among them, as they are: so it is with QEMU's, and
/// SeaBIOS tells by what it finds in the RAM that it is shown that it has run before.
impl Device for I440fx {
    fn reset(&mut self) {
        self.config.reset_header();
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// Section `0000:00:00.0/I440FX` v3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I440fxState {
    parent_obj: PciDeviceState,
    unused: Pad<1>,
}

impl VmState for I440fxState {
    const VERSION: u32 = 3;
    const WORDS: Words = Words { prefix: "", fields: &[PCI_DEVICE_WORDS] };
}

impl Migratable for I440fx {
    type State = I440fxState;

    fn save(&self, _: Audience) -> Result<I440fxState, FieldError> {
        Ok(I440fxState { parent_obj: self.config.save(false), unused: Pad })
    }

    fn check(&self, state: &I440fxState) -> Result<(), FieldError> {
        self.config.check(&state.parent_obj)
    }

    fn restore(&mut self, state: I440fxState) -> Result<(), FieldError> {
        self.config.restore(&state.parent_obj);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_host_bridge() {
        let mut bridge = I440fx::new();
        let mut id = [0; 12];
        bridge.config_read(0, &mut id);
        assert_eq!(id, [0x86, 0x80, 0x37, 0x12, 0, 0, 0, 0, 2, 0, 0, 6]);
        let mut subsystem = [0; 4];
        bridge.config_read(0x2c, &mut subsystem);
        assert_eq!(subsystem, [0xf4, 0x1a, 0x00, 0x11]);
    }

    #[test]
    fn pam_registers_rule_their_segments() {
        let mut bridge = I440fx::new();
        let rom = PamAccess { read: false, write: false };
        assert!((0..13).all(|segment| bridge.pam(segment) == Some(rom)));
        assert_eq!(bridge.pam(13), None);
        // As SeaBIOS leaves them.
        bridge.config_write(0x59, &[0x10, 0x11, 0x11, 0x21]);
        bridge.config_write(0x5f, &[0x33]);
        let read = PamAccess { read: true, write: false };
        let write = PamAccess { read: false, write: true };
        let both = PamAccess { read: true, write: true };
        let expected = [read, read, read, read, read, read, write, rom, rom, rom, rom, both, both];
        for (segment, access) in expected.into_iter().enumerate() {
            assert_eq!(bridge.pam(segment), Some(access), "{:#x}", PAM_SEGMENTS[segment].0);
        }
    }

    #[test]
    fn a_change_is_told_once_and_survives_a_reset() {
        let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut bridge = I440fx::new();
        let hook = told.clone();
        bridge.on_pam(Box::new(move |all| hook.lock().unwrap().push(all[0])));
        bridge.config_write(0x04, &[0x06, 0x01]);
        bridge.config_write(0x59, &[0x30]);
        bridge.config_write(0x59, &[0x30]);
        bridge.config_write(0x58, &[0, 0x10, 0, 0]);
        let both = PamAccess { read: true, write: true };
        let read = PamAccess { read: true, write: false };
        assert_eq!(*told.lock().unwrap(), [both, read]);
        PciFunction::reset(&mut bridge);
        assert_eq!((bridge.pam(0), bridge.config.command()), (Some(read), 0));
        assert_eq!(told.lock().unwrap().len(), 2);
    }

    #[test]
    fn state_travels_whole() {
        let mut from = I440fx::new();
        for offset in 0x40..0x100 {
            from.config_write(offset, &[offset as u8]);
        }
        from.config_write(4, &[0x03, 0x01]);
        let state = from.save(Audience::Qemu).unwrap();
        let mut to = I440fx::new();
        to.check(&state).unwrap();
        to.restore(state.clone()).unwrap();
        assert_eq!(to.save(Audience::Qemu).unwrap(), state);
        assert_eq!(to.pam(0), from.pam(0));
        let mut bad = state;
        bad.parent_obj.config[2] = 0x38;
        assert!(to.check(&bad).is_err());
    }
}
