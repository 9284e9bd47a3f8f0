//! How bytes move between hub and site: fetching, transfers, the relay, publishing in place, and
//! the messages between the two.
//!
//! Owns a site's chunk index and transfer journals (`chunk_index`), and the relay's cache. The
//! daemons call it. A crash loses at most what was not yet committed: a transfer resumes from its
//! journal, and everything else is requested again.

pub mod chunk_index;
pub mod fetch;
pub mod in_place;
pub mod relay;
pub mod transfer;
pub mod wire;
