//! Manifests that the hub pushes without a request: stored when they arrive, and given once to the
//! transfer that needs them.
//!
//! `site::connection` receives them ([`Runner::accept_pushed`]); `attempt` looks for one before it
//! requests the manifest. They are in memory: a manifest that is not kept, or is lost in a crash,
//! is requested.

use std::sync::atomic::Ordering;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{Counters, Runner};
use crate::fetch::take_manifest;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::{PUSHED_MANIFESTS_MAX, PUSHED_ROOT_BYTES_MAX};
use content::manifest::{Digest, Root};
use model::protocol::PushedManifest;

impl Runner {
    /// Stores manifests that the hub pushed. They are hints: an invalid one is requested later, and
    /// so is one beyond the number that is kept.
    pub async fn accept_pushed(&self, manifests: Vec<PushedManifest>) {
        for PushedManifest { digest, frames } in manifests.into_iter().take(PUSHED_MANIFESTS_MAX) {
            let (store, wire) = (
                self.inner.shared.store.clone(),
                frames.as_str().len() as u64,
            );
            let taken = blocking(move || {
                let frames = BASE64
                    .decode(frames.as_str())
                    .map_err(|e| Fault::integrity(format!("base64: {e}")))?;
                let root = take_manifest(frames.into(), digest, &store)?;
                // A few compressed bytes may be a large manifest, and many of them are kept.
                match root.to_bytes().len() <= PUSHED_ROOT_BYTES_MAX {
                    true => Ok(root),
                    false => Err(Fault::integrity("it is too large to be pushed")),
                }
            });
            match taken.await {
                Ok(root) => {
                    let mut pushed = self.inner.pushed.lock();
                    pushed.retain(|(of, ..)| *of != digest);
                    // The earlier ones are needed sooner.
                    if pushed.len() < PUSHED_MANIFESTS_MAX {
                        pushed.push((digest, root, wire));
                    }
                }
                Err(fault) => {
                    // The hub chooses how many there are.
                    self.inner
                        .bad_pushed
                        .note(format_args!("{digest}: {fault}"));
                }
            }
        }
    }

    /// Takes the pushed root manifest of a digest.
    pub(super) fn take_pushed(&self, digest: Digest, counters: &Counters) -> Option<Root> {
        let mut pushed = self.inner.pushed.lock();
        let at = pushed.iter().position(|(of, ..)| *of == digest)?;
        let (_, root, wire) = pushed.remove(at);
        counters.wire.fetch_add(wire, Ordering::Relaxed);
        Some(root)
    }
}
