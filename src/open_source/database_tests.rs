//! Labels that are published out of the database, from the source's text to the canonical files.

use std::path::Path;
use std::sync::Arc;

use crate::api::types::SourceOptions;
use crate::open_source::{self, Access, AtSite};
use base::fault::{Code, Fault};
use base::names::Kind;
use content::chunk::DEFAULT_CHUNKING;
use content::ingest::{self, Progress};
use content::label_rows::{ANNOTATIONS, CLASSES, SAMPLES};
use content::manifest::FORMAT_MAX;
use content::manifest::{DatasetBinding, Digest, KindInfo, LabelsInfo};
use content::store::Store;
use sink::Sink as _;
use sink::labels::testing::set::Set;
use sink::labels::testing::{Bench, Db};
use state::Catalogue;

sink::on_both!(
    an_exported_version_equals_the_imported_one,
    a_version_keeps_its_dataset,
    rows_of_a_query_do_not_depend_on_their_order,
    a_query_that_returns_all_rows_can_be_loaded_again,
    queries_that_are_refused,
    a_query_keeps_classes_sizes_and_splits,
    a_query_only_reads,
    a_change_during_the_query_is_not_visible,
);

struct Out {
    dir: tempfile::TempDir,
    info: LabelsInfo,
    digest: Digest,
}

impl Out {
    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap()
    }
}

async fn publish_with(bench: &Bench, source: &str, options: SourceOptions) -> Result<Out, Fault> {
    let site = AtSite {
        labels: bench.sink.clone(),
        catalogue: Catalogue::open(bench.data.path()).await?,
        registry: None,
    };
    let (source, runtime) = (source.to_owned(), tokio::runtime::Handle::current());
    let work = move || {
        let dir = tempfile::tempdir().unwrap();
        let access = Access::of_user(Path::new("/nowhere"), FORMAT_MAX).with_site(site);
        let mut opened = open_source::open(
            Kind::Labels,
            &source,
            &options,
            None,
            &access,
            &scratch(dir.path()),
            &runtime,
        )?;
        let store = Store::open(&dir.path().join("store"))?;
        let ingested = ingest::ingest(
            opened.as_mut(),
            Kind::Labels,
            &store,
            &store,
            &Progress::default(),
        )?;
        let KindInfo::Labels(info) = opened.info() else {
            unreachable!("labels say that they are something else")
        };
        Ok(Out {
            dir,
            info,
            digest: ingested.digest,
        })
    };
    base::blocking::spawn(work).await.unwrap()
}

async fn publish(bench: &Bench, source: &str) -> Result<Out, Fault> {
    publish_with(bench, source, SourceOptions::default()).await
}

async fn commit(bench: &Bench, set: &Set, version: &str) {
    let (incoming, staged) = set.stage(&bench.sink, version);
    bench.sink.check(&incoming).await.unwrap();
    bench.sink.commit(&incoming, &staged).await.unwrap();
}

async fn an_exported_version_equals_the_imported_one(bench: Bench) {
    let set = Set::new(1, 300, 4, 10);
    commit(&bench, &set, "v1").await;
    let out = publish(&bench, "db:aoi-line3:v1").await.unwrap();
    set.assert_at(out.dir.path());
    assert_eq!(
        (
            out.info.format.as_str(),
            out.info.annotations as i64,
            out.info.samples
        ),
        ("database", set.count(), 300)
    );
    assert_eq!(
        publish(&bench, "db:aoi-line3:v1").await.unwrap().digest,
        out.digest
    );
    // Without a version it is the active one.
    let newer = Set::new(2, 30, 4, 0);
    commit(&bench, &newer, "v2").await;
    newer.assert_at(publish(&bench, "db:aoi-line3").await.unwrap().dir.path());
    assert_eq!(
        publish(&bench, "db:aoi-line3:v1").await.unwrap().digest,
        out.digest
    );
    for source in ["db:aoi-line3:v9", "db:nothing"] {
        assert_eq!(
            publish(&bench, source).await.err().unwrap().code,
            Code::NotFound,
            "{source}"
        );
    }
}

