//! One good input of each format.

use super::*;

#[test]
fn coco() {
    // Annotations before images, white space, ids out of order, text ids, numbers that must keep
    // their spelling.
    let text = r#"{ "info": {"year": 2026}, "annotations": [
        {"id": 7, "image_id": 20, "category_id": 3, "bbox": [1, 2.50, 3, 4e0], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 1, "bbox": [0,0,10,10], "segmentation": [[0,0,10,0,10,10]]},
        {"id": 3, "image_id": 20, "category_id": 1, "segmentation": [[1,1,5,1,5,9],[2,2,3,2,3,10]]},
        {"id": 4, "image_id": 20, "category_id": 1, "bbox": [1,1,2,2], "segmentation": {"size":[50,40],"counts":"`n1"}, "iscrowd": 1},
        {"id": 5, "image_id": 20, "category_id": 3, "bbox": [1,1,2,2], "keypoints": [1,1,2, 0,0,0], "num_keypoints": 1},
        {"id": 6, "image_id": 10, "category_id": 3, "bbox": [], "segmentation": [], "attributes": {"缺陷": true}},
        {"image_id": 10, "caption": "two dents"}
      ],
      "images": [ {"id": 20, "file_name": "b/图像.png", "width": 40, "height": 50.0, "license": 1},
                  {"id": 10, "file_name": ".\\a.png"}, {"id": "x-1", "file_name": "c.png"} ],
      "categories": [ {"id": 3, "name": "划痕", "supercategory": "surface"}, {"id": 1, "name": "dent"} ] }"#;
    let output = Input::file("a.json", text).read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "a.png 1 polygon 0,0,10,10",
            "a.png 3 class -,-,-,-",
            "a.png - other -,-,-,-",
            "b/图像.png 3 bbox 1,2.5,3,4",
            "b/图像.png 1 polygon 1,1,4,9",
            "b/图像.png 1 rle 1,1,2,2",
            "b/图像.png 3 keypoints 1,1,2,2",
        ]
    );
    assert_eq!(
        output.geoms()[4..],
        [
            r#"[[1,1,5,1,5,9],[2,2,3,2,3,10]]"#,
            r#"{"size":[50,40],"counts":"`n1"}"#,
            "[1,1,2,0,0,0]"
        ]
    );
    assert_eq!(
        output.attrs()[1..4],
        [
            r#"{"attributes":{"缺陷":true}}"#,
            r#"{"caption":"two dents"}"#,
            r#"{"area":12,"iscrowd":0}"#
        ]
    );
    assert_eq!(
        output.raws()[3],
        r#"{"id":7,"image_id":20,"category_id":3,"bbox":[1,2.50,3,4e0],"area":12,"iscrowd":0}"#
    );
    assert_eq!(
        output.classes,
        "{\"id\":1,\"name\":\"dent\",\"attrs\":null}\n{\"id\":3,\"name\":\"划痕\",\"attrs\":{\"supercategory\":\"surface\"}}\n"
    );
    assert_eq!(
        output.sample_rows(),
        ["a.png - - -", "b/图像.png 40 50 -", "c.png - - -"]
    );
    assert!(output.samples.contains(
        r#""meta":{"id":20,"file_name":"b/图像.png","width":40,"height":50.0,"license":1}}"#
    ));
}

#[test]
fn boxes_may_reach_one_pixel_over() {
    let text = r#"{"images":[{"id":1,"file_name":"a","width":10,"height":10}],"categories":[],
        "annotations":[{"image_id":1,"bbox":[-1,-0.0,12,11]}]}"#;
    assert_eq!(
        Input::file("a.json", text).read().unwrap().rows(),
        ["a - bbox -1,0,12,11"]
    );
}

