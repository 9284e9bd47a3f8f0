//! A hub with invalid content that an earlier version stored. Tests how `verify`, a site's report
//! and a second publish handle it.

use super::*;
use crate::api::types::State;
use crate::hub::upload::tests::Bench;
use base::fault::Reason;
use content::chunk::DEFAULT_CHUNKING;
use content::frame::Frame;
use content::manifest::{Attributes, Builder, Root};
use model::protocol::Report;
use registry::image::OCI_MANIFEST;

/// A hub whose store holds the content of `notes.txt` with a wrong length, and an artifact that was
/// published with this chunk.
async fn poisoned() -> (Bench, std::path::PathBuf, Verified) {
    let bench = Bench::start().await;
    let source = bench.source("a", 1 << 20, 1);
    let notes = Verified::new(b"content that everybody knows ".repeat(100).into());
    base::durable::replace(&source.join("notes.txt"), &notes.bytes).unwrap();
    let store = &bench.hub.inner.store;
    store
        .append(&Frame::lying(&notes, notes.bytes.len() + 777))
        .unwrap();
    store.flush().unwrap();
    let token = bench.token(None, Some("office")).await;
    bench
        .publish(&source, "model/a:v1", Some(&token))
        .await
        .unwrap();
    assert_eq!(
        store.raw_len(notes.id).unwrap(),
        Some(notes.bytes.len() as u32 + 777),
        "the publish used the stored chunk"
    );
    (bench, source, notes)
}

async fn verify(bench: &Bench) -> Vec<String> {
    bench
        .hub
        .inner
        .jobs
        .verify_now("model/a:v1".parse().unwrap(), false, Arc::default())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_finds_a_wrong_length_and_publishing_again_repairs() {
    let (bench, source, _) = poisoned().await;
    let found = verify(&bench).await;
    assert!(
        found.len() == 1 && found[0].starts_with("model/a:v1: notes.txt: "),
        "{found:?}"
    );
    let again = bench
        .publish(&source, "model/a:v1", None)
        .await
        .unwrap()
        .published;
    assert!(again.unchanged && again.stored > 0, "{again:?}");
    assert_eq!(verify(&bench).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_a_site_refused_is_stored_again() {
    let (bench, source, notes) = poisoned().await;
    let fault = Fault::from(content::frame::FrameError::Mismatch { expected: notes.id });
    let mut report = Report {
        id: "t-1".parse().unwrap(),
        generation: 0,
        state: State::Failed,
        body: Default::default(),
    };
    report.body.set_fault(Some(&fault));
    report.body.reason = Some(Reason::SiteOffline);
    bench.hub.inner.relay.recheck_refused(&report).await;
    assert!(
        bench.hub.inner.store.has(notes.id).unwrap(),
        "the failure had another reason than the content"
    );
    report.body.reason = Some(Reason::Integrity);
    bench.hub.inner.relay.recheck_refused(&report).await;
    assert!(!bench.hub.inner.store.has(notes.id).unwrap());
    assert!(
        bench
            .publish(&source, "model/a:v1", None)
            .await
            .unwrap()
            .published
            .stored
            > 0
    );
    assert_eq!(verify(&bench).await, Vec::<String>::new());
    // Valid chunks remain, although the report names them.
    bench.hub.inner.relay.recheck_refused(&report).await;
    assert!(bench.hub.inner.store.has(notes.id).unwrap());
}

/// The root of an image with these blobs under these names, all in the store.
fn image(store: &Store, top: &[u8], blobs: &[(Sha256, &[u8])]) -> Root {
    let mut sink = |page: Verified| store.put(&Frame::encode(&page)).map(|_| ());
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    let entry = |path: &str, body| Entry {
        path: path.parse().unwrap(),
        mode: 0o644,
        body,
        attributes: Attributes::default(),
    };
    for folder in ["blobs", "blobs/sha256"] {
        builder.push(&entry(folder, EntryBody::Dir), &[]).unwrap();
    }
    let mut blobs = blobs.to_vec();
    blobs.sort();
    for (name, content) in blobs {
        let content = Verified::new(content.to_vec().into());
        store.put(&Frame::encode(&content)).unwrap();
        let file = FileInfo {
            size: content.bytes.len() as u64,
            hash: content.id,
        };
        builder
            .push(&entry(&name.layout_path(), EntryBody::File(file)), &[])
            .unwrap();
    }
    let (digest, size) = (Sha256::of(top).to_string(), top.len() as u64);
    let info = ImageInfo {
        media_type: OCI_MANIFEST.into(),
        digest,
        size,
        platforms: vec![],
        absent: vec![],
        repository: None,
        tag: None,
        referrers: vec![],
    };
    builder.finish(Kind::Image, KindInfo::Image(info)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_finds_each_fault_of_an_image_that_a_site_would_refuse() {
    let bench = Bench::start().await;
    let (config, layer, evil) = (&b"{}"[..], &[1; 1000][..], &[2; 1000][..]);
    let blob = |content: &[u8]| serde_json::json!({"mediaType": "x", "digest": Sha256::of(content), "size": content.len()});
    let top =
        serde_json::json!({"schemaVersion": 2, "config": blob(config), "layers": [blob(layer)]})
            .to_string();
    let top = top.as_bytes();
    let named = |content| (Sha256::of(content), content);
    for (name, blobs, says) in [
        ("sound", vec![named(config), named(top), named(layer)], None),
        (
            "lacking",
            vec![named(config), named(top)],
            Some("the file blobs/sha256/"),
        ),
        (
            "short",
            vec![named(config), named(top), (Sha256::of(layer), &layer[1..])],
            Some("the digest of this image blob is sha256:"),
        ),
        (
            "evil",
            vec![named(config), named(top), (Sha256::of(layer), evil)],
            Some("the digest of this image blob is sha256:"),
        ),
        (
            "no manifest",
            vec![named(config), named(layer)],
            Some("top manifest"),
        ),
    ] {
        let artifact = format!("image/{}:1", name.replace(' ', "-"))
            .parse()
            .unwrap();
        bench
            .hub
            .inner
            .catalogue
            .add_artifact(&artifact, &image(&bench.hub.inner.store, top, &blobs), None)
            .await
            .unwrap();
        let found = bench
            .hub
            .inner
            .jobs
            .verify_now(artifact, false, Arc::default())
            .await
            .unwrap();
        match says {
            None => assert_eq!(found, Vec::<String>::new(), "{name}"),
            Some(says) => assert!(
                found.len() == 1 && found[0].contains(says),
                "{name}: {found:?}"
            ),
        }
    }
}
