//! What an address leads to: opened here, so that what is wrong with it is said at once.

use std::os::fd::OwnedFd;
use std::time::Duration;

use migration::transport::descriptor::{self, Kind};
use migration::transport::{
    Address, Connection, Links, Listener, Sink, StreamError, Supply, TransportError,
};

use crate::config::{MigrationUri, SocketUri};
use crate::grants::{Grants, keep_from_commands};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an address can't be used.
#[derive(Debug, thiserror::Error)]
pub enum WayError {
    /// No connection.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No file, pipe or command.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Pages can't have connections of their own.
    #[error(
        "further connections (--channels, the capability 'multifd') can only be made to tcp:HOST:PORT and \
         unix:PATH"
    )]
    OneConnection,
    /// Commands are off.
    #[error(
        "exec: runs a command as the user that the VM runs as, and that is off: start the VM with \
         --allow-exec (on the command line; no configuration file can say it) if that is what you want"
    )]
    ExecIsOff,
    /// No such descriptor.
    #[error(
        "the VM has no descriptor '{name}': it must be started with one (as with {name}>FILE or \
         {name}<FILE in a shell) or be given one with 'getfd', and each can be used once"
    )]
    NoDescriptor {
        /// Its number or name.
        name: String,
    },
}

/// A way out.
pub(super) enum WayOut {
    /// To another VMM.
    Connection(Links),
    /// To where nobody answers.
    Sink(Sink),
}

/// A way in.
pub(super) enum WayIn {
    /// Somebody will connect.
    Listener(Listener),
    /// Somebody has connected.
    Connection(Connection),
    /// Nobody is there.
    Supply(Supply),
}

pub(super) fn address(uri: &SocketUri) -> Address {
    match uri {
        SocketUri::Tcp { host, port } => Address::Tcp { host: host.clone(), port: *port },
        SocketUri::Unix(path) => Address::Unix(path.clone()),
    }
}

fn allowed(grants: &Grants) -> Result<(), WayError> {
    if !grants.allow_exec {
        return Err(WayError::ExecIsOff);
    }
    keep_from_commands();
    Ok(())
}

fn descriptor(name: &str, grants: &Grants) -> Result<(OwnedFd, Kind, String), WayError> {
    let fd = grants.take(name).ok_or_else(|| WayError::NoDescriptor { name: name.to_owned() })?;
    let shown = format!("fd:{name}");
    let kind = descriptor::kind(&fd, &shown)?;
    Ok((fd, kind, shown))
}

impl WayOut {
    /// With as many further connections as `channels` says.
    pub(super) fn open(
        uri: &MigrationUri,
        channels: u8,
        grants: &Grants,
    ) -> Result<Self, WayError> {
        if channels > 0 && !matches!(uri, MigrationUri::Socket(_)) {
            return Err(WayError::OneConnection);
        }
        Ok(match uri {
            MigrationUri::Socket(uri) => {
                let connect = || Connection::connect(&address(uri), CONNECT_TIMEOUT);
                let main = connect()?;
                let pages = (0..channels).map(|_| connect()).collect::<Result<_, _>>()?;
                Self::Connection(Links { main, pages })
            }
            MigrationUri::File { path, offset } => Self::Sink(Sink::file(path, *offset)?),
            MigrationUri::Command(command) => {
                allowed(grants)?;
                Self::Sink(Sink::command(command)?)
            }
            MigrationUri::Descriptor(name) => match descriptor(name, grants)? {
                (fd, Kind::Socket, name) => {
                    Self::Connection(descriptor::connection(fd, name)?.into())
                }
                (fd, _, name) => Self::Sink(Sink::descriptor(fd, name)?),
            },
        })
    }
}

impl WayIn {
    pub(super) fn open(uri: &MigrationUri, grants: &Grants) -> Result<Self, WayError> {
        Ok(match uri {
            MigrationUri::Socket(uri) => Self::Listener(Listener::bind(&address(uri))?),
            MigrationUri::File { path, offset } => Self::Supply(Supply::file(path, *offset)?),
            MigrationUri::Command(command) => {
                allowed(grants)?;
                Self::Supply(Supply::command(command)?)
            }
            MigrationUri::Descriptor(name) => match descriptor(name, grants)? {
                (fd, Kind::Socket, name) => Self::Connection(descriptor::connection(fd, name)?),
                (fd, _, name) => Self::Supply(Supply::descriptor(fd, name)?),
            },
        })
    }

    /// Where it can be reached, with the port that was chosen.
    pub(super) fn listening(&self) -> Option<SocketUri> {
        let Self::Listener(listener) = self else { return None };
        Some(match listener.address() {
            Address::Tcp { host, port } => SocketUri::Tcp { host: host.clone(), port: *port },
            Address::Unix(path) => SocketUri::Unix(path.clone()),
        })
    }
}
