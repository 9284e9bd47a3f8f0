//! Several images or platforms in one archive: which are used, and which are left out.

use super::tools::run;
use super::*;

/// Two platforms with an attestation each, in an index that `index.json` lists, as the containerd
/// store saves them.
fn two_platforms(parts: &mut Parts) -> (Value, Vec<Value>) {
    let shared = layer("shared", b"s");
    let mut children = Vec::new();
    for arch in ["amd64", "arm64"] {
        let own = layer("own", arch.as_bytes());
        let mut image = oci_image(parts, arch, &[&shared, &own]);
        let statement = format!("{{\"about\":\"{arch}\"}}");
        let config = parts.blob(OCI_CONFIG, br#"{"architecture":"unknown","os":"unknown"}"#);
        let statement = parts.blob("application/vnd.in-toto+json", statement.as_bytes());
        let mut attestation = manifest(parts, &config, &[statement]);
        attestation["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
        attestation["annotations"] = json!({ "vnd.docker.reference.digest": image["digest"], "vnd.docker.reference.type": "attestation-manifest" });
        image["platform"] = json!({ "architecture": arch, "os": "linux" });
        children.push(image);
        children.push(attestation);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children });
    let mut top = parts.blob(OCI_INDEX, index.to_string().as_bytes());
    top["annotations"] = json!({ "io.containerd.image.name": "docker.io/library/app:v1", "org.opencontainers.image.ref.name": "v1" });
    (top, children)
}

#[test]
fn existing_platforms_are_kept_and_absent_ones_left_out() {
    let case = Case::new();
    let mut whole = Parts::default();
    let (top, children) = two_platforms(&mut whole);
    whole.layout(std::slice::from_ref(&top));
    let source = case.open(&whole.tar()).unwrap();
    assert!(source.omitted().is_empty(), "{:?}", source.omitted());
    let info = source.info;
    assert_eq!(
        (json!(info.digest), info.platforms.len(), info.absent.len()),
        (top["digest"].clone(), 2, 0)
    );

    // The manifest of arm64 is missing; or its manifest and config exist, but only the shared
    // layer.
    let mut no_manifest = whole.clone();
    no_manifest.remove(&format!("blobs/sha256/{}", hex_of(&children[2])));
    let mut no_layer = whole.clone();
    no_layer.remove(&BlobDigest::of(&layer("own", b"arm64")).member());
    for parts in [no_manifest, no_layer] {
        let source = case.open(&parts.tar()).unwrap();
        let info = source.info.clone();
        assert_eq!(info.platforms, ["linux/amd64"]);
        let mut absent = vec![children[2]["digest"].clone(), children[3]["digest"].clone()];
        absent.sort_by_key(Value::to_string);
        assert_eq!(
            json!(info.absent),
            json!(absent),
            "the platform and its attestation"
        );
        assert_ne!(json!(info.digest), top["digest"]);
        assert_eq!(
            left_out(&source, Category::Platforms),
            (1, vec!["linux/arm64".into()])
        );
        let attestation = format!("attestation {}", children[3]["digest"].as_str().unwrap());
        assert_eq!(
            left_out(&source, Category::Referrers),
            (1, vec![attestation])
        );
        let digests = format!(
            "{}, published as {}",
            top["digest"].as_str().unwrap(),
            info.digest
        );
        assert_eq!(left_out(&source, Category::ImageDigest), (1, vec![digests]));
        assert_eq!(source.omitted().list().len(), 3, "{:?}", source.omitted());
        let all = contents(source);
        let index = all
            .iter()
            .find(|(p, _)| p.file_name() == &info.digest[7..])
            .unwrap()
            .1
            .clone()
            .unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["manifests"], json!(children[..2]));
        assert!(
            !all.iter()
                .any(|(p, _)| p.file_name() == hex_of(&children[3])),
            "only parts of the image"
        );
        let out = case.path("out");
        let _ = fs::remove_dir_all(&out);
        write_out(case.open(&parts.tar()).unwrap(), &out);
        let raw = run(
            "skopeo",
            &["inspect", "--raw", &format!("oci:{}", out.display())],
        );
        assert_eq!(BlobDigest::of(raw.as_bytes()).to_string(), info.digest);
    }

    // A platform with its own layer and another missing layer is not absent but damaged.
    let mut damaged = Parts::default();
    let (a, b, c) = (layer("a", b"1"), layer("b", b"2"), layer("c", b"3"));
    let images = [
        oci_image(&mut damaged, "amd64", &[&a]),
        oci_image(&mut damaged, "arm64", &[&b, &c]),
    ];
    let index =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": images }).to_string();
    let top = damaged.blob(OCI_INDEX, index.as_bytes());
    damaged.layout(&[top]);
    damaged.remove(&BlobDigest::of(&c).member());
    refused(
        case.open(&damaged.tar()),
        &["it is missing", &BlobDigest::of(&c).member()],
    );

    // Nothing at all.
    let mut none = whole.clone();
    for child in [&children[0], &children[2]] {
        none.remove(&format!("blobs/sha256/{}", hex_of(child)));
    }
    refused(case.open(&none.tar()), &["none of the listed platforms"]);
}

