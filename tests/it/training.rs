//! Cross-site training: a site uses another site's trainer, the model is delivered to the first
//! site, and the borrowed inputs are removed.
//!
//! The trainer is a Python script that trains a real model: it learns by logistic regression which
//! of two textures an image shows, from the delivered pixels and rows. The test evaluates the model
//! on images that were not used for training.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rand::Rng;
use serde_json::Value;

use crate::support::daemon::{Hub, PACKHORSE, Site, SiteSpec, Transfer};
use crate::support::data::{self, write};
use crate::support::http;
use crate::support::images;
use crate::support::postgres::sqlite_rows;
use crate::support::registry::Registry;
use crate::support::tree::assert_same;
use crate::support::{Scratch, free_port, limit, secs, wait_for};

const SIDE: usize = 12;
const CLASSES: [&str; 2] = ["clean", "scratched"];

/// The trainer. It reads its rows from SQLite if the site uses SQLite, otherwise from the JSON
/// Lines files, because Python's standard library has no PostgreSQL client.
pub(crate) const TRAINER: &str = r#"
import json, math, os, sqlite3, subprocess, sys, time
mode, folder, path = sys.argv[1], sys.argv[2], sys.argv[-1]
assert os.environ["PACKHORSE_RUN"] == path
run = json.load(open(path))
inputs = {i["kind"]: i for i in run["inputs"]}
open(os.path.join(folder, "pid"), "w").write(str(os.getpid()))
print("training", run["run"], "with", [i["artifact"] for i in run["inputs"]], flush=True)
while mode == "hold" and not os.path.exists(os.path.join(folder, "go")):
    time.sleep(0.05)
if mode == "fail":
    print("x" * 20000)
    print("CUDA error: 显存不足", file=sys.stderr)
    sys.exit(3)
labels = inputs["labels"]
if labels["database"].startswith("sqlite:"):
    db = sqlite3.connect("file:" + labels["database"].removeprefix("sqlite://") + "?mode=ro", uri=True)
    rows = db.execute(f"SELECT sample_path, class FROM {labels['table']} WHERE label_set = ? AND version = ?", (labels["label_set"], labels["version"])).fetchall()
else:
    lines = lambda name: [json.loads(line) for line in open(os.path.join(labels["rows"], name))]
    names = {c["id"]: c["name"] for c in lines("classes.jsonl")}
    rows = [(a["sample"], names[a["class"]]) for a in lines("annotations.jsonl")]
def pixels(file):
    data = open(file, "rb").read()
    header, body = data.split(b"\n255\n", 1)
    assert header.startswith(b"P5")
    return [b / 255 - 0.5 for b in body]
classes = ["clean", "scratched"]
samples = [(pixels(os.path.join(inputs["dataset"]["path"], p)), classes.index(c)) for p, c in sorted(rows)]
weights, bias = [0.0] * len(samples[0][0]), 0.0
for epoch in range(60):
    for x, y in samples:
        z = bias + sum(w * v for w, v in zip(weights, x))
        step = 0.1 * (y - 1 / (1 + math.exp(-max(-50, min(50, z)))))
        bias += step
        weights = [w + step * v for w, v in zip(weights, x)]
out = run["output"]
if mode == "self":
    out = os.path.join(folder, "made")
    os.mkdir(out)
json.dump({"bias": bias, "weights": weights, "samples": len(samples)}, open(os.path.join(out, "model.json"), "w"))
if mode == "self":
    # The environment names the daemon of the training site. The token is valid only for this run.
    token = open(os.environ["PACKHORSE_TOKEN_FILE"]).read()
    assert token.startswith("run." + run["run"] + ".") and "PACKHORSE_CONFIG" not in os.environ
    assert "SOME_API_KEY" not in os.environ, "a secret of the daemon's environment"
    assert subprocess.run([sys.argv[3], "status"]).returncode == 4
    assert subprocess.run([sys.argv[3], "publish", out, "--as", "dataset/stolen:1"]).returncode == 4
    subprocess.run([sys.argv[3], "publish", out, "--as", run["model"], "--run", run["run"]], check=True)
"#;

/// An image of one of two textures, as PGM.
fn picture(rng: &mut impl Rng, class: usize) -> Vec<u8> {
    let mut out = format!("P5\n{SIDE} {SIDE}\n255\n").into_bytes();
    for y in 0..SIDE {
        for x in 0..SIDE {
            let line = class == 1 && x.abs_diff(y) <= 1;
            let level: i32 = if line { 170 } else { 110 };
            out.push((level + rng.random_range(-60..60)) as u8);
        }
    }
    out
}

/// A dataset and its labels as CSV.
pub(crate) fn dataset(scratch: &Scratch, name: &str, count: usize) -> (PathBuf, PathBuf) {
    let (root, csv) = (scratch.join(name), scratch.join(&format!("{name}.csv")));
    let mut rng = data::rng(name);
    let mut text = String::from("sample_path,class,x,y,w,h\n");
    for i in 0..count {
        let path = format!("相机/图 {i:03}.pgm");
        write(&root.join(&path), &picture(&mut rng, i % 2));
        text += &format!("{path},{},0,0,{SIDE},{SIDE}\n", CLASSES[i % 2]);
    }
    write(&csv, text.as_bytes());
    (root, csv)
}

