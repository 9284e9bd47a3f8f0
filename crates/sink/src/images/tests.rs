//! The image sinks: against docker-registry with both kinds of access, against a stand-in for
//! Harbor, and in a directory. skopeo also checks the results.

mod referrers;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::{StorageLocation, Verification};
use ::registry::testing::fixture::{
    Access, Image, Info, PASSWORD, RealRegistry, TokenService, USER, image, noise, tar_layer, write,
};
use ::registry::testing::standin::{Scripted, StandIn, error};
use base::fault::{Code, Reason, Retry};
use base::names::RelPath;
use base::names::{ArtifactRef, Kind};
use content::chunk::Hash;
use content::manifest::{FileInfo, ImageInfo, KindInfo, Root, Totals};

mod shared_blobs;

fn incoming(reference: &str, image: &Image) -> Incoming {
    let of = image.info.clone();
    let info = ImageInfo {
        media_type: of.media_type,
        digest: of.digest,
        size: of.size,
        platforms: of.platforms,
        absent: Vec::new(),
        repository: None,
        tag: None,
        referrers: Vec::new(),
    };
    let artifact: ArtifactRef = reference.parse().unwrap();
    let root = Root {
        format: 1,
        kind: Kind::Image,
        info: KindInfo::Image(info),
        chunking: content::chunk::DEFAULT_CHUNKING,
        totals: Totals::default(),
        depth: 0,
        pages: Vec::new(),
    };
    Incoming {
        artifact,
        digest: Hash::of(image.info.digest.as_bytes()),
        root,
        transfer: "t1".parse().unwrap(),
        waits: Default::default(),
    }
}

fn file_info(path: &Path) -> FileInfo {
    let bytes = std::fs::read(path).unwrap();
    FileInfo {
        size: bytes.len() as u64,
        hash: Hash::of(&bytes),
    }
}

/// The configuration of an image sink, with the password in a file below `dir`.
fn sink_config(url: &str, dir: &Path) -> settings::ImagesSink {
    let file = dir.join("password");
    write(&file, format!("{PASSWORD}\n").as_bytes());
    settings::ImagesSink {
        url: url.into(),
        username: Some(USER.into()),
        password_file: Some(file),
        ca_file: None,
        realm_hosts: Vec::new(),
        insecure: false,
        create_project: false,
    }
}

fn staged(sink: &dyn Sink, layers: &[Vec<u8>], platforms: &[&str]) -> Image {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    image(
        &sink
            .staging_root()
            .join(format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed))),
        layers,
        platforms,
    )
}

fn blob_path(digest: &Sha256) -> RelPath {
    digest.layout_path().parse().unwrap()
}

fn skopeo(args: &[&str]) -> String {
    let out = Command::new("skopeo")
        .args(args)
        .output()
        .expect("skopeo is missing: run scripts/test, or apt-get install skopeo");
    assert!(
        out.status.success(),
        "skopeo {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// The behaviour of every image sink; `inspect` returns the digest that another client sees.
async fn contract(sink: &dyn Sink, inspect: &dyn Fn(&str) -> String) {
    let base = tar_layer("base.txt", &noise(1, 2_000_000));
    let one = staged(
        sink,
        &[base.clone(), tar_layer("top.txt", b"one")],
        &["amd64", "arm64"],
    );
    let v1 = incoming("image/seg:v1", &one);
    sink.check(&v1).await.unwrap();
    assert!(
        !sink
            .holds(
                &v1,
                &blob_path(&one.layers[0]),
                &file_info(&one.dir.join(one.layers[0].layout_path()))
            )
            .await
            .unwrap()
    );
    let landed = sink.commit(&v1, &one.dir).await.unwrap();
    assert!(
        landed.location.contains(&one.info.digest),
        "{}",
        landed.location
    );
    assert!(!one.dir.exists(), "the staging directory is removed");
    assert_eq!(inspect("v1"), one.info.digest);
    sink.check(&v1).await.unwrap();
    sink.commit(&v1, &one.dir).await.unwrap();
    assert_eq!(
        sink.verify(&v1, &landed.place, &Verification::default())
            .await
            .unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(
        sink.read_at(&landed.place, &blob_path(&one.layers[0]), 1000, 50)
            .await
            .unwrap(),
        base[1000..1050]
    );
    assert!(
        sink.read_at(
            &landed.place,
            &blob_path(&one.layers[0]),
            base.len() as u64 - 5,
            10
        )
        .await
        .is_err()
    );
    let top = blob_path(&one.info.digest.parse().unwrap());
    assert_eq!(
        sink.read_at(&landed.place, &top, 0, 2).await.unwrap().len(),
        2,
        "manifests can be read too"
    );

    // The second version shares its base layer, which exists already and is not staged.
    let two = staged(
        sink,
        &[base.clone(), tar_layer("top.txt", b"two")],
        &["amd64", "arm64"],
    );
    let v2 = incoming("image/seg:v2", &two);
    let shared = two.dir.join(two.layers[0].layout_path());
    assert!(
        sink.holds(&v2, &blob_path(&two.layers[0]), &file_info(&shared))
            .await
            .unwrap()
    );
    std::fs::remove_file(&shared).unwrap();
    sink.commit(&v2, &two.dir).await.unwrap();
    assert_eq!(
        (inspect("v1"), inspect("v2")),
        (one.info.digest.clone(), two.info.digest.clone())
    );

    // Different content under an existing version.
    let other = staged(sink, &[tar_layer("top.txt", b"other")], &["amd64"]);
    let taken = incoming("image/seg:v1", &other);
    for fault in [
        sink.check(&taken).await.unwrap_err(),
        sink.commit(&taken, &other.dir).await.unwrap_err(),
    ] {
        assert_eq!(
            (fault.code, fault.reason, fault.retry),
            (Code::Conflict, Reason::SinkRefused, Retry::Never),
            "{fault}"
        );
    }

    // A missing blob, and a blob with another size than its manifest states.
    let partial = staged(sink, &[noise(8, 1000)], &["amd64"]);
    std::fs::remove_file(partial.dir.join(partial.layers[0].layout_path())).unwrap();
    let fault = sink
        .commit(&incoming("image/seg:v3", &partial), &partial.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkUnavailable, Retry::Backoff),
        "{fault}"
    );
    let short = staged(sink, &[noise(9, 1000)], &["amd64"]);
    write(&short.dir.join(short.layers[0].layout_path()), b"short");
    let fault = sink
        .commit(&incoming("image/seg:v3", &short), &short.dir)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::Integrity, "{fault}");
    // The size is correct, the content is not.
    let wrong_image = staged(sink, &[noise(10, 1000)], &["amd64"]);
    write(
        &wrong_image.dir.join(wrong_image.layers[0].layout_path()),
        &noise(11, 1000),
    );
    let fault = sink
        .commit(&incoming("image/seg:v3", &wrong_image), &wrong_image.dir)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::Integrity, "{fault}");

    sink.activate(&v1.artifact).await.unwrap();
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    sink.remove(&v1.artifact, Some(&v1.root.info))
        .await
        .unwrap();
    assert!(
        !sink
            .verify(&v1, &landed.place, &Verification::default())
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        sink.verify(&v2, &landed.place, &Verification::default())
            .await
            .unwrap(),
        Vec::<String>::new(),
        "content of another version is kept"
    );
    assert_eq!(inspect("v2"), two.info.digest);
    sink.probe().await.unwrap();
}