async fn a_version_keeps_its_dataset(bench: Bench) {
    let set = Set::new(1, 9, 2, 0);
    let (mut incoming, _) = set.stage(&bench.sink, "v1");
    let binding = DatasetBinding {
        artifact: "dataset/panels:v7".parse().unwrap(),
        digest: incoming.digest,
    };
    if let KindInfo::Labels(info) = &mut incoming.root.info {
        info.dataset = Some(binding.clone());
    }
    incoming.root.chunking = DEFAULT_CHUNKING;
    let catalogue = Catalogue::open(bench.data.path()).await.unwrap();
    catalogue
        .add_artifact(&incoming.artifact, &incoming.root, None)
        .await
        .unwrap();
    incoming.digest = incoming.root.digest();
    bench.sink.check(&incoming).await.unwrap();
    bench
        .sink
        .commit(&incoming, &bench.sink.staging_root().join("t-v1"))
        .await
        .unwrap();
    assert_eq!(
        publish(&bench, "db:aoi-line3:v1")
            .await
            .unwrap()
            .info
            .dataset,
        Some(binding)
    );
    let options = SourceOptions {
        for_dataset: None,
        allow_missing: true,
        ..SourceOptions::default()
    };
    assert_eq!(
        publish_with(&bench, "db:aoi-line3:v1", options)
            .await
            .err()
            .unwrap()
            .code,
        Code::Usage
    );
}

/// A table of somebody's own, in plain columns.
async fn own_table(bench: &Bench) {
    bench.sql("CREATE TABLE mine (n INTEGER, img TEXT, defect TEXT, x DOUBLE PRECISION, y INTEGER, w NUMERIC, h REAL, note TEXT)").await;
    let mut rows = Vec::new();
    for n in 0..200 {
        let defect = ["'scratch'", "'划痕'", "NULL"][n % 3];
        rows.push(format!(
            "({n}, 'line/{:03}.png', {defect}, {}.25, {n}, 7.5, 0.5, '{{ \"who\": {n} }}')",
            n % 40,
            n
        ));
    }
    bench
        .sql(&format!("INSERT INTO mine VALUES {}", rows.join(",")))
        .await;
    if let Db::Postgres(..) = &bench.db {
        bench.sql("GRANT SELECT ON mine TO packhorse").await;
    }
}

