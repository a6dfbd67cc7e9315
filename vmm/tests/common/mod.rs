//! A machine with every kind of device, on which nothing runs.

use std::fs::File;
use std::path::Path;

use vmm::config::{Config, Settings};
use vmm::machine::Machine;
use vmm::power::MachineEvents;

/// A disk image of that size, in bytes.
pub(crate) fn disk(directory: &Path, size: u64) -> String {
    let disk = directory.join("disk.img");
    File::create(&disk).and_then(|file| file.set_len(size)).expect("a disk image");
    disk.display().to_string()
}

/// One that waits, with this memory, these disks and this network in TOML's words.
pub(crate) fn machine(memory: &str, disks: &str, net: &str) -> (Machine, MachineEvents) {
    let toml = format!(
        r#"
        name = "sections"
        memory = "{memory}"
        smp = 2
        paused = true
        migrate-listen = "defer"
        rng = {{}}
        balloon = {{}}
        console = "null"
        serial = "null"
        disk = [{disks}]
        net = [{net}]
        "#
    );
    let settings = Settings::from_toml(&toml, "the test's configuration").expect("settings");
    let config = Config::resolve(settings).expect("a configuration");
    let (queue, _) = MachineEvents::new();
    let machine = Machine::new(&config, &queue).expect("a machine: is there a /dev/kvm?");
    (machine, queue)
}
