//! A small but real set of all five kinds, made by a seed: what `quickstart` publishes.
//!
//! The same seed gives the same bytes. A later version is the one before with the changes that a
//! working day brings: a few images shot again, renamed or added, some labels corrected, a line of
//! code edited, a layer put on the image, one run of the model's weights trained further. Writes
//! files without syncing them: they can be made again.

mod picture;

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use self::picture::{CATEGORIES, Defect, HEIGHT, WIDTH};
use base::fault::{Fault, IoContext};

/// Images of the first version; each later one adds [`IMAGES_ADDED`].
const IMAGES: u64 = 120;
const IMAGES_ADDED: u64 = 4;
/// The model: this many tensors of [`TENSOR_BYTES`] each.
const TENSORS: u64 = 12;
const TENSOR_BYTES: usize = 2 << 20;
/// The run of a tensor that a later version changes: about one per cent of the model.
const TRAINED: std::ops::Range<usize> = (512 << 10)..(752 << 10);
/// Generated data in the image's base layer and in each layer put on it, in bytes.
const BASE_DATA_BYTES: usize = 6 << 20;
const PATCH_DATA_BYTES: usize = 192 << 10;

/// The operator project: path, whether it is a program, text.
const OPERATOR: [(&str, bool, &str); 9] = [
    (
        "README.md",
        false,
        include_str!("sample/operator/README.md"),
    ),
    (
        "adc/__init__.py",
        false,
        include_str!("sample/operator/adc/__init__.py"),
    ),
    (
        "adc/features.py",
        false,
        include_str!("sample/operator/adc/features.py"),
    ),
    (
        "adc/labels.py",
        false,
        include_str!("sample/operator/adc/labels.py"),
    ),
    (
        "adc/model.py",
        false,
        include_str!("sample/operator/adc/model.py"),
    ),
    (
        "adc/png.py",
        false,
        include_str!("sample/operator/adc/png.py"),
    ),
    (
        "classify.py",
        true,
        include_str!("sample/operator/classify.py"),
    ),
    (
        "configs/线体3.json",
        false,
        include_str!("sample/operator/configs/line3.json"),
    ),
    ("train.py", true, include_str!("sample/operator/train.py")),
];
/// The line of code that a later version edits.
const EDITED: (&str, &str) = ("adc/features.py", "MARGIN = 4");

/// The location of each kind of the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleSet {
    /// A folder of images.
    pub dataset: PathBuf,
    /// COCO JSON for them.
    pub labels: PathBuf,
    /// A Python project that can train on them.
    pub operator: PathBuf,
    /// An OCI image layout folder.
    pub image: PathBuf,
    /// A safetensors file.
    pub model: PathBuf,
}

/// Writes version `version` (from 1 on) of the set into `dir`, which is made. Running it again
/// writes the same again. Takes about a second and blocks.
pub fn make(dir: &Path, seed: u64, version: u32) -> Result<SampleSet, Fault> {
    let version = u64::from(version.max(1));
    let set = SampleSet {
        dataset: dir.join("dataset"),
        labels: dir.join("labels.json"),
        operator: dir.join("operator"),
        image: dir.join("image"),
        model: dir.join("model.safetensors"),
    };
    let shots = shots(version);
    let mut defects = Vec::with_capacity(shots.len());
    for shot in &shots {
        let (png, found) = picture::panel(&mut Random::new(
            seed,
            Stream::Picture,
            shot.number << 16 | shot.revision,
        ));
        put(&set.dataset.join(&shot.path), &png, 0o644)?;
        defects.push(found);
    }
    let coco = coco(&shots, &defects, version);
    put(&set.labels, &to_json(&coco)?, 0o644)?;
    for (path, text) in operator(version) {
        put(
            &set.operator.join(path.0),
            text.as_bytes(),
            if path.1 { 0o755 } else { 0o644 },
        )?;
    }
    link("train.py", &set.operator.join("train"))?;
    image(&set.image, seed, version)?;
    model(&set.model, seed, version)?;
    Ok(set)
}