async fn rows_of_a_query_do_not_depend_on_their_order(bench: Bench) {
    // Makes the database; nothing of labels is in it.
    bench
        .sink
        .check(&Set::new(1, 1, 1, 0).incoming("v1"))
        .await
        .unwrap();
    own_table(&bench).await;
    let query = "db:SELECT img AS sample_path, defect AS class, x, y, w, h, note AS attrs FROM mine WHERE n < 150 ORDER BY";
    let first = publish(&bench, &format!("{query} n")).await.unwrap();
    let other = publish(&bench, &format!("{query} h, -n; ")).await.unwrap();
    assert_eq!(first.digest, other.digest);
    assert_eq!(
        (
            first.info.samples,
            first.info.annotations,
            first.info.classes
        ),
        (40, 150, 2)
    );
    assert_eq!(
        first.text(CLASSES),
        "{\"id\":0,\"name\":\"scratch\",\"attrs\":null}\n{\"id\":1,\"name\":\"划痕\",\"attrs\":null}\n"
    );
    let lines = first.text(ANNOTATIONS);
    let one = lines
        .lines()
        .find(|line| line.contains("\"x\":41.25"))
        .unwrap();
    let expected = r#"{"sample":"line/001.png","class":null,"kind":"bbox","x":41.25,"y":41.0,"w":7.5,"h":0.5,"geom":null,"attrs":{"who":41},"raw":{"#;
    assert!(one.starts_with(expected), "{one}");
    assert!(
        one.contains(r#""sample_path":"line/001.png""#) && one.contains(r#""x":41.25"#),
        "{one}"
    );
    let fewer = publish(&bench, "db:SELECT img AS sample_path, defect AS class, x, y, w, h, note AS attrs FROM mine WHERE n < 149").await;
    assert_ne!(fewer.unwrap().digest, first.digest);
    // Samples alone.
    let bare = publish(&bench, "db:SELECT DISTINCT img AS sample_path FROM mine")
        .await
        .unwrap();
    assert_eq!((bare.info.samples, bare.info.annotations), (40, 0));
}

async fn a_query_that_returns_all_rows_can_be_loaded_again(bench: Bench) {
    if let Db::Sqlite(_) = &bench.db {
        assert_eq!(
            publish(&bench, "db:SELECT 'a' AS sample_path")
                .await
                .err()
                .unwrap()
                .code,
            Code::NotFound,
            "before there is a database"
        );
    }
    bench
        .sink
        .check(&Set::new(1, 1, 1, 0).incoming("v1"))
        .await
        .unwrap();
    own_table(&bench).await;
    let own = publish(
        &bench,
        "db:SELECT img AS sample_path, defect AS class, x, y, w, h, note AS attrs FROM mine",
    )
    .await
    .unwrap();
    let set = Set {
        classes: own.text(CLASSES),
        samples: own.text(SAMPLES),
        annotations: own.text(ANNOTATIONS),
    };
    commit(&bench, &set, "v1").await;
    let view = bench.table("annotations");
    let again = publish(
        &bench,
        &format!("db:select * from {view} where label_set = 'aoi-line3' -- all of it"),
    )
    .await
    .unwrap();
    assert_eq!(again.digest, own.digest, "the rows are the same");
    for name in [CLASSES, SAMPLES, ANNOTATIONS] {
        assert_eq!(again.text(name), own.text(name));
    }
    // And the version's own export is that too.
    assert_eq!(
        publish(&bench, "db:aoi-line3:v1").await.unwrap().digest,
        own.digest
    );
    commit(&bench, &set, "v2").await;
    let fault = publish(&bench, &format!("db:SELECT * FROM {view}"))
        .await
        .err()
        .unwrap();
    assert_eq!(fault.code, Code::Usage);
    assert!(fault.message.contains("mixes the rows"), "{fault}");
}

async fn a_query_keeps_classes_sizes_and_splits(bench: Bench) {
    let classes = "{\"id\":3,\"name\":\"划痕\",\"attrs\":{\"supercategory\":\"表面\"}}\n{\"id\":7,\"name\":\"凹坑\",\"attrs\":null}\n\
                   {\"id\":9,\"name\":\"未用\",\"attrs\":null}\n";
    let row = |sample: &str, class: u8| {
        format!(
            "{{\"sample\":\"{sample}\",\"class\":{class},\"kind\":\"bbox\",\"x\":1.0,\"y\":2.0,\"w\":3.0,\"h\":4.0,\"geom\":null,\"attrs\":null,\"raw\":{{\"id\":{class}}}}}\n"
        )
    };
    let sample = |path: &str, split: &str| {
        format!(
            "{{\"path\":\"{path}\",\"hash\":null,\"width\":640,\"height\":480,\"split\":\"{split}\",\"meta\":null}}\n"
        )
    };
    let set = Set {
        classes: classes.to_owned(),
        samples: [sample("a.png", "train"), sample("b.png", "val")].concat(),
        annotations: [row("a.png", 3), row("b.png", 7)].concat(),
    };
    commit(&bench, &set, "v1").await;
    let view = bench.table("annotations");
    let out = publish(
        &bench,
        &format!("db:SELECT * FROM {view} WHERE version = 'v1'"),
    )
    .await
    .unwrap();
    set.assert_at(out.dir.path());
    // Also where only some rows, and no numbers, are taken.
    let query = format!(
        "db:SELECT label_set, version, sample_path, class, x, y, w, h FROM {view} WHERE class = '凹坑'"
    );
    let out = publish(&bench, &query).await.unwrap();
    assert_eq!(out.text(CLASSES), classes);
    assert!(out.text(ANNOTATIONS).contains("\"class\":7"));
    // A class that the query names itself is its own.
    let query = format!(
        "db:SELECT label_set, version, sample_path, 'x' AS class, 3 AS class_id FROM {view} WHERE version = 'v1'"
    );
    let out = publish(&bench, &query).await.unwrap();
    assert!(out.text(CLASSES).starts_with("{\"id\":3,\"name\":\"x\""));
}

async fn queries_that_are_refused(bench: Bench) {
    commit(&bench, &Set::new(1, 9, 2, 0), "v1").await;
    own_table(&bench).await;
    for (query, code, why) in [
        ("SELECT nonsense FROM mine", Code::Usage, "nonsense"),
        ("SELECT FROM WHERE", Code::Usage, "the query"),
        ("SELECT img, x, y FROM mine", Code::Usage, "\"img\""),
        ("SELECT x FROM mine", Code::Usage, "sample_path"),
        (
            "SELECT '../up' AS sample_path",
            Code::Integrity,
            "not allowed",
        ),
        (
            "SELECT 'a' AS sample_path, 1 AS x, 2 AS y, 0 AS w, 4 AS h",
            Code::Integrity,
            "zero or negative box",
        ),
        (
            "SELECT 'a' AS sample_path, 1 AS x",
            Code::Integrity,
            "only some",
        ),
        (
            "SELECT 'a' AS sample_path, 'wide' AS x, 2 AS y, 3 AS w, 4 AS h",
            Code::Integrity,
            "not a number",
        ),
        (
            "SELECT 'a' AS sample_path, '{nonsense' AS attrs, 'b' AS class",
            Code::Integrity,
            "malformed",
        ),
        (
            "SELECT 'a' AS sample_path, 'zz' AS sample_hash",
            Code::Integrity,
            "sample_hash",
        ),
        (
            "SELECT 'a' AS sample_path, 5 AS width UNION SELECT 'a', 6",
            Code::Integrity,
            "contradict",
        ),
        (
            "SELECT 'a' AS sample_path; SELECT 'b' AS sample_path",
            Code::Usage,
            "the query",
        ),
    ] {
        let fault = publish(&bench, &format!("db:{query}"))
            .await
            .err()
            .unwrap_or_else(|| unreachable!("{query} was taken"));
        assert_eq!(fault.code, code, "{query}: {fault}");
        assert!(
            format!("{fault} {}", fault.next).contains(why),
            "{query}: {fault}; {}",
            fault.next
        );
    }
    let columns = [("x".to_owned(), "left".to_owned())].into();
    let options = SourceOptions {
        columns,
        ..SourceOptions::default()
    };
    assert_eq!(
        publish_with(&bench, "db:SELECT 'a' AS sample_path", options)
            .await
            .err()
            .unwrap()
            .code,
        Code::Usage
    );
    let options = SourceOptions {
        columns: [("path_prefix".to_owned(), "images".to_owned())].into(),
        ..SourceOptions::default()
    };
    let moved = publish_with(&bench, "db:SELECT 'a' AS sample_path", options)
        .await
        .unwrap();
    assert!(
        moved.text(SAMPLES).starts_with("{\"path\":\"images/a\""),
        "{}",
        moved.text(SAMPLES)
    );
}

async fn a_query_only_reads(bench: Bench) {
    let set = Set::new(1, 9, 2, 0);
    commit(&bench, &set, "v1").await;
    let version = bench.table("label_version");
    for query in [
        format!(
            "WITH gone AS (DELETE FROM {version} RETURNING version) SELECT version AS sample_path FROM gone"
        ),
        format!("SELECT 'a' AS sample_path) AS q; DELETE FROM {version}; SELECT 1 FROM (SELECT 1"),
        format!("SELECT 'a' AS sample_path; DELETE FROM {version}"),
    ] {
        let fault = publish(&bench, &format!("db:{query}"))
            .await
            .err()
            .unwrap_or_else(|| unreachable!("{query} was taken"));
        assert_eq!(fault.code, Code::Usage, "{query}: {fault}");
    }
    assert_eq!(
        bench.number("SELECT count(*) FROM {}label_version").await,
        1
    );
    set.assert_at(publish(&bench, "db:aoi-line3:v1").await.unwrap().dir.path());
}

/// What is written while a query runs is not in it: it sees one snapshot.
async fn a_change_during_the_query_is_not_visible(bench: Bench) {
    bench
        .sink
        .check(&Set::new(1, 1, 1, 0).incoming("v1"))
        .await
        .unwrap();
    own_table(&bench).await;
    let (send, mut rows) = tokio::sync::mpsc::channel(1);
    let sink = bench.sink.clone();
    // 40,000 rows, so that most of them are read after the change.
    let query = "SELECT a.img AS sample_path, a.x, b.n AS y FROM mine a, mine b";
    let query = tokio::spawn(async move { sink.query(query, send).await });
    let mut found = rows.recv().await.unwrap().len();
    bench
        .sql("DELETE FROM mine WHERE n % 2 = 0; INSERT INTO mine (n, img) VALUES (1000, 'new.png')")
        .await;
    while let Some(batch) = rows.recv().await {
        found += batch.len();
    }
    query.await.unwrap().unwrap();
    assert_eq!(found, 200 * 200);
    assert_eq!(bench.number("SELECT count(*) FROM mine").await, 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_rows_are_the_same_in_both_engines() {
    let (sqlite, postgres) = (Bench::sqlite().await, Bench::postgres().await);
    let mut digests = Vec::new();
    for bench in [&sqlite, &postgres] {
        bench
            .sink
            .check(&Set::new(1, 1, 1, 0).incoming("v1"))
            .await
            .unwrap();
        own_table(bench).await;
        let query = "db:SELECT img AS sample_path, defect AS class, x, y, w, h, note AS attrs, '{\"n\":1}' AS raw FROM mine";
        digests.push(publish(bench, query).await.unwrap().digest);
    }
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn a_hub_has_no_label_database() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let open = |kind, source: &str| {
        open_source::open(
            kind,
            source,
            &SourceOptions::default(),
            None,
            &Access::of_user(Path::new("/nowhere"), FORMAT_MAX),
            &scratch(Path::new("/nowhere")),
            runtime.handle(),
        )
        .err()
        .unwrap()
    };
    assert_eq!(open(Kind::Labels, "db:a:v1").code, Code::Usage);
    assert_eq!(open(Kind::Model, "db:a:v1").code, Code::Usage);
    assert_eq!(open(Kind::Labels, "a/relative/path").code, Code::Usage);
}

fn scratch(folder: &Path) -> open_source::Scratch {
    open_source::Scratch {
        folder: folder.into(),
        progress: Arc::default(),
    }
}
