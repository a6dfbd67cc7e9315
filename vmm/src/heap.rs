//! How this process' heap grows.
//!
//! While a guest stands still, devices' states are written and read, some megabytes of small pieces. By
//! default glibc gives each thread a heap of its own, which grows by a page at a time and asks the kernel each
//! time (malloc(3), mallopt(3)): with sixteen disks that was a quarter of the pause.

/// By how much the heap grows at least, in bytes.
const STEP: libc::c_int = 1 << 20;
/// What is larger is mapped by itself, in bytes: more than a device's state. Once one of these numbers is set,
/// glibc adapts none of them any more, and would leave this one at 128 KiB.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 4 << 20;
/// So much may be free at the heap's end before it is given back, in bytes.
const SPARE: libc::c_int = 2 << 20;

/// Has all threads share one heap that grows in large steps. Called before any thread is started; where it
/// can't be had, everything works as well, and slower.
pub fn share() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TOP_PAD, STEP),
        (libc::M_MMAP_THRESHOLD, LARGE),
        (libc::M_TRIM_THRESHOLD, SPARE),
    ] {
        // SAFETY: sets a number that the allocator looks at when it grows; nothing that is allocated changes.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            tracing::debug!(parameter, value, "the heap grows as it likes");
        }
    }
}

/// Bytes that a device's state takes on either side, about: a virtio device's has 46 KiB, for QEMU's layout
/// has room for 1024 queues.
const STATE: usize = 64 << 10;

/// Touches what the states of so many devices will take, before the guest stands still for it: a page that is new
/// costs more than to fill it. It is free again at once, and stays with this process where the allocator is glibc's.
pub fn warm(devices: usize) {
    // The heap grows by so much, and a step; no more than `SPARE` of that is kept when it is free.
    let most = (SPARE - STEP - (STEP >> 4)) as usize;
    let bytes = devices.saturating_mul(STATE).saturating_add(4 * STATE).min(most);
    drop(std::hint::black_box(vec![1_u8; bytes]));
}

/// Gives back what is free everywhere in the heap: after a migration most of what it took.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}
