//! What a file is, from its first bytes: a format that is read, or one that is known and not read.
//!
//! JSON is recognised by its keys and the first byte of each value, XML by its root, KLARF by its
//! first word, other files by their signature. Nothing is decoded beyond that.

use super::guess::Format;

/// How much of a file is looked at.
pub(super) const LOOK_BYTES: u64 = 64 << 10;

/// What a file was recognised as.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    Format(Format),
    /// A format that is not read: what it is, and what to do.
    Unread(&'static str, &'static str),
    /// Why nothing was recognised.
    Unknown(&'static str),
}

use Known::Unread;

/// Recognises the file that begins so.
pub(super) fn of_head(head: &[u8]) -> Known {
    for (magic, what, instead) in [
        (
            &b"PK\x03\x04"[..],
            "an archive (or an Excel workbook)",
            "unpack it first; save a workbook as CSV",
        ),
        (&[0x1f, 0x8b][..], "a compressed file", "unpack it first"),
        (b"7z\xbc\xaf\x27\x1c", "an archive", "unpack it first"),
        (b"Rar!", "an archive", "unpack it first"),
        (b"PAR1", "Parquet", "write the table as CSV or JSON Lines"),
        (
            b"SQLite format 3\0",
            "a SQLite database",
            "write the rows as CSV or JSON Lines; the site's own label database is db:SELECT …",
        ),
        (
            b"\x89HDF",
            "HDF5 (or a MATLAB file)",
            "write the labels as CSV, JSON Lines or COCO",
        ),
        (
            b"MATLAB",
            "a MATLAB file",
            "write the labels as CSV, JSON Lines or COCO",
        ),
        (
            b"\x89PNG",
            "an image",
            "give the directory of masks with a class map: --format masks",
        ),
        (
            &[0xff, 0xd8, 0xff][..],
            "an image",
            "give the file or directory of the labels",
        ),
    ] {
        if head.starts_with(magic) {
            return Unread(what, instead);
        }
    }
    let utf16;
    let text = match head {
        [0xef, 0xbb, 0xbf, rest @ ..] => rest,
        // Every other byte of UTF-16 is enough to recognise ASCII.
        [0xff, 0xfe, rest @ ..] => {
            utf16 = rest.iter().copied().step_by(2).collect::<Vec<u8>>();
            &utf16
        }
        [0xfe, 0xff, rest @ ..] => {
            utf16 = rest.iter().copied().skip(1).step_by(2).collect::<Vec<u8>>();
            &utf16
        }
        _ => head,
    };
    let text = text.trim_ascii_start();
    match text.first() {
        Some(b'[') => list(&Keys::of(text)),
        // A whole object on the first line and another one after it: no single document looks like
        // that.
        Some(b'{') => match text.iter().position(|b| *b == b'\n') {
            Some(end)
                if serde_json::from_slice::<serde::de::IgnoredAny>(&text[..end]).is_ok()
                    && text[end..].trim_ascii_start().starts_with(b"{") =>
            {
                Known::Format(Format::Jsonl)
            }
            _ => object(&Keys::of(text)),
        },
        Some(b'<') => xml(text),
        None => Known::Unknown("it is empty"),
        Some(_) if super::klarf::begins(text) => Known::Format(Format::Klarf),
        Some(_) => Known::Unknown(
            "it is not JSON and its name does not end in .csv, .tsv, .jsonl or .ndjson",
        ),
    }
}

fn list(keys: &Keys) -> Known {
    let has = |key| keys.inner(key).is_some();
    if has("image_id") && (has("score") || has("category_id")) {
        return Unread(
            "a list of COCO results (detections), without images and classes",
            "publish a COCO file with images, annotations and categories; add these as its annotations",
        );
    }
    let is_of_create_ml = has("coordinates") || !has("id");
    if has("image") && has("annotations") && !has("data") && is_of_create_ml {
        return Unread("CreateML", "export as COCO, YOLO or Pascal VOC");
    }
    if has("External ID") || has("Labeled Data") {
        return Unread(
            "an export of Labelbox",
            "export as COCO, or as JSON Lines with one row each",
        );
    }
    Known::Format(Format::LabelStudio)
}

