//! KLARF of each version.

use super::omitted::notes;
use super::*;
use base::omitted::Category;

const KLARF_12: &str = "FileVersion 1 2;
FileTimestamp 11-30-2026 03:00:00;
InspectionStationID \"VENDOR\" \"MODEL;X\" \"AOI-7\";
SampleType PANEL;
LotID \"批 01\";
SampleSize 1 300;
DiePitch 2.0000000000e+004 1.5000000000e+004;
DieOrigin 0.0 0.0;
WaferID \"01\";
Slot 1;
SampleCenterLocation 1.0000000000e+004 7.5000000000e+003;
ClassLookup 2
 0 \"未分类\"
 12 \"划痕; 长\";
SampleTestPlan 2
 0 0
 1 0;
DefectRecordSpec 12 DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE DEFECTAREA CLASSNUMBER TEST IMAGECOUNT IMAGELIST ;
TiffFileName 图像/a_1.tif;
DefectList
 1 1000.500 2000.250 0 0 10.0 4.0 32.5 12 1 2 2 1 0 2 0
 2 1000.500 2000.250 1 0 1.0 1.0 1.0 0 1 0 0;
TiffFileName 图像/a_3.tif;
DefectList
 3 15.000 20.000 0 1 5.0
  5.0 25.0 12 1 1 1
  1 0;
SummarySpec 5
 TESTNO NDEFECT DEFDENSITY NDIE NDEFDIE ;
SummaryList
 1 3 5.0e-003 2 2;
EndOfFile;
";

#[test]
fn klarf_of_versions_1_1_and_1_2() {
    for version in ["1 1", "1 2"] {
        let text = KLARF_12.replace("FileVersion 1 2", &format!("FileVersion {version}"));
        let mut input = Input::file("small.001", text);
        let output = input.read().unwrap();
        assert_eq!((output.format, output.guessed), ("klarf", true));
        assert_eq!(output.class_names(), ["0=未分类", "12=划痕; 长"]);
        // Without a scale there are no boxes. A defect without images belongs to the file.
        assert_eq!(
            output.rows(),
            [
                "small.001 0 class -,-,-,-",
                "图像/a_1.tif 12 class -,-,-,-",
                "图像/a_3.tif 12 class -,-,-,-"
            ]
        );
        assert_eq!(
            output.attrs()[1],
            "{\"DEFECTID\":1,\"XREL\":1000.5,\"YREL\":2000.25,\"XINDEX\":0,\"YINDEX\":0,\"XSIZE\":10.0,\"YSIZE\":4.0,\
             \"DEFECTAREA\":32.5,\"CLASSNUMBER\":12,\"TEST\":1,\"IMAGECOUNT\":2,\
             \"images\":[{\"index\":1,\"type\":0},{\"index\":2,\"type\":0}],\"wafer_x\":-8999.5,\"wafer_y\":-5499.75,\
             \"unit\":\"um\",\"lot\":\"批 01\",\"wafer\":\"01\",\"slot\":\"1\",\"station\":\"VENDOR MODEL;X AOI-7\"}"
        );
        assert!(output.attrs()[2].contains("\"XSIZE\":5.0,\"YSIZE\":5.0,\"DEFECTAREA\":25.0"));
        // Half a micrometre a pixel, in an image of the die: y counts downwards from its top.
        input.options.klarf_scale = Some("0.5".into());
        assert_eq!(
            input.read().unwrap().rows(),
            [
                "small.001 0 bbox 2000,25998.5,2,2",
                "图像/a_1.tif 12 bbox 1991,25995.5,20,8",
                "图像/a_3.tif 12 bbox 25,29955,10,10"
            ]
        );
    }
}

#[test]
fn klarf_beside_its_images() {
    // Each image has the defect in its centre.
    let mut input = Input::folder(&[
        (
            "lot/small.klarf",
            KLARF_12.replace(".tif", ".png").as_bytes(),
        ),
        ("lot/图像/a_1.png", &png(100, 80)),
        ("lot/图像/a_3.png", &png(60, 60)),
    ])
    .column("klarf_image", "defect");
    input.options.klarf_scale = Some("0.5".into());
    input.options.on_bad = Some("skip".into());
    let output = input.read().unwrap();
    assert_eq!(
        output.rows(),
        [
            "lot/图像/a_1.png 12 bbox 40,36,20,8",
            "lot/图像/a_3.png 12 bbox 25,25,10,10"
        ]
    );
    assert!(notes(&input, Category::BadRecords)[0].starts_with("1 × image size unknown"));
}

const KLARF_18: &str = r#"Record FileRecord "1.8"
{
  Field FileTimestamp 2 {"2026-11-30", "03:00:00"}
  Record LotRecord "批 01"
  {
    Field DiePitch 2 {20000000, 15000000}
    Record WaferRecord "01"
    {
      Field SampleCenterLocation 2 {10000000, 7500000}
      List DefectList
      {
        Columns 9 { int32 DEFECTID, int32 XREL, int32 YREL, int32 XINDEX, int32 YINDEX,
          int32 XSIZE, int32 YSIZE, int32 CLASSNUMBER, ImageList IMAGEINFO }
        Data 2
        {
          1 1000500 2000250 0 0 10000 4000 12 Images 2 { "图像/a_1.jpg" "JPG" 1 "Patch", "图像/a_1r.jpg" "JPG" 1 "Ref" };
          2 1000500 2000250
            1 0 1000 NA 0 N ;
        }
      }
    }
    List ClassLookupList
    {
      Columns 3 { int32 CLASSNUMBER, string CLASSNAME, string CLASSCODE }
      Data 1 { 12 "划痕; 长" ""; }
    }
  }
}
EndOfFile;
"#;

