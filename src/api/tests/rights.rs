//! The rights matrix of the API: every actor × every route.

use std::collections::BTreeSet;

use super::*;

/// What a route needs: the least role, whether `wall` has it, and whether a token with a scope has
/// it.
struct Row {
    route: &'static str,
    least: &'static str,
    wall: bool,
    scoped: bool,
    trainer: bool,
}

const fn row(route: &'static str, least: &'static str) -> Row {
    Row {
        route,
        least,
        wall: false,
        scoped: true,
        trainer: false,
    }
}

const fn whole(route: &'static str, least: &'static str) -> Row {
    Row {
        scoped: false,
        ..row(route, least)
    }
}

const fn wall(route: &'static str) -> Row {
    Row {
        wall: true,
        ..row(route, "viewer")
    }
}

const fn trainer(route: &'static str, least: &'static str) -> Row {
    Row {
        trainer: true,
        ..row(route, least)
    }
}

/// Every route that needs a token, with a query if it needs one.
const MATRIX: &[Row] = &[
    whole("GET /metrics", "viewer"),
    whole("GET /v1/access", "admin"),
    whole("POST /v1/access", "admin"),
    whole("DELETE /v1/access?name=none", "admin"),
    whole("POST /v1/access/rotate", "admin"),
    whole("GET /v1/access/show?name=none", "admin"),
    whole("POST /v1/adopt", "operator"),
    row("GET /v1/artifacts", "viewer"),
    trainer("POST /v1/artifacts", "publisher"),
    row("GET /v1/artifacts/show?ref=dataset/line3:v1", "viewer"),
    wall("GET /v1/deliveries"),
    row("GET /v1/deliveries/show?id=d1", "viewer"),
    whole("GET /v1/doctor", "viewer"),
    row("GET /v1/events?format=json", "viewer"),
    row("POST /v1/export", "operator"),
    whole("POST /v1/gc", "operator"),
    whole("POST /v1/import", "operator"),
    row("GET /v1/jobs?id=j-none", "viewer"),
    // Of a job that another actor started.
    row("DELETE /v1/jobs?id=j-none", "operator"),
    row("GET /v1/jobs/list", "viewer"),
    row("POST /v1/labels/export", "operator"),
    row("POST /v1/pin", "operator"),
    row("POST /v1/plan", "publisher"),
    row("GET /v1/runs", "viewer"),
    row("POST /v1/runs", "publisher"),
    trainer("POST /v1/runs/action", "publisher"),
    trainer("GET /v1/runs/show?name=r", "viewer"),
    wall("GET /v1/sites"),
    row("GET /v1/sites/show?name=chengdu", "viewer"),
    whole("POST /v1/sites/set", "admin"),
    whole("POST /v1/sites/action", "admin"),
    whole("GET /v1/publishers", "viewer"),
    whole("GET /v1/publishers/show?name=none", "viewer"),
    whole("POST /v1/publishers/action", "admin"),
    whole("POST /v1/tokens", "admin"),
    wall("GET /v1/transfers"),
    row("POST /v1/transfers", "publisher"),
    row("POST /v1/transfers/action", "operator"),
    row("POST /v1/verify", "operator"),
    whole("GET /v1/workers", "viewer"),
];

/// Routes that need no token.
const PUBLIC: [&str; 4] = [
    "GET /healthz",
    "GET /readyz",
    "GET /v1/proof",
    "GET /openapi.json",
];

/// A body with which the actors that may use the route reach the daemon or a later check.
fn body(route: &str, is_trainer: bool) -> Value {
    match route {
        "POST /v1/artifacts" if is_trainer => {
            json!({"source": "/out", "as": "model/m:1", "run": "r"})
        }
        "POST /v1/artifacts" => json!({"source": "/x", "as": "dataset/line3:v2"}),
        "POST /v1/runs/action" => json!({"name": "r", "action": "finish"}),
        _ => json!({}),
    }
}

