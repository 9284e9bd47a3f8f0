//! Labels of every format, good and bad, through the door that `ingest` uses.

mod bad;
mod formats;
mod geometry;
mod good;
mod klarf;
mod omitted;
mod order;
mod real;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use super::*;
use content::chunk::Hash;
use content::label_rows::{AnnotationRow, ClassRow, SampleRow};

/// An input on disk, and how it is to be read.
pub(super) struct Input {
    root: tempfile::TempDir,
    pub(super) path: PathBuf,
    pub(super) options: LabelOptions,
}

impl Input {
    /// One file of this name.
    pub(super) fn file(name: &str, bytes: impl AsRef<[u8]>) -> Self {
        let input = Self::folder(&[(name, bytes.as_ref())]);
        let path = input.root.path().join(name);
        Self { path, ..input }
    }

    /// A folder of files.
    pub(super) fn folder(files: &[(&str, &[u8])]) -> Self {
        let root = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            File::create(path).unwrap().write_all(bytes).unwrap();
        }
        Self {
            path: root.path().into(),
            root,
            options: LabelOptions::default(),
        }
    }

    pub(super) fn format(mut self, word: &str) -> Self {
        self.options.format = Some(word.to_owned());
        self
    }

    pub(super) fn column(mut self, field: &str, column: &str) -> Self {
        self.options
            .columns
            .insert(field.to_owned(), column.to_owned());
        self
    }

    pub(super) fn read(&self) -> Result<Output, Fault> {
        self.read_for(None)
    }

    /// Reads for a dataset of these files.
    pub(super) fn read_for(&self, dataset: Option<&[&str]>) -> Result<Output, Fault> {
        let scratch = tempfile::tempdir().unwrap();
        let mut source = LabelsSource::open(
            &self.path,
            scratch.path(),
            &self.options,
            dataset.map(bound),
        )?;
        let mut output = Output {
            format: source.format(),
            guessed: source.guessed(),
            ..Output::default()
        };
        let mut names = Vec::new();
        while let Some(entry) = source.next()? {
            let SourceBody::File {
                size,
                content: Content::File(path),
            } = entry.body
            else {
                unreachable!("an entry is no file")
            };
            let text = std::fs::read_to_string(path).unwrap();
            assert_eq!((entry.mode, size), (0o644, text.len() as u64));
            names.push(entry.path.to_string());
            let slots = [
                &mut output.annotations,
                &mut output.classes,
                &mut output.samples,
            ];
            if let Some(slot) = slots.into_iter().nth(names.len() - 1) {
                *slot = text;
            }
        }
        assert_eq!(names, [ANNOTATIONS, CLASSES, SAMPLES]);
        assert_eq!(
            std::fs::read_dir(scratch.path()).unwrap().count(),
            3,
            "nothing else may be left in the scratch folder"
        );
        check_canonical::<AnnotationRow>(&output.annotations);
        check_canonical::<ClassRow>(&output.classes);
        check_canonical::<SampleRow>(&output.samples);
        let KindInfo::Labels(info) = source.info() else {
            unreachable!("labels have labels' info")
        };
        assert_eq!(info.format, output.format);
        let lines = |text: &str| text.lines().count() as u64;
        let counted = (
            lines(&output.annotations),
            lines(&output.classes),
            lines(&output.samples),
        );
        assert_eq!((info.annotations, info.classes, info.samples), counted);
        assert_eq!(info.dataset.is_some(), dataset.is_some());
        Ok(output)
    }
}

/// Every line must be what the shared type makes of it.
fn check_canonical<T: serde::Serialize + serde::de::DeserializeOwned>(text: &str) {
    assert!(text.is_empty() || text.ends_with('\n'));
    for line in text.lines() {
        let row: T =
            serde_json::from_str(line).unwrap_or_else(|error| unreachable!("{line}: {error}"));
        assert_eq!(serde_json::to_string(&row).unwrap(), line);
    }
}

/// A dataset of these files, each with the hash of its path.
fn bound(files: &[&str]) -> BoundDataset {
    let mut paths: Vec<RelPath> = files.iter().map(|path| path.parse().unwrap()).collect();
    paths.sort();
    let binding = DatasetBinding {
        artifact: "dataset/line3:v1".parse().unwrap(),
        digest: Hash::of(b"root"),
    };
    let files = paths.into_iter().map(|path| {
        let info = FileInfo {
            size: 1,
            hash: Hash::of(path.as_str().as_bytes()),
        };
        Ok((path, info))
    });
    BoundDataset {
        binding,
        files: Box::new(files),
    }
}

/// The canonical files as text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) format: &'static str,
    pub(super) guessed: bool,
    pub(super) annotations: String,
    pub(super) classes: String,
    pub(super) samples: String,
}

impl Output {
    /// Each annotation as `sample class kind x,y,w,h`.
    pub(super) fn rows(&self) -> Vec<String> {
        self.each(|row| {
            let number = |n: Option<f64>| {
                n.map_or("-".to_owned(), |n| ((n * 1e6).round() / 1e6).to_string())
            };
            let class = row.class.map_or("-".to_owned(), |id| id.to_string());
            format!(
                "{} {class} {} {},{},{},{}",
                row.sample,
                row.kind,
                number(row.x),
                number(row.y),
                number(row.w),
                number(row.h)
            )
        })
    }

