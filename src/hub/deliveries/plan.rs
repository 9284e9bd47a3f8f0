//! What a delivery would cost: each site is asked, all within one deadline.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::time::Instant;

use super::{Deliveries, check_size};
use crate::api::types::PlanRow;
use crate::hub::sharing::Targets;
use base::fault::Fault;
use base::limits::PLAN_ROWS_MAX;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use content::manifest::Digest;
use model::actor::Actor;
use model::protocol::{AskSite, Planned};

/// How long all sites together may take to compute a plan.
const PLAN_MAX: Duration = Duration::from_secs(30);
/// Rows of a plan that are computed at once.
const PLANS_AT_ONCE: usize = 256;

impl Deliveries {
    /// What a delivery would cost: a row for each artifact and site. Sends nothing.
    pub(in crate::hub) async fn plan(
        &self,
        actor: &Actor,
        artifacts: &[ArtifactRef],
        selector: &SiteSelector,
    ) -> Result<Vec<PlanRow>, Fault> {
        let sites = self.inner.catalogue.select_sites(selector).await?;
        check_size(artifacts, sites.len(), PLAN_ROWS_MAX)?;
        let mut rows = Vec::new();
        for artifact in artifacts {
            let row = self.inner.catalogue.artifact(artifact).await?;
            let origin = row.origin.as_ref();
            let Targets {
                sites,
                mut left_out,
            } = self
                .inner
                .entitlement
                .targets(actor, artifact, origin, &sites, selector)
                .await?;
            let (digest, total) = (row.digest, row.root.totals.bytes);
            rows.extend(
                sites
                    .into_iter()
                    .map(|site| (artifact, digest, total, site, std::mem::take(&mut left_out))),
            );
        }
        // The deadline is for all sites together. The questions to one site are sent one after the
        // other.
        let deadline = Instant::now() + PLAN_MAX;
        let mut turns: HashMap<SiteName, Arc<tokio::sync::Mutex<()>>> = HashMap::new();
        let asked = rows
            .into_iter()
            .map(|(artifact, digest, total, site, left_out)| {
                let turn = turns.entry(site.clone()).or_default().clone();
                async move {
                    let planned = tokio::time::timeout_at(deadline, async {
                        let _turn = turn.lock().await;
                        self.ask_plan(&site, artifact, digest).await
                    });
                    let planned = planned.await.ok().flatten();
                    PlanRow {
                        artifact: artifact.to_string(),
                        site: site.to_string(),
                        asked: planned.is_some(),
                        total,
                        missing: planned.as_ref().map_or(total, |p| p.missing),
                        needs: planned.as_ref().map_or(total, |p| p.needs),
                        free: planned.as_ref().and_then(|p| p.free),
                        inodes: planned.as_ref().and_then(|p| p.inodes),
                        free_inodes: planned.as_ref().and_then(|p| p.free_inodes),
                        seconds: planned
                            .as_ref()
                            .and_then(|p| (p.rate > 0).then(|| p.missing.div_ceil(p.rate))),
                        left_out,
                    }
                }
            });
        Ok(futures::stream::iter(asked.collect::<Vec<_>>())
            .buffered(PLANS_AT_ONCE)
            .collect()
            .await)
    }

    /// Asks a site for the cost of a delivery to it. `None`: the site is offline or does not
    /// answer. Until the answer, the site may read the manifest of the artifact, and nothing else
    /// of it.
    async fn ask_plan(
        &self,
        site: &SiteName,
        artifact: &ArtifactRef,
        digest: Digest,
    ) -> Option<Planned> {
        let _plan = self.inner.entitlement.plan(site, digest);
        let question = AskSite::Plan {
            artifact: artifact.clone(),
            digest,
        };
        self.inner.links.ask(site, &question).await.ok()
    }
}
