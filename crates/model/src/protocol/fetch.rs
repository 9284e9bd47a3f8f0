//! The request of a fetch stream.
//!
//! Postcard (`wire format 1`): structs and tuples are their fields in order; `u32` and `u64` are
//! LEB128, `i32` is LEB128 of its zigzag form; a list is its length and its items; an enum is the
//! number of its variant and its fields; a hash is its 32 bytes.
//!
//! ```text
//! request = digest (32) priority(i32) count wanted*
//! wanted  = 0                                 the root manifest
//!         | 1 ranges                          pages that the root lists
//!         | 2 page (32) ranges                children of a page
//!         | 3 max(u64)                        the root, and the pages that it lists
//!         | 4 ranges base (32) first count    entry pages as a delta
//!         | 5 page (32) ranges                children of a page whose frames were refused
//! ranges  = count (first count)*
//! ```

use base::fault::Fault;
use base::limits::FETCH_BATCH_CHUNKS_MAX;
use content::chunk::Hash;
use content::manifest::Digest;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Requests chunks of an artifact by their positions in its manifest, so that no peer can request a
/// chunk of which it does not know that it belongs to an artifact that it may read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FetchRequest {
    /// The artifact.
    pub digest: Digest,
    /// Higher is answered first.
    pub priority: i32,
    /// What of it; see [`FetchRequest::parse`] for how much that may be.
    #[serde(deserialize_with = "few_wants")]
    pub wants: Vec<Wanted>,
}

/// Part of an artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Wanted {
    /// The root manifest.
    Root,
    /// Pages that the root manifest lists: `(first, count)`.
    TopPages(Vec<(u32, u32)>),
    /// Children of a page, pages or chunks: `(first, count)`.
    Children {
        /// The page.
        page: Hash,
        /// Its children.
        ranges: Vec<(u32, u32)>,
    },
    /// The root manifest, and after it the pages that it lists, if they have no more than this many
    /// raw bytes together.
    RootAndPages(u64),
    /// Entry pages of the artifact, as one delta against entry pages of another artifact that the
    /// requester holds: by their numbers in the order of the manifests.
    Delta {
        /// The requested pages: `(first, count)`.
        ranges: Vec<(u32, u32)>,
        /// The other artifact, which the requester may read as well.
        base: Digest,
        /// Its pages: `(first, count)`.
        against: (u32, u32),
    },
    /// Children of a page whose frames the requester received before and refused, because they did
    /// not verify. The sender verifies its copies first, and replaces a damaged copy if another
    /// daemon has the chunk. A sender of an earlier version refuses the request.
    Refused {
        /// The page.
        page: Hash,
        /// Its children.
        ranges: Vec<(u32, u32)>,
    },
}

/// Stops before more wants are in memory than a request may have.
fn few_wants<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Wanted>, D::Error> {
    struct Few;
    impl<'de> Visitor<'de> for Few {
        type Value = Vec<Wanted>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {FETCH_BATCH_CHUNKS_MAX} wants")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Wanted>, A::Error> {
            let mut wants = Vec::new();
            while let Some(wanted) = seq.next_element()? {
                if wants.len() == FETCH_BATCH_CHUNKS_MAX {
                    return Err(serde::de::Error::invalid_length(wants.len() + 1, &self));
                }
                wants.push(wanted);
            }
            Ok(wants)
        }
    }
    from.deserialize_seq(Few)
}

impl FetchRequest {
    /// Parses a request. One that requests more than allowed is refused: at most one root manifest,
    /// at most one delta, and [`FETCH_BATCH_CHUNKS_MAX`] wants, ranges, chunks and pages in all.
    pub fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let request: Self = postcard::from_bytes(bytes).map_err(|_| {
            Fault::integrity(format!(
                "a fetch request is malformed, or has more than {FETCH_BATCH_CHUNKS_MAX} wants"
            ))
        })?;
        let (mut roots, mut deltas, mut pieces) = (0, 0, 0_u64);
        for wanted in &request.wants {
            let ranges = match wanted {
                Wanted::Root | Wanted::RootAndPages(_) => {
                    roots += 1;
                    &[][..]
                }
                Wanted::TopPages(ranges)
                | Wanted::Children { ranges, .. }
                | Wanted::Refused { ranges, .. } => ranges,
                Wanted::Delta { ranges, .. } => {
                    deltas += 1;
                    ranges
                }
            };
            // An empty range costs time as well, and so does a want without ranges.
            pieces += ranges
                .iter()
                .map(|(_, count)| u64::from(*count).max(1))
                .sum::<u64>()
                .max(1);
        }
        if roots > 1 || deltas > 1 {
            return Err(Fault::integrity(
                "a fetch request asks for more than one root manifest or delta",
            ));
        }
        if pieces > FETCH_BATCH_CHUNKS_MAX as u64 {
            return Err(Fault::integrity(format!(
                "a fetch request asks for {pieces} pieces; {FETCH_BATCH_CHUNKS_MAX} are allowed"
            )));
        }
        Ok(request)
    }

    /// The bytes of a request.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Fault> {
        postcard::to_stdvec(self)
            .map_err(|e| Fault::internal(format!("write a fetch request: {e}")))
    }
}
