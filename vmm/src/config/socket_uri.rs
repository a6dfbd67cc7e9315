//! Where somebody listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{ConfigError, nearest};

/// `tcp:HOST:PORT` (a name, an IPv4 address, or an IPv6 address in brackets) or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SocketUri {
    /// A TCP socket.
    Tcp {
        /// Name or address, without brackets; empty when listening means all addresses.
        host: String,
        /// Port; 0 when listening lets the kernel choose.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Longest path of a unix socket: `sun_path` has 108 bytes, one of them for the end.
const UNIX_PATH_MAX: usize = 107;

impl FromStr for SocketUri {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let invalid = |expected: String| ConfigError::Invalid {
            what: "address",
            found: text.to_string(),
            expected,
        };
        let forms = "an address: tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH";
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(invalid(forms.to_string()));
        };
        match scheme {
            "unix" if rest.is_empty() || rest.len() > UNIX_PATH_MAX => {
                Err(invalid(format!("unix:PATH with a path of 1 to {UNIX_PATH_MAX} bytes")))
            }
            "unix" => Ok(Self::Unix(PathBuf::from(rest))),
            "tcp" => {
                let parse = || {
                    let (host, port) = rest.rsplit_once(':')?;
                    let host = match host.strip_prefix('[') {
                        Some(inner) => {
                            let inner = inner.strip_suffix(']')?;
                            inner.split('%').next()?.parse::<std::net::Ipv6Addr>().ok()?;
                            inner
                        }
                        None if host.contains(':') => return None,
                        None => host,
                    };
                    Some(Self::Tcp { host: host.to_string(), port: port.parse().ok()? })
                };
                parse().ok_or_else(|| {
                    invalid("tcp:HOST:PORT with a port from 0 to 65535 (and brackets around an IPv6 address)".to_string())
                })
            }
            _ => Err(invalid(match nearest(scheme, ["tcp", "unix"]) {
                Some(word) => format!("{forms}; did you mean '{word}:{rest}'?"),
                None => forms.to_string(),
            })),
        }
    }
}

impl fmt::Display for SocketUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for text in [
            "tcp:host.example:4444",
            "tcp:192.0.2.1:1",
            "tcp:[::1]:4444",
            "tcp::0",
            "unix:/run/x.sock",
        ] {
            assert_eq!(text.parse::<SocketUri>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "tcp",
            "tcp:",
            "tcp:host",
            "tcp:host:x",
            "tcp:::1:4",
            "tcp:[::1:4",
            "tcp:h:70000",
            "unix:",
            "fd:3",
        ] {
            assert!(text.parse::<SocketUri>().is_err(), "{text}");
        }
        assert!(
            "tpc:h:1"
                .parse::<SocketUri>()
                .unwrap_err()
                .to_string()
                .contains("did you mean 'tcp:h:1'")
        );
    }
}
