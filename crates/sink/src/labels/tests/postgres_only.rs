//! Errors that only a server has, and the effect of the switch on sessions that began before it.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection};

use crate::labels::open;
use crate::labels::postgres::Postgres;
use crate::labels::testing::server::server;
use crate::labels::testing::set::Set;
use crate::labels::testing::{Bench, Db, postgres_config};
use crate::settings;
use crate::{Sink, Threads};
use base::fault::{Code, Fault, Reason, Retry};

fn class(fault: &Fault) -> (Code, Reason, Retry) {
    (fault.code, fault.reason, fault.retry)
}

/// The fault of check, commit and probe, which must be the same.
async fn fault_of(cfg: &settings::LabelsSink, data: &tempfile::TempDir) -> Fault {
    let sink = open(Some(cfg), data.path()).unwrap();
    let (incoming, staged) = Set::new(1, 5, 2, 0).stage(&sink, "v1");
    let checked = sink.check(&incoming).await.unwrap_err();
    let committed = sink.commit(&incoming, &staged).await.unwrap_err();
    let probed = sink.probe().await.unwrap_err();
    assert_eq!(class(&checked), class(&committed));
    assert_eq!(class(&checked), class(&probed));
    for fault in [&checked, &committed, &probed] {
        assert!(
            !format!("{fault:?}").contains("horse battery"),
            "the password is in {fault:?}"
        );
    }
    assert!(staged.exists());
    checked
}

#[tokio::test]
async fn a_server_that_is_down_is_retried() {
    let data = tempfile::tempdir().unwrap();
    let port = base::testing::free_port();
    let cfg = settings::LabelsSink {
        url: format!("postgres://packhorse@127.0.0.1:{port}/labels"),
        password_file: None,
    };
    let fault = fault_of(&cfg, &data).await;
    assert_eq!(
        class(&fault),
        (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff),
        "{fault}"
    );
    assert!(fault.message.contains(&port.to_string()), "{fault}");
}

