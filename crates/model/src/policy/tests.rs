//! The rights as one table: every actor, every verb, every object. What the table does not name is
//! refused.

use std::collections::BTreeSet;

use super::*;

pub(super) const VERBS: [Verb; 31] = [
    Verb::Connect,
    Verb::Control,
    Verb::Renew,
    Verb::ReadManifest,
    Verb::ReadContent,
    Verb::Receive,
    Verb::Watch,
    Verb::Read,
    Verb::Diagnose,
    Verb::ReadExclusions,
    Verb::ReadDigest,
    Verb::Publish,
    Verb::Offer,
    Verb::Upload,
    Verb::Deliver,
    Verb::Plan,
    Verb::Act,
    Verb::Report,
    Verb::Train,
    Verb::Borrow,
    Verb::Finish,
    Verb::Cancel,
    Verb::Pin,
    Verb::Verify,
    Verb::Export,
    Verb::Import,
    Verb::Collect,
    Verb::CancelJob,
    Verb::CreateToken,
    Verb::ManageAccess,
    Verb::ManageSites,
];

/// What the administrator may do, to every object.
const ADMIN: &str = "Watch Read Diagnose ReadExclusions ReadDigest Publish Deliver Plan Act Train Finish Cancel Pin Verify Export Import Collect CancelJob \
                     CreateToken ManageAccess ManageSites";
/// What the hub may do at a site or a publisher, to every object.
const HUB: &str = "ReadManifest ReadContent Plan Verify";

