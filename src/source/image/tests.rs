//! Images made here byte by byte, and images made by skopeo and umoci, which must be installed.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::holder::BlobDigest;
use super::oci::{OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
use super::*;
use crate::fault::Code;
use crate::ingest::{Progress, ingest};
use crate::names::{Kind, RelPath};
use crate::store::Store;

const SMALL_CAPS: Caps = Caps { bytes: 1 << 20, ratio: 64 };
const TAR_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An archive or a folder in the making: names and what they hold.
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

    /// Adds a blob and gives its descriptor.
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
        assert!(self.0.len() < before, "{name} was not there");
    }

    fn get(&mut self, name: &str) -> &mut Vec<u8> {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, Part::File(bytes))) => bytes,
            _ => unreachable!("no file {name}"),
        }
    }

    fn layout(&mut self, tops: &[Value]) -> &mut Self {
        self.file("index.json", json!({ "schemaVersion": 2, "manifests": tops }).to_string());
        self.file("oci-layout", br#"{"imageLayoutVersion": "1.0.0"}"#)
    }

    /// Names go in as raw bytes, so that hostile ones can be made.
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
            let Part::File(bytes) = part else { unreachable!("files only") };
            write(&at.join(name), bytes);
        }
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(path).unwrap().write_all(bytes).unwrap();
}

fn layer(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut parts = Parts::default();
    parts.file(name, bytes);
    parts.tar()
}

fn config(arch: &str, layers: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|l| BlobDigest::of(l).to_string()).collect();
    json!({ "architecture": arch, "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": ids } }).to_string().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// An OCI image of one platform; gives its manifest's descriptor.
fn oci_image(parts: &mut Parts, arch: &str, layers: &[&[u8]]) -> Value {
    let config = parts.blob(OCI_CONFIG, &config(arch, layers));
    let layers: Vec<Value> = layers.iter().map(|l| parts.blob(TAR_LAYER, l)).collect();
    manifest(parts, &config, &layers)
}

fn manifest(parts: &mut Parts, config: &Value, layers: &[Value]) -> Value {
    let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
    parts.blob(OCI_MANIFEST, manifest.to_string().as_bytes())
}