/// One image of the dataset.
struct Shot {
    number: u64,
    /// The version in which it was last shot.
    revision: u64,
    path: String,
}

fn shots(version: u64) -> Vec<Shot> {
    let path = |n: u64| match n % 3 {
        0 => format!("线体3/面板_{n:04}.png"),
        line => format!("line-{line}/panel_{n:04}.png"),
    };
    let mut shots: Vec<Shot> = (1..=IMAGES)
        .map(|number| Shot {
            number,
            revision: 1,
            path: path(number),
        })
        .collect();
    for v in 2..=version {
        let at = |step: u64| ((v * 37 + step) % IMAGES) as usize;
        for step in [0, 50] {
            shots[at(step)].revision = v;
        }
        for step in [13, 77] {
            let shot = &mut shots[at(step)];
            shot.path = shot.path.replace(".png", "_复检.png");
        }
        let last = shots.len() as u64;
        shots.extend((last + 1..=last + IMAGES_ADDED).map(|number| Shot {
            number,
            revision: v,
            path: path(number),
        }));
    }
    shots
}

fn coco(shots: &[Shot], defects: &[Vec<Defect>], version: u64) -> Value {
    let images: Vec<Value> = shots
        .iter()
        .map(|s| json!({ "id": s.number, "file_name": s.path, "width": WIDTH, "height": HEIGHT }))
        .collect();
    let mut annotations = Vec::new();
    for (shot, found) in shots.iter().zip(defects) {
        for (i, defect) in found.iter().enumerate() {
            let [x, y, w, h] = defect.bbox;
            annotations.push(json!({
                "id": shot.number * 10 + i as u64, "image_id": shot.number, "category_id": defect.category + 1,
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            }));
        }
    }
    // A second review marked these few as doubtful.
    for v in 2..=version {
        let count = annotations.len() as u64;
        for step in [3, 31, 67] {
            annotations[((v * 11 + step) % count) as usize]["attributes"] =
                json!({ "doubtful": true, "reviewed_in": v });
        }
    }
    let categories: Vec<Value> = CATEGORIES
        .iter()
        .enumerate()
        .map(|(i, name)| json!({ "id": i + 1, "name": name, "supercategory": "defect" }))
        .collect();
    json!({ "info": { "description": "panel defects, generated" }, "images": images, "annotations": annotations, "categories": categories })
}

