//! The rights of a token of the API: its role decides about the verb, its scope about the object.

use super::{Object, Refusal, Verb, refuse};
use crate::actor::Actor;
use crate::grant::{Grant, Role};

/// The least role for a verb, and whether the verb concerns the daemon as a whole: a token with a
/// scope has no such right. `None`: no token has the right.
fn right_of(verb: Verb) -> Option<(Role, bool)> {
    Some(match verb {
        Verb::Watch | Verb::Read | Verb::ReadExclusions | Verb::ReadDigest => (Role::Viewer, false),
        Verb::Diagnose => (Role::Viewer, true),
        Verb::Publish
        | Verb::Deliver
        | Verb::Plan
        | Verb::Train
        | Verb::Finish
        // Of its own job. Those of others are the operator's.
        | Verb::CancelJob => (Role::Publisher, false),
        Verb::Act | Verb::Cancel | Verb::Pin | Verb::Verify | Verb::Export => {
            (Role::Operator, false)
        }
        Verb::Import | Verb::Collect => (Role::Operator, true),
        Verb::CreateToken | Verb::ManageAccess | Verb::ManageSites => (Role::Admin, true),
        Verb::Connect
        | Verb::Control
        | Verb::Renew
        | Verb::ReadManifest
        | Verb::ReadContent
        | Verb::Receive
        | Verb::Offer
        | Verb::Upload
        | Verb::Report
        | Verb::Borrow => return None,
    })
}

