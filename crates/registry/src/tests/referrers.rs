//! The referrers that a pull leaves in the registry: from the referrers API, from tags, and with a
//! registry that does not answer.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::image::{OCI_INDEX, OCI_MANIFEST};
use crate::testing::fixture::{Access, Image, RealRegistry, image, noise, tar_layer};
use crate::testing::standin::{Scripted, StandIn, error};
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
        let reference: Reference = format!("{}/op/a:v1", self.server.address).parse().unwrap();
        let to = tempfile::tempdir_in(self.dir.path()).unwrap();
        pull_to_layout(
            &reference,
            credentials().into(),
            &[],
            &to.path().join("got"),
            &AtomicU64::default(),
        )
        .await
        .unwrap()
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
    let omitted = tokio::time::timeout(Duration::from_secs(20), asked)
        .await
        .expect("the requests have their own deadline");
    assert!(omitted.is_empty());
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
        &[],
        &dir.join("got"),
        &AtomicU64::default(),
    )
    .await
    .unwrap();
    assert_eq!(examples(&omitted), [format!("signature {signature}")]);
}
