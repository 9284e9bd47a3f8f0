//! Decides to which of the named sites an artifact is delivered, and reports the others. The
//! `[share]` lists exclude sites ([`model::policy`]). The administrator of the hub and the
//! publishing site learn which sites are excluded. For any other site, the artifact does not exist.

use super::entitlement::Entitlement;
use crate::api::types::LeftOut;
use crate::delivery;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use exchange::fetch::nothing_such;
use model::actor::Actor;
use model::policy::{self, Object, ShareList, Verb};
use state::{ArtifactRow, Catalogue, TransferRow, no_artifact};

/// The sites that a delivery names.
#[derive(Default)]
pub(super) struct Targets {
    /// Those that may receive the artifact.
    pub(super) sites: Vec<SiteName>,
    /// Those that may not; empty if the actor may not know.
    pub(super) left_out: Vec<LeftOut>,
}

/// A site that a list excludes from the artifacts that `origin` published.
fn left_out(
    artifact: &ArtifactRef,
    origin: &SiteName,
    site: &SiteName,
    list: ShareList,
) -> LeftOut {
    let (by, why) = match list {
        ShareList::Hub => ("hub", "not in the hub's [share] allow".to_owned()),
        ShareList::Origin => (
            "origin",
            format!("not in the [share] allow of site {origin}"),
        ),
    };
    LeftOut {
        artifact: artifact.to_string(),
        site: site.to_string(),
        by: by.into(),
        why,
    }
}

/// The fault for an actor that may know why an artifact cannot be delivered to the named sites.
fn not_shared(artifact: &ArtifactRef, origin: &SiteName, left_out: &[LeftOut]) -> Fault {
    if left_out.is_empty() {
        return Fault::not_found(format!(
            "the selection means no site but {origin}, where {artifact} was published"
        ))
        .with_next(
            "name the site itself to deliver it there too; 'packhorse sites' lists the others",
        );
    }
    Fault::not_allowed(delivery::left_out(left_out).join("; "))
        .with_next("to share it, add the site to that list and restart the daemon that has the list in its configuration")
}

/// Whether `actor` may know which sites the lists exclude from the artifacts of `origin`.
fn may_know(actor: &Actor, origin: &SiteName) -> bool {
    let artifact = Object::Artifact {
        origin: Some(origin),
        delivered: false,
        supplied: false,
    };
    policy::may(actor, Verb::ReadExclusions, &artifact).is_ok()
}

impl Entitlement {
    /// Of these sites, which `to` selects, those that may receive an artifact. Refused if none is
    /// left, or if a site that is selected by name may not.
    pub(super) async fn targets(
        &self,
        actor: &Actor,
        artifact: &ArtifactRef,
        origin: Option<&SiteName>,
        sites: &[SiteName],
        to: &SiteSelector,
    ) -> Result<Targets, Fault> {
        let mut targets = Targets::default();
        let Some(origin) = origin else {
            targets.sites = sites.to_vec();
            return Ok(targets);
        };
        let named = matches!(to, SiteSelector::Names(_));
        for site in sites {
            match self.excluded_by(origin, site).await? {
                Some(list) => targets
                    .left_out
                    .push(left_out(artifact, origin, site, list)),
                // `all` means all sites except the origin.
                None if named || site != origin => targets.sites.push(site.clone()),
                None => {}
            }
        }
        let refused = targets.sites.is_empty() || named && !targets.left_out.is_empty();
        match (refused, may_know(actor, origin)) {
            (true, true) => Err(not_shared(artifact, origin, &targets.left_out)),
            (true, false) => Err(no_artifact(artifact)),
            (false, true) => Ok(targets),
            (false, false) => Ok(Targets {
                left_out: Vec::new(),
                ..targets
            }),
        }
    }

    /// The reason why a transfer must not start again: its site may not receive the artifact any
    /// more. It would fail, and the hub and the site would lose the record that it was done.
    pub(super) async fn no_longer_shared(
        &self,
        actor: &Actor,
        row: &TransferRow,
        artifact: &ArtifactRow,
    ) -> Result<Option<Fault>, Fault> {
        let Some(origin) = &artifact.origin else {
            return Ok(None);
        };
        let Some(list) = self.excluded_by(origin, &row.site).await? else {
            return Ok(None);
        };
        // The same content may be shared under another name.
        if self.is_shared_still(&row.site, row.digest).await? {
            return Ok(None);
        }
        if may_know(actor, origin) {
            let left_out = left_out(&row.artifact, origin, &row.site, list);
            return Ok(Some(not_shared(&row.artifact, origin, &[left_out])));
        }
        let next = "the content at the site is kept; ask the administrator of the hub";
        Ok(Some(nothing_such().with_next(next)))
    }
}

