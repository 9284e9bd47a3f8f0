//! Further forms of images, and their selection.

use super::*;

fn platforms(wanted: &[&str]) -> ImageOptions {
    ImageOptions {
        platforms: wanted.iter().map(|text| text.parse().unwrap()).collect(),
        ..ImageOptions::default()
    }
}

fn paths(source: ImageSource) -> Vec<String> {
    contents(source)
        .into_iter()
        .map(|(path, _)| path.to_string())
        .collect()
}

/// An index with `linux/amd64`, `linux/arm64` and an attestation of the latter.
fn index(parts: &mut Parts) -> (Value, Vec<Value>) {
    let (a, b) = (layer("a", b"1"), layer("b", b"2"));
    let mut children = vec![
        oci_image(parts, "amd64", &[&a]),
        oci_image(parts, "arm64", &[&a, &b]),
    ];
    for (child, architecture) in children.iter_mut().zip(["amd64", "arm64"]) {
        child["platform"] = json!({"os": "linux", "architecture": architecture});
    }
    let statement = parts.blob("application/vnd.in-toto+json", b"{}");
    let unknown = json!({ "architecture": "unknown", "os": "unknown", "rootfs": { "type": "layers", "diff_ids": [statement["digest"]] } });
    let unknown = parts.blob(OCI_CONFIG, unknown.to_string().as_bytes());
    let mut attestation = manifest(parts, &unknown, &[statement]);
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({
        "vnd.docker.reference.digest": children[1]["digest"],
        "vnd.docker.reference.type": "attestation-manifest",
    });
    children.push(attestation);
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children });
    (
        parts.blob(OCI_INDEX, index.to_string().as_bytes()),
        children,
    )
}

#[test]
fn one_selected_platform_is_the_image_with_its_own_digest() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let (top, children) = index(&mut parts);
    let bytes = parts.layout(&[top]).tar();
    let source = case
        .open_with(&bytes, None, &platforms(&["linux/arm64"]))
        .unwrap();
    assert_eq!(json!(source.info.digest), children[1]["digest"]);
    assert_eq!(source.info.platforms, ["linux/arm64"]);
    let all = paths(source);
    assert!(
        !all.contains(&format!("blobs/sha256/{}", hex_of(&children[0]))),
        "{all:?}"
    );
    assert_eq!(
        all.iter()
            .filter(|path| path.starts_with("blobs/sha256/"))
            .count(),
        4,
        "manifest, config and two layers: {all:?}"
    );
}

#[test]
fn several_selected_platforms_are_an_index_of_them() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let (top, children) = index(&mut parts);
    let bytes = parts.layout(std::slice::from_ref(&top)).tar();
    let both = case
        .open_with(&bytes, None, &platforms(&["amd64", "linux/arm64/v8"]))
        .unwrap();
    assert_eq!(
        json!(both.info.digest),
        top["digest"],
        "nothing is left out"
    );
    let fault = case
        .open_with(&bytes, None, &platforms(&["linux/s390x"]))
        .unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
    assert!(
        fault.message.contains("linux/s390x") && fault.message.contains("linux/amd64, linux/arm64"),
        "{fault:?}"
    );

    // With a third one that is left out, the index is a new one.
    let mut more = Parts::default();
    let (_, mut three) = index(&mut more);
    let mut third = oci_image(&mut more, "s390x", &[&layer("c", b"3")]);
    third["platform"] = json!({"os": "linux", "architecture": "s390x"});
    three.push(third);
    let top = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": three }).to_string();
    let top = more.blob(OCI_INDEX, top.as_bytes());
    let bytes = more.layout(&[top]).tar();
    let source = case
        .open_with(&bytes, None, &platforms(&["linux/amd64", "linux/s390x"]))
        .unwrap();
    assert_eq!(source.info.platforms, ["linux/amd64", "linux/s390x"]);
    assert_eq!(left_out(&source, Category::Platforms).0, 0);
    assert_eq!(left_out(&source, Category::ImageDigest).0, 1);
    let digest = source.info.digest.clone();
    let made = contents(source)
        .into_iter()
        .find(|(path, _)| path.as_str() == digest.replace("sha256:", "blobs/sha256/"))
        .unwrap()
        .1
        .unwrap();
    let made: Value = serde_json::from_slice(&made).unwrap();
    let listed: Vec<&Value> = made["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["digest"])
        .collect();
    assert_eq!(listed, [&children[0]["digest"], &three[3]["digest"]]);
}

