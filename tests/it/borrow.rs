//! A complete training run with real servers. Each site has a PostgreSQL and a docker-registry. All
//! five kinds go from site a to site b through the hub, which stores none of their content before.
//! Site b trains a model, and the hub delivers it to site a.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::images;
use crate::support::labels::{Reader, Row};
use crate::support::postgres::{Postgres, ROLE};
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs, wait_for};
use crate::training::{TRAINER, dataset, score};

const KINDS: [&str; 5] = [
    "dataset/panels:v1",
    "labels/panels:v1",
    "operator/judge:v1",
    "image/judge:v1",
    "model/base:v1",
];

/// The metric of the bytes that the hub fetched from sites.
const FETCHED: &str = "packhorse_relay_fetched_bytes";

/// The labels, read from the table that [`mark`] creates.
const MARKS: &str = "db:SELECT image AS sample_path, defect AS class, CASE WHEN shape IS NULL THEN 'bbox' ELSE 'polygon' END AS kind, \
                     x, y, w, h, shape AS geom, json_build_object('inspector', inspector) AS attrs FROM marks";

#[test]
fn all_five_kinds_are_borrowed_through_the_hub_and_removed_after_the_run() {
    let _limit = limit(secs(300));
    let scratch = Scratch::new();
    let scratch_b = Scratch::new();
    let (postgres_a, postgres_b) = (
        Postgres::start_new(&scratch),
        Postgres::start_new(&scratch_b),
    );
    let (registry_a, registry_b) = (
        Registry::basic(&scratch, "ra"),
        Registry::basic(&scratch, "rb"),
    );
    let hub = Hub::start_new(scratch.path());
    let (labels_sink, images_sink) = (
        postgres_a.sink(&scratch, "labels"),
        registry_a.sink(&scratch),
    );
    let a = Site::start_new(
        scratch.path(),
        &hub,
        "a",
        &SiteSpec {
            labels_sink: Some(labels_sink),
            images_sink: Some(images_sink),
            ..SiteSpec::default()
        },
    );
    let (script, folder) = (scratch.join("trainer.py"), scratch.folder("trainer"));
    data::write(&script, TRAINER.as_bytes());
    let words = [
        "/usr/bin/env",
        "python3",
        script.to_str().unwrap(),
        "hold",
        folder.to_str().unwrap(),
    ];
    let more = format!("[train]\ncommand = {words:?}\nallow = [\"a\"]\n");
    let (labels_sink, images_sink) = (
        postgres_b.sink(&scratch_b, "labels"),
        registry_b.sink(&scratch),
    );
    let b = Site::start_new(
        scratch.path(),
        &hub,
        "b",
        &SiteSpec {
            labels_sink: Some(labels_sink),
            images_sink: Some(images_sink),
            more: &more,
            ..SiteSpec::default()
        },
    );

    // Only site a has the content: folders on its NAS, an image in its registry, labels as rows in
    // its database.
    let (images_root, csv) = dataset(&scratch, "panels", 60);
    let expected = mark(&postgres_a, &csv, &images_root);
    let (project, base) = (scratch.join("project"), scratch.join("base"));
    data::operator(&project);
    data::model(&base, 3 << 20);
    let fixture = images::small();
    registry_a.push(
        &format!("oci:{}:v1", fixture.join("layout").display()),
        "operators/judge:v1",
    );
    let reference = format!("registry://{}/operators/judge:v1", registry_a.host());
    a.publish(&images_root, KINDS[0], &[]);
    a.json(&["publish", MARKS, "--as", KINDS[1], "--for", KINDS[0]]);
    a.publish(&project, KINDS[2], &[]);
    a.json(&["publish", &reference, "--as", KINDS[3]]);
    a.publish(&base, KINDS[4], &[]);

    // The hub has none of these rows and fetches them from a. They are delivered to a third site
    // alone, so that the metric shows the fetch.
    let c = Site::start_new(scratch.path(), &hub, "c", &SiteSpec::default());
    let fetched = hub.metric(FETCHED);
    hub.deliver_and_wait(KINDS[1], "c", secs(60));
    check(
        &Reader::Sqlite(&c.labels_db).version("panels", "v1"),
        &expected,
    );
    let fetched = hub.metric(FETCHED) - fetched;
    assert!(fetched > 1000, "{fetched} bytes of the labels came from a");

    // Site b had the project before the run, so it keeps it.
    hub.deliver_and_wait(KINDS[2], "b", secs(60));
    let mut args = vec![
        "train",
        "start",
        "--name",
        "r1",
        "--from",
        "a",
        "--on",
        "b",
        "--expect",
        "model/judge",
        "--input",
    ];
    args.extend(KINDS);
    a.cli(&args).expect(0);
    wait_for("the trainer has started", secs(120), || {
        std::fs::read_to_string(folder.join("pid"))
            .ok()
            .filter(|pid| !pid.is_empty())
    });

    // All five artifacts at b equal those at a.
    for (reference, source) in [
        (KINDS[0], &images_root),
        (KINDS[2], &project),
        (KINDS[4], &base),
    ] {
        assert_same(source, &b.folder(reference));
    }
    let at_b = Reader::Postgres(&postgres_b, "labels");
    check(&at_b.version("panels", "v1"), &expected);
    assert_eq!(
        registry_b.digest("operators/judge:v1"),
        registry_a.digest("operators/judge:v1")
    );
    let descriptor: Value =
        serde_json::from_slice(&std::fs::read(b.data_dir.join("runs/r1/run.json")).unwrap())
            .unwrap();
    let text = descriptor.to_string();
    assert!(
        text.contains(&format!("{}/operators/judge:v1", registry_b.host())),
        "where the image lies: {text}"
    );
    assert!(
        text.contains("postgres://packhorse@") && !text.contains("läb els"),
        "the database, without its password: {text}"
    );
    assert!(text.contains("\"packhorse.annotations\""));
    let delivery = descriptor_delivery(&hub);
    assert!(
        hub.cli(&["status", &delivery])
            .expect(0)
            .out
            .contains("5 of 5 parts")
    );

    data::write(&folder.join("go"), b"");
    let done = wait_for("the run is done", secs(120), || {
        Some(hub.json(&["train", "show", "r1"])).filter(|run| run["state"] == "done")
    });
    let right = score(&a.folder("model/judge:r1"));
    assert!(
        right >= 90,
        "the model at a classifies {right} of 100 correctly"
    );
    let lineage = a.json(&["show", "model/judge:r1"])["lineage"]["inputs"].clone();
    for (i, reference) in KINDS.iter().enumerate() {
        assert_eq!(lineage[i]["artifact"], *reference);
        assert_eq!(
            lineage[i]["digest"],
            a.json(&["show", reference])["digest"],
            "{done:#}"
        );
    }

    wait_for("all borrowed content is removed", secs(60), || {
        (hub.json(&["train", "show", "r1"])["released"] == true).then_some(())
    });
    assert!(!b.folder(KINDS[0]).exists() && !b.folder(KINDS[4]).exists());
    assert_eq!(at_b.version("panels", "v1").len(), 0, "the rows are gone");
    let tags: PathBuf = scratch
        .join("rb/docker/registry/v2/repositories/operators/judge/_manifests/tags/v1/current/link");
    assert!(!tags.exists(), "the image's tag is gone from b's registry");
    assert_same(&project, &b.folder(KINDS[2]));
    assert_eq!(
        registry_a.digest("operators/judge:v1").len(),
        71,
        "a keeps its own"
    );
    assert_eq!(b.leftovers(), Vec::<PathBuf>::new());
}

