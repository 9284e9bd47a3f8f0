//! What `publish` omits from folders and images: it is reported and recorded, refused by
//! `--strict`, and accepted if the user names it.

use rustix::fs::XattrFlags;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, Hub, Site, SiteSpec, packhorse};
use crate::support::data::write;
use crate::support::images;
use crate::support::{Scratch, limit, secs};

/// `what` and `count` of each omission in an answer.
fn counts(answer: &Value) -> Vec<(String, u64)> {
    let omitted = answer["omitted"]
        .as_array()
        .unwrap_or_else(|| panic!("the answer lists no omission: {answer:#}"));
    omitted
        .iter()
        .map(|one| {
            (
                one["what"].as_str().unwrap().to_owned(),
                one["count"].as_u64().unwrap(),
            )
        })
        .collect()
}

fn of(list: &[(&str, u64)]) -> Vec<(String, u64)> {
    list.iter()
        .map(|(what, count)| ((*what).to_owned(), *count))
        .collect()
}

/// Checks that `show` reports the same as `publish`, and that the text output has a line for each
/// category.
fn is_shown(daemon: &Daemon, reference: &str, published: &Value) {
    assert_eq!(
        daemon.json(&["show", reference])["omitted"],
        published["omitted"],
        "{reference}"
    );
    let shown = daemon.cli(&["show", reference]).expect(0).out;
    let lines = shown
        .lines()
        .filter(|line| line.trim_start().starts_with("left out"))
        .count();
    assert_eq!(
        lines,
        published["omitted"].as_array().unwrap().len(),
        "{shown}"
    );
}

#[test]
fn omissions_of_a_folder_are_reported_and_strict_allows_accepted_ones() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::start_new(scratch.path(), &hub, "a", &SiteSpec::default());
    let folder = scratch.join("set");
    write(&folder.join("a"), b"content");
    std::fs::hard_link(folder.join("a"), folder.join("b")).unwrap();
    write(&folder.join("sub/c"), b"more");
    rustix::fs::setxattr(folder.join("sub/c"), "user.k", b"v", XattrFlags::empty())
        .expect("the scratch folder has user attributes");
    let path = folder.to_str().unwrap();
    let lost = of(&[("times", 3), ("hard_links", 1), ("xattrs", 1)]);
    let all = "times,hard_links,xattrs";
    for (daemon, reference) in [(&*hub, "dataset/hub:1"), (&*site, "model/site:1")] {
        let publish = |more: &[&str]| {
            daemon.cli(&[&["publish", path, "--as", reference, "--no-times"], more].concat())
        };
        publish(&["--strict"]).expect(8).says(&[
            "times: 3 ×",
            "hard_links: 1 ×",
            "xattrs: 1 ×",
            &format!("--accept-omitted {all}"),
        ]);
        let partly = publish(&[
            "--strict",
            "--accept-omitted",
            "times",
            "--accept-omitted",
            "xattrs",
        ])
        .expect(8);
        assert!(!partly.err.contains("times: "), "{}", partly.err);
        partly.says(&["hard_links: 1 ×", &format!("--accept-omitted {all}")]);
        publish(&["--strict", "--accept-omitted", "times,dreams"])
            .expect(2)
            .says(&["dreams", "hard_links,xattrs"]);
        daemon.cli(&["show", reference]).expect(5);
        let published = daemon.json(&[
            "publish",
            path,
            "--as",
            reference,
            "--no-times",
            "--strict",
            "--accept-omitted",
            all,
        ]);
        assert_eq!(counts(&published), lost);
        is_shown(daemon, reference, &published);
        assert_eq!(
            hub.json(&["show", reference])["omitted"],
            published["omitted"],
            "the hub has the omissions of an artifact of a site too"
        );
        publish(&[]).expect(0).says(&[
            "left out of",
            "3 × modification time",
            "1 × hard link",
            "sub/c: user.k",
        ]);
    }
    let token = hub
        .cli(&["token", "create", "--publisher", "p"])
        .expect(0)
        .out;
    let (line, state) = (hub.quic.to_string(), scratch.join("state"));
    let remote = [
        "publish",
        path,
        "--as",
        "dataset/remote:1",
        "--no-times",
        "--hub",
        &line,
        "--state",
        state.to_str().unwrap(),
        "-o",
        "json",
    ];
    let publish =
        |more: &[&str]| packhorse(&[&remote[..], &["--join-token", token.trim()], more].concat());
    publish(&["--strict", "--accept-omitted", "times"])
        .expect(8)
        .says(&["hard_links: 1 ×", &format!("--accept-omitted {all}")]);
    hub.cli(&["show", "dataset/remote:1"]).expect(5);
    let published = publish(&["--strict", "--accept-omitted", all])
        .expect(0)
        .json();
    assert_eq!(counts(&published), lost);
    is_shown(&hub, "dataset/remote:1", &published);
}

