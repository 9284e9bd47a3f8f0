//! The referrers that a pull leaves in the registry: from the referrers API, from tags, and with a
//! registry that does not answer.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::image::{OCI_INDEX, OCI_MANIFEST};
use crate::testing::fixture::{Access, Image, RealRegistry, image, noise, tar_layer};
use crate::testing::standin::{Scripted, StandIn, error};
use base::fault::Fault;
use base::omitted::{Category, Omitted};

fn digest(n: u8) -> String {
    Sha256::of(&[n]).to_string()
}

fn list(entries: &[(u8, &str)]) -> String {
    let entries: Vec<Value> =
        entries.iter().map(|(n, what)| json!({"mediaType": OCI_MANIFEST, "digest": digest(*n), "size": 1, "artifactType": what})).collect();
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string()
}

struct World {
    server: StandIn,
    made: Image,
    dir: tempfile::TempDir,
}

impl World {
    async fn start(platforms: &[&str]) -> Self {
        let (server, dir) = (StandIn::start().await, tempfile::tempdir().unwrap());
        let made = image(&dir.path().join("made"), &[noise(6, 1000)], platforms);
        held_by(&server, &made);
        Self { server, made, dir }
    }

    fn top(&self) -> Sha256 {
        self.made.info.digest.parse().unwrap()
    }

    fn hold_manifest(&self, tag: &str, text: &str) {
        self.server
            .held
            .lock()
            .manifests
            .insert(("op/a".into(), tag.into()), text.to_owned().into());
    }

    async fn pull(&self) -> Omitted {
        self.pull_of(&ALL).await.unwrap().0
    }

    /// What a pull leaves out, and the layout that it makes.
    async fn pull_of(&self, what: &Selection<'_>) -> Result<(Omitted, tempfile::TempDir), Fault> {
        let reference: Reference = format!("{}/op/a:v1", self.server.address).parse().unwrap();
        let to = tempfile::tempdir_in(self.dir.path()).unwrap();
        let omitted = pull_to_layout(
            &reference,
            credentials().into(),
            what,
            &to.path().join("got"),
            &AtomicU64::default(),
        )
        .await?;
        Ok((omitted, to))
    }
}

fn examples(omitted: &Omitted) -> Vec<String> {
    let list = omitted.list();
    assert!(
        list.iter()
            .all(|omission| omission.what == Category::Referrers),
        "{list:?}"
    );
    let mut examples: Vec<String> = list
        .into_iter()
        .flat_map(|omission| omission.examples)
        .collect();
    examples.sort();
    examples
}

#[tokio::test]
async fn the_referrers_api_is_used_for_the_image_and_its_platforms() {
    let world = World::start(&["amd64", "arm64"]).await;
    let top = Box::leak(format!("/referrers/{}", world.made.info.digest).into_boxed_str());
    // The second page lists the manifest of the cosign tag again, and a platform of the image
    // itself.
    let next = Scripted {
        headers: vec![("link", r#"</v2/op/a/referrers/more>; rel="next""#)],
        ..Scripted::new("GET", top, 200, list(&[(1, "application/spdx+json")]))
    };
    world.server.held.lock().script.push(next);
    let signature = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).to_string();
    world.hold_manifest(&format!("sha256-{}.sig", world.top().hex()), &signature);
    let index: Value = serde_json::from_slice(
        &std::fs::read(world.made.dir.join(world.top().layout_path())).unwrap(),
    )
    .unwrap();
    let own = &index["manifests"][0]["digest"];
    let more = json!({"manifests": [{"digest": Sha256::of(signature.as_bytes())}, {"digest": own, "artifactType": ""}]});
    world
        .server
        .script("GET", "/referrers/more", 200, more.to_string());
    let platform = Box::leak(
        format!(
            "/referrers/{}",
            index["manifests"][1]["digest"].as_str().unwrap()
        )
        .into_boxed_str(),
    );
    world
        .server
        .script("GET", platform, 200, list(&[(2, "application/x-scan")]));
    let found = examples(&world.pull().await);
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(
        found.contains(&format!("application/spdx+json {}", digest(1))),
        "{found:?}"
    );
    assert!(
        found.contains(&format!("application/x-scan {}", digest(2))),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|one| one.ends_with(&Sha256::of(signature.as_bytes()).to_string())),
        "{found:?}"
    );
    assert_eq!(
        world
            .server
            .held
            .lock()
            .count("GET", &format!("/manifests/sha256-{}", world.top().hex())),
        0,
        "the fallback tag is not needed"
    );
}

