//! The test suite of engines on SQLite, and tests of what only SQLite has: its file, its
//! migrations, and damaged rows in it.

use std::path::Path;
use std::sync::Arc;

use base::names::{ArtifactRef, SiteName};
use model::paging::Room;
use model::transfer::{State, TransferQuery};
use sqlx::ConnectOptions as _;
use sqlx::migrate::Migrator;

use super::*;
use crate::conformance::{join, part, root, signed, wanted};
use crate::{Catalogue, Subject};

crate::conformance::catalogue_suite!(opened);

async fn opened() -> (tempfile::TempDir, Catalogue) {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = Catalogue::open(dir.path()).await.unwrap();
    (dir, catalogue)
}

/// A connection that is separate from those of the daemon.
async fn raw(dir: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new()
        .filename(dir.join("catalogue.db"))
        .create_if_missing(true);
    options
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(10))
        .connect()
        .await
        .unwrap()
}

async fn sql(dir: &Path, statement: &'static str) -> u64 {
    let mut db = raw(dir).await;
    let done = sqlx::query(statement)
        .execute(&mut db)
        .await
        .unwrap()
        .rows_affected();
    db.close().await.unwrap();
    done
}

/// A catalogue as the program created it before the migration `version`.
async fn before(version: i64, dir: &Path) -> SqliteConnection {
    let mut db = raw(dir).await;
    let migrations = sqlx::migrate!("../../migrations/catalogue");
    let older: Vec<_> = migrations
        .iter()
        .filter(|migration| migration.version < version)
        .cloned()
        .collect();
    assert!(older.len() < migrations.iter().count());
    Migrator::with_migrations(older).run(&mut db).await.unwrap();
    db
}

