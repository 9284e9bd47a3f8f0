//! Whom an artifact that was published at a site is shared with, by the `[share] allow` of that
//! site and of the hub. The hub's own administrator is told who is left out; to a site, what it may
//! not have does not exist.

use super::Hub;
use crate::api::types::LeftOut;
use crate::delivery;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use exchange::fetch::nothing_such;
use state::{Forbids, TransferRow, no_artifact};

/// Whom an artifact goes to, of the sites that somebody means.
pub(super) struct Targets {
    /// Those that may have it.
    pub(super) sites: Vec<SiteName>,
    /// Those that may not; none where a site asks.
    pub(super) left_out: Vec<LeftOut>,
}

/// A site that somebody forbids to have what `origin` published.
fn left_out(
    artifact: &ArtifactRef,
    origin: &SiteName,
    site: &SiteName,
    forbids: Forbids,
) -> LeftOut {
    let (by, why) = match forbids {
        Forbids::Hub => ("hub", "not in the hub's [share] allow".to_owned()),
        Forbids::Origin => (
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

/// What the administrator is told when an artifact cannot go where he wants it.
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

impl Hub {
    /// Of these sites, which `to` means, those that may have an artifact by the hub's policy and by
    /// what its origin says. It is refused when none is left, or one may not that was named
    /// outright: the administrator (`by` is `None`) and the origin itself are told why, and who
    /// else is left out; any other site gets the answer for what does not exist, and no more.
    pub(super) async fn shared_with(
        &self,
        by: Option<&SiteName>,
        artifact: &ArtifactRef,
        origin: Option<&SiteName>,
        sites: &[SiteName],
        to: &SiteSelector,
    ) -> Result<Targets, Fault> {
        let Some(origin) = origin else {
            return Ok(Targets {
                sites: sites.to_vec(),
                left_out: Vec::new(),
            });
        };
        let named = matches!(to, SiteSelector::Names(_));
        let mut shared = Targets {
            sites: Vec::new(),
            left_out: Vec::new(),
        };
        for site in sites {
            match self.inner.catalogue.forbidden_by(origin, site).await? {
                Some(forbids) => shared
                    .left_out
                    .push(left_out(artifact, origin, site, forbids)),
                // "All" means all others.
                None if named || site != origin => shared.sites.push(site.clone()),
                None => {}
            }
        }
        let refused = shared.sites.is_empty() || named && !shared.left_out.is_empty();
        let may_know = by.is_none_or(|by| by == origin);
        match refused {
            true if may_know => Err(not_shared(artifact, origin, &shared.left_out)),
            true => Err(no_artifact(artifact)),
            false if may_know => Ok(shared),
            false => Ok(Targets {
                left_out: Vec::new(),
                ..shared
            }),
        }
    }

    /// Why a transfer must not begin again: its site may not have the artifact any more. It would
    /// fail, and what is noted of it as done, here and at the site, would be lost for that. `by`:
    /// the site that asks; `None`: the administrator.
    pub(super) async fn shared_no_more(
        &self,
        by: Option<&SiteName>,
        row: &TransferRow,
    ) -> Result<Option<Fault>, Fault> {
        let catalogue = &self.inner.catalogue;
        let Some(origin) = catalogue.artifact(&row.artifact).await?.origin else {
            return Ok(None);
        };
        let Some(forbids) = catalogue.forbidden_by(&origin, &row.site).await? else {
            return Ok(None);
        };
        // The same content may be shared under another name.
        if catalogue.is_shared(&row.site, row.digest).await? {
            return Ok(None);
        }
        Ok(Some(match by {
            Some(_) => nothing_such()
                .with_next("what is at the site stays as it is; ask whoever runs the hub"),
            None => not_shared(
                &row.artifact,
                &origin,
                &[left_out(&row.artifact, &origin, &row.site, forbids)],
            ),
        }))
    }

    /// What `doctor` says of the hub's own list, when it names a site that is not there: one that
    /// is meant is left out silently then.
    pub(super) fn share_fault(&self, sites: &[SiteName]) -> Option<String> {
        let unknown = unknown(self.inner.config.share.allow.as_deref()?, sites);
        let names = unknown.join(", ");
        (!unknown.is_empty()).then(|| format!("fault [share] allow: no site is called {names}; correct the name, or let that site join"))
    }
}

impl Hub {
    /// What `doctor` says of the lists of the sites, as they told them: names in `[share] allow`
    /// and `[train] allow` that no site bears.
    pub(super) async fn site_list_faults(&self, sites: &[SiteName]) -> Result<Vec<String>, Fault> {
        let mut out = Vec::new();
        for list in self.inner.catalogue.allow_lists().await? {
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
}

/// The names in a list of selectors that none of these sites bears.
fn unknown(allow: &[String], sites: &[SiteName]) -> Vec<String> {
    let names = allow
        .iter()
        .filter_map(|text| match text.parse::<SiteSelector>() {
            Ok(SiteSelector::Names(names)) => Some(names),
            // Labels are no names, and what is no selector the daemon does not start with.
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
    fn a_name_in_the_list_that_no_site_bears_is_found() {
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
    fn the_administrator_is_told_who_is_left_out_by_whose_list_and_what_to_do() {
        let (artifact, origin): (ArtifactRef, SiteName) =
            ("model/m:1".parse().unwrap(), "a".parse().unwrap());
        let site =
            |name: &str, forbids| left_out(&artifact, &origin, &name.parse().unwrap(), forbids);
        let fault = not_shared(
            &artifact,
            &origin,
            &[site("c", Forbids::Hub), site("d", Forbids::Origin)],
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
    async fn a_name_in_the_list_of_a_site_that_no_site_bears_is_reported() {
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
        let told = faults().await;
        assert!(
            told[0].starts_with("fault site west: [share] allow: no site is called weest;"),
            "{told:?}"
        );
        assert!(
            told[1].starts_with("fault site west: [train] allow: no site is called esat;"),
            "{told:?}"
        );
    }
}