async fn registry_contract(server: &RealRegistry, realm_hosts: &[&str]) {
    let dir = server.dir.path();
    let mut config = sink_config(&server.url("op"), dir);
    config.realm_hosts = realm_hosts.iter().map(|&host| host.to_owned()).collect();
    let sink = open(Some(&config), dir).unwrap();
    let creds = format!("{USER}:{PASSWORD}");
    contract(sink.as_ref(), &|tag| {
        let image = format!("docker://{}/op/seg:{tag}", server.address);
        let raw = skopeo(&[
            "inspect",
            "--raw",
            "--tls-verify=false",
            "--creds",
            &creds,
            &image,
        ]);
        Sha256::of(raw.as_bytes()).to_string()
    })
    .await;
    let out = format!("dir:{}", dir.join("copied").display());
    let image = format!("docker://{}/op/seg:v2", server.address);
    skopeo(&[
        "copy",
        "-q",
        "--all",
        "--src-tls-verify=false",
        "--src-creds",
        &creds,
        &image,
        &out,
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_password() {
    registry_contract(&RealRegistry::start(&Access::Basic), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_tokens() {
    let service = TokenService::start().await;
    registry_contract(
        &RealRegistry::start(&Access::Bearer(service.clone())),
        &[service.address()],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    let layout = dir.path().join("images/seg");
    contract(sink.as_ref(), &|tag| {
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
        let entries = index["manifests"].as_array().unwrap();
        let entry = entries
            .iter()
            .find(|e| e["annotations"]["org.opencontainers.image.ref.name"] == tag)
            .unwrap();
        entry["digest"].as_str().unwrap().to_owned()
    })
    .await;
    let out = format!("dir:{}", dir.path().join("copied").display());
    skopeo(&[
        "copy",
        "-q",
        "--all",
        &format!("oci:{}:v2", layout.display()),
        &out,
    ]);

    // A flipped bit is found; removing the last version removes the directory.
    let one = staged(sink.as_ref(), &[noise(20, 5000)], &["amd64"]);
    let only = incoming("image/one:v1", &one);
    let landed = sink.commit(&only, &one.dir).await.unwrap();
    write(
        &dir.path()
            .join("images/one")
            .join(one.layers[0].layout_path()),
        &noise(21, 5000),
    );
    assert_eq!(
        sink.verify(&only, &landed.place, &Verification::default())
            .await
            .unwrap()
            .len(),
        1
    );
    sink.remove(&only.artifact, Some(&only.root.info))
        .await
        .unwrap();
    assert!(!dir.path().join("images/one").exists());
}

#[tokio::test]
async fn a_directory_of_layouts_is_created_at_first_use() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("mount/images");
    let sink = open(
        Some(&sink_config(
            &format!("oci-layout:{}", images.display()),
            dir.path(),
        )),
        dir.path(),
    )
    .unwrap();
    assert!(
        !images.exists(),
        "a NAS that hangs must not block the start of the daemon"
    );
    assert!(
        sink.is_shared(),
        "other sites may use a configured directory"
    );
    sink.probe().await.unwrap();
    sink.trial().await.unwrap();
    assert!(images.is_dir());
    assert!(!open(None, dir.path()).unwrap().is_shared());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sites_use_one_directory_of_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let config = sink_config(
        &format!("oci-layout:{}", dir.path().join("images").display()),
        dir.path(),
    );
    let sinks = [
        open(Some(&config), dir.path()).unwrap(),
        open(Some(&config), dir.path()).unwrap(),
    ];
    let mut images = Vec::new();
    for number in 0..12 {
        let sink = &sinks[number % 2];
        let image = staged(
            sink.as_ref(),
            &[noise(100 + number as u64, 2000)],
            &["amd64"],
        );
        images.push((incoming(&format!("image/seg:v{number}"), &image), image));
    }
    let commits = images
        .iter()
        .enumerate()
        .map(|(number, (incoming, image))| sinks[number % 2].commit(incoming, &image.dir));
    for landed in futures::future::join_all(commits).await {
        landed.unwrap();
    }
    for (incoming, _) in &images {
        assert!(
            sinks[0].exists_at_target(incoming).await.unwrap(),
            "{} is committed, although the other site committed others at the same time",
            incoming.artifact
        );
    }
    // Different images under one version: one is committed, and the other gets a conflict.
    let [one, two] =
        [200, 201].map(|seed| staged(sinks[0].as_ref(), &[noise(seed, 2000)], &["amd64"]));
    let [a, b] = [&one, &two].map(|image| incoming("image/seg:same", image));
    let (first, second) =
        tokio::join!(sinks[0].commit(&a, &one.dir), sinks[1].commit(&b, &two.dir));
    let fault = match (first, second) {
        (Ok(_), Err(fault)) | (Err(fault), Ok(_)) => fault,
        both => unreachable!("one of the two: {both:?}"),
    };
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Conflict, Reason::SinkRefused),
        "{fault}"
    );
}

#[tokio::test]
async fn a_damaged_layer_of_the_right_size_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    let base = noise(30, 5000);
    let one = staged(sink.as_ref(), std::slice::from_ref(&base), &["amd64"]);
    sink.commit(&incoming("image/one:v1", &one), &one.dir)
        .await
        .unwrap();
    let layer = dir
        .path()
        .join("images/one")
        .join(one.layers[0].layout_path());
    write(&layer, &noise(31, 5000));

    // The second version has the same base layer, which is found by its name and size and is
    // therefore not staged.
    let two = staged(sink.as_ref(), &[base.clone(), noise(32, 100)], &["amd64"]);
    let (v2, path) = (incoming("image/one:v2", &two), blob_path(&two.layers[0]));
    let from = two.dir.join(path.as_str());
    let file = file_info(&from);
    assert!(sink.holds(&v2, &path, &file).await.unwrap());
    std::fs::remove_file(&from).unwrap();
    let fault = sink.commit(&v2, &two.dir).await.unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkUnavailable, Retry::Backoff),
        "{fault}"
    );
    // The next attempt delivers it, and then both versions are intact.
    assert!(!sink.holds(&v2, &path, &file).await.unwrap());
    write(&from, &base);
    let landed = sink.commit(&v2, &two.dir).await.unwrap();
    assert_eq!(
        sink.verify(&v2, &landed.place, &Verification::default())
            .await
            .unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(std::fs::read(&layer).unwrap(), base);
}

#[tokio::test]
async fn invalid_images_are_refused_before_a_transfer() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = |url: &str| sink_config(url, dir.path());
    for bad in [
        "oci-layout:relative",
        "harbor/op",
        "https://user:pw@h/op",
        "https://h/Op",
        "ftp://h/op",
    ] {
        let fault = open(Some(&cfg(bad)), dir.path()).err().unwrap();
        assert_eq!(fault.code, Code::Config, "{bad}: {fault}");
    }
    let no_secret = settings::ImagesSink {
        password_file: Some("/nowhere".into()),
        ..cfg("https://h/op")
    };
    assert_eq!(
        open(Some(&no_secret), dir.path()).err().unwrap().code,
        Code::Config
    );
    let sink = open(Some(&cfg("http://127.0.0.1:1/op")), dir.path()).unwrap();
    let made = staged(sink.as_ref(), &[noise(1, 10)], &["amd64"]);
    let fault = sink
        .check(&incoming("image/a..b:v1", &made))
        .await
        .unwrap_err();
    assert_eq!(fault.reason, Reason::SinkRefused, "{fault}");
    let fault = sink
        .check(&incoming("image/a:v1", &made))
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason, fault.retry),
        (Code::Unreachable, Reason::SinkUnavailable, Retry::Backoff),
        "{fault}"
    );
}

