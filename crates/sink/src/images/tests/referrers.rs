//! What is carried with an image: signatures and SBOMs, in a real registry without the referrers API,
//! with a stand-in that has it, and in a directory of layouts.

use serde_json::{Value, json};

use super::*;
use crate::Committed;
use ::registry::image::{OCI_INDEX, OCI_MANIFEST};
use ::registry::{Access as RegistryAccess, Credentials, Origin, Registry};
use content::manifest::ImageReferrer;

/// A referrer whose parts are staged with an image.
fn attach(image: &Image, about: &Sha256, tag: Option<&str>, seed: u64) -> ImageReferrer {
    let put = |bytes: &[u8]| {
        let digest = Sha256::of(bytes);
        write(&image.dir.join(digest.layout_path()), bytes);
        digest
    };
    let blob = noise(seed, 2000);
    let layer = json!({"mediaType": "application/x", "digest": put(&blob), "size": blob.len()});
    let config =
        json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": put(b"{}"), "size": 2});
    let mut manifest =
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]});
    if tag.is_none() {
        manifest["artifactType"] = "application/spdx+json".into();
        manifest["annotations"] = json!({"made": "today"});
        manifest["subject"] = json!({"mediaType": OCI_MANIFEST, "digest": about, "size": 1});
    }
    let bytes = manifest.to_string();
    ImageReferrer {
        media_type: OCI_MANIFEST.into(),
        digest: put(bytes.as_bytes()).to_string(),
        size: bytes.len() as u64,
        about: about.to_string(),
        tag: tag.map(|suffix| ImageReferrer::cosign_tag(about, suffix)),
    }
}

fn with(mut incoming: Incoming, referrers: &[ImageReferrer]) -> Incoming {
    if let KindInfo::Image(info) = &mut incoming.root.info {
        info.referrers = referrers.to_vec();
    }
    incoming.root.format = 3;
    incoming
}

fn digest(text: &str) -> Sha256 {
    text.parse().unwrap()
}

/// The manifest of the first platform of an index.
fn first_platform(image: &Image) -> Sha256 {
    let path = image.dir.join(digest(&image.info.digest).layout_path());
    let index: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    digest(index["manifests"][0]["digest"].as_str().unwrap())
}

/// A signature of the index and one of a platform, an SBOM of the index, and what describes the SBOM.
fn signed(image: &Image, seed: u64) -> Vec<ImageReferrer> {
    let top = digest(&image.info.digest);
    let sbom = attach(image, &top, None, seed);
    let of_sbom = attach(image, &digest(&sbom.digest), None, seed + 1);
    vec![
        attach(image, &top, Some("sig"), seed + 2),
        attach(image, &first_platform(image), Some("sig"), 1000),
        sbom,
        of_sbom,
    ]
}

async fn problems(sink: &dyn Sink, incoming: &Incoming, landed: &Committed) -> Vec<String> {
    sink.verify(incoming, &landed.place, &Verification::default())
        .await
        .unwrap()
}

