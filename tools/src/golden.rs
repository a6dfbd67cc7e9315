//! Reads streams that were recorded once, and writes them anew: whoever changes the format's reader or
//! writer learns here what he has broken.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use migration::inspect::{self, Rewriter};

use crate::error::{Doing, Error, Result};
use crate::process;

/// How a migration stream begins.
const MAGIC: [u8; 4] = *b"QEVM";

/// Programs that unpack, by a file's extension.
const UNPACK: [(&str, &str); 3] = [("xz", "xz"), ("gz", "gzip"), ("zst", "zstd")];

/// Checks every stream in a folder: it is read to its last byte, each device's fields are known by its
/// description, and what is written from what was understood is the same to the last byte. Gives how
/// many streams there were; files of other kinds are named and left alone.
///
/// # Errors
/// The first stream of which that is not true, and where.
pub fn check(folder: &Path) -> Result<usize> {
    let doing = || format!("list {}", folder.display());
    let entries = fs::read_dir(folder).doing(doing)?;
    let entries = entries.collect::<io::Result<Vec<_>>>().doing(doing)?;
    let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    let mut streams = 0;
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match check_file(&path)? {
            Some(what) => println!("{name}: {what}"),
            None => {
                println!("{name}: not a stream");
                continue;
            }
        }
        streams += 1;
    }
    if streams == 0 {
        return Err(Error::Golden { file: folder.to_owned(), why: "no stream is in there".into() });
    }
    println!("{streams} streams: all read to the last byte, and written the same");
    Ok(streams)
}

/// Checks one file; gives what it contains, or nothing if it is no stream.
fn check_file(path: &Path) -> Result<Option<String>> {
    let mut file = unpacked(path)?;
    let doing = || format!("read {}", path.display());
    let mut magic = [0; MAGIC.len()];
    let is_stream = match file.read_exact(&mut magic) {
        Ok(()) => magic == MAGIC,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
        Err(error) => return Err(error).doing(doing),
    };
    if !is_stream {
        return Ok(None);
    }
    file.rewind().doing(doing)?;
    let second = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
    let same = Same { original: BufReader::new(second.doing(doing)?), offset: 0 };
    let mut rewriter = Rewriter::new(same);
    let bad = |why: String| Error::Golden { file: path.to_owned(), why };
    let report = inspect::read(file, &mut rewriter, &mut |_| {}).map_err(|e| bad(e.to_string()))?;
    if let Some(broken) = report.broken {
        return Err(bad(format!("it breaks at offset {:#x}: {}", broken.offset, broken.what)));
    }
    if report.trailing != 0 {
        return Err(bad(format!("{} bytes follow its end", report.trailing)));
    }
    let written = rewriter.into_inner().offset;
    if written != report.bytes {
        return Err(bad(format!("{} bytes were read, but {written} written", report.bytes)));
    }
    let devices = report.devices().count();
    let known = report.devices().filter(|section| section.value.is_some()).count();
    let pages = report.blocks.iter().fold(0_u64, |sum, block| sum + block.pages.all());
    Ok(Some(format!(
        "{} bytes, {pages} pages, {known} of {devices} devices described",
        report.bytes
    )))
}

/// Writes a stream without its pages, packed, for a folder of recorded ones: what is left is the
/// machine, and nobody's programs.
///
/// # Errors
/// If it can't be read to its end, or the new file can't be written.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    let plain = tempfile::tempfile().doing(|| "make a temporary file".to_owned())?;
    let share = || plain.try_clone().doing(|| "share a temporary file".to_owned());
    let mut rewriter = Rewriter::new(BufWriter::new(share()?)).without_pages();
    let bad = |why: String| Error::Golden { file: from.to_owned(), why };
    let report = inspect::read(unpacked(from)?, &mut rewriter, &mut |_| {});
    let report = report.map_err(|e| bad(e.to_string()))?;
    if let Some(broken) = report.broken {
        return Err(bad(format!("it breaks at offset {:#x}: {}", broken.offset, broken.what)));
    }
    rewriter.into_inner().flush().doing(|| "write a temporary file".to_owned())?;
    let mut packed = share()?;
    packed.rewind().doing(|| "read a temporary file".to_owned())?;
    let file = File::create_new(to).doing(|| format!("make {}", to.display()))?;
    let mut pack = Command::new("xz");
    pack.args(["-9e", "-c"]).stdin(packed).stdout(file).stderr(Stdio::inherit());
    process::run(&mut pack)
}

/// The file itself, or a nameless file with what is packed in it.
fn unpacked(path: &Path) -> Result<File> {
    let file = File::open(path).doing(|| format!("open {}", path.display()))?;
    let extension = path.extension().unwrap_or_default();
    let Some((_, program)) = UNPACK.iter().find(|(known, _)| extension == *known) else {
        return Ok(file);
    };
    let mut plain = tempfile::tempfile().doing(|| "make a temporary file".to_owned())?;
    let to = plain.try_clone().doing(|| "share a temporary file".to_owned())?;
    let mut unpack = Command::new(program);
    unpack.arg("-dc").stdin(file).stdout(to).stderr(Stdio::inherit());
    process::run(&mut unpack)?;
    plain.rewind().doing(|| "read a temporary file".to_owned())?;
    Ok(plain)
}

/// Takes what is written and compares it with a file.
struct Same<R> {
    original: R,
    offset: u64,
}

impl<R: Read> Write for Same<R> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut expected = vec![0; buf.len()];
        self.original.read_exact(&mut expected)?;
        if let Some(at) = buf.iter().zip(&expected).position(|(a, b)| a != b) {
            let offset = self.offset + at as u64;
            let (found, expected) = (buf[at], expected[at]);
            return Err(io::Error::other(format!(
                "written anew it differs at offset {offset:#x}: {found:#04x} instead of {expected:#04x}"
            )));
        }
        self.offset += buf.len() as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
