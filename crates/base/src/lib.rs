//! The foundation of all other crates: errors, names, limits, durable writes and small helpers.
//!
//! This crate owns no state. All other crates call it; it calls none of them. [`durable`], the only
//! module that replaces files, states what survives a crash.

pub mod admission;
pub mod blocking;
pub mod budget;
pub mod buffers;
pub mod cgroup;
pub mod clock;
pub mod congestion;
pub mod durable;
pub mod expiring_cache;
pub mod fault;
pub mod job_progress;
pub mod limits;
pub mod list;
pub mod locks;
pub mod mounts;
pub mod names;
pub mod number;
pub mod omitted;
pub mod open_files;
pub mod peer;
pub mod platform;
pub mod private;
pub mod rate_limiter;
pub mod secrets;
pub mod sha256;
pub mod space;
pub mod spans;
pub mod tally;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod threads;
pub mod workers;
