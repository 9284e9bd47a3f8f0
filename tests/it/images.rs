//! Images made by common tools: every form that `publish` reads leads to the same digest at every
//! site.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::command::tool;
use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::disk::SmallDisk;
use crate::support::images::{self, sha256};
use crate::support::line::Line;
use crate::support::registry::{PASSWORD, Registry, USER};
use crate::support::tree::assert_same;
use crate::support::{Scratch, data, limit, secs, wait_for};

/// A hub, a site with a registry, and a site with an OCI layout.
struct World {
    hub: Hub,
    layout_site: Site,
    registry_site: Site,
    registry: Registry,
    scratch: Scratch,
}

impl World {
    fn start() -> Self {
        let scratch = Scratch::new();
        let registry = Registry::bearer(&scratch, "bearer");
        let hub = Hub::start_new(scratch.path());
        let spec = SiteSpec {
            images_sink: Some(registry.sink(&scratch)),
            ..SiteSpec::default()
        };
        let registry_site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
        let layout_site = Site::start_new(scratch.path(), &hub, "hefei", &SiteSpec::default());
        Self {
            hub,
            layout_site,
            registry_site,
            registry,
            scratch,
        }
    }

    /// Publishes an image to both sites, and waits until both have it with the recorded digest.
    /// Returns its `info`.
    fn carry(&self, source: &str, name: &str, more: &[&str]) -> Value {
        let reference = format!("image/{name}:v1");
        let args: Vec<&str> = [
            "publish", source, "--as", &reference, "--to", "all", "--wait",
        ]
        .into_iter()
        .chain(more.iter().copied())
        .collect();
        self.hub.cli(&args).expect(0);
        let info = self.hub.json(&["show", &reference])["info"].clone();
        let digest = info["digest"]
            .as_str()
            .unwrap_or_else(|| panic!("{name} has no digest: {info}"));
        assert_eq!(
            self.registry.digest(&format!("operators/{name}:v1")),
            digest,
            "{name} in the registry"
        );
        let raw = tool("skopeo", &["inspect", "--raw", &self.in_layout(name)]);
        assert_eq!(sha256(raw.as_bytes()), digest, "{name} in the layout");
        info
    }

    fn in_layout(&self, name: &str) -> String {
        format!("oci:{}/{name}:v1", self.layout_site.layout.display())
    }

    /// Copies an image out of the registry, unpacks it, and compares its files.
    fn check_files(&self, name: &str) {
        let copy = self.scratch.join(&format!("copy-{name}"));
        self.registry.skopeo(
            "copy",
            &[
                "--preserve-digests",
                &format!("{{}}/operators/{name}:v1"),
                &format!("oci:{}:v1", copy.display()),
            ],
        );
        let root = images::unpack(&copy, "v1", &self.scratch.join(&format!("bundle-{name}")));
        assert_same(&images::small().join("root"), &root);
    }
}

fn fixture(name: &str) -> String {
    let path: PathBuf = images::small().join(name);
    path.to_str().unwrap().to_owned()
}

#[test]
fn one_image_in_every_form() {
    let _limit = limit(secs(240));
    let world = World::start();
    let original = images::top(&images::small().join("layout"))["digest"].clone();

    for (source, name) in [
        ("layout", "layout"),
        ("oci.tar", "oci-tar"),
        ("oci.tar.zst", "oci-tar-zst"),
    ] {
        let info = world.carry(&fixture(source), name, &[]);
        assert_eq!(
            info["digest"], original,
            "an OCI image keeps its bytes: {name}"
        );
        world.check_files(name);
    }
    let plain = world.carry(&fixture("docker.tar"), "docker-tar", &[]);
    world.check_files("docker-tar");
    let squeezed = world.carry(&fixture("docker.tar.gz"), "docker-tar-gz", &[]);
    assert_eq!(
        plain["digest"], squeezed["digest"],
        "the compression of the archive does not matter"
    );
    assert_eq!(plain["platforms"], json!(["linux/amd64"]));
}

