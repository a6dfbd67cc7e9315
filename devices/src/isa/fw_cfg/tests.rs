use std::sync::Arc;

use migration::vmstate::{Audience, Migratable};

use super::state::*;
use super::*;
use crate::memory::GuestRam;

const RAM_SIZE: u64 = 0x10_0000;

fn device() -> FwCfg {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap();
    let mut device = FwCfg::new(Arc::new(ram), [0x77; 16], RAM_SIZE, 2, 4);
    device.add_file("opt/second", b"2nd".to_vec()).unwrap();
    device.add_file("etc/first", vec![0xa5; 300]).unwrap();
    device
}

fn select(device: &mut FwCfg, item: u16) {
    device.pio_write(PioAddress(BASE_PORT), SELECTOR, &item.to_le_bytes());
}

fn read(device: &mut FwCfg, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    for byte in &mut bytes {
        device.pio_read(PioAddress(BASE_PORT), DATA, std::slice::from_mut(byte));
    }
    bytes
}

/// Puts a descriptor at 0x1000, rings, and returns the control word that is there then.
fn dma(device: &mut FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let at = GuestAddress(0x1000);
    let raw = (u128::from(control) << 96) | (u128::from(length) << 64) | u128::from(address);
    device.ram.write_slice(&raw.to_be_bytes(), at).unwrap();
    device.pio_write(PioAddress(BASE_PORT), DMA_HIGH, &[0; 4]);
    device.pio_write(PioAddress(BASE_PORT), DMA_LOW, &0x1000u32.to_be_bytes());
    let mut answer = [0; 4];
    device.ram.read_slice(&mut answer, at).unwrap();
    u32::from_be_bytes(answer)
}

fn memory(device: &FwCfg, at: u64, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    device.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn tells_who_it_is_and_how_large_the_machine_is() {
    let mut device = device();
    for (item, expected) in [
        (0x00, b"QEMU\0\0".to_vec()),
        (0x01, vec![3, 0, 0, 0]),
        (0x02, vec![0x77; 16]),
        (0x03, vec![0, 0, 0x10, 0, 0, 0, 0, 0]),
        (0x04, vec![1, 0]),
        // ACPI tables and SMBIOS entries as old boards had them: none.
        (0x8000, vec![0, 0]),
        (0x8001, vec![0, 0]),
        (0x4000, b"QEMU".to_vec()),
        (0x05, vec![2, 0]),
        (0x0f, vec![4, 0]),
        (0x77, vec![0, 0]),
    ] {
        select(&mut device, item);
        assert_eq!(read(&mut device, expected.len()), expected, "item {item:#x}");
    }
    let mut signature = [0; 8];
    device.pio_read(PioAddress(BASE_PORT), DMA_HIGH, &mut signature);
    assert_eq!(&signature, b"QEMU CFG");
}

#[test]
fn lists_its_files_by_name() {
    let mut device = device();
    select(&mut device, 0x19);
    let directory = read(&mut device, 4 + 2 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 2]);
    assert_eq!(directory[4..12], [0, 0, 1, 44, 0, 0x20, 0, 0]);
    assert_eq!(directory[12..22], *b"etc/first\0");
    assert_eq!(directory[68..76], [0, 0, 0, 3, 0, 0x21, 0, 0]);
    select(&mut device, 0x21);
    assert_eq!(read(&mut device, 5), b"2nd\0\0");
}

#[test]
fn refuses_files_it_cannot_list() {
    let mut device = device();
    assert!(matches!(device.add_file("etc/first", vec![]), Err(FileError::Duplicate(_))));
    assert!(matches!(device.add_file(&"x".repeat(56), vec![]), Err(FileError::Name(_))));
    assert!(matches!(device.add_file("", vec![]), Err(FileError::Name(_))));
    for n in 2..MAX_FILES {
        device.add_file(&format!("f{n}"), vec![]).unwrap();
    }
    assert!(matches!(device.add_file("one more", vec![]), Err(FileError::Full(_))));
}

#[test]
fn dma_selects_reads_skips_and_fills_with_zeros() {
    let mut device = device();
    device.ram.write_slice(&[0xff; 16], GuestAddress(0x2000)).unwrap();
    assert_eq!(dma(&mut device, (0x21 << 16) | dma::SELECT | dma::READ, 8, 0x2000), 0);
    assert_eq!(memory(&device, 0x2000, 9), b"2nd\0\0\0\0\0\xff");
    assert_eq!(dma(&mut device, (0x21 << 16) | dma::SELECT | dma::SKIP, 1, 0), 0);
    assert_eq!(dma(&mut device, dma::READ, 2, 0x2100), 0);
    assert_eq!(memory(&device, 0x2100, 2), b"nd");
}

