//! Tests of the hostile peers themselves: while they behave honestly, hub and sites accept them.

use model::protocol::Wanted;
use packhorse::config::Transport;
use serde_json::json;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::hostile::{
    Artifact, EntryPage, FalseHub, Identity, IndexPage, TRANSPORTS, desired, frame, over, wanted,
};
use crate::support::{Scratch, limit, secs};

#[test]
fn a_simulated_site_that_behaves_honestly_publishes_and_reads_back() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    for (transport, version) in TRANSPORTS.into_iter().zip(["v1", "v2"]) {
        let site = Identity::site(&hub, &format!("mal-{version}"), over(transport)).dial();
        let _control = site.control();
        hub.wait_online(&format!("mal-{version}"), true, secs(20));
        let artifact = Artifact::of_files(
            "dataset",
            &[("a.txt", b"one"), ("b.txt", version.as_bytes())],
        );
        let asked = site.serve(vec![artifact.clone()]);
        let reference = format!("dataset/good:{version}");
        let question = json!({"publish": {"artifact": reference, "digest": artifact.digest().hex(), "to": null, "run": null}});
        let published = site.ask(&question).unwrap();
        assert_eq!(published["digest"], artifact.digest().hex());
        assert!(asked.load(std::sync::atomic::Ordering::Relaxed) > 0);
        let read_root = || {
            site.fetch(artifact.digest(), vec![Wanted::Root])
                .read_to_end(secs(20))
                .unwrap()
        };
        assert_eq!(
            read_root()[..32],
            [0; 32],
            "nothing was delivered to it yet, so it gets a fault"
        );
        hub.deliver(&[&reference], &format!("mal-{version}"));
        assert_eq!(read_root()[..32], artifact.digest().0);
    }
}

#[test]
fn a_simulated_hub_that_behaves_honestly_delivers() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let site = Site::start_new(
        scratch.path(),
        &hub,
        "east",
        &SiteSpec {
            more: "[line]\ntransport = \"tcp\"\n",
            ..SiteSpec::default()
        },
    );
    let false_hub = FalseHub::take_over(&mut hub);
    let (connection, mut control) = false_hub.site(secs(30));
    let artifact = Artifact::of_files("dataset", &[("a.txt", b"one")]);
    connection.serve(vec![artifact.clone()]);
    control
        .message(&desired(
            1,
            &[wanted("t-1", "dataset/x:1", artifact.digest(), "run")],
        ))
        .unwrap();
    site.wait_done("t-1", secs(30));
    assert_eq!(
        std::fs::read(site.folder("dataset/x:1").join("a.txt")).unwrap(),
        b"one"
    );
}

#[test]
fn a_simulated_site_offers_manifests_of_every_shape() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Identity::site(&hub, "mal", over(Transport::Quic)).dial();
    let _control = site.control();

    // A valid manifest of two levels, with a folder, a link and a file of two chunks.
    let mut deep = Artifact::new("dataset");
    let halves = [vec![1u8; 200 << 10], vec![2u8; 100 << 10]];
    let whole = content::chunk::Hash::of(&halves.concat());
    let ids = halves.each_ref().map(|half| deep.hold(half));
    let page =
        EntryPage::new()
            .dir("d", 0o755)
            .link("d/l", "x")
            .file_as("f", 300 << 10, whole, 0o644);
    let page = page.chunk(ids[0], 200 << 10).chunk(ids[1], 100 << 10);
    let (id, len) = deep.hold_page(&page);
    deep.list_index(&IndexPage::new().child(id, len, 2, 3), 1);
    deep.set("depth", json!(1));
    for (total, n) in [
        ("dirs", 1),
        ("symlinks", 1),
        ("files", 1),
        ("chunks", 2),
        ("bytes", 300 << 10),
    ] {
        deep.add(total, n);
    }

    // Invalid manifests: a truncated page, a page with a wrong hash, and a page that never arrives.
    let mut cut = Artifact::new("dataset");
    cut.list(&EntryPage::new().file("a", b"x", 0o644).raw(&[3, 0]), 1);
    let mut other = Artifact::of_files("dataset", &[("a", b"x")]);
    let listed = other.list(&EntryPage::new().file("b", b"y", 0o644), 1);
    other.hold_frame(listed, frame(listed, 1, 0, b"?"));
    let mut lacking = Artifact::of_files("dataset", &[("a", b"x")]);
    let listed = lacking.list(&EntryPage::new().file("b", b"z", 0o644), 1);
    lacking.withhold(listed);

    site.serve(vec![
        deep.clone(),
        cut.clone(),
        other.clone(),
        lacking.clone(),
    ]);
    let offer = |name: &str, artifact: &Artifact| {
        site.ask(&json!({"publish": {"artifact": format!("dataset/{name}:1"), "digest": artifact.digest().hex(), "to": null, "run": null}}))
    };
    offer("deep", &deep).unwrap();
    for (name, artifact) in [("other", &other), ("lacking", &lacking)] {
        offer(name, artifact).unwrap_err();
    }
    // The test continues with any answer of the hub.
    let _ = offer("cut", &cut);
    assert!(hub.artifacts().contains(&"dataset/deep:1".to_owned()));
    site.close();
    hub.wait_online("mal", false, secs(20));
}

#[test]
fn a_simulated_site_cannot_report_done_without_a_receipt() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let source = scratch.folder("source");
    std::fs::write(source.join("a"), b"a").unwrap();
    hub.publish(&source, "dataset/a:1", &[]);
    let identity = Identity::site(&hub, "mal", over(Transport::Quic));
    let site = identity.dial();
    let mut control = site.control();
    hub.wait_online("mal", true, secs(20));
    let id = hub.deliver(&["dataset/a:1"], "mal").remove(0);
    let sent = control.receive(secs(20)).unwrap();
    assert!(sent["desired"]["transfers"].is_array(), "{sent}");
    let body = json!({"bytes": {"total": 1, "reused": 0, "resumed": 0, "received": 1, "committed": 1, "wire": 1}, "rate": 0, "attempts": 1, "landed": false});
    let report = |receipt: serde_json::Value| {
        let mut body = body.clone();
        body["receipt"] = receipt;
        json!({"report": [{"id": id, "generation": 0, "state": "done", "body": body}]})
    };
    let wrong = identity
        .receipt(&json!({"artifact": "dataset/b:1", "site": "mal", "digest": "00"}).to_string());
    control.message(&report(wrong)).unwrap();
    control.message(&report(serde_json::Value::Null)).unwrap();
    // Its questions are answered after its reports were handled.
    site.ask(&json!({"list_runs": {"limit": 1}})).unwrap();
    assert_ne!(hub.transfer(&id).state, "done");
}

#[test]
fn a_simulated_publisher_is_accepted() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let publisher = Identity::publisher(&hub, "mal", over(Transport::Tcp)).dial();
    assert!(publisher.ask(&json!({"list_runs": {"limit": 1}})).is_err());
    assert!(!publisher.is_closed());
}