/// The signature and the SBOM of an image reach a registry without the referrers API and a directory
/// of layouts, and are the same when a site publishes from its registry what it received.
#[test]
fn signatures_and_sboms_arrive_with_the_image() {
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const SPDX: &str = "application/spdx+json";
    let _limit = limit(secs(240));
    let world = World::start();
    let signed = world.scratch.folder("signed");
    images::layout(&signed, &[b"layer"]);
    let image = images::top(&signed);
    let hex = image["digest"].as_str().unwrap().replace("sha256:", "");
    let empty = images::put_blob(&signed, "application/vnd.oci.empty.v1+json", b"{}");
    let referrer = |what: &str, content: &[u8], subject: Option<&Value>| {
        let layer = images::put_blob(&signed, what, content);
        let mut manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": what, "config": empty, "layers": [layer] });
        if let Some(subject) = subject {
            manifest["subject"] = json!({ "mediaType": MANIFEST, "digest": subject["digest"], "size": subject["size"] });
        }
        images::put_blob(&signed, MANIFEST, manifest.to_string().as_bytes())
    };
    let payload = format!(r#"{{"critical":{{"image":"{hex}"}}}}"#);
    let mut signature = referrer(
        "application/vnd.dev.cosign.simplesigning.v1+json",
        payload.as_bytes(),
        None,
    );
    let tag = format!("sha256-{hex}.sig");
    signature["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let sbom = referrer(SPDX, br#"{"spdxVersion":"SPDX-2.3"}"#, Some(&image));
    let index = json!({ "schemaVersion": 2, "manifests": [image, signature, sbom] });
    data::write(&signed.join("index.json"), index.to_string().as_bytes());

    let source = signed.to_str().unwrap().to_owned();
    let info = world.carry(&source, "signed", &["--strict"]);
    assert_eq!(info["referrers"].as_array().unwrap().len(), 2, "{info}");
    assert_eq!(
        world.registry.digest(&format!("operators/signed:{tag}")),
        signature["digest"]
    );
    let list = format!("{{}}/operators/signed:sha256-{hex}");
    let list = world.registry.skopeo("inspect", &["--raw", &list]);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(
        (
            &list["manifests"][0]["digest"],
            &list["manifests"][0]["artifactType"]
        ),
        (&sbom["digest"], &json!(SPDX))
    );
    let layout = world.layout_site.layout.join("signed");
    let in_layout = format!("oci:{}:{tag}", layout.display());
    let raw = tool("skopeo", &["inspect", "--raw", &in_layout]);
    assert_eq!(sha256(raw.as_bytes()), signature["digest"]);
    for site in [&world.registry_site, &world.layout_site] {
        site.cli(&["verify", "image/signed:v1"]).expect(0);
    }

    // The site's registry and the directory of the other one are sources of the same artifact.
    let digest = |reference: &str| world.hub.json(&["show", reference])["digest"].clone();
    let in_registry = format!("registry://{}/operators/signed:v1", world.registry.host());
    let in_directory = format!("{}#v1", layout.display());
    for (site, source, reference) in [
        (&world.registry_site, &in_registry, "image/pulled:v1"),
        (&world.layout_site, &in_directory, "image/copied:v1"),
    ] {
        let args = [
            "publish", source, "--as", reference, "--to", "all", "--wait", "--strict",
        ];
        site.cli(&args).expect(0);
        assert_eq!(digest(reference), digest("image/signed:v1"), "{reference}");
    }
    assert_eq!(
        world.registry.digest(&format!("operators/copied:{tag}")),
        signature["digest"]
    );
    // Without them it is another artifact, and the name of a published one keeps its content.
    let alone = [
        "publish",
        &source,
        "--as",
        "image/alone:v1",
        "--no-referrers",
    ];
    let published = world.hub.json(&alone);
    assert_eq!(published["omitted"][0]["what"], "referrers");
    assert_eq!(published["omitted"][0]["count"], 2);
    assert_ne!(digest("image/alone:v1"), digest("image/signed:v1"));
    let again = world
        .hub
        .json(&["publish", &source, "--as", "image/alone:v1"]);
    assert_eq!(again["unchanged"], true, "{again}");
    assert!(again["note"].as_str().unwrap().contains("SBOMs differ"));
}

#[test]
fn zstd_layers_are_not_recompressed() {
    let _limit = limit(secs(180));
    let world = World::start();
    let info = world.carry(&fixture("zstd"), "zstd", &[]);
    assert_eq!(
        info["digest"],
        images::top(&images::small().join("zstd"))["digest"]
    );
}

#[test]
fn an_index_of_two_platforms_arrives_complete() {
    let _limit = limit(secs(180));
    let world = World::start();
    let info = world.carry(&fixture("two"), "two", &[]);
    assert_eq!(
        info["digest"],
        images::top(&images::small().join("two"))["digest"]
    );
    assert_eq!(info["platforms"], json!(["linux/amd64", "linux/arm64"]));
    for architecture in ["amd64", "arm64"] {
        let out = world.registry.skopeo(
            "inspect",
            &[
                "--override-arch",
                architecture,
                "--config",
                "{}/operators/two:v1",
            ],
        );
        assert!(out.contains(architecture), "{out}");
    }
}

#[test]
fn a_platform_without_blobs_is_omitted_and_reported() {
    let _limit = limit(secs(180));
    let world = World::start();
    let info = world.carry(&fixture("absent"), "absent", &[]);
    assert_eq!(info["platforms"], json!(["linux/amd64"]));
    let left_out = info["absent"].as_array().unwrap();
    let digest = left_out
        .first()
        .and_then(|d| d.as_str())
        .unwrap_or_default();
    assert!(
        left_out.len() == 1 && digest.starts_with("sha256:"),
        "the omission is reported: {info}"
    );
}

#[test]
fn an_image_is_published_from_a_registry() {
    let _limit = limit(secs(180));
    let mut world = World::start();
    let source = Registry::basic(&world.scratch, "source");
    source.push(&format!("oci:{}:v1", fixture("two")), "team/app:v1");
    let password = world.scratch.join("source-password");
    std::fs::write(&password, PASSWORD).unwrap();
    let url = format!("registry://{}/team/app:v1", source.host());
    let registry = format!(
        "[registry.\"{}\"]\nusername = \"{USER}\"\npassword_file = \"{}\"\n[listen]",
        source.host(),
        password.display()
    );
    world.hub.stop();
    world.hub.edit_config("[listen]", &registry);
    world.hub.start();
    let info = world.carry(&url, "pulled", &[]);
    assert_eq!(
        info["digest"],
        images::top(&images::small().join("two"))["digest"]
    );

    let missing = format!("registry://{}/team/none:v1", source.host());
    let mut args = vec!["publish", missing.as_str(), "--as", "image/none:v1"];
    world.hub.cli(&args).expect(5).says(&["team/none"]);
    std::fs::write(&password, "wrong").unwrap();
    args[1] = &url;
    world.hub.cli(&args).expect(4);
    world.hub.cli(&["show", "image/none:v1"]).expect(5);
}

/// The credentials are those of `docker login`, and the platform is selected.
#[test]
fn an_image_is_published_with_the_credentials_of_docker_login() {
    let _limit = limit(secs(180));
    let world = World::start();
    let source = Registry::basic(&world.scratch, "source");
    source.push(&format!("oci:{}:v1", fixture("two")), "team/app:v1");
    let url = format!("docker://{}/team/app:v1", source.host());
    let args = ["publish", url.as_str(), "--as", "image/none:v1"];
    let hint = format!("docker login {}", source.host());
    world.hub.cli(&args).expect(4).says(&[&hint]);
    let login = world.hub.docker_config();
    std::fs::create_dir_all(&login).unwrap();
    let entry = json!({ "username": USER, "password": PASSWORD });
    let text = json!({ "auths": { source.host(): entry } });
    std::fs::write(login.join("config.json"), text.to_string()).unwrap();
    let all = world.carry(&url, "all", &[]);
    assert_eq!(
        all["digest"],
        images::top(&images::small().join("two"))["digest"]
    );
    let one = world.carry(&url, "one", &["--platform", "linux/arm64"]);
    assert_eq!(one["platforms"], json!(["linux/arm64"]));
    assert_eq!(
        one["media_type"],
        "application/vnd.oci.image.manifest.v1+json"
    );
    let none = [
        "publish",
        &url,
        "--as",
        "image/none:v1",
        "--platform",
        "linux/s390x",
    ];
    world.hub.cli(&none).expect(5).says(&["linux/arm64"]);
}

#[test]
fn a_rebuilt_layer_reuses_the_unchanged_content_in_the_registry() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let registry = Registry::basic(&scratch, "basic");
    let hub = Hub::start_new(scratch.path());
    let spec = SiteSpec {
        images_sink: Some(registry.sink(&scratch)),
        ..SiteSpec::default()
    };
    let _site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let mut layer = data::noise(&mut data::rng("a layer"), 8 << 20);
    for version in ["v1", "v2"] {
        let source = scratch.join(version);
        images::layout(&source, &[&layer]);
        let name = format!("image/rebuilt:{version}");
        hub.publish(&source, &name, &[]);
        let bytes = hub.deliver_and_wait(&name, "chengdu", secs(60)).bytes;
        assert_eq!(
            registry.digest(&format!("operators/rebuilt:{version}")),
            images::top(&source)["digest"]
        );
        if version == "v2" {
            assert!(
                bytes.received < 512 << 10 && bytes.reused > 7 << 20,
                "{bytes:?}"
            );
        }
        layer.splice(
            3 << 20..(3 << 20) + 1000,
            data::noise(&mut data::rng("a change"), 1010),
        );
    }
}

/// The total size of the files with this name below a folder.
fn folder_bytes(folder: &Path, name: &str) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => folder_bytes(&entry.path(), name),
        Ok(meta) if entry.file_name() == name => meta.len(),
        _ => 0,
    };
    entries.map(bytes).sum()
}