fn object(keys: &Keys) -> Known {
    let has = |key| keys.outer(key).is_some();
    let inner = |key| keys.inner(key).is_some();
    if has("shapes") && keys.outer("shapes") == Some(b'[') {
        return Known::Format(Format::LabelMe);
    }
    if has("dm_format_version")
        || (has("items") && (keys.outer("categories") == Some(b'{') || has("infos")))
    {
        return Known::Format(Format::Datumaro);
    }
    if has("_via_img_metadata") || has("_via_settings") {
        return Known::Format(Format::Via);
    }
    if has("project") && has("attribute") && (has("file") || has("view")) {
        return Unread(
            "a project of VGG Image Annotator 3",
            "export it as COCO, or as CSV",
        );
    }
    if has("images") || keys.outer("categories") == Some(b'[') {
        return Known::Format(Format::Coco);
    }
    if has("result") && (has("completed_by") || has("task") || has("was_cancelled")) {
        return Unread(
            "one annotation of Label Studio's target storage",
            "export the project from Label Studio as JSON (all tasks in one file)",
        );
    }
    if keys.outer("data") == Some(b'{') && (has("annotations") || has("completions")) {
        return Unread(
            "one task of Label Studio",
            "export the project as JSON (all tasks in one file), or put the task into a list: [ … ]",
        );
    }
    if has("objects") && (has("size") || has("tags")) {
        return Unread("Supervisely", "export the project as COCO or Pascal VOC");
    }
    if inner("regions") && (inner("filename") || inner("file_attributes")) {
        return Known::Format(Format::Via);
    }
    if has("markResult") || has("step_1") {
        return Unread("LabelBee", "export as COCO or YOLO");
    }
    if has("annotations") || keys.outer.is_empty() {
        // Its reader says what is missing.
        return Known::Format(Format::Coco);
    }
    Known::Unknown("it is a JSON object, and has none of the members of a known format")
}

fn xml(text: &[u8]) -> Known {
    let text = String::from_utf8_lossy(text);
    let mut rest = text.as_ref();
    // The first element behind the declaration, comments and a document type.
    let root = loop {
        let Some(start) = rest.find('<') else {
            break "";
        };
        rest = &rest[start + 1..];
        let skip = match rest.as_bytes().first() {
            Some(b'?') => "?>",
            Some(b'!') if rest.starts_with("!--") => "-->",
            Some(b'!') => ">",
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || matches!(c, '>' | '/'));
                break &rest[..end.unwrap_or(rest.len())];
            }
        };
        match rest.find(skip) {
            Some(end) => rest = &rest[end + skip.len()..],
            None => break "",
        }
    };
    match root {
        "annotations" => Known::Format(Format::Cvat),
        "annotation" => Unread(
            "one file of Pascal VOC",
            "give the folder that holds the Pascal VOC XML files",
        ),
        "dataset" => Unread(
            "an XML file of imglab (dlib)",
            "export as COCO or Pascal VOC",
        ),
        "html" | "HTML" => Unread(
            "a web page",
            "give the labels themselves; a download may have ended at a login page",
        ),
        _ => Known::Unknown("it is one XML file, and its root is not <annotations> (CVAT)"),
    }
}

/// The keys of the outer value and of the values in it, each with the first byte of its value.
#[derive(Default)]
struct Keys {
    outer: Vec<(String, u8)>,
    inner: Vec<(String, u8)>,
}

