//! What the holder of a token with a scope sees: nothing of what is outside it.

use super::super::fake;
use super::rights::token;
use super::*;

/// A daemon with things inside and outside the scope of the token that is returned.
async fn world(role: &str) -> (Daemon, String) {
    let d = daemon().await;
    d.fake
        .strict
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let sites = [("xian", "west"), ("harbin", "north")];
    *d.fake.more_sites.lock() = sites.map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
    *d.fake.artifacts.lock() = vec![
        fake::artifact("dataset/hidden-a:v1"),
        super::super::types::Artifact {
            origin: Some("harbin".parse().unwrap()),
            info: json!({"is": "labels", "dataset": {"artifact": "dataset/hidden-a:v1", "digest": "ab"}}),
            ..fake::artifact("dataset/line3:v1")
        },
        fake::artifact("model/hidden-b:v1"),
    ];
    let put = |id: &str, artifact: &str, site: &str| {
        d.fake.put(Transfer {
            delivery: format!("d-{}", &id[2..3]),
            artifact: artifact.parse().unwrap(),
            message: Some(format!("waits for harbin, {artifact}")),
            next: Some("nothing".into()),
            ..transfer(id, site, State::Queued)
        });
    };
    put("t-1a", "dataset/line3:v1", "chengdu");
    put("t-1b", "dataset/line3:v1", "harbin");
    put("t-1c", "model/hidden-b:v1", "chengdu");
    put("t-2a", "dataset/hidden-a:v1", "xian");
    put("t-3a", "dataset/line3:v1", "xian");
    let scope = json!({"artifacts": ["dataset/line3*"], "sites": "region=west"});
    let text = token(&d, "scoped", role, scope).await;
    (d, text)
}

