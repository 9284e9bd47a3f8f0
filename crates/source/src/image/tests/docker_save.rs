//! Archives of `docker save`, before and since version 25, in every dialect of tar.

use super::tools::unpacked;
use super::*;

#[test]
fn a_docker_save_becomes_an_oci_image_with_the_config_as_it_was() {
    let case = Case::new();
    let parts = docker_save(&["app:v1", "app:latest"]);
    let plain = contents(case.open(&parts.tar()).unwrap());
    let source = case.open(&parts.tar()).unwrap();
    assert_eq!(source.image_info().media_type, OCI_MANIFEST);
    assert_eq!(source.image_info().platforms, ["linux/amd64"]);
    assert_eq!(
        left_out(&source, Category::ImageNames),
        (1, vec!["app:v1".into()]),
        "one of two names is left out"
    );
    assert!(
        case.open_tag(&parts.tar(), Some("v1"))
            .unwrap()
            .omitted()
            .is_empty(),
        "nothing is left out if a name is selected"
    );
    assert!(
        case.open(&docker_save(&["app:v1"]).tar())
            .unwrap()
            .omitted()
            .is_empty()
    );
    assert_eq!(
        plain
            .iter()
            .filter(|(p, _)| p.parent() == Some("blobs/sha256"))
            .count(),
        4,
        "two layers, config, manifest"
    );
    // The same image in any wrapping is the same artifact.
    let mut hard = parts.clone();
    hard.0.iter_mut().for_each(|(_, part)| {
        if let Part::Symlink(_) = part {
            *part = Part::Hardlink("./aa/layer.tar".into());
        }
    });
    for bytes in [
        gzip(&parts.tar()),
        zstd::encode_all(&parts.tar()[..], 1).unwrap(),
        xz(&parts.tar()),
        bzip2(&parts.tar()),
        hard.tar(),
    ] {
        assert_eq!(contents(case.open(&bytes).unwrap()), plain);
    }
    let out = case.path("out");
    write_out(source, &out);
    let (_, rootfs) = unpacked(&case, &out);
    assert_eq!(fs::read(rootfs.join("opt/adc/run.py")).unwrap(), b"print()");
}

#[test]
fn docker_25_oci_parts_are_used_unless_they_contradict_the_config() {
    let case = Case::new();
    let (a, b) = (layer("a", b"1"), layer("b", b"2"));
    let config_bytes = config("amd64", &[&a, &b]);
    let saved = |parts: &mut Parts| {
        let member = |bytes: &[u8]| BlobDigest::of(bytes).member();
        let listed = json!([{ "Config": member(&config_bytes), "RepoTags": ["app:v1"], "Layers": [member(&a), member(&b)] }]);
        parts.file("manifest.json", listed.to_string());
    };
    let mut good = Parts::default();
    let top = oci_image(&mut good, "amd64", &[&a, &b]);
    saved(&mut good);
    let info = case
        .open(&good.layout(std::slice::from_ref(&top)).tar())
        .unwrap()
        .info;
    assert_eq!(json!(info.digest), top["digest"]);

    for swapped in [false, true] {
        let mut bad = Parts::default();
        let config = bad.blob(OCI_CONFIG, &config_bytes);
        let (la, lb) = (bad.blob(TAR_LAYER, &a), bad.blob(TAR_LAYER, &b));
        let wrong = manifest(
            &mut bad,
            &config,
            &if swapped { vec![lb, la] } else { vec![] },
        );
        bad.layout(std::slice::from_ref(&wrong));
        let why = if swapped {
            "layer 1 is"
        } else {
            "it has 0 layers, but the config lists 2"
        };
        refused(case.open(&bad.tar()), &[why]);
        saved(&mut bad);
        let source = case.open(&bad.tar()).unwrap();
        assert_ne!(json!(source.image_info().digest), wrong["digest"]);
        assert_eq!(
            left_out(&source, Category::ImageDigest).0,
            1,
            "index.json states a different digest"
        );
        let digest = source.image_info().digest[7..].to_owned();
        let made = contents(source)
            .into_iter()
            .find(|(p, _)| p.file_name() == digest)
            .unwrap()
            .1
            .unwrap();
        let made: Value = serde_json::from_slice(&made).unwrap();
        assert_eq!(
            made["layers"][0]["digest"],
            json!(BlobDigest::of(&a).to_string())
        );
    }
}

