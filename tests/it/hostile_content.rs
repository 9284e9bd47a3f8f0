//! Content from hostile publishers: the hub refuses malformed manifests, and no site commits
//! content that does not match its hash. Other artifacts are not affected.

use std::os::unix::fs::PermissionsExt;

use content::chunk::Hash;
use packhorse::config::Transport;
use registry::image::Sha256;
use serde_json::json;

use crate::support::daemon::{Hub, Site, SiteSpec};
use crate::support::data;
use crate::support::hostile::{Artifact, EntryPage, Identity, TRANSPORTS, frame, over};
use crate::support::{Scratch, limit, secs, wait_for};

/// A dataset with this page, which has one file of one byte and optionally a link.
fn one_file(page: &EntryPage, links: u64) -> Artifact {
    let mut artifact = Artifact::new("dataset");
    artifact.hold(b"x");
    for (total, n) in [
        ("files", 1),
        ("bytes", 1),
        ("chunks", 1),
        ("symlinks", links),
    ] {
        artifact.add(total, n);
    }
    artifact.list(page, 1);
    artifact
}

fn malformed() -> Vec<(&'static str, Artifact)> {
    let file = |path: &str| EntryPage::new().file(path, b"x", 0o644);
    let mut out = vec![
        ("dotdot", one_file(&file("../evil"), 0)),
        ("absolute", one_file(&file("/etc/evil"), 0)),
        ("nul", one_file(&file("a\0b"), 0)),
        (
            "through-link",
            one_file(
                &EntryPage::new().link("d", "x").file("d/evil", b"x", 0o644),
                1,
            ),
        ),
        (
            "link",
            one_file(
                &EntryPage::new()
                    .file("a", b"x", 0o644)
                    .link("l", "/etc/passwd"),
                1,
            ),
        ),
        (
            "nul-link",
            one_file(
                &EntryPage::new().file("a", b"x", 0o644).link("l", "a\0b"),
                1,
            ),
        ),
    ];
    // Invalid manifests that are below every quota.
    let mut bytes = one_file(&file("a"), 0);
    bytes.add("bytes", 1 << 40);
    out.push(("huge", bytes));
    let mut image = one_file(&file("a"), 0);
    image.set("info", json!({"is": "image", "media_type": "x", "digest": "sha256:zz", "size": 1, "platforms": [], "absent": []}));
    out.push(("no-files", image));
    let mut often = Artifact::new("dataset");
    often.hold(b"x");
    for total in ["files", "bytes", "chunks"] {
        often.add(total, 7_800);
    }
    often.list(&file("a"), 7_800);
    out.push(("often", often));
    out
}

#[test]
fn the_hub_refuses_malformed_manifests() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Identity::site(&hub, "mal", over(TRANSPORTS[0])).dial();
    let publisher = Identity::publisher(&hub, "lab", over(TRANSPORTS[1])).dial();
    let _control = site.control();
    hub.wait_online("mal", true, secs(20));
    let all = malformed();
    for peer in [&site, &publisher] {
        peer.serve(all.iter().map(|(_, artifact)| artifact.clone()).collect());
    }
    for (name, artifact) in &all {
        let named = json!({"artifact": format!("dataset/{name}:1"), "digest": artifact.digest().hex(), "to": null});
        let (offer, upload) = (
            site.ask(&json!({"publish": named})),
            publisher.ask(&json!({"upload": named})),
        );
        for refused in [offer, upload] {
            let fault = refused.expect_err(name);
            assert!(
                fault.contains("\"integrity\"")
                    && (fault.contains(&format!("dataset/{name}:1: "))
                        // A manifest of too many values is not examined.
                        || *name == "often" && fault.contains("values; 16384 are allowed")),
                "{name}: {fault}"
            );
        }
    }
    assert_eq!(hub.artifacts(), Vec::<String>::new());
    hub.cli(&["gc"]).expect(0);
}