impl Keys {
    /// Reads the beginning of a document, which may be cut off anywhere.
    fn of(text: &[u8]) -> Self {
        let mut keys = Self::default();
        let (mut depth, mut at) = (0u32, 0);
        let mut last: Option<String> = None;
        while let Some(byte) = text.get(at) {
            match byte {
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                b'"' => {
                    let start = at;
                    at += 1;
                    while let Some(byte) = text.get(at) {
                        match byte {
                            b'\\' => at += 2,
                            b'"' => break,
                            _ => at += 1,
                        }
                    }
                    last = text
                        .get(start..=at)
                        .and_then(|quoted| serde_json::from_slice(quoted).ok());
                }
                b':' => {
                    let value = text[at + 1..].trim_ascii_start().first().copied();
                    let list = match depth {
                        1 => Some(&mut keys.outer),
                        2 => Some(&mut keys.inner),
                        _ => None,
                    };
                    if let (Some(list), Some(key), Some(value)) = (list, last.take(), value)
                        && list.len() < 1000
                    {
                        list.push((key, value));
                    }
                }
                _ => {}
            }
            at += 1;
        }
        keys
    }

    fn outer(&self, name: &str) -> Option<u8> {
        find(&self.outer, name)
    }

    fn inner(&self, name: &str) -> Option<u8> {
        find(&self.inner, name)
    }
}

fn find(keys: &[(String, u8)], name: &str) -> Option<u8> {
    keys.iter()
        .find(|(key, _)| key == name)
        .map(|(_, first)| *first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_recognised() {
        let format = |text: &str| match of_head(text.as_bytes()) {
            Known::Format(format) => format.as_str(),
            Unread(what, _) => what,
            Known::Unknown(why) => why,
        };
        for (text, expected) in [
            (
                r#"{"version":"5.5.0","flags":{},"shapes":[{"label":"a""#,
                "labelme",
            ),
            (r#"{"dm_format_version":"1.0","categories":{}"#, "datumaro"),
            (
                r#"{"infos":{},"categories":{"label":{"labels":[]}},"items":[]}"#,
                "datumaro",
            ),
            (
                r#"{"a.png10":{"filename":"a.png","size":10,"regions":[]}}"#,
                "via",
            ),
            (r#"{"_via_settings":{},"_via_img_metadata":{}}"#, "via"),
            (r#"{"info":{},"images":[{"id":1}"#, "coco"),
            (
                r#"{"annotations":[{"id":1,"regions":2,"filename":3}]}"#,
                "coco",
            ),
            (
                r#"[{"image_id":1,"category_id":1,"bbox":[1,2,3,4],"score":0.9}]"#,
                "a list of COCO results (detections), without images and classes",
            ),
            (
                r#"[{"id":1,"data":{"image":"a"},"annotations":[]}]"#,
                "label_studio",
            ),
            ("[]", "label_studio"),
            (
                r#"{"id":1,"task":{"id":2,"data":{}},"result":[],"was_cancelled":false}"#,
                "one annotation of Label Studio's target storage",
            ),
            (
                r#"{"id":1,"data":{"image":"a"},"annotations":[]}"#,
                "one task of Label Studio",
            ),
            (
                r#"[{"image":"a.jpg","annotations":[{"label":"x","coordinates":{}}]}]"#,
                "CreateML",
            ),
            (
                "<?xml version=\"1.0\"?><!-- a <b> --><annotations><version>1.1",
                "cvat",
            ),
            ("<annotation verified=\"no\">", "one file of Pascal VOC"),
            ("FileVersion 1 2;\n", "klarf"),
            ("Record FileRecord \"1.8\" {", "klarf"),
            ("PAR1\u{15}", "Parquet"),
            ("", "it is empty"),
            (
                "hello",
                "it is not JSON and its name does not end in .csv, .tsv, .jsonl or .ndjson",
            ),
        ] {
            assert_eq!(format(text), expected, "{text}");
        }
        let utf16: Vec<u8> = "<annotations>".bytes().flat_map(|b| [b, 0]).collect();
        assert_eq!(
            of_head(&[&[0xff, 0xfe], &utf16[..]].concat()),
            Known::Format(Format::Cvat)
        );
        // Cut off anywhere, it does not fail.
        let whole = r#"{"a\"b":{"c":[1,{"d":"e"}]},"shapes":[1]}"#;
        for end in 0..whole.len() {
            of_head(&whole.as_bytes()[..end]);
        }
    }
}
