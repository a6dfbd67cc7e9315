//! A configuration is written for QEMU, read back, and is the same.

use super::*;
use crate::config::MigrateListen;

fn assert_comes_back(config: &Config) {
    let line = QemuLine::of(config, None).unwrap();
    let shell = line.to_shell();
    let read = Like::from_line(&shell).unwrap_or_else(|e| panic!("{shell}\n{e}"));
    assert_eq!(Config::resolve(read.settings).expect(&shell), *config, "{shell}");
    // The words of --json are the words of the shell.
    let words: Vec<_> = line.args().map(str::to_string).collect();
    assert_eq!(shell_words::split(&shell).unwrap(), words);
}

#[test]
fn configurations_come_back_the_same() {
    for toml in [
        "migrate-listen = 'defer'\nserial = 'null'",
        "kernel = 'vmlinuz'\nserial = 'stdio'\nappend = ''",
        "kernel = '-odd'\nappend = \"root=/dev/vda quiet 'a b' \\\"c\\\" $HOME \\\\ # !\"\nmemory = '3584M'",
        "name = 'web.1'\nuuid = '12345678-1234-5678-1234-567812345678'\nsmp = 254\nmemory = '1T'\n\
         cpu = 'host,migratable=off'\nmigrate-listen = 'tcp:[::1]:7000'\npaused = true\ndirty-ring = 65536\n\
         firmware = '/my bios/b,c.bin'\nqmp = 'unix:/run/a,b=c d.sock'\nserial = 'pty'",
        "migrate-listen = 'unix:/run/a,b=c d.sock'\nsmp = 4\nserial = 'unix:/run/s,1=x.sock'\nrng = true\n\
         balloon = { addr = '1f' }\nconsole = { backend = 'file:/tmp/a,,b.log', id = 'hvc' }\n\
         disk = [{ path = 'a,b.img' }, { path = '/b c/its.img', readonly = true, cache = 'none', queues = 1, addr = '9' }]\n\
         net = [{ tap = 'tap,0' }, { stream = 'unix:/n,et.sock', virtio = 'legacy' }, { stream = 'tcp:[fe80::1]:99' }]",
        "kernel = 'k'\ninitrd = 'i'\n\
         disk = [{ path = 'nbd:img' }, { path = \"it's \\\"q\\\"=\\n.img\" }, { path = './x:y' }, { path = 'json:{}' }]",
    ] {
        assert_comes_back(&from_toml(toml));
    }
}

/// QEMU 7.2 has no `file:`, so a command reads it there.
#[test]
fn a_file_is_read_by_a_command() {
    let incoming = |uri: &str| {
        let config = from_toml("kernel = 'k'\nserial = 'null'");
        let line = QemuLine::of(&config, Some(&uri.parse().unwrap())).unwrap();
        line.args().last().map(str::to_string)
    };
    assert_eq!(incoming("file:/a b.mig").unwrap(), "exec:cat '/a b.mig'");
    assert_eq!(incoming("file:x.mig,offset=512").unwrap(), "exec:tail -c +513 x.mig");
    assert_eq!(incoming("exec:zstd -dc x").unwrap(), "exec:zstd -dc x");
    assert_eq!(incoming("tcp:[::1]:7").unwrap(), "tcp:[::1]:7");
}

/// Every combination of what a disk, a net and a plain device can be.
#[test]
fn all_kinds_of_devices_come_back_the_same() {
    let kinds = ["transitional", "modern", "legacy"];
    for (n, virtio) in kinds.into_iter().enumerate() {
        for cache in ["writeback", "none"] {
            for readonly in [true, false] {
                for queues in [1, 2, 254] {
                    assert_comes_back(&from_toml(&format!(
                        "migrate-listen = 'defer'\nsmp = {queues}\n\
                         rng = {{ virtio = '{virtio}', addr = '1{n}' }}\n\
                         balloon = {{ virtio = '{virtio}', id = 'b' }}\n\
                         console = {{ backend = 'pty', virtio = '{virtio}', id = 'c.d-e' }}\n\
                         disk = [{{ path = 'x', id = 'd', virtio = '{virtio}', cache = '{cache}', \
                         readonly = {readonly}, queues = {} }}]\n\
                         net = [{{ tap = 't', virtio = '{virtio}', mac = '52:54:00:00:00:0{n}' }}]",
                        255 - queues
                    )));
                }
            }
        }
    }
}

