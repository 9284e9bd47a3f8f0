//! The inputs of a run: whether they have arrived, and whether they are unchanged when a trainer
//! starts.
//!
//! [`super::RunKeeper`] calls this before each start of a trainer. Nothing here is stored.

use super::{RunKeeper, Try};
use crate::site::watch::WatchResult;
use base::fault::{Code, Fault, Retry};
use base::names::ArtifactRef;
use model::run::Input;
use model::run::site::{Event, Run};

impl RunKeeper {
    /// Whether the catalogue lists an input as present. An input that is being delivered again is
    /// not present until it has arrived.
    pub(super) async fn is_listed(&self, input: &Input) -> Result<bool, Fault> {
        let catalogue = &self.opened.catalogue;
        match catalogue.artifact(&input.artifact).await {
            Ok(row) if row.place.is_some() && row.digest == input.digest => {}
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(false),
        }
        Ok(catalogue
            .transfers_of_artifact(&input.artifact)
            .await?
            .iter()
            .all(|row| row.state.is_final()))
    }

    /// Whether a trainer may start with the inputs now. If not, the reason is recorded.
    pub(super) async fn may_begin(&self, run: &Run) -> Result<bool, Fault> {
        let name = &run.spec.name;
        if self.is_too_soon(name, Try::GoOn) {
            return Ok(false);
        }
        let Err(fault) = self.check_inputs(run).await else {
            return Ok(true);
        };
        self.put_off(name, Try::GoOn);
        let event = match fault.retry {
            Retry::Never => Event::NotStarted(fault.message),
            Retry::Backoff | Retry::AfterMs(_) => Event::NotYet(fault.message),
        };
        self.take(name, event).await?;
        Ok(false)
    }

    /// Checks the inputs before a trainer starts. Files that were published here in place may have
    /// changed since, and the lineage of the model would then be wrong. A failed check is tried
    /// again; only a missing or changed input is a permanent failure.
    pub(super) async fn check_inputs(&self, run: &Run) -> Result<(), Fault> {
        for Input {
            artifact, digest, ..
        } in &run.spec.inputs
        {
            let in_place = match self.opened.catalogue.artifact(artifact).await {
                Ok(there) => artifact.kind.is_files() && there.published,
                Err(fault) => return Err(not_now(artifact, fault)),
            };
            if in_place {
                match self.watch.check(artifact, true).await {
                    Ok(WatchResult::Unchanged) => {}
                    Ok(WatchResult::Changed(how)) => {
                        return Err(Fault::integrity(format!(
                            "{artifact} differs from its published content: {how}"
                        )));
                    }
                    Ok(WatchResult::Unknown) => {
                        return Err(not_now(
                            artifact,
                            Fault::unreachable("its folder is not available"),
                        ));
                    }
                    Err(fault) => return Err(not_now(artifact, fault)),
                }
            }
            match self.opened.runner.holds(artifact, *digest).await {
                Ok(true) => {}
                Ok(false) => {
                    return Err(Fault::not_found(format!(
                        "{artifact} is no longer at this site"
                    )));
                }
                Err(fault) => return Err(not_now(artifact, fault)),
            }
        }
        Ok(())
    }
}

/// The fault for an input that cannot be checked. This is temporary unless its manifest is damaged.
fn not_now(artifact: &ArtifactRef, fault: Fault) -> Fault {
    match fault.code {
        Code::Integrity => fault.context(artifact),
        _ => fault
            .context(format_args!("waits for {artifact}"))
            .with_retry(Retry::Backoff),
    }
}