#[test]
fn an_image_of_another_platform_is_not_selected() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let top = oci_image(&mut parts, "amd64", &[&layer("a", b"1")]);
    let oci = parts.layout(&[top]).tar();
    for bytes in [oci, docker_save(&["adc:v1"]).tar()] {
        case.open_with(&bytes, None, &platforms(&["linux/amd64"]))
            .unwrap();
        let fault = case
            .open_with(&bytes, None, &platforms(&["linux/arm64"]))
            .unwrap_err();
        assert_eq!(fault.code, Code::NotFound, "{fault:?}");
    }
}

#[test]
fn a_platform_that_the_archive_lists_and_lacks_is_named_as_absent() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let (top, children) = index(&mut parts);
    parts.layout(&[top]);
    let mut without_manifest = parts.clone();
    without_manifest.remove(&format!("blobs/sha256/{}", hex_of(&children[1])));
    let mut without_layer = parts.clone();
    without_layer.remove(&BlobDigest::of(&layer("b", b"2")).member());
    for bytes in [without_manifest.tar(), without_layer.tar()] {
        let fault = case
            .open_with(&bytes, None, &platforms(&["linux/arm64"]))
            .unwrap_err();
        assert_eq!(fault.code, Code::NotFound, "{fault:?}");
        assert!(
            fault.message.contains(
                "lists the platform linux/arm64 but does not contain it, only: linux/amd64"
            ),
            "{fault:?}"
        );
        case.open_with(&bytes, None, &platforms(&["linux/amd64"]))
            .unwrap();
    }
    // Damage is no absence: a layer of the platform is there, and its config is not.
    let mut damaged = parts;
    let config = config("arm64", &[&layer("a", b"1"), &layer("b", b"2")]);
    damaged.remove(&BlobDigest::of(&config).member());
    refused(
        case.open_with(&damaged.tar(), None, &platforms(&["linux/arm64"])),
        &["is missing"],
    );
}

#[test]
fn the_last_member_of_a_name_counts() {
    let case = Case::new();
    let mut parts = docker_save(&["app:v1"]);
    let listed = parts.get("manifest.json").clone();
    let other = String::from_utf8(listed)
        .unwrap()
        .replace("app:v1", "app:v2");
    parts.file("manifest.json", other);
    let bytes = parts.tar();
    case.open_tag(&bytes, Some("app:v2")).unwrap();
    let fault = case.open_tag(&bytes, Some("app:v1")).unwrap_err();
    assert_eq!(fault.code, Code::NotFound, "{fault:?}");
}

#[test]
fn a_root_filesystem_is_not_an_image() {
    let case = Case::new();
    let mut parts = Parts::default();
    parts
        .put("bin", Part::Symlink("usr/bin".into()))
        .put("etc/mtab", Part::Symlink("/proc/mounts".into()))
        .put("dev/initctl", Part::Fifo)
        .file("usr/bin/app", "x");
    let fault = case.open(&parts.tar()).unwrap_err();
    assert!(
        fault.message.contains("root filesystem") && fault.next.contains("docker save"),
        "{fault:?}"
    );
    // The members of an image say what it is.
    parts.file("manifest.json", "[]");
    refused(
        case.open(&parts.tar()),
        &["etc/mtab", "outside the archive"],
    );
}

