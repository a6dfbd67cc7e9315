//! The first vCPU's registers at the entry of a kernel, and the tables that they point to.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryBackend;

use super::{BootError, Entry, Protocol, at, write};

// Intel SDM vol. 3, 2.5 (control registers), 2.2.1 (EFER), 2.3 (RFLAGS).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads as one.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Page table entries: present, writable (SDM vol. 3, 4.5).
const PTE_PRESENT_WRITABLE: u64 = 3;
/// In a page directory: maps 2 MiB.
const PDE_LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;

/// A flat segment of 4 GiB: its descriptor's type and the two size bits that differ.
#[derive(Clone, Copy)]
struct Flat {
    selector: u16,
    type_: u8,
    long: bool,
}

/// Execute/read, accessed.
const TYPE_CODE: u8 = 0xb;
/// Read/write, accessed.
const TYPE_DATA: u8 = 0x3;
/// 32-bit TSS, busy.
const TYPE_TSS: u8 = 0xb;

// The Linux boot protocol names these selectors (`__BOOT_CS`, `__BOOT_DS`); PVH leaves them free.
const CODE_64: Flat = Flat { selector: 0x10, type_: TYPE_CODE, long: true };
const CODE_32: Flat = Flat { selector: 0x10, type_: TYPE_CODE, long: false };
const DATA: Flat = Flat { selector: 0x18, type_: TYPE_DATA, long: false };
const TSS_SELECTOR: u16 = 0x20;
/// What the PVH ABI says the TSS segment's limit is.
const TSS_LIMIT: u32 = 0x67;

impl Flat {
    fn kvm(self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: self.selector,
            type_: self.type_,
            present: 1,
            dpl: 0,
            db: u8::from(!self.long),
            s: 1,
            l: u8::from(self.long),
            g: 1,
            ..Default::default()
        }
    }

    /// As it stands in the descriptor table (SDM vol. 3, 3.4.5).
    fn descriptor(self) -> u64 {
        let sizes: u64 = if self.long { 0xa } else { 0xc };
        0x000f_0000_0000_ffff | sizes << 52 | 0x9 << 44 | u64::from(self.type_) << 40
    }
}

fn tss() -> kvm_segment {
    kvm_segment {
        limit: TSS_LIMIT,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS,
        present: 1,
        ..Default::default()
    }
}

fn write_gdt<M: GuestMemoryBackend>(mem: &M, code: Flat) -> Result<(), BootError> {
    let tss = u64::from(TSS_LIMIT) | 0x8 << 44 | u64::from(TYPE_TSS) << 40;
    let table = [0, 0, code.descriptor(), DATA.descriptor(), tss];
    for (address, entry) in (at::GDT..).step_by(8).zip(table) {
        write(mem, "descriptor table", address, &entry.to_le_bytes())?;
    }
    Ok(())
}

/// The descriptor table for PVH.
pub(super) fn write_pvh_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    write_gdt(mem, CODE_32)
}

/// Descriptor table, and page tables that map the first 4 GiB to themselves in pages of 2 MiB.
pub(super) fn write_long_mode_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    write_gdt(mem, CODE_64)?;
    let mut tables = vec![0u64; 6 * 512];
    let table = |index: u64| (at::PAGE_TABLES + index * PAGE) | PTE_PRESENT_WRITABLE;
    let pointers = (0u64..4).map(|i| (512 + i as usize, table(2 + i)));
    let pages =
        (0u64..4 * 512).map(|i| (2 * 512 + i as usize, i << 21 | PTE_PRESENT_WRITABLE | PDE_LARGE));
    for (index, entry) in std::iter::once((0, table(1))).chain(pointers).chain(pages) {
        tables[index] = entry;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(mem, "page tables", at::PAGE_TABLES, &bytes)
}

/// Sets the first vCPU's registers so that it begins at `entry`. All others stay as KVM resets
/// them. The MSRs that firmware would set are [`crate::vcpu_init::reset_msrs`]'s.
pub fn setup_bsp(vcpu: &VcpuFd, entry: &Entry) -> Result<(), BootError> {
    let vcpu_error = |what| move |source| BootError::Vcpu { what, source };
    let mut sregs = vcpu.get_sregs().map_err(vcpu_error("special registers"))?;
    set_mode(&mut sregs, entry.protocol);
    vcpu.set_sregs(&sregs).map_err(vcpu_error("special registers"))?;
    vcpu.set_regs(&entry_regs(entry)).map_err(vcpu_error("registers"))
}

fn entry_regs(entry: &Entry) -> kvm_regs {
    let mut regs = kvm_regs { rip: entry.rip, rflags: RFLAGS_FIXED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => regs.rsi = entry.boot_info,
        Protocol::Pvh => regs.rbx = entry.boot_info,
    }
    regs
}

fn set_mode(sregs: &mut kvm_sregs, protocol: Protocol) {
    let code = match protocol {
        Protocol::Linux64 => {
            sregs.cr3 = at::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            CODE_64
        }
        Protocol::Pvh => {
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
            sregs.cr0 = CR0_PE | CR0_ET;
            CODE_32
        }
    };
    sregs.cs = code.kvm();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = DATA.kvm();
    }
    sregs.tr = tss();
    sregs.gdt.base = at::GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit};
    use vm_memory::GuestAddress;

    use super::super::load;
    use super::super::testing::*;
    use super::*;

    /// Runs a kernel under KVM to its first exit, which must be `out` to port 0x80, and gives the
    /// value.
    fn first_word(kernel: &[u8]) -> u32 {
        let mem = ram();
        let entry = load(&mem, &image(kernel)).unwrap();
        let kvm = Kvm::new().expect("this test needs /dev/kvm");
        let vm = kvm.create_vm().unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: RAM.low,
            userspace_addr: mem.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: the mapping belongs to `mem`, which outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        setup_bsp(&vcpu, &entry).unwrap();
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x80, data) => u32::from_le_bytes(data.try_into().unwrap()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pvh_kernel_begins_in_flat_32_bit_mode() {
        // Reloads its segments from the table, then: mov eax, [ebx]; out 0x80, eax
        let code = b"\x66\xb8\x18\0\x8e\xd8\x8e\xd0\xea\x0f\0\x20\0\x10\0\x8b\x03\xe7\x80";
        assert_eq!(first_word(&pvh_elf(code)), 0x336e_c578);
    }

    #[test]
    fn a_bzimage_begins_in_long_mode() {
        // mov ax, 0x18; mov ds, ax; mov ss, ax; mov eax, [rsi + 0x202]; bswap rax; shr rax, 32;
        // out 0x80, eax: only in long mode does REX.W make the word come out swapped.
        let code = b"\x66\xb8\x18\0\x8e\xd8\x8e\xd0\x8b\x86\x02\x02\0\0\x48\x0f\xc8\x48\xc1\xe8\x20\xe7\x80";
        assert_eq!(first_word(&bzimage(code)), 0x4864_7253);
    }
}
