use super::*;
use base::fault::Code;
use base::names::{ArtifactRef, SiteName, TransferId};
use content::manifest::{KindInfo, Root, Totals};
use model::paging::Room;
use model::transfer::{State, TransferQuery};
use transport::identity::{Claim, Holder};

async fn catalogue() -> (tempfile::TempDir, Catalogue) {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = Catalogue::open(dir.path()).await.unwrap();
    (dir, catalogue)
}

fn root(bytes: u64) -> Root {
    let totals = Totals {
        bytes,
        ..Totals::default()
    };
    let chunking = content::chunk::DEFAULT_CHUNKING;
    Root {
        format: 1,
        kind: base::names::Kind::Model,
        info: KindInfo::Files,
        chunking,
        totals,
        depth: 0,
        pages: vec![],
    }
}

#[tokio::test]
async fn an_artifact_never_changes() {
    let (_dir, catalogue) = catalogue().await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    assert!(catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert!(!catalogue.add_artifact(&name, &root(1), None).await.unwrap());
    assert_eq!(
        catalogue
            .add_artifact(&name, &root(2), None)
            .await
            .unwrap_err()
            .code,
        Code::Conflict
    );
    assert_eq!(
        catalogue.artifact(&name).await.unwrap().digest,
        root(1).digest()
    );
}

#[tokio::test]
async fn a_token_is_good_once_and_for_a_while() {
    let (_dir, catalogue) = catalogue().await;
    let name: SiteName = "west".parse().unwrap();
    let (site, claim) = (Holder::Site(name.clone()), Claim::Site(name.clone()));
    catalogue
        .add_token("a", &[1; 32], &site, &Default::default(), 60)
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .redeem_token("a", &[2; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap(),
        site
    );
    // Its answer may have been lost: the same key may ask again, and no other, until the site was
    // here.
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap(),
        site
    );
    assert!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[8; 32])
            .await
            .unwrap_err()
            .message
            .contains("used")
    );
    catalogue.site_seen(&name, None).await.unwrap();
    assert!(
        catalogue
            .redeem_token("a", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .message
            .contains("used")
    );
    catalogue
        .add_token("b", &[1; 32], &site, &Default::default(), 0)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(
        catalogue
            .redeem_token("b", &[1; 32], &claim, &[7; 32])
            .await
            .unwrap_err()
            .message
            .contains("expired")
    );
}

