//! The contract of every engine, run on each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use sqlx::Connection;

use crate::labels::testing::set::Set;
use crate::labels::testing::{Bench, Db};
use crate::{Sink, StorageLocation, Verification};
use base::durable;
use base::fault::{Code, Reason, Retry};

crate::on_both!(
    commits_what_the_views_show,
    a_repeated_commit_changes_nothing,
    refuses_different_content_under_the_same_version,
    continues_after_a_crash,
    an_aborted_commit_does_not_block_the_next,
    a_commit_waits_for_the_rename_of_an_aborted_one,
    readers_see_the_old_version_or_the_new,
    refuses_bad_rows_and_leaves_nothing,
    activates_and_removes,
    the_version_that_was_requested_last_is_active,
    rows_that_were_deleted_are_noticed_without_reading_them,
    rows_of_an_earlier_program_are_removed_before_anything_is_delivered,
    exports_the_original_bytes,
    exports_an_empty_set,
    verify_finds_changed_rows,
    many_rows_in_bounded_memory,
    two_sets_at_once,
);

async fn commit(bench: &Bench, set: &Set, version: &str) -> StorageLocation {
    let (incoming, staged) = set.stage(&bench.sink, version);
    bench.sink.check(&incoming).await.unwrap();
    let landed = bench.sink.commit(&incoming, &staged).await.unwrap();
    assert!(!staged.exists(), "the staging directory still exists");
    landed.place
}

