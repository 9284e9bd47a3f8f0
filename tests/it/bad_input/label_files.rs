//! Label files with every kind of fault: each is refused with file, record and reason.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::daemon::{Site, SiteSpec};
use crate::support::data::{self, Photo, write};
use crate::support::labels::{self, Mark, Reader, assert_boxes};
use crate::support::{limit, secs};

use super::Refusing;

/// A small valid COCO document.
fn sound() -> (Vec<Photo>, Vec<Mark>, Value) {
    let photos: Vec<Photo> = (0..6)
        .map(|i| Photo {
            path: format!("缺陷 {i}.png"),
            width: 100,
            height: 80,
        })
        .collect();
    let marks = labels::marks(&photos, 4);
    let document = labels::coco(&photos, &marks);
    (photos, marks, document)
}

/// Publishes a label file that must be refused with these words.
#[track_caller]
fn refused(world: &Refusing, name: &str, bytes: &[u8], words: &[&str]) {
    let file = world.scratch.join("labels").join(name);
    write(&file, bytes);
    let mut all = vec![name];
    all.extend(words);
    world.hub.refuses(&file, "labels/bad:v1", &[], 8, &all);
}

#[test]
fn coco_faults() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    let (_, _, sound) = sound();
    let case = |name: &str, words: &[&str], spoil: &dyn Fn(&mut Value)| {
        let mut document = sound.clone();
        spoil(&mut document);
        refused(
            &world,
            &format!("{name}.json"),
            document.to_string().as_bytes(),
            words,
        );
    };
    case("zero-box", &["1001", "box"], &|d| {
        d["annotations"][1]["bbox"] = json!([1, 1, 0, 5]);
    });
    case("negative-box", &["1001", "box"], &|d| {
        d["annotations"][1]["bbox"] = json!([1, 1, -3, 5]);
    });
    case("outside", &["1001", "outside"], &|d| {
        d["annotations"][1]["bbox"] = json!([90, 1, 30, 5]);
    });
    case("short-box", &["1001", "box"], &|d| {
        d["annotations"][1]["bbox"] = json!([90, 1, 30]);
    });
    case("unknown-class", &["1001", "999"], &|d| {
        d["annotations"][1]["category_id"] = json!(999);
    });
    case("orphan", &["1001", "777"], &|d| {
        d["annotations"][1]["image_id"] = json!(777);
    });
    case("duplicate-annotation", &["1000"], &|d| {
        d["annotations"][1]["id"] = json!(1000);
    });
    case("duplicate-image", &["5"], &|d| {
        d["images"][1]["id"] = json!(5);
    });
    case("duplicate-class", &["划伤"], &|d| {
        d["categories"][1]["name"] = json!("划伤");
    });
    case("duplicate-class-id", &["3"], &|d| {
        d["categories"][1]["id"] = json!(3);
    });
    case("nul", &["nul"], &|d| {
        d["categories"][1]["name"] = json!("par\u{0}ticle");
    });
    case("escaping", &[".."], &|d| {
        d["images"][1]["file_name"] = json!("../outside.png");
    });

    let text = sound.to_string();
    refused(
        &world,
        "truncated.json",
        &text.as_bytes()[..text.len() / 2],
        &[],
    );
    let mut latin1 = text.clone().into_bytes();
    let place = text.find("particle").unwrap();
    latin1[place] = 0xe9;
    refused(&world, "latin1.json", &latin1, &["utf-8"]);
    // NaN is not valid JSON, but some tools write it.
    refused(
        &world,
        "nan.json",
        text.replacen("\"area\":", "\"x\":NaN,\"area\":", 1)
            .as_bytes(),
        &[],
    );
    let deep = format!(
        "{{\"images\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    refused(&world, "deep.json", deep.as_bytes(), &[]);
    world.check_clean();
}

#[test]
fn all_faults_are_counted_and_the_first_are_listed() {
    let _limit = limit(secs(90));
    let world = Refusing::start();
    let photos: Vec<Photo> = (0..50)
        .map(|i| Photo {
            path: format!("{i}.png"),
            width: 100,
            height: 80,
        })
        .collect();
    let marks = labels::marks(&photos, 4);
    let mut document = labels::coco(&photos, &marks);
    for annotation in document["annotations"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .take(40)
    {
        annotation["bbox"] = json!([1, 1, 0, 0]);
    }
    refused(
        &world,
        "many.json",
        document.to_string().as_bytes(),
        &["1000", "1001", "1002", "40"],
    );
    world.check_clean();
}

#[test]
fn csv_and_yolo_faults() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    let head = "sample_path,class,x,y,w,h\n";
    for (name, rows, words) in [
        ("drift.csv", "a.png,c,1,2,3,4\na.png,c,1,2,3\n", vec!["3"]),
        ("nan.csv", "a.png,c,1,2,3,4\na.png,c,NaN,2,3,4\n", vec!["3"]),
        ("infinite.csv", "a.png,c,1,2,inf,4\n", vec!["2"]),
        ("words.csv", "a.png,c,left,2,3,4\n", vec!["2", "left"]),
        ("nul.csv", "a\0.png,c,1,2,3,4\n", vec!["nul"]),
        ("zero.csv", "a.png,c,1,2,0,4\n", vec!["2"]),
        ("no-sample.csv", ",c,1,2,3,4\n", vec!["2"]),
    ] {
        refused(&world, name, format!("{head}{rows}").as_bytes(), &words);
    }
    refused(
        &world,
        "latin1.csv",
        b"sample_path,class,x,y,w,h\nd\xe9faut.png,c,1,2,3,4\n",
        &["utf-8"],
    );
    refused(&world, "no-columns.csv", b"this,that\n1,2\n", &["sample"]);

    let dataset = data::dataset(&world.scratch.join("dataset"), 4);
    let marks = labels::marks(&dataset.photos, 3);
    let nameless = world.scratch.join("nameless");
    labels::yolo(&nameless, &dataset.root, &dataset.photos, &marks, false);
    world.hub.refuses(
        &nameless,
        "labels/bad:v1",
        &["--format", "yolo"],
        8,
        &["names"],
    );
    let broken = world.scratch.join("broken");
    labels::yolo(&broken, &dataset.root, &dataset.photos, &marks, true);
    write(
        &broken.join("labels/train/缺陷 0001.txt"),
        b"0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2\n",
    );
    world.hub.refuses(
        &broken,
        "labels/bad:v1",
        &["--format", "yolo"],
        8,
        &["缺陷 0001.txt", "2"],
    );
    write(
        &broken.join("labels/train/缺陷 0001.txt"),
        b"9 0.5 0.5 0.2 0.2\n",
    );
    world.hub.refuses(
        &broken,
        "labels/bad:v1",
        &["--format", "yolo"],
        8,
        &["缺陷 0001.txt", "9"],
    );
    world.check_clean();
}