#[test]
fn a_layer_is_pushed_to_the_registry_while_the_transfer_is_running() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let registry = Registry::basic(&scratch, "basic");
    let hub = Hub::start_new(scratch.path());
    let line = Line::to(hub.quic);
    let spec = SiteSpec {
        images_sink: Some(registry.sink(&scratch)),
        through: Some(line.address()),
        ..SiteSpec::default()
    };
    let _site = Site::start_new(scratch.path(), &hub, "chengdu", &spec);
    let mut rng = data::rng("early layers");
    let layers: Vec<Vec<u8>> = (0..3).map(|_| data::noise(&mut rng, 12 << 20)).collect();
    let source = scratch.join("image");
    images::layout(
        &source,
        &layers.iter().map(Vec::as_slice).collect::<Vec<_>>(),
    );
    hub.publish(&source, "image/early:v1", &[]);
    // Less than one layer. The connection is slow, so that lost packets are sent again before the
    // proxy stops.
    line.throttle(3 << 20);
    let before = line.down();
    line.hold_at(before + (11 << 20));
    let transfer = hub.deliver(&["image/early:v1"], "chengdu").remove(0);
    let stored = |layer: &[u8]| {
        let hex = sha256(layer).replace("sha256:", "");
        scratch
            .join(&format!(
                "basic/docker/registry/v2/blobs/sha256/{}/{hex}/data",
                &hex[..2]
            ))
            .exists()
    };
    let uploads = scratch.join("basic/docker/registry/v2/repositories");
    wait_for(
        "the registry receives the first bytes of a layer",
        secs(60),
        || (folder_bytes(&uploads, "data") > 0).then_some(()),
    );
    assert!(
        !layers.iter().any(|layer| stored(layer)),
        "no layer can be complete"
    );
    // Less than all three layers. At most 12 MiB are requested at once, so the first layer is
    // complete.
    line.throttle(0);
    line.hold_at(before + (33 << 20));
    wait_for("the registry has a layer", secs(25), || {
        layers.iter().any(|layer| stored(layer)).then_some(())
    });
    let then = hub.transfer(&transfer);
    assert!(
        then.state == "transferring" && !layers.iter().all(|layer| stored(layer)),
        "{then:?}"
    );
    line.hold_at(0);
    let done = hub.wait_done(&transfer, secs(60));
    assert!(
        layers.iter().all(|layer| stored(layer)) && done.bytes.reused == 0,
        "{done:?}"
    );
}

