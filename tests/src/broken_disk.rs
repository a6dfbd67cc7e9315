//! A disk whose flushes fail when they are told to, for one process: a library that is loaded ahead of
//! the system's and answers in its place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// While the file named in the environment is there, nothing can be flushed.
const SOURCE: &str = r#"
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static int broken(void)
{
    const char *file = getenv("BROKEN_DISK");
    return file && !access(file, F_OK);
}

int fdatasync(int fd)
{
    if (broken())
        return errno = EIO, -1;
    return syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    if (broken())
        return errno = EIO, -1;
    return syscall(SYS_fsync, fd);
}
"#;

/// The library, and the file that it looks for.
pub struct BrokenDisk {
    library: PathBuf,
    file: PathBuf,
}

impl BrokenDisk {
    /// Builds it in a directory, with the C compiler that the self-checking guest needs as well. The
    /// disk is well at first.
    pub fn new(dir: &Path) -> Self {
        let (source, library) = (dir.join("broken.c"), dir.join("broken.so"));
        fs::write(&source, SOURCE).expect("a file");
        let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
        let built = cc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
        assert!(built.expect("a C compiler").success(), "the library is built");
        Self { library, file: dir.join("is-broken") }
    }

    /// What the process needs in its environment.
    pub fn environment(&self) -> Vec<(String, PathBuf)> {
        vec![("LD_PRELOAD".into(), self.library.clone()), ("BROKEN_DISK".into(), self.file.clone())]
    }

    /// From now on flushes fail with EIO, or they succeed again.
    pub fn set(&self, broken: bool) {
        if broken {
            fs::write(&self.file, "").expect("a file");
        } else {
            fs::remove_file(&self.file).expect("the file");
        }
    }
}
