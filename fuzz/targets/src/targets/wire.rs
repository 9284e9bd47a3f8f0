//! What peers send: frames of the TCP transport, control messages, questions and answers, fetch
//! requests, and join requests.

use std::fmt::Debug;

use base::fault::Fault;
use base::limits::FETCH_BATCH_CHUNKS_MAX;
use model::protocol::{
    AskHub, AskSite, FetchRequest, FromHub, FromSite, Planned, Presence, Wanted, from_json, to_json,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Parts, texts};
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const MUX: Target = Target {
    name: "mux_frame",
    about: "frames of the TCP transport, and the state of its streams: the input is a list of steps",
    run: mux,
    seeds: || {
        let open = |id: u8| vec![1, id, 0];
        let data = |id: u8| vec![2, id, 3, b'a', b'b', b'c'];
        let steps: [Vec<u8>; 4] = [
            [
                open(1),
                vec![10, 0],
                data(1),
                vec![12, 1, 13, 9, 19, 0, 3, 1, 0, 12, 1, 14, 0, 17, 0, 19, 0],
            ]
            .concat(),
            [
                open(1),
                open(3),
                vec![10, 0, 10, 0],
                data(3),
                vec![
                    4, 3, 0, 5, 1, 0, 16, 0, 15, 1, 18, 0, 8, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0,
                ],
            ]
            .concat(),
            vec![
                11, 5, 13, 200, 19, 0, 6, 2, 4, 0, 0, 1, 0, 19, 0, 6, 0, 4, 0, 1, 0, 0, 19, 0,
            ],
            [
                open(1),
                vec![0, 7, 2, 0, 1, 0, 0, 0, 0, 1],
                vec![9, 0, 6, 0, 0, 0, 1, b'n', b'o'],
            ]
            .concat(),
        ];
        steps.to_vec()
    },
    words: &[
        "\u{1}\u{1}\u{0}",
        "\u{a}\u{0}",
        "\u{13}\u{0}",
        "\u{c}\u{1}",
        "\u{2}\u{1}\u{3}abc",
        "\u{6}\u{0}\u{4}",
    ],
    short: 3000,
};

fn mux(input: &[u8]) {
    taken(transport::testing::drive_mux(input));
}

/// Parses a message from JSON. What is parsed can be written, and parses to the same.
fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let value = taken(from_json::<T>(bytes))?;
    let written = to_json(&value);
    assert!(written.is_ok(), "{value:?}");
    let again = written.and_then(|written| from_json::<T>(&written));
    assert_eq!(again.as_ref(), Ok(&value));
    Some(value)
}

const DIGEST: &str = "0101010101010101010101010101010101010101010101010101010101010101";

