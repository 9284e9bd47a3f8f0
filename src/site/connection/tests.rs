//! A site in this process, and a hub that sends invalid messages.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::api::types::{State, TransferQuery};
use crate::config;
use crate::site::Site;
use base::durable;
use model::protocol::{CONTROL, FromHub, FromSite, Report};
use transport::identity::{CertificateRequest, HubIdentity};
use transport::{Arrival, Listener};

struct Bench {
    site: Site,
    listener: Listener,
    dir: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hub = Arc::new(
            HubIdentity::open_or_create(&dir.path().join("hub"), &"hub".parse().unwrap()).unwrap(),
        );
        let listener = Listener::bind(
            ([127, 0, 0, 1], 0).into(),
            hub.clone(),
            Arc::new(transport::testing::AdmitAll),
            &ConnectionSettings::default(),
            64 << 20,
            &base::workers::Workers::default(),
        )
        .unwrap();
        let data = dir.path().join("site");
        durable::create_dir_all(&data).unwrap();
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .issue_for(&"east".parse().unwrap(), request.csr_der())
            .unwrap();
        request
            .complete(&cert, hub.ca_der())
            .unwrap()
            .save(&data)
            .unwrap();
        let text = format!(
            "role = \"site\"\nname = \"east\"\ndata_dir = {:?}\n[listen]\napi = \"127.0.0.1:0\"\n[hub]\naddress = \"{}\"\n",
            data.display().to_string(),
            listener.local_addr()
        );
        let site = Site::open(
            config::parse(&text, "a test").unwrap(),
            CancellationToken::new(),
        )
        .await
        .unwrap();
        let work = site.clone();
        tokio::spawn(async move { work.run().await });
        Self {
            site,
            listener,
            dir,
        }
    }

    /// The control stream of the site's next connection.
    async fn control(&self) -> (Link, SendHalf, RecvHalf) {
        let work = async {
            let Some(Arrival::Site { link, .. }) = self.listener.accept().await else {
                unreachable!("another peer connected")
            };
            let (send, mut recv) = link.accept().await.unwrap();
            let mut kind = [0];
            recv.read_exact(&mut kind).await.unwrap();
            assert_eq!(kind[0], CONTROL);
            (link, send, recv)
        };
        timeout(Duration::from_secs(30), work).await.unwrap()
    }

    async fn ids(&self) -> Vec<String> {
        let (rows, _) = self
            .site
            .inner
            .opened
            .catalogue
            .transfers(&TransferQuery::default())
            .await
            .unwrap();
        rows.iter().map(|row| row.id.to_string()).collect()
    }
}

fn wanted(id: &str, delivery: &str, want: &str) -> Value {
    json!({ "id": id, "delivery": delivery, "artifact": "dataset/x:1", "digest": "00".repeat(32), "want": want, "generation": 0, "total": 1,
        "created_ms": 1, "after": [], "lineage": null })
}

fn desired(transfers: &[Value], runs: &[Value]) -> Value {
    json!({ "desired": { "revision": 1, "transfers": transfers, "runs": runs, "manifests": [] } })
}