#[test]
fn a_line_says_all_that_a_migration_depends_on() {
    let config = from_toml(
        "kernel = 'k'\nsmp = 2\nmemory = '1G'\nrng = true\n\
         disk = [{ path = 'my disk,1.img', virtio = 'modern' }]\nnet = [{ tap = 'tap0' }]",
    );
    let listen: MigrateListen = "tcp:0.0.0.0:7001".parse().unwrap();
    let shell = QemuLine::of(&config, Some(&listen)).unwrap().to_shell();
    let want = "\
qemu-system-x86_64 \\
    -name vm \\
    -machine pc-i440fx-7.2,usb=off,vmport=off,hpet=off,graphics=off \\
    -accel kvm \\
    -cpu host \\
    -nodefaults \\
    -no-user-config \\
    -display none \\
    -m 1G \\
    -smp 2 \\
    -kernel k \\
    -append console=ttyS0 \\
    -drive 'if=none,id=drive-disk0,file=my disk,,1.img,format=raw,cache=writeback' \\
    -device virtio-blk-pci,id=disk0,addr=02.0,disable-legacy=on,drive=drive-disk0,num-queues=2 \\
    -netdev tap,id=netdev-net0,ifname=tap0,script=no,downscript=no \\
    -device virtio-net-pci,id=net0,addr=03.0,netdev=netdev-net0,mac=52:54:00:12:34:56 \\
    -device virtio-rng-pci,id=rng0,addr=04.0 \\
    -chardev stdio,id=serial0 \\
    -serial chardev:serial0 \\
    -incoming tcp:0.0.0.0:7001";
    assert_eq!(shell, want);
}

#[test]
fn what_qemu_has_not_is_said() {
    let level = from_toml("migrate-listen = 'defer'\ncpu = 'x86-64-v2'");
    let error = QemuLine::of(&level, None).unwrap_err().to_string();
    assert!(error.contains("--cpu x86-64-v2: only a VM that runs with --cpu host"), "{error}");

    let zero = from_toml("kernel = \"a\\u0000b\"");
    let error = QemuLine::of(&zero, None).unwrap_err().to_string();
    assert_eq!(
        error,
        "'a\\u{0}b' can't stand in a command line: it is not UTF-8, or has a zero byte in it"
    );

    let selfcheck = QemuLine::of(&from_toml("selfcheck = ''"), None).unwrap();
    assert!(selfcheck.notes()[0].contains("QEMU can take it while it runs"), "{selfcheck:?}");
    assert!(!selfcheck.to_shell().contains("-kernel"));
}

/// QEMU's ids begin with a letter; ours need not, and are left out then.
#[test]
fn an_id_that_qemu_would_not_take_is_left_out() {
    let config = from_toml(
        "migrate-listen = 'defer'\nserial = 'null'\nrng = { id = '0' }\n\
         console = { backend = 'pty', id = '1' }",
    );
    let shell = QemuLine::of(&config, None).unwrap().to_shell();
    assert!(shell.contains("-device virtio-rng-pci,addr=02.0 "), "{shell}");
    assert!(shell.contains("-device virtconsole,chardev=char-1,nr=0"), "{shell}");
    let again = Config::resolve(Like::from_line(&shell).unwrap().settings).unwrap();
    assert_eq!(again.rng.unwrap().id.as_str(), "rng0");
    assert_eq!(again.console.unwrap().id.as_str(), "console0");
}

#[test]
fn flags_are_said_over_the_line() {
    let line = like(
        "-m 512 -netdev tap,id=n,ifname=tap0 -device virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc,addr=7 \
         -drive if=none,id=d,file=a.img,format=raw -device virtio-blk-pci,id=root,drive=d",
    );
    let flags = Settings::from_toml(
        "memory = '1G'\nmigrate-listen = 'defer'\nserial = 'pty'\nnet = [{ tap = 'tap9', id = 'net0' }]\n\
         disk = [{ path = 'b.img', id = 'root', cache = 'none' }, { path = 'c.img' }]",
        "x",
    );
    let config = Config::resolve(line.settings.overruled_by(flags.unwrap())).unwrap();
    let want = from_toml(
        "memory = '1G'\nmigrate-listen = 'defer'\nserial = 'pty'\n\
         net = [{ tap = 'tap9', mac = '52:54:00:aa:bb:cc', addr = '7' }]\n\
         disk = [{ path = 'b.img', id = 'root', cache = 'none', addr = '2' }, { path = 'c.img' }]",
    );
    assert_eq!(config, want);
    assert_eq!(line.notes, [] as [&str; 0]);
}

/// What operators are told to write is understood, and little of it is left out.
#[test]
fn the_line_of_the_manual_is_taken() {
    let manual = include_str!("../../../../docs/qemu.md");
    let from = manual.find("    qemu-system-x86_64").expect("a command line");
    let block = &manual[from..];
    let line = &block[..block.find("\n\n").expect("its end")];
    let like = Like::from_line(line).unwrap();
    let notes = [
        "-display none: the guest does not see it; left out",
        "-netdev tap,id=net0: the guest does not see downscript, script; left out",
    ];
    assert_eq!(like.notes, notes);
    let want = from_toml(
        "kernel = 'vmlinuz'\ninitrd = 'initrd.img'\nappend = 'console=ttyS0 root=/dev/vda'\n\
         memory = '1024M'\nsmp = 2\ndisk = [{ path = 'web.img' }]\nnet = [{ tap = 'tap0' }]\n\
         serial = 'unix:/run/web.serial'\nqmp = 'unix:/run/web.qmp'",
    );
    assert_eq!(Config::resolve(like.settings).unwrap(), want);
}
