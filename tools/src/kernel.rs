//! Debian's kernels, unpacked in the cache, and their modules.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{self, Lists, Offer};
use crate::cache;
use crate::error::{Doing, Error, Result};
use crate::process;
use crate::setup;

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum KernelKind {
    /// The newest of bookworm (`linux-image-amd64`).
    Default,
    /// The one before it that bookworm still offers.
    Old,
    /// The newest of bookworm-backports.
    Backports,
    /// Bookworm's newest for cloud guests (`linux-image-cloud-amd64`): virtio, few other drivers.
    Cloud,
}

impl KernelKind {
    fn name(self) -> &'static str {
        match self {
            KernelKind::Default => "default",
            KernelKind::Old => "old",
            KernelKind::Backports => "backports",
            KernelKind::Cloud => "cloud",
        }
    }

    fn meta_package(self) -> &'static str {
        match self {
            KernelKind::Cloud => "linux-image-cloud-amd64",
            _ => "linux-image-amd64",
        }
    }
}

impl std::fmt::Display for KernelKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its release, as `uname -r` tells it.
    pub release: String,
    /// The bootable image.
    pub bzimage: PathBuf,
    modules_dir: PathBuf,
}

/// A kernel module's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The name without `.ko`, as in the file's name.
    pub name: String,
    /// Where the file is; it may be compressed.
    pub path: PathBuf,
}

impl Kernel {
    /// The kernel of a kind, fetched when the cache does not have it.
    pub fn get(kind: KernelKind) -> Result<Kernel> {
        let dir = cache::entry(&format!("kernel/{kind}"), |dir| fetch(kind, dir))?;
        Kernel::open(&dir)
    }

    fn open(dir: &Path) -> Result<Kernel> {
        let odd = |reason| Error::OddKernelPackage { dir: dir.to_owned(), reason };
        let releases = names_in(&dir.join("lib/modules"))?;
        let [release] = &releases[..] else {
            return Err(odd("it has not exactly one set of modules"));
        };
        let bzimage = dir.join("boot").join(format!("vmlinuz-{release}"));
        if !bzimage.exists() {
            return Err(odd("it has no vmlinuz for its modules"));
        }
        Ok(Kernel {
            release: release.clone(),
            bzimage,
            modules_dir: dir.join("lib/modules").join(release),
        })
    }

    /// The modules of these names with all they depend on, in an order in which they can be loaded.
    /// Modules that are built into the kernel are left out.
    ///
    /// # Errors
    /// `NoModule` for a name that the kernel has not.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let read = |name: &str| {
            let path = self.modules_dir.join(name);
            fs::read_to_string(&path).doing(|| format!("read {}", path.display()))
        };
        let order = load_order(&read("modules.dep")?, &read("modules.builtin")?, names)
            .map_err(|module| Error::NoModule { release: self.release.clone(), module })?;
        Ok(order
            .into_iter()
            .map(|file| Module { name: stem(&file).to_owned(), path: self.modules_dir.join(file) })
            .collect())
    }
}

impl Module {
    /// The module's bytes, uncompressed.
    pub fn read(&self) -> Result<Vec<u8>> {
        if self.path.extension().is_some_and(|ext| ext == "xz") {
            let mut command = Command::new("xz");
            command.args(["--decompress", "--stdout"]).arg(&self.path);
            let done = command.output().map_err(|source| process::start_error(&command, source))?;
            if done.status.success() {
                return Ok(done.stdout);
            }
            let output = String::from_utf8_lossy(&done.stderr).into_owned();
            return Err(Error::Failed {
                command: process::line(&command),
                status: done.status,
                output,
            });
        }
        fs::read(&self.path).doing(|| format!("read {}", self.path.display()))
    }
}

fn fetch(kind: KernelKind, dir: &Path) -> Result<()> {
    setup::lab()?;
    let lists = match kind {
        KernelKind::Backports => apt::backports()?,
        _ => Lists::Machine,
    };
    let meta = kind.meta_package();
    let offers = apt::offers(&lists, meta)?;
    let offer = choose(kind, &offers).ok_or_else(|| Error::NotOffered {
        wanted: format!("{kind} version of {meta}"),
        found: format!("there are {offers:?}"),
    })?;
    let image = apt::dependency(&lists, meta, &offer.version, "linux-image-")?;
    apt::unpack(&lists, &image, None, dir)?;
    let release = Kernel::open(dir)?.release;
    process::output(Command::new("depmod").arg("-b").arg(dir).arg(&release))?;
    Ok(())
}

/// apt lists the newest first, whichever suite it is from.
fn choose(kind: KernelKind, offers: &[Offer]) -> Option<&Offer> {
    match kind {
        KernelKind::Old => offers.get(1),
        _ => offers.first(),
    }
}

fn load_order(
    dep: &str,
    builtin: &str,
    names: &[&str],
) -> std::result::Result<Vec<String>, String> {
    let mut files: HashMap<String, (&str, Vec<&str>)> = HashMap::new();
    for line in dep.lines() {
        let Some((file, needs)) = line.split_once(':') else { continue };
        files.insert(key(file), (file, needs.split_whitespace().collect()));
    }
    let builtin: HashSet<String> = builtin.lines().map(key).collect();

    fn visit(
        name: &str,
        files: &HashMap<String, (&str, Vec<&str>)>,
        builtin: &HashSet<String>,
        seen: &mut HashSet<String>,
        order: &mut Vec<String>,
    ) -> std::result::Result<(), String> {
        let name = key(name);
        if builtin.contains(&name) || !seen.insert(name.clone()) {
            return Ok(());
        }
        let (file, needs) = files.get(&name).ok_or(name)?;
        for need in needs.iter().rev() {
            visit(need, files, builtin, seen, order)?;
        }
        order.push((*file).to_owned());
        Ok(())
    }

    let (mut seen, mut order) = (HashSet::new(), Vec::new());
    for name in names {
        visit(name, &files, &builtin, &mut seen, &mut order)?;
    }
    Ok(order)
}

/// `kernel/drivers/x/virtio-rng.ko.xz` → `virtio-rng`.
fn stem(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name)
}

/// The name under which the kernel knows a module: dashes and underscores are the same to it.
fn key(file: &str) -> String {
    stem(file).replace('-', "_")
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).doing(|| format!("read {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/a/virtio_net.ko: kernel/a/net_failover.ko kernel/b/failover.ko kernel/c/virtio.ko\n\
                       kernel/a/net_failover.ko: kernel/b/failover.ko\n\
                       kernel/b/failover.ko:\nkernel/c/virtio.ko:\nkernel/d/virtio-rng.ko.xz: kernel/c/virtio.ko\n";

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let order =
            load_order(DEP, "kernel/x/ext4.ko\n", &["virtio_net", "ext4", "virtio_rng"]).unwrap();
        assert_eq!(
            order.iter().map(|file| stem(file)).collect::<Vec<_>>(),
            ["virtio", "failover", "net_failover", "virtio_net", "virtio-rng"]
        );
    }

    #[test]
    fn an_unknown_module_is_named() {
        assert_eq!(load_order(DEP, "", &["virtio_net", "no-such"]), Err("no_such".to_owned()));
    }
}
