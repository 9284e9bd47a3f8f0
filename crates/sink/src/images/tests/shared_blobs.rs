//! Blobs that several layouts of one directory have.

use std::os::unix::fs::MetadataExt;

use super::*;

/// Larger than a manifest can be.
const LARGE: usize = 5 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn layouts_share_large_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    let base = tar_layer("base.bin", &noise(40, LARGE));
    let images = dir.path().join("images");
    let one = staged(sink.as_ref(), std::slice::from_ref(&base), &["amd64"]);
    let first = incoming("image/one:v1", &one);
    sink.commit(&first, &one.dir).await.unwrap();

    let top = tar_layer("top.txt", b"two");
    let two = staged(sink.as_ref(), &[base, top], &["amd64"]);
    let second = named("image/two:v1", &two, "ops/team/two", "v1");
    let (large, small) = (&two.layers[0], &two.layers[1]);
    let file = |digest: &Sha256| two.dir.join(digest.layout_path());
    for (digest, expected) in [(large, true), (small, false)] {
        let (path, info) = (blob_path(digest), file_info(&file(digest)));
        let holds = sink.holds(&second, &path, &info).await.unwrap();
        assert_eq!(holds, expected, "{digest}");
    }
    std::fs::remove_file(file(large)).unwrap();
    let landed = sink.commit(&second, &two.dir).await.unwrap();
    let there = |layout: &str| images.join(layout).join(large.layout_path());
    let inode = |layout: &str| std::fs::metadata(there(layout)).unwrap().ino();
    assert_eq!(inode("one"), inode("ops/team/two"));
    let verification = Verification::default();
    let findings = sink.verify(&second, &landed.place, &verification).await;
    assert_eq!(findings.unwrap(), Vec::<String>::new());

    // Each image is removed alone.
    sink.remove(&first.artifact, Some(&first.root.info))
        .await
        .unwrap();
    assert!(!images.join("one").exists());
    let verification = Verification::default();
    let findings = sink.verify(&second, &landed.place, &verification).await;
    assert_eq!(findings.unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_of_another_layout_is_not_shared() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    let base = tar_layer("base.bin", &noise(41, LARGE));
    let images = dir.path().join("images");
    for (name, is_damaged) in [("image/bad:v1", true), ("image/two:v1", false)] {
        let image = staged(sink.as_ref(), std::slice::from_ref(&base), &["amd64"]);
        let of = incoming(name, &image);
        let path = image.dir.join(image.layers[0].layout_path());
        let size = std::fs::metadata(&path).unwrap().len();
        if is_damaged {
            sink.commit(&of, &image.dir).await.unwrap();
            let there = images.join("bad").join(image.layers[0].layout_path());
            write(&there, &noise(42, size as usize));
            continue;
        }
        std::fs::remove_file(&path).unwrap();
        let fault = sink.commit(&of, &image.dir).await.unwrap_err();
        assert_eq!(
            fault.retry,
            Retry::Backoff,
            "the blob is fetched: {fault:?}"
        );
        let there = images.join("two").join(image.layers[0].layout_path());
        assert!(!there.exists());
        let info = FileInfo {
            size,
            hash: Hash::of(b""),
        };
        let path = blob_path(&image.layers[0]);
        let holds = sink.holds(&of, &path, &info).await.unwrap();
        assert!(!holds, "the next attempt fetches it");
    }
}
