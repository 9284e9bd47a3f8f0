//! Who may enter a hub in this process: renewals, enrolments, revocations and expired certificates.

use std::time::Instant;

use super::*;
use crate::api::Backend as _;
use crate::api::types::{MemberAction, MemberActionRequest, SetSiteRequest, Site, TokenRequest};
use crate::hub::upload::tests::Bench;
use base::fault::Code;
use base::names::SiteName;
use model::protocol::{CONTROL, renewal};
use transport::identity::{CertificateRequest, Claim, SiteIdentity};
use transport::{ConnectionSettings, Transport};

const BOTH: [Transport; 2] = [Transport::Quic, Transport::Tcp];

async fn dial(bench: &Bench, identity: &SiteIdentity, over: Transport) -> Result<Link, Fault> {
    let line = ConnectionSettings {
        transport: over,
        ..ConnectionSettings::default()
    };
    transport::dial(&bench.address, identity, &line, 8 << 20).await
}

async fn joined(bench: &Bench, site: &str) -> SiteIdentity {
    let token = bench.token(Some(site), None).await;
    bench
        .join(&token, &Claim::Site(site.parse().unwrap()))
        .await
}

async fn renewed(link: &Link, identity: &SiteIdentity) -> Result<SiteIdentity, Fault> {
    let request = identity.make_renewal_request()?;
    let question = AskHub::Renew {
        request: renewal(request.csr_der())?,
    };
    let answer: String = wire::ask(link, &question).await?;
    request.complete(&hex::decode(answer).unwrap(), identity.ca_der())
}

async fn act(bench: &Bench, name: &str, action: MemberAction) -> Result<Site, Fault> {
    let request = MemberActionRequest {
        name: name.into(),
        action,
        why: (action == MemberAction::Revoke).then(|| "stolen".into()),
        force: false,
    };
    bench.hub.act_on_site(&Actor::Admin, request).await
}

