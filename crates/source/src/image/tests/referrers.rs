//! Layouts with signatures and other referrers next to the image: the image is used, and the
//! referrers are carried with it or counted.

use super::*;
use base::limits::IMAGE_REFERRERS_MAX;

const SPDX: &str = "application/spdx+json";

/// A manifest that describes another one, by `subject`.
fn about(parts: &mut Parts, subject: &Value, what: &str, text: &str) -> Value {
    let config = parts.blob("application/vnd.oci.empty.v1+json", b"{}");
    let layer = parts.blob(what, text.as_bytes());
    let subject = json!({ "mediaType": subject["mediaType"], "digest": subject["digest"], "size": subject["size"] });
    let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": what, "config": config, "layers": [layer], "subject": subject });
    parts.blob(OCI_MANIFEST, manifest.to_string().as_bytes())
}

/// A signature as cosign stores it: only its name or its kind states what it describes.
fn signature(parts: &mut Parts, image: &Value) -> Value {
    let payload = format!(r#"{{"critical":{{"image":{}}}}}"#, image["digest"]);
    let config = parts.blob(OCI_CONFIG, br#"{"architecture":"","os":""}"#);
    let layer = parts.blob(
        "application/vnd.dev.cosign.simplesigning.v1+json",
        payload.as_bytes(),
    );
    manifest(parts, &config, &[layer])
}

fn named(mut entry: Value, name: &str) -> Value {
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    entry
}

fn cosign(mut entry: Value, kind: &str, name: Option<&str>) -> Value {
    entry["annotations"] = json!({ "kind": format!("dev.cosignproject.cosign/{kind}") });
    if let Some(name) = name {
        entry["annotations"]["org.opencontainers.image.ref.name"] = name.into();
    }
    entry
}

fn example(what: &str, entry: &Value) -> String {
    format!("{what} {}", entry["digest"].as_str().unwrap())
}

struct Layout {
    case: Case,
    parts: Parts,
    image: Value,
}

impl Layout {
    fn new() -> Self {
        let mut parts = Parts::default();
        let image = oci_image(&mut parts, "amd64", &[&layer("a", b"1")]);
        Self {
            case: Case::new(),
            parts,
            image,
        }
    }

    fn open(&self, tops: &[Value], tag: Option<&str>) -> Result<ImageSource, Fault> {
        self.case
            .open_tag(&self.parts.clone().layout(tops).tar(), tag)
    }

    /// Opens the layout. It must be the image, with exactly these referrers left out.
    #[track_caller]
    fn expect_left_out(&self, tops: &[Value], tag: Option<&str>, referrers: &[String]) {
        let source = self.open(tops, tag).unwrap();
        assert_eq!(json!(source.info.digest), self.image["digest"]);
        assert_eq!(
            left_out(&source, Category::Referrers),
            (referrers.len() as u64, referrers.to_vec())
        );
        assert_eq!(
            source.omitted().list().len(),
            usize::from(!referrers.is_empty()),
            "{:?}",
            source.omitted()
        );
        let members = contents(source).len();
        assert_eq!(members, 2 + 3 + 2, "only the image");
    }
}

#[test]
fn objects_that_cosign_and_hauler_save_are_counted() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let sig = signature(&mut layout.parts, &image);
    let kept = [example("signature", &sig)];
    layout.expect_left_out(
        &[
            cosign(image.clone(), "image", None),
            cosign(sig.clone(), "sigs", None),
        ],
        None,
        &kept,
    );
    let hauler = [
        cosign(image.clone(), "image", Some("ops/app:v1")),
        cosign(sig.clone(), "sigs", Some("ops/app:v1")),
    ];
    layout.expect_left_out(&hauler, None, &kept);
    layout.expect_left_out(&hauler, Some("ops/app:v1"), &kept);
    // By the tag that cosign assigns; a referrer of another image does not count.
    let tag = |digest: &str, suffix: &str| format!("app:sha256-{digest}{suffix}");
    let (own, other) = (hex_of(&image), "0".repeat(64));
    let entries = [
        named(image.clone(), "app:v1"),
        named(sig.clone(), &tag(&own, ".sig")),
    ];
    layout.expect_left_out(&entries, None, &kept);
    layout.expect_left_out(&entries, Some("v1"), &kept);
    let entries = [
        named(image.clone(), "app:v1"),
        named(sig.clone(), &tag(&other, ".att")),
    ];
    layout.expect_left_out(&entries, Some("v1"), &[]);
    // A name that only resembles that of a referrer belongs to an image.
    let fault = layout
        .open(
            &[
                named(image, "app:v1"),
                named(sig.clone(), &tag(&own, ".log")),
            ],
            None,
        )
        .unwrap_err();
    assert_eq!(fault.code, Code::Usage, "{fault}");
    // The signature is published if it is selected, or if there is nothing else.
    let source = layout.open(&entries, Some(&tag(&other, ".att"))).unwrap();
    assert_eq!(json!(source.info.digest), sig["digest"]);
    let source = layout
        .open(&[cosign(sig.clone(), "sigs", None)], None)
        .unwrap();
    assert_eq!(
        (json!(source.info.digest), source.omitted().is_empty()),
        (sig["digest"].clone(), true)
    );
}

#[test]
fn manifests_with_a_subject_are_counted_through_others_and_once() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let sbom = about(&mut layout.parts, &image, SPDX, "{}");
    let signed = about(
        &mut layout.parts,
        &sbom,
        "application/x-signature",
        "of the SBOM",
    );
    let (first, second) = (
        example(SPDX, &sbom),
        example("application/x-signature", &signed),
    );
    let both = [first.clone(), second];
    let entries = [named(image.clone(), "v1"), sbom.clone(), signed];
    layout.expect_left_out(&entries, None, &both);
    layout.expect_left_out(&entries, Some("v1"), &both);
    // The fallback tag lists them too.
    let mut listed = sbom.clone();
    listed["artifactType"] = SPDX.into();
    let list =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed] }).to_string();
    let list = layout.parts.blob(OCI_INDEX, list.as_bytes());
    let fallback = named(list, &format!("sha256-{}", hex_of(&image)));
    layout.expect_left_out(
        &[named(image.clone(), "v1"), fallback.clone()],
        None,
        std::slice::from_ref(&first),
    );
    layout.expect_left_out(
        &[named(image.clone(), "v1"), fallback, sbom],
        Some("v1"),
        &[first],
    );
    // It describes another image of the layout, so it does not count.
    let other = named(
        oci_image(&mut layout.parts, "arm64", &[&layer("b", b"2")]),
        "v2",
    );
    let of_other = about(&mut layout.parts, &other, SPDX, "{ }");
    layout.expect_left_out(&[named(image, "v1"), other, of_other], Some("v1"), &[]);
}

