//! Each class of errors that QEMU's users know from its migrations: two sides that differ in just that
//! way. What can be known before the first page is said before the first page, by the name that a search
//! finds.
//!
//! | known as | shown here by | and elsewhere |
//! |---|---|---|
//! | Not a migration stream | another magic | `migration/tests/engine/hostile.rs` |
//! | State blocked by non-migratable device (invtsc) | `--cpu max,migratable=off` | `native_preflight.rs` |
//! | error while loading state for instance 0x… of device | a section's version (manifest); its bytes (rehearsal) | `native_rehearse.rs` |
//! | Unknown savevm section or instance | a section's name, its instance | `native_mismatch.rs` |
//! | Unknown ramblock | a block's name | `lab_qemu_refusals.rs` |
//! | Length mismatch | a block's size | `native_mismatch.rs` |
//! | load of migration failed: Input/output error | a cut: known only when it happens | `native_failures.rs`, `migration/tests/engine/cut.rs` |
//! | Missing section footer | a layout's digest | `migration/tests/engine/preflight.rs` |
//! | failed to set MSR 0x… to 0x… | a register that KVM has not | `native_preflight.rs` |
//! | get_pci_config_device: Bad config data | a byte of configuration space, a BAR, MSI-X vectors | `vmm/src/migrate/fit.rs` |
//! | saved image requires TUN_F_UFO support | – | `native_preflight_network.rs` |
//! | VQ n size 0x… < last_avail_idx 0x… - used_idx 0x… | number of queues; the value can only be known at the end | `devices/src/virtio/tests` |
//! | Machine type received is … and local is … | the machine type | `native_mismatch.rs` |
//! | XSAVE size, XCR0, TSC frequency, UUID | each of them | `native_preflight.rs` |

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::vm::Vm;
use system_tests::wait;

const MEMORY: &str = "64M";
const WORK: &str = "set=16M,rate=0,verify=20000";
const DEVICES: &str = "--rng=addr=04 --uuid 12345678-1234-5678-1234-567812345678";
/// MANIFEST: type, number and length.
const MANIFEST: &[u8] = b"\x08\x4d\x01\0\x04";
/// Header, manifest and goodbye are well below this; the guest's pages are far above.
const NO_PAGE: usize = 128 << 10;

type Edit = fn(&mut Value);

/// Lets one connection pass, and changes the source's manifest on its way.
struct Editor {
    address: SocketAddr,
    worker: JoinHandle<usize>,
}

impl Editor {
    fn new(target: &str, edit: Edit) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let target = target.strip_prefix("tcp:").expect("a port").to_string();
        let worker = thread::spawn(move || {
            let (mut near, _) = listener.accept().expect("the source");
            let mut far = TcpStream::connect(target).expect("the destination");
            let (mut near2, mut far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let back = thread::spawn(move || {
                let _ = std::io::copy(&mut far2, &mut near2);
                let _ = near2.shutdown(std::net::Shutdown::Both);
            });
            let passed = edit_manifest(&mut near, &mut far, edit);
            let rest = std::io::copy(&mut near, &mut far).unwrap_or(0);
            let _ = far.shutdown(std::net::Shutdown::Write);
            back.join().expect("no panic");
            passed + usize::try_from(rest).unwrap()
        });
        Self { address, worker }
    }

    fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }
}

/// Passes everything up to the manifest, and that changed. Gives how much that was.
fn edit_manifest(near: &mut TcpStream, far: &mut TcpStream, edit: Edit) -> usize {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(MANIFEST) {
        if !matches!(near.read(&mut byte), Ok(1)) {
            return head.len();
        }
        head.push(byte[0]);
        far.write_all(&byte).expect("room");
    }
    let mut len = [0; 4];
    near.read_exact(&mut len).expect("a length");
    let mut body = vec![0; u32::from_be_bytes(len) as usize];
    near.read_exact(&mut body).expect("a manifest");
    let mut manifest: Value = serde_json::from_slice(&body).expect("JSON");
    let before = manifest.clone();
    edit(&mut manifest);
    assert_ne!(manifest, before, "nothing was changed");
    let body = serde_json::to_vec(&manifest).expect("JSON");
    far.write_all(&u32::try_from(body.len()).unwrap().to_be_bytes()).expect("room");
    far.write_all(&body).expect("room");
    head.len() + 4 + body.len()
}

/// The entry of the manifest's list that has this value for `key`.
fn find<'a>(list: &'a mut Value, key: &str, value: &str) -> &'a mut Value {
    let list = list.as_array_mut().expect("a list");
    list.iter_mut().find(|entry| entry[key] == value).expect("an entry")
}

fn section<'a>(manifest: &'a mut Value, id: &str) -> &'a mut Value {
    find(&mut manifest["sections"], "id", id)
}

fn rng(manifest: &mut Value) -> &mut Value {
    find(&mut manifest["details"]["devices"], "kind", "virtio-rng")
}

/// What differs, and what has to be said of it.
struct Case {
    known_as: &'static str,
    says: &'static [&'static str],
    edit: Edit,
}