/// The files of a site besides its own databases.
fn names(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut out = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path.clone());
            }
            out.push(path);
        }
    }
    out.sort();
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_an_invalid_id_is_refused_completely() {
    let bench = Bench::start().await;
    let victim = bench.dir.path().join("victim");
    durable::create_dir_all(&victim.join("sub")).unwrap();
    durable::replace(&victim.join("sub/data.txt"), b"keep me").unwrap();
    let before = names(&victim);
    let absolute = victim.display().to_string();
    let relative = "../../../../victim";
    let run = |id: &str, transfer: &str| {
        json!({ "want": "stop", "model": null, "borrowed": [{ "transfer": transfer, "artifact": "dataset/x:1", "digest": "00".repeat(32) }],
            "spec": { "name": "r", "id": id, "from": "west", "on": "east", "inputs": [], "expect": "model/m", "delivery": "d-1",
                "created_ms": 1, "deadline_ms": i64::MAX } })
    };
    let good = wanted("t-good", "d-1", "cancel");
    let mut after = wanted("t-after", "d-1", "run");
    after["after"] = json!([absolute]);
    let mut generation = wanted("t-generation", "d-1", "run");
    generation["generation"] = json!(1_i64 << 62);
    let hostile = [
        desired(&[good.clone(), wanted(&absolute, "d-1", "cancel")], &[]),
        desired(&[good.clone(), wanted(relative, "d-1", "run")], &[]),
        desired(&[good.clone(), wanted("..", "d-1", "cancel")], &[]),
        desired(&[good.clone(), wanted("t-1", "../d", "run")], &[]),
        desired(&[good.clone(), after], &[]),
        desired(&[good.clone(), generation], &[]),
        desired(std::slice::from_ref(&good), &[run(&absolute, "t-1")]),
        desired(std::slice::from_ref(&good), &[run("r-1", &absolute)]),
    ];
    for message in &hostile {
        assert!(
            serde_json::from_value::<FromHub>(message.clone()).is_err(),
            "{message}"
        );
    }
    // Each message costs a pause before the next connection: two are enough to check that nothing
    // is executed.
    for message in &hostile[..2] {
        let (link, mut send, mut recv) = bench.control().await;
        wire::send(&mut send, message).await.unwrap();
        // The site ends the stream and executes no part of the message.
        let end = async { while wire::receive::<FromSite>(&mut recv).await.is_ok() {} };
        timeout(Duration::from_secs(30), end).await.unwrap();
        link.close("the test continues");
        assert_eq!(
            (bench.ids().await, names(&victim)),
            (Vec::new(), before.clone()),
            "{message}"
        );
        assert!(
            bench
                .site
                .inner
                .opened
                .catalogue
                .open_runs::<Value>(9)
                .await
                .unwrap()
                .is_empty(),
            "{message}"
        );
    }
    // The same site still works with an honest hub.
    let (_link, mut send, mut recv) = bench.control().await;
    wire::send(&mut send, &desired(&[good], &[])).await.unwrap();
    let cancelled = async {
        loop {
            if let FromSite::Report(all) = wire::receive::<FromSite>(&mut recv).await.unwrap()
                && all.iter().any(|report| {
                    report.id.as_str() == "t-good" && report.state == State::Cancelled
                })
            {
                return;
            }
        }
    };
    timeout(Duration::from_secs(30), cancelled).await.unwrap();
    bench.site.inner.opened.stop.cancel();
    bench.site.stopped().await;
}

