//! Transfers and deliveries.

use base::clock;
use base::names::{ArtifactRef, SiteName, TransferId};
use model::transfer::{State, TransferQuery};

use super::{root, signed, wanted};
use crate::{Body, Catalogue, Part, TransferRow};

pub(crate) async fn a_repeated_delivery_has_one_transfer_and_a_cursor_returns_only_changes(
    catalogue: Catalogue,
) {
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    let sites: Vec<SiteName> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    let part = || {
        [Part {
            artifact: name.clone(),
            digest: root(1).digest(),
            total: 1,
            needs: None,
            sites: sites.clone(),
        }]
    };
    let first = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &part(), &[])
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .deliver(&"d-2".parse().unwrap(), None, &part(), &[])
            .await
            .unwrap(),
        first
    );
    let mut parts = 0;
    catalogue
        .each_part(&catalogue.delivery("d-2").await.unwrap().id, |_| parts += 1)
        .await
        .unwrap();
    assert_eq!(
        parts, 2,
        "an existing transfer is also part of the second delivery"
    );
    let (all, cursor) = catalogue
        .transfers(&TransferQuery::default())
        .await
        .unwrap();
    assert_eq!(all.len(), 2);
    let since = |c| TransferQuery {
        since: Some(c),
        ..Default::default()
    };
    assert!(
        catalogue
            .transfers(&since(cursor))
            .await
            .unwrap()
            .0
            .is_empty()
    );
    catalogue
        .update_transfer(&first[1], 0, State::Done, &signed())
        .await
        .unwrap();
    let (news, _) = catalogue.transfers(&since(cursor)).await.unwrap();
    assert_eq!(news.iter().map(|t| &t.id).collect::<Vec<_>>(), [&first[1]]);
    catalogue
        .update_transfer(&first[1], 0, State::Planning, &Body::default())
        .await
        .unwrap();
    assert_eq!(
        catalogue.transfer(&first[1]).await.unwrap().state,
        State::Done,
        "a done transfer stays done"
    );
    assert!(
        catalogue
            .is_delivered(&sites[0], root(1).digest())
            .await
            .unwrap()
    );
    assert!(
        !catalogue
            .is_delivered(&sites[0], root(2).digest())
            .await
            .unwrap()
    );
}

pub(crate) async fn a_new_transfer_has_the_greatest_id_although_the_clock_was_put_back(
    catalogue: Catalogue,
) {
    let in_three_days = clock::now_unix_ms() + 3 * 24 * 3_600_000;
    let earlier = TransferId::made(in_three_days, u32::MAX);
    let wanted = wanted(earlier.as_str(), "model/m:1", 0);
    catalogue.adopt(&wanted).await.unwrap();
    let artifact: ArtifactRef = "model/m:2".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root(1), None)
        .await
        .unwrap();
    let part = Part::new(
        &catalogue.artifact(&artifact).await.unwrap(),
        std::slice::from_ref(&wanted.site),
    );
    let ids = catalogue
        .deliver(&"d-2".parse().unwrap(), None, &[part], &[])
        .await
        .unwrap();
    assert!(
        ids.iter().all(|id| *id > earlier),
        "{ids:?} after {earlier}"
    );
}

pub(crate) async fn labels_wait_for_their_dataset_at_the_same_site(catalogue: Catalogue) {
    let sites: Vec<SiteName> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    let part = |name: &str, needs: Option<&str>| Part {
        sites: sites.clone(),
        artifact: name.parse().unwrap(),
        digest: root(name.len() as u64).digest(),
        total: 1,
        needs: needs.map(|n| n.parse().unwrap()),
    };
    let parts = [
        part("labels/l:1", Some("dataset/d:1")),
        part("dataset/d:1", None),
    ];
    let ids = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &parts, &[])
        .await
        .unwrap();
    let at_a = |ids: &[TransferId]| vec![(ids[0].clone(), ids[2].clone())];
    assert_eq!(catalogue.waits(&sites[0]).await.unwrap(), at_a(&ids));
    catalogue
        .update_transfer(&ids[2], 0, State::Failed, &Body::default())
        .await
        .unwrap();
    assert_eq!(
        catalogue.waits(&sites[0]).await.unwrap(),
        at_a(&ids),
        "a failed transfer will be retried"
    );
    catalogue
        .act(&ids[2], model::transfer::Action::Retry)
        .await
        .unwrap();
    catalogue
        .update_transfer(&ids[2], 1, State::Done, &signed())
        .await
        .unwrap();
    assert!(catalogue.waits(&sites[0]).await.unwrap().is_empty());
    assert_eq!(
        catalogue.waits(&sites[1]).await.unwrap().len(),
        1,
        "each site waits for its own"
    );
}

