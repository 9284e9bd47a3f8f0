//! LabelMe, CVAT, Datumaro, VIA and masks.

use super::omitted::notes;
use super::*;
use crate::labels::png::tests::png as whole_png;
use base::omitted::Category;

const LABELME: &str = r#"{"version":"5.5.0","flags":{"重拍":false},"shapes":[
  {"label":"划痕","points":[[40.5,60.0],[10.0,20.0]],"group_id":null,"description":"","shape_type":"rectangle","flags":{},"mask":null},
  {"label":"划痕","points":[[100,100],[120,100],[110,130]],"group_id":3,"shape_type":"polygon","flags":{}},
  {"label":"划痕","points":[[200,100],[220,100],[210,130]],"group_id":3,"shape_type":"polygon","flags":{}},
  {"label":"孔","points":[[300,300],[303,304]],"group_id":null,"shape_type":"circle","flags":{"深":true}},
  {"label":"线","points":[[1,1],[9,9],[20,3]],"group_id":1,"shape_type":"linestrip","flags":{}},
  {"label":"孔","points":[[7,8]],"shape_type":"point"}],
 "imagePath":"..\\图像\\板1.png","imageData":"iVBORw0KGgo=","imageHeight":480,"imageWidth":640}"#;

#[test]
fn labelme() {
    let output = Input::file("a.json", LABELME).read().unwrap();
    assert_eq!((output.format, output.guessed), ("labelme", true));
    assert_eq!(output.class_names(), ["0=划痕", "1=孔", "2=线"]);
    assert_eq!(
        output.rows(),
        [
            "图像/板1.png 0 bbox 10,20,30.5,40",
            "图像/板1.png 1 other 295,295,10,10",
            "图像/板1.png 2 polyline 1,1,19,8",
            "图像/板1.png 1 point 7,8,-,-",
            "图像/板1.png 0 polygon 100,100,120,30",
        ]
    );
    assert_eq!(
        output.geoms()[4],
        "[[100.0,100.0,120.0,100.0,110.0,130.0],[200.0,100.0,220.0,100.0,210.0,130.0]]"
    );
    assert_eq!(
        output.attrs(),
        [
            "-",
            r#"{"flags":{"深":true}}"#,
            r#"{"group_id":1}"#,
            "-",
            r#"{"group_id":3}"#
        ]
    );
    assert_eq!(output.sample_rows(), ["图像/板1.png 640 480 -"]);
    assert!(!output.samples.contains("imageData"));
    // In a folder, the image beside the file counts; one bad file does not hide the others.
    let mut input = Input::folder(&[
        ("train/json/板1.json", LABELME.as_bytes()),
        ("train/images/板1.jpg", b""),
        (
            "train/json/b.json",
            b"{\"shapes\":[],\"imagePath\":\"b.png\"}",
        ),
        ("train/json/c.json", b"{\"shapes\":[{]}"),
        ("train/json/d.json", b"{}"),
    ]);
    let message = input.read().unwrap_err().message;
    assert!(
        message.contains("1 record refused (1 × malformed): train/json/c.json"),
        "{message}"
    );
    input.options.on_bad = Some("skip".into());
    assert_eq!(
        input.read().unwrap().sample_rows(),
        [
            "train/images/板1.jpg 640 480 train",
            "train/json/b.png - - train"
        ]
    );
    assert_eq!(notes(&input, Category::UnreadFiles), ["train/json/d.json"]);
}

