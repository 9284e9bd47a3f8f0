//! A hub in this process, and a publisher that tries permitted and forbidden requests.

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::super::Hub;
use crate::api::Backend as _;
use crate::api::types::{Action, TokenRequest};
use crate::config::{self, ConnectionSettings};
use crate::publisher::{self, Asked, Uploaded};
use base::fault::{Code, Reason};
use base::peer::Peer;
use content::manifest::{Digest, FORMAT_MAX};
use exchange::fetch::Fetcher;
use exchange::wire;
use model::actor::Actor;
use model::protocol::{AskHub, CONTROL, FromHub, FromSite, Wanted, renewal};
use transport::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity};
use transport::{self, Link};

mod hello;
mod scope;

/// The bytes of a connection without payload: handshake, questions, and the search for the largest
/// packet.
const QUIET: u64 = 192 << 10;

/// The first message of a site.
pub(in crate::hub) fn hello(changes: bool) -> FromSite {
    FromSite::Hello {
        version: "0".into(),
        share: None,
        train: None,
        congestion: Default::default(),
        changes,
        manifest_format: FORMAT_MAX,
        reason: None,
    }
}

pub(in crate::hub) struct Bench {
    pub(in crate::hub) hub: Hub,
    pub(in crate::hub) address: String,
    pub(in crate::hub) dir: tempfile::TempDir,
}

impl Bench {
    pub(in crate::hub) async fn start() -> Self {
        Self::start_with("").await
    }

    /// Starts a hub with additional configuration.
    pub(in crate::hub) async fn start_with(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("hub");
        base::durable::create_dir_all(&data).unwrap();
        let text = format!(
            "role = \"hub\"\nname = \"hub\"\ndata_dir = {:?}\n[listen]\napi = \"127.0.0.1:0\"\nquic = \"127.0.0.1:0\"\n{more}",
            data.display().to_string()
        );
        let hub = Hub::open(
            config::parse(&text, "a test").unwrap(),
            CancellationToken::new(),
        )
        .await
        .unwrap();
        let address = hub.inner.listener.local_addr().to_string();
        let work = hub.clone();
        tokio::spawn(async move { work.run().await });
        Self { hub, address, dir }
    }

    pub(in crate::hub) async fn token(
        &self,
        site: Option<&str>,
        publisher: Option<&str>,
    ) -> String {
        self.limited_token(site, publisher, &[], None).await
    }

    /// The token of a publisher with a scope.
    async fn limited_token(
        &self,
        site: Option<&str>,
        publisher: Option<&str>,
        artifacts: &[&str],
        deliver_to: Option<&str>,
    ) -> String {
        let (site, publisher) = (site.map(Into::into), publisher.map(Into::into));
        self.hub
            .token(TokenRequest {
                site,
                publisher,
                labels: Default::default(),
                artifacts: artifacts.iter().map(|text| (*text).into()).collect(),
                deliver_to: deliver_to.map(Into::into),
                ttl_seconds: 60,
            })
            .await
            .unwrap()
            .token
    }

