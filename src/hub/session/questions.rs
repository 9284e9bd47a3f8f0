//! The questions of a site, and what it publishes in place.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::Sessions;
use crate::api::types::Published;
use crate::hub::answers::{self, as_json, verb_of};
use crate::hub::deliveries::{all_of, no_transfers};
use base::fault::Fault;
use base::limits::{
    ANSWER_BYTES_MAX, ANSWER_MAX, API_ROWS_MAX, LONG_POLL_MAX, MANIFEST_IDLE_MAX, OFFER_MAX,
};
use base::names::{ArtifactRef, RunName, SiteName, SiteSelector, WorkIds};
use base::omitted::Omitted;
use base::peer::Peer;
use content::manifest::Digest;
use exchange::fetch::Fetcher;
use exchange::wire;
use model::actor::Actor;
use model::paging::Room;
use model::policy::{self, Object};
use model::protocol::AskHub;
use state::no_delivery;
use transport::{Link, RecvHalf, SendHalf};

impl Sessions {
    pub(super) async fn question(
        &self,
        mut send: SendHalf,
        mut recv: RecvHalf,
        site: &SiteName,
        link: &Link,
    ) -> Result<(), Fault> {
        let peer = Peer::Site(site.clone());
        let (question, share) =
            wire::receive_question(&mut recv, self.inner.budgets.questions(), &peer).await?;
        if !matches!(
            question,
            AskHub::Delivery(_)
                | AskHub::Transfers { .. }
                | AskHub::ShowRun(_)
                | AskHub::ListRuns { .. }
                | AskHub::LimitedRate
        ) {
            self.inner.budgets.change(&peer).await;
        }
        let actor = Actor::from(&peer);
        let may = policy::may(&actor, verb_of(&question), &Object::Daemon);
        let answer = match (may, question) {
            (Err(refusal), _) => Err(refusal.into()),
            (
                Ok(()),
                AskHub::Publish {
                    artifact,
                    digest,
                    to,
                    run,
                    omitted,
                },
            ) => {
                let offer =
                    self.take_offer(site, artifact, digest, to.as_ref(), run.as_ref(), &omitted);
                let offer = timeout(OFFER_MAX, offer).await;
                offer.unwrap_or_else(|_| {
                    Err(Fault::unreachable(format!(
                        "the manifest did not arrive within {} s",
                        OFFER_MAX.as_secs()
                    )))
                })
            }
            (Ok(()), question) => {
                let answer = timeout(ANSWER_MAX, self.answer(link, &actor, question)).await;
                answer.unwrap_or_else(|_| {
                    Err(Fault::unreachable("the hub did not answer in time")
                        .with_next("ask again later"))
                })
            }
        };
        drop(share);
        answers::send(&self.inner.budgets, &mut send, &peer, answer).await
    }

    async fn answer(
        &self,
        link: &Link,
        actor: &Actor,
        question: AskHub,
    ) -> Result<serde_json::Value, Fault> {
        let deliveries = &self.inner.deliveries;
        match question {
            AskHub::Act { id, action } => {
                deliveries.act_on(actor, &id, action).await?;
                as_json(deliveries.answer_page(&id, None).await?.0)
            }
            AskHub::Deliver { artifacts, to } => {
                as_json(deliveries.deliver(actor, &artifacts, &to, false).await?)
            }
            AskHub::Renew { request } => {
                let peer = link
                    .peer()
                    .ok_or_else(|| Fault::internal("a connection without a peer"))?;
                self.inner
                    .membership
                    .renew(peer, link, request.as_str())
                    .await
            }
            AskHub::LimitedRate => as_json(link.limited_rate()),
            AskHub::Delivery(id) => self.delivery_for(actor, &id).await,
            AskHub::Transfers { id, since, wait } => {
                self.transfers_for(actor, &id, since, wait).await
            }
            AskHub::StartRun(request) => as_json(self.inner.runs.start(actor, &request).await?),
            AskHub::ActOnRun(request) => as_json(self.inner.runs.act_on(actor, &request).await?),
            AskHub::ShowRun(name) => as_json(self.inner.runs.show(actor, name.as_str()).await?),
            AskHub::ListRuns { limit, from } => {
                let room = Room {
                    rows: limit.saturating_sub(from).min(API_ROWS_MAX),
                    bytes: ANSWER_BYTES_MAX,
                };
                as_json(self.inner.runs.list(actor, None, from, room).await?.rows)
            }
            AskHub::Publish { .. } | AskHub::Upload { .. } => {
                Err(Fault::internal("an offer or upload is handled elsewhere"))
            }
        }
    }