/// Object, actor, verbs. Site `a` is the origin of every artifact that has one, gets the model of
/// every run, and the transfers go to it. Site `b` trains. Site `c` has to do with nothing.
/// Publisher `p` uploaded what was uploaded. The trainer is that of run `r`.
const TABLE: &[(&str, &str, &str)] = &[
    (
        "daemon",
        "site a",
        "Control Renew ReadManifest ReadContent Read Offer Deliver Act Report Train Finish Cancel",
    ),
    (
        "daemon",
        "site b",
        "Control Renew ReadManifest ReadContent Read Offer Deliver Act Report Train Finish Cancel",
    ),
    (
        "daemon",
        "site c",
        "Control Renew ReadManifest ReadContent Read Offer Deliver Act Report Train Finish Cancel",
    ),
    ("daemon", "publisher p", "Renew Upload"),
    ("daemon", "publisher q", "Renew Upload"),
    ("daemon", "publisher a", "Renew Upload"),
    ("member", "site a", "Connect Renew"),
    ("member, expired within the grace", "site a", "Renew"),
    ("member", "site b", "Connect Renew"),
    ("member, expired within the grace", "site b", "Renew"),
    ("member", "site c", "Connect Renew"),
    ("member, expired within the grace", "site c", "Renew"),
    ("member", "publisher p", "Connect Renew"),
    ("member, expired within the grace", "publisher p", "Renew"),
    ("member", "publisher q", "Connect Renew"),
    ("member, expired within the grace", "publisher q", "Renew"),
    ("member", "publisher a", "Connect Renew"),
    ("member, expired within the grace", "publisher a", "Renew"),
    (
        "artifact of a",
        "site a",
        "Read ReadExclusions Deliver Train",
    ),
    (
        "artifact of a, delivered",
        "site a",
        "Read ReadExclusions Deliver Train",
    ),
    ("artifact of a, delivered", "site b", "Read Deliver Train"),
    ("artifact of a, delivered", "site c", "Read Deliver Train"),
    (
        "artifact of the hub, delivered",
        "site a",
        "Read Deliver Train",
    ),
    (
        "artifact of the hub, delivered",
        "site b",
        "Read Deliver Train",
    ),
    (
        "artifact of the hub, delivered",
        "site c",
        "Read Deliver Train",
    ),
    ("artifact of the hub, supplied", "site a", "Deliver"),
    ("artifact of the hub, supplied", "site b", "Deliver"),
    ("artifact of the hub, supplied", "site c", "Deliver"),
    ("artifact of the hub, supplied", "publisher p", "Deliver"),
    ("artifact of the hub, supplied", "publisher q", "Deliver"),
    ("artifact of the hub, supplied", "publisher a", "Deliver"),
    ("published by the hub", "site a", "Receive"),
    ("published by the hub", "site b", "Receive"),
    ("published by the hub", "site c", "Receive"),
    ("published by a for all", "site a", "Receive"),
    ("published by a for all", "site b", "Receive"),
    ("published by a for all", "site c", "Receive"),
    ("published by a, the hub allows b", "site a", "Receive"),
    ("published by a, the hub allows b", "site b", "Receive"),
    ("published by a for b", "site a", "Receive"),
    ("published by a for b", "site b", "Receive"),
    ("published by a for nobody", "site a", "Receive"),
    (
        "content delivered and shared",
        "site a",
        "ReadManifest ReadContent",
    ),
    (
        "content delivered and shared",
        "site b",
        "ReadManifest ReadContent",
    ),
    (
        "content delivered and shared",
        "site c",
        "ReadManifest ReadContent",
    ),
    // Of its own content a site is never deprived.
    (
        "content delivered, of a for nobody",
        "site a",
        "ReadManifest ReadContent",
    ),
    (
        "content delivered, of a for nobody and of the hub",
        "site a",
        "ReadManifest ReadContent",
    ),
    (
        "content delivered, of a for nobody and of the hub",
        "site b",
        "ReadManifest ReadContent",
    ),
    (
        "content delivered, of a for nobody and of the hub",
        "site c",
        "ReadManifest ReadContent",
    ),
    ("content planned", "site a", "ReadManifest"),
    ("content planned", "site b", "ReadManifest"),
    ("content planned", "site c", "ReadManifest"),
    ("name taken by a for b", "site a", "ReadDigest"),
    ("name taken by a for b", "site b", "ReadDigest"),
    ("name taken by the hub, delivered", "site a", "ReadDigest"),
    ("name taken by the hub, delivered", "site b", "ReadDigest"),
    ("name taken by the hub, delivered", "site c", "ReadDigest"),
    ("name taken by p", "publisher p", "ReadDigest"),
    (
        "publication of the model of r",
        "trainer of run r",
        "Publish",
    ),
    ("transfer to a", "site a", "Act Report"),
    ("progress of a transfer to a", "site a", "Read"),
    ("progress of a transfer to a, of b", "site a", "Read"),
    ("progress of a transfer to a, of b", "site b", "Read"),
    ("progress of a transfer to a, delivered", "site a", "Read"),
    ("progress of a transfer to a, delivered", "site b", "Read"),
    ("progress of a transfer to a, delivered", "site c", "Read"),
    ("run from a on b", "site a", "Read Finish Cancel"),
    (
        "run from a on b",
        "site b",
        "Read Finish Cancel Publish Report",
    ),
    ("run r by name", "trainer of run r", "Read Finish"),
    ("new run from a", "site a", "Train"),
    ("trainer that reported nothing", "site a", "Borrow"),
    ("trainer that reported nothing", "site b", "Borrow"),
    ("trainer that reported nothing", "site c", "Borrow"),
    ("trainer for a", "site a", "Borrow"),
    ("trainer for all", "site a", "Borrow"),
    ("trainer for all", "site b", "Borrow"),
    ("trainer for all", "site c", "Borrow"),
    ("job of the trainer of r", "trainer of run r", "Read"),
];

fn name(text: &str) -> SiteName {
    text.parse().unwrap()
}