impl Daemon {
    fn with(&self, token: &str, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        request.header("X-Packhorse-Token", token)
    }
    async fn json(&self, token: &str, path: &str) -> Value {
        let response = self.with(token, Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.json().await.unwrap()
    }
}

fn ids(rows: &Value, field: &str) -> Vec<String> {
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row[field].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn lists_counts_and_events_hold_nothing_from_outside() {
    let (d, text) = world("viewer").await;
    let artifacts = d.json(&text, "/v1/artifacts").await;
    assert_eq!(ids(&artifacts, "artifact"), ["dataset/line3:v1"]);
    assert_eq!(
        ids(&d.json(&text, "/v1/sites").await, "name"),
        ["chengdu", "xian"]
    );
    let open: Vec<Value> = d.json(&text, "/v1/sites").await.as_array().unwrap().clone();
    assert_eq!(open[0]["open_transfers"], 1, "the fake says 2 of all");
    let transfers = d.json(&text, "/v1/transfers").await;
    assert_eq!(ids(&transfers, "id"), ["t-3a", "t-1a"]);
    let whole = d.json(&text, "/v1/deliveries/show?id=d-1").await;
    assert_eq!(ids(&whole["parts"], "id"), ["t-1a"]);
    assert_eq!(
        (&whole["sites"], &whole["bytes"]["total"]),
        (&json!(["chengdu"]), &json!(1000))
    );
    let events = d.json(&text, "/v1/events?format=json").await;
    let of_events: Vec<&str> = events
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["body"]["id"].as_str().unwrap())
        .collect();
    assert_eq!(of_events, ["t-1a", "t-3a"]);
    let stream = d
        .with(&text, Method::GET, "/v1/events")
        .send()
        .await
        .unwrap();
    let frames = read_frames(stream, 2).await.join("\n");
    for (what, text) in [
        ("artifacts", artifacts.to_string()),
        ("transfers", transfers.to_string()),
        ("delivery", whole.to_string()),
        ("events", events.to_string()),
        ("stream", frames),
        ("sites", json!(open).to_string()),
    ] {
        for hidden in ["hidden", "harbin", "t-1b", "t-1c", "t-2a", "d-2"] {
            assert!(!text.contains(hidden), "{what}: {hidden} in {text}");
        }
    }
}

#[tokio::test]
async fn what_is_hidden_gets_the_answer_for_what_does_not_exist() {
    let (d, text) = world("operator").await;
    let pairs: [(Method, &str, Value, &str, &str); 12] = [
        (
            Method::GET,
            "/v1/artifacts/show?ref=NAME",
            json!(null),
            "model/hidden-b:v1",
            "model/missing:v1",
        ),
        (
            Method::GET,
            "/v1/transfers?id=NAME",
            json!(null),
            "t-1b",
            "t-0b",
        ),
        (
            Method::GET,
            "/v1/transfers?id=t-1a,NAME",
            json!(null),
            "t-1c",
            "t-0c",
        ),
        (
            Method::GET,
            "/v1/transfers?id=NAME",
            json!(null),
            "d-2",
            "d-9",
        ),
        (
            Method::GET,
            "/v1/deliveries/show?id=NAME",
            json!(null),
            "d-2",
            "d-9",
        ),
        (
            Method::POST,
            "/v1/transfers/action",
            json!({"id": "NAME", "action": "cancel"}),
            "t-2a",
            "t-0a",
        ),
        (
            Method::POST,
            "/v1/transfers/action",
            json!({"id": "NAME", "action": "cancel"}),
            "d-2",
            "d-9",
        ),
        (
            Method::POST,
            "/v1/transfers",
            json!({"artifacts": ["NAME"], "to": "all"}),
            "model/hidden-b:v1",
            "model/missing:v1",
        ),
        (
            Method::POST,
            "/v1/transfers",
            json!({"artifacts": ["dataset/line3:v1"], "to": "xian,NAME"}),
            "harbin",
            "nobody",
        ),
        (
            Method::POST,
            "/v1/plan",
            json!({"artifacts": ["dataset/line3:v1"], "to": "NAME"}),
            "harbin",
            "nobody",
        ),
        (
            Method::POST,
            "/v1/verify",
            json!({"artifact": "NAME"}),
            "model/hidden-b:v1",
            "model/missing:v1",
        ),
        (
            Method::POST,
            "/v1/pin",
            json!({"artifact": "NAME", "pinned": true}),
            "model/hidden-b:v1",
            "model/missing:v1",
        ),
    ];
    for (method, path, body, hidden, missing) in pairs {
        let mut answers = Vec::new();
        for name in [hidden, missing] {
            let path = path.replace("NAME", name);
            let mut request = d.with(&text, method.clone(), &path);
            if !body.is_null() {
                let body: Value =
                    serde_json::from_str(&body.to_string().replace("NAME", name)).unwrap();
                request = request.json(&body);
            }
            let begun = Instant::now();
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 404, "{path} {name}");
            assert!(
                begun.elapsed() >= Duration::from_millis(50),
                "answered at a fixed time"
            );
            let text = response.text().await.unwrap();
            answers.push(text.replace(name, "NAME"));
        }
        assert_eq!(answers[0], answers[1], "{path}");
    }
    assert!(d.fake.world.lock().delivered.is_empty());
    let open = |id: &str| {
        let world = d.fake.world.lock();
        world
            .transfers
            .iter()
            .any(|t| t.id == id && t.state == State::Queued)
    };
    assert!(open("t-2a"), "nothing hidden was cancelled");
    // Of a delivery, only the visible parts are.
    let cancel = json!({"id": "d-1", "action": "cancel"});
    let response = d
        .with(&text, Method::POST, "/v1/transfers/action")
        .json(&cancel)
        .send()
        .await
        .unwrap();
    assert_eq!(ids(&response.json().await.unwrap(), "id"), ["t-1a"]);
    assert!(open("t-1b") && open("t-1c") && !open("t-1a"));
}

#[tokio::test]
async fn all_sites_are_those_of_the_scope() {
    let (d, text) = world("publisher").await;
    for (to, expected) in [
        ("all", Some("chengdu,xian")),
        ("region!=north", Some("chengdu,xian")),
        ("xian", Some("xian")),
        ("region=north", None),
    ] {
        d.fake.world.lock().delivered.clear();
        let request = json!({"artifacts": ["dataset/line3:v1"], "to": to});
        let response = d
            .with(&text, Method::POST, "/v1/transfers")
            .json(&request)
            .send()
            .await
            .unwrap();
        assert_eq!(
            response.status(),
            if expected.is_some() { 202 } else { 404 },
            "{to}"
        );
        let delivered = d
            .fake
            .world
            .lock()
            .delivered
            .first()
            .map(|request| request.to.clone());
        assert_eq!(delivered.as_deref(), expected, "{to}");
    }
    let publish = |body: Value| {
        d.with(&text, Method::POST, "/v1/artifacts")
            .json(&body)
            .send()
    };
    let ok = publish(json!({"source": "/x", "as": "dataset/line3:v2", "to": "all"}))
        .await
        .unwrap();
    // The fake has no job of this name, so the request has reached it.
    error(ok, StatusCode::NOT_FOUND, "not_found").await;
    assert_eq!(
        d.fake.world.lock().published[0].to.as_deref(),
        Some("chengdu,xian")
    );
    let outside = publish(json!({"source": "/x", "as": "model/mine:v1"}))
        .await
        .unwrap();
    let message = error(outside, StatusCode::FORBIDDEN, "not_allowed").await;
    assert!(
        message.contains("may publish dataset/line3* only"),
        "{message}"
    );
    let rows = publish(json!({"source": "db:other:v1", "as": "dataset/line3:v2"}))
        .await
        .unwrap();
    error(rows, StatusCode::FORBIDDEN, "not_allowed").await;
}