#[test]
fn images_without_names_are_selected_by_position_and_image_id() {
    let case = Case::new();
    let (a, b) = (config("amd64", &[]), config("arm64", &[]));
    let names = [&a, &b].map(|config| format!("{}.json", &BlobDigest::of(config).to_string()[7..]));
    let mut parts = Parts::default();
    parts.file(&names[0], a).file(&names[1], b.clone());
    let listed = json!([
        { "Config": names[0], "RepoTags": null, "Layers": [] },
        { "Config": names[1], "RepoTags": null, "Layers": [] },
    ]);
    let docker = parts.file("manifest.json", listed.to_string()).tar();
    let mut parts = Parts::default();
    let tops = ["amd64", "arm64"].map(|arch| oci_image(&mut parts, arch, &[]));
    let oci = parts.layout(&tops).tar();
    for bytes in [docker, oci] {
        let platform = |tag: &str| {
            let source = case.open_tag(&bytes, Some(tag)).unwrap();
            source.info.platforms
        };
        assert_eq!(platform("@0"), ["linux/amd64"]);
        assert_eq!(platform("@1"), ["linux/arm64"]);
        assert_eq!(platform(&BlobDigest::of(&b).to_string()), ["linux/arm64"]);
        let fault = case.open(&bytes).unwrap_err();
        assert_eq!(fault.code, Code::Usage, "{fault:?}");
        assert!(fault.message.contains("@0, @1"), "{fault:?}");
        assert_eq!(
            case.open_tag(&bytes, Some("@2")).unwrap_err().code,
            Code::NotFound
        );
    }
}

#[test]
fn a_directory_of_skopeo_is_an_image() {
    let case = Case::new();
    let mut parts = Parts::default();
    let top = oci_image(&mut parts, "amd64", &[&layer("a", b"1"), &layer("b", b"2")]);
    let folder = case.path("dir");
    for (name, part) in &parts.0 {
        let Part::File(bytes) = part else {
            unreachable!()
        };
        let hex = name.rsplit('/').next().unwrap();
        let name = if hex == hex_of(&top) {
            "manifest.json"
        } else {
            hex
        };
        write(&folder.join(name), bytes);
    }
    write(
        &folder.join("version"),
        b"Directory Transport Version: 1.1\n",
    );
    let source = ImageSource::open(&folder, &case.path("s")).unwrap();
    assert_eq!(json!(source.info.digest), top["digest"]);
    assert_eq!(
        paths(source)
            .iter()
            .filter(|path| path.starts_with("blobs/sha256/"))
            .count(),
        4
    );
    // Damage is detected there, too.
    write(
        &folder.join(&BlobDigest::of(&layer("b", b"2")).to_string()[7..]),
        &layer("b", b"3"),
    );
    let fault = ImageSource::open(&folder, &case.path("s")).unwrap_err();
    assert!(fault.message.contains("wrong digest"), "{fault:?}");
}

#[test]
fn encrypted_layers_are_compared_with_their_own_digest_only() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let config = parts.blob(OCI_CONFIG, &config("amd64", &[b"the content"]));
    let secret = parts.blob(&format!("{TAR_LAYER}+encrypted"), b"without the key");
    let top = manifest(&mut parts, &config, std::slice::from_ref(&secret));
    parts.layout(std::slice::from_ref(&top));
    let source = case.open(&parts.tar()).unwrap();
    assert_eq!(json!(source.info.digest), top["digest"]);
    *parts.get(&format!("blobs/sha256/{}", hex_of(&secret))) = b"WITHOUT THE KEY".to_vec();
    refused(case.open(&parts.tar()), &["wrong digest"]);
}

#[test]
fn an_artifact_with_the_config_of_an_image_needs_no_diff_ids() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let config = parts.blob(
        OCI_CONFIG,
        br#"{"architecture":"","os":"","config":{},"rootfs":{"type":"","diff_ids":null}}"#,
    );
    let model = parts.blob("application/vnd.example.model", b"weights");
    let top = manifest(&mut parts, &config, &[model]);
    let source = case
        .open(&parts.layout(std::slice::from_ref(&top)).tar())
        .unwrap();
    assert_eq!(json!(source.info.digest), top["digest"]);
    // The layers of an image still need them.
    let mut parts = Parts::default();
    let config = parts.blob(OCI_CONFIG, &super::config("amd64", &[]));
    let layer = parts.blob(TAR_LAYER, &layer("a", b"1"));
    let top = manifest(&mut parts, &config, &[layer]);
    refused(case.open(&parts.layout(&[top]).tar()), &["config lists 0"]);
}

