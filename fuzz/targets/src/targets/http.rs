//! Bodies and queries of the HTTP API, and the configuration file.

use axum::extract::Query;
use axum::http::Uri;
use packhorse::api::types::{
    ActionRequest, DeliverRequest, DeliveryQuery, EventQuery, ExportRequest, ImportRequest,
    JobQuery, LimitQuery, PinRequest, PublishRequest, RunActionRequest, RunQuery, RunRequest,
    ShowQuery, TokenRequest, TransferQuery, VerifyRequest,
};
use packhorse::config;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Parts;
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const API_BODY: Target = Target {
    name: "api_body",
    about: "bodies (JSON) and queries of the HTTP API: the first byte chooses the type",
    run: api_body,
    seeds: || {
        [
            (0, r#"{"source":"/data/line3","as":"dataset/line3:v1","to":"all","options":{"format":"coco","for":"dataset/line3:v1","allow_missing":true,"columns":{"class":"defect"},"strict":true,"accept_omitted":["times"]}}"#),
            (1, r#"{"artifacts":["dataset/line3:v1"],"to":"region=west"}"#),
            (2, r#"{"artifact":"dataset/line3:v1","repair":true,"quick":false}"#),
            (3, r#"{"artifact":"dataset/line3:v1","pinned":true}"#),
            (4, r#"{"artifacts":["dataset/line3:v1"],"out":"/tmp/x.ph"}"#),
            (5, r#"{"file":"/tmp/x.ph"}"#),
            (6, r#"{"id":"t-1","action":"pause"}"#),
            (7, r#"{"name":"r1","from":"suzhou","on":"chengdu","inputs":["dataset/line3:v1"],"expect":"model/m","ttl":"24h"}"#),
            (8, r#"{"name":"r1","action":"cancel","failed":"no data"}"#),
            (9, r#"{"site":"chengdu","labels":{"region":"west"},"ttl":"1h"}"#),
            (10, "id=t-1,d-2&since=5&wait=30&limit=10"),
            (11, "since=1&wait=1&limit=5&format=json"),
            (12, "ref=dataset%2Fline3%3Av1&id=d-1&name=r1&limit=7&wait=3"),
        ]
        .iter()
        .map(|(which, text)| [&[*which][..], text.as_bytes()].concat())
        .collect()
    },
    words: &[
        "source",
        "as",
        "to",
        "options",
        "columns",
        "artifact",
        "artifacts",
        "out",
        "file",
        "id",
        "action",
        "pause",
        "resume",
        "cancel",
        "retry",
        "name",
        "from",
        "on",
        "inputs",
        "expect",
        "ttl",
        "site",
        "labels",
        "since",
        "wait",
        "limit",
        "format",
        "ref",
        "%00",
        "%2e%2e",
        "&",
        "=",
    ],
    short: 1500,
};

fn api_body(input: &[u8]) {
    let mut parts = Parts::new(input);
    match parts.byte() % 13 {
        0 => body::<PublishRequest>(parts.rest),
        1 => body::<DeliverRequest>(parts.rest),
        2 => body::<VerifyRequest>(parts.rest),
        3 => body::<PinRequest>(parts.rest),
        4 => body::<ExportRequest>(parts.rest),
        5 => body::<ImportRequest>(parts.rest),
        6 => body::<ActionRequest>(parts.rest),
        7 => body::<RunRequest>(parts.rest),
        8 => body::<RunActionRequest>(parts.rest),
        9 => body::<TokenRequest>(parts.rest),
        10 => query::<TransferQuery>(parts.rest),
        11 => query::<EventQuery>(parts.rest),
        _ => {
            query::<ShowQuery>(parts.rest);
            query::<DeliveryQuery>(parts.rest);
            query::<RunQuery>(parts.rest);
            query::<JobQuery>(parts.rest);
            query::<LimitQuery>(parts.rest);
        }
    }
}

/// As an extractor of the API parses it. What is parsed can be written, and parses to the same.
fn body<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let Some(value) = taken(serde_json::from_slice::<T>(bytes)) else {
        return;
    };
    same(&value);
}

fn same<T: DeserializeOwned + Serialize>(value: &T) {
    let json = serde_json::to_string(value);
    assert!(json.is_ok());
    let again = json.as_deref().map(|json| {
        serde_json::from_str::<T>(json).and_then(|again| serde_json::to_string(&again))
    });
    assert!(
        matches!((&json, &again), (Ok(json), Ok(Ok(again))) if json == again),
        "{json:?} became {again:?}"
    );
}

fn query<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(uri) = format!("/v1/x?{text}").parse::<Uri>() else {
        return note("no address");
    };
    if let Some(Query(value)) = taken(Query::<T>::try_from_uri(&uri)) {
        same(&value);
    }
}

pub(super) const CONFIG: Target = Target {
    name: "config",
    about: "a configuration file of a hub or a site",
    run: configuration,
    seeds: || {
        let plain = [
            include_bytes!("../../../../config/hub.toml").to_vec(),
            include_bytes!("../../../../config/site.toml").to_vec(),
        ];
        // The samples with each default in force.
        let set = plain.iter().map(|text| {
            let text = String::from_utf8_lossy(text);
            let line = |line: &str| {
                line.strip_prefix('#')
                    .filter(|rest| !rest.starts_with([' ', '#']))
                    .unwrap_or(line)
                    .to_owned()
                    + "\n"
            };
            text.lines().map(line).collect::<String>().into_bytes()
        });
        set.chain(plain.clone()).collect()
    },
    words: &[
        "[hub]\n",
        "[listen]\n",
        "[sink.files]\n",
        "[sink.labels]\n",
        "[sink.images]\n",
        "[share]\n",
        "[relay]\n",
        "[line]\n",
        "[limits]\n",
        "[quota.site]\n",
        "[train]\n",
        "role = \"site\"\n",
        "name = \"x\"\n",
        "\"20MiB\"",
        "\"30s\"",
        "\"999999999999TiB\"",
        "\"18446744073709551615ms\"",
        "oci-layout:",
        "sqlite://",
        "postgres://",
        "https://",
        "\"\"\"",
        "= [",
    ],
    short: 400,
};

fn configuration(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    match config::parse(&text, "config.toml") {
        Ok(config) => {
            note("taken");
            assert!(config.data_dir.is_absolute());
            config.notes().iter().for_each(|text| note(text));
            drop((
                config.labels_sink(),
                config.images_sink(),
                config.files_root(),
            ));
            config.secret_files().for_each(drop);
        }
        Err(fault) => {
            note(&fault.message);
            // file:line:column, within the text.
            let place: Vec<&str> = fault.message.splitn(4, ':').collect();
            let line = place.get(1).and_then(|line| line.parse::<usize>().ok());
            assert!(
                line.is_some_and(|line| (1..=text.lines().count() + 1).contains(&line)),
                "{fault}"
            );
        }
    }
    for word in text.split('"').take(20) {
        taken(config::parse_size(word));
        taken(config::parse_duration(word));
        taken(config::parse_host_port(word));
    }
}
