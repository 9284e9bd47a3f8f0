//! The rights of a trainer at the API of the site that trains.

use base::names::{ArtifactRef, Kind, RunName};

use super::{Object, Refusal, Verb, refuse};
use crate::actor::Actor;

/// A trainer publishes the model of its run, finishes that run, and reads both.
pub(super) fn may(run: &RunName, verb: Verb, object: &Object<'_>) -> Result<(), Refusal> {
    let refuse = |why: String| {
        refuse(
            why,
            format!(
                "use the admin token, or leave it to the daemon: this token is valid for run {run} only"
            ),
        )
    };
    match (verb, *object) {
        (
            Verb::Publish,
            Object::Publication {
                reference,
                source,
                run: named,
                delivers,
            },
        ) => {
            let is_model = reference
                .parse::<ArtifactRef>()
                .is_ok_and(|artifact| artifact.kind == Kind::Model);
            if named != Some(run.as_str()) {
                refuse(format!(
                    "a trainer publishes for its own run only: --run {run}"
                ))
            } else if !is_model {
                refuse(format!(
                    "a trainer publishes the model of its run, and {reference} is not a model"
                ))
            } else if !source.starts_with('/') {
                refuse("a trainer publishes from a path".into())
            } else if delivers {
                refuse(
                    "the model goes to the site that started the run, and --to names others".into(),
                )
            } else {
                Ok(())
            }
        }
        (Verb::Finish | Verb::Read, Object::RunByName(name)) if name == run.as_str() => Ok(()),
        (Verb::Finish | Verb::Cancel, Object::RunByName(_)) => {
            refuse(format!("a trainer finishes its own run {run} only"))
        }
        (
            Verb::Read,
            Object::Job {
                starter: Some(Actor::Trainer(of)),
            },
        ) if of == run => Ok(()),
        _ => refuse(
            "a trainer publishes the model of its run, finishes that run, and nothing else".into(),
        ),
    }
}
