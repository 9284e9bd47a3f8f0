//! Pascal VOC as its writers write it.

use super::*;

/// One Pascal VOC file.
fn voc_xml(before: &str, objects: &str) -> Vec<u8> {
    format!(
        "<annotation><filename>a.jpg</filename>{before}<size><width>640</width><height>480</height></size>{objects}</annotation>"
    )
    .into_bytes()
}

fn voc_box(edges: [&str; 4]) -> String {
    let [a, b, c, d] = edges;
    format!(
        "<object><name>划痕</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
    )
}

#[test]
fn voc_boxes_count_from_where_their_writer_does() {
    let unknown = "<path>D:\\数据\\a.jpg</path><source><database>Unknown</database></source>";
    let kit = "<source><database>The VOC2007 Database</database></source>";
    let ints = ["64", "96", "256", "288"];
    for (before, edges, base, expected, said) in [
        (
            unknown,
            ints,
            None,
            "64,96,192,192",
            "--voc-base 0-exclusive",
        ),
        (
            unknown,
            ["0.0", "0.0", "640.0", "480.0"],
            None,
            "0,0,640,480",
            "a box begins at 0",
        ),
        (
            "",
            ["10.5", "20.25", "40.75", "60.0"],
            None,
            "10.5,20.25,30.25,39.75",
            "have fractions",
        ),
        (kit, ints, None, "63,95,193,193", "--voc-base 1-inclusive"),
        ("", ints, None, "63,95,193,193", "--voc-base 1-inclusive"),
        (
            "",
            ["0", "5", "639", "9"],
            None,
            "0,5,640,5",
            "--voc-base 0-inclusive",
        ),
        (kit, ints, Some("0"), "64,96,192,192", ""),
        (unknown, ints, Some("1"), "63,95,193,193", ""),
        (unknown, ints, Some("1-exclusive"), "63,95,192,192", ""),
    ] {
        let mut input = Input::folder(&[("a.xml", &voc_xml(before, &voc_box(edges)))]);
        input.options.voc_base = base.map(str::to_owned);
        assert_eq!(
            input.read().unwrap().rows(),
            [format!("a.jpg 0 bbox {expected}")],
            "{before} {edges:?}"
        );
        let notes = notes(&input, Category::Inferred);
        assert_eq!(notes.len(), usize::from(base.is_none()), "{notes:?}");
        assert!(
            notes.iter().all(|note| note.contains(said)),
            "{said:?} is not in {notes:?}"
        );
    }
    let mut input = Input::folder(&[("a.xml", &voc_xml("", ""))]);
    input.options.voc_base = Some("2".into());
    assert_eq!(input.read().unwrap_err().code, base::fault::Code::Usage);
}