#[test]
fn csv() {
    let text = "\u{feff}filename;class;xmin;ymin;xmax;ymax;width;height;subset;operator\r\n\
        b.png;\"dent; deep\";1;2;4,;6;;;train;li\r\n";
    // A decimal comma is no number: refused below, so here with a point.
    let output = Input::file("a.csv", text.replace("4,;", "4.5;"))
        .read()
        .unwrap();
    assert_eq!(output.rows(), ["b.png 0 bbox 1,2,3.5,4"]);
    assert_eq!(output.attrs(), [r#"{"operator":"li"}"#]);
    assert_eq!(
        output.raws(),
        [
            r#"{"filename":"b.png","class":"dent; deep","xmin":"1","ymin":"2","xmax":"4.5","ymax":"6","width":"","height":"","subset":"train","operator":"li"}"#
        ]
    );
    assert_eq!(output.sample_rows(), ["b.png - - train"]);

    let text = "img\tcode\tpx\tpy\tw\th\tattrs\tid\tkind\n\
        a.png\tscratch\t\t\t\t\t{\"a\" : [1]}\tu1\t\n\
        a.png\tdent\t1\t2\t3\t4\t\tu2\t\n\
        a.png\tdent\t1\t2\t\t\t\tu3\t\n\n\
        0.png\t\t\t\t\t\t\t\t\n\
        b.png\t\t1\t1\t2\t2\t\tu4\tother\n";
    let input = Input::file("a.tsv", text)
        .column("sample_path", "IMG")
        .column("class", "code")
        .column("x", "px")
        .column("y", "py");
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "a.png 1 class -,-,-,-",
            "a.png 0 bbox 1,2,3,4",
            "a.png 0 point 1,2,-,-",
            "b.png - other 1,1,2,2"
        ],
    );
    assert_eq!(output.attrs(), [r#"{"a":[1]}"#, "-", "-", "-"]);
    assert_eq!(output.class_names(), ["0=dent", "1=scratch"]);
    assert_eq!(
        output.sample_rows(),
        ["0.png - - -", "a.png - - -", "b.png - - -"]
    );

    let text = "path,class_id,class\na,5,dent\nb,5,dent\nc,2,\n";
    let output = Input::file("a.csv", text).read().unwrap();
    assert_eq!(
        (output.class_names(), output.rows().len()),
        (vec!["2=2".to_owned(), "5=dent".to_owned()], 3)
    );
    let output = Input::file("a.csv", "path,id,class\na,1,x\nb,1,x\n")
        .column("id", "")
        .read()
        .unwrap();
    assert_eq!(
        output.rows().len(),
        2,
        "a field mapped to nothing is not taken"
    );
}

#[test]
fn jsonl() {
    let text = "{\"path\":\"b.png\",\"class\":\"dent\",\"x\":1,\"y\":2,\"w\":3,\"h\":4,\"width\":100,\"height\":80,\"score\":0.5}\n\n\
        {\"path\":\"a.png\", \"class\":7, \"kind\":\"polygon\", \"geom\":[[0,0,1,0,1,1]], \"attrs\":{\"b\": 1}}\n\
        {\"path\":\"b.png\"}";
    let output = Input::file("a.jsonl", text).read().unwrap();
    assert_eq!(
        output.rows(),
        ["a.png 7 polygon -,-,-,-", "b.png 8 bbox 1,2,3,4"]
    );
    assert_eq!(
        (output.geoms(), output.attrs()),
        (
            vec!["[[0,0,1,0,1,1]]".into(), "-".into()],
            vec!["{\"b\":1}".into(), "{\"score\":0.5}".into()]
        )
    );
    assert_eq!(output.class_names(), ["7=7", "8=dent"]);
    assert_eq!(output.sample_rows(), ["a.png - - -", "b.png 100 80 -"]);
    // What comes out can go in again.
    let again = Input::file("again.jsonl", &output.annotations)
        .read()
        .unwrap();
    assert_eq!(again.rows(), output.rows());
}

#[test]
fn label_studio() {
    let text = r#"[ {"id": 5, "data": {"image": "/data/local-files/?d=line3/b.png", "split": "val"}, "annotations": [
        {"id": 50, "completed_by": 1, "result": [
          {"id": "r1", "type": "rectanglelabels", "from_name": "label", "original_width": 200, "original_height": 100,
           "value": {"x": 10, "y": 20, "width": 5, "height": 10, "rotation": 0, "rectanglelabels": ["dent", "deep"]}},
          {"id": "r2", "type": "rectanglelabels", "original_width": 200, "original_height": 100,
           "value": {"x": 50, "y": 50, "width": 2, "height": 2, "rotation": 90, "rectanglelabels": ["dent"]}}]},
        {"id": 51, "completed_by": {"id": 2, "email": "a@b"}, "result": [
          {"id": "r1", "type": "polygonlabels", "original_width": 200, "original_height": 100,
           "value": {"points": [[0,0],[10,0],[10,10]], "polygonlabels": ["scratch"]}},
          {"id": "r3", "type": "choices", "value": {"choices": ["ng"]}},
          {"id": "r4", "type": "keypointlabels", "original_width": 200, "original_height": 100,
           "value": {"x": 50, "y": 50, "width": 1, "keypointlabels": ["dent"]}},
          {"id": "r5", "type": "brushlabels", "original_width": 200, "original_height": 100,
           "value": {"format": "rle", "rle": [1, 2], "brushlabels": ["dent"]}},
          {"id": "r6", "type": "ellipselabels", "original_width": 200, "original_height": 100,
           "value": {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 0, "ellipselabels": []}},
          {"id": "r7", "type": "textarea", "value": {"text": ["odd"]}}]},
        {"id": 52, "was_cancelled": true, "result": [{"type": "choices", "value": {"choices": ["never"]}}]}],
        "predictions": [{"id": 1, "model_version": "m1", "score": 0.9, "result": [{"id": "p", "type": "choices", "value": {"choices": ["ok"]}}]}]},
      {"id": 4, "data": {"image": "a.png"}, "annotations": []} ]"#;
    let input = Input::file("a.json", text);
    let output = input.read().unwrap();
    assert_eq!(
        output.class_names(),
        ["0=deep", "1=dent", "2=ng", "3=scratch"]
    );
    assert_eq!(
        output.rows(),
        [
            "line3/b.png 1 bbox 20,20,10,10",
            "line3/b.png 0 bbox 20,20,10,10",
            "line3/b.png 1 bbox 98,50,2,4",
            "line3/b.png 3 polygon 0,0,20,10",
            "line3/b.png 2 class -,-,-,-",
            "line3/b.png 1 point 100,50,-,-",
            "line3/b.png 1 rle -,-,-,-",
            "line3/b.png - other 80,40,40,20",
            "line3/b.png - other -,-,-,-",
        ]
    );
    let geoms = output.geoms();
    assert_eq!(
        geoms[2],
        r#"{"x":100.0,"y":50.0,"w":4.0,"h":2.0,"rotation":90.0}"#
    );
    assert_eq!(geoms[3], "[[0.0,0.0,20.0,0.0,20.0,10.0]]");
    assert_eq!(geoms[6], r#"{"format":"label_studio","rle":[1,2]}"#);
    let attrs = output.attrs();
    assert_eq!(
        attrs[0],
        r#"{"annotator":1,"annotation":50,"region":"r1","from_name":"label"}"#
    );
    assert_eq!(
        attrs[3],
        r#"{"annotator":{"id":2,"email":"a@b"},"annotation":51,"region":"r1"}"#
    );
    assert_eq!(
        output.sample_rows(),
        ["a.png - - -", "line3/b.png 200 100 val"]
    );

    let output = input.column("predictions", "true").read().unwrap();
    assert_eq!(output.rows().len(), 10);
    assert_eq!(
        output.attrs()[9],
        r#"{"prediction":1,"model_version":"m1","score":0.9,"region":"p"}"#
    );
}