#[test]
fn labels_need_a_dataset_that_has_their_samples() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    let dataset = data::dataset(&world.scratch.join("dataset"), 10);
    let marks = labels::marks(&dataset.photos, 3);
    let mut document = labels::coco(&dataset.photos, &marks);
    let file = world.scratch.join("labels.json");
    labels::write_json(&file, &document);
    world.hub.refuses(
        &file,
        "labels/l:v1",
        &["--for", "dataset/d:v1"],
        5,
        &["dataset/d:v1"],
    );
    world.hub.publish(&dataset.root, "dataset/d:v1", &[]);
    let published = world
        .hub
        .publish(&file, "labels/l:v1", &["--for", "dataset/d:v1"]);
    assert_eq!(published["artifact"], "labels/l:v1");
    let info = world.hub.json(&["show", "labels/l:v1"])["info"].clone();
    assert_eq!(
        (&info["samples"], &info["annotations"]),
        (&json!(10), &json!(marks.len())),
        "{info}"
    );

    document["images"][0]["file_name"] = json!("没有.png");
    document["images"][1]["file_name"] = json!("也没有.png");
    labels::write_json(&file, &document);
    world.hub.refuses(
        &file,
        "labels/l:v2",
        &["--for", "dataset/d:v1"],
        8,
        &["没有.png", "也没有.png"],
    );
    world.hub.publish(
        &file,
        "labels/l:v2",
        &["--for", "dataset/d:v1", "--allow-missing"],
    );
}

#[test]
fn every_format_gives_the_same_boxes() {
    let _limit = limit(secs(180));
    let world = Refusing::start();
    let site = Site::start_new(
        world.scratch.path(),
        &world.hub,
        "hefei",
        &SiteSpec::default(),
    );
    let dataset = data::dataset(&world.scratch.join("dataset"), 12);
    let mut marks = labels::marks(&dataset.photos, 4);
    marks.iter_mut().for_each(|m| m.polygon = false);
    let at = |name: &str| -> PathBuf { world.scratch.join(name) };
    write(&at("boxes.csv"), labels::csv(&marks).as_bytes());
    write(&at("boxes.jsonl"), labels::jsonl(&marks).as_bytes());
    labels::write_json(&at("coco.json"), &labels::coco(&dataset.photos, &marks));
    labels::write_json(
        &at("studio.json"),
        &labels::label_studio(&dataset.photos, &marks),
    );
    labels::voc(&at("voc"), &dataset.photos, &marks);
    labels::yolo(&at("yolo"), &dataset.root, &dataset.photos, &marks, true);

    for (source, name, format, tolerance) in [
        ("boxes.csv", "csv", "csv", 1e-9),
        ("boxes.jsonl", "jsonl", "jsonl", 1e-9),
        ("coco.json", "coco", "coco", 1e-9),
        ("studio.json", "studio", "label_studio", 1e-6),
        // VOC counts whole pixels from 1, and both corners are inside the box.
        ("voc", "voc", "voc", 1.01),
        ("yolo", "yolo", "yolo", 1e-6),
    ] {
        let reference = format!("labels/{name}:v1");
        world.hub.publish(
            &at(source),
            &reference,
            &["--format", format, "--to", "hefei", "--wait"],
        );
        let info = world.hub.json(&["show", &reference])["info"].clone();
        assert_eq!(
            (&info["format"], &info["classes"]),
            (&json!(format), &json!(3)),
            "{info}"
        );
        let rows = Reader::Sqlite(&site.labels_db).version(name, "v1");
        let in_yolo =
            |photo: &Photo| format!("images/train/{}", photo.path.rsplit('/').next().unwrap());
        match name {
            "yolo" => assert_boxes(&rows, &marks, in_yolo, tolerance),
            _ => assert_boxes(&rows, &marks, |photo| photo.path.clone(), tolerance),
        }
        assert_eq!(Reader::Sqlite(&site.labels_db).current(name), rows);
    }
    // Columns with other names are mapped.
    write(
        &at("other.csv"),
        labels::csv(&marks)
            .replacen("sample_path,class", "image,defect", 1)
            .as_bytes(),
    );
    let mapped = [
        "--column",
        "sample_path=image",
        "--column",
        "class=defect",
        "--to",
        "hefei",
        "--wait",
    ];
    world
        .hub
        .publish(&at("other.csv"), "labels/mapped:v1", &mapped);
    assert_boxes(
        &Reader::Sqlite(&site.labels_db).current("mapped"),
        &marks,
        |photo| photo.path.clone(),
        1e-9,
    );
}
