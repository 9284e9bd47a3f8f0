//! One attempt of a transfer: its manifest, its bytes, its commit.
//!
//! The transfer's task calls it again after each pause, and after a restart of the daemon. It
//! always begins at the first step, and each step skips what an earlier attempt left: manifest
//! pages in the store, staged files in the journal, a commit in the sink.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::progress_rate::{ProgressRate, Stall};
use super::waiting::{Takes, stays};
use super::{Assembly, Counters, Runner, incoming, slots, stopped, unless};
use crate::fetch::Fetcher;
use base::blocking::{Stop, cancellable};
use base::fault::{Fault, IoContext, Reason};
use content::manifest;
use model::transfer::State;
use sink::{Incoming, Waits};
use state::TransferRow;
use transport::Link;

/// How often a transfer's progress is written to the catalogue.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

impl Runner {
    /// One attempt, with a slot. `resumes_commit`: the transfer was committing before it waited for
    /// the slot.
    pub(super) async fn attempt(
        &self,
        row: &mut TransferRow,
        counters: &Arc<Counters>,
        stop: &CancellationToken,
        resumes_commit: bool,
    ) -> Result<(), Fault> {
        let inner = &self.inner;
        let id = row.id.clone();
        let sink = inner.sinks.of(row.artifact.kind).clone();
        let known = inner
            .catalogue
            .by_digest(row.digest)
            .await?
            .map(|known| known.root);

        if let (true, Some(root)) = (resumes_commit, &known) {
            // The daemon ended during or after the commit: the sink knows which.
            let incoming = incoming(row, root);
            let staged = row.id.in_dir(sink.staging_root());
            let looked = staged.clone();
            // An error of the NAS does not mean that nothing is staged there.
            let exists = sink
                .threads()
                .run(move || looked.try_exists().at_sink(looked.display()));
            if !unless(
                stop,
                self.watched(row, sink.as_ref(), &incoming.waits, Takes::Moments, exists),
            )
            .await?
            {
                let _alone = self.turn_with_artifact(row, &incoming, stop).await?;
                let commit = sink.commit(&incoming, &staged);
                match self
                    .watched(row, sink.as_ref(), &incoming.waits, Takes::ItsTime, commit)
                    .await
                {
                    Ok(landed) => return self.land(row, counters, &incoming, landed).await,
                    // The rest of the commit must wait, for room or for the sink.
                    Err(fault) if !sink::needs_new_delivery(&fault) => return Err(fault),
                    // Nothing was committed, or not all of it is intact: it is fetched again.
                    Err(fault) => {
                        tracing::info!(error = %fault, "the commit cannot be resumed");
                    }
                }
            }
        }

        self.enter(row, State::Planning, None).await;
        // A thread of an earlier attempt may hang in the sink, with the folder open.
        let staging = async { Ok(Arc::new(self.staging_of(&id).await)) };
        let staging = unless(
            stop,
            self.watched(
                row,
                sink.as_ref(),
                &Waits::default(),
                Takes::AnyTime,
                staging,
            ),
        )
        .await?;
        let wanted = row.clone();
        if let Some(landed) = Box::pin(unless(
            stop,
            self.watched(
                row,
                sink.as_ref(),
                &Waits::default(),
                Takes::AnyTime,
                self.still_here(&wanted),
            ),
        ))
        .await?
        {
            let Some(root) = known else {
                return Err(Fault::internal(
                    "an artifact at this site is not in the catalogue",
                ));
            };
            return self
                .land(row, counters, &incoming(row, &root), landed)
                .await;
        }
        let base = inner
            .catalogue
            .previous_version(&row.artifact)
            .await?
            .map(|kin| kin.root);
        let mut fetcher = None;
        let root = match known.or_else(|| self.take_pushed(row.digest, counters)) {
            Some(root) => root,
            None => {
                let new = Fetcher::new(
                    unless(stop, self.link(row)).await?,
                    row.digest,
                    counters.wire.clone(),
                );
                let root = if base.is_some() {
                    unless(stop, new.root()).await?
                } else {
                    unless(stop, new.root_and_pages(&inner.shared.store)).await?
                };
                fetcher = Some(new);
                root
            }
        };
        let fetcher = match fetcher {
            Some(fetcher) => fetcher,
            None => Fetcher::new(
                unless(stop, self.link(row)).await?,
                row.digest,
                counters.wire.clone(),
            ),
        };
        if !stays(row.body.reason) {
            row.body.set_fault(None);
        }
        unless(
            stop,
            fetcher.pages(&root, base.as_ref(), &inner.shared.store),
        )
        .await?;
        let (checked, artifact, store) = (
            root.clone(),
            row.artifact.clone(),
            inner.shared.store.clone(),
        );
        let check = move |stop: &Stop| manifest::check(&artifact, &checked, &store, stop);
        // A check that is not awaited any more holds its place until it has ended.
        let place = inner.checks.clone().acquire_owned();
        let check = async { cancellable(place.await, check).await };
        unless(stop, check).await?;
        inner
            .catalogue
            .add_artifact(&row.artifact, &root, None)
            .await?;
        row.body.bytes.total = root.totals.bytes;
        let incoming = incoming(row, &root);
        let claimed = self
            .watched(
                row,
                sink.as_ref(),
                &incoming.waits,
                Takes::ItsTime,
                self.claimed(&incoming, stop),
            )
            .await?;
        if let Some(landed) = claimed {
            return self.land(row, counters, &incoming, landed).await;
        }
        unless(
            stop,
            self.watched(
                row,
                sink.as_ref(),
                &incoming.waits,
                Takes::Moments,
                sink.check(&incoming),
            ),
        )
        .await?;
        if let Some(landed) = self
            .watched(
                row,
                sink.as_ref(),
                &incoming.waits,
                Takes::ItsTime,
                self.adopted(&incoming, stop),
            )
            .await?
        {
            return self.land(row, counters, &incoming, landed).await;
        }

        self.enter(row, State::Transferring, None).await;
        unless(
            stop,
            self.watched(
                row,
                sink.as_ref(),
                &incoming.waits,
                Takes::AnyTime,
                self.find_removed_versions(&incoming.artifact, sink.as_ref()),
            ),
        )
        .await?;
        let assembly = Assembly {
            shared: inner.shared.clone(),
            sink: sink.clone(),
            incoming: incoming.clone(),
            fetcher,
            priority: slots::priority(root.totals.bytes),
            counters: counters.clone(),
            stop: stop.clone(),
            staging: Some(staging),
        };
        let staged = self.staged(row, &assembly).await?;
        self.note_bytes(row, counters);
        row.body.rate = 0;
        self.enter(row, State::Committing, None).await;
        let _alone = self.turn_with_artifact(row, &incoming, stop).await?;
        let landed = self
            .watched(
                row,
                sink.as_ref(),
                &incoming.waits,
                Takes::ItsTime,
                sink.commit(&incoming, &staged),
            )
            .await?;
        self.land(row, counters, &incoming, landed).await
    }

