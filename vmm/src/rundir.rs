//! Where the VMs of this host are found: one directory for each, by name.
//!
//! ```text
//! $XDG_RUNTIME_DIR/mini-vmm/NAME/   (else /run/mini-vmm/NAME/)
//!     lock         locked while the VM's process lives; its pid inside
//!     qmp.sock     control socket
//!     config.json  effective configuration, every default written out
//! ```
//!
//! The lock says whether a VM lives; files alone say nothing, since a process that was killed
//! leaves them behind. A directory whose lock nobody holds is taken over.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use thiserror::Error;

use crate::config::{Config, VmName};

/// Why a VM has no directory, or isn't found.
#[derive(Debug, Error)]
pub enum RunDirError {
    /// A VM of that name lives.
    #[error("a VM named '{name}' runs already{}: choose another --name, or end it with 'mini-vmm quit --vm {name}'", by(.pid))]
    Taken {
        /// The name.
        name: String,
        /// Its process, if known.
        pid: Option<u32>,
    },
    /// The directory can't be used.
    #[error(
        "the directory '{path}' for running VMs can't be used (set XDG_RUNTIME_DIR to a directory of your own)"
    )]
    Directory {
        /// The directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No VM at all.
    #[error("no VM runs here (none is found in '{0}')")]
    NoVm(String),
    /// Not clear which.
    #[error("several VMs run here: say which with --vm NAME ({})", .0.join(", "))]
    Which(Vec<String>),
    /// No VM of that name.
    #[error("no VM named '{name}' runs here{}", meant(.running))]
    NotFound {
        /// The name asked for.
        name: String,
        /// The nearest name, or all of them.
        running: Vec<String>,
    },
}

fn by(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

fn meant(running: &[String]) -> String {
    match running {
        [] => String::new(),
        [one] => format!(": did you mean '{one}'?"),
        many => format!(": there are {}", many.join(", ")),
    }
}

/// The directory that holds all VMs' directories.
#[must_use]
pub fn base() -> PathBuf {
    let parent = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    parent.map_or_else(|| PathBuf::from("/run"), PathBuf::from).join("mini-vmm")
}

/// A directory that is ours while this lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Holds the lock; the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl RunDir {
    /// Takes the name, and records the configuration.
    ///
    /// # Errors
    /// [`RunDirError::Taken`] if a VM of that name lives; [`RunDirError::Directory`].
    pub fn claim(config: &Config) -> Result<Self, RunDirError> {
        Self::claim_in(&base(), config)
    }

    fn claim_in(base: &Path, config: &Config) -> Result<Self, RunDirError> {
        let path = base.join(config.name.as_str());
        let failed = |source| RunDirError::Directory { path: path.display().to_string(), source };
        loop {
            DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
            let lock_path = path.join("lock");
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&lock_path);
            let mut lock = match opened {
                // Its last owner has just removed the directory.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed)?,
            };
            match fcntl(&lock, FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let mut text = String::new();
                    let _ = (&lock).take(32).read_to_string(&mut text);
                    return Err(RunDirError::Taken {
                        name: config.name.to_string(),
                        pid: text.trim().parse().ok(),
                    });
                }
                Err(errno) => return Err(failed(errno.into())),
            }
            // The lock is worth something only if the file still has its name.
            let same = |on_disk: fs::Metadata, ours: fs::Metadata| {
                on_disk.ino() == ours.ino() && on_disk.dev() == ours.dev()
            };
            if !fs::metadata(&lock_path)
                .is_ok_and(|m| lock.metadata().is_ok_and(|ours| same(m, ours)))
            {
                continue;
            }
            let mut write = || -> io::Result<()> {
                lock.set_len(0)?;
                lock.rewind()?;
                writeln!(lock, "{}", std::process::id())?;
                fs::write(path.join("config.json"), serde_json::to_vec_pretty(config)?)
            };
            write().map_err(failed)?;
            return Ok(Self { path, _lock: lock });
        }
    }

    /// Path of the control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // The lock goes last: until then nobody else takes the directory for free.
        for name in ["qmp.sock", "config.json", "lock"] {
            let _ = fs::remove_file(self.path.join(name));
        }
        // Only if it is empty; somebody may have put a file of his own there.
        let _ = fs::remove_dir(&self.path);
    }
}

