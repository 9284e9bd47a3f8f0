//! OCI layouts as an archive or a directory: read in place, each blob checked compressed and
//! uncompressed.

use super::*;

#[test]
fn the_content_of_compressed_layers_is_checked_too() {
    let case = Case::new();
    let raw = layer("a", &b"x".repeat(70_000));
    for (media, bytes) in [
        ("+gzip", gzip(&raw)),
        ("+zstd", zstd::encode_all(&raw[..], 1).unwrap()),
    ] {
        let mut parts = Parts::default();
        let config = parts.blob(OCI_CONFIG, &config("arm64", &[&raw]));
        let layers = [parts.blob(&format!("{TAR_LAYER}{media}"), &bytes)];
        let top = manifest(&mut parts, &config, &layers);
        let good = parts.clone().layout(&[top]).tar();
        assert_eq!(
            case.open(&good).unwrap().image_info().platforms,
            ["linux/arm64"]
        );

        let mut parts = Parts::default();
        let config = parts.blob(OCI_CONFIG, &self::config("arm64", &[b"something else"]));
        let layers = [parts.blob(&format!("{TAR_LAYER}{media}"), &bytes)];
        let top = manifest(&mut parts, &config, &layers);
        refused(
            case.open(&parts.layout(&[top]).tar()),
            &["wrong content", "blobs/sha256/"],
        );
    }
}

#[test]
fn a_layout_directory_is_read_in_place_and_never_through_links() {
    let case = Case::new();
    let mut parts = Parts::default();
    let l = layer("a", b"1");
    let top = oci_image(&mut parts, "amd64", &[&l]);
    parts.layout(std::slice::from_ref(&top));
    let folder = case.path("image.in");
    parts.folder(&folder);
    assert_eq!(
        json!(
            ImageSource::open_layout(&folder, &ImageOptions::default())
                .unwrap()
                .info
                .digest
        ),
        top["digest"]
    );
    let blob = folder.join(BlobDigest::of(&l).member());
    write(&case.path("elsewhere"), &l);
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink(case.path("elsewhere"), &blob).unwrap();
    refused(
        ImageSource::open(&folder, &case.path("s")),
        &["not a regular file"],
    );
    fs::remove_file(&blob).unwrap();
    refused(
        ImageSource::open(&folder, &case.path("s")),
        &[
            "it is missing: manifest sha256:",
            &BlobDigest::of(&l).member(),
        ],
    );
    let fault = ImageSource::open(&case.path("nothing"), &case.path("s")).unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
}

#[test]
fn an_inconsistent_oci_layout_is_refused() {
    let case = Case::new();
    let raw = layer("a", b"1");
    let make = || {
        let mut parts = Parts::default();
        let top = oci_image(&mut parts, "amd64", &[&raw]);
        (parts, top)
    };
    let (mut parts, top) = make();
    parts.layout(std::slice::from_ref(&top));
    let good = parts.clone();
    assert!(case.open(&good.tar()).is_ok());

    let mut flipped = good.clone();
    flipped.get(&BlobDigest::of(&raw).member())[513] ^= 1;
    refused(
        case.open(&flipped.tar()),
        &["wrong digest", &BlobDigest::of(&raw).member()],
    );
    let mut longer = good.clone();
    longer.get(&BlobDigest::of(&raw).member()).push(0);
    refused(
        case.open(&longer.tar()),
        &["wrong size", &BlobDigest::of(&raw).member()],
    );
    let mut changed = good.clone();
    let member = format!("blobs/sha256/{}", hex_of(&top));
    changed.get(&member)[3] = b'X';
    refused(case.open(&changed.tar()), &["wrong digest", &member]);
    let mut missing = good.clone();
    missing.remove("oci-layout");
    refused(case.open(&missing.tar()), &["oci-layout", "missing"]);
    let mut gone = good;
    gone.remove(&member);
    refused(
        case.open(&gone.tar()),
        &[&member, "it is missing: index.json lists it"],
    );

    let odd = |media: &str, manifest: Value| {
        let (mut parts, _) = make();
        let top = parts.blob(media, manifest.to_string().as_bytes());
        parts.layout(&[top]).tar()
    };
    refused(
        case.open(&odd(
            OCI_MANIFEST,
            json!({ "schemaVersion": 1, "fsLayers": [] }),
        )),
        &["schema 1"],
    );
    refused(
        case.open(&odd(OCI_MANIFEST, json!({ "schemaVersion": 3 }))),
        &["unknown schema"],
    );
    refused(
        case.open(&odd("application/x-odd", json!({ "schemaVersion": 2 }))),
        &["unknown media type"],
    );
    refused(
        case.open(&odd(
            OCI_INDEX,
            json!({ "schemaVersion": 2, "layers": [], "manifests": [] }),
        )),
        &["both a manifest and an index"],
    );
    refused(
        case.open(&odd(
            OCI_MANIFEST,
            json!({ "schemaVersion": 2, "mediaType": OCI_INDEX }),
        )),
        &["but listed as"],
    );
    let sha512 = json!({ "mediaType": OCI_MANIFEST, "digest": "sha512:00", "size": 1 });
    refused(
        case.open(&make().0.layout(&[sha512]).tar()),
        &["not a sha256"],
    );
}
