//! Every fault of every format: what is said, and that nothing gets through.

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
fn tables() {
    let latin = b"path,class\na.png,caf\xe9\n".to_vec();
    for (text, said) in [
        (
            latin,
            "invalid UTF-8): line 2: byte 8 of the record is not UTF-8",
        ),
        (
            b"path,caf\xe9\na,1\n".to_vec(),
            "the header: byte 7 of the record is not UTF-8",
        ),
        (
            b"path,class\na.png,dent,x\n".to_vec(),
            "column count differs from the header's): line 2: it has 3 columns, the header has 2",
        ),
        (
            b"path,class\n\n\na.png\n".to_vec(),
            "line 4: it has 1 columns",
        ),
        (
            b"path,class\r\na,x\r\nb\r\nc,x\r\n".to_vec(),
            "line 3: it has 1 columns",
        ),
        (
            b"path,class\r\n\r\n\"a\r\na\",x\r\nb".to_vec(),
            "line 5: it has 1 columns",
        ),
        (
            b"a.png,dent,1\n".to_vec(),
            "no column holds the sample's path; the header has a.png, dent, 1",
        ),
        (b"".to_vec(), "it is empty; a header is needed"),
        (
            b"path,path\n".to_vec(),
            "the header names the column \"path\" twice",
        ),
        (
            b"path,x,y,width,height\n".to_vec(),
            "whether width and height are the box's or the image's is not clear",
        ),
        (
            b"path,x,y,w,h\na,NaN,1,1,1\n".to_vec(),
            "of x, y and w, h (or x2, y2) only some are there",
        ),
        (b"path,x,y,w,h\na,1,1,1e999,1\n".to_vec(), "w is \"1e999\""),
        (
            b"path;x;y;w;h\na;1,5;1;1;1\n".to_vec(),
            "x is \"1,5\", not a number",
        ),
        (
            b"path,x,y,w,h\na,1,1,0,1\n".to_vec(),
            "zero or negative box): line 2",
        ),
        (
            b"path,x,y,x2,y2\na,5,5,4,9\n".to_vec(),
            "the box is -1 wide and 4 high",
        ),
        (b"path,x,y,w,h\na,1,1,,1\n".to_vec(), "only some are there"),
        (
            b"path,x,y,w,h,width,height\na,1,1,20,1,10,10\n".to_vec(),
            "box outside its image): line 2",
        ),
        (
            b"path,x,y,w,h,width,height\na,1,1,2,1,10,10\na,,,,,11,10\n".to_vec(),
            "records contradict each other): line 3: the width of \"a\" is 11 here and 10 before",
        ),
        (
            b"path,split\na,train\na,val\n".to_vec(),
            "line 3: \"a\" is in the split \"val\" here and in \"train\" before",
        ),
        (
            b"path,width,class\na,1.5,x\n".to_vec(),
            "width is 1.5, not a number of pixels",
        ),
        (b"path,class\n,dent\n".to_vec(), "it names no sample"),
        (
            b"path,class\n../a,dent\n".to_vec(),
            "path not allowed): line 2",
        ),
        (b"path,class\na,de\0nt\n".to_vec(), "holds NULs"),
        (
            b"path,class,id\na,x,1\nb,x,1\n".to_vec(),
            "duplicate annotation id): line 3: its id is that of line 2 already",
        ),
        (
            b"path,class,class_id\na,x,1\nb,y,1\n".to_vec(),
            "duplicate class): line 3: class 1 is \"x\" already",
        ),
        (
            b"path,class,class_id\na,x,1\nb,x,2\n".to_vec(),
            "the name \"x\" belongs to class 1 already",
        ),
        (
            b"path,class_id\na,x\n".to_vec(),
            "class_id is \"x\", not a whole number",
        ),
        (
            b"path,kind\na,boxy\n".to_vec(),
            "the kind \"boxy\" is none of bbox",
        ),
        (b"path,attrs,class\na,{1,x\n".to_vec(), "malformed): line 2"),
        (
            b"path;attrs;class\na;[1];x\n".to_vec(),
            "attrs is not a JSON object",
        ),
        (
            [b"path,class\na,\"".to_vec(), vec![b'x'; 6 << 20]].concat(),
            "line 2: the row is too large: a quote may be open",
        ),
    ] {
        check(
            &Input::file("a.csv", text),
            &["a.csv (csv, guessed): ", said],
        );
    }
    check(
        &Input::file("a.csv", "path,c\n").column("class", "label"),
        &["there is no column \"label\" for class; the header has path, c"],
    );
    let large = format!(
        "{{\"path\":\"a\",\"z\":\"{}\"}}",
        "x".repeat(LABEL_RECORD_BYTES_MAX)
    );
    for (text, said) in [
        (
            b"{\"path\":\"a\",\"x\":1,\"y\":1,\"w\":\"wide\",\"h\":1}\n".to_vec(),
            "record 1: w is \"wide\", not a number",
        ),
        (b"{\"path\":\"a\"}\n[]\n".to_vec(), "wrong shape): record 2"),
        (
            b"{\"path\":\"a\",\"x\":NaN}\n".to_vec(),
            "record 1: it holds NaN",
        ),
        (b"{\"path\":7}\n".to_vec(), "sample_path is 7, not text"),
        (b"{\"path\":\"a\"\n".to_vec(), "cut off"),
        (b"{\"path\":\"caf\xe9\"}\n".to_vec(), "invalid UTF-8): "),
        (large.into_bytes(), "record too large): record 1"),
    ] {
        check(
            &Input::file("a.jsonl", text),
            &["a.jsonl (jsonl, guessed): ", said],
        );
    }
}