/// A write lock on all of a file, owned by the open file and not by the process.
fn whole_file() -> libc::flock {
    // The constants of these fields are small positive numbers of a wider type.
    #[allow(clippy::cast_possible_truncation)]
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Whether somebody holds the lock; asks without taking it, so that nobody is disturbed.
fn is_alive(dir: &Path) -> bool {
    let Ok(lock) = OpenOptions::new().read(true).write(true).open(dir.join("lock")) else {
        return false;
    };
    let mut wanted = whole_file();
    fcntl(&lock, FcntlArg::F_OFD_GETLK(&mut wanted)).is_ok()
        && i32::from(wanted.l_type) != libc::F_UNLCK
}

/// A VM that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningVm {
    /// Its name.
    pub name: String,
    /// Its control socket.
    pub socket: PathBuf,
}

/// All VMs of this user that live now, by name.
#[must_use]
pub fn running() -> Vec<RunningVm> {
    running_in(&base())
}

fn running_in(base: &Path) -> Vec<RunningVm> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter(|entry| is_alive(&entry.path()))
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?.parse::<VmName>().ok()?;
            Some(RunningVm { name: name.to_string(), socket: entry.path().join("qmp.sock") })
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// The VM of that name, or the only one that runs.
///
/// # Errors
/// If there is none, or several and no name was given.
pub fn find(name: Option<&str>) -> Result<RunningVm, RunDirError> {
    find_in(&base(), name)
}

fn find_in(base: &Path, name: Option<&str>) -> Result<RunningVm, RunDirError> {
    let mut all = running_in(base);
    let names = |all: &[RunningVm]| all.iter().map(|vm| vm.name.clone()).collect::<Vec<_>>();
    match name {
        Some(name) => match all.iter().position(|vm| vm.name == name) {
            Some(at) => Ok(all.swap_remove(at)),
            None => {
                let near = crate::config::nearest(name, all.iter().map(|vm| vm.name.as_str()));
                let running = near.map_or_else(|| names(&all), |near| vec![near.to_string()]);
                Err(RunDirError::NotFound { name: name.to_string(), running })
            }
        },
        None if all.len() > 1 => Err(RunDirError::Which(names(&all))),
        None => all.pop().ok_or_else(|| RunDirError::NoVm(base.display().to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn config(name: &str) -> Config {
        Config::resolve(Settings::from_toml(&format!("name='{name}'\nselfcheck=''"), "x").unwrap())
            .unwrap()
    }

    #[test]
    fn a_name_is_taken_while_its_vm_lives() {
        let base = tempfile::tempdir().unwrap();
        let one = RunDir::claim_in(base.path(), &config("one")).unwrap();
        let refused = RunDir::claim_in(base.path(), &config("one")).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("'one' runs already (process {})", std::process::id())),
            "{refused}"
        );
        assert_eq!(find_in(base.path(), None).unwrap().socket, one.socket());

        let two = RunDir::claim_in(base.path(), &config("two")).unwrap();
        assert_eq!(
            find_in(base.path(), None).unwrap_err().to_string(),
            "several VMs run here: say which with --vm NAME (one, two)"
        );
        assert!(
            find_in(base.path(), Some("tow"))
                .unwrap_err()
                .to_string()
                .ends_with("did you mean 'two'?")
        );
        drop((one, two));
        assert!(matches!(find_in(base.path(), None), Err(RunDirError::NoVm(_))));
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_taken_over() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("dead");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("lock"), "999999\n").unwrap();
        fs::write(dir.join("qmp.sock"), "").unwrap();
        assert_eq!(running_in(base.path()), []);
        let _claimed = RunDir::claim_in(base.path(), &config("dead")).unwrap();
        assert_eq!(running_in(base.path()).len(), 1);
        let recorded: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(recorded["memory"], "256M");
    }
}