async fn harbor(dir: &Path, create_project: bool) -> (StandIn, Arc<dyn Sink>) {
    let server = StandIn::start().await;
    let cfg = settings::ImagesSink {
        create_project,
        ..sink_config(&format!("http://{}/op", server.address), dir)
    };
    (server, open(Some(&cfg), dir).unwrap())
}

/// Scripts one answer during a commit, and checks the result of the commit.
async fn commit_gets(
    method: &'static str,
    path: &'static str,
    status: u16,
    body: String,
    code: Code,
    reason: Reason,
    retry: Retry,
) {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    server.script_always(method, path, status, body);
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let fault = sink
        .commit(&incoming("image/a:v1", &made), &made.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason, fault.retry),
        (code, reason, retry),
        "{method} {path} {status}: {fault}"
    );
    let printed = format!("{fault:?}");
    assert!(
        !printed.contains(PASSWORD) && !printed.contains("sekret") && !printed.contains("h.ey"),
        "{printed}"
    );
    assert!(
        made.dir.exists(),
        "staged content is kept for the next attempt"
    );
}

#[tokio::test]
async fn harbor_refusals() {
    let over = "adding 9.5 KiB of storage resource, which when updated to current usage of 1 MiB will exceed the configured upper limit of 1 MiB.";
    let read_only = "The system is in read only mode. Any modification is prohibited.";
    let html = "<html><h1>504 Gateway Time-out</h1></html>";
    let uploads = "/blobs/uploads/";
    commit_gets(
        "PUT",
        uploads,
        403,
        error("DENIED", over),
        Code::NoSpace,
        Reason::NoSpace,
        Retry::Backoff,
    )
    .await;
    commit_gets(
        "POST",
        uploads,
        403,
        error("DENIED", read_only),
        Code::Unreachable,
        Reason::SinkUnavailable,
        Retry::AfterMs(60_000),
    )
    .await;
    commit_gets(
        "POST",
        uploads,
        403,
        error("DENIED", "nothing for you"),
        Code::NotAllowed,
        Reason::SinkDenied,
        Retry::Never,
    )
    .await;
    commit_gets(
        "PUT",
        "/manifests/",
        413,
        html.into(),
        Code::Conflict,
        Reason::SinkRefused,
        Retry::Never,
    )
    .await;
    commit_gets(
        "PUT",
        "/manifests/",
        400,
        error("MANIFEST_INVALID", "no"),
        Code::Conflict,
        Reason::SinkRefused,
        Retry::Never,
    )
    .await;
    commit_gets(
        "PUT",
        "/manifests/",
        400,
        error("MANIFEST_BLOB_UNKNOWN", ""),
        Code::Conflict,
        Reason::SinkUnavailable,
        Retry::Backoff,
    )
    .await;
    commit_gets(
        "PUT",
        "/manifests/",
        504,
        html.into(),
        Code::Unreachable,
        Reason::SinkUnavailable,
        Retry::Backoff,
    )
    .await;
    commit_gets(
        "HEAD",
        "/manifests/",
        500,
        String::new(),
        Code::Unreachable,
        Reason::SinkUnavailable,
        Retry::Backoff,
    )
    .await;
}

