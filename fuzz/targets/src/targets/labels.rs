//! Labels: each format that annotation tools write, the canonical files that a site loads, and the
//! rows of a query.

use std::path::Path;

use base::names::RelPath;
use content::chunk::Hash;
use content::label_rows::{
    ANNOTATIONS, AnnotationRow, CLASSES, ClassRow, QUERY_COLUMNS, QueryRow, SAMPLES, SampleRow,
};
use content::manifest::{DatasetBinding, FileInfo, KindInfo, LabelsInfo};
use serde::Serialize;
use serde::de::DeserializeOwned;
use source::Source as _;
use source::labels::{BoundDataset, LabelOptions, LabelsSource};

use super::folder::write_folder;
use super::{Parts, scratch, write_file};
use crate::Target;
use crate::outcome::{note, taken};

/// The first byte of an input: whether the labels are for a dataset, and whether samples may be
/// missing there.
const FOR_DATASET: u8 = 1;
const ALLOW_MISSING: u8 = 2;
/// Whether the format is guessed.
const GUESSED: u8 = 4;
/// Whether predictions are taken, and path rules apply.
const SETTINGS: u8 = 8;

const DATASET: [&str; 5] = ["a.png", "b.png", "b/c.png", "images/a.png", "labels"];

const COMMON: &[&str] = &[
    "a.png",
    "b.png",
    "b/c.png",
    "images/a.png",
    "../a.png",
    "bbox",
    "polygon",
    "rle",
    "keypoints",
    "class",
    "other",
    "null",
    "1e999",
    "-0.0",
    "0.5",
    "\u{feff}",
    "\r\n",
];

macro_rules! format_target {
    ($target:ident, $run:ident, $name:literal, $about:literal, $word:literal, $file:expr, $seeds:expr, $words:expr) => {
        pub(super) const $target: Target = Target {
            name: $name,
            about: $about,
            run: $run,
            seeds: || seeds(&$seeds),
            words: $words,
            short: 150,
        };

        fn $run(input: &[u8]) {
            labels(input, $word, $file);
        }
    };
}

fn seeds(texts: &[&str]) -> Vec<Vec<u8>> {
    texts
        .iter()
        .flat_map(|text| {
            [0, FOR_DATASET | ALLOW_MISSING, GUESSED]
                .map(|flags| [&[flags][..], text.as_bytes()].concat())
        })
        .collect()
}

format_target!(
    COCO,
    coco,
    "labels_coco",
    "COCO",
    "coco",
    Some("labels.json"),
    [
        r#"{"info":{"year":2026},"annotations":[{"id":7,"image_id":20,"category_id":3,"bbox":[1,2.50,3,4e0],"area":12,"iscrowd":0},{"id":2,"image_id":10,"category_id":1,"bbox":[0,0,10,10],"segmentation":[[0,0,10,0,10,10]]},{"id":4,"image_id":20,"category_id":1,"bbox":[1,1,2,2],"segmentation":{"size":[50,40],"counts":"abc"},"iscrowd":1},{"id":5,"image_id":20,"category_id":3,"bbox":[1,1,2,2],"keypoints":[1,1,2,0,0,0],"num_keypoints":1},{"image_id":10,"caption":"two dents"}],"images":[{"id":20,"file_name":"b/c.png","width":40,"height":50.0},{"id":10,"file_name":".\\a.png"},{"id":"x-1","file_name":"c.png"}],"categories":[{"id":3,"name":"scratch","supercategory":"surface"},{"id":1,"name":"dent"}]}"#,
        r#"{"images":[],"annotations":[],"categories":[]}"#
    ],
    &[
        "images",
        "annotations",
        "categories",
        "image_id",
        "category_id",
        "bbox",
        "segmentation",
        "counts",
        "size",
        "keypoints",
        "num_keypoints",
        "file_name",
        "width",
        "height",
        "id",
        "name",
        "supercategory",
        "area",
        "iscrowd",
        "a.png",
        "b/c.png"
    ]
);

