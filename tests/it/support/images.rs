//! Image fixtures, made with umoci and skopeo. They are created once and kept below the target
//! folder.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::command::tool;
use super::data::{chmod, noise, rng, write};

/// `sha256:<hex>` of some bytes.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Increase it when a fixture changes: the stored fixtures are then created again.
const EDITION: u32 = 2;

/// A fixture folder, which `make` creates unless an earlier run did.
fn kept(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fixtures-{EDITION}"));
    std::fs::create_dir_all(&cache).expect("create the fixture folder");
    let folder = cache.join(name);
    // Each test runs in its own process: the lock prevents two of them from creating the same
    // fixture.
    let lock = File::create(cache.join(format!("{name}.lock"))).expect("create a lock file");
    lock.lock().expect("lock a fixture");
    if !folder.exists() {
        let half = cache.join(format!("{name}.half"));
        let _ = std::fs::remove_dir_all(&half);
        std::fs::create_dir_all(&half).expect("create a fixture's folder");
        make(&half);
        std::fs::rename(&half, &folder).expect("finish a fixture");
    }
    folder
}

fn umoci(args: &[&str]) {
    tool("umoci", args);
}

fn skopeo(args: &[&str]) {
    tool("skopeo", args);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("fixture paths are UTF-8")
}

/// An OCI layout of an image with these layers.
pub(crate) fn layout(root: &Path, layers: &[&[u8]]) {
    let ids: Vec<String> = layers.iter().map(|layer| sha256(layer)).collect();
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": ids } });
    let config = put_blob(
        root,
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| put_blob(root, "application/vnd.oci.image.layer.v1.tar", layer))
        .collect();
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let top = put_blob(root, media_type, manifest.to_string().as_bytes());
    set_top(root, top);
}

/// A root filesystem with busybox, a link, a hard link, an empty folder and a Chinese name.
fn small_root(root: &Path) {
    write(
        &root.join("bin/busybox"),
        &std::fs::read("/bin/busybox").expect("busybox-static is installed (scripts/test does it)"),
    );
    chmod(&root.join("bin/busybox"), 0o755);
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("link");
    std::fs::hard_link(root.join("bin/busybox"), root.join("bin/ls")).expect("link");
    write(&root.join("etc/os-release"), b"ID=packhorse-test\n");
    write(&root.join("etc/配置.conf"), "名称=测试\n".as_bytes());
    std::fs::create_dir_all(root.join("var/empty")).expect("create a folder");
}

/// At least 100 MB of Debian's files on this machine, on top of the small root.
fn large_root(root: &Path) {
    small_root(root);
    let mut copied = 0;
    let places = [
        "/usr/lib/python3.11",
        "/usr/lib/python3",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib",
        "/usr/share",
    ];
    for place in places.map(Path::new).into_iter().filter(|p| p.is_dir()) {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(place)
            .expect("list a folder")
            .flatten()
            .map(|e| e.path())
            .collect();
        entries.sort();
        for entry in entries {
            let target = root.join(place.strip_prefix("/").expect("absolute"));
            let meta = entry.symlink_metadata().expect("read an entry's metadata");
            let size = if meta.is_dir() {
                super::disk_usage(&entry)
            } else {
                meta.len()
            };
            // A single huge folder would only make the fixture slow. /usr/lib itself comes after
            // its parts.
            if size > 30 << 20
                || target
                    .join(entry.file_name().expect("it has a name"))
                    .exists()
            {
                continue;
            }
            std::fs::create_dir_all(&target).expect("create a folder");
            tool("cp", &["-a", text(&entry), text(&target)]);
            copied += size;
            if copied > 120 << 20 {
                return;
            }
        }
    }
    panic!("only {copied} bytes of system files were found for the base image");
}

/// Adds a folder to an image as one layer, under a new tag.
fn add_layer(layout: &Path, from: &str, to: &str, folder: &Path, at: &str) {
    umoci(&["tag", "--image", &format!("{}:{from}", text(layout)), to]);
    insert(&format!("{}:{to}", text(layout)), folder, at);
}