#[tokio::test]
async fn a_registry_that_rejects_uploads_is_detected_before_a_transfer() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let made = staged(sink.as_ref(), &[noise(1, 10)], &["amd64"]);
    sink.check(&incoming("image/a:v1", &made)).await.unwrap();
    server.script_always(
        "POST",
        "/blobs/uploads/",
        403,
        error("DENIED", "The system is in read only mode."),
    );
    let fault = sink
        .check(&incoming("image/a:v1", &made))
        .await
        .unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkUnavailable, Retry::AfterMs(60_000)),
        "{fault}"
    );
}

#[tokio::test]
async fn harbor_asks_for_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let slow_down = Scripted::new(
        "POST",
        "/blobs/uploads/",
        429,
        error("TOOMANYREQUESTS", "slow down"),
    );
    server.held.lock().script.push(Scripted {
        headers: vec![("retry-after", "17")],
        times: usize::MAX,
        ..slow_down
    });
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let fault = sink
        .commit(&incoming("image/a:v1", &made), &made.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkUnavailable, Retry::AfterMs(17_000)),
        "{fault}"
    );
}

#[tokio::test]
async fn a_missing_project_is_reported_or_created() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    server.held.lock().projects.clear();
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let one = incoming("image/a:v1", &made);
    let fault = sink.check(&one).await.unwrap_err();
    assert_eq!(
        (fault.code, fault.reason, fault.retry),
        (Code::Config, Reason::SinkDenied, Retry::Never),
        "{fault}"
    );
    assert!(
        fault.message.contains("project \"op\" does not exist")
            && fault.next.contains("create_project"),
        "{fault:?}"
    );

    let cfg = settings::ImagesSink {
        create_project: true,
        ..sink_config(&format!("http://{}/op", server.address), dir.path())
    };
    let sink = open(Some(&cfg), dir.path()).unwrap();
    sink.check(&one).await.unwrap();
    sink.commit(&one, &made.dir).await.unwrap();
    assert!(server.held.lock().projects.contains("op"));
}

