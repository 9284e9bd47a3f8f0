//! What a site has to do, on its control stream: the differences to what was sent before, or the
//! complete list where the site has none.
//!
//! The hub compares all open transfers of the site with what it has sent ([`SentList`]) whenever one
//! of them changed. It says that a transfer is not wanted any more only after it has read that this
//! transfer has ended: a row that cannot be read stops no transfer. A site of an earlier version
//! receives the complete list, the oldest 1,000 transfers, at each change.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, sleep_until};

use super::Sessions;
use super::control::Control;
use crate::hub::manifest_push::ManifestPush;
use base::fault::{Code, Fault};
use base::limits::{
    LIST_EVERY_MIN, LIST_REST_FACTOR, LIST_REST_MAX, STATE_RETRY_EVERY, TRANSFERS_LISTED_MAX,
};
use base::names::{Kind, SiteName, TransferId};
use exchange::wire;
use model::desired::{Part, SentList};
use model::paging::json_bytes;
use model::protocol::{Desired, FromHub, Known};
use model::run::DesiredRun;
use model::transfer::Want;
use state::{Listed, Subject, WorkRow};
use transport::SendHalf;

/// The transfers in the complete list of a site of an earlier version.
const OLDER_LIST_MAX: usize = 1_000;
/// The largest part of one such list that lineages may use.
pub(super) const LINEAGE_BYTES_MAX: usize = 1 << 20;
/// The bytes of new transfers that are in memory before they are sent.
const NEWS_BYTES_MAX: usize = 1 << 20;

/// The transfers that go first, of each transfer that waits.
type Waits = HashMap<TransferId, Vec<TransferId>>;

impl Sessions {
    /// Sends changes, and acknowledges reports, until the stream ends.
    pub(super) async fn send_changes(
        &self,
        send: &mut SendHalf,
        control: &Control<'_>,
    ) -> Result<(), Fault> {
        let inner = &self.inner;
        let mut list = SentList::default();
        let push = ManifestPush::begin(inner.catalogue.clone(), inner.library.clone());
        let mut work = inner.catalogue.watch(Subject::Site(control.site.clone()));
        let mut tried = Instant::now();
        let (mut is_list_due, mut is_due) = (true, true);
        let mut listed = None::<Instant>;
        let mut rest_until = Instant::now();
        loop {
            self.acknowledge(send, control).await?;
            if tried.elapsed() >= STATE_RETRY_EVERY {
                tried = Instant::now();
                self.store_again(control).await;
            }
            is_list_due |= control.is_list_asked.swap(false, Ordering::Relaxed);
            let list_from = listed.filter(|_| is_list_due).map(|at| at + LIST_EVERY_MIN);
            let from = list_from.map_or(rest_until, |from| from.max(rest_until));
            if (is_due || is_list_due) && Instant::now() >= from {
                let began = Instant::now();
                if is_list_due {
                    list.clear();
                    listed = Some(began);
                }
                self.send_difference(send, control, &mut list, is_list_due, &push)
                    .await?;
                (is_due, is_list_due) = (false, false);
                // Most of the time goes to other work, however long the list is.
                let rest = (began.elapsed() * LIST_REST_FACTOR).min(LIST_REST_MAX);
                rest_until = Instant::now() + rest;
                continue;
            }
            let is_waiting = is_due || is_list_due;
            tokio::select! {
                () = work.changed_within(control.poll()) => is_due = true,
                () = control.answer.notified() => {}
                () = sleep_until(from), if is_waiting => {}
            }
        }
    }

    /// Acknowledges the reports that were processed.
    async fn acknowledge(&self, send: &mut SendHalf, control: &Control<'_>) -> Result<(), Fault> {
        match control.take_processed() {
            Some(stored) => self.tell(send, &stored).await,
            None => Ok(()),
        }
    }

    async fn tell(&self, send: &mut SendHalf, message: &FromHub) -> Result<(), Fault> {
        let bytes = wire::send_counted(send, message).await?;
        self.inner.traffic.sent(bytes);
        Ok(())
    }