/// Creates a token; returns its text.
pub(super) async fn token(d: &Daemon, name: &str, role: &str, scope: Value) -> String {
    let mut request = json!({"name": name, "role": role});
    for (key, value) in scope.as_object().unwrap() {
        request[key] = value.clone();
    }
    let response = d.post("/v1/access", request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["cache-control"], "no-store");
    let reply: Value = response.json().await.unwrap();
    reply["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_actor_may_use_the_routes_of_the_matrix_and_no_other() {
    let d = daemon().await;
    let mut described = BTreeSet::new();
    let document: Value = d.get("/openapi.json").await.json().await.unwrap();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            described.insert(format!("{} {path}", method.to_uppercase()));
        }
    }
    let without_query = |route: &str| route.split('?').next().unwrap().to_owned();
    let mut rows: BTreeSet<String> = MATRIX.iter().map(|row| without_query(row.route)).collect();
    rows.extend(PUBLIC.iter().map(|route| (*route).to_owned()));
    described.insert("GET /openapi.json".into());
    assert_eq!(rows, described, "each route has a row here");

    let mut actors = vec![
        ("admin token".to_owned(), TOKEN.to_owned()),
        ("trainer".to_owned(), d.fake.trainer.text()),
        ("no token".to_owned(), String::new()),
        ("wrong token".to_owned(), "0".repeat(64)),
    ];
    let roles = ["viewer", "publisher", "operator", "admin"];
    for role in roles.iter().chain(&["wall"]) {
        let text = token(&d, role, role, json!({})).await;
        actors.push(((*role).to_owned(), text));
    }
    for role in ["viewer", "publisher", "operator", "wall"] {
        let name = format!("scoped-{role}");
        let scope = json!({"artifacts": ["dataset/line3", "model/*"], "sites": "chengdu"});
        actors.push((name.clone(), token(&d, &name, role, scope).await));
    }
    let revoked = token(&d, "gone", "admin", json!({})).await;
    let gone = d.request(Method::DELETE, "/v1/access?name=gone");
    assert_eq!(gone.send().await.unwrap().status(), 200);
    actors.push(("revoked".to_owned(), revoked));

    for row in MATRIX {
        let (method, path) = row.route.split_once(' ').unwrap();
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        for (actor, text) in &actors {
            let (scoped, role) = match actor.strip_prefix("scoped-") {
                Some(role) => (true, role),
                None => (false, actor.as_str()),
            };
            let place = |role: &str| roles.iter().position(|of| *of == role);
            let expected = match role {
                "admin token" => None,
                "trainer" => (!row.trainer).then_some(403),
                "no token" | "wrong token" | "revoked" => Some(401),
                "wall" => (!row.wall).then_some(403),
                role => (place(role) < place(row.least)).then_some(403),
            };
            // A hidden job does not exist for a token with a scope.
            let expected = match row.route {
                "DELETE /v1/jobs?id=j-none" if scoped && role == "publisher" => None,
                _ if scoped && !row.scoped => Some(403),
                _ => expected,
            };
            // The last use of the revoked token must not make its answers rare.
            let mut request = d
                .client
                .request(method.clone(), format!("{}{path}", d.base));
            if !text.is_empty() {
                request = request.header("X-Packhorse-Token", text);
            }
            if method == Method::POST {
                request = request.json(&body(row.route, role == "trainer"));
            }
            let status = request.send().await.unwrap().status().as_u16();
            match expected {
                // Beyond a rate there are too many invalid ones.
                Some(401) => assert!([401, 429].contains(&status), "{actor}: {}", row.route),
                Some(expected) => assert_eq!(status, expected, "{actor}: {}", row.route),
                None => assert!(
                    ![401, 403, 429].contains(&status),
                    "{actor}: {}: {status}",
                    row.route
                ),
            }
        }
    }
}

#[tokio::test]
async fn a_publisher_follows_and_cancels_its_own_job_and_an_operator_any() {
    let d = daemon().await;
    for id in ["publish", "other"] {
        d.fake.put_job(super::super::types::Job {
            state: "running".into(),
            ..job(id, Ok(json!(null)))
        });
    }
    let publisher = token(&d, "p", "publisher", json!({})).await;
    let scoped = token(&d, "s", "publisher", json!({"artifacts": ["model/*"]})).await;
    let operator = token(&d, "o", "operator", json!({})).await;
    let as_ = |token: &str, method: Method, path: &str| {
        d.client
            .request(method, format!("{}{path}", d.base))
            .header("X-Packhorse-Token", token)
    };
    let status = async |request: reqwest::RequestBuilder| request.send().await.unwrap().status();
    let publish = json!({"source": "/x", "as": "dataset/x:1"});
    let begun = as_(&publisher, Method::POST, "/v1/artifacts").json(&publish);
    assert_eq!(status(begun).await, 202);
    for (token, id, read, cancel) in [
        (&scoped, "publish", 404, 404),
        (&scoped, "other", 404, 404),
        (&publisher, "other", 200, 403),
        (&operator, "other", 200, 200),
        (&publisher, "publish", 200, 200),
    ] {
        let path = format!("/v1/jobs?id={id}");
        assert_eq!(status(as_(token, Method::GET, &path)).await, read, "{id}");
        assert_eq!(
            status(as_(token, Method::DELETE, &path)).await,
            cancel,
            "{id}"
        );
    }
    let list = as_(&scoped, Method::GET, "/v1/jobs/list");
    let jobs: Value = list.send().await.unwrap().json().await.unwrap();
    assert_eq!(jobs, json!([]));
}

#[tokio::test]
async fn only_the_token_of_the_machine_reaches_every_path() {
    use crate::reach::Reach;
    let d = daemon().await;
    let operator = token(&d, "o", "operator", json!({})).await;
    let scoped = token(&d, "s", "operator", json!({"artifacts": ["*/*"]})).await;
    let trainer = d.fake.trainer.text();
    let publish = json!({"source": "/x", "as": "model/line3:v1", "run": "r"});
    let own_run = Reach::Run("r".parse().unwrap());
    for (token, publishes, writes) in [
        (TOKEN, Some(Reach::Machine), Some(Reach::Machine)),
        (&operator, Some(Reach::Roots), Some(Reach::Roots)),
        (&scoped, Some(Reach::Roots), None),
        (&trainer, Some(own_run), None),
    ] {
        let post = async |path: &str, body: &Value| {
            d.fake.reaches.lock().clear();
            let request = d.client.post(format!("{}{path}", d.base));
            let request = request.header("X-Packhorse-Token", token).json(body);
            request.send().await.unwrap();
            d.fake.reaches.lock().pop()
        };
        // A token with a scope sees no run of this name.
        let mut publish = publish.clone();
        if token == scoped {
            publish["run"] = Value::Null;
        }
        assert_eq!(post("/v1/artifacts", &publish).await, publishes);
        let file = json!({"file": "/x"});
        assert_eq!(post("/v1/import", &file).await, writes);
        let out = json!({"artifacts": ["dataset/line3:v1"], "out": "/x"});
        let exports = if token == scoped {
            Some(Reach::Roots)
        } else {
            writes
        };
        assert_eq!(post("/v1/export", &out).await, exports);
    }
}
