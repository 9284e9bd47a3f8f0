//! Access to the artifacts of the catalogue: loads the facts that the rules of [`model::policy`]
//! need, and evaluates the rules.
//!
//! The sessions, deliveries, runs and the library of the hub call it. A positive answer for content
//! is cached in memory for a short time; nothing else is stored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::planning::{Plan, Planning};
use base::expiring_cache::ExpiringCache;
use base::fault::{Code, Fault};
use base::names::{ArtifactRef, SiteName, SiteSelector};
use base::peer::Peer;
use content::manifest::Digest;
use model::actor::Actor;
use model::policy::{self, Object, Published, Refusal, ShareList, Sharing, Verb};
use state::{ArtifactRow, Catalogue, SharingRow, TransferRow, no_artifact};

/// How long a positive answer for content is cached.
const READABLE_FOR: Duration = Duration::from_secs(2);

/// Decides which artifacts an actor may use. Cheap to clone.
#[derive(Clone)]
pub(super) struct Entitlement {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    /// `[share] allow` of the hub, as at the start of the daemon; `None`: every site.
    share: Option<Vec<SiteSelector>>,
    /// Content that peers may read.
    readable: Mutex<ExpiringCache<(Peer, Digest), ()>>,
    /// The plan questions that sites are answering at this moment.
    planning: Planning,
}