#[test]
fn platforms_listed_at_the_top_become_one_index() {
    let case = Case::new();
    let mut parts = Parts::default();
    let mut images = vec![
        oci_image(&mut parts, "amd64", &[&layer("a", b"1")]),
        oci_image(&mut parts, "arm64", &[&layer("a", b"2")]),
    ];
    images[0]["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    images[1]["platform"] = json!({ "architecture": "arm64", "os": "linux", "variant": "v8" });
    parts.layout(&images);
    let info = case.open(&parts.tar()).unwrap().info;
    assert_eq!(
        (info.media_type.as_str(), info.platforms.len()),
        (OCI_INDEX, 2)
    );
    parts.remove(&format!("blobs/sha256/{}", hex_of(&images[1])));
    assert_eq!(
        left_out(&case.open(&parts.tar()).unwrap(), Category::Platforms),
        (1, vec!["linux/arm64/v8".into()])
    );
}

#[test]
fn platforms_below_an_index_in_an_index_count_once() {
    let case = Case::new();
    let mut parts = Parts::default();
    let here = oci_image(&mut parts, "amd64", &[&layer("a", b"1")]);
    let gone: Vec<Value> = ["arm64", "s390x", "riscv64"]
        .iter()
        .map(|arch| {
            let digest = BlobDigest::of(arch.as_bytes()).to_string();
            json!({ "mediaType": OCI_MANIFEST, "digest": digest, "size": 5, "platform": { "os": "linux", "architecture": arch } })
        })
        .collect();
    let inner =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": gone[..2] }).to_string();
    let inner = parts.blob(OCI_INDEX, inner.as_bytes());
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [here, inner, gone[2], gone[0]] }).to_string();
    let top = parts.blob(OCI_INDEX, index.as_bytes());
    parts.layout(&[top]);
    let source = case.open(&parts.tar()).unwrap();
    assert_eq!(
        left_out(&source, Category::Platforms).0,
        3,
        "{:?}",
        source.omitted()
    );
}

#[test]
fn one_of_several_images_is_selected_by_its_tag() {
    let case = Case::new();
    let mut parts = Parts::default();
    let mut tops = Vec::new();
    for tag in ["v1", "v2"] {
        let mut top = oci_image(&mut parts, "amd64", &[&layer("a", tag.as_bytes())]);
        top["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        tops.push(top);
    }
    let oci = parts.layout(&tops).tar();
    let mut docker = docker_save(&["app:v1"]);
    let mut listed: Vec<Value> = serde_json::from_slice(docker.get("manifest.json")).unwrap();
    let l = layer("z", b"z");
    let c = config("amd64", &[&l]);
    docker.file("z/layer.tar", l).file("z.json", c);
    listed.push(json!({ "Config": "z.json", "RepoTags": ["app:v2"], "Layers": ["z/layer.tar"] }));
    *docker.get("manifest.json") = json!(listed).to_string().into_bytes();
    for bytes in [oci, docker.tar()] {
        let fault = case.open(&bytes).unwrap_err();
        assert_eq!(fault.code, Code::Usage);
        assert!(
            fault.message.contains("v1")
                && fault.message.contains("v2")
                && fault.next.contains("#TAG"),
            "{fault:?}"
        );
        let one = case.open_tag(&bytes, Some("v1")).unwrap().info.digest;
        let two = case.open_tag(&bytes, Some("v2")).unwrap().info.digest;
        assert_ne!(one, two);
        let fault = case.open_tag(&bytes, Some("v3")).unwrap_err();
        assert_eq!(fault.code, Code::NotFound);
    }
}
