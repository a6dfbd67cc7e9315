//! A lab host's initramfs: `resources/lab/init`, busybox, the modules, and the run's command.

use std::path::Path;

use super::host::{self, Plan};
use super::{ADDRESS_A, ADDRESS_B};
use crate::error::Result;
use crate::initramfs::Initramfs;
use crate::process::shell_quote;
use crate::setup;

/// What makes KVM, the shared directories, the ports and the link work, and what tests want.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm_amd",
    "tun",
    "veth",
    "bridge",
    "loop",
];

/// Variables that are passed on to the command as they are here.
const PASSED_ON: &[&str] = &["PATH", "HOME", "LANG", "USER", "XDG_CACHE_HOME", "CARGO_TARGET_DIR"];

/// Beginnings of the names of other variables that are passed on.
const PASSED_ON_PREFIXES: &[&str] = &["RUST_", "MINI_VMM_"];

/// Builds the initramfs.
pub(super) fn build(plan: &Plan, results: &Path) -> Result<Vec<u8>> {
    let mut image = Initramfs::new();
    image.busybox(&setup::busybox()?)?;
    image.modules(&plan.kernel, MODULES)?;
    image.file("init", include_bytes!("../../../resources/lab/init"), true);
    let settings = format!(
        "HOST={}\nRESULTS={}\nADDRESS={}\n",
        plan.letter,
        shell_quote(&results.display().to_string()),
        host::address(plan),
    );
    image.file("lab/settings", settings.as_bytes(), false);
    image.file("lab/command", script(plan, results).as_bytes(), false);
    Ok(image.finish())
}

/// The command as a shell script: its environment, its directory, itself.
fn script(plan: &Plan, results: &Path) -> String {
    let mut script = String::new();
    let mut export = |name: &str, value: &str| {
        script += &format!("export {name}={}\n", shell_quote(value));
    };
    for (name, value) in std::env::vars() {
        if PASSED_ON.contains(&name.as_str())
            || PASSED_ON_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        {
            export(&name, &value);
        }
    }
    export("MINI_VMM_LAB_HOST", &plan.letter.to_string());
    export("MINI_VMM_LAB_RESULTS", &results.display().to_string());
    if let Ok(xtask) = std::env::current_exe() {
        export("MINI_VMM_LAB_XTASK", &xtask.display().to_string());
    }
    if plan.link.is_some() {
        let (own, other) =
            if plan.letter == 'a' { (ADDRESS_A, ADDRESS_B) } else { (ADDRESS_B, ADDRESS_A) };
        export("MINI_VMM_LAB_ADDRESS", own);
        export("MINI_VMM_LAB_PEER", other);
    }
    for (name, value) in &plan.command.env {
        export(name, value);
    }
    let words: Vec<String> = plan.command.argv.iter().map(|word| shell_quote(word)).collect();
    let cwd = shell_quote(&plan.command.cwd.display().to_string());
    script + &format!("cd {cwd} || exit 125\nexec {}\n", words.join(" "))
}