/// The operator project's files: path and whether it is a program, and text.
fn operator(version: u64) -> impl Iterator<Item = ((&'static str, bool), String)> {
    OPERATOR.into_iter().map(move |(path, program, text)| {
        let text = if path == EDITED.0 && version > 1 {
            text.replace(EDITED.1, &format!("MARGIN = {}", 4 + version))
        } else {
            text.to_owned()
        };
        ((path, program), text)
    })
}

/// An OCI image: a base layer, a layer with the operator project, and one more for each version
/// past the first.
fn image(dir: &Path, seed: u64, version: u64) -> Result<(), Fault> {
    let mut base = Layer::default();
    base.file(
        "etc/os-release",
        b"NAME=\"Packhorse sample\"\nID=sample\n",
        0o644,
    )?;
    base.file(
        "opt/adc/lib/kernels.bin",
        &data(seed, 1, BASE_DATA_BYTES),
        0o644,
    )?;
    let mut project = Layer::default();
    for ((path, program), text) in operator(1) {
        project.file(
            &format!("opt/adc/{path}"),
            text.as_bytes(),
            if program { 0o755 } else { 0o644 },
        )?;
    }
    let mut layers = vec![base.finish()?, project.finish()?];
    for v in 2..=version {
        let mut patch = Layer::default();
        for ((path, _), text) in operator(v).filter(|((path, _), _)| *path == EDITED.0) {
            patch.file(&format!("opt/adc/{path}"), text.as_bytes(), 0o644)?;
        }
        patch.file(
            &format!("opt/adc/lib/patch-{v}.bin"),
            &data(seed, v, PATCH_DATA_BYTES),
            0o644,
        )?;
        layers.push(patch.finish()?);
    }
    let diff_ids: Vec<String> = layers.iter().map(|tar| digest(tar)).collect();
    let mut descriptors = Vec::with_capacity(layers.len());
    for tar in &layers {
        let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
        gz.write_all(tar).at("compress a layer")?;
        let bytes = gz.finish().at("compress a layer")?;
        descriptors.push(blob(
            dir,
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &bytes,
        )?);
    }
    let config = to_json(&json!({
        "created": "2026-01-01T00:00:00Z", "architecture": "amd64", "os": "linux",
        "config": { "Entrypoint": ["/opt/adc/train.py"], "WorkingDir": "/opt/adc" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    }))?;
    let config = blob(dir, "application/vnd.oci.image.config.v1+json", &config)?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": descriptors });
    let mut top = blob(dir, media_type, &to_json(&manifest)?)?;
    top["annotations"] = json!({ "org.opencontainers.image.ref.name": format!("v{version}") });
    put(
        &dir.join("index.json"),
        &to_json(&json!({ "schemaVersion": 2, "manifests": [top] }))?,
        0o644,
    )?;
    put(
        &dir.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
        0o644,
    )
}

/// Writes a blob of a layout and gives its descriptor.
fn blob(dir: &Path, media_type: &str, bytes: &[u8]) -> Result<Value, Fault> {
    let digest = digest(bytes);
    put(
        &dir.join("blobs").join(digest.replace(':', "/")),
        bytes,
        0o644,
    )?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// An image layer in the making. Times and owners are zero, so that the same files give the same
/// bytes.
struct Layer {
    tar: tar::Builder<Vec<u8>>,
    folders: Vec<String>,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
            folders: Vec::new(),
        }
    }
}

impl Layer {
    fn file(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<(), Fault> {
        for (at, _) in path.match_indices('/') {
            let folder = format!("{}/", &path[..at]);
            if !self.folders.contains(&folder) {
                self.append(&folder, tar::EntryType::Directory, b"", 0o755)?;
                self.folders.push(folder);
            }
        }
        self.append(path, tar::EntryType::Regular, bytes, mode)
    }

    fn append(
        &mut self,
        path: &str,
        kind: tar::EntryType,
        bytes: &[u8],
        mode: u32,
    ) -> Result<(), Fault> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        header.set_mtime(0);
        self.tar
            .append_data(&mut header, path, bytes)
            .at(format_args!("make a layer with {path}"))
    }

    fn finish(self) -> Result<Vec<u8>, Fault> {
        self.tar.into_inner().at("make a layer")
    }
}

/// Something like a compiled library: it compresses to about a half.
fn data(seed: u64, n: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed, Stream::Data, n);
    (0..bytes / 8)
        .flat_map(|_| (random.next() & 0x0f0f_ff0f_0fff_0f0f).to_le_bytes())
        .collect()
}

/// A safetensors file (github.com/huggingface/safetensors): the header's length as u64 LE, a JSON
/// header padded with spaces to 8 bytes, then the tensors.
fn model(path: &Path, seed: u64, version: u64) -> Result<(), Fault> {
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".into(),
        json!({ "format": "pt", "made_by": "packhorse quickstart" }),
    );
    for i in 0..TENSORS {
        let (name, dtype, shape) = match i + 1 {
            TENSORS => ("head.weight".to_owned(), "F32", [512, 1024]),
            _ => (format!("layers.{i}.weight"), "F16", [1024, 1024]),
        };
        let begin = i * TENSOR_BYTES as u64;
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, begin + TENSOR_BYTES as u64] }));
    }
    let mut header = to_json(&header.into())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let what = || format!("write {}", path.display());
    parent_of(path)?;
    let mut file = BufWriter::new(File::create(path).at(what())?);
    file.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(&header))
        .at(what())?;
    for i in 0..TENSORS {
        let half = i + 1 < TENSORS;
        let mut tensor = weights(
            &mut Random::new(seed, Stream::Weights, i),
            TENSOR_BYTES,
            half,
        );
        for v in (2..=version).filter(|v| v * 5 % (TENSORS - 1) == i) {
            tensor[TRAINED].copy_from_slice(&weights(
                &mut Random::new(seed, Stream::Weights, v << 32),
                TRAINED.len(),
                half,
            ));
        }
        file.write_all(&tensor).at(what())?;
    }
    file.flush().at(what())?;
    fs::set_permissions(path, Permissions::from_mode(0o644)).at(what())
}

