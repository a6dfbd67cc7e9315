//! A file that a VM is saved to: whole, or as it was before.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::StreamError;

/// Guest memory has secrets: nobody else may read it.
const MODE: u32 = 0o600;
/// How many names are tried beside a file.
const MAX_LEFT_BEHIND: u32 = 16;

/// What is to be done about the file at the end. Dropping it undoes what was begun.
#[derive(Debug)]
pub(super) struct Saving {
    path: PathBuf,
    /// Written beside it, to take its place at the end.
    beside: Option<PathBuf>,
    /// It was made for this VM, and goes when the VM is not saved.
    made: bool,
    done: bool,
}

/// What a path led to.
pub(super) enum Opened {
    /// A file or a device.
    File(File, Saving),
    /// A named pipe, which someone reads from.
    Pipe(File),
}

impl Saving {
    /// Opens `path` for a VM that begins at byte `offset`.
    ///
    /// A regular file is replaced whole when all of the VM is there, so that a save that fails does
    /// not destroy the one before it; with an offset, and where the path is a device, it is
    /// written in place.
    pub(super) fn open(path: &Path, offset: u64) -> Result<Opened, StreamError> {
        let shown = path.display().to_string();
        let failed = |source| StreamError::Open { name: shown.clone(), purpose: "writing", source };
        let found = match fs::metadata(path) {
            Ok(metadata) => Some(metadata.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if found.is_some_and(|kind| kind.is_dir()) {
            return Err(StreamError::Directory { path: shown });
        }
        if found.is_some_and(|kind| kind.is_fifo()) {
            let mut options = OpenOptions::new();
            let options = options.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
            return options.open(path).map(Opened::Pipe).map_err(failed);
        }
        // A link to a file: the file is replaced, not the link.
        let path = match found {
            Some(_) => fs::canonicalize(path).map_err(failed)?,
            None => path.to_path_buf(),
        };
        let mut options = OpenOptions::new();
        options.write(true).mode(MODE);
        if offset == 0 && found.is_none_or(|kind| kind.is_file()) {
            let (file, beside) = create_beside(&path).map_err(failed)?;
            let saving = Self { path, beside: Some(beside), made: false, done: false };
            return Ok(Opened::File(file, saving));
        }
        let made = found.is_none();
        let mut file = options.create_new(made).open(&path).map_err(failed)?;
        let saving = Self { path, beside: None, made, done: false };
        if offset != 0 {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        Ok(Opened::File(file, saving))
    }

    /// Whether the file can still be left as it was.
    pub(super) fn is_revocable(&self) -> bool {
        self.beside.is_some() || self.made
    }

    /// All of the VM is in the file and on its disk: gives it its name.
    pub(super) fn publish(mut self) -> Result<(), StreamError> {
        let name = self.path.display().to_string();
        if let Some(beside) = &self.beside {
            fs::rename(beside, &self.path)
                .map_err(|e| StreamError::io("renaming the file to", &name, e))?;
            // From here on it is the path that has to go if the name can't be made lasting.
            self.beside = None;
            self.made = true;
        }
        if self.made {
            let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty());
            File::open(directory.unwrap_or(Path::new(".")))
                .and_then(|directory| directory.sync_all())
                .map_err(|e| StreamError::io("writing to disk the directory of", &name, e))?;
        }
        self.done = true;
        Ok(())
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        let ours = self.beside.as_ref().or(self.made.then_some(&self.path));
        if let Some(path) = ours.filter(|_| !self.done)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "a half of a saved VM is left behind");
        }
    }
}

/// A new file in the same directory, under a name that nobody else uses.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let mut last = io::ErrorKind::AlreadyExists.into();
    for n in 0..MAX_LEFT_BEHIND {
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}-{n}.part", std::process::id()));
        let beside = path.with_file_name(name);
        match File::options().write(true).create_new(true).mode(MODE).open(&beside) {
            Ok(file) => return Ok((file, beside)),
            // Of a process that was killed, or of one in another container.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open(path: &Path, offset: u64) -> (File, Saving) {
        match Saving::open(path, offset).expect("it opens") {
            Opened::File(file, saving) => (file, saving),
            Opened::Pipe(_) => panic!("no pipe"),
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("a directory").flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("vm.mig");
        for (content, publish, expected) in
            [("one", true, "one"), ("two", false, "one"), ("three", true, "three")]
        {
            let (mut file, saving) = open(&path, 0);
            file.write_all(content.as_bytes()).expect("room");
            assert!(saving.is_revocable());
            if publish {
                saving.publish().expect("it is there");
            } else {
                drop(saving);
            }
            assert_eq!(fs::read_to_string(&path).expect("a file"), expected);
            assert_eq!(names(dir.path()), ["vm.mig"]);
        }
        let mode = fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, MODE);
    }

    #[test]
    fn an_offset_leaves_what_is_in_front_and_a_link_stays_a_link() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, link) = (dir.path().join("vm.mig"), dir.path().join("link"));
        fs::write(&path, "header and old").expect("a file");
        let (mut file, saving) = open(&path, 7);
        file.write_all(b"VM").expect("room");
        saving.publish().expect("it is there");
        assert_eq!(fs::read_to_string(&path).expect("a file"), "header VMd old");
        std::os::unix::fs::symlink(&path, &link).expect("a link");
        let (mut file, saving) = open(&link, 0);
        file.write_all(b"new").expect("room");
        saving.publish().expect("it is there");
        assert_eq!(fs::read_to_string(&path).expect("a file"), "new");
        assert!(fs::symlink_metadata(&link).expect("a link").is_symlink());
    }

    #[test]
    fn what_was_made_for_nothing_goes_and_a_directory_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        drop(open(&dir.path().join("new"), 512));
        assert!(names(dir.path()).is_empty());
        let error = Saving::open(dir.path(), 0).err().expect("a directory").to_string();
        assert!(error.contains("name a file in it"), "{error}");
        let missing = dir.path().join("no/such");
        assert!(matches!(Saving::open(&missing, 0), Err(StreamError::Open { .. })));
    }
}