/// What an image carries: the digest of each, what it describes, its tag.
fn carried(source: &ImageSource) -> Vec<(String, String, Option<String>)> {
    let all = source.info.referrers.iter();
    all.map(|one| (one.digest.clone(), one.about.clone(), one.tag.clone()))
        .collect()
}

fn one(entry: &Value, about: &Value, tag: Option<String>) -> (String, String, Option<String>) {
    let digest = |value: &Value| value["digest"].as_str().unwrap().to_owned();
    (digest(entry), digest(about), tag)
}

fn sig_of(image: &Value) -> String {
    format!("sha256-{}.sig", hex_of(image))
}

impl Layout {
    fn carry(&self, tops: &[Value], tag: Option<&str>) -> Result<ImageSource, Fault> {
        let options = ImageOptions {
            referrers: true,
            ..ImageOptions::default()
        };
        self.case
            .open_with(&self.parts.clone().layout(tops).tar(), tag, &options)
    }

    /// Opens the layout. It must be the image, with exactly these referrers and nothing left out.
    #[track_caller]
    fn expect_carried(
        &self,
        tops: &[Value],
        tag: Option<&str>,
        referrers: &[(String, String, Option<String>)],
    ) -> Vec<(RelPath, Option<Vec<u8>>)> {
        let source = self.carry(tops, tag).unwrap();
        assert_eq!(json!(source.info.digest), self.image["digest"]);
        assert_eq!(carried(&source), referrers);
        assert!(source.omitted().is_empty(), "{:?}", source.omitted());
        let info = source.info.clone();
        let entries = contents(source);
        // What was written as a layout is the same artifact again, whatever its form was.
        let folder = self.case.path("again");
        fs::remove_dir_all(&folder).unwrap_or_default();
        for (path, bytes) in &entries {
            if let Some(bytes) = bytes {
                write(&folder.join(path.as_str()), bytes);
            }
        }
        let options = ImageOptions {
            referrers: true,
            ..ImageOptions::default()
        };
        let again = ImageSource::open_layout(&folder, &options).unwrap();
        assert_eq!(again.info, info);
        assert_eq!(contents(again), entries);
        entries
    }
}