#[tokio::test]
async fn wrong_credentials_and_missing_permissions_are_distinguished() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _) = harbor(dir.path(), false).await;
    let cfg = sink_config(&format!("http://{}/op", server.address), dir.path());
    write(&dir.path().join("password"), b"another");
    let sink = open(Some(&cfg), dir.path()).unwrap();
    let made = staged(sink.as_ref(), &[noise(1, 10)], &["amd64"]);
    let fault = sink
        .check(&incoming("image/a:v1", &made))
        .await
        .unwrap_err();
    assert_eq!(fault.reason, Reason::SinkDenied);
    assert!(fault.message.contains("rejects the credentials"), "{fault}");
    // After the file is corrected, no restart is needed.
    write(&dir.path().join("password"), PASSWORD.as_bytes());
    sink.check(&incoming("image/a:v1", &made)).await.unwrap();
}

#[tokio::test]
async fn an_expired_token_is_renewed_once() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let one = incoming("image/a:v1", &made);
    sink.check(&one).await.unwrap();
    server.held.lock().first_good_token = 2;
    sink.commit(&one, &made.dir).await.unwrap();
    assert_eq!(server.held.lock().count("GET", "/service/token"), 2);
    server.held.lock().first_good_token = usize::MAX;
    let fault = sink.check(&one).await.unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkDenied, Retry::Never),
        "{fault}"
    );
}

#[tokio::test]
async fn an_immutable_tag_of_the_same_image_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let one = incoming("image/a:v1", &made);
    let precondition = error(
        "PRECONDITION",
        "Failed to process request due to 'a:v1' configured as immutable.",
    );
    let script = |but_done| Scripted {
        but_done,
        ..Scripted::new("PUT", "/manifests/v1", 412, precondition.clone())
    };
    server.held.lock().script.push(script(true));
    sink.commit(&one, &made.dir).await.unwrap();

    // The tag did not exist when it was checked, and then refers to a different image.
    let other = staged(sink.as_ref(), &[noise(2, 10_000)], &["amd64"]);
    server.script("HEAD", "/manifests/v1", 404, "");
    server.held.lock().script.push(script(false));
    let fault = sink
        .commit(&incoming("image/a:v1", &other), &other.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason, fault.retry),
        (Code::Conflict, Reason::SinkRefused, Retry::Never),
        "{fault}"
    );
}

#[tokio::test]
async fn a_proxy_limit_causes_chunked_uploads() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    server.held.lock().body_bytes_max = Some(3 << 20);
    let made = staged(
        sink.as_ref(),
        &[noise(1, 9 << 20), noise(2, 10 << 20)],
        &["amd64"],
    );
    sink.commit(&incoming("image/a:v1", &made), &made.dir)
        .await
        .unwrap();
    assert!(server.held.lock().count("PATCH", "/blobs/uploads/") >= 8);

    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    server.held.lock().body_bytes_max = Some(100_000);
    let made = staged(sink.as_ref(), &[noise(1, 9 << 20)], &["amd64"]);
    let fault = sink
        .commit(&incoming("image/a:v1", &made), &made.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::SinkRefused, Retry::Never),
        "{fault}"
    );
    assert!(fault.next.contains("client_max_body_size"), "{fault:?}");
}

#[tokio::test]
async fn interrupted_uploads_continue_or_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let commit = async |name: &str, seed| {
        let made = staged(sink.as_ref(), &[noise(seed, 4 << 20)], &["amd64"]);
        let before = server.held.lock().count("POST", "/blobs/uploads/");
        sink.commit(&incoming(name, &made), &made.dir)
            .await
            .unwrap();
        server.held.lock().count("POST", "/blobs/uploads/") - before
    };
    // The gateway timed out, but the registry did not: the blob exists and is not sent again.
    server.held.lock().script.push(Scripted {
        but_done: true,
        ..Scripted::new("PUT", "/blobs/uploads/", 504, "<html>504</html>".into())
    });
    assert_eq!(commit("image/a:v1", 1).await, 2, "one session per blob");
    // The session is gone, so a new one is opened.
    server.script(
        "PUT",
        "/blobs/uploads/",
        404,
        error("BLOB_UPLOAD_UNKNOWN", ""),
    );
    assert_eq!(commit("image/a:v2", 2).await, 3);
    // A blob was removed between its check and the push of the manifest.
    server.script(
        "PUT",
        "/manifests/",
        400,
        error("MANIFEST_BLOB_UNKNOWN", "blob unknown"),
    );
    assert_eq!(commit("image/a:v3", 3).await, 2);
    // In chunks, with a server error between two of them: the session continues.
    server.held.lock().body_bytes_max = Some(2 << 20);
    assert_eq!(
        commit("image/a:v4", 4).await,
        3,
        "one session was used to find the accepted size"
    );
    // The config is sent at the same time; only requests of the layer have this size.
    let second = Scripted {
        skip: 1,
        body_bytes_min: 1 << 20,
        ..Scripted::new("PATCH", "/blobs/uploads/", 500, String::new())
    };
    server.held.lock().script.push(second);
    assert_eq!(commit("image/a:v5", 5).await, 2);
    assert_eq!(
        server.held.lock().count("GET", "/blobs/uploads/"),
        1,
        "the position of the session was requested"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_end_of_the_body_is_read() {
    // Like a proxy that decides by the length: it answers, closes, and reads nothing more.
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match socket.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let answer = match head.split(|b| *b == b' ').next().unwrap_or_default() {
                    b"GET" => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}".to_owned(),
                    b"HEAD" => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned(),
                    b"POST" => "HTTP/1.1 202 Accepted\r\nlocation: /v2/up\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned(),
                    _ => {
                        let body = error("DENIED", "it will exceed the configured upper limit of 1 MiB");
                        format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
                    }
                };
                let _ = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let sink = open(
        Some(&sink_config(&format!("http://{address}/op"), dir.path())),
        dir.path(),
    )
    .unwrap();
    let made = staged(
        sink.as_ref(),
        &[noise(1, 20 << 20), noise(2, 1 << 20), noise(3, 100)],
        &["amd64"],
    );
    for _ in 0..20 {
        let fault = sink
            .commit(&incoming("image/a:v1", &made), &made.dir)
            .await
            .unwrap_err();
        assert_eq!(fault.reason, Reason::NoSpace, "{fault}");
    }
}