#[tokio::test]
async fn event_numbers_continue_in_a_catalogue_of_the_previous_revision() {
    // The number of events written, the number left by `trim_events`, and whether a transfer has
    // the newest number.
    for (written, left, of_transfer) in [
        (0, 0, false),
        (5, 5, false),
        (5, 2, false),
        (5, 0, false),
        (5, 5, true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut db = before(10, dir.path()).await;
        for n in 0..written {
            let insert = "INSERT INTO event (at_ms, what, name) VALUES (?, 'artifact', ?)";
            sqlx::query(insert)
                .bind(n)
                .bind(format!("model/old:{n}"))
                .execute(&mut db)
                .await
                .unwrap();
        }
        sqlx::query("DELETE FROM event WHERE seq <= ?")
            .bind(written - left)
            .execute(&mut db)
            .await
            .unwrap();
        let mut newest = written as u64;
        if of_transfer {
            newest = 9;
            let insert = "INSERT INTO transfer (id, delivery, reference, digest, site, state, body, created_ms, updated_ms, cursor)
                VALUES ('t-1', 'd-1', 'model/m:1', ?, 'b', 'done', '{}', 1, 1, 9)";
            sqlx::query(insert)
                .bind(&root(1).digest().0[..])
                .execute(&mut db)
                .await
                .unwrap();
        }
        db.close().await.unwrap();

        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        assert_eq!(catalogue.cursor().await.unwrap(), newest);
        for n in 0..3 {
            catalogue
                .add_artifact(&format!("model/new:{n}").parse().unwrap(), &root(n), None)
                .await
                .unwrap();
        }
        let names = |events: Vec<crate::EventRow>| {
            events
                .into_iter()
                .map(|event| (event.seq, event.name))
                .collect::<Vec<_>>()
        };
        let new: Vec<_> = (0..3)
            .map(|n| (newest + n + 1, format!("model/new:{n}")))
            .collect();
        // A reader that has read all events, and one that has not.
        assert_eq!(names(catalogue.events(newest, 9).await.unwrap()), new);
        let old = (written - left..written).map(|n| (n as u64 + 1, format!("model/old:{n}")));
        assert_eq!(
            names(catalogue.events(0, 99).await.unwrap()),
            old.chain(new).collect::<Vec<_>>()
        );
        // The program is started again.
        catalogue.close().await;
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        assert_eq!(catalogue.cursor().await.unwrap(), newest + 3);
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_read_is_skipped_and_reported() {
    let (dir, catalogue) = opened().await;
    let site = join(&catalogue, "b", &[("line", "3")]).await;
    let mut parts = Vec::new();
    for n in 0..5 {
        let name = format!("model/m:{n}");
        catalogue
            .add_artifact(&name.parse().unwrap(), &root(n), Some(&site))
            .await
            .unwrap();
        parts.push(part(&name, std::slice::from_ref(&site)));
        catalogue
            .save_run(
                &format!("r-{n}"),
                "training",
                true,
                &serde_json::json!({ "spec": { "on": "b" } }),
            )
            .await
            .unwrap();
    }
    let changed = catalogue
        .deliver(&"d-1".parse().unwrap(), None, &parts, &[])
        .await
        .unwrap();
    let ids = changed.clone();
    assert!(ids.is_sorted(), "in the order of the parts");
    let bad = ids[1].to_string();
    let changed: Vec<_> = changed.iter().filter(|id| **id != ids[1]).collect();
    sqlx::query("UPDATE transfer SET body = 'no JSON' WHERE id = ?")
        .bind(&bad)
        .execute(&mut raw(dir.path()).await)
        .await
        .unwrap();
    assert_eq!(
        sql(
            dir.path(),
            "UPDATE artifact SET root = x'00', used_ms = 1 WHERE reference = 'model/m:1'"
        )
        .await,
        1
    );
    assert_eq!(
        sql(dir.path(), "UPDATE run SET body = '{' WHERE name = 'r-1'").await,
        1
    );

    // The work of a site, and the counts for metrics.
    let open = catalogue.open_transfers(&site).await.unwrap();
    assert_eq!(
        open.iter().map(|row| &row.id).collect::<Vec<_>>(),
        [&ids[0], &ids[2], &ids[3], &ids[4]]
    );
    assert_eq!(
        catalogue
            .counted_transfers()
            .await
            .unwrap()
            .iter()
            .map(|some| some.transfers)
            .sum::<i64>(),
        5
    );
    assert_eq!(
        catalogue.relay_kept().await.unwrap().len(),
        1,
        "its root is not read for that"
    );
    // Lists in pages of every size, in both orders.
    let since = |since| TransferQuery {
        since: Some(since),
        ..TransferQuery::default()
    };
    for rows in 1..6 {
        let room = Room {
            rows,
            bytes: 1 << 20,
        };
        let (mut seen, mut behind) = (Vec::new(), None);
        loop {
            let query = TransferQuery::default();
            let (page, _) = catalogue
                .transfer_page(&query, behind.as_deref(), room, |row| row.id.to_string())
                .await
                .unwrap();
            seen.extend(page.rows);
            let Some(next) = page.next else { break };
            behind = Some(next);
        }
        assert_eq!(seen, [4, 3, 2, 0].map(|n| ids[n].to_string()), "{rows}");
        let (mut seen, mut cursor) = (Vec::new(), 0);
        while seen.len() < 4 {
            let (page, next) = catalogue
                .transfer_page(&since(cursor), None, room, |row| row.id.to_string())
                .await
                .unwrap();
            assert!(next > cursor, "it goes on");
            (cursor, seen) = (next, [seen, page.rows].concat());
        }
        let expected: Vec<_> = changed.iter().map(ToString::to_string).collect();
        assert_eq!(seen, expected, "{rows}");
        let (mut seen, mut cursor) = (Vec::new(), 0);
        while seen.len() < 4 {
            let query = TransferQuery {
                limit: Some(rows),
                ..since(cursor)
            };
            let (page, next) = catalogue.transfers(&query).await.unwrap();
            assert!(next > cursor, "it goes on");
            cursor = next;
            seen.extend(page.into_iter().map(|row| row.id));
        }
        assert_eq!(seen.iter().collect::<Vec<_>>(), changed, "{rows}");
        let (mut artifacts, mut behind) = (Vec::new(), None);
        loop {
            let page = catalogue
                .artifact_page(behind.as_deref(), room, |row| row.artifact.to_string())
                .await
                .unwrap();
            artifacts.extend(page.rows);
            let Some(next) = page.next else { break };
            behind = Some(next);
        }
        assert_eq!(
            artifacts,
            [0, 2, 3, 4].map(|n| format!("model/m:{n}")),
            "{rows}"
        );
        let (mut runs, mut behind) = (0, None);
        loop {
            let show = |_: &serde_json::Value| ();
            let page = catalogue
                .run_page(None, behind.as_deref(), 0, room, show)
                .await
                .unwrap();
            runs += page.rows.len();
            let Some(next) = page.next else { break };
            behind = Some(next);
        }
        assert_eq!(runs, 4, "{rows}");
    }
    assert_eq!(
        catalogue
            .open_runs::<serde_json::Value>(9)
            .await
            .unwrap()
            .len(),
        4
    );
    assert_eq!(
        catalogue
            .run_page(
                Some(&site),
                None,
                0,
                Room {
                    rows: 9,
                    bytes: 1 << 20
                },
                |_: &serde_json::Value| ()
            )
            .await
            .unwrap()
            .rows
            .len(),
        4
    );
    // The other rows can still be read.
    catalogue
        .update_transfer(&ids[2], 0, State::Done, &signed())
        .await
        .unwrap();
    // A query by name, a query before a removal, and the query for the inputs of a run fail
    // instead, and the fault names the row.
    for fault in [
        catalogue.transfer(&bad).await.unwrap_err(),
        catalogue.delivery_parts("d-1").await.unwrap_err(),
        catalogue
            .each_part(&"d-1".parse().unwrap(), |_| ())
            .await
            .unwrap_err(),
    ] {
        assert!(fault.message.contains(&bad), "{fault}");
    }
    assert!(
        catalogue
            .all_open_runs::<serde_json::Value>(9)
            .await
            .unwrap_err()
            .message
            .contains("r-1")
    );
    // A list without that run would end it at its site.
    let open = catalogue.complete_open_runs::<serde_json::Value>(9);
    assert_eq!(open.await.unwrap(), None);
    assert!(
        catalogue
            .artifact(&"model/m:1".parse().unwrap())
            .await
            .unwrap_err()
            .message
            .contains("model/m:1")
    );
    let reported = || {
        catalogue
            .malformed_rows()
            .iter()
            .map(|row| format!("{} {}", row.table, row.key))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        reported(),
        [
            "artifact model/m:1".to_owned(),
            "run r-1".to_owned(),
            format!("transfer {bad}")
        ]
    );

    let lines: Vec<String> = catalogue
        .malformed_rows()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(lines[2], format!("transfer {bad} cannot be read: body"));

    // The site is returned without its labels.
    assert_eq!(
        sql(
            dir.path(),
            "UPDATE site SET labels = 'none' WHERE name = 'b'"
        )
        .await,
        1
    );
    assert!(
        catalogue
            .site("b")
            .await
            .unwrap()
            .unwrap()
            .labels
            .is_empty()
    );
    assert!(reported().contains(&"labels of site b".to_owned()));
    // A restored row is no longer reported.
    sqlx::query("UPDATE transfer SET body = '{}' WHERE id = ?")
        .bind(&bad)
        .execute(&mut raw(dir.path()).await)
        .await
        .unwrap();
    assert_eq!(catalogue.open_transfers(&site).await.unwrap().len(), 4);
    assert!(!reported().iter().any(|row| row.starts_with("transfer")));
}

#[tokio::test]
async fn the_content_of_the_relay_cache_is_listed_without_root_manifests() {
    let (dir, catalogue) = opened().await;
    let site: SiteName = "b".parse().unwrap();
    for n in 0..3 {
        let artifact: ArtifactRef = format!("model/m:{n}").parse().unwrap();
        catalogue
            .add_artifact(&artifact, &root(n), Some(&site))
            .await
            .unwrap();
        catalogue.relay_used(root(n).digest()).await.unwrap();
    }
    // If the root manifest was read, this would fail.
    assert_eq!(sql(dir.path(), "UPDATE artifact SET root = x'00'").await, 3);
    assert_eq!(catalogue.relay_kept().await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_lineage_that_cannot_be_read_counts_as_unknown_and_is_reported() {
    let (dir, catalogue) = opened().await;
    let model: ArtifactRef = "model/m:1".parse().unwrap();
    let damaged = "INSERT INTO lineage (reference, body) VALUES ('model/m:1', '{')";
    assert_eq!(sql(dir.path(), damaged).await, 1);
    assert!(catalogue.lineage(&model).await.unwrap().is_none());
    let rows = catalogue.malformed_rows();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].table, &*rows[0].key), ("lineage", "model/m:1"));
}

#[tokio::test]
async fn a_transaction_that_is_not_committed_wakes_no_task() {
    let (_dir, catalogue) = opened().await;
    let mut watch = catalogue.watch(Subject::Site("b".parse().unwrap()));
    let mut changes = catalogue.change_transfers().await.unwrap();
    changes
        .insert(&wanted("t-1", "model/m:1", 0), None)
        .await
        .unwrap();
    assert!(futures::poll!(std::pin::pin!(watch.changed())).is_pending());
    drop(changes);
    assert!(futures::poll!(std::pin::pin!(watch.changed())).is_pending());
    assert!(catalogue.transfer("t-1").await.is_err());
    let mut changes = catalogue.change_transfers().await.unwrap();
    changes
        .insert(&wanted("t-1", "model/m:1", 0), None)
        .await
        .unwrap();
    changes.commit().await.unwrap();
    assert!(futures::poll!(std::pin::pin!(watch.changed())).is_ready());
}

#[tokio::test]
async fn rows_with_ids_that_no_longer_parse_are_removed_by_the_migration() {
    let (dir, catalogue) = opened().await;
    let mut db = raw(dir.path()).await;
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
            .execute(&mut db)
            .await
            .unwrap();
    }
    let (readable, _) = catalogue
        .transfers(&TransferQuery::default())
        .await
        .unwrap();
    assert_eq!(readable.len(), 1, "such rows cannot be read");
    sqlx::raw_sql(include_str!(
        "../../../../migrations/catalogue/0008_ids.sql"
    ))
    .execute(&mut db)
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
async fn a_collection_waits_for_open_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let common = Arc::<Common>::default();
    let engine = Arc::new(Sqlite::open(dir.path(), common.clone()).await.unwrap());
    let catalogue = Catalogue::on(engine.clone(), common);
    let name: ArtifactRef = "model/m:1".parse().unwrap();
    let mut write = engine.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO artifact (reference, digest, root, created_ms) VALUES ($1, $2, $3, 0)",
    )
    .bind(name.to_string())
    .bind(&root(1).digest().0[..])
    .bind(root(1).to_bytes())
    .execute(write.db())
    .await
    .unwrap();
    let other = catalogue.clone();
    let settled = tokio::spawn(async move { other.artifact_names_settled().await.unwrap() });
    tokio::task::yield_now().await;
    assert!(
        catalogue.artifact_names().await.unwrap().is_empty(),
        "it is not visible yet"
    );
    write.commit().await.unwrap();
    assert_eq!(settled.await.unwrap(), [name]);
}