#[tokio::test]
async fn cursors_say_nothing_about_what_happens_outside() {
    let (d, text) = world("viewer").await;
    let cursor = async |path: &str| {
        let response = d.with(&text, Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let cursor = response.headers()["x-packhorse-cursor"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap();
        assert!(!response.headers().contains_key("x-packhorse-next"));
        (cursor, ids(&response.json().await.unwrap(), "id"))
    };
    let hidden = || {
        for n in 0..40 {
            d.fake.put(Transfer {
                artifact: "model/hidden-b:v1".parse().unwrap(),
                ..transfer(&format!("t-h{n}"), "chengdu", State::Queued)
            });
        }
    };
    let (first, _) = cursor("/v1/transfers").await;
    let (second, _) = cursor("/v1/transfers").await;
    hidden();
    let (third, _) = cursor("/v1/transfers").await;
    assert_eq!([second - first, third - second], [1, 1]);
    // A reader that continues gets nothing, and continues from the same number.
    let (same, rows) = cursor(&format!("/v1/transfers?since={first}&wait=1")).await;
    assert_eq!((same, rows.len()), (first, 0));
    hidden();
    d.fake.put(transfer("t-9", "xian", State::Queued));
    hidden();
    let (next, rows) = cursor(&format!("/v1/transfers?since={first}")).await;
    assert_eq!((next, rows), (third + 1, vec!["t-9".to_owned()]));
    let (_, rows) = cursor(&format!("/v1/transfers?since={next}")).await;
    assert!(rows.is_empty(), "{rows:?}");
    let (_, all) = cursor("/v1/transfers?since=0").await;
    assert_eq!(all, ["t-1a", "t-3a", "t-9"]);
    let rows = d.json(&text, "/v1/transfers").await;
    // The time of 2026-11-23T10:00:05, of each.
    assert!(
        rows.as_array()
            .unwrap()
            .iter()
            .all(|row| row["cursor"] == 1_795_428_005_000_u64),
        "{rows}"
    );

    let events = d.json(&text, "/v1/events?format=json").await;
    let numbers: Vec<u64> = events
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["seq"].as_u64().unwrap())
        .collect();
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
    let path = format!("/v1/events?format=json&since={}", numbers[1]);
    let rest = d.json(&text, &path).await;
    assert_eq!(rest.as_array().unwrap().len(), 1, "{rest}");
    // A number of the daemon is not one of this token, and the answer names none.
    for path in ["/v1/transfers?since=5", "/v1/events?format=json&since=5"] {
        let response = d.with(&text, Method::GET, path).send().await.unwrap();
        let message = error(response, StatusCode::CONFLICT, "conflict").await;
        assert!(message.chars().all(|c| !c.is_ascii_digit()), "{message}");
    }
}

#[tokio::test]
async fn runs_are_visible_only_as_a_whole() {
    let (d, text) = world("viewer").await;
    let run = |name: &str, on: &str, input: &str, expect: &str| {
        let mut run = fake::run(name, super::super::types::RunState::Training);
        (run.from, run.on) = ("chengdu".parse().unwrap(), on.parse().unwrap());
        run.inputs.truncate(1);
        run.inputs[0].artifact = input.into();
        (run.expect, run.model) = (expect.into(), None);
        d.fake.world.lock().runs.push(run);
    };
    run("all", "xian", "dataset/line3:v1", "dataset/line3-x");
    run("on-hidden", "harbin", "dataset/line3:v1", "dataset/line3-x");
    run(
        "of-hidden",
        "xian",
        "dataset/hidden-a:v1",
        "dataset/line3-x",
    );
    run("to-hidden", "xian", "dataset/line3:v1", "model/hidden-b");
    assert_eq!(ids(&d.json(&text, "/v1/runs").await, "name"), ["all"]);
    let mut answers = Vec::new();
    for name in ["on-hidden", "of-hidden", "to-hidden", "missing"] {
        let path = format!("/v1/runs/show?name={name}");
        let response = d.with(&text, Method::GET, &path).send().await.unwrap();
        assert_eq!(response.status(), 404);
        answers.push(response.text().await.unwrap().replace(name, "NAME"));
    }
    assert!(
        answers.iter().all(|answer| *answer == answers[0]),
        "{answers:?}"
    );
}