async fn commits_what_the_views_show(bench: Bench) {
    let set = Set::new(1, 20, 4, 0);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    let landed = bench.sink.commit(&incoming, &staged).await.unwrap();
    assert_eq!(
        landed.place,
        StorageLocation::Folder {
            path: bench.data.path().join("labels/aoi-line3/v1")
        }
    );
    assert!(
        landed
            .location
            .ends_with("annotations label_set=aoi-line3 version=v1"),
        "{}",
        landed.location
    );
    assert!(!landed.location.contains("correct horse"));
    set.assert_at(&bench.data.path().join("labels/aoi-line3/v1"));

    assert_eq!(bench.current().await, set.count());
    assert_eq!(
        bench
            .number("SELECT count(*) FROM {}annotations WHERE version = 'v1'")
            .await,
        set.count()
    );
    let columns = "SELECT count(*) FROM (SELECT label_set, version, sample_path, sample_hash, class, kind, x, y, w, h, geom, attrs, raw
        FROM {}current_annotations WHERE class = '划痕' AND kind = 'polygon' AND sample_path LIKE 'line-2/%') AS q";
    let expected = set
        .annotations
        .lines()
        .filter(|l| {
            l.starts_with(r#"{"sample":"line-2/"#) && l.contains(r#""class":0,"kind":"polygon""#)
        })
        .count();
    assert!(expected > 0);
    assert_eq!(bench.number(columns).await, expected as i64);
    assert_eq!(
        bench
            .number(
                "SELECT count(*) FROM {}current_annotations WHERE CAST(raw ->> 'n' AS INTEGER) = 2"
            )
            .await,
        {
            set.annotations
                .lines()
                .filter(|l| l.contains(r#""n":2,"#))
                .count() as i64
        }
    );

    let read = bench
        .sink
        .read_at(&landed.place, &"samples.jsonl".parse().unwrap(), 5, 100)
        .await
        .unwrap();
    assert_eq!(&read[..], &set.samples.as_bytes()[5..105]);
    let beyond = bench
        .sink
        .read_at(
            &landed.place,
            &"samples.jsonl".parse().unwrap(),
            set.samples.len() as u64,
            1,
        )
        .await;
    assert!(beyond.is_err());
    let probed = bench.sink.probe().await.unwrap();
    assert!(probed.contains("1 label versions stored"), "{probed}");
    assert!(
        bench
            .sink
            .refuse_path(&"notes.txt".parse().unwrap())
            .is_some()
    );
    assert!(
        bench
            .sink
            .refuse_path(&"classes.jsonl".parse().unwrap())
            .is_none()
    );
}

async fn a_repeated_commit_changes_nothing(bench: Bench) {
    let set = Set::new(1, 9, 3, 0);
    let place = commit(&bench, &set, "v1").await;
    commit(&bench, &Set::new(2, 12, 3, 0), "v2").await;
    // Staged once more, as after a lost journal.
    assert_eq!(commit(&bench, &set, "v1").await, place);
    // No longer staged, as after a crash after the rename.
    let incoming = set.incoming("v1");
    let landed = bench
        .sink
        .commit(&incoming, &bench.sink.staging_root().join("t-v1"))
        .await
        .unwrap();
    assert_eq!(landed.place, place);
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        2
    );
    assert_eq!(
        bench
            .sink
            .active_version("aoi-line3")
            .await
            .unwrap()
            .as_deref(),
        Some("v2")
    );
    assert_eq!(bench.leftovers().await, 0);
}

async fn refuses_different_content_under_the_same_version(bench: Bench) {
    let set = Set::new(1, 9, 3, 0);
    commit(&bench, &set, "v1").await;
    let (incoming, staged) = Set::new(2, 9, 3, 0).stage(&bench.sink, "v1");
    for fault in [
        bench.sink.check(&incoming).await.unwrap_err(),
        bench.sink.commit(&incoming, &staged).await.unwrap_err(),
    ] {
        assert_eq!(
            (fault.code, fault.reason, fault.retry),
            (Code::Conflict, Reason::SinkRefused, Retry::Never),
            "{fault}"
        );
    }
    assert_eq!(bench.current().await, set.count());
    assert!(
        bench
            .sink
            .verify(
                &set.incoming("v1"),
                &StorageLocation::Folder {
                    path: bench.data.path().join("labels/aoi-line3/v1")
                },
                &Verification::default()
            )
            .await
            .unwrap()
            .is_empty()
    );
}

async fn continues_after_a_crash(bench: Bench) {
    let set = Set::new(1, 30, 5, 0);
    bench.sink.check(&set.incoming("v1")).await.unwrap();
    if let Db::Postgres(..) = &bench.db {
        // What a daemon leaves that dies during the copy.
        bench.sql("SET ROLE packhorse; INSERT INTO {}label_set (name) VALUES ('aoi-line3');
            INSERT INTO {}label_version (label_set_id, version, manifest_digest, state) VALUES (1, 'v1', 'x', 'loading'), (1, 'v0', 'y', 'removing');
            INSERT INTO {}version_sample (version_id, sample_no, path) SELECT v, n, 'p' || n FROM generate_series(1, 2) v, generate_series(0, 40) n;
            INSERT INTO {}annotation (version_id, ann_no, sample_no, kind, raw) VALUES (1, 0, 0, 'bbox', '1'), (2, 0, 0, 'bbox', '1')").await;
    }
    commit(&bench, &set, "v1").await;
    assert_eq!(bench.current().await, set.count());
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        1
    );
    assert_eq!(bench.leftovers().await, 0);
}

async fn an_aborted_commit_does_not_block_the_next(bench: Bench) {
    let set = Set::new(1, 2_000, 5, 100);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    for ms in [5, 30, 60, 90, 150, 220] {
        if !staged.exists() {
            break;
        }
        let _ = tokio::time::timeout(
            Duration::from_millis(ms),
            bench.sink.commit(&incoming, &staged),
        )
        .await;
    }
    bench.sink.commit(&incoming, &staged).await.unwrap();
    assert_eq!(bench.current().await, set.count());
    assert_eq!(bench.leftovers().await, 0);
    set.assert_at(&bench.data.path().join("labels/aoi-line3/v1"));
}

async fn a_commit_waits_for_the_rename_of_an_aborted_one(bench: Bench) {
    let set = Set::new(1, 9, 3, 0);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    bench
        .sink
        .engine
        .load(&bench.sink.new_version(&incoming, &staged).unwrap())
        .await
        .unwrap();
    let kept = bench.data.path().join("labels/aoi-line3/v1");
    let (go, told) = std::sync::mpsc::sync_channel::<()>(1);
    let (from, to) = (staged.clone(), kept.clone());
    let rename = bench.sink.change_stored(move || {
        let _ = told.recv();
        durable::create_dir_all(to.parent().unwrap())?;
        durable::rename_noreplace(&from, &to)
    });
    // Started, then dropped.
    assert!(rename.now_or_never().is_none());
    let mut commit = bench.sink.commit(&incoming, &staged);
    // Without the wait, this takes a fraction of the time, and removes and loads the rows while the
    // files are about to disappear.
    assert!(
        tokio::time::timeout(Duration::from_secs(1), &mut commit)
            .await
            .is_err(),
        "the commit did not wait"
    );
    go.send(()).unwrap();
    commit.await.unwrap();
    assert!(!staged.exists());
    assert_eq!(bench.current().await, set.count());
    assert_eq!(bench.leftovers().await, 0);
    set.assert_at(&kept);
}

async fn readers_see_the_old_version_or_the_new(bench: Bench) {
    let sets = [
        Set::new(1, 300, 4, 0),
        Set::new(2, 301, 7, 0),
        Set::new(3, 299, 5, 0),
        Set::new(4, 310, 6, 0),
    ];
    let counts: Vec<i64> = sets.iter().map(Set::count).collect();
    commit(&bench, &sets[0], "v0").await;
    let sql = format!(
        "SELECT count(*), count(DISTINCT version), count(DISTINCT raw ->> 'seed') FROM {}",
        bench.table("current_annotations")
    );
    let reading = {
        let counts = counts.clone();
        let read = move |(rows, versions, seeds): (i64, i64, i64), last: &mut usize| {
            let at = counts.iter().position(|c| *c == rows);
            assert!(at.is_some(), "{rows} rows that belong to no version");
            let at = at.unwrap();
            assert_eq!(
                (versions, seeds),
                (1, 1),
                "rows of two versions at the same time"
            );
            assert!(at >= *last, "an older version became visible again");
            *last = at;
            at + 1 == counts.len()
        };
        match &bench.db {
            Db::Postgres(server, database) => {
                let url = server.admin_url(database);
                tokio::spawn(async move {
                    let mut conn = sqlx::PgConnection::connect(&url).await.unwrap();
                    let (mut last, mut reads) = (0, 0);
                    loop {
                        reads += 1;
                        let row = sqlx::query_as(sqlx::AssertSqlSafe(sql.clone()))
                            .fetch_one(&mut conn)
                            .await
                            .unwrap();
                        if read(row, &mut last) {
                            return reads;
                        }
                    }
                })
            }
            Db::Sqlite(file) => {
                let url = format!("sqlite://{}", file.display());
                tokio::spawn(async move {
                    let mut conn = sqlx::SqliteConnection::connect(&url).await.unwrap();
                    let (mut last, mut reads) = (0, 0);
                    loop {
                        reads += 1;
                        let row = sqlx::query_as(sqlx::AssertSqlSafe(sql.clone()))
                            .fetch_one(&mut conn)
                            .await
                            .unwrap();
                        if read(row, &mut last) {
                            return reads;
                        }
                    }
                })
            }
        }
    };
    for (n, set) in sets.iter().enumerate().skip(1) {
        commit(&bench, set, &format!("v{n}")).await;
    }
    let reads: i32 = tokio::time::timeout(Duration::from_secs(30), reading)
        .await
        .unwrap()
        .unwrap();
    assert!(reads > 3, "only {reads} reads happened during the commits");
}

async fn refuses_bad_rows_and_leaves_nothing(bench: Bench) {
    let good = Set::new(1, 12, 4, 0);
    commit(&bench, &good, "v1").await;
    type Spoil = fn(&mut Set);
    let spoiled: [(&str, Spoil); 17] = [
        ("which is not in classes.jsonl", |s| {
            s.annotations = s.annotations.replacen("\"class\":0,", "\"class\":5,", 1);
        }),
        ("which is not in samples.jsonl", |s| {
            s.annotations = s.annotations.replacen("面板 0000003", "面板 9999999", 1);
        }),
        ("is truncated", |s| {
            s.annotations.truncate(s.annotations.len() - 1);
        }),
        ("is not an annotation", |s| {
            s.annotations.insert_str(0, "{\"sample\":\n");
        }),
        ("is not an annotation", |s| {
            s.annotations = s.annotations.replacen("\"raw\"", "\"row\"", 1);
        }),
        ("is not in canonical form", |s| {
            s.annotations = s.annotations.replacen("\"y\":1e+300", "\"y\":1E300", 1);
        }),
        ("is not in canonical form", |s| {
            s.annotations = s.annotations.replacen(",\"kind\"", ", \"kind\"", 1);
        }),
        ("unknown kind", |s| {
            s.annotations = s
                .annotations
                .replacen("\"kind\":\"bbox\"", "\"kind\":\"cube\"", 1);
        }),
        ("is out of order", |s| {
            s.annotations = s
                .annotations
                .lines()
                .rev()
                .map(|l| format!("{l}\n"))
                .collect();
        }),
        ("lines, but the manifest", |s| {
            s.annotations.push_str(
                &s.annotations
                    .lines()
                    .last()
                    .map(|l| format!("{l}\n"))
                    .unwrap(),
            );
        }),
        ("longer than 12 MiB", |s| {
            s.annotations = s.annotations.replacen(
                "\"pad\":\"",
                &format!("\"pad\":\"{}", "x".repeat(13 << 20)),
                1,
            );
        }),
        ("out of order or repeated", |s| {
            s.samples = s.samples.lines().rev().map(|l| format!("{l}\n")).collect();
        }),
        ("has an invalid path", |s| {
            s.samples = s
                .samples
                .replacen("{\"path\":\"line/", "{\"path\":\"../", 1);
        }),
        ("hash that is not", |s| {
            s.samples = s.samples.replacen("\"hash\":\"", "\"hash\":\"zz", 1);
        }),
        ("NUL in its split", |s| {
            s.samples = s.samples.replacen("\"split\":\"", "\"split\":\"\\u0000", 1);
        }),
        ("name \"scratch\", which another class also has", |s| {
            s.classes = s.classes.replace("划痕", "scratch");
        }),
        ("out of order or repeated", |s| {
            s.classes = s.classes.replacen("\"id\":3,", "\"id\":0,", 1);
        }),
    ];
    for (why, spoil) in spoiled {
        let set = Set::new(2, 12, 4, 0);
        let incoming = set.incoming("v2");
        let mut bad = set.clone();
        spoil(&mut bad);
        let staged = incoming.transfer.in_dir(bench.sink.staging_root());
        bad.write(&staged);
        let fault = bench.sink.commit(&incoming, &staged).await.unwrap_err();
        assert!(fault.message.contains(why), "{why}: {fault}");
        assert_eq!(
            (fault.code, fault.reason, fault.retry),
            (Code::Integrity, Reason::Integrity, Retry::Never),
            "{why}: {fault}"
        );
        assert_eq!(
            bench.number("SELECT count(*) FROM {}label_version").await,
            1,
            "{why}"
        );
        assert_eq!(bench.leftovers().await, 0, "{why}");
    }
    assert_eq!(bench.current().await, good.count());
    assert!(!bench.data.path().join("labels/aoi-line3/v2").exists());
    // The same version with valid content is accepted afterwards.
    let valid = Set::new(2, 12, 4, 0);
    commit(&bench, &valid, "v2").await;
    assert_eq!(bench.current().await, valid.count());
}

async fn activates_and_removes(bench: Bench) {
    let (one, two) = (Set::new(1, 12, 4, 0), Set::new(2, 15, 4, 0));
    commit(&bench, &one, "v1").await;
    commit(&bench, &two, "v2").await;
    let (v1, v2) = (one.incoming("v1").artifact, two.incoming("v2").artifact);
    bench.sink.activate(&v1).await.unwrap();
    assert_eq!(bench.current().await, one.count());
    assert_eq!(
        bench.number("SELECT count(*) FROM {}annotations").await,
        one.count() + two.count()
    );
    assert_eq!(
        bench
            .sink
            .activate(&one.incoming("v9").artifact)
            .await
            .unwrap_err()
            .code,
        Code::NotFound
    );
    bench.sink.activate(&v2).await.unwrap();
    assert_eq!(bench.current().await, two.count());
    // The active version is removed, and the other one becomes active.
    bench.sink.remove(&v2, None).await.unwrap();
    bench.sink.remove(&v2, None).await.unwrap();
    assert!(!bench.data.path().join("labels/aoi-line3/v2").exists());
    assert_eq!(bench.current().await, one.count());
    assert_eq!(bench.leftovers().await, 0);
    bench.sink.remove(&v1, None).await.unwrap();
    assert_eq!(bench.current().await, 0);
    assert!(!bench.data.path().join("labels/aoi-line3").exists());
    assert_eq!(bench.sink.active_version("aoi-line3").await.unwrap(), None);
    // A removed version may be delivered again with different content.
    commit(&bench, &two, "v1").await;
    assert_eq!(bench.current().await, two.count());
}

/// Two versions of one delivery may be loaded in any order.
async fn the_version_that_was_requested_last_is_active(bench: Bench) {
    let sets = [10, 12, 14].map(|samples| Set::new(1, samples, 4, 0));
    let active = async || bench.sink.active_version("aoi-line3").await.unwrap();
    commit(&bench, &sets[1], "v2").await;
    commit(&bench, &sets[0], "v1").await;
    assert_eq!(active().await.as_deref(), Some("v2"), "v1 was overtaken");
    assert_eq!(bench.current().await, sets[1].count());
    commit(&bench, &sets[2], "v3").await;
    assert_eq!(active().await.as_deref(), Some("v3"));
    // Loaded again, the active version and another one.
    bench.sql("DELETE FROM {}annotation WHERE ann_no = 0").await;
    for (set, version) in [(&sets[2], "v3"), (&sets[0], "v1")] {
        let incoming = set.incoming(version);
        assert!(!bench.sink.exists_at_target(&incoming).await.unwrap());
        commit(&bench, set, version).await;
        assert_eq!(active().await.as_deref(), Some("v3"), "{version}");
        assert!(bench.sink.exists_at_target(&incoming).await.unwrap());
    }
    assert_eq!(bench.current().await, sets[2].count());
    // What remains is ordered in the same way.
    for (removed, next) in [("v3", Some("v2")), ("v2", Some("v1")), ("v1", None)] {
        let removed = sets[0].incoming(removed).artifact;
        bench.sink.remove(&removed, None).await.unwrap();
        assert_eq!(active().await.as_deref(), next);
    }
    assert_eq!(bench.leftovers().await, 0);
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_request").await,
        0
    );
}

