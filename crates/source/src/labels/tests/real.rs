//! Inputs as annotation tools, spreadsheets and trainers write them: each with the rows that it
//! means.

mod voc;
mod yolo;

use super::omitted::notes;
use super::*;
use base::omitted::Category;

#[test]
fn regions_of_label_studio() {
    let result = |id: &str, name: &str, kind: &str, members: &str| {
        format!(
            r#"{{"original_width":640,"original_height":480,"id":"{id}","from_name":"{name}","type":"{kind}","value":{{"x":10,"y":20,"width":30,"height":40,"rotation":0{members}}}}}"#
        )
    };
    let task = |results: &[String]| {
        let text = format!(
            r#"[{{"id":1,"data":{{"image":"/data/upload/1/0a1b2c3d-a.png"}},"annotations":[{{"id":5,"result":[{}]}}]}}]"#,
            results.join(",")
        );
        Input::file("a.json", text)
    };
    let ocr = task(&[
        result("r1", "bbox", "rectangle", ""),
        result("r1", "label", "labels", r#","labels":["型号"]"#),
        result(
            "r2",
            "label",
            "rectanglelabels",
            r#","rectanglelabels":["划痕"]"#,
        ),
        result("r1", "transcription", "textarea", r#","text":["AB-123"]"#),
        result("r2", "sev", "choices", r#","choices":["严重"]"#),
    ]);
    let output = ocr.read().unwrap();
    assert_eq!(output.class_names(), ["0=划痕", "1=型号"]);
    assert_eq!(
        output.rows(),
        ["a.png 1 bbox 64,96,192,192", "a.png 0 bbox 64,96,192,192"]
    );
    assert_eq!(
        output.attrs(),
        [
            r#"{"annotation":5,"region":"r1","from_name":"bbox","text":{"transcription":["AB-123"]}}"#,
            r#"{"annotation":5,"region":"r2","from_name":"label","choices":{"sev":["严重"]}}"#,
        ]
    );
    assert!(output.raws()[0].starts_with(r#"[{"original_width":640"#));
    assert_eq!(
        notes(&ocr, Category::ChangedPaths),
        ["task 0 (id 1): /data/upload/1/0a1b2c3d-a.png -> a.png"]
    );
    // A choice for the whole image is its class, as before.
    let whole = r#"[{"id":1,"data":{"image":"a.png"},"annotations":[{"id":5,"result":[{"id":"c","type":"choices","value":{"choices":["ng"]}}]}]}]"#;
    assert_eq!(
        Input::file("a.json", whole).read().unwrap().rows(),
        ["a.png 0 class -,-,-,-"]
    );
    let skipped = whole.replace(r#""id":1,"#, r#""id":1,"skipped":true,"#);
    assert_eq!(
        notes(&Input::file("a.json", skipped), Category::SkippedTasks),
        ["task 0 (id 1)"]
    );
}

#[test]
fn large_tasks_of_label_studio() {
    let mask = vec!["255"; 400_000].join(",");
    let region = |n: usize| {
        format!(
            r#"{{"id":"p{n}","type":"polygonlabels","original_width":640,"original_height":480,"value":{{"points":[[0,0],[10.5,0],[10,10],[{}.123456789,5.987654321]],"polygonlabels":["a"]}},"meta":"{}"}}"#,
            n % 50,
            "x".repeat(200)
        )
    };
    let regions: Vec<String> = (0..5000).map(region).collect();
    let text = format!(
        r#"[{{"id":1,"data":{{"image":"a.png"}},"annotations":[{{"id":5,"result":[{{"id":"m","type":"brushlabels","original_width":640,"original_height":480,"value":{{"format":"rle","rle":[{mask}],"brushlabels":["a"]}}}},{}]}}]}}]"#,
        regions.join(",")
    );
    let output = Input::file("a.json", text).read().unwrap();
    assert_eq!(output.rows().len(), 5001);
    assert_eq!(
        output.geoms()[0].len(),
        r#"{"format":"label_studio","rle":[]}"#.len() + mask.len()
    );
}

#[test]
fn tables_of_real_tools() {
    let via = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n\
        板1.png,123,\"{}\",1,0,\"{\"\"name\"\":\"\"rect\"\",\"\"x\"\":10,\"\"y\"\":20,\"\"width\"\":30,\"\"height\"\":40}\",\"{\"\"class\"\":\"\"划痕\"\"}\"\n\
        b.png,1,{},0,0,{},{}\n";
    let hf = "{\"file_name\": \"板1.png\", \"width\": 640, \"objects\": {\"bbox\": [[10, 20, 30, 40]], \"categories\": [0]}}\n{\"file_name\": \"b.png\", \"objects\": {\"bbox\": [], \"categories\": []}}\n";
    let boxed = "板1.png 0 bbox 10,20,30,40";
    for (name, text, columns) in [
        ("via.csv", via, &[][..]),
        ("metadata.jsonl", hf, &[]),
        (
            "a.csv",
            "path,class,cx,cy,bw,bh\n板1.png,划痕,25,40,30,40\n",
            &[],
        ),
        (
            "a.csv",
            "image,x_center,y_center,width,height,cls\n板1.png,25,40,30,40,划痕\n",
            &[],
        ),
        (
            "a.csv",
            "image_path,width,height,bbox,label\n板1.png,1024,1024,\"[10.0, 20.0, 30.0, 40.0]\",usask\n",
            &[],
        ),
        (
            "a.jsonl",
            "{\"image\": \"板1.png\", \"label\": \"划痕\", \"bbox\": [10, 20, 30, 40]}\n",
            &[],
        ),
        (
            "a.csv",
            "图片,类别,左,上,宽,高\n板1.png,划痕,10,20,30,40\n",
            &[],
        ),
        (
            "a.csv",
            "image,cls,box\n板1.png,a,\"10,20,40,60\"\n",
            &[("bbox_format", "xyxy")],
        ),
        (
            "a.csv",
            "image,cls,box\n板1.png,a,\"25 40 30 40\"\n",
            &[("bbox_format", "cxcywh")],
        ),
        (
            "a.jsonl",
            "{\"image\": \"板1.png\", \"bboxes\": [[10,20,30,40]], \"labels\": [\"a\"], \"class\": \"a\"}\n",
            &[],
        ),
        // Spreadsheets and pandas.
        (
            "a.csv",
            ",path,class,x,y,w,h\n0,板1.png,划痕,10,20,30,40\n",
            &[],
        ),
        (
            "a.csv",
            "path,class,x,y,w,h,,\n板1.png,划痕,10,20,30,40,,\n,,,,,,,\n",
            &[],
        ),
        (
            "a.csv",
            "\n,,,,,\npath,class,x,y,w,h\n板1.png,划痕,10,20,30,40,,,\n",
            &[],
        ),
        (
            "a.csv",
            "sep=;\npath;class;x;y;w;h\n板1.png;划痕;10;20;30;40\n",
            &[],
        ),
        (
            "a.csv",
            "\u{feff}\"sep=\t\"\r\npath\tclass\tx\ty\tw\th\r\n板1.png\t划痕\t10\t20\t30\t40\r\n",
            &[],
        ),
        (
            "a.csv",
            "path,class,x,y,w,h\n板1.png,划痕,10,20,30,40\n板2.png,,NaN,NaN,NULL,NaN\n",
            &[],
        ),
    ] {
        let mut input = Input::file(name, text);
        for (setting, value) in columns {
            input = input.column(setting, value);
        }
        let output = input.read().unwrap();
        let rows = output.rows();
        assert!(
            rows == [boxed] || rows == [boxed.replace(" 0 bbox", " - bbox")],
            "{text}: {rows:?}"
        );
    }
    let pandas = Input::file("a.csv", ",path,class\n7,a.png,x\n")
        .read()
        .unwrap();
    assert_eq!(
        (pandas.attrs(), pandas.raws()),
        (
            vec![r#"{"index":"7"}"#.into()],
            vec![r#"{"index":"7","path":"a.png","class":"x"}"#.into()]
        )
    );
    let output = Input::file("via.csv", via).read().unwrap();
    assert_eq!(output.class_names(), ["0=划痕"]);
    assert!(
        output.attrs()[0].ends_with(r#""region_attributes":{"class":"划痕"}}"#),
        "{:?}",
        output.attrs()
    );
    assert_eq!(output.sample_rows(), ["b.png - - -", "板1.png - - -"]);
    let kaggle = "ImageId,ClassId,EncodedPixels,width,height\na.png,3,2 2 5 4,3,4\nb.png,3,,3,4\n";
    let output = Input::file("train.csv", kaggle).read().unwrap();
    assert_eq!(output.rows(), ["a.png 3 rle 0,0,2,4"]);
    assert_eq!(
        output.geoms(),
        [r#"{"format":"kaggle","counts":"2 2 5 4"}"#]
    );
    // Two forms of one box: the first is read, and the other is kept.
    let both = Input::file("a.csv", "path,x,y,w,h,bbox\na,1,2,3,4,\"[9,9,9,9]\"\n")
        .read()
        .unwrap();
    assert_eq!(
        (both.rows(), both.attrs()),
        (
            vec!["a - bbox 1,2,3,4".into()],
            vec![r#"{"bbox":"[9,9,9,9]"}"#.into()]
        )
    );
}

#[test]
fn fractions_of_the_image() {
    let open_images =
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\nabc,x,/m/01,1,0.1,0.5,0.2,0.6\n";
    let image = png(640, 480);
    let beside = |files: &[(&str, &[u8])]| {
        let mut all: Vec<(&str, &[u8])> = vec![("a.csv", open_images.as_bytes())];
        all.extend(files);
        let folder = Input::folder(&all);
        let path = folder.path.join("a.csv");
        Input { path, ..folder }
    };
    for (input, sample) in [
        (beside(&[("images/abc.jpg", &image)]), "abc.jpg 640 480 -"),
        (
            beside(&[("sizes.csv", b"path,width,height\nabc,640,480\n")]),
            "abc 640 480 -",
        ),
    ] {
        let output = input.read().unwrap();
        assert_eq!(output.sample_rows(), [sample]);
        assert!(
            output.rows()[0].ends_with("0 bbox 64,96,256,192"),
            "{:?}",
            output.rows()
        );
        assert!(notes(&input, Category::Inferred)[0].contains("normalised=true"));
    }
    let fault = beside(&[]).read().unwrap_err();
    assert!(
        fault
            .message
            .contains("image size unknown): line 2: its box is a fraction"),
        "{}",
        fault.message
    );
    let as_pixels = beside(&[]).column("normalised", "false").read().unwrap();
    assert_eq!(as_pixels.rows(), ["abc 0 bbox 0.1,0.2,0.4,0.4"]);
    let sized = "path,x,y,w,h,width,height\na,0.5,0.5,0.5,0.5,100,200\n";
    assert_eq!(
        Input::file("a.csv", sized).read().unwrap().rows(),
        ["a - bbox 50,100,50,100"]
    );
    let said = Input::file("a.csv", "path,x,y,w,h,width,height\na,1,0,1,1,100,200\n")
        .column("normalised", "true");
    assert!(
        said.read()
            .unwrap_err()
            .message
            .contains("box outside its image")
    );
}

#[test]
fn text_in_other_encodings() {
    let text = "path,class\n板1.png,划痕\n板2.png,凹坑\n";
    let gbk = encoding_rs::GB18030.encode(text).0.into_owned();
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [&b"\xff\xfe"[..], &utf16].concat();
    for (bytes, encoding, inferred) in [
        (gbk.clone(), None, Some("GBK")),
        (gbk.clone(), Some("gb18030"), None),
        (utf16.clone(), None, Some("UTF-16LE")),
        (utf16, Some("utf-16le"), None),
        (marked, None, None),
    ] {
        let mut input = Input::file("a.csv", bytes);
        input.options.encoding = encoding.map(str::to_owned);
        assert_eq!(input.read().unwrap().class_names(), ["0=凹坑", "1=划痕"]);
        let notes = notes(&input, Category::Inferred);
        assert_eq!(notes.len(), usize::from(inferred.is_some()));
        assert!(
            notes
                .iter()
                .all(|note| inferred.is_some_and(|name| note.contains(name))),
            "{notes:?}"
        );
    }
    let jsonl = encoding_rs::GB18030
        .encode("{\"path\":\"板.png\",\"class\":\"划痕\"}\n")
        .0
        .into_owned();
    assert_eq!(
        Input::file("a.jsonl", jsonl).read().unwrap().class_names(),
        ["0=划痕"]
    );
    let coco = encoding_rs::GB18030
        .encode(r#"{"images":[{"id":1,"file_name":"缺陷.png"}]}"#)
        .0
        .into_owned();
    assert_eq!(
        Input::file("a.json", coco).read().unwrap().sample_rows(),
        ["缺陷.png - - -"]
    );
    let mut wrong = Input::file("a.csv", gbk);
    wrong.options.encoding = Some("utf-8".into());
    assert!(wrong.read().unwrap_err().message.contains("invalid UTF-8"));
}

#[test]
fn paths_of_other_machines() {
    let text = "path,class\nD:\\数据\\板1.png,a\nhttps://host/x/b.png?sig=1,a\nimages\\c.png,a\n";
    let input = Input::file("a.csv", text);
    assert_eq!(
        input.read().unwrap().sample_rows(),
        ["images/c.png - - -", "x/b.png - - -", "数据/板1.png - - -"]
    );
    assert_eq!(
        notes(&input, Category::ChangedPaths),
        [
            "line 2: D:\\数据\\板1.png -> 数据/板1.png",
            "line 3: https://host/x/b.png?sig=1 -> x/b.png",
            "line 4: images\\c.png -> images/c.png"
        ]
    );
    let input = input.column("path_keep", "1").column("path_prefix", "p");
    assert_eq!(
        input.read().unwrap().sample_rows(),
        ["p/b.png - - -", "p/c.png - - -", "p/板1.png - - -"]
    );
}

#[test]
fn coco_checks_every_shape() {
    let coco = |annotation: &str| {
        let text = format!(
            r#"{{"images":[{{"id":1,"file_name":"a.png","width":100,"height":80}}],"categories":[{{"id":1,"name":"a"}}],
            "annotations":[{{"id":1,"image_id":1,"category_id":1,{annotation}}}]}}"#
        );
        Input::file("a.json", text)
    };
    for (annotation, said) in [
        (
            r#""bbox":[1,1,5,5],"segmentation":[[1,1,5,1,150,5]]"#,
            "reaches out of \"a.png\"",
        ),
        (
            r#""bbox":[1,1,5,5],"segmentation":[[1,1,5,1,5]]"#,
            "not a list of rings",
        ),
        (
            r#""bbox":[1,1,5,5],"segmentation":[[1,1,5,1,"5",5]]"#,
            "not a list of rings",
        ),
        (r#""bbox":[1,1,5,5],"keypoints":[1,90,2]"#, "reaches out of"),
        (
            r#""bbox":[1,1,5,5],"segmentation":{"size":[100,80],"counts":[8000]}"#,
            "its mask is 80 × 100, and \"a.png\" is 100 × 80",
        ),
    ] {
        let message = coco(annotation).read().unwrap_err().message;
        assert!(message.contains(said), "{message}");
    }
    for (annotation, row) in [
        (
            r#""bbox":[1,1,5,5],"keypoints":[1,1,2,900,900,0]"#,
            "a.png 1 keypoints 1,1,5,5",
        ),
        (
            r#""bbox":[1,1,5,5],"segmentation":{"size":[80,100],"counts":[8000]}"#,
            "a.png 1 rle 1,1,5,5",
        ),
        (r#""segmentation":[1,1,5,1,5,5]"#, "a.png 1 polygon 1,1,4,4"),
        (
            r#""bbox":[0.1,0.25,0.05,0.5],"segmentation":[[0.1,0.25,0.15,0.25,0.15,0.75]]"#,
            "a.png 1 polygon 10,20,5,40",
        ),
    ] {
        assert_eq!(
            coco(annotation).read().unwrap().rows(),
            [row],
            "{annotation}"
        );
    }
    let normalised =
        coco(r#""bbox":[0.1,0.25,0.05,0.5],"segmentation":[[0.1,0.25,0.15,0.25,0.15,0.75]]"#);
    assert_eq!(
        normalised.read().unwrap().geoms(),
        ["[[10.0,20.0,15.0,20.0,15.0,60.0]]"]
    );
    assert!(notes(&normalised, Category::Inferred)[0].contains("normalised=true"));
    let as_pixels = normalised.column("normalised", "false");
    assert_eq!(
        as_pixels.read().unwrap().rows(),
        ["a.png 1 polygon 0.1,0.25,0.05,0.5"]
    );
}

#[test]
fn coco_as_roboflow_and_others_lay_it_out() {
    let categories = r#"[{"id":0,"name":"dent","supercategory":"none"},{"id":1,"name":"dent","supercategory":"dent"}]"#;
    let file = |name: &str| {
        format!(
            r#"{{"images":[{{"id":0,"file_name":"{name}","width":100,"height":80}}],"categories":{categories},
            "annotations":[{{"id":0,"image_id":"0","category_id":1,"bbox":[1,1,5,5]}}]}}"#
        )
    };
    let (a, b) = (file("a.jpg"), file("b.jpg"));
    let roboflow = Input::folder(&[
        ("README.roboflow.txt", b"x"),
        ("train/_annotations.coco.json", a.as_bytes()),
        ("train/a.jpg", b""),
        ("valid/_annotations.coco.json", b.as_bytes()),
        ("valid/b.jpg", b""),
    ]);
    let output = roboflow.read().unwrap();
    assert_eq!((output.format, output.guessed), ("coco", true));
    assert_eq!(
        output.sample_rows(),
        ["train/a.jpg 100 80 train", "valid/b.jpg 100 80 val"]
    );
    assert_eq!(
        output.rows(),
        ["train/a.jpg 1 bbox 1,1,5,5", "valid/b.jpg 1 bbox 1,1,5,5"]
    );
    assert_eq!(output.class_names(), ["1=dent"]);
    assert!(notes(&roboflow, Category::UnreadMembers)[0].contains("the unused class 0"));
    let official = Input::folder(&[
        ("annotations/instances_train2017.json", a.as_bytes()),
        ("annotations/instances_val2017.json", b.as_bytes()),
        ("train2017/a.jpg", b""),
        ("images/val2017/b.jpg", b""),
    ]);
    assert_eq!(
        official.read().unwrap().sample_rows(),
        [
            "images/val2017/b.jpg 100 80 val",
            "train2017/a.jpg 100 80 train"
        ]
    );
    // A root that annotations use, or that is no supercategory, keeps its name for itself.
    let used = a.replace(r#""category_id":1"#, r#""category_id":0"#);
    assert!(
        Input::file("a.json", used)
            .read()
            .unwrap_err()
            .message
            .contains("the name \"dent\" belongs to class 0 already")
    );
}

#[test]
fn bad_records_are_left_out_or_cut_where_that_is_asked_for() {
    let text = r#"{"images":[{"id":1,"file_name":"a.png","width":100,"height":80},{"id":2,"file_name":"b.png"}],
        "categories":[{"id":1,"name":"a"}],"annotations":[
        {"id":1,"image_id":1,"category_id":1,"bbox":[1,1,5,5]},
        {"id":918,"image_id":1,"category_id":1,"bbox":[1,1,1.03,0]},
        {"id":2,"image_id":1,"category_id":1,"bbox":[90,-5,20,10]},
        {"id":3,"image_id":1,"category_id":1,"bbox":[200,1,5,5]},
        {"id":4,"image_id":1,"category_id":1,"bbox":[1,1,5,5],"segmentation":[[1,1,150,1,5,5]]},
        {"id":5,"image_id":1,"category_id":1,"bbox":[1,1,5,5],"keypoints":[1,1,2,150,1,2]},
        {"id":1,"image_id":1,"category_id":1,"bbox":[2,2,2,2]},
        {"id":6,"image_id":7,"category_id":1,"bbox":[2,2,2,2]},
        {"id":7,"image_id":2,"category_id":9,"bbox":[2,2,2,2]},
        {"id":8,"image_id":2,"category_id":1,"bbox":[2,2,2,2]}]}"#;
    let mut input = Input::file("a.json", text);
    assert!(
        input
            .read()
            .unwrap_err()
            .message
            .contains("8 records refused")
    );
    input.options.on_bad = Some("skip".into());
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        ["a.png 1 bbox 1,1,5,5", "b.png 1 bbox 2,2,2,2"]
    );
    let bad = notes(&input, Category::BadRecords);
    // The count of each kind, and behind it the further ones of each kind.
    assert_eq!(bad.len(), 5 + 3, "{bad:?}");
    assert!(
        bad[5].starts_with("box outside its image: annotations[3] (id 3)"),
        "{bad:?}"
    );
    assert!(
        bad[0].starts_with("1 × zero or negative box, the first at annotations[1] (id 918)"),
        "{bad:?}"
    );
    assert!(bad[1].starts_with("4 × box outside its image"), "{bad:?}");
    input.options.on_bad = Some("clip".into());
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "a.png 1 bbox 1,1,5,5",
            "a.png 1 bbox 90,0,10,5",
            "a.png 1 polygon 1,1,5,5",
            "a.png 1 keypoints 1,1,5,5",
            "b.png 1 bbox 2,2,2,2"
        ]
    );
    // The polygon is cut where it leaves the image, at 2 and 11/29 on the right edge.
    let geoms = output.geoms();
    assert!(
        geoms[2].starts_with("[[1.0,1.0,100.0,1.0,100.0,2.37931034"),
        "{geoms:?}"
    );
    assert!(geoms[2].ends_with(",5.0,5.0]]"), "{geoms:?}");
    assert_eq!(geoms[3], "[1.0,1.0,2.0,0.0,0.0,0.0]");
    assert_eq!(notes(&input, Category::ClippedShapes).len(), 3);
    // A sample that the dataset lacks is left out with all that is said of it.
    input.options.on_bad = Some("skip".into());
    let output = input.read_for(Some(&["b.png"])).unwrap();
    assert_eq!(
        (output.sample_rows(), output.rows().len()),
        (vec!["b.png - - -".to_owned()], 1)
    );
    input.options.on_bad = Some("ignore".into());
    assert_eq!(input.read().unwrap_err().code, base::fault::Code::Usage);
}