fn actors() -> Vec<Actor> {
    let publisher = |name: &str| Actor::Publisher(name.parse().unwrap());
    let trainer = |run: &str| Actor::Trainer(run.parse().unwrap());
    let site = |text: &str| Actor::Site(name(text));
    vec![
        Actor::Admin,
        trainer("r"),
        trainer("other"),
        site("a"),
        site("b"),
        site("c"),
        publisher("p"),
        // The name of a site gives a publisher nothing of what that site may.
        publisher("a"),
        publisher("q"),
        Actor::Hub,
    ]
}

/// Calls `see` with each object and its name.
fn each_object(mut see: impl FnMut(&'static str, &Object<'_>)) {
    let (a, b) = (name("a"), name("b"));
    let p: PublisherName = "p".parse().unwrap();
    let starter = Actor::Trainer("r".parse().unwrap());
    let named: ArtifactRef = "dataset/x:v1".parse().unwrap();
    let no_labels = BTreeMap::new();
    let labels = BTreeMap::from([("line".to_owned(), "3".to_owned())]);
    let for_b: Vec<SiteSelector> = vec!["b".parse().unwrap()];
    let nobody: Vec<SiteSelector> = vec!["line=4".parse().unwrap()];
    let everybody: Vec<SiteSelector> = vec!["x".parse().unwrap(), "line=3".parse().unwrap()];
    let published = |origin: Option<_>, hub: Option<_>, of_origin: Option<_>| Published {
        origin,
        sharing: Sharing {
            hub,
            origin: of_origin,
            labels: &labels,
        },
    };
    let of_hub = published(None, Some(nobody.as_slice()), Some(nobody.as_slice()));
    let of_a = |of_origin| published(Some(&a), None, Some(of_origin));
    let secret = of_a(nobody.as_slice());
    let both = [secret, of_hub];
    let days = |days: u64| Duration::from_secs(days * 86_400);
    let membership = |standing, expired: Option<u64>| Object::Membership {
        standing,
        expired: expired.map(days),
        grace: days(180),
    };
    let artifact = |origin, delivered, supplied| Object::Artifact {
        origin,
        delivered,
        supplied,
    };
    let taken = |published, publisher, delivered| Object::Taken {
        published,
        publisher,
        delivered,
    };
    let publication = |reference, source, run, delivers| Object::Publication {
        reference,
        source,
        run,
        delivers,
    };
    let progress = |origin, delivered| Object::Progress {
        to: &a,
        origin,
        delivered,
    };
    let (list, all, labelled) = (["a".to_owned()], ["all".to_owned()], ["line=3".to_owned()]);
    let objects = [
        ("daemon", Object::Daemon),
        ("member", membership(Standing::Current, None)),
        ("no member", membership(Standing::Unknown, None)),
        ("member, revoked", membership(Standing::Revoked, None)),
        ("member, superseded", membership(Standing::Superseded, None)),
        (
            "member, expired within the grace",
            membership(Standing::Current, Some(179)),
        ),
        (
            "member, expired beyond the grace",
            membership(Standing::Current, Some(180)),
        ),
        (
            "member, expired and revoked",
            membership(Standing::Revoked, Some(1)),
        ),
        ("artifact of a", artifact(Some(&a), false, false)),
        ("artifact of a, delivered", artifact(Some(&a), true, false)),
        ("artifact of the hub", artifact(None, false, false)),
        (
            "artifact of the hub, delivered",
            artifact(None, true, false),
        ),
        ("artifact of the hub, supplied", artifact(None, false, true)),
        ("published by the hub", Object::Published(of_hub)),
        (
            "published by a for all",
            Object::Published(of_a(&everybody)),
        ),
        (
            "published by a, the hub allows b",
            Object::Published(published(Some(&a), Some(for_b.as_slice()), None)),
        ),
        ("published by a for b", Object::Published(of_a(&for_b))),
        ("published by a for nobody", Object::Published(secret)),
        (
            "content delivered and shared",
            Object::Content {
                delivered: true,
                planned: false,
                names: &[of_hub],
            },
        ),
        (
            "content delivered, of a for nobody",
            Object::Content {
                delivered: true,
                planned: false,
                names: &[secret],
            },
        ),
        (
            "content delivered, of a for nobody and of the hub",
            Object::Content {
                delivered: true,
                planned: false,
                names: &both,
            },
        ),
        (
            "content delivered, without a name",
            Object::Content {
                delivered: true,
                planned: false,
                names: &[],
            },
        ),
        (
            "content shared, not delivered",
            Object::Content {
                delivered: false,
                planned: false,
                names: &[of_hub],
            },
        ),
        (
            "content planned",
            Object::Content {
                delivered: false,
                planned: true,
                names: &[],
            },
        ),
        ("name taken by a for b", taken(of_a(&for_b), None, false)),
        ("name taken by the hub", taken(of_hub, None, false)),
        (
            "name taken by the hub, delivered",
            taken(of_hub, None, true),
        ),
        ("name taken by p", taken(of_hub, Some(&p), false)),
        (
            "publication of the model of r",
            publication("model/m:1", "/out", Some("r"), false),
        ),
        (
            "publication of a model",
            publication("model/m:1", "/out", None, false),
        ),
        (
            "publication of a model of s",
            publication("model/m:1", "/out", Some("s"), false),
        ),
        (
            "publication of a dataset of r",
            publication("dataset/m:1", "/out", Some("r"), false),
        ),
        (
            "publication of nothing of r",
            publication("m", "/out", Some("r"), false),
        ),
        (
            "publication from a registry of r",
            publication("model/m:1", "registry://h/r:t", Some("r"), false),
        ),
        (
            "publication and delivery of r",
            publication("model/m:1", "/out", Some("r"), true),
        ),
        ("transfer to a", Object::Transfer { to: &a }),
        ("progress of a transfer to a", progress(None, false)),
        (
            "progress of a transfer to a, of b",
            progress(Some(&b), false),
        ),
        (
            "progress of a transfer to a, delivered",
            progress(None, true),
        ),
        ("run from a on b", Object::Run { from: &a, on: &b }),
        ("run r by name", Object::RunByName("r")),
        ("new run from a", Object::NewRun { from: &a }),
        (
            "trainer that reported nothing",
            Object::Trainer { allow: None },
        ),
        ("trainer for a", Object::Trainer { allow: Some(&list) }),
        ("trainer for all", Object::Trainer { allow: Some(&all) }),
        // The hub assigns labels, and does not decide for whom a site trains.
        (
            "trainer for labels",
            Object::Trainer {
                allow: Some(&labelled),
            },
        ),
        ("trainer for nobody", Object::Trainer { allow: Some(&[]) }),
        ("job", Object::Job { starter: None }),
        (
            "job of the trainer of r",
            Object::Job {
                starter: Some(&starter),
            },
        ),
        ("an artifact by name", Object::Named(&named)),
        (
            "a site by name",
            Object::Place {
                site: &a,
                labels: &no_labels,
            },
        ),
    ];
    for (name, object) in &objects {
        see(name, object);
    }
}

