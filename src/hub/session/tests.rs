//! Tests which reports of a site the hub accepts, and which it refuses.

use std::time::Duration;

use super::list::LINEAGE_BYTES_MAX;
use super::*;
use crate::api::View;
use crate::api::types::{Action, Bytes, State, Transfer};
use crate::config;
use crate::hub::Hub;
use crate::hub::answers::fits;
use crate::hub::upload::tests::hello;
use base::durable;
use base::limits::ANSWER_BYTES_MAX;
use base::names::{ArtifactRef, Kind, TransferId, WorkIds};
use content::chunk::DEFAULT_CHUNKING;
use content::manifest::{Digest, KindInfo, Root, Totals};
use exchange::wire;
use model::paging;
use model::protocol::{Changes, Desired, FromHub, FromSite, Report, ReportBatch};
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
        hub.inner
            .catalogue
            .redeem_token("t", &[1; 32], &Claim::Site(site.clone()), &[7; 32])
            .await
            .unwrap();
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .inner
            .identity
            .issue_for(&site, request.csr_der())
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
                Receipt::sign(row, self.identity.cert_der(), |statement| {
                    self.identity.sign(statement)
                })
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
    let others = LINEAGE_BYTES_MAX + (1 << 20) + (256 << 10) + base::limits::TOLD_BYTES_MAX / 3 * 4;
    assert!(paging::json_bytes(&transfers) + others < base::limits::CONTROL_FRAME_BYTES_MAX);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_for_one_site_is_read_only_for_that_site() {
    const SITES: usize = 8;
    const CHANGES: u64 = 20;
    let bench = crate::hub::upload::tests::Bench::start().await;
    let catalogue = &bench.hub.inner.catalogue;
    let mut connected = Vec::new();
    for n in 0..SITES {
        let name: SiteName = format!("site-{n}").parse().unwrap();
        let token = bench.token(Some(name.as_str()), None).await;
        let identity = bench.join(&token, &Claim::Site(name.clone())).await;
        let link = bench.dial(&identity).await;
        let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
        send.write_all(&[CONTROL]).await.unwrap();
        wire::send(&mut send, &hello(true)).await.unwrap();
        changes(&mut recv).await;
        connected.push((name, link, send, recv));
    }
    let (name, _, _, recv) = &mut connected[3];
    let root = Root {
        format: 1,
        kind: Kind::Model,
        info: KindInfo::Files,
        chunking: DEFAULT_CHUNKING,
        totals: Totals::default(),
        depth: 0,
        pages: vec![],
    };
    let artifact: ArtifactRef = "model/m:1".parse().unwrap();
    catalogue
        .add_artifact(&artifact, &root, None)
        .await
        .unwrap();
    let part = Part {
        artifact,
        digest: root.digest(),
        total: 0,
        needs: None,
        sites: vec![name.clone()],
    };
    let id = catalogue
        .deliver(&state::new_delivery_id(), None, &[part], &[])
        .await
        .unwrap()
        .remove(0);
    let mut listed = async |want: Want| {
        let list = async {
            loop {
                if changes(recv)
                    .await
                    .set
                    .iter()
                    .any(|wanted| wanted.want == want)
                {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(30), list).await.unwrap();
    };
    listed(Want::Run).await;
    let before = catalogue.reads();
    for _ in 0..CHANGES / 2 {
        catalogue.act(&id, Action::Pause).await.unwrap();
        listed(Want::Pause).await;
        catalogue.act(&id, Action::Resume).await.unwrap();
        listed(Want::Run).await;
    }
    let each = (catalogue.reads() - before) / CHANGES;
    // Three reads for the site, and a few for the hub's own work. If each site's state were read,
    // there would be 24 more.
    assert!((3..16).contains(&each), "{each} reads for a change");
}

/// Changes rows of the hub's catalogue.
async fn damage(dir: &std::path::Path, sql: &'static str, id: &TransferId) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(dir.join("catalogue.db"));
    let mut db = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let damaged = sqlx::query(sql).bind(id.as_str());
    assert_eq!(damaged.execute(&mut db).await.unwrap().rows_affected(), 1);
    sqlx::Connection::close(db).await.unwrap();
}

#[tokio::test]
async fn a_transfer_that_cannot_be_read_stops_no_other_and_doctor_names_it() {
    let bench = Bench::start().await;
    let bad = bench.deliver("model/m:1").await;
    let sound = bench.deliver("model/n:1").await;
    let data = bench._dir.path().join("hub");
    damage(
        &data,
        "UPDATE transfer SET body = 'no JSON' WHERE id = $1",
        &bad.id,
    )
    .await;

    // A site needs no more than what is undamaged.
    let desired = async || {
        let site = Bench::site();
        let wanted = bench.hub.inner.sessions.desired_transfers(&site);
        let wanted = wanted.await.unwrap();
        wanted
            .into_iter()
            .map(|wanted| wanted.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(desired().await, [bad.id.clone(), sound.id.clone()]);
    damage(
        &data,
        "UPDATE transfer SET digest = x'00' WHERE id = $1",
        &bad.id,
    )
    .await;
    assert_eq!(desired().await, std::slice::from_ref(&sound.id));
    let body = bench.signed(&sound);
    assert_eq!(
        bench.report(&sound, State::Done, body).await.unwrap(),
        State::Done
    );
    let lines = crate::api::Backend::doctor(&bench.hub).await.unwrap();
    let named = format!("fault catalogue: transfer {} cannot be read", bad.id);
    assert!(
        lines.iter().any(|line| line.starts_with(&named)),
        "{lines:?}"
    );
}

/// The next changes; acknowledgements before them are skipped.
async fn changes(recv: &mut RecvHalf) -> Changes {
    let next = async {
        loop {
            match wire::receive(recv).await.unwrap() {
                FromHub::Changes(changes) => return changes,
                FromHub::Stored { .. } => {}
                FromHub::Desired { .. } => unreachable!("the site understands changes"),
            }
        }
    };
    timeout(Duration::from_secs(30), next).await.unwrap()
}

/// The next acknowledgement; changes before it are skipped.
async fn stored(recv: &mut RecvHalf) -> (u64, Vec<TransferId>) {
    let next = async {
        loop {
            if let FromHub::Stored { number, unstored } = wire::receive(recv).await.unwrap() {
                return (number, unstored);
            }
        }
    };
    timeout(Duration::from_secs(30), next).await.unwrap()
}

/// A connected hub with three open transfers to one site, and the control stream of that site.
struct Connected {
    bench: crate::hub::upload::tests::Bench,
    rows: Vec<TransferRow>,
    identity: SiteIdentity,
    _link: Link,
    send: SendHalf,
    recv: RecvHalf,
}

impl Connected {
    async fn start() -> Self {
        let bench = crate::hub::upload::tests::Bench::start().await;
        let token = bench.token(Some("mal"), None).await;
        let identity = bench.join(&token, &Claim::Site(Bench::site())).await;
        let mut rows = Vec::new();
        for name in ["model/a:1", "model/b:1", "model/c:1"] {
            rows.push(Self::deliver(&bench, name).await);
        }
        let link = bench.dial(&identity).await;
        let (mut send, recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
        send.write_all(&[CONTROL]).await.unwrap();
        wire::send(&mut send, &hello(true)).await.unwrap();
        Self {
            bench,
            rows,
            identity,
            _link: link,
            send,
            recv,
        }
    }

    async fn deliver(bench: &crate::hub::upload::tests::Bench, name: &str) -> TransferRow {
        let catalogue = &bench.hub.inner.catalogue;
        let root = Root {
            format: 1,
            kind: Kind::Model,
            info: KindInfo::Files,
            chunking: DEFAULT_CHUNKING,
            totals: Totals::default(),
            depth: 0,
            pages: vec![],
        };
        let artifact: ArtifactRef = name.parse().unwrap();
        catalogue
            .add_artifact(&artifact, &root, None)
            .await
            .unwrap();
        let part = Part::new(
            &catalogue.artifact(&artifact).await.unwrap(),
            &[Bench::site()],
        );
        let (delivery, parts) = (state::new_delivery_id(), [part]);
        let ids = catalogue.deliver(&delivery, None, &parts, &[]).await;
        let id = ids.unwrap().remove(0);
        catalogue.transfer(&id).await.unwrap()
    }

    async fn report(&mut self, number: u64, reports: Vec<Report>) {
        let batch = ReportBatch::new(number, reports, &mut None);
        let message = FromSite::Reports(batch);
        wire::send(&mut self.send, &message).await.unwrap();
    }

    fn done(&self, row: &TransferRow) -> Report {
        let sign = |statement: &[u8]| self.identity.sign(statement);
        let receipt = Receipt::sign(row, self.identity.cert_der(), sign).unwrap();
        Report {
            id: row.id.clone(),
            generation: 0,
            state: State::Done,
            body: Body {
                receipt: Some(receipt),
                ..Body::default()
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_receives_the_list_once_and_then_only_what_changed() {
    let mut site = Connected::start().await;
    let list = changes(&mut site.recv).await;
    assert!(list.begin && list.end && !list.partial, "{list:?}");
    assert_eq!(
        list.set.iter().map(|wanted| &wanted.id).collect::<Vec<_>>(),
        site.rows.iter().map(|row| &row.id).collect::<Vec<_>>()
    );
    let new = Connected::deliver(&site.bench, "model/d:1").await;
    let change = changes(&mut site.recv).await;
    assert_eq!((change.revision, change.begin), (list.revision + 1, false));
    assert_eq!((change.set.len(), &change.set[0].id), (1, &new.id));
    // A report is stored, acknowledged, and the transfer is removed from the list.
    let done = site.done(&new);
    site.report(7, vec![done]).await;
    assert_eq!(stored(&mut site.recv).await, (7, Vec::new()));
    let change = changes(&mut site.recv).await;
    assert_eq!(change.removed, [new.id]);
    assert!(change.set.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_the_hub_cannot_read_does_not_end_the_transfer_at_the_site() {
    let mut site = Connected::start().await;
    let data = site.bench.hub.inner.config.data_dir.clone();
    let (bad, gone) = (site.rows[0].id.clone(), site.rows[1].id.clone());
    changes(&mut site.recv).await;
    // While the site is connected: one row is unreadable, another is not found as one of the site.
    damage(
        &data,
        "UPDATE transfer SET digest = x'00' WHERE id = $1",
        &bad,
    )
    .await;
    damage(&data, "UPDATE transfer SET site = '/' WHERE id = $1", &gone).await;
    let new = Connected::deliver(&site.bench, "model/d:1").await;
    let change = changes(&mut site.recv).await;
    assert_eq!((change.set.len(), &change.set[0].id), (1, &new.id));
    assert!(change.removed.is_empty(), "{change:?}");
    // With a new connection: the hub lists the row that it cannot read.
    let link = site.bench.dial(&site.identity).await;
    let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
    send.write_all(&[CONTROL]).await.unwrap();
    wire::send(&mut send, &hello(true)).await.unwrap();
    let list = changes(&mut recv).await;
    assert_eq!((&list.kept[..], list.set.len()), (&[bad][..], 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_could_not_be_stored_is_named_and_can_be_sent_again() {
    let mut site = Connected::start().await;
    changes(&mut site.recv).await;
    let data = site.bench.hub.inner.config.data_dir.clone();
    let (bad, good) = (site.rows[0].clone(), site.rows[1].clone());
    damage(
        &data,
        "UPDATE transfer SET body = 'x' WHERE id = $1",
        &bad.id,
    )
    .await;
    let reports = vec![site.done(&bad), site.done(&good)];
    site.report(1, reports).await;
    assert_eq!(stored(&mut site.recv).await, (1, vec![bad.id.clone()]));
    damage(
        &data,
        "UPDATE transfer SET body = '{}' WHERE id = $1",
        &bad.id,
    )
    .await;
    let again = vec![site.done(&bad)];
    site.report(2, again).await;
    assert_eq!(stored(&mut site.recv).await, (2, Vec::new()));
    let catalogue = &site.bench.hub.inner.catalogue;
    for id in [bad.id, good.id] {
        assert_eq!(catalogue.transfer(&id).await.unwrap().state, State::Done);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_queue_is_listed_completely_in_small_parts() {
    const TRANSFERS: usize = 1_500;
    let site = Connected::start().await;
    let data = site.bench.hub.inner.config.data_dir.clone();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(data.join("catalogue.db"));
    let mut db = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let copies = "INSERT INTO transfer (id, delivery, reference, digest, site, want, generation, state, body, created_ms, updated_ms, cursor, after_ids)
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $2)
        SELECT 't-x' || i, delivery, 'model/x' || i || ':1', digest, site, want, generation, state, body, created_ms - i, updated_ms, cursor, after_ids
        FROM transfer, n WHERE id = $1";
    let copied = sqlx::query(copies)
        .bind(site.rows[0].id.as_str())
        .bind(TRANSFERS as i64)
        .execute(&mut db);
    assert_eq!(copied.await.unwrap().rows_affected(), TRANSFERS as u64);
    sqlx::Connection::close(db).await.unwrap();
    // A new connection, as the first one may have been listed before.
    let link = site.bench.dial(&site.identity).await;
    let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await.unwrap();
    send.write_all(&[CONTROL]).await.unwrap();
    wire::send(&mut send, &hello(true)).await.unwrap();
    let (mut listed, mut parts) = (std::collections::HashSet::new(), 0);
    loop {
        let part = changes(&mut recv).await;
        assert!(paging::json_bytes(&part) <= base::limits::CHANGES_BYTES_MAX + (4 << 10));
        parts += 1;
        assert_eq!(part.begin, parts == 1);
        listed.extend(part.set.into_iter().map(|wanted| wanted.id));
        if part.end {
            break;
        }
    }
    assert_eq!(listed.len(), TRANSFERS + 3);
    assert!(parts > 5, "{parts}");
}
