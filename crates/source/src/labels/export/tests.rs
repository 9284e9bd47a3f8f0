//! Every format is read back with this crate's own readers, and gives the same rows.

use std::path::{Path, PathBuf};

use content::label_rows::{AnnotationRow, ClassRow, SampleRow};

use super::super::tests::{Input, Output as Read};
use super::*;

const COCO: &str = r#"{"images":[
{"id":1,"file_name":"线3/板1.png","width":640,"height":480,"split":"train","license":4},
{"id":2,"file_name":"线3/板2.png","width":640,"height":480,"split":"val"},
{"id":3,"file_name":"a, \"b\".png","width":100,"height":50}],
"annotations":[
{"id":11,"image_id":1,"category_id":3,"bbox":[10.25,20,30.5,40],"area":1220,"iscrowd":0,"segmentation":[]},
{"id":12,"image_id":1,"category_id":7,"bbox":[1,2,3,4],"area":6,"iscrowd":0,"segmentation":[[1,2,4,2,4,6]]},
{"id":13,"image_id":3,"category_id":3,"bbox":[0,0,100,50],"area":5000.5,"iscrowd":0,"segmentation":[],"attributes":{"who":"检验员","n":1.50}}],
"categories":[{"id":3,"name":"划痕","supercategory":"表面"},{"id":7,"name":"凹 & <坑>"},{"id":9,"name":"未用"}]}"#;

/// Canonical files in a folder, and what was read from the source.
struct Published {
    dir: tempfile::TempDir,
    read: Read,
}

impl Published {
    #[expect(
        clippy::disallowed_methods,
        reason = "a fixture need not survive a crash"
    )]
    fn of(read: Read) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rows")).unwrap();
        for (name, text) in [
            (ANNOTATIONS, &read.annotations),
            (CLASSES, &read.classes),
            (SAMPLES, &read.samples),
        ] {
            std::fs::write(dir.path().join("rows").join(name), text).unwrap();
        }
        Self { dir, read }
    }

    fn coco(text: &str) -> Self {
        Self::of(Input::file("a.json", text).read().unwrap())
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn export(&self, format: &str) -> Result<Exported, Fault> {
        let rows = self.dir.path().join("rows");
        export(&rows, format.parse().unwrap(), &self.out(), &|| Ok(()))
    }
}

fn parsed<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Annotations without their records, with the names of their classes.
fn annotations(read: &Read) -> Vec<String> {
    let classes: Vec<ClassRow> = parsed(&read.classes);
    parsed::<AnnotationRow>(&read.annotations)
        .into_iter()
        .map(|row| {
            let class = classes.iter().find(|class| Some(class.id) == row.class);
            let sides = [row.x, row.y, row.w, row.h];
            let json = |json: Option<Box<RawValue>>| json.map(|json| json.get().to_owned());
            let (geom, attrs) = (json(row.geom), json(row.attrs));
            let name = class.map(|class| &class.name);
            format!(
                "{} {name:?} {} {sides:?} {geom:?} {attrs:?}",
                row.sample, row.kind
            )
        })
        .collect()
}

fn samples(read: &Read) -> Vec<String> {
    parsed::<SampleRow>(&read.samples)
        .into_iter()
        .map(|row| {
            format!(
                "{} {:?} {:?} {:?}",
                row.path, row.width, row.height, row.split
            )
        })
        .collect()
}