#[test]
fn every_right_is_in_the_table_and_no_other() {
    let mut used = BTreeSet::new();
    each_object(|name, object| {
        for actor in actors() {
            let who = actor.to_string();
            let allowed = match &actor {
                Actor::Admin => ADMIN,
                Actor::Hub => HUB,
                _ => {
                    let row = TABLE
                        .iter()
                        .position(|(of, by, _)| *of == name && *by == who);
                    used.extend(row);
                    row.map_or("", |row| TABLE[row].2)
                }
            };
            let allowed: Vec<&str> = allowed.split_whitespace().collect();
            for verb in VERBS {
                let expected = allowed.contains(&format!("{verb:?}").as_str());
                assert_eq!(
                    may(&actor, verb, object).is_ok(),
                    expected,
                    "{who}: {verb:?} {name}"
                );
            }
        }
    });
    assert_eq!(
        used.len(),
        TABLE.len(),
        "each row of the table is of an actor and an object that exist"
    );
    let in_order = VERBS
        .iter()
        .enumerate()
        .all(|(number, verb)| *verb as usize == number);
    assert!(
        in_order && Verb::ManageSites as usize + 1 == VERBS.len(),
        "no verb is left out"
    );
    let verbs: Vec<String> = VERBS.iter().map(|verb| format!("{verb:?}")).collect();
    for word in TABLE
        .iter()
        .flat_map(|row| row.2.split_whitespace())
        .chain(ADMIN.split_whitespace())
        .chain(HUB.split_whitespace())
    {
        assert!(verbs.iter().any(|verb| verb == word), "{word}");
    }
}