    /// Compares what the site has to do with what was sent, and sends the difference. `is_list`:
    /// nothing was sent, and the site gives up what it does not receive.
    async fn send_difference(
        &self,
        send: &mut SendHalf,
        control: &Control<'_>,
        list: &mut SentList,
        is_list: bool,
        push: &ManifestPush,
    ) -> Result<(), Fault> {
        let site = control.site;
        let waits = self.waits(site).await?;
        list.begin_look();
        let mut part = Part::new(is_list);
        let (mut behind, mut found, mut is_partial) = (None, 0, false);
        let _share = loop {
            let look = self.look(site, behind.as_deref(), &waits, list).await?;
            found += look.found;
            is_partial |= look.is_partial || found >= TRANSFERS_LISTED_MAX;
            let (manifests, share) = push.next_new(site, &look.new).await;
            part.add_manifests(manifests);
            for id in look.kept {
                if let Some(full) = part.keep(id, list) {
                    self.tell(send, &FromHub::Changes(full)).await?;
                }
            }
            for mut wanted in look.differing {
                wanted.lineage = self.lineage(&wanted).await?;
                if let Some(full) = part.set(wanted, list) {
                    self.tell(send, &FromHub::Changes(full)).await?;
                    self.acknowledge(send, control).await?;
                }
            }
            behind = look.cut_behind.filter(|_| found < TRANSFERS_LISTED_MAX);
            if behind.is_none() {
                break share;
            }
        };
        if found < TRANSFERS_LISTED_MAX {
            for id in list.not_found() {
                if self.has_ended(site, &id).await
                    && let Some(full) = part.remove(id, list)
                {
                    self.tell(send, &FromHub::Changes(full)).await?;
                }
            }
        }
        let runs = self.inner.runs.desired(site).await?;
        let runs = match runs {
            Some(runs) => list.runs_differ(&runs)?.then_some(runs),
            None => None,
        };
        if let Some(last) = part.end(runs, is_list, is_partial, list) {
            self.tell(send, &FromHub::Changes(last)).await?;
        }
        Ok(())
    }

    /// Whether a transfer that the site has is not wanted any more. A transfer that cannot be read
    /// counts as wanted.
    async fn has_ended(&self, site: &SiteName, id: &TransferId) -> bool {
        match self.inner.catalogue.transfer(id).await {
            Ok(row) => row.site == *site && row.state.is_final() && row.want != Want::Cancel,
            Err(fault) => fault.code == Code::NotFound,
        }
    }

    /// Reads the open transfers behind one, until [`NEWS_BYTES_MAX`] of them differ from what was
    /// sent.
    async fn look(
        &self,
        site: &SiteName,
        behind: Option<&str>,
        waits: &Waits,
        list: &mut SentList,
    ) -> Result<Look, Fault> {
        let mut look = Look::default();
        let mut bytes = 0;
        let mut last = None;
        let mut outcome = Ok(());
        let see = &mut |row: Listed<WorkRow>| {
            if bytes >= NEWS_BYTES_MAX || look.found >= TRANSFERS_LISTED_MAX {
                look.cut_behind = last.take();
                return false;
            }
            look.found += 1;
            match row {
                Listed::Row(row) => {
                    last = Some(row.id.to_string());
                    let wanted = desired(row, waits);
                    let is_new = !list.has(&wanted.id);
                    match list.found(&wanted) {
                        Ok(true) => {
                            bytes += json_bytes(&wanted);
                            if is_new {
                                look.new.push(wanted.clone());
                            }
                            look.differing.push(wanted);
                        }
                        Ok(false) => {}
                        Err(fault) => {
                            outcome = Err(fault);
                            return false;
                        }
                    }
                }
                Listed::Malformed { key, .. } => {
                    match key.parse::<TransferId>() {
                        Ok(id) if list.found_unreadable(&id) => look.kept.push(id),
                        Ok(_) => {}
                        // The site cannot be informed which transfer continues.
                        Err(_) => look.is_partial = true,
                    }
                    last = Some(key);
                }
            }
            true
        };
        let read = self.inner.catalogue.each_open_transfer(site, behind, see);
        read.await?;
        outcome.map(|()| look)
    }

