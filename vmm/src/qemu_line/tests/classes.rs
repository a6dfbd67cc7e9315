//! What is honoured, what is left out, and what matters: the options about the whole machine.

use super::*;

#[test]
fn the_board_is_read_in_all_its_forms() {
    let size = |text: &str| config(text).memory.to_string();
    assert_eq!(size(""), "128M");
    for (said, want) in [
        ("-m 512", "512M"),
        ("-m 2G", "2G"),
        ("-m size=2G", "2G"),
        ("-m size=2048", "2G"),
        ("-m 1.5G", "1536M"),
        ("-m 1048576k,slots=0", "1G"),
        ("-m 512 -m 1G", "1G"),
        ("-m 512 -machine usb=on -machine usb=off", "512M"),
        ("-m 1G,maxmem=1024", "1G"),
    ] {
        assert_eq!(size(said), want, "{said}");
    }
    for (said, want) in [
        ("", 1),
        ("-smp 2", 2),
        ("-smp cpus=3", 3),
        ("-smp 4,sockets=1,cores=4,threads=1,dies=1,maxcpus=4", 4),
        ("-smp cores=5", 5),
    ] {
        assert_eq!(config(said).smp, want, "{said}");
    }
    let all = config(
        "-name guest=web,debug-threads=on -uuid 12345678-1234-5678-1234-567812345678 -S \
         -incoming tcp:0.0.0.0:7000 -kernel k -initrd i -bios /b.bin -qmp unix:/q,,1.sock,server=on,wait=off",
    );
    let want = from_toml(
        "name = 'web'\nuuid = '12345678-1234-5678-1234-567812345678'\npaused = true\nserial = 'null'\n\
         migrate-listen = 'tcp:0.0.0.0:7000'\nkernel = 'k'\ninitrd = 'i'\nappend = ''\nmemory = '128M'\n\
         firmware = '/b.bin'\nqmp = 'unix:/q,1.sock'",
    );
    assert_eq!(all, want);
}