#[test]
fn content_that_does_not_match_its_hash_is_never_committed() {
    let _limit = limit(secs(180));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let east = Site::start_new(scratch.path(), &hub, "east", &SiteSpec::default());
    let mal = Identity::site(&hub, "mal", over(Transport::Quic)).dial();
    let _control = mal.control();
    hub.wait_online("mal", true, secs(20));

    let special = one_file(&EntryPage::new().file("run", b"x", 0o6755), 0);
    // A chunk with its right hash, but with a wrong length in its frame and its manifest.
    let known = b"content that everybody knows ".repeat(100);
    let (name, lie) = (Hash::of(&known), known.len() as u64 + 777);
    let mut poison = Artifact::new("dataset");
    for (total, n) in [("files", 1), ("bytes", lie), ("chunks", 1)] {
        poison.add(total, n);
    }
    poison.hold_frame(
        name,
        frame(
            name,
            lie as u32,
            1,
            &zstd::bulk::compress(&known, 1).unwrap(),
        ),
    );
    poison.list(&EntryPage::new().file_as("x", lie, name, 0o644), 1);
    // An image whose layer has the right size and wrong content.
    let (layer, evil) = ([1u8; 1000], [2u8; 1000]);
    let config = br#"{"architecture":"amd64","os":"linux"}"#.to_vec();
    let descriptor =
        |bytes: &[u8]| json!({"mediaType": "x", "digest": Sha256::of(bytes), "size": bytes.len()});
    let manifest =
        json!({"schemaVersion": 2, "config": descriptor(&config), "layers": [descriptor(&layer)]})
            .to_string()
            .into_bytes();
    let mut blobs = [
        (Sha256::of(&config), config),
        (Sha256::of(&manifest), manifest.clone()),
        (Sha256::of(&layer), evil.to_vec()),
    ];
    blobs.sort();
    let mut image = Artifact::new("image");
    let top = Sha256::of(&manifest).to_string();
    image.set("info", json!({"is": "image", "media_type": "application/vnd.oci.image.manifest.v1+json", "digest": top, "size": manifest.len(), "platforms": ["linux/amd64"], "absent": []}));
    let mut page = EntryPage::new()
        .dir("blobs", 0o755)
        .dir("blobs/sha256", 0o755);
    for (digest, content) in &blobs {
        page = page.file(digest.layout_path(), content, 0o644);
        image.hold(content);
        image.add("bytes", content.len() as u64);
    }
    for (total, n) in [("dirs", 2), ("files", 3), ("chunks", 3)] {
        image.add(total, n);
    }
    image.list(&page, 1);

    mal.serve(vec![special.clone(), poison.clone(), image.clone()]);
    for (reference, artifact) in [
        ("dataset/special:1", &special),
        ("dataset/poison:1", &poison),
        ("image/adc:1", &image),
    ] {
        mal.ask(&json!({"publish": {"artifact": reference, "digest": artifact.digest().hex(), "to": null, "run": null}})).unwrap();
    }
    let refused = |reference: &str| {
        let id = hub.deliver(&[reference], "east").remove(0);
        let failed = hub.wait_transfer(&id, "failed", secs(60), |t| t.state == "failed");
        assert_eq!(failed.reason.as_deref(), Some("integrity"), "{failed:#?}");
        failed.message.unwrap_or_default()
    };

    hub.deliver_and_wait("dataset/special:1", "east", secs(60));
    let mode = std::fs::metadata(east.folder("dataset/special:1").join("run"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o755, "no special bits are set");

    let said = refused("dataset/poison:1");
    assert!(said.contains(&name.hex()), "{said}");
    let source = scratch.join("honest");
    data::write(&source.join("known.txt"), &known);
    hub.publish(&source, "operator/honest:v1", &[]);
    hub.cli(&["verify", "operator/honest:v1"]).expect(0);
    hub.deliver_and_wait("operator/honest:v1", "east", secs(60));

    let said = refused("image/adc:1");
    assert!(said.contains("does not match its digest"), "{said}");
    let layout = east.layout.join("adc");
    assert!(
        !layout.join("index.json").exists()
            && !layout.join(Sha256::of(&layer).layout_path()).exists()
    );
    // The relay must first have stored the transmitted content.
    wait_for("verify at the hub finds it too", secs(30), || {
        let found = hub.cli(&["verify", "image/adc:1"]);
        (found.code == 8
            && found
                .out
                .contains("the digest of this image blob is sha256:"))
        .then_some(())
    });
}