format_target!(
    CSV,
    csv,
    "labels_csv",
    "labels as CSV",
    "csv",
    Some("labels.csv"),
    [
        "filename;class;xmin;ymin;xmax;ymax;width;height;subset;operator\r\nb.png;\"dent; deep\";1;2;4.5;6;;;train;li\r\n",
        "img\tcode\tpx\tpy\tw\th\tattrs\tid\tkind\na.png\tscratch\t\t\t\t\t{\"a\" : [1]}\tu1\t\na.png\tdent\t1\t2\t3\t4\t\tu2\t\n",
        "path,class_id,class\na.png,5,dent\nb.png,5,dent\nc,2,\n",
        "path,x,y,w,h,class,width,height,kind,geom\na.png,1,2,3,4,dent,40,50,polygon,\"[[0,0,1,0,1,1]]\"\n"
    ],
    &[
        "path", "filename", "class", "class_id", "x", "y", "w", "h", "xmin", "ymax", "kind",
        "geom", "split", "attrs", "id", ",", ";", "\t", "\"\"", "\"", "\n", "a.png", "polygon"
    ]
);

format_target!(
    JSONL,
    jsonl,
    "labels_jsonl",
    "labels as JSON Lines",
    "jsonl",
    Some("labels.jsonl"),
    [
        "{\"path\":\"b.png\",\"class\":\"dent\",\"x\":1,\"y\":2,\"w\":3,\"h\":4,\"width\":100,\"height\":80,\"score\":0.5}\n\n{\"path\":\"a.png\", \"class\":7, \"kind\":\"polygon\", \"geom\":[[0,0,1,0,1,1]], \"attrs\":{\"b\": 1}}\n{\"path\":\"b.png\"}",
        "{\"sample\":\"a.png\",\"class\":1,\"kind\":\"bbox\",\"x\":1.0,\"y\":2.0,\"w\":3.0,\"h\":4.0,\"geom\":null,\"attrs\":null,\"raw\":{}}\n"
    ],
    &[
        "path",
        "sample",
        "class",
        "class_id",
        "x",
        "y",
        "w",
        "h",
        "x2",
        "y2",
        "kind",
        "geom",
        "split",
        "attrs",
        "raw",
        "id",
        "width",
        "height",
        "a.png",
        "polygon",
        "keypoints",
        "rle",
        "\n{\"path\":\"a.png\"}\n"
    ]
);

format_target!(
    LABEL_STUDIO,
    label_studio,
    "labels_label_studio",
    "an export of Label Studio",
    "label_studio",
    Some("labels.json"),
    [
        r#"[{"id":5,"data":{"image":"/data/local-files/?d=b.png","split":"val"},"annotations":[{"id":50,"completed_by":1,"result":[{"id":"r1","type":"rectanglelabels","from_name":"label","original_width":200,"original_height":100,"value":{"x":10,"y":20,"width":5,"height":10,"rotation":0,"rectanglelabels":["dent","deep"]}},{"id":"r2","type":"rectanglelabels","original_width":200,"original_height":100,"value":{"x":50,"y":50,"width":2,"height":2,"rotation":90,"rectanglelabels":["dent"]}}]},{"id":51,"completed_by":{"id":2,"email":"a@b"},"was_cancelled":false,"result":[{"id":"r1","type":"polygonlabels","original_width":200,"original_height":100,"value":{"points":[[0,0],[10,0],[10,10]],"polygonlabels":["scratch"]}},{"id":"r3","type":"choices","value":{"choices":["ng"]}},{"id":"r4","type":"keypointlabels","original_width":200,"original_height":100,"value":{"x":50,"y":50,"width":1,"keypointlabels":["dent"]}},{"id":"r5","type":"brushlabels","original_width":200,"original_height":100,"value":{"format":"rle","rle":[1,2],"brushlabels":["dent"]}}]}],"predictions":[{"result":[]}]}]"#,
        r#"[{"id":1,"data":{"image":"a.png"},"completions":[{"result":[],"was_cancelled":true}]}]"#
    ],
    &[
        "data",
        "image",
        "annotations",
        "completions",
        "predictions",
        "result",
        "value",
        "type",
        "original_width",
        "original_height",
        "rotation",
        "rectanglelabels",
        "polygonlabels",
        "keypointlabels",
        "brushlabels",
        "ellipselabels",
        "choices",
        "points",
        "rle",
        "was_cancelled",
        "completed_by",
        "meta",
        "id",
        "x",
        "y",
        "width",
        "height",
        "radiusX",
        "a.png"
    ]
);

