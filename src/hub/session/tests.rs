//! Tests which reports of a site the hub accepts, and which it refuses.

mod changes;

use super::list::LINEAGE_BYTES_MAX;
use super::*;
use crate::api::View;
use crate::api::types::{Action, Bytes, State, Transfer};
use crate::config;
use crate::hub::Hub;
use crate::hub::answers::fits;
use base::durable;
use base::limits::ANSWER_BYTES_MAX;
use base::names::{ArtifactRef, Kind, TransferId, WorkIds};
use content::chunk::DEFAULT_CHUNKING;
use content::manifest::{Digest, KindInfo, Root, Totals};
use exchange::wire;
use model::actor::Actor;
use model::paging;
use model::protocol::{Desired, FromSite, Report};
use model::receipt::Receipt;
use state::{Body, Part, TransferRow, Want};
use transport::identity::{CertificateRequest, Claim, SiteIdentity};

struct Bench {
    hub: Hub,
    identity: SiteIdentity,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("hub");
        durable::create_dir_all(&data).unwrap();
        let text = format!(
            "role = \"hub\"\nname = \"hub\"\ndata_dir = {:?}\n[listen]\napi = \"127.0.0.1:0\"\nquic = \"127.0.0.1:0\"\n",
            data.display().to_string()
        );
        let hub = Hub::open(
            config::parse(&text, "a test").unwrap(),
            CancellationToken::new(),
        )
        .await
        .unwrap();
        let site = Self::site();
        hub.inner
            .catalogue
            .add_token(
                "t",
                &[1; 32],
                &Peer::Site(site.clone()),
                &Default::default(),
                60,
            )
            .await
            .unwrap();
        let (peer, serial) = hub
            .inner
            .catalogue
            .redeem_token("t", &[1; 32], &Claim::Site(site.clone()), &[7; 32])
            .await
            .unwrap();
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .inner
            .identity
            .issue_as(&peer, request.csr_der(), &serial)
            .unwrap();
        let identity = request
            .complete(&cert, hub.inner.identity.ca_der())
            .unwrap();
        Self {
            hub,
            identity,
            _dir: dir,
        }
    }

    fn site() -> SiteName {
        "mal".parse().unwrap()
    }

    async fn deliver(&self, reference: &str) -> TransferRow {
        let totals = Totals {
            bytes: 7,
            ..Totals::default()
        };
        let root = Root {
            format: 1,
            kind: Kind::Model,
            info: KindInfo::Files,
            chunking: DEFAULT_CHUNKING,
            totals,
            depth: 0,
            pages: vec![],
        };
        let artifact: ArtifactRef = reference.parse().unwrap();
        self.hub
            .inner
            .catalogue
            .add_artifact(&artifact, &root, None)
            .await
            .unwrap();
        let part = Part {
            artifact,
            digest: root.digest(),
            total: 7,
            needs: None,
            sites: vec![Self::site()],
        };
        let ids = self
            .hub
            .inner
            .catalogue
            .deliver(&state::new_delivery_id(), None, &[part], &[])
            .await
            .unwrap();
        self.row(&ids[0]).await
    }

    async fn row(&self, id: &TransferId) -> TransferRow {
        self.hub.inner.catalogue.transfer(id).await.unwrap()
    }

    fn signed(&self, row: &TransferRow) -> Body {
        Body {
            receipt: Some(
                Receipt::sign(
                    row,
                    clock::now_ms(),
                    self.identity.cert_der(),
                    |statement| self.identity.sign(statement),
                )
                .unwrap(),
            ),
            ..Body::default()
        }
    }

    async fn report(&self, row: &TransferRow, state: State, body: Body) -> Result<State, Fault> {
        let report = Report {
            id: row.id.clone(),
            generation: row.generation,
            state,
            body,
        };
        self.hub
            .inner
            .sessions
            .take_report(&Self::site(), report)
            .await?;
        Ok(self.row(&row.id).await.state)
    }
}

#[tokio::test]
async fn a_receipt_is_valid_only_for_its_own_transfer() {
    let bench = Bench::start().await;
    let row = bench.deliver("model/m:1").await;
    let other = TransferRow {
        id: "t-other".parse().unwrap(),
        ..row.clone()
    };
    for (wrong, why) in [
        (other, "is for another transfer"),
        (
            TransferRow {
                digest: Digest::of(b"else"),
                ..row.clone()
            },
            "is for something else",
        ),
        (
            TransferRow {
                site: "east".parse().unwrap(),
                ..row.clone()
            },
            "is for something else",
        ),
    ] {
        let fault = bench
            .report(&row, State::Done, bench.signed(&wrong))
            .await
            .unwrap_err();
        assert!(fault.message.contains(why), "{fault}");
    }
    let fault = bench
        .report(&row, State::Done, Body::default())
        .await
        .unwrap_err();
    assert!(fault.message.contains("missing"), "{fault}");
    assert_eq!(bench.row(&row.id).await.state, State::Queued);
    assert_eq!(
        bench
            .report(&row, State::Done, bench.signed(&row))
            .await
            .unwrap(),
        State::Done
    );
}

