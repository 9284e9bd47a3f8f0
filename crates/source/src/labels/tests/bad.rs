//! Every fault of every format: what is said, and that nothing gets through. Here COCO, and inputs
//! that are no labels; `tables` and `tools` have the others.

mod tables;
mod tools;

use super::*;
use base::fault::Code;
use base::limits::{LABEL_RECORD_BYTES_MAX, OFFENDERS_LISTED_MAX};

/// The input must be refused as `integrity`, with all of these in what is said.
fn check(input: &Input, said: &[&str]) {
    let fault = match input.read() {
        Err(fault) => fault,
        Ok(output) => unreachable!("taken, but {said:?} was expected: {output:?}"),
    };
    assert_eq!(fault.code, Code::Integrity, "{fault:?}");
    assert!(!fault.next.is_empty());
    for part in said {
        assert!(
            fault.message.contains(part),
            "{part:?} is not said by: {}",
            fault.message
        );
    }
}

/// A COCO file with one image and one class beside these.
fn coco_with(images: &str, annotations: &str, categories: &str) -> Input {
    let text = format!(
        r#"{{"annotations":[{annotations}],"images":[{{"id":1,"file_name":"a.png","width":100,"height":100}}{images}],
        "categories":[{{"id":1,"name":"dent"}}{categories}]}}"#
    );
    Input::file("a.json", text)
}