#[test]
fn an_inconsistent_docker_save_is_refused() {
    let case = Case::new();
    let changed = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut parts = docker_save(&["app:v1"]);
        let name = if name == "config" {
            parts
                .0
                .iter()
                .find(|(n, _)| n.len() == 69)
                .unwrap()
                .0
                .clone()
        } else {
            name.to_owned()
        };
        change(parts.get(&name));
        parts.tar()
    };
    refused(
        case.open(&changed("aa/layer.tar", &|b| b[600] ^= 1)),
        &["aa/layer.tar", "wrong content"],
    );
    refused(
        case.open(&changed("config", &|b| b.push(b' '))),
        &["wrong digest", ".json"],
    );
    refused(
        case.open(&changed("manifest.json", &|b| b.truncate(20))),
        &["manifest.json", "malformed JSON"],
    );
    refused(
        case.open(&changed("manifest.json", &|b| b.resize(5 << 20, b' '))),
        &["manifest.json", "more than the allowed 4194304"],
    );
    let edited = |edit: &dyn Fn(&mut Value)| {
        changed("manifest.json", &|b| {
            let mut value = serde_json::from_slice(b).unwrap();
            edit(&mut value);
            *b = value.to_string().into_bytes();
        })
    };
    refused(
        case.open(&edited(&|v| v[0]["Layers"] = json!(["aa/layer.tar"]))),
        &["lists 1 layers, but the config lists 3"],
    );
    refused(
        case.open(&edited(&|v| v[0]["Layers"][0] = json!("zz/layer.tar"))),
        &["zz/layer.tar", "it is missing"],
    );
    refused(
        case.open(&edited(&|v| *v = json!([]))),
        &["contains no image"],
    );
    let mut none = docker_save(&[]);
    none.remove("manifest.json");
    refused(
        case.open(&none.tar()),
        &["index.json", "neither an OCI layout nor a docker archive"],
    );
    let mut inner = Parts::default();
    for (name, part) in docker_save(&[]).0 {
        inner.put(&format!("img/{name}"), part);
    }
    refused(case.open(&inner.tar()), &["directory \"img\""]);
    refused(case.open(b"this is not an archive"), &["truncated"]);
    refused(
        case.open(&b"this is not an archive".repeat(100)),
        &["not a tar archive"],
    );
    refused(case.open(b"\x04\x22\x4d\x18rest"), &["compressed with lz4"]);
    refused(case.open(b"\xfd7zXZ\0rest"), &["truncated"]);
}

#[test]
fn long_names_and_large_members_of_every_tar_dialect_are_found() {
    let case = Case::new();
    let long = format!("{}/layer.tar", "d/".repeat(90));
    let l = layer("a", b"1");
    let c = config("amd64", &[&l]);
    let listed = json!([{ "Config": "c.json", "Layers": [long] }]).to_string();
    let files: [(&str, &[u8]); 3] = [
        (&long, &l),
        ("c.json", &c),
        ("manifest.json", listed.as_bytes()),
    ];
    // GNU long names, and PAX records that alone state the size, as Go writes members of more than
    // 8 GiB.
    let mut gnu = tar::Builder::new(Vec::new());
    let mut pax = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        gnu.append_data(&mut header, name, bytes).unwrap();
        pax.append_pax_extensions([
            ("path", name.as_bytes()),
            ("size", bytes.len().to_string().as_bytes()),
        ])
        .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("short").unwrap();
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        let out = pax.get_mut();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    let (gnu, pax) = (gnu.into_inner().unwrap(), pax.into_inner().unwrap());
    assert_eq!(
        case.open(&gnu).unwrap().info.digest,
        case.open(&pax).unwrap().info.digest
    );
    let mut huge = tar::Header::new_gnu();
    huge.set_entry_type(tar::EntryType::GNULongName);
    huge.set_path("x").unwrap();
    huge.set_size(10 << 30);
    huge.set_cksum();
    refused(
        case.open(&[huge.as_bytes(), &[0; 1024][..]].concat()),
        &["extended header is larger"],
    );
}