#[tokio::test]
async fn an_unknown_generation_is_refused_and_sizes_cannot_overflow() {
    let bench = Bench::start().await;
    let row = bench.deliver("model/m:1").await;
    for generation in [1 << 62, 1, -1] {
        let bad = TransferRow {
            generation,
            ..row.clone()
        };
        assert!(
            bench
                .report(&bad, State::Transferring, Body::default())
                .await
                .is_err()
        );
    }
    assert_eq!(bench.row(&row.id).await.state, State::Queued);
    let max = u64::MAX;
    let bytes = serde_json::json!({ "total": max, "reused": max, "resumed": max, "received": max, "committed": max, "wire": max });
    let body: Body = serde_json::from_value(
        serde_json::json!({ "bytes": bytes, "rate": max, "eta_seconds": max }),
    )
    .unwrap();
    bench.report(&row, State::Transferring, body).await.unwrap();
    let parts: Vec<Transfer> = (0..40)
        .map(|_| bench.hub.inner.deliveries.view(&row))
        .collect();
    let seen = bench.row(&row.id).await.view();
    assert!(
        seen.bytes.total < max && seen.rate < max && seen.eta_seconds.is_some_and(|eta| eta < max),
        "{seen:?}"
    );
    let all = vec![
        Transfer {
            bytes: Bytes {
                total: seen.bytes.total,
                ..Bytes::default()
            },
            ..seen
        };
        40
    ];
    let total = |parts: &[Transfer]| {
        let mut whole = crate::delivery::Whole::new(usize::MAX);
        parts.iter().for_each(|part| whole.add(part.clone()));
        whole
            .end(&state::DeliveryRow {
                id: "d-1".parse().unwrap(),
                run: None,
                created_ms: 0,
            })
            .bytes
            .total
    };
    assert!(total(&all) >= total(&parts));
}

#[tokio::test]
async fn a_commit_before_a_late_cancellation_is_done_at_the_hub_too() {
    let bench = Bench::start().await;
    let row = bench.deliver("model/m:1").await;
    bench
        .report(&row, State::Committing, Body::default())
        .await
        .unwrap();
    let catalogue = &bench.hub.inner.catalogue;
    catalogue.act(&row.id, Action::Cancel).await.unwrap();
    assert_eq!(
        bench
            .report(&row, State::Committing, Body::default())
            .await
            .unwrap(),
        State::Cancelled
    );
    assert!(
        bench
            .report(&row, State::Done, Body::default())
            .await
            .is_err(),
        "without a receipt it is not done"
    );
    assert_eq!(
        bench
            .report(&row, State::Done, bench.signed(&row))
            .await
            .unwrap(),
        State::Done
    );
    let now = bench.row(&row.id).await;
    assert!(
        now.body.receipt.is_some() && now.want == Want::Run && now.finished_ms.is_some(),
        "{now:?}"
    );
    assert!(
        catalogue
            .open_transfers(&Bench::site())
            .await
            .unwrap()
            .is_empty(),
        "the site has no further work for it"
    );

    // A transfer that failed before the site received the cancellation: the cancellation is sent
    // until the site has confirmed it.
    let row = bench.deliver("model/n:1").await;
    catalogue.act(&row.id, Action::Cancel).await.unwrap();
    for (said, want) in [(State::Failed, Want::Cancel), (State::Cancelled, Want::Run)] {
        assert_eq!(
            bench.report(&row, said, Body::default()).await.unwrap(),
            State::Cancelled
        );
        assert_eq!(bench.row(&row.id).await.want, want);
    }

    // A transfer that started again in the meantime is not completed by a report of its first
    // attempt.
    let row = bench.deliver("model/o:1").await;
    catalogue.act(&row.id, Action::Cancel).await.unwrap();
    catalogue.act(&row.id, Action::Retry).await.unwrap();
    assert_eq!(
        bench
            .report(&row, State::Done, bench.signed(&row))
            .await
            .unwrap(),
        State::Queued
    );
}

