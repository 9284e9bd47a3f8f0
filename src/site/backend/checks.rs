//! The checks of a site: its copies of artifacts (`verify`), and its surroundings (`doctor`).
//!
//! The API calls this through [`super::Site`]. Nothing here is stored.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Site;
use crate::api::types::{Action, State, Transfer};
use crate::trainer;
use base::blocking::{blocking, blocking_at};
use base::fault::Fault;
use base::job_progress::JobProgress;
use base::limits::SINK_ANSWER_MAX;
use base::names::{ArtifactRef, TransferId};
use exchange::transfer::{VerifyReport, beside, verify};
use model::protocol::AskHub;
use sink::{Incoming, Verification};
use state::ArtifactRow;

impl Site {
    /// Reads and checks this site's copy of an artifact. Returns one line for each fault; other
    /// differences are notes.
    pub(super) async fn verify_now(
        &self,
        row: ArtifactRow,
        quick: bool,
        progress: Arc<JobProgress>,
    ) -> Result<Vec<String>, Fault> {
        let Some(place) = row.place.clone() else {
            return Ok(vec![format!("this site has no copy of {}", row.artifact)]);
        };
        progress.doing(format!("re-reading {}", row.artifact));
        if !quick {
            let total = row.root.totals.bytes;
            progress.total.store(total, Ordering::Relaxed);
        }
        if row.published {
            if quick {
                progress.note(
                    "it was published here, and there is no quick check for that: its content was read",
                );
            }
            let origin = self.inner.opened.reader.clone();
            let path = place.filesystem().to_owned();
            return blocking_at(&path, move || {
                let read = |bytes| {
                    progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                    progress.check()
                };
                origin.verify(row.digest, &row.root, &[place], read)
            })
            .await;
        }
        let sink = self.inner.opened.sinks.of(row.artifact.kind).clone();
        let incoming = Incoming {
            artifact: row.artifact,
            digest: row.digest,
            root: row.root,
            transfer: TransferId::none(),
            waits: Default::default(),
        };
        let counted = progress.clone();
        let look = Verification::new(quick, move |bytes| {
            counted.bytes.fetch_add(bytes, Ordering::Relaxed);
        });
        let store = &self.inner.opened.shared.store;
        let VerifyReport {
            faults,
            notes,
            unread,
        } = verify(sink.as_ref(), store.clone(), &incoming, &place, &look).await?;
        if let Some(why) = unread.filter(|_| faults.is_empty()) {
            return Err(Fault::not_allowed(format!(
                "{} was not verified: {why}",
                incoming.artifact
            ))
            .with_next(
                "run 'packhorse verify' again when the registry allows a pull of the image",
            ));
        }
        notes.into_iter().for_each(|note| progress.note(note));
        // A repair keeps additional files, so they are reported before it.
        progress.doing(format!(
            "looking for additional files of {}",
            incoming.artifact
        ));
        if let Some(note) = beside(
            sink.as_ref(),
            store.clone(),
            &incoming,
            &place,
            faults.is_empty(),
        )
        .await?
        {
            progress.note(note);
        }
        Ok(faults)
    }

    /// Requests from the hub a new delivery of an artifact that is damaged or incomplete here.
    pub(super) async fn ask_again(&self, artifact: &ArtifactRef) -> Result<String, Fault> {
        let rows = self
            .inner
            .opened
            .catalogue
            .transfers_of_artifact(artifact)
            .await?;
        let Some(brought) = rows
            .iter()
            .rev()
            .find(|row| row.state == State::Done && row.removed_ms.is_none())
        else {
            return Err(Fault::conflict(format!(
                "no completed transfer delivered {artifact} to this site"
            ))
            .with_next("see 'packhorse status'; at the hub: packhorse deliver"));
        };
        let _: Vec<Transfer> = self
            .inner
            .hub
            .ask(&AskHub::Act {
                id: (&brought.id).into(),
                action: Action::Retry,
            })
            .await?;
        Ok(format!(
            "the missing content was requested from the hub: packhorse status {}",
            brought.id
        ))
    }

    /// The lines of `doctor`: the connection, the sinks, the trainer, and this daemon's own state.
    pub(super) async fn checks(&self) -> Result<Vec<String>, Fault> {
        let inner = &self.inner;
        let mut out = Vec::new();
        let link = inner.hub.link();
        out.push(match (&link, inner.hub.fault()) {
            (Some(link), _) => {
                let config = &inner.opened.config;
                let addresses = config.hub.iter().flat_map(|hub| hub.address.split(','));
                let proxy = addresses
                    .filter(|_| link.transport() == "tcp")
                    .find_map(|address| config.line.proxy.of_hub(address))
                    .map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"));
                let reason = link
                    .reason()
                    .map_or_else(String::new, |why| format!("; {why}"));
                format!(
                    "ok line: {} to {}{proxy}, round trip {} ms{reason}",
                    link.transport(),
                    link.remote_address(),
                    link.rtt().as_millis()
                )
            }
            (None, Some(fault)) => format!("fault line: {}; {}", fault.message, fault.next),
            (None, None) => "fault line: not connected yet".into(),
        });
        out.extend(
            link.as_ref()
                .and_then(transport::clock_difference)
                .map(|text| format!("fault clock: {text}")),
        );
        let probes = inner.opened.sinks.all().map(|sink| async move {
            let silent = |_| {
                let text = format!(
                    "{} has not answered for {} s",
                    sink.staging_root().display(),
                    SINK_ANSWER_MAX.as_secs()
                );
                Err(sink
                    .wait_reason()
                    .unwrap_or_else(|| Fault::unreachable(text)))
            };
            tokio::time::timeout(SINK_ANSWER_MAX, sink.probe())
                .await
                .unwrap_or_else(silent)
        });
        for probed in futures::future::join_all(probes).await {
            out.push(match probed {
                Ok(text) => format!("ok {text}"),
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        if let Some(program) = inner
            .opened
            .config
            .train
            .as_ref()
            .and_then(|train| train.command.first().cloned())
        {
            let path = PathBuf::from(&program);
            let checked = blocking_at(&path, move || {
                trainer::check_program(&program)
                    .map(|()| format!("ok train: {program} is executable"))
            });
            let silent = |_| {
                let text = format!(
                    "{} has not answered for {} s",
                    path.display(),
                    SINK_ANSWER_MAX.as_secs()
                );
                Err(Fault::unreachable(text))
            };
            let checked = tokio::time::timeout(SINK_ANSWER_MAX, checked).await;
            out.push(match checked.unwrap_or_else(silent) {
                Ok(text) => text,
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        let (data, index) = (
            inner.opened.config.data_dir.clone(),
            inner.opened.shared.chunk_index.clone(),
        );
        let own = move || {
            let mut out = vec![sink::stage::room_report(&data)?];
            out.extend(crate::site::lost::report(&data));
            out.extend(index.loss().map(|loss| loss.report(&data)));
            Ok(out)
        };
        out.extend(blocking(own).await?);
        out.extend(inner.watch.changed_lines().await?);
        out.extend(crate::api::malformed_lines(&inner.opened.catalogue));
        out.extend(inner.workers.doctor());
        Ok(out)
    }
}