impl Entitlement {
    /// Creates it for this catalogue. `share`: `[share] allow` of the hub.
    pub(super) fn new(catalogue: Catalogue, share: Option<Vec<SiteSelector>>) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                share,
                readable: Mutex::default(),
                planning: Planning::default(),
            }),
        }
    }

    /// Until the returned value is dropped, the site may read the manifest of this content.
    pub(super) fn plan(&self, site: &SiteName, digest: Digest) -> Plan {
        self.inner.planning.begin(site, digest)
    }

    /// Whether a peer may read the manifest of this content.
    pub(super) async fn may_read_manifest(
        &self,
        peer: &Peer,
        digest: Digest,
    ) -> Result<bool, Fault> {
        self.may_read(peer, Verb::ReadManifest, digest).await
    }

    /// Whether a peer may read this content.
    pub(super) async fn may_read_content(
        &self,
        peer: &Peer,
        digest: Digest,
    ) -> Result<bool, Fault> {
        self.may_read(peer, Verb::ReadContent, digest).await
    }

    async fn may_read(&self, peer: &Peer, verb: Verb, digest: Digest) -> Result<bool, Fault> {
        let key = (peer.clone(), digest);
        if self.inner.readable.lock().get(&key).is_some() {
            return Ok(true);
        }
        let may = self.ask_content(Actor::from(peer), digest).await?;
        if may(Verb::ReadContent) {
            self.inner.readable.lock().put(key, (), READABLE_FOR);
        }
        Ok(may(verb))
    }

    /// Whether a site has received this content, and some list still allows that it does.
    pub(super) async fn is_shared_still(
        &self,
        site: &SiteName,
        digest: Digest,
    ) -> Result<bool, Fault> {
        let may = self.ask_content(Actor::Site(site.clone()), digest).await?;
        Ok(may(Verb::ReadContent))
    }

    /// Loads the facts about an actor and this content. The returned function decides.
    async fn ask_content(
        &self,
        actor: Actor,
        digest: Digest,
    ) -> Result<impl Fn(Verb) -> bool, Fault> {
        let delivered = self.is_delivered(&actor, digest).await?;
        let planned = actor
            .site()
            .is_some_and(|site| self.inner.planning.has(site, digest));
        let mut rows: Vec<(Option<SiteName>, SharingRow)> = Vec::new();
        if let Some(site) = actor.site().filter(|_| delivered) {
            for origin in self.inner.catalogue.origins_for(site, digest).await? {
                let row = self.sharing(origin.as_ref(), site).await?;
                rows.push((origin, row));
            }
        }
        let this = self.clone();
        Ok(move |verb| {
            let names: Vec<Published<'_>> = rows
                .iter()
                .map(|(origin, row)| this.published(origin.as_ref(), row))
                .collect();
            let content = Object::Content {
                delivered,
                planned,
                names: &names,
            };
            policy::may(&actor, verb, &content).is_ok()
        })
    }

    /// The list that excludes a site from the artifacts of `origin`; `None`: the site may receive
    /// them.
    pub(super) async fn excluded_by(
        &self,
        origin: &SiteName,
        site: &SiteName,
    ) -> Result<Option<ShareList>, Fault> {
        let row = self.sharing(Some(origin), site).await?;
        let published = Object::Published(self.published(Some(origin), &row));
        match policy::may(&Actor::Site(site.clone()), Verb::Receive, &published) {
            Ok(()) => Ok(None),
            Err(Refusal::NotShared(list)) => Ok(Some(list)),
            Err(other) => Err(other.into()),
        }
    }

    /// The artifact, if `actor` may do `verb` with it. An artifact that the actor may not know gets
    /// the answer for one that does not exist. `supplied`: the actor offers or uploads the artifact
    /// in this request.
    pub(super) async fn artifact_for(
        &self,
        actor: &Actor,
        verb: Verb,
        artifact: &ArtifactRef,
        supplied: bool,
    ) -> Result<ArtifactRow, Fault> {
        let hidden = || match actor {
            Actor::Site(site) => {
                Fault::not_found(format!("site {site} holds no artifact {artifact}"))
            }
            _ => no_artifact(artifact),
        };
        let row = match self.inner.catalogue.artifact(artifact).await {
            Err(fault) if fault.code == Code::NotFound => return Err(hidden()),
            row => row?,
        };
        let object = Object::Artifact {
            origin: row.origin.as_ref(),
            delivered: self.is_delivered(actor, row.digest).await?,
            supplied,
        };
        match policy::may(actor, verb, &object) {
            Ok(()) => Ok(row),
            Err(Refusal::Hidden) => Err(hidden()),
            Err(other) => Err(other.into()),
        }
    }

    /// Whether `actor` may read the state of a transfer.
    pub(super) async fn may_read_progress(
        &self,
        actor: &Actor,
        row: &TransferRow,
    ) -> Result<bool, Fault> {
        let origin = match self.inner.catalogue.artifact(&row.artifact).await {
            Ok(artifact) => artifact.origin,
            Err(fault) if fault.code == Code::NotFound => None,
            Err(fault) => return Err(fault),
        };
        let progress = Object::Progress {
            to: &row.site,
            origin: origin.as_ref(),
            delivered: self.is_delivered(actor, row.digest).await?,
        };
        Ok(policy::may(actor, Verb::Read, &progress).is_ok())
    }

    /// The fault of a publish under a used name contains the digest of the existing artifact. An
    /// actor that may not read this artifact learns only that the name is used.
    pub(super) async fn hide_taken<T>(
        &self,
        actor: &Actor,
        artifact: &ArtifactRef,
        digest: Digest,
        done: Result<T, Fault>,
    ) -> Result<T, Fault> {
        let fault = match done {
            Err(fault) if fault.code == Code::Conflict => fault,
            done => return done,
        };
        let row = match self.inner.catalogue.artifact(artifact).await {
            Ok(row) if row.digest != digest => row,
            Ok(_) => return Err(fault),
            Err(unknown) if unknown.code == Code::NotFound => return Err(fault),
            Err(other) => return Err(other),
        };
        let publisher = self.inner.catalogue.publisher_of(artifact).await?;
        let sharing = match actor.site() {
            Some(site) => self.sharing(row.origin.as_ref(), site).await?,
            None => SharingRow::default(),
        };
        let taken = Object::Taken {
            published: self.published(row.origin.as_ref(), &sharing),
            publisher: publisher.as_ref(),
            delivered: self.is_delivered(actor, row.digest).await?,
        };
        match policy::may(actor, Verb::ReadDigest, &taken) {
            Ok(()) => Err(fault),
            Err(_) => Err(Fault::conflict(format!("the name {artifact} is taken"))
                .with_next("publish this under another name or version")),
        }
    }

    /// Whether the actor has a transfer of this content that was neither cancelled nor removed.
    async fn is_delivered(&self, actor: &Actor, digest: Digest) -> Result<bool, Fault> {
        match actor.site() {
            Some(site) => self.inner.catalogue.is_delivered(site, digest).await,
            None => Ok(false),
        }
    }

    async fn sharing(
        &self,
        origin: Option<&SiteName>,
        site: &SiteName,
    ) -> Result<SharingRow, Fault> {
        match origin {
            Some(origin) => self.inner.catalogue.sharing(origin, site).await,
            None => Ok(SharingRow::default()),
        }
    }

    fn published<'a>(&'a self, origin: Option<&'a SiteName>, row: &'a SharingRow) -> Published<'a> {
        let SharingRow { share, labels } = row;
        let labels: &BTreeMap<String, String> = labels;
        Published {
            origin,
            sharing: Sharing {
                hub: self.inner.share.as_deref(),
                origin: share.as_deref(),
                labels,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::names::Kind;
    use content::chunk::DEFAULT_CHUNKING;
    use content::manifest::{KindInfo, Root, Totals};
    use state::Part;
    use transport::identity::Claim;

    /// A catalogue with the sites `a`, `b` and `c`.
    async fn catalogue() -> (tempfile::TempDir, Catalogue, [SiteName; 3]) {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        let sites = ["a", "b", "c"].map(|name| name.parse::<SiteName>().unwrap());
        for site in &sites {
            let (id, peer) = (site.as_str(), Peer::Site(site.clone()));
            catalogue
                .add_token(id, &[1; 32], &peer, &BTreeMap::new(), 60)
                .await
                .unwrap();
            catalogue
                .redeem_token(id, &[1; 32], &Claim::Site(site.clone()), &[7; 32])
                .await
                .unwrap();
        }
        (dir, catalogue, sites)
    }

    fn root(bytes: u64) -> Root {
        Root {
            format: 1,
            kind: Kind::Model,
            info: KindInfo::Files,
            chunking: DEFAULT_CHUNKING,
            totals: Totals {
                bytes,
                ..Totals::default()
            },
            depth: 0,
            pages: vec![],
        }
    }

    fn list(texts: &[&str]) -> Option<Vec<SiteSelector>> {
        Some(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[tokio::test]
    async fn the_hubs_list_ends_only_open_transfers_of_artifacts_of_sites() {
        let (_dir, catalogue, sites) = catalogue().await;
        let published = [
            ("model/of-a:1", root(1), Some(&sites[0])),
            ("model/of-hub:1", root(2), None),
        ];
        for (name, root, origin) in &published {
            let artifact: ArtifactRef = name.parse().unwrap();
            catalogue
                .add_artifact(&artifact, root, *origin)
                .await
                .unwrap();
            let part = Part {
                artifact,
                digest: root.digest(),
                total: 1,
                needs: None,
                sites: sites.to_vec(),
            };
            let delivery = name.replace(['/', ':'], "-").parse().unwrap();
            catalogue
                .deliver(&delivery, None, &[part], &[])
                .await
                .unwrap();
        }
        for (hub, of_a) in [
            (None, [true; 3]),
            (list(&["b"]), [true, true, false]),
            (list(&[]), [true, false, false]),
        ] {
            let entitlement = Entitlement::new(catalogue.clone(), hub);
            for (site, of_a) in sites.iter().zip(of_a) {
                let peer = Peer::Site(site.clone());
                let content = root(1).digest();
                assert_eq!(
                    entitlement.may_read_content(&peer, content).await.unwrap(),
                    of_a,
                    "{site}"
                );
                assert_eq!(
                    entitlement.may_read_manifest(&peer, content).await.unwrap(),
                    of_a,
                    "{site}"
                );
                assert!(
                    entitlement
                        .may_read_content(&peer, root(2).digest())
                        .await
                        .unwrap(),
                    "the hub shares its own content with {site}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_site_that_plans_reads_the_manifest_until_the_plan_ends() {
        let (_dir, catalogue, [site, ..]) = catalogue().await;
        let entitlement = Entitlement::new(catalogue, None);
        let (peer, digest) = (Peer::Site(site.clone()), root(1).digest());
        let reads = async || {
            let manifest = entitlement.may_read_manifest(&peer, digest).await.unwrap();
            let content = entitlement.may_read_content(&peer, digest).await.unwrap();
            (manifest, content)
        };
        assert_eq!(reads().await, (false, false));
        let plan = entitlement.plan(&site, digest);
        assert_eq!(reads().await, (true, false));
        drop(plan);
        assert_eq!(reads().await, (false, false));
    }

    #[tokio::test]
    async fn the_list_of_the_hub_is_named_before_that_of_the_origin() {
        let (_dir, catalogue, [a, b, c]) = catalogue().await;
        catalogue.set_share(&a, Some(&["b".into()])).await.unwrap();
        for (hub, site, expected) in [
            (None, &b, None),
            (None, &c, Some(ShareList::Origin)),
            (list(&["all"]), &b, None),
            (list(&["c"]), &b, Some(ShareList::Hub)),
            (list(&["c"]), &c, Some(ShareList::Origin)),
            (list(&[]), &c, Some(ShareList::Hub)),
            (list(&[]), &a, None),
        ] {
            let entitlement = Entitlement::new(catalogue.clone(), hub);
            assert_eq!(
                entitlement.excluded_by(&a, site).await.unwrap(),
                expected,
                "{site}"
            );
        }
    }

    #[tokio::test]
    async fn a_publisher_with_the_name_of_a_site_has_nothing_of_that_site() {
        let (_dir, catalogue, [a, ..]) = catalogue().await;
        let artifact: ArtifactRef = "model/of-a:1".parse().unwrap();
        catalogue
            .add_artifact(&artifact, &root(1), Some(&a))
            .await
            .unwrap();
        let entitlement = Entitlement::new(catalogue, None);
        let (site, publisher) = (Actor::Site(a), Actor::Publisher("a".parse().unwrap()));
        let row = entitlement.artifact_for(&site, Verb::Deliver, &artifact, false);
        row.await.unwrap();
        let fault = entitlement
            .artifact_for(&publisher, Verb::Deliver, &artifact, false)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed);
        let taken = Err::<(), _>(Fault::conflict("taken, by its digest"));
        let digest = root(2).digest();
        let fault = entitlement
            .hide_taken(&publisher, &artifact, digest, taken.clone())
            .await
            .unwrap_err();
        assert!(!fault.message.contains("digest"), "{fault}");
        let fault = entitlement
            .hide_taken(&site, &artifact, digest, taken)
            .await
            .unwrap_err();
        assert!(fault.message.contains("digest"), "{fault}");
    }
}