#[tokio::test]
async fn a_blob_of_another_image_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    sink.commit(&incoming("image/a:v1", &made), &made.dir)
        .await
        .unwrap();
    let again = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let path = blob_path(&again.layers[0]);
    let file = file_info(&again.dir.join(path.as_str()));
    let other = incoming("image/b:v1", &again);
    assert!(sink.holds(&other, &path, &file).await.unwrap());
    std::fs::remove_file(again.dir.join(path.as_str())).unwrap();
    let landed = sink.commit(&other, &again.dir).await.unwrap();
    assert_eq!(
        landed.place,
        StorageLocation::Registry {
            repository: "op/b".into()
        }
    );
    assert_eq!(
        server
            .held
            .lock()
            .blobs
            .keys()
            .filter(|(_, digest)| *digest == again.layers[0].to_string())
            .count(),
        2
    );
}

/// The file of a blob in the storage of docker-registry.
fn stored(server: &RealRegistry, digest: &Sha256) -> PathBuf {
    let hex = digest.hex();
    server
        .dir
        .path()
        .join("data/docker/registry/v2/blobs/sha256")
        .join(&hex[..2])
        .join(&hex)
        .join("data")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_a_registry_is_found_and_replaced() {
    let server = RealRegistry::start(&Access::Basic);
    let dir = server.dir.path();
    let sink = open(Some(&sink_config(&server.url("op"), dir)), dir).unwrap();
    let layers = [noise(1, 3_000_000), noise(2, 1000)];
    let made = staged(sink.as_ref(), &layers, &["amd64"]);
    let one = incoming("image/a:v1", &made);
    let landed = sink.commit(&one, &made.dir).await.unwrap();
    let read = Arc::new(AtomicUsize::new(0));
    let counted = read.clone();
    let look = Verification::new(false, move |bytes| {
        counted.fetch_add(bytes as usize, Ordering::Relaxed);
    });
    assert_eq!(
        sink.verify(&one, &landed.place, &look).await.unwrap(),
        Vec::<String>::new()
    );
    assert!(
        read.load(Ordering::Relaxed) > 3_001_000,
        "every blob was read"
    );

    let damaged = made.layers[0];
    let file = stored(&server, &damaged);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1_500_000] ^= 1;
    write(&file, &bytes);
    let found = sink
        .verify(&one, &landed.place, &Verification::default())
        .await
        .unwrap();
    assert!(
        found.len() == 1 && found[0].contains(&damaged.to_string()) && found[0].contains("damaged"),
        "{found:?}"
    );
    let quick = Verification::new(true, |_| unreachable!("a quick look reads no blob"));
    assert_eq!(
        sink.verify(&one, &landed.place, &quick).await.unwrap(),
        Vec::<String>::new()
    );
    assert!(
        quick
            .take_notes()
            .iter()
            .any(|note| note.contains("no blob was read"))
    );

    // The blob is fetched and sent again. This registry keeps its old bytes, so the blob does not
    // count as replaced.
    let again = staged(sink.as_ref(), &layers, &["amd64"]);
    let path = blob_path(&damaged);
    assert!(
        !sink
            .holds(&one, &path, &file_info(&again.dir.join(path.as_str())))
            .await
            .unwrap(),
        "a damaged blob does not count as present"
    );
    let fault = sink.commit(&one, &again.dir).await.unwrap_err();
    assert_eq!(
        (fault.code, fault.retry),
        (Code::Integrity, Retry::Never),
        "{fault}"
    );
    assert!(
        fault.message.contains(&damaged.to_string()) && fault.next.contains("garbage collection"),
        "{fault:?}"
    );
    // A restarted daemon has no record of the damage, and detects it again.
    let other = open(Some(&sink_config(&server.url("op"), dir)), dir).unwrap();
    assert_eq!(
        other.commit(&one, &again.dir).await.unwrap_err().code,
        Code::Integrity
    );
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    sink.commit(&one, &again.dir).await.unwrap();
    assert_eq!(
        sink.verify(&one, &landed.place, &Verification::default())
            .await
            .unwrap(),
        Vec::<String>::new()
    );
}

const POLICY: &str =
    "current image without vulnerability scanning cannot be pulled due to configured policy";