#[test]
fn a_foreign_layer_may_be_absent() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let (base, own) = (layer("base", b"windows"), layer("own", b"1"));
    let config = parts.blob(OCI_CONFIG, &config("amd64", &[&base, &own]));
    let mut foreign = parts.blob(
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        &base,
    );
    foreign["urls"] = json!(["https://example.com/base"]);
    let own = parts.blob(TAR_LAYER, &own);
    let top = manifest(&mut parts, &config, &[foreign.clone(), own]);
    parts.layout(std::slice::from_ref(&top));
    let present = case.open(&parts.tar()).unwrap();
    let (info, there) = (present.info.clone(), paths(present));
    parts.remove(&format!("blobs/sha256/{}", hex_of(&foreign)));
    let absent = case.open(&parts.tar()).unwrap();
    assert_eq!(absent.info, info);
    let reported = absent.omitted().list();
    assert_eq!(reported.len(), 1, "{reported:?}");
    assert_eq!(reported[0].what, Category::ForeignLayers);
    let digest = foreign["digest"].as_str().unwrap().to_owned();
    assert_eq!(reported[0].examples, [digest]);
    assert_eq!(there.len(), paths(absent).len() + 1);
}

#[test]
fn a_cache_of_buildkit_is_an_image() {
    let (case, mut parts) = (Case::new(), Parts::default());
    let layer = parts.blob(TAR_LAYER, &layer("a", b"1"));
    let config = parts.blob(
        "application/vnd.buildkit.cacheconfig.v0",
        b"{\"layers\":[]}",
    );
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [layer, config] });
    let top = parts.blob(OCI_INDEX, index.to_string().as_bytes());
    let source = case
        .open(&parts.layout(std::slice::from_ref(&top)).tar())
        .unwrap();
    assert_eq!(json!(source.info.digest), top["digest"]);
    assert!(paths(source).contains(&format!("blobs/sha256/{}", hex_of(&config))));
}

#[test]
fn the_layers_of_docker_save_are_compressed_always_in_the_same_way() {
    let case = Case::new();
    let archive = docker_save(&["adc:v1"]).tar();
    let compress = ImageOptions {
        compress: true,
        ..ImageOptions::default()
    };
    let plain = case.open(&archive).unwrap();
    let source = case.open_with(&archive, None, &compress).unwrap();
    let digest = source.info.digest.clone();
    assert_ne!(digest, plain.info.digest);
    let files = contents(source);
    let manifest = files
        .iter()
        .find(|(path, _)| path.as_str() == digest.replace("sha256:", "blobs/sha256/"))
        .and_then(|(_, bytes)| bytes.as_ref())
        .unwrap();
    let manifest: Value = serde_json::from_slice(manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3);
    assert_eq!(layers[0], layers[2], "a shared layer is compressed once");
    for layer in layers {
        assert_eq!(
            layer["mediaType"],
            "application/vnd.oci.image.layer.v1.tar+gzip"
        );
    }
    // The result is a sound image, and the same one again.
    let made = case.path("made");
    for (path, bytes) in &files {
        if let Some(bytes) = bytes {
            write(&made.join(path.as_str()), bytes);
        }
    }
    ImageSource::open(&made, &case.path("s")).unwrap();
    let again = case.open_with(&archive, None, &compress).unwrap();
    assert_eq!(again.info.digest, digest);
    // An OCI layout keeps its digests.
    let mut parts = Parts::default();
    let top = oci_image(&mut parts, "amd64", &[&layer("a", b"1")]);
    let fault = case
        .open_with(&parts.layout(&[top]).tar(), None, &compress)
        .unwrap_err();
    assert_eq!(fault.code, Code::Usage);
}

#[test]
fn a_layer_of_zeros_is_no_bomb_below_the_limit() {
    let case = Case::new();
    let zeros = layer("swap", &vec![0; 2 << 20]);
    let mut parts = Parts::default();
    let config = parts.blob(OCI_CONFIG, &config("amd64", &[&zeros]));
    let compressed = parts.blob(
        &format!("{TAR_LAYER}+zstd"),
        &zstd::encode_all(&zeros[..], 1).unwrap(),
    );
    let top = manifest(&mut parts, &config, &[compressed]);
    parts.layout(&[top]);
    let path = case.file(&parts.tar());
    let open = |unpacked_bytes_max| {
        let options = ImageOptions {
            unpacked_bytes_max,
            ..ImageOptions::default()
        };
        ImageSource::open_for(&path, &case.path("s"), None, &options, &Arc::default())
    };
    open(None).unwrap();
    open(Some(4 << 20)).unwrap();
    refused(
        open(Some(1 << 20)),
        &["decompression bomb", "image_unpacked"],
    );
}
