//! Training runs as actors request them: start, finish, cancel, show and list.
//!
//! The API and the sessions of sites call this. Everything that can be refused is refused before
//! the run is stored; [`super::RunKeeper`] continues from the stored run, also after a crash.

use super::{OPEN_MAX, RunKeeper};
use crate::api::types::{self, ModelLineage, RunModel, RunState, RunTrainer, RunVerb};
use crate::hub::answers::verb_of_run;
use base::clock;
use base::fault::{Code, Fault};
use base::limits::{RUN_INPUTS_MAX, RUN_TTL_MAX, RUNS_OPEN_MAX};
use base::names::{ArtifactRef, Kind, SiteName, SiteSelector};
use base::spans;
use model::actor::Actor;
use model::paging::{Page, Room};
use model::policy::{self, Object, Refusal, Scope, ShareList, Verb};
use model::run::hub::{Event, Finish, Run};
use model::run::{Input, Lineage, RunAct, RunOrder, Spec, no_run as unknown};
use state::{Part, new_delivery_id, new_run_id};

/// The inputs of a new run.
struct Inputs {
    inputs: Vec<Input>,
    /// Labels and images that the training site published itself.
    own: Vec<Part>,
    /// Inputs whose files changed after the training site published them.
    changed: Vec<String>,
}

