//! Every bound on what a peer may send. A number beyond its bound is refused before anything is
//! allocated for it.

/// Longest machine type name, in bytes. QEMU's longest is below 40.
pub const MAX_MACHINE_NAME: u32 = 255;
/// Most capabilities that a configuration section may list; QEMU 7.2 sends one at most.
pub const MAX_CAPABILITIES: u32 = 32;
/// Most RAM blocks that a source may announce. A QEMU has seven, and one for each option ROM.
pub const MAX_RAM_BLOCKS: usize = 64;
/// Longest payload of one of our own JSON messages, in bytes. The digests of 1 TiB of RAM in
/// chunks of 4 MiB are 256 Ki numbers of up to 21 characters.
pub const MAX_JSON: u32 = 8 << 20;
/// Longest description of the device sections, in bytes; QEMU's own is below 0.5 MiB. It is
/// skipped, not stored.
pub const MAX_DESCRIPTION: u32 = 64 << 20;
/// Longest description that is kept and read, in bytes: the one of a saved VM. The digests of 1 TiB
/// of RAM are 21 MiB of it, a vCPU is below 0.1 MiB.
pub const MAX_SAVED_DESCRIPTION: u32 = 32 << 20;
/// Longest payload of a command or a return-path message whose length is a `u16`, in bytes.
pub const MAX_SHORT_PAYLOAD: u16 = 4096;
/// Most problems that a destination lists in one verdict.
pub const MAX_PROBLEMS: usize = 64;
/// Longest reason that is taken from or given to a peer, in bytes of UTF-8.
pub const MAX_REASON: usize = 4096;
/// Most bytes that are read and thrown away so that a peer can see why the connection closes.
pub const MAX_LINGER: u64 = 256 << 20;
/// Largest body of one device section, in bytes. QEMU's largest, a virtio device with a full list
/// of unfinished requests, is far below.
pub const MAX_SECTION_BODY: u64 = 64 << 20;
/// Most scraps of RAM in a rehearsal: one for each virtqueue that there can be.
pub const MAX_SCRAPS: usize = 4096;
/// Most bytes in one probe, which are read and thrown away.
pub const MAX_PROBE: u32 = 1 << 20;
/// Most bytes of probes on one connection.
pub const MAX_PROBES: u64 = 256 << 20;