/// The number of correct results of a model for a hundred images that were not used for training.
pub(crate) fn score(model: &Path) -> usize {
    let text = std::fs::read(model.join("model.json")).unwrap();
    let model: Value = serde_json::from_slice(&text).unwrap();
    let weights: Vec<f64> = model["weights"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w.as_f64().unwrap())
        .collect();
    assert_eq!(weights.len(), SIDE * SIDE);
    let mut rng = data::rng("never seen");
    let right = |class: usize, image: &[u8]| {
        let pixels = &image[image.len() - SIDE * SIDE..];
        let z = model["bias"].as_f64().unwrap()
            + pixels
                .iter()
                .zip(&weights)
                .map(|(p, w)| (f64::from(*p) / 255.0 - 0.5) * w)
                .sum::<f64>();
        (z > 0.0) == (class == 1)
    };
    (0..100)
        .filter(|i| right(i % 2, &picture(&mut rng, i % 2)))
        .count()
}

struct World {
    a: Site,
    b: Site,
    hub: Hub,
    folder: PathBuf,
    scratch: Scratch,
}

impl World {
    /// Starts a hub with two sites; b trains with the script in this mode.
    fn start(mode: &str) -> Self {
        Self::with(|scratch, folder| Self::command(scratch, folder, mode))
    }

    fn command(scratch: &Scratch, folder: &Path, mode: &str) -> String {
        let script = scratch.join("trainer.py");
        write(&script, TRAINER.as_bytes());
        let words = [
            "/usr/bin/env",
            "python3",
            script.to_str().unwrap(),
            mode,
            folder.to_str().unwrap(),
            PACKHORSE,
        ];
        format!("[train]\ncommand = {words:?}\nallow = [\"a\"]\n")
    }

    /// Starts a hub with two sites; b has this `[train]`.
    fn with(train: impl Fn(&Scratch, &Path) -> String) -> Self {
        let scratch = Scratch::new();
        let folder = scratch.folder("trainer");
        let hub = Hub::start_new(scratch.path());
        let a = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
        let more = train(&scratch, &folder);
        // A trainer that publishes its model itself does so from this folder.
        let more = format!(
            "[publish]\nroots = [{:?}]\n{more}",
            folder.to_str().unwrap()
        );
        let b = Site::start_new(
            scratch.path(),
            &hub,
            "b",
            &SiteSpec {
                more: &more,
                ..SiteSpec::default()
            },
        );
        Self {
            a,
            b,
            hub,
            folder,
            scratch,
        }
    }

    /// Publishes a dataset and its labels at the hub.
    fn publish_at_hub(&self) {
        let (root, csv) = dataset(&self.scratch, "panels", 60);
        self.hub.publish(&root, "dataset/panels:v1", &[]);
        self.hub
            .publish(&csv, "labels/panels:v1", &["--for", "dataset/panels:v1"]);
    }

    fn begin(&self, more: &[&str]) -> Value {
        self.begin_as("r1", more)
    }

    fn begin_as(&self, name: &str, more: &[&str]) -> Value {
        let args = [
            "train",
            "start",
            "--name",
            name,
            "--from",
            "a",
            "--on",
            "b",
            "--input",
            "labels/panels:v1",
            "dataset/panels:v1",
        ];
        let args: Vec<&str> = args
            .into_iter()
            .chain(["--expect", "model/judge"])
            .chain(more.iter().copied())
            .collect();
        self.hub.json(&args)
    }

    fn run(&self) -> Value {
        self.hub.json(&["train", "show", "r1"])
    }

    #[track_caller]
    fn wait_run(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait_run_of("r1", what, wanted)
    }

    #[track_caller]
    fn wait_run_of(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let show = || self.hub.json(&["train", "show", name]);
        wait_for(&format!("run {name} is {what}"), secs(90), || {
            Some(show()).filter(|run| wanted(run))
        })
    }

    /// Waits until the trainer has started. Returns its process id.
    #[track_caller]
    fn trainer(&self) -> String {
        wait_for("the trainer has started", secs(60), || {
            std::fs::read_to_string(self.folder.join("pid"))
                .ok()
                .filter(|pid| !pid.is_empty())
        })
    }

    /// Checks that b has removed all borrowed inputs.
    #[track_caller]
    fn assert_given_back(&self) {
        self.wait_run("released", |run| run["released"] == true);
        for reference in ["dataset/panels:v1", "labels/panels:v1"] {
            assert!(
                !self.b.folder(reference).exists(),
                "{reference} was not removed from b"
            );
            assert!(
                !self.b.artifacts().contains(&reference.to_owned()),
                "{reference} is still listed at b"
            );
        }
        let rows = sqlite_rows(
            &self.b.labels_db,
            "SELECT count(*) AS n FROM annotations WHERE label_set = 'panels'",
        );
        assert_eq!(rows[0]["n"], 0, "rows at b");
        for t in self.hub.json(&["status"]).as_array().unwrap() {
            let borrowed = t["site"] == "b"
                && t["state"] == "done"
                && t["artifact"].as_str().unwrap().ends_with("/panels:v1");
            assert_eq!(!t["removed_at"].is_null(), borrowed, "{t:#}");
        }
    }
}

