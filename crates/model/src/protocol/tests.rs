//! The bytes of each message, written out: a change that an older peer would not understand fails
//! here.

use std::fmt::Debug;

use serde_json::{Value, json};

use super::*;
use crate::transfer::{Body, State};
use base::fault::Code;
use base::limits::{FETCH_BATCH_CHUNKS_MAX, GENERATION_MAX};
use content::chunk::Hash;

const DIGEST: &str = "0101010101010101010101010101010101010101010101010101010101010101";

/// These bytes are a message, and the message is these bytes.
fn bytes<T: Serialize + DeserializeOwned + PartialEq + Debug>(text: &str) {
    let text = text.replace("DIGEST", DIGEST);
    let message: T =
        from_json(text.as_bytes()).unwrap_or_else(|fault| unreachable!("{text}: {fault}"));
    assert_eq!(String::from_utf8(to_json(&message).unwrap()).unwrap(), text);
}

/// A message of an older peer, without the fields that came later, is this message.
fn older<T: DeserializeOwned + PartialEq + Debug>(older: &str, newer: &str) {
    let [older, newer] = [older, newer]
        .map(|text| from_json::<T>(text.replace("DIGEST", DIGEST).as_bytes()).unwrap());
    assert_eq!(older, newer);
}

#[test]
fn control_messages_from_a_site() {
    bytes::<FromSite>(
        r#"{"hello":{"version":"0.1.0","share":["all","line=3","a,b"],"train":null,"congestion":"auto","changes":true,"manifest_format":2,"reason":"no answer over QUIC"}}"#,
    );
    older::<FromSite>(
        r#"{"hello":{"version":"0.1.0"}}"#,
        r#"{"hello":{"version":"0.1.0","share":null,"train":null,"congestion":"auto","changes":false,"manifest_format":1,"reason":null}}"#,
    );
    bytes::<FromSite>(r#""list""#);
    bytes::<FromSite>(
        r#"{"reports":{"number":4,"certificate":"Yw==","reports":[{"id":"t-1","generation":0,"state":"done","body":{"bytes":{"total":10},"attempts":1,"receipt":{"certificate":"","signature":"cw==","statement":"{}"}}}]}}"#,
    );
    bytes::<FromSite>(
        r#"{"report":[{"id":"t-1","generation":3,"state":"transferring","body":{"reason":null,"message":null,"next":null,"waits_for":"t-0","bytes":{"total":10,"reused":1,"resumed":2,"received":3,"committed":4,"wire":5},"rate":6,"eta_seconds":7,"attempts":1,"location":"/nas/x","receipt":{"certificate":"Yw==","signature":"cw==","statement":"{}"},"landed":false,"note":"a note"}}]}"#,
    );
    bytes::<FromSite>(
        r#"{"runs":[{"name":"r1","id":"r-1","phase":"training","by_platform":false,"by_command":true,"starts":1,"started_ms":5,"ended":{"exit_code":1,"signal":null,"message":"it failed","tail":"no data\n","ended_ms":9},"has_output":false,"model":{"artifact":"model/m:r1","digest":"DIGEST"},"message":null,"removed":["t-1"],"left":["t-2: busy"],"released":false}]}"#,
    );
    bytes::<FromSite>(
        r#"{"changed":[["dataset/d:1","a.png: the size differs from the recorded size"]]}"#,
    );
}

#[test]
fn control_messages_from_the_hub() {
    bytes::<FromHub>(
        r#"{"desired":{"revision":9,"transfers":[{"id":"t-1","delivery":"d-1","artifact":"labels/l:1","digest":"DIGEST","want":"run","generation":2,"total":10,"created_ms":1,"after":["t-0"],"lineage":{"run":"r1","from":"a","on":"b","inputs":[{"artifact":"dataset/d:1","digest":"DIGEST","bytes":10}]}}],"runs":[{"spec":{"name":"r1","id":"r-1","from":"a","on":"b","inputs":[],"expect":"model/m","delivery":"d-2","created_ms":1,"deadline_ms":2},"want":"train","borrowed":[{"transfer":"t-1","artifact":"dataset/d:1","digest":"DIGEST","generation":0}],"model":null,"ready":true}],"manifests":[{"digest":"DIGEST","frames":"AA=="}]}}"#,
    );
    older::<FromHub>(
        r#"{"desired":{"revision":9,"transfers":[]}}"#,
        r#"{"desired":{"revision":9,"transfers":[],"runs":[],"manifests":[]}}"#,
    );
    bytes::<FromHub>(
        r#"{"changes":{"revision":9,"begin":true,"end":true,"partial":true,"set":[{"id":"t-1","delivery":"d-1","artifact":"model/m:1","digest":"DIGEST","want":"run","generation":2,"total":10,"created_ms":1,"known":{"state":"paused","reason":"paused_by_user"}}],"removed":["t-2"],"kept":["t-3"],"runs":[],"manifests":[{"digest":"DIGEST","frames":"AA=="}]}}"#,
    );
    bytes::<FromHub>(r#"{"changes":{"revision":10,"removed":["t-2"]}}"#);
    bytes::<FromHub>(r#"{"stored":{"number":4}}"#);
    bytes::<FromHub>(r#"{"stored":{"number":5,"unstored":["t-1"]}}"#);
    older::<Desired>(
        r#"{"id":"t-1","delivery":"d-1","artifact":"model/m:1","digest":"DIGEST","want":"cancel","generation":0,"total":1,"created_ms":1}"#,
        r#"{"id":"t-1","delivery":"d-1","artifact":"model/m:1","digest":"DIGEST","want":"cancel","generation":0,"total":1,"created_ms":1,"after":[],"lineage":null}"#,
    );
}

#[test]
fn questions_to_the_hub() {
    for text in [
        r#"{"act":{"id":"t-1","action":"pause"}}"#,
        r#"{"deliver":{"artifacts":["dataset/d:1","model/m:2"],"to":"all"}}"#,
        r#"{"renew":{"request":"00ff"}}"#,
        r#"{"start_run":{"name":"r1","from":"a","on":"b","inputs":["dataset/d:1"],"expect":"model/m:v","ttl_seconds":60}}"#,
        r#"{"act_on_run":{"name":"r1","action":"finish","failed":"no data"}}"#,
        r#"{"show_run":"r1"}"#,
        r#"{"list_runs":{"limit":5,"from":1}}"#,
        r#"{"publish":{"artifact":"model/m:1","digest":"DIGEST","to":"a,b","run":"r1","omitted":[{"what":"times","count":2,"examples":["a"]}]}}"#,
        r#"{"upload":{"artifact":"model/m:1","digest":"DIGEST","to":null,"omitted":[]}}"#,
        r#"{"delivery":"d-1"}"#,
        r#"{"transfers":{"id":"t-1,d-2","since":7,"wait":30}}"#,
    ] {
        bytes::<AskHub>(text);
    }
    older::<AskHub>(
        r#"{"list_runs":{"limit":5}}"#,
        r#"{"list_runs":{"limit":5,"from":0}}"#,
    );
    older::<AskHub>(
        r#"{"publish":{"artifact":"model/m:1","digest":"DIGEST"}}"#,
        r#"{"publish":{"artifact":"model/m:1","digest":"DIGEST","to":null,"run":null,"omitted":[]}}"#,
    );
}

#[test]
fn questions_to_a_site_and_answers() {
    bytes::<AskSite>(r#"{"plan":{"artifact":"dataset/d:1","digest":"DIGEST"}}"#);
    bytes::<AskSite>(r#"{"holds":{"artifact":"dataset/d:1","digest":"DIGEST"}}"#);
    bytes::<AskSite>(r#"{"stands":{"artifact":"dataset/d:1","digest":"DIGEST"}}"#);
    for state in ["sound", "damaged", "missing", "unavailable"] {
        bytes::<Result<Presence, Fault>>(&format!(
            r#"{{"Ok":{{"state":"{state}","detail":"a is gone","active":null}}}}"#
        ));
    }
    bytes::<Result<Planned, Fault>>(
        r#"{"Ok":{"missing":1,"needs":2,"free":null,"inodes":null,"free_inodes":null,"rate":4}}"#,
    );
    older::<Result<Planned, Fault>>(
        r#"{"Ok":{"missing":1,"needs":2,"free":null,"rate":4}}"#,
        r#"{"Ok":{"missing":1,"needs":2,"free":null,"inodes":null,"free_inodes":null,"rate":4}}"#,
    );
    bytes::<Result<bool, Fault>>(r#"{"Ok":true}"#);
    bytes::<Result<bool, Fault>>(
        r#"{"Err":{"code":"not_found","reason":"source_gone","retry":{"after_ms":5},"message":"it is gone","next":"look"}}"#,
    );
}

fn request(wants: Vec<Wanted>) -> FetchRequest {
    FetchRequest {
        digest: Hash([1; 32]),
        priority: -3,
        wants,
    }
}

#[test]
fn fetch_requests() {
    let one = "01".repeat(32);
    let two = "02".repeat(32);
    let cases = [
        (Vec::new(), "00".to_owned()),
        (vec![Wanted::Root], "0100".into()),
        (
            vec![Wanted::TopPages(vec![(0, 1), (300, 2)])],
            "010102 0001 ac0202".into(),
        ),
        (
            vec![Wanted::Children {
                page: Hash([2; 32]),
                ranges: vec![(7, 1)],
            }],
            format!("0102 {two} 01 0701"),
        ),
        (vec![Wanted::RootAndPages(1 << 20)], "0103 808040".into()),
        (
            vec![Wanted::Delta {
                ranges: vec![(1, 1)],
                base: Hash([2; 32]),
                against: (3, 4),
            }],
            format!("0104 01 0101 {two} 0304"),
        ),
        (
            vec![Wanted::Refused {
                page: Hash([2; 32]),
                ranges: vec![(7, 1)],
            }],
            format!("0105 {two} 01 0701"),
        ),
    ];
    for (wants, hex) in cases {
        let bytes = request(wants.clone()).to_bytes().unwrap();
        assert_eq!(
            hex::encode(&bytes),
            format!("{one} 05 {hex}").replace(' ', ""),
            "{wants:?}"
        );
        assert_eq!(FetchRequest::parse(&bytes).unwrap(), request(wants));
    }
}

#[test]
fn a_request_has_one_root_and_a_bounded_number_of_pieces() {
    let parse = |wants: Vec<Wanted>| FetchRequest::parse(&request(wants).to_bytes().unwrap());
    let most = FETCH_BATCH_CHUNKS_MAX as u32;
    let children = |ranges| Wanted::Children {
        page: Hash([2; 32]),
        ranges,
    };
    let delta = || Wanted::Delta {
        ranges: vec![(0, 1)],
        base: Hash([3; 32]),
        against: (0, 1),
    };
    let fine = [
        vec![Wanted::Root],
        vec![Wanted::RootAndPages(u64::MAX)],
        vec![delta()],
        vec![children(vec![(0, most)])],
        vec![children(vec![(5, 1)]); FETCH_BATCH_CHUNKS_MAX],
        vec![Wanted::Root, Wanted::TopPages(vec![(0, most - 1)])],
    ];
    for wants in fine {
        assert_eq!(parse(wants.clone()).unwrap().wants, wants);
    }
    let too_much = [
        vec![Wanted::Root, Wanted::Root],
        vec![Wanted::Root, Wanted::RootAndPages(1)],
        vec![delta(), delta()],
        vec![children(vec![(0, most + 1)])],
        vec![children(vec![(0, u32::MAX), (0, u32::MAX), (0, u32::MAX)])],
        vec![Wanted::TopPages(vec![(0, 0); FETCH_BATCH_CHUNKS_MAX + 1])],
        vec![children(Vec::new()); FETCH_BATCH_CHUNKS_MAX + 1],
        vec![children(vec![(0, most)]), Wanted::Root],
        vec![Wanted::Root; 60_000],
    ];
    for wants in too_much {
        assert_eq!(parse(wants).unwrap_err().code, Code::Integrity);
    }
}

fn parses<T: DeserializeOwned>(value: &Value) -> bool {
    serde_json::from_value::<T>(value.clone()).is_ok()
}

#[test]
fn a_report_of_an_impossible_generation_does_not_parse() {
    let report = |generation: i64| json!({ "report": [{ "id": "t-1", "generation": generation, "state": "queued", "body": {} }] });
    let good = [0, 1, GENERATION_MAX];
    let bad = [-1, GENERATION_MAX + 1, i64::MIN, i64::MAX];
    assert!(good.iter().all(|n| parses::<FromSite>(&report(*n))));
    assert!(!bad.iter().any(|n| parses::<FromSite>(&report(*n))));
}

#[test]
fn a_message_with_a_bad_id_does_not_parse() {
    let report = |id: &str| {
        json!({ "report": [{ "id": "t-1", "generation": 0, "state": "queued", "body": {} },
            { "id": id, "generation": 0, "state": "queued", "body": { "waits_for": id } }] })
    };
    let run = |id: &str| {
        json!({ "runs": [{ "name": "r", "id": id, "phase": "waiting", "by_platform": false, "starts": 0, "started_ms": null,
            "ended": null, "has_output": false, "model": null, "message": null, "removed": [id], "left": [], "released": false }] })
    };
    let order = |name: &str, on: &str| json!({ "start_run": { "name": name, "from": "a", "on": on, "inputs": ["model/m:1"], "expect": "model/m", "ttl_seconds": 1 } });
    let questions = |id: &str| {
        [
            json!({ "act": { "id": id, "action": "cancel" } }),
            json!({ "delivery": id }),
            json!({ "transfers": { "id": format!("t-1,{id}"), "since": null, "wait": 0 } }),
            json!({ "show_run": id }),
            json!({ "act_on_run": { "name": id, "action": "cancel" } }),
            json!({ "publish": { "artifact": "model/m:1", "digest": DIGEST, "run": id } }),
            json!({ "publish": { "artifact": format!("model/m:{id}"), "digest": DIGEST } }),
            json!({ "publish": { "artifact": "model/m:1", "digest": DIGEST, "to": id } }),
            json!({ "deliver": { "artifacts": [format!("{id}/m:1")], "to": "all" } }),
            order(id, "b"),
            order("r", id),
        ]
    };
    assert!(parses::<FromSite>(&report("t-2")) && parses::<FromSite>(&run("r-1")));
    for good in questions("model") {
        assert!(parses::<AskHub>(&good), "{good}");
    }
    for bad in [
        "/var/tmp/x",
        "../x",
        "..",
        ".",
        "",
        "a/b",
        "a\u{0}",
        "a\u{202e}b",
        "\n",
    ] {
        assert!(
            !parses::<FromSite>(&report(bad)) && !parses::<FromSite>(&run(bad)),
            "{bad:?}"
        );
        for question in questions(bad) {
            assert!(!parses::<AskHub>(&question), "{question}");
        }
    }
}

#[test]
fn a_batch_of_reports_carries_a_certificate_once_and_loses_nothing() {
    let body = |certificate: &str| -> Body {
        serde_json::from_value(
            json!({ "attempts": 2, "eta_seconds": 0, "bytes": { "total": 7 },
            "receipt": { "certificate": certificate, "signature": "cw==", "statement": "{}" } }),
        )
        .unwrap()
    };
    let report = |id: &str, body: Body| Report {
        id: id.parse().unwrap(),
        generation: 1,
        state: State::Done,
        body,
    };
    let (long, other) = ("c".repeat(700), "d".repeat(700));
    let batches = [
        vec![report("t-1", body(&long)), report("t-2", body(&long))],
        vec![
            report("t-3", body(&long)),
            report("t-4", body(&other)),
            report("t-4", Body::default()),
        ],
        vec![report("t-5", body(&other)), report("t-6", body(&long))],
        vec![report("t-7", body(&other))],
    ];
    let (mut sent, mut received) = (None, None);
    let mut sizes = Vec::new();
    for (number, reports) in batches.into_iter().enumerate() {
        let batch = ReportBatch::new(number as u64, reports.clone(), &mut sent);
        let text = to_json(&FromSite::Reports(batch)).unwrap();
        sizes.push(text.len());
        let FromSite::Reports(batch) = from_json(&text).unwrap() else {
            unreachable!("the message is a batch")
        };
        assert!(
            batch
                .into_reports(&mut received)
                .eq(reports.iter().cloned())
        );
    }
    assert!(
        sizes[0] > 700 && sizes[0] < 1200 && sizes[3] < 300,
        "{sizes:?}"
    );
}
