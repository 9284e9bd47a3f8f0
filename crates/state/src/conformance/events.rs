//! Tests of event numbers and wake-ups.

use futures::poll;

use super::{join, part, root, signed};
use crate::{Body, Catalogue, Offer, Subject, Watch};
use base::fault::Code;
use base::names::{ArtifactRef, SiteName};
use model::paging::Room;
use model::transfer::{Action, State, TransferQuery};

pub(crate) async fn event_numbers_have_no_gap_and_a_reader_misses_none(catalogue: Catalogue) {
    const WRITERS: u64 = 8;
    const EACH: u64 = 12;
    let before = catalogue.cursor().await.unwrap();
    let artifact: ArtifactRef = "model/m:1".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root(1), None)
        .await
        .unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (catalogue, artifact) = (catalogue.clone(), artifact.clone());
            tokio::spawn(async move {
                for n in 0..EACH {
                    catalogue
                        .save_run(&format!("run-{writer}-{n}"), "training", true, &1)
                        .await
                        .unwrap();
                    // A refused write, and a transaction that is not committed, takes no number.
                    catalogue
                        .add_artifact(&artifact, &root(2), None)
                        .await
                        .unwrap_err();
                    let mut changes = catalogue.change_transfers().await.unwrap();
                    changes
                        .insert(
                            &super::wanted(&format!("t-{writer}-{n}"), "model/m:1", 0),
                            None,
                        )
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    let (mut since, mut names) = (before, Vec::new());
    while (names.len() as u64) < WRITERS * EACH + 1 {
        for event in catalogue.events(since, 5).await.unwrap() {
            assert_eq!(event.seq, since + 1, "{event:?}");
            since = event.seq;
            names.push(event.name);
        }
        assert!(catalogue.cursor().await.unwrap() >= since);
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(catalogue.events(since, 5).await.unwrap().is_empty());
    assert_eq!(catalogue.cursor().await.unwrap(), since);
    names.sort();
    names.dedup();
    assert_eq!(names.len() as u64, WRITERS * EACH + 1, "each number once");
}

pub(crate) async fn a_cursor_from_which_changes_would_be_missed_is_refused(catalogue: Catalogue) {
    for n in 0..4 {
        let artifact: ArtifactRef = format!("model/m:{n}").parse().unwrap();
        catalogue
            .add_artifact(&artifact, &root(n), None)
            .await
            .unwrap();
    }
    let newest = catalogue.cursor().await.unwrap();
    catalogue.check_cursor(newest).await.unwrap();
    for since in [0, 1, newest] {
        catalogue.check_event_cursor(since).await.unwrap();
    }
    // A catalogue that was restored from a backup.
    for refused in [
        catalogue.check_cursor(newest + 1).await,
        catalogue.check_event_cursor(newest + 1).await,
        catalogue.check_event_cursor(u64::MAX).await,
    ] {
        let fault = refused.unwrap_err();
        assert_eq!(fault.code, Code::Conflict);
        assert!(fault.next.contains("complete list"), "{fault:?}");
    }
    let query = TransferQuery {
        since: Some(newest + 1),
        ..TransferQuery::default()
    };
    let room = Room {
        rows: 9,
        bytes: 1 << 20,
    };
    let page = catalogue.transfer_page(&query, None, room, |row| row.id.to_string());
    assert_eq!(page.await.unwrap_err().code, Code::Conflict);
}

async fn is_woken(watch: &mut Watch) -> bool {
    let changed = std::pin::pin!(watch.changed());
    poll!(changed).is_ready()
}

pub(crate) async fn a_change_wakes_only_those_that_wait_for_its_subject(catalogue: Catalogue) {
    let sites: Vec<SiteName> = vec![
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
    ];
    let names: Vec<ArtifactRef> = ["model/m:1", "model/m:2"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    for name in &names {
        catalogue
            .add_artifact(name, &root(1), Some(&sites[1]))
            .await
            .unwrap();
    }
    let ids = catalogue
        .deliver(
            &"d-1".parse().unwrap(),
            None,
            &[part("model/m:1", &sites[..1])],
            &[],
        )
        .await
        .unwrap();
    let place = sink::StorageLocation::Folder {
        path: "/nas".into(),
    };
    // Whether a change wakes the waiters for the work of a, the work of b, and artifacts.
    macro_rules! check {
        ($expected:expr, $what:literal, $change:expr) => {
            let mut watches = [
                catalogue.watch(Subject::Site(sites[0].clone())),
                catalogue.watch(Subject::Site(sites[1].clone())),
                catalogue.watch(Subject::Artifacts),
            ];
            let mut all = catalogue.watch_all();
            assert!(!is_woken(&mut all).await, "before: {}", $what);
            $change.await.map(drop).unwrap();
            for (watch, expected) in watches.iter_mut().zip($expected) {
                assert_eq!(is_woken(watch).await, expected, "{}", $what);
            }
            assert!(is_woken(&mut all).await, "watching everything: {}", $what);
        };
    }
    let (a, b, artifacts, none) = (
        [true, false, false],
        [false, true, false],
        [false, false, true],
        [false; 3],
    );
    check!(a, "a user pauses", catalogue.act(&ids[0], Action::Pause));
    check!(a, "a user resumes", catalogue.act(&ids[0], Action::Resume));
    check!(
        a,
        "a site begins a transfer",
        catalogue.update_transfer(&ids[0], 0, State::Transferring, &Body::default())
    );
    let further = Body {
        rate: 7,
        ..Body::default()
    };
    check!(
        none,
        "progress of the transfer",
        catalogue.update_transfer(&ids[0], 0, State::Transferring, &further)
    );
    check!(
        a,
        "a report of a site",
        catalogue.update_transfer(&ids[0], 0, State::Done, &signed())
    );
    let deliver = async |id: &str, name: &str, to: &[SiteName]| {
        catalogue
            .deliver(&id.parse().unwrap(), None, &[part(name, to)], &[])
            .await
    };
    check!(
        a,
        "the transfer is part of another delivery",
        deliver("d-2", "model/m:1", &sites[..1])
    );
    check!(
        b,
        "a delivery to b",
        deliver("d-3", "model/m:2", &sites[1..])
    );
    check!(
        [true, true, false],
        "a delivery to both",
        deliver("d-4", "model/m:3", &sites)
    );
    check!(
        a,
        "its content is removed",
        catalogue.set_removed(&ids[0], 7)
    );
    let run = serde_json::json!({ "spec": { "from": "b", "on": "a" } });
    check!(
        [true, true, false],
        "a run of b at a",
        catalogue.save_run("r", "training", true, &run)
    );
    check!(
        none,
        "a site connects",
        catalogue.site_seen(&sites[0], true, 1, None)
    );
    let offer = Offer::default();
    check!(
        artifacts,
        "a publish",
        catalogue.set_published(&names[0], &place, "/nas", 7, &offer)
    );
    let gone = [(names[0].clone(), "gone".into())];
    check!(
        artifacts,
        "a file is missing",
        catalogue.set_changed_at(&sites[1], &gone)
    );
    check!(artifacts, "a pin", catalogue.set_pinned(&names[0], true));
    check!(
        artifacts,
        "it is removed",
        catalogue.remove_artifact(&names[1])
    );
    let mut all = catalogue.watch_all();
    assert!(catalogue.act("t-none", Action::Pause).await.is_err());
    catalogue
        .report(&ids[0], 0, State::Done, signed())
        .await
        .unwrap();
    assert!(!is_woken(&mut all).await, "nothing changed");
    catalogue.notify();
    assert!(is_woken(&mut all).await);
}

pub(crate) async fn an_event_keeps_what_its_subject_was_like(catalogue: Catalogue) {
    let site = join(&catalogue, "a", &[]).await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    catalogue.add_artifact(&name, &root(1), None).await.unwrap();
    let parts = [part("model/m:1", std::slice::from_ref(&site))];
    let ids = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &parts, &[])
        .await
        .unwrap();
    let id = &ids[0];
    catalogue
        .update_transfer(id, 0, State::Planning, &Default::default())
        .await
        .unwrap();
    catalogue
        .report(id, 0, State::Done, signed())
        .await
        .unwrap();
    catalogue.set_pinned(&name, true).await.unwrap();
    catalogue.set_pinned(&name, false).await.unwrap();
    catalogue
        .site_seen(&site, true, 5, Some("1.2"))
        .await
        .unwrap();
    catalogue.site_seen(&site, false, 6, None).await.unwrap();
    let run =
        |state: &str| serde_json::json!({ "state": state, "spec": { "from": "a", "on": "a" } });
    for state in ["training", "done"] {
        catalogue
            .save_run("r", state, true, &run(state))
            .await
            .unwrap();
    }

    let events = catalogue.events(0, 100).await.unwrap();
    let of = |what: &'static str| events.iter().filter(move |event| event.what == what);
    let now = catalogue.transfer(id).await.unwrap();
    let then: Vec<_> = of("transfer").map(|e| e.transfer(now.clone())).collect();
    let states: Vec<State> = then.iter().map(|row| row.state).collect();
    assert_eq!(states.first(), Some(&State::Queued));
    assert!(states.contains(&State::Planning) && states.last() == Some(&State::Done));
    assert!(then.is_sorted_by_key(|row| row.cursor) && then.iter().all(|row| row.id == *id));
    assert_eq!(then.last(), Some(&now));
    let newest = of("transfer").next_back().unwrap();
    assert!(newest.is_newest_of(&now) && !of("transfer").next().unwrap().is_newest_of(&now));
    let now = catalogue.artifact(&name).await.unwrap();
    let pinned: Vec<bool> = of("artifact")
        .map(|e| e.artifact(now.clone()).pinned)
        .collect();
    assert_eq!(pinned, [false, true, false]);
    let online: Vec<_> = of("site")
        .map(|e| e.site().unwrap())
        .map(|s| (s.online, s.seen_ms, s.version))
        .collect();
    let version = Some("1.2".to_owned());
    assert_eq!(
        online,
        [
            (false, None, None),
            (true, Some(5), version.clone()),
            (false, Some(6), version)
        ]
    );
    let runs: Vec<serde_json::Value> = of("run").filter_map(|e| e.run()).collect();
    assert_eq!(runs, [run("training"), run("done")]);
    // An event of an earlier version has no state: what is known is what is now.
    let old = crate::EventRow {
        state: None,
        ..newest.clone()
    };
    let now = catalogue.transfer(id).await.unwrap();
    assert_eq!(old.transfer(now.clone()), now);
}

pub(crate) async fn with_many_sites_a_change_for_one_is_read_by_one(catalogue: Catalogue) {
    const SITES: usize = 20;
    let mut sites = Vec::new();
    for n in 0..SITES {
        sites.push(join(&catalogue, &format!("site-{n}"), &[]).await);
    }
    catalogue
        .add_artifact(&"model/m:1".parse().unwrap(), &root(1), None)
        .await
        .unwrap();
    let ids = catalogue
        .deliver(
            &"d-1".parse().unwrap(),
            None,
            &[part("model/m:1", &sites)],
            &[],
        )
        .await
        .unwrap();
    let mut watches: Vec<Watch> = sites
        .iter()
        .map(|site| catalogue.watch(Subject::Site(site.clone())))
        .collect();
    // The hub does the same for each connected site.
    let look_if_woken = async |watches: &mut Vec<Watch>| {
        let before = catalogue.reads();
        let mut looked = Vec::new();
        for (n, watch) in watches.iter_mut().enumerate() {
            if is_woken(watch).await {
                looked.push(n);
                assert_eq!(catalogue.open_transfers(&sites[n]).await.unwrap().len(), 1);
                catalogue.waits(&sites[n]).await.unwrap();
                catalogue.open_runs::<serde_json::Value>(9).await.unwrap();
                // The next wake-up is not delayed.
                *watch = catalogue.watch(Subject::Site(sites[n].clone()));
            }
        }
        (looked, catalogue.reads() - before)
    };
    assert_eq!(look_if_woken(&mut watches).await, (vec![], 0));
    catalogue
        .update_transfer(&ids[3], 0, State::Planning, &Default::default())
        .await
        .unwrap();
    assert_eq!(look_if_woken(&mut watches).await, (vec![3], 3));
    // Several changes in a short time are read once.
    for _ in 0..5 {
        catalogue.act(&ids[7], Action::Pause).await.unwrap();
        catalogue.act(&ids[7], Action::Resume).await.unwrap();
    }
    assert_eq!(look_if_woken(&mut watches).await.0, [7]);
    assert_eq!(look_if_woken(&mut watches).await, (vec![], 0));
}