#[tokio::test]
async fn the_texts_of_a_report_are_truncated_and_cleaned_on_receipt() {
    let bench = Bench::start().await;
    let row = bench.deliver("model/m:1").await;
    let hostile = "\u{1b}[2J\u{1b}]0;pwned\u{7} \u{202e}evil";
    let long = "x".repeat(1 << 20);
    let report = serde_json::json!({ "report": [{ "id": row.id, "generation": 0, "state": "failed",
        "body": { "message": format!("{hostile}{long}"), "next": hostile, "location": format!("/x\n{hostile}"), "receipt": [0, 0, [0]] } }] });
    let FromSite::Report(reports) = serde_json::from_value(report).unwrap() else {
        unreachable!("the message is a report")
    };
    for report in reports {
        bench
            .hub
            .inner
            .sessions
            .take_report(&Bench::site(), report)
            .await
            .unwrap();
    }
    let seen = bench.row(&row.id).await.view();
    for text in [&seen.message, &seen.next, &seen.location].map(|text| text.as_deref().unwrap()) {
        assert!(
            text.len() <= 8 << 10 && !text.replace('\n', "").contains(base::text::is_unsafe),
            "{text:?}"
        );
    }
    assert_eq!((seen.state, seen.receipt), (State::Failed, None));
}

#[tokio::test]
async fn a_client_that_follows_the_cursor_receives_all_of_a_long_answer() {
    let bench = Bench::start().await;
    let row = bench.deliver("model/m:1").await;
    // More transfers to other sites than fit in one answer.
    let catalogue = &bench.hub.inner.catalogue;
    let sites: Vec<SiteName> = (0..600)
        .map(|n| format!("site-{n}").parse().unwrap())
        .collect();
    let part = Part::new(&catalogue.artifact(&row.artifact).await.unwrap(), &sites);
    let ids = catalogue
        .deliver(&"d-all".parse().unwrap(), None, &[part], &[])
        .await
        .unwrap();
    let body = Body {
        message: Some("x".repeat(8000).as_str().into()),
        ..Body::default()
    };
    for id in &ids {
        // An open transfer would have the reason that its site is offline.
        catalogue
            .update_transfer(id, 0, State::Failed, &body)
            .await
            .unwrap();
    }
    let all: WorkIds = "d-all".parse().unwrap();
    let (mut got, mut answers, mut since) = (Vec::new(), 0, None);
    loop {
        let answer = bench
            .hub
            .inner
            .sessions
            .transfers_for(&Actor::Site(Bench::site()), &all, since, 0)
            .await
            .unwrap();
        assert!(paging::json_bytes(&answer) <= ANSWER_BYTES_MAX);
        let (page, cursor): (Vec<Transfer>, u64) = serde_json::from_value(answer).unwrap();
        if page.is_empty() {
            break;
        }
        got.extend(page.into_iter().map(|row| row.id));
        (answers, since) = (answers + 1, Some(cursor));
    }
    got.sort_unstable();
    let mut all: Vec<String> = ids.iter().map(ToString::to_string).collect();
    all.sort_unstable();
    assert!(
        answers > 1 && got == all,
        "{answers} answers, {} rows",
        got.len()
    );
    assert!(
        fits(serde_json::json!("x".repeat(ANSWER_BYTES_MAX))).is_err()
            && fits(serde_json::json!([1])).is_ok()
    );
}

#[test]
fn the_longest_desired_state_fits_in_one_message() {
    let name = |c: &str| c.repeat(128);
    let id = "t".repeat(64);
    let wanted = Desired {
        id: id.parse().unwrap(),
        delivery: id.parse().unwrap(),
        artifact: format!("operator/{}:{}", name("a"), name("b"))
            .parse()
            .unwrap(),
        digest: Digest::of(b"x"),
        want: Want::Cancel,
        generation: base::limits::GENERATION_MAX,
        total: base::limits::COUNTED_BYTES_MAX,
        created_ms: i64::MAX,
        // Only one transfer of an artifact to a site can be open.
        after: vec![id.parse().unwrap()],
        lineage: None,
        known: Default::default(),
    };
    let transfers = vec![wanted; 1000];
    // Lineages, runs and pushed manifests have their own limits; one run may exceed its limit.
    let others = LINEAGE_BYTES_MAX
        + (1 << 20)
        + (256 << 10)
        + base::limits::MESSAGE_MANIFESTS_BYTES_MAX / 3 * 4;
    assert!(paging::json_bytes(&transfers) + others < base::limits::CONTROL_FRAME_BYTES_MAX);
}