#[test]
fn the_hub_starts_no_pull_that_does_not_fit_on_its_disk() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let mut hub = Hub::new(scratch.path());
    let Some(disk) = SmallDisk::mount_tmpfs(&hub.data_dir, "110m") else {
        return;
    };
    let registry = Registry::basic(&scratch, "source");
    let layout = scratch.join("layout");
    let layers = ["a", "b", "c"].map(|name| data::noise(&mut data::rng(name), 20 << 20));
    images::layout(
        &layout,
        &layers.iter().map(Vec::as_slice).collect::<Vec<_>>(),
    );
    registry.push(&format!("oci:{}", layout.display()), "team/app:v1");
    let password = scratch.join("password");
    data::write(&password, PASSWORD.as_bytes());
    let url = format!("registry://{}/team/app:v1", registry.host());
    let access = format!(
        "[registry.\"{}\"]\nusername = \"{USER}\"\npassword_file = \"{}\"\n[listen]",
        registry.host(),
        password.display()
    );
    hub.edit_config("[listen]", &access);
    hub.start();
    let publish = |more: &[&str]| {
        let args = ["publish", &url, "--as", "image/app:v1"];
        hub.cli(
            &args
                .into_iter()
                .chain(more.iter().copied())
                .collect::<Vec<_>>(),
        )
    };
    // 80 MiB are needed: the image and a second copy of its largest layer. That leaves less space
    // than the hub reserves for itself.
    let used = disk.used();
    publish(&["--timeout", "8s"]).expect(11).says(&[
        "waiting for room",
        "the image needs",
        hub.data_dir.to_str().unwrap(),
    ]);
    assert!(
        disk.used() < used + (4 << 20),
        "{} bytes of the image were written",
        disk.used() - used
    );
    // Less than twice the image's size: the disk never holds the image twice.
    disk.grow("165m");
    // The job still waits, although its client has ended: a second job would need the space again.
    wait_for("the publish that waited for room is done", secs(60), || {
        hub.artifacts()
            .contains(&"image/app:v1".to_owned())
            .then_some(())
    });
    hub.cli(&["verify", "image/app:v1"]).expect(0);
}