/// The behaviour of every image sink. `set` changes the content of a blob, `holds` says whether the
/// target has a manifest.
async fn contract(
    sink: &dyn Sink,
    set: &dyn Fn(&Sha256, &[u8]),
    holds: impl AsyncFn(&str) -> bool,
) {
    let layers = [tar_layer("base.txt", b"base")];
    let one = staged(sink, &layers, &["amd64", "arm64"]);
    let of_one = signed(&one, 10);
    let v1 = with(incoming("image/seg:v1", &one), &of_one);
    sink.check(&v1).await.unwrap();
    assert!(!sink.exists_at_target(&v1).await.unwrap());
    let landed = sink.commit(&v1, &one.dir).await.unwrap();
    assert_eq!((landed.note.as_deref(), one.dir.exists()), (None, false));
    assert!(sink.exists_at_target(&v1).await.unwrap());
    assert_eq!(problems(sink, &v1, &landed).await, Vec::<String>::new());
    for referrer in &of_one {
        assert!(holds(&referrer.digest).await);
        let path = blob_path(&digest(&referrer.digest));
        let len = referrer.size as u32;
        let read = sink.read_at(&landed.place, &path, 0, len).await.unwrap();
        assert_eq!(Sha256::of(&read), digest(&referrer.digest));
    }

    // A damaged signature is found, and what is staged again is accepted.
    let blob = Sha256::of(&noise(12, 2000));
    set(&blob, &noise(99, 2000));
    let found = problems(sink, &v1, &landed).await;
    assert!(
        found.len() == 1 && found[0].contains(&blob.hex()),
        "{found:?}"
    );
    sink.clear(&v1).await.unwrap();
    // docker-registry keeps a file that it has, whatever its content is.
    set(&blob, &noise(12, 2000));
    let again = staged(sink, &layers, &["amd64", "arm64"]);
    assert_eq!(signed(&again, 10), of_one);
    sink.commit(&v1, &again.dir).await.unwrap();
    assert_eq!(problems(sink, &v1, &landed).await, Vec::<String>::new());

    // Another index with the same platform: the signature of the platform stays with it.
    let two = staged(sink, &layers, &["amd64"]);
    let platform = first_platform_or_top(&two);
    assert_eq!(of_one[1].about, platform.to_string());
    let of_two = vec![attach(&two, &platform, Some("sig"), 1000)];
    let v2 = with(incoming("image/seg:v2", &two), &of_two);
    let landed_two = sink.commit(&v2, &two.dir).await.unwrap();
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    assert!(!sink.exists_at_target(&v1).await.unwrap());
    assert_eq!(problems(sink, &v2, &landed_two).await, Vec::<String>::new());
    assert!(holds(&of_one[1].digest).await);
    for gone in [0, 2, 3] {
        assert!(!holds(&of_one[gone].digest).await, "{gone}");
    }
    // Removing it again changes nothing.
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    assert_eq!(problems(sink, &v2, &landed_two).await, Vec::<String>::new());
    sink.remove(&v2.artifact, Some(&v2.root.info))
        .await
        .unwrap();
    assert!(!holds(&of_one[1].digest).await);
}

fn first_platform_or_top(image: &Image) -> Sha256 {
    digest(&image.info.digest)
}

fn client(server: &RealRegistry) -> Registry {
    let credentials = Some(Credentials::new(USER, PASSWORD));
    let origin = Origin {
        https: false,
        authority: server.address.clone(),
    };
    Registry::open(origin, RegistryAccess::from(credentials)).unwrap()
}