/// The line of `doctor` about the hub's own list: a name that no site has. The intended site would
/// be excluded silently.
pub(super) fn share_fault(allow: Option<&[String]>, sites: &[SiteName]) -> Option<String> {
    let names = unknown(allow?, sites).join(", ");
    (!names.is_empty()).then(|| format!("fault [share] allow: no site is called {names}; correct the name, or let that site join"))
}

/// The lines of `doctor` about the lists that the sites reported: names in `[share] allow` and
/// `[train] allow` that no site has.
pub(super) async fn site_list_faults(
    catalogue: &Catalogue,
    sites: &[SiteName],
) -> Result<Vec<String>, Fault> {
    let mut out = Vec::new();
    for list in catalogue.allow_lists().await? {
        for (table, allow) in [("share", &list.share), ("train", &list.train)] {
            let unknown = unknown(allow, sites).join(", ");
            if !unknown.is_empty() {
                let site = &list.site;
                out.push(format!(
                    "fault site {site}: [{table}] allow: no site is called {unknown}; correct the name in the configuration of {site}, or let that site join"
                ));
            }
        }
    }
    Ok(out)
}

/// The names in a list of selectors that none of these sites has.
fn unknown(allow: &[String], sites: &[SiteName]) -> Vec<String> {
    let names = allow
        .iter()
        .filter_map(|text| match text.parse::<SiteSelector>() {
            Ok(SiteSelector::Names(names)) => Some(names),
            // Labels are not names. A daemon does not start with an invalid selector.
            _ => None,
        });
    names
        .flatten()
        .filter(|name| !sites.contains(name))
        .map(String::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_the_list_that_no_site_has_is_found() {
        let sites: Vec<SiteName> = ["a", "b"]
            .iter()
            .map(|name| name.parse().unwrap())
            .collect();
        let check = |allow: &[&str], expected: &[&str]| {
            let allow: Vec<String> = allow.iter().map(|&text| text.to_owned()).collect();
            assert_eq!(unknown(&allow, &sites), expected, "{allow:?}");
        };
        check(&[], &[]);
        check(&["all", "a", "line=3"], &[]);
        check(&["a,bb", "line=3", "c"], &["bb", "c"]);
    }

    #[test]
    fn the_administrator_learns_the_excluded_sites_the_list_and_the_next_step() {
        let (artifact, origin): (ArtifactRef, SiteName) =
            ("model/m:1".parse().unwrap(), "a".parse().unwrap());
        let site = |name: &str, list| left_out(&artifact, &origin, &name.parse().unwrap(), list);
        let fault = not_shared(
            &artifact,
            &origin,
            &[site("c", ShareList::Hub), site("d", ShareList::Origin)],
        );
        assert_eq!(fault.code, base::fault::Code::NotAllowed);
        insta::assert_snapshot!(format!("{fault}\n{}", fault.next), @r"
        model/m:1 is not shared with c: not in the hub's [share] allow; model/m:1 is not shared with d: not in the [share] allow of site a
        to share it, add the site to that list and restart the daemon that has the list in its configuration
        ");
        let nobody = not_shared(&artifact, &origin, &[]);
        assert_eq!(nobody.code, base::fault::Code::NotFound);
        assert!(
            nobody.message.contains("no site but a") && nobody.message.contains("model/m:1"),
            "{nobody}"
        );
    }

    #[tokio::test]
    async fn a_name_in_the_list_of_a_site_that_no_site_has_is_reported() {
        use crate::api::Backend as _;
        let bench = crate::hub::upload::tests::Bench::start().await;
        let west: SiteName = "west".parse().unwrap();
        bench
            .join(
                &bench.token(Some("west"), None).await,
                &transport::identity::Claim::Site(west.clone()),
            )
            .await;
        let catalogue = &bench.hub.inner.catalogue;
        let list = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let faults = async || {
            bench
                .hub
                .doctor()
                .await
                .unwrap()
                .into_iter()
                .filter(|line| line.contains("allow"))
                .collect::<Vec<_>>()
        };
        catalogue
            .set_share(&west, Some(&list(&["all", "west"])))
            .await
            .unwrap();
        catalogue.set_train_allow(&west, Some(&[])).await.unwrap();
        assert_eq!(faults().await, Vec::<String>::new());
        catalogue
            .set_share(&west, Some(&list(&["weest,west", "line=3"])))
            .await
            .unwrap();
        catalogue
            .set_train_allow(&west, Some(&list(&["esat"])))
            .await
            .unwrap();
        let lines = faults().await;
        assert!(
            lines[0].starts_with("fault site west: [share] allow: no site is called weest;"),
            "{lines:?}"
        );
        assert!(
            lines[1].starts_with("fault site west: [train] allow: no site is called esat;"),
            "{lines:?}"
        );
    }
}