#[test]
fn what_an_actor_must_not_know_of_looks_as_if_it_did_not_exist() {
    let site = |text: &str| Actor::Site(name(text));
    let check = |actor: Actor, verb: Verb, object: &str, expected: fn(&Refusal) -> bool| {
        let mut found = None;
        each_object(|name, of| {
            if name == object {
                found = Some(may(&actor, verb, of));
            }
        });
        let refusal = found.unwrap().unwrap_err();
        assert!(
            expected(&refusal),
            "{actor}: {verb:?} {object}: {refusal:?}"
        );
    };
    let hidden: fn(&Refusal) -> bool = |refusal| *refusal == Refusal::Hidden;
    let said: fn(&Refusal) -> bool = |refusal| matches!(refusal, Refusal::NotAllowed { .. });
    check(
        site("c"),
        Verb::ReadContent,
        "content delivered, of a for nobody",
        hidden,
    );
    check(
        site("c"),
        Verb::ReadManifest,
        "content shared, not delivered",
        hidden,
    );
    check(site("c"), Verb::Deliver, "artifact of the hub", hidden);
    check(site("c"), Verb::Train, "artifact of a", hidden);
    check(
        site("c"),
        Verb::ReadExclusions,
        "artifact of a, delivered",
        hidden,
    );
    check(site("c"), Verb::ReadDigest, "name taken by a for b", hidden);
    check(site("b"), Verb::Act, "transfer to a", hidden);
    check(site("c"), Verb::Read, "progress of a transfer to a", hidden);
    check(site("c"), Verb::Cancel, "run from a on b", hidden);
    check(site("c"), Verb::Publish, "run from a on b", hidden);
    check(
        "publisher".parse().map(Actor::Publisher).unwrap(),
        Verb::ReadContent,
        "content delivered and shared",
        hidden,
    );
    check(site("c"), Verb::Connect, "no member", |refusal| {
        *refusal == Refusal::Unknown
    });
    check(site("c"), Verb::Train, "new run from a", said);
    check(site("c"), Verb::Upload, "daemon", said);
    check(site("c"), Verb::Collect, "daemon", said);
    check(site("c"), Verb::Borrow, "trainer for a", |refusal| {
        *refusal == Refusal::NoTraining
    });
    check(
        site("c"),
        Verb::Receive,
        "published by a, the hub allows b",
        |r| *r == Refusal::NotShared(ShareList::Hub),
    );
    check(site("c"), Verb::Receive, "published by a for b", |r| {
        *r == Refusal::NotShared(ShareList::Origin)
    });
}

#[test]
fn a_list_of_runs_shows_the_runs_that_may_be_read() {
    let sites = ["a", "b", "c"].map(name);
    for actor in actors() {
        let scope = runs_scope(&actor);
        for (from, on) in sites
            .iter()
            .flat_map(|from| sites.iter().map(move |on| (from, on)))
        {
            let listed = match scope {
                Ok(Scope::All) => true,
                Ok(Scope::Of(site)) => site == from || site == on,
                Err(_) => false,
            };
            assert_eq!(
                may(&actor, Verb::Read, &Object::Run { from, on }).is_ok(),
                listed,
                "{actor}: from {from} on {on}"
            );
        }
    }
}