#[tokio::test]
async fn without_the_api_the_fallback_tag_is_used_and_failures_are_ignored() {
    let world = World::start(&["amd64"]).await;
    assert!(world.pull().await.is_empty(), "a registry that has neither");
    world.hold_manifest(
        &format!("sha256-{}", world.top().hex()),
        &list(&[(1, "application/spdx+json"), (2, "")]),
    );
    world.hold_manifest(
        &format!("sha256-{}.att", world.top().hex()),
        &json!({"mediaType": OCI_MANIFEST}).to_string(),
    );
    for (status, body) in [
        (404, error("NOT_FOUND", "")),
        (500, "oops".into()),
        (200, "<html>".into()),
        (403, error("DENIED", "")),
        (401, error("UNAUTHORIZED", "")),
    ] {
        world.server.held.lock().script.clear();
        world
            .server
            .script_always("GET", "/referrers/", status, body);
        let omitted = world.pull().await;
        let found = examples(&omitted);
        assert_eq!(omitted.count(Category::Referrers), 3, "{status}: {found:?}");
        assert!(
            found
                .iter()
                .any(|one| one.starts_with("attestation sha256:")),
            "{found:?}"
        );
        assert!(
            found.contains(&format!("artifact {}", digest(2))),
            "{found:?}"
        );
    }
    // None of this may fail a pull.
    world.server.held.lock().script.clear();
    for (method, path) in [
        ("GET", "/referrers/"),
        ("HEAD", "/manifests/sha256-"),
        ("GET", "/manifests/sha256-"),
    ] {
        world.server.script_always(method, path, 500, "");
    }
    assert!(world.pull().await.is_empty());
    world.server.held.lock().script.clear();
    world.server.script_always(
        "GET",
        "/referrers/",
        200,
        format!(r#"{{"manifests": [{}"#, " ".repeat(2 << 20)),
    );
    assert_eq!(
        world.pull().await.count(Category::Referrers),
        3,
        "an answer that is too large is ignored"
    );
}

#[tokio::test]
async fn a_pull_does_not_wait_for_a_silent_referrers_api() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let registry = Registry::new(
        origin(&silent.local_addr().unwrap().to_string()),
        None,
        None,
    )
    .unwrap();
    let subjects = [Sha256::of(b"x")];
    let asked = registry.referrers("op/a", &subjects, Duration::from_millis(50));
    let found = tokio::time::timeout(Duration::from_secs(20), asked)
        .await
        .expect("the requests have their own deadline");
    assert!(found.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_lists_the_tags_of_cosign() {
    let server = RealRegistry::start(&Access::Open);
    let dir = server.dir.path().join("work");
    let registry = Registry::new(origin(&server.address), None, None).unwrap();
    let put = async |name: &str, tag: &str| {
        let made = image(&dir.join(name), &[tar_layer(name, b"a")], &["amd64"]);
        for entry in std::fs::read_dir(made.dir.join("blobs/sha256")).unwrap() {
            let file = entry.unwrap().path();
            let bytes = std::fs::read(&file).unwrap();
            registry
                .push_blob(
                    "op/a",
                    &LocalBlob {
                        digest: Sha256::of(&bytes),
                        size: bytes.len() as u64,
                        file,
                    },
                )
                .await
                .unwrap();
        }
        let top: Sha256 = made.info.digest.parse().unwrap();
        let bytes = bytes::Bytes::from(std::fs::read(made.dir.join(top.layout_path())).unwrap());
        registry
            .put_manifest("op/a", tag, OCI_MANIFEST, &bytes, &top)
            .await
            .unwrap();
        top
    };
    let top = put("image", "v1").await;
    let signature = put("signature", &format!("sha256-{}.sig", top.hex())).await;
    let reference: Reference = format!("{}/op/a:v1", server.address).parse().unwrap();
    let omitted = pull_to_layout(
        &reference,
        None.into(),
        &ALL,
        &dir.join("got"),
        &AtomicU64::default(),
    )
    .await
    .unwrap();
    assert_eq!(examples(&omitted), [format!("signature {signature}")]);
}

const CARRIED: Selection<'static> = Selection {
    platforms: &[],
    referrers: true,
};

/// A manifest with one blob that both are at the stand-in.
fn held_referrer(world: &World, subject: Option<&Sha256>, seed: u64) -> (Sha256, Sha256) {
    let blob = noise(seed, 3000);
    let digest = Sha256::of(&blob);
    let layer = json!({"mediaType": "application/x", "digest": digest, "size": blob.len()});
    let mut manifest =
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": layer, "layers": [layer]});
    if let Some(subject) = subject {
        manifest["subject"] = json!({"mediaType": OCI_INDEX, "digest": subject, "size": 1});
    }
    let text = manifest.to_string();
    let own = Sha256::of(text.as_bytes());
    world.hold_manifest(&own.to_string(), &text);
    world
        .server
        .held
        .lock()
        .blobs
        .insert(("op/a".into(), digest.to_string()), blob.into());
    (own, digest)
}

fn index_of(layout: &tempfile::TempDir) -> Vec<Value> {
    let bytes = std::fs::read(layout.path().join("got/index.json")).unwrap();
    let index: Value = serde_json::from_slice(&bytes).unwrap();
    index["manifests"].as_array().unwrap().clone()
}

#[tokio::test]
async fn referrers_of_the_image_its_platforms_and_each_other_are_pulled() {
    let world = World::start(&["amd64", "arm64"]).await;
    let (top, amd) = (world.top(), {
        let bytes = std::fs::read(world.made.dir.join(world.top().layout_path())).unwrap();
        let index: Value = serde_json::from_slice(&bytes).unwrap();
        let amd: Sha256 = serde_json::from_value(index["manifests"][0]["digest"].clone()).unwrap();
        amd
    });
    let (sbom, sbom_blob) = held_referrer(&world, Some(&top), 1);
    let (sig, _) = held_referrer(&world, None, 2);
    let (of_sbom, of_sbom_blob) = held_referrer(&world, Some(&sbom), 3);
    // The API lists the SBOM and one that is lost; the signature of a platform has cosign's tag, and
    // that of the SBOM is in the fallback tag.
    let path = |digest: &Sha256| Box::leak(format!("/referrers/{digest}").into_boxed_str());
    let listed = |digest: &Sha256| json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": 9, "artifactType": "application/spdx+json"});
    let lost = Sha256::of(b"lost");
    let of_top = json!({"manifests": [listed(&sbom), listed(&lost)]});
    world
        .server
        .script_always("GET", path(&top), 200, of_top.to_string());
    let text = |digest: &Sha256| {
        let held = world.server.held.lock();
        let bytes = &held.manifests[&("op/a".to_owned(), digest.to_string())];
        String::from_utf8(bytes.to_vec()).unwrap()
    };
    let tag = format!("sha256-{}.sig", amd.hex());
    world.hold_manifest(&tag, &text(&sig));
    let list = json!({"schemaVersion": 2, "manifests": [listed(&of_sbom)]});
    world.hold_manifest(&format!("sha256-{}", sbom.hex()), &list.to_string());
    let (omitted, layout) = world.pull_of(&CARRIED).await.unwrap();
    assert_eq!(
        examples(&omitted),
        [format!("application/spdx+json {lost}")]
    );
    let entries = index_of(&layout);
    let digests: Vec<&str> = entries
        .iter()
        .map(|entry| entry["digest"].as_str().unwrap())
        .collect();
    assert_eq!(digests[0], top.to_string());
    let mut expected = [sbom, sig, of_sbom].map(|digest| digest.to_string());
    expected.sort();
    let mut others = digests[1..].to_vec();
    others.sort_unstable();
    assert_eq!(others, expected);
    for entry in &entries[1..] {
        let name = &entry["annotations"]["org.opencontainers.image.ref.name"];
        let is_signature = entry["digest"] == sig.to_string();
        assert_eq!(name == &json!(tag), is_signature, "{entry}");
    }
    for digest in [sbom_blob, of_sbom_blob, sbom, of_sbom, sig] {
        let bytes = std::fs::read(layout.path().join("got").join(digest.layout_path())).unwrap();
        assert_eq!(Sha256::of(&bytes), digest);
    }
    // A lost blob does not fail the pull: the layout's reader sees that it is not whole.
    let key = ("op/a".to_owned(), sbom_blob.to_string());
    let blob = world.server.held.lock().blobs.remove(&key).unwrap();
    let (_, layout) = world.pull_of(&CARRIED).await.unwrap();
    assert!(
        !layout
            .path()
            .join("got")
            .join(sbom_blob.layout_path())
            .exists()
    );
    // Damaged content and a refusal do.
    world
        .server
        .held
        .lock()
        .blobs
        .insert(key.clone(), noise(9, 3000).into());
    assert!(world.pull_of(&CARRIED).await.is_err());
    world.server.held.lock().blobs.insert(key, blob);
    world.server.script(
        "GET",
        Box::leak(format!("/manifests/{sbom}").into_boxed_str()),
        403,
        error("DENIED", "no"),
    );
    let fault = world.pull_of(&CARRIED).await.unwrap_err();
    assert!(fault.message.contains(&sbom.to_string()), "{fault}");
    world.pull_of(&CARRIED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_the_fallback_tag_keeps_what_others_wrote() {
    let server = RealRegistry::start(&Access::Open);
    let dir = server.dir.path().join("work");
    let registry = Registry::new(origin(&server.address), None, None).unwrap();
    let subject = Sha256::of(b"subject");
    let mut all = Vec::new();
    for name in ["one", "two", "three"] {
        let made = image(&dir.join(name), &[tar_layer(name, b"a")], &["amd64"]);
        for entry in std::fs::read_dir(made.dir.join("blobs/sha256")).unwrap() {
            let file = entry.unwrap().path();
            let bytes = std::fs::read(&file).unwrap();
            let blob = LocalBlob {
                digest: Sha256::of(&bytes),
                size: bytes.len() as u64,
                file,
            };
            registry.push_blob("op/a", &blob).await.unwrap();
        }
        let top: Sha256 = made.info.digest.parse().unwrap();
        let bytes = bytes::Bytes::from(std::fs::read(made.dir.join(top.layout_path())).unwrap());
        let has_api = registry
            .put_manifest("op/a", &top.to_string(), OCI_MANIFEST, &bytes, &top)
            .await
            .unwrap();
        assert!(!has_api, "docker-registry 2.8 has no referrers API");
        let descriptor = crate::image::Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: top,
            size: bytes.len() as u64,
            urls: None,
            platform: None,
        };
        all.push((descriptor, bytes));
    }
    let listed = async |n: usize| {
        let (one, _): &(crate::image::Descriptor, bytes::Bytes) = &all[n];
        registry
            .lists_referrer("op/a", &subject, &one.digest)
            .await
            .unwrap()
    };
    // Three clients at once; each of them may overwrite the others, and notices it.
    let add = |n: usize| registry.add_to_fallback("op/a", &subject, &all[n].0, &all[n].1);
    let (a, b, c) = tokio::join!(add(0), add(1), add(2));
    for added in [a, b, c] {
        added.unwrap();
    }
    registry
        .remove_from_fallback("op/a", &subject, &[all[1].0.digest])
        .await
        .unwrap();
    assert!(listed(0).await && !listed(1).await && listed(2).await);
    let rest = [all[0].0.digest, all[2].0.digest];
    registry
        .remove_from_fallback("op/a", &subject, &rest)
        .await
        .unwrap();
    let tag = format!("sha256-{}", subject.hex());
    assert_eq!(registry.head_manifest("op/a", &tag).await.unwrap(), None);
    registry
        .remove_from_fallback("op/a", &subject, &rest)
        .await
        .unwrap();
}