async fn rows_of_an_earlier_program_are_removed_before_anything_is_delivered(bench: Bench) {
    let set = Set::new(1, 20, 4, 0);
    commit(&bench, &set, "v1").await;
    let migrations = match &bench.db {
        Db::Postgres(..) => "packhorse.schema_migration WHERE version > 5",
        Db::Sqlite(_) => "_sqlx_migrations WHERE version > 2",
    };
    bench
        .sql(&format!(
            "DROP TABLE {{}}label_request; DELETE FROM {migrations}"
        ))
        .await;
    let removed = set.incoming("v1").artifact;
    bench.sink.remove(&removed, None).await.unwrap();
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        0
    );
}

async fn rows_that_were_deleted_are_noticed_without_reading_them(bench: Bench) {
    let set = Set::new(1, 20, 4, 0);
    let incoming = set.incoming("v1");
    let is_there = async || bench.sink.exists_at_target(&incoming).await.unwrap();
    for table in ["annotation", "version_sample", "label_class"] {
        commit(&bench, &set, "v1").await;
        assert!(is_there().await);
        bench.sql(&format!("DELETE FROM {{}}{table}")).await;
        assert!(!is_there().await, "{table}");
    }
    commit(&bench, &set, "v1").await;
    assert!(is_there().await);
    assert_eq!(bench.current().await, set.count());
}