fn is(state: &'static str) -> impl Fn(&Value) -> bool {
    move |run| run["state"] == state
}

/// Whether the run has its model. Panics if the run ended without one.
fn has_its_model(run: &Value) -> bool {
    assert_ne!(run["state"], "failed", "{run:#}");
    matches!(run["state"].as_str(), Some("returning" | "done"))
}

/// Whether the run's message contains these words.
fn says(words: &'static str) -> impl Fn(&Value) -> bool {
    move |run| {
        run["message"]
            .as_str()
            .is_some_and(|message| message.contains(words))
    }
}

#[test]
fn a_model_that_the_trainer_published_is_delivered_and_borrowed_inputs_are_removed() {
    let _limit = limit(secs(180));
    let world = World::start("self");
    world.publish_at_hub();
    // b has one input of the run already.
    let base = world.scratch.join("base");
    write(
        &base.join("base.bin"),
        &data::noise(&mut data::rng("base"), 100_000),
    );
    world.hub.publish(&base, "model/base:v1", &[]);
    world.hub.deliver_and_wait("model/base:v1", "b", secs(60));

    // b also has an older version of a borrowed input.
    let (older, _) = dataset(&world.scratch, "older", 20);
    world.hub.publish(&older, "dataset/panels:v0", &[]);
    world
        .hub
        .deliver_and_wait("dataset/panels:v0", "b", secs(60));

    let begun = world.begin(&["--input", "model/base:v1", "--ttl", "1h"]);
    assert_eq!(begun["name"], "r1");
    let again = world.begin(&["--input", "model/base:v1", "--ttl", "1h"]);
    assert_eq!(
        again["delivery"], begun["delivery"],
        "a repeated request starts no second run"
    );
    world
        .hub
        .cli(&[
            "train",
            "start",
            "--name",
            "r1",
            "--from",
            "a",
            "--on",
            "b",
            "--input",
            "model/base:v1",
            "--expect",
            "model/x",
        ])
        .expect(6);

    let done = world.wait_run("done", is("done"));
    assert_eq!(done["model"]["artifact"], "model/judge:r1", "{done:#}");
    let right = score(&world.a.folder("model/judge:r1"));
    assert!(
        right >= 90,
        "the model at a classifies {right} of 100 correctly"
    );
    assert_eq!(
        world.hub.json(&["show", "model/judge:r1"])["origin"],
        "b",
        "the model was published at the training site"
    );

    // Both the hub and a know the lineage of the model.
    for daemon in [&*world.hub, &*world.a] {
        let shown = daemon.json(&["show", "model/judge:r1"]);
        assert_eq!(shown["digest"], done["model"]["digest"]);
        let lineage = &shown["lineage"];
        assert_eq!(
            (&lineage["run"], &lineage["from"], &lineage["on"]),
            (&"r1".into(), &"a".into(), &"b".into()),
            "{shown:#}"
        );
        let inputs = lineage["inputs"].as_array().unwrap();
        assert_eq!(inputs.len(), 3);
        for input in inputs {
            let source = world
                .hub
                .json(&["show", input["artifact"].as_str().unwrap()]);
            assert_eq!(source["digest"], input["digest"], "{input}");
        }
        assert!(
            daemon
                .cli(&["show", "model/judge:r1"])
                .expect(0)
                .out
                .contains("run r1, for a, on b")
        );
    }
    world.assert_given_back();
    assert!(
        world.b.folder("model/base:v1").join("base.bin").exists(),
        "content that b had before the run is kept"
    );
    assert_eq!(world.b.current("model/base"), "v1");
    assert_same(&older, &world.b.folder("dataset/panels:v0"));
    assert_eq!(
        world.b.current("dataset/panels"),
        "v0",
        "readers see the earlier version again"
    );
    // The removed inputs are no longer at b: a new delivery delivers them again.
    world
        .hub
        .deliver_and_wait("dataset/panels:v1", "b", secs(60));
    assert!(world.b.folder("dataset/panels:v1").exists());
}

#[test]
fn the_hub_shows_why_a_trainer_failed() {
    let _limit = limit(secs(120));
    let world = World::start("fail");
    world.publish_at_hub();
    let failed = world.hub.cli(&[
        "train",
        "start",
        "--name",
        "r1",
        "--from",
        "a",
        "--on",
        "b",
        "--input",
        "labels/panels:v1",
        "dataset/panels:v1",
        "--expect",
        "model/judge",
        "--wait",
    ]);
    failed.expect(7).says(&["exit code 3"]);
    let run = world.run();
    assert_eq!(
        (&run["state"], &run["trainer"]["exit_code"]),
        (&"failed".into(), &3.into()),
        "{run:#}"
    );
    let tail = run["trainer"]["tail"].as_str().unwrap();
    assert!(
        tail.ends_with("CUDA error: 显存不足") && tail.len() <= 4096,
        "{tail}"
    );
    assert!(
        world
            .hub
            .cli(&["train", "show", "r1"])
            .expect(0)
            .out
            .contains("CUDA error: 显存不足")
    );
    assert!(
        world
            .hub
            .cli(&["train", "list"])
            .expect(0)
            .out
            .contains("failed")
    );
    world.assert_given_back();
    // The trainer's log is kept.
    let log = std::fs::read_to_string(world.b.data_dir.join("runs/r1/trainer.log")).unwrap();
    assert!(log.starts_with("training r1"), "{log}");
    world.hub.cli(&["train", "cancel", "r1"]).expect(6);
}