#[test]
fn coco_annotations() {
    let deep = "[".repeat(130) + &"]".repeat(130);
    let large = "x".repeat(LABEL_RECORD_BYTES_MAX);
    for (annotation, said) in [
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[NaN,0,1,1]}"#,
            "1 × not a finite number): annotations[0]: it holds NaN",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":-Infinity}"#,
            "not a finite number): annotations[0]: it holds -Infinity",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[0,0,1e400,1]}"#,
            "it holds 1e400",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[0,0,0,5]}"#,
            "zero or negative box): annotations[0] (id 9): the box is 0 wide and 5 high",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[5,5,3,-2]}"#,
            "the box is 3 wide and -2 high",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[95,0,10,10]}"#,
            "box outside its image): annotations[0] (id 9): 10 × 10 at 95, 0 reaches out of \"a.png\" (100 × 100)",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"bbox":[-3,0,10,10]}"#,
            "box outside its image",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":8,"bbox":[0,0,1,1]}"#,
            "unknown class): annotations[0] (id 9): class 8 is not in the list",
        ),
        (
            r#"{"id":9,"image_id":5,"category_id":1,"bbox":[0,0,1,1]}"#,
            "orphan annotation): annotations[0] (id 9): there is no image with the id 5",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1},{"id":9,"image_id":1,"category_id":1}"#,
            "duplicate annotation id): annotations[1] (id 9): its id is that of annotations[0] (id 9) already",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"note":"a\u0000b"}"#,
            r"NUL in text): annotations[0]: it holds a NUL character (\u0000)",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":1,"note":"\ud800"}"#,
            "invalid UTF-8): annotations[0]: it holds half of a surrogate pair",
        ),
        (
            r#"{"id":9,"image_id":1,"category_id":"x"}"#,
            "wrong shape): annotations[0] (id 9): its category_id is not a whole number",
        ),
        (r#"{"id":9,"category_id":1}"#, "its image_id is not"),
        (r#"{"id":[9],"image_id":1}"#, "its id is not"),
        (
            r#"{"id":9,"image_id":1,"bbox":[1,2,3]}"#,
            "its bbox is not a list of four numbers",
        ),
        (
            r#"{"id":9,"image_id":1,"bbox":"1,2,3,4"}"#,
            "its bbox is not a list of four numbers",
        ),
        (
            r#"{"id":9,"image_id":1,"segmentation":[[1,2,3]]}"#,
            "its segmentation is not a list of rings",
        ),
        (
            r#"{"id":9,"image_id":1,"keypoints":[1,2]}"#,
            "its keypoints are not",
        ),
        (
            r#"{"id":9,"image_id":1,"id":9}"#,
            "the key \"id\" comes twice",
        ),
        (r#"{"id":9,"image_id":1,}"#, "malformed): annotations[0]: "),
        (r#"7"#, "wrong shape): annotations[0]: "),
        (
            &format!(r#"{{"id":9,"image_id":1,"a":{deep}}}"#),
            "nested too deep): annotations[0]: it is nested deeper than 128",
        ),
        (
            &format!(r#"{{"id":9,"image_id":1,"a":"{large}"}}"#),
            "record too large): annotations[0]: it is larger than 4194304 bytes",
        ),
    ] {
        check(
            &coco_with("", annotation, ""),
            &["a.json (coco, guessed): 1 record refused (1 × ", said],
        );
        // The next record is still read.
        let two = format!(r#"{annotation},{{"id":77,"image_id":1,"category_id":99}}"#);
        check(
            &coco_with("", &two, ""),
            &[
                "2 records refused",
                said.split_once("): ").map_or(said, |(_, place)| place),
            ],
        );
    }
}

#[test]
fn coco_images_classes_and_documents() {
    for (images, categories, said) in [
        (
            r#",{"id":1,"file_name":"b.png"}"#,
            "",
            "duplicate image id): images[1] (id 1): another image has its id already",
        ),
        (
            r#",{"id":2,"file_name":"a.png"}"#,
            "",
            "duplicate image path): images[1] (id 2): \"a.png\" was named before",
        ),
        (
            r#",{"id":2,"file_name":"../a.png"}"#,
            "",
            "path not allowed): images[1] (id 2): path \"../a.png\" is not allowed",
        ),
        (
            r#",{"id":2,"file_name":"/data/a.png"}"#,
            "",
            "it is absolute",
        ),
        (
            r#",{"id":2,"file_name":"b.png","width":-1,"height":5}"#,
            "",
            "its width is -1, not a number of pixels",
        ),
        (r#",{"id":2}"#, "", "its file_name is not a string"),
        (
            r#",{"file_name":"b.png"}"#,
            "",
            "wrong shape): images[1]: its id is not",
        ),
        (
            "",
            r#",{"id":2,"name":"dent"}"#,
            "duplicate class): categories[1]: the name \"dent\" belongs to class 1 already, here to 2",
        ),
        (
            "",
            r#",{"id":1,"name":"stain"}"#,
            "duplicate class): categories[1]: class 1 is \"dent\" already",
        ),
        ("", r#",{"id":2,"name":""}"#, "the class's name is empty"),
        ("", r#",{"id":2}"#, "its name is not a string"),
    ] {
        check(
            &coco_with(images, "", categories),
            &["1 record refused", said],
        );
    }
    // A refused image does not make orphans of its annotations.
    check(
        &coco_with(r#",{"id":2,"file_name":""}"#, r#"{"image_id":2}"#, ""),
        &["1 record refused (1 × path not allowed)"],
    );
    for (text, said) in [
        (
            r#"{"images":[{"id":1"#,
            "malformed JSON at byte 18: the file ends within a value: it is cut off",
        ),
        (
            r#"{"images":[]"#,
            "the file ends where ',' is expected: it is cut off",
        ),
        (r#"{"images":[]}x"#, "something follows the end"),
        (
            r#"{"images":[],"images":[]}"#,
            "the list \"images\" comes twice",
        ),
        (r#"{"images":{}}"#, "\"images\" is not a list"),
        (
            r#"{"images":[{"id":1,"file_name":"a"},]}"#,
            "']' right after a comma",
        ),
        (
            r#"{"annotations":[]}"#,
            "it has no list \"images\", so it is not COCO",
        ),
        (r#"{"a" 1}"#, "':' expected, '1' found"),
    ] {
        check(&Input::file("a.json", text), &[said]);
    }
    let mut latin = br#"{"images":[{"id":1,"file_name":""#.to_vec();
    latin.extend(b"caf\xe9.png\"}]}");
    check(
        &Input::file("a.json", latin),
        &["invalid UTF-8): images[0]: byte 24 of the record is not UTF-8"],
    );
    check(
        &Input::file("a.json", b"\xff\xfe{\0}\0").format("coco"),
        &["it has no list \"images\""],
    );
}

#[test]
fn the_first_offenders_are_listed_and_all_are_counted() {
    let bad: Vec<String> = (0..50)
        .map(|n| {
            format!(
                r#"{{"id":{n},"image_id":1,"category_id":1,"bbox":[0,0,{},1]}}"#,
                -n
            )
        })
        .collect();
    let input = coco_with("", &(bad.join(",") + r#",{"id":7,"image_id":3}"#), "");
    let fault = input.read().unwrap_err();
    assert!(fault.message.contains("52 records refused (50 × zero or negative box, 1 × duplicate annotation id, 1 × orphan annotation): "));
    assert_eq!(
        fault.message.matches("the box is").count(),
        OFFENDERS_LISTED_MAX
    );
    assert!(
        fault.message.ends_with(
            "annotations[19] (id 19): the box is -19 wide and 1 high; and 30 more; \
             annotations[50] (id 7): its id is that of annotations[7] (id 7) already; \
             annotations[50] (id 7): there is no image with the id 3"
        ),
        "{}",
        fault.message
    );
    assert!(
        fault.next.contains("above zero")
            && fault.next.ends_with("if it is not coco, name the format"),
        "{}",
        fault.next
    );
}

#[test]
fn what_is_no_labels_at_all() {
    for (input, said) in [
        (Input::file("a.json", "  "), "it is empty"),
        (Input::file("a.txt", "hello"), "it is not JSON"),
        (Input::file("a.xml", "<a/>"), "it is one XML file"),
        (Input::file("a.json", r#"{"a":1}"#), "it is a JSON object"),
        (Input::folder(&[("a.png", b"")]), "the folder holds neither"),
    ] {
        check(
            &input,
            &["the format of the labels", "cannot be guessed", said],
        );
    }
    for (input, said) in [
        (
            Input::file("a.zip", b"PK\x03\x04abc"),
            "are an archive (or an Excel workbook), which is not read",
        ),
        (
            Input::file("a.xml", "<annotation/>"),
            "are one file of Pascal VOC, which is not read",
        ),
    ] {
        check(&input, &[said]);
    }
    let fault = |input: &Input| input.read().unwrap_err();
    let gone = Input {
        path: "/nonexistent/labels.json".into(),
        ..Input::file("a", "")
    };
    assert_eq!(fault(&gone).code, Code::NotFound);
    assert_eq!(fault(&gone.format("coco")).code, Code::NotFound);
    assert_eq!(
        fault(&Input::file("a.json", "[]").format("cocoa")).code,
        Code::Usage
    );
    assert_eq!(
        fault(&Input::file("a.csv", "path\n").column("colour", "x")).code,
        Code::Usage
    );
    assert_eq!(
        fault(&Input::file("a.json", "[]").column("class", "x")).code,
        Code::Usage
    );
    assert_eq!(
        fault(&Input::file("a.json", "[]").column("predictions", "yes")).code,
        Code::Usage
    );
}
