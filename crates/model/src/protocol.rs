//! The protocol between a hub, its sites and publishers: the messages, what each must not exceed,
//! and their bytes.
//!
//! Owns the types of the messages; `exchange::wire` reads and writes them on streams, hub and site
//! act on them. A message is parsed whole, into types that cannot hold an invalid value, before
//! anything of it is used. Nothing here survives a crash, nor has to.
//!
//! # Streams
//! Every stream begins with one byte that says its kind:
//!
//! ```text
//! 'C'  control, opened by the site, one for each connection (a second one ends the first): messages in both directions,
//!      each behind its u32 LE length: JSON, `FromSite` and `FromHub`
//! 'F'  fetch, opened by the end that lacks chunks: u32 LE length, a postcard `FetchRequest`; the answer is the requested
//!      frames, in order, as they are stored (see `content::frame`), and the end of the stream. A frame with the fault codec
//!      takes the place of a chunk that could not be sent, and ends the answer.
//! 'Q'  question, opened by either end: u32 LE length, JSON, `AskHub` or `AskSite`; the answer likewise: `{"Ok":…}` or
//!      `{"Err":fault}`
//! ```
//!
//! # Versions
//! JSON messages grow by fields with a default, which an older peer ignores; a field is never
//! renamed or removed. Variants of the fetch request keep their numbers, and new ones come last.
//! The test `bytes` holds the bytes of each message.

mod changes;
mod control;
mod fetch;
mod question;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

use base::fault::Fault;
use base::text;

pub use changes::{Changes, ReportBatch};
pub use control::{AllowList, Desired, FromHub, FromSite, Known, PushedManifest, Report};
pub use fetch::{FetchRequest, Wanted};
pub use question::{AskHub, AskSite, Planned, Presence, PresenceState, renewal};

/// First byte of a control stream.
pub const CONTROL: u8 = b'C';
/// First byte of a fetch stream.
pub const FETCH: u8 = b'F';
/// First byte of a question.
pub const QUESTION: u8 = b'Q';

/// Writes a message as JSON.
pub fn to_json<T: Serialize>(message: &T) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(message).map_err(|e| Fault::internal(format!("a message as JSON: {e}")))
}

/// Parses a message from JSON. The fault does not repeat what the peer sent.
pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    text::parse_json(bytes)
        .map_err(|why| Fault::integrity(format!("the peer sent a malformed message: {why}")))
}