fn read_file(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn coco_gives_the_same_rows_classes_and_samples() {
    let set = Published::coco(COCO);
    let exported = set.export("coco").unwrap();
    assert_eq!(
        (exported.classes, exported.samples, exported.annotations),
        (3, 3, 3)
    );
    assert_eq!(exported.notes, Vec::<String>::new());
    let text = read_file(&set.out().join("annotations.json"));
    let again = Input::file("annotations.json", &text).read().unwrap();
    assert_eq!(again.format, "coco");
    assert_eq!(annotations(&again), annotations(&set.read));
    assert_eq!(samples(&again), samples(&set.read));
    assert_eq!(again.classes, set.read.classes);
    assert!(text.contains("\"license\":4"), "{text}");
    // The same labels give the same file: what is read back exports to the same bytes.
    let again = Published::of(again);
    again.export("coco").unwrap();
    assert_eq!(read_file(&again.out().join("annotations.json")), text);
}

#[test]
fn what_tools_of_coco_expect_is_added() {
    let table = "path,class,kind,x,y,w,h,geom,width,height\na.png,dent,polygon,0,0,4,4,\"[[0,0,4,0,4,4]]\",9,9\na.png,,point,1,2,,,,9,9\n";
    let set = Published::of(Input::file("a.csv", table).read().unwrap());
    let exported = set.export("coco").unwrap();
    assert_eq!(
        exported.notes,
        ["annotations of the kind point without a box are left out: 1: a.png (annotation 2)"]
    );
    let text = read_file(&set.out().join("annotations.json"));
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!([{"id": 1, "image_id": 1, "category_id": 0, "bbox": [0.0, 0.0, 4.0, 4.0],
        "segmentation": [[0, 0, 4, 0, 4, 4]], "area": 8.0, "iscrowd": 0}]);
    assert_eq!(value["annotations"], expected);
}

#[test]
fn a_table_gives_the_same_rows() {
    let set = Published::coco(COCO);
    let exported = set.export("csv").unwrap();
    let notes = exported.notes.join("\n");
    assert!(
        notes.contains("classes without annotations are left out: 1: 未用"),
        "{notes}"
    );
    let text = read_file(&set.out().join("labels.csv"));
    let again = Input::file("labels.csv", text).read().unwrap();
    assert_eq!(annotations(&again), annotations(&set.read));
    assert_eq!(samples(&again), samples(&set.read));
    let ids = |read: &Read| -> Vec<i64> {
        let used = |id: &i64| *id != 9;
        let ids = parsed::<ClassRow>(&read.classes).into_iter().map(|c| c.id);
        ids.filter(used).collect()
    };
    assert_eq!(ids(&again), ids(&set.read));
}

#[test]
fn pascal_voc_gives_the_same_boxes_and_polygons() {
    let set = Published::coco(COCO);
    let exported = set.export("voc").unwrap();
    let notes = exported.notes.join("\n");
    for what in [
        "attributes named attributes are left out: 1",
        "classes have no numbers in Pascal VOC: 1: 3 7 9",
        "classes without annotations are left out: 1: 未用",
    ] {
        assert!(notes.contains(what), "{notes}");
    }
    let mut input = Input::folder(&[]);
    input.path = set.out();
    let again = input.format("voc").read().unwrap();
    let plain = |read: &Read| -> Vec<String> {
        let rows = annotations(read).into_iter();
        // Attributes are text there.
        rows.map(|row| {
            row.rsplit_once(" Some(\"{")
                .map_or(row.clone(), |(row, _)| row.to_owned())
        })
        .collect()
    };
    assert_eq!(plain(&again), plain(&set.read));
    assert_eq!(samples(&again), samples(&set.read));
}

#[test]
fn yolo_gives_the_same_boxes_polygons_and_splits() {
    let set = Published::coco(COCO);
    let exported = set.export("yolo").unwrap();
    let notes = exported.notes.join("\n");
    assert!(
        notes.contains("classes have another number, from 0 without gaps: 3: 3 \"划痕\" -> 0"),
        "{notes}"
    );
    let yaml = read_file(&set.out().join("data.yaml"));
    assert_eq!(
        yaml,
        "path: .\ntrain: train.txt\nval: val.txt\nnames:\n  0: \"划痕\"\n  1: \"凹 & <坑>\"\n  2: \"未用\"\n"
    );
    let mut input = Input::folder(&[]);
    input.path = set.out();
    let again = input.format("yolo").read().unwrap();
    assert_eq!(samples(&again), samples(&set.read));
    let (ours, theirs) = (
        parsed::<AnnotationRow>(&again.annotations),
        parsed::<AnnotationRow>(&set.read.annotations),
    );
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(&theirs) {
        assert_eq!((&a.sample, &a.kind), (&b.sample, &b.kind));
        for (a, b) in [(a.x, b.x), (a.y, b.y), (a.w, b.w), (a.h, b.h)] {
            assert!((a.unwrap() - b.unwrap()).abs() < 1e-9, "{a:?} {b:?}");
        }
    }
    assert_eq!(again.classes.lines().count(), 3);
}

#[test]
fn labels_of_images_are_in_a_folder_labels() {
    let text = COCO
        .replace("线3/板", "images/train/板")
        .replace("a, \\\"b\\\".png", "images/c.png");
    let set = Published::coco(&text);
    set.export("yolo").unwrap();
    let rows = read_file(&set.out().join("labels/train/板1.txt"));
    assert_eq!(rows.lines().count(), 2);
    assert_eq!(read_file(&set.out().join("labels/train/板2.txt")), "");
    assert!(set.out().join("labels/c.txt").exists());
}

#[test]
fn what_cannot_be_written_leaves_nothing() {
    let set = Published::coco(&COCO.replace("板2.png", "板1.jpg"));
    for format in ["yolo", "voc"] {
        let fault = set.export(format).unwrap_err();
        assert_eq!(fault.code, base::fault::Code::Conflict, "{fault}");
        assert!(fault.message.contains("two samples"), "{fault}");
        assert!(!set.out().exists());
    }
    std::fs::create_dir(set.out()).unwrap();
    assert_eq!(
        set.export("coco").unwrap_err().code,
        base::fault::Code::Conflict
    );
    assert!(set.out().exists(), "a folder of somebody else stays");
    let rows = set.dir.path().join("rows");
    let out = set.dir.path().join("stopped");
    let stop = || Err(base::job_progress::cancelled());
    assert!(export(&rows, ExportFormat::Csv, &out, &stop).is_err());
    assert!(!out.exists());
    assert_eq!(
        "parquet".parse::<ExportFormat>().unwrap_err().code,
        base::fault::Code::Usage
    );
}