pub(crate) async fn only_inputs_that_nothing_else_needs_are_removed_after_a_run(
    catalogue: Catalogue,
) {
    let sites: Vec<SiteName> = vec!["b".parse().unwrap()];
    let part = |name: &str| Part {
        artifact: name.parse().unwrap(),
        digest: root(1).digest(),
        total: 1,
        needs: None,
        sites: sites.clone(),
    };
    let done = |id: TransferId| {
        let catalogue = catalogue.clone();
        async move {
            catalogue
                .update_transfer(&id, 0, State::Done, &signed())
                .await
                .unwrap();
        }
    };
    let before = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &[part("model/had:1")], &[])
        .await
        .unwrap();
    let all = [
        part("model/had:1"),
        part("model/one:1"),
        part("model/two:1"),
    ];
    let one = catalogue
        .deliver(&"d-2".parse().unwrap(), Some("one"), &all, &[])
        .await
        .unwrap();
    catalogue
        .deliver(
            &"d-3".parse().unwrap(),
            Some("two"),
            &[part("model/two:1")],
            &[],
        )
        .await
        .unwrap();
    for id in &one {
        done(id.clone()).await;
    }
    assert_eq!(one[0], before[0]);
    let borrowed = |run: &'static str| {
        let (catalogue, site) = (catalogue.clone(), sites[0].clone());
        async move {
            let rows = catalogue.only_borrowed(run, &site).await.unwrap();
            rows.into_iter()
                .map(|row| row.artifact.to_string())
                .collect::<Vec<_>>()
        }
    };
    catalogue
        .save_run("one", "training", true, &1)
        .await
        .unwrap();
    catalogue
        .save_run("two", "training", true, &1)
        .await
        .unwrap();
    assert_eq!(borrowed("one").await, ["model/one:1"]);
    assert!(borrowed("two").await.is_empty(), "run one still needs it");
    catalogue.save_run("one", "failed", true, &1).await.unwrap();
    assert_eq!(borrowed("two").await, ["model/two:1"]);
    catalogue
        .deliver(&"d-4".parse().unwrap(), None, &[part("model/two:1")], &[])
        .await
        .unwrap();
    assert!(
        borrowed("two").await.is_empty(),
        "it was requested again later"
    );

    catalogue.set_removed(&one[1], 7).await.unwrap();
    let other = root(1).digest();
    assert!(
        catalogue.is_delivered(&sites[0], other).await.unwrap(),
        "by the other transfers"
    );
    let again = catalogue
        .deliver(&"d-5".parse().unwrap(), None, &[part("model/one:1")], &[])
        .await
        .unwrap();
    assert_ne!(
        again[0], one[1],
        "removed content is delivered by a new transfer"
    );
}

pub(crate) async fn an_input_that_may_be_in_removal_is_delivered_again(catalogue: Catalogue) {
    let sites: Vec<SiteName> = vec!["b".parse().unwrap()];
    let part = |name: &str| Part {
        artifact: name.parse().unwrap(),
        digest: root(1).digest(),
        total: 1,
        needs: None,
        sites: sites.clone(),
    };
    let (shared, own) = (part("model/shared:1"), part("model/own:1"));
    catalogue
        .deliver(
            &"d-1".parse().unwrap(),
            None,
            std::slice::from_ref(&shared),
            &[],
        )
        .await
        .unwrap();
    let ids = catalogue
        .deliver(
            &"d-2".parse().unwrap(),
            Some("one"),
            &[shared.clone(), own.clone()],
            &[],
        )
        .await
        .unwrap();
    for id in &ids {
        catalogue
            .update_transfer(id, 0, State::Done, &signed())
            .await
            .unwrap();
    }
    // For a run that has ended, so that it needs nothing.
    let deliver = async |run: &str, part: &Part| {
        catalogue
            .save_run(run, "cancelled", false, &1)
            .await
            .unwrap();
        let id = catalogue
            .deliver(
                &run.parse().unwrap(),
                Some(run),
                std::slice::from_ref(part),
                &[],
            )
            .await
            .unwrap()
            .remove(0);
        let row = catalogue.transfer(&id).await.unwrap();
        assert!(ids.contains(&id), "the transfer stays done");
        catalogue
            .update_transfer(&id, row.generation, State::Done, &signed())
            .await
            .unwrap();
        row.generation
    };
    catalogue
        .save_run("one", "training", true, &1)
        .await
        .unwrap();
    assert_eq!(deliver("two", &own).await, 0);
    catalogue.save_run("one", "done", true, &1).await.unwrap();
    assert_eq!(
        deliver("three", &own).await,
        1,
        "the run has ended and its site removes the input"
    );
    assert_eq!(
        deliver("four", &shared).await,
        0,
        "another delivery needs it, so it is not removed"
    );
    catalogue.save_run("one", "done", false, &1).await.unwrap();
    assert_eq!(
        deliver("five", &own).await,
        1,
        "the cleanup of the run is complete"
    );
    let late = serde_json::json!({ "spec": { "deadline_ms": 1000 } });
    catalogue
        .save_run("one", "training", true, &late)
        .await
        .unwrap();
    assert_eq!(
        deliver("six", &own).await,
        2,
        "the site may remove it before the hub notices the deadline"
    );
}

pub(crate) async fn a_restarted_transfer_records_whether_it_committed_its_artifact_before(
    catalogue: Catalogue,
) {
    let adopt = async |id: &str, generation| {
        catalogue
            .adopt(&wanted(id, "model/m:1", generation))
            .await
            .unwrap()
            .row
    };
    let enter = async |row: &TransferRow, state| {
        let body = Body {
            receipt: signed().receipt,
            ..row.body.clone()
        };
        catalogue
            .update_transfer(&row.id, row.generation, state, &body)
            .await
            .unwrap();
        catalogue.transfer(&row.id).await.unwrap()
    };
    let row = adopt("t-0", 0).await;
    assert!(!row.has_landed());
    assert!(enter(&row, State::Done).await.has_landed());
    let row = adopt("t-0", 1).await;
    assert_eq!((row.state, row.has_landed()), (State::Queued, true));
    // Cancelled while it waits: the content that it committed before is still there.
    assert!(enter(&row, State::Cancelled).await.has_landed());
    // Another transfer that finds this content and is cancelled has committed nothing.
    let other = adopt("t-1", 0).await;
    assert!(!enter(&other, State::Cancelled).await.has_landed());
    let row = adopt("t-0", 2).await;
    assert!(row.has_landed(), "after any number of restarts");
    enter(&row, State::Done).await;
    catalogue.set_removed("t-0", 7).await.unwrap();
    assert!(
        !adopt("t-0", 3).await.has_landed(),
        "it was removed in between"
    );
}