#[tokio::test]
async fn an_image_that_a_policy_blocks_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    server.script_always("HEAD", "/manifests/", 412, "");
    server.script_always(
        "GET",
        "/manifests/",
        412,
        error("PROJECTPOLICYVIOLATION", POLICY),
    );
    let made = staged(sink.as_ref(), &[noise(1, 10_000)], &["amd64"]);
    let one = incoming("image/a:v1", &made);
    sink.check(&one).await.unwrap();
    let landed = sink.commit(&one, &made.dir).await.unwrap();
    assert!(landed.note.is_some_and(|note| note.contains("policy")));
    let top = server
        .held
        .lock()
        .manifests
        .get(&("op/a".to_owned(), "v1".to_owned()))
        .cloned()
        .unwrap();
    assert_eq!(Sha256::of(&top).to_string(), made.info.digest);
    // A repeated commit and all later requests: the image is not lost.
    sink.commit(&one, &made.dir).await.unwrap();
    assert!(sink.exists_at_target(&one).await.unwrap());
    let look = Verification::default();
    assert_eq!(
        sink.verify(&one, &landed.place, &look).await.unwrap(),
        Vec::<String>::new()
    );
    assert!(
        look.take_unread()
            .is_some_and(|why| why.contains("no blob could be read"))
    );

    // The tag is also immutable, and the registry does not report its image.
    let other = staged(sink.as_ref(), &[noise(2, 10_000)], &["amd64"]);
    server.script(
        "PUT",
        "/manifests/v1",
        412,
        error(
            "PRECONDITION",
            "Failed to process request due to 'a:v1' configured as immutable.",
        ),
    );
    let fault = sink
        .commit(&incoming("image/a:v1", &other), &other.dir)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Conflict, Reason::SinkRefused),
        "{fault}"
    );
    assert!(!format!("{fault:?}").contains("remove"), "{fault:?}");
    // The registry does not have our image under any name, so the tag refers to a different image,
    // which is not overwritten.
    let (strange, strange_sink) = harbor(dir.path(), false).await;
    strange.script_always("HEAD", "/manifests/v1", 412, "");
    for fault in [
        strange_sink.check(&one).await.unwrap_err(),
        strange_sink.commit(&one, &other.dir).await.unwrap_err(),
    ] {
        assert_eq!(
            (fault.code, fault.reason),
            (Code::Conflict, Reason::SinkRefused),
            "{fault}"
        );
    }
    assert_eq!(strange.held.lock().count("PUT", "/manifests/"), 0);
    // Harbor's own API reports it.
    let theirs = format!(r#"{{"digest":"{}"}}"#, made.info.digest);
    server.script_always(
        "GET",
        "/projects/op/repositories/a/artifacts/v1",
        200,
        theirs,
    );
    let fault = sink
        .check(&incoming("image/a:v1", &other))
        .await
        .unwrap_err();
    assert!(fault.message.contains(&made.info.digest), "{fault}");
    sink.check(&one).await.unwrap();
}

#[tokio::test]
async fn a_short_pause_is_respected_and_nothing_is_sent_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (server, sink) = harbor(dir.path(), false).await;
    for (method, path) in [
        ("POST", "/blobs/uploads/"),
        ("HEAD", "/blobs/"),
        ("PUT", "/manifests/"),
        ("HEAD", "/manifests/"),
    ] {
        let pause = Scripted::new(method, path, 429, error("TOOMANYREQUESTS", "slow down"));
        server.held.lock().script.push(Scripted {
            headers: vec![("retry-after", "0")],
            skip: 1,
            ..pause
        });
    }
    let made = staged(
        sink.as_ref(),
        &[noise(1, 10_000), noise(2, 10_000)],
        &["amd64"],
    );
    let one = incoming("image/a:v1", &made);
    sink.commit(&one, &made.dir).await.unwrap();
    assert_eq!(
        server.held.lock().count("PUT", "/blobs/uploads/"),
        3,
        "two layers and the configuration, once each"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_respond_is_reported() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(); // accepts connections and never answers
    let dir = tempfile::tempdir().unwrap();
    let sink = open(
        Some(&sink_config(
            &format!("http://{}/op", listener.local_addr().unwrap()),
            dir.path(),
        )),
        dir.path(),
    )
    .unwrap();
    let made = staged(sink.as_ref(), &[noise(1, 1000)], &["amd64"]);
    let one = incoming("image/a:v1", &made);
    let mut waits = one.waits.subscribe();
    let commit = tokio::spawn(async move { sink.commit(&one, &made.dir).await });
    let report = tokio::time::timeout(
        std::time::Duration::from_secs(20),
        waits.wait_for(Option::is_some),
    )
    .await
    .unwrap()
    .unwrap()
    .clone();
    assert_eq!(
        report.map(|fault| fault.reason),
        Some(Reason::SinkUnavailable)
    );
    commit.abort();
}

fn named(reference: &str, image: &Image, repository: &str, tag: &str) -> Incoming {
    let mut incoming = incoming(reference, image);
    if let KindInfo::Image(info) = &mut incoming.root.info {
        (info.repository, info.tag) = (Some(repository.to_owned()), Some(tag.to_owned()));
    }
    incoming
}

