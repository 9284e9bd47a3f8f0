//! The life of an access token: created, used, rotated, revoked, expired; and floods of invalid
//! ones.

use super::rights::token;
use super::*;

async fn status_of(d: &Daemon, token: &str) -> StatusCode {
    let request = d.client.get(format!("{}/v1/sites", d.base));
    let request = request.header("X-Packhorse-Token", token);
    request.send().await.unwrap().status()
}

async fn shown(d: &Daemon, name: &str) -> Value {
    let path = format!("/v1/access/show?name={name}");
    d.get(&path).await.json().await.unwrap()
}

#[tokio::test]
async fn a_token_is_shown_once_and_ends_with_its_rotation_and_revocation() {
    let d = daemon().await;
    let first = token(&d, "ci", "viewer", json!({"artifacts": ["model/*"]})).await;
    assert!(first.starts_with("phk_") && first.len() == 66, "{first}");
    let new = shown(&d, "ci").await;
    assert_eq!(new["state"], "valid");
    assert_eq!(new["created_by"], "admin");
    assert_eq!(new["last_used"], Value::Null);
    assert!(new["expires_at"].is_string(), "90 days");
    assert_eq!(status_of(&d, &first).await, 200);
    assert!(shown(&d, "ci").await["last_used"].is_string());
    let list = d.get("/v1/access").await.text().await.unwrap();
    assert!(list.contains("ci") && !list.contains(&first[17..40]));

    let again = d
        .post("/v1/access", json!({"name": "ci", "role": "viewer"}))
        .await;
    error(again, StatusCode::CONFLICT, "conflict").await;
    let rotated = d.post("/v1/access/rotate", json!({"name": "ci"})).await;
    let reply: Value = rotated.json().await.unwrap();
    let second = reply["token"].as_str().unwrap();
    assert_eq!(status_of(&d, &first).await, 401);
    assert_eq!(status_of(&d, second).await, 200);
    assert_eq!(reply["access"]["artifacts"], json!(["model/*"]));

    // A wrong secret for an id that exists.
    let mut wrong = second.as_bytes().to_vec();
    wrong.swap(20, 21);
    let wrong = String::from_utf8(wrong).unwrap();
    assert!(wrong == second || status_of(&d, &wrong).await == 401);

    let revoked = d.request(Method::DELETE, "/v1/access?name=ci");
    assert_eq!(revoked.send().await.unwrap().status(), 200);
    assert_eq!(status_of(&d, second).await, 401);
    assert_eq!(shown(&d, "ci").await["state"], "revoked");
    let none = d.request(Method::DELETE, "/v1/access?name=none");
    error(
        none.send().await.unwrap(),
        StatusCode::NOT_FOUND,
        "not_found",
    )
    .await;
    // Its name is free again.
    let third = token(&d, "ci", "admin", json!({})).await;
    assert_eq!(status_of(&d, &third).await, 200);
}

#[tokio::test]
async fn what_a_token_may_not_be_is_refused() {
    let d = daemon().await;
    for (request, why) in [
        (json!({"name": "A b", "role": "viewer"}), "token name"),
        (json!({"name": "x", "role": "root"}), "root"),
        (
            json!({"name": "x", "role": "viewer", "ttl_seconds": 0}),
            "validity",
        ),
        (
            json!({"name": "x", "role": "viewer", "ttl_seconds": u64::MAX}),
            "validity",
        ),
        (
            json!({"name": "x", "role": "viewer", "no_expiry": true}),
            "must expire",
        ),
        (
            json!({"name": "x", "role": "viewer", "artifacts": ["nonsense"]}),
            "nonsense",
        ),
        (
            json!({"name": "x", "role": "viewer", "sites": ""}),
            "site selection",
        ),
        (json!({"name": "x", "role": "viewer", "scope": 1}), "scope"),
        (
            json!({"name": "x", "role": "admin", "artifacts": ["model/*"]}),
            "no scope",
        ),
        (
            json!({"name": "x", "role": "viewer", "artifacts": vec!["model/*"; 101]}),
            "patterns",
        ),
    ] {
        let response = d.post("/v1/access", request.clone()).await;
        let message = error(response, StatusCode::BAD_REQUEST, "usage").await;
        assert!(message.contains(why), "{request}: {message}");
    }
    let wall = token(&d, "hall", "wall", json!({"no_expiry": true})).await;
    assert_eq!(status_of(&d, &wall).await, 200);
    assert_eq!(shown(&d, "hall").await["expires_at"], Value::Null);
}