#[test]
fn labelme_masks() {
    // Two columns and two rows of one bit: 10 / 11.
    let mask = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACAQAAAABazTCJAAAADElEQVR4nGNoYDgAAAJEAUHooQgHAAAAAElFTkSuQmCC";
    let text = format!(
        r#"{{"shapes":[{{"label":"a","points":[[1,1],[2,2]],"shape_type":"mask","mask":"{mask}"}},
        {{"label":"a","points":[[1,1],[2,2]],"shape_type":"mask","mask":"AAAA"}}],
        "imagePath":"a.png","imageHeight":3,"imageWidth":4}}"#
    );
    let mut input = Input::file("a.json", text);
    input.options.on_bad = Some("skip".into());
    let output = input.read().unwrap();
    assert_eq!(output.rows(), ["a.png 0 rle 1,1,2,2"]);
    assert_eq!(output.geoms(), [r#"{"size":[3,4],"counts":[4,2,2,1,3]}"#]);
    assert_eq!(notes(&input, Category::BadRecords).len(), 1);
}

const CVAT: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><task><name>产线3</name><labels><label><name>划痕</name><color>#fff</color><attributes></attributes></label><label><name>未用</name></label></labels></task></meta>
<image id="0" name="图像/板1.png" subset="Train" width="640" height="480">
 <box label="划痕" source="manual" occluded="0" xtl="10.50" ytl="20.00" xbr="40.00" ybr="60.00" z_order="0"><attribute name="严重">重</attribute></box>
 <box label="划痕" occluded="1" xtl="10" ytl="20" xbr="30" ybr="60" rotation="90.0" z_order="0"></box>
 <polygon label="划痕" occluded="0" points="1.0,2.0;30.0,2.0;30.0,20.0" z_order="1"></polygon>
 <mask label="划痕" occluded="0" rle="1, 1, 2" left="2" top="1" width="2" height="2" z_order="0"></mask>
 <ellipse label="划痕" occluded="0" cx="50.0" cy="50.0" rx="5.0" ry="9.0" z_order="0"></ellipse>
 <skeleton label="划痕"><points label="a" outside="0" occluded="0" points="1,2"/><points label="b" outside="1" occluded="0" points="0,0"/><points label="c" outside="0" occluded="1" points="5,8"/></skeleton>
 <tag label="划痕" source="manual"></tag>
</image>
<image id="1" name="图像/板2.png" width="640" height="480"></image>
</annotations>"#;

#[test]
fn cvat_images() {
    let output = Input::file("annotations.xml", CVAT).read().unwrap();
    assert_eq!((output.format, output.guessed), ("cvat", true));
    assert_eq!(output.class_names(), ["0=划痕", "1=未用"]);
    assert_eq!(
        output.rows(),
        [
            "图像/板1.png 0 bbox 10.5,20,29.5,40",
            "图像/板1.png 0 bbox 0,30,40,20",
            "图像/板1.png 0 polygon 1,2,29,18",
            "图像/板1.png 0 rle 3,1,1,1",
            "图像/板1.png 0 other 45,41,10,18",
            "图像/板1.png 0 keypoints 1,2,4,6",
            "图像/板1.png 0 class -,-,-,-",
        ]
    );
    let geoms = output.geoms();
    assert!(geoms[1].starts_with(r#"{"cx":20.0,"cy":40.0,"w":20.0,"h":40.0,"angle":1.57"#));
    // Column 3, row 1 of 640 × 480.
    assert_eq!(geoms[3], r#"{"size":[480,640],"counts":[1441,1,305758]}"#);
    assert_eq!(geoms[5], "[1.0,2.0,2.0,0.0,0.0,0.0,5.0,8.0,1.0]");
    let attrs = output.attrs();
    assert_eq!(
        attrs[0],
        r#"{"source":"manual","attributes":{"严重":"重"}}"#
    );
    assert_eq!(attrs[1], r#"{"occluded":"1"}"#);
    assert_eq!(attrs[5], r#"{"points":["a","b","c"]}"#);
    assert_eq!(
        output.sample_rows(),
        ["图像/板1.png 640 480 train", "图像/板2.png 640 480 -"]
    );
    // The same in a folder with its images.
    let input = Input::folder(&[
        ("annotations.xml", CVAT.as_bytes()),
        ("images/Train/图像/板1.png", b""),
        ("images/图像/板2.png", b""),
    ]);
    let output = input.read().unwrap();
    assert_eq!(output.format, "cvat");
    assert_eq!(
        output.sample_rows(),
        [
            "images/Train/图像/板1.png 640 480 train",
            "images/图像/板2.png 640 480 -"
        ]
    );
    for (change, with, said) in [
        ("<version>1.1", "<version>2.0", "version \"2.0\""),
        (
            "rle=\"1, 1, 2\"",
            "rle=\"1, 9\"",
            "does not fit its 2 × 2 pixels",
        ),
        ("<tag label", "<blob label", "no shape <blob>"),
        ("</annotations>", "", "cut off"),
    ] {
        let text = match change {
            "<tag label" => CVAT.replace("<tag ", "<blob ").replace("</tag>", "</blob>"),
            _ => CVAT.replace(change, with),
        };
        let message = Input::file("a.xml", text).read().unwrap_err().message;
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn cvat_tracks() {
    let text = r#"<annotations><version>1.1</version><meta><job><original_size><width>100</width><height>80</height></original_size>
        <labels><label><name>dent</name></label></labels></job></meta>
        <track id="4" label="dent" source="manual">
        <box frame="0" outside="0" occluded="0" keyframe="1" xtl="1" ytl="2" xbr="11" ybr="22" z_order="0"></box>
        <box frame="12" outside="0" occluded="1" keyframe="0" xtl="2" ytl="2" xbr="12" ybr="22" z_order="0"></box>
        <box frame="13" outside="1" occluded="0" keyframe="1" xtl="2" ytl="2" xbr="12" ybr="22" z_order="0"></box>
        </track></annotations>"#;
    let output = Input::file("a.xml", text).read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "frame_000000.PNG 0 bbox 1,2,10,20",
            "frame_000012.PNG 0 bbox 2,2,10,20"
        ]
    );
    assert_eq!(output.attrs()[1], r#"{"track":"4","occluded":"1"}"#);
    assert_eq!(output.sample_rows()[0], "frame_000000.PNG 100 80 -");
}

const DATUMARO: &str = r#"{"dm_format_version":"1.0","media_type":2,"infos":{},"categories":{"label":{"labels":[{"name":"划痕","parent":"","attributes":[]},{"name":"未用","parent":"","attributes":[]}],"attributes":["occluded"]}},
 "items":[{"id":"图像/板1","annotations":[{"id":1,"type":"bbox","attributes":{"occluded":false},"group":0,"label_id":0,"z_order":0,"bbox":[10.5,20.0,29.5,40.0]},
  {"id":2,"type":"polygon","attributes":{},"group":2,"label_id":0,"z_order":0,"points":[1,2,30,2,30,20]},
  {"id":3,"type":"label","attributes":{},"group":0,"label_id":0},
  {"id":4,"type":"mask","attributes":{},"group":0,"label_id":0,"rle":{"counts":"6230009","size":[5,6]}}],"attr":{"frame":0},"image":{"path":"图像/板1.png","size":[5,6]}},
  {"id":"图像/板2","annotations":[],"image":{"path":"图像/板2.png","size":[480,640]}}]}"#;

#[test]
fn datumaro() {
    // The boxes of the first image are larger than the size that its mask needs.
    let text = DATUMARO.replace("1.png\",\"size\":[5,6]", "1.png\",\"size\":[480,640]");
    let mut input = Input::file("datumaro.json", text);
    let message = input.read().unwrap_err().message;
    assert!(message.contains("its mask is 6 × 5"), "{message}");
    input.options.on_bad = Some("skip".into());
    let output = input.read().unwrap();
    assert_eq!((output.format, output.guessed), ("datumaro", true));
    assert_eq!(output.class_names(), ["0=划痕", "1=未用"]);
    assert_eq!(
        output.rows(),
        [
            "图像/板1.png 0 bbox 10.5,20,29.5,40",
            "图像/板1.png 0 polygon 1,2,29,18",
            "图像/板1.png 0 class -,-,-,-",
        ]
    );
    assert_eq!(
        output.attrs()[..2],
        [
            r#"{"id":1,"attributes":{"occluded":false}}"#,
            r#"{"id":2,"group":2}"#
        ]
    );
    assert_eq!(
        output.sample_rows(),
        ["图像/板1.png 640 480 -", "图像/板2.png 640 480 -"]
    );
    // A folder: a file a subset, and its images.
    let item = |id: &str, annotations: &str| {
        format!(
            r#"{{"categories":{{"label":{{"labels":[{{"name":"a"}}]}}}},"infos":{{}},"items":[{{"id":"{id}","annotations":[{annotations}]}}]}}"#
        )
    };
    let (train, other) = (
        item(
            "x/1",
            r#"{"type":"points","label_id":0,"points":[1,2,3,4],"visibility":[2,0]}"#,
        ),
        item("2", r#"{"type":"bbox","label_id":-1,"bbox":[1,2,3,4]}"#),
    );
    let input = Input::folder(&[
        ("annotations/Training.json", train.as_bytes()),
        ("annotations/line 7.json", other.as_bytes()),
        ("images/Training/x/1.JPG", b""),
        ("images/2.png", b""),
    ]);
    let output = input.read().unwrap();
    assert_eq!(
        output.sample_rows(),
        [
            "images/2.png - - line 7",
            "images/Training/x/1.JPG - - train"
        ]
    );
    assert_eq!(
        output.rows(),
        [
            "images/2.png - bbox 1,2,3,4",
            "images/Training/x/1.JPG 0 keypoints 1,2,-,-"
        ]
    );
}

#[test]
fn via_json() {
    let images = r#""板1.png10":{"filename":"板1.png","size":10,"file_attributes":{"line":"3"},"regions":[
        {"shape_attributes":{"name":"rect","x":1,"y":2,"width":3,"height":4},"region_attributes":{"defect":"划痕"}},
        {"shape_attributes":{"name":"polygon","all_points_x":[0,10,5],"all_points_y":[0,0,8]},"region_attributes":{"defect":"划痕","深":"1"}}]},
        "b.png-1":{"filename":"b.png","size":-1,"file_attributes":{},"regions":{"0":{"shape_attributes":{"name":"point","cx":1,"cy":2},"region_attributes":{}}}}"#;
    let expected = [
        "b.png - point 1,2,-,-",
        "板1.png 0 bbox 1,2,3,4",
        "板1.png 0 polygon 0,0,10,8",
    ];
    for text in [
        format!("{{{images}}}"),
        format!(
            r#"{{"_via_settings":{{"ui":{{}}}},"_via_img_metadata":{{{images}}},"_via_attributes":{{}}}}"#
        ),
    ] {
        let output = Input::file("via.json", text).read().unwrap();
        assert_eq!((output.format, output.guessed), ("via", true));
        assert_eq!(output.rows(), expected);
        assert_eq!(output.attrs()[2], r#"{"defect":"划痕","深":"1"}"#);
        assert!(output.samples.contains(r#""file_attributes":{"line":"3"}"#));
    }
}

#[test]
fn masks() {
    // 3 × 2 pixels: 0 7 7 / 0 0 7, grey.
    let grey = whole_png((3, 2), 8, 0, &[], &[0, 0, 7, 7, 0, 0, 0, 7]);
    let jpeg = b"\xff\xd8";
    let mut input = Input::folder(&[
        (
            "class_map.csv",
            "value,name\n0,background\n7,划痕\n9,未用\n".as_bytes(),
        ),
        ("train/images/a.jpg", jpeg),
        ("train/masks/a.png", &grey),
        ("val/masks/b.png", &grey),
        ("val/masks/cut.png", &grey[..grey.len() - 30]),
    ]);
    let message = input.read().unwrap_err().message;
    assert!(
        message.contains("1 record refused (1 × malformed): val/masks/cut.png"),
        "{message}"
    );
    input.options.on_bad = Some("skip".into());
    let output = input.read().unwrap();
    assert_eq!((output.format, output.guessed), ("masks", true));
    assert_eq!(output.class_names(), ["0=background", "7=划痕", "9=未用"]);
    assert_eq!(
        output.rows(),
        [
            "train/images/a.jpg 7 rle 1,0,2,2",
            "val/b.png 7 rle 1,0,2,2"
        ]
    );
    assert_eq!(output.geoms()[0], r#"{"size":[2,3],"counts":[2,1,1,2]}"#);
    assert_eq!(
        output.sample_rows(),
        ["train/images/a.jpg 3 2 train", "val/b.png 3 2 val"]
    );
    // Colours, by a palette or not; an interlaced image would do as well.
    let palette = whole_png((2, 1), 8, 3, &[0, 0, 0, 255, 0, 1], &[0, 0, 1]);
    let rgb = whole_png((2, 1), 8, 2, &[], &[0, 0, 0, 0, 255, 0, 1]);
    let input = Input::folder(&[
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\n孔:255,0,1::\n".as_bytes(),
        ),
        ("SegmentationClass/p.png", &palette),
        ("SegmentationClass/r.png", &rgb),
        ("JPEGImages/r.jpg", jpeg),
        ("ImageSets/Segmentation/train.txt", b"r\n"),
    ]);
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        ["JPEGImages/r.jpg 1 rle 1,0,1,1", "p.png 1 rle 1,0,1,1"]
    );
    assert_eq!(
        output.sample_rows(),
        ["JPEGImages/r.jpg 2 1 train", "p.png 2 1 -"]
    );
    // A value that the map does not have.
    let input = Input::folder(&[
        (
            "_classes.csv",
            b"Pixel Value, Class\n0, background\n1, dent\n",
        ),
        ("a_mask.png", &grey),
        ("a.jpg", jpeg),
    ]);
    let message = input.read().unwrap_err().message;
    assert!(message.contains("1 × unknown class"), "{message}");
    let fault = Input::folder(&[("masks/a.png", &grey)])
        .format("masks")
        .read()
        .unwrap_err();
    assert!(fault.next.contains("class_map.csv"), "{}", fault.next);
}

#[test]
fn inputs_are_named_as_what_they_are() {
    for (name, text, said) in [
        (
            "r.json",
            r#"[{"image_id":1,"category_id":1,"bbox":[1,2,3,4],"score":0.9}]"#,
            "a list of COCO results",
        ),
        (
            "1.json",
            r#"{"id":1,"task":{"id":2},"result":[],"completed_by":1}"#,
            "one annotation of Label Studio",
        ),
        (
            "a.xml",
            "<annotation><filename>a.png</filename></annotation>",
            "one file of Pascal VOC",
        ),
        ("a.parquet", "PAR1", "are Parquet"),
    ] {
        let message = Input::file(name, text).read().unwrap_err().message;
        assert!(message.contains(said), "{message}");
    }
    // Also where another format is asked for.
    let fault = Input::file("a.json", LABELME)
        .format("coco")
        .read()
        .unwrap_err();
    assert!(
        fault
            .next
            .contains("the labels look like labelme: --format labelme"),
        "{}",
        fault.next
    );
    let fault = Input::file(
        "a.json",
        r#"[{"image_id":1,"category_id":1,"bbox":[1,2,3,4],"score":0.9}]"#,
    )
    .format("label_studio")
    .read()
    .unwrap_err();
    assert!(
        fault.next.contains("a list of COCO results"),
        "{}",
        fault.next
    );
    let storage = r#"{"id":1,"task":{"id":2},"result":[],"completed_by":1}"#.as_bytes();
    let fault = Input::folder(&[("1.json", storage), ("2.json", storage)])
        .read()
        .unwrap_err();
    assert!(
        fault.message.contains("one annotation of Label Studio"),
        "{}",
        fault.message
    );
}

#[test]
fn bad_records_are_written_to_a_file() {
    let rows: String = (0..30)
        .map(|n| format!("{n}.png,1,2,{},4\n", if n % 3 == 0 { 0 } else { 3 }))
        .collect();
    let mut input = Input::file("a.csv", format!("path,x,y,w,h\n{rows}z.png,1,a,3,4\n"));
    let target = input.root.path().join("bad.jsonl");
    input.options.bad_out = Some(target.clone());
    let message = input.read().unwrap_err().message;
    assert!(
        message.ends_with(&format!("all of them are in {}", target.display())),
        "{message}"
    );
    let text = std::fs::read_to_string(&target).unwrap();
    assert_eq!(text.lines().count(), 11);
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let empty: Vec<_> = lines
        .iter()
        .filter(|line| line["reason"] == "zero or negative box")
        .collect();
    assert_eq!(empty.len(), 10);
    assert_eq!(empty[0]["place"], "line 2");
    assert_eq!(empty[0]["record"]["path"], "0.png");
    // A repeated read gives the same file; another one is never replaced.
    assert!(input.read().unwrap_err().message.contains("all of them"));
    input.options.on_bad = Some("skip".into());
    assert_eq!(input.read().unwrap().rows().len(), 20);
    std::fs::remove_file(&target).unwrap();
    File::create(&target).unwrap().write_all(b"mine").unwrap();
    assert_eq!(input.read().unwrap_err().code, base::fault::Code::Conflict);
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "mine");
    assert!(check_bad_out(&target).is_err());
    // Without a bad record there is no file.
    let mut input = Input::file("a.csv", "path\na.png\n");
    let target = input.root.path().join("none.jsonl");
    input.options.bad_out = Some(target.clone());
    input.read().unwrap();
    assert!(!target.exists());
    input.options.bad_out = Some("relative.jsonl".into());
    assert_eq!(input.read().unwrap_err().code, base::fault::Code::Usage);
}
