//! Training runs at the hub: executes the effects of the state machine `run::hub`, and passes it
//! the observed events.
//!
//! Runs are checked one at a time, and each change is written before it is executed. Effects that a
//! crash prevented are executed at the next check, because the state machine returns an effect
//! until it is done.

mod requests;

pub(crate) use requests::lineage_view;
pub(in crate::hub) use requests::view as run_view;

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;

use super::deliveries::Deliveries;
use super::entitlement::Entitlement;
use super::library::HubLibrary;
use crate::api::types::{self, State};
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, RunName, SiteName};
use base::spans;
use base::workers::Worker;
use content::chunk::Hash;
use content::manifest::Root;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::run::hub::{Effect, Event, ObservedTransfer, Run, step};
use model::run::{Borrowed, DesiredRun, Lineage, Model, RunReport, Spec, no_run as unknown};
use state::{Catalogue, Part, TransferRow, new_delivery_id};

/// A run may take several steps in one check; more steps than this are a defect.
const STEPS_MAX: usize = 16;
/// The shortest pause between two checks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The most open runs that are checked.
const OPEN_MAX: u32 = 10_000;
/// The approximate part of one message that the runs of a site may use.
const RUNS_BYTES_MAX: usize = 1 << 20;

/// The training runs. Cheap to clone.
#[derive(Clone)]
pub(super) struct RunKeeper {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    entitlement: Entitlement,
    deliveries: Deliveries,
    library: HubLibrary,
    /// Events are handled one after the other.
    turn: tokio::sync::Mutex<()>,
}

