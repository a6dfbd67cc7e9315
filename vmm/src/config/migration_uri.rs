//! Where a migration goes to or comes from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{ByteSize, ConfigError, SocketUri, nearest};

/// What a VM can travel through.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MigrationUri {
    /// `tcp:HOST:PORT` or `unix:PATH`: another VMM, which answers.
    Socket(SocketUri),
    /// `file:PATH[,offset=N]`.
    File {
        /// The file.
        path: PathBuf,
        /// Where in it the VM begins, in bytes.
        offset: u64,
    },
    /// `fd:N`, a descriptor that the process was started with, or `fd:NAME`, one that was handed
    /// over on the control socket.
    Descriptor(String),
    /// `exec:COMMAND`, for a shell.
    Command(String),
}

/// What `--migrate-listen` may say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MigrateListen {
    /// Listen here, or restore from here, from the start.
    At(MigrationUri),
    /// Wait for `migrate-incoming` on the control socket.
    Defer,
}

const FORMS: &str = "an address: tcp:HOST:PORT, tcp:[IPV6]:PORT, unix:PATH, file:PATH[,offset=N], \
                     fd:N or exec:COMMAND";

/// The most bytes of a descriptor's name.
const MAX_NAME: usize = 64;

impl MigrationUri {
    /// The same with a path that does not depend on the directory of whoever reads it: another
    /// process is going to.
    ///
    /// # Errors
    /// If the current directory can't be had.
    pub fn absolute(self) -> std::io::Result<Self> {
        Ok(match self {
            Self::File { path, offset } => Self::File { path: std::path::absolute(path)?, offset },
            Self::Socket(SocketUri::Unix(path)) => {
                Self::Socket(SocketUri::Unix(std::path::absolute(path)?))
            }
            other => other,
        })
    }
}

fn invalid(found: &str, expected: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { what: "address", found: found.to_string(), expected: expected.into() }
}

/// A number of bytes: decimal, hexadecimal, or with a unit as in `1M`.
fn bytes(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok().or_else(|| text.parse::<ByteSize>().ok().map(|size| size.0)),
    }
}

fn file(text: &str, rest: &str) -> Result<MigrationUri, ConfigError> {
    let (path, offset) = match rest.rsplit_once(",offset=") {
        None => (rest, 0),
        Some((path, offset)) => {
            let expected = "file:PATH,offset=N with a number of bytes, like 512, 0x1000 or 1M";
            // What a file offset can be.
            let offset = bytes(offset).filter(|&n| i64::try_from(n).is_ok());
            (path, offset.ok_or_else(|| invalid(text, expected))?)
        }
    };
    if path.is_empty() || path.contains('\0') {
        return Err(invalid(text, "file:PATH with a path of a file"));
    }
    // A comma may be part of a name, but hardly so near to the only option there is.
    if let Some((_, option)) = path.rsplit_once(',')
        && let Some((key, value)) = option.split_once('=')
        && nearest(key, ["offset"]).is_some()
    {
        return Err(invalid(
            text,
            format!("file:PATH[,offset=N]; did you mean ',offset={value}'?"),
        ));
    }
    Ok(MigrationUri::File { path: PathBuf::from(path), offset })
}

impl FromStr for MigrationUri {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(invalid(text, FORMS));
        };
        match scheme {
            "tcp" | "unix" => text.parse().map(Self::Socket),
            "file" => file(text, rest),
            "fd" => {
                let word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                let good = !rest.is_empty() && rest.len() <= MAX_NAME && rest.chars().all(word);
                if !good {
                    let expected = "fd:N with the number of a descriptor that the VM was started \
                                    with, or fd:NAME with a name that 'getfd' has given one";
                    return Err(invalid(text, expected));
                }
                if matches!(rest.parse(), Ok(0..=2)) {
                    let expected = "fd:N with N from 3 on: 0 to 2 are the standard streams (a shell \
                                    makes another of them with 3<&0)";
                    return Err(invalid(text, expected));
                }
                Ok(Self::Descriptor(rest.to_string()))
            }
            "exec" if rest.trim().is_empty() || rest.contains('\0') => {
                Err(invalid(text, "exec:COMMAND with a command for a shell"))
            }
            "exec" => Ok(Self::Command(rest.to_string())),
            _ => {
                let known = ["tcp", "unix", "file", "fd", "exec"];
                Err(match nearest(scheme, known) {
                    Some(word) => invalid(text, format!("{FORMS}; did you mean '{word}:{rest}'?")),
                    None => invalid(text, FORMS),
                })
            }
        }
    }
}

impl fmt::Display for MigrationUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(uri) => uri.fmt(f),
            Self::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Self::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
            Self::Descriptor(name) => write!(f, "fd:{name}"),
            Self::Command(command) => write!(f, "exec:{command}"),
        }
    }
}

impl FromStr for MigrateListen {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text == "defer" { Ok(Self::Defer) } else { text.parse().map(Self::At) }
    }
}

impl fmt::Display for MigrateListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Defer => f.write_str("defer"),
            Self::At(uri) => uri.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<MigrationUri>().unwrap_err().to_string()
    }

    #[test]
    fn forms() {
        for text in [
            "tcp:host.example:4444",
            "unix:/run/x.sock",
            "file:vm.mig",
            "file:/a,b=c/vm.mig",
            "file:vm.mig,offset=512",
            "fd:3",
            "fd:migration_1",
            "exec:gzip -c >vm.mig.gz",
            "exec:ssh host 'a:b'",
        ] {
            assert_eq!(text.parse::<MigrationUri>().unwrap().to_string(), text);
        }
        for (text, offset) in [("0x1000", 4096), ("1M", 1 << 20), ("0", 0)] {
            let uri = format!("file:x,offset={text}").parse::<MigrationUri>().unwrap();
            assert_eq!(uri, MigrationUri::File { path: "x".into(), offset });
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_nearest_right_word() {
        for (text, words) in [
            ("vm.mig", "file:PATH[,offset=N]"),
            ("flie:vm.mig", "did you mean 'file:vm.mig'?"),
            ("exe:cat", "did you mean 'exec:cat'?"),
            ("tpc:h:1", "did you mean 'tcp:h:1'?"),
            ("file:", "with a path"),
            ("file:,offset=1", "with a path"),
            ("file:x,offset=many", "number of bytes"),
            ("file:x,offset=18446744073709551615", "number of bytes"),
            ("file:x,ofset=1", "did you mean ',offset=1'?"),
            ("fd:", "number of a descriptor"),
            ("fd:a b", "number of a descriptor"),
            ("fd:1", "3<&0"),
            ("exec: ", "with a command"),
            ("tcp:h", "tcp:HOST:PORT"),
        ] {
            assert!(refusal(text).contains(words), "{text}: {}", refusal(text));
        }
    }

    #[test]
    fn another_process_finds_the_same_file() {
        let here = std::env::current_dir().unwrap();
        let uri = "file:vm.mig,offset=5".parse::<MigrationUri>().unwrap().absolute().unwrap();
        assert_eq!(uri, MigrationUri::File { path: here.join("vm.mig"), offset: 5 });
    }
}
