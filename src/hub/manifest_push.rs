//! What a site is pushed without asking: the manifest of what is new to it, a round trip less on a
//! long line.
//!
//! All of it is a hint. The list of what the site should hold never waits for it, and whatever is
//! wrong with a manifest shows when the site asks.

use std::collections::HashSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::FutureExt;

use super::Hub;
use crate::api::types::State;
use base::budget::Share;
use base::clock;
use base::fault::Fault;
use base::limits::{TOLD_BYTES_MAX, TOLD_MAX};
use base::names::{SiteName, TransferId};
use base::peer::Peer;
use base::text::Exact;
use exchange::fetch::{self, Library};
use exchange::wire::PRIORITY_MANIFEST;
use model::protocol::{Desired, PushedManifest};
use state::Want;

/// No manifest is small enough of an artifact larger than this: 36 bytes for each 256 KiB at least.
const TOTAL_MAX: u64 = (TOLD_BYTES_MAX as u64 / 36) * (256 << 10);

/// What was pushed over one line.
pub(super) struct ManifestPush {
    /// What was asked for before the line stood, the site asks for by itself.
    since_ms: i64,
    known: HashSet<TransferId>,
}

impl ManifestPush {
    /// Nothing yet.
    pub(super) fn begin() -> Self {
        Self {
            since_ms: clock::now_unix_ms() as i64,
            known: HashSet::new(),
        }
    }
}

impl Hub {
    /// The manifests of transfers that were asked for since the line stands and that it was not
    /// pushed of yet, as far as they are small, with the share of the budget that they hold.
    pub(super) async fn push_new(
        &self,
        site: &SiteName,
        wanted: &[Desired],
        push: &mut ManifestPush,
    ) -> (Vec<PushedManifest>, Option<Share>) {
        let is_new = |wanted: &&Desired| {
            let begins = wanted.want == Want::Run
                && wanted.generation == 0
                && wanted.created_ms >= push.since_ms;
            begins && wanted.total <= TOTAL_MAX && !push.known.contains(&wanted.id)
        };
        let new: Vec<&Desired> = wanted.iter().filter(is_new).take(TOLD_MAX).collect();
        push.known = wanted.iter().map(|wanted| wanted.id.clone()).collect();
        if new.is_empty() {
            return (Vec::new(), None);
        }
        let peer = Peer::Site(site.clone());
        // Now or not at all.
        let Some(Ok(share)) = self
            .share(&peer, TOLD_BYTES_MAX as u64, PRIORITY_MANIFEST)
            .now_or_never()
        else {
            return (Vec::new(), None);
        };
        let (mut pushed, mut room) = (Vec::new(), TOLD_BYTES_MAX);
        for wanted in new {
            match self.manifest_for(site, &peer, wanted, room).await {
                Ok(Some(frames)) => {
                    room -= frames.len();
                    let Some(frames) = Exact::new(BASE64.encode(frames)) else {
                        continue;
                    };
                    pushed.push(PushedManifest {
                        digest: wanted.digest,
                        frames,
                    });
                }
                Ok(None) => {}
                Err(fault) => {
                    tracing::debug!(%site, artifact = %wanted.artifact, error = %fault, "a manifest is not pushed");
                }
            }
        }
        (pushed, Some(share))
    }

    /// The manifest of a transfer that has not begun, if it has no more than so many bytes.
    async fn manifest_for(
        &self,
        site: &SiteName,
        peer: &Peer,
        wanted: &Desired,
        room: usize,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let catalogue = &self.inner.catalogue;
        // Who has another version asks for what differs from that.
        if catalogue.transfer(&wanted.id).await?.state != State::Queued
            || catalogue.has_kin_at(site, &wanted.artifact).await?
        {
            return Ok(None);
        }
        let opened = self.open(peer, wanted.digest).await?;
        fetch::manifest_frames(peer, self, &opened, room).await
    }
}
