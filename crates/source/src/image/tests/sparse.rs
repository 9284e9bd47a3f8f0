//! Archives whose members GNU tar stored without their holes.

use std::os::unix::fs::FileExt;

use super::tools::run;
use super::*;

/// The blocks in which filesystems allocate.
const BLOCK: usize = 4096;

/// A layer with more holes than one header describes.
fn layer_with_holes() -> Vec<u8> {
    let mut parts = Parts::default();
    for number in 0..60 {
        let mut bytes = vec![0; 4 * BLOCK];
        bytes[2 * BLOCK] = number;
        parts.file(&format!("etc/{number}"), bytes);
    }
    parts.tar()
}

/// An archive of `docker save` with this layer, packed again by GNU tar.
fn packed(case: &Case, layer: &[u8], options: &[&str]) -> Vec<u8> {
    let config = config("amd64", &[layer]);
    let name = format!("{}.json", &BlobDigest::of(&config).to_string()[7..]);
    let mut parts = Parts::default();
    parts
        .file(
            "manifest.json",
            json!([{ "Config": name, "RepoTags": ["app:v1"], "Layers": ["aa/layer.tar"] }])
                .to_string(),
        )
        .file("aa/layer.tar", layer)
        .file("aa/VERSION", "1.0")
        .file(&name, config);
    let (folder, archive) = (case.path("unpacked"), case.path("packed.tar"));
    parts.folder(&folder);
    let file = fs::File::create(folder.join("aa/layer.tar")).unwrap();
    file.set_len(layer.len() as u64).unwrap();
    for (number, block) in layer.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, (number * BLOCK) as u64).unwrap();
        }
    }
    let (folder, packed) = (folder.display().to_string(), archive.display().to_string());
    let mut args = vec!["-S", "-C", &folder, "-cf", &packed];
    args.extend(options);
    args.push(".");
    run("tar", &args);
    fs::read(archive).unwrap()
}

const FORMS: [&[&str]; 4] = [
    &["--format=gnu"],
    &["--format=posix", "--sparse-version=0.0"],
    &["--format=posix", "--sparse-version=0.1"],
    &["--format=posix", "--sparse-version=1.0"],
];

#[test]
fn sparse_members_are_read_with_their_holes() {
    let layer = layer_with_holes();
    for form in FORMS {
        let case = Case::new();
        let bytes = packed(&case, &layer, form);
        assert!(
            bytes.len() < layer.len() * 2 / 3,
            "{form:?}: {}",
            bytes.len()
        );
        for bytes in [gzip(&bytes), bytes] {
            let source = case.open(&bytes).unwrap();
            let member = BlobDigest::of(&layer).member();
            let all = contents(source);
            let found = all.iter().find(|(path, _)| path.as_str() == member);
            assert_eq!(found.unwrap().1.as_ref(), Some(&layer), "{form:?}");
        }
    }
}

#[test]
fn a_file_that_is_one_hole_is_zeros() {
    for form in FORMS {
        let case = Case::new();
        let layer = vec![0; 64 << 10];
        let source = case.open(&packed(&case, &layer, form)).unwrap();
        let all = contents(source);
        assert!(
            all.iter().any(|(_, bytes)| bytes.as_ref() == Some(&layer)),
            "{form:?}"
        );
    }
}

#[test]
fn holes_are_limited_as_decompressed_bytes_are() {
    let case = Case::new();
    let mut layer = vec![0; 4 << 20];
    layer[..512].fill(1);
    for form in FORMS {
        refused(
            case.open(&packed(&case, &layer, form)),
            &["sparse file of 4194304 bytes", "image_unpacked"],
        );
    }
}

#[test]
fn an_archive_of_sparse_members_truncated_anywhere_is_refused() {
    for form in FORMS {
        let case = Case::new();
        let bytes = packed(&case, &layer_with_holes(), form);
        let archive = bytes.len() - bytes.iter().rev().take_while(|b| **b == 0).count();
        for cut in (256..archive).step_by(256) {
            assert!(case.open(&bytes[..cut]).is_err(), "{form:?} {cut}");
        }
    }
}
