//! Tokens and permissions: who may join, who may use the API, and what an unauthorised client
//! learns.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use crate::support::daemon::{Hub, Site, SiteSpec, get, packhorse};
use crate::support::{Scratch, limit, secs, wait_for};

#[test]
fn a_join_token_is_valid_once_for_one_site_until_it_expires() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = |name: &str| Site::new(scratch.path(), &hub, name, &SiteSpec::default());

    let chengdu = site("chengdu");
    let token = hub.token("chengdu", &[]);
    let wuhan = site("wuhan");
    wuhan.join_with(&token).expect(4).says(&["wuhan"]);
    chengdu.join_with(&token).expect(0);
    let used = site("chengdu2");
    used.edit_config("name = \"chengdu2\"", "name = \"chengdu\"");
    used.join_with(&token).expect(4).says(&["token"]);

    let good = hub.token("wuhan", &[]);
    let (head, last) = good.split_at(good.len() - 1);
    let forged = format!("{head}{}", if last == "a" { "b" } else { "a" });
    wuhan.join_with(&forged).expect(4).says(&["token"]);
    wuhan.join_with("nonsense").expect(4).says(&["token"]);

    let short = hub
        .cli(&["token", "create", "--site", "wuhan", "--ttl", "1s"])
        .expect(0)
        .out
        .trim()
        .to_owned();
    let made = std::time::Instant::now();
    wait_for("the token has expired", secs(5), || {
        (made.elapsed() > secs(2)).then_some(())
    });
    wuhan.join_with(&short).expect(4).says(&["token"]);
    wuhan.join_with(&good).expect(0);

    let names: Vec<String> = hub
        .json(&["sites"])
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        names,
        ["chengdu", "wuhan"],
        "only an enrolled site is listed"
    );
}

#[test]
fn a_site_that_has_not_joined_reports_that() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    packhorse(&["serve", "--config", site.config.to_str().unwrap()])
        .expect(4)
        .says(&["join"]);
}

#[test]
fn a_token_of_another_hub_is_refused() {
    let _limit = limit(secs(90));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let impostor = Hub::start_new(&scratch.folder("impostor"));
    let token = hub.token("chengdu", &[]);
    // The token has the hash of its hub's CA, so another hub that answers learns nothing and enrols
    // nothing.
    let site = Site::new(scratch.path(), &impostor, "chengdu", &SiteSpec::default());
    site.join_with(&token).expect(4);
    assert_eq!(impostor.json(&["sites"]).as_array().unwrap().len(), 0);
    Site::new(
        &scratch.folder("right"),
        &hub,
        "chengdu",
        &SiteSpec::default(),
    )
    .join_with(&token)
    .expect(0);
}

#[test]
fn an_unreachable_daemon_is_reported() {
    let _limit = limit(secs(120));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let site = Site::new(scratch.path(), &hub, "chengdu", &SiteSpec::default());
    let token = hub.token("chengdu", &[]);
    let hub_port = hub.quic.port().to_string();
    hub.stop();
    site.join_with(&token).expect(10).says(&[&hub_port]);
    let api_port = hub.api.port().to_string();
    hub.cli(&["status"]).expect(10).says(&[&api_port]);
    hub.cli(&["publish", "/etc/hostname", "--as", "model/m:v1"])
        .expect(10);
}

#[test]
fn the_api_requires_its_token() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let token_file = hub.data_dir.join("api-token");
    assert_eq!(
        token_file.metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    let token = std::fs::read_to_string(&token_file).unwrap();

    let api = format!("http://{}", hub.api);
    packhorse(&[
        "artifacts",
        "--api",
        &api,
        "--token-file",
        token_file.to_str().unwrap(),
    ])
    .expect(0);
    let wrong = scratch.join("wrong-token");
    std::fs::write(&wrong, "wrong").unwrap();
    packhorse(&[
        "artifacts",
        "--api",
        &api,
        "--token-file",
        wrong.to_str().unwrap(),
    ])
    .expect(4);
    packhorse(&["artifacts", "--api", &api, "--token-file", "/no/such/file"])
        .says(&["/no/such/file"]);

    for path in ["/v1/artifacts", "/v1/transfers", "/v1/sites", "/v1/events"] {
        let (status, body) = get(hub.api, path).unwrap();
        assert_eq!(status, 401, "{path} without a token: {body}");
        let error: serde_json::Value =
            serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"));
        assert!(
            error["code"].is_string() && error["message"].is_string() && error["next"].is_string(),
            "{path}: {body}"
        );
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(hub.api, path).unwrap().0, 200, "{path}");
    }
    assert!(!hub.log().contains(token.trim()), "the token is in the log");
}

#[test]
fn the_token_is_not_sent_to_another_program_on_the_api_port() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let mut hub = Hub::start_new(scratch.path());
    let (socket, token_file) = (
        hub.data_dir.join("api.sock"),
        hub.data_dir.join("api-token"),
    );
    assert_eq!(
        socket.metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    hub.stop();
    assert!(!socket.exists());
    let listener = TcpListener::bind(hub.api).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heard = seen.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = vec![0; 64 << 10];
            let read = stream.read(&mut request).unwrap_or(0);
            heard.lock().unwrap().extend_from_slice(&request[..read]);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]");
        }
    });
    hub.cli(&["sites"])
        .expect(10)
        .says(&["not this daemon", &hub.api.to_string()]);
    let api = format!("http://{}", hub.api);
    packhorse(&[
        "sites",
        "--api",
        &api,
        "--token-file",
        token_file.to_str().unwrap(),
    ])
    .expect(10)
    .says(&["not this daemon"]);
    let seen = String::from_utf8_lossy(&seen.lock().unwrap()).into_owned();
    assert!(
        seen.matches("GET /v1/proof?challenge=").count() == 2,
        "{seen}"
    );
    assert!(
        !seen.contains(std::fs::read_to_string(token_file).unwrap().trim()),
        "it received the token"
    );
}

#[test]
fn the_token_is_not_sent_to_a_program_that_relays_the_proof() {
    let _limit = limit(secs(60));
    let scratch = Scratch::new();
    let hub = Hub::start_new(scratch.path());
    let token = hub.data_dir.join("api-token");
    let sites = |address: SocketAddr| {
        let (api, token) = (format!("http://{address}"), token.to_str().unwrap());
        packhorse(&["sites", "--api", &api, "--token-file", token])
    };
    sites(hub.api).expect(0);
    // The relay passes each connection on to the daemon, unchanged, and keeps what it read.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (heard, daemon) = (seen.clone(), hub.api);
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut server = TcpStream::connect(daemon).unwrap();
            let (mut back, mut from) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut back));
            let mut bytes = vec![0; 64 << 10];
            while let Ok(read @ 1..) = client.read(&mut bytes) {
                heard.lock().unwrap().extend_from_slice(&bytes[..read]);
                if server.write_all(&bytes[..read]).is_err() {
                    break;
                }
            }
        }
    });
    sites(relay)
        .expect(4)
        .says(&["is not the daemon", &hub.api.to_string()]);
    let seen = String::from_utf8_lossy(&seen.lock().unwrap()).into_owned();
    assert!(seen.contains("GET /v1/proof?challenge="), "{seen}");
    assert!(
        !seen.contains(std::fs::read_to_string(&token).unwrap().trim()),
        "it received the token"
    );
}