const VOC_TEXT: &str = "=== labels/a.xml\n<annotation><folder>images</folder><filename>a.png</filename><size><width>40</width><height>50</height><depth>3</depth></size><object><name>dent</name><pose>Left</pose><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20.5</ymax></bndbox></object><object><name>scratch &amp; more</name><polygon><x1>1</x1><y1>1</y1><x2>5</x2><y2>1</y2><x3>5</x3><y3>9</y3></polygon><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object></annotation>\n=== b.xml\n<?xml version=\"1.0\" encoding=\"UTF-8\"?><annotation><filename>b.png</filename></annotation>";

format_target!(
    VOC,
    voc,
    "labels_voc",
    "a folder of Pascal VOC files",
    "voc",
    None,
    [VOC_TEXT],
    &[
        "<annotation>",
        "</annotation>",
        "<object>",
        "</object>",
        "<bndbox>",
        "<xmin>",
        "</xmin>",
        "<name>",
        "<size>",
        "<width>",
        "<filename>",
        "<path>",
        "<part>",
        "&amp;",
        "&#x41;",
        "&#0;",
        "&lt;",
        "<![CDATA[",
        "]]>",
        "<!--",
        "-->",
        "<!DOCTYPE a [<!ENTITY b \"c\">]>",
        "<?xml ",
        "?>",
        "\n=== a.xml\n",
        "a.png"
    ]
);

const YOLO_TEXT: &str = "=== data.yaml\nnames:\n  0: dent\n  1: scratch\nnc: 2\n=== labels/a.txt\n0 0.5 0.5 0.1 0.2\n1 0.1 0.1 0.2 0.1 0.3 0.3\n=== labels/b.txt\n\n=== sizes.csv\npath,width,height\na.png,40,50\nb.png,100,80\nimages/a.png,40,50\n=== classes.txt\ndent\nscratch\n";
const YOLO_IMAGES: &str = "=== data.yaml\nnames: [dent, 'scratch: deep']\nkpt_shape: [2, 3]\n=== images/a.png\n\u{2}PNG\n=== labels/a.txt\n0 0.5 0.5 0.1 0.2 0.1 0.1 2 0.2 0.2 1\n";

format_target!(
    YOLO,
    yolo,
    "labels_yolo",
    "a folder of YOLO files, with images",
    "yolo",
    None,
    [YOLO_TEXT, YOLO_IMAGES],
    &[
        "names:",
        "nc:",
        "kpt_shape:",
        "0: dent",
        "[a, b]",
        "- dent",
        "\"",
        "'",
        "#",
        "path,width,height",
        "0 0.5 0.5 0.1 0.1\n",
        "1 0 0 1 1 0 1\n",
        "\n=== labels/a.txt\n",
        "\n=== images/a.jpg\n",
        "\n=== images/a.png\n",
        "\n=== sizes.csv\n",
        "\n=== classes.txt\n",
        "\u{2}PNG\n",
        "\u{2}JPEG\n"
    ]
);

