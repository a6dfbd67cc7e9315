//! What stands between a VM and its destination: the problems, and the one table of their kinds.
//!
//! Programs know a problem by its [`Kind::code`], which never changes its meaning; people who have
//! met it with a QEMU know it by the words in [`Kind::known_as`]. `docs/preflight.md` explains each
//! (a test compares it with this table).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::wire::bounded_reason;

/// A kind of problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// The stable word for programs.
    pub code: &'static str,
    /// Whether the VM can't move with it. What is not fatal is a warning.
    pub fatal: bool,
    /// What a QEMU says when it comes upon it; empty where it says nothing.
    pub known_as: &'static str,
    /// What it means, as a sentence.
    pub meaning: &'static str,
}

macro_rules! kinds {
    ($($name:ident $code:literal $fatal:ident $known_as:literal $meaning:literal;)*) => {
        $(#[doc = $meaning] pub const $name: Kind = Kind {
            code: $code,
            fatal: kinds!(@ $fatal),
            known_as: $known_as,
            meaning: $meaning,
        };)*
        /// The table.
        pub const ALL: &[Kind] = &[$($name),*];
    };
    (@ fatal) => { true };
    (@ warning) => { false };
}

/// The kinds, by name.
pub mod kind {
    use super::Kind;

    kinds! {
        BLOCKED "blocked" fatal "State blocked by non-migratable device"
            "The source's VM can't be migrated at all, to no destination.";
        MACHINE_TYPE "machine-type" fatal "Machine type received is '…' and local is '…'"
            "The two sides are other machine types.";
        UUID "uuid" fatal "UUID received is … and local is …"
            "The two sides have been given UUIDs, and not the same.";
        VCPUS "vcpus" fatal "Unknown savevm section or instance 'cpu'"
            "The two sides have other numbers of vCPUs.";
        RAM_BLOCK "ram-block" fatal "Unknown ramblock"
            "One side has a RAM block that the other has not.";
        RAM_SIZE "ram-size" fatal "Length mismatch"
            "A RAM block has another size.";
        DEVICE_MISSING "device-missing" fatal "Unknown savevm section or instance"
            "The source has a device that the destination has not.";
        DEVICE_EXTRA "device-extra" fatal ""
            "The destination has a device that the source has not.";
        DEVICE_VERSION "device-version" fatal "unsupported version"
            "A device's state comes in a version that the destination does not know.";
        DEVICE_LAYOUT "device-layout" fatal "Missing section footer"
            "The two sides disagree on the fields of a device's state.";
        PCI_SLOT "pci-slot" fatal "Unknown savevm section or instance"
            "A PCI slot holds another device, or only on one side.";
        PCI_CONFIG "pci-config" fatal "get_pci_config_device: Bad config data"
            "A device differs in what its PCI configuration says: kind of virtio, MSI-X vectors, BARs, or \
             any byte that a guest can't change.";
        QUEUES "queues" fatal "virtio: number of queues differs"
            "A device has another number of virtqueues.";
        FEATURES "features" fatal "Features 0x… unsupported. Allowed features: 0x…"
            "A device offers its driver features that the destination's has not.";
        DISK_SIZE "disk-size" fatal "get_pci_config_device: Bad config data"
            "A disk has another size.";
        DISK_MISSING "disk-missing" fatal "Could not open"
            "A disk's image can't be opened at the destination.";
        DISK_NOT_WRITABLE "disk-not-writable" fatal "Permission denied"
            "A disk's image may only be read at the destination, and the guest writes to it.";
        DISK_READONLY "disk-readonly" fatal "Features 0x… unsupported"
            "A disk is read-only on one side only.";
        DISK_UNLOCKED "disk-unlocked" warning "Failed to get \"write\" lock"
            "Nobody holds a lock on a disk's image at the destination, though the source does on its \
             own: it may be another image.";
        TAP_MISSING "tap-missing" fatal "could not configure /dev/net/tun"
            "A network back end can't be opened at the destination.";
        TAP_OFFLOAD "tap-offload" fatal "saved image requires TUN_F_UFO support"
            "A tap at the destination can't do what the guest's driver relies on.";
        CPU_FEATURE "cpu-feature" fatal "host doesn't support requested feature"
            "The destination's processor or KVM lacks a feature that the guest was promised.";
        CPUID_REFUSED "cpuid-refused" fatal "kvm_init_vcpu: CPUID"
            "The destination's KVM does not take the guest's CPUID, tried out on a spare vCPU.";
        TSC_FREQUENCY "tsc-frequency" fatal "TSC frequency mismatch"
            "The guest's TSC runs at a frequency that the destination's host can't give.";
        XSAVE_SIZE "xsave-size" fatal "KVM_SET_XSAVE2"
            "The guest's extended state is larger than the destination's KVM takes.";
        XSAVE_REFUSED "xsave-refused" fatal "KVM_SET_XSAVE"
            "The destination's KVM refuses the components of the guest's extended state, tried out \
             on a spare vCPU.";
        XCR0_REFUSED "xcr0-refused" fatal "KVM_SET_XCRS"
            "The destination's KVM refuses the guest's XCR0, tried out on a spare vCPU.";
        MSR_UNKNOWN "msr-unknown" fatal "failed to set MSR 0x… to 0x…"
            "The destination's KVM has not got an MSR that holds something, tried out on a spare \
             vCPU.";
        MSR_REFUSED "msr-refused" fatal "failed to set MSR 0x… to 0x…"
            "The destination's KVM refuses an MSR's value, tried out on a spare vCPU.";
        KVM_CAPABILITY "kvm-capability" warning "KVM_CAP_…"
            "The destination's KVM lacks something that the source's has and the guest rarely needs.";
        NESTED_STATE "nested-state" fatal "KVM_CAP_NESTED_STATE"
            "The guest is a hypervisor, and the destination's KVM can't take such a state.";
        TRIAL "trial" warning ""
            "The spare vCPU could not be made, so that nothing was tried out on it.";
        HOST_MEMORY "host-memory" fatal "Cannot allocate memory"
            "The destination's host has too little free memory.";
        CLOCK_DIFFERENCE "clock-difference" warning ""
            "The clocks of the two hosts are apart, and the guest's would jump.";
        REHEARSAL "rehearsal" fatal "error while loading state for instance 0x… of device"
            "The state of the devices and vCPUs was loaded at the destination for show, and that failed.";
        QEMU_REGISTER "qemu-register" fatal ""
            "To a QEMU: the guest has set a register that QEMU's layout has no place for, and would lose it.";
        QEMU_REGISTER_HARMLESS "qemu-register-harmless" warning ""
            "To a QEMU: the guest has set a register that QEMU's layout has no place for, and can do without it.";
        QEMU_FIRMWARE "qemu-firmware" fatal ""
            "To a QEMU: the guest has no firmware, and none is found that it could be given.";
        QEMU_COMMAND "qemu-command" warning ""
            "To a QEMU: the VM's configuration has no equal in a QEMU's command line.";
        DETAILS "details" fatal ""
            "The destination does not understand the source's description of the machine.";
        NOT_CONVERGING "not-converging" fatal "convergence"
            "The guest writes to its memory faster than it can be sent.";
        NO_FORECAST "no-forecast" warning ""
            "How long the migration would take could not be found out.";
    }
}

