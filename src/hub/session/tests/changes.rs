//! What the hub sends to a site that receives changes, and what it acknowledges.

use std::time::Duration;

use super::*;
use crate::hub::upload::tests::hello;
use model::protocol::{Changes, FromHub, ReportBatch};

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
    let id = deliver_model(catalogue, "model/m:1", name).await;
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

/// Delivers a new model without content to a site.
async fn deliver_model(catalogue: &Catalogue, name: &str, site: &SiteName) -> TransferId {
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
    let row = catalogue.artifact(&artifact).await.unwrap();
    let part = Part::new(&row, std::slice::from_ref(site));
    let delivery = state::new_delivery_id();
    let ids = catalogue.deliver(&delivery, None, &[part], &[]).await;
    ids.unwrap().remove(0)
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
        let id = deliver_model(catalogue, name, &Bench::site()).await;
        catalogue.transfer(&id).await.unwrap()
    }

    async fn report(&mut self, number: u64, reports: Vec<Report>) {
        let batch = ReportBatch::new(number, reports, &mut None);
        let message = FromSite::Reports(batch);
        wire::send(&mut self.send, &message).await.unwrap();
    }

    fn done(&self, row: &TransferRow) -> Report {
        let sign = |statement: &[u8]| self.identity.sign(statement);
        let receipt = Receipt::sign(row, clock::now_ms(), self.identity.cert_der(), sign).unwrap();
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
