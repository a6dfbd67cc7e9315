//! From words to options: which QEMU has, which take a value, and which the guest does not see.

use super::findings::Findings;
use crate::config::nearest;

/// One option of a command line. A repeated one comes several times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opt {
    /// Without its dash.
    pub(super) name: &'static str,
    /// Empty where it takes none.
    pub(super) value: String,
}

#[derive(Clone, Copy)]
enum Class {
    /// Something is made of it.
    Read,
    /// The guest does not see it.
    Host,
    /// The same, but something else is different, which is told.
    Instead(&'static str),
    /// It matters; what to do about it.
    Matters(&'static str),
}
use Class::{Host, Instead, Matters, Read};

const NO_SUCH_DEVICE: &str = "mini-vmm has no such device; start the guest in QEMU without it";
const NO_SUCH_DISK: &str = "it is not a virtio disk; write -drive if=none,id=…,file=…,format=raw and \
                            -device virtio-blk-pci,drive=…";
/// What to write for `-net` and `-nic`.
pub(super) const NO_SUCH_NET: &str =
    "write -netdev tap,id=…,ifname=… and -device virtio-net-pci,netdev=…";
const NO_TABLES: &str = "the guest would see other tables; start it in QEMU without";
const UNSEEN: &str = "it can change any part of the machine; write what it does as options";

/// Name, whether a value follows, and class.
const OPTIONS: &[(&str, bool, Class)] = &[
    ("machine", true, Read),
    ("M", true, Read),
    ("accel", true, Read),
    ("enable-kvm", false, Read),
    ("cpu", true, Read),
    ("m", true, Read),
    ("smp", true, Read),
    ("name", true, Read),
    ("uuid", true, Read),
    ("kernel", true, Read),
    ("initrd", true, Read),
    ("append", true, Read),
    ("bios", true, Read),
    ("drive", true, Read),
    ("blockdev", true, Read),
    ("device", true, Read),
    ("netdev", true, Read),
    ("chardev", true, Read),
    ("serial", true, Read),
    ("parallel", true, Read),
    ("qmp", true, Read),
    ("qmp-pretty", true, Read),
    ("mon", true, Read),
    ("incoming", true, Read),
    ("S", false, Read),
    ("nodefaults", false, Read),
    ("no-hpet", false, Read),
    ("object", true, Read),
    ("net", true, Read),
    ("nic", true, Read),
    ("vga", true, Read),
    ("rtc", true, Read),
    ("no-user-config", false, Read),
    ("nographic", false, Host),
    ("display", true, Host),
    ("vnc", true, Host),
    ("spice", true, Host),
    ("k", true, Host),
    ("full-screen", false, Host),
    ("monitor", true, Host),
    ("echr", true, Host),
    ("no-reboot", false, Instead("a guest that reboots is started again here; left out")),
    ("no-shutdown", false, Instead("a VM whose guest switches itself off ends here; left out")),
    ("action", true, Instead("what a guest's end leads to can't be chosen here; left out")),
    ("boot", true, Instead("the firmware here boots the first disk; left out")),
    ("daemonize", false, Host),
    ("pidfile", true, Host),
    ("chroot", true, Host),
    ("runas", true, Host),
    ("sandbox", true, Host),
    ("msg", true, Host),
    ("mem-prealloc", false, Read),
    ("mem-path", true, Host),
    ("overcommit", true, Host),
    ("audiodev", true, Host),
    ("audio", true, Host),
    ("L", true, Host),
    ("D", true, Host),
    ("d", true, Host),
    ("dfilter", true, Host),
    ("seed", true, Host),
    ("trace", true, Host),
    ("gdb", true, Host),
    ("s", false, Host),
    ("only-migratable", false, Host),
    ("compat", true, Host),
    ("enable-sync-profile", false, Host),
    ("async-teardown", false, Host),
    ("dump-vmstate", true, Host),
    ("hda", true, Matters(NO_SUCH_DISK)),
    ("hdb", true, Matters(NO_SUCH_DISK)),
    ("hdc", true, Matters(NO_SUCH_DISK)),
    ("hdd", true, Matters(NO_SUCH_DISK)),
    ("cdrom", true, Matters(NO_SUCH_DISK)),
    ("fda", true, Matters(NO_SUCH_DISK)),
    ("fdb", true, Matters(NO_SUCH_DISK)),
    ("sd", true, Matters(NO_SUCH_DISK)),
    ("mtdblock", true, Matters(NO_SUCH_DISK)),
    (
        "snapshot",
        false,
        Matters("mini-vmm writes to the image itself; give it a copy, and leave this out"),
    ),
    ("iscsi", true, Matters(NO_SUCH_DISK)),
    ("pflash", true, Matters("this board has no flash: mini-vmm knows SeaBIOS only")),
    ("fsdev", true, Matters(NO_SUCH_DEVICE)),
    ("virtfs", true, Matters(NO_SUCH_DEVICE)),
    ("usb", false, Matters(NO_SUCH_DEVICE)),
    ("usbdevice", true, Matters(NO_SUCH_DEVICE)),
    ("tpmdev", true, Matters(NO_SUCH_DEVICE)),
    ("debugcon", true, Matters(NO_SUCH_DEVICE)),
    ("watchdog", true, Matters(NO_SUCH_DEVICE)),
    ("watchdog-action", true, Matters(NO_SUCH_DEVICE)),
    ("option-rom", true, Matters(NO_SUCH_DEVICE)),
    ("no-acpi", false, Matters("the machine has ACPI; start the guest in QEMU without")),
    ("acpitable", true, Matters(NO_TABLES)),
    ("smbios", true, Matters(NO_TABLES)),
    ("fw_cfg", true, Matters(NO_TABLES)),
    ("dtb", true, Matters(NO_TABLES)),
    ("numa", true, Matters("the machine has one memory node; start the guest in QEMU without")),
    ("icount", true, Matters("KVM does not count instructions; start the guest in QEMU without")),
    ("global", true, Matters("it changes devices unseen; start the guest in QEMU without")),
    ("set", true, Matters(UNSEEN)),
    ("readconfig", true, Matters(UNSEEN)),
    ("add-fd", true, Matters("mini-vmm is given no open files; write paths and names")),
    ("loadvm", true, Matters("QEMU's snapshots can't be loaded; migrate the running guest")),
    ("preconfig", false, Matters("mini-vmm is configured by its command line only")),
    ("plugin", true, Matters("KVM has no plugins; start the guest in QEMU without")),
    ("singlestep", false, Matters("KVM does not step; start the guest in QEMU without")),
];

/// Sorts the words after the program's name into options; those of which nothing is to be made go
/// to `found` at once.
pub(super) fn sort(words: &[String], found: &mut Findings) -> Vec<Opt> {
    let mut options = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let Some(said) = word.strip_prefix('-') else {
            found.matters(
                format!("'{word}'"),
                "a word that belongs to no option: to QEMU that is an IDE disk, which mini-vmm has \
                 not; if a shell was to see it, leave it out",
            );
            continue;
        };
        let said = said.strip_prefix('-').unwrap_or(said);
        let Some((name, has_value, class)) = OPTIONS.iter().find(|(name, ..)| *name == said) else {
            // Whether a value follows can only be guessed.
            words.next_if(|next| !next.starts_with('-'));
            let near = nearest(said, OPTIONS.iter().map(|(name, ..)| *name));
            let near = near.map(|near| format!(" (did you mean '-{near}'?)"));
            found.matters(
                word.clone(),
                format!(
                    "this option is not known to mini-vmm{}; start the guest in QEMU without it",
                    near.unwrap_or_default()
                ),
            );
            continue;
        };
        let value = if *has_value { words.next().cloned() } else { Some(String::new()) };
        let Some(value) = value else {
            found.matters(word.clone(), "its value is missing at the end of the command line");
            continue;
        };
        let shown = if value.is_empty() { word.clone() } else { format!("{word} {value}") };
        match class {
            Read => options.push(Opt { name, value }),
            Host => found.note(&shown, "the guest does not see it; left out"),
            Instead(what) => found.note(&shown, what),
            Matters(why) => found.matters(shown, *why),
        }
    }
    options
}