#[test]
fn the_layouts_of_cosign_oras_and_hauler_are_carried_whole() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let sig = signature(&mut layout.parts, &image);
    let signed = [one(&sig, &image, Some(sig_of(&image)))];
    // cosign save: no names.
    let cosign_save = [
        cosign(image.clone(), "image", None),
        cosign(sig.clone(), "sigs", None),
    ];
    let first = layout.expect_carried(&cosign_save, None, &signed);
    assert_eq!(first.len(), 2 + 3 + 3 + 2);
    // hauler: the image and the signature have one name.
    let hauler = [
        cosign(image.clone(), "image", Some("ops/app:v1")),
        cosign(sig.clone(), "sigs", Some("ops/app:v1")),
    ];
    assert_eq!(layout.expect_carried(&hauler, None, &signed), first);
    assert_eq!(
        layout.expect_carried(&hauler, Some("ops/app:v1"), &signed),
        first
    );
    // The tag of cosign, as skopeo copies it.
    let tagged = [named(image.clone(), "app:v1"), named(sig, &sig_of(&image))];
    assert_eq!(layout.expect_carried(&tagged, None, &signed), first);
    // oras cp -r: untagged manifests with a subject, also below each other, and the fallback tag.
    let sbom = about(&mut layout.parts, &image, SPDX, "{}");
    let of_sbom = about(&mut layout.parts, &sbom, "application/x-signature", "s");
    let both = [one(&sbom, &image, None), one(&of_sbom, &sbom, None)];
    let oras = [of_sbom, named(image.clone(), "v1"), sbom.clone()];
    layout.expect_carried(&oras, None, &both);
    layout.expect_carried(&oras, Some("v1"), &both);
    let list = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [sbom] });
    let list = layout.parts.blob(OCI_INDEX, list.to_string().as_bytes());
    let fallback = [
        named(image.clone(), "v1"),
        named(list, &format!("sha256-{}", hex_of(&image))),
    ];
    layout.expect_carried(&fallback, None, &both[..1]);
    // Without the option they are counted, and the artifact is that of earlier versions.
    let plain = layout.open(&cosign_save, None).unwrap();
    let alone = layout.open(&[image], None).unwrap();
    assert_eq!(plain.info, alone.info);
    assert_eq!(contents(plain), contents(alone));
}

#[test]
fn what_is_not_whole_or_describes_something_else_is_left_out() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let expect = |layout: &Layout, entries: &[Value], tag: Option<&str>, what: &[String]| {
        let source = layout.carry(entries, tag).unwrap();
        assert_eq!(carried(&source), []);
        assert_eq!(
            left_out(&source, Category::Referrers),
            (what.len() as u64, what.to_vec())
        );
        assert_eq!(contents(source).len(), 2 + 3 + 2, "only the image");
    };
    // A missing blob, and a missing manifest.
    let sbom = about(&mut layout.parts, &image, SPDX, "{}");
    let sig = signature(&mut layout.parts, &image);
    let entries = [named(image.clone(), "v1"), sbom.clone()];
    for part in [BlobDigest::of(b"{}").member(), {
        let digest: BlobDigest = sbom["digest"].as_str().unwrap().parse().unwrap();
        digest.member()
    }] {
        let parts = layout.parts.clone();
        layout.parts.remove(&part);
        let listed = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [sbom] });
        let list = layout.parts.blob(OCI_INDEX, listed.to_string().as_bytes());
        let list = named(list, &format!("sha256-{}", hex_of(&image)));
        let what = [example("artifact", &sbom)];
        expect(&layout, &[entries[0].clone(), list], None, &what);
        layout.parts = parts;
    }
    // In a list of referrers, but without a subject.
    let listed = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [sig] });
    let list = layout.parts.blob(OCI_INDEX, listed.to_string().as_bytes());
    let list = named(list, &format!("sha256-{}", hex_of(&image)));
    let what = [example("artifact", &sig)];
    expect(&layout, &[entries[0].clone(), list], None, &what);
    // A signature without a digest next to two images: of which one is not known.
    let other = oci_image(&mut layout.parts, "arm64", &[&layer("b", b"2")]);
    let three = [
        named(image.clone(), "v1"),
        named(other, "v2"),
        cosign(sig.clone(), "sigs", None),
    ];
    let what = [example("signature", &sig)];
    expect(&layout, &three, Some("v1"), &what);
    // Of something that is not there.
    let zeros = json!({ "mediaType": OCI_MANIFEST, "digest": format!("sha256:{}", "0".repeat(64)), "size": 1 });
    let lost = about(&mut layout.parts, &zeros, SPDX, "{}");
    let of_lost = about(&mut layout.parts, &lost, SPDX, "{}");
    let what = [example(SPDX, &lost), example(SPDX, &of_lost)];
    expect(
        &layout,
        &[named(image.clone(), "v1"), lost, of_lost],
        None,
        &what,
    );
    // The image loses a platform, so the signature of its index describes something else.
    let arm = oci_image(&mut layout.parts, "arm64", &[&layer("b", b"2")]);
    let children: Vec<Value> = [(&image, "amd64"), (&arm, "arm64")]
        .into_iter()
        .map(|(entry, arch)| {
            let mut entry = entry.clone();
            entry["platform"] = json!({ "os": "linux", "architecture": arch });
            entry
        })
        .collect();
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children });
    let index = layout.parts.blob(OCI_INDEX, index.to_string().as_bytes());
    let of_index = signature(&mut layout.parts, &index);
    let entries = [
        cosign(index.clone(), "imageIndex", None),
        cosign(of_index.clone(), "sigs", None),
        named(sig.clone(), &sig_of(&image)),
    ];
    let options = ImageOptions {
        referrers: true,
        platforms: vec!["linux/amd64".parse().unwrap()],
        ..ImageOptions::default()
    };
    let tar = layout.parts.clone().layout(&entries).tar();
    let source = layout.case.open_with(&tar, None, &options).unwrap();
    assert_eq!(carried(&source), [one(&sig, &image, Some(sig_of(&image)))]);
    assert_eq!(
        left_out(&source, Category::Referrers),
        (1, vec![example("signature", &of_index)])
    );
    // With all platforms both are carried.
    let whole = layout.carry(&entries, None).unwrap();
    assert_eq!(whole.info.referrers.len(), 2);
    assert!(whole.omitted().is_empty(), "{:?}", whole.omitted());
}