#[tokio::test]
async fn members_of_the_previous_revision_keep_their_certificates_until_they_get_newer_ones() {
    use base::peer::Peer;
    use model::policy::Standing;
    use transport::identity::{Claim, Serial};

    let dir = tempfile::tempdir().unwrap();
    let mut db = before(14, dir.path()).await;
    for statement in [
        "INSERT INTO site (name, labels, joined_ms, seen_ms) VALUES ('west', '{\"line\":\"3\"}', 1, 5000)",
        "INSERT INTO publisher (name, joined_ms, scope) VALUES ('office', 1, '{\"artifacts\":[\"model/*\"]}')",
        // A site whose join was not answered, and one that has connected since.
        "INSERT INTO token (id, secret_hash, site, labels, expires_ms, used_ms, key_hash)
             VALUES ('lost', zeroblob(32), 'late', '{}', 9000000000000, 4000, zeroblob(32))",
        "INSERT INTO site (name, labels, joined_ms) VALUES ('late', '{}', 4000)",
        "INSERT INTO token (id, secret_hash, site, labels, expires_ms, used_ms, key_hash)
             VALUES ('done', zeroblob(32), 'west', '{}', 9000000000000, 4000, zeroblob(32))",
    ] {
        sqlx::query(statement).execute(&mut db).await.unwrap();
    }
    db.close().await.unwrap();
    let catalogue = Catalogue::open(dir.path()).await.unwrap();
    let row = catalogue.site("west").await.unwrap().unwrap();
    assert_eq!(
        (row.labels["line"].as_str(), &row.member),
        ("3", &Default::default())
    );
    let publishers = catalogue.publishers(None, 10).await.unwrap();
    assert!(publishers.len() == 1 && publishers[0].member == Default::default());

    let earlier = Serial::from_bytes(&[0x7f; 20]).unwrap();
    for who in [
        Peer::Site("west".parse().unwrap()),
        Peer::Publisher("office".parse().unwrap()),
    ] {
        let member = async || catalogue.member(&who).await.unwrap().unwrap();
        assert_eq!(member().await.standing(&earlier, 0), Standing::Current);
        // Nothing is recorded of a handshake with it.
        catalogue.confirm(&who, &earlier).await.unwrap();
        assert_eq!(member().await, Default::default());
        let renewed = catalogue.renew(&who, &earlier).await.unwrap();
        let now = clock::now_ms();
        for serial in [&earlier, &renewed] {
            assert_eq!(member().await.standing(serial, now), Standing::Current);
        }
        catalogue.confirm(&who, &renewed).await.unwrap();
        assert_eq!(member().await.standing(&earlier, now), Standing::Superseded);
        assert_eq!(member().await.standing(&renewed, now), Standing::Current);
    }
    let ask = async |id: &str, site: &str| {
        let claim = Claim::Site(site.parse().unwrap());
        catalogue.redeem_token(id, &[0; 32], &claim, &[0; 32]).await
    };
    ask("lost", "late").await.unwrap();
    assert!(
        ask("done", "west")
            .await
            .unwrap_err()
            .message
            .contains("used already")
    );
}
