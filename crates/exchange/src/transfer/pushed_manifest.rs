//! Manifests that the hub tells of by itself: taken in when they come, given out once, to the
//! transfer that needs them.
//!
//! `site::line` brings them ([`Runner::hear`]), `attempt` looks whether there is one before it
//! asks. They lie in memory: what is not kept, or goes in a crash, is asked for.

use std::sync::atomic::Ordering;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{Counters, Runner};
use crate::fetch::take_manifest;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::PUSHED_MANIFESTS_MAX;
use content::manifest::{Digest, Root};
use model::protocol::PushedManifest;

impl Runner {
    /// Takes in manifests that the hub tells of by itself. They are hints: what is wrong with one
    /// shows when it is asked for.
    pub async fn accept_pushed(&self, manifests: Vec<PushedManifest>) {
        for PushedManifest { digest, frames } in manifests {
            let (store, wire) = (
                self.inner.shared.store.clone(),
                frames.as_str().len() as u64,
            );
            let taken = blocking(move || {
                let frames = BASE64
                    .decode(frames.as_str())
                    .map_err(|e| Fault::integrity(format!("base64: {e}")))?;
                take_manifest(frames.into(), digest, &store)
            });
            match taken.await {
                Ok(root) => {
                    let mut pushed = self.inner.pushed.lock();
                    pushed.retain(|(of, ..)| *of != digest);
                    // Those before it begin sooner.
                    if pushed.len() < PUSHED_MANIFESTS_MAX {
                        pushed.push((digest, root, wire));
                    }
                }
                Err(fault) => {
                    tracing::warn!(%digest, error = %fault, "a manifest that the hub pushed cannot be used");
                }
            }
        }
    }

    /// The root manifest that the hub pushed of.
    pub(super) fn take_pushed(&self, digest: Digest, counters: &Counters) -> Option<Root> {
        let mut pushed = self.inner.pushed.lock();
        let at = pushed.iter().position(|(of, ..)| *of == digest)?;
        let (_, root, wire) = pushed.remove(at);
        counters.wire.fetch_add(wire, Ordering::Relaxed);
        Some(root)
    }
}