const CVAT_TEXT: &str = r##"<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><labels><label><name>dent</name></label></labels><original_size><width>40</width><height>50</height></original_size></task></meta><image id="0" name="a.png" subset="Train" width="40" height="50"><box label="dent" xtl="1" ytl="2" xbr="10" ybr="20" rotation="15.0"><attribute name="deep">yes</attribute></box><polygon label="dent" points="1,2;30,2;30,20"></polygon><mask label="dent" rle="1, 1, 2" left="2" top="1" width="2" height="2"></mask><ellipse label="dent" cx="20" cy="20" rx="5" ry="9"></ellipse><skeleton label="dent"><points label="a" outside="0" points="1,2"/></skeleton><tag label="dent"/></image><track id="1" label="dent"><box frame="3" outside="0" xtl="1" ytl="2" xbr="10" ybr="20"></box></track></annotations>"##;

format_target!(
    CVAT,
    cvat,
    "labels_cvat",
    "CVAT's XML",
    "cvat",
    Some("annotations.xml"),
    [CVAT_TEXT],
    &[
        "<annotations>",
        "<image ",
        "<track ",
        "<box ",
        "<mask ",
        "<points ",
        "<attribute ",
        "</image>",
        "name=\"a.png\"",
        "rle=\"",
        "points=\"",
        "rotation=\"",
        "label=\"dent\"",
        "frame=\"1\"",
        "width=\"9\"",
        "1,2;3,4",
        "1, 1, 2",
        "/>",
        "65535",
        "1e300"
    ]
);

format_target!(
    DATUMARO,
    datumaro,
    "labels_datumaro",
    "Datumaro's JSON",
    "datumaro",
    Some("train.json"),
    [
        r#"{"dm_format_version":"1.0","categories":{"label":{"labels":[{"name":"dent","parent":""}]}},"items":[{"id":"a","annotations":[{"id":1,"type":"bbox","label_id":0,"bbox":[1,2,3,4]},{"type":"polygon","label_id":0,"points":[1,2,30,2,30,20]},{"type":"mask","label_id":0,"rle":{"counts":"6230009","size":[5,6]}},{"type":"points","points":[1,2],"visibility":[2]},{"type":"ellipse","points":[1,2,3,4]},{"type":"label","label_id":0}],"image":{"path":"a.png","size":[5,6]}}]}"#
    ],
    &[
        "items",
        "categories",
        "annotations",
        "type",
        "bbox",
        "mask",
        "rle",
        "counts",
        "size",
        "points",
        "label_id",
        "ellipse",
        "polyline",
        "rotated_bbox",
        "visibility",
        "image",
        "path",
        "id",
        "6230009",
        "a.png"
    ]
);

format_target!(
    LABELME,
    labelme,
    "labels_labelme",
    "LabelMe's JSON",
    "labelme",
    Some("a.json"),
    [
        r#"{"version":"5.5.0","flags":{},"shapes":[{"label":"dent","points":[[4.5,6.0],[1.0,2.0]],"group_id":null,"shape_type":"rectangle","flags":{}},{"label":"dent","points":[[1,1],[9,1],[5,9]],"group_id":3,"shape_type":"polygon"},{"label":"hole","points":[[10,10],[13,14]],"shape_type":"circle"},{"label":"a","points":[[1,1],[2,2]],"shape_type":"mask","mask":"iVBORw0KGgoAAAANSUhEUgAAAAIAAAACAQAAAABazTCJAAAADElEQVR4nGNoYDgAAAJEAUHooQgHAAAAAElFTkSuQmCC"}],"imagePath":"..\\images\\a.png","imageData":null,"imageHeight":50,"imageWidth":40}"#
    ],
    &[
        "shapes",
        "label",
        "points",
        "shape_type",
        "group_id",
        "rectangle",
        "polygon",
        "circle",
        "rotation",
        "linestrip",
        "point",
        "mask",
        "imagePath",
        "imageHeight",
        "imageWidth",
        "imageData",
        "iVBORw0KGgo",
        "..",
        "a.png"
    ]
);

