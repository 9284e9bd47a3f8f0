//! A hub with content that an earlier version took in, and what `verify`, a report of a site and a second publish make of it.

use super::super::upload::tests::Bench;
use super::*;
use crate::api::types::State;
use crate::fault::{Fault, Reason};
use crate::frame::Frame;
use crate::wire::Report;

/// A hub whose store holds the content of `notes.txt` under a wrong length, and an artifact that was published against it.
async fn poisoned() -> (Bench, std::path::PathBuf, Verified) {
    let bench = Bench::start().await;
    let source = bench.source("a", 1 << 20, 1);
    let notes = Verified::new(b"content that everybody knows ".repeat(100).into());
    crate::durable::replace(&source.join("notes.txt"), &notes.bytes).unwrap();
    let store = &bench.hub.inner.store;
    store.append(&Frame::lying(&notes, notes.bytes.len() + 777)).unwrap();
    store.flush().unwrap();
    let token = bench.token(None, Some("office")).await;
    bench.publish(&source, "model/a:v1", Some(&token)).await.unwrap();
    assert_eq!(store.raw_len(notes.id).unwrap(), Some(notes.bytes.len() as u32 + 777), "it was taken for the content that is here");
    (bench, source, notes)
}

async fn verify(bench: &Bench) -> Vec<String> {
    bench.hub.verify_now("model/a:v1".parse().unwrap(), Arc::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_finds_a_wrong_length_and_publishing_again_repairs() {
    let (bench, source, _) = poisoned().await;
    let found = verify(&bench).await;
    assert!(found.len() == 1 && found[0].starts_with("model/a:v1: notes.txt: "), "{found:?}");
    let again = bench.publish(&source, "model/a:v1", None).await.unwrap().published;
    assert!(again.unchanged && again.stored > 0, "{again:?}");
    assert_eq!(verify(&bench).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_a_site_refused_is_stored_again() {
    let (bench, source, notes) = poisoned().await;
    let fault = Fault::from(crate::frame::FrameError::Mismatch { expected: notes.id });
    let mut report = Report { id: "t-1".into(), generation: 0, state: State::Failed, body: Default::default() };
    report.body.set_fault(Some(&fault));
    report.body.reason = Some(Reason::SiteOffline);
    let site = "west".parse().unwrap();
    bench.hub.recheck_refused(&site, &report).await;
    assert!(bench.hub.inner.store.has(notes.id).unwrap(), "it was no fault of the content");
    report.body.reason = Some(Reason::Integrity);
    bench.hub.recheck_refused(&site, &report).await;
    assert!(!bench.hub.inner.store.has(notes.id).unwrap());
    assert!(bench.publish(&source, "model/a:v1", None).await.unwrap().published.stored > 0);
    assert_eq!(verify(&bench).await, Vec::<String>::new());
    // Sound chunks stay, whatever is claimed of them.
    bench.hub.recheck_refused(&site, &report).await;
    assert!(bench.hub.inner.store.has(notes.id).unwrap());
}