/// The file of a blob of docker-registry.
fn data(server: &RealRegistry, blob: &Sha256) -> PathBuf {
    fn find(folder: &Path, hex: &str) -> Option<PathBuf> {
        std::fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
            if entry.file_name().to_str() == Some(hex) && entry.path().join("data").exists() {
                return Some(entry.path().join("data"));
            }
            find(&entry.path(), hex)
        })
    }
    find(server.dir.path(), &blob.hex()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_and_sboms_in_a_registry_without_the_referrers_api() {
    let server = RealRegistry::start(&Access::Basic);
    let sink = open(
        Some(&sink_config(&server.url("op"), server.dir.path())),
        server.dir.path(),
    )
    .unwrap();
    let registry = client(&server);
    let held = async |digest: &str| {
        registry
            .head_manifest("op/seg", digest)
            .await
            .unwrap()
            .is_some()
    };
    let set = |blob: &Sha256, bytes: &[u8]| write(&data(&server, blob), bytes);
    contract(sink.as_ref(), &set, &held).await;

    // What clients see: the tag of cosign, and the list of the fallback tag.
    let image = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    let top = digest(&image.info.digest);
    let all = [
        attach(&image, &top, Some("sig"), 20),
        attach(&image, &top, None, 21),
    ];
    let v1 = with(incoming("image/one:v1", &image), &all);
    let landed = sink.commit(&v1, &image.dir).await.unwrap();
    let tag = all[0].tag.clone().unwrap();
    assert_eq!(
        registry.head_manifest("op/one", &tag).await.unwrap(),
        Some(digest(&all[0].digest))
    );
    let fallback = format!("sha256-{}", top.hex());
    let list = async || {
        let list = registry.get_manifest("op/one", &fallback, "pull").await;
        let list: Value = serde_json::from_slice(&list.unwrap().unwrap().bytes).unwrap();
        assert_eq!(list["mediaType"], OCI_INDEX);
        list["manifests"].as_array().unwrap().clone()
    };
    let entry = json!({"mediaType": OCI_MANIFEST, "digest": all[1].digest, "size": all[1].size,
        "artifactType": "application/spdx+json", "annotations": {"made": "today"}});
    assert_eq!(list().await, [entry]);

    // Signed again at the site: that signature stays, and is no problem.
    let resigned = staged(sink.as_ref(), &[tar_layer("b", b"b")], &["amd64"]);
    let other = with(incoming("image/one:v2", &resigned), &[]);
    sink.commit(&other, &resigned.dir).await.unwrap();
    let manifest = registry.get_manifest("op/one", "v2", "pull").await;
    let manifest = manifest.unwrap().unwrap();
    let theirs = manifest.descriptor.digest;
    registry
        .put_manifest("op/one", &tag, OCI_MANIFEST, &manifest.bytes, &theirs)
        .await
        .unwrap();
    let again = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    attach(&again, &top, Some("sig"), 20);
    attach(&again, &top, None, 21);
    let note = sink.commit(&v1, &again.dir).await.unwrap().note.unwrap();
    assert!(note.contains(&tag), "{note}");
    let verification = Verification::default();
    let found = sink.verify(&v1, &landed.place, &verification).await;
    assert_eq!(found.unwrap(), Vec::<String>::new());
    assert!(verification.take_notes()[0].contains(&tag));
    assert!(sink.exists_at_target(&v1).await.unwrap());
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    assert_eq!(
        registry.head_manifest("op/one", &tag).await.unwrap(),
        Some(theirs),
        "not ours"
    );
    assert_eq!(
        registry.head_manifest("op/one", &fallback).await.unwrap(),
        None
    );
    // A list that lost an entry is a problem.
    let image = staged(sink.as_ref(), &[tar_layer("c", b"c")], &["amd64"]);
    let top = digest(&image.info.digest);
    let sbom = attach(&image, &top, None, 22);
    let v3 = with(
        incoming("image/one:v3", &image),
        std::slice::from_ref(&sbom),
    );
    let landed = sink.commit(&v3, &image.dir).await.unwrap();
    registry
        .remove_from_fallback("op/one", &top, &[digest(&sbom.digest)])
        .await
        .unwrap();
    let found = problems(sink.as_ref(), &v3, &landed).await;
    assert!(
        found.len() == 1 && found[0].contains("does not list it"),
        "{found:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_the_referrers_api_needs_no_fallback_tag() {
    let server = StandIn::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = sink_config(&format!("http://{}/op", server.address), dir.path());
    config.realm_hosts = vec![server.address.clone()];
    let sink = open(Some(&config), dir.path()).unwrap();
    let image = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    let top = digest(&image.info.digest);
    let all = [
        attach(&image, &top, Some("att"), 30),
        attach(&image, &top, None, 31),
    ];
    let put = Box::leak(format!("/manifests/{}", all[1].digest).into_boxed_str());
    let scripted = Scripted {
        headers: vec![("oci-subject", "sha256:0")],
        but_done: true,
        ..Scripted::new("PUT", put, 201, String::new())
    };
    server.held.lock().script.push(scripted);
    let v1 = with(incoming("image/seg:v1", &image), &all);
    let landed = sink.commit(&v1, &image.dir).await.unwrap();
    let fallback = format!("/manifests/sha256-{}", top.hex());
    let list = json!({"manifests": [{"digest": all[1].digest}]}).to_string();
    {
        let held = server.held.lock();
        let puts: Vec<&String> = held
            .log
            .iter()
            .filter(|line| line.starts_with("PUT ") && line.contains("/manifests/"))
            .collect();
        let expected = ["v1", all[0].tag.as_ref().unwrap(), &all[1].digest];
        let expected = expected.map(|name| format!("PUT /v2/op/seg/manifests/{name}"));
        assert_eq!(puts, expected.iter().collect::<Vec<_>>(), "in this order");
        assert!(!held.log.iter().any(|line| line.ends_with(&fallback)));
    }
    server.script_always("GET", "/referrers/", 200, list);
    assert_eq!(
        problems(sink.as_ref(), &v1, &landed).await,
        Vec::<String>::new()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_and_sboms_in_a_directory_of_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    let layout = dir.path().join("images/seg");
    let index = |layout: &Path| -> Vec<Value> {
        let Ok(bytes) = std::fs::read(layout.join("index.json")) else {
            return Vec::new();
        };
        let index: Value = serde_json::from_slice(&bytes).unwrap();
        index["manifests"].as_array().unwrap().clone()
    };
    let held = async |digest: &str| {
        let blob: Sha256 = digest.parse().unwrap();
        let is_listed = index(&layout).iter().any(|entry| entry["digest"] == digest);
        let is_there = layout.join(blob.layout_path()).exists();
        assert_eq!(is_listed, is_there, "{digest}");
        is_there
    };
    let set = |blob: &Sha256, bytes: &[u8]| {
        let path = layout.join(blob.layout_path());
        if Sha256::of(bytes) != *blob {
            write(&path, bytes);
        }
        // What is damaged was removed, and is replaced by what is staged.
        assert_eq!(path.exists(), Sha256::of(bytes) != *blob);
    };
    contract(sink.as_ref(), &set, &held).await;
    assert!(!layout.exists(), "the last version takes all with it");

    // Signed again at the site, and an entry of another program: both stay.
    let image = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    let top = digest(&image.info.digest);
    let sig = attach(&image, &top, Some("sig"), 20);
    let plain = incoming("image/one:v1", &image);
    let layout = dir.path().join("images/one");
    let other = staged(sink.as_ref(), &[tar_layer("b", b"b")], &["amd64"]);
    let by_hand = format!("image/one:{}", sig.tag.clone().unwrap());
    let by_hand = incoming(&by_hand, &other);
    sink.commit(&by_hand, &other.dir).await.unwrap();
    let v1 = with(plain, std::slice::from_ref(&sig));
    let landed = sink.commit(&v1, &image.dir).await.unwrap();
    assert!(landed.note.unwrap().contains(sig.tag.as_ref().unwrap()));
    assert!(sink.exists_at_target(&v1).await.unwrap());
    assert_eq!(index(&layout).len(), 3);
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    assert_eq!(index(&layout).len(), 1);
    assert!(sink.exists_at_target(&by_hand).await.unwrap());

    // The same signature delivered by hand is a version of its own, whatever came first.
    let image = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    let sig = attach(&image, &top, Some("att"), 21);
    let v2 = with(incoming("image/one:v2", &image), std::slice::from_ref(&sig));
    sink.commit(&v2, &image.dir).await.unwrap();
    let alone = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
    attach(&alone, &top, Some("att"), 21);
    let info = ::registry::testing::fixture::Info {
        media_type: sig.media_type.clone(),
        digest: sig.digest.clone(),
        size: sig.size,
        platforms: Vec::new(),
    };
    let alone = Image { info, ..alone };
    let by_hand = format!("image/one:{}", sig.tag.clone().unwrap());
    let by_hand = incoming(&by_hand, &alone);
    sink.commit(&by_hand, &alone.dir).await.unwrap();
    sink.remove(&v2.artifact, Some(&v2.root.info))
        .await
        .unwrap();
    assert!(sink.exists_at_target(&by_hand).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_part_of_a_signature_is_fetched_again() {
    for missing in [
        Some(Sha256::of(&noise(40, 2000))),
        Some(Sha256::of(b"{}")),
        None,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let sink = open(None, dir.path()).unwrap();
        let image = staged(sink.as_ref(), &[tar_layer("a", b"a")], &["amd64"]);
        let sig = attach(&image, &digest(&image.info.digest), Some("sig"), 40);
        let missing = missing.unwrap_or_else(|| digest(&sig.digest));
        let v1 = with(incoming("image/seg:v1", &image), &[sig]);
        std::fs::remove_file(image.dir.join(missing.layout_path())).unwrap();
        let fault = sink.commit(&v1, &image.dir).await.unwrap_err();
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::SinkUnavailable, Retry::Backoff),
            "{fault}"
        );
        assert!(!sink.exists_at_target(&v1).await.unwrap());
    }
}