#[test]
fn dma_goes_nowhere_but_into_ram() {
    let mut device = device();
    let read_first = (0x20 << 16) | dma::SELECT | dma::READ;
    for address in [RAM_SIZE - 10, RAM_SIZE, u64::MAX, u64::MAX - 3] {
        assert_eq!(dma(&mut device, read_first, 300, address), dma::ERROR, "{address:#x}");
    }
    assert_eq!(dma(&mut device, read_first, u32::MAX, 0x2000), dma::ERROR);
    assert_eq!(dma(&mut device, (0x20 << 16) | dma::SELECT | dma::WRITE, 1, 0x2000), dma::ERROR);
    // A descriptor outside of RAM is nobody's.
    device.pio_write(PioAddress(BASE_PORT), DMA_HIGH, &[0xff; 8]);
    assert_eq!(dma(&mut device, 0, 0, 0), 0);
}

#[test]
fn odd_accesses_do_no_harm() {
    let mut device = device();
    for offset in 0..12 {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xee; len];
            device.pio_write(PioAddress(BASE_PORT), offset, &data);
            device.pio_read(PioAddress(BASE_PORT), offset, &mut data);
        }
    }
}

#[test]
fn state_travels_whole() {
    let sent = FwCfgState {
        cur_entry: 0x20,
        cur_offset: 298,
        subsections: Subsections {
            dma: Some(Dma { dma_addr: 0x1122_3344_5566_7788 }),
            acpi_mr: Some(AcpiSizes { table_mr_size: 1, linker_mr_size: 2, rsdp_mr_size: 3 }),
        },
    };
    let mut device = device();
    device.check(&sent).unwrap();
    device.restore(sent.clone()).unwrap();
    assert_eq!(device.save(Audience::Qemu).unwrap(), sent);
    assert_eq!(read(&mut device, 4), [0xa5, 0xa5, 0, 0]);

    let mut bad = sent;
    bad.subsections.acpi_mr.as_mut().unwrap().linker_mr_size = u64::MAX;
    assert_eq!(device.check(&bad).unwrap_err().field, "linker_mr_size");
}

#[test]
fn its_dma_register_answers_where_a_guest_looks_for_it() {
    use crate::bus::IoBus;
    let device = Arc::new(std::sync::Mutex::new(device()));
    let bus = IoBus::new();
    for (base, len) in PORTS {
        bus.map_pio(base, len, device.clone()).unwrap();
    }
    let mut signature = [0; 8];
    bus.pio_read(0x514, &mut signature[..4]);
    bus.pio_read(0x518, &mut signature[4..]);
    assert_eq!(&signature, b"QEMU CFG");
    // Select the RAM size, and read it to 0x2000. A firmware may leave the high half alone.
    let control = 3 << 16 | dma::SELECT | dma::READ;
    let raw = (u128::from(control) << 96) | (8 << 64) | 0x2000;
    let ram = device.lock().unwrap().ram.clone();
    ram.write_slice(&raw.to_be_bytes(), GuestAddress(0x1000)).unwrap();
    bus.pio_write(0x518, &0x1000u32.to_be_bytes());
    assert_eq!(ram.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), RAM_SIZE);
}

#[test]
fn files_are_replaced_all_at_once() {
    let mut device = device();
    let files = [("etc/b", b"B".to_vec()), ("etc/a", b"AA".to_vec())];
    device.replace_files(files.map(|(name, bytes)| (name.to_string(), bytes))).unwrap();
    select(&mut device, 0x19);
    let directory = read(&mut device, 4 + 3 * 64);
    assert_eq!((&directory[..4], &directory[4..8]), (&[0, 0, 0, 2][..], &[0, 0, 0, 2][..]));
    assert!(directory[12..].starts_with(b"etc/a\0") && directory[76..].starts_with(b"etc/b\0"));
    assert!(directory[132..].iter().all(|byte| *byte == 0));
    select(&mut device, 0x21);
    assert_eq!(read(&mut device, 2), b"B\0");
    device.replace_files([]).unwrap();
    select(&mut device, 0x20);
    assert_eq!(read(&mut device, 2), [0, 0]);
}
