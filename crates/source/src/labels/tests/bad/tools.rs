//! Faults of Label Studio, Pascal VOC and YOLO.

use super::*;

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