    pub(in crate::hub) async fn join(&self, token: &str, claim: &Claim) -> SiteIdentity {
        transport::join(
            &self.address,
            &token.parse::<JoinToken>().unwrap(),
            claim,
            &ConnectionSettings::default(),
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap()
    }

    pub(in crate::hub) async fn dial(&self, identity: &SiteIdentity) -> Link {
        transport::dial(
            &self.address,
            identity,
            &ConnectionSettings::default(),
            8 << 20,
        )
        .await
        .unwrap()
    }

    pub(in crate::hub) fn source(&self, name: &str, bytes: usize, seed: u8) -> std::path::PathBuf {
        let folder = self.dir.path().join(name);
        base::durable::create_dir_all(&folder).unwrap();
        let mut content = vec![0; bytes];
        blake3::Hasher::new()
            .update(&[seed])
            .finalize_xof()
            .fill(&mut content);
        base::durable::replace(&folder.join("weights.bin"), &content).unwrap();
        base::durable::replace(&folder.join("notes.txt"), name.as_bytes()).unwrap();
        folder
    }

    pub(in crate::hub) async fn publish(
        &self,
        source: &Path,
        reference: &str,
        token: Option<&str>,
    ) -> Result<Uploaded, base::fault::Fault> {
        self.publish_to(source, reference, None, token).await
    }

    async fn publish_to(
        &self,
        source: &Path,
        reference: &str,
        to: Option<&str>,
        token: Option<&str>,
    ) -> Result<Uploaded, base::fault::Fault> {
        let asked = Asked {
            source: source.display().to_string(),
            artifact: reference.parse().unwrap(),
            to: to.map(Into::into),
            options: Default::default(),
            hub: self.address.clone(),
            token: token.map(Into::into),
            state: self.dir.path().join("state"),
        };
        publisher::publish(asked, Arc::default()).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_missing_content_is_sent() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    let source = bench.source("a", 4 << 20, 1);
    let first = bench
        .publish(&source, "model/a:v1", Some(&token))
        .await
        .unwrap();
    assert!(first.wire > 4 << 20 && first.wire < 5 << 20, "{first:?}");
    assert!(!first.published.unchanged && first.published.stored > 4 << 20);
    let again = bench.publish(&source, "model/a:v1", None).await.unwrap();
    assert!(
        again.published.unchanged && again.published.stored == 0 && again.wire < QUIET,
        "{again:?}"
    );
    // The same content under another name; then with a small addition.
    let other = bench.publish(&source, "model/b:v1", None).await.unwrap();
    assert!(
        !other.published.unchanged && other.published.stored == 0 && other.wire < QUIET,
        "{other:?}"
    );
    base::durable::replace(&source.join("more.bin"), &[7; 100_000]).unwrap();
    let more = bench.publish(&source, "model/b:v2", None).await.unwrap();
    assert!(
        more.published.stored > 0 && more.wire < QUIET + (100 << 10),
        "{more:?}"
    );
    let there = bench
        .hub
        .inner
        .catalogue
        .artifact(&"model/a:v1".parse().unwrap())
        .await
        .unwrap()
        .digest
        .hex();
    let fault = bench
        .publish(&source, "model/a:v1", None)
        .await
        .unwrap_err();
    assert!(
        fault.code == Code::Conflict && fault.message.contains(&there),
        "its own publisher learns the existing digest: {fault}"
    );
    // It does not learn the content of another publisher's artifact.
    let foreign = "model/c:v1".parse().unwrap();
    let root = bench
        .hub
        .inner
        .catalogue
        .artifact(&"model/a:v1".parse().unwrap())
        .await
        .unwrap()
        .root;
    bench
        .hub
        .inner
        .catalogue
        .add_artifact(&foreign, &root, None)
        .await
        .unwrap();
    let fault = bench
        .publish(&source, "model/c:v1", None)
        .await
        .unwrap_err();
    assert!(
        fault.code == Code::Conflict && !fault.message.contains(&there),
        "{fault}"
    );
    // The artifact is in the hub's store, and complete.
    let row = bench
        .hub
        .inner
        .catalogue
        .artifact(&"model/b:v2".parse().unwrap())
        .await
        .unwrap();
    assert_eq!(row.origin, None);
    let store = bench.hub.inner.store.clone();
    base::blocking::spawn(move || {
        for step in content::manifest::Walk::new(&row.root, &store) {
            if let content::manifest::Step::Chunk(chunk, _) = step.unwrap() {
                store.read(chunk.id).unwrap();
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_simultaneous_publishes_share_a_token_and_a_certificate() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    let (a, b) = (bench.source("a", 3 << 20, 1), bench.source("b", 3 << 20, 2));
    let (a, b) = tokio::join!(
        bench.publish(&a, "model/a:v1", Some(&token)),
        bench.publish(&b, "model/b:v1", Some(&token))
    );
    assert!(!a.unwrap().published.unchanged && !b.unwrap().published.unchanged);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_may_do_nothing_else() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    let source = bench.source("a", 1 << 20, 1);
    let published = bench
        .publish(&source, "model/a:v1", Some(&token))
        .await
        .unwrap();
    let digest: Digest = published.published.digest.parse().unwrap();
    let identity = bench
        .join(&bench.token(None, Some("lab")).await, &Claim::Publisher)
        .await;
    assert_eq!(identity.holder(), &Peer::Publisher("lab".parse().unwrap()));
    let link = bench.dial(&identity).await;
    let fault = Fetcher::new(link.clone(), digest, Arc::default())
        .root()
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::NotFound, Reason::SourceGone),
        "the same answer as for a missing artifact: {fault}"
    );
    let artifact: base::names::ArtifactRef = "model/a:v1".parse().unwrap();
    for question in [
        AskHub::Deliver {
            artifacts: vec!["model/a:v1".parse().unwrap()],
            to: "all".parse().unwrap(),
        },
        AskHub::Act {
            id: "t-1".parse().unwrap(),
            action: Action::Cancel,
        },
        AskHub::Publish {
            artifact: artifact.clone(),
            digest,
            to: None,
            run: None,
            omitted: Default::default(),
        },
    ] {
        let fault = wire::ask::<_, serde_json::Value>(&link, &question)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{question:?}: {fault}");
    }
    // A control stream gets no answer.
    let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
    send.write_all(&[CONTROL]).await.unwrap();
    let _ = wire::send(&mut send, &hello(false)).await;
    assert!(wire::receive::<FromHub>(&mut recv).await.is_err());
    assert!(bench.hub.inner.catalogue.sites().await.unwrap().is_empty());
    // It can renew its certificate, and is still a publisher.
    let request = identity.make_renewal_request().unwrap();
    let answer: String = wire::ask(
        &link,
        &AskHub::Renew {
            request: renewal(request.csr_der()).unwrap(),
        },
    )
    .await
    .unwrap();
    let renewed = request
        .complete(&hex::decode(answer).unwrap(), identity.ca_der())
        .unwrap();
    assert_eq!(renewed.holder(), identity.holder());
    assert_eq!(
        bench
            .hub
            .inner
            .identity
            .verify_site(renewed.cert_der())
            .unwrap_err()
            .code,
        Code::NotAllowed,
        "it signs no receipts"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_cannot_upload_and_false_content_is_refused() {
    let bench = Bench::start().await;
    let site = bench
        .join(
            &bench.token(Some("west"), None).await,
            &Claim::Site("west".parse().unwrap()),
        )
        .await;
    let link = bench.dial(&site).await;
    let artifact: base::names::ArtifactRef = "model/a:v1".parse().unwrap();
    let upload = AskHub::Upload {
        artifact,
        digest: content::chunk::Hash::of(b"x"),
        to: None,
        omitted: Default::default(),
    };
    let fault = wire::ask::<_, serde_json::Value>(&link, &upload)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::NotAllowed, "{fault}");

    // A publisher that sends other content than announced: the bytes do not match the digest.
    let publisher = bench
        .join(&bench.token(None, Some("lab")).await, &Claim::Publisher)
        .await;
    let link = bench.dial(&publisher).await;
    let liar = async {
        while let Some((mut send, mut recv)) = link.accept().await {
            let mut kind = [0];
            recv.read_exact(&mut kind).await.unwrap();
            let frame = content::frame::Frame::encode(&content::frame::Verified::new(
                b"something else".as_slice().into(),
            ));
            send.write_bytes(frame.to_bytes()).await.unwrap();
            send.finish().unwrap();
        }
    };
    let asked = wire::ask::<_, serde_json::Value>(&link, &upload);
    let fault = tokio::select! { answer = asked => answer.unwrap_err(), () = liar => unreachable!("the connection ended") };
    assert_eq!(fault.code, Code::Integrity, "{fault}");
    assert!(
        bench
            .hub
            .inner
            .catalogue
            .artifacts()
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manifest_of_a_new_artifact_is_pushed_to_a_site_once() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    bench
        .publish(&bench.source("a", 3 << 20, 1), "model/a:v1", Some(&token))
        .await
        .unwrap();
    let site = bench
        .join(
            &bench.token(Some("west"), None).await,
            &Claim::Site("west".parse().unwrap()),
        )
        .await;
    // The first list has the transfers that were requested before the connection.
    let open = async |link: &Link| {
        let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
        send.write_all(&[CONTROL]).await.unwrap();
        wire::send(&mut send, &hello(false)).await.unwrap();
        let FromHub::Desired { manifests, .. } = wire::receive(&mut recv).await.unwrap() else {
            unreachable!("the site gets complete lists")
        };
        assert!(manifests.is_empty());
        (send, recv)
    };

    let link = bench.dial(&site).await;
    let (_send, mut recv) = open(&link).await;
    bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/a:v1".parse().unwrap()],
            &"west".parse().unwrap(),
            false,
        )
        .await
        .unwrap();
    let FromHub::Desired {
        transfers,
        manifests,
        ..
    } = wire::receive(&mut recv).await.unwrap()
    else {
        unreachable!("the site gets complete lists")
    };
    assert_eq!(manifests.len(), 1);
    let (first, only) = (&transfers[0], &manifests[0]);
    assert_eq!(only.digest, first.digest);
    let frames = base64::Engine::decode(
        &base64::engine::general_purpose::STANDARD,
        only.frames.as_str(),
    )
    .unwrap();
    let pages = content::store::Store::open(&bench.dir.path().join("pages")).unwrap();
    let root = exchange::fetch::take_manifest(frames.clone().into(), first.digest, &pages).unwrap();
    let chunks = content::manifest::Walk::new(&root, &pages)
        .map(Result::unwrap)
        .filter(|step| matches!(step, content::manifest::Step::Chunk(..)));
    assert!(
        chunks.count() > 50,
        "the whole manifest arrived without a request"
    );
    // A part of it, the manifest of another artifact, and one with a flipped bit are refused.
    for (frames, digest) in [
        (frames[..frames.len() - 1].to_vec(), first.digest),
        (frames.clone(), content::chunk::Hash::of(b"x")),
        (
            frames
                .iter()
                .enumerate()
                .map(|(at, byte)| byte ^ u8::from(at == frames.len() - 9))
                .collect(),
            first.digest,
        ),
    ] {
        exchange::fetch::take_manifest(frames.into(), digest, &pages).unwrap_err();
    }

    // A pushed manifest is not pushed again, neither with the next list nor over the next
    // connection. A damaged manifest delays nothing.
    bench
        .publish(&bench.source("b", 3 << 20, 3), "model/b:v1", Some(&token))
        .await
        .unwrap();
    let packs = content::store::Store::open(&bench.dir.path().join("none"))
        .unwrap()
        .path();
    let packs = bench
        .dir
        .path()
        .join("hub/store")
        .join(packs.file_name().unwrap());
    for pack in std::fs::read_dir(packs).unwrap() {
        std::fs::File::options()
            .write(true)
            .open(pack.unwrap().path())
            .unwrap()
            .set_len(8)
            .unwrap();
    }
    bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/b:v1".parse().unwrap()],
            &"west".parse().unwrap(),
            false,
        )
        .await
        .unwrap();
    let FromHub::Desired {
        transfers,
        manifests,
        ..
    } = wire::receive(&mut recv).await.unwrap()
    else {
        unreachable!("the site gets complete lists")
    };
    assert_eq!((transfers.len(), manifests.len()), (2, 0));
    let link = bench.dial(&site).await;
    open(&link).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_manifest_is_pushed_to_a_site_that_has_another_version() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    for (reference, seed) in [("model/a:v1", 1), ("model/a:v2", 2), ("model/b:v1", 3)] {
        bench
            .publish(
                &bench.source(&reference.replace([':', '/'], "-"), 100_000, seed),
                reference,
                Some(&token),
            )
            .await
            .unwrap();
    }
    let site = bench
        .join(
            &bench.token(Some("west"), None).await,
            &Claim::Site("west".parse().unwrap()),
        )
        .await;
    let catalogue = &bench.hub.inner.catalogue;
    let id = bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/a:v1".parse().unwrap()],
            &"west".parse().unwrap(),
            false,
        )
        .await
        .unwrap()
        .transfers
        .remove(0);
    let body =
        serde_json::from_str(r#"{"receipt":{"statement":"s","signature":"x","certificate":"y"}}"#)
            .unwrap();
    catalogue
        .update_transfer(&id, 0, crate::api::types::State::Done, &body)
        .await
        .unwrap();
    let link = bench.dial(&site).await;
    let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
    send.write_all(&[CONTROL]).await.unwrap();
    wire::send(&mut send, &hello(false)).await.unwrap();
    wire::receive::<FromHub>(&mut recv).await.unwrap();
    bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/a:v2".parse().unwrap(), "model/b:v1".parse().unwrap()],
            &"west".parse().unwrap(),
            false,
        )
        .await
        .unwrap();
    let FromHub::Desired {
        transfers,
        manifests,
        ..
    } = wire::receive(&mut recv).await.unwrap()
    else {
        unreachable!("the site gets complete lists")
    };
    let digest = |name: &str| {
        transfers
            .iter()
            .find(|wanted| wanted.artifact.to_string() == name)
            .unwrap()
            .digest
    };
    let told: Vec<Digest> = manifests.iter().map(|told| told.digest).collect();
    assert_eq!(
        (transfers.len(), told),
        (2, vec![digest("model/b:v1")]),
        "the site requests only the difference of the other version"
    );
}

/// The fault that the hub sends instead of the first frame.
async fn refusal(link: &Link, digest: Digest, wanted: Wanted) -> base::fault::Fault {
    let mut frames = Fetcher::new(link.clone(), digest, Arc::default())
        .ask(vec![wanted], 0)
        .await
        .unwrap();
    frames.next().await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forbidden_artifact_gets_the_same_answer_as_a_missing_one() {
    let bench = Bench::start().await;
    let token = bench.token(None, Some("office")).await;
    for (reference, name, seed) in [("model/a:v1", "a", 1), ("model/b:v1", "b", 2)] {
        bench
            .publish(&bench.source(name, 1 << 20, seed), reference, Some(&token))
            .await
            .unwrap();
    }
    let a = bench
        .hub
        .inner
        .catalogue
        .artifact(&"model/a:v1".parse().unwrap())
        .await
        .unwrap();
    let b = bench
        .hub
        .inner
        .catalogue
        .artifact(&"model/b:v1".parse().unwrap())
        .await
        .unwrap();
    let (page_of_a, page_of_b, absent) = (
        a.root.pages[0].id,
        b.root.pages[0].id,
        content::chunk::Hash::of(b"x"),
    );
    let first_of = |page| Wanted::Children {
        page,
        ranges: vec![(0, 1)],
    };
    let beside = |base| Wanted::Delta {
        ranges: vec![(0, 1)],
        base,
        against: (0, 1),
    };
    let site = bench
        .join(
            &bench.token(Some("west"), None).await,
            &Claim::Site("west".parse().unwrap()),
        )
        .await;
    let link = bench.dial(&site).await;

    // No transfer to this site exists. The answers must be identical: code, message and next step.
    let nothing = refusal(&link, absent, Wanted::Root).await;
    assert_eq!(
        (nothing.code, nothing.reason),
        (Code::NotFound, Reason::SourceGone),
        "{nothing}"
    );
    for wanted in [
        Wanted::Root,
        Wanted::TopPages(vec![(0, 1)]),
        first_of(page_of_a),
    ] {
        assert_eq!(
            refusal(&link, a.digest, wanted.clone()).await,
            nothing,
            "{wanted:?}"
        );
    }

    // While the site plans a delivery, it may read the manifest, and no content.
    {
        let _planning = bench
            .hub
            .inner
            .entitlement
            .plan(&"west".parse().unwrap(), a.digest);
        let fetcher = Fetcher::new(link.clone(), a.digest, Arc::default());
        fetcher.root().await.unwrap();
        fetcher
            .ask(vec![Wanted::TopPages(vec![(0, 1)])], 0)
            .await
            .unwrap()
            .next()
            .await
            .unwrap();
        assert_eq!(refusal(&link, a.digest, first_of(page_of_a)).await, nothing);
    }
    assert_eq!(refusal(&link, a.digest, Wanted::Root).await, nothing);

    // The site may read all content of the first artifact. With the name of the first artifact it
    // may read no content of the second.
    bench
        .hub
        .inner
        .deliveries
        .deliver(
            &Actor::Admin,
            &["model/a:v1".parse().unwrap()],
            &"west".parse().unwrap(),
            false,
        )
        .await
        .unwrap();
    let fetcher = Fetcher::new(link.clone(), a.digest, Arc::default());
    fetcher.root().await.unwrap();
    fetcher
        .ask(vec![first_of(page_of_a)], 0)
        .await
        .unwrap()
        .next()
        .await
        .unwrap();
    for wanted in [
        first_of(absent),
        first_of(page_of_b),
        beside(absent),
        beside(b.digest),
    ] {
        assert_eq!(
            refusal(&link, a.digest, wanted.clone()).await,
            nothing,
            "{wanted:?}"
        );
    }
    assert_eq!(refusal(&link, b.digest, Wanted::Root).await, nothing);
}
