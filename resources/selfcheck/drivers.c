/*
 * Virtio-blk disks taken into use as a driver does that wants messages (MSI-X) and never asks for
 * anything: a host has as much to move for each as for one that is at work. By the legacy registers
 * (virtio 1.2, 4.1.4.8). The disks share their rings, in which there is no request.
 */
#include "selfcheck.h"

#define MSIX 0x11 /* PCI 3.0, 6.8.2 */
#define MSIX_ENABLE (1u << 31)
#define CAPABILITIES 0x34
#define ENTRY_DWORDS 4
#define LAPIC 0xfee00000u

#define RING_ENTRIES 256

/* Descriptors, available ring, and the used ring on a page of its own. */
static u8 rings[3 * PAGE] __attribute__((aligned(4096)));

/* Where the capability is; 0: there is none. */
static u32 capability(u32 slot, u32 id)
{
    u32 at = pci_read(slot, CAPABILITIES) & 0xfc;
    while (at) {
        u32 header = pci_read(slot, at);
        if ((header & 0xff) == id)
            break;
        at = header >> 8 & 0xfc;
    }
    return at;
}

static void drive(u32 slot)
{
    u32 msix = capability(slot, MSIX);
    if (!msix)
        fail("slot=%u has a disk without MSI-X", (u64)slot);
    pci_write(slot, PCI_COMMAND, pci_read(slot, PCI_COMMAND) | PCI_IO_MEMORY_MASTER);
    u16 ports = pci_read(slot, PCI_BAR0) & 0xfffc;
    u32 table = pci_read(slot, msix + 4);
    u64 base = pci_read(slot, PCI_BAR0 + 4 * (table & 7)) & ~15u;
    volatile u32 *entry = (volatile u32 *)(base + (table & ~7u));
    for (u32 vector = 0; vector < 2; vector++, entry += ENTRY_DWORDS) {
        entry[0] = LAPIC;
        entry[1] = 0;
        entry[2] = VECTOR_DEVICE;
        entry[3] = 0;
    }
    pci_write(slot, msix, pci_read(slot, msix) | MSIX_ENABLE);
    out8(ports + VIRTIO_STATUS, 0);
    out8(ports + VIRTIO_STATUS, VIRTIO_HAS_DRIVER);
    out32(ports + VIRTIO_GUEST_FEATURES, 0);
    out16(ports + VIRTIO_CONFIG_VECTOR, 0);
    out16(ports + VIRTIO_QUEUE_SELECT, 0);
    u16 entries = in16(ports + VIRTIO_QUEUE_SIZE);
    if (!entries || entries > RING_ENTRIES)
        fail("disk queue size=%u", (u64)entries);
    out32(ports + VIRTIO_QUEUE_PAGE, (u64)rings / PAGE);
    out16(ports + VIRTIO_QUEUE_VECTOR, 1);
    if (in16(ports + VIRTIO_QUEUE_VECTOR) != 1)
        fail("slot=%u has a disk that does not take its vector", (u64)slot);
    out8(ports + VIRTIO_STATUS, VIRTIO_DRIVER_OK);
}

/* Gives how many there are, without the first one if that is the log's. */
u64 drivers_init(void)
{
    u64 found = 0, others = params.disk ? 1 : 0;
    for (u32 slot = 0; params.drive && slot < 32; slot++) {
        if (pci_read(slot, 0) != VIRTIO_BLK || found++ < others)
            continue;
        drive(slot);
    }
    return found > others ? found - others : 0;
}