/// What `docker save` wrote before version 25: a shared layer is a link.
fn docker_save(tags: &[&str]) -> Parts {
    let (a, b) = (layer("etc/hostname", b"panel"), layer("opt/adc/run.py", b"print()"));
    let config = config("amd64", &[&a, &b, &a]);
    let name = format!("{}.json", &BlobDigest::of(&config).to_string()[7..]);
    let mut parts = Parts::default();
    parts.file("aa/layer.tar", a).file("bb/layer.tar", b).put("cc/layer.tar", Part::Symlink("../aa/layer.tar".into())).file(&name, config);
    let layers = ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"];
    parts.file("manifest.json", json!([{ "Config": name, "RepoTags": tags, "Layers": layers }]).to_string());
    parts
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
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
        let scratch = self.path("scratch");
        fs::create_dir_all(&scratch).unwrap();
        open(&self.file(bytes), &scratch, tag, SMALL_CAPS)
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
                Content::File(path) => fs::read(path).unwrap(),
                Content::Range { file, offset } => fs::read(&*file).unwrap()[offset as usize..(offset + size) as usize].to_vec(),
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
        assert!(fault.message.contains(part), "{part:?} is not in: {}", fault.message);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| unreachable!("this test needs {program}: apt install {program} ({e})"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn skopeo(from: &str, to: &str) {
    run("skopeo", &["--insecure-policy", "copy", "--quiet", from, to]);
}

/// An OCI layout with gzip layers, made by umoci: `<dir>/base:v1`.
fn umoci_image(case: &Case) -> String {
    let base = case.path("base").display().to_string();
    let image = format!("{base}:v1");
    run("umoci", &["init", "--layout", &base]);
    run("umoci", &["new", "--image", &image]);
    write(&case.path("tree/app/模型.txt"), b"weights");
    write(&case.path("more"), &b"0123456789".repeat(5000));
    run("umoci", &["insert", "--rootless", "--image", &image, case.path("tree").to_str().unwrap(), "/opt"]);
    run("umoci", &["insert", "--rootless", "--image", &image, case.path("more").to_str().unwrap(), "/opt/more"]);
    image
}

/// What umoci unpacks from a layout, and the digest that skopeo says it has.
fn unpacked(case: &Case, layout: &Path) -> (String, PathBuf) {
    let inspected: Value = serde_json::from_str(&run("skopeo", &["inspect", &format!("oci:{}", layout.display())])).unwrap();
    let tagged = case.path("tagged").display().to_string();
    let _ = fs::remove_dir_all(&tagged);
    let bundle = case.path("bundle");
    let _ = fs::remove_dir_all(&bundle);
    skopeo(&format!("oci:{}", layout.display()), &format!("oci:{tagged}:t"));
    run("umoci", &["unpack", "--rootless", "--image", &format!("{tagged}:t"), bundle.to_str().unwrap()]);
    (inspected["Digest"].as_str().unwrap().to_owned(), bundle.join("rootfs"))
}

#[test]
fn what_skopeo_and_umoci_make_comes_through_and_unpacks() {
    let case = Case::new();
    let image = umoci_image(&case);
    let raw: Value = serde_json::from_str(&run("skopeo", &["inspect", &format!("oci:{image}")])).unwrap();
    let forms = [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")];
    for (kind, name) in forms {
        skopeo(&format!("oci:{image}"), &format!("{kind}:{}:app:v1", case.path(name).display()));
    }
    let mut digests = BTreeMap::new();
    for name in ["base", "oci.tar", "docker.tar"] {
        let source = ImageSource::open(&case.path(name), &case.path("none")).unwrap();
        let info = source.image_info().clone();
        assert_eq!(info.platforms.len(), 1, "{info:?}");
        assert!(info.platforms[0].starts_with("linux/"), "{info:?}");
        let out = case.path(&format!("{name}.out"));
        write_out(source, &out);
        let (digest, rootfs) = unpacked(&case, &out);
        assert_eq!(digest, info.digest);
        assert_eq!(fs::read(rootfs.join("opt/app/模型.txt")).unwrap(), b"weights");
        assert_eq!(fs::metadata(rootfs.join("opt/more")).unwrap().len(), 50_000);
        digests.insert(name, digest);
    }
    // An OCI form keeps the maker's bytes; a docker archive gets a manifest of its own, always the same one.
    assert_eq!(digests["base"], raw["Digest"].as_str().unwrap());
    assert_eq!(digests["oci.tar"], digests["base"]);
    let again = ImageSource::open(&case.path("docker.tar"), &case.path("none")).unwrap();
    assert_eq!(again.image_info().digest, digests["docker.tar"]);
}

#[test]
fn a_docker_save_becomes_an_oci_image_with_the_config_as_it_was() {
    let case = Case::new();
    let parts = docker_save(&["app:v1", "app:latest"]);
    let plain = contents(case.open(&parts.tar()).unwrap());
    let source = case.open(&parts.tar()).unwrap();
    assert_eq!(source.image_info().media_type, OCI_MANIFEST);
    assert_eq!(source.image_info().platforms, ["linux/amd64"]);
    assert_eq!(plain.iter().filter(|(p, _)| p.parent() == Some("blobs/sha256")).count(), 4, "two layers, config, manifest");
    // The same image, however wrapped, is the same artifact.
    let mut hard = parts.clone();
    hard.0.iter_mut().for_each(|(_, part)| {
        if let Part::Symlink(_) = part {
            *part = Part::Hardlink("./aa/layer.tar".into());
        }
    });
    for bytes in [gzip(&parts.tar()), zstd::encode_all(&parts.tar()[..], 1).unwrap(), hard.tar()] {
        assert_eq!(contents(case.open(&bytes).unwrap()), plain);
    }
    let out = case.path("out");
    write_out(source, &out);
    let (_, rootfs) = unpacked(&case, &out);
    assert_eq!(fs::read(rootfs.join("opt/adc/run.py")).unwrap(), b"print()");
}

#[test]
fn compressed_layers_are_checked_inside_too() {
    let case = Case::new();
    let raw = layer("a", &b"x".repeat(70_000));
    for (media, bytes) in [("+gzip", gzip(&raw)), ("+zstd", zstd::encode_all(&raw[..], 1).unwrap())] {
        let mut parts = Parts::default();
        let config = parts.blob(OCI_CONFIG, &config("arm64", &[&raw]));
        let layers = [parts.blob(&format!("{TAR_LAYER}{media}"), &bytes)];
        let top = manifest(&mut parts, &config, &layers);
        let good = parts.clone().layout(&[top]).tar();
        assert_eq!(case.open(&good).unwrap().image_info().platforms, ["linux/arm64"]);

        let mut parts = Parts::default();
        let config = parts.blob(OCI_CONFIG, &self::config("arm64", &[b"something else"]));
        let layers = [parts.blob(&format!("{TAR_LAYER}{media}"), &bytes)];
        let top = manifest(&mut parts, &config, &layers);
        refused(case.open(&parts.layout(&[top]).tar()), &["wrong content", "blobs/sha256/"]);
    }
}

#[test]
fn docker_25_oci_parts_are_used_unless_they_contradict_the_config() {
    let case = Case::new();
    let (a, b) = (layer("a", b"1"), layer("b", b"2"));
    let config_bytes = config("amd64", &[&a, &b]);
    let saved = |parts: &mut Parts| {
        let member = |bytes: &[u8]| BlobDigest::of(bytes).member();
        let listed = json!([{ "Config": member(&config_bytes), "RepoTags": ["app:v1"], "Layers": [member(&a), member(&b)] }]);
        parts.file("manifest.json", listed.to_string());
    };
    let mut good = Parts::default();
    let top = oci_image(&mut good, "amd64", &[&a, &b]);
    saved(&mut good);
    let info = case.open(&good.layout(std::slice::from_ref(&top)).tar()).unwrap().info;
    assert_eq!(json!(info.digest), top["digest"]);

    for swapped in [false, true] {
        let mut bad = Parts::default();
        let config = bad.blob(OCI_CONFIG, &config_bytes);
        let (la, lb) = (bad.blob(TAR_LAYER, &a), bad.blob(TAR_LAYER, &b));
        let wrong = manifest(&mut bad, &config, &if swapped { vec![lb, la] } else { vec![] });
        bad.layout(std::slice::from_ref(&wrong));
        let why = if swapped { "layer 1 is" } else { "it has 0 layers and the config lists 2" };
        refused(case.open(&bad.tar()), &[why]);
        saved(&mut bad);
        let source = case.open(&bad.tar()).unwrap();
        assert_ne!(json!(source.image_info().digest), wrong["digest"]);
        let digest = source.image_info().digest[7..].to_owned();
        let made = contents(source).into_iter().find(|(p, _)| p.file_name() == digest).unwrap().1.unwrap();
        let made: Value = serde_json::from_slice(&made).unwrap();
        assert_eq!(made["layers"][0]["digest"], json!(BlobDigest::of(&a).to_string()));
    }
}

/// Two platforms with an attestation each, in an index that `index.json` names, as the containerd store saves them.
fn two_platforms(parts: &mut Parts) -> (Value, Vec<Value>) {
    let shared = layer("shared", b"s");
    let mut children = Vec::new();
    for arch in ["amd64", "arm64"] {
        let own = layer("own", arch.as_bytes());
        let mut image = oci_image(parts, arch, &[&shared, &own]);
        let statement = format!("{{\"about\":\"{arch}\"}}");
        let config = parts.blob(OCI_CONFIG, br#"{"architecture":"unknown","os":"unknown"}"#);
        let statement = parts.blob("application/vnd.in-toto+json", statement.as_bytes());
        let mut attestation = manifest(parts, &config, &[statement]);
        attestation["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
        attestation["annotations"] =
            json!({ "vnd.docker.reference.digest": image["digest"], "vnd.docker.reference.type": "attestation-manifest" });
        image["platform"] = json!({ "architecture": arch, "os": "linux" });
        children.push(image);
        children.push(attestation);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children });
    let mut top = parts.blob(OCI_INDEX, index.to_string().as_bytes());
    top["annotations"] = json!({ "io.containerd.image.name": "docker.io/library/app:v1", "org.opencontainers.image.ref.name": "v1" });
    (top, children)
}

fn hex_of(value: &Value) -> String {
    value["digest"].as_str().unwrap()[7..].to_owned()
}

#[test]
fn several_platforms_stay_and_absent_ones_are_left_out() {
    let case = Case::new();
    let mut whole = Parts::default();
    let (top, children) = two_platforms(&mut whole);
    whole.layout(std::slice::from_ref(&top));
    let info = case.open(&whole.tar()).unwrap().info;
    assert_eq!((json!(info.digest), info.platforms.len(), info.absent.len()), (top["digest"].clone(), 2, 0));

    // arm64's manifest is gone; or its manifest and config are there and no layer but the shared one.
    let mut no_manifest = whole.clone();
    no_manifest.remove(&format!("blobs/sha256/{}", hex_of(&children[2])));
    let mut no_layer = whole.clone();
    no_layer.remove(&BlobDigest::of(&layer("own", b"arm64")).member());
    for parts in [no_manifest, no_layer] {
        let source = case.open(&parts.tar()).unwrap();
        let info = source.info.clone();
        assert_eq!(info.platforms, ["linux/amd64"]);
        let mut absent = vec![children[2]["digest"].clone(), children[3]["digest"].clone()];
        absent.sort_by_key(Value::to_string);
        assert_eq!(json!(info.absent), json!(absent), "the platform, and its attestation with it");
        assert_ne!(json!(info.digest), top["digest"]);
        let all = contents(source);
        let index = all.iter().find(|(p, _)| p.file_name() == &info.digest[7..]).unwrap().1.clone().unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["manifests"], json!(children[..2]));
        assert!(!all.iter().any(|(p, _)| p.file_name() == hex_of(&children[3])), "nothing but what belongs to the image");
        let out = case.path("out");
        let _ = fs::remove_dir_all(&out);
        write_out(case.open(&parts.tar()).unwrap(), &out);
        let raw = run("skopeo", &["inspect", "--raw", &format!("oci:{}", out.display())]);
        assert_eq!(BlobDigest::of(raw.as_bytes()).to_string(), info.digest);
    }

    // A platform with a layer of its own that lacks another is not absent but damaged.
    let mut damaged = Parts::default();
    let (a, b, c) = (layer("a", b"1"), layer("b", b"2"), layer("c", b"3"));
    let images = [oci_image(&mut damaged, "amd64", &[&a]), oci_image(&mut damaged, "arm64", &[&b, &c])];
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": images }).to_string();
    let top = damaged.blob(OCI_INDEX, index.as_bytes());
    damaged.layout(&[top]);
    damaged.remove(&BlobDigest::of(&c).member());
    refused(case.open(&damaged.tar()), &["it is missing", &BlobDigest::of(&c).member()]);

    // Nothing at all.
    let mut none = whole.clone();
    for child in [&children[0], &children[2]] {
        none.remove(&format!("blobs/sha256/{}", hex_of(child)));
    }
    refused(case.open(&none.tar()), &["none of the platforms"]);
}

#[test]
fn platforms_listed_at_the_top_become_one_index() {
    let case = Case::new();
    let mut parts = Parts::default();
    let mut images = vec![oci_image(&mut parts, "amd64", &[&layer("a", b"1")]), oci_image(&mut parts, "arm64", &[&layer("a", b"2")])];
    images[0]["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    images[1]["platform"] = json!({ "architecture": "arm64", "os": "linux", "variant": "v8" });
    parts.layout(&images);
    let info = case.open(&parts.tar()).unwrap().info;
    assert_eq!((info.media_type.as_str(), info.platforms.len()), (OCI_INDEX, 2));
}

#[test]
fn one_of_several_images_is_chosen_by_its_tag() {
    let case = Case::new();
    let mut parts = Parts::default();
    let mut tops = Vec::new();
    for tag in ["v1", "v2"] {
        let mut top = oci_image(&mut parts, "amd64", &[&layer("a", tag.as_bytes())]);
        top["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        tops.push(top);
    }
    let oci = parts.layout(&tops).tar();
    let mut docker = docker_save(&["app:v1"]);
    let mut listed: Vec<Value> = serde_json::from_slice(docker.get("manifest.json")).unwrap();
    let l = layer("z", b"z");
    let c = config("amd64", &[&l]);
    docker.file("z/layer.tar", l).file("z.json", c);
    listed.push(json!({ "Config": "z.json", "RepoTags": ["app:v2"], "Layers": ["z/layer.tar"] }));
    *docker.get("manifest.json") = json!(listed).to_string().into_bytes();
    for bytes in [oci, docker.tar()] {
        let fault = case.open(&bytes).unwrap_err();
        assert_eq!(fault.code, Code::Usage);
        assert!(fault.message.contains("v1") && fault.message.contains("v2") && fault.next.contains("#TAG"), "{fault:?}");
        let one = case.open_tag(&bytes, Some("v1")).unwrap().info.digest;
        let two = case.open_tag(&bytes, Some("v2")).unwrap().info.digest;
        assert_ne!(one, two);
        let fault = case.open_tag(&bytes, Some("v3")).unwrap_err();
        assert_eq!(fault.code, Code::NotFound);
    }
}

#[test]
fn a_layout_folder_is_read_in_place_and_never_through_links() {
    let case = Case::new();
    let mut parts = Parts::default();
    let l = layer("a", b"1");
    let top = oci_image(&mut parts, "amd64", &[&l]);
    parts.layout(std::slice::from_ref(&top));
    let folder = case.path("image.in");
    parts.folder(&folder);
    assert_eq!(json!(ImageSource::open_layout(&folder).unwrap().info.digest), top["digest"]);
    let blob = folder.join(BlobDigest::of(&l).member());
    write(&case.path("elsewhere"), &l);
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink(case.path("elsewhere"), &blob).unwrap();
    refused(ImageSource::open(&folder, &case.path("s")), &["not a regular file"]);
    fs::remove_file(&blob).unwrap();
    refused(ImageSource::open(&folder, &case.path("s")), &["it is missing: manifest sha256:", &BlobDigest::of(&l).member()]);
    let fault = ImageSource::open(&case.path("nothing"), &case.path("s")).unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
}

#[test]
fn a_truncated_archive_is_refused_wherever_it_ends() {
    let case = Case::new();
    let tar = docker_save(&["app:v1"]).tar();
    let body = tar.len() - 1024;
    for cut in (0..=body).step_by(256) {
        let why = if cut == 0 { "it is empty" } else { "truncated" };
        refused(case.open(&tar[..cut]), &[why]);
    }
    let packed = gzip(&tar);
    refused(case.open(&packed[..packed.len() / 2]), &["truncated"]);
    assert!(!case.path("scratch/image.tar").exists(), "nothing is left behind");
}

#[test]
fn hostile_names_and_links_are_refused() {
    let case = Case::new();
    let with = |name: &str, part: Part| docker_save(&[]).put(name, part).tar();
    let file = || Part::File(b"x".to_vec());
    let link = |to: &str| Part::Symlink(to.into());
    refused(case.open(&with("../evil", file())), &["../evil", "contains '..'"]);
    refused(case.open(&with("a/../../evil", file())), &["contains '..'"]);
    refused(case.open(&with("/etc/passwd", file())), &["/etc/passwd", "absolute"]);
    refused(case.open(&with("out", link("/etc/passwd"))), &["out", "out of the archive"]);
    refused(case.open(&with("d/out", link("../../x"))), &["out of the archive"]);
    refused(case.open(&with("hard", Part::Hardlink("/etc/passwd".into()))), &["hard", "absolute"]);
    refused(case.open(&with("self", link("self"))), &["self", "circle"]);
    let round = docker_save(&[]).put("one", link("two")).put("two", link("one")).tar();
    refused(case.open(&round), &["one", "circle"]);
    refused(case.open(&with("pipe", Part::Fifo)), &["pipe", "neither a file"]);
    refused(case.open(&with("aa/layer.tar", file())), &["aa/layer.tar", "twice with different content"]);
    let (mut twice, again) = (docker_save(&[]), docker_save(&[]).get("aa/layer.tar").clone());
    assert!(case.open(&twice.file("aa/layer.tar", again).tar()).is_ok(), "the same content twice is no lie");
}

#[test]
fn a_lying_docker_save_is_refused() {
    let case = Case::new();
    let changed = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut parts = docker_save(&["app:v1"]);
        let name = if name == "config" { parts.0.iter().find(|(n, _)| n.len() == 69).unwrap().0.clone() } else { name.to_owned() };
        change(parts.get(&name));
        parts.tar()
    };
    refused(case.open(&changed("aa/layer.tar", &|b| b[600] ^= 1)), &["aa/layer.tar", "wrong content"]);
    refused(case.open(&changed("config", &|b| b.push(b' '))), &["wrong digest", ".json"]);
    refused(case.open(&changed("manifest.json", &|b| b.truncate(20))), &["manifest.json", "not the JSON"]);
    refused(case.open(&changed("manifest.json", &|b| b.resize(5 << 20, b' '))), &["manifest.json", "more than the 4194304 allowed"]);
    let edited = |edit: &dyn Fn(&mut Value)| {
        changed("manifest.json", &|b| {
            let mut value = serde_json::from_slice(b).unwrap();
            edit(&mut value);
            *b = value.to_string().into_bytes();
        })
    };
    refused(case.open(&edited(&|v| v[0]["Layers"] = json!(["aa/layer.tar"]))), &["lists 1 layers and the config 3"]);
    refused(case.open(&edited(&|v| v[0]["Layers"][0] = json!("zz/layer.tar"))), &["zz/layer.tar", "it is missing"]);
    refused(case.open(&edited(&|v| *v = json!([]))), &["lists no image"]);
    let mut none = docker_save(&[]);
    none.remove("manifest.json");
    refused(case.open(&none.tar()), &["index.json", "neither an OCI layout nor a docker archive"]);
    let mut inner = Parts::default();
    for (name, part) in docker_save(&[]).0 {
        inner.put(&format!("img/{name}"), part);
    }
    refused(case.open(&inner.tar()), &["folder \"img\""]);
    refused(case.open(b"this is no archive at all"), &["truncated"]);
    refused(case.open(&b"this is no archive at all".repeat(100)), &["not a tar archive"]);
    refused(case.open(b"\xfd7zXZ\0rest"), &["compressed with xz"]);
}

#[test]
fn a_lying_oci_layout_is_refused() {
    let case = Case::new();
    let raw = layer("a", b"1");
    let make = || {
        let mut parts = Parts::default();
        let top = oci_image(&mut parts, "amd64", &[&raw]);
        (parts, top)
    };
    let (mut parts, top) = make();
    parts.layout(std::slice::from_ref(&top));
    let good = parts.clone();
    assert!(case.open(&good.tar()).is_ok());

    let mut flipped = good.clone();
    flipped.get(&BlobDigest::of(&raw).member())[513] ^= 1;
    refused(case.open(&flipped.tar()), &["wrong digest", &BlobDigest::of(&raw).member()]);
    let mut longer = good.clone();
    longer.get(&BlobDigest::of(&raw).member()).push(0);
    refused(case.open(&longer.tar()), &["wrong size", &BlobDigest::of(&raw).member()]);
    let mut lied = good.clone();
    let member = format!("blobs/sha256/{}", hex_of(&top));
    lied.get(&member)[3] = b'X';
    refused(case.open(&lied.tar()), &["wrong digest", &member]);
    let mut missing = good.clone();
    missing.remove("oci-layout");
    refused(case.open(&missing.tar()), &["oci-layout", "missing"]);
    let mut gone = good;
    gone.remove(&member);
    refused(case.open(&gone.tar()), &[&member, "it is missing: index.json lists it"]);

    let odd = |media: &str, manifest: Value| {
        let (mut parts, _) = make();
        let top = parts.blob(media, manifest.to_string().as_bytes());
        parts.layout(&[top]).tar()
    };
    refused(case.open(&odd(OCI_MANIFEST, json!({ "schemaVersion": 1, "fsLayers": [] }))), &["schema 1"]);
    refused(case.open(&odd(OCI_MANIFEST, json!({ "schemaVersion": 3 }))), &["unknown schema"]);
    refused(case.open(&odd("application/x-odd", json!({ "schemaVersion": 2 }))), &["unknown media type"]);
    refused(case.open(&odd(OCI_INDEX, json!({ "schemaVersion": 2, "layers": [], "manifests": [] }))), &["at once"]);
    refused(case.open(&odd(OCI_MANIFEST, json!({ "schemaVersion": 2, "mediaType": OCI_INDEX }))), &["is listed as"]);
    let sha512 = json!({ "mediaType": OCI_MANIFEST, "digest": "sha512:00", "size": 1 });
    refused(case.open(&make().0.layout(&[sha512]).tar()), &["not a sha256"]);
}

#[test]
fn an_image_that_changes_after_its_check_is_not_taken() {
    let case = Case::new();
    let store = Store::open(&case.path("store")).unwrap();
    let raw = layer("a", b"1");
    let mut parts = Parts::default();
    let top = oci_image(&mut parts, "amd64", &[&raw]);
    parts.layout(&[top]);
    let (folder, tar) = (case.path("folder"), parts.tar());
    parts.folder(&folder);
    let archive = case.file(&tar);
    let member = folder.join(BlobDigest::of(&raw).member());
    let in_tar = tar.windows(raw.len()).position(|bytes| bytes == raw).unwrap();
    for (image, file, start) in [(&folder, &member, 0), (&archive, &archive, in_tar)] {
        let opened = || open(image, &case.path("none"), None, SMALL_CAPS).unwrap();
        ingest(&mut opened(), Kind::Image, &store, &store, &Progress::default()).unwrap();
        let mut source = opened();
        // Timestamps are as coarse as the kernel's tick.
        std::thread::sleep(Duration::from_millis(30));
        let time = fs::metadata(file).unwrap().modified().unwrap();
        let out = File::options().write(true).open(file).unwrap();
        out.write_all_at(b"2", start as u64 + 512).unwrap();
        out.set_modified(time).unwrap();
        let fault = ingest(&mut source, Kind::Image, &store, &store, &Progress::default()).unwrap_err();
        assert_eq!(fault.code, Code::Integrity, "{fault}");
        assert!(fault.message.contains("changed while it was read"), "{fault}");
    }
}

#[test]
fn bombs_are_refused_around_and_inside() {
    let case = Case::new();
    let zeros = || std::io::repeat(0).take(64 << 20);
    refused(case.open(&zstd::encode_all(zeros(), 1).unwrap()), &["decompression bomb"]);
    assert!(!case.path("scratch/image.tar").exists());
    let mut parts = Parts::default();
    let config = parts.blob(OCI_CONFIG, &config("amd64", &[b"whatever"]));
    let layers = [parts.blob(&format!("{TAR_LAYER}+zstd"), &zstd::encode_all(zeros(), 1).unwrap())];
    let top = manifest(&mut parts, &config, &layers);
    refused(case.open(&parts.layout(&[top]).tar()), &["decompression bomb", "blobs/sha256/"]);
}

#[test]
fn long_names_and_large_members_of_every_tar_dialect_are_found() {
    let case = Case::new();
    let long = format!("{}/layer.tar", "d/".repeat(90));
    let l = layer("a", b"1");
    let c = config("amd64", &[&l]);
    let listed = json!([{ "Config": "c.json", "Layers": [long] }]).to_string();
    let files: [(&str, &[u8]); 3] = [(&long, &l), ("c.json", &c), ("manifest.json", listed.as_bytes())];
    // GNU long names, and PAX records with the size given there only, as Go writes members past 8 GiB.
    let mut gnu = tar::Builder::new(Vec::new());
    let mut pax = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        gnu.append_data(&mut header, name, bytes).unwrap();
        pax.append_pax_extensions([("path", name.as_bytes()), ("size", bytes.len().to_string().as_bytes())]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("short").unwrap();
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        let out = pax.get_mut();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    let (gnu, pax) = (gnu.into_inner().unwrap(), pax.into_inner().unwrap());
    assert_eq!(case.open(&gnu).unwrap().info.digest, case.open(&pax).unwrap().info.digest);
    let mut huge = tar::Header::new_gnu();
    huge.set_entry_type(tar::EntryType::GNULongName);
    huge.set_path("x").unwrap();
    huge.set_size(10 << 30);
    huge.set_cksum();
    refused(case.open(&[huge.as_bytes(), &[0; 1024][..]].concat()), &["extended header is larger"]);
}