#[test]
fn voc() {
    let xml = |name: &str, objects: &str| {
        format!(
            "<?xml version=\"1.0\"?><annotation><folder>x</folder><filename>{name}</filename>\
             <size><width>100</width><height>80</height><depth>3</depth></size>{objects}</annotation>"
        )
    };
    let object = "<object><name>划痕</name><pose>Left</pose><difficult>0</difficult>\
        <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>80.0</ymax></bndbox></object>";
    let (one, none) = (
        xml(
            "b.jpg",
            &format!("{object}<object><name>dent</name></object>"),
        ),
        xml("a.jpg", ""),
    );
    let input = Input::folder(&[
        ("Annotations/b.xml", one.as_bytes()),
        ("Annotations/x/a.xml", none.as_bytes()),
        ("JPEGImages/b.jpg", b""),
        ("ImageSets/Main/val.txt", b"b\nc\n"),
    ]);
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "JPEGImages/b.jpg 1 bbox 0,10,100,70",
            "JPEGImages/b.jpg 0 class -,-,-,-"
        ]
    );
    assert_eq!(output.class_names(), ["0=dent", "1=划痕"]);
    assert_eq!(output.attrs(), [r#"{"pose":"Left","difficult":"0"}"#, "-"]);
    assert_eq!(
        output.raws()[0],
        r#"{"name":"划痕","pose":"Left","difficult":"0","bndbox":{"xmin":"1","ymin":"11","xmax":"100","ymax":"80.0"}}"#
    );
    assert_eq!(
        output.sample_rows(),
        ["JPEGImages/b.jpg 100 80 val", "JPEGImages/x/a.jpg 100 80 -"]
    );
    let beside = Input::folder(&[
        ("Annotations/b.xml", none.as_bytes()),
        ("x/a.xml", one.as_bytes()),
    ]);
    assert_eq!(
        beside.read().unwrap().sample_rows(),
        ["a.jpg 100 80 -", "x/b.jpg 100 80 -"]
    );
}

#[test]
fn yolo() {
    let input = Input::folder(&[
        ("data.yaml", b"names: [scratch, dent]\n"),
        (
            "labels/train/a.txt",
            b"1 0.5 0.5 0.1 0.2\r\n\r\n0 0 0 1 0 1 1\n1 0.5 0.5 0.2 0.2 0.875\n",
        ),
        ("labels/train/c.txt", b""),
        ("images/train/a.PNG", &png(100, 50)),
        ("images/train/c.png", &png(10, 10)),
        ("images/val/b.png", &png(64, 32)),
        ("images/val/d.webp", b"RIFF"),
        ("train.txt", b"images/train/a.PNG\n"),
    ]);
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "images/train/a.PNG 1 bbox 45,20,10,10",
            "images/train/a.PNG 0 polygon 0,0,100,50",
            "images/train/a.PNG 1 bbox 40,20,20,10"
        ]
    );
    assert_eq!(output.geoms()[1], "[[0.0,0.0,100.0,0.0,100.0,50.0]]");
    assert_eq!(output.attrs(), ["-", "-", r#"{"confidence":0.875}"#]);
    assert_eq!(
        output.raws()[1],
        r#"{"file":"labels/train/a.txt","line":3,"text":"0 0 0 1 0 1 1"}"#
    );
    assert_eq!(output.class_names(), ["0=scratch", "1=dent"]);
    assert_eq!(
        output.sample_rows(),
        [
            "images/train/a.PNG 100 50 train",
            "images/train/c.png 10 10 train",
            "images/val/b.png 64 32 val",
            "images/val/d.webp - - val"
        ]
    );

    // No folders: beside each other. No image at all: sizes.csv.
    let beside = Input::folder(&[
        ("obj.names", b"dent\n"),
        ("a.txt", b"0 .5 .5 1 1"),
        ("a.png", &png(10, 20)),
        ("b.png", &png(10, 20)),
    ]);
    assert_eq!(beside.read().unwrap().rows(), ["a.png 0 bbox 0,0,10,20"]);
    let sizes = Input::folder(&[
        ("classes.txt", b"dent"),
        ("labels/a.txt", b"0 .5 .5 1 1"),
        ("sizes.csv", b"path,width,height\nimages/a.tiff,30,40\n"),
    ]);
    assert_eq!(
        sizes.read().unwrap().rows(),
        ["images/a.tiff 0 bbox 0,0,30,40"]
    );
    let pose = Input::folder(&[
        ("data.yaml", b"names: {0: panel}\nkpt_shape: [2, 3]"),
        ("a.txt", b"0 .5 .5 1 1 .1 .1 2 .9 .9 1"),
        ("a.png", &png(10, 20)),
    ]);
    assert_eq!(pose.read().unwrap().geoms(), ["[1.0,2.0,2.0,9.0,18.0,1.0]"]);
}