async fn exports_the_original_bytes(bench: Bench) {
    let set = Set::new(1, 500, 5, 10);
    commit(&bench, &set, "v1").await;
    commit(&bench, &Set::new(2, 5, 5, 0), "v2").await;
    let out = bench.data.path().join("out");
    bench
        .sink
        .export_canonical("aoi-line3", "v1", &out)
        .await
        .unwrap();
    set.assert_at(&out);
    let fault = bench
        .sink
        .export_canonical("aoi-line3", "v7", &out)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
    let fault = bench
        .sink
        .export_canonical("other", "v1", &out)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
    bench.sql("DELETE FROM {}annotation WHERE ann_no = 7").await;
    let fault = bench
        .sink
        .export_canonical("aoi-line3", "v1", &out)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::Integrity);
}

async fn exports_an_empty_set(bench: Bench) {
    let set = Set {
        classes: String::new(),
        samples: String::new(),
        annotations: String::new(),
    };
    commit(&bench, &set, "v1").await;
    let out = bench.data.path().join("out");
    bench
        .sink
        .export_canonical("aoi-line3", "v1", &out)
        .await
        .unwrap();
    set.assert_at(&out);
    assert_eq!(bench.current().await, 0);
}

async fn verify_finds_changed_rows(bench: Bench) {
    let set = Set::new(1, 50, 4, 0);
    let place = commit(&bench, &set, "v1").await;
    let incoming = set.incoming("v1");
    assert_eq!(
        bench
            .sink
            .verify(&incoming, &place, &Verification::default())
            .await
            .unwrap(),
        Vec::<String>::new()
    );
    bench
        .sql("UPDATE {}annotation SET w = 13 WHERE ann_no = 17")
        .await;
    let found = bench
        .sink
        .verify(&incoming, &place, &Verification::default())
        .await
        .unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("annotations.jsonl line 18: the database contains")
            && found[0].contains("\"w\":13.0"),
        "{found:?}"
    );
    bench
        .sql(
            "UPDATE {}annotation SET w = 12 WHERE ann_no = 17; DELETE FROM {}annotation WHERE ann_no IN (0, 30);
        UPDATE {}version_sample SET split = 'test' WHERE sample_no = 3; UPDATE {}label_class SET name = 'x' WHERE class_id = 0;
        INSERT INTO {}annotation (version_id, ann_no, sample_no, kind, raw) VALUES (1, 100000, 1, 'bbox', '1')",
        )
        .await;
    let found = bench
        .sink
        .verify(&incoming, &place, &Verification::default())
        .await
        .unwrap();
    let starts: Vec<String> = found
        .iter()
        .map(|l| l.split(" contains {").next().unwrap())
        .map(|l| l.split(" contains …").next().unwrap().to_owned())
        .collect();
    assert_eq!(
        starts,
        [
            "classes.jsonl line 2: the database",
            "samples.jsonl line 4: the database",
            "annotations.jsonl line 1: the row is missing from the database",
            "annotations.jsonl line 31: the row is missing from the database",
            "annotations.jsonl line 100001: the database contains a row that was never published",
        ]
    );
    bench.sql("DELETE FROM {}annotation").await;
    let found = bench
        .sink
        .verify(&incoming, &place, &Verification::default())
        .await
        .unwrap();
    assert_eq!(
        found.len(),
        base::limits::OFFENDERS_LISTED_MAX + 1,
        "{found:?}"
    );
    // Without the stored files, the digest still detects the change.
    durable::remove_all(&bench.data.path().join("labels")).unwrap();
    assert!(
        !bench
            .sink
            .verify(&incoming, &place, &Verification::default())
            .await
            .unwrap()
            .is_empty()
    );
    let found = bench
        .sink
        .verify(&set.incoming("v5"), &place, &Verification::default())
        .await
        .unwrap();
    assert_eq!(found, ["the label database does not contain aoi-line3:v5"]);
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