#[test]
fn other_ways_to_say_the_same() {
    for line in [
        "qemu-system-x86_64 -M pc-i440fx-7.2,vmport=off -no-hpet -enable-kvm -cpu host -nodefaults -serial null",
        "/usr/bin/kvm --machine type=pc-i440fx-7.2,hpet=no,vmport=no,usb=no -cpu host -nodefaults -serial null",
        "-machine pc-i440fx-7.2,accel=kvm:tcg,hpet=off,vmport=off,kernel-irqchip=on -cpu host \\\n -nodefaults -serial null",
        "-machine pc-i440fx-7.2 -machine vmport=off,hpet=off,accel=kvm -cpu model=host,migratable=on \
         -nodefaults -serial none -serial null -vga none -parallel none -net none -rtc base=utc -no-user-config"
            .replace("-serial none ", "").as_str(),
    ] {
        let read = Like::from_line(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        let want = like("").settings;
        assert_eq!(Settings { firmware: None, ..read.settings }, want, "{line}");
    }
}

#[test]
fn what_the_guest_does_not_see_is_told() {
    for (said, words) in [
        ("-display none", "-display none: the guest does not see it"),
        ("-nographic", "-nographic: "),
        ("-monitor stdio", "-monitor stdio: "),
        ("-pidfile /run/x", "-pidfile /run/x: "),
        ("-daemonize", "-daemonize: "),
        ("-no-reboot", "-no-reboot: a guest that reboots is started again here"),
        ("-boot order=c,menu=on", "-boot order=c,menu=on: the firmware here boots the first disk"),
        ("-netdev tap,id=n,ifname=t", "-netdev n: no device uses it"),
        ("-drive if=none,id=d,file=x,format=raw", "-drive or -blockdev d: no device uses it"),
        ("-name 'two words'", "say another with --name"),
        ("-name web,process=x", "the guest does not see process"),
        ("-incoming rdma:host:1", "say with --migrate-listen"),
        ("-qmp tcp:localhost:4444,server=on,wait=off", "control socket"),
        ("-qmp unix:/a,server=on,wait=off -qmp unix:/b,server=on,wait=off", "-qmp unix:/b"),
        ("-qmp unix:/a,server", "does not wait for the first connection"),
        ("-chardev vc,id=m -mon chardev=m", "monitor is left out"),
        ("-object iothread,id=t", "-object iothread,id=t: "),
        ("-accel tcg", "mini-vmm has KVM only"),
    ] {
        let notes = like(said).notes.join("\n");
        assert!(notes.contains(words), "{said}: {notes}");
    }
    assert_eq!(like("-machine graphics=off").notes, [] as [&str; 0]);
}

#[test]
fn a_dirty_ring_is_taken_where_one_can_be_had() {
    let ring = |said: &str| {
        let line = BOARD.replace("-accel kvm", &format!("-accel kvm,dirty-ring-size={said}"));
        let like = Like::from_line(&line).unwrap_or_else(|e| panic!("{said}: {e}"));
        (like.settings.dirty_ring, like.notes.join("\n"))
    };
    assert_eq!(ring("4096"), (Some(4096), String::new()));
    assert_eq!(ring("0"), (None, String::new()));
    for said in ["512", "131072", "5000", "many"] {
        let (entries, notes) = ring(said);
        assert_eq!(entries, None, "{said}");
        assert!(
            notes.contains(&format!("dirty-ring-size={said}: a dirty ring has 1024 to")),
            "{notes}"
        );
    }
}

#[test]
fn what_matters_is_named_with_what_to_do() {
    for (said, words) in [
        (
            "-machine hpet=on",
            "-machine: QEMU's board has an HPET and mini-vmm's has not; start the guest in QEMU with hpet=off",
        ),
        ("-machine vmport=auto", "VMware's port"),
        (
            "-machine usb=on",
            "-machine: mini-vmm does not have usb=on; start the guest in QEMU with usb=off",
        ),
        ("-machine kernel-irqchip=split", "with kernel-irqchip=on"),
        ("-machine smbuss=on", "did you mean 'smbus'?"),
        ("-machine q35", "-machine q35: mini-vmm has no such board, only pc-i440fx-7.2"),
        ("-machine pc", "what 'pc' is changes with each QEMU"),
        ("-cpu qemu64", "-cpu qemu64: mini-vmm has not this model; start the guest with -cpu host"),
        ("-cpu host,+invtsc", "the property '+invtsc' is not known"),
        ("-m 2G,slots=2,maxmem=4G", "adds no memory while the guest runs"),
        ("-m 512MB", "-m 512MB: this is no size"),
        ("-m nonsense", "this is no size"),
        ("-smp 2,sockets=2", "-smp: mini-vmm does not have sockets=2"),
        ("-smp 4,cores=2,threads=2", "cores of one socket"),
        ("-smp 2,maxcpus=4", "adds no vCPUs"),
        ("-smp 0", "cpus=0 is no number"),
        ("-uuid x", "-uuid x: this is no UUID"),
        ("-rtc base=localtime", "-rtc: mini-vmm does not have base=localtime"),
        ("-vga std", "-vga std: mini-vmm has no display"),
        ("-parallel null", "no parallel port"),
        ("-nic user", "-nic user: write -netdev tap"),
        ("-smbios type=1", "-smbios type=1: the guest would see other tables"),
        ("-acpitable file=x", "other tables"),
        ("-usb", "-usb: mini-vmm has no such device"),
        ("-hda x.img", "-hda x.img: it is not a virtio disk"),
        ("-snapshot", "writes to the image itself"),
        ("-global PIIX4_PM.disable_s3=1", "it changes devices unseen"),
        ("-numa node", "one memory node"),
        ("-readconfig x", "can change any part of the machine"),
        ("-object memory-backend-memfd,id=pc.ram,size=1G", "another name in a migration"),
        ("-object can-bus,id=c", "-object can-bus,id=c: mini-vmm has no such object"),
        ("-machne x", "-machne: this option is not known to mini-vmm (did you mean '-machine'?)"),
        ("-xyzzy plugh", "-xyzzy: this option is not known to mini-vmm; start the guest"),
        ("-serial null", "-serial null: mini-vmm has one serial port"),
        ("disk.img", "'disk.img': a word that belongs to no option"),
        ("-append", "-append: its value is missing"),
        ("-chardev null,id=c -chardev pty,id=c", "-chardev c: there is another one of that id"),
        (
            "-blockdev file,node-name=d,filename=x -blockdev file,node-name=d,filename=y",
            "another one",
        ),
        ("> log", "if a shell was to see it"),
    ] {
        let error = refusal(&format!("{BOARD} {said}"));
        assert!(error.contains(words), "{said}: {error}");
        assert!(error.starts_with("--like: a VM of mini-vmm can't be like this QEMU's"), "{error}");
    }
}

#[test]
fn what_a_bare_line_leaves_to_qemu_matters_too() {
    let error = refusal("qemu-system-x86_64");
    for words in [
        "-nodefaults is missing",
        "-accel is missing",
        "-machine is missing",
        "hpet=off",
        "vmport=off",
        "-cpu is missing",
        "-serial is missing",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
    assert_eq!(error.lines().count(), 8, "all at once, one in each line: {error}");
}

#[test]
fn what_is_no_command_line_is_said() {
    for (line, words) in [
        ("qemu-system-x86_64 -name 'x", "a quote in it is not closed"),
        ("sudo qemu-system-x86_64", "begins with 'sudo', which is not qemu-system-x86_64"),
        ("qemu-system-aarch64 -m 1", "begins with 'qemu-system-aarch64'"),
    ] {
        let error = refusal(line);
        assert!(error.contains(words), "{line}: {error}");
    }
}

/// Whatever it is, the answer is settings or words.
#[test]
fn no_line_breaks_the_reader() {
    let full = format!(
        "{BOARD} -m 1G -smp 2,cores=2 -drive if=none,id=d,file=a,,b,format=raw -blockdev \
         driver=raw,node-name=n,file.file.file.file.file.file.driver=raw -device \
         '{{\"driver\":\"virtio-blk-pci\",\"drive\":\"d\",\"addr\":24}}' -netdev \
         stream,id=s,addr.type=inet,addr.host=::1,addr.port=99999 -chardev socket,id=c,path=/x,server \
         -serial mon:unix:/y,nowait -device virtio-serial,id=v -device virtconsole,bus=v.0,chardev=c"
    );
    for (cut, _) in full.char_indices() {
        let _ = Like::from_line(&full[..cut]);
        let _ = Like::from_line(&full[cut..]);
        let _ = Like::from_line(&full.replacen(&full[cut..=cut], "", 1));
    }
    let deep = format!("-device '{}1{}'", "{\"a\":".repeat(5000), "}".repeat(5000));
    let many = format!("{BOARD} {}", "-device virtio-rng-pci ".repeat(300));
    for (line, words) in [(deep, "this is no JSON"), (many, "no PCI slot is left for it")] {
        assert!(refusal(&line).contains(words), "{words}");
    }
}

/// Lines as a test bench has them: each is understood, and each reason is one of the table.
#[test]
fn the_lines_of_a_test_bench() {
    let board = "qemu-system-x86_64 -M pc-i440fx-7.2,usb=off,hpet=off,vmport=off,graphics=off -nodefaults \
                 -no-user-config -m 96 -display none -serial file:serial.log \
                 -qmp unix:qmp.sock,server=on,wait=off";
    let full = format!(
        "{board} -accel kvm -cpu host -smp 2 -kernel vmlinuz -initrd initrd.gz \
         -append 'console=ttyS0 panic=-1 act=1 quiet' -netdev tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=off \
         -device virtio-net-pci,netdev=n0,romfile= -blockdev driver=file,filename=disk.img,node-name=f0 \
         -blockdev driver=raw,file=f0,node-name=d0 -device virtio-blk-pci,drive=d0 -device virtio-rng-pci \
         -device virtio-balloon-pci -device virtio-serial-pci,id=vs0 -chardev null,id=c0 \
         -device virtconsole,chardev=c0,bus=vs0.0,nr=0"
    );
    let want = from_toml(
        "memory = '96M'\nsmp = 2\nkernel = 'vmlinuz'\ninitrd = 'initrd.gz'\nserial = 'file:serial.log'\n\
         qmp = 'unix:qmp.sock'\nappend = 'console=ttyS0 panic=-1 act=1 quiet'\n\
         net = [{ tap = 'tap0', addr = '2' }]\ndisk = [{ path = 'disk.img', addr = '3' }]\n\
         rng = { addr = '4' }\nballoon = { addr = '5' }\n\
         console = { backend = 'null', id = 'vs0', addr = '6' }",
    );
    assert_eq!(Config::resolve(Like::from_line(&full).unwrap().settings).unwrap(), want);

    for (options, reasons) in [
        (
            "-accel tcg -smp 1",
            &["-accel tcg: mini-vmm runs guests under KVM only", "-cpu is missing"][..],
        ),
        ("-accel kvm -smp 1", &["-cpu is missing"]),
        (
            "-accel kvm -cpu host -netdev user,id=n0 -device virtio-net-pci,netdev=n0",
            &[
                "-netdev user,id=n0: mini-vmm has no such network",
                "there is no -netdev with id=n0 that",
            ],
        ),
        (
            "-accel kvm -cpu host -device virtio-serial-pci,id=vs0 -chardev null,id=c0 -chardev null,id=c1 \
             -device virtconsole,chardev=c0,bus=vs0.0,nr=0 \
             -device virtserialport,chardev=c1,bus=vs0.0,nr=1,name=org.test.0",
            &["-device virtserialport: mini-vmm has no such device"],
        ),
    ] {
        let error = refusal(&format!("{board} {options}"));
        for reason in reasons {
            assert!(error.contains(reason), "{options}: {error}");
        }
        // A heading stands above several, and in the line of a single one.
        let lines = error.lines().count() - usize::from(reasons.len() > 1);
        assert_eq!(lines, reasons.len(), "{options}: {error}");
    }
}
