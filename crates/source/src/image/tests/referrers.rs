//! Layouts with signatures and other referrers next to the image: the image is used, and the
//! referrers are counted.

use super::*;

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