async fn many_rows_in_bounded_memory(bench: Bench) {
    // 50,000 rows of more than 1 KiB; the memory would grow visibly if all were held at once.
    let set = Set::new(1, 10_000, 6, 1_200);
    let (rows, bytes) = (set.count(), set.annotations.len() as u64);
    assert!(rows >= 50_000);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    drop(set);
    bench.sink.check(&incoming).await.unwrap();
    let before = resident_bytes();
    let peak = Arc::new(AtomicU64::new(0));
    let seen = peak.clone();
    let watch = tokio::spawn(async move {
        loop {
            seen.fetch_max(resident_bytes(), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    bench.sink.commit(&incoming, &staged).await.unwrap();
    bench
        .sink
        .export_canonical("aoi-line3", "v1", &bench.data.path().join("out"))
        .await
        .unwrap();
    watch.abort();
    assert_eq!(bench.current().await, rows);
    let grown = peak.load(Ordering::Relaxed).saturating_sub(before);
    // Other tests run at the same time, so the limit is generous.
    assert!(
        grown < bytes.max(64 << 20),
        "grew by {grown} bytes for {bytes}"
    );
}

async fn two_sets_at_once(bench: Bench) {
    let set = Set::new(1, 300, 4, 0);
    let mut commits = Vec::new();
    for name in ["left", "right", "third"] {
        let sink = bench.sink.clone();
        let mut incoming = set.incoming("v1");
        incoming.artifact = format!("labels/{name}:v1").parse().unwrap();
        let staged = sink.staging_root().join(name);
        set.write(&staged);
        commits.push(tokio::spawn(async move {
            sink.check(&incoming).await?;
            sink.commit(&incoming, &staged).await
        }));
    }
    for commit in commits {
        commit.await.unwrap().unwrap();
    }
    assert_eq!(
        bench
            .number("SELECT count(*) FROM {}current_annotations")
            .await,
        3 * set.count()
    );
}