pub(super) const CONTROL: Target = Target {
    name: "control_message",
    about: "messages of the control stream, of a site and of the hub",
    run: |input| {
        json::<FromSite>(input);
        match json::<FromHub>(input) {
            Some(FromHub::Desired { transfers, .. }) => {
                assert!(transfers.iter().all(|transfer| transfer.generation >= 0));
            }
            Some(FromHub::Changes(changes)) => {
                assert!(changes.set.iter().all(|wanted| wanted.generation >= 0));
                let mut list = model::desired::ReceivedList::default();
                let _ = list.take(&changes);
                let _ = list.take(&changes);
            }
            _ => {}
        }
    },
    seeds: || {
        texts(&[
            r#"{"hello":{"version":"0.1.0","share":["all","line=3","a,b"],"train":null,"congestion":"auto"}}"#,
            r#"{"report":[{"id":"t-1","generation":3,"state":"transferring","body":{"reason":"no_space","message":"m","next":"n","waits_for":"t-0","bytes":{"total":10,"reused":1,"resumed":2,"received":3,"committed":4,"wire":5},"rate":6,"eta_seconds":7,"attempts":1,"location":"/nas/x","receipt":{"certificate":"Yw==","signature":"cw==","statement":"{}"},"landed":false,"note":"a note"}}]}"#,
            r#"{"runs":[{"name":"r1","id":"r-1","phase":"training","by_platform":false,"by_command":true,"starts":1,"started_ms":5,"ended":{"exit_code":1,"signal":null,"message":"it failed","tail":"no data\n","ended_ms":9},"has_output":false,"model":null,"message":null,"removed":["t-1"],"left":["t-2: busy"],"released":false}]}"#,
            r#""list""#,
            r#"{"stored":{"number":5,"unstored":["t-1"]}}"#,
            r#"{"reports":{"number":4,"certificate":"Yw==","reports":[{"id":"t-1","generation":0,"state":"done","body":{"bytes":{"total":10},"attempts":1,"receipt":{"certificate":"","signature":"cw==","statement":"{}"}}}]}}"#,
            &r#"{"changes":{"revision":9,"begin":true,"end":true,"partial":true,"set":[{"id":"t-1","delivery":"d-1","artifact":"model/m:1","digest":"DIGEST","want":"run","generation":2,"total":10,"created_ms":1,"known":{"state":"paused","reason":"paused_by_user"}}],"removed":["t-2"],"kept":["t-3"],"runs":[],"manifests":[{"digest":"DIGEST","frames":"AA=="}]}}"#.replace("DIGEST", DIGEST),
            r#"{"changed":[["dataset/d:1","a.png: the size differs from the recorded size"]]}"#,
            &r#"{"desired":{"revision":9,"transfers":[{"id":"t-1","delivery":"d-1","artifact":"labels/l:1","digest":"DIGEST","want":"run","generation":2,"total":10,"created_ms":1,"after":["t-0"],"lineage":{"run":"r1","from":"a","on":"b","inputs":[{"artifact":"dataset/d:1","digest":"DIGEST","bytes":10}]}}],"runs":[{"spec":{"name":"r1","id":"r-1","from":"a","on":"b","inputs":[],"expect":"model/m","delivery":"d-2","created_ms":1,"deadline_ms":2},"want":"train","borrowed":[{"transfer":"t-1","artifact":"dataset/d:1","digest":"DIGEST","generation":0}],"model":null,"ready":true}],"manifests":[{"digest":"DIGEST","frames":"AA=="}]}}"#.replace("DIGEST", DIGEST),
        ])
    },
    words: &[
        "hello",
        "report",
        "runs",
        "changed",
        "desired",
        "changes",
        "reports",
        "stored",
        "unstored",
        "list",
        "begin",
        "set",
        "removed",
        "kept",
        "revision",
        "version",
        "share",
        "train",
        "id",
        "generation",
        "state",
        "body",
        "bytes",
        "receipt",
        "transfers",
        "manifests",
        "frames",
        "after",
        "lineage",
        "want",
        "run",
        "pause",
        "cancel",
        "done",
        "failed",
        "dataset/d:1",
        "all",
        "null",
    ],
    short: 1200,
};

pub(super) const QUESTION: Target = Target {
    name: "question",
    about: "questions to the hub and to a site, and their answers",
    run: |input| {
        json::<AskHub>(input);
        json::<AskSite>(input);
        json::<Result<Presence, Fault>>(input);
        json::<Result<Planned, Fault>>(input);
        json::<Result<bool, Fault>>(input);
        taken(from_json::<Result<serde_json::Value, Fault>>(input));
    },
    seeds: || {
        [
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
            r#"{"plan":{"artifact":"dataset/d:1","digest":"DIGEST"}}"#,
            r#"{"stands":{"artifact":"dataset/d:1","digest":"DIGEST"}}"#,
            r#"{"Ok":{"state":"damaged","detail":"a is gone","active":null}}"#,
            r#"{"Ok":{"missing":1,"needs":2,"free":null,"rate":4}}"#,
            r#"{"Ok":true}"#,
            r#"{"Err":{"code":"not_found","reason":"source_gone","retry":{"after_ms":5},"message":"it is gone","next":"look"}}"#,
        ]
        .iter()
        .map(|text| text.replace("DIGEST", DIGEST).into_bytes())
        .collect()
    },
    words: &[
        "act",
        "deliver",
        "renew",
        "start_run",
        "act_on_run",
        "show_run",
        "list_runs",
        "publish",
        "upload",
        "delivery",
        "transfers",
        "plan",
        "holds",
        "stands",
        "Ok",
        "Err",
        "id",
        "action",
        "artifacts",
        "artifact",
        "digest",
        "to",
        "omitted",
        "what",
        "count",
        "examples",
        "other",
        "since",
        "wait",
        "expect",
        "model/m",
        "limit",
        "from",
    ],
    short: 1200,
};

