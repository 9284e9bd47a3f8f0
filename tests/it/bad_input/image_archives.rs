//! Truncated image archives, and archives with false metadata.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::data::{copy_tree, noise, rng, write};
use crate::support::images::{self, blob, put_blob, set_top, sha256, top};
use crate::support::{limit, secs};

use super::Refusing;

/// A tar that is built member by member, with any names and links.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn member(
        mut self,
        name: &str,
        kind: tar::EntryType,
        link: &str,
        size: u64,
        bytes: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        // The checked functions refuse the names that these tests need.
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        header.set_cksum();
        self.0.append(&header, bytes).unwrap();
        self
    }

    fn file(self, name: &str, bytes: &[u8]) -> Self {
        self.member(name, tar::EntryType::Regular, "", bytes.len() as u64, bytes)
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.member(name, tar::EntryType::Symlink, target, 0, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A layer with one file.
fn layer(text: &str) -> Vec<u8> {
    Tar::new().file("file.txt", text.as_bytes()).bytes()
}

/// The config of an image with these layers.
fn config(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|l| sha256(l)).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
    json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs })
        .to_string()
        .into_bytes()
}

/// The `manifest.json` of `docker save`.
fn listing(layers: &[&str]) -> Vec<u8> {
    json!([{ "Config": "config.json", "RepoTags": ["a:v1"], "Layers": layers }])
        .to_string()
        .into_bytes()
}

#[track_caller]
fn refused(world: &Refusing, name: &str, bytes: &[u8], words: &[&str]) {
    let file = world.scratch.join(name);
    write(&file, bytes);
    world.hub.refuses(&file, "image/bad:v1", &[], 8, words);
}

#[test]
fn docker_archives_with_false_metadata_are_refused() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    let (one, two) = (layer("one"), layer("two"));

    // First, a valid archive of this form must be accepted.
    let sound = Tar::new()
        .file("1/layer.tar", &one)
        .file("config.json", &config(&[&one]))
        .file("manifest.json", &listing(&["1/layer.tar"]));
    let file = world.scratch.join("sound.tar");
    write(&file, &sound.bytes());
    world.hub.publish(&file, "image/good:v1", &[]);
    let repeated = Tar::new()
        .file("1/layer.tar", &one)
        .link("2/layer.tar", "../1/layer.tar")
        .file("config.json", &config(&[&one, &one]))
        .file("manifest.json", &listing(&["1/layer.tar", "2/layer.tar"]));
    write(&file, &repeated.bytes());
    world.hub.publish(&file, "image/good:v2", &[]);

    let start = || {
        Tar::new()
            .file("1/layer.tar", &one)
            .file("config.json", &config(&[&one]))
    };
    refused(
        &world,
        "no-manifest.tar",
        &start().bytes(),
        &["manifest.json"],
    );
    refused(
        &world,
        "missing-layer.tar",
        &start()
            .file("manifest.json", &listing(&["9/layer.tar"]))
            .bytes(),
        &["9/layer.tar"],
    );
    let swapped = Tar::new()
        .file("1/layer.tar", &two)
        .file("config.json", &config(&[&one]))
        .file("manifest.json", &listing(&["1/layer.tar"]));
    refused(
        &world,
        "wrong-layer.tar",
        &swapped.bytes(),
        &["1/layer.tar"],
    );
    let more = start()
        .file("2/layer.tar", &two)
        .file("manifest.json", &listing(&["1/layer.tar", "2/layer.tar"]));
    refused(&world, "count.tar", &more.bytes(), &["diff_id"]);
    let twice = start()
        .file("1/layer.tar", &two)
        .file("manifest.json", &listing(&["1/layer.tar"]));
    refused(&world, "twice.tar", &twice.bytes(), &["1/layer.tar"]);
    let climbing = start()
        .file("../evil", b"x")
        .file("manifest.json", &listing(&["1/layer.tar"]));
    refused(&world, "climbing.tar", &climbing.bytes(), &["../evil"]);
    let cycle = Tar::new()
        .link("a/layer.tar", "../b/layer.tar")
        .link("b/layer.tar", "../a/layer.tar")
        .file("config.json", &config(&[&one]))
        .file("manifest.json", &listing(&["a/layer.tar"]));
    refused(&world, "cycle.tar", &cycle.bytes(), &["layer.tar"]);
    let outside = Tar::new()
        .link("1/layer.tar", "../../../etc/passwd")
        .file("config.json", &config(&[&one]));
    refused(
        &world,
        "outside.tar",
        &outside
            .file("manifest.json", &listing(&["1/layer.tar"]))
            .bytes(),
        &["1/layer.tar"],
    );
    let lying = start().member(
        "manifest.json",
        tar::EntryType::Regular,
        "",
        1 << 40,
        &listing(&["1/layer.tar"]),
    );
    refused(&world, "lying.tar", &lying.bytes(), &[]);
    refused(&world, "noise.tar", &noise(&mut rng("noise"), 100_000), &[]);
    refused(&world, "empty.tar", b"", &[]);
    assert_eq!(world.hub.artifacts().len(), 2);
    assert_eq!(super::leftovers(&world.hub), Vec::<PathBuf>::new());
}