#[test]
fn klarf_of_version_1_8() {
    let mut input = Input::file("small.klarf", KLARF_18);
    input.options.klarf_scale = Some("0.5".into());
    let output = input.read().unwrap();
    assert_eq!((output.format, output.guessed), ("klarf", true));
    assert_eq!(output.class_names(), ["0=0", "12=划痕; 长"]);
    assert_eq!(
        output.rows(),
        [
            "small.klarf 0 point 2001,25999.5,-,-",
            "图像/a_1.jpg 12 bbox 1991,25995.5,20,8"
        ]
    );
    // Every image is a sample.
    assert_eq!(
        output.sample_rows(),
        [
            "small.klarf - - -",
            "图像/a_1.jpg - - -",
            "图像/a_1r.jpg - - -"
        ]
    );
    let attrs = output.attrs();
    assert!(
        attrs[0].contains("\"YSIZE\":null") && attrs[0].contains("\"unit\":\"nm\""),
        "{}",
        attrs[0]
    );
    assert!(
        attrs[1].contains("\"images\":[{\"format\":\"JPG\",\"index\":1,\"type\":\"Patch\",\"file\":\"图像/a_1.jpg\"}"),
        "{}",
        attrs[1]
    );
    assert!(
        attrs[1].contains("\"wafer_x\":-8999500.0,\"wafer_y\":-5499750.0"),
        "{}",
        attrs[1]
    );
}

#[test]
fn klarf_that_is_wrong() {
    for (text, said) in [
        (KLARF_12.replace("EndOfFile;", ""), "it is cut off"),
        (
            KLARF_12.replace("DefectRecordSpec 12", "DefectRecordSpec 11"),
            "announces 11 columns and names 12",
        ),
        (
            KLARF_12.replace("FileVersion 1 2", "FileVersion 2 0"),
            "FileVersion is \"2 0\"",
        ),
        (
            KLARF_12.replace("2 1000.500 2000.250 1 0 1.0 1.0 1.0 0 1 0 0;", "x 1;"),
            "its DEFECTID is \"x\"",
        ),
        (
            KLARF_12.replace(" 25.0 12 1 1 1", " 25.0 12 1 1 7"),
            "its IMAGELIST is shorter",
        ),
        (
            KLARF_12.replace(" 1000.500 2000.250 0 0", " a 2000.250 0 0"),
            "its XREL is \"a\"",
        ),
        (
            KLARF_18.replace("Data 2", "Data 3"),
            "announces 3 rows and has 2",
        ),
        (
            KLARF_18.replace("Images 2 {", "Images 3 {"),
            "announces 3 images",
        ),
        (KLARF_18.replace(" N ;", ";"), "it has 8 of 9 values"),
        (
            KLARF_18.replace("\"1.8\"", "\"2.0\""),
            "its version is \"2.0\"",
        ),
        (KLARF_18.replace("EndOfFile;", ""), "it is cut off"),
    ] {
        let mut input = Input::file("a.klarf", text);
        input.options.klarf_scale = Some("1".into());
        let message = input.read().unwrap_err().message;
        assert!(message.contains(said), "{said}: {message}");
    }
    // A bad defect is left out, and the next ones are read.
    let mut input = Input::file(
        "a.klarf",
        KLARF_12.replace("\n 1 1000.500", "\n x 1000.500"),
    );
    input.options.on_bad = Some("skip".into());
    assert_eq!(input.read().unwrap().rows().len(), 2);
    // An empty list of images may be left out at the end of a line.
    let text = KLARF_12.replace("0 1 0 0;", "0 1 0\n 4 1.0 1.0 0 0 1.0 1.0 1.0 0 1 0;");
    assert_eq!(Input::file("a.klarf", text).read().unwrap().rows().len(), 4);
    let mut input = Input::file("a.csv", "path\na.png\n");
    input.options.klarf_scale = Some("1".into());
    assert_eq!(input.read().unwrap_err().code, base::fault::Code::Usage);
}

#[test]
fn klarf_in_bounded_memory() {
    // Each statement, field or row is bounded, and so is all that is kept of a file.
    let word = format!("\"{}\" ", "x".repeat(60 << 10));
    let large = word.repeat(80);
    let many: String = (0..80).map(|n| format!("Statement{n} {word};\n")).collect();
    let fields: String = (0..80)
        .map(|n| format!("Field F{n} 1 {{{word}}}\n"))
        .collect();
    let columns = format!(
        "DefectRecordSpec 80 {};",
        (0..80).map(|n| format!("C{n} ")).collect::<String>()
    );
    for (text, said) in [
        (
            KLARF_12.replace("Slot 1;", &many),
            "its statements or fields are larger than",
        ),
        (
            format!("FileVersion 1 2; {columns} DefectList {large}; EndOfFile;"),
            "a statement or row is larger than",
        ),
        (
            KLARF_18.replacen("{", &format!("{{ Field F 80 {{{large}}}"), 1),
            "a statement or row is larger than",
        ),
        (
            KLARF_18.replacen("{", &format!("{{ {fields}"), 1),
            "its statements or fields are larger than",
        ),
    ] {
        let message = match Input::file("a.klarf", text).read() {
            Err(fault) => fault.message,
            Ok(_) => unreachable!("not refused: {said}"),
        };
        assert!(message.contains(said), "{said}: {message}");
    }
}