#[tokio::test]
async fn a_publisher_is_no_site() {
    let (_dir, catalogue) = catalogue().await;
    let name: SiteName = "office".parse().unwrap();
    let publisher = Holder::Publisher(name.clone());
    catalogue
        .add_token("a", &[1; 32], &publisher, &Default::default(), 60)
        .await
        .unwrap();
    // A site that shows a publisher's token is refused, and the token stays good.
    let fault = catalogue
        .redeem_token("a", &[1; 32], &Claim::Site(name.clone()), &[7; 32])
        .await
        .unwrap_err();
    assert!(fault.message.contains("is for a publisher"), "{fault}");
    assert!(!catalogue.publisher_seen(&name).await.unwrap());
    assert_eq!(
        catalogue
            .redeem_token("a", &[1; 32], &Claim::Publisher, &[7; 32])
            .await
            .unwrap(),
        publisher
    );
    assert!(catalogue.publisher_seen(&name).await.unwrap());
    assert!(catalogue.sites().await.unwrap().is_empty());
    assert_eq!(
        catalogue
            .select_sites(&"all".parse().unwrap())
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    // Nor can a site take its name, or a publisher that of a site.
    let site = Holder::Site(name);
    assert_eq!(
        catalogue
            .add_token("b", &[1; 32], &site, &Default::default(), 60)
            .await
            .unwrap_err()
            .code,
        Code::Conflict
    );
    catalogue
        .add_token(
            "c",
            &[1; 32],
            &Holder::Site("west".parse().unwrap()),
            &Default::default(),
            60,
        )
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .redeem_token("c", &[1; 32], &Claim::Publisher, &[7; 32])
            .await
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
}

#[tokio::test]
async fn delivering_twice_is_one_transfer_and_a_cursor_shows_what_is_new() {
    let (_dir, catalogue) = catalogue().await;
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
        "what stood already is part of the second delivery too"
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
        "what is done stays done"
    );
    assert!(
        catalogue
            .is_entitled(&sites[0], root(1).digest())
            .await
            .unwrap()
    );
    assert!(
        !catalogue
            .is_entitled(&sites[0], root(2).digest())
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn labels_wait_for_their_dataset_at_the_same_site() {
    let (_dir, catalogue) = catalogue().await;
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
        "a failed one will be retried"
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

#[tokio::test]
async fn what_a_run_borrowed_goes_and_what_others_want_stays() {
    let (_dir, catalogue) = catalogue().await;
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
        "somebody asked for it since"
    );

    catalogue.set_removed(&one[1], 7).await.unwrap();
    let other = root(1).digest();
    assert!(
        catalogue.is_entitled(&sites[0], other).await.unwrap(),
        "by the others"
    );
    let again = catalogue
        .deliver(&"d-5".parse().unwrap(), None, &[part("model/one:1")], &[])
        .await
        .unwrap();
    assert_ne!(again[0], one[1], "what was given back is sent again");
}

#[tokio::test]
async fn what_a_run_may_be_giving_back_is_brought_again() {
    let (_dir, catalogue) = catalogue().await;
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
    // For a run that is over at once, so that it wants nothing.
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
        assert!(ids.contains(&id), "it stands");
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
    assert_eq!(deliver("three", &own).await, 1, "it is over and gives back");
    assert_eq!(
        deliver("four", &shared).await,
        0,
        "somebody wants it, so nobody takes it away"
    );
    catalogue.save_run("one", "done", false, &1).await.unwrap();
    assert_eq!(
        deliver("five", &own).await,
        1,
        "it has given back what it had to"
    );
    let late = serde_json::json!({ "spec": { "deadline_ms": 1000 } });
    catalogue
        .save_run("one", "training", true, &late)
        .await
        .unwrap();
    assert_eq!(
        deliver("six", &own).await,
        2,
        "its site may give back before the hub sees that its time is up"
    );
}

/// What a site reports of a transfer that is done.
fn signed() -> Body {
    serde_json::from_str(r#"{"receipt":{"statement":"s","signature":"x","certificate":"y"}}"#)
        .unwrap()
}

/// What a hub asks of site b.
fn wanted(id: &str, artifact: &str, generation: i64) -> TransferRow {
    TransferRow {
        id: id.parse().unwrap(),
        delivery: "d-1".parse().unwrap(),
        artifact: artifact.parse().unwrap(),
        digest: root(1).digest(),
        site: "b".parse().unwrap(),
        want: Want::Run,
        generation,
        state: State::Queued,
        body: Body::default(),
        created_ms: 1,
        updated_ms: 0,
        finished_ms: None,
        cursor: 0,
        after: Vec::new(),
        removed_ms: None,
    }
}

#[tokio::test]
async fn a_transfer_knows_whether_it_landed_before_it_was_begun_again() {
    let (_dir, catalogue) = catalogue().await;
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
    // Given up while it waits for its turn: what it brought lies there.
    assert!(enter(&row, State::Cancelled).await.has_landed());
    // One that finds that there, and is given up as well, has brought nothing.
    let other = adopt("t-1", 0).await;
    assert!(!enter(&other, State::Cancelled).await.has_landed());
    let row = adopt("t-0", 2).await;
    assert!(row.has_landed(), "however often");
    enter(&row, State::Done).await;
    catalogue.set_removed("t-0", 7).await.unwrap();
    assert!(
        !adopt("t-0", 3).await.has_landed(),
        "it was given back since"
    );
}

#[tokio::test]
async fn rows_with_ids_that_no_longer_parse_are_removed_by_the_migration() {
    let (_dir, catalogue) = catalogue().await;
    let good = catalogue
        .adopt(&wanted("t-good", "model/m:1", 0))
        .await
        .unwrap()
        .row;
    let run = |id: &str, transfer: &str| {
        serde_json::json!({ "spec": { "id": id, "delivery": "d-1" }, "borrowed": [{ "transfer": transfer }], "removed": [transfer],
            "left": { transfer: "why" }, "message": "/any ../text" })
    };
    catalogue
        .save_run("good", "training", true, &run("r-1", "t-1"))
        .await
        .unwrap();
    catalogue
        .save_run("bad-id", "training", true, &run("../r", "t-1"))
        .await
        .unwrap();
    catalogue
        .save_run("bad-transfer", "training", true, &run("r-1", "/t"))
        .await
        .unwrap();
    let insert = "INSERT INTO transfer (id, delivery, reference, digest, site, state, body, created_ms, updated_ms, cursor, after_ids)
        SELECT ?, ?, ?, digest, site, 'failed', ?, 1, 1, 1, ? FROM transfer WHERE id = 't-good'";
    let long = "t".repeat(65);
    let rows = [
        ("/var/tmp/x", "d-1", "{}", "[]"),
        ("../x", "d-1", "{}", "[]"),
        ("..", "d-1", "{}", "[]"),
        ("t/../x", "d-1", "{}", "[]"),
        (long.as_str(), "d-1", "{}", "[]"),
        ("t-bad-delivery", "/d", "{}", "[]"),
        (
            "t-waits",
            "d-1",
            r#"{"waits_for":"/x"}"#,
            r#"["t-1","../x"]"#,
        ),
    ];
    for (n, (id, delivery, body, after)) in rows.iter().enumerate() {
        let reference = format!("model/bad:{n}");
        sqlx::query(insert)
            .bind(id)
            .bind(delivery)
            .bind(reference)
            .bind(body)
            .bind(after)
            .execute(&catalogue.write)
            .await
            .unwrap();
    }
    assert!(
        catalogue
            .transfers(&TransferQuery::default())
            .await
            .is_err(),
        "such rows cannot be read"
    );
    sqlx::raw_sql(include_str!("../../../migrations/catalogue/0008_ids.sql"))
        .execute(&catalogue.write)
        .await
        .unwrap();
    let (mut left, _) = catalogue
        .transfers(&TransferQuery::default())
        .await
        .unwrap();
    left.sort_by(|a, b| a.id.cmp(&b.id));
    let ids: Vec<&str> = left.iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids, ["t-good", "t-waits"]);
    assert_eq!(
        (left[0].digest, left[1].after.len(), &left[1].body.waits_for),
        (good.digest, 0, &None)
    );
    assert_eq!(
        catalogue
            .open_runs::<serde_json::Value>(9)
            .await
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn what_is_published_while_it_is_given_back_stays() {
    let (_dir, catalogue) = catalogue().await;
    let names: Vec<ArtifactRef> = ["model/m:1", "model/m:2", "model/m:3"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    let [arrived, own] =
        ["/nas/m", "/home/m"].map(|path| sink::StorageLocation::Folder { path: path.into() });
    for name in &names {
        catalogue.add_artifact(name, &root(1), None).await.unwrap();
        catalogue
            .set_place(name, Some(&arrived), Some("/nas/m"))
            .await
            .unwrap();
    }
    let publish = async |name: &ArtifactRef| {
        catalogue
            .set_published(name, &own, "/home/m", 7, &Offer::default())
            .await
            .unwrap();
    };
    // Before, in between, and not at all.
    publish(&names[0]).await;
    assert!(!catalogue.leave(&names[0]).await.unwrap());
    assert!(catalogue.artifact(&names[0]).await.unwrap().place.is_some());
    assert!(catalogue.leave(&names[1]).await.unwrap() && catalogue.leave(&names[2]).await.unwrap());
    publish(&names[1]).await;
    // The hub may have heard of it already.
    catalogue.offered(&names[1]).await.unwrap();
    for name in &names[1..] {
        catalogue.remove_left(name).await.unwrap();
    }
    let there = catalogue.artifact(&names[1]).await.unwrap();
    assert_eq!((there.published, there.place.as_ref()), (true, Some(&own)));
    assert_eq!(
        catalogue.artifact(&names[2]).await.unwrap_err().code,
        Code::NotFound
    );
}

#[tokio::test]
async fn what_is_read_in_a_folder_is_found() {
    let (_dir, catalogue) = catalogue().await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    catalogue.add_artifact(&name, &root(1), None).await.unwrap();
    let place = sink::StorageLocation::Folder {
        path: "/data/runs/r/output".into(),
    };
    catalogue
        .set_place(&name, Some(&place), Some(""))
        .await
        .unwrap();
    let found = async |folder: &str| catalogue.published_in(Path::new(folder)).await.unwrap();
    assert_eq!(found("/data/runs/r").await, None, "it was delivered there");
    catalogue.set_place(&name, None, None).await.unwrap();
    catalogue
        .set_published(&name, &place, "", 7, &Offer::default())
        .await
        .unwrap();
    for folder in ["/data/runs/r", "/data/runs/r/output"] {
        assert_eq!(found(folder).await, Some(name.clone()), "{folder}");
    }
    for folder in ["/data/runs/r/output/a", "/data/runs/r/out", "/data/runs/x"] {
        assert_eq!(found(folder).await, None, "{folder}");
    }
}

async fn join(catalogue: &Catalogue, name: &str, labels: &[(&str, &str)]) -> SiteName {
    let site: SiteName = name.parse().unwrap();
    let labels = labels
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    catalogue
        .add_token(name, &[1; 32], &Holder::Site(site.clone()), &labels, 60)
        .await
        .unwrap();
    catalogue
        .redeem_token(name, &[1; 32], &Claim::Site(site.clone()), &[7; 32])
        .await
        .unwrap();
    site
}

/// The same catalogue under a hub whose policy is this.
fn under(catalogue: &Catalogue, allow: &[&str]) -> Catalogue {
    let policy: Vec<SiteSelector> = allow.iter().map(|text| text.parse().unwrap()).collect();
    catalogue.clone().with_share_policy(Some(policy))
}

#[tokio::test]
async fn the_hub_says_who_may_have_what_sites_publish_and_a_site_can_only_narrow_it() {
    let (_dir, catalogue) = catalogue().await;
    let sites = [
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
        join(&catalogue, "c", &[("line", "3")]).await,
        join(&catalogue, "d", &[("line", "4")]).await,
    ];
    // Of what a published: to a itself, b, c and d.
    let check = async |catalogue: &Catalogue, expected: [Option<Forbids>; 4]| {
        for (site, expected) in sites.iter().zip(expected) {
            assert_eq!(
                catalogue.forbidden_by(&sites[0], site).await.unwrap(),
                expected,
                "{site}"
            );
            assert_eq!(
                catalogue.shares_with(&sites[0], site).await.unwrap(),
                expected.is_none(),
                "{site}"
            );
        }
    };
    let (hub, origin) = (Some(Forbids::Hub), Some(Forbids::Origin));
    let policy = under(&catalogue, &["b", "line=3"]);
    check(&catalogue, [None; 4]).await;
    check(&policy, [None, None, None, hub]).await;
    check(&under(&catalogue, &["all"]), [None; 4]).await;
    check(&under(&catalogue, &[]), [None, hub, hub, hub]).await;

    catalogue
        .set_share(&sites[0], Some(&["b".to_owned(), "d".to_owned()]))
        .await
        .unwrap();
    check(&catalogue, [None, None, origin, None]).await;
    check(&policy, [None, None, origin, hub]).await;
    catalogue.set_share(&sites[0], Some(&[])).await.unwrap();
    check(&policy, [None, origin, origin, hub]).await;
    // That was a's list: what b publishes goes as far as the hub lets it.
    assert!(policy.shares_with(&sites[1], &sites[2]).await.unwrap());
    assert!(!policy.shares_with(&sites[1], &sites[0]).await.unwrap());
}

#[tokio::test]
async fn the_hubs_policy_ends_open_transfers_of_what_sites_published_and_no_others() {
    let (_dir, catalogue) = catalogue().await;
    let sites = [
        join(&catalogue, "a", &[]).await,
        join(&catalogue, "b", &[]).await,
        join(&catalogue, "c", &[]).await,
    ];
    let published = [
        ("model/of-a:1", root(1), Some(&sites[0])),
        ("model/of-hub:1", root(2), None),
    ];
    for (name, root, origin) in &published {
        let artifact: ArtifactRef = name.parse().unwrap();
        catalogue
            .add_artifact(&artifact, root, *origin)
            .await
            .unwrap();
        let part = Part {
            artifact,
            digest: root.digest(),
            total: 1,
            needs: None,
            sites: sites.to_vec(),
        };
        catalogue
            .deliver(
                &name.replace(['/', ':'], "-").parse().unwrap(),
                None,
                &[part],
                &[],
            )
            .await
            .unwrap();
    }
    // To a, b and c.
    let check = async |catalogue: &Catalogue, of_a: [bool; 3]| {
        for (site, of_a) in sites.iter().zip(of_a) {
            assert_eq!(
                catalogue.is_shared(site, root(1).digest()).await.unwrap(),
                of_a,
                "{site}"
            );
            assert!(
                catalogue.is_shared(site, root(2).digest()).await.unwrap(),
                "the hub's own is no site's to keep from {site}"
            );
        }
    };
    check(&catalogue, [true; 3]).await;
    check(&under(&catalogue, &["b"]), [true, true, false]).await;
    check(&under(&catalogue, &[]), [true, false, false]).await;
}

#[tokio::test]
async fn what_changed_where_it_was_published_is_an_event_once() {
    let (_dir, catalogue) = catalogue().await;
    let names: Vec<ArtifactRef> = ["model/m:1", "model/m:2", "model/m:3"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    let place = sink::StorageLocation::Folder {
        path: "/nas".into(),
    };
    for name in &names {
        catalogue.add_artifact(name, &root(1), None).await.unwrap();
    }
    for name in &names[..2] {
        catalogue
            .set_published(name, &place, "/nas", 7, &Offer::default())
            .await
            .unwrap();
    }
    assert_eq!(catalogue.published().await.unwrap(), names[..2]);
    assert_eq!(catalogue.artifact(&names[0]).await.unwrap().published_ms, 7);
    let before = catalogue.cursor().await.unwrap();
    assert!(
        !catalogue.set_changed(&names[0], None).await.unwrap(),
        "it was sound"
    );
    assert!(
        catalogue
            .set_changed(&names[0], Some("a is gone"))
            .await
            .unwrap()
    );
    assert!(
        !catalogue
            .set_changed(&names[0], Some("a is gone"))
            .await
            .unwrap()
    );
    assert!(
        catalogue
            .set_changed(&names[0], Some("b is gone"))
            .await
            .unwrap()
    );
    assert_eq!(catalogue.cursor().await.unwrap(), before + 2);
    assert_eq!(
        catalogue
            .artifact(&names[0])
            .await
            .unwrap()
            .changed
            .as_deref(),
        Some("b is gone")
    );
    // The hub is told of it once it has heard of the artifact itself.
    assert!(catalogue.changed_here().await.unwrap().is_empty());
    catalogue.offered(&names[0]).await.unwrap();
    assert_eq!(
        catalogue.changed_here().await.unwrap(),
        [(names[0].clone(), "b is gone".into())]
    );
    assert!(catalogue.set_changed(&names[0], None).await.unwrap());
    assert!(catalogue.changed_here().await.unwrap().is_empty());
}

#[tokio::test]
async fn of_what_changed_the_newest_sound_version_from_the_same_place_is_known() {
    let (_dir, catalogue) = catalogue().await;
    // In the order of their names: where and when it was published, whether it changed, and what
    // was published there since.
    let all = [
        ("model/m:1", "a", 1, true, Some("model/m:3")),
        ("model/m:2", "a", 2, false, None),
        ("model/m:3", "a", 4, false, None),
        ("model/m:4", "a", 3, false, None),
        ("model/m:5", "a", 4, true, None),
        ("model/m:6", "b", 5, false, None),
        ("model/n:1", "a", 0, true, None),
    ];
    for (name, _, _, changed, _) in all {
        let name = name.parse().unwrap();
        catalogue.add_artifact(&name, &root(1), None).await.unwrap();
        catalogue
            .set_changed(&name, changed.then_some("a is gone"))
            .await
            .unwrap();
    }
    let rows = catalogue.artifacts().await.unwrap();
    let published = rows
        .into_iter()
        .zip(all)
        .map(|(row, (_, place, at_ms, ..))| (place, at_ms, row.artifact, row.changed));
    let found: Vec<_> = what_changed(published)
        .into_iter()
        .map(|c| (c.artifact, c.place, c.how, c.newer))
        .collect();
    let expected = all
        .into_iter()
        .filter(|(_, _, _, changed, _)| *changed)
        .map(|(name, place, _, _, newer)| {
            (
                name.parse::<ArtifactRef>().unwrap(),
                place,
                "a is gone".to_owned(),
                newer.map(|newer| newer.parse().unwrap()),
            )
        });
    assert_eq!(found, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn the_hub_believes_of_each_site_what_changed_of_its_own() {
    let (_dir, catalogue) = catalogue().await;
    let sites: Vec<SiteName> = vec!["a".parse().unwrap(), "b".parse().unwrap()];
    let names: Vec<ArtifactRef> = ["model/a:1", "model/a:2", "model/b:1", "model/hub:1"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    for (name, origin) in
        names
            .iter()
            .zip([Some(&sites[0]), Some(&sites[0]), Some(&sites[1]), None])
    {
        catalogue
            .add_artifact(name, &root(1), origin)
            .await
            .unwrap();
    }
    let tell = async |site: usize, of: &[usize]| {
        let all: Vec<(ArtifactRef, base::text::Message)> = of
            .iter()
            .map(|&i| (names[i].clone(), format!("{i} is gone").into()))
            .collect();
        catalogue.set_changed_at(&sites[site], &all).await.unwrap()
    };
    let check = async |expected: [bool; 4]| {
        for (i, expected) in expected.into_iter().enumerate() {
            let changed = catalogue.artifact(&names[i]).await.unwrap().changed;
            assert_eq!(
                changed,
                expected.then(|| format!("{i} is gone")),
                "{}",
                names[i]
            );
        }
    };
    assert!(!tell(0, &[]).await);
    assert!(tell(1, &[2]).await);
    assert!(tell(0, &[0, 1, 2, 3]).await);
    check([true, true, true, false]).await;
    assert!(!tell(0, &[0, 1]).await);
    assert!(tell(0, &[1]).await);
    check([false, true, true, false]).await;
    assert!(tell(1, &[]).await);
    check([false, true, false, false]).await;
    // The hub has the bytes itself now: whatever lies there is no business of its.
    catalogue.take_over(&names[1]).await.unwrap();
    check([false; 4]).await;
}

#[tokio::test]
async fn lists_go_on_behind_any_row() {
    let (_dir, catalogue) = catalogue().await;
    let artifact: ArtifactRef = "dataset/a:1".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root(1), None)
        .await
        .unwrap();
    let row = catalogue.artifact(&artifact).await.unwrap();
    for n in 0..7 {
        let part = Part::new(&row, &[format!("site-{n}").parse().unwrap()]);
        catalogue
            .deliver(&format!("d-{n}").parse().unwrap(), None, &[part], &[])
            .await
            .unwrap();
    }
    let ids = |rows: &[TransferRow]| {
        rows.iter()
            .map(|row| row.id.to_string())
            .collect::<Vec<_>>()
    };
    let all = ids(&catalogue
        .transfers(&TransferQuery::default())
        .await
        .unwrap()
        .0);
    let everything = TransferQuery::default();
    let room = |rows| Room {
        rows,
        bytes: 1 << 20,
    };
    let view = |row: &TransferRow| row.id.to_string();
    for (n, id) in all.iter().enumerate() {
        let (page, _) = catalogue
            .transfer_page(&everything, Some(id), room(3), view)
            .await
            .unwrap();
        let rest = &all[n + 1..(n + 4).min(all.len())];
        assert_eq!(
            page.rows.iter().collect::<Vec<_>>(),
            rest.iter().collect::<Vec<_>>()
        );
        assert_eq!(page.next, (n + 4 < all.len()).then(|| rest[2].clone()));
    }
    assert!(
        catalogue
            .transfer_page(&everything, Some("t-0"), room(3), view)
            .await
            .unwrap()
            .0
            .rows
            .is_empty()
    );
    // By bytes, one at a time; of ids, in the order in which they were begun.
    let ids_of = TransferQuery {
        id: Some(all.join(",")),
        ..TransferQuery::default()
    };
    let (mut seen, mut behind) = (Vec::new(), None);
    loop {
        let (page, _) = catalogue
            .transfer_page(
                &ids_of,
                behind.as_deref(),
                Room { rows: 9, bytes: 10 },
                view,
            )
            .await
            .unwrap();
        assert!(page.rows.len() <= 1);
        seen.extend(page.rows);
        let Some(next) = page.next else { break };
        behind = Some(next);
    }
    let mut oldest_first = all.clone();
    oldest_first.sort();
    assert_eq!(seen, oldest_first);
    let unknown = TransferQuery {
        id: Some(format!("{},t-0", all[0])),
        ..TransferQuery::default()
    };
    assert_eq!(
        catalogue
            .transfer_page(&unknown, None, room(3), view)
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    let deliveries = async |behind: Option<String>, limit, by_transfers| {
        let rows = catalogue
            .deliveries(behind.as_deref(), limit, by_transfers)
            .await
            .unwrap();
        rows.into_iter()
            .map(|row| row.id.to_string())
            .collect::<Vec<_>>()
    };
    for by_transfers in [false, true] {
        let all = deliveries(None, 100, by_transfers).await;
        assert_eq!(all.len(), 7);
        for (n, id) in all.iter().enumerate() {
            assert_eq!(
                deliveries(Some(id.clone()), 3, by_transfers).await,
                all[n + 1..(n + 4).min(all.len())]
            );
        }
    }
    assert_eq!(
        catalogue
            .artifact_page(None, room(3), |row| row.artifact.clone())
            .await
            .unwrap()
            .rows
            .len(),
        1
    );
    assert_eq!(
        catalogue.artifact_names_settled().await.unwrap(),
        std::slice::from_ref(&artifact)
    );
    let counted = catalogue.counted_transfers().await.unwrap();
    assert_eq!(counted.iter().map(|some| some.transfers).sum::<i64>(), 7);
    let bytes = row.root.totals.bytes;
    assert_eq!(
        catalogue
            .published_by(None, Some(&"office".parse().unwrap()))
            .await
            .unwrap(),
        (0, 0)
    );
    catalogue
        .set_publisher(&artifact, &"office".parse().unwrap())
        .await
        .unwrap();
    assert_eq!(
        catalogue
            .published_by(None, Some(&"office".parse().unwrap()))
            .await
            .unwrap(),
        (1, bytes)
    );
}

#[tokio::test]
async fn whoever_follows_by_a_cursor_misses_none_of_many_that_change_at_once() {
    let (_dir, catalogue) = catalogue().await;
    let (artifacts, site): (Vec<ArtifactRef>, SiteName) = (
        (0..9)
            .map(|n| format!("dataset/a:{n}").parse().unwrap())
            .collect(),
        "west".parse().unwrap(),
    );
    let mut parts = Vec::new();
    for artifact in &artifacts {
        catalogue
            .add_artifact(artifact, &root(1), None)
            .await
            .unwrap();
        parts.push(Part::new(
            &catalogue.artifact(artifact).await.unwrap(),
            std::slice::from_ref(&site),
        ));
    }
    let ids = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &parts, &[])
        .await
        .unwrap();
    let before = catalogue.cursor().await.unwrap();
    catalogue
        .add_token(
            "t",
            &[1; 32],
            &Holder::Site(site.clone()),
            &Default::default(),
            60,
        )
        .await
        .unwrap();
    catalogue
        .redeem_token("t", &[1; 32], &Claim::Site(site.clone()), &[7; 32])
        .await
        .unwrap();
    catalogue.site_seen(&site, None).await.unwrap();
    let (mut since, mut seen) = (before, Vec::new());
    loop {
        let query = TransferQuery {
            since: Some(since),
            ..TransferQuery::default()
        };
        let (page, cursor) = catalogue
            .transfer_page(
                &query,
                None,
                Room {
                    rows: 2,
                    bytes: 1 << 20,
                },
                |row| row.id.to_string(),
            )
            .await
            .unwrap();
        assert!(page.rows.len() <= 2);
        seen.extend(page.rows);
        since = cursor;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(
        seen,
        ids.iter().map(ToString::to_string).collect::<Vec<_>>()
    );
    assert_eq!(
        since,
        catalogue.cursor().await.unwrap(),
        "the event of the site comes behind them"
    );
    assert!(
        catalogue
            .events(before, 100)
            .await
            .unwrap()
            .iter()
            .any(|event| event.what == "site" && event.name == "west")
    );
}

#[tokio::test]
async fn a_collection_waits_for_what_is_being_committed() {
    let (_dir, catalogue) = catalogue().await;
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    let mut tx = catalogue.write.begin_with("BEGIN IMMEDIATE").await.unwrap();
    sqlx::query("INSERT INTO artifact (reference, digest, root, created_ms) VALUES (?, ?, ?, 0)")
        .bind(name.to_string())
        .bind(&root(1).digest().0[..])
        .bind(root(1).to_bytes())
        .execute(&mut *tx)
        .await
        .unwrap();
    let other = catalogue.clone();
    let settled = tokio::spawn(async move { other.artifact_names_settled().await.unwrap() });
    tokio::task::yield_now().await;
    assert!(
        catalogue.artifact_names().await.unwrap().is_empty(),
        "nobody sees it yet"
    );
    tx.commit().await.unwrap();
    assert_eq!(settled.await.unwrap(), [name]);
}