pub(super) const FETCH_REQUEST: Target = Target {
    name: "fetch_request",
    about: "the request of a fetch stream",
    run: fetch_request,
    seeds: || {
        use content::chunk::Hash;
        let wants = [
            vec![Wanted::Root],
            vec![Wanted::RootAndPages(1 << 20)],
            vec![Wanted::TopPages(vec![(0, 1), (300, 2)])],
            vec![Wanted::Children {
                page: Hash([2; 32]),
                ranges: vec![(7, 1), (9, 100)],
            }],
            vec![Wanted::Refused {
                page: Hash([2; 32]),
                ranges: vec![(7, 1)],
            }],
            vec![
                Wanted::Delta {
                    ranges: vec![(1, 1)],
                    base: Hash([2; 32]),
                    against: (3, 4),
                },
                Wanted::Root,
            ],
        ];
        let request = |wants| FetchRequest {
            digest: Hash([1; 32]),
            priority: -3,
            wants,
        };
        wants
            .into_iter()
            .filter_map(|wants| request(wants).to_bytes().ok())
            .collect()
    },
    words: &["\u{0}", "\u{1}", "\u{2}", "\u{3}", "\u{4}", "\u{5}"],
    short: 4000,
};

fn fetch_request(input: &[u8]) {
    let Some(request) = taken(FetchRequest::parse(input)) else {
        return;
    };
    let again = request
        .to_bytes()
        .and_then(|bytes| FetchRequest::parse(&bytes));
    assert_eq!(again.as_ref(), Ok(&request));
    assert!(request.wants.len() <= FETCH_BATCH_CHUNKS_MAX);
    let ranges = request.wants.iter().flat_map(|wanted| match wanted {
        Wanted::Root | Wanted::RootAndPages(_) => &[][..],
        Wanted::TopPages(ranges)
        | Wanted::Children { ranges, .. }
        | Wanted::Refused { ranges, .. }
        | Wanted::Delta { ranges, .. } => ranges,
    });
    let pieces: u64 = ranges.map(|(_, count)| u64::from(*count)).sum();
    assert!(pieces <= FETCH_BATCH_CHUNKS_MAX as u64, "{pieces} pieces");
    note(&format!(
        "{:?}",
        request.wants.first().map(std::mem::discriminant)
    ));
}

pub(super) const JOIN: Target = Target {
    name: "join",
    about: "the first messages of a connection, join requests and answers, join tokens, certificates and their requests",
    run: |input| {
        let mut parts = Parts::new(input);
        let which = parts.byte();
        taken(transport::testing::parse_join(which, parts.rest));
    },
    // What holds a key or a certificate is among the committed inputs.
    seeds: || {
        let welcome = r#"{"hub":"central","time_ms":1764500000000}"#;
        let refused = r#"{"refused":{"code":"not_allowed","reason":"internal","retry":"never","message":"no","next":"look"}}"#;
        vec![
            [&[0][..], welcome.as_bytes()].concat(),
            [&[2][..], refused.as_bytes()].concat(),
        ]
    },
    words: &[
        "token_id",
        "secret",
        "site",
        "csr",
        "certificate",
        "refused",
        "hub",
        "time_ms",
        "code",
        "message",
        ".",
        "AAAA",
        "packhorse:site:x",
    ],
    short: 600,
};