impl RunKeeper {
    /// Starts a run, or returns the one that was started before.
    pub(in crate::hub) async fn start(
        &self,
        actor: &Actor,
        order: &RunOrder,
    ) -> Result<types::Run, Fault> {
        let catalogue = &self.inner.catalogue;
        let RunOrder {
            name,
            from,
            on,
            inputs: wanted,
            expect,
            ttl_seconds,
        } = order.clone();
        check_order(order)?;
        policy::may(actor, Verb::Train, &Object::NewRun { from: &from })?;
        self.check_sites(&from, &on).await?;
        let Inputs {
            inputs,
            mut own,
            changed,
        } = self.select_inputs(actor, &on, wanted).await?;
        let _turn = self.inner.turn.lock().await;
        if let Some(run) = catalogue.run::<Run>(name.as_str()).await? {
            let same = run.spec.from == from
                && run.spec.on == on
                && run.spec.inputs == inputs
                && run.spec.expect == expect;
            let ended_badly = matches!(run.state, RunState::Failed | RunState::Cancelled);
            return match same && !ended_badly {
                true => Ok(view(&run)),
                false => Err(Fault::conflict(match same {
                    true => format!("run {name} is {} already", run.state.as_str()),
                    false => format!("the run {name} exists already, with other parameters"),
                })
                .with_next("start it under another name")),
            };
        }
        let model = expect.reference(&name)?;
        match catalogue.artifact(&model).await {
            Ok(_) => {
                return Err(Fault::conflict(format!(
                    "{model} exists already, and run {name} would publish its model under that name"
                ))
                .with_next("expect another version, or start the run under another name"));
            }
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            Err(_) => {}
        }
        // The trainer would read the changed files, and the lineage of the model would be wrong.
        if let Some(first) = changed.first() {
            let why = format!(
                "{}: changed at {on} since it was published there",
                changed.join(", ")
            );
            return Err(Fault::conflict(why).with_next(format!(
                "'packhorse show {first}' lists the changes; at {on}, restore the original content, or publish the current content as a new version"
            )));
        }
        // A trainer finds rows and images by their names. Publishing in place does not create these
        // names. The run does not create them either, because it removes what it delivers, and this
        // is the site's own artifact.
        let named = catalogue.done_already(&own).await?;
        own.retain(|part| named.iter().all(|row| row.artifact != part.artifact));
        if !own.is_empty() {
            let all: Vec<String> = own.iter().map(|part| part.artifact.to_string()).collect();
            return Err(Fault::conflict(format!(
                "{}: published at {on}, but not delivered there, so no trainer finds the rows or the image under that name",
                all.join(", ")
            ))
            .with_next(format!("packhorse deliver {} --to {on}; when that is done, start the run again", all.join(" "))));
        }
        let open = catalogue.open_runs::<Run>(OPEN_MAX).await?;
        if open.iter().filter(|run| run.spec.on == on).count() >= RUNS_OPEN_MAX {
            return Err(
                Fault::conflict(format!("{RUNS_OPEN_MAX} runs are open at site {on}"))
                    .with_next("wait until one has ended"),
            );
        }
        let created_ms = clock::now_ms();
        let ttl_ms = i64::try_from(ttl_seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
        let spec = Spec {
            name,
            id: new_run_id(),
            from,
            on,
            inputs,
            expect,
            delivery: new_delivery_id(),
            created_ms,
            deadline_ms: created_ms.saturating_add(ttl_ms),
        };
        let run = Run::new(spec);
        catalogue
            .save_run(run.spec.name.as_str(), run.state.as_str(), true, &run)
            .await?;
        spans::run(&run.spec.name)
            .in_scope(|| tracing::info!(from = %run.spec.from, on = %run.spec.on, "a run starts"));
        Ok(view(&run))
    }

    /// Refuses a run at a site that may not train for `from`.
    async fn check_sites(&self, from: &SiteName, on: &SiteName) -> Result<(), Fault> {
        let (catalogue, entitlement) = (&self.inner.catalogue, &self.inner.entitlement);
        catalogue
            .select_sites(&format!("{from},{on}").parse()?)
            .await?;
        if let Some(list) = entitlement.excluded_by(on, from).await? {
            let (who, place) = match list {
                ShareList::Hub => ("the hub's policy".to_owned(), "the hub".to_owned()),
                ShareList::Origin => (format!("site {on}"), on.to_string()),
            };
            return Err(Fault::not_allowed(format!(
                "{who} does not share artifacts of {on} with {from}"
            ))
            .with_next(format!(
                "add {from} to [share] allow in the configuration of {place}"
            )));
        }
        let allow = catalogue.train_list(on).await?;
        let trainer = Object::Trainer {
            allow: allow.as_deref(),
        };
        if policy::may(&Actor::Site(from.clone()), Verb::Borrow, &trainer).is_err() {
            return Err(Fault::not_allowed(format!("site {on} does not train for {from}"))
                .with_next(format!("add {from} to [train] allow in the configuration of site {on}, then restart its daemon")));
        }
        Ok(())
    }

    /// The inputs of a new run. Refuses inputs that the actor, or the training site, may not have.
    async fn select_inputs(
        &self,
        actor: &Actor,
        on: &SiteName,
        wanted: Vec<ArtifactRef>,
    ) -> Result<Inputs, Fault> {
        let entitlement = &self.inner.entitlement;
        let mut inputs: Vec<Input> = Vec::new();
        let (mut own, mut changed): (Vec<Part>, Vec<String>) = Default::default();
        for artifact in wanted {
            if inputs.iter().any(|input| input.artifact == artifact) {
                continue;
            }
            let row = entitlement
                .artifact_for(actor, Verb::Train, &artifact, false)
                .await?;
            // The training site needs all inputs.
            let there = SiteSelector::Names(vec![on.clone()]);
            let (origin, only) = (row.origin.as_ref(), std::slice::from_ref(on));
            entitlement
                .targets(actor, &artifact, origin, only, &there)
                .await?;
            if row.origin.as_ref() == Some(on)
                && matches!(artifact.kind, Kind::Labels | Kind::Image)
            {
                own.push(Part::new(&row, std::slice::from_ref(on)));
            } else if row.origin.as_ref() == Some(on) && row.changed.is_some() {
                changed.push(artifact.to_string());
            }
            inputs.push(Input {
                artifact,
                digest: row.digest,
                bytes: row.root.totals.bytes,
            });
        }
        Ok(Inputs {
            inputs,
            own,
            changed,
        })
    }

    /// Finishes or cancels a run.
    pub(in crate::hub) async fn act_on(
        &self,
        actor: &Actor,
        request: &RunAct,
    ) -> Result<types::Run, Fault> {
        let run = self
            .run_for(actor, verb_of_run(request.action), request.name.as_str())
            .await?;
        let event = match request.action {
            RunVerb::Finish => Event::Finish(Finish {
                failed: request.failed.as_deref().map(Into::into),
            }),
            RunVerb::Cancel => Event::Cancel,
        };
        let (run, ..) = self.take(&run.spec.name, event).await?;
        Ok(view(&run))
    }

    /// The run, if `actor` may do `verb` with it. A run that the actor may not know gets the answer
    /// for one that does not exist.
    pub(super) async fn run_for(
        &self,
        actor: &Actor,
        verb: Verb,
        name: &str,
    ) -> Result<Run, Fault> {
        let run = self.load(name).await?;
        let Spec { from, on, .. } = &run.spec;
        match policy::may(actor, verb, &Object::Run { from, on }) {
            Ok(()) => Ok(run),
            Err(Refusal::Hidden) => Err(unknown(name)),
            Err(other) => Err(other.into()),
        }
    }

    /// One run, if `actor` may read it.
    pub(in crate::hub) async fn show(
        &self,
        actor: &Actor,
        name: &str,
    ) -> Result<types::Run, Fault> {
        Ok(view(&self.run_for(actor, Verb::Read, name).await?))
    }

    /// The newest of the runs that `actor` may read.
    pub(in crate::hub) async fn list(
        &self,
        actor: &Actor,
        behind: Option<&str>,
        skip: u32,
        room: Room,
    ) -> Result<Page<types::Run>, Fault> {
        let of = match policy::runs_scope(actor)? {
            Scope::All => None,
            Scope::Of(site) => Some(site),
        };
        self.inner
            .catalogue
            .run_page(of, behind, skip, room, view)
            .await
    }
}

/// Refuses an order that is not valid by itself.
fn check_order(order: &RunOrder) -> Result<(), Fault> {
    let RunOrder {
        from,
        on,
        inputs,
        ttl_seconds,
        ..
    } = order;
    if from == on {
        return Err(
            Fault::usage(format!("site {from} cannot train for itself in a run"))
                .with_next("start the trainer there manually"),
        );
    }
    if inputs.is_empty() || inputs.len() > RUN_INPUTS_MAX {
        return Err(Fault::usage(format!(
            "a run needs 1 to {RUN_INPUTS_MAX} inputs, and {} are named",
            inputs.len()
        )));
    }
    if *ttl_seconds == 0 || *ttl_seconds > RUN_TTL_MAX.as_secs() {
        return Err(Fault::usage(format!(
            "a run's time is 1 s to {} days",
            RUN_TTL_MAX.as_secs() / 86_400
        )));
    }
    Ok(())
}

/// A lineage as the API shows it.
pub(crate) fn lineage_view(lineage: Lineage) -> ModelLineage {
    let inputs = lineage.inputs.iter().map(Into::into).collect();
    ModelLineage {
        run: lineage.run,
        from: lineage.from,
        on: lineage.on,
        inputs,
    }
}

/// A run as the API shows it.
pub(in crate::hub) fn view(run: &Run) -> types::Run {
    let trainer = run.site.as_ref().map(|site| {
        let ended = site.ended.as_ref();
        let phase = serde_json::to_value(site.phase)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned));
        RunTrainer {
            phase: phase.unwrap_or_default(),
            starts: site.starts,
            started_at: site.started_ms.map(clock::rfc3339_ms),
            ended_at: ended.map(|e| clock::rfc3339_ms(e.ended_ms)),
            exit_code: ended.and_then(|e| e.exit_code),
            signal: ended.and_then(|e| e.signal),
            message: site.words().map(str::to_owned),
            tail: ended.map(|e| e.tail.to_string()),
        }
    });
    types::Run {
        name: run.spec.name.clone(),
        from: run.spec.from.clone(),
        on: run.spec.on.clone(),
        state: run.state,
        message: run.message(),
        next: run.next.clone(),
        inputs: run.spec.inputs.iter().map(Into::into).collect(),
        expect: run.spec.expect.to_string(),
        model: run.model.as_ref().map(|m| RunModel {
            artifact: m.artifact.to_string(),
            digest: m.digest.hex(),
        }),
        delivery: run.spec.delivery.to_string(),
        home: run.home.as_ref().map(ToString::to_string),
        trainer,
        released: run.released,
        created_at: clock::rfc3339_ms(run.spec.created_ms),
        deadline_at: clock::rfc3339_ms(run.spec.deadline_ms),
        finished_at: run.finished_ms.map(clock::rfc3339_ms),
    }
}
