//! Input that is truncated, refers to files outside its archive, is a decompression bomb, or
//! changes during the read.

use std::os::unix::fs::FileExt;

use super::*;
use base::names::Kind;
use content::ingest::{Progress, ingest};
use content::store::Store;

#[test]
fn an_archive_truncated_anywhere_is_refused() {
    let case = Case::new();
    let tar = docker_save(&["app:v1"]).tar();
    // Without the blocks that end it, it ends as well as at the end of each member.
    let body = tar.len() - 1024;
    let ends = ends_of_members(&tar);
    assert_eq!(ends.last(), Some(&body));
    for cut in (0..body).step_by(256) {
        let why = match cut {
            0 => "it is empty",
            cut if ends.contains(&cut) => "is missing",
            _ => "truncated",
        };
        refused(case.open(&tar[..cut]), &[why]);
    }
    case.open(&tar[..body]).unwrap();
    let packed = gzip(&tar);
    refused(case.open(&packed[..packed.len() / 2]), &["truncated"]);
    assert!(
        !case.path("scratch/image.tar").exists(),
        "the scratch file is removed"
    );
}

/// Where the members of a tar end.
fn ends_of_members(tar: &[u8]) -> Vec<usize> {
    tar::Archive::new(tar)
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let end = entry.raw_file_position() + entry.size();
            end.next_multiple_of(512) as usize
        })
        .collect()
}

#[test]
fn hostile_names_and_links_are_refused() {
    let case = Case::new();
    let with = |name: &str, part: Part| docker_save(&[]).put(name, part).tar();
    let file = || Part::File(b"x".to_vec());
    let link = |to: &str| Part::Symlink(to.into());
    refused(
        case.open(&with("../evil", file())),
        &["../evil", "contains '..'"],
    );
    refused(case.open(&with("a/../../evil", file())), &["contains '..'"]);
    refused(
        case.open(&with("/etc/passwd", file())),
        &["/etc/passwd", "absolute"],
    );
    refused(
        case.open(&with("out", link("/etc/passwd"))),
        &["out", "outside the archive"],
    );
    refused(
        case.open(&with("d/out", link("../../x"))),
        &["outside the archive"],
    );
    refused(
        case.open(&with("hard", Part::Hardlink("/etc/passwd".into()))),
        &["hard", "absolute"],
    );
    refused(case.open(&with("self", link("self"))), &["self", "loop"]);
    let round = docker_save(&[])
        .put("one", link("two"))
        .put("two", link("one"))
        .tar();
    refused(case.open(&round), &["one", "loop"]);
    refused(
        case.open(&with("pipe", Part::Fifo)),
        &["pipe", "neither a file"],
    );
}

#[test]
fn an_image_that_changes_after_its_check_is_refused() {
    let case = Case::new();
    let store = Store::open(&case.path("store")).unwrap();
    let raw = layer("a", b"1");
    let mut parts = Parts::default();
    let top = oci_image(&mut parts, "amd64", &[&raw]);
    parts.layout(&[top]);
    let (folder, tar) = (case.path("folder"), parts.tar());
    parts.folder(&folder);
    let archive = case.file(&tar);
    let member = folder.join(BlobDigest::of(&raw).member());
    let in_tar = tar
        .windows(raw.len())
        .position(|bytes| bytes == raw)
        .unwrap();
    for (image, file, start) in [(&folder, &member, 0), (&archive, &archive, in_tar)] {
        let opened = || ImageSource::open(image, &case.path("none")).unwrap();
        ingest(
            &mut opened(),
            Kind::Image,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap();
        let mut source = opened();
        base::testing::wait_for_file_clock();
        let time = fs::metadata(file).unwrap().modified().unwrap();
        let out = fs::File::options().write(true).open(file).unwrap();
        out.write_all_at(b"2", start as u64 + 512).unwrap();
        out.set_modified(time).unwrap();
        let fault = ingest(
            &mut source,
            Kind::Image,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap_err();
        assert_eq!(fault.code, Code::Integrity, "{fault}");
        assert!(
            fault.message.contains("changed while it was read"),
            "{fault}"
        );
    }
}

/// The memory of the decoder is what the header of a block asks for: here almost 4 GiB.
#[test]
fn an_xz_archive_does_not_choose_the_memory_of_the_daemon() {
    let case = Case::new();
    let mut archive = xz(b"content");
    let header = 12; // after the header of the stream
    let len = (usize::from(archive[header]) + 1) * 4;
    assert_eq!(
        archive[header + 2..header + 4],
        [0x21, 1],
        "LZMA2, one byte"
    );
    archive[header + 4] = 40;
    let mut crc = flate2::Crc::new();
    crc.update(&archive[header..header + len - 4]);
    archive[header + len - 4..header + len].copy_from_slice(&crc.sum().to_le_bytes());
    refused(
        case.open(&archive),
        &["cannot be decompressed", "4096 MiB of memory"],
    );
}

/// A value of one byte takes some hundred bytes when it is parsed.
#[test]
fn a_json_document_with_very_many_values_is_refused() {
    let case = Case::new();
    let layers = vec!["\"a\""; 100_000].join(",");
    let mut parts = docker_save(&["app:v1"]);
    *parts.get("manifest.json") =
        format!(r#"[{{"Config":"c","RepoTags":null,"Layers":[{layers}]}}]"#).into_bytes();
    refused(case.open(&parts.tar()), &["manifest.json", "values"]);
}

#[test]
fn a_cancelled_job_reads_no_image() {
    let case = Case::new();
    let options = ImageOptions::default();
    options.stop.set();
    for bytes in [
        docker_save(&["app:v1"]).tar(),
        gzip(&docker_save(&["app:v1"]).tar()),
    ] {
        let fault = case.open_with(&bytes, None, &options).unwrap_err();
        assert_eq!(
            fault.reason,
            base::fault::Reason::CancelledByUser,
            "{fault}"
        );
    }
}

/// Runtimes unpack no such layer.
#[test]
fn a_layer_is_not_xz_or_bzip2() {
    for (pack, name) in [(xz as fn(&[u8]) -> Vec<u8>, "xz"), (bzip2, "bzip2")] {
        let case = Case::new();
        let mut parts = Parts::default();
        let raw = layer("a", b"1");
        let config = parts.blob(OCI_CONFIG, &config("amd64", &[&raw]));
        let layers = [parts.blob(TAR_LAYER, &pack(&raw))];
        let top = manifest(&mut parts, &config, &layers);
        let said = format!("{name} is not supported");
        refused(case.open(&parts.layout(&[top]).tar()), &[&said]);
    }
}

#[test]
fn bombs_are_refused_outside_and_inside() {
    let case = Case::new();
    let zeros = || std::io::repeat(0).take(64 << 20);
    let raw = vec![0; 64 << 20];
    for archive in [zstd::encode_all(zeros(), 1).unwrap(), xz(&raw), bzip2(&raw)] {
        refused(case.open(&archive), &["decompression bomb"]);
    }
    assert!(!case.path("scratch/image.tar").exists());
    let mut parts = Parts::default();
    let config = parts.blob(OCI_CONFIG, &config("amd64", &[b"whatever"]));
    let layers = [parts.blob(
        &format!("{TAR_LAYER}+zstd"),
        &zstd::encode_all(zeros(), 1).unwrap(),
    )];
    let top = manifest(&mut parts, &config, &layers);
    refused(
        case.open(&parts.layout(&[top]).tar()),
        &["decompression bomb", "blobs/sha256/"],
    );
}
