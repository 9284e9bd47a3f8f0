//! How [`Scoped`] reads the daemon: pages with visible rows, one visible object, cursors.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

use super::super::types::*;
use super::cursors::List;
use super::view::{Sites, View, no_run, sites_of};
use super::{PAGE, Scoped, name_of, printable, without_numbers};
use crate::delivery::Whole;
use crate::jobs::no_such_job;
use base::fault::{Code, Fault};
use base::names::{ArtifactRef, SiteName, SiteSelector};
use model::paging::{Page, Room};
use model::policy::{self, Object, Verb};
use state::{DeliveryRow, no_artifact, no_work};

/// The answer that something does not exist is given at a multiple of this after the request.
const ANSWER_AT: Duration = Duration::from_millis(50);
/// How long the labels of sites, and visible transfers, are remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(2);

impl Scoped {
    pub(super) fn is_site(&self) -> bool {
        self.inner.role() == "site"
    }

    pub(super) async fn view(&self) -> Result<View, Fault> {
        Ok(View {
            actor: self.actor.clone(),
            sites: self.sites_in_scope().await?,
            limits_artifacts: self.grant.scope.artifacts.is_some(),
        })
    }

    pub(super) async fn sites_in_scope(&self) -> Result<Sites, Fault> {
        let Some(selector) = &self.grant.scope.sites else {
            return Ok(Sites::All);
        };
        if self.is_site() {
            // It knows no labels, and no token of it has a selector with some.
            let visible = match selector {
                SiteSelector::Names(names) => names.iter().cloned().collect(),
                SiteSelector::All | SiteSelector::Labels(_) => Default::default(),
            };
            return Ok(Sites::Some {
                visible,
                hidden: None,
            });
        }
        if let Some(sites) = self.shared.sites.lock().get(&self.grant.id) {
            return Ok(sites.clone());
        }
        let (mut listed, mut behind) = (Vec::new(), None);
        loop {
            let page = self.inner.sites(behind.as_deref(), PAGE).await?;
            listed.extend(page.rows.into_iter().map(|site| (site.name, site.labels)));
            behind = page.next;
            if behind.is_none() {
                break;
            }
        }
        let sites = sites_of(&self.actor, listed);
        let mut known = self.shared.sites.lock();
        known.put(self.grant.id.clone(), sites.clone(), REMEMBERED_FOR);
        Ok(sites)
    }

    /// The result of `work`. That something does not exist is answered at a multiple of
    /// [`ANSWER_AT`]: how long it took says nothing about what is hidden.
    pub(super) async fn evenly<T>(
        &self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let begun = Instant::now();
        let result = work.await;
        if matches!(&result, Err(fault) if fault.code == Code::NotFound) {
            let steps = begun.elapsed().as_millis() / ANSWER_AT.as_millis() + 1;
            let steps = u32::try_from(steps).unwrap_or(u32::MAX);
            tokio::time::sleep_until(begun + ANSWER_AT * steps).await;
        }
        result
    }