#[test]
fn label_studio() {
    let region = |value: &str| {
        format!(
            r#"[{{"id":1,"data":{{"image":"a.png"}},"annotations":[{{"id":1,"result":[{{"type":"rectanglelabels","original_width":10,"original_height":10,"value":{value}}}]}}]}}]"#
        )
    };
    let task = r#"{"id":1,"data":{"image":"a.png"},"annotations":[{"id":5,"result":[]}]}"#;
    for (text, said) in [
        (
            region(r#"{"x":0,"y":0,"width":-1,"height":5}"#),
            "zero or negative box): task 0 (id 1) annotations[0] result[0]: ",
        ),
        (
            region(r#"{"x":90,"y":0,"width":50,"height":5}"#),
            "box outside its image",
        ),
        (
            region(r#"{"x":90,"y":0,"width":50}"#),
            "its height is missing, not a number",
        ),
        (
            region(r#"{"x":0,"y":0,"width":5,"height":5,"rectanglelabels":"dent"}"#),
            "its rectanglelabels is not a list of names",
        ),
        (
            region(r#"{"x":0,"y":0,"width":5,"height":5,"rectanglelabels":[""]}"#),
            "the class's name is empty",
        ),
        (
            region(r#"{"x":1e999,"y":0,"width":5,"height":5}"#),
            "it holds 1e999",
        ),
        (
            region("1").replace("original_width", "w"),
            "wrong shape): task 0 (id 1) annotations[0] result[0]",
        ),
        (
            region(r#"{"x":0,"y":0,"width":5,"height":5}"#).replace("original_width", "w"),
            "image size unknown",
        ),
        (
            format!(
                "[{task},{}]",
                task.replace("a.png", "b.png").replace('5', "6")
            ),
            "duplicate image id): task 1 (id 1)",
        ),
        (
            format!(
                "[{task},{}]",
                task.replace("\"id\":1", "\"id\":2").replace('5', "6")
            ),
            "duplicate image path): task 1 (id 2)",
        ),
        (
            format!(
                "[{task},{}]",
                task.replace("\"id\":1", "\"id\":2")
                    .replace("a.png", "b.png")
            ),
            "duplicate annotation id): task 1 (id 2) annotations[0]",
        ),
        (
            r#"[{"id":1,"image":"a.png","label":[]}]"#.into(),
            "it has no data; export from Label Studio as JSON, not as JSON-MIN",
        ),
        (
            r#"[{"id":1,"data":{"text":"a"}}]"#.into(),
            "its data names no image",
        ),
        (
            r#"[{"id":1,"data":{"image":"a"},"annotations":{}}]"#.into(),
            "its annotations is not a list",
        ),
        (
            r#"[{"id":1,"data":{"image":"a\u0000"}}]"#.into(),
            "NUL in text): task 0",
        ),
        (r#"[{"id":1"#.into(), "cut off"),
    ] {
        check(
            &Input::file("a.json", text),
            &["a.json (label_studio, guessed): ", said],
        );
    }
    check(
        &Input::file("a.json", "{}").format("label_studio"),
        &["(label_studio, as asked): ", "a list of tasks is expected"],
    );
}

#[test]
fn voc() {
    let object = |name: &str, edges: [&str; 4]| {
        let [a, b, c, d] = edges;
        format!(
            "<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        )
    };
    let xml = |objects: &str| {
        format!("<annotation><filename>a.png</filename><size><width>9</width><height>9</height></size>{objects}</annotation>").into_bytes()
    };
    for (text, said) in [
        (
            xml(&object("dent", ["5", "5", "2", "9"])),
            "zero or negative box): a.xml object[0]: the box is -2 wide and 5 high",
        ),
        (
            xml(&object("dent", ["1", "1", "20", "9"])),
            "box outside its image): a.xml object[0]",
        ),
        (
            xml(&object("dent", ["nan", "1", "2", "2"])),
            "not a finite number): a.xml object[0]: its xmin is nan",
        ),
        (
            xml(&object("dent", ["", "1", "2", "2"])),
            "its xmin is \"\", not a number",
        ),
        (
            xml(&object("", ["1", "1", "2", "2"])),
            "the class's name is empty",
        ),
        (xml("<object/>"), "it has no name"),
        (
            b"<annotation><size/></annotation>".to_vec(),
            "it has no filename",
        ),
        (b"<html/>".to_vec(), "its root is <html>, not <annotation>"),
        (b"<annotation><filename>a".to_vec(), "malformed): a.xml"),
        (
            b"<annotation><filename>a\0</filename></annotation>".to_vec(),
            "NUL in text): a.xml",
        ),
        (
            b"<annotation><filename>caf\xe9</filename></annotation>".to_vec(),
            "invalid UTF-8): ",
        ),
        (
            b"<annotation><filename>../a</filename></annotation>".to_vec(),
            "path not allowed): a.xml",
        ),
        (
            [b"<annotation>".to_vec(), vec![b' '; 5 << 20]].concat(),
            "record too large): a.xml",
        ),
    ] {
        check(
            &Input::folder(&[("a.xml", &text)]),
            &["(voc, guessed): 1 record refused", said],
        );
    }
    check(
        &Input::folder(&[("a.xml", &xml("")), ("b.xml", &xml(""))]),
        &["duplicate image path): ", "\"a.png\" was named before"],
    );
    check(
        &Input::folder(&[("a.txt", b"")]).format("voc"),
        &["the folder holds no XML file"],
    );
    check(
        &Input::file("a.xml", xml("")).format("voc"),
        &["Pascal VOC labels are a folder"],
    );
}

#[test]
fn yolo() {
    let image = png(100, 100);
    let long = b"0 ".repeat(3 << 20);
    for (text, said) in [
        (
            &b"0 0.5 0.5 0 0.1"[..],
            "zero or negative box): a.txt line 1",
        ),
        (
            b"\n0 0.95 0.5 0.2 0.1",
            "box outside its image): a.txt line 2: 20 × 10 at 85, 45 reaches out of \"a.png\"",
        ),
        (b"0 320 200 50 50", "box outside its image"),
        (
            b"5 0.5 0.5 0.1 0.1",
            "unknown class): a.txt line 1: class 5 is not in the list of classes",
        ),
        (
            b"dent 0.5 0.5 0.1 0.1",
            "its class is \"dent\", not a whole number",
        ),
        (b"0 0.5 nan 0.1 0.1", "not a finite number): a.txt line 1"),
        (b"0 0.5 0,5 0.1 0.1", "it holds \"0,5\", not a number"),
        (
            b"0 0.5 0.5",
            "wrong shape): a.txt line 1: 2 numbers follow the class",
        ),
        (b"0 .5 .5 .1 .1\0", "NUL in text"),
        (b"0 .5 .5 .1 .1 \xff", "invalid UTF-8"),
        (&long, "record too large): a.txt line 1"),
    ] {
        check(
            &Input::folder(&[("classes.txt", b"dent"), ("a.png", &image), ("a.txt", text)]),
            &["(yolo, guessed): ", said],
        );
    }
    let good = b"0 .5 .5 .1 .1";
    for (files, said) in [
        (
            &[("a.png", &image[..]), ("a.txt", good)][..],
            "YOLO labels without class names",
        ),
        (
            &[("classes.txt", b"dent"), ("a.txt", good)],
            "image size unknown): a.txt",
        ),
        (
            &[
                ("classes.txt", b"dent"),
                ("a.txt", good),
                ("a.jpg", b"no image"),
            ],
            "image size unknown): a.txt",
        ),
        (
            &[
                ("classes.txt", b"dent\ndent"),
                ("a.txt", good),
                ("a.png", &image),
            ],
            "duplicate class): classes.txt: the name \"dent\"",
        ),
        (
            &[
                ("classes.txt", b"dent\n\nx"),
                ("a.txt", good),
                ("a.png", &image),
            ],
            "the class's name is empty",
        ),
        (
            &[
                ("data.yaml", b"names: [a]\nnc: 2"),
                ("a.txt", good),
                ("a.png", &image),
            ],
            "nc is 2, but there are 1 names",
        ),
        (
            &[
                ("classes.txt", b"dent"),
                ("sizes.csv", b"path,width,height\na.png,x,1\n"),
            ],
            "malformed): sizes.csv row 1",
        ),
        (
            &[("classes.txt", b"caf\xe9"), ("a.txt", good)],
            "invalid UTF-8): ",
        ),
    ] {
        check(&Input::folder(files), &[said]);
    }
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
