//! Guest memory as devices see it.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory in which every write by a device is marked in an atomic bitmap (4 KiB pages), so
/// that no write path can forget to tell the migration.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// A shared handle to it.
pub type GuestRamRef = Arc<GuestRam>;
