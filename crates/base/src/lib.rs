//! What every other crate builds on: errors, names, limits, durable writes and small helpers.
//!
//! Owns no state of its own. All other crates call it; it calls none of them. What survives a crash
//! is said by [`durable`], the only module that replaces files.

pub mod admission;
pub mod blocking;
pub mod budget;
pub mod buffers;
pub mod clock;
pub mod congestion;
pub mod durable;
pub mod expiring_cache;
pub mod fault;
pub mod job_progress;
pub mod limits;
pub mod names;
pub mod number;
pub mod omitted;
pub mod open_files;
pub mod private;
pub mod secrets;
pub mod sha256;
pub mod space;
pub mod tally;
pub mod text;