const CASES: &[Case] = &[
    Case {
        known_as: "Machine type received is 'pc-q35-7.2' and local is 'pc-i440fx-7.2'",
        says: &["--machine"],
        edit: |m| m["machine"] = "pc-q35-7.2".into(),
    },
    Case {
        known_as: "UUID received is 00000000-0000-0000-0000-000000000001",
        says: &["--uuid"],
        edit: |m| m["details"]["uuid"] = "00000000-0000-0000-0000-000000000001".into(),
    },
    Case {
        known_as: "unsupported version",
        says: &["i8254"],
        edit: |m| section(m, "i8254")["version"] = 99.into(),
    },
    Case {
        known_as: "Unknown savevm section or instance 'i8255'",
        says: &["i8255"],
        edit: |m| section(m, "i8254")["id"] = "i8255".into(),
    },
    Case {
        known_as: "Unknown savevm section or instance 'i8254' 7",
        says: &["i8254"],
        edit: |m| section(m, "i8254")["instance"] = 7.into(),
    },
    Case {
        known_as: "Missing section footer",
        says: &["i8254"],
        edit: |m| section(m, "i8254")["layout"] = "0123456789abcdef".into(),
    },
    Case {
        known_as: "Unknown ramblock \"nvdimm0\"",
        says: &["nvdimm0"],
        edit: |m| {
            let block = json!({ "name": "nvdimm0", "len": 4096 });
            m["ram"].as_array_mut().unwrap().push(block);
        },
    },
    Case {
        known_as: "Length mismatch: pc.ram: 0x8000000 in != 0x4000000",
        says: &["--memory"],
        edit: |m| find(&mut m["ram"], "name", "pc.ram")["len"] = (128 << 20).into(),
    },
    Case {
        known_as: "failed to set MSR 0x4b5650df to 0x1",
        says: &["vCPU 0"],
        edit: |m| m["details"]["vcpus"][0]["msrs"] = json!([[0x4b56_50df_u32, 1]]),
    },
    Case {
        known_as: "KVM_SET_XCRS",
        says: &["XCR0"],
        edit: |m| m["details"]["vcpus"][0]["xcr0"] = 4.into(),
    },
    Case {
        known_as: "KVM_SET_XSAVE2",
        says: &["XSAVE"],
        edit: |m| m["details"]["xsave-size"] = (1 << 20).into(),
    },
    Case {
        known_as: "get_pci_config_device: Bad config data: i=0x0 read: f5 device: f4",
        says: &["virtio-rng in PCI slot 04"],
        edit: |m| rng(m)["config"]["0"] = 0xf5.into(),
    },
    Case {
        known_as: "get_pci_config_device: Bad config data",
        says: &["BAR 0: io 0x40"],
        edit: |m| rng(m)["bars"]["0"] = "io 0x40".into(),
    },
    Case {
        known_as: "get_pci_config_device: Bad config data",
        says: &["MSI-X vectors"],
        edit: |m| rng(m)["vectors"] = 7.into(),
    },
    Case {
        known_as: "virtio: number of queues differs",
        says: &["queues="],
        edit: |m| rng(m)["queues"] = 2.into(),
    },
    Case {
        known_as: "unsupported. Allowed features: 0x",
        says: &["virtio-rng"],
        edit: |m| rng(m)["features"] = json!(u64::MAX),
    },
];

#[test]
fn what_differs_is_said_by_its_known_name_before_a_page_is_sent() {
    let mut here = Guest::boot_with(MEMORY, 1, WORK, DEVICES);
    here.wait_ready();
    let there = Guest::incoming_with(MEMORY, 1, DEVICES);
    for Case { known_as, says, edit } in CASES {
        let editor = Editor::new(&there.vm.migrate_uri(), *edit);
        let out = here.vm.migrate_command(&editor.uri()).output().expect("it starts");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{known_as}: {said}");
        for words in [known_as].into_iter().chain(*says) {
            assert!(said.contains(words), "'{words}' is not said here: {said}");
            // The other side writes its log when it has answered.
            let log = || there.vm.stderr();
            wait::until(words, 20, || log().contains(words).then_some(()), log);
        }
        let passed = editor.worker.join().expect("no panic");
        assert!(passed < NO_PAGE, "{known_as}: {passed} bytes were sent");
        let info = here.vm.qmp().ask("query-migrate");
        let sent = info["ram"]["transferred"].as_u64().unwrap_or(0);
        assert!(sent < NO_PAGE as u64, "{known_as}: {info}");
        assert_eq!(info["ram"]["normal"].as_u64().unwrap_or(0), 0, "{known_as}: {info}");
        assert_eq!(here.vm.qmp().status(), "running");
    }
    here.is_whole();
    here.moves_after_all(MEMORY, 1, DEVICES);
    // And the one that has refused so often is as good as ever.
    assert_eq!(there.vm.qmp().status(), "inmigrate");
}

#[test]
fn what_is_no_migration_stream_is_called_so() {
    let there = Guest::incoming(MEMORY, 1);
    let uri = there.vm.migrate_uri();
    let mut stranger = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut said = Vec::new();
    let _ = stranger.read_to_end(&mut said);
    let log = || there.vm.stderr();
    let called = || log().contains("Not a migration stream").then_some(());
    wait::until("the stranger to be called one", 20, called, log);
    let mut here = Guest::ready(MEMORY, 1, WORK);
    here.migrate_to(&there, true);
}

#[test]
fn a_vm_that_may_not_move_says_so_when_it_is_told_to_and_before() {
    let mut here = Guest::start(Vm::selfcheck(MEMORY, 1, WORK).args("--cpu host,migratable=off"));
    here.wait_ready();
    let name = "State blocked by non-migratable CPU device (invtsc flag)";
    // Before anybody asks for a migration.
    let info = here.vm.qmp().ask("query-migrate");
    let reasons = info["blocked-reasons"].as_array().cloned().unwrap_or_default();
    assert!(reasons.iter().any(|r| r.as_str().is_some_and(|r| r.contains(name))), "{info}");
    let there = Guest::incoming(MEMORY, 1);
    let out = here.vm.migrate_command(&there.vm.migrate_uri()).output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains(name), "{said}");
    assert!(!there.vm.stderr().contains("sent away"), "{}", there.vm.stderr());
    here.is_whole();
}
