//! Uploads to registries that give them another address, or accept only some forms of them.

use super::{credentials, local, origin};
use crate::image::Sha256;
use crate::testing::fixture::{Access, PASSWORD, RealRegistry, USER, write};
use crate::testing::standin::{Scripted, StandIn, error};
use crate::{Origin, Registry, Settings};
use base::fault::{Code, Reason};

async fn pushed(address: &str, seed: u64) -> Result<bool, base::fault::Fault> {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::new(origin(address), credentials(), None).unwrap();
    registry
        .push_blob("op/a", &local(dir.path(), seed, 300_000))
        .await
}

fn blob_bytes(server: &StandIn, seed: u64) -> Option<bytes::Bytes> {
    let digest = Sha256::of(&crate::testing::fixture::noise(seed, 300_000)).to_string();
    server
        .held
        .lock()
        .blobs
        .get(&("op/a".to_owned(), digest))
        .cloned()
}

/// docker-registry with `http.host` names its uploads by that host, and wants credentials there.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_under_another_name_of_the_registry_go_to_its_configured_name() {
    let server = RealRegistry::start_as(&Access::Basic, Some("localhost"));
    super::round_trip(
        &Registry::new(origin(&server.address), credentials(), None).unwrap(),
        server.dir.path(),
    )
    .await;
    let chunked = Registry::new(origin(&server.address), credentials(), None)
        .unwrap()
        .with_chunk_bytes(100_000);
    let blob = local(server.dir.path(), 9, 300_000);
    assert!(chunked.push_blob("op/a", &blob).await.unwrap());
}

