use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::*;
use base::clock;
use base::fault::Code;
use base::names::SiteName;
use base::peer::Peer;

fn name(s: &str) -> SiteName {
    s.parse().unwrap()
}

fn joined(hub: &HubIdentity, site: &str) -> SiteIdentity {
    let request = CertificateRequest::new().unwrap();
    let cert = hub.issue_for(&name(site), request.csr_der()).unwrap();
    request.complete(&cert, hub.ca_der()).unwrap()
}

#[test]
fn the_hub_keeps_its_ca_and_replaces_a_damaged_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let first = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    let again = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    assert_eq!(
        (first.ca_der(), first.cert_der()),
        (again.ca_der(), again.cert_der())
    );
    for file in ["ca.pem", "hub.pem"] {
        let mode = std::fs::metadata(dir.path().join("identity").join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    // A crash between writing the two files, and a truncated second file, are both repaired from
    // the CA.
    for damage in [None, Some("-----BEGIN PRIVATE KEY-----\nAA")] {
        let path = dir.path().join("identity/hub.pem");
        std::fs::remove_file(&path).unwrap();
        if let Some(text) = damage {
            durable::replace_secret(&path, text.as_bytes()).unwrap();
        }
        let repaired = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
        assert_eq!(repaired.ca_der(), first.ca_der());
        assert_ne!(repaired.cert_der(), first.cert_der());
    }
    let renamed = HubIdentity::open_or_create(dir.path(), &name("hub2")).unwrap();
    assert_eq!(
        holder(&renamed.cert_der()).unwrap(),
        Peer::Hub(name("hub2"))
    );
    assert_eq!(renamed.ca_hash(), first.ca_hash());
}

#[test]
fn a_damaged_ca_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    durable::replace_secret(&dir.path().join("identity/ca.pem"), b"torn").unwrap();
    let fault = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap_err();
    assert_eq!(fault.code, Code::Config);
    assert_eq!(
        std::fs::read(dir.path().join("identity/ca.pem")).unwrap(),
        b"torn"
    );
}

#[test]
fn the_hubs_certificate_names_the_hub_and_serves_only_as_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    assert_eq!(holder(&hub.cert_der()).unwrap(), Peer::Hub(name("hub")));
    verify_chain(&hub.cert_der(), hub.ca_der(), Role::Hub).unwrap();
    assert_eq!(
        hub.verify_site(&hub.cert_der()).unwrap_err().code,
        Code::NotAllowed
    );
    let site = joined(&hub, "chengdu");
    // A site certificate must not work as that of a hub.
    assert_eq!(
        verify_chain(site.cert_der(), hub.ca_der(), Role::Hub)
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
}

#[test]
fn a_site_keeps_renews_and_signs() {
    let (hub_dir, site_dir, other_dir) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let hub = HubIdentity::open_or_create(hub_dir.path(), &name("hub")).unwrap();
    assert!(SiteIdentity::load(site_dir.path()).unwrap().is_none());
    joined(&hub, "chengdu").save(site_dir.path()).unwrap();
    let site = SiteIdentity::load(site_dir.path()).unwrap().unwrap();
    assert_eq!(site.holder(), &Peer::Site(name("chengdu")));
    assert!(!site.needs_renewal());
    let mode = std::fs::metadata(site_dir.path().join("identity/site.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let request = site.make_renewal_request().unwrap();
    let cert = hub.issue_for(&name("chengdu"), request.csr_der()).unwrap();
    let renewed = request.complete(&cert, site.ca_der()).unwrap();
    assert_ne!(renewed.cert_der(), site.cert_der());

    let signature = renewed.sign(b"receipt").unwrap();
    verify_signature(renewed.cert_der(), b"receipt", &signature).unwrap();
    assert_eq!(
        verify_signature(renewed.cert_der(), b"receipts", &signature)
            .unwrap_err()
            .code,
        Code::Integrity
    );
    assert_eq!(
        verify_signature(site.cert_der(), b"receipt", &signature)
            .unwrap_err()
            .code,
        Code::Integrity
    );
    assert_eq!(
        hub.verify_site(renewed.cert_der()).unwrap(),
        name("chengdu")
    );

    let other = HubIdentity::open_or_create(other_dir.path(), &name("other")).unwrap();
    assert_eq!(
        other.verify_site(site.cert_der()).unwrap_err().code,
        Code::NotAllowed
    );
}

#[test]
fn a_request_gives_only_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    // A request that contains another name and asks for a CA gets the name of the caller and no CA.
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::new(vec![HUB_DNS_NAME.to_owned()]).unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(
        "packhorse:site:victim".try_into().unwrap(),
    ));
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let csr = params.serialize_request(&key).unwrap();
    let cert = hub.issue_for(&name("chengdu"), csr.der()).unwrap();
    assert_eq!(holder(&cert).unwrap(), Peer::Site(name("chengdu")));
    assert!(verify_chain(&cert, hub.ca_der(), Role::Hub).is_err());

    let mut torn = csr.der().to_vec();
    let middle = torn.len() / 2;
    torn[middle] ^= 1;
    for bad in [&torn[..], b"", b"garbage"] {
        assert_eq!(
            hub.issue_for(&name("chengdu"), bad).unwrap_err().code,
            Code::NotAllowed
        );
    }
    let other_kind = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&other_kind)
        .unwrap();
    assert_eq!(
        hub.issue_for(&name("chengdu"), csr.der()).unwrap_err().code,
        Code::NotAllowed
    );
}