#[test]
fn damaged_and_hostile_referrers_are_refused_or_bounded() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let sbom = about(&mut layout.parts, &image, SPDX, "the SBOM");
    let entries = [named(image.clone(), "v1"), sbom.clone()];
    let manifest: BlobDigest = sbom["digest"].as_str().unwrap().parse().unwrap();
    for member in [BlobDigest::of(b"the SBOM").member(), manifest.member()] {
        let parts = layout.parts.clone();
        let bytes = layout.parts.get(&member);
        // The manifest stays valid JSON: its type is another one.
        let at = bytes
            .windows(4)
            .position(|part| part == b"spdx")
            .unwrap_or(0);
        bytes[at] ^= 1;
        refused(
            layout.carry(&entries, None),
            &["wrong digest", &member[13..20]],
        );
        layout.parts = parts;
    }
    let mut wrong = sbom;
    wrong["size"] = 9.into();
    refused(
        layout.carry(&[entries[0].clone(), wrong], None),
        &["wrong size"],
    );
    // Ten thousand of them, each of the one before: as many are carried as are allowed.
    let (mut tops, mut before) = (vec![named(image.clone(), "v1")], image);
    let config = layout
        .parts
        .blob("application/vnd.oci.empty.v1+json", b"{}");
    for _ in 0..10_000 {
        let subject = json!({ "mediaType": OCI_MANIFEST, "digest": before["digest"], "size": before["size"] });
        let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [], "subject": subject });
        let bytes = manifest.to_string();
        let digest = BlobDigest::of(bytes.as_bytes());
        layout.parts.file(&digest.member(), bytes.as_bytes());
        before =
            json!({ "mediaType": OCI_MANIFEST, "digest": digest.to_string(), "size": bytes.len() });
        tops.push(before.clone());
    }
    for tag in [None, Some("v1")] {
        let source = layout.carry(&tops, tag).unwrap();
        assert_eq!(source.info.referrers.len(), IMAGE_REFERRERS_MAX);
        assert_eq!(
            left_out(&source, Category::Referrers).0,
            10_000 - IMAGE_REFERRERS_MAX as u64
        );
    }
}

#[test]
fn a_pulled_signature_with_a_signature_is_an_image() {
    let mut layout = Layout::new();
    let sig = signature(&mut layout.parts, &layout.image.clone());
    let of_sig = about(&mut layout.parts, &sig, SPDX, "{}");
    let tops = [named(sig.clone(), &sig_of(&layout.image)), of_sig.clone()];
    let folder = layout.case.path("pulled");
    layout.parts.clone().layout(&tops).folder(&folder);
    let options = ImageOptions {
        referrers: true,
        ..ImageOptions::default()
    };
    let source = ImageSource::open_scratch(&folder, &options).unwrap();
    assert_eq!(json!(source.info.digest), sig["digest"]);
    assert_eq!(carried(&source), [one(&of_sig, &sig, None)]);
}