/// Waits until the hub shows a site as connected, or not.
async fn online(bench: &Bench, site: &str, online: bool) {
    let began = Instant::now();
    while bench.hub.site(site).await.unwrap().online != online {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{site}: {online}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_whose_answer_was_lost_locks_nobody_out() {
    let bench = Bench::start().await;
    let first = joined(&bench, "east").await;
    let link = dial(&bench, &first, Transport::Quic).await.unwrap();
    // The site was killed before it stored the answer, twice.
    let lost = renewed(&link, &first).await.unwrap();
    let second = renewed(&link, &first).await.unwrap();
    assert_ne!(lost.cert_der(), second.cert_der());
    link.close("killed");
    for over in BOTH {
        dial(&bench, &first, over).await.unwrap();
        // It never had this one.
        let fault = dial(&bench, &lost, over).await.unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed);
    }
    let shown = bench.hub.site("east").await.unwrap().certificate.unwrap();
    assert!(shown.previous_until.is_some() && shown.used_at.is_none());
    // The hub sees the new one: from then on it is the only one.
    dial(&bench, &second, Transport::Tcp).await.unwrap();
    let shown = bench.hub.site("east").await.unwrap().certificate.unwrap();
    assert!(shown.previous_until.is_none() && shown.used_at.is_some());
    assert_eq!(shown.serial, second.serial().unwrap().to_string());
    for over in BOTH {
        let fault = dial(&bench, &first, over).await.unwrap_err();
        assert!(
            fault.code == Code::NotAllowed
                && fault
                    .message
                    .contains("a newer certificate was issued for site east"),
            "{fault}"
        );
        dial(&bench, &second, over).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_another_enrolment_the_old_certificate_is_cut_off() {
    let bench = Bench::start().await;
    let old = joined(&bench, "east").await;
    let mut open = Vec::new();
    for over in BOTH {
        open.push(dial(&bench, &old, over).await.unwrap());
    }
    let new = joined(&bench, "east").await;
    for link in &open {
        let closed = timeout(Duration::from_secs(1), link.closed()).await;
        closed.expect("it is closed within a second");
    }
    for over in BOTH {
        assert_eq!(
            dial(&bench, &old, over).await.unwrap_err().code,
            Code::NotAllowed
        );
        dial(&bench, &new, over).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_closes_every_connection_and_restore_lets_in_again() {
    let bench = Bench::start().await;
    let (east, west) = (joined(&bench, "east").await, joined(&bench, "west").await);
    let token = bench.token(None, Some("office")).await;
    let office = bench.join(&token, &Claim::Publisher).await;
    for over in BOTH {
        let link = dial(&bench, &east, over).await.unwrap();
        let other = dial(&bench, &west, over).await.unwrap();
        online(&bench, "east", true).await;
        let began = Instant::now();
        let site = act(&bench, "east", MemberAction::Revoke).await.unwrap();
        let revoked = site.revoked.unwrap();
        assert_eq!(
            (revoked.by.as_str(), revoked.why.as_deref()),
            ("admin", Some("stolen"))
        );
        link.closed().await;
        assert!(began.elapsed() < Duration::from_secs(1));
        let why = link.refusal().unwrap();
        assert!(why.contains("by admin: stolen"), "{why}");
        assert!(why.contains(REVOKED) && transport::next_after_refusal(&why).contains("restore"));
        assert!(!other.is_closed());
        let fault = dial(&bench, &east, over).await.unwrap_err();
        assert!(
            fault.code == Code::NotAllowed && fault.message.contains("by admin: stolen"),
            "{fault}"
        );
        assert!(
            fault.next.contains("packhorse site restore"),
            "{}",
            fault.next
        );
        online(&bench, "east", false).await;
        act(&bench, "east", MemberAction::Restore).await.unwrap();
        dial(&bench, &east, over).await.unwrap();
    }
    // The same for a publisher, all of whose connections are closed.
    let links = [
        dial(&bench, &office, Transport::Quic).await.unwrap(),
        dial(&bench, &office, Transport::Tcp).await.unwrap(),
        dial(&bench, &office, Transport::Quic).await.unwrap(),
    ];
    let request = |action| MemberActionRequest {
        name: "office".into(),
        action,
        why: None,
        force: false,
    };
    let revoke = request(MemberAction::Revoke);
    bench
        .hub
        .act_on_publisher(&Actor::Admin, revoke)
        .await
        .unwrap();
    for link in &links {
        let closed = timeout(Duration::from_secs(1), link.closed()).await;
        closed.expect("it is closed within a second");
    }
    assert_eq!(
        dial(&bench, &office, Transport::Tcp)
            .await
            .unwrap_err()
            .code,
        Code::NotAllowed
    );
    let restore = request(MemberAction::Restore);
    bench
        .hub
        .act_on_publisher(&Actor::Admin, restore)
        .await
        .unwrap();
    let link = dial(&bench, &office, Transport::Tcp).await.unwrap();
    renewed(&link, &office).await.unwrap();
    let remove = request(MemberAction::Remove);
    bench
        .hub
        .act_on_publisher(&Actor::Admin, remove)
        .await
        .unwrap();
    link.closed().await;
    let shown = bench.hub.publisher("office").await;
    assert_eq!(shown.unwrap_err().code, Code::NotFound);
}

/// A certificate of a site that ended this long ago, and is newer than its recorded one.
fn expired(bench: &Bench, site: &str, ago: Duration) -> SiteIdentity {
    let hub = &bench.hub.inner.identity;
    let now = Duration::from_millis(clock::now_unix_ms());
    let name: SiteName = site.parse().unwrap();
    let request = CertificateRequest::new().unwrap();
    let lifetime = (now - ago - Duration::from_secs(30 * 86_400), now - ago);
    let cert = hub
        .issue_between(&name, request.csr_der(), lifetime)
        .unwrap();
    request.complete(&cert, hub.ca_der()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_can_only_be_renewed_and_only_within_the_grace() {
    let day = Duration::from_secs(86_400);
    let bench = Bench::start().await;
    joined(&bench, "east").await;
    for over in BOTH {
        let old = expired(&bench, "east", 179 * day);
        let link = dial(&bench, &old, over).await.unwrap();
        assert!(link.is_for_renewal() && old.needs_renewal());
        // A site of an earlier version opens its control stream first. It gets nothing.
        let (mut control, mut answer) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
        control.write_all(&[CONTROL]).await.unwrap();
        let question = AskHub::ListRuns { limit: 1, from: 0 };
        let fault = wire::ask::<_, serde_json::Value>(&link, &question)
            .await
            .unwrap_err();
        assert!(
            fault.code == Code::NotAllowed && fault.message.contains("expired"),
            "{fault}"
        );
        assert!(!bench.hub.site("east").await.unwrap().online);
        let new = renewed(&link, &old).await.unwrap();
        assert!(
            answer.read_to_end(10).await.is_err(),
            "the hub closes the connection"
        );
        let link = dial(&bench, &new, over).await.unwrap();
        assert!(!link.is_for_renewal());
        online(&bench, "east", true).await;
        link.close("the test goes on");
        // It was renewed: it cannot be used a second time.
        let fault = dial(&bench, &old, over).await.unwrap_err();
        assert!(fault.message.contains("a newer certificate"), "{fault}");
        let older = expired(&bench, "east", 181 * day);
        let fault = dial(&bench, &older, over).await.unwrap_err();
        assert!(fault.message.contains("has expired"), "{fault}");
        online(&bench, "east", false).await;
    }
    let old = expired(&bench, "east", day);
    act(&bench, "east", MemberAction::Revoke).await.unwrap();
    let fault = dial(&bench, &old, Transport::Tcp).await.unwrap_err();
    assert!(fault.message.contains(REVOKED), "{fault}");

    let strict = Bench::start_with("[identity]\ngrace = \"0s\"\n").await;
    joined(&strict, "east").await;
    let old = expired(&strict, "east", Duration::from_secs(60));
    let fault = dial(&strict, &old, Transport::Quic).await.unwrap_err();
    assert!(fault.message.contains("has expired"), "{fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_publisher_renews_and_publishes() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    let source = bench.source("a", 1 << 16, 1);
    bench
        .publish(&source, "model/a:1", Some(&token))
        .await
        .unwrap();
    let folder = std::fs::read_dir(bench.dir.path().join("state"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.join("identity/site.pem").exists())
        .unwrap();
    let hub = &bench.hub.inner.identity;
    let now = Duration::from_millis(clock::now_unix_ms());
    let request = CertificateRequest::new().unwrap();
    let lifetime = (
        now - Duration::from_secs(40 * 86_400),
        now - Duration::from_secs(86_400),
    );
    let holder = Peer::Publisher("office".parse().unwrap());
    let cert = hub.issue_to(&holder, request.csr_der(), lifetime).unwrap();
    let old = request.complete(&cert, hub.ca_der()).unwrap();
    old.save(&folder).unwrap();
    bench.publish(&source, "model/a:2", None).await.unwrap();
    let new = SiteIdentity::load(&folder).unwrap().unwrap();
    assert!(new.cert_der() != old.cert_der() && !new.needs_renewal());
    bench.publish(&source, "model/a:3", None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_about_members_are_checked() {
    let bench = Bench::start().await;
    joined(&bench, "east").await;
    let set = |labels: &[(&str, &str)], remove: &[&str]| SetSiteRequest {
        name: "east".into(),
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        remove_labels: remove.iter().map(|key| (*key).to_owned()).collect(),
    };
    for bad in [
        set(&[], &[]),
        set(&[("a", "1")], &["a"]),
        set(&[("a b", "1")], &[]),
    ] {
        let fault = bench.hub.set_site(&Actor::Admin, bad).await.unwrap_err();
        assert_eq!(fault.code, Code::Usage, "{fault}");
    }
    let site = bench
        .hub
        .set_site(&Actor::Admin, set(&[("line", "3")], &[]))
        .await
        .unwrap();
    let changed = site.changed.unwrap();
    assert_eq!(
        (changed.what.as_str(), changed.by.as_str()),
        ("set", "admin")
    );
    let request = |action, why: Option<&str>, force| MemberActionRequest {
        name: "east".into(),
        action,
        why: why.map(Into::into),
        force,
    };
    let long = "x".repeat(201);
    for bad in [
        request(MemberAction::Restore, Some("why"), false),
        request(MemberAction::Revoke, None, true),
        request(MemberAction::Revoke, Some(&long), false),
        request(MemberAction::Revoke, Some("two\nlines"), false),
    ] {
        let fault = bench.hub.act_on_site(&Actor::Admin, bad).await.unwrap_err();
        assert_eq!(fault.code, Code::Usage, "{fault}");
    }
    assert!(bench.hub.site("east").await.unwrap().revoked.is_none());
    let unknown = MemberActionRequest {
        name: "nobody".into(),
        ..request(MemberAction::Revoke, None, false)
    };
    let fault = bench
        .hub
        .act_on_site(&Actor::Admin, unknown)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::NotFound);
    // A join token that would be valid for too long.
    let token = TokenRequest {
        site: Some("late".into()),
        publisher: None,
        labels: Default::default(),
        artifacts: Vec::new(),
        deliver_to: None,
        ttl_seconds: 30 * 86_400 + 1,
    };
    let fault = bench.hub.token(token.clone()).await.unwrap_err();
    assert!(
        fault.code == Code::Usage && fault.message.contains("30 days"),
        "{fault}"
    );
    let longest = TokenRequest {
        ttl_seconds: 30 * 86_400,
        ..token
    };
    bench.hub.token(longest).await.unwrap();
}