    pub(super) fn each(&self, show: impl Fn(AnnotationRow) -> String) -> Vec<String> {
        self.annotations
            .lines()
            .map(|line| show(serde_json::from_str(line).unwrap()))
            .collect()
    }

    pub(super) fn geoms(&self) -> Vec<String> {
        self.each(|row| {
            row.geom
                .map_or("-".to_owned(), |json| json.get().to_owned())
        })
    }

    pub(super) fn attrs(&self) -> Vec<String> {
        self.each(|row| {
            row.attrs
                .map_or("-".to_owned(), |json| json.get().to_owned())
        })
    }

    pub(super) fn raws(&self) -> Vec<String> {
        self.each(|row| row.raw.get().to_owned())
    }

    /// The classes as `id=name`.
    pub(super) fn class_names(&self) -> Vec<String> {
        let show = |row: ClassRow| format!("{}={}", row.id, row.name);
        self.classes
            .lines()
            .map(|line| show(serde_json::from_str(line).unwrap()))
            .collect()
    }

    /// The samples as `path width height split`.
    pub(super) fn sample_rows(&self) -> Vec<String> {
        let show = |row: SampleRow| {
            let number = |n: Option<i64>| n.map_or("-".to_owned(), |n| n.to_string());
            format!(
                "{} {} {} {}",
                row.path,
                number(row.width),
                number(row.height),
                row.split.as_deref().unwrap_or("-")
            )
        };
        self.samples
            .lines()
            .map(|line| show(serde_json::from_str(line).unwrap()))
            .collect()
    }
}

/// A PNG's header, which is all that is looked at.
pub(super) fn png(width: u32, height: u32) -> Vec<u8> {
    let mut out = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    out.extend(width.to_be_bytes());
    out.extend(height.to_be_bytes());
    out
}

#[test]
fn formats_are_guessed_and_said() {
    let empty_coco = br#"{"images":[],"annotations":[],"categories":[]}"#;
    for (input, format) in [
        (Input::file("a.json", empty_coco), "coco"),
        (
            Input::file("a.json", [&b"\xef\xbb\xbf\n"[..], empty_coco].concat()),
            "coco",
        ),
        (Input::file("a.json", "[]"), "label_studio"),
        (Input::file("a.TSV", "path\tclass\n"), "csv"),
        (Input::file("a.ndjson", ""), "jsonl"),
        (
            Input::file("a.json", "{\"path\":\"a\"}\n{\"path\":\"b\"}\n"),
            "jsonl",
        ),
        (Input::folder(&[("classes.txt", b"a")]), "yolo"),
        (
            Input::folder(&[(
                "x/a.xml",
                b"<annotation><filename>a.png</filename></annotation>",
            )]),
            "voc",
        ),
    ] {
        let output = input.read().unwrap();
        assert_eq!((output.format, output.guessed), (format, true));
    }
    let output = Input::file("rows.txt", "path,class\na.png,dent\n")
        .format("csv")
        .read()
        .unwrap();
    assert_eq!((output.format, output.guessed), ("csv", false));
}

#[test]
fn a_dataset_is_joined_by_path() {
    let text = "path,class\nb/1.png,dent\na.png,dent\nb.png,dent\n";
    let input = Input::file("a.csv", text);
    let output = input
        .read_for(Some(&["a.png", "b/0.png", "b/1.png", "b.png", "c.png"]))
        .unwrap();
    let hashes: Vec<String> = output
        .samples
        .lines()
        .map(|line| serde_json::from_str::<SampleRow>(line).unwrap())
        .inspect(|row| assert_eq!(row.hash, Some(Hash::of(row.path.as_bytes()))))
        .map(|row| row.path)
        .collect();
    // A folder's files stand before a file whose name goes on behind the folder's.
    assert_eq!(hashes, ["a.png", "b/1.png", "b.png"]);

    let fault = input.read_for(Some(&["a.png", "b/2.png"])).unwrap_err();
    assert_eq!(fault.code, base::fault::Code::Integrity);
    assert!(
        fault.message.contains("2 records refused (2 × sample not in the dataset): b/1.png: dataset/line3:v1 has no such file; b.png:"),
        "{}",
        fault.message
    );
    assert!(fault.next.contains("--allow-missing"));

    let mut input = input;
    input.options.allow_missing = true;
    let output = input.read_for(Some(&["a.png"])).unwrap();
    assert_eq!(
        output
            .samples
            .lines()
            .filter(|line| line.contains("\"hash\":null"))
            .count(),
        2
    );

    let input = input
        .column("path_prefix", "images/")
        .column("path_strip", "b");
    let output = input.read().unwrap();
    assert_eq!(
        output.sample_rows(),
        [
            "images/.png - - -",
            "images/1.png - - -",
            "images/a.png - - -"
        ]
    );
}