/// Writes marks into a table of a third party, in a form that packhorse does not know. The boxes
/// differ from each other, some have a shape, and all have an attribute, so that no column can be
/// confused with another. Returns the expected rows, without their records.
fn mark(postgres: &Postgres, csv: &Path, images: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(csv).unwrap();
    let (mut values, mut rows) = (Vec::new(), Vec::new());
    for (i, line) in text.lines().skip(1).enumerate() {
        let mut cells = line.split(',');
        let (path, class) = (cells.next().unwrap(), cells.next().unwrap());
        let bbox = [
            (i % 3) as f64 + 0.5,
            (i % 4) as f64,
            (i % 5 + 1) as f64,
            (i % 6 + 2) as f64,
        ];
        let shape = (i % 3 == 0).then_some("[[0,0,5,0,5,7.5]]");
        let inspector = format!("检验员 {}", i % 7);
        let ([x, y, w, h], quoted) = (
            bbox,
            shape.map_or_else(|| "NULL".to_owned(), |shape| format!("'{shape}'")),
        );
        values.push(format!(
            "('{path}', '{class}', {x}, {y}, {w}, {h}, {quoted}, '{inspector}')"
        ));
        rows.push(Row {
            label_set: "panels".into(),
            version: "v1".into(),
            sample_path: path.into(),
            sample_hash: Some(
                blake3::hash(&std::fs::read(images.join(path)).unwrap())
                    .to_hex()
                    .to_string(),
            ),
            class: class.into(),
            kind: if shape.is_some() { "polygon" } else { "bbox" }.into(),
            bbox,
            geom: shape.map_or(Value::Null, |shape| serde_json::from_str(shape).unwrap()),
            attrs: json!({ "inspector": inspector }),
            raw: Value::Null,
        });
    }
    let columns = "image text, defect text, x float8, y float8, w float8, h float8, shape text, inspector text";
    let values = values.join(", ");
    postgres
        .query("labels", &format!("CREATE TABLE marks ({columns}); INSERT INTO marks VALUES {values}; GRANT SELECT ON marks TO {ROLE}"));
    rows
}

/// Checks every column. The record is the row of the query.
fn check(rows: &[Row], expected: &[Row]) {
    for row in rows {
        assert!(
            row.raw["sample_path"] == *row.sample_path && row.raw["x"] == row.bbox[0],
            "{row:?}"
        );
    }
    let rows: Vec<Row> = rows
        .iter()
        .map(|row| Row {
            raw: Value::Null,
            ..row.clone()
        })
        .collect();
    assert_eq!(rows, expected);
}

fn descriptor_delivery(hub: &Hub) -> String {
    hub.json(&["train", "show", "r1"])["delivery"]
        .as_str()
        .unwrap()
        .to_owned()
}
