//! A whole borrowing with real servers: PostgreSQL and docker-registry at both sites, all five kinds from A to B by the hub, a
//! model made of them at B, and home again.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::images;
use crate::support::labels::{Reader, Row};
use crate::support::postgres::Postgres;
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, limit, secs, wait_for};
use crate::training::{TRAINER, dataset, score};

const KINDS: [&str; 5] = ["dataset/panels:v1", "labels/panels:v1", "operator/judge:v1", "image/judge:v1", "model/base:v1"];

#[test]
fn all_five_kinds_are_borrowed_by_way_of_the_hub_and_given_back() {
    let _limit = limit(secs(300));
    let scratch = Scratch::new();
    let postgres = Postgres::start_new(&scratch);
    postgres.create_database("labels_b");
    let (registry_a, registry_b) = (Registry::basic(&scratch, "ra"), Registry::basic(&scratch, "rb"));
    let hub = Hub::start_new(scratch.path());
    let spec = |database: &str, registry: &Registry| (postgres.sink(&scratch, database), registry.sink(&scratch));
    let (labels_sink, images_sink) = spec("labels", &registry_a);
    let a = Site::start_new(
        scratch.path(),
        &hub,
        "a",
        &SiteSpec { labels_sink: Some(labels_sink), images_sink: Some(images_sink), ..SiteSpec::default() },
    );
    let (script, folder) = (scratch.join("trainer.py"), scratch.folder("trainer"));
    data::write(&script, TRAINER.as_bytes());
    let words = ["/usr/bin/env", "python3", script.to_str().unwrap(), "hold", folder.to_str().unwrap()];
    let more = format!("[train]\ncommand = {words:?}\n");
    let (labels_sink, images_sink) = spec("labels_b", &registry_b);
    let b = Site::start_new(
        scratch.path(),
        &hub,
        "b",
        &SiteSpec { labels_sink: Some(labels_sink), images_sink: Some(images_sink), more: &more, ..SiteSpec::default() },
    );

    // Everything lies at a: folders on its NAS, an image in its registry, labels as rows in its database.
    let (images_root, csv) = dataset(&scratch, "panels", 60);
    tell_apart(&csv);
    let (project, base) = (scratch.join("project"), scratch.join("base"));
    data::operator(&project);
    data::model(&base, 3 << 20);
    let fixture = images::small();
    registry_a.push(&format!("oci:{}:v1", fixture.join("layout").display()), "operators/judge:v1");
    let reference = format!("registry://{}/operators/judge:v1", registry_a.host());
    let password = scratch.join("ra-password");
    a.publish(&images_root, KINDS[0], &[]);
    hub.publish(&csv, "labels/marks:v1", &["--for", KINDS[0]]);
    hub.deliver_and_wait("labels/marks:v1", "a", secs(60));
    a.json(&["publish", "db:marks:v1", "--as", KINDS[1]]);
    a.publish(&project, KINDS[2], &[]);
    let user = crate::support::registry::USER;
    a.json(&["publish", &reference, "--as", KINDS[3], "--username", user, "--password-file", password.to_str().unwrap()]);
    a.publish(&base, KINDS[4], &[]);

    // b has the project already: that stays.
    hub.deliver_and_wait(KINDS[2], "b", secs(60));
    let mut args = vec!["train", "start", "--name", "r1", "--from", "a", "--on", "b", "--expect", "model/judge", "--input"];
    args.extend(KINDS);
    a.cli(&args).expect(0);
    wait_for("the trainer has begun", secs(120), || std::fs::read_to_string(folder.join("pid")).ok().filter(|pid| !pid.is_empty()));

    // All five lie at b as they lay at a.
    for (reference, source) in [(KINDS[0], &images_root), (KINDS[2], &project), (KINDS[4], &base)] {
        assert_same(source, &b.folder(reference));
    }
    let at_b = Reader::Postgres(&postgres, "labels_b");
    let rows = at_b.version("panels", "v1");
    assert_eq!(rows.len(), 60);
    let rows_at_a = Reader::Postgres(&postgres, "labels").version("marks", "v1");
    let under_its_name_at_b: Vec<Row> = rows_at_a.into_iter().map(|row| Row { label_set: "panels".into(), ..row }).collect();
    assert_eq!(rows, under_its_name_at_b, "every column");
    assert!(rows.iter().any(|row| row.kind == "polygon" && row.geom.is_array() && row.attrs.is_object()), "{:?}", rows[0]);
    for row in &rows {
        let bytes = std::fs::read(images_root.join(&row.sample_path)).unwrap();
        assert_eq!(row.sample_hash.as_deref(), Some(blake3::hash(&bytes).to_hex().as_str()), "{row:?}");
    }
    assert_eq!(registry_b.digest("operators/judge:v1"), registry_a.digest("operators/judge:v1"));
    let descriptor: Value = serde_json::from_slice(&std::fs::read(b.data_dir.join("runs/r1/run.json")).unwrap()).unwrap();
    let text = descriptor.to_string();
    assert!(text.contains(&format!("{}/operators/judge:v1", registry_b.host())), "where the image lies: {text}");
    assert!(text.contains("postgres://packhorse@") && !text.contains("läb els"), "the database, without its password: {text}");
    assert!(text.contains("\"packhorse.annotations\""));
    let delivery = descriptor_delivery(&hub);
    assert!(hub.cli(&["status", &delivery]).expect(0).out.contains("5 of 5 parts"));

    data::write(&folder.join("go"), b"");
    let done = wait_for("the run is done", secs(120), || Some(hub.json(&["train", "show", "r1"])).filter(|run| run["state"] == "done"));
    let right = score(&a.folder("model/judge:r1"));
    assert!(right >= 90, "the model at a tells {right} of 100 right");
    let lineage = a.json(&["show", "model/judge:r1"])["lineage"]["inputs"].clone();
    for (i, reference) in KINDS.iter().enumerate() {
        assert_eq!(lineage[i]["artifact"], *reference);
        assert_eq!(lineage[i]["digest"], a.json(&["show", reference])["digest"], "{done:#}");
    }

    wait_for("all is given back", secs(60), || (hub.json(&["train", "show", "r1"])["released"] == true).then_some(()));
    assert!(!b.folder(KINDS[0]).exists() && !b.folder(KINDS[4]).exists());
    assert_eq!(at_b.version("panels", "v1").len(), 0, "the rows are gone");
    let tags: PathBuf = scratch.join("rb/docker/registry/v2/repositories/operators/judge/_manifests/tags/v1/current/link");
    assert!(!tags.exists(), "the image's tag is gone from b's registry");
    assert_same(&project, &b.folder(KINDS[2]));
    assert_eq!(registry_a.digest("operators/judge:v1").len(), 71, "a keeps its own");
    assert_eq!(b.leftovers(), Vec::<PathBuf>::new());
}

/// Gives the rows of a CSV boxes of their own, some a shape and all an attribute, so that no column can pass for another.
fn tell_apart(csv: &Path) {
    let text = std::fs::read_to_string(csv).unwrap();
    let mut out = String::from("sample_path,class,x,y,w,h,kind,geom,inspector\n");
    for (i, line) in text.lines().skip(1).enumerate() {
        let mut cells = line.split(',');
        let (path, class) = (cells.next().unwrap(), cells.next().unwrap());
        let shape = if i % 3 == 0 { "polygon,\"[[0,0,5,0,5,7.5]]\"" } else { "," };
        out += &format!("{path},{class},{}.5,{},{},{},{shape},检验员 {}\n", i % 3, i % 4, i % 5 + 1, i % 6 + 2, i % 7);
    }
    data::write(csv, out.as_bytes());
}

fn descriptor_delivery(hub: &Hub) -> String {
    hub.json(&["train", "show", "r1"])["delivery"].as_str().unwrap().to_owned()
}
