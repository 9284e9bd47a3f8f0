//! Layouts with signatures and other referrers beside the image: the image is taken, and what stays
//! behind is counted.

use super::*;

const SPDX: &str = "application/spdx+json";

/// A manifest about another one, by `subject`.
fn about(parts: &mut Parts, subject: &Value, what: &str, text: &str) -> Value {
    let config = parts.blob("application/vnd.oci.empty.v1+json", b"{}");
    let layer = parts.blob(what, text.as_bytes());
    let subject = json!({ "mediaType": subject["mediaType"], "digest": subject["digest"], "size": subject["size"] });
    let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": what, "config": config, "layers": [layer], "subject": subject });
    parts.blob(OCI_MANIFEST, manifest.to_string().as_bytes())
}

/// A signature as cosign stores it: only its name or its kind says what it is about.
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

    /// Opens it: it must be the image, with these referrers left out and nothing else.
    #[track_caller]
    fn leaves(&self, tops: &[Value], tag: Option<&str>, referrers: &[String]) {
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
        assert_eq!(members, 2 + 3 + 2, "nothing but the image");
    }
}

#[test]
fn what_cosign_and_hauler_save_beside_an_image_is_counted() {
    let mut layout = Layout::new();
    let image = layout.image.clone();
    let sig = signature(&mut layout.parts, &image);
    let kept = [example("signature", &sig)];
    layout.leaves(
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
    layout.leaves(&hauler, None, &kept);
    layout.leaves(&hauler, Some("ops/app:v1"), &kept);
    // By the tag that cosign gives it; one about another image is that image's.
    let tag = |digest: &str, suffix: &str| format!("app:sha256-{digest}{suffix}");
    let (own, other) = (hex_of(&image), "0".repeat(64));
    let entries = [
        named(image.clone(), "app:v1"),
        named(sig.clone(), &tag(&own, ".sig")),
    ];
    layout.leaves(&entries, None, &kept);
    layout.leaves(&entries, Some("v1"), &kept);
    let entries = [
        named(image.clone(), "app:v1"),
        named(sig.clone(), &tag(&other, ".att")),
    ];
    layout.leaves(&entries, Some("v1"), &[]);
    // A name that only resembles one is an image's.
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
    // Whoever names the signature, or has nothing else, publishes it.
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
    layout.leaves(&entries, None, &both);
    layout.leaves(&entries, Some("v1"), &both);
    // The fallback tag lists them too.
    let mut listed = sbom.clone();
    listed["artifactType"] = SPDX.into();
    let list =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed] }).to_string();
    let list = layout.parts.blob(OCI_INDEX, list.as_bytes());
    let fallback = named(list, &format!("sha256-{}", hex_of(&image)));
    layout.leaves(
        &[named(image.clone(), "v1"), fallback.clone()],
        None,
        std::slice::from_ref(&first),
    );
    layout.leaves(
        &[named(image.clone(), "v1"), fallback, sbom],
        Some("v1"),
        &[first],
    );
    // About another image of the layout: not this one's.
    let other = named(
        oci_image(&mut layout.parts, "arm64", &[&layer("b", b"2")]),
        "v2",
    );
    let of_other = about(&mut layout.parts, &other, SPDX, "{ }");
    layout.leaves(&[named(image, "v1"), other, of_other], Some("v1"), &[]);
}
