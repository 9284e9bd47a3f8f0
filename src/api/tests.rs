//! The API over a real socket, with a backend out of memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};

use super::fake::{Fake, TOKEN, job, transfer};
use super::types::{State, Transfer, TransferQuery, Worker};
use base::fault::{Fault, Retry};
use base::limits::{API_BODY_BYTES_MAX, API_CONNECTIONS_MAX, API_HEAD_MAX, API_PAGE_BYTES};
use base::tally::Log;
use base::workers::Pace;

mod rights;
mod scope;
mod tokens;

struct Daemon {
    fake: Arc<Fake>,
    base: String,
    client: Client,
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<(), Fault>>,
}

async fn daemon() -> Daemon {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fake = Arc::new(Fake::default());
    let (base, stop, task) = fake.serve().await;
    let client = Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    Daemon {
        fake,
        base,
        client,
        stop,
        task,
    }
}

impl Daemon {
    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .header("X-Packhorse-Token", TOKEN)
    }
    async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }
    async fn post(&self, path: &str, body: Value) -> Response {
        self.request(Method::POST, path)
            .json(&body)
            .send()
            .await
            .unwrap()
    }
}

/// Checks status, form and code of an error; returns its message.
async fn error(response: Response, status: StatusCode, code: &str) -> String {
    assert_eq!(response.status(), status);
    assert!(response.headers().contains_key("x-packhorse-version"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        body.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["code", "message", "next"]
    );
    assert_eq!(body["code"], code);
    body["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn changes_are_returned_in_answers_of_a_bounded_size() {
    let d = daemon().await;
    // Each about 8 KiB as JSON: more than one answer holds.
    for n in 0..700 {
        let message = Some(format!("{n} {}", "x".repeat(8000)));
        d.fake.put(Transfer {
            message,
            ..transfer(&format!("t{n}"), "chengdu", State::Queued)
        });
    }
    let number = |response: &Response, name: &str| {
        response
            .headers()
            .get(name)
            .map(|v| v.to_str().unwrap().parse::<u64>().unwrap())
    };
    // A snapshot is whole, newest first.
    let rows: Vec<Transfer> = d
        .get("/v1/transfers?limit=10000")
        .await
        .json()
        .await
        .unwrap();
    let newest_first: Vec<String> = (0..700).rev().map(|n| format!("t{n}")).collect();
    assert!(
        rows.iter().map(|row| &row.id).eq(&newest_first),
        "{} rows",
        rows.len()
    );
    // What changed: the cursor goes on behind what was given.
    let (mut since, mut seen, mut answers) = (0, 0, 0);
    loop {
        let response = d
            .get(&format!("/v1/transfers?limit=10000&since={since}"))
            .await;
        since = number(&response, "x-packhorse-cursor").unwrap();
        let more = number(&response, "x-packhorse-next");
        assert!(more.is_none_or(|more| more == since));
        let text = response.text().await.unwrap();
        assert!(text.len() <= API_PAGE_BYTES + 2);
        let rows: Vec<Transfer> = serde_json::from_str(&text).unwrap();
        if rows.is_empty() {
            break;
        }
        seen += rows.len();
        answers += 1;
        assert_eq!(
            more.is_some(),
            seen < 700,
            "it says whether more has changed"
        );
    }
    assert!(
        seen == 700 && answers > 10,
        "{seen} rows in {answers} answers"
    );
    // The command line reads the whole snapshot.
    let api = d.base.strip_prefix("http://").unwrap().parse().unwrap();
    let nowhere = std::path::Path::new("/nowhere");
    let client =
        crate::cli::client::Client::to_daemon(nowhere, api, super::ApiToken::parse(TOKEN).unwrap())
            .unwrap();
    let (all, _) = client
        .transfers(&TransferQuery {
            limit: Some(10_000),
            ..TransferQuery::default()
        })
        .await
        .unwrap();
    assert_eq!(all.len(), 700);
    // And all that changed, up to what it asks for.
    for (limit, expected) in [(10_000, 700), (100, 100)] {
        let query = TransferQuery {
            since: Some(0),
            limit: Some(limit),
            ..TransferQuery::default()
        };
        let (all, cursor) = client.transfers(&query).await.unwrap();
        assert_eq!((all.len(), cursor), (expected, expected as u64));
    }
}

#[tokio::test]
async fn a_token_is_wanted_everywhere_but_for_probes() {
    let d = daemon().await;
    for path in [
        "/".to_owned(),
        "/healthz".into(),
        "/readyz".into(),
        "/openapi.json".into(),
        format!("/v1/proof?challenge={}", "0".repeat(64)),
    ] {
        let response = d
            .client
            .get(format!("{}{path}", d.base))
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["x-packhorse-version"], super::VERSION);
        assert!(!response.headers().contains_key("set-cookie"));
    }
    let paths = [
        "/metrics",
        "/v1/artifacts",
        "/v1/artifacts/show?ref=x",
        "/v1/transfers",
        "/v1/sites",
        "/v1/doctor",
        "/v1/workers",
        "/v1/jobs?id=x",
        "/v1/events",
    ];
    for path in paths {
        let bare = d
            .client
            .get(format!("{}{path}", d.base))
            .send()
            .await
            .unwrap();
        assert_eq!(
            error(bare, StatusCode::UNAUTHORIZED, "not_allowed").await,
            "the API wants a token",
            "{path}"
        );
    }
    let wrong = d
        .client
        .get(format!("{}/v1/sites", d.base))
        .header("X-Packhorse-Token", "x")
        .send()
        .await
        .unwrap();
    assert_eq!(
        error(wrong, StatusCode::UNAUTHORIZED, "not_allowed").await,
        "the API token is wrong"
    );
    let bearer = d
        .client
        .get(format!("{}/v1/sites", d.base))
        .bearer_auth(TOKEN)
        .send()
        .await
        .unwrap();
    assert_eq!(bearer.status(), 200);
    // A body is not even read for who may not ask.
    let post = d
        .client
        .post(format!("{}/v1/transfers", d.base))
        .body("{")
        .send()
        .await
        .unwrap();
    error(post, StatusCode::UNAUTHORIZED, "not_allowed").await;
}

#[tokio::test]
async fn errors_have_one_form() {
    let d = daemon().await;
    error(
        d.get("/v1/nothing").await,
        StatusCode::NOT_FOUND,
        "not_found",
    )
    .await;
    error(
        d.get("/v1/plan").await,
        StatusCode::METHOD_NOT_ALLOWED,
        "usage",
    )
    .await;
    error(
        d.request(Method::DELETE, "/").send().await.unwrap(),
        StatusCode::METHOD_NOT_ALLOWED,
        "usage",
    )
    .await;
    error(
        d.get("/v1/artifacts/show?ref=dataset/x:1").await,
        StatusCode::NOT_FOUND,
        "not_found",
    )
    .await;
    error(
        d.get("/v1/artifacts/show").await,
        StatusCode::BAD_REQUEST,
        "usage",
    )
    .await;
    error(
        d.get("/v1/transfers?since=soon").await,
        StatusCode::BAD_REQUEST,
        "usage",
    )
    .await;
    error(
        d.get("/v1/events?format=xml").await,
        StatusCode::BAD_REQUEST,
        "usage",
    )
    .await;
    let missing = error(
        d.post("/v1/transfers", json!({"to": "all"})).await,
        StatusCode::BAD_REQUEST,
        "usage",
    )
    .await;
    assert!(missing.contains("artifacts"), "{missing}");
    let unknown = error(
        d.post("/v1/gc2", json!({})).await,
        StatusCode::NOT_FOUND,
        "not_found",
    )
    .await;
    assert!(unknown.contains("/v1/gc2"));
    let extra = d
        .post(
            "/v1/transfers",
            json!({"artifacts": [], "to": "all", "dryRun": true}),
        )
        .await;
    assert!(
        error(extra, StatusCode::BAD_REQUEST, "usage")
            .await
            .contains("dryRun")
    );
    let broken = d
        .request(Method::POST, "/v1/plan")
        .header("content-type", "application/json")
        .body("{\"a")
        .send()
        .await
        .unwrap();
    error(broken, StatusCode::BAD_REQUEST, "usage").await;
    let untyped = d
        .request(Method::POST, "/v1/plan")
        .body("{}")
        .send()
        .await
        .unwrap();
    error(untyped, StatusCode::UNSUPPORTED_MEDIA_TYPE, "usage").await;
    let name = d
        .post("/v1/artifacts", json!({"source": "/x", "as": "nonsense"}))
        .await;
    error(name, StatusCode::BAD_REQUEST, "usage").await;
    let large = json!({"artifacts": ["x".repeat(API_BODY_BYTES_MAX)], "to": "all"});
    error(
        d.post("/v1/plan", large).await,
        StatusCode::PAYLOAD_TOO_LARGE,
        "usage",
    )
    .await;
    assert!(d.fake.world.lock().delivered.is_empty());
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let d = daemon().await;
    d.fake.world.lock().ready =
        Some(Fault::unreachable("postgres at db does not answer").with_retry(Retry::AfterMs(1500)));
    let response = d.get("/readyz").await;
    assert_eq!(response.headers()["retry-after"], "2");
    assert!(
        error(response, StatusCode::SERVICE_UNAVAILABLE, "unreachable")
            .await
            .contains("postgres")
    );
}

#[tokio::test]
async fn work_is_accepted_and_followed() {
    let d = daemon().await;
    d.fake
        .put_job(job("publish", Ok(json!({"artifact": "dataset/x:1"}))));
    let response = d
        .post(
            "/v1/artifacts",
            json!({"source": "/x", "as": "dataset/x:1", "options": {"for": "dataset/y:1"}}),
        )
        .await;
    assert_eq!(response.status(), 202);
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "publish");
    assert_eq!(
        d.fake.world.lock().published[0]
            .options
            .for_dataset
            .as_deref(),
        Some("dataset/y:1")
    );
    let done: Value = d
        .get("/v1/jobs?id=publish&wait=30")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(done["result"]["artifact"], "dataset/x:1");
    let deliver = d
        .post(
            "/v1/transfers",
            json!({"artifacts": ["dataset/x:1"], "to": "all"}),
        )
        .await;
    assert_eq!(deliver.status(), 202);
    let token: Value = d
        .post("/v1/tokens", json!({"site": "chengdu", "ttl_seconds": 60}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(token["token"], "id.secret-for-chengdu-60s");
    let text = d.get("/metrics").await;
    assert!(
        text.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
}

#[tokio::test]
async fn a_long_poll_ends_with_the_change_and_with_its_time() {
    let d = daemon().await;
    d.fake.put(transfer("t1", "chengdu", State::Queued));
    let now = d.get("/v1/transfers").await;
    assert_eq!(now.headers()["x-packhorse-cursor"], "1");
    let began = Instant::now();
    let none = d.get("/v1/transfers?since=1&wait=1").await;
    assert!(began.elapsed() >= Duration::from_millis(900));
    assert_eq!(none.headers()["x-packhorse-cursor"], "1");
    assert_eq!(none.json::<Value>().await.unwrap(), json!([]));
    let asked = d.fake.asked(1);
    let both = async {
        tokio::join!(d.get("/v1/transfers?since=1&wait=60"), async {
            asked.await;
            d.fake.put(transfer("t1", "chengdu", State::Planning));
        })
    };
    let (changed, ()) = tokio::time::timeout(Duration::from_secs(30), both)
        .await
        .expect("the change ends the wait");
    assert_eq!(changed.headers()["x-packhorse-cursor"], "2");
    assert_eq!(
        changed.json::<Value>().await.unwrap()[0]["state"],
        "planning"
    );
}

/// Reads a stream until it holds `frames` frames.
async fn read_frames(response: Response, frames: usize) -> Vec<String> {
    let mut stream = response.bytes_stream();
    let mut text = String::new();
    while text.matches("\n\n").count() < frames {
        let piece = tokio::time::timeout(Duration::from_secs(15), stream.next())
            .await
            .unwrap();
        text.push_str(std::str::from_utf8(&piece.unwrap().unwrap()).unwrap());
    }
    text.split("\n\n")
        .filter(|f| !f.is_empty())
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn the_event_stream_resumes_after_the_last_event() {
    let d = daemon().await;
    for state in [State::Queued, State::Planning, State::Transferring] {
        d.fake.put(transfer("t1", "chengdu", state));
    }
    let stream = d.get("/v1/events?since=1").await;
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    assert!(!stream.headers().contains_key("content-length"));
    let frames = read_frames(stream, 2).await;
    assert!(
        frames[0].contains("id: 2\n") && frames[0].contains("event: transfer\n"),
        "{frames:?}"
    );
    // Last-Event-ID goes before since.
    // One query for what there is, and a second that finds nothing new.
    let asked = d.fake.asked(2);
    let again = d
        .request(Method::GET, "/v1/events?since=0")
        .header("Last-Event-ID", "2")
        .send()
        .await
        .unwrap();
    let (frames, ()) = tokio::join!(read_frames(again, 2), async {
        asked.await;
        d.fake.put(transfer("t1", "chengdu", State::Done));
    });
    assert!(
        frames[0].contains("id: 3\n") && frames[1].contains("id: 4\n"),
        "{frames:?}"
    );
    let array = d.get("/v1/events?since=2&format=json").await;
    assert_eq!(array.headers()["x-packhorse-cursor"], "4");
    assert_eq!(
        array
            .json::<Value>()
            .await
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let accept = d
        .request(Method::GET, "/v1/events?since=4&wait=1")
        .header("Accept", "application/json")
        .send()
        .await
        .unwrap();
    assert_eq!(accept.json::<Value>().await.unwrap(), json!([]));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_says_that_it_lives() {
    let d = daemon().await;
    let frames = read_frames(d.get("/v1/events").await, 1).await;
    assert_eq!(frames, [": heartbeat"]);
}

#[tokio::test]
async fn a_stop_ends_waits_and_streams() {
    let d = daemon().await;
    let stream = d.get("/v1/events").await;
    let (poll, task) = (
        d.request(Method::GET, "/v1/transfers?since=0&wait=60")
            .send(),
        d.task,
    );
    let asked = d.fake.asked(1);
    let all = async {
        let (answer, ()) = tokio::join!(poll, async {
            asked.await;
            d.stop.send(()).unwrap();
        });
        assert_eq!(answer.unwrap().status(), 200);
        assert_eq!(stream.bytes().await.unwrap(), "");
        task.await.unwrap().unwrap();
    };
    // Less than the poll would wait.
    tokio::time::timeout(Duration::from_secs(30), all)
        .await
        .expect("a stop ends them");
}

#[tokio::test]
async fn an_unknown_key_of_a_query_is_refused() {
    let d = daemon().await;
    for path in [
        "/v1/transfers?site=fab",
        "/v1/transfers?limt=1",
        "/v1/transfers?limit=1&Wait=1",
        "/v1/artifacts?kind=model",
        "/v1/deliveries/show?id=d-1&x",
        "/v1/events?format=json&sinc=1",
        "/v1/jobs?id=j-1&wait=1&all=true",
        "/v1/sites?limt=1",
        "/metrics?site=b",
        "/healthz?x=1",
        "/readyz?x=1",
        "/openapi.json?x=1",
    ] {
        let answer = d.get(path).await;
        assert_eq!(answer.status(), 400, "{path}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["code"], "usage");
        let next = body["next"].as_str().unwrap();
        assert!(
            next.starts_with("use one of: ") || next == "leave the query out",
            "{next}"
        );
    }
    assert_eq!(
        d.get("/v1/transfers?since=0&wait=0&limit=1").await.status(),
        200
    );
}

#[tokio::test]
async fn the_description_names_every_route() {
    let d = daemon().await;
    let document: Value = d.get("/openapi.json").await.json().await.unwrap();
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(paths.len(), 37, "{paths:?}");
    assert_eq!(document["servers"][0]["url"], ".");
    for schema in [
        "Transfer",
        "Artifact",
        "ArtifactDetail",
        "Site",
        "Job",
        "Published",
        "Delivered",
        "PlanRow",
        "Event",
        "ErrorBody",
        "Worker",
    ] {
        assert!(
            document["components"]["schemas"][schema].is_object(),
            "{schema}"
        );
    }
    // Every reference must lead somewhere, or generators of clients stop.
    let text = document.to_string();
    for reference in text.split("#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(
            document["components"]["schemas"][name].is_object(),
            "{name}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn unfinished_requests_keep_nobody_out() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let d = daemon().await;
    let stream = d.get("/v1/events").await;
    let mut slow = Vec::new();
    for _ in 0..API_CONNECTIONS_MAX {
        let mut socket = tokio::net::TcpStream::connect(&d.base[7..]).await.unwrap();
        socket
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            .await
            .unwrap();
        slow.push(socket);
    }
    // From the same address, with the token and without.
    let begun = Instant::now();
    assert_eq!(d.get("/v1/sites").await.status(), 200);
    assert_eq!(
        reqwest::get(format!("{}/healthz", d.base))
            .await
            .unwrap()
            .status(),
        200
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
    // Those that are left have a deadline, though a header comes now and then.
    let ends = slow.into_iter().map(|socket| async {
        let (mut read, mut write) = socket.into_split();
        let trickle = async {
            while write.write_all(b"A: b\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        let mut rest = Vec::new();
        tokio::select! { () = trickle => {} _ = read.read_to_end(&mut rest) => {} }
    });
    tokio::time::timeout(API_HEAD_MAX * 2, futures::future::join_all(ends))
        .await
        .unwrap();
    // Whoever has shown the token stays.
    assert_eq!(read_frames(stream, 1).await, [": heartbeat"]);
}

#[tokio::test]
async fn changes_and_wrong_tokens_are_logged() {
    let (log, _captured) = Log::capture();
    let d = daemon().await;
    for n in 0..100 {
        let wrong = d
            .client
            .post(format!("{}/v1/gc", d.base))
            .header("X-Packhorse-Token", format!("wrong-{n}"))
            .send()
            .await
            .unwrap();
        assert_eq!(wrong.status(), 401);
    }
    let lines = log.lines_with("wrong token");
    assert!(
        lines.len() == 1 && lines[0].contains("127.0.0.1") && lines[0].contains("POST /v1/gc"),
        "{lines:?}"
    );
    assert!(!lines[0].contains("wrong-0"), "{lines:?}");

    d.get("/v1/sites").await;
    d.post(
        "/v1/plan",
        json!({"artifacts": ["dataset/x:1"], "to": "all"}),
    )
    .await;
    assert_eq!(
        log.lines_with("a change over the API"),
        Vec::<String>::new(),
        "these change nothing"
    );
    d.post(
        "/v1/transfers",
        json!({"artifacts": ["dataset/x:1"], "to": "region=west"}),
    )
    .await;
    d.post("/v1/tokens", json!({"site": "chengdu", "ttl_seconds": 60}))
        .await;
    d.post("/v1/transfers", json!({"to": "x".repeat(10_000)}))
        .await;
    let lines = log.lines_with("a change over the API");
    assert_eq!(lines.len(), 3, "{lines:?}");
    for part in [
        "who=\"admin\"",
        "peer=127.0.0.1",
        "/v1/transfers",
        "dataset/x:1",
        "region=west",
        "status=202",
    ] {
        assert!(lines[0].contains(part), "{part}: {}", lines[0]);
    }
    assert!(
        lines[1].contains("chengdu")
            && lines[1].contains("status=200")
            && !lines[1].contains("secret-for"),
        "{}",
        lines[1]
    );
    assert!(
        lines[2].contains("status=400") && lines[2].len() < 1000,
        "{}",
        lines[2]
    );
}

#[tokio::test]
async fn the_local_socket_serves_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Arc::new(Fake::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let local = super::LocalSocket::listen(dir.path()).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let token = super::ApiToken::parse(TOKEN).unwrap();
    let served = tokio::spawn({
        let token = token.clone();
        async move {
            let stopped = async { stopped.await.unwrap() };
            let (access, _data) = super::fake::access();
            super::serve(&listener, Some(&local), fake, token, access, stopped).await
        }
    });
    let socket = super::SocketPath::of_running(dir.path()).unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder()
        .unix_socket(socket.path())
        .build()
        .unwrap();
    let ask = |path: String| client.get(format!("http://localhost{path}"));
    assert_eq!(
        ask("/v1/sites".into()).send().await.unwrap().status(),
        401,
        "it wants the token too"
    );
    assert_eq!(
        ask("/v1/sites".into())
            .header("X-Packhorse-Token", TOKEN)
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    let query = super::ProofQuery::random(&token);
    let proof: super::Proof = ask(format!("/v1/proof?challenge={}", query.challenge))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert!(proof.is_by(&token, &query) && proof.address.is_empty());
    assert_eq!(
        ask("/v1/proof?challenge=00".into())
            .send()
            .await
            .unwrap()
            .status(),
        400
    );
    drop(client);
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert!(
        super::SocketPath::of_running(dir.path()).is_none()
            && !dir.path().join("api.sock").exists()
    );
}

#[tokio::test]
async fn a_long_list_is_complete_and_sent_in_pages() {
    use base::limits::{API_PAGE_ROWS, API_ROWS_MAX};
    let d = daemon().await;
    let count = API_PAGE_ROWS + API_PAGE_ROWS / 2;
    for n in 0..count {
        d.fake
            .put(transfer(&format!("t{n}"), "chengdu", State::Queued));
    }
    let ids = async |path: &str| {
        let rows: Vec<Value> = d.get(path).await.json().await.unwrap();
        rows.iter()
            .map(|row| row["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let newest_first: Vec<String> = (0..count).rev().map(|n| format!("t{n}")).collect();
    assert_eq!(
        ids(&format!("/v1/transfers?limit={API_ROWS_MAX}")).await,
        newest_first
    );
    for limit in [
        1,
        API_PAGE_ROWS - 1,
        API_PAGE_ROWS,
        API_PAGE_ROWS + 1,
        count - 1,
        count,
    ] {
        assert_eq!(
            ids(&format!("/v1/transfers?limit={limit}")).await,
            newest_first[..limit as usize],
            "{limit}"
        );
    }
    let many = vec!["t1"; 1_001].join(",");
    error(
        d.get(&format!("/v1/transfers?id={many}")).await,
        StatusCode::BAD_REQUEST,
        "usage",
    )
    .await;
    assert_eq!(ids("/v1/deliveries").await.len(), 1);
}

#[tokio::test]
async fn a_row_that_is_on_several_pages_is_sent_once() {
    let d = daemon().await;
    let row = |id: &str, state| transfer(id, "chengdu", state);
    *d.fake.repeating.lock() = Some(vec![
        vec![row("t1", State::Queued), row("t2", State::Queued)],
        vec![row("t2", State::Planning)],
        vec![row("t3", State::Queued), row("t1", State::Done)],
    ]);
    let rows: Vec<Value> = d.get("/v1/transfers?id=d-1").await.json().await.unwrap();
    let seen = rows.iter().map(|row| (&row["id"], &row["state"]));
    let expected = ["t1", "t2", "t3"].map(|id| (json!(id), json!("queued")));
    assert!(
        seen.eq(expected.iter().map(|(id, state)| (id, state))),
        "{rows:?}"
    );
}

#[tokio::test]
async fn every_list_is_complete_and_read_in_pages() {
    let d = daemon().await;
    let long = "x".repeat(3000);
    for n in 0..100 {
        let message = Some(format!("{n} {long}"));
        d.fake.put(Transfer {
            message: message.clone(),
            ..transfer(&format!("t{n}"), "chengdu", State::Queued)
        });
        d.fake
            .put_job(job(&format!("j-{n}"), Ok(json!({ "said": long }))));
        d.fake.world.lock().runs.push(super::types::Run {
            message,
            ..super::fake::run(&format!("r{n}"), super::types::RunState::Training)
        });
        let artifact = super::types::Artifact {
            changed: Some(long.clone()),
            ..super::fake::artifact(&format!("model/m:{n:03}"))
        };
        d.fake.artifacts.lock().push(artifact);
    }
    let count = async |path: &str, pointer: &str| {
        let response = d.get(path).await;
        assert_eq!(response.headers()["content-type"], "application/json");
        let mut chunks = response.bytes_stream();
        let mut text = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.unwrap();
            assert!(
                chunk.len() <= API_PAGE_BYTES + 4096,
                "{path}: {} bytes at once",
                chunk.len()
            );
            text.extend_from_slice(&chunk);
        }
        let value: Value = serde_json::from_slice(&text).unwrap();
        value.pointer(pointer).unwrap().as_array().unwrap().len()
    };
    assert_eq!(count("/v1/artifacts", "").await, 101);
    assert_eq!(
        count("/v1/artifacts/show?ref=model/m:007", "/transfers").await,
        100
    );
    assert_eq!(count("/v1/runs?limit=10000", "").await, 100);
    assert_eq!(count("/v1/jobs/list", "").await, 100);
    assert_eq!(count("/v1/transfers?id=d1", "").await, 100);
    assert_eq!(count("/v1/deliveries/show?id=d1", "/parts").await, 100);
    assert_eq!(count("/v1/sites", "").await, 1);
    // In a list of deliveries one that is too long is cut, and says so.
    let all: Vec<super::types::Delivery> = d.get("/v1/deliveries").await.json().await.unwrap();
    assert!(
        all[0].parts.len() < 100 && all[0].parts_total == Some(100),
        "{} parts",
        all[0].parts.len()
    );
    let whole: super::types::Delivery = d
        .get("/v1/deliveries/show?id=d1")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (whole.parts_total, whole.note.as_deref(), whole.sites.len()),
        (None, None, 1)
    );
}

#[tokio::test]
async fn the_workers_are_listed_with_their_last_error() {
    let d = daemon().await;
    let worker = d.fake.workers.register("flush", Pace::on_request());
    d.fake.workers.register("serve", Pace::Continuous);
    let full = || Err::<(), _>(Fault::no_space("/data: the disk is full"));
    worker.iterate_blocking(full).unwrap_err();
    let listed = async || -> Vec<Worker> { d.get("/v1/workers").await.json().await.unwrap() };
    let all = listed().await;
    assert_eq!(all.len(), 2);
    let Worker {
        name,
        state,
        iterations,
        errors,
        restarts,
        last_iteration,
        last_error,
        problem,
    } = &all[0];
    assert_eq!((name.as_str(), state.as_str()), ("flush", "failed"));
    assert_eq!((*iterations, *errors, *restarts), (1, 1, 0));
    let error = last_error.as_ref().unwrap();
    assert_eq!(error.message, "/data: the disk is full");
    assert_eq!(error.next, Fault::no_space("").next);
    for time in [&error.at, last_iteration.as_ref().unwrap()] {
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{time}");
    }
    assert!(problem.as_ref().unwrap().contains("the disk is full"));
    assert_eq!(
        (all[1].state.as_str(), &all[1].last_error),
        ("running", &None)
    );
    worker.iterate_blocking(|| Ok(())).unwrap();
    let again = &listed().await[0];
    assert_eq!((again.state.as_str(), again.iterations), ("idle", 2));
    assert!(again.last_error.is_some() && again.problem.is_none());
}

#[tokio::test]
async fn a_job_is_cancelled_over_the_api() {
    let d = daemon().await;
    d.fake.put_job(job("j-1", Ok(json!({}))));
    let cancelled: Value = d
        .request(Method::DELETE, "/v1/jobs?id=j-1")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(cancelled["id"], "j-1");
    error(
        d.request(Method::DELETE, "/v1/jobs?id=j-2")
            .send()
            .await
            .unwrap(),
        StatusCode::NOT_FOUND,
        "not_found",
    )
    .await;
    let all: Vec<Value> = d.get("/v1/jobs/list").await.json().await.unwrap();
    assert!(all.iter().any(|job| job["id"] == "j-1"));
}
