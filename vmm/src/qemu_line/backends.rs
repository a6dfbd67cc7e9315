//! The host's side of serial lines, consoles, networks and control sockets in a QEMU command line.

use std::path::PathBuf;

use super::findings::Findings;
use super::props::{Props, Rule, Rules};
use crate::config::{CharBackend, NetSettings, SocketUri, split};

const CHARDEV: Rules = &[
    ("mux", Rule::Host),
    ("signal", Rule::Host),
    ("logfile", Rule::Host),
    ("logappend", Rule::Host),
    ("append", Rule::Host),
    ("wait", Rule::Host),
    ("telnet", Rule::Host),
    ("reconnect", Rule::Host),
    ("server", Rule::Host),
];
const TAP: Rules = &[
    ("script", Rule::Host),
    ("downscript", Rule::Host),
    ("vhost", Rule::Host),
    ("vhostforce", Rule::Host),
    ("poll-us", Rule::Host),
    ("sndbuf", Rule::Host),
    ("vnet_hdr", Rule::Only(&["on"])),
    ("queues", Rule::Only(&["1"])),
];
const STREAM: Rules = &[("server", Rule::Only(&["off"]))];

/// Reads `-chardev`: its id, and where it leads to if that is a place that mini-vmm knows.
pub(super) fn chardev(text: &str, found: &mut Findings) -> Option<(String, Option<CharBackend>)> {
    let mut props = match Props::parse(text, "backend") {
        Ok(props) => props,
        Err(why) => {
            found.matters("-chardev", why);
            return None;
        }
    };
    let kind = props.take("backend").unwrap_or_default();
    let Some(id) = props.take("id") else {
        found.matters(format!("-chardev {kind}"), "it has no id");
        return None;
    };
    let option = format!("-chardev {kind},id={id}");
    Some((id, char_backend(&kind, props, &option, found)))
}

/// Reads what stands behind `-serial`, `-qmp` and the like, where it is no `chardev:ID`.
pub(super) fn char_shorthand(
    text: &str,
    option: &str,
    found: &mut Findings,
) -> Option<CharBackend> {
    let text = match text.strip_prefix("mon:") {
        Some(rest) => {
            found.note(option, "QEMU's monitor is left out");
            rest
        }
        None => text,
    };
    match text.split_once(':') {
        // A file's name is all that follows, commas and all.
        Some(("file", path)) => Some(CharBackend::File(path.into())),
        Some(("unix", rest)) => {
            let mut pairs = split(rest, Some("path"));
            let path = if pairs.is_empty() { String::new() } else { pairs.remove(0).1 };
            let mut props = Props::of(pairs);
            let backend = socket(path, &mut props, option, found)?;
            props.settle(option, &[CHARDEV], found);
            Some(backend)
        }
        _ => {
            let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
            let props = Props::of(split(rest, None));
            char_backend(kind, props, option, found)
        }
    }
}

fn char_backend(
    kind: &str,
    mut props: Props,
    option: &str,
    found: &mut Findings,
) -> Option<CharBackend> {
    let backend = match kind {
        "null" => Some(CharBackend::Null),
        "pty" => Some(CharBackend::Pty),
        "stdio" => Some(CharBackend::Stdio),
        "file" => props.take("path").map(|path| CharBackend::File(path.into())),
        "socket" => match props.take("path") {
            Some(path) => socket(path, &mut props, option, found),
            None => None,
        },
        _ => None,
    };
    // A backend that is not to be had is told by whoever uses it.
    if backend.is_some() {
        props.settle(option, &[CHARDEV], found);
    }
    backend
}

/// A listening socket; mini-vmm connects to none.
fn socket(
    path: String,
    props: &mut Props,
    option: &str,
    found: &mut Findings,
) -> Option<CharBackend> {
    let listens = props.take_switch("server").unwrap_or(false);
    // QEMU may hold the guest back until somebody connects; here a line may be connected any time.
    if listens && props.take_switch("wait") != Some(false) {
        found.note(option, "the guest does not wait for the first connection (wait=on)");
    }
    let backend = format!("unix:{path}").parse().ok();
    if listens { backend } else { None }
}

/// Where a chardev leads to if mini-vmm can't go there: the guest sees the same device.
pub(super) fn or_null(
    backend: Option<CharBackend>,
    option: &str,
    flag: &str,
    found: &mut Findings,
) -> CharBackend {
    backend.unwrap_or_else(|| {
        found.note(
            option,
            &format!(
                "mini-vmm can't go there, and drops the output: say with {flag} where it goes \
                 (stdio, file:PATH, unix:PATH where it listens, pty)"
            ),
        );
        CharBackend::Null
    })
}

/// Reads `-netdev`: its id, and its end here.
pub(super) fn netdev(text: &str, found: &mut Findings) -> Option<(String, NetSettings)> {
    let mut props = match Props::parse(text, "type") {
        Ok(props) => props,
        Err(why) => {
            found.matters("-netdev", why);
            return None;
        }
    };
    let kind = props.take("type").unwrap_or_default();
    let Some(id) = props.take("id") else {
        found.matters(format!("-netdev {kind}"), "it has no id");
        return None;
    };
    let option = format!("-netdev {kind},id={id}");
    let mut net =
        NetSettings { tap: None, stream: None, mac: None, id: None, addr: None, virtio: None };
    match kind.as_str() {
        "tap" => {
            for key in ["fd", "fds", "vhostfd", "vhostfds", "br", "helper"] {
                if props.take(key).is_some() {
                    found.matters(
                        &option,
                        format!(
                            "mini-vmm takes no '{key}', since it opens the tap by its name: write \
                             ifname=NAME of an existing one"
                        ),
                    );
                }
            }
            net.tap = props.take("ifname");
            if net.tap.is_none() {
                found.matters(
                    &option,
                    "QEMU would make a tap of its own; write ifname=NAME of an existing one",
                );
            }
            props.settle(&option, &[TAP], found);
        }
        "stream" => {
            net.stream = stream_address(&mut props);
            if net.stream.is_none() {
                found.matters(
                    &option,
                    "write addr.type=unix,addr.path=PATH or addr.type=inet,addr.host=HOST,addr.port=PORT",
                );
            }
            props.settle(&option, &[STREAM], found);
        }
        _ => {
            found.matters(
                &option,
                "mini-vmm has no such network: it has tap with ifname=, and stream",
            );
            return None;
        }
    }
    Some((id, net))
}

fn stream_address(props: &mut Props) -> Option<SocketUri> {
    let mut addr = props.take_below("addr.");
    let uri = match addr.take("type")?.as_str() {
        "unix" => SocketUri::Unix(PathBuf::from(addr.take("path")?)),
        "inet" => {
            SocketUri::Tcp { host: addr.take("host")?, port: addr.take("port")?.parse().ok()? }
        }
        _ => return None,
    };
    // Whatever else there is would make it another address.
    addr.is_empty().then_some(uri)
}