    async fn waits(&self, site: &SiteName) -> Result<Waits, Fault> {
        let mut waits = Waits::new();
        for (id, first) in self.inner.catalogue.waits(site).await? {
            waits.entry(id).or_default().push(first);
        }
        Ok(waits)
    }

    async fn lineage(&self, wanted: &Desired) -> Result<Option<model::run::Lineage>, Fault> {
        match wanted.artifact.kind {
            Kind::Model => self.inner.catalogue.lineage(&wanted.artifact).await,
            _ => Ok(None),
        }
    }

    /// Sends the complete list at each change, to a site of an earlier version.
    pub(super) async fn send_lists(
        &self,
        send: &mut SendHalf,
        control: &Control<'_>,
    ) -> Result<(), Fault> {
        let inner = &self.inner;
        let mut last: Option<(Vec<Desired>, Vec<DesiredRun>)> = None;
        let mut revision = 0;
        let mut push = ManifestPush::begin(inner.catalogue.clone(), inner.library.clone());
        let mut tried = Instant::now();
        let mut work = inner.catalogue.watch(Subject::Site(control.site.clone()));
        loop {
            if tried.elapsed() >= STATE_RETRY_EVERY {
                tried = Instant::now();
                if self.store_again(control).await {
                    // The site answers each list with the state of all its transfers.
                    last = None;
                }
            }
            // These sites know no list without runs: if one cannot be read, the last list stays.
            let runs = match inner.runs.desired(control.site).await? {
                Some(runs) => runs,
                None => last
                    .as_ref()
                    .map(|(_, runs)| runs.clone())
                    .unwrap_or_default(),
            };
            let now = (self.desired_transfers(control.site).await?, runs);
            if last.as_ref() != Some(&now) {
                revision += 1;
                let (transfers, runs) = now.clone();
                let (manifests, _share) = push.next(control.site, &transfers).await;
                let message = FromHub::Desired {
                    revision,
                    transfers,
                    runs,
                    manifests,
                };
                self.tell(send, &message).await?;
                last = Some(now);
            }
            work.changed_within(control.poll()).await;
        }
    }

    /// The complete list for a site of an earlier version.
    pub(super) async fn desired_transfers(&self, site: &SiteName) -> Result<Vec<Desired>, Fault> {
        let waits = self.waits(site).await?;
        let mut out = Vec::new();
        let see = &mut |row: Listed<WorkRow>| {
            if let Listed::Row(row) = row {
                let known = Known::default();
                out.push(Desired {
                    known,
                    ..desired(row, &waits)
                });
            }
            out.len() < OLDER_LIST_MAX
        };
        let read = self.inner.catalogue.each_open_transfer(site, None, see);
        read.await?;
        // A transfer must be listed, otherwise the site cancels it. The lineage of its model is
        // included only if there is space.
        let mut used = 0;
        for wanted in &mut out {
            let lineage = self.lineage(wanted).await?.filter(|lineage| {
                let bytes = json_bytes(lineage);
                let fits = used + bytes <= LINEAGE_BYTES_MAX;
                used += if fits { bytes } else { 0 };
                fits
            });
            wanted.lineage = lineage;
        }
        Ok(out)
    }
}

/// A part of the open transfers of a site, compared with what was sent.
#[derive(Default)]
struct Look {
    /// How many there are.
    found: usize,
    /// Those that differ from what was sent.
    differing: Vec<Desired>,
    /// Those of them that were never sent.
    new: Vec<Desired>,
    /// Those that cannot be read and that the site does not know.
    kept: Vec<TransferId>,
    /// Not even the id of one could be read.
    is_partial: bool,
    /// More follow behind this one.
    cut_behind: Option<String>,
}

fn desired(row: WorkRow, waits: &Waits) -> Desired {
    Desired {
        after: waits.get(&row.id).cloned().unwrap_or_default(),
        id: row.id,
        delivery: row.delivery,
        artifact: row.artifact,
        digest: row.digest,
        want: row.want,
        generation: row.generation,
        total: row.total,
        created_ms: row.created_ms,
        lineage: None,
        known: Known {
            state: row.state,
            reason: row.reason,
        },
    }
}