#[test]
fn a_wrong_clock_is_reported_with_both_times() {
    let validity = Validity {
        from: "2026-01-01T00:00:00Z".parse().unwrap(),
        until: "2027-01-01T00:00:00Z".parse().unwrap(),
    };
    let june = "2026-06-01T00:00:00Z".parse().unwrap();
    validity.check(&"site a", "this machine", june).unwrap();
    assert_eq!(validity.early(&"site a", "this machine", june), None);
    // Not valid yet: one of the clocks is wrong, which is not a reason to reject.
    let before = "2025-12-29T23:00:00Z".parse().unwrap();
    validity.check(&"site a", "the hub", before).unwrap();
    let early = validity.early(&"site a", "the hub", before).unwrap();
    for part in [
        "2026-01-01T00:00:00.000Z",
        "2 d 1 h after the time of the hub",
        "2025-12-29T23:00:00.000Z",
    ] {
        assert!(early.contains(part), "{early}");
    }
    let late = validity
        .check(
            &"site a",
            "the hub",
            "2027-01-02T00:00:00Z".parse().unwrap(),
        )
        .unwrap_err();
    assert!(
        late.message.contains("expired") && late.message.contains("the hub"),
        "{late}"
    );
    assert!(validity.has_used(0.5, "2026-08-01T00:00:00Z".parse().unwrap()));
    assert!(!validity.has_used(0.5, "2026-06-01T00:00:00Z".parse().unwrap()));
}

#[test]
fn printed_tokens_parse_and_changed_tokens_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    let token = JoinToken::generate(&hub);
    let text = token.to_string();
    assert_eq!(text.parse::<JoinToken>().unwrap(), token);
    assert_eq!(token.ca_hash(), &hub.ca_hash());
    assert!(!format!("{token:?}").contains(text.split('.').nth(1).unwrap()));
    assert_ne!(token.secret_hash(), JoinToken::generate(&hub).secret_hash());
    for bad in [
        "",
        "a.b.c",
        &text[1..],
        &text[..text.len() - 3],
        &text.replace('.', "-"),
        &format!("{text}.x"),
    ] {
        let fault = bad.parse::<JoinToken>().unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{bad}");
        assert!(
            fault.message.starts_with("the join token is incomplete"),
            "{fault}"
        );
    }
}

#[test]
fn a_certificate_lasts_30_days_and_is_renewed_around_half_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    let day = Duration::from_secs(86_400);
    let mut earliest = 31;
    let mut latest = 0;
    for _ in 0..40 {
        let site = joined(&hub, "a");
        let validity = site.validity().unwrap();
        let left = Duration::try_from(validity.until.duration_since(clock::now())).unwrap();
        assert!(left > 29 * day && left <= LEAF_VALIDITY && LEAF_VALIDITY == 30 * day);
        // The validity began a day before the certificate was issued.
        let due = (0..31).find(|days| site.needs_renewal_at(validity.from + *days * day));
        let due = due.unwrap();
        assert!((12..=19).contains(&due), "after {due} of 31 days");
        (earliest, latest) = (earliest.min(due), latest.max(due));
        assert!(
            site.needs_renewal_at(validity.from - day),
            "it begins in the future"
        );
        assert!(site.needs_renewal_at(validity.until + 100 * day));
    }
    assert!(earliest < latest, "all on day {latest}");
}

#[test]
fn the_hub_replaces_its_certificate_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    let (first, reset_key) = (hub.cert_der(), hub.reset_key());
    assert!(!hub.renew_if_due().unwrap());
    assert_eq!(hub.cert_der(), first);
    hub.age(Duration::from_secs(200 * 86_400));
    assert!(hub.renew_if_due().unwrap());
    assert_ne!(hub.cert_der(), first);
    verify_chain(&hub.cert_der(), hub.ca_der(), Role::Hub).unwrap();
    let again = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    assert_eq!(again.cert_der(), hub.cert_der(), "it was stored");
    assert_eq!(again.reset_key(), reset_key);
}

#[test]
fn the_reset_key_of_an_earlier_version_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    // An earlier version had no file, and derived the key from that of its certificate.
    let identity = dir.path().join("identity");
    std::fs::remove_file(identity.join("reset.key")).unwrap();
    let pem = std::fs::read(identity.join("hub.pem")).unwrap();
    use rustls::pki_types::pem::PemObject as _;
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(&pem).unwrap();
    let expected = blake3::derive_key("packhorse QUIC stateless reset v1", key.secret_pkcs8_der());
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    assert_eq!(hub.reset_key(), expected);
    std::fs::remove_file(identity.join("hub.pem")).unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    assert_eq!(hub.reset_key(), expected);
}

#[test]
fn no_certificate_begins_before_its_ca() {
    // A CA created with a clock that was up to one day ahead is the earliest that this test can
    // create; the beginning of the CA is the lower limit.
    let dir = tempfile::tempdir().unwrap();
    let hub = HubIdentity::open_or_create(dir.path(), &name("hub")).unwrap();
    let ca = validity(hub.ca_der()).unwrap();
    assert!(joined(&hub, "a").validity().unwrap().from >= ca.from);
    assert_eq!(hub.clock_fault(), None);
}