/// One reason why a migration can't succeed, or why it may disappoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Problem {
    /// A stable word for programs, for example `ram-size`; [`kind::ALL`] has all of them.
    pub code: String,
    /// What is wrong, for example `RAM block pc.ram`.
    pub what: String,
    /// What the destination has.
    pub expected: String,
    /// What the source has.
    pub found: String,
    /// What can be done about it.
    #[serde(default)]
    pub hint: String,
    /// The device, RAM block or section that it is about; empty where it is about the whole machine.
    #[serde(default)]
    pub device: String,
    /// The vCPU that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
    /// Which of its values, for example `size` or `MSR 0x277`.
    #[serde(default)]
    pub field: String,
    /// Whether the VM can't move with it. A peer that does not say means that.
    #[serde(default = "yes")]
    pub fatal: bool,
    /// What a QEMU says when it comes upon it, for whoever searches for that.
    #[serde(default)]
    pub known_as: String,
}

fn yes() -> bool {
    true
}

impl Problem {
    /// A problem of `kind`.
    pub fn new(
        kind: Kind,
        what: impl Into<String>,
        expected: impl ToString,
        found: impl ToString,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            code: kind.code.to_owned(),
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
            hint: hint.into(),
            device: String::new(),
            vcpu: None,
            field: String::new(),
            fatal: kind.fatal,
            known_as: kind.known_as.to_owned(),
        }
    }

    /// Which part of the machine, and which of its values.
    #[must_use]
    pub fn of(mut self, device: impl Into<String>, field: impl Into<String>) -> Self {
        self.device = device.into();
        self.field = field.into();
        self
    }

    /// Which vCPU, and which of its values.
    #[must_use]
    pub fn of_vcpu(mut self, vcpu: u32, field: impl Into<String>) -> Self {
        self.vcpu = Some(vcpu);
        self.field = field.into();
        self
    }

    /// The words that a QEMU would have said, with their values.
    #[must_use]
    pub fn known_as(mut self, words: impl Into<String>) -> Self {
        self.known_as = words.into();
        self
    }

    /// The same, with texts no longer than a peer takes, and without characters that would do
    /// something to a terminal.
    #[must_use]
    pub fn bounded(&self) -> Self {
        let short = |text: &str| {
            let printable: String =
                text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            bounded_reason(&printable)
        };
        Self {
            code: short(&self.code),
            what: short(&self.what),
            expected: short(&self.expected),
            found: short(&self.found),
            hint: short(&self.hint),
            device: short(&self.device),
            vcpu: self.vcpu,
            field: short(&self.field),
            fatal: self.fatal,
            known_as: short(&self.known_as),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: the destination has {}, the source has {}",
            self.what, self.expected, self.found
        )?;
        let known = !self.known_as.is_empty();
        match (self.hint.is_empty(), known) {
            (true, false) => Ok(()),
            (false, false) => write!(f, " ({})", self.hint),
            (true, true) => write!(f, " (known as \"{}\")", self.known_as),
            (false, true) => write!(f, " ({}; known as \"{}\")", self.hint, self.known_as),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_unique_and_every_one_is_explained_to_operators() {
        let book = include_str!("../../docs/preflight.md");
        let (_, book) = book.split_once("## The codes").unwrap();
        let mut seen = BTreeSet::new();
        for kind in kind::ALL {
            assert!(seen.insert(kind.code), "{} twice", kind.code);
            let row = book.lines().find(|line| line.starts_with(&format!("| `{}` |", kind.code)));
            let row =
                row.unwrap_or_else(|| panic!("docs/preflight.md says nothing of {}", kind.code));
            let fatal = if kind.fatal { "| yes |" } else { "| warning |" };
            assert!(row.contains(fatal), "{row}");
            assert!(row.contains(kind.known_as), "{row}");
        }
        let rows = book.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, kind::ALL.len(), "docs/preflight.md explains one that there is not");
    }

    #[test]
    fn what_an_older_peer_leaves_out_is_fatal_and_what_a_hostile_one_sends_is_harmless() {
        let text = r#"{"code":"x","what":"a\u001b[2Jb","expected":"1","found":"2"}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert!(problem.fatal);
        assert_eq!(problem.bounded().what, "a?[2Jb");
        let long = Problem { what: "x".repeat(1 << 20), ..problem };
        assert_eq!(long.bounded().what.len(), crate::wire::limits::MAX_REASON);
    }
}
