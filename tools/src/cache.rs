//! Where fetched and built things are kept, outside the repository.
//!
//! `$XDG_CACHE_HOME/mini-vmm`, else `~/.cache/mini-vmm`. A thing is built in a scratch directory
//! beside its final place and renamed into it, so whatever exists under its final name is whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Doing, Error, Result};

/// The cache's root; created when missing.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = std::env::var_os("HOME").filter(|dir| !dir.is_empty());
            PathBuf::from(home.unwrap_or_else(|| "/root".into())).join(".cache")
        }
    };
    let root = base.join("mini-vmm");
    create_dir(&root)?;
    Ok(root)
}

/// Creates a directory and its parents.
pub fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).doing(|| format!("create the directory {}", dir.display()))
}

/// Returns `root()/name`, building it first when it isn't there.
///
/// `build` fills an empty scratch directory, which then becomes `root()/name`. Other processes
/// that want the cache wait meanwhile.
pub fn entry(name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = root()?;
    let place = root.join(name);
    if place.exists() {
        return Ok(place);
    }
    let _lock = lock(&root)?;
    if place.exists() {
        return Ok(place);
    }
    let parent = place.parent().unwrap_or(&root);
    create_dir(parent)?;
    let scratch = tempfile::Builder::new()
        .prefix(".building-")
        .tempdir_in(parent)
        .doing(|| format!("create a scratch directory in {}", parent.display()))?;
    build(scratch.path())?;
    let scratch = scratch.keep();
    fs::rename(&scratch, &place)
        .doing(|| format!("rename {} to {}", scratch.display(), place.display()))?;
    Ok(place)
}

fn lock(root: &Path) -> Result<Flock<File>> {
    let path = root.join("lock");
    let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
    let failed = |errno: nix::Error| Error::Io {
        doing: format!("lock {}", path.display()),
        source: errno.into(),
    };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::Error::EWOULDBLOCK)) => {
            eprintln!("xtask: another xtask is filling the cache; waiting for it");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno))
        }
        Err((_, errno)) => Err(failed(errno)),
    }
}