pub(super) fn may(grant: &Grant, verb: Verb, object: &Object<'_>) -> Result<(), Refusal> {
    let Some((least, is_of_all)) = right_of(verb) else {
        return refuse(
            "only a connected site or publisher does this",
            "use the API of the daemon",
        );
    };
    let is_permitted =
        grant.role.includes(least) || grant.role == Role::Wall && verb == Verb::Watch;
    if !is_permitted {
        return refuse(
            format!(
                "the token {} has the role {}, and this needs the role {least}",
                grant.name, grant.role
            ),
            "use a token with that role, or ask the administrator for one",
        );
    }
    let scope = &grant.scope;
    if is_of_all && scope.is_limited() {
        return refuse(
            format!(
                "this concerns the daemon as a whole, and the token {} has a scope",
                grant.name
            ),
            "use a token without --artifacts and --sites",
        );
    }
    match *object {
        Object::Daemon | Object::Publication { .. } | Object::RunByName(_) => Ok(()),
        Object::Named(artifact) => match &scope.artifacts {
            Some(patterns) if !patterns.iter().any(|pattern| pattern.includes(artifact)) => {
                if verb != Verb::Publish {
                    return Err(Refusal::Hidden);
                }
                let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
                refuse(
                    format!(
                        "the token {} may publish {} only, not {artifact}",
                        grant.name,
                        patterns.join(", ")
                    ),
                    "publish under another name, or ask the administrator for a token with other --artifacts",
                )
            }
            _ => Ok(()),
        },
        Object::Place { site, labels } => match &scope.sites {
            Some(sites) if !sites.includes(site, labels) => Err(Refusal::Hidden),
            _ => Ok(()),
        },
        Object::Job { starter } => {
            let is_own = matches!(starter, Some(Actor::Token(by)) if by.id == grant.id);
            if is_own {
                Ok(())
            } else if scope.is_limited() {
                Err(Refusal::Hidden)
            } else if verb == Verb::CancelJob && !grant.role.includes(Role::Operator) {
                refuse(
                    format!(
                        "the token {} has the role {}, which cancels its own jobs only",
                        grant.name, grant.role
                    ),
                    "use a token with the role operator",
                )
            } else {
                Ok(())
            }
        }
        _ => Err(Refusal::Hidden),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::super::tests::VERBS;
    use super::*;
    use crate::grant::GrantScope;

    fn grant(role: Role, artifacts: &[&str], sites: Option<&str>) -> Grant {
        let patterns = artifacts.iter().map(|text| text.parse().unwrap());
        Grant {
            id: format!("{role}{}", artifacts.len()),
            name: "t".into(),
            role,
            scope: GrantScope {
                artifacts: (!artifacts.is_empty()).then(|| patterns.collect()),
                sites: sites.map(|text| text.parse().unwrap()),
            },
        }
    }

    /// Each role, and the verbs that it has beyond those of the role before it.
    const ROLES: [(Role, &str); 5] = [
        (Role::Wall, "Watch"),
        (
            Role::Viewer,
            "Watch Read Diagnose ReadExclusions ReadDigest",
        ),
        (
            Role::Publisher,
            "Publish Deliver Plan Train Finish CancelJob",
        ),
        (
            Role::Operator,
            "Act Cancel Pin Verify Export Import Collect",
        ),
        (Role::Admin, "CreateToken ManageAccess ManageSites"),
    ];

    #[test]
    fn every_verb_of_every_role_is_in_the_table_and_no_other() {
        for role in Role::ALL {
            let rights: Vec<&str> = ROLES
                .iter()
                .filter(|(of, _)| role.includes(*of))
                .flat_map(|(_, verbs)| verbs.split_whitespace())
                .collect();
            for verb in VERBS {
                let expected = rights.contains(&format!("{verb:?}").as_str());
                let may = may(&grant(role, &[], None), verb, &Object::Daemon);
                assert_eq!(may.is_ok(), expected, "{role}: {verb:?}");
            }
        }
    }

    #[test]
    fn a_scope_hides_what_is_outside_it() {
        let token = grant(Role::Admin, &["dataset/line3-*"], Some("region=west"));
        let (inside, outside) = (
            "dataset/line3-a:v1".parse().unwrap(),
            "dataset/line4:v1".parse().unwrap(),
        );
        assert_eq!(may(&token, Verb::Read, &Object::Named(&inside)), Ok(()));
        for verb in [Verb::Read, Verb::Deliver, Verb::Verify] {
            assert_eq!(
                may(&token, verb, &Object::Named(&outside)),
                Err(Refusal::Hidden)
            );
        }
        // The holder named it himself, and it may not exist.
        assert!(matches!(
            may(&token, Verb::Publish, &Object::Named(&outside)),
            Err(Refusal::NotAllowed { .. })
        ));
        let site = "chengdu".parse().unwrap();
        for (labels, expected) in [
            (&[("region", "west")][..], Ok(())),
            (&[("region", "east")], Err(Refusal::Hidden)),
            (&[], Err(Refusal::Hidden)),
        ] {
            let labels: BTreeMap<String, String> = labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            let place = Object::Place {
                site: &site,
                labels: &labels,
            };
            assert_eq!(may(&token, Verb::Read, &place), expected);
        }
        for verb in [
            Verb::Diagnose,
            Verb::Import,
            Verb::Collect,
            Verb::CreateToken,
            Verb::ManageAccess,
        ] {
            assert!(
                matches!(
                    may(&token, verb, &Object::Daemon),
                    Err(Refusal::NotAllowed { .. })
                ),
                "{verb:?} concerns the whole daemon"
            );
        }
    }

    #[test]
    fn a_job_of_another_is_hidden_or_the_operators() {
        let by = |grant: &Grant| Actor::Token(Arc::new(grant.clone()));
        let (own, scoped) = (
            grant(Role::Publisher, &[], None),
            grant(Role::Publisher, &["model/*"], None),
        );
        let admin = Actor::Admin;
        for (token, starter, verb, expected) in [
            (&own, by(&own), Verb::CancelJob, true),
            (&own, by(&own), Verb::Read, true),
            (&own, admin.clone(), Verb::CancelJob, false),
            (&own, admin.clone(), Verb::Read, true),
            (&scoped, by(&scoped), Verb::Read, true),
            (&scoped, by(&own), Verb::Read, false),
            (&scoped, admin, Verb::CancelJob, false),
        ] {
            let job = Object::Job {
                starter: Some(&starter),
            };
            assert_eq!(may(token, verb, &job).is_ok(), expected, "{verb:?}");
        }
        let operator = grant(Role::Operator, &[], None);
        assert!(may(&operator, Verb::CancelJob, &Object::Job { starter: None }).is_ok());
    }
}