/// Floats like trained ones: random signs and mantissas, small magnitudes, each half as often as
/// the next larger.
fn weights(random: &mut Random, bytes: usize, half: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        let r = random.next();
        let octave = u64::from((r >> 48).trailing_zeros().min(7));
        if half {
            // sign, 5 bits of exponent (bias 15), 10 of mantissa: up to 2^-4
            let bits = (r & 0x83ff) | ((10 - octave) << 10);
            out.extend_from_slice(&(bits as u16).to_le_bytes());
        } else {
            // sign, 8 bits of exponent (bias 127), 23 of mantissa
            let bits = (r & 0x807f_ffff) | ((122 - octave) << 23);
            out.extend_from_slice(&(bits as u32).to_le_bytes());
        }
    }
    out
}

fn to_json(value: &Value) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(|e| Fault::internal(format!("write the sample's JSON: {e}")))
}

fn parent_of(path: &Path) -> Result<(), Fault> {
    let Some(parent) = path.parent().filter(|p| !p.is_dir()) else {
        return Ok(());
    };
    parent_of(parent)?;
    match fs::create_dir(parent) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            return Err(Fault::io(format_args!("create {}", parent.display()), &e));
        }
        _ => {}
    }
    // Independent of the umask, because modes are part of an artifact.
    fs::set_permissions(parent, Permissions::from_mode(0o755))
        .at(format_args!("create {}", parent.display()))
}

fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Fault> {
    parent_of(path)?;
    let write = || -> std::io::Result<()> {
        File::create(path)?.write_all(bytes)?;
        fs::set_permissions(path, Permissions::from_mode(mode))
    };
    write().at(format_args!("write {}", path.display()))
}

fn link(target: &str, path: &Path) -> Result<(), Fault> {
    match symlink(target, path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()), // from an earlier run: it has one target only
        result => result.at(format_args!("link {}", path.display())),
    }
}