#[test]
fn a_training_run_survives_the_kill_of_every_daemon() {
    let _limit = limit(secs(240));
    let mut world = World::start("hold");
    world.publish_at_hub();
    world.begin(&[]);
    // During or just after the delivery of the inputs.
    world.hub.kill();
    world.hub.start();
    world.b.kill();
    world.b.start();
    let pid = world.trainer();
    // During the training.
    world.b.kill();
    world.b.start();
    world.hub.kill();
    world.hub.start();
    world.a.kill();
    let run = world.wait_run("training", is("training"));
    assert!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "the training continued without its daemon"
    );
    assert_eq!(run["trainer"]["starts"], 1, "{run:#}");
    world.b.kill();
    write(&world.folder.join("go"), b"");
    wait_for("the trainer has ended", secs(60), || {
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
    world.b.start();
    // a is offline; the model waits for it.
    world.wait_run("returning", is("returning"));
    world.hub.kill();
    world.hub.start();
    world.a.start();
    let done = world.wait_run("done", is("done"));
    assert_eq!(done["trainer"]["starts"], 1);
    assert_eq!(
        done["trainer"]["exit_code"], 0,
        "the daemon was not running when the trainer ended: {done:#}"
    );
    assert!(score(&world.a.folder("model/judge:r1")) >= 90);
    world.assert_given_back();
}

#[test]
fn a_cancelled_or_late_run_ends_its_trainer_and_releases_its_inputs() {
    let _limit = limit(secs(180));
    for (ttl, state) in [("1h", "cancelled"), ("25s", "failed")] {
        let world = World::start("hold");
        world.publish_at_hub();
        world.begin(&["--ttl", ttl]);
        let pid = world.trainer();
        if state == "cancelled" {
            world.wait_run("training", is("training"));
            world
                .hub
                .cli(&["train", "finish", "r1"])
                .expect(6)
                .says(&["command"]);
            world.hub.cli(&["train", "cancel", "r1"]).expect(0);
        }
        let run = world.wait_run(state, is(state));
        wait_for("the trainer has ended", secs(30), || {
            (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
        });
        world.assert_given_back();
        if state == "failed" {
            assert!(run["message"].as_str().unwrap().contains("time"), "{run:#}");
        }
        assert!(world.run()["model"].is_null());
    }
}

#[test]
fn an_impossible_run_is_refused_or_fails_before_any_delivery() {
    let _limit = limit(secs(120));
    let world = World::start("learn");
    world.publish_at_hub();
    let start = |more: &[&str]| {
        let args: Vec<&str> = ["train", "start", "--name"]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        world.hub.cli(&args)
    };
    let data = ["--input", "dataset/panels:v1"];
    start(&[
        "R", "--from", "a", "--on", "b", data[0], data[1], "--expect", "model/m",
    ])
    .expect(2);
    start(&[
        "r", "--from", "a", "--on", "a", data[0], data[1], "--expect", "model/m",
    ])
    .expect(2);
    start(&[
        "r", "--from", "a", "--on", "c", data[0], data[1], "--expect", "model/m",
    ])
    .expect(5);
    start(&[
        "r",
        "--from",
        "a",
        "--on",
        "b",
        data[0],
        "dataset/none:v1",
        "--expect",
        "model/m",
    ])
    .expect(5);
    start(&[
        "r",
        "--from",
        "a",
        "--on",
        "b",
        data[0],
        data[1],
        "--expect",
        "dataset/m",
    ])
    .expect(2);
    world.hub.cli(&["train", "show", "r"]).expect(5);
    // A site can start a run only for itself, and only with artifacts that it has.
    let at_a = |on: &str, from: &str| {
        world.a.cli(&[
            "train", "start", "--name", "r", "--from", from, "--on", on, data[0], data[1],
            "--expect", "model/m",
        ])
    };
    at_a("a", "b").expect(4);
    at_a("b", "a").expect(5);
    world
        .hub
        .deliver_and_wait("dataset/panels:v1", "a", secs(60));
    // a has no `[train]`: it trains for no site, and no run starts.
    start(&[
        "r2", "--from", "b", "--on", "a", data[0], data[1], "--expect", "model/m", "--wait",
    ])
    .expect(4)
    .says(&["[train]"]);
    assert!(
        world.a.folder("dataset/panels:v1").exists(),
        "a keeps its artifacts"
    );
    world.hub.cli(&["train", "show", "r2"]).expect(5);
}

#[test]
fn a_site_trains_only_for_sites_in_its_own_configuration() {
    let _limit = limit(secs(60));
    let world = World::with(|scratch, folder| {
        World::command(scratch, folder, "learn").replace("allow = [\"a\"]", "allow = [\"other\"]")
    });
    let (root, _) = dataset(&world.scratch, "panels", 2);
    world.hub.publish(&root, "dataset/panels:v1", &[]);
    wait_for("the hub knows for which sites b trains", secs(20), || {
        let sites = world.hub.json(&["sites"]);
        sites
            .as_array()
            .unwrap()
            .iter()
            .any(|site| site["name"] == "b" && !site["version"].is_null())
            .then_some(())
    });
    let args = [
        "train",
        "start",
        "--name",
        "r",
        "--from",
        "a",
        "--on",
        "b",
        "--input",
        "dataset/panels:v1",
        "--expect",
        "model/m",
    ];
    world
        .hub
        .cli(&args)
        .expect(4)
        .says(&["[train] allow", "add a to"]);
    world.a.cli(&args).expect(4).says(&["[train] allow"]);
    assert_eq!(
        world.hub.json(&["status"]),
        serde_json::json!([]),
        "nothing was delivered"
    );
    assert!(!world.folder.join("pid").exists());
}

#[test]
fn an_input_that_the_training_site_lost_is_restored_before_its_trainer_starts() {
    let _limit = limit(secs(120));
    let world = World::start("learn");
    world.publish_at_hub();
    let id = world
        .hub
        .deliver_and_wait("dataset/panels:v1", "b", secs(60))
        .id;
    std::fs::remove_dir_all(world.b.folder("dataset/panels:v1")).unwrap();
    world.begin(&[]);
    let run = world.wait_run("past its training", has_its_model);
    let landed = world.hub.json(&["status", &id])[0]["finished_at"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        run["trainer"]["started_at"].as_str().unwrap() >= landed.as_str(),
        "it arrived at {landed}: {run:#}"
    );
}

#[test]
fn consecutive_runs_do_not_remove_their_common_inputs() {
    let _limit = limit(secs(180));
    let world = World::start("learn");
    world.publish_at_hub();
    // Each run starts while the run before it releases its inputs.
    let names = ["r1", "r2", "r3", "r4"];
    for name in names {
        world.begin_as(name, &[]);
        world.wait_run_of(name, "past its training", has_its_model);
    }
    for name in names {
        world.wait_run_of(name, "done and released", |run| {
            run["state"] == "done" && run["released"] == true
        });
    }
    world.assert_given_back();
}

#[test]
fn a_model_that_the_hub_refuses_fails_the_run_with_the_reason() {
    let _limit = limit(secs(120));
    let world = World::start("hold");
    world.publish_at_hub();
    world.begin(&[]);
    world.trainer();
    let other = world.scratch.join("other");
    write(&other.join("weights.bin"), b"another model");
    world.hub.publish(&other, "model/judge:r1", &[]);
    write(&world.folder.join("go"), b"");
    let failed = world.wait_run("failed", is("failed"));
    assert!(says("model/judge:r1")(&failed), "{failed:#}");
    assert_eq!(
        (
            &failed["trainer"]["exit_code"],
            &failed["trainer"]["message"]
        ),
        (&0.into(), &failed["message"]),
        "{failed:#}"
    );
    world.assert_given_back();
    // A conflict that is known before the start is reported at the start.
    let start = [
        "train",
        "start",
        "--name",
        "r2",
        "--from",
        "a",
        "--on",
        "b",
        "--input",
        "dataset/panels:v1",
    ];
    let refused: Vec<&str> = start
        .into_iter()
        .chain(["--expect", "model/judge:r1"])
        .collect();
    world
        .hub
        .cli(&refused)
        .expect(6)
        .says(&["model/judge:r1 exists already"]);
}

#[test]
fn a_trainer_does_not_start_on_files_that_changed_after_publishing_in_place() {
    let _limit = limit(secs(120));
    let world = World::start("learn");
    let (root, csv) = dataset(&world.scratch, "panels", 30);
    world.b.publish(&root, "dataset/panels:v1", &[]);
    world.hub.publish(&csv, "labels/panels:v1", &[]);
    write(&root.join("相机/图 000.pgm"), b"edited");
    // b checks its files every five minutes. It detects the change earlier, because it checks again
    // before it starts the trainer.
    world.begin(&[]);
    let failed = world.wait_run("failed", is("failed"));
    assert!(
        says("dataset/panels:v1 differs from its published content")(&failed)
            && says("图 000.pgm")(&failed),
        "{failed:#}"
    );
    assert!(
        !world.b.data_dir.join("runs/r1").exists(),
        "no trainer was started"
    );
    wait_for("the hub knows the change", secs(30), || {
        world.hub.json(&["show", "dataset/panels:v1"])["changed"]
            .is_string()
            .then_some(())
    });
    let start = [
        "train",
        "start",
        "--name",
        "r2",
        "--from",
        "a",
        "--on",
        "b",
        "--expect",
        "model/judge",
        "--input",
        "dataset/panels:v1",
    ];
    world
        .hub
        .cli(&start)
        .expect(6)
        .says(&["dataset/panels:v1: changed at b"]);
}

#[test]
fn an_input_that_cannot_be_removed_is_reported_and_blocks_no_other() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let mut registry = Registry::basic(&scratch, "rb");
    let folder = scratch.folder("trainer");
    let hub = Hub::start_new(scratch.path());
    let a = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let more = World::command(&scratch, &folder, "hold");
    let spec = SiteSpec {
        images_sink: Some(registry.sink(&scratch)),
        more: &more,
        ..SiteSpec::default()
    };
    let b = Site::start_new(scratch.path(), &hub, "b", &spec);
    let world = World {
        a,
        b,
        hub,
        folder,
        scratch,
    };
    world.publish_at_hub();
    let layout = images::small().join("layout");
    world.hub.publish(&layout, "image/judge:v1", &[]);
    world.begin(&["--input", "image/judge:v1"]);
    world.trainer();
    // b adds its own tag to the image: this registry cannot delete one of two tags.
    registry.push(
        &format!("oci:{}:v1", layout.display()),
        "operators/judge:own",
    );
    let image = registry.digest("operators/judge:own");
    assert_eq!(registry.digest("operators/judge:v1"), image);
    registry.stop();
    write(&world.folder.join("go"), b"");
    let told = world.wait_run(
        "in trouble",
        says("at b: image/judge:v1 could not be removed"),
    );
    assert_eq!(told["released"], false, "{told:#}");
    wait_for("the other inputs are removed", secs(30), || {
        (!world.b.folder("dataset/panels:v1").exists()).then_some(())
    });
    registry.start();
    let told = world.wait_run("released", |run| run["released"] == true);
    assert!(
        says("at b: image/judge:v1 stays")(&told) && says("another tag")(&told),
        "{told:#}"
    );
    assert_eq!(registry.digest("operators/judge:own"), image);
    assert!(
        !world.b.artifacts().contains(&"image/judge:v1".to_owned()),
        "b no longer tracks the run"
    );
}

#[test]
fn several_artifacts_are_one_delivery_and_labels_follow_their_dataset() {
    let _limit = limit(secs(120));
    let world = World::start("learn");
    let (root, csv) = dataset(&world.scratch, "panels", 30);
    world
        .hub
        .publish(&root, "dataset/panels:v1", &["--to", "a"]);
    world
        .hub
        .publish(&csv, "labels/panels:v1", &["--for", "dataset/panels:v1"]);
    let first = world.hub.json(&[
        "deliver",
        "labels/panels:v1",
        "dataset/panels:v1",
        "--to",
        "a",
        "--wait",
    ]);
    let delivery = first["delivery"].as_str().unwrap();
    assert_eq!(first["transfers"].as_array().unwrap().len(), 2);
    assert_eq!(first["artifact"], "labels/panels:v1,dataset/panels:v1");
    // The transfer of the dataset was running before: it is part of this delivery too.
    assert_eq!(world.hub.transfers(&[delivery]).len(), 2);
    let shown = world.hub.cli(&["status", delivery]).expect(0).out;
    assert!(
        shown.contains(delivery) && shown.contains("2 of 2 parts"),
        "{shown}"
    );

    // At b the dataset is paused: its labels wait for it, and their transfer reports that.
    let mut world = world;
    world.b.stop();
    let held = world.hub.json(&[
        "deliver",
        "labels/panels:v1",
        "dataset/panels:v1",
        "--to",
        "b",
    ]);
    let delivery = held["delivery"].as_str().unwrap().to_owned();
    let parts = world.hub.transfers(&[&delivery]);
    let of = |kind: &str| {
        parts
            .iter()
            .find(|t| t.artifact.starts_with(kind))
            .unwrap()
            .id
            .clone()
    };
    let (data, labels) = (of("dataset"), of("labels"));
    world.hub.cli(&["pause", &data]).expect(0);
    world.b.start();
    let says_so = |t: &Transfer| {
        t.has_reason(&["waiting_for_dependency"])
            && t.message
                .as_deref()
                .is_some_and(|message| message.contains("dataset/panels:v1"))
    };
    world
        .hub
        .wait_transfer(&labels, "waiting", secs(30), says_so);
    assert!(
        world
            .hub
            .cli(&["status", &delivery])
            .expect(0)
            .out
            .contains("0 of 2 parts")
    );
    // It still waits after a restart of the site.
    world.b.kill();
    world.b.start();
    world.hub.wait_online("b", true, secs(20));
    world
        .hub
        .wait_transfer(&labels, "waiting", secs(30), says_so);
    world.hub.cli(&["resume", &data]).expect(0);
    world.hub.wait_done(&labels, secs(60));
    assert_eq!(
        world.hub.transfer(&data).state,
        "done",
        "the dataset arrived first"
    );
    let at_site = world.b.cli(&["status", &delivery]).expect(0).out;
    assert!(at_site.contains("2 of 2 parts"), "{at_site}");
}

#[test]
fn a_platform_is_called_until_it_accepts_the_run_and_reports_the_end() {
    let _limit = limit(secs(120));
    let calls: Arc<Mutex<Vec<Value>>> = Arc::default();
    let seen = calls.clone();
    let platform = http::serve(move |_| {
        let take = move |axum::Json(descriptor): axum::Json<Value>| async move {
            let mut seen = seen.lock().unwrap();
            if seen.is_empty() {
                // The platform starts, and its answer is lost.
                write(
                    &Path::new(descriptor["output"].as_str().unwrap()).join("begun.bin"),
                    b"begun at the first call",
                );
            }
            seen.push(descriptor);
            // The platform is busy at first.
            if seen.len() < 3 {
                axum::http::StatusCode::SERVICE_UNAVAILABLE
            } else {
                axum::http::StatusCode::ACCEPTED
            }
        };
        axum::Router::new().route("/runs", axum::routing::post(take))
    });
    let url = format!("http://{}/runs", platform.address);
    let world = World::with(|_, _| format!("[train]\nurl = \"{url}\"\nallow = [\"a\"]\n"));
    world.publish_at_hub();
    world.begin(&[]);
    let descriptor = wait_for("the platform accepts the run", secs(60), || {
        calls.lock().unwrap().get(2).cloned()
    });
    assert_eq!(
        (&descriptor["run"], &descriptor["model"]),
        (&"r1".into(), &"model/judge:r1".into())
    );
    let input = |kind: &str| {
        descriptor["inputs"]
            .as_array()
            .unwrap()
            .iter()
            .find(|i| i["kind"] == kind)
            .unwrap()
            .clone()
    };
    assert_eq!(
        input("dataset")["path"],
        world.b.folder("dataset/panels:v1").to_str().unwrap()
    );
    let labels = input("labels");
    assert_eq!(
        (&labels["label_set"], &labels["version"]),
        (&"panels".into(), &"v1".into())
    );
    assert!(
        Path::new(labels["rows"].as_str().unwrap())
            .join("annotations.jsonl")
            .is_file()
    );
    let begun = Path::new(descriptor["output"].as_str().unwrap()).join("begun.bin");
    assert_eq!(
        std::fs::read(begun).unwrap(),
        b"begun at the first call",
        "a repeated call removes nothing"
    );
    world.wait_run("training", is("training"));
    let made = world.scratch.join("made");
    write(&made.join("weights.bin"), b"made by a platform");
    // The platform publishes from its own machine, which ends the run's training.
    world.hub.publish(&made, "model/judge:7", &["--run", "r1"]);
    let done = world.wait_run("done", is("done"));
    assert_eq!(done["model"]["artifact"], "model/judge:7");
    assert!(world.a.folder("model/judge:7").join("weights.bin").exists());
    world.hub.json(&["train", "finish", "r1"]);
    world.assert_given_back();
    assert_eq!(
        calls.lock().unwrap().len(),
        3,
        "an accepted call is not repeated"
    );
}

#[test]
fn a_platform_writes_its_model_to_the_output_folder_or_reports_a_failure() {
    let _limit = limit(secs(120));
    let calls: Arc<Mutex<Vec<Value>>> = Arc::default();
    let seen = calls.clone();
    let platform = http::serve(move |_| {
        let take = move |axum::Json(descriptor): axum::Json<Value>| async move {
            if descriptor["run"] == "r1" {
                write(
                    &Path::new(descriptor["output"].as_str().unwrap()).join("weights.bin"),
                    b"left by a platform",
                );
            }
            seen.lock().unwrap().push(descriptor);
            axum::http::StatusCode::ACCEPTED
        };
        axum::Router::new().route("/runs", axum::routing::post(take))
    });
    let url = format!("http://{}/runs", platform.address);
    let world = World::with(|_, _| format!("[train]\nurl = \"{url}\"\nallow = [\"a\"]\n"));
    world.publish_at_hub();
    let calls_for = |name: &str| -> Vec<Value> {
        calls
            .lock()
            .unwrap()
            .iter()
            .filter(|call| call["run"] == name)
            .cloned()
            .collect()
    };
    let begin = |name: &str| {
        world.begin_as(name, &[]);
        wait_for("the platform accepts the run", secs(60), || {
            (!calls_for(name).is_empty()).then_some(())
        });
        world.wait_run_of(name, "training", is("training"));
    };

    begin("r1");
    world.hub.cli(&["train", "finish", "r1"]).expect(0);
    let done = world.wait_run("done", is("done"));
    assert_eq!(done["model"]["artifact"], "model/judge:r1");
    assert_eq!(
        std::fs::read(world.a.folder("model/judge:r1").join("weights.bin")).unwrap(),
        b"left by a platform"
    );
    world.assert_given_back();

    begin("r2");
    world
        .hub
        .cli(&["train", "finish", "r2", "--failed", "no GPU"])
        .expect(0);
    let failed = world.wait_run_of("r2", "failed", is("failed"));
    assert!(failed["model"].is_null(), "{failed:#}");
    assert!(
        world
            .hub
            .cli(&["train", "show", "r2"])
            .expect(0)
            .out
            .contains("the training platform says: no GPU")
    );
    world.wait_run_of("r2", "released", |run| run["released"] == true);
    world.assert_given_back();

    // The platform is informed of a cancelled run, with the content of the first call; it is not
    // called for a completed run.
    begin("r3");
    world.hub.cli(&["train", "cancel", "r3"]).expect(0);
    let said = wait_for("the platform is informed of the end", secs(30), || {
        calls_for("r3").get(1).cloned()
    });
    let mut expected = calls_for("r3")[0].clone();
    assert!(expected.get("cancel").is_none());
    expected["cancel"] = true.into();
    assert_eq!(said, expected);
    world.wait_run_of("r3", "released", |run| run["released"] == true);
    assert_eq!((calls_for("r1").len(), calls_for("r3").len()), (1, 2));
}

#[test]
fn a_platform_that_does_not_answer_is_reported() {
    let _limit = limit(secs(120));
    let world = World::with(|_, _| {
        format!(
            "[train]\nurl = \"http://127.0.0.1:{}/runs\"\nallow = [\"a\"]\n",
            free_port()
        )
    });
    world.publish_at_hub();
    world.begin(&[]);
    let run = world.wait_run("called without an answer", says("does not answer"));
    assert_eq!(run["state"], "training", "{run:#}");
    world.hub.cli(&["train", "cancel", "r1"]).expect(0);
    world.assert_given_back();
}

#[test]
fn labels_and_images_published_at_the_training_site_must_also_be_delivered_there() {
    let _limit = limit(secs(180));
    let world = World::start("hold");
    let (root, csv) = dataset(&world.scratch, "panels", 60);
    world.hub.publish(&root, "dataset/panels:v1", &[]);
    world.b.publish(&csv, "labels/panels:v1", &[]);
    world
        .b
        .publish(&images::small().join("docker.tar"), "image/judge:v1", &[]);
    let (more, own) = (
        ["--input", "image/judge:v1"],
        ["labels/panels:v1", "image/judge:v1"],
    );

    // b has neither the rows nor the image under these names, and a trainer would need both.
    let start = [
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
        "dataset/panels:v1",
    ];
    let refused: Vec<&str> = start.into_iter().chain(own).collect();
    let next = "packhorse deliver labels/panels:v1 image/judge:v1 --to b";
    world
        .hub
        .cli(&refused)
        .expect(6)
        .says(&["published at b, but not delivered there", next]);
    world.hub.deliver_and_wait(own[0], "b", secs(60));
    world
        .hub
        .cli(&refused)
        .expect(6)
        .says(&["packhorse deliver image/judge:v1 --to b"]);
    world.hub.cli(&["train", "show", "r1"]).expect(5);
    world.hub.deliver_and_wait(own[1], "b", secs(60));

    world.begin(&more);
    world.trainer();
    let text = std::fs::read(world.b.data_dir.join("runs/r1/run.json")).unwrap();
    let descriptor: Value = serde_json::from_slice(&text).unwrap();
    let input = |kind: &str| {
        descriptor["inputs"]
            .as_array()
            .unwrap()
            .iter()
            .find(|i| i["kind"] == kind)
            .unwrap()
            .clone()
    };
    let (labels, image) = (input("labels"), input("image"));
    let rows = || {
        let [table, set, version] =
            ["table", "label_set", "version"].map(|field| labels[field].as_str().unwrap());
        let sql = format!(
            "SELECT count(*) AS n FROM {table} WHERE label_set = '{set}' AND version = '{version}'"
        );
        sqlite_rows(&world.b.labels_db, &sql)[0]["n"].clone()
    };
    assert_eq!(rows(), 60, "{labels:#}");
    assert!(
        Path::new(labels["rows"].as_str().unwrap())
            .join("annotations.jsonl")
            .is_file(),
        "{labels:#}"
    );
    let layout = format!("oci:{}:v1@sha256:", world.b.layout.join("judge").display());
    assert!(
        image["image"].as_str().unwrap().starts_with(&layout),
        "{image:#}"
    );

    write(&world.folder.join("go"), b"");
    world.wait_run("done", is("done"));
    assert!(score(&world.a.folder("model/judge:r1")) >= 90);
    // Only the dataset was borrowed.
    world.wait_run("released", |run| run["released"] == true);
    assert!(!world.b.folder("dataset/panels:v1").exists());
    assert_eq!(
        rows(),
        60,
        "b keeps the artifacts that it published and received"
    );
    assert!(
        own.iter()
            .all(|name| world.b.artifacts().contains(&(*name).to_owned())),
        "{:?}",
        world.b.artifacts()
    );
}

#[test]
fn a_model_is_published_at_the_training_site_and_delivered_to_the_requesting_site() {
    let _limit = limit(secs(180));
    let world = World::start("learn");
    // Only a has the data.
    let (root, csv) = dataset(&world.scratch, "panels", 60);
    world.a.publish(&root, "dataset/panels:v1", &[]);
    world
        .a
        .publish(&csv, "labels/panels:v1", &["--for", "dataset/panels:v1"]);
    let begun = world.a.json(&[
        "train",
        "start",
        "--name",
        "r1",
        "--from",
        "a",
        "--on",
        "b",
        "--input",
        "dataset/panels:v1",
        "labels/panels:v1",
        "--expect",
        "model/judge:best",
        "--wait",
    ]);
    assert_eq!(
        (&begun["state"], &begun["model"]["artifact"]),
        (&"done".into(), &"model/judge:best".into()),
        "{begun:#}"
    );
    let right = score(&world.a.folder("model/judge:best"));
    assert!(
        right >= 90,
        "the model at a classifies {right} of 100 correctly"
    );
    let shown = world.a.json(&["show", "model/judge:best"]);
    for (i, reference) in ["dataset/panels:v1", "labels/panels:v1"]
        .into_iter()
        .enumerate()
    {
        let source = world.a.json(&["show", reference]);
        assert_eq!(shown["lineage"]["inputs"][i]["digest"], source["digest"]);
    }
    assert_eq!(
        world.b.json(&["show", "model/judge:best"])["lineage"],
        shown["lineage"]
    );
    world.assert_given_back();
    assert!(root.exists(), "the artifacts that a published are kept");
}
