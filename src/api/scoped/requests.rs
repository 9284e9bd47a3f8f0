//! The requests that name artifacts and sites: what is outside the scope does not exist for them.

use super::super::types::*;
use super::Scoped;
use super::view::{Sites, View};
use crate::reach::Reach;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use model::policy::{self, Object, Verb};
use state::{no_site, no_site_selected};

impl Scoped {
    /// A publish under a name of the scope.
    pub(super) async fn publish_in_scope(
        &self,
        mut request: PublishRequest,
        reach: Reach,
    ) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.as_ref.parse()?;
        policy::may(&self.actor, Verb::Publish, &Object::Named(&artifact))?;
        if request.source.starts_with("db:") {
            return Err(Fault::not_allowed(format!(
                "the token {} has a scope, and the rows of a database have none",
                self.grant.name
            ))
            .with_next("publish from files, or use a token without --artifacts and --sites"));
        }
        let view = self.view().await?;
        if let Some(dataset) = &request.options.for_dataset {
            self.artifact(&view, dataset).await?;
        }
        if let Some(run) = &request.run {
            self.visible_run(run).await?;
        }
        if let Some(to) = &request.to {
            request.to = Some(self.narrow_sites(&view, to).await?);
        }
        self.inner.publish(request, reach).await
    }

    /// A delivery of visible artifacts to the selected sites that are visible.
    pub(super) async fn narrow(
        &self,
        view: &View,
        request: DeliverRequest,
    ) -> Result<DeliverRequest, Fault> {
        for artifact in &request.artifacts {
            self.artifact(view, artifact).await?;
        }
        Ok(DeliverRequest {
            to: self.narrow_sites(view, &request.to).await?,
            ..request
        })
    }

    /// The selection without hidden sites. A hidden site that it names does not exist.
    async fn narrow_sites(&self, view: &View, to: &str) -> Result<String, Fault> {
        let selector: SiteSelector = to.parse()?;
        let Sites::Some { visible, .. } = &view.sites else {
            return Ok(to.to_owned());
        };
        let chosen: Vec<SiteName> = match &selector {
            SiteSelector::All => visible.iter().cloned().collect(),
            SiteSelector::Names(names) => {
                let mut hidden = names.iter().filter(|name| !view.has_site(name)).peekable();
                if hidden.peek().is_some() {
                    return Err(no_site(hidden));
                }
                names.clone()
            }
            SiteSelector::Labels(_) if self.is_site() => {
                return Err(Fault::usage(
                    "the scope of the token selects sites by name, and this site does not know their labels",
                )
                .with_next("name the sites in --to"));
            }
            SiteSelector::Labels(_) => self.visible_sites(view, &selector).await?,
        };
        if chosen.is_empty() {
            return Err(no_site_selected());
        }
        Ok(SiteSelector::Names(chosen).to_string())
    }

    async fn visible_sites(
        &self,
        view: &View,
        selector: &SiteSelector,
    ) -> Result<Vec<SiteName>, Fault> {
        let (mut chosen, mut behind) = (Vec::new(), None);
        loop {
            let page = self.inner.sites(behind.as_deref(), super::PAGE).await?;
            let selected = page.rows.into_iter().filter(|site| {
                view.has_site(&site.name) && selector.includes(&site.name, &site.labels)
            });
            chosen.extend(selected.map(|site| site.name));
            behind = page.next;
            if behind.is_none() {
                return Ok(chosen);
            }
        }
    }

    /// Refuses a training run that names something hidden, as if it did not exist.
    pub(super) async fn check_train(&self, view: &View, request: &RunRequest) -> Result<(), Fault> {
        for input in &request.inputs {
            self.artifact(view, input).await?;
        }
        let expected = request.expect.as_str();
        let model: Result<ArtifactRef, _> = expected
            .parse()
            .or_else(|_| format!("{expected}:v").parse());
        policy::may(&self.actor, Verb::Publish, &Object::Named(&model?))?;
        for site in [&request.from, &request.on] {
            let site: SiteName = site.parse()?;
            if !view.has_site(&site) {
                return Err(no_site([&site]));
            }
        }
        Ok(())
    }
}
