//! The tables of PostgreSQL with many versions, and the databases of earlier revisions, which have a
//! pair of partitions for each version.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};

use crate::labels::testing::server::Server;
use crate::labels::testing::set::Set;
use crate::labels::testing::{Bench, Db};
use crate::{Incoming, Sink, StorageLocation, Verification};
use base::fault::{Code, Reason};

const FIRST: &str = include_str!("../../../../../migrations/labels-postgres/0001_labels.sql");
const THIRD: &str =
    include_str!("../../../../../migrations/labels-postgres/0003_views_for_readers.sql");

fn database(bench: &Bench) -> (&'static Server, &str) {
    match &bench.db {
        Db::Postgres(server, database) => (server, database),
        Db::Sqlite(_) => unreachable!(),
    }
}

async fn deliver(bench: &Bench, set: &Set, version: &str) -> Incoming {
    let (incoming, staged) = set.stage(&bench.sink, version);
    bench.sink.check(&incoming).await.unwrap();
    bench.sink.commit(&incoming, &staged).await.unwrap();
    incoming
}

async fn session(bench: &Bench) -> PgConnection {
    let (server, database) = database(bench);
    PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap()
}

async fn verify(bench: &Bench, incoming: &Incoming) -> Vec<String> {
    let place = StorageLocation::Folder {
        path: bench
            .data
            .path()
            .join("labels/aoi-line3")
            .join(incoming.artifact.version()),
    };
    let verification = Verification::default();
    bench
        .sink
        .verify(incoming, &place, &verification)
        .await
        .unwrap()
}

/// Gives the database the tables and views of this earlier revision, with the same rows.
fn go_back_to(bench: &Bench, revision: u32) {
    let (server, name) = database(bench);
    let tables = FIRST.find("CREATE TABLE packhorse.version_sample").unwrap();
    let views = FIRST.find("CREATE VIEW packhorse.annotations").unwrap();
    server.psql(
        name,
        &format!(
            "SET ROLE packhorse;
             DROP VIEW packhorse.annotations, packhorse.current_annotations, packhorse.samples, packhorse.current_samples,
             packhorse.classes, packhorse.current_classes;
             DROP TABLE packhorse.label_request;
             ALTER TABLE packhorse.annotation RENAME TO kept_annotation;
             ALTER TABLE packhorse.version_sample RENAME TO kept_version_sample;
             {}
             DELETE FROM packhorse.schema_migration WHERE version > {revision}",
            &FIRST[tables..views]
        ),
    );
    let versions = server.psql(name, "SELECT id FROM packhorse.label_version ORDER BY id");
    for id in versions.lines() {
        let of = |table: &str| {
            format!(
                "CREATE TABLE packhorse.{table}_v{id} (LIKE packhorse.{table}, CONSTRAINT one_version CHECK (version_id IS NOT NULL AND version_id = {id}));
                 INSERT INTO packhorse.{table}_v{id} SELECT * FROM packhorse.kept_{table} WHERE version_id = {id};
                 ALTER TABLE packhorse.{table} ATTACH PARTITION packhorse.{table}_v{id} FOR VALUES IN ({id});"
            )
        };
        server.psql(
            name,
            &format!(
                "SET ROLE packhorse; {} {}
                 CREATE UNIQUE INDEX ON packhorse.version_sample_v{id} (sample_no);
                 CREATE UNIQUE INDEX ON packhorse.annotation_v{id} (ann_no)",
                of("version_sample"),
                of("annotation")
            ),
        );
    }
    server.psql(
        name,
        "DROP TABLE packhorse.kept_annotation, packhorse.kept_version_sample",
    );
    let rest = if revision == 1 {
        format!(
            "DROP TABLE packhorse.label_switch; SET ROLE packhorse; {}",
            &FIRST[views..]
        )
    } else {
        format!("SET ROLE packhorse; BEGIN; {THIRD}; COMMIT")
    };
    server.psql(name, &rest);
}