#[tokio::test]
async fn a_missing_password_file_is_retried() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("password");
    base::durable::replace_secret(&file, b"horse battery\n").unwrap();
    let cfg = settings::LabelsSink {
        url: "postgres://packhorse@127.0.0.1:1/labels".into(),
        password_file: Some(file.clone()),
    };
    let sink = open(Some(&cfg), data.path()).unwrap();
    std::fs::remove_file(&file).unwrap();
    let fault = sink
        .check(&Set::new(1, 5, 2, 0).incoming("v1"))
        .await
        .unwrap_err();
    assert_eq!(
        class(&fault),
        (Code::NotAllowed, Reason::SinkDenied, Retry::Backoff),
        "{fault}"
    );
    assert!(
        fault.next.contains(file.to_str().unwrap()),
        "{}",
        fault.next
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_missing_permissions_are_not_retried() {
    let data = tempfile::tempdir().unwrap();
    let server = base::blocking::spawn(server).await.unwrap();
    let database = "labels_of_others";
    server.psql("postgres", &format!("CREATE DATABASE {database}"));
    let denied = (Code::NotAllowed, Reason::SinkDenied, Retry::Never);

    let mut cfg = postgres_config(server, "packhorse", database, &data);
    base::durable::replace_secret(cfg.password_file.as_deref().unwrap(), b"horse battery\n")
        .unwrap();
    let fault = fault_of(&cfg, &data).await;
    assert_eq!(class(&fault), denied, "{fault}");
    assert!(fault.next.contains("password_file"), "{}", fault.next);

    cfg = postgres_config(server, "nobody_much", database, &data);
    let fault = fault_of(&cfg, &data).await;
    assert_eq!(class(&fault), denied, "{fault}");
    assert!(
        fault
            .next
            .contains("GRANT CREATE ON DATABASE … TO nobody_much"),
        "{}",
        fault.next
    );

    cfg = postgres_config(server, "packhorse", "no_such_db", &data);
    let fault = fault_of(&cfg, &data).await;
    assert_eq!(class(&fault), denied, "{fault}");
    assert!(fault.next.contains("CREATE DATABASE"), "{}", fault.next);

    // A schema that another role created.
    server.psql(database, "CREATE SCHEMA packhorse");
    cfg = postgres_config(server, "packhorse", database, &data);
    let fault = fault_of(&cfg, &data).await;
    assert_eq!(class(&fault), denied, "{fault}");
    assert!(fault.next.contains("ON SCHEMA packhorse"), "{}", fault.next);
    server.psql(
        database,
        "GRANT CREATE, USAGE ON SCHEMA packhorse TO packhorse",
    );
    open(Some(&cfg), data.path())
        .unwrap()
        .check(&Set::new(1, 5, 2, 0).incoming("v1"))
        .await
        .unwrap();
    // Tables that belong to another role.
    server.psql(
        database,
        "GRANT CREATE, USAGE ON SCHEMA packhorse TO nobody_much",
    );
    cfg = postgres_config(server, "nobody_much", database, &data);
    assert_eq!(class(&fault_of(&cfg, &data).await), denied);
}

#[tokio::test]
async fn the_config_is_checked_when_it_is_opened() {
    let data = tempfile::tempdir().unwrap();
    let open_with = |url: &str, password_file: Option<&str>| {
        let cfg = settings::LabelsSink {
            url: url.into(),
            password_file: password_file.map(|f| data.path().join(f)),
        };
        open(Some(&cfg), data.path()).err().unwrap()
    };
    let fault = open_with("postgres://packhorse@db/labels", Some("missing"));
    assert_eq!(fault.code, Code::Config);
    assert!(
        fault
            .message
            .contains(data.path().join("missing").to_str().unwrap()),
        "{fault}"
    );
    for (url, why) in [
        (
            "postgres://packhorse:secret@db/labels",
            "contains a password",
        ),
        (
            "postgres://packhorse@db/labels?password=secret",
            "contains a password",
        ),
        (
            "postgres://packhorse@db:notaport/labels",
            "does not have the form",
        ),
        ("mysql://db/labels", "must begin with"),
        ("sqlite://labels.db", "does not name a file"),
    ] {
        let fault = open_with(url, None);
        assert_eq!(fault.code, Code::Config, "{url}");
        assert!(
            fault.message.contains(why) && !fault.message.contains("secret"),
            "{url}: {fault}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sqlstate_has_its_fault() {
    let server = base::blocking::spawn(server).await.unwrap();
    let engine =
        Postgres::new(&server.admin_url("postgres"), None, Threads::new("test", 8)).unwrap();
    let mut conn = sqlx::PgConnection::connect(&server.admin_url("postgres"))
        .await
        .unwrap();
    let tried_again = (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff);
    let denied = (Code::NotAllowed, Reason::SinkDenied, Retry::Never);
    let wrong = (Code::Integrity, Reason::Integrity, Retry::Never);
    for (state, expected) in [
        ("53100", (Code::NoSpace, Reason::NoSpace, Retry::Backoff)),
        ("53300", tried_again),
        ("40001", tried_again),
        ("40P01", tried_again),
        ("55P03", tried_again),
        ("57P01", tried_again),
        ("25006", tried_again),
        ("28P01", denied),
        ("42501", denied),
        ("3D000", denied),
        ("23505", wrong),
        ("22P05", wrong),
        ("XX000", (Code::Internal, Reason::Internal, Retry::Backoff)),
    ] {
        let sql = format!("DO $$ BEGIN RAISE 'no way' USING ERRCODE = '{state}'; END $$");
        let error = sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut conn)
            .await
            .unwrap_err();
        let fault = engine.fault("try", &error);
        assert_eq!(class(&fault), expected, "{state}: {fault}");
        assert!(fault.message.contains("(try): no way"), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_with_an_old_plan_reads_the_old_version_and_delays_no_commit() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let (one, two) = (Set::new(1, 20, 4, 0), Set::new(2, 25, 4, 0));
    let deliver = async |set: &Set, version: &str| {
        let (incoming, staged) = set.stage(&bench.sink, version);
        bench.sink.check(&incoming).await.unwrap();
        bench.sink.commit(&incoming, &staged).await.unwrap();
        incoming
    };
    let v1 = deliver(&one, "v1").await;

    // A prepared statement with a generic plan, in an open transaction.
    let mut reader = sqlx::PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap();
    let sql = "SELECT count(*) FROM packhorse.current_annotations WHERE label_set = $1";
    for _ in 0..8 {
        let _: i64 = sqlx::query_scalar(sql)
            .bind("aoi-line3")
            .fetch_one(&mut reader)
            .await
            .unwrap();
    }
    sqlx::raw_sql("BEGIN").execute(&mut reader).await.unwrap();
    let read = async |reader: &mut sqlx::PgConnection| -> i64 {
        sqlx::query_scalar(sql)
            .bind("aoi-line3")
            .fetch_one(reader)
            .await
            .unwrap()
    };
    assert_eq!(read(&mut reader).await, one.count());

    // It is idle in its transaction: two versions are delivered, and it continues to read the first.
    deliver(&two, "v2").await;
    assert_eq!(
        (bench.current().await, read(&mut reader).await),
        (two.count(), one.count())
    );
    let v3 = deliver(&one, "v3").await;
    bench.sink.activate(&v1.artifact).await.unwrap();
    bench.sink.activate(&v3.artifact).await.unwrap();
    assert_eq!(
        (bench.current().await, read(&mut reader).await),
        (one.count(), one.count())
    );
    assert_eq!(
        bench
            .sink
            .active_version("aoi-line3")
            .await
            .unwrap()
            .as_deref(),
        Some("v3")
    );

    // A version that is delivered again because changed rows were found replaces rows that somebody
    // reads.
    deliver(&one, "v3").await;
    assert_eq!(bench.current().await, one.count());
    assert_eq!(
        bench
            .number("SELECT count(*) FROM {}label_version WHERE state <> 'ready'")
            .await,
        0
    );
    deliver(&two, "v4").await;
    sqlx::raw_sql("COMMIT").execute(&mut reader).await.unwrap();
    assert_eq!(read(&mut reader).await, two.count());
    deliver(&two, "v5").await;
    assert_eq!(bench.leftovers().await, 0);

    // Removing the active version leaves one active version, and no transaction sees two.
    bench
        .sink
        .remove(&"labels/aoi-line3:v5".parse().unwrap(), None)
        .await
        .unwrap();
    bench
        .sink
        .remove(&"labels/aoi-line3:v2".parse().unwrap(), None)
        .await
        .unwrap();
    assert_eq!(bench.current().await, two.count());
    let overlaps = "SELECT count(*) FROM packhorse.label_switch a JOIN packhorse.label_switch b
        ON a.label_set_id = b.label_set_id AND a.ctid <> b.ctid AND a.since < b.until AND b.since < a.until";
    assert_eq!(bench.number(overlaps).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_of_the_role_do_not_end_a_load() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    for limit in [
        "statement_timeout = '5ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "default_transaction_read_only = on",
        "synchronous_commit = off",
    ] {
        server.psql(
            "postgres",
            &format!("ALTER ROLE packhorse IN DATABASE {database} SET {limit}"),
        );
    }
    let set = Set::new(1, 2_000, 6, 200);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    bench.sink.commit(&incoming, &staged).await.unwrap();
    assert_eq!(bench.current().await, set.count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holder_of_a_lock_is_reported_while_the_delivery_waits() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let set = Set::new(1, 20, 4, 0);
    let (first, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&first).await.unwrap();
    bench.sink.commit(&first, &staged).await.unwrap();
    let mut holder = sqlx::PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap();
    let lock =
        "SET application_name = 'night job'; BEGIN; LOCK TABLE packhorse.annotation IN SHARE MODE";
    sqlx::raw_sql(lock).execute(&mut holder).await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut holder)
        .await
        .unwrap();

    let (incoming, staged) = set.stage(&bench.sink, "v2");
    let (sink, mut waits) = (bench.sink.clone(), incoming.waits.subscribe());
    let commit = tokio::spawn(async move { sink.commit(&incoming, &staged).await });
    let report = tokio::time::timeout(Duration::from_secs(20), waits.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(
        class(&report),
        (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff)
    );
    assert!(
        report
            .message
            .contains(&format!("server process {pid} (night job")),
        "{report}"
    );
    assert!(
        report
            .next
            .contains(&format!("pg_terminate_backend({pid})")),
        "{}",
        report.next
    );
    sqlx::raw_sql("COMMIT").execute(&mut holder).await.unwrap();
    commit.await.unwrap().unwrap();
    assert_eq!(
        bench
            .number("SELECT count(*) FROM {}label_version WHERE state = 'ready'")
            .await,
        2
    );
}

/// Also the table of the migrations, which each check reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holder_of_all_tables_is_reported_while_a_check_waits() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let set = Set::new(1, 20, 4, 0);
    bench.sink.check(&set.incoming("v1")).await.unwrap();
    let mut holder = sqlx::PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap();
    let lock = "SET application_name = 'night job'; BEGIN; LOCK TABLE packhorse.schema_migration,
        packhorse.label_set, packhorse.label_version, packhorse.label_active, packhorse.label_switch,
        packhorse.label_request, packhorse.label_class, packhorse.version_sample, packhorse.annotation";
    sqlx::raw_sql(lock).execute(&mut holder).await.unwrap();
    let incoming = set.incoming("v1");
    let (sink, mut waits) = (bench.sink.clone(), incoming.waits.subscribe());
    let check = tokio::spawn(async move { sink.check(&incoming).await });
    let report = tokio::time::timeout(Duration::from_secs(20), waits.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap()
        .clone()
        .unwrap();
    assert!(report.message.contains("(night job"), "{report}");
    // The fault of the check says the same.
    let fault = check.await.unwrap().unwrap_err();
    assert_eq!(
        class(&fault),
        (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff)
    );
    assert!(fault.message.contains("(night job"), "{fault}");
    sqlx::raw_sql("COMMIT").execute(&mut holder).await.unwrap();
    bench.sink.check(&set.incoming("v1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_does_not_wait_for_readers_and_takes_nothing_from_them() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let set = Set::new(1, 20, 4, 0);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    bench.sink.commit(&incoming, &staged).await.unwrap();
    let mut reader = sqlx::PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap();
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
        .execute(&mut reader)
        .await
        .unwrap();
    let all = "SELECT count(*) FROM packhorse.annotations";
    let read = async |reader: &mut sqlx::PgConnection| -> i64 {
        sqlx::query_scalar(all).fetch_one(reader).await.unwrap()
    };
    assert_eq!(read(&mut reader).await, set.count());
    bench
        .sink
        .remove(&incoming.artifact, Some(&incoming.root.info))
        .await
        .unwrap();
    assert_eq!(bench.current().await, 0);
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        0
    );
    assert_eq!(bench.leftovers().await, 0);
    assert_eq!(read(&mut reader).await, set.count());
    sqlx::raw_sql("COMMIT").execute(&mut reader).await.unwrap();
    assert_eq!(read(&mut reader).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_the_server_ends_is_retried() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let set = Set::new(1, 5_000, 6, 200);
    let (incoming, staged) = set.stage(&bench.sink, "v1");
    bench.sink.check(&incoming).await.unwrap();
    let (sink, again) = (bench.sink.clone(), (incoming.clone(), staged.clone()));
    let commit = tokio::spawn(async move { sink.commit(&incoming, &staged).await });
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE 'COPY packhorse.annotation%' AND state = 'active'";
    while server.psql(database, end) == "0" {
        assert!(
            !commit.is_finished(),
            "the copy was too fast to be interrupted"
        );
    }
    let fault = commit.await.unwrap().unwrap_err();
    assert_eq!(
        class(&fault),
        (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff),
        "{fault}"
    );
    bench.sink.commit(&again.0, &again.1).await.unwrap();
    assert_eq!(bench.current().await, set.count());
    assert_eq!(bench.leftovers().await, 0);
}

/// `cargo test -p sink --release --lib -- --ignored --nocapture copy_beside_psql`; `ROWS` sets the number of
/// annotations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures the ratio to psql (W12) in BENCHMARKS.md"]
async fn copy_beside_psql() {
    let bench = Bench::postgres().await;
    let Db::Postgres(server, database) = &bench.db else {
        unreachable!()
    };
    let rows: usize = std::env::var("ROWS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(200_000);
    let set = Set::new(1, rows / 9, 10, 100);
    for round in 0..3 {
        let (incoming, staged) = set.stage(&bench.sink, &format!("v{round}"));
        bench.sink.check(&incoming).await.unwrap();
        let began = std::time::Instant::now();
        bench.sink.commit(&incoming, &staged).await.unwrap();
        let ours = began.elapsed();

        let id = bench
            .number(&format!(
                "SELECT id FROM {{}}label_version WHERE version = 'v{round}'"
            ))
            .await;
        let file = bench.data.path().join("rows.tsv");
        server.psql(
            database,
            &format!(
                "\\copy (SELECT * FROM packhorse.annotation WHERE version_id = {id}) to '{}'",
                file.display()
            ),
        );
        server.psql(
            database,
            "DROP TABLE IF EXISTS peer; CREATE TABLE peer (LIKE packhorse.annotation)",
        );
        let began = std::time::Instant::now();
        server.psql(database, &format!("\\copy peer from '{}'", file.display()));
        let copied = began.elapsed();
        let indexes = "CREATE UNIQUE INDEX ON peer (ann_no); CREATE INDEX ON peer (sample_no); CREATE INDEX ON peer (class_id)";
        server.psql(database, indexes);
        let theirs = began.elapsed();
        println!(
            "{} rows: packhorse {ours:.2?} (samples, classes, ANALYZE and the switch included), psql \\copy {copied:.2?}, with indexes {theirs:.2?}: ratio {:.2}",
            set.count(),
            ours.as_secs_f64() / theirs.as_secs_f64()
        );
    }
    let sqlite = Bench::sqlite().await;
    let (incoming, staged) = set.stage(&sqlite.sink, "v1");
    sqlite.sink.check(&incoming).await.unwrap();
    let began = std::time::Instant::now();
    sqlite.sink.commit(&incoming, &staged).await.unwrap();
    println!("sqlite {:.2?}", began.elapsed());
    let mut conn = sqlx::PgConnection::connect(&server.admin_url(database))
        .await
        .unwrap();
    let explain = "EXPLAIN (ANALYZE, COSTS off) SELECT * FROM packhorse.current_annotations WHERE label_set = 'aoi-line3' AND class = '划痕'";
    let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(explain))
        .fetch_all(&mut conn)
        .await
        .unwrap();
    println!("{}", plan.join("\n"));
}