    /// Waits until no other task commits, checks or removes the artifact. A commit that has not
    /// begun can be stopped.
    async fn turn_with_artifact(
        &self,
        row: &mut TransferRow,
        incoming: &Incoming,
        stop: &CancellationToken,
    ) -> Result<OwnedMutexGuard<()>, Fault> {
        let sink = self.inner.sinks.of(row.artifact.kind).clone();
        let alone = async { Ok(self.alone_with(&incoming.artifact).await) };
        unless(
            stop,
            self.watched(row, sink.as_ref(), &incoming.waits, Takes::AnyTime, alone),
        )
        .await
    }

    /// The connection to the hub, as soon as there is one.
    async fn link(&self, row: &mut TransferRow) -> Result<Link, Fault> {
        let mut watch = self.inner.link.clone();
        loop {
            if let Some(link) = watch
                .borrow_and_update()
                .clone()
                .filter(|link| !link.is_closed())
            {
                return Ok(link);
            }
            if row.body.reason != Some(Reason::HubUnreachable) {
                let fault = Fault::unreachable("there is no connection to the hub")
                    .with_reason(Reason::HubUnreachable);
                let state = row.state;
                self.enter(row, state, Some(fault)).await;
            }
            watch.changed().await.map_err(|_| stopped())?;
        }
    }

    /// Assembles the artifact, and writes its progress to the catalogue. Returns the staging
    /// folder.
    async fn staged(&self, row: &mut TransferRow, assembly: &Assembly) -> Result<PathBuf, Fault> {
        let counters = &assembly.counters;
        let run = assembly.run();
        let (mut stall, mut was_held_up) = (Stall::default(), false);
        let before = counters.received.load(Ordering::Relaxed);
        tokio::pin!(run);
        // Not the wall clock, which may be changed.
        let begun = std::time::Instant::now();
        let now_ms = || begun.elapsed().as_millis() as u64;
        let mut progress_rate =
            ProgressRate::new(now_ms(), row.body.bytes.received + row.body.bytes.reused);
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            tokio::select! {
                staged = &mut run => return staged,
                _ = ticks.tick() => {
                    self.note_bytes(row, counters);
                    let bytes = row.body.bytes;
                    let stalls = stall.secs(bytes).map(|seconds| {
                        Fault::unreachable(format!("{} has stored nothing for {seconds} s", assembly.sink.staging_root().display()))
                    });
                    let report = assembly.incoming.waits.now().or_else(|| assembly.sink.wait_reason()).or(stalls);
                    let gets_further = was_held_up || stays(row.body.reason) && counters.received.load(Ordering::Relaxed) > before;
                    if report.is_some() || gets_further {
                        row.body.set_fault(report.as_ref());
                    }
                    was_held_up = report.is_some();
                    row.body.rate = progress_rate.rate(now_ms(), bytes.received + bytes.reused);
                    self.inner.last_rate.store(row.body.rate, Ordering::Relaxed);
                    row.body.eta_seconds = progress_rate.eta(bytes.total.saturating_sub(bytes.committed));
                    self.save(row).await;
                }
            }
        }
    }
}
