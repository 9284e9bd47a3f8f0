//! Verifies the hub's copies of the chunks that a site refused.
//!
//! A copy that does not verify is removed from the index of its store. Publishing the content again
//! then stores it again, and content of a site is fetched again from that site. The names of the
//! chunks are taken from the message of the report, because sites of earlier versions name them
//! only there. A false report has no other effect than that the hub verifies a few of its own
//! chunks.

use super::relay::RelayKeeper;
use crate::api::types::State;
use base::blocking::blocking;
use base::fault::Reason;
use base::limits::REFUSED_CHUNKS_MAX;
use content::chunk::Hash;
use model::protocol::Report;

impl RelayKeeper {
    /// Handles a site's report of a failed transfer. The site's next report is handled after it.
    pub(super) async fn recheck_refused(&self, report: &Report) {
        if report.state != State::Failed || report.body.reason != Some(Reason::Integrity) {
            return;
        }
        let named = named_chunks(report.body.message.as_deref().unwrap_or_default());
        if named.is_empty() {
            return;
        }
        let relay = self.relay().clone();
        match blocking(move || relay.recheck(&named)).await {
            Ok(0) => {}
            Ok(bad) => {
                tracing::error!(
                    bad,
                    "chunks that a site refused are damaged at the hub; they were removed from the index"
                );
            }
            Err(fault) => {
                tracing::error!(error = %fault, "the chunks that a site refused could not be verified");
            }
        }
    }
}

/// The hashes of chunks in a text: the first few words of 64 hexadecimal digits.
fn named_chunks(text: &str) -> Vec<Hash> {
    let words = text
        .split(|c: char| !c.is_ascii_hexdigit())
        .filter(|word| word.len() == 64);
    words
        .filter_map(|word| word.parse().ok())
        .take(REFUSED_CHUNKS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_found_in_a_message() {
        let (a, b) = (Hash::of(b"a"), Hash::of(b"b"));
        assert_eq!(
            named_chunks(&format!(
                "site west: the content of chunk {a} does not match its hash; {b}, {}",
                &b.hex()[..20]
            )),
            [a, b]
        );
        assert_eq!(named_chunks(&format!("{a}0 {}", "z".repeat(64))), []);
        assert_eq!(
            named_chunks(&format!("{a} ").repeat(100)).len(),
            REFUSED_CHUNKS_MAX
        );
    }
}
