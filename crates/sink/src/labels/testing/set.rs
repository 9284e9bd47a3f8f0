//! Label sets for tests, in canonical form, with difficult content: names in Chinese, escapes,
//! repeated and unordered keys, numbers that a parser would change, rows without a class.

use std::path::{Path, PathBuf};

use crate::Incoming;
use crate::Sink as _;
use crate::labels::LabelsSink;
use base::names::{ArtifactRef, Kind, RelPath};
use content::chunk::Hash;
use content::label_rows::{ANNOTATIONS, AnnotationRow, CLASSES, ClassRow, SAMPLES, SampleRow};
use content::manifest::{KindInfo, LabelsInfo, Root, Totals};

/// The three files as text.
#[derive(Clone)]
pub struct Set {
    pub classes: String,
    pub samples: String,
    pub annotations: String,
}

fn json(text: impl Into<String>) -> Option<Box<serde_json::value::RawValue>> {
    Some(serde_json::value::RawValue::from_string(text.into()).unwrap())
}

fn lines<T: serde::Serialize>(rows: &[T]) -> String {
    rows.iter()
        .map(|row| serde_json::to_string(row).unwrap() + "\n")
        .collect()
}

impl Set {
    /// `samples` samples with about `each` annotations (some have none); each record has `padding`
    /// additional bytes.
    pub fn new(seed: u64, samples: usize, each: usize, padding: usize) -> Self {
        let classes: Vec<ClassRow> = ["scratch", "划痕", "a \"quoted\"\tname", "dead pixel"]
            .iter()
            .zip([-1, 0, 3, 7_000_000_000])
            .map(|(name, id)| ClassRow {
                id,
                name: (*name).into(),
                attrs: (id == 3)
                    .then(|| json(r#"{"b":1,"a":[1.00,2e3]}"#))
                    .flatten(),
            })
            .collect();
        // In byte order "line-2" comes before "line/…"; in manifest order it does not.
        let mut paths: Vec<RelPath> = (0..samples)
            .map(|i| {
                format!("{}/面板 {i:07}.png", ["line", "line-2", "线3"][i % 3])
                    .parse()
                    .unwrap()
            })
            .collect();
        paths.sort();
        let (mut sample_rows, mut annotation_rows) = (Vec::new(), Vec::new());
        for (i, path) in paths.iter().enumerate() {
            let bound = i % 4 != 0;
            sample_rows.push(SampleRow {
                path: path.to_string(),
                hash: bound.then(|| Hash::of(path.as_str().as_bytes())),
                width: bound.then_some(640),
                height: bound.then_some(480),
                split: (i % 5 != 0).then(|| "train".into()),
                meta: (i % 7 == 0)
                    .then(|| json(r#"{"z":"\u0000","a":1,"a":2}"#))
                    .flatten(),
            });
            for n in 0..if i % 10 == 9 { 0 } else { each } {
                let x = (seed as f64) * 0.1 + n as f64 + (i as f64) / 3.0;
                annotation_rows.push(AnnotationRow {
                    sample: path.to_string(),
                    class: [Some(-1), Some(0), Some(7_000_000_000), None][(i + n) % 4],
                    kind: ["bbox", "polygon", "class", "other"][n % 4].into(),
                    x: Some(if n == 1 { -0.0 } else { x }),
                    y: Some(1e300),
                    w: (n % 3 != 0).then_some(12.0),
                    h: (n % 3 != 0).then_some(0.1 + 0.2),
                    geom: (n % 2 == 1)
                        .then(|| json(format!("[[{x},1.50],[2,3E2]]")))
                        .flatten(),
                    attrs: (n % 5 == 0)
                        .then(|| json(r#"{"who":"检验员","q":"\u0000 \ud83d\ude00 😀"}"#))
                        .flatten(),
                    raw: json(format!(
                        r#"{{"seed":{seed},"n":{n},"b":1.0,"a":-0,"a":"again","pad":"{}"}}"#,
                        "p".repeat(padding)
                    ))
                    .unwrap(),
                });
            }
        }
        Self {
            classes: lines(&classes),
            samples: lines(&sample_rows),
            annotations: lines(&annotation_rows),
        }
    }

    pub fn count(&self) -> i64 {
        self.annotations.lines().count() as i64
    }

    /// The files in the order of [`Set::of`].
    fn files(&self) -> [(&'static str, &str); 3] {
        [
            (CLASSES, &self.classes),
            (SAMPLES, &self.samples),
            (ANNOTATIONS, &self.annotations),
        ]
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a fixture need not survive a crash"
    )]
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        for (name, text) in self.files() {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }

    /// Panics unless the directory contains exactly these bytes.
    pub fn assert_at(&self, dir: &Path) {
        for (name, text) in self.files() {
            let found = std::fs::read_to_string(dir.join(name)).unwrap();
            for (n, (is, should)) in found.lines().zip(text.lines()).enumerate() {
                assert_eq!(is, should, "{name} line {}", n + 1);
            }
            assert!(found == text, "{name} has another length");
        }
    }

    /// The incoming artifact for this version, as the transfer engine passes it.
    pub fn incoming(&self, version: &str) -> Incoming {
        let count = |text: &str| text.lines().count() as u64;
        let info = LabelsInfo {
            dataset: None,
            samples: count(&self.samples),
            annotations: count(&self.annotations),
            classes: count(&self.classes),
            format: "jsonl".into(),
        };
        let all: String = self.files().iter().map(|(_, text)| *text).collect();
        Incoming {
            artifact: ArtifactRef::new(Kind::Labels, "aoi-line3", version).unwrap(),
            digest: Hash::of(all.as_bytes()),
            root: Root {
                format: 1,
                kind: Kind::Labels,
                info: KindInfo::Labels(info),
                chunking: content::chunk::DEFAULT_CHUNKING,
                totals: Totals {
                    files: 3,
                    bytes: all.len() as u64,
                    ..Totals::default()
                },
                depth: 0,
                pages: Vec::new(),
            },
            transfer: format!("t-{version}").parse().unwrap(),
            waits: Default::default(),
        }
    }

    /// Stages the set, as the transfer engine does before a commit.
    pub fn stage(&self, sink: &LabelsSink, version: &str) -> (Incoming, PathBuf) {
        let incoming = self.incoming(version);
        let staged = incoming.transfer.in_dir(sink.staging_root());
        self.write(&staged);
        (incoming, staged)
    }
}