    /// Reads pages until one has visible rows or is the last.
    pub(super) async fn visible_page<'a, T, U>(
        &self,
        behind: Option<&str>,
        read: impl Fn(Option<String>) -> BoxFuture<'a, Result<Page<T>, Fault>>,
        mut show: impl FnMut(T) -> Option<U>,
    ) -> Result<Page<U>, Fault> {
        let mut behind = behind.map(str::to_owned);
        loop {
            let page = read(behind).await?;
            let rows: Vec<U> = page.rows.into_iter().filter_map(&mut show).collect();
            if !rows.is_empty() || page.next.is_none() {
                return Ok(Page {
                    rows,
                    next: page.next,
                    repeats: page.repeats,
                });
            }
            behind = page.next;
        }
    }

    /// All visible transfers of an id.
    pub(super) async fn parts(
        &self,
        view: &View,
        id: &str,
        mut see: impl FnMut(Transfer) -> bool + Send,
    ) -> Result<(), Fault> {
        let query = TransferQuery {
            id: Some(id.to_owned()),
            ..TransferQuery::default()
        };
        let (mut behind, mut seen) = (None::<String>, std::collections::HashSet::new());
        loop {
            let read = self.inner.transfers(&query, behind.as_deref(), PAGE).await;
            let page = match read {
                Err(fault) if fault.code == Code::NotFound => return Err(no_work(&printable(id))),
                read => read?.0,
            };
            let was_empty = page.rows.is_empty();
            for part in page.rows.into_iter().filter_map(|row| view.transfer(row)) {
                let is_new = !page.repeats || seen.insert(part.id.clone());
                if is_new && !see(part) {
                    return Ok(());
                }
            }
            behind = page.next.filter(|_| !was_empty);
            if behind.is_none() {
                return Ok(());
            }
        }
    }

    /// Refuses an id with no visible transfer, as one that does not exist.
    pub(super) async fn check_work(&self, view: &View, id: &str) -> Result<(), Fault> {
        let key = (self.grant.id.clone(), id.to_owned());
        if self.shared.works.lock().get(&key).is_some() {
            return Ok(());
        }
        let mut has_part = false;
        self.parts(view, id, |_| {
            has_part = true;
            false
        })
        .await?;
        if !has_part {
            return Err(no_work(&printable(id)));
        }
        self.shared.works.lock().put(key, (), REMEMBERED_FOR);
        Ok(())
    }

    /// A visible artifact of the daemon.
    pub(super) async fn artifact(&self, view: &View, name: &str) -> Result<ArtifactDetail, Fault> {
        let artifact: ArtifactRef = name.parse()?;
        // Both are looked up, so that both take the same time.
        let detail = match self.inner.show(name).await {
            Err(fault) if fault.code == Code::NotFound => return Err(no_artifact(&artifact)),
            detail => detail?,
        };
        let shown = view.artifact(detail.artifact);
        Ok(ArtifactDetail {
            artifact: shown.ok_or_else(|| no_artifact(&artifact))?,
            lineage: detail.lineage.and_then(|lineage| view.lineage(lineage)),
            transfers: Vec::new(),
        })
    }

    pub(super) async fn visible_run(&self, name: &str) -> Result<Run, Fault> {
        let view = self.view().await?;
        match self.inner.run(name).await {
            Err(fault) if fault.code == Code::NotFound => Err(no_run(name)),
            run => view.run(run?).ok_or_else(|| no_run(name)),
        }
    }

    /// A delivery with its visible parts; `None`: it has none.
    pub(super) async fn visible_delivery(
        &self,
        view: &View,
        whole: Delivery,
        max: usize,
    ) -> Result<Option<Delivery>, Fault> {
        let mut shown = Whole::new(max);
        let mut has_part = false;
        let note = whole.note.filter(|_| whole.parts_total.is_none());
        if whole.parts_total.is_none() {
            for part in whole
                .parts
                .into_iter()
                .filter_map(|part| view.transfer(part))
            {
                has_part = true;
                shown.add(part);
            }
        } else {
            self.parts(view, &whole.id, |part| {
                has_part = true;
                shown.add(part);
                true
            })
            .await?;
        }
        if !has_part {
            return Ok(None);
        }
        let run = match whole.run {
            Some(run) => self.visible_run(&run).await.is_ok().then_some(run),
            None => None,
        };
        let shown = shown.end(&DeliveryRow {
            id: whole.id.parse()?,
            run,
            created_ms: 0,
        });
        Ok(Some(Delivery {
            created_at: whole.created_at,
            note: shown.note.or(view.text(note)),
            ..shown
        }))
    }

    /// The open transfers of each artifact to each site, if the view needs them.
    pub(super) async fn open(
        &self,
        view: &View,
    ) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault> {
        if view.limits_artifacts {
            self.inner.open_by_artifact().await
        } else {
            Ok(Vec::new())
        }
    }

    /// The cursor of the daemon from which a reader continues.
    pub(super) fn raw_cursor(&self, list: List, since: u64) -> Result<u64, Fault> {
        let token = &self.grant.id;
        let found = self.shared.cursors.lock().find(token, list, since)?;
        let read_to = self.read_to.lock();
        let own = read_to.get(name_of(list)).filter(|_| since == 0).copied();
        Ok(own.unwrap_or(found))
    }

    /// Nothing visible happened up to this cursor of the daemon.
    pub(super) fn nothing_up_to(&self, list: List, since: u64, raw: u64) {
        let mut cursors = self.shared.cursors.lock();
        cursors.move_to(&self.grant.id, list, since, raw);
        self.read_to.lock().insert(name_of(list), raw);
    }

    pub(super) fn give(&self, raw: u64) -> u64 {
        self.shared.cursors.lock().give(&self.grant.id, raw)
    }

    /// The transfers that changed after a cursor: one page of the daemon that has visible rows. It
    /// is followed by another only if that has visible rows too.
    pub(super) async fn changed_transfers(
        &self,
        query: &TransferQuery,
        since: u64,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let view = self.view().await?;
        let mut raw = self.raw_cursor(List::Transfers, since)?;
        let mut found: Option<(Vec<Transfer>, u64)> = None;
        loop {
            let asked = TransferQuery {
                since: Some(raw),
                ..query.clone()
            };
            let (page, next) = self
                .inner
                .transfers(&asked, None, room)
                .await
                .map_err(without_numbers)?;
            let has_more = page.next.is_some() && next > raw;
            let rows: Vec<Transfer> = page
                .rows
                .into_iter()
                .filter_map(|row| view.transfer(row))
                .collect();
            match found {
                Some((first, at)) if !rows.is_empty() => {
                    let next = Some(String::new());
                    let page = Page {
                        next,
                        ..Page::whole(first)
                    };
                    return Ok((page, self.give(at)));
                }
                None if !rows.is_empty() => found = Some((rows, next)),
                _ => {}
            }
            if !has_more {
                return Ok(match found {
                    Some((rows, _)) => (Page::whole(rows), self.give(next)),
                    None => {
                        self.nothing_up_to(List::Transfers, since, next);
                        let number = if since == 0 { self.give(next) } else { since };
                        (Page::whole(Vec::new()), number)
                    }
                });
            }
            raw = next;
        }
    }

    /// Refuses what concerns the daemon as a whole.
    pub(super) fn refuse<T>(&self, verb: Verb) -> Result<T, Fault> {
        policy::may(&self.actor, verb, &Object::Daemon)?;
        Err(Fault::not_allowed(
            "a token with a scope does not permit this",
        ))
    }

    /// A job that this token started.
    pub(super) fn check_job(&self, id: &str, verb: Verb) -> Result<(), Fault> {
        let is_own = self.started.is_by(id, &self.actor);
        let job = Object::Job {
            starter: is_own.then_some(&self.actor),
        };
        policy::may(&self.actor, verb, &job).map_err(|_| no_such_job(&printable(id)))
    }
}
