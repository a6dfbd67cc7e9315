//! Feature bits that are not of one device type (virtio 1.2, 6).

/// Legacy: an interrupt whenever the available ring runs empty.
pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
/// Legacy: descriptors may be laid out in any way.
pub const ANY_LAYOUT: u64 = 1 << 27;
/// Descriptors may point to tables of descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say at which index they want to be told.
pub const EVENT_IDX: u64 = 1 << 29;
/// Legacy: a driver that accepts this bit has not looked at what it accepts.
pub const BAD_FEATURE: u64 = 1 << 30;
/// The driver is not a legacy one.
pub const VERSION_1: u64 = 1 << 32;
/// Queues can be reset one by one.
pub const RING_RESET: u64 = 1 << 40;

/// What every device of the board offers to every driver.
pub const COMMON: u64 =
    NOTIFY_ON_EMPTY | ANY_LAYOUT | INDIRECT_DESC | EVENT_IDX | BAD_FEATURE | RING_RESET;
/// What of it a modern driver is not shown.
pub const LEGACY_ONLY: u64 = NOTIFY_ON_EMPTY | ANY_LAYOUT | BAD_FEATURE;
