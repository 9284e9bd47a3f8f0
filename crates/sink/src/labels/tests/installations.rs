//! What real installations have: connection pools, databases that are not UTF8, TLS, many versions,
//! readers without write access; and the views that readers use.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::labels::open;
use crate::labels::testing::server::server;
use crate::labels::testing::set::Set;
use crate::labels::testing::{Bench, Db, postgres_config};
use crate::settings;
use crate::{Sink, StorageLocation};
use base::fault::{Code, Fault, Reason};
use content::label_rows::ClassRow;

crate::on_both!(views_show_samples_and_classes);

async fn commit(bench: &Bench, set: &Set, version: &str) -> StorageLocation {
    let (incoming, staged) = set.stage(&bench.sink, version);
    bench.sink.check(&incoming).await.unwrap();
    bench.sink.commit(&incoming, &staged).await.unwrap().place
}

async fn views_show_samples_and_classes(bench: Bench) {
    let mut set = Set::new(1, 30, 4, 0);
    let root = r#"{"b":1,"a":[1.00,2e3]}"#;
    set.classes = set.classes.replace(root, r#"{"supercategory":"表面"}"#);
    commit(&bench, &set, "v1").await;
    let count = async |sql: &str| bench.number(sql).await;
    let samples = set.samples.lines().count() as i64;
    for view in ["samples", "current_samples"] {
        let of = format!("FROM {{}}{view} WHERE label_set = 'aoi-line3' AND version = 'v1'");
        assert_eq!(count(&format!("SELECT count(*) {of}")).await, samples);
        assert_eq!(
            count(&format!(
                "SELECT count(*) {of} AND width = 640 AND height = 480 AND split = 'train'"
            ))
            .await,
            set.samples
                .lines()
                .filter(|line| line.contains("640") && line.contains("train"))
                .count() as i64
        );
    }
    // Every tenth sample has no annotation.
    let without = "SELECT count(*) FROM {}samples i WHERE NOT EXISTS
        (SELECT 1 FROM {}annotations n WHERE n.sample_path = i.sample_path AND n.version = i.version)";
    assert_eq!(count(without).await, 3);
    for view in ["classes", "current_classes"] {
        assert_eq!(count(&format!("SELECT count(*) FROM {{}}{view}")).await, 4);
    }
    // No annotation has this class.
    let unused =
        "SELECT class_id FROM {}current_classes WHERE class LIKE 'a %' AND supercategory = '表面'";
    assert_eq!(count(unused).await, 3);
    for view in ["annotations", "current_annotations"] {
        let rows = set.count();
        let sql = format!("SELECT count(DISTINCT annotation_no) FROM {{}}{view}");
        assert_eq!(count(&sql).await, rows);
        let sql = format!(
            "SELECT count(*) FROM {{}}{view} WHERE class_id = 7000000000 AND class = 'dead pixel'"
        );
        assert!(count(&sql).await > 0);
        let sql = format!("SELECT count(*) FROM {{}}{view} WHERE width = 640");
        assert!(count(&sql).await > 0);
    }
    let classes = bench.sink.classes("aoi-line3", "v1").await.unwrap();
    let ids: Vec<i64> = classes.iter().map(|class: &ClassRow| class.id).collect();
    assert_eq!(ids, [-1, 0, 3, 7_000_000_000]);
    assert!(
        bench
            .sink
            .classes("aoi-line3", "v2")
            .await
            .unwrap()
            .is_empty()
    );
    if let Db::Postgres(..) = bench.db {
        // A text that jsonb cannot hold does not spoil the query.
        let sql = "SELECT count(*) FROM {}annotations WHERE attrs_jsonb IS NOT NULL AND attrs_jsonb ->> 'who' = 'x'";
        assert_eq!(count(sql).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_the_previous_revision_may_read_the_new_views() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    commit(&bench, &Set::new(1, 10, 2, 0), "v1").await;
    // The state that the previous version left, with a reader of its views.
    server.psql(
        database,
        "DROP VIEW packhorse.samples, packhorse.current_samples, packhorse.classes, packhorse.current_classes,
         packhorse.annotations, packhorse.current_annotations;
         DELETE FROM packhorse.schema_migration WHERE version = 3;
         CREATE VIEW packhorse.annotations AS SELECT s.name AS label_set, v.version, i.path AS sample_path, i.hash AS sample_hash,
         c.name AS class, n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw FROM packhorse.annotation n
         JOIN packhorse.label_version v ON v.id = n.version_id AND v.state = 'ready'
         JOIN packhorse.label_set s ON s.id = v.label_set_id
         JOIN packhorse.version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
         LEFT JOIN packhorse.label_class c ON c.version_id = n.version_id AND c.class_id = n.class_id;
         CREATE VIEW packhorse.current_annotations AS SELECT * FROM packhorse.annotations;
         ALTER VIEW packhorse.annotations OWNER TO packhorse; ALTER VIEW packhorse.current_annotations OWNER TO packhorse;
         GRANT USAGE ON SCHEMA packhorse TO nobody_much; GRANT SELECT ON packhorse.annotations TO nobody_much",
    );
    let (incoming, _) = Set::new(1, 10, 2, 0).stage(&bench.sink, "v2");
    bench.sink.check(&incoming).await.unwrap();
    let may = |view: &str| {
        let sql =
            format!("SELECT has_table_privilege('nobody_much', 'packhorse.{view}', 'SELECT')");
        server.psql(database, &sql)
    };
    assert_eq!(
        ["annotations", "samples", "classes", "current_samples"].map(may),
        ["t", "t", "t", "f"]
    );
    assert_eq!(bench.number("SELECT count(*) FROM {}samples").await, 10);
}

/// The fault of a probe, which the check before a delivery must have too.
async fn fault_of(cfg: &settings::LabelsSink, data: &tempfile::TempDir) -> Fault {
    let sink = open(Some(cfg), data.path()).unwrap();
    let (incoming, _) = Set::new(1, 5, 2, 0).stage(&sink, "v1");
    let checked = sink.check(&incoming).await.unwrap_err();
    let probed = sink.probe().await.unwrap_err();
    assert_eq!((checked.code, checked.reason), (probed.code, probed.reason));
    probed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_in_transaction_mode_is_refused_and_one_in_session_mode_works() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    for (mode, pools) in [("transaction", [1, 20]), ("session", [10, 20])] {
        for size in pools {
            let pool = server.pool(database, mode, size);
            let cfg = settings::LabelsSink {
                url: pool.url(database),
                password_file: None,
            };
            if mode == "transaction" {
                let fault = fault_of(&cfg, &bench.data).await;
                assert_eq!(
                    (fault.code, fault.reason),
                    (Code::Config, Reason::SinkUnavailable)
                );
                assert!(
                    fault
                        .message
                        .contains("a connection pool in transaction mode"),
                    "{fault}"
                );
                assert!(fault.next.contains("pool_mode = session"), "{}", fault.next);
                continue;
            }
            let sink = open(Some(&cfg), bench.data.path()).unwrap();
            sink.probe().await.unwrap();
            let version = format!("v{size}");
            let (incoming, staged) = Set::new(1, 20, 3, 0).stage(&sink, &version);
            sink.check(&incoming).await.unwrap();
            sink.commit(&incoming, &staged).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_utf8_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let server = base::blocking::spawn(server).await.unwrap();
    for encoding in ["LATIN1", "EUC_CN", "SQL_ASCII"] {
        let database = format!("not_{}", encoding.to_lowercase());
        server.psql(
            "postgres",
            &format!(
                "CREATE DATABASE {database} OWNER packhorse ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
            ),
        );
        let fault = fault_of(
            &postgres_config(server, "packhorse", &database, &data),
            &data,
        )
        .await;
        assert_eq!(
            (fault.code, fault.reason),
            (Code::NotAllowed, Reason::SinkDenied)
        );
        assert!(
            fault.message.contains(&format!("the encoding {encoding}")),
            "{fault}"
        );
        assert!(
            fault.next.contains("ENCODING 'UTF8' TEMPLATE template0"),
            "{}",
            fault.next
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_tls_are_named() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let with = |options: &str| {
        let cfg = postgres_config(server, "packhorse", database, &bench.data);
        settings::LabelsSink {
            url: format!("{}?{options}", cfg.url),
            ..cfg
        }
    };
    let fault = fault_of(&with("sslmode=require"), &bench.data).await;
    assert_tls(&fault, "the server has no TLS");
    let dir = bench.data.path();
    let missing = dir.join("missing.pem");
    server.use_tls(dir, "localhost");
    for (options, said) in [
        ("sslmode=verify-ca".to_owned(), "not signed by a known CA"),
        (
            format!("sslmode=verify-ca&sslrootcert={}", missing.display()),
            "sslrootcert",
        ),
        // The name of the certificate is localhost, the host of the URL is 127.0.0.1.
        (
            format!(
                "sslmode=verify-full&sslrootcert={}",
                dir.join("ca.pem").display()
            ),
            "for another name",
        ),
    ] {
        assert_tls(&fault_of(&with(&options), &bench.data).await, said);
    }
    let good = with(&format!(
        "sslmode=verify-ca&sslrootcert={}",
        dir.join("ca.pem").display()
    ));
    open(Some(&good), dir).unwrap().probe().await.unwrap();
    server.demand_tls();
    let fault = fault_of(&with("sslmode=disable"), &bench.data).await;
    assert_tls(&fault, "the server demands TLS");
}

#[track_caller]
fn assert_tls(fault: &Fault, next: &str) {
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Unreachable, Reason::SinkUnavailable),
        "{fault}"
    );
    assert!(
        fault.message.contains("the TLS connection failed"),
        "{fault}"
    );
    assert!(fault.next.contains(next), "{fault}: {}", fault.next);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_for_one_image_uses_the_index_of_paths() {
    let bench = Bench::sqlite().await;
    for version in ["v1", "v2"] {
        commit(&bench, &Set::new(1, 600, 5, 0), version).await;
    }
    let Db::Sqlite(file) = &bench.db else {
        unreachable!()
    };
    let plan = sqlite(
        file,
        None,
        "EXPLAIN QUERY PLAN SELECT * FROM current_annotations WHERE label_set = 'aoi-line3' AND sample_path = 'line/面板 0000003.png'",
    );
    let (paths, annotations) = (
        plan.find("version_sample_by_path"),
        plan.find("annotation_by_sample"),
    );
    assert!(paths.is_some() && paths < annotations, "{plan}");
}

/// The rows of a query as Python reads them; as this user, who may not write there.
fn sqlite(file: &std::path::Path, user: Option<u32>, sql: &str) -> String {
    let script = "import sqlite3, sys\nfor row in sqlite3.connect('file:' + sys.argv[1] + '?mode=ro', uri=True).execute(sys.argv[2]): print(row)";
    let mut command = Command::new("setpriv");
    if let Some(user) = user.filter(|_| rustix::process::geteuid().is_root()) {
        command.args([
            format!("--reuid={user}"),
            format!("--regid={user}"),
            "--clear-groups".into(),
        ]);
    }
    let output = command
        // A python of the user who runs the tests may be closed to others.
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .args(["python3", "-c", script])
        .arg(file)
        .arg(sql)
        .current_dir("/")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_for_a_set_reads_only_its_active_version() {
    let bench = Bench::sqlite().await;
    for version in ["v1", "v2"] {
        commit(&bench, &Set::new(1, 200, 2, 0), version).await;
    }
    // Many sets with one version each, and the statistics of a delivery.
    bench
        .sql(
            "WITH RECURSIVE n (i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < 1600)
             INSERT INTO label_set (id, name) SELECT i, 'other-' || i FROM n;
             INSERT INTO label_version (id, label_set_id, version, manifest_digest) SELECT id, id, 'v1', '' FROM label_set WHERE id >= 1000;
             INSERT INTO label_active (label_set_id, version_id) SELECT id, id FROM label_set WHERE id >= 1000;
             PRAGMA analysis_limit = 2000; ANALYZE",
        )
        .await;
    let Db::Sqlite(file) = &bench.db else {
        unreachable!()
    };
    for view in ["current_annotations", "current_samples", "current_classes"] {
        let plan = sqlite(
            file,
            None,
            &format!(
                "EXPLAIN QUERY PLAN SELECT count(*) FROM {view} WHERE label_set = 'other-1200'"
            ),
        );
        assert!(!plan.contains("SCAN"), "{view}: {plan}");
        let active = plan
            .find("SEARCH a ")
            .expect("the active version is looked up");
        let rows = plan.find("SEARCH v ").expect("its version too");
        assert!(active < rows, "{view} begins with all versions: {plan}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_user_reads_the_file_between_deliveries() {
    let bench = Bench::sqlite().await;
    let Db::Sqlite(file) = &bench.db else {
        unreachable!()
    };
    let folder = file.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    for (version, rows) in [("v1", 20), ("v2", 30)] {
        let set = Set::new(1, rows, 2, 0);
        commit(&bench, &set, version).await;
        bench.sink.probe().await.unwrap();
        for name in ["labels.db-wal", "labels.db-shm"] {
            assert!(folder.join(name).exists(), "{name} was removed");
        }
        let count = "SELECT count(*) FROM current_annotations";
        assert_eq!(
            sqlite(file, Some(65_534), count),
            format!("({},)\n", set.count())
        );
    }
    // Neither the end of the daemon nor its next start takes the file away from the reader.
    let count = "SELECT count(*) FROM current_annotations";
    let before = sqlite(file, Some(65_534), count);
    bench.sink.leave().await;
    assert!(!folder.join("labels.db-wal").exists());
    assert_eq!(sqlite(file, Some(65_534), count), before);
    bench.sink.tend().await.unwrap();
    assert!(folder.join("labels.db-wal").exists());
    assert_eq!(sqlite(file, Some(65_534), count), before);
    // A file that is moved away takes its connection with it.
    let away = folder.join("away.db");
    base::durable::rename_noreplace(file, &away).unwrap();
    let set = Set::new(2, 10, 2, 0);
    commit(&bench, &set, "v3").await;
    assert_eq!(bench.current().await, set.count());
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        1
    );
    assert_eq!(
        sqlite(&away, None, "SELECT count(*) FROM label_version"),
        "(2,)\n"
    );
}
