//! The domain without I/O: transfers, training runs and their state machines, receipts.
//!
//! Owns the words for states, the rules of what follows on what, and the limits of lists. Hub and
//! site call it; the catalogue stores what it returns. Nothing here reads a clock, a disk or a
//! socket, so nothing has to survive a crash.

pub mod actor;
pub mod desired;
pub mod grant;
pub mod paging;
pub mod policy;
pub mod protocol;
pub mod publisher_scope;
pub mod receipt;
pub mod run;
pub mod transfer;
