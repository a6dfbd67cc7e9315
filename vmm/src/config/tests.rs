//! From words to a machine, and back.

use super::*;

fn resolve(toml: &str) -> Result<Config, ConfigError> {
    Config::resolve(Settings::from_toml(toml, "the configuration file 'x.toml'")?)
}

fn refusal(toml: &str) -> String {
    crate::error_chain(&resolve(toml).expect_err(toml))
}

#[test]
fn every_default_is_written_out() {
    let config = resolve(
        r#"
        kernel = "vmlinuz"
        smp = 2
        memory = "1G"
        rng = true
        balloon = { addr = "02.0" }
        console = "pty"
        disk = [{ path = "a.img" }, { path = "b.img", readonly = true, addr = "3" }]
        net = [{ tap = "tap0" }, { stream = "unix:/run/net.sock", mac = "52:54:00:12:34:56" }]
        "#,
    )
    .unwrap();
    let json = serde_json::to_value(&config).unwrap();
    let want = serde_json::json!({
        "name": "vm", "uuid": "00000000-0000-0000-0000-000000000000",
        "machine": "pc-i440fx-7.2", "cpu": "host,migratable=on", "smp": 2, "memory": "1G",
        "kernel": "vmlinuz", "initrd": null, "firmware": null, "append": "console=ttyS0",
        "disk": [
            {"path": "a.img", "id": "disk0", "addr": "04.0", "virtio": "transitional", "readonly": false, "cache": "writeback", "queues": 2},
            {"path": "b.img", "id": "disk1", "addr": "03.0", "virtio": "transitional", "readonly": true, "cache": "writeback", "queues": 2},
        ],
        "net": [
            {"tap": "tap0", "id": "net0", "addr": "05.0", "virtio": "transitional", "mac": "52:54:00:12:34:57"},
            {"stream": "unix:/run/net.sock", "id": "net1", "addr": "06.0", "virtio": "transitional", "mac": "52:54:00:12:34:56"},
        ],
        "rng": {"id": "rng0", "addr": "07.0", "virtio": "transitional"},
        "console": {"backend": "pty", "id": "console0", "addr": "08.0", "virtio": "transitional"},
        "balloon": {"id": "balloon0", "addr": "02.0", "virtio": "transitional"},
        "serial": "stdio", "qmp": null, "prealloc": false, "dirty-ring": null, "shared-memory": false,
        "paused": false, "migrate-listen": null,
    });
    assert_eq!(json, want);

    // What is recorded uses the words of the settings, so it resolves to itself.
    let mut words = json;
    words.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    let again = Config::resolve(serde_json::from_value(words).unwrap()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn flags_and_file_have_the_same_words() {
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        settings: Settings,
    }
    let flags: Flags = clap::Parser::try_parse_from([
        "x",
        "--kernel",
        "vmlinuz",
        "--smp",
        "2",
        "--memory",
        "1G",
        "--rng",
        "--balloon=addr=02.0",
        "--console",
        "pty,id=c",
        "--disk",
        "path=a.img,queues=1",
        "--net",
        "tap=tap0",
        "--paused",
        "--prealloc=on",
        "--dirty-ring",
        "4096",
        "--shared-memory",
    ])
    .unwrap();
    let file = resolve(
        r#"
        kernel = "vmlinuz"
        smp = 2
        memory = "1G"
        rng = true
        paused = true
        prealloc = true
        dirty-ring = 4096
        shared-memory = true
        [balloon]
        addr = "02.0"
        [console]
        backend = "pty"
        id = "c"
        [[disk]]
        path = "a.img"
        queues = 1
        [[net]]
        tap = "tap0"
        "#,
    );
    assert_eq!(Config::resolve(flags.settings).unwrap(), file.unwrap());

    let mut flag_names: Vec<_> = <Flags as clap::CommandFactory>::command()
        .get_arguments()
        .filter_map(|a| a.get_long().map(str::to_string))
        .collect();
    let mut keys: Vec<_> = keys::fields_of::<Settings>().iter().map(ToString::to_string).collect();
    flag_names.sort();
    keys.sort();
    assert_eq!(flag_names, keys);
}

#[test]
fn flags_overrule_the_file() {
    let file = "kernel='a'\nappend='b'\nmemory='64M'\ndirty-ring=1024\ndisk=[{path='1'}]";
    let file = Settings::from_toml(file, "x").unwrap();
    let flags = Settings::from_toml("selfcheck=''\ndirty-ring=0\ndisk=[{path='2'}]", "x").unwrap();
    let config = Config::resolve(file.overruled_by(flags)).unwrap();
    assert_eq!(config.boot, Boot::SelfCheck { selfcheck: String::new() });
    assert_eq!((config.memory, config.dirty_ring), (ByteSize(64 << 20), None));
    assert_eq!(
        config.disk.iter().map(|d| d.path.to_str().unwrap()).collect::<Vec<_>>(),
        ["1", "2"]
    );
}

#[test]
fn a_device_with_the_id_of_one_in_the_file_overrules_that() {
    let file = "migrate-listen='defer'\ndisk=[{path='1'},{path='2',id='root',readonly=true,addr='9'}]\n\
                net=[{tap='t',mac='52:54:00:aa:bb:cc'}]";
    let file = Settings::from_toml(file, "x").unwrap();
    let flags = "disk=[{path='3',id='root',queues=4},{path='4',id='disk0'},{path='5',id='disk1'}]\n\
                 net=[{stream='unix:/s',id='net0',addr='1f'}]";
    let flags = Settings::from_toml(flags, "x").unwrap();
    let config = Config::resolve(file.overruled_by(flags)).unwrap();
    let want = resolve(
        "migrate-listen='defer'\n\
         disk=[{path='4'},{path='3',id='root',readonly=true,addr='9',queues=4},{path='5',id='disk1'}]\n\
         net=[{stream='unix:/s',mac='52:54:00:aa:bb:cc',addr='1f'}]",
    );
    assert_eq!(config, want.unwrap());

    let twice = Settings::from_toml("disk=[{path='1',id='x'},{path='2',id='x'}]", "x").unwrap();
    let error = Config::resolve(Settings {
        migrate_listen: Some(MigrateListen::Defer),
        ..Settings::default().overruled_by(twice)
    });
    assert!(error.unwrap_err().to_string().contains("id 'x' is used by both"));
}

#[test]
fn refusals_say_what_is_right() {
    for (toml, want) in [
        (
            "memry='1G'",
            "unknown key 'memry' in the configuration file 'x.toml': did you mean 'memory'?",
        ),
        ("disk=[{pth='a'}]", "did you mean 'path'?"),
        ("rng={adr='5'}", "did you mean 'addr'?"),
        (
            "selfcheck=''\nmemory='0M'",
            "memory: '0B' is not a RAM size that can be had: a multiple of 1M",
        ),
        ("selfcheck=''\nmemory='65537K'", "memory: '65537K' is not"),
        ("memory=512", "a size in quotes"),
        ("memory='512'", "a size with its unit"),
        ("selfcheck=''\nsmp=0", "smp: '0' is not a number of vCPUs from 1 to 254"),
        ("selfcheck=''\nsmp=256", "smp: '256' is not"),
        (
            "selfcheck=''\ndirty-ring=512",
            "dirty-ring: '512' is not a number of entries that a dirty ring can have: a power of two \
             from 1024 to 65536, or 0 for none",
        ),
        ("selfcheck=''\ndirty-ring=3000", "dirty-ring: '3000' is not"),
        ("selfcheck=''\ndirty-ring=131072", "dirty-ring: '131072' is not"),
        ("machine='pc-i440fx-7.1'", "did you mean 'pc-i440fx-7.2'?"),
        ("cpu='hots'", "did you mean 'host'?"),
        ("cpu='host,migrateable=on'", "did you mean 'migratable'?"),
        ("serial='sdtio'", "did you mean 'stdio'?"),
        ("disk=[{path='a',cache='writebak'}]", "did you mean 'writeback'?"),
        ("disk=[{path='a',addr='1'}]", "a PCI slot from 02.0 to 1f.0"),
        ("disk=[{path='a',addr='20'}]", "a PCI slot from 02.0 to 1f.0"),
        ("disk=[{path='a',queues=0}]", "a number of queues from 1 to 255"),
        ("net=[{tap='t',mac='01:00:00:00:00:00'}]", "a unicast MAC address"),
        ("selfcheck=''\nnet=[{id='n'}]", "either tap=NAME or stream=ADDR"),
        (
            "selfcheck=''\ndisk=[{path='a',addr='5'},{path='b',addr='5'}]",
            "PCI address '05.0' is used by both disk0 and disk1",
        ),
        ("selfcheck=''\ndisk=[{path='a',id='x'},{path='b',id='x'}]", "id 'x' is used by both"),
        ("selfcheck=''\ndisk=[{path='a'},{path='a'}]", "disk image 'a' is used by both"),
        (
            "selfcheck=''\nconsole='stdio'",
            "backend 'stdio' is used by both the serial port and the console",
        ),
        ("selfcheck=''\nkernel='k'", "say only one"),
        ("selfcheck=''\ninitrd='k'", "need a 'kernel'"),
        ("", "there is nothing to run"),
        ("name='../x'\nselfcheck=''", "a name of 1 to 48 letters"),
        ("migrate-listen='tpc:a:1'", "did you mean 'tcp:a:1'?"),
        ("= nonsense", "the configuration file 'x.toml'"),
    ] {
        let got = refusal(toml);
        assert!(got.contains(want), "{toml}: {got}");
    }
}

#[test]
fn the_bus_is_finite() {
    let disks: Vec<_> = (0..31).map(|n| format!("{{path='{n}'}}")).collect();
    assert!(
        refusal(&format!("selfcheck=''\ndisk=[{}]", disks.join(",")))
            .contains("no PCI slot is left for disk30")
    );
}