fn insert(image: &str, folder: &Path, at: &str) {
    let mut args = vec!["insert"];
    args.extend(rootless());
    args.extend(["--image", image, text(folder), at]);
    umoci(&args);
}

fn rootless() -> &'static [&'static str] {
    if super::is_root() {
        &[]
    } else {
        &["--rootless"]
    }
}

/// Creates a layout with one tag, `base`, whose image has this root.
fn new_layout(layout: &Path, root: &Path, architecture: &str) {
    umoci(&["init", "--layout", text(layout)]);
    let image = format!("{}:base", text(layout));
    umoci(&["new", "--image", &image]);
    umoci(&[
        "config",
        "--image",
        &image,
        "--architecture",
        architecture,
        "--os",
        "linux",
        "--config.cmd",
        "/bin/sh",
    ]);
    insert(&image, root, "/");
}

/// The files that an operator image of version `n` has on top of its base.
fn app(folder: &Path, n: u32) {
    write(
        &folder.join("run.sh"),
        format!("#!/bin/sh\necho operator {n}\n").as_bytes(),
    );
    chmod(&folder.join("run.sh"), 0o755);
    write(
        &folder.join("权重.bin"),
        &noise(&mut rng(&format!("app {n}")), 700_000),
    );
}

/// Two versions of an operator image on one base of over 100 MB, as OCI archives. The folder has
/// `v1.tar`, `v2.tar`, and `app1`, `app2`: the expected content of `/app` of each.
pub(crate) fn large() -> PathBuf {
    kept("large", |dir| {
        let layout = dir.join("layout");
        let root = dir.join("root");
        large_root(&root);
        new_layout(&layout, &root, "amd64");
        for n in [1, 2] {
            app(&dir.join(format!("app{n}")), n);
            add_layer(
                &layout,
                "base",
                &format!("v{n}"),
                &dir.join(format!("app{n}")),
                "/app",
            );
            let archive = dir.join(format!("v{n}.tar"));
            skopeo(&[
                "copy",
                &format!("oci:{}:v{n}", text(&layout)),
                &format!("oci-archive:{}:v{n}", text(&archive)),
            ]);
        }
        std::fs::remove_dir_all(&root).expect("remove the root");
    })
}

/// One small image in every form. The folder has `layout` (an OCI layout with the tag `v1`),
/// `oci.tar`, `docker.tar` (`docker save`), `docker.tar.gz`, `oci.tar.zst`, `zstd` (a layout whose
/// layers are zstd), `two` (an index of two platforms), `absent` (an index that lists a platform
/// whose blobs are missing), and `root` with the expected content of `/` of all.
pub(crate) fn small() -> PathBuf {
    kept("small", |dir| {
        let (root, layout) = (dir.join("root"), dir.join("layout"));
        small_root(&root);
        app(&dir.join("app"), 1);
        new_layout(&layout, &root, "amd64");
        add_layer(&layout, "base", "v1", &dir.join("app"), "/app");
        umoci(&["rm", "--image", &format!("{}:base", text(&layout))]);
        super::data::copy_tree(&dir.join("app"), &root.join("app"));

        let source = format!("oci:{}:v1", text(&layout));
        let at = |name: &str| text(dir).to_owned() + "/" + name;
        skopeo(&[
            "copy",
            &source,
            &format!("oci-archive:{}:v1", at("oci.tar")),
        ]);
        skopeo(&[
            "copy",
            &source,
            &format!("docker-archive:{}:operators/app:v1", at("docker.tar")),
        ]);
        tool("gzip", &["-k", "-1", &at("docker.tar")]);
        compress_zstd(&dir.join("oci.tar"), &dir.join("oci.tar.zst"));
        skopeo(&[
            "copy",
            "--dest-compress-format",
            "zstd",
            &source,
            &format!("oci:{}:v1", at("zstd")),
        ]);

        let other = dir.join("other");
        new_layout(&other, &root, "arm64");
        two_platforms(&layout, &other, &dir.join("two"));
        two_platforms(&layout, &other, &dir.join("absent"));
        remove_platform(&dir.join("absent"), "arm64");
    })
}