#[test]
fn voc_turned_boxes_and_polygons() {
    let turned = "<object><type>robndbox</type><name>a</name><robndbox><cx>100.0</cx><cy>120.0</cy><w>40.0</w><h>20.0</h><angle>0.5</angle></robndbox></object>";
    let at_the_edge = turned.replace("100.0", "5.0");
    let ring = "<x1>11</x1><y1>21</y1><x2>40</x2><y2>21</y2><x3>40</x3><y3>60</y3>";
    let polygon = voc_box(["11", "21", "40", "60"])
        .replace("</object>", &format!("<polygon>{ring}</polygon></object>"));
    let points = "<object><name>a</name><polygon><pt><x>1</x><y>2</y></pt><pt><x>3</x><y>2</y></pt><pt><x>3</x><y>4</y></pt></polygon></object>";
    let objects = format!("{turned}{at_the_edge}{polygon}{points}");
    let mut input = Input::folder(&[("a.xml", &voc_xml("", &objects))]);
    input.options.voc_base = Some("0".into());
    let output = input.read().unwrap();
    // Half sides of the upright box: (40 cos 0.5 + 20 sin 0.5) / 2 and (40 sin 0.5 + 20 cos 0.5) /
    // 2.
    assert_eq!(
        output.rows(),
        [
            "a.jpg 0 bbox 77.654093,101.635664,44.691813,36.728673",
            "a.jpg 0 bbox -17.345907,101.635664,44.691813,36.728673",
            "a.jpg 1 polygon 11,21,29,39",
            "a.jpg 0 polygon 1,2,2,2",
        ]
    );
    assert_eq!(
        output.geoms()[0],
        r#"{"cx":100.0,"cy":120.0,"w":40.0,"h":20.0,"angle":0.5}"#
    );
    assert_eq!(output.geoms()[2], "[[11.0,21.0,40.0,21.0,40.0,60.0]]");
    assert_eq!(output.attrs()[0], r#"{"type":"robndbox"}"#);
    input.options.voc_base = Some("1".into());
    let output = input.read().unwrap();
    assert_eq!(output.rows()[2], "a.jpg 1 polygon 10,20,30,40");
    assert_eq!(output.geoms()[2], "[[10.0,20.0,39.0,20.0,39.0,59.0]]");
    // A shape that is not read is reported.
    let other = "<object><name>a</name><ellipse><cx>1</cx></ellipse></object>";
    let input = Input::folder(&[("a.xml", &voc_xml("", other))]);
    assert_eq!(
        notes(&input, Category::UnreadBoxes),
        ["a.xml object[0]: ellipse"]
    );
}

#[test]
fn voc_images_are_found_beside_the_files() {
    let named = |filename: &str| {
        format!("<annotation><filename>{filename}</filename></annotation>").into_bytes()
    };
    for (xml, filename, image, path) in [
        ("xml/b.xml", "old name.jpg", "images/b.png", "images/b.png"),
        (
            "Annotations/b.xml",
            "b",
            "JPEGImages/b.JPG",
            "JPEGImages/b.JPG",
        ),
        (
            "set/Annotations/b.xml",
            "b.jpg",
            "set/JPEGImages/b.jpg",
            "set/JPEGImages/b.jpg",
        ),
        ("b.xml", "D:\\x\\b.jpg", "b.jpg", "b.jpg"),
        ("b.xml", "D:\\x\\b.jpg", "else.txt", "b.jpg"),
        ("train/b.xml", "b.jpg", "train/b.jpg", "train/b.jpg"),
        ("b.xml", "gone.jpg", "else/b.jpg", "gone.jpg"),
    ] {
        let input = Input::folder(&[(xml, &named(filename)), (image, b"")]);
        let samples = input.read().unwrap().sample_rows();
        assert!(
            samples[0].starts_with(&format!("{path} ")),
            "{filename} {image}: {samples:?}"
        );
        let is_as_named = filename == path || (xml == "train/b.xml") || filename == "gone.jpg";
        assert_eq!(
            notes(&input, Category::ChangedPaths).is_empty(),
            is_as_named,
            "{filename}"
        );
    }
    let files = [("a.xml", named("old.jpg")), ("a.png", Vec::new())];
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (*name, bytes.as_slice()))
        .collect();
    let input = Input::folder(&files).column("path_from", "record");
    assert_eq!(input.read().unwrap().sample_rows(), ["old.jpg - - -"]);
    let input = Input::folder(&files[..1]).column("path_from", "image");
    assert!(
        input
            .read()
            .unwrap_err()
            .message
            .contains("there is neither an image \"old.jpg\"")
    );
    let input = Input::folder(&[
        ("a.xml", b"<annotation><object/></annotation>"),
        ("a.png", b""),
    ]);
    assert!(
        input.read().unwrap_err().message.contains("it has no name"),
        "the image's name is that of the file"
    );
}

#[test]
fn xml_in_the_encodings_that_tools_declare() {
    let text = |encoding: &str, name: &str| {
        format!(
            "<?xml version='1.0' encoding='{encoding}'?><annotation><filename>{name}.jpg</filename></annotation>"
        )
    };
    let gbk = |text: &str| encoding_rs::GB18030.encode(text).0.into_owned();
    for (bytes, path) in [
        (text("utf8", "板").into_bytes(), "板"),
        (text("gb2312", "a").into_bytes(), "a"),
        (text("ISO-8859-1", "a").into_bytes(), "a"),
        (text("GBK", "板").into_bytes(), "板"),
        (gbk(&text("GBK", "板")), "板"),
        (gbk(&text("gb2312", "板")), "板"),
        (gbk(&text("utf-8", "缺陷板")), "缺陷板"),
        (b"<?xml version='1.0' encoding='latin1'?><annotation><filename>caf\xe9.jpg</filename></annotation>".to_vec(), "café"),
    ] {
        let input = Input::folder(&[("a.xml", &bytes)]);
        assert_eq!(input.read().unwrap().sample_rows(), [format!("{path}.jpg - - -")]);
    }
    let input = Input::folder(&[("a.xml", text("GBK", "板").as_bytes())]);
    assert!(notes(&input, Category::Inferred)[0].contains("is read as UTF-8"));
    let input = Input::folder(&[(
        "a.xml",
        b"<?xml version='1.0' encoding='klingon'?><annotation>\xe9</annotation>",
    )]);
    let message = input.read().unwrap_err().message;
    assert!(
        message.contains("declares the encoding \"klingon\", which is not known"),
        "{message}"
    );
}
