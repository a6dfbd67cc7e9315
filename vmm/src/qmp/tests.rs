//! The protocol as a client sees it, over a real socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::commands::TRANSCRIPTS;
use super::testing::FakeVm;
use super::{QmpServer, bind};
use crate::control::{Event, VmControl};

struct Fixture {
    vm: Arc<FakeVm>,
    server: QmpServer,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let vm = FakeVm::running();
    let server =
        super::PreparedServer::new(vec![bind(&path).unwrap()]).unwrap().serve(vm.clone()).unwrap();
    Fixture { vm, server, path, _dir: dir }
}

struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects, and reads the greeting.
    fn greeted(fixture: &Fixture) -> Self {
        let stream = UnixStream::connect(&fixture.path).unwrap();
        // A deadline, so that a missing answer fails the test instead of hanging it.
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Self { reader: BufReader::new(stream) };
        let greeting = client.receive();
        assert_eq!(greeting["QMP"]["version"]["qemu"], json!({"major": 7, "minor": 2, "micro": 0}));
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
        client
    }

    fn negotiated(fixture: &Fixture) -> Self {
        let mut client = Self::greeted(fixture);
        assert_eq!(client.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
        client
    }

    fn send(&mut self, text: impl AsRef<[u8]>) {
        self.reader.get_mut().write_all(text.as_ref()).unwrap();
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.receive()
    }

    fn at_end(&mut self) -> bool {
        let mut line = String::new();
        // A server that goes away while we have sent more than it has read resets the connection.
        match self.reader.read_line(&mut line) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn class(reply: &Value) -> &str {
    reply["error"]["class"].as_str().unwrap_or_else(|| panic!("no error: {reply}"))
}

/// A client that asks a VM without a balloon knows it by the class.
#[test]
fn a_vm_without_a_balloon_says_so_before_anything_else() {
    let fixture = fixture();
    let mut client = Client::negotiated(&fixture);
    fixture.vm.without_balloon();
    let want = json!({"class": "DeviceNotActive", "desc": "No balloon device has been activated"});
    for ask in [
        r#"{"execute": "query-balloon"}"#,
        r#"{"execute": "balloon", "arguments": {"value": 67108864}}"#,
        r#"{"execute": "balloon", "arguments": {"value": -5}}"#,
    ] {
        assert_eq!(client.ask(ask), json!({ "error": want }), "{ask}");
    }
}

/// Every transcript in a command's comment is what really happens.
#[test]
fn transcripts_are_true() {
    let mut steps = 0;
    for (file, source) in TRANSCRIPTS {
        let comments = source.lines().map(|line| line.strip_prefix("///").map(str::trim));
        let mut session: Option<(Fixture, Client)> = None;
        let mut pending: Option<(bool, String)> = None;
        for line in comments.chain([None]) {
            let starts = line.filter(|l| l.starts_with("->") || l.starts_with("<-"));
            if (starts.is_some()
                || pending.as_ref().is_none_or(|_| line.is_none_or(|l| l.starts_with("```"))))
                && let Some((sent, text)) = pending.take()
            {
                let (_, client) = session.as_mut().unwrap();
                steps += 1;
                let text = text.replace("VERSION", env!("CARGO_PKG_VERSION"));
                if sent {
                    client.send(text);
                } else {
                    let want: Value = serde_json::from_str(&text)
                        .unwrap_or_else(|e| panic!("{file}: {text}: {e}"));
                    let mut got = client.receive();
                    if let Some(stamp) = got.as_object_mut().unwrap().remove("timestamp") {
                        assert!(stamp["seconds"].is_u64() && stamp["microseconds"].is_u64());
                    }
                    assert_eq!(got, want, "{file}");
                }
            }
            match (line, starts) {
                (Some("```text"), _) => {
                    let fixture = fixture();
                    let client = Client::negotiated(&fixture);
                    session = Some((fixture, client));
                }
                (_, Some(text)) => {
                    pending = Some((text.starts_with("->"), text[2..].trim().to_string()))
                }
                (Some(more), None) => {
                    if let Some((_, text)) = &mut pending {
                        text.push_str(more);
                    }
                }
                (None, None) => {}
            }
        }
    }
    assert!(steps >= 40, "only {steps} lines of transcripts were found");
}

#[test]
fn nothing_goes_before_negotiation() {
    let f = fixture();
    let mut c = Client::greeted(&f);
    let early = c.ask(r#"{"execute":"query-status","id":"a"}"#);
    assert_eq!(
        early,
        json!({"id": "a", "error": {"class": "CommandNotFound",
               "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}})
    );
    let oob = c.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    assert_eq!(class(&oob), "GenericError");
    assert_eq!(
        c.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#),
        json!({"return": {}})
    );
    assert_eq!(class(&c.ask(r#"{"execute":"qmp_capabilities"}"#)), "CommandNotFound");
    let unknown = c.ask(r#"{"execute":"warp"}"#);
    assert_eq!(unknown["error"]["desc"], "The command warp has not been found");
}

#[test]
fn garbage_gets_an_error_and_the_session_goes_on() {
    let f = fixture();
    let mut c = Client::negotiated(&f);
    for (text, desc) in [
        ("nonsense\n", "JSON parse error, expecting an object"),
        ("\u{ff}\n", "JSON parse error, expecting an object"),
        ("{]\n", "JSON parse error, a bracket closes what is not open"),
        ("[]\n", "QMP input must be a JSON object"),
        ("{}\n", "QMP input lacks member 'execute'"),
        (r#"{"arguments":{}}"#, "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"stop","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"stop","control":{}}"#, "QMP input member 'control' is unexpected"),
        (r#"{"exec-oob":"stop"}"#, "QMP input member 'exec-oob' is unexpected"),
    ] {
        let reply = c.ask(text);
        assert_eq!(reply["error"]["desc"], desc, "{text}");
        assert_eq!(class(&reply), "GenericError");
    }
    assert!(
        c.ask("{\"execute\" 1}\n")["error"]["desc"]
            .as_str()
            .unwrap()
            .starts_with("JSON parse error, ")
    );
    assert_eq!(
        c.ask(r#"{"execute":"query-name","id":{"a":[1]}}"#),
        json!({"return": {"name": "fake"}, "id": {"a": [1]}})
    );
}

#[test]
fn a_request_without_end_ends_the_session_only() {
    let f = fixture();
    let mut c = Client::negotiated(&f);
    let mut endless = vec![b' '; (1 << 20) + 4096];
    endless[0] = b'{';
    // The server may hang up before all is sent.
    let _ = c.reader.get_mut().write_all(&endless);
    assert!(c.receive()["error"]["desc"].as_str().unwrap().contains("longer than 1048576 bytes"));
    assert!(c.at_end());
    Client::negotiated(&f);
}

#[test]
fn many_requests_at_once_are_answered_in_order() {
    let f = fixture();
    let mut c = Client::negotiated(&f);
    let burst: String =
        (0..500).map(|n| format!(r#"{{"execute":"query-name","id":{n}}}"#)).collect();
    c.send(burst);
    for n in 0..500 {
        assert_eq!(c.receive()["id"], n);
    }
}

#[test]
fn a_blocked_command_blocks_nobody_else() {
    let f = fixture();
    let (mut a, mut b) = (Client::negotiated(&f), Client::negotiated(&f));
    let gate = f.vm.stop_gate.lock().unwrap();
    a.send(r#"{"execute":"stop","id":1}"#);
    assert_eq!(b.ask(r#"{"execute":"query-status"}"#)["return"]["status"], "running");
    f.vm.bus.send(Event::Powerdown);
    for client in [&mut a, &mut b] {
        assert_eq!(client.receive()["event"], "POWERDOWN");
    }
    drop(gate);
    assert_eq!(a.receive()["event"], "STOP");
    assert_eq!(a.receive(), json!({"return": {}, "id": 1}));
    assert_eq!(b.receive()["event"], "STOP");
}

const EVENTS_ON: &str = r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#;

#[test]
fn migration_events_need_their_capability() {
    let f = fixture();
    let (mut a, mut b) = (Client::negotiated(&f), Client::negotiated(&f));
    assert_eq!(
        a.ask(r#"{"execute":"migrate","arguments":{"uri":"tcp:h:1"}}"#),
        json!({"return": {}})
    );
    assert_eq!(a.ask(r#"{"execute":"migrate_cancel"}"#), json!({"return": {}}));
    assert_eq!(a.ask(EVENTS_ON), json!({"return": {}}));
    assert_eq!(
        a.ask(r#"{"execute":"migrate","arguments":{"uri":"tcp:h:1"}}"#)["data"]["status"],
        "setup"
    );
    assert_eq!(b.receive()["event"], "MIGRATION");
    assert_eq!(b.receive()["data"]["pass"], 1);
}

#[test]
fn what_happened_before_the_capability_stays_untold_also_to_a_client_that_is_behind() {
    let f = fixture();
    let (mut a, mut b) = (Client::negotiated(&f), Client::negotiated(&f));
    // More than the socket holds: the server is in the middle of its answer until this client reads on.
    let id = "x".repeat(1 << 19);
    b.send(json!({"execute": "query-name", "id": &id}).to_string());
    assert!(!b.reader.fill_buf().unwrap().is_empty());
    a.ask(r#"{"execute":"migrate","arguments":{"uri":"tcp:h:1"}}"#);
    a.ask(r#"{"execute":"migrate_cancel"}"#);
    a.ask(EVENTS_ON);
    assert_eq!(b.receive()["id"], id);
    assert_eq!(b.ask(r#"{"execute":"query-status"}"#)["return"]["status"], "running");
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let f = fixture();
    let mut deaf = Client::negotiated(&f);
    let mut other = Client::negotiated(&f);
    // More than the socket's buffer and the backlog hold together.
    for n in 0..40_000u32 {
        f.vm.bus.send(Event::Powerdown);
        if n % 500 == 499 {
            // The other client reads, so it is never left behind.
            for _ in 0..500 {
                assert_eq!(other.receive()["event"], "POWERDOWN");
            }
        }
    }
    assert_eq!(other.ask(r#"{"execute":"query-name"}"#)["return"]["name"], "fake");
    let mut lines = 0;
    let mut line = String::new();
    while deaf.reader.read_line(&mut line).is_ok_and(|n| n > 0) {
        line.clear();
        lines += 1;
    }
    assert!(lines < 40_000, "{lines} events were kept for it");
}

#[test]
fn the_last_event_arrives_before_the_end() {
    let f = fixture();
    let mut c = Client::negotiated(&f);
    c.send(r#"{"execute":"quit"}"#);
    let both = [c.receive(), c.receive()];
    assert!(both.contains(&json!({"return": {}})));
    let event = both.iter().find(|m| m["event"] == "SHUTDOWN").expect("the event");
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    f.vm.bus.send(Event::Stop);
    f.server.stop();
    assert_eq!(c.receive()["event"], "STOP");
    assert!(c.at_end());
}

#[test]
fn only_the_owner_gets_in_and_nobody_else_takes_the_place() {
    let f = fixture();
    assert_eq!(std::fs::metadata(&f.path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(bind(&f.path).unwrap_err().to_string().contains("another process listens there"));
    let file = f.path.with_extension("txt");
    std::fs::write(&file, "precious").unwrap();
    bind(&file).unwrap_err();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    // Left behind by a process that is gone: taken over.
    let stale = f.path.with_extension("stale");
    drop(bind(&stale).unwrap());
    bind(&stale).unwrap();
    assert_eq!(f.vm.name(), "fake");
}
