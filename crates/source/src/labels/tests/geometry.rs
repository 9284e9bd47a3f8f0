//! Polygons, masks and keypoints are checked, cut and scaled like boxes.

use super::*;

/// A COCO file with one image of 4 x 3 and an annotation with these members.
fn coco(members: &str) -> Input {
    let text = format!(
        r#"{{"images":[{{"id":1,"file_name":"a.png","width":4,"height":3}}],"annotations":[{{"id":1,"image_id":1,"category_id":1,{members}}}],"categories":[{{"id":1,"name":"x"}}]}}"#
    );
    Input::file("a.json", text)
}

#[test]
fn masks_and_polygons_are_checked() {
    for members in [
        r#""bbox":[0,0,2,2],"segmentation":[[0,0],[2,0]]"#,
        r#""bbox":[0,0,2,2],"segmentation":[[0,0,2,0,2,2],[]]"#,
        r#""bbox":[0,0,2,2],"segmentation":[[1,1,1,1,1,1]]"#,
        r#""bbox":[0,0,2,2],"segmentation":{"foo":1}"#,
        r#""bbox":[0,0,2,2],"segmentation":{"counts":[12]}"#,
        r#""bbox":[0,0,2,2],"segmentation":{"size":[3,4],"counts":[11]}"#,
        r#""bbox":[0,0,2,2],"segmentation":{"size":[3,4],"counts":[-1,13]}"#,
        r#""bbox":[0,0,2,2],"segmentation":{"size":[3,4],"counts":"xx!!"}"#,
    ] {
        let fault = coco(members).read().unwrap_err();
        assert!(fault.message.contains("wrong shape"), "{}", fault.message);
    }
    let points = r#""bbox":[0,0,2,2],"segmentation":[[0,0],[2,0],[2,2]]"#;
    assert_eq!(coco(points).read().unwrap().geoms(), ["[[0,0,2,0,2,2]]"]);
    let mask = r#""segmentation":{"size":[3,4],"counts":[3,3,6]}"#;
    assert_eq!(coco(mask).read().unwrap().rows(), ["a.png 1 rle 1,0,1,3"]);
    for (kind, geom) in [
        ("polygon", "[[1,1]]"),
        ("polygon", "[[0,0,2,0],[0,0,1,1,2,1]]"),
        ("rle", r#"{"size":[3,4],"counts":[2]}"#),
        ("rle", r#"{"format":"kaggle","counts":"1"}"#),
    ] {
        let line = format!(
            r#"{{"path":"a.png","width":4,"height":3,"class":"x","kind":"{kind}","geom":{geom}}}"#
        );
        let fault = Input::file("a.jsonl", line).read().unwrap_err();
        assert!(fault.message.contains("wrong shape"), "{}", fault.message);
    }
    let overflow = r#""bbox":[1e308,1e308,1e308,1e308]"#;
    let fault = coco(overflow).read().unwrap_err();
    assert!(fault.message.contains("not a finite"), "{}", fault.message);
}

#[test]
fn fractions_count_for_all_points() {
    let keypoints = r#""bbox":[0.25,0,0.5,1],"keypoints":[0.5,0.5,2,0,0,0]"#;
    let output = coco(keypoints).read().unwrap();
    assert_eq!(output.rows(), ["a.png 1 keypoints 1,0,2,3"]);
    assert_eq!(output.geoms(), ["[2.0,1.5,2.0,0.0,0.0,0.0]"]);
    let head = r#"{"path":"a.png","width":10,"height":20,"class":"x","kind":"polygon","geom":[[0.1,0.1,0.6,0.1,0.6,0.5]]"#;
    let with_box = r#","x":0.1,"y":0.1,"w":0.5,"h":0.4"#;
    for rest in [with_box, ""] {
        let output = Input::file("a.jsonl", format!("{head}{rest}}}"))
            .read()
            .unwrap();
        assert_eq!(output.geoms(), ["[[1.0,2.0,6.0,2.0,6.0,10.0]]"], "{rest}");
    }
}

#[test]
fn annotations_of_an_image_that_is_left_out_are_counted() {
    let mut input = Input::file(
        "a.json",
        r#"{"images":[{"id":1,"file_name":"../a.png"},{"id":2,"file_name":"b.png"}],"annotations":[{"id":1,"image_id":1,"category_id":1,"bbox":[0,0,1,1]},{"id":2,"image_id":2,"category_id":1,"bbox":[0,0,1,1]}],"categories":[{"id":1,"name":"x"}]}"#,
    );
    input.options.on_bad = Some("skip".into());
    let scratch = tempfile::tempdir().unwrap();
    let source = LabelsSource::open(&input.path, scratch.path(), &input.options, None).unwrap();
    assert_eq!(source.omitted().count(Category::BadRecords), 2);
    assert_eq!(input.read().unwrap().rows(), ["b.png 1 bbox 0,0,1,1"]);
}