/// Another host that wants credentials does not get them, and the message names it.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_gets_no_credentials() {
    let (server, other) = (StandIn::start().await, StandIn::start().await);
    let location = format!("http://{}/v2/op/a/blobs/uploads/x", other.address);
    server.held.lock().script.push(Scripted {
        headers: vec![("location", Box::leak(location.into_boxed_str()))],
        times: usize::MAX,
        ..Scripted::new("POST", "/blobs/uploads/", 202, String::new())
    });
    let fault = pushed(&server.address, 1).await.unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Config, Reason::SinkDenied)
    );
    assert!(
        fault
            .message
            .contains(&format!("sends uploads to {}", other.address)),
        "{fault:?}"
    );
    assert!(
        fault.next.contains("external_url") && fault.next.contains("sink.images.url"),
        "{fault:?}"
    );
    let held = other.held.lock();
    assert!(held.count("PUT", "/blobs/uploads/x") > 0, "{:?}", held.log);
    assert_eq!(held.authorized, 0, "no credentials were sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_takes_only_chunks_gets_chunks() {
    for (status, code) in [
        (400, "UNSUPPORTED"),
        (405, "UNSUPPORTED"),
        (416, "UNSUPPORTED"),
        (501, "UNSUPPORTED"),
        (415, ""),
    ] {
        let server = StandIn::start().await;
        server.held.lock().script.push(Scripted {
            times: usize::MAX,
            body_bytes_min: 1,
            ..Scripted::new(
                "PUT",
                "/blobs/uploads/",
                status,
                error(code, "monolithic upload is not supported"),
            )
        });
        assert!(pushed(&server.address, 2).await.unwrap(), "{status}");
        assert_eq!(blob_bytes(&server, 2).unwrap().len(), 300_000);
        assert_eq!(server.held.lock().count("PATCH", "/uploads/"), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_chunks_too_is_an_error() {
    let server = StandIn::start().await;
    for method in ["PUT", "PATCH"] {
        server.held.lock().script.push(Scripted {
            times: usize::MAX,
            body_bytes_min: 1,
            ..Scripted::new(method, "/blobs/uploads/", 400, error("UNSUPPORTED", "no"))
        });
    }
    let fault = pushed(&server.address, 3).await.unwrap_err();
    assert_eq!(fault.code, Code::Conflict);
    assert_eq!(server.held.lock().count("PATCH", "/uploads/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_not_smaller_than_the_registry_wants() {
    let server = StandIn::start().await;
    server.held.lock().chunk_bytes_min = Some(200_000);
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::new(origin(&server.address), credentials(), None)
        .unwrap()
        .with_chunk_bytes(50_000);
    let blob = local(dir.path(), 4, 300_000);
    assert!(registry.push_blob("op/a", &blob).await.unwrap());
    assert_eq!(server.held.lock().count("PATCH", "/uploads/"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirected_upload_is_sent_to_its_target() {
    let server = StandIn::start().await;
    server.held.lock().script.push(Scripted {
        headers: vec![(
            "location",
            "/v2/op/a/blobs/uploads/s1?digest=sha256:4e5e8d8b4a4f2bd4d1d9f3d1d2dbb4f4c0d2c7a94c8fd5a3a2a9ef3f5d8e0b1a",
        )],
        body_bytes_min: 1,
        ..Scripted::new("PUT", "/blobs/uploads/s1", 307, String::new())
    });
    // The target compares the digest of the redirect, which is wrong: the bytes arrived there.
    let fault = pushed(&server.address, 5).await.unwrap_err();
    assert_eq!(fault.code, Code::Integrity, "{fault:?}");
    assert_eq!(server.held.lock().count("PUT", "/blobs/uploads/s1"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_the_size_of_requests_is_not_one_of_manifests() {
    let server = StandIn::start().await;
    server.held.lock().script.push(Scripted {
        times: usize::MAX,
        body_bytes_min: 1,
        ..Scripted::new(
            "PUT",
            "/blobs/uploads/",
            413,
            error("SIZE_INVALID", "request entity too large"),
        )
    });
    let fault = pushed(&server.address, 6).await.unwrap_err();
    assert!(
        fault.next.contains("client_max_body_size") && !fault.next.contains("manifest"),
        "{fault:?}"
    );
}

/// A login page answers 200 to every request.
#[tokio::test(flavor = "multi_thread")]
async fn a_login_page_is_not_an_image() {
    let server = StandIn::start().await;
    for method in ["GET", "HEAD"] {
        server.held.lock().script.push(Scripted {
            headers: vec![("content-type", "text/html; charset=utf-8")],
            times: usize::MAX,
            ..Scripted::new(
                method,
                "/",
                200,
                "<!doctype html><title>Sign in</title>".into(),
            )
        });
    }
    let registry = Registry::new(origin(&server.address), credentials(), None).unwrap();
    for fault in [
        registry.ping().await.unwrap_err().fault("ping"),
        registry
            .head_manifest("op/a", "v1")
            .await
            .unwrap_err()
            .fault("look up op/a:v1"),
    ] {
        assert_eq!(
            (fault.code, fault.reason),
            (Code::Unreachable, Reason::SinkUnavailable)
        );
        assert!(
            fault
                .message
                .contains("a web page answered, not a registry"),
            "{fault:?}"
        );
        assert!(fault.next.contains("login page"), "{fault:?}");
    }
}

/// `openssl req -x509` makes a certificate that is its own authority (CA:TRUE).
#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_is_a_ca_file() {
    let made = |names: &[&str], is_ca: bool| {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        if is_ca {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }
        (params.self_signed(&key).unwrap(), key)
    };
    let ping = async |address: &str, ca: &std::path::Path| {
        let origin = Origin {
            https: true,
            authority: address.into(),
        };
        let registry = Registry::new(origin, None, Some(ca)).unwrap();
        registry.ping().await.map_err(|e| e.fault("ping"))
    };
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    let serve = |certificate: &rcgen::Certificate, key: &rcgen::KeyPair| {
        RealRegistry::start(&Access::Tls {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    };

    let (own, key) = made(&["127.0.0.1"], true);
    let server = serve(&own, &key);
    // Among other certificates, and in any place.
    let (other, _) = made(&["127.0.0.1"], true);
    write(&ca, format!("{}{}", other.pem(), own.pem()).as_bytes());
    ping(&server.address, &ca).await.unwrap();
    // Another certificate for the same name is not trusted.
    write(&ca, other.pem().as_bytes());
    let fault = ping(&server.address, &ca).await.unwrap_err();
    assert_eq!(fault.reason, Reason::SinkUnavailable);
    assert!(fault.next.contains("ca_file"), "{fault:?}");

    // Its name still counts.
    let (own, key) = made(&["registry.example.com"], true);
    let server = serve(&own, &key);
    write(&ca, own.pem().as_bytes());
    let fault = ping(&server.address, &ca).await.unwrap_err();
    assert!(fault.message.contains("for a different name"), "{fault:?}");

    // So does its validity.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    params.not_before = rcgen::date_time_ymd(2019, 1, 1);
    let own = params.self_signed(&key).unwrap();
    let server = serve(&own, &key);
    write(&ca, own.pem().as_bytes());
    let fault = ping(&server.address, &ca).await.unwrap_err();
    assert!(fault.message.contains("has expired"), "{fault:?}");

    // A certificate of an authority signs others, as before.
    let (authority, authority_key) = made(&["authority"], true);
    let issuer = rcgen::Issuer::from_ca_cert_der(authority.der(), authority_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let signed = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let server = serve(&signed, &key);
    write(&ca, authority.pem().as_bytes());
    ping(&server.address, &ca).await.unwrap();
    // The certificate itself, without its authority.
    write(&ca, signed.pem().as_bytes());
    ping(&server.address, &ca).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_insecure_source_needs_neither_a_trusted_certificate_nor_tls() {
    let access = || crate::Access {
        insecure: true,
        credentials: Some(crate::Credentials::new(USER, PASSWORD)),
        ..crate::Access::default()
    };
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["elsewhere".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let with_tls = RealRegistry::start(&Access::Tls {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    });
    let without = RealRegistry::start(&Access::Basic);
    for server in [&with_tls, &without] {
        let origin = Origin {
            https: true,
            authority: server.address.clone(),
        };
        let registry = Registry::of_source(origin.clone(), access()).await.unwrap();
        registry.ping().await.unwrap();
        let secure = Registry::of_source(origin, None.into()).await.unwrap();
        assert!(secure.ping().await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_page_in_place_of_the_token_service_is_named() {
    let server = StandIn::start().await;
    server.held.lock().script.push(Scripted {
        headers: vec![("content-type", "text/html; charset=utf-8")],
        times: usize::MAX,
        ..Scripted::new("GET", "/token", 200, "<!doctype html>".into())
    });
    let registry = Registry::new(origin(&server.address), credentials(), None).unwrap();
    let fault = registry
        .head_manifest("op/a", "v1")
        .await
        .unwrap_err()
        .fault("look up op/a:v1");
    assert!(
        fault
            .message
            .contains("a web page answered, not a token service")
            && fault.message.contains(&server.address)
            && fault.next.contains("login page"),
        "{fault:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_of_a_redirect_that_does_not_answer_is_named() {
    // Bound, and nobody listens.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let host = held.local_addr().unwrap().to_string();
    let login: &'static str = format!("http://{host}/login").leak();
    let server = StandIn::start().await;
    server.held.lock().script.push(Scripted {
        headers: vec![("location", login)],
        times: usize::MAX,
        ..Scripted::new("GET", "/v2/", 302, String::new())
    });
    let registry = Registry::new(origin(&server.address), None, None).unwrap();
    let fault = registry.ping().await.unwrap_err().fault("ping");
    assert!(
        fault
            .message
            .contains(&format!("{host}, to which the registry refers"))
            && fault.message.contains("connection refused")
            && fault.next.contains(&host),
        "{fault:?}"
    );
    // A registry that is down itself is not said to refer to another host.
    let registry = Registry::new(origin(&host), None, None).unwrap();
    let fault = registry.ping().await.unwrap_err().fault("ping");
    assert!(!fault.message.contains("refers"), "{fault:?}");
}

#[test]
fn advice_for_a_missing_image_knows_that_a_user_is_set() {
    for settings in [Settings::Daemon, Settings::Command] {
        let (without, with) = (
            settings.credentials("r.lan", false),
            settings.credentials("r.lan", true),
        );
        assert!(without.contains("password"), "{without}");
        assert!(
            with.contains("may pull") && !with.contains("set username"),
            "{with}"
        );
    }
}
