//! What is left out is counted and named, and links out of the folder are not read.

use std::os::unix::fs::symlink;

use super::*;
use base::fault::Code;
use base::omitted::Category;

/// What reading left out, and how many annotations there are.
fn read(input: &Input) -> (Omitted, u64) {
    let scratch = tempfile::tempdir().unwrap();
    let source = LabelsSource::open(&input.path, scratch.path(), &input.options, None).unwrap();
    let KindInfo::Labels(info) = source.info() else {
        unreachable!("labels have labels' info")
    };
    (source.omitted(), info.annotations)
}

/// The examples of what is reported of one category.
pub(super) fn notes(input: &Input, what: Category) -> Vec<String> {
    let list = read(input).0.list();
    list.into_iter()
        .filter(|omission| omission.what == what)
        .flat_map(|omission| omission.examples)
        .collect()
}

#[track_caller]
fn check(input: &Input, annotations: u64, expected: &[(Category, u64, &str)]) {
    let (omitted, found) = read(input);
    let list = omitted.list();
    assert_eq!(
        (list.len(), found),
        (expected.len(), annotations),
        "{list:?}"
    );
    for (omission, (what, count, words)) in list.iter().zip(expected) {
        assert_eq!((omission.what, omission.count), (*what, *count), "{list:?}");
        assert!(
            omission
                .examples
                .iter()
                .any(|example| example.contains(words)),
            "{words:?} not in {list:?}"
        );
    }
}

#[test]
fn rows_that_lose_their_columns() {
    use Category::{NoAnnotations, UnknownColumns, UnreadBoxes};
    let via = "filename,file_size,marks\na.png,10,\"{\"\"x\"\":1}\"\nb.png,10,{}\n";
    check(
        &Input::file("via.csv", via),
        0,
        &[
            (UnknownColumns, 2, "line 2: file_size, marks"),
            (NoAnnotations, 1, "2 samples"),
        ],
    );
    check(
        &Input::file(
            "c.csv",
            "image,class,rect,boxes2\na.png,dent,1,2\na.png,dent,3,4\n",
        ),
        2,
        &[(UnreadBoxes, 2, "rect, boxes2")],
    );
    let hf = "{\"file_name\": \"a.png\", \"objects\": {\"count\": [1]}}\n";
    check(
        &Input::file("hf.jsonl", hf),
        0,
        &[
            (UnknownColumns, 1, "record 1: objects"),
            (NoAnnotations, 1, ""),
        ],
    );
    let mapped = "图片,等级\na.png,划痕\n";
    check(
        &Input::file("m.csv", mapped).column("sample_path", "图片"),
        0,
        &[(UnknownColumns, 1, "等级"), (NoAnnotations, 1, "")],
    );
    check(
        &Input::file("ok.csv", "image,class,x,y,w,h,who\na.png,dent,1,2,3,4,me\n"),
        1,
        &[],
    );
    // An image without marks among others is no mistake.
    check(
        &Input::file("ok.csv", "image,class\na.png,dent\nb.png,\n"),
        1,
        &[],
    );
}

#[test]
fn empty_sets() {
    let coco = r#"{"info": {"year": 2026}, "licenses": [], "images": [], "annotations": [], "categories": []}"#;
    check(
        &Input::file("e.json", coco),
        0,
        &[
            (Category::NoAnnotations, 1, "0 samples"),
            (Category::UnreadMembers, 1, "info"),
        ],
    );
    check(
        &Input::file("e.csv", "image,class\n"),
        0,
        &[(Category::NoAnnotations, 1, "0 samples")],
    );
}

#[test]
fn tasks_of_label_studio() {
    let result = r#"[{"original_width": 10, "original_height": 10, "type": "rectanglelabels",
                      "value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": ["a"]}}]"#;
    let task = |members: &str| {
        Input::file(
            "t.json",
            format!(r#"[{{"id": 1, "data": {{"image": "a.png"}}, {members}}}]"#),
        )
    };
    check(
        &task(&format!(
            r#""completions": [{{"id": 1, "result": {result}}}]"#
        )),
        1,
        &[],
    );
    for word in ["skipped", "was_cancelled"] {
        let skipped = task(&format!(
            r#""annotations": [{{"id": 1, "{word}": true, "result": {result}}}]"#
        ));
        check(
            &skipped,
            0,
            &[
                (Category::NoAnnotations, 1, ""),
                (Category::SkippedTasks, 1, "task 0 (id 1)"),
            ],
        );
    }
    let predicted = task(&format!(
        r#""annotations": [{{"id": 1, "result": {result}}}], "predictions": [{{"result": {result}}}]"#
    ));
    check(&predicted, 1, &[(Category::Predictions, 1, "task 0")]);
    check(&predicted.column("predictions", "true"), 2, &[]);
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02";

#[test]
fn linked_folders_and_files_that_a_format_does_not_read() {
    let elsewhere = Input::folder(&[("a.txt", b"0 0.5 0.5 0.1 0.1\n")]);
    let yolo = Input::folder(&[
        ("data.yaml", b"names: [a]\n"),
        ("images/a.png", PNG),
        ("notes.md", b"x"),
    ])
    .format("yolo");
    symlink(elsewhere.root.path(), yolo.root.path().join("labels")).unwrap();
    check(
        &yolo,
        0,
        &[
            (Category::NoAnnotations, 1, ""),
            (Category::LinkedFolders, 1, "labels -> "),
            (Category::UnreadFiles, 1, "notes.md"),
        ],
    );
    let xml = b"<annotation><filename>a.png</filename><object><name>a</name></object></annotation>";
    let voc = Input::folder(&[
        ("Annotations/a.xml", xml),
        ("JPEGImages/a.png", PNG),
        ("SegmentationClass/a.png", PNG),
    ]);
    check(
        &voc,
        1,
        &[(Category::UnreadFiles, 1, "SegmentationClass/a.png")],
    );
}

#[test]
fn a_link_out_of_the_folder_is_refused_and_nothing_of_it_is_shown() {
    let outside = Input::file("secret", "root:*:20228:0:99999:7:::\n");
    let files: [(&str, &[u8]); 3] = [
        ("data.yaml", b"names: [a]\n"),
        ("labels/a.txt", b"0 0.5 0.5 0.1 0.1\n"),
        ("images/a.png", PNG),
    ];
    for link in ["labels/b.txt", "sizes.csv", "classes.yaml"] {
        let yolo = Input::folder(&files).format("yolo");
        symlink(&outside.path, yolo.root.path().join(link)).unwrap();
        std::fs::hard_link(
            yolo.root.path().join("images/a.png"),
            yolo.root.path().join("images/b.png"),
        )
        .unwrap();
        let fault = yolo.read().err().unwrap();
        assert_eq!(fault.code, Code::Integrity, "{link}: {fault}");
        assert!(
            fault.message.contains(link) && fault.message.contains("leaves the directory"),
            "{fault}"
        );
        assert!(!fault.message.contains("root:"), "{fault}");
    }
    // One that stays inside is read.
    let yolo = Input::folder(&files).format("yolo");
    symlink("a.txt", yolo.root.path().join("labels/c.txt")).unwrap();
    std::fs::hard_link(
        yolo.root.path().join("images/a.png"),
        yolo.root.path().join("images/c.png"),
    )
    .unwrap();
    check(&yolo, 2, &[]);
}
