//! The client against real registries, and helpers shared with the tests of sinks.

mod referrers;
mod uploads;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::testing::fixture::{
    Access, PASSWORD, RealRegistry, TokenService, USER, image, noise, tar_layer, write,
};
use crate::testing::{fixture, standin};

use crate::image::Sha256;
use crate::{
    Credentials, LocalBlob, Origin, Reference, Registry, Selection, pull_keeping, pull_to_layout,
};
use base::fault::{Code, Reason};

fn origin(address: &str) -> Origin {
    Origin {
        https: false,
        authority: address.into(),
    }
}

/// All platforms, without what refers to the image.
const ALL: Selection<'static> = Selection {
    platforms: &[],
    referrers: false,
};

fn credentials() -> Option<Credentials> {
    Some(Credentials::new(USER, PASSWORD))
}

fn local(dir: &std::path::Path, seed: u64, len: usize) -> LocalBlob {
    let bytes = noise(seed, len);
    let file = dir.join(format!("blob{seed}"));
    write(&file, &bytes);
    LocalBlob {
        digest: Sha256::of(&bytes),
        size: len as u64,
        file,
    }
}

async fn round_trip(registry: &Registry, dir: &std::path::Path) {
    let blob = local(dir, 1, 3_000_000);
    assert!(registry.push_blob("op/a", &blob).await.unwrap(), "sent");
    assert!(
        !registry.push_blob("op/a", &blob).await.unwrap(),
        "not sent twice"
    );
    assert_eq!(
        registry.blob_size("op/a", &blob.digest).await.unwrap(),
        Some(blob.size)
    );
    assert_eq!(
        registry
            .blob_range("op/a", &blob.digest, 1_000_000, 1000)
            .await
            .unwrap(),
        noise(1, 1_001_000)[1_000_000..]
    );
    assert!(
        registry
            .blob_range("op/a", &blob.digest, 2_999_990, 20)
            .await
            .is_err(),
        "short reads are errors"
    );
    assert!(registry.mount("op/b", &blob.digest, "op/a").await.unwrap());
    assert!(
        !registry
            .mount("op/b", &Sha256::of(b"unknown"), "op/a")
            .await
            .unwrap()
    );
    assert_eq!(
        registry.blob_size("op/b", &blob.digest).await.unwrap(),
        Some(blob.size)
    );

    let wrong = LocalBlob {
        digest: Sha256::of(b"other"),
        ..local(dir, 2, 1000)
    };
    assert_eq!(
        registry.push_blob("op/a", &wrong).await.unwrap_err().code,
        Code::Integrity
    );
    let wrong_blob = LocalBlob {
        size: 999,
        ..local(dir, 3, 1000)
    };
    assert_eq!(
        registry
            .push_blob("op/a", &wrong_blob)
            .await
            .unwrap_err()
            .code,
        Code::Integrity
    );
    let empty = local(dir, 4, 0);
    assert!(registry.push_blob("op/a", &empty).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_with_a_password() {
    let server = RealRegistry::start(&Access::Basic);
    round_trip(
        &Registry::new(origin(&server.address), credentials(), None).unwrap(),
        server.dir.path(),
    )
    .await;
    let wrong = Registry::new(
        origin(&server.address),
        Some(Credentials::new(USER, "wrong-pw")),
        None,
    )
    .unwrap();
    let fault = wrong.ping().await.unwrap_err().fault("ping");
    assert_eq!(
        (fault.code, fault.reason),
        (Code::NotAllowed, Reason::SinkDenied)
    );
    assert!(!format!("{fault:?}").contains("wrong-pw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_with_tokens_and_in_chunks() {
    let service = TokenService::start().await;
    let server = RealRegistry::start(&Access::Bearer(service.clone()));
    // The token service uses another port, which is not configured yet, so it gets no password.
    let fault = Registry::new(origin(&server.address), credentials(), None)
        .unwrap()
        .ping()
        .await
        .unwrap_err()
        .fault("ping");
    assert_eq!(
        (fault.code, service.asked.load(Ordering::Relaxed)),
        (Code::NotAllowed, 0),
        "{fault}"
    );
    assert!(
        fault.next.contains("realm_hosts") && fault.next.contains(service.address()),
        "{fault:?}"
    );
    let credentials = || credentials().map(|c| c.with_realm_hosts(&[service.address().to_owned()]));
    let registry = Registry::new(origin(&server.address), credentials(), None)
        .unwrap()
        .with_chunk_bytes(1 << 20);
    round_trip(&registry, server.dir.path()).await;
    let asked = service.asked.load(Ordering::Relaxed);
    assert!(asked <= 8, "tokens are kept: {asked} were requested");

    service.grant_nothing.store(true, Ordering::Relaxed);
    let denied = Registry::new(origin(&server.address), credentials(), None).unwrap();
    let fault = denied
        .push_blob("op/a", &local(server.dir.path(), 9, 10))
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::NotAllowed, Reason::SinkDenied)
    );
    assert!(
        fault.message.contains("does not grant pull,push on op/a"),
        "{fault}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_faults_state_their_cause() {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let server = RealRegistry::start(&Access::Tls {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    });
    let at = |https| Origin {
        https,
        authority: server.address.clone(),
    };
    let ca = server.dir.path().join("tls.pem");

    Registry::new(at(true), None, Some(&ca))
        .unwrap()
        .ping()
        .await
        .unwrap();
    let fault = Registry::new(at(true), None, None)
        .unwrap()
        .ping()
        .await
        .unwrap_err()
        .fault("ping");
    assert_eq!(fault.reason, Reason::SinkUnavailable);
    assert!(
        fault.message.contains("TLS") && fault.next.contains("ca_file"),
        "{fault:?}"
    );
    let fault = Registry::new(at(false), None, None)
        .unwrap()
        .ping()
        .await
        .unwrap_err()
        .fault("ping");
    assert!(fault.next.contains("https://"), "{fault:?}");
    let plain = RealRegistry::start(&Access::Open);
    let https = Origin {
        https: true,
        authority: plain.address.clone(),
    };
    let fault = Registry::new(https, None, None)
        .unwrap()
        .ping()
        .await
        .unwrap_err()
        .fault("ping");
    assert!(fault.next.contains("http://"), "{fault:?}");
    write(&ca, b"nonsense");
    assert_eq!(
        Registry::new(at(true), None, Some(&ca)).err().unwrap().code,
        Code::Config
    );
}

#[tokio::test]
async fn a_missing_registry_is_unreachable() {
    let address = format!("127.0.0.1:{}", base::testing::free_port());
    let fault = Registry::new(origin(&address), None, None)
        .unwrap()
        .ping()
        .await
        .unwrap_err()
        .fault("ping");
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Unreachable, Reason::SinkUnavailable)
    );
    assert!(fault.message.contains("connection refused"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_what_skopeo_pushed() {
    let server = RealRegistry::start(&Access::Basic);
    let dir = server.dir.path().join("work");
    let layers = [
        tar_layer("图像.txt", &noise(5, 500_000)),
        tar_layer("b", b"b"),
    ];
    let made = image(&dir.join("made"), &layers, &["amd64", "arm64"]);
    let copied = std::process::Command::new("skopeo")
        .args([
            "copy",
            "-q",
            "--all",
            "--dest-tls-verify=false",
            "--dest-creds",
            &format!("{USER}:{PASSWORD}"),
        ])
        .arg(format!("oci:{}", made.dir.display()))
        .arg(format!("docker://{}/op/seg:v1", server.address))
        .status();
    assert!(
        copied
            .expect("skopeo is missing: run scripts/test, or apt-get install skopeo")
            .success()
    );

    let reference: Reference = format!("{}/op/seg:v1", server.address).parse().unwrap();
    let got = dir.join("got");
    pull_to_layout(
        &reference,
        credentials().into(),
        &ALL,
        &got,
        &AtomicU64::default(),
    )
    .await
    .unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(got.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    let top: Sha256 = index["manifests"][0]["digest"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    for entry in std::fs::read_dir(got.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(
            Sha256::of(&std::fs::read(&path).unwrap()).hex(),
            path.file_name().unwrap().to_str().unwrap()
        );
    }
    let by_digest: Reference = format!("{}/op/seg@{top}", server.address).parse().unwrap();
    pull_to_layout(
        &by_digest,
        credentials().into(),
        &ALL,
        &dir.join("again"),
        &AtomicU64::default(),
    )
    .await
    .unwrap();

    let absent: Reference = format!("{}/op/seg:v9", server.address).parse().unwrap();
    let fault = pull_to_layout(
        &absent,
        credentials().into(),
        &ALL,
        &dir.join("no"),
        &AtomicU64::default(),
    )
    .await
    .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::NotFound, Reason::SourceGone)
    );
    let fault = pull_to_layout(
        &reference,
        None.into(),
        &ALL,
        &dir.join("no"),
        &AtomicU64::default(),
    )
    .await
    .unwrap_err();
    assert_eq!(fault.code, Code::NotAllowed);
}

#[tokio::test]
async fn a_pull_skips_absent_platforms_and_detects_wrong_bytes() {
    let server = standin::StandIn::start().await;
    let dir = tempfile::tempdir().unwrap();
    let made = image(
        &dir.path().join("made"),
        &[noise(6, 100_000)],
        &["amd64", "arm64"],
    );
    let mut arm = None;
    {
        let mut held = server.held.lock();
        for entry in std::fs::read_dir(made.dir.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let bytes: bytes::Bytes = std::fs::read(&path).unwrap().into();
            let digest = Sha256::of(&bytes).to_string();
            if String::from_utf8_lossy(&bytes).contains("\"layers\": [") {
                arm = Some(digest.clone());
                held.manifests
                    .insert(("op/a".into(), digest.clone()), bytes.clone());
            }
            if digest == made.info.digest {
                held.manifests
                    .insert(("op/a".into(), "v1".into()), bytes.clone());
            }
            held.blobs.insert(("op/a".into(), digest), bytes);
        }
        held.manifests
            .remove(&("op/a".to_owned(), arm.clone().unwrap()));
    }
    server.held.lock().cuts = 3;
    let reference: Reference = format!("{}/op/a:v1", server.address).parse().unwrap();
    let got = dir.path().join("got");
    pull_to_layout(
        &reference,
        credentials().into(),
        &ALL,
        &got,
        &AtomicU64::default(),
    )
    .await
    .unwrap();
    assert_eq!(server.held.lock().cuts, 0, "interrupted blobs continued");
    assert!(
        !got.join(arm.unwrap().parse::<Sha256>().unwrap().layout_path())
            .exists()
    );
    assert!(got.join(made.layers[0].layout_path()).exists());

    let key = ("op/a".to_owned(), made.layers[0].to_string());
    server
        .held
        .lock()
        .blobs
        .insert(key, noise(7, 100_000).into());
    let fault = pull_to_layout(
        &reference,
        credentials().into(),
        &ALL,
        &dir.path().join("bad"),
        &AtomicU64::default(),
    )
    .await
    .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Integrity, Reason::Integrity)
    );
}

/// Stores an image in the stand-in as `op/a:v1`.
fn held_by(server: &standin::StandIn, made: &fixture::Image) {
    let mut held = server.held.lock();
    for entry in std::fs::read_dir(made.dir.join("blobs/sha256")).unwrap() {
        let bytes: bytes::Bytes = std::fs::read(entry.unwrap().path()).unwrap().into();
        let digest = Sha256::of(&bytes).to_string();
        if bytes.starts_with(b"{") {
            held.manifests
                .insert(("op/a".into(), digest.clone()), bytes.clone());
        }
        if digest == made.info.digest {
            held.manifests
                .insert(("op/a".into(), "v1".into()), bytes.clone());
        }
        held.blobs.insert(("op/a".into(), digest), bytes);
    }
}

#[tokio::test]
async fn a_pull_waits_if_the_registry_asks_for_a_pause() {
    let server = standin::StandIn::start().await;
    let dir = tempfile::tempdir().unwrap();
    let made = image(
        &dir.path().join("made"),
        &[noise(6, 100_000), noise(7, 100_000)],
        &["amd64"],
    );
    held_by(&server, &made);
    for (path, status) in [
        ("/v2/", 503),
        ("/v2/", 429),
        ("/manifests/v1", 429),
        ("/blobs/", 429),
        ("/blobs/", 503),
        ("/blobs/", 429),
    ] {
        let pause = standin::Scripted::new(
            "GET",
            path,
            status,
            standin::error("TOOMANYREQUESTS", "slow down"),
        );
        server.held.lock().script.push(standin::Scripted {
            headers: vec![("retry-after", "0")],
            ..pause
        });
    }
    server.script("GET", "/blobs/", 503, ""); // and no word of how long
    let reference: Reference = format!("{}/op/a:v1", server.address).parse().unwrap();
    let got = dir.path().join("got");
    pull_to_layout(
        &reference,
        credentials().into(),
        &ALL,
        &got,
        &AtomicU64::default(),
    )
    .await
    .unwrap();
    assert!(
        server
            .held
            .lock()
            .script
            .iter()
            .all(|scripted| scripted.times == 0),
        "every scripted pause was used"
    );
    assert!(got.join(made.layers[1].layout_path()).exists());
}

#[tokio::test]
async fn content_of_a_failed_pull_is_not_fetched_again() {
    let server = standin::StandIn::start().await;
    let dir = tempfile::tempdir().unwrap();
    let made = image(
        &dir.path().join("made"),
        &[
            noise(6, 100_000),
            noise(7, 100_000),
            noise(8, 100_000),
            noise(9, 100_000),
        ],
        &["amd64"],
    );
    held_by(&server, &made);
    let kept = dir.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    let reference: Reference = format!("{}/op/a:v1", server.address).parse().unwrap();
    let pull = async |to: &str| {
        pull_keeping(
            &reference,
            credentials().into(),
            &ALL,
            &dir.path().join(to),
            &kept,
            &AtomicU64::default(),
        )
        .await
    };

    let last = Box::leak(format!("/blobs/{}", made.layers[3]).into_boxed_str());
    server.held.lock().cuts = 1;
    server.script_always("GET", last, 403, standin::error("DENIED", "not now"));
    let fault = pull("first").await.unwrap_err();
    assert!(
        fault.message.contains(&made.layers[3].to_string()),
        "{fault}"
    );
    let whole = || {
        made.layers
            .iter()
            .filter(|layer| kept.join(layer.hex()).exists())
            .count()
    };
    let (before, had) = (server.held.lock().count("GET", "/blobs/"), whole());
    server.held.lock().script.clear();
    pull("second").await.unwrap();
    let blobs = made.layers.len() + 1;
    let fetched = server.held.lock().count("GET", "/blobs/") - before;
    // Not more than what is not kept; fewer if the config or the beginning of a layer, which may be
    // all of it, were kept too. The refused layer is always fetched.
    assert!(
        had > 0 && (1..=blobs - had).contains(&fetched),
        "{fetched} of {blobs} fetched, {had} layers were kept"
    );

    // The beginning of a blob is kept too, and used only if it matches.
    for (beginning, name) in [
        (noise(6, 60_000), "third"),
        (noise(1, 60_000), "fourth"),
        (noise(1, 200_000), "fifth"),
    ] {
        std::fs::remove_file(kept.join(made.layers[0].hex())).unwrap();
        write(
            &kept.join(format!("{}.part", made.layers[0].hex())),
            &beginning,
        );
        pull(name).await.unwrap();
        assert_eq!(
            Sha256::of(
                &std::fs::read(dir.path().join(name).join(made.layers[0].layout_path())).unwrap()
            ),
            made.layers[0]
        );
    }
}

#[tokio::test]
async fn a_pull_that_does_not_fit_writes_no_byte() {
    let server = standin::StandIn::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (noise(1, 1000), 1u64 << 50);
    let blob = |digest: Sha256, size: u64| serde_json::json!({"mediaType": "x", "digest": digest, "size": size});
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(Sha256::of(&small), 1000),
        "layers": [blob(Sha256::of(b"large"), large)],
    });
    let manifest = bytes::Bytes::from(manifest.to_string());
    {
        let mut held = server.held.lock();
        let digest = Sha256::of(&manifest).to_string();
        held.manifests
            .insert(("op/a".into(), "v1".into()), manifest.clone());
        held.manifests.insert(("op/a".into(), digest), manifest);
        held.blobs.insert(
            ("op/a".into(), Sha256::of(&small).to_string()),
            small.into(),
        );
    }
    let reference: Reference = format!("{}/op/a:v1", server.address).parse().unwrap();
    let (got, wanted) = (dir.path().join("got"), AtomicU64::default());
    let fault = pull_to_layout(&reference, credentials().into(), &ALL, &got, &wanted)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::NoSpace, Reason::NoSpace),
        "{fault:?}"
    );
    assert!(
        fault.message.contains(got.to_str().unwrap()),
        "the message names the disk: {fault:?}"
    );
    assert!(
        wanted.load(Ordering::Relaxed) >= 2 * large,
        "the image and its largest layer once more"
    );
    assert_eq!(
        std::fs::read_dir(got.join("blobs/sha256")).unwrap().count(),
        0,
        "nothing is written if the image does not fit"
    );
}
