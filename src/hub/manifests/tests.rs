//! A hub whose catalogue has malformed manifests that an earlier version accepted.

use std::sync::Arc;

use futures::FutureExt as _;

use super::super::upload::tests::Bench;
use super::*;
use crate::api::Backend as _;
use base::job_progress::JobProgress;
use base::limits::MANIFEST_CHECKS_MAX;
use base::names::Kind;
use content::chunk::DEFAULT_CHUNKING;
use content::frame::{Frame, Verified};
use content::manifest::{KindInfo, PageRef, Totals};

/// A manifest of one file with this path and content. Its page and its chunk are written to the
/// store.
fn manifest_of(store: &Store, path: &str, content: &Verified) -> Root {
    let mut page = vec![b'E', 3, 0, path.len() as u8];
    page.extend(path.as_bytes());
    page.extend([0xa4, 3]); // mode 0644
    let mut size = content.bytes.len();
    while size >= 0x80 {
        page.push(size as u8 | 0x80);
        size >>= 7;
    }
    page.push(size as u8);
    page.extend(content.id.0);
    let page = Verified::new(page.into());
    store.put(&Frame::encode(&page)).unwrap();
    store.put(&Frame::encode(content)).unwrap();
    let totals = Totals {
        files: 1,
        bytes: content.bytes.len() as u64,
        chunks: 1,
        ..Totals::default()
    };
    let pages = vec![PageRef {
        id: page.id,
        len: page.bytes.len() as u32,
        chunks: 1,
        entries: 1,
    }];
    Root {
        format: 1,
        kind: Kind::Dataset,
        info: KindInfo::Files,
        chunking: DEFAULT_CHUNKING,
        totals,
        depth: 0,
        pages,
    }
}

fn noise(seed: u8, len: usize) -> Verified {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut out);
    Verified::new(out.into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_manifest_is_reported_and_other_work_continues() {
    let bench = Bench::start().await;
    let inner = &bench.hub.inner;
    let (catalogue, store) = (&inner.catalogue, &inner.store);
    let content: Vec<Verified> = (0..4).map(|seed| noise(seed, 200_000)).collect();
    let sound = manifest_of(store, "a", &content[0]);
    let bad = manifest_of(store, "../evil", &content[1]);
    let (relayed, old) = (
        manifest_of(store, "/abs", &content[2]),
        manifest_of(store, "b", &content[3]),
    );
    // Its only page is missing.
    let lost = Root {
        pages: vec![PageRef {
            id: Hash::of(b"gone"),
            ..bad.pages[0]
        }],
        ..bad.clone()
    };
    for seed in 10..14 {
        store.put(&Frame::encode(&noise(seed, 1 << 20))).unwrap();
    }
    store.flush().unwrap();
    let west = "west".parse().unwrap();
    for (name, root, origin) in [
        ("sound", &sound, None),
        ("bad", &bad, None),
        ("lost", &lost, None),
        ("relayed", &relayed, Some(&west)),
        ("old", &old, Some(&west)),
    ] {
        catalogue
            .add_artifact(&format!("dataset/{name}:1").parse().unwrap(), root, origin)
            .await
            .unwrap();
    }

    let progress = Arc::<JobProgress>::default();
    let result = bench.hub.inner.jobs.collect_now(progress).await.unwrap();
    assert!(result["freed"].as_u64().unwrap() > 3 << 20, "{result}");
    assert_eq!(
        result["malformed"],
        serde_json::json!(["dataset/bad:1", "dataset/lost:1", "dataset/relayed:1"])
    );
    for (artifact, root) in [("sound", &sound), ("bad", &bad), ("relayed", &relayed)] {
        assert!(store.has(root.pages[0].id).unwrap(), "a page of {artifact}");
    }
    assert!(
        content.iter().all(|chunk| store.read(chunk.id).is_ok()),
        "the content that they name is kept"
    );

    for (name, says) in [
        ("bad", "\"../evil\" is not allowed"),
        ("lost", "is missing from the store"),
        ("relayed", "\"/abs\" is not allowed"),
    ] {
        let found = bench
            .hub
            .inner
            .jobs
            .verify_now(
                format!("dataset/{name}:1").parse().unwrap(),
                false,
                Arc::default(),
            )
            .await
            .unwrap();
        assert!(
            found.len() == 1
                && found[0].starts_with(&format!("dataset/{name}:1: "))
                && found[0].contains(says),
            "{found:?}"
        );
    }
    for _ in 0..2 {
        let lines = bench.hub.doctor().await.unwrap();
        let faults: Vec<&String> = lines
            .iter()
            .filter(|line| line.starts_with("fault manifest "))
            .collect();
        assert_eq!(faults.len(), 3, "{lines:?}");
        assert!(
            ["bad", "lost", "relayed"].iter().all(|name| faults
                .iter()
                .any(|line| line.contains(&format!("dataset/{name}:1")))),
            "{faults:?}"
        );
    }

    // The relay keeps the content that the malformed manifest names, and removes the rest.
    for root in [&relayed, &old] {
        catalogue.relay_used(root.digest()).await.unwrap();
    }
    bench
        .hub
        .inner
        .relay
        .evict_these(&HashSet::from([old.digest()]))
        .await
        .unwrap();
    let kept: Vec<String> = catalogue
        .relay_kept()
        .await
        .unwrap()
        .into_iter()
        .map(|kept| kept.artifact.to_string())
        .collect();
    assert_eq!(kept, ["dataset/relayed:1"]);
}

/// Links whose targets climb again and again, in so many pages that a check takes a moment.
fn long_manifest(store: &Store) -> Root {
    let target = format!("{}x", "x/".repeat(2000));
    let mut sink = |page: Verified| store.put(&Frame::encode(&page)).map(drop);
    let mut builder = manifest::Builder::new(DEFAULT_CHUNKING, &mut sink);
    for number in 0..20_000 {
        let entry = manifest::Entry {
            path: format!("l{number:06}").parse().unwrap(),
            mode: 0o777,
            body: manifest::EntryBody::Symlink(target.clone()),
            attributes: Default::default(),
        };
        builder.push(&entry, &[]).unwrap();
    }
    builder.finish(Kind::Dataset, KindInfo::Files).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_whose_peer_has_gone_ends_and_then_returns_its_places() {
    let bench = Bench::start().await;
    let inner = &bench.hub.inner;
    let store = inner.store.clone();
    let root = tokio::task::block_in_place(|| base::blocking::may_block(|| long_manifest(&store)));
    let (artifact, peer) = (
        "dataset/long:1".parse().unwrap(),
        base::peer::Peer::Publisher("line".parse().unwrap()),
    );
    let budgets = super::super::peer_budgets::PeerBudgets::new(64 << 20);
    // As many as a peer may have at once, begun and given up.
    for _ in 0..MANIFEST_CHECKS_MAX {
        let places = budgets.check(&peer).await;
        let check = inner.manifests.check(&artifact, &root, places);
        assert!(check.now_or_never().is_none(), "the check takes longer");
    }
    // The threads have ended when their places are free again.
    let places = [budgets.check(&peer).await, budgets.check(&peer).await];
    let more = budgets.check(&peer).now_or_never();
    assert!(more.is_none(), "no more than that at once");
    drop(places);
    // A check that is waited for ends with its result.
    let places = budgets.check(&peer).await;
    inner
        .manifests
        .check(&artifact, &root, places)
        .await
        .unwrap();
}