#[tokio::test]
async fn the_expiry_of_a_token_is_reported_two_weeks_before() {
    let d = daemon().await;
    let day = 86_400;
    token(&d, "soon", "viewer", json!({"ttl_seconds": 13 * day})).await;
    token(&d, "later", "viewer", json!({"ttl_seconds": 15 * day})).await;
    let short = token(&d, "short", "viewer", json!({"ttl_seconds": 1})).await;
    let expired = async {
        while status_of(&d, &short).await != 401 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), expired)
        .await
        .unwrap();
    let lines: Vec<String> = d.get("/v1/doctor").await.json().await.unwrap();
    let of = |name: &str| {
        let start = format!("fault access token {name}: ");
        lines.iter().find(|line| line.starts_with(&start)).cloned()
    };
    assert!(
        of("soon").unwrap().contains("it expires in 12 d"),
        "{lines:?}"
    );
    assert!(of("short").unwrap().contains("it expired"), "{lines:?}");
    assert_eq!(of("later"), None);
    let metrics = d.get("/metrics").await.text().await.unwrap();
    let line = |name: &str| {
        let start = format!("packhorse_access_token_expires_in_seconds{{token=\"{name}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.map(|value| value.parse::<i64>().unwrap())
    };
    let left = line("soon").unwrap();
    assert!((12 * day..=13 * day).contains(&left), "{left}");
    assert!(line("short").unwrap() <= 0);
    assert_eq!(line("later"), None);
    assert!(metrics.contains("packhorse_api_invalid_tokens_total "));
}

#[tokio::test]
async fn streams_and_long_polls_end_with_their_token() {
    let d = daemon().await;
    d.fake.put(transfer("t1", "chengdu", State::Queued));
    for scope in [json!({}), json!({"sites": "chengdu"})] {
        let text = token(&d, "ends", "viewer", scope).await;
        let get = |path: &str| {
            let request = d.client.get(format!("{}{path}", d.base));
            request.header("X-Packhorse-Token", &text)
        };
        let stream = get("/v1/events?since=0").send().await.unwrap();
        assert_eq!(stream.status(), 200);
        let now = get("/v1/transfers").send().await.unwrap();
        let cursor = now.headers()["x-packhorse-cursor"].to_str().unwrap();
        let path = format!("/v1/transfers?since={cursor}&wait=50");
        let asked = d.fake.asked(1);
        let poll = tokio::spawn(get(&path).send());
        asked.await;
        let revoke = d.request(Method::DELETE, "/v1/access?name=ends");
        assert_eq!(revoke.send().await.unwrap().status(), 200);
        let ends = async {
            let polled = poll.await.unwrap().unwrap();
            error(polled, StatusCode::UNAUTHORIZED, "not_allowed").await;
            stream.bytes().await.unwrap();
        };
        tokio::time::timeout(Duration::from_secs(10), ends)
            .await
            .expect("both end at once");
    }
}

#[tokio::test]
async fn a_flood_of_invalid_tokens_delays_no_valid_caller() {
    let d = daemon().await;
    let valid = token(&d, "ok", "viewer", json!({})).await;
    // An id that exists, with a secret that does not: the checksum is right.
    let foreign = super::super::tokens::TokenText::generate()
        .unwrap()
        .into_secret();
    let mut seen = std::collections::BTreeMap::<u16, u32>::new();
    for n in 0..300 {
        let wrong = if n % 2 == 0 {
            "x".repeat(66)
        } else {
            foreign.clone()
        };
        *seen
            .entry(status_of(&d, &wrong).await.as_u16())
            .or_default() += 1;
        if n % 20 == 0 {
            assert_eq!(status_of(&d, &valid).await, 200, "after {n} invalid ones");
        }
    }
    assert_eq!(
        seen.keys().copied().collect::<Vec<_>>(),
        [401, 429],
        "{seen:?}"
    );
    let request = d.client.get(format!("{}/v1/sites", d.base));
    let wrong = request.header("X-Packhorse-Token", "x".repeat(66));
    let answer = wrong.send().await.unwrap();
    if answer.status() == 429 {
        assert_eq!(answer.headers()["retry-after"], "1");
    }
    assert_eq!(status_of(&d, &valid).await, 200);
}

#[tokio::test]
async fn the_command_line_proves_the_daemon_before_it_sends_an_access_token() {
    let d = daemon().await;
    let text = token(&d, "cli", "viewer", json!({})).await;
    let api = d.base.strip_prefix("http://").unwrap().parse().unwrap();
    let nowhere = std::path::Path::new("/nowhere");
    let client = |text: &str| {
        let token = super::super::ApiToken::parse(text).unwrap();
        crate::cli::client::Client::to_daemon(nowhere, api, token).unwrap()
    };
    let sites: Value = client(&text).get("/v1/sites", &()).await.unwrap();
    assert_eq!(sites[0]["name"], "chengdu");
    let foreign = super::super::tokens::TokenText::generate()
        .unwrap()
        .into_secret();
    let fault = client(&foreign)
        .get::<Value>("/v1/sites", &())
        .await
        .unwrap_err();
    assert!(fault.next.contains("no token was sent"), "{fault}");
}