fn compress_zstd(from: &Path, to: &Path) {
    let (mut from, to) = (
        File::open(from).expect("open a fixture"),
        File::create(to).expect("create a fixture"),
    );
    zstd::stream::copy_encode(&mut from, to, 3).expect("compress a fixture");
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("read a JSON file"))
        .expect("parse a JSON file")
}

/// A blob's path in a layout.
pub(crate) fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout
        .join("blobs/sha256")
        .join(digest.strip_prefix("sha256:").expect("a sha256 digest"))
}

/// Adds bytes to a layout as a blob. Returns their descriptor.
pub(crate) fn put_blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = sha256(bytes);
    write(&blob(layout, &digest), bytes);
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

/// The top descriptor of a layout with one image.
pub(crate) fn top(layout: &Path) -> Value {
    read_json(&layout.join("index.json"))["manifests"][0].clone()
}

/// Writes a layout's `index.json` so that it names this descriptor as `v1`.
pub(crate) fn set_top(layout: &Path, mut descriptor: Value) {
    descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": "v1" });
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
    write(&layout.join("index.json"), index.to_string().as_bytes());
    write(
        &layout.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    );
}

fn two_platforms(first: &Path, second: &Path, target: &Path) {
    super::data::copy_tree(&first.join("blobs"), &target.join("blobs"));
    super::data::copy_tree(&second.join("blobs"), &target.join("blobs"));
    let manifests: Vec<Value> = [(first, "amd64"), (second, "arm64")]
        .into_iter()
        .map(|(layout, architecture)| {
            let mut descriptor = top(layout);
            descriptor
                .as_object_mut()
                .expect("a descriptor")
                .remove("annotations");
            descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
            descriptor
        })
        .collect();
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index =
        json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests }).to_string();
    let descriptor = put_blob(target, media_type, index.as_bytes());
    set_top(target, descriptor);
}

/// Removes all blobs that only this platform needs, as the export of the containerd store does.
fn remove_platform(layout: &Path, architecture: &str) {
    let index = read_json(&blob(
        layout,
        top(layout)["digest"].as_str().expect("a digest"),
    ));
    let digests = |descriptor: &Value| -> Vec<String> {
        let digest = descriptor["digest"].as_str().expect("a digest").to_owned();
        let manifest = read_json(&blob(layout, &digest));
        let layers = manifest["layers"]
            .as_array()
            .expect("a manifest has layers")
            .iter();
        let parts = layers
            .chain([&manifest["config"]])
            .map(|d| d["digest"].as_str().expect("a digest").to_owned());
        parts.chain([digest]).collect()
    };
    let (gone, kept): (Vec<&Value>, Vec<&Value>) = index["manifests"]
        .as_array()
        .expect("an index")
        .iter()
        .partition(|m| m["platform"]["architecture"] == architecture);
    let kept: Vec<String> = kept.into_iter().flat_map(digests).collect();
    for digest in gone
        .into_iter()
        .flat_map(digests)
        .filter(|d| !kept.contains(d))
    {
        // Two layers with the same content are one blob.
        let _ = std::fs::remove_file(blob(layout, &digest));
    }
}

/// Unpacks one image of an OCI layout with umoci, and returns its root folder.
pub(crate) fn unpack(layout: &Path, tag: &str, bundle: &Path) -> PathBuf {
    let image = format!("{}:{tag}", text(layout));
    let mut args = vec!["unpack"];
    args.extend(rootless());
    args.extend(["--image", &image, text(bundle)]);
    umoci(&args);
    bundle.join("rootfs")
}