format_target!(
    VIA,
    via,
    "labels_via",
    "the JSON of VGG Image Annotator",
    "via",
    Some("via.json"),
    [
        r#"{"a.png10":{"filename":"a.png","size":10,"regions":[{"shape_attributes":{"name":"rect","x":1,"y":2,"width":3,"height":4},"region_attributes":{"class":"dent"}},{"shape_attributes":{"name":"polygon","all_points_x":[0,10,5],"all_points_y":[0,0,8]},"region_attributes":{}}],"file_attributes":{}}}"#,
        r#"{"_via_settings":{},"_via_img_metadata":{"b":{"filename":"b.png","regions":{"0":{"shape_attributes":{"name":"ellipse","cx":1,"cy":2,"rx":1,"ry":2}}}}}}"#
    ],
    &[
        "_via_img_metadata",
        "filename",
        "regions",
        "shape_attributes",
        "region_attributes",
        "name",
        "rect",
        "circle",
        "ellipse",
        "polygon",
        "polyline",
        "point",
        "all_points_x",
        "all_points_y",
        "width",
        "height",
        "theta",
        "a.png"
    ]
);

format_target!(
    MASKS,
    masks,
    "labels_masks",
    "a folder of masks with a class map",
    "masks",
    None,
    [
        "=== class_map.csv\nvalue,name\n0,background\n7,dent\n=== masks/a.png\n\u{2}PNG\n=== a.jpg\n\u{2}JPEG\n",
        "=== labelmap.txt\n# label:color_rgb:parts:actions\nbackground:0,0,0::\ndent:255,0,1::\n=== SegmentationClass/a.png\n\u{2}PNG\n"
    ],
    &[
        "\n=== class_map.json\n",
        "\n=== _classes.csv\n",
        "\n=== classes.txt\n",
        "\n=== masks/b.png\n",
        "\u{2}PNG",
        "value,name",
        "name,r,g,b",
        "0,background",
        "dent:1,2,3::",
        "{\"1\":\"dent\"}",
        "IDAT",
        "PLTE",
        "IEND"
    ]
);

const KLARF_12: &str = "FileVersion 1 2;\nLotID \"L;1\";\nDiePitch 2.0e+004 1.5e+004;\nWaferID \"01\";\nSampleCenterLocation 1.0e+004 7.5e+003;\nClassLookup 2\n 0 \"none\"\n 12 \"dent; long\";\nDefectRecordSpec 11 DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE CLASSNUMBER TEST IMAGECOUNT IMAGELIST ;\nTiffFileName images/a.tif;\nDefectList\n 1 1000.5 2000.25 0 0 10.0 4.0 12 1 2 2 1 0 2 0\n 2 10.0 20.0 1 0 1.0\n 1.0 0 1 0 0;\nEndOfFile;\n";
const KLARF_18: &str = "Record FileRecord \"1.8\" {\n Record LotRecord \"L\" { Field DiePitch 2 {20000000, 15000000} Record WaferRecord \"01\" { List DefectList { Columns 6 { int32 DEFECTID, int32 XREL, int32 YREL, int32 XSIZE, int32 CLASSNUMBER, ImageList IMAGEINFO } Data 2 { 1 1000500 2000250 10000 12 Images 1 { \"a.jpg\" \"JPG\" 1 \"Patch\" }; 2 1 2 NA 0 N; } } }\n List ClassLookupList { Columns 2 { int32 CLASSNUMBER, string CLASSNAME } Data 1 { 12 \"dent\"; } } } }\nEndOfFile;\n";

format_target!(
    KLARF,
    klarf,
    "labels_klarf",
    "KLARF of the versions 1.2 and 1.8",
    "klarf",
    Some("lot.klarf"),
    [KLARF_12, KLARF_18],
    &[
        "FileVersion 1 2;",
        "Record ",
        "Field ",
        "List ",
        "Columns ",
        "Data ",
        "DefectList",
        "DefectRecordSpec ",
        "ClassLookup ",
        "TiffFileName ",
        "EndOfFile;",
        "Images 1 {",
        " N ;",
        "NA",
        "IMAGELIST",
        "IMAGECOUNT",
        "CLASSNUMBER",
        "XREL",
        "DiePitch",
        "\"",
        ";",
        "{",
        "}",
        ",",
        "-1",
        "1e300"
    ]
);