impl RunKeeper {
    /// The runs of this catalogue.
    pub(super) fn new(
        catalogue: Catalogue,
        entitlement: Entitlement,
        deliveries: Deliveries,
        library: HubLibrary,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                entitlement,
                deliveries,
                library,
                turn: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// Checks the open runs after each change, until the daemon stops.
    pub(super) async fn keep(&self, worker: &Worker) -> Result<(), Fault> {
        let mut watch = self.inner.catalogue.watch_decisions();
        loop {
            // The worker reports a fault, and tries again.
            let _ = worker
                .iterate(async {
                    let open = self.inner.catalogue.open_runs::<Run>(OPEN_MAX).await;
                    for run in open.map_err(|fault| fault.context("read the open runs"))? {
                        let name = &run.spec.name;
                        let look = async {
                            if let Err(fault) = Box::pin(self.look_at(name)).await {
                                worker.count_error(&fault.clone().context(name));
                                tracing::warn!(error = %fault, "a run could not continue; retrying");
                            }
                        };
                        look.instrument(spans::run(name)).await;
                    }
                    Ok(())
                })
                .await;
            watch.changed().await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn load(&self, name: &str) -> Result<Run, Fault> {
        self.inner
            .catalogue
            .run(name)
            .await?
            .ok_or_else(|| unknown(name))
    }

    /// Applies an event; the change is durable when this returns. The caller executes the effects.
    async fn take(&self, name: &RunName, event: Event) -> Result<(Run, Vec<Effect>, bool), Fault> {
        let _turn = self.inner.turn.lock().await;
        self.take_in_turn(name, event).await
    }

    /// The same for a caller that holds `turn`.
    async fn take_in_turn(
        &self,
        name: &RunName,
        event: Event,
    ) -> Result<(Run, Vec<Effect>, bool), Fault> {
        let before = self.load(name.as_str()).await?;
        let (after, effects) = step(&before, event, clock::now_ms())?;
        let changed = after != before;
        if changed {
            if after.state != before.state {
                spans::run(name).in_scope(|| {
                    tracing::info!(
                        state = after.state.as_str(),
                        why = after.message.as_deref().unwrap_or_default(),
                        "the state of a run changed"
                    );
                });
            }
            self.inner
                .catalogue
                .save_run(name.as_str(), after.state.as_str(), after.is_open(), &after)
                .await?;
        }
        Ok((after, effects, changed))
    }

    /// Checks a run until nothing changes.
    async fn look_at(&self, name: &RunName) -> Result<(), Fault> {
        for _ in 0..STEPS_MAX {
            let run = self.load(name.as_str()).await?;
            let parts = self
                .inner
                .catalogue
                .delivery_parts(&run.spec.delivery)
                .await?;
            // After its end, a run concerns only the transfers that no other run or delivery needs.
            let own = match run.state.is_final() {
                true => {
                    self.inner
                        .catalogue
                        .only_borrowed(name.as_str(), &run.spec.on)
                        .await?
                }
                false => parts.clone().unwrap_or_default(),
            };
            let inputs = own.iter().map(|row| self.seen(row)).collect();
            let home = match &run.model {
                Some(model) => self.home_of(&run, model).await?,
                None => None,
            };
            let home = home.map(|row| self.seen(&row));
            let (run, effects, changed) = self
                .take(
                    name,
                    Event::Looked {
                        delivered: parts.is_some(),
                        inputs,
                        home,
                    },
                )
                .await?;
            for effect in &effects {
                self.run_effect(&run, *effect).await?;
            }
            if effects.is_empty() && !changed {
                return Ok(());
            }
        }
        Err(Fault::internal("the run does not reach a stable state"))
    }

    fn seen(&self, row: &TransferRow) -> ObservedTransfer {
        let view = self.inner.deliveries.view(row);
        ObservedTransfer {
            id: row.id.clone(),
            state: view.state,
            message: view.message,
        }
    }

    async fn home_of(&self, run: &Run, model: &Model) -> Result<Option<TransferRow>, Fault> {
        let rows = self
            .inner
            .catalogue
            .transfers_of_artifact(&model.artifact)
            .await?;
        let own = |row: &TransferRow| row.site == run.spec.from && row.removed_ms.is_none();
        // The transfer that was not cancelled, else the one that was cancelled last.
        let kept = rows
            .iter()
            .rev()
            .find(|row| own(row) && row.state != State::Cancelled);
        Ok(kept
            .or_else(|| rows.iter().rev().find(|row| own(row)))
            .cloned())
    }

    async fn run_effect(&self, run: &Run, effect: Effect) -> Result<(), Fault> {
        let catalogue = &self.inner.catalogue;
        match effect {
            Effect::Borrow => {
                let mut parts = Vec::new();
                for input in &run.spec.inputs {
                    let row = catalogue.artifact(&input.artifact).await?;
                    // An artifact that was published at that site needs no transfer. Its rows and
                    // images were delivered there, otherwise the run was refused.
                    if row.origin.as_ref() != Some(&run.spec.on) {
                        parts.push(Part::new(&row, std::slice::from_ref(&run.spec.on)));
                    }
                }
                self.inner
                    .deliveries
                    .begin(&run.spec.delivery, Some(run.spec.name.as_str()), &parts)
                    .await
                    .map(|_| ())
            }
            Effect::SendHome => {
                let Some(model) = &run.model else {
                    return Ok(());
                };
                catalogue
                    .set_lineage(&model.artifact, &Lineage::from(&run.spec))
                    .await?;
                let row = catalogue.artifact(&model.artifact).await?;
                let part = Part::new(&row, std::slice::from_ref(&run.spec.from));
                self.inner
                    .deliveries
                    .begin(&new_delivery_id(), None, &[part])
                    .await
                    .map(|_| ())
            }
            Effect::Abandon => {
                let own = catalogue
                    .only_borrowed(run.spec.name.as_str(), &run.spec.on)
                    .await?;
                let home = match &run.model {
                    Some(model) => self.home_of(run, model).await?,
                    None => None,
                };
                for row in own.into_iter().chain(home) {
                    if !matches!(row.state, State::Done | State::Cancelled) {
                        catalogue.act(&row.id, types::Action::Cancel).await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The runs of a site's desired state: the oldest, as many as fit in a message. The others
    /// wait. `None`: a run cannot be read, and a list without it would end it at its site.
    pub(super) async fn desired(&self, site: &SiteName) -> Result<Option<Vec<DesiredRun>>, Fault> {
        let catalogue = &self.inner.catalogue;
        let Some(open) = catalogue.complete_open_runs::<Run>(OPEN_MAX).await? else {
            return Ok(None);
        };
        let mut out = Vec::new();
        let mut listed_bytes = 0;
        for run in open {
            if run.spec.on != *site {
                continue;
            }
            // The estimate uses only values that never change, because the site ends a run that is
            // no longer listed. The list of borrowed inputs repeats the inputs.
            let spec = serde_json::to_vec(&run.spec)
                .map_err(|e| Fault::internal(format!("a run as JSON: {e}")))?;
            listed_bytes += 3 * spec.len();
            if listed_bytes > RUNS_BYTES_MAX && !out.is_empty() {
                break;
            }
            let borrowed = self
                .inner
                .catalogue
                .only_borrowed(run.spec.name.as_str(), site)
                .await?;
            let borrowed = borrowed.into_iter().map(|row| Borrowed {
                transfer: row.id,
                artifact: row.artifact,
                digest: row.digest,
                generation: Some(row.generation),
            });
            let (want, ready) = (run.want(), run.is_ready());
            out.push(DesiredRun {
                want,
                borrowed: borrowed.collect(),
                model: run.model,
                spec: run.spec,
                ready,
            });
        }
        Ok(Some(out))
    }

    /// Handles a site's report of a run.
    pub(super) async fn take_report(
        &self,
        site: &SiteName,
        report: RunReport,
    ) -> Result<(), Fault> {
        let run = self.load(report.name.as_str()).await?;
        let actor = Actor::Site(site.clone());
        let Spec { from, on, .. } = &run.spec;
        policy::may(&actor, Verb::Report, &Object::Run { from, on })
            .map_err(|_| Fault::not_allowed(format!("site {site} reported a run of site {on}")))?;
        if run.spec.id != report.id {
            return Ok(());
        }
        let borrowed = match report.removed.is_empty() {
            true => Vec::new(),
            false => {
                self.inner
                    .catalogue
                    .only_borrowed(report.name.as_str(), site)
                    .await?
            }
        };
        for id in &report.removed {
            let Ok(row) = self.inner.catalogue.transfer(id).await else {
                continue;
            };
            let transfer = Object::Transfer { to: &row.site };
            let ours = policy::may(&actor, Verb::Report, &transfer).is_ok()
                && run
                    .spec
                    .inputs
                    .iter()
                    .any(|input| input.artifact == row.artifact);
            if !ours || row.state != State::Done || row.removed_ms.is_some() {
                continue;
            }
            if borrowed.iter().any(|row| row.id == *id) {
                self.inner
                    .catalogue
                    .set_removed(id, clock::now_ms())
                    .await?;
            } else {
                // Another run or delivery has requested the artifact since, and the site learned it
                // too late.
                spans::transfer(id, &row.artifact, site).in_scope(|| {
                    tracing::info!("a removed artifact is requested again, and delivered again");
                });
                self.inner.catalogue.act(id, types::Action::Retry).await?;
            }
        }
        let name = report.name.clone();
        self.take(&name, Event::Reported(Box::new(report)))
            .await
            .map(|_| ())
    }

    /// Refuses a model that its run would refuse, before any of it is stored.
    pub(super) async fn check_model(
        &self,
        actor: &Actor,
        run: &RunName,
        artifact: &ArtifactRef,
    ) -> Result<(), Fault> {
        let row = self.run_for(actor, Verb::Publish, run.as_str()).await?;
        // The digest of a new model is not known yet; a known model has one.
        let digest = match &row.model {
            Some(model) => model.digest,
            None => Hash([0; 32]),
        };
        step(
            &row,
            Event::Published(Model {
                artifact: artifact.clone(),
                digest,
            }),
            clock::now_ms(),
        )
        .map(|_| ())
    }

    /// Adds the model of a run to the catalogue. If the run ended while the manifest was fetched,
    /// the model is refused, because it would use up its version without a result. `false`: the
    /// catalogue has it already.
    pub(super) async fn add_model(
        &self,
        actor: &Actor,
        name: &RunName,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<bool, Fault> {
        let turn = self.inner.turn.lock().await;
        self.check_model(actor, name, artifact).await?;
        let added = self
            .inner
            .library
            .register(actor.site(), artifact, root)
            .await?;
        let model = Model {
            artifact: artifact.clone(),
            digest: root.digest(),
        };
        let (run, ..) = self.take_in_turn(name, Event::Published(model)).await?;
        drop(turn);
        self.inner
            .catalogue
            .set_lineage(artifact, &Lineage::from(&run.spec))
            .await?;
        Ok(added)
    }
}
