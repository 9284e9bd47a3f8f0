//! Images built byte by byte, as archives and as layout directories; `tools` uses those of skopeo
//! and umoci.

mod docker_save;
mod forms;
mod hostile;
mod layout;
mod platforms;
mod referrers;
mod sparse;
mod tools;

use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::holder::BlobDigest;
use super::oci::{OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
use super::*;
use base::fault::Code;
use base::names::RelPath;

const SMALL_CAPS: Caps = Caps {
    bytes: 1 << 20,
    ratio: 64,
};
const TAR_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An archive or directory under construction: names and their content.
#[derive(Default, Clone)]
struct Parts(Vec<(String, Part)>);

#[derive(Clone)]
enum Part {
    File(Vec<u8>),
    Symlink(String),
    Hardlink(String),
    Fifo,
}

impl Parts {
    fn file(&mut self, name: &str, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.0.push((name.into(), Part::File(bytes.into())));
        self
    }

    fn put(&mut self, name: &str, part: Part) -> &mut Self {
        self.0.push((name.into(), part));
        self
    }

    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = BlobDigest::of(bytes);
        if !self.0.iter().any(|(name, _)| *name == digest.member()) {
            self.file(&digest.member(), bytes);
        }
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    }

    fn remove(&mut self, name: &str) {
        let before = self.0.len();
        self.0.retain(|(n, _)| n != name);
        assert!(self.0.len() < before, "{name} did not exist");
    }

    fn get(&mut self, name: &str) -> &mut Vec<u8> {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, Part::File(bytes))) => bytes,
            _ => unreachable!("no file {name}"),
        }
    }

    fn layout(&mut self, tops: &[Value]) -> &mut Self {
        self.file(
            "index.json",
            json!({ "schemaVersion": 2, "manifests": tops }).to_string(),
        );
        self.file("oci-layout", br#"{"imageLayoutVersion": "1.0.0"}"#)
    }

    /// Names are written as raw bytes, so that hostile names are possible.
    fn tar(&self) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, part) in &self.0 {
            let mut header = tar::Header::new_ustar();
            let (kind, link, bytes): (_, &str, &[u8]) = match part {
                Part::File(bytes) => (tar::EntryType::Regular, "", bytes),
                Part::Symlink(to) => (tar::EntryType::Symlink, to, b""),
                Part::Hardlink(to) => (tar::EntryType::Link, to, b""),
                Part::Fifo => (tar::EntryType::Fifo, "", b""),
            };
            let raw = header.as_old_mut();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            tar.append(&header, bytes).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn folder(&self, at: &Path) {
        for (name, part) in &self.0 {
            let Part::File(bytes) = part else {
                unreachable!("files only")
            };
            write(&at.join(name), bytes);
        }
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

fn layer(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut parts = Parts::default();
    parts.file(name, bytes);
    parts.tar()
}

fn config(arch: &str, layers: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<String> = layers
        .iter()
        .map(|l| BlobDigest::of(l).to_string())
        .collect();
    json!({ "architecture": arch, "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": ids } }).to_string().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut writer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// An OCI image of one platform. Returns the descriptor of its manifest.
fn oci_image(parts: &mut Parts, arch: &str, layers: &[&[u8]]) -> Value {
    let config = parts.blob(OCI_CONFIG, &config(arch, layers));
    let layers: Vec<Value> = layers.iter().map(|l| parts.blob(TAR_LAYER, l)).collect();
    manifest(parts, &config, &layers)
}

fn manifest(parts: &mut Parts, config: &Value, layers: &[Value]) -> Value {
    let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
    parts.blob(OCI_MANIFEST, manifest.to_string().as_bytes())
}

/// An archive as `docker save` wrote it before version 25: a shared layer is a link.
fn docker_save(tags: &[&str]) -> Parts {
    let (a, b) = (
        layer("etc/hostname", b"panel"),
        layer("opt/adc/run.py", b"print()"),
    );
    let config = config("amd64", &[&a, &b, &a]);
    let name = format!("{}.json", &BlobDigest::of(&config).to_string()[7..]);
    let mut parts = Parts::default();
    parts
        .file("aa/layer.tar", a)
        .file("bb/layer.tar", b)
        .put("cc/layer.tar", Part::Symlink("../aa/layer.tar".into()))
        .file(&name, config);
    let layers = ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"];
    parts.file(
        "manifest.json",
        json!([{ "Config": name, "RepoTags": tags, "Layers": layers }]).to_string(),
    );
    parts
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, bytes: &[u8]) -> PathBuf {
        let path = self.path("image.in");
        write(&path, bytes);
        path
    }

    fn open(&self, bytes: &[u8]) -> Result<ImageSource, Fault> {
        self.open_tag(bytes, None)
    }

    fn open_tag(&self, bytes: &[u8], tag: Option<&str>) -> Result<ImageSource, Fault> {
        self.open_with(bytes, tag, &ImageOptions::default())
    }

    fn open_with(
        &self,
        bytes: &[u8],
        tag: Option<&str>,
        options: &ImageOptions,
    ) -> Result<ImageSource, Fault> {
        let scratch = self.path("scratch");
        fs::create_dir_all(&scratch).unwrap();
        let reading = Reading {
            caps: SMALL_CAPS,
            ..Reading::new(options, &scratch)
        };
        let path = self.file(bytes);
        reading.or_cancelled(open(&path, &scratch, tag, reading, &Arc::default()))
    }
}

/// All entries of a source with their bytes, in order.
fn contents(mut source: ImageSource) -> Vec<(RelPath, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    while let Some(entry) = source.next().unwrap() {
        let bytes = match entry.body {
            SourceBody::Dir => None,
            SourceBody::Symlink(_) => unreachable!("a link in a layout"),
            SourceBody::File { size, content } => Some(match content {
                Content::Memory(bytes) => bytes.to_vec(),
                Content::File(path) | Content::Scratch(path) => fs::read(path).unwrap(),
                Content::Range { file, offset } => {
                    fs::read(&*file).unwrap()[offset as usize..(offset + size) as usize].to_vec()
                }
            }),
        };
        all.push((entry.path, bytes));
    }
    assert!(all.windows(2).all(|w| w[0].0 < w[1].0), "manifest order");
    for (path, bytes) in &all {
        if let (Some("blobs/sha256"), Some(bytes)) = (path.parent(), bytes) {
            assert_eq!(path.as_str(), BlobDigest::of(bytes).member());
        }
    }
    all
}

fn write_out(source: ImageSource, at: &Path) {
    for (path, bytes) in contents(source) {
        if let Some(bytes) = bytes {
            write(&at.join(path.as_str()), &bytes);
        }
    }
}

fn refused(result: Result<ImageSource, Fault>, parts: &[&str]) {
    let fault = result.expect_err("it must be refused");
    assert_eq!(fault.code, Code::Integrity, "{}", fault.message);
    for part in parts.iter().chain(&["image.in"]) {
        assert!(
            fault.message.contains(part),
            "{part:?} is not in: {}",
            fault.message
        );
    }
}

/// The number of omitted items of a category, and the first of them.
fn left_out(source: &ImageSource, what: Category) -> (u64, Vec<String>) {
    let list = source.omitted().list();
    let of = list.into_iter().find(|omission| omission.what == what);
    of.map(|omission| (omission.count, omission.examples))
        .unwrap_or_default()
}

fn hex_of(value: &Value) -> String {
    value["digest"].as_str().unwrap()[7..].to_owned()
}
