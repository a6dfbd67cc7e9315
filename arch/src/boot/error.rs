//! Why a kernel could not be booted.

use std::path::PathBuf;

use vm_memory::GuestMemoryError;

/// A kernel, initrd or command line that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host did not let us read a file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A directory, a device or a FIFO.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// A file of no bytes.
    #[error("{name} is empty")]
    Empty {
        /// The file.
        name: String,
    },
    /// No format that is known here.
    #[error(
        "{name} is not a kernel: expected a bzImage or an ELF file with a PVH note, found {found}"
    )]
    NotAKernel {
        /// The file.
        name: String,
        /// Its first bytes, and what they look like.
        found: String,
    },
    /// A header that contradicts itself, the file or the format.
    #[error("{name} is corrupt: {what} should be {expected}, found {found} ({found:#x})")]
    Corrupt {
        /// The file.
        name: String,
        /// The header's field.
        what: &'static str,
        /// What would have been right.
        expected: String,
        /// What stands there.
        found: u64,
    },
    /// Too old or for another processor.
    #[error("{name} cannot be booted: it has no {missing}")]
    NoEntry {
        /// The file.
        name: String,
        /// What it lacks.
        missing: &'static str,
    },
    /// The kernel wants memory that the guest doesn't have, or that is not RAM.
    #[error(
        "{name} does not fit the guest's memory: it needs {start:#x} to {end:#x}, and RAM for \
         kernels is {:#x} to {ram_end:#x}; {}",
        super::at::HIGH_MEMORY,
        if *start < super::at::HIGH_MEMORY {
            "a kernel for this machine is linked at 1 MiB or above"
        } else {
            "give the guest more memory"
        }
    )]
    KernelTooBig {
        /// The file.
        name: String,
        /// First address it needs.
        start: u64,
        /// First address after what it needs.
        end: u64,
        /// End of RAM below 4 GiB.
        ram_end: u64,
    },
    /// No room for the initrd.
    #[error(
        "initrd {} ({size} bytes) does not fit between the kernel's end ({kernel_end:#x}) and the \
         highest address for it ({limit:#x}); give the guest more memory",
        path.display()
    )]
    InitrdTooBig {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// Where the kernel's memory ends.
        kernel_end: u64,
        /// End of RAM, or what the kernel says it can reach.
        limit: u64,
    },
    /// The kernel takes no command line of that length.
    #[error("the kernel's command line has {len} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: u64,
        /// The longest that is possible.
        max: u64,
    },
    /// A NUL would end the command line early.
    #[error("the kernel's command line has a NUL byte at position {position}")]
    CmdlineNul {
        /// Byte offset.
        position: usize,
    },
    /// A file or structure could not be copied to guest memory.
    #[error("cannot copy {name} to guest memory at {address:#x}: {source}")]
    Copy {
        /// What was being copied.
        name: String,
        /// Where to.
        address: u64,
        /// The reason.
        source: GuestMemoryError,
    },
    /// The loader refused a file that had passed all of our own checks.
    #[error("cannot load {name}: {source}")]
    Loader {
        /// The file.
        name: String,
        /// The loader's reason.
        source: linux_loader::loader::Error,
    },
    /// The loader could not write the boot parameters.
    #[error("cannot write the boot parameters: {0}")]
    Parameters(#[from] linux_loader::configurator::Error),
    /// KVM refused the first vCPU's registers.
    #[error("cannot set the first vCPU's {what}: {source}")]
    Vcpu {
        /// Which registers.
        what: &'static str,
        /// KVM's reason.
        source: vmm_sys_util::errno::Error,
    },
}

/// The first bytes of a file in words, for a person who gave the wrong one.
pub(super) fn describe(start: &[u8]) -> String {
    let kinds: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", " (gzip: unpack it first)"),
        (b"\x28\xb5\x2f\xfd", " (zstd: unpack it first)"),
        (b"\xfd7zXZ", " (xz: unpack it first)"),
        (b"07070", " (a cpio archive: an initrd?)"),
        (b"#!", " (a script)"),
        (b"!<arch>", " (an archive: a package?)"),
        (b"MZ", " (a Windows or EFI program without a Linux setup header)"),
    ];
    let kind = kinds.iter().find(|(magic, _)| start.starts_with(magic)).map_or("", |kind| kind.1);
    let bytes: Vec<String> = start.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{}{kind}", bytes.join(" "))
}