#[test]
fn truncated_archives_are_refused() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    for name in ["oci.tar", "docker.tar", "docker.tar.gz", "oci.tar.zst"] {
        let whole = std::fs::read(images::small().join(name)).unwrap();
        // The end of a tar is padding: a cut there removes no content.
        for part in [whole.len() / 3, whole.len() * 2 / 3] {
            refused(&world, &format!("cut-{part}-{name}"), &whole[..part], &[]);
        }
    }
    world.check_clean();
}

/// A copy of the small layout, to be changed, and its manifest.
fn layout(world: &Refusing, name: &str) -> (PathBuf, Value) {
    let layout = world.scratch.join(name);
    copy_tree(&images::small().join("layout"), &layout);
    let manifest = std::fs::read(blob(&layout, top(&layout)["digest"].as_str().unwrap())).unwrap();
    (layout, serde_json::from_slice(&manifest).unwrap())
}

/// Makes a changed manifest the top manifest of a layout.
fn set_manifest(layout: &Path, manifest: &Value) {
    let descriptor = put_blob(
        layout,
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    set_top(layout, descriptor);
}

#[test]
fn oci_layouts_with_false_metadata_are_refused() {
    let _limit = limit(secs(120));
    let world = Refusing::start();
    let refused = |layout: &Path, words: &[&str]| {
        drop(world.hub.refuses(layout, "image/bad:v1", &[], 8, words));
    };
    let digest_of =
        |manifest: &Value, i: usize| manifest["layers"][i]["digest"].as_str().unwrap().to_owned();
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();

    let (flipped, manifest) = layout(&world, "flipped");
    let digest = digest_of(&manifest, 0);
    let mut bytes = std::fs::read(blob(&flipped, &digest)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    write(&blob(&flipped, &digest), &bytes);
    refused(&flipped, &[&hex(&digest)]);

    let (missing, manifest) = layout(&world, "missing");
    let digest = digest_of(&manifest, 1);
    std::fs::remove_file(blob(&missing, &digest)).unwrap();
    refused(&missing, &[&hex(&digest)]);

    let (size, mut manifest) = layout(&world, "size");
    manifest["layers"][0]["size"] = json!(manifest["layers"][0]["size"].as_u64().unwrap() + 1);
    set_manifest(&size, &manifest);
    refused(&size, &["size"]);

    let (count, mut manifest) = layout(&world, "count");
    let first = manifest["layers"][0].clone();
    manifest["layers"].as_array_mut().unwrap().push(first);
    set_manifest(&count, &manifest);
    refused(&count, &["diff_id"]);

    let (escaping, _) = layout(&world, "escaping");
    let mut descriptor = top(&escaping);
    descriptor["digest"] = json!("sha256:../../../../etc/passwd");
    set_top(&escaping, descriptor);
    refused(&escaping, &["digest"]);

    let (empty, _) = layout(&world, "empty");
    write(
        &empty.join("index.json"),
        br#"{"schemaVersion":2,"manifests":[]}"#,
    );
    refused(&empty, &[]);
    world.check_clean();
}

#[test]
fn a_decompression_bomb_fills_neither_memory_nor_disk() {
    let _limit = limit(secs(240));
    let world = Refusing::start();
    // 1 GiB of white space instead of a few hundred bytes of JSON, as about a megabyte of gzip.
    let path = world.scratch.join("bomb.tar.gz");
    let mut out = flate2::write::GzEncoder::new(
        std::fs::File::create(&path).unwrap(),
        flate2::Compression::fast(),
    );
    let mut header = tar::Header::new_gnu();
    header.set_path("manifest.json").unwrap();
    header.set_size(1 << 30);
    header.set_cksum();
    out.write_all(header.as_bytes()).unwrap();
    let blank = vec![b' '; 1 << 20];
    for _ in 0..1024 {
        out.write_all(&blank).unwrap();
    }
    out.write_all(&[0; 1024]).unwrap();
    out.finish().unwrap();
    world
        .hub
        .refuses(&path, "image/bomb:v1", &[], 8, &["manifest.json"]);
    let peak = world.hub.memory("VmHWM");
    assert!(peak < 256 << 20, "the daemon had {peak} bytes resident");
    world.check_clean();
}
