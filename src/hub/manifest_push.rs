//! Pushes small manifests of new artifacts to a site without a request, which saves a round trip on
//! a long connection.
//!
//! A pushed manifest is only a hint. The desired state never waits for it. A fault of a manifest is
//! reported when the site requests it.

use std::collections::HashSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::FutureExt;

use super::library::HubLibrary;
use crate::api::types::State;
use base::budget::Share;
use base::clock;
use base::fault::Fault;
use base::limits::{MESSAGE_MANIFESTS_BYTES_MAX, MESSAGE_MANIFESTS_MAX};
use base::names::{SiteName, TransferId};
use base::peer::Peer;
use base::text::Exact;
use exchange::fetch::{self, Library};
use exchange::wire::PRIORITY_MANIFEST;
use model::protocol::{Desired, PushedManifest};
use state::{Catalogue, Want};

/// The manifest of a larger artifact is never small enough: it has at least 36 bytes for each 256
/// KiB.
const TOTAL_MAX: u64 = (MESSAGE_MANIFESTS_BYTES_MAX as u64 / 36) * (256 << 10);

/// The manifests that were pushed over one connection.
pub(super) struct ManifestPush {
    catalogue: Catalogue,
    library: HubLibrary,
    /// The start of the connection. The site itself requests the manifests of older transfers.
    since_ms: i64,
    known: HashSet<TransferId>,
}

impl ManifestPush {
    /// Starts with no pushed manifests.
    pub(super) fn begin(catalogue: Catalogue, library: HubLibrary) -> Self {
        Self {
            catalogue,
            library,
            since_ms: clock::now_ms(),
            known: HashSet::new(),
        }
    }

    /// The small manifests of transfers that were created since the connection started and whose
    /// manifest was not pushed yet, and the share of the budget that they hold.
    pub(super) async fn next(
        &mut self,
        site: &SiteName,
        wanted: &[Desired],
    ) -> (Vec<PushedManifest>, Option<Share>) {
        let new: Vec<Desired> = wanted
            .iter()
            .filter(|wanted| !self.known.contains(&wanted.id))
            .cloned()
            .collect();
        self.known = wanted.iter().map(|wanted| wanted.id.clone()).collect();
        self.next_new(site, &new).await
    }

    /// The same of transfers that were not sent before.
    pub(super) async fn next_new(
        &self,
        site: &SiteName,
        new: &[Desired],
    ) -> (Vec<PushedManifest>, Option<Share>) {
        let begins = |wanted: &&Desired| {
            let begins = wanted.want == Want::Run
                && wanted.generation == 0
                && wanted.created_ms >= self.since_ms;
            begins && wanted.total <= TOTAL_MAX
        };
        let new: Vec<&Desired> = new
            .iter()
            .filter(begins)
            .take(MESSAGE_MANIFESTS_MAX)
            .collect();
        if new.is_empty() {
            return (Vec::new(), None);
        }
        let peer = Peer::Site(site.clone());
        // A push never waits for a share of the budget.
        let Some(Ok(share)) = self
            .library
            .share(&peer, MESSAGE_MANIFESTS_BYTES_MAX as u64, PRIORITY_MANIFEST)
            .now_or_never()
        else {
            return (Vec::new(), None);
        };
        let (mut pushed, mut room) = (Vec::new(), MESSAGE_MANIFESTS_BYTES_MAX);
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
                    tracing::debug!(artifact = %wanted.artifact, error = %fault, "a manifest was not pushed");
                }
            }
        }
        (pushed, Some(share))
    }

    /// The manifest of a transfer that has not started, if it has no more than `room` bytes.
    async fn manifest_for(
        &self,
        site: &SiteName,
        peer: &Peer,
        wanted: &Desired,
        room: usize,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let catalogue = &self.catalogue;
        // A site that has another version requests only the difference.
        if catalogue.transfer(&wanted.id).await?.state != State::Queued
            || catalogue
                .has_previous_version_at(site, &wanted.artifact)
                .await?
        {
            return Ok(None);
        }
        let opened = self.library.open(peer, wanted.digest).await?;
        fetch::manifest_frames(peer, &self.library, &opened, room).await
    }
}
