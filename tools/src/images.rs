//! Linux guests for the tests: Debian's kernels with a small initramfs of our own.
//!
//! The initramfs holds `resources/linux-guest/init` (read there what the guest understands), a
//! static busybox, the virtio modules, and `guest-tool`, compiled here. All of it is kept in the
//! cache, so what was made before a lab host started is found inside it.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::error::{Doing, Error, Result};
use crate::initramfs::Initramfs;
use crate::kernel::{Kernel, KernelKind};
use crate::process;
use crate::setup;

/// The modules of a guest: virtio, and the power button.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "virtio_balloon",
    "button",
    "evdev",
];

const INIT: &[u8] = include_bytes!("../../resources/linux-guest/init");
const GUEST_TOOL: &[u8] = include_bytes!("../../resources/linux-guest/guest-tool.c");

/// The files that make a Linux guest.
#[derive(Debug, Clone)]
pub struct GuestImages {
    /// The kernel's release, as `uname -r` tells it.
    pub release: String,
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The same kernel as an ELF file, with its PVH entry.
    pub vmlinux: PathBuf,
    /// The initial RAM filesystem, which is all the guest has.
    pub initrd: PathBuf,
    /// `guest-tool` for this side: the other end of a TCP session, the check of a disk.
    pub guest_tool: PathBuf,
}

/// The files of a Linux guest, made when the cache does not have them.
///
/// # Errors
/// When packages can't be fetched or the tool can't be compiled.
pub fn linux_guest(kind: KernelKind) -> Result<GuestImages> {
    let kernel = Kernel::get(kind)?;
    let guest_tool = guest_tool()?;
    let mut image = Initramfs::new();
    image.busybox(&setup::busybox()?)?;
    image.program("bin/guest-tool", &guest_tool)?;
    image.modules(&kernel, MODULES)?;
    image.file("init", INIT, true);
    let image = image.finish();
    let initrd = cached_file("guest/initrd", &hash(&image), |path| {
        fs::write(path, &image).doing(|| format!("write {}", path.display()))
    })?;
    let vmlinux =
        cached_file("guest/vmlinux", &hash(&(&kernel.release, kind.to_string())), |path| {
            let elf = extract_vmlinux(&kernel.bzimage)?;
            fs::write(path, elf).doing(|| format!("write {}", path.display()))
        })?;
    Ok(GuestImages {
        release: kernel.release,
        bzimage: kernel.bzimage,
        vmlinux,
        initrd,
        guest_tool,
    })
}

fn guest_tool() -> Result<PathBuf> {
    cached_file("guest/guest-tool", &hash(&GUEST_TOOL), |path| {
        setup::toolchain()?;
        let source = path.with_extension("c");
        fs::write(&source, GUEST_TOOL).doing(|| format!("write {}", source.display()))?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-Wall", "-Wextra", "-static", "-s", "-o"]).arg(path).arg(&source);
        process::output(&mut gcc).map(drop)
    })
}

/// The file of this name and version in the cache, made by `make` when it isn't there.
fn cached_file(
    name: &str,
    version: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let file = Path::new(name).file_name().unwrap_or_default();
    let dir = cache::entry(&format!("{name}-{version}"), |dir| make(&dir.join(file)))?;
    Ok(dir.join(file))
}

fn hash(value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// How a kernel's payload can be compressed: the magic number, the program that undoes it.
const COMPRESSIONS: &[(&[u8], &str)] =
    &[(b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")];

/// Takes the ELF file out of a bzImage.
///
/// The header's fields are those of the kernel's `Documentation/arch/x86/boot.rst`. The compressed
/// payload is followed by its uncompressed size (4 bytes), which the programs don't expect.
fn extract_vmlinux(bzimage: &Path) -> Result<Vec<u8>> {
    setup::lab()?;
    let odd = |reason| Error::OddKernelPackage { dir: bzimage.to_owned(), reason };
    let image = fs::read(bzimage).doing(|| format!("read {}", bzimage.display()))?;
    let payload = payload(&image).ok_or_else(|| odd("its bzImage has no payload"))?;
    let (_, program) = COMPRESSIONS
        .iter()
        .find(|(magic, _)| payload.starts_with(magic))
        .ok_or_else(|| odd("its payload is compressed in a way that is not known here"))?;
    let scratch = tempfile::NamedTempFile::new().doing(|| "create a temporary file".to_owned())?;
    fs::write(scratch.path(), payload).doing(|| format!("write {}", scratch.path().display()))?;
    let input = fs::File::open(scratch.path()).doing(|| "open a temporary file".to_owned())?;
    let mut command = Command::new(program);
    let done = command
        .args(["-d", "-c"])
        .stdin(input)
        .output()
        .map_err(|source| process::start_error(&command, source))?;
    if !done.status.success() || !done.stdout.starts_with(b"\x7fELF") {
        let output = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(Error::Failed {
            command: process::line(&command),
            status: done.status,
            output,
        });
    }
    Ok(done.stdout)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    image.get(start..start + field(0x24c)?.checked_sub(4)?)
}