    /// A delivery with all parts, for an actor that may read all of them.
    async fn delivery_for(&self, actor: &Actor, id: &str) -> Result<serde_json::Value, Fault> {
        let row = self.inner.catalogue.delivery(id).await?;
        if !self
            .inner
            .deliveries
            .may_read_all(actor, &all_of(id))
            .await?
        {
            return Err(no_delivery(id));
        }
        as_json(self.inner.deliveries.whole(&row, ANSWER_BYTES_MAX).await?)
    }

    /// The state of the transfers of a site's artifacts to any site.
    pub(super) async fn transfers_for(
        &self,
        actor: &Actor,
        id: &WorkIds,
        since: Option<u64>,
        wait: u64,
    ) -> Result<serde_json::Value, Fault> {
        // All transfers are checked, changed or not: a site gets the same answer for transfers that
        // it may not read and for those that do not exist.
        let ids = id.to_string();
        if !self
            .inner
            .deliveries
            .may_read_all(actor, &all_of(&ids))
            .await?
        {
            return Err(no_transfers(&ids));
        }
        let until = Instant::now() + Duration::from_secs(wait).min(LONG_POLL_MAX);
        loop {
            let changed = self.inner.catalogue.changed();
            let (rows, cursor) = self.inner.deliveries.answer_page(&ids, since).await?;
            if !rows.is_empty() || since.is_none() || Instant::now() >= until {
                return as_json((rows, cursor));
            }
            let _ = tokio::time::timeout_at(until.into(), changed).await;
        }
    }

    /// Adds an artifact that was published at a site to the catalogue. Its content stays at the
    /// site until it is requested.
    async fn take_offer(
        &self,
        site: &SiteName,
        artifact: ArtifactRef,
        digest: Digest,
        to: Option<&SiteSelector>,
        run: Option<&RunName>,
        omitted: &Omitted,
    ) -> Result<serde_json::Value, Fault> {
        let inner = &self.inner;
        let actor = Actor::Site(site.clone());
        // All checks that can refuse the offer come before the artifact exists.
        if let Some(to) = to {
            let sites = inner.catalogue.select_sites(to).await?;
            inner
                .entitlement
                .targets(&actor, &artifact, Some(site), &sites, to)
                .await?;
        }
        if let Some(run) = run {
            inner.runs.check_model(&actor, run, &artifact).await?;
        }
        let link =
            self.inner.links.of(site).ok_or_else(|| {
                Fault::unreachable(format!("the connection to site {site} ended"))
            })?;
        let fetcher = Fetcher::new(link, digest, Arc::default()).with_idle_max(MANIFEST_IDLE_MAX);
        let peer = Peer::Site(site.clone());
        let _offer = inner.budgets.offer(&peer).await;
        let root = fetcher.root().await?;
        let reserved = inner.quotas.reserve(&peer, &artifact, &root).await?;
        // Until the artifact is in the catalogue, no garbage collection removes its pages.
        let store = inner.store.leased_with(reserved.clone());
        fetcher.pages(&root, None, &store).await?;
        let places = inner.budgets.check(&peer).await;
        inner.manifests.check(&artifact, &root, places).await?;
        // If this digest was opened before the artifact was known here, it must be opened again.
        inner.library.forget(digest);
        let added = match run {
            Some(run) => inner.runs.add_model(&actor, run, &artifact, &root).await,
            None => {
                inner
                    .catalogue
                    .add_artifact(&artifact, &root, Some(site))
                    .await
            }
        };
        let added = inner
            .entitlement
            .hide_taken(&actor, &artifact, digest, added)
            .await?;
        reserved.finish();
        inner.catalogue.set_omitted(&artifact, omitted).await?;
        let transfers = match to {
            Some(to) => {
                inner
                    .deliveries
                    .deliver(&actor, std::slice::from_ref(&artifact), to, true)
                    .await?
                    .transfers
            }
            None => Vec::new(),
        };
        tracing::info!(%artifact, %digest, bytes = root.totals.bytes, "published at a site");
        let (artifact, digest, bytes) = (artifact.to_string(), digest.hex(), root.totals.bytes);
        let published = Published {
            artifact,
            digest,
            transfers,
            bytes,
            stored: 0,
            unchanged: !added,
            note: None,
            omitted: omitted.list(),
        };
        serde_json::to_value(published).map_err(|e| Fault::internal(e.to_string()))
    }
}