/// What a row of random numbers is for, so that no two are the same.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Picture = 1,
    Data,
    Weights,
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, fast, and the same for ever, which the `rand`
/// crate does not promise.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: Stream, n: u64) -> Self {
        let mut mixed = Self(seed);
        for part in [stream as u64, n] {
            mixed.0 ^= part;
            mixed.0 = mixed.next();
        }
        mixed
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to below `high`.
    fn between(&mut self, low: i32, high: i32) -> i32 {
        low + (self.next() % u64::from(low.abs_diff(high).max(1))) as i32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::Command;

    use super::*;
    use source::files::FilesSource;
    use source::image::ImageSource;
    use source::{Content, Source, SourceBody};

    fn tree(dir: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut source = FilesSource::open(dir).unwrap();
        let mut all = BTreeMap::new();
        while let Some(entry) = source.next().unwrap() {
            let bytes = match entry.body {
                SourceBody::Dir => continue,
                SourceBody::Symlink(target) => target.into_bytes(),
                SourceBody::File {
                    content: Content::File(path),
                    ..
                } => fs::read(path).unwrap(),
                SourceBody::File { .. } => unreachable!("a folder's files are files"),
            };
            all.insert(entry.path.to_string(), (entry.mode, bytes));
        }
        all
    }

    /// How many files are new or other, how many are gone, and the bytes of the new ones.
    fn change(old: &Path, new: &Path) -> (usize, usize, usize) {
        let (old, new) = (tree(old), tree(new));
        let other: Vec<_> = new
            .iter()
            .filter(|(path, file)| old.get(*path) != Some(file))
            .collect();
        let gone = old.keys().filter(|path| !new.contains_key(*path)).count();
        (
            other.len(),
            gone,
            other.iter().map(|(_, (_, bytes))| bytes.len()).sum(),
        )
    }

    #[test]
    fn a_seed_creates_the_same_set_and_a_version_changes_little() {
        let dir = tempfile::tempdir().unwrap();
        let one = make(&dir.path().join("1"), 7, 1).unwrap();
        make(&dir.path().join("again"), 7, 1).unwrap();
        let first = tree(&dir.path().join("1"));
        assert!(first == tree(&dir.path().join("again")));
        make(&dir.path().join("again"), 7, 1).unwrap();
        assert!(
            first == tree(&dir.path().join("again")),
            "again into the same folder"
        );
        make(&dir.path().join("other"), 8, 1).unwrap();
        assert!(first != tree(&dir.path().join("other")));

        let two = make(&dir.path().join("2"), 7, 2).unwrap();
        let (other, gone, bytes) = change(&one.dataset, &two.dataset);
        assert_eq!(
            (other, gone),
            (2 + 2 + 4, 2),
            "two shot again, two renamed, four added"
        );
        assert!(bytes < 1 << 20, "{bytes}");
        assert_eq!(change(&one.operator, &two.operator).0, 1);
        let (_, _, bytes) = change(&one.image, &two.image);
        assert!(bytes < 256 << 10, "{bytes}");
        let (a, b) = (fs::read(&one.model).unwrap(), fs::read(&two.model).unwrap());
        assert!((24 << 20..25 << 20).contains(&a.len()) && a.len() == b.len());
        let differ: Vec<usize> = (0..a.len()).filter(|i| a[*i] != b[*i]).collect();
        assert!(
            differ.last().unwrap() - differ[0] < a.len() / 100 + 4096,
            "one run"
        );
        assert_ne!(
            fs::read(&one.labels).unwrap(),
            fs::read(&two.labels).unwrap()
        );
        assert_eq!(
            fs::read_link(two.operator.join("train")).unwrap(),
            Path::new("train.py")
        );
        assert_eq!(tree(&two.operator)["train.py"].0, 0o755);
    }

    #[test]
    fn the_model_is_a_safetensors_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        model(&path, 1, 1).unwrap();
        let bytes = fs::read(&path).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        let end = header
            .values()
            .filter_map(|t| t["data_offsets"][1].as_u64())
            .max()
            .unwrap();
        assert_eq!(bytes.len() as u64, 8 + header_len as u64 + end);
        assert_eq!(header_len % 8, 0);
    }

    #[test]
    fn others_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        for version in [1, 2] {
            let set = make(&dir.path().join(version.to_string()), 42, version).unwrap();
            let source = ImageSource::open(&set.image, dir.path()).unwrap();
            let run = |program: &str, args: &[&str]| -> Value {
                let output = Command::new(program).args(args).output();
                let output = output.unwrap_or_else(|e| {
                    unreachable!("this test needs {program}: apt install {program} ({e})")
                });
                assert!(
                    output.status.success(),
                    "{program}: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
                serde_json::from_slice(&output.stdout).unwrap()
            };
            let inspected = run(
                "skopeo",
                &["inspect", &format!("oci:{}", set.image.display())],
            );
            assert_eq!(inspected["Digest"], json!(source.image_info().digest));
            assert_eq!(
                inspected["Layers"].as_array().unwrap().len(),
                1 + version as usize
            );
            let model = dir.path().join("model.json");
            let train = set.operator.join("train");
            let paths =
                [&train, &set.dataset, &set.labels, &model].map(|p| p.display().to_string());
            let trained = run(
                "python3",
                &[
                    "-B", &paths[0], "--images", &paths[1], "--labels", &paths[2], "--out",
                    &paths[3],
                ],
            );
            assert!(trained["tested"].as_u64().unwrap() > 25, "{trained}");
            assert!(
                trained["accuracy"].as_f64().unwrap() > 0.7,
                "it really learns: {trained}"
            );
        }
    }
}
