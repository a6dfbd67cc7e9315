//! What stands against a QEMU as the destination, known without asking one.

use arch::wire::Loss;
use migration::guest::VmError;
use migration::problem::{Problem, kind};

use crate::qemu_line::QemuLine;
use crate::rom::{self, PC_BIOS};
use crate::vm::Vm;

/// Everything. The vCPUs are looked at one after the other, each for some microseconds.
pub(super) fn problems(vm: &Vm) -> Result<Vec<Problem>, VmError> {
    let lost = {
        // Nobody stops or starts the vCPUs meanwhile.
        let _life = vm.life();
        vm.machine.lost_to_qemu()
    };
    let lost = lost.map_err(|e| VmError::with("the vCPUs could not be looked at", e))?;
    let mut problems: Vec<_> = (0..)
        .zip(&lost)
        .flat_map(|(vcpu, lost)| lost.iter().map(move |loss| register(vcpu, loss)))
        .collect();
    problems.extend(firmware(vm));
    problems.extend(command_line(vm));
    Ok(problems)
}

fn register(vcpu: u32, loss: &Loss) -> Problem {
    let (kind, hint) = match loss.harmless {
        Some(why) => (kind::QEMU_REGISTER_HARMLESS, why),
        None => {
            (kind::QEMU_REGISTER, "move the guest to a mini-vmm, or end what uses it in the guest")
        }
    };
    Problem::new(
        kind,
        format!("vCPU {vcpu}: {}, which has no place in what a QEMU gets", loss.register),
        format_args!("{:#x}, its value after power-on", loss.power_on),
        format_args!("{:#x}", loss.value),
        hint,
    )
    .of_vcpu(vcpu, &*loss.register)
}

/// A reboot in QEMU would find nothing to start.
fn firmware(vm: &Vm) -> Option<Problem> {
    if vm.machine.ram.roms().has(PC_BIOS) {
        return None;
    }
    let error = rom::read_bios(vm.config().firmware.as_deref()).err()?;
    let hint = "install the package 'seabios', or name a file with --firmware";
    let found = crate::error_chain(&error);
    let what = "the guest has no firmware for a QEMU";
    Some(Problem::new(kind::QEMU_FIRMWARE, what, "a BIOS of 256 KiB", found, hint))
}

fn command_line(vm: &Vm) -> Option<Problem> {
    let error = QemuLine::of(vm.config(), None).err()?;
    let found = crate::error_chain(&error);
    let what = "the VM's configuration";
    Some(Problem::new(kind::QEMU_COMMAND, what, "an equal of it", found, ""))
}