/// Waits for a report that `is` accepts.
async fn reported(recv: &mut RecvHalf, what: &str, mut is: impl FnMut(&Report) -> bool) {
    let work = async {
        loop {
            let all = match wire::receive::<FromSite>(recv).await.unwrap() {
                FromSite::Report(all) => all,
                FromSite::Reports(batch) => batch.into_reports(&mut None).collect(),
                _ => continue,
            };
            if all.iter().any(&mut is) {
                return;
            }
        }
    };
    timeout(Duration::from_secs(30), work)
        .await
        .unwrap_or_else(|_| unreachable!("never reported: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_cannot_be_adopted_delays_no_other() {
    let bench = Bench::start().await;
    let (_link, mut send, mut recv) = bench.control().await;
    let bad = |generation: i64| {
        let mut bad = wanted("t-bad", "d-1", "cancel");
        (bad["artifact"], bad["generation"]) = (json!("dataset/bad:1"), generation.into());
        bad
    };
    wire::send(&mut send, &desired(&[bad(0)], &[]))
        .await
        .unwrap();
    reported(&mut recv, "the first", |report| {
        report.id.as_str() == "t-bad" && report.state == State::Cancelled
    })
    .await;
    // Its row is damaged, so every operation on it fails.
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(bench.dir.path().join("site/catalogue.db"));
    let mut db = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let damage =
        "UPDATE transfer SET body = 'no JSON', state = 'failed', want = 'run' WHERE id = 't-bad'";
    assert_eq!(
        sqlx::query(damage)
            .execute(&mut db)
            .await
            .unwrap()
            .rows_affected(),
        1
    );
    sqlx::Connection::close(db).await.unwrap();

    let is_cancelled = |id: &'static str| {
        move |report: &Report| report.id.as_str() == id && report.state == State::Cancelled
    };
    wire::send(
        &mut send,
        &desired(&[bad(1), wanted("t-1", "d-1", "cancel")], &[]),
    )
    .await
    .unwrap();
    reported(
        &mut recv,
        "a later one in the same list",
        is_cancelled("t-1"),
    )
    .await;
    wire::send(
        &mut send,
        &desired(&[bad(1), wanted("t-2", "d-1", "cancel")], &[]),
    )
    .await
    .unwrap();
    reported(
        &mut recv,
        "one of a later list, over the same connection",
        is_cancelled("t-2"),
    )
    .await;
    assert!(
        bench
            .site
            .inner
            .opened
            .runner
            .unwritten()
            .iter()
            .any(|row| row.id.as_str() == "t-bad" && row.body.message.is_some())
    );
    bench.site.inner.opened.stop.cancel();
    bench.site.stopped().await;
}

fn changes(revision: u64, content: &Value) -> Value {
    let mut changes = json!({ "revision": revision });
    changes
        .as_object_mut()
        .unwrap()
        .extend(content.as_object().unwrap().clone());
    json!({ "changes": changes })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_are_executed_and_a_missing_one_brings_the_complete_list() {
    let bench = Bench::start().await;
    let (_link, mut send, mut recv) = bench.control().await;
    let paused = |id: &str, artifact: &str| {
        let mut wanted = wanted(id, "d-1", "pause");
        wanted["artifact"] = json!(artifact);
        wanted
    };
    let is = |id: &'static str, state: State| {
        move |report: &Report| report.id.as_str() == id && report.state == state
    };
    // The complete list in two parts.
    let first = json!({ "begin": true, "set": [paused("t-1", "model/a:1")] });
    let last = json!({ "end": true, "set": [paused("t-2", "model/b:1"), paused("t-3", "model/c:1")], "runs": [] });
    wire::send(&mut send, &changes(1, &first)).await.unwrap();
    wire::send(&mut send, &changes(2, &last)).await.unwrap();
    // One batch may have several of them.
    let mut missing = vec!["t-1", "t-2", "t-3"];
    reported(&mut recv, "all three", |report| {
        missing.retain(|id| report.id.as_str() != *id || report.state != State::Paused);
        missing.is_empty()
    })
    .await;
    let removed = json!({ "removed": ["t-1"] });
    wire::send(&mut send, &changes(3, &removed)).await.unwrap();
    reported(&mut recv, "a removed one", is("t-1", State::Cancelled)).await;
    // Revision 4 is missing.
    let ignored = json!({ "removed": ["t-2"] });
    wire::send(&mut send, &changes(5, &ignored)).await.unwrap();
    let asked =
        async { while wire::receive::<FromSite>(&mut recv).await.unwrap() != FromSite::List {} };
    timeout(Duration::from_secs(30), asked).await.unwrap();
    // A transfer that the hub cannot read continues, one that it does not list is given up.
    let list = json!({ "begin": true, "end": true, "kept": ["t-2"], "runs": [] });
    wire::send(&mut send, &changes(6, &list)).await.unwrap();
    reported(
        &mut recv,
        "one that is not listed",
        is("t-3", State::Cancelled),
    )
    .await;
    let catalogue = &bench.site.inner.opened.catalogue;
    assert_eq!(
        catalogue.transfer("t-2").await.unwrap().state,
        State::Paused
    );
    bench.site.inner.opened.stop.cancel();
    bench.site.stopped().await;
}