#[test]
fn absent_platforms_and_signatures_of_an_image_are_reported() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let (manifest, index) = (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
    );

    let sparse = scratch.folder("sparse");
    images::layout(&sparse, &[b"layer"]);
    let mut image = images::top(&sparse);
    image.as_object_mut().unwrap().remove("annotations");
    let absent = |architecture: &str| {
        let digest = images::sha256(architecture.as_bytes());
        json!({ "mediaType": manifest, "digest": digest, "size": 5, "platform": { "os": "linux", "architecture": architecture } })
    };
    let list = json!({ "schemaVersion": 2, "mediaType": index, "manifests": [image, absent("arm64"), absent("s390x")] });
    let top = images::put_blob(&sparse, index, list.to_string().as_bytes());
    images::set_top(&sparse, top.clone());
    let path = sparse.to_str().unwrap();
    let refused = hub
        .cli(&["publish", path, "--as", "image/sparse:1", "--strict"])
        .expect(8);
    refused.says(&[
        "platforms: 2 ×",
        "linux/arm64; linux/s390x",
        top["digest"].as_str().unwrap(),
        "--accept-omitted platforms,image_digest",
    ]);
    let published = hub.publish(
        &sparse,
        "image/sparse:1",
        &["--strict", "--accept-omitted", "platforms,image_digest"],
    );
    assert_eq!(
        counts(&published),
        of(&[("platforms", 2), ("image_digest", 1)])
    );
    is_shown(&hub, "image/sparse:1", &published);

    let signed = scratch.folder("signed");
    images::layout(&signed, &[b"another layer"]);
    let mut image = images::top(&signed);
    image["annotations"] = json!({ "kind": "dev.cosignproject.cosign/image" });
    let config = images::put_blob(
        &signed,
        "application/vnd.oci.image.config.v1+json",
        br#"{"architecture":"","os":""}"#,
    );
    let payload = images::put_blob(
        &signed,
        "application/vnd.dev.cosign.simplesigning.v1+json",
        b"{}",
    );
    let signature =
        json!({ "schemaVersion": 2, "mediaType": manifest, "config": config, "layers": [payload] });
    let mut signature = images::put_blob(&signed, manifest, signature.to_string().as_bytes());
    signature["annotations"] = json!({ "kind": "dev.cosignproject.cosign/sigs" });
    write(
        &signed.join("index.json"),
        json!({ "schemaVersion": 2, "manifests": [image, signature] })
            .to_string()
            .as_bytes(),
    );
    let refused = hub
        .cli(&[
            "publish",
            signed.to_str().unwrap(),
            "--as",
            "image/signed:1",
            "--strict",
            "--no-referrers",
        ])
        .expect(8);
    refused.says(&[
        "referrers: 1 ×",
        "signature sha256:",
        "--accept-omitted referrers",
    ]);
    let published = hub.publish(&signed, "image/signed:1", &["--no-referrers"]);
    assert_eq!(counts(&published), of(&[("referrers", 1)]));
    is_shown(&hub, "image/signed:1", &published);
    assert_eq!(
        hub.json(&["show", "image/signed:1"])["info"]["digest"],
        image["digest"],
        "the image, not the signature"
    );
}