#[test]
fn all_images_of_a_layout_are_published_and_share_their_large_blobs() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "hefei", &SiteSpec::default());
    let layout = scratch.join("set");
    let base = data::noise(&mut data::rng("base"), 6 << 20);
    let mut tops = Vec::new();
    for layers in [&[&base[..]][..], &[&base[..], b"more"], &[b"other"]] {
        images::layout(&layout, layers);
        tops.push(images::top(&layout));
    }
    for (top, name) in tops.iter_mut().zip(["docker.io/ops/app:V1", "v2", ""]) {
        let top = top.as_object_mut().unwrap();
        top.remove("annotations");
        if !name.is_empty() {
            let names = serde_json::json!({ "org.opencontainers.image.ref.name": name });
            top.insert("annotations".into(), names);
        }
    }
    let digests: Vec<String> = tops
        .iter()
        .map(|top| top["digest"].as_str().unwrap().to_owned())
        .collect();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": tops });
    data::write(&layout.join("index.json"), index.to_string().as_bytes());
    let publish = ["publish", layout.to_str().unwrap(), "--all"];
    let published = hub.json(&publish);
    let version = format!("sha256-{}", &digests[2]["sha256:".len()..][..16]);
    let expected = [
        "image/ops-app:v1".to_owned(),
        "image/set:v2".to_owned(),
        format!("image/set:{version}"),
    ];
    for (number, reference) in expected.iter().enumerate() {
        assert_eq!(published[number]["artifact"], **reference, "{published}");
        let info = hub.json(&["show", reference])["info"].clone();
        assert_eq!(info["digest"], *digests[number], "{reference}: {info}");
    }
    let again = hub.json(&publish);
    assert_eq!(again[2]["unchanged"], true, "{again}");
    // One after another: two transfers at once may both store a blob.
    for reference in &expected {
        hub.deliver_and_wait(reference, "hefei", secs(60));
    }
    // The repository is that of the image, without its registry.
    let there = |name: &str| {
        let blob = images::blob(&site.layout.join(name), &sha256(&base));
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(blob).unwrap())
    };
    assert_eq!(there("ops/app"), there("set"));
    // A registry is no such source.
    hub.cli(&["publish", "registry://r.example.com/a:v1", "--all"])
        .expect(2)
        .says(&["--list"]);
}