/// Reads labels of one format twice, and checks what came out.
fn labels(input: &[u8], format: &str, file: Option<&str>) {
    let dir = scratch();
    let mut parts = Parts::new(input);
    let flags = parts.byte();
    let path = match file {
        Some(name) => {
            let path = dir.path().join("in").join(name);
            assert!(write_file(&path, parts.rest).is_ok());
            path
        }
        None => {
            let path = dir.path().join("in");
            write_folder(&path, parts.rest);
            path
        }
    };
    let mut options = LabelOptions {
        allow_missing: flags & ALLOW_MISSING != 0,
        ..LabelOptions::default()
    };
    options.format = (flags & GUESSED == 0).then(|| format.to_owned());
    if format == "klarf" && flags & (SETTINGS | GUESSED) == SETTINGS {
        options.klarf_scale = Some("0.5".to_owned());
    }
    if flags & SETTINGS != 0 {
        let settings = [
            ("path_strip", "b/"),
            ("path_prefix", "images"),
            ("predictions", "true"),
        ];
        options
            .columns
            .extend(settings.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
    let read = |name: &str| {
        let scratch = dir.path().join(name);
        assert!(std::fs::create_dir(&scratch).is_ok());
        let dataset = (flags & FOR_DATASET != 0).then(dataset).flatten();
        LabelsSource::open(&path, &scratch, &options, dataset)
            .map(|source| (scratch, info(&source)))
    };
    let (first, again) = (read("first"), read("again"));
    match (&first, &again) {
        (Ok((one, info)), Ok((two, _))) => {
            note("taken");
            for name in [ANNOTATIONS, CLASSES, SAMPLES] {
                assert_eq!(
                    std::fs::read(one.join(name)).ok(),
                    std::fs::read(two.join(name)).ok(),
                    "{name} is the same each time"
                );
            }
            canonical_files(one, info);
        }
        (Err(one), Err(two)) => {
            note(&one.message);
            assert_eq!(one.message, two.message, "a refusal is the same each time");
        }
        _ => assert_eq!(
            first.is_ok(),
            again.is_ok(),
            "labels are taken or refused each time"
        ),
    }
}

fn info(source: &LabelsSource) -> Option<LabelsInfo> {
    if let KindInfo::Labels(info) = source.info() {
        Some(info)
    } else {
        None
    }
}

fn dataset() -> Option<BoundDataset> {
    let mut paths: Vec<RelPath> = DATASET
        .iter()
        .filter_map(|path| path.parse().ok())
        .collect();
    paths.sort();
    let binding = DatasetBinding {
        artifact: "dataset/line3:v1".parse().ok()?,
        digest: Hash::of(b"root"),
    };
    let files = paths.into_iter().map(|path| {
        Ok((
            path.clone(),
            FileInfo {
                size: 1,
                hash: Hash::of(path.as_str().as_bytes()),
            },
        ))
    });
    Some(BoundDataset {
        binding,
        files: Box::new(files),
    })
}

/// What a publish writes, a site can load: the reader of the sink accepts it, and counts the same.
fn canonical_files(dir: &Path, info: &Option<LabelsInfo>) {
    check_rows::<AnnotationRow>(&dir.join(ANNOTATIONS));
    check_rows::<ClassRow>(&dir.join(CLASSES));
    check_rows::<SampleRow>(&dir.join(SAMPLES));
    let counted = sink::labels::testing::count_labels(dir);
    assert!(
        counted.is_ok(),
        "the sink refuses what the source made: {counted:?}"
    );
    let stated = info
        .as_ref()
        .map(|info| (info.samples, info.annotations, info.classes));
    assert_eq!(counted.ok(), stated);
}

/// Every line is what the shared type makes of it.
fn check_rows<T: Serialize + DeserializeOwned>(file: &Path) {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    assert!(text.is_empty() || text.ends_with('\n'));
    for line in text.lines() {
        let again = serde_json::from_str::<T>(line).and_then(|row| serde_json::to_string(&row));
        assert_eq!(again.ok().as_deref(), Some(line));
    }
}

pub(super) const CANONICAL: Target = Target {
    name: "labels_canonical",
    about: "the canonical label files that a site loads (first byte 0), or the rows of a database query",
    run: canonical,
    seeds: || {
        let annotation = r#"{"sample":"a.png","class":1,"kind":"bbox","x":1.0,"y":2.0,"w":3.0,"h":4.0,"geom":null,"attrs":{"a":1},"raw":{"id":7}}"#;
        let class = r#"{"id":1,"name":"dent","attrs":null}"#;
        let sample =
            r#"{"path":"a.png","hash":null,"width":40,"height":50,"split":"train","meta":null}"#;
        let files = format!(
            "=== annotations.jsonl\n{annotation}\n\n=== classes.jsonl\n{class}\n\n=== samples.jsonl\n{sample}\n\n"
        );
        let row = "a.png||dent|1|bbox|1|2|3|4||{\"a\":1}|{\"id\":7}|40|50|train||\n";
        let shape =
            "b.png||dent|1|polygon|||||[[0,0,1,0,1,1]]||||||s|v1\na.png|||||||||||||||s|v1\n";
        [(0, files.as_str()), (1, row), (1, shape)]
            .iter()
            .map(|(how, text)| [&[*how][..], text.as_bytes()].concat())
            .collect()
    },
    words: COMMON,
    short: 250,
};

fn canonical(input: &[u8]) {
    let dir = scratch();
    let mut parts = Parts::new(input);
    if parts.byte().is_multiple_of(2) {
        let at = dir.path().join("in");
        write_folder(&at, parts.rest);
        for name in [ANNOTATIONS, CLASSES, SAMPLES] {
            if !at.join(name).exists() {
                assert!(write_file(&at.join(name), b"").is_ok());
            }
        }
        if taken(sink::labels::testing::count_labels(&at)).is_some() {
            check_rows::<AnnotationRow>(&at.join(ANNOTATIONS));
            check_rows::<ClassRow>(&at.join(CLASSES));
            check_rows::<SampleRow>(&at.join(SAMPLES));
        }
        return;
    }
    let text = String::from_utf8_lossy(parts.rest);
    let row = |line: &str| -> QueryRow {
        let mut fields = line
            .split('|')
            .map(|field| (!field.is_empty()).then(|| field.to_owned()));
        std::array::from_fn(|_| fields.next().flatten())
    };
    let rows: Vec<QueryRow> = text.lines().map(row).collect();
    assert_eq!(
        QUERY_COLUMNS.len(),
        rows.first().map_or(QUERY_COLUMNS.len(), |row| row.len())
    );
    let read = |rows: Vec<QueryRow>, name: &str| {
        let scratch = dir.path().join(name);
        assert!(std::fs::create_dir(&scratch).is_ok());
        LabelsSource::from_query(
            std::iter::once(rows),
            &scratch,
            &LabelOptions::default(),
            None,
            &source::own::Own::none(),
            &mut |_, _| Ok(Vec::new()),
        )
        .map(|source| (scratch, info(&source)))
    };
    // The order of the rows makes no difference.
    let turned = rows.iter().rev().cloned().collect();
    let (first, again) = (read(rows, "first"), read(turned, "again"));
    assert_eq!(
        first.is_ok(),
        again.is_ok(),
        "{:?} {:?}",
        first.as_ref().err(),
        again.as_ref().err()
    );
    if let (Some((one, info)), Ok((two, _))) = (taken(first), again) {
        for name in [ANNOTATIONS, CLASSES, SAMPLES] {
            assert_eq!(
                std::fs::read(one.join(name)).ok(),
                std::fs::read(two.join(name)).ok(),
                "{name}"
            );
        }
        canonical_files(&one, &info);
    }
}
