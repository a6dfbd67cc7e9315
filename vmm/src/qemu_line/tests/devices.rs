//! Disks, networks and the other devices of a QEMU command line, and where they are put.

use super::*;
use crate::config::{CharBackend, DiskCache, VirtioVersion};

const DISK: &str = "-drive if=none,id=d,file=a.img,format=raw";
const TAP: &str = "-netdev tap,id=n,ifname=tap0,script=no";

#[test]
fn slots_are_given_as_qemu_gives_them() {
    // In the order of the line, whatever the kind; if=virtio comes when all the others are there.
    let got = config(&format!(
        "-drive if=virtio,file=v.img,format=raw {DISK} {TAP} -device virtio-balloon -device virtio-rng-pci,addr=4 \
         -device virtio-net-pci,netdev=n -device virtio-blk-pci,drive=d"
    ));
    let slots: Vec<_> =
        got.pci_devices().into_iter().map(|(id, slot)| (id.to_string(), slot.number())).collect();
    let want = [("disk0", 5), ("disk1", 6), ("net0", 3), ("rng0", 4), ("balloon0", 2)];
    assert_eq!(slots, want.map(|(id, slot)| (id.to_string(), slot)));

    for (said, words) in [
        ("-device virtio-rng-pci -device virtio-balloon-pci,addr=2", "PCI slot 02.0 is taken"),
        ("-device virtio-rng-pci,addr=1", "a PCI slot from 02.0 to 1f.0"),
        ("-device virtio-rng-pci,addr=5.1", "a PCI slot from 02.0 to 1f.0"),
        ("-device virtio-rng-pci,bus=pci.1", "does not have bus=pci.1"),
        (r#"-device '{"driver":"virtio-rng-pci","addr":5}'"#, "a PCI slot from 02.0 to 1f.0"),
        (r#"-device '{"driver":"virtio-rng-pci","addr":999}'"#, "addr is 999"),
    ] {
        let error = refusal(&format!("{BOARD} {said}"));
        assert!(error.contains(words), "{said}: {error}");
    }
    let json = config(r#"-device '{"driver":"virtio-rng-pci","addr":56,"id":"r"}'"#).rng.unwrap();
    assert_eq!((json.addr.number(), json.id.as_str()), (7, "r"));
}

#[test]
fn a_name_that_qemu_gave_is_not_given_again() {
    let got = config(
        "-drive if=none,id=x,file=x,format=raw -drive if=none,id=y,file=y,format=raw \
         -device virtio-blk-pci,drive=x -device virtio-blk-pci,drive=y,id=disk0",
    );
    let ids: Vec<_> = got.disk.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["disk1", "disk0"]);
}

#[test]
fn disks_are_read_in_all_their_forms() {
    let disk = |said: &str| {
        let disk = config(said).disk.remove(0);
        (disk.path.to_str().unwrap().to_string(), disk.readonly, disk.cache)
    };
    let (back, none) = (DiskCache::Writeback, DiskCache::None);
    let device = "-device virtio-blk-pci,drive=d";
    for (said, want) in [
        ("-drive if=none,id=d,format=raw,file=a,,b.img", ("a,b.img", false, back)),
        (
            "-drive if=none,id=d,format=raw,file=file:a:b,readonly=on,cache=none",
            ("a:b", true, none),
        ),
        (
            "-drive if=none,id=d,driver=raw,file='/a b',cache.direct=on,aio=native",
            ("/a b", false, none),
        ),
        ("-drive if=none,id=d,format=raw,file=a,cache=unsafe,werror=enospc", ("a", false, back)),
        ("-blockdev file,node-name=d,filename=x", ("x", false, back)),
        (
            "-blockdev driver=raw,node-name=d,read-only=on,file.driver=file,file.filename=x,cache.direct=on",
            ("x", true, none),
        ),
        (
            r#"-blockdev '{"driver":"host_device","filename":"/dev/sdz","node-name":"f","cache":{"direct":true,"no-flush":false},"auto-read-only":true}' -blockdev '{"driver":"raw","node-name":"d","file":"f","read-only":false}'"#,
            ("/dev/sdz", false, none),
        ),
        (
            r#"-blockdev '{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"a,b"}}'"#,
            ("a,b", false, back),
        ),
    ] {
        let (path, readonly, cache) = want;
        assert_eq!(
            disk(&format!("{said} {device}")),
            (path.to_string(), readonly, cache),
            "{said}"
        );
    }
    let device = config(&format!("{DISK} -smp 2 -device virtio-blk-pci,drive=d,num-queues=7")).disk;
    assert_eq!(device[0].queues, 7);
    assert_eq!(config(&format!("{DISK} -smp 2 -device virtio-blk,drive=d")).disk[0].queues, 2);
}

#[test]
fn disks_that_mini_vmm_has_not_are_named() {
    let device = "-device virtio-blk-pci,drive=d";
    for (said, words) in [
        ("-drive id=d,file=x,format=raw", "-drive d: mini-vmm has no ide disks"),
        (
            "-drive if=none,id=d,file=x,format=qcow2",
            "raw images and block devices only, not 'qcow2'",
        ),
        ("-drive if=none,id=d,file=x", "write format=raw"),
        ("-drive if=none,id=d,file=nbd://host/x,format=raw", "'nbd:' is no file on this host"),
        ("-drive if=none,id=d,format=raw", "it has no file"),
        (
            "-drive if=none,id=d,file=x,format=raw,cache=writethrough",
            "a disk without a write cache",
        ),
        ("-drive if=none,id=d,file=x,format=raw,snapshot=on", "does not have snapshot=on"),
        ("-drive if=none,id=d,file=x,format=raw,media=cdrom", "does not have media=cdrom"),
        ("-drive if=none,id=d,file=x,format=raw,werror=stop", "does not have werror=stop"),
        ("", "there is no -drive with id=d, and no -blockdev with node-name=d"),
        ("-blockdev driver=raw,node-name=d,file=f", "there is no -blockdev f"),
        ("-blockdev driver=raw,node-name=d,file=d", "too far from its file"),
        ("-blockdev driver=raw,node-name=d", "has no file"),
        ("-blockdev driver=file,node-name=d", "names no filename"),
        ("-blockdev driver=qcow2,node-name=d,file.driver=file,file.filename=x", "not 'qcow2'"),
        (
            "-blockdev driver=raw,node-name=d,offset=512,file.driver=file,file.filename=x",
            "'offset'",
        ),
        ("-blockdev driver=file,filename=x", "it has no node-name"),
        ("-blockdev '{x'", "this is no JSON"),
        (r#"-blockdev '{"a":[1]}'"#, "the JSON value of 'a' is neither text, number nor switch"),
    ] {
        let error = refusal(&format!("{BOARD} {said} {device}"));
        assert!(error.contains(words), "{said}: {error}");
    }
    for (said, words) in [
        ("num-queues=0", "num-queues must be a number from 1 to 255"),
        ("num-queues=300", "num-queues must be a number from 1 to 255"),
        ("serial=abc", "the property 'serial' is not known"),
        ("packed=on", "does not have packed=on; start the guest in QEMU with packed=off"),
        ("queue-size=128", "with queue-size=256"),
        ("physical_block_size=4096", "with physical_block_size=512"),
        ("vectors=0", "'vectors'"),
        ("disable-legacy=on,disable-modern=on", "for no driver at all"),
        ("disable-legacy=maybe", "disable-legacy=maybe is no switch"),
    ] {
        let error = refusal(&format!("{BOARD} {DISK} {device},{said}"));
        assert!(error.contains(words), "{said}: {error}");
    }
}

#[test]
fn networks_are_read_and_refused() {
    let net = |said: &str| config(said).net.remove(0);
    let tap = net(&format!(
        "{TAP},vhost=on -device virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc,mq=off"
    ));
    assert_eq!(tap.mac.to_string(), "52:54:00:aa:bb:cc");
    let uri = |said: &str| serde_json::to_value(net(said)).unwrap()["stream"].clone();
    for (said, want) in [
        ("addr.type=unix,addr.path=/a,,b", "unix:/a,b"),
        ("server=off,addr.type=inet,addr.host=::1,addr.port=9", "tcp:[::1]:9"),
    ] {
        assert_eq!(
            uri(&format!("-netdev stream,id=n,{said} -device virtio-net-pci,netdev=n")),
            want
        );
    }
    let json = r#"-netdev '{"type":"stream","id":"n","addr":{"type":"unix","path":"/x"}}'"#;
    assert_eq!(uri(&format!("{json} -device virtio-net,netdev=n")), "unix:/x");

    for (said, words) in [
        ("-netdev tap,id=n", "QEMU would make a tap of its own; write ifname=NAME"),
        (
            "-netdev tap,id=n,fd=3",
            "-netdev tap,id=n: mini-vmm takes no 'fd', since it opens the tap",
        ),
        ("-netdev tap,id=n,ifname=t,queues=2", "does not have queues=2"),
        ("-netdev tap,id=n,ifname=t,vnet_hdr=off", "with vnet_hdr=on"),
        ("-netdev tap,ifname=t", "-netdev tap: it has no id"),
        ("-netdev bridge,id=n,br=b", "it has tap with ifname=, and stream"),
        ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=x", "with server=off"),
        ("-netdev stream,id=n,addr.type=fd,addr.str=x", "write addr.type=unix"),
        ("-netdev stream,id=n,addr.type=unix,addr.path=x,addr.abstract=on", "write addr.type=unix"),
        ("-netdev tap,id=m,ifname=t", "there is no -netdev with id=n"),
    ] {
        let error = refusal(&format!("{BOARD} {said} -device virtio-net-pci,netdev=n"));
        assert!(error.contains(words), "{said}: {error}");
    }
    for (said, words) in [
        ("netdev=n,mq=on,vectors=10", "does not have mq=on"),
        ("netdev=n,mac=zz", "a unicast MAC address"),
        ("mac=52:54:00:12:34:56", "it has no netdev="),
        ("netdev=n,host_mtu=1400", "with host_mtu=0"),
    ] {
        let error = refusal(&format!("{BOARD} {TAP} -device virtio-net-pci,{said}"));
        assert!(error.contains(words), "{said}: {error}");
    }
}

#[test]
fn virtio_names_say_which_drivers_they_are_for() {
    for (said, want) in [
        ("virtio-rng-pci", VirtioVersion::Transitional),
        ("virtio-rng-pci,disable-legacy=auto", VirtioVersion::Transitional),
        ("virtio-rng-pci-transitional", VirtioVersion::Transitional),
        ("virtio-rng-pci-non-transitional", VirtioVersion::Modern),
        ("virtio-rng,disable-legacy=on", VirtioVersion::Modern),
        ("virtio-rng-pci,disable-legacy=off,disable-modern=on", VirtioVersion::Legacy),
    ] {
        assert_eq!(config(&format!("-device {said}")).rng.unwrap().virtio, want, "{said}");
    }
}

#[test]
fn consoles_and_serial_ports_lead_where_qemus_do() {
    let serial = |said: &str| {
        let line = format!("{} {said}", BOARD.replace("-serial null", ""));
        Like::from_line(&line).unwrap_or_else(|e| panic!("{said}: {e}"))
    };
    for (said, want) in [
        ("-serial stdio", CharBackend::Stdio),
        ("-serial mon:stdio", CharBackend::Stdio),
        ("-serial pty", CharBackend::Pty),
        ("-serial file:/a,b=c d", CharBackend::File("/a,b=c".into())),
        ("-serial unix:/a,,b,server,nowait", CharBackend::Unix("/a,b".into())),
        (
            "-serial chardev:c -chardev socket,id=c,path=/s,server=on,wait=off",
            CharBackend::Unix("/s".into()),
        ),
        ("-serial chardev:c -chardev file,id=c,path=/f,append=on", CharBackend::File("/f".into())),
        // Where mini-vmm can't go, the guest has a port all the same.
        ("-serial tcp:localhost:1", CharBackend::Null),
        ("-serial unix:/a", CharBackend::Null),
        ("-serial chardev:c -chardev vc,id=c", CharBackend::Null),
    ] {
        let said = said.trim_end_matches(" d");
        let read = serial(said);
        assert_eq!(read.settings.serial, Some(want.clone()), "{said}");
        let told = read.notes.iter().any(|note| note.contains("say with --serial where it goes"));
        assert_eq!(told, want == CharBackend::Null, "{said}: {:?}", read.notes);
    }

    let console = config(
        "-chardev pty,id=c -device virtio-serial-pci,max_ports=31,addr=9 -device virtconsole,chardev=c",
    );
    let console = console.console.unwrap();
    assert_eq!((console.backend, console.addr.number()), (CharBackend::Pty, 9));
    for (said, words) in [
        ("-device virtio-serial-pci", "start the guest in QEMU with one -device virtconsole"),
        ("-device virtconsole,chardev=c", "there is no virtio-serial-pci before it"),
        (
            "-device virtio-serial-pci -device virtconsole,chardev=x",
            "there is no -chardev with id=x",
        ),
        ("-device virtio-serial-pci -device virtconsole,chardev=c,nr=1", "does not have nr=1"),
        ("-device virtio-serial-pci,max_ports=4 -device virtconsole,chardev=c", "max_ports=31"),
        (
            "-device virtio-serial-pci,id=v -device virtconsole,chardev=c,bus=w.0",
            "there is no bus w.0",
        ),
        ("-device virtio-rng-pci -device virtio-rng-pci", "one virtio-rng device at most"),
        (
            "-device e1000,id=x",
            "-device e1000,id=x: mini-vmm has no such device; start the guest in QEMU with virtio-net-pci instead",
        ),
        ("-device ide-hd", "with virtio-blk-pci instead"),
        ("-device vhost-vsock-pci,guest-cid=3", "outside the VM and can't be moved"),
        ("-device VGA", "mini-vmm has virtio-blk-pci, virtio-net-pci"),
        ("-device virtio-balloon-pci,free-page-reporting=on", "with free-page-reporting=off"),
    ] {
        let error = refusal(&format!("{BOARD} -chardev null,id=c {said}"));
        assert!(error.contains(words), "{said}: {error}");
    }
}