/// An image with a repository and a tag of its own, in both sinks.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_has_the_name_that_its_artifact_states() {
    let dir = tempfile::tempdir().unwrap();
    let server = RealRegistry::start(&Access::Open);
    let registry = open(
        Some(&sink_config(&server.url("operators"), dir.path())),
        dir.path(),
    )
    .unwrap();
    let layout = open(None, dir.path()).unwrap();
    for (sink, location) in [
        (
            &registry,
            format!("{}/operators/ops/team/trainer:V1.2_A@", server.address),
        ),
        (
            &layout,
            format!(
                "oci:{}:V1.2_A@",
                dir.path().join("images/ops/team/trainer").display()
            ),
        ),
    ] {
        let sink = sink.as_ref();
        let image = staged(sink, &[noise(40, 1000)], &["amd64"]);
        let incoming = named("image/trainer:v1", &image, "ops/team/trainer", "V1.2_A");
        sink.check(&incoming).await.unwrap();
        let landed = sink.commit(&incoming, &image.dir).await.unwrap();
        assert_eq!(landed.location, format!("{location}{}", image.info.digest));
        assert!(sink.exists_at_target(&incoming).await.unwrap());
        let found = sink
            .verify(&incoming, &landed.place, &Verification::default())
            .await
            .unwrap();
        assert_eq!(found, Vec::<String>::new());

        // The name of a layout above it is another image.
        let above = staged(sink, &[noise(41, 1000)], &["amd64"]);
        let above_incoming = named("image/ops:v1", &above, "ops", "v1");
        sink.check(&above_incoming).await.unwrap();
        sink.commit(&above_incoming, &above.dir).await.unwrap();
        sink.remove(&above_incoming.artifact, Some(&above_incoming.root.info))
            .await
            .unwrap();
        let found = sink
            .verify(&incoming, &landed.place, &Verification::default())
            .await
            .unwrap();
        assert_eq!(found, Vec::<String>::new(), "it is not removed with it");
        sink.remove(&incoming.artifact, Some(&incoming.root.info))
            .await
            .unwrap();
        assert!(!sink.exists_at_target(&incoming).await.unwrap());

        // A peer cannot leave the directory or the project.
        let hostile = [
            ("../../etc", "v1"),
            ("/etc", "v1"),
            ("ops//x", "v1"),
            ("Ops", "v1"),
            ("ops", "../v1"),
            ("ops", ""),
        ];
        for (repository, tag) in hostile {
            let incoming = named("image/x:v1", &image, repository, tag);
            let fault = sink.check(&incoming).await.unwrap_err();
            assert_eq!(fault.code, Code::Integrity, "{repository} {tag}: {fault}");
        }
    }
    assert!(
        !dir.path().join("images/ops").exists(),
        "empty directories go"
    );
    let image = staged(layout.as_ref(), &[noise(42, 1000)], &["amd64"]);
    for repository in ["ops/blobs", "ops/index.json", "ops/by-version/x"] {
        let incoming = named("image/x:v1", &image, repository, "v1");
        let fault = layout.check(&incoming).await.unwrap_err();
        assert_eq!(fault.code, Code::Conflict, "{repository}: {fault}");
    }
}

/// An image with the media types of Docker, read by the skopeo of this machine.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_docker_in_a_layout_is_read_by_skopeo() {
    let dir = tempfile::tempdir().unwrap();
    let sink = open(None, dir.path()).unwrap();
    for reference in ["image/dk:v1", "image/dk:v2"] {
        let source = dir.path().join("source");
        image(&source, &[tar_layer("a", reference.as_bytes())], &["amd64"]);
        let docker = dir.path().join("docker");
        skopeo(&[
            "copy",
            "-q",
            "--format",
            "v2s2",
            &format!("oci:{}", source.display()),
            &format!("dir:{}", docker.display()),
        ]);
        let manifest = std::fs::read(docker.join("manifest.json")).unwrap();
        let made = sink.staging_root().join("docker");
        std::fs::create_dir_all(made.join("blobs/sha256")).unwrap();
        for entry in std::fs::read_dir(&docker).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if name.len() == 64 {
                std::fs::copy(entry.path(), made.join("blobs/sha256").join(name)).unwrap();
            }
        }
        let digest = Sha256::of(&manifest);
        write(&made.join(digest.layout_path()), &manifest);
        let image = Image {
            dir: made.clone(),
            info: Info {
                media_type: "application/vnd.docker.distribution.manifest.v2+json".into(),
                digest: digest.to_string(),
                size: manifest.len() as u64,
                platforms: vec!["linux/amd64".into()],
            },
            layers: Vec::new(),
        };
        let landed = sink
            .commit(&incoming(reference, &image), &made)
            .await
            .unwrap();
        let note = landed.note.unwrap();
        let at = note
            .split("skopeo copy ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap();
        let raw = skopeo(&["inspect", "--raw", at]);
        assert_eq!(Sha256::of(raw.as_bytes()), digest);
        skopeo(&[
            "copy",
            "-q",
            at,
            &format!("dir:{}", dir.path().join("out").display()),
        ]);
        for folder in [&source, &docker] {
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
}