/// The tables of the schema that are not those of this revision.
async fn old_tables(bench: &Bench) -> i64 {
    bench
        .number("SELECT count(*) FROM pg_class WHERE relnamespace = 'packhorse'::regnamespace AND relkind IN ('r', 'p')
            AND (relkind = 'p' OR relname ~ '_v[0-9]+$' OR relname ~ '_(of_all|by_version)$')")
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_of_an_earlier_revision_are_moved_and_no_reader_waits() {
    let bench = Bench::postgres().await;
    let (server, name) = database(&bench);
    let set = Set::new(1, 20, 4, 0);
    let mut all = Vec::new();
    for version in 0..12 {
        all.push(deliver(&bench, &set, &format!("v{version}")).await);
    }
    bench.sink.activate(&all[3].artifact).await.unwrap();
    go_back_to(&bench, 3);
    // A load that was interrupted, and a reader who may also read the tables.
    server.psql(
        name,
        "SET ROLE packhorse; INSERT INTO packhorse.label_version (label_set_id, version, manifest_digest, state) VALUES (1, 'half', 'x', 'loading');
         CREATE TABLE packhorse.annotation_v77 (LIKE packhorse.annotation);
         GRANT USAGE ON SCHEMA packhorse TO nobody_much;
         GRANT SELECT ON packhorse.current_annotations, packhorse.annotation TO nobody_much",
    );
    assert!(old_tables(&bench).await >= 25);
    let active = "SELECT count(*) FROM packhorse.current_annotations WHERE version = 'v3'";

    // A reader is idle in a transaction: the delivery waits and names it, and others can read.
    let mut idle = session(&bench).await;
    sqlx::raw_sql(
        "SET application_name = 'notebook'; BEGIN; SELECT count(*) FROM packhorse.annotations",
    )
    .execute(&mut idle)
    .await
    .unwrap();
    let (sink, incoming) = (bench.sink.clone(), all[0].clone());
    let checking = tokio::spawn(async move { sink.check(&incoming).await });
    let mut reader = session(&bench).await;
    while !checking.is_finished() {
        let read = sqlx::query_scalar::<_, i64>(active).fetch_one(&mut reader);
        let read = tokio::time::timeout(Duration::from_secs(30), read).await;
        assert_eq!(read.unwrap().unwrap(), set.count());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let fault = checking.await.unwrap().unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Unreachable, Reason::SinkUnavailable),
        "{fault}"
    );
    assert!(fault.message.contains("(notebook"), "{fault}");

    // What was copied by then stays; what is missing is copied.
    let copied = "SELECT count(DISTINCT version_id) FROM {}annotation_of_all";
    assert_eq!(bench.number(copied).await, 12);
    bench
        .sql("DELETE FROM {}annotation_of_all WHERE version_id = 5; DELETE FROM {}version_sample_of_all WHERE version_id = 5")
        .await;
    sqlx::raw_sql("COMMIT").execute(&mut idle).await.unwrap();
    bench.sink.check(&all[0]).await.unwrap();
    assert_eq!(old_tables(&bench).await, 0);
    assert_eq!(bench.leftovers().await, 0);
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        12
    );
    for incoming in &all {
        assert_eq!(verify(&bench, incoming).await, Vec::<String>::new());
    }
    let active_version = bench.sink.active_version("aoi-line3").await.unwrap();
    assert_eq!(active_version.as_deref(), Some("v3"));
    for table in ["current_annotations", "annotation"] {
        let read = format!("SET ROLE nobody_much; SELECT count(*) > 0 FROM packhorse.{table}");
        assert_eq!(server.psql(name, &read), "t");
    }
    deliver(&bench, &Set::new(2, 25, 4, 0), "v12").await;
    assert_eq!(bench.current().await, Set::new(2, 25, 4, 0).count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_of_the_first_revision_is_migrated() {
    let bench = Bench::postgres().await;
    let set = Set::new(1, 20, 4, 0);
    let incoming = deliver(&bench, &set, "v1").await;
    go_back_to(&bench, 1);
    assert_eq!(bench.current().await, set.count());
    bench.sink.check(&incoming).await.unwrap();
    assert_eq!(bench.number("SELECT count(*) FROM {}label_switch").await, 1);
    assert_eq!(bench.current().await, set.count());
    assert_eq!(old_tables(&bench).await, 0);
    assert_eq!(verify(&bench, &incoming).await, Vec::<String>::new());
}

/// Adds versions with the rows of version 1, each the active one of a set of its own.
async fn add_versions(bench: &Bench, from: u32, to: u32) {
    bench
        .sql(&format!(
            "INSERT INTO {{}}label_set (name) SELECT 'set' || n FROM generate_series({from}, {to}) n;
             INSERT INTO {{}}label_version (label_set_id, version, manifest_digest, state, n_samples, n_annotations)
             SELECT s.id, 'v1', 'x', 'ready', v.n_samples, v.n_annotations FROM {{}}label_set s, {{}}label_version v
             WHERE v.id = 1 AND s.name IN (SELECT 'set' || n FROM generate_series({from}, {to}) n) ORDER BY s.id;
             INSERT INTO {{}}label_switch (label_set_id, version_id, since)
             SELECT label_set_id, id, '-infinity' FROM {{}}label_version v WHERE NOT EXISTS (SELECT FROM {{}}label_switch s WHERE s.version_id = v.id);
             INSERT INTO {{}}label_class SELECT v.id, c.class_id, c.name, c.attrs FROM {{}}label_class c, {{}}label_version v
             WHERE c.version_id = 1 AND NOT EXISTS (SELECT FROM {{}}label_class o WHERE o.version_id = v.id);
             INSERT INTO {{}}version_sample SELECT v.id, sample_no, path, hash, width, height, split, meta
             FROM {{}}version_sample i, {{}}label_version v WHERE i.version_id = 1
             AND NOT EXISTS (SELECT FROM {{}}version_sample o WHERE o.version_id = v.id) ORDER BY 1, 2;
             INSERT INTO {{}}annotation SELECT v.id, ann_no, sample_no, class_id, kind, x, y, w, h, geom, attrs, raw
             FROM {{}}annotation n, {{}}label_version v WHERE n.version_id = 1
             AND NOT EXISTS (SELECT FROM {{}}annotation o WHERE o.version_id = v.id) ORDER BY 1, 2;
             ANALYZE"
        ))
        .await;
}

/// The locks that the session holds, and those of them that are in the shared table.
async fn locks(conn: &mut PgConnection) -> (i64, i64) {
    sqlx::query_as("SELECT count(*), count(*) FILTER (WHERE NOT fastpath) FROM pg_locks WHERE pid = pg_backend_pid()")
        .fetch_one(conn)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_readers_of_three_hundred_versions_hold_few_locks() {
    let bench = Bench::postgres().await;
    let set = Set::new(1, 40, 4, 0);
    deliver(&bench, &set, "v1").await;
    add_versions(&bench, 2, 3).await;
    let query = "SELECT count(*) FROM packhorse.current_annotations WHERE label_set = 'set3'";
    let read = async |conn: &mut PgConnection| -> i64 {
        sqlx::query_scalar(query).fetch_one(conn).await.unwrap()
    };
    let mut first = session(&bench).await;
    sqlx::raw_sql("BEGIN").execute(&mut first).await.unwrap();
    assert_eq!(read(&mut first).await, set.count());
    let of_three = locks(&mut first).await;
    sqlx::raw_sql("COMMIT").execute(&mut first).await.unwrap();

    add_versions(&bench, 4, 300).await;
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        300
    );
    let mut readers = Vec::new();
    for _ in 0..100 {
        let mut reader = session(&bench).await;
        sqlx::raw_sql("BEGIN").execute(&mut reader).await.unwrap();
        assert_eq!(read(&mut reader).await, set.count());
        assert!(locks(&mut reader).await.0 <= of_three.0);
        readers.push(reader);
    }
    assert!(of_three.0 <= 30, "{of_three:?}");
    // A delivery does not wait for them.
    deliver(&bench, &set, "v2").await;
    // The rows of other versions are not read.
    let explain = format!("EXPLAIN (COSTS off) {query}");
    let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(explain))
        .fetch_all(&mut readers[0])
        .await
        .unwrap();
    let scans: BTreeSet<&str> = plan
        .iter()
        .filter(|line| line.contains("Seq Scan"))
        .filter_map(|line| line.split(" on ").nth(1)?.split(' ').next())
        .collect();
    assert!(
        !scans.contains("annotation") && !scans.contains("version_sample"),
        "{}",
        plan.join("\n")
    );
}

/// `cargo test -p sink many_versions_beside_few -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn many_versions_beside_few() {
    let bench = Bench::postgres().await;
    deliver(&bench, &Set::new(1, 1_000, 6, 100), "v1").await;
    add_versions(&bench, 2, 3).await;
    let measure = async |versions: &str| {
        let mut conn = session(&bench).await;
        for filter in [
            "",
            " AND class = '划痕'",
            " AND sample_path = 'line/面板 0000003.png'",
        ] {
            let query = format!(
                "SELECT * FROM packhorse.current_annotations WHERE label_set = 'set3'{filter}"
            );
            let mut times = Vec::new();
            for _ in 0..9 {
                let began = std::time::Instant::now();
                let rows = sqlx::raw_sql(AssertSqlSafe(query.clone()))
                    .fetch_all(&mut conn)
                    .await
                    .unwrap();
                times.push((began.elapsed(), rows.len()));
            }
            times.sort();
            println!(
                "{versions} versions{filter}: {:.2?} for {} rows",
                times[4].0, times[4].1
            );
        }
    };
    measure("3").await;
    add_versions(&bench, 4, 300).await;
    measure("300").await;
}
