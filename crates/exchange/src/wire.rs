//! What crosses the line: the kinds of streams, their messages, and their framing.
//!
//! Every stream begins with one byte that says its kind.
//!
//! ```text
//! 'C'  control, opened by the site, one for each connection (a second one ends the first): JSON messages both ways, each behind
//!      its u32 LE length
//! 'F'  fetch, opened by whoever lacks chunks: u32 LE length, a postcard [`FetchRequest`]; the answer is the frames
//!      asked for, in order, as they are stored (see `frame`), and the end of the stream. A frame with the fault codec
//!      stands for a chunk that could not be given and ends the answer.
//! 'Q'  question, opened by either: u32 LE length, JSON; the answer likewise, `{"Ok":…}` or `{"Err":fault}`
//! ```

use std::time::{Duration, Instant};

use serde::de::{DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::time::timeout;

use base::blocking::blocking;
use base::budget::{Budget, Share};
use base::fault::Fault;
use base::limits::{
    ALLOW_ENTRIES_MAX, ANSWER_IDLE_MAX, ANSWER_MAX, CONTROL_FRAME_BYTES_MAX,
    FETCH_BATCH_CHUNKS_MAX, MESSAGE_BYTES_PER_SECOND_MIN, MESSAGE_BYTES_SMALL,
    QUESTION_BYTES_FACTOR, QUESTION_BYTES_MAX, RENEWAL_BYTES_MAX, SILENCE_MAX,
    STANDING_TEXT_BYTES_MAX,
};
use base::names::{
    ArtifactRef, DeliveryId, RunName, SiteName, SiteSelector, TransferId, WorkId, WorkIds,
};
use base::number;
use base::omitted::Omitted;
use base::text::{self, Exact, Lenient, Message, Text, Version};
use content::chunk::Hash;
use content::manifest::Digest;
use model::run::{DesiredRun, Lineage, RunAct, RunOrder, RunReport};
use model::transfer::{Action, State};
use state::{Body, Want};
use transport::Congestion;
use transport::{Link, RecvHalf, SendHalf};

/// First byte of a control stream.
pub const CONTROL: u8 = b'C';
/// First byte of a fetch stream.
pub const FETCH: u8 = b'F';
/// First byte of a question.
pub const QUESTION: u8 = b'Q';

/// Priorities of streams: control before questions before small transfers before large.
pub use transport::PRIORITY_CONTROL;
/// Questions.
pub const PRIORITY_QUESTION: i32 = 50;
/// Manifests.
pub const PRIORITY_MANIFEST: i32 = 20;

/// Asks for chunks of an artifact by where its manifest names them, so that nobody can ask for what
/// he does not know to belong to an artifact that he may read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FetchRequest {
    /// The artifact.
    pub digest: Digest,
    /// Higher is answered first.
    pub priority: i32,
    /// What of it; see [`FetchRequest::parse`] for how much that may be.
    #[serde(deserialize_with = "few_wants")]
    pub wants: Vec<Wanted>,
}

/// Stops before more wants are in memory than a request may have.
fn few_wants<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Wanted>, D::Error> {
    struct Few;
    impl<'de> Visitor<'de> for Few {
        type Value = Vec<Wanted>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {FETCH_BATCH_CHUNKS_MAX} wants")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Wanted>, A::Error> {
            let mut wants = Vec::new();
            while let Some(wanted) = seq.next_element()? {
                if wants.len() == FETCH_BATCH_CHUNKS_MAX {
                    return Err(serde::de::Error::invalid_length(wants.len() + 1, &self));
                }
                wants.push(wanted);
            }
            Ok(wants)
        }
    }
    from.deserialize_seq(Few)
}

impl FetchRequest {
    /// Parses a request. One that asks for more than a request may is refused: at most one root
    /// manifest, at most one delta, and [`FETCH_BATCH_CHUNKS_MAX`] wants, ranges, chunks and pages
    /// in all.
    pub fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let request: Self = postcard::from_bytes(bytes).map_err(|_| {
            Fault::integrity(format!(
                "a fetch request is malformed, or has more than {FETCH_BATCH_CHUNKS_MAX} wants"
            ))
        })?;
        let (mut roots, mut differences, mut pieces) = (0, 0, 0_u64);
        for wanted in &request.wants {
            let ranges = match wanted {
                Wanted::Root | Wanted::RootAndPages(_) => {
                    roots += 1;
                    &[][..]
                }
                Wanted::TopPages(ranges) | Wanted::Children { ranges, .. } => ranges,
                Wanted::Delta { ranges, .. } => {
                    differences += 1;
                    ranges
                }
            };
            // An empty range costs time as well, and so does a want without ranges.
            pieces += ranges
                .iter()
                .map(|(_, count)| u64::from(*count).max(1))
                .sum::<u64>()
                .max(1);
        }
        if roots > 1 || differences > 1 {
            return Err(Fault::integrity(
                "a fetch request asks for more than one root manifest or delta",
            ));
        }
        if pieces > FETCH_BATCH_CHUNKS_MAX as u64 {
            return Err(Fault::integrity(format!(
                "a fetch request asks for {pieces} pieces; {FETCH_BATCH_CHUNKS_MAX} are allowed"
            )));
        }
        Ok(request)
    }
}

/// Some of an artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Wanted {
    /// The root manifest.
    Root,
    /// Pages that the root manifest lists: `(first, count)`.
    TopPages(Vec<(u32, u32)>),
    /// Children of a page, pages or chunks: `(first, count)`.
    Children {
        /// The page.
        page: Hash,
        /// Which of its children.
        ranges: Vec<(u32, u32)>,
    },
    /// The root manifest, and behind it the pages that it lists, if together they have no more than
    /// this many raw bytes.
    RootAndPages(u64),
    /// Entry pages of the artifact, as one delta against entry pages of another that the asker
    /// holds: by their numbers in the order of the manifests.
    Delta {
        /// The pages wanted: `(first, count)`.
        ranges: Vec<(u32, u32)>,
        /// The other artifact, which the asker may read as well.
        base: Digest,
        /// Its pages: `(first, count)`.
        against: (u32, u32),
    },
}

/// From a site.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSite {
    /// First.
    Hello {
        /// The program's version.
        version: Version,
        /// Whom the site shares what is published there with: names or selectors; `None`:
        /// everybody.
        #[serde(default)]
        share: Option<AllowList>,
        /// The sites that this site trains for: names, or `all`. `None`: it is older and decides by
        /// itself.
        #[serde(default)]
        train: Option<AllowList>,
        /// The congestion control that the site's line is set to, for what the hub sends as well.
        #[serde(default)]
        congestion: Congestion,
    },
    /// How transfers stand; any number of times for each.
    Report(Vec<Report>),
    /// How training runs stand at this site; any number of times for each.
    Runs(Vec<RunReport>),
    /// Everything that was published here in place and is no longer what it was, and how it
    /// changed; sent whole on connecting and whenever it differs.
    Changed(Vec<(ArtifactRef, Message)>),
}

/// An `allow` list of a site: the sites that it shares with, or that it trains for. What is no
/// selection of sites is left out, and allows nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Lenient<SiteSelector>>")]
pub struct AllowList(Vec<SiteSelector>);

impl AllowList {
    /// The list in a configuration.
    pub fn of(allow: &[String]) -> Self {
        Self(allow.iter().filter_map(|text| text.parse().ok()).collect())
    }

    /// Each entry as text.
    pub fn texts(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }
}

impl From<Vec<Lenient<SiteSelector>>> for AllowList {
    fn from(list: Vec<Lenient<SiteSelector>>) -> Self {
        Self(
            list.into_iter()
                .filter_map(|entry| entry.0)
                .take(ALLOW_ENTRIES_MAX)
                .collect(),
        )
    }
}

/// How a transfer stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Which.
    pub id: TransferId,
    /// Of which try.
    pub generation: i64,
    /// Where it is.
    pub state: State,
    /// The rest.
    pub body: Body,
}

/// From the hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromHub {
    /// Everything that the site has to do; sent whole whenever it changes, so that no single
    /// message matters.
    Desired {
        /// Rises with every change.
        revision: u64,
        /// What is not ended.
        transfers: Vec<Desired>,
        /// The training runs that this site trains, or has to clean up after.
        #[serde(default)]
        runs: Vec<DesiredRun>,
        /// Manifests of what is new, if they are small, so that the site need not ask: on a long
        /// line a round trip less.
        #[serde(default)]
        manifests: Vec<PushedManifest>,
    },
}

/// A manifest that was not asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PushedManifest {
    /// Of which artifact.
    pub digest: Digest,
    /// The frames of the root and of the pages that it lists, behind each other, in base64.
    pub frames: Exact<CONTROL_FRAME_BYTES_MAX>,
}

/// A transfer that the hub wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Its id.
    pub id: TransferId,
    /// Its delivery.
    pub delivery: DeliveryId,
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Go on, stand still, give up.
    pub want: Want,
    /// Raised by every retry.
    #[serde(deserialize_with = "number::generation")]
    pub generation: i64,
    /// Bytes of the artifact.
    #[serde(deserialize_with = "number::count")]
    pub total: u64,
    /// When it was asked for.
    pub created_ms: i64,
    /// The transfers to this site that go first: labels come after their dataset.
    #[serde(default)]
    pub after: Vec<TransferId>,
    /// What it was made of, where that is known.
    #[serde(default)]
    pub lineage: Option<Lineage>,
}

/// A site asks the hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskHub {
    /// Act on one of the site's transfers.
    Act {
        /// Which.
        id: WorkId,
        /// What.
        action: Action,
    },
    /// Deliver artifacts to sites.
    Deliver {
        /// References.
        artifacts: Vec<ArtifactRef>,
        /// Names, `all`, or a selector.
        to: SiteSelector,
    },
    /// A new certificate for the key of this request.
    Renew {
        /// The signing request, DER in hex.
        request: Exact<RENEWAL_BYTES_MAX>,
    },
    /// Begin a training run for this site.
    StartRun(RunOrder),
    /// Finish or cancel a run that this site has to do with.
    ActOnRun(RunAct),
    /// A run that this site has to do with.
    ShowRun(RunName),
    /// The runs that this site has to do with.
    ListRuns {
        /// At most this many.
        limit: u32,
        /// Behind so many of them: an answer holds as many as fit.
        #[serde(default)]
        from: u32,
    },
    /// An artifact was published at the site; the answer is an `Published` of the API. The hub
    /// fetches the manifest over the same line before it answers.
    Publish {
        /// Its name.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
        /// Sites to deliver to at once.
        #[serde(default)]
        to: Option<SiteSelector>,
        /// The training run that made it.
        #[serde(default)]
        run: Option<RunName>,
        /// What its publish left out.
        #[serde(default)]
        omitted: Omitted,
    },
    /// A publisher has an artifact, which the hub fetches over the same line into its own store
    /// before it answers with an `Published` of the API.
    Upload {
        /// Its name.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
        /// Sites to deliver to at once.
        #[serde(default)]
        to: Option<SiteSelector>,
        /// What its publish left out.
        #[serde(default)]
        omitted: Omitted,
    },
    /// A delivery as a whole, if each of its parts is the site's own or of what it holds; the
    /// answer is an `Delivery` of the API.
    Delivery(DeliveryId),
    /// How transfers stand, each the site's own or of what it holds; the answer is a list and a
    /// cursor.
    Transfers {
        /// Ids of transfers or deliveries, comma-separated.
        id: WorkIds,
        /// Only what changed after this cursor.
        since: Option<u64>,
        /// Wait so many seconds for that.
        wait: u64,
    },
}

/// A certificate request, DER, as [`AskHub::Renew`] carries it.
pub fn renewal(csr_der: &[u8]) -> Result<Exact<RENEWAL_BYTES_MAX>, Fault> {
    Exact::new(hex::encode(csr_der))
        .ok_or_else(|| Fault::internal("the certificate request is too long"))
}

/// The hub asks a site.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskSite {
    /// What a delivery of this artifact would move.
    Plan {
        /// Which.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
    /// Whether the site has this artifact still, as far as a quick look tells; the answer is a
    /// `bool`.
    Holds {
        /// Which.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
    /// How this artifact is at the site, as far as a look tells that reads no content; the answer
    /// is [`Standing`].
    Stands {
        /// Which.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
}

/// A site's answer to [`AskSite::Stands`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// How it is.
    pub state: Stands,
    /// The first thing that is wrong, in words.
    pub detail: Option<Text<STANDING_TEXT_BYTES_MAX>>,
    /// The active version of its series, where there is such a thing and it is known.
    pub active: Option<Text<STANDING_TEXT_BYTES_MAX>>,
}

/// How an artifact is at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stands {
    /// It is there, and nothing shows that it was changed.
    Sound,
    /// Something of it is gone or was changed.
    Damaged,
    /// It is not there.
    Missing,
    /// The site cannot look now.
    Unavailable,
}

/// A site's answer to [`AskSite::Plan`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Planned {
    /// Bytes that would cross the line.
    #[serde(deserialize_with = "number::count")]
    pub missing: u64,
    /// Bytes that would be written.
    #[serde(deserialize_with = "number::count")]
    pub needs: u64,
    /// Room at the site.
    #[serde(deserialize_with = "number::optional_count")]
    pub free: Option<u64>,
    /// Bytes a second, as the line last went; 0 when it is not known.
    #[serde(deserialize_with = "number::count")]
    pub rate: u64,
}

/// Which site is on the other end of a stream, for what it may see.
pub type Peer = SiteName;

/// Asks the other end of a line, and waits for its answer, which must come soon.
pub async fn ask<Q: Serialize + Sync, T: DeserializeOwned + Send + 'static>(
    link: &Link,
    question: &Q,
) -> Result<T, Fault> {
    let answer = timeout(ANSWER_MAX, async {
        receive_answer(&mut put(link, question).await?.1).await
    })
    .await;
    answer.unwrap_or_else(|_| Err(unanswered(link, ANSWER_MAX)))
}

/// [`ask`] for a question whose answer comes only after content was moved: it may take as long as
/// some is moving.
pub async fn ask_to_move<Q: Serialize + Sync, T: DeserializeOwned + Send + 'static>(
    link: &Link,
    question: &Q,
) -> Result<T, Fault> {
    let answer = async { receive_answer(&mut put(link, question).await?.1).await };
    tokio::select! {
        answer = answer => answer,
        () = nothing_moves(link, ANSWER_IDLE_MAX) => Err(unanswered(link, ANSWER_IDLE_MAX)),
    }
}

/// Ends once no stream of the line carried anything for so long, either way.
async fn nothing_moves(link: &Link, idle_max: Duration) {
    let (mut moved, mut since) = (link.stream_bytes(), Instant::now());
    loop {
        tokio::time::sleep(idle_max / 20).await;
        let now = link.stream_bytes();
        if now != moved {
            (moved, since) = (now, Instant::now());
        } else if since.elapsed() >= idle_max {
            return;
        }
    }
}

fn unanswered(link: &Link, after: Duration) -> Fault {
    let peer = link
        .peer()
        .map_or_else(|| "the peer".to_owned(), ToString::to_string);
    Fault::unreachable(format!(
        "{peer} did not answer a question within {} s",
        after.as_secs()
    ))
    .with_next("look at the log of the other daemon, then run the command again")
}

/// Opens a stream with a question on it. The stream lives as long as both halves.
async fn put<Q: Serialize + Sync>(
    link: &Link,
    question: &Q,
) -> Result<(SendHalf, RecvHalf), Fault> {
    let text = serde_json::to_vec(question)
        .map_err(|e| Fault::internal(format!("a question as JSON: {e}")))?;
    if text.len() > QUESTION_BYTES_MAX {
        return Err(Fault::usage(format!(
            "the request has {} bytes; {QUESTION_BYTES_MAX} are allowed",
            text.len()
        ))
        .with_next("name fewer artifacts at once, or give shorter settings"));
    }
    let (mut send, recv) = link.open(PRIORITY_QUESTION).await?;
    // In one piece: the other end waits only so long for what follows the first byte.
    let mut out = Vec::with_capacity(text.len() + 5);
    out.push(QUESTION);
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(&text);
    send.write_all(&out).await?;
    send.finish()?;
    Ok((send, recv))
}

async fn receive_answer<T: DeserializeOwned + Send + 'static>(
    recv: &mut RecvHalf,
) -> Result<T, Fault> {
    receive::<Result<T, Fault>>(recv).await?
}

/// Sends one message behind its length.
pub async fn send<T: Serialize + Sync>(to: &mut SendHalf, message: &T) -> Result<(), Fault> {
    let text = serde_json::to_vec(message)
        .map_err(|e| Fault::internal(format!("a message as JSON: {e}")))?;
    if text.len() > CONTROL_FRAME_BYTES_MAX {
        // The other end would refuse it, and end the stream.
        return Err(Fault::internal(format!(
            "a message has {} bytes, and {CONTROL_FRAME_BYTES_MAX} are allowed",
            text.len()
        )));
    }
    send_bytes(to, &text).await
}

/// Sends bytes behind their length.
pub async fn send_bytes(to: &mut SendHalf, bytes: &[u8]) -> Result<(), Fault> {
    let mut out = Vec::with_capacity(bytes.len() + 4);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
    to.write_all(&out).await
}

/// Receives one message of at most [`CONTROL_FRAME_BYTES_MAX`]. It may begin at any time; once
/// begun it must arrive.
pub async fn receive<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
) -> Result<T, Fault> {
    let len = receive_len(from, CONTROL_FRAME_BYTES_MAX).await?;
    parse(receive_body(from, len).await?).await
}

/// [`receive`], for a message whose memory comes out of the peer's share of `budget` before it is
/// read. The share is to be kept as long as the message.
pub async fn receive_within<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
    budget: &Budget,
    peer: &Peer,
) -> Result<(T, Share), Fault> {
    let len = receive_len(from, CONTROL_FRAME_BYTES_MAX).await?;
    let share = budget.take(peer, len as u64, PRIORITY_CONTROL).await?;
    Ok((parse(receive_body(from, len).await?).await?, share))
}

/// Receives a question, which has to begin at once; as [`receive_within`].
pub async fn receive_question<T: DeserializeOwned + Send + 'static>(
    from: &mut RecvHalf,
    budget: &Budget,
    peer: &Peer,
) -> Result<(T, Share), Fault> {
    let len = timeout(SILENCE_MAX, receive_len(from, QUESTION_BYTES_MAX)).await;
    let len = len.map_err(|_| Fault::unreachable("a question did not arrive"))??;
    let share = budget
        .take(peer, len as u64 * QUESTION_BYTES_FACTOR, PRIORITY_QUESTION)
        .await?;
    Ok((parse(receive_body(from, len).await?).await?, share))
}

/// Receives bytes behind their length. They may begin at any time; once begun they must arrive.
pub async fn receive_bytes(from: &mut RecvHalf, max: usize) -> Result<Vec<u8>, Fault> {
    let len = receive_len(from, max).await?;
    receive_body(from, len).await
}

async fn receive_len(from: &mut RecvHalf, max: usize) -> Result<usize, Fault> {
    let mut len = [0; 4];
    from.read_exact(&mut len).await?;
    let len = u32::from_le_bytes(len) as usize;
    if len > max {
        return Err(Fault::integrity(format!(
            "the peer sent a message of {len} bytes; {max} are allowed"
        )));
    }
    Ok(len)
}

async fn receive_body(from: &mut RecvHalf, len: usize) -> Result<Vec<u8>, Fault> {
    let mut out = vec![0; len];
    let patience = SILENCE_MAX + Duration::from_secs(len as u64 / MESSAGE_BYTES_PER_SECOND_MIN);
    let read = timeout(patience, from.read_exact(&mut out)).await;
    read.map_err(|_| {
        Fault::unreachable(format!(
            "a message did not arrive within {} s",
            patience.as_secs()
        ))
    })??;
    Ok(out)
}

async fn parse<T: DeserializeOwned + Send + 'static>(text: Vec<u8>) -> Result<T, Fault> {
    let is_small = text.len() <= MESSAGE_BYTES_SMALL;
    let work = move || {
        text::parse_json(&text)
            .map_err(|why| Fault::integrity(format!("the peer sent a malformed message: {why}")))
    };
    if is_small {
        work()
    } else {
        blocking(work).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parses<T: DeserializeOwned>(value: &Value) -> bool {
        serde_json::from_value::<T>(value.clone()).is_ok()
    }

    #[test]
    fn a_message_with_a_bad_id_does_not_parse() {
        let digest = "00".repeat(32);
        let report = |id: &str| {
            json!({ "report": [{ "id": "t-1", "generation": 0, "state": "queued", "body": {} },
            { "id": id, "generation": 0, "state": "queued", "body": { "waits_for": id } }] })
        };
        let run = |id: &str| {
            json!({ "runs": [{ "name": "r", "id": id, "phase": "waiting", "by_platform": false, "starts": 0, "started_ms": null,
            "ended": null, "has_output": false, "model": null, "message": null, "removed": [id], "left": [], "released": false }] })
        };
        let questions = |id: &str| {
            [
                json!({ "act": { "id": id, "action": "cancel" } }),
                json!({ "delivery": id }),
                json!({ "transfers": { "id": format!("t-1,{id}"), "since": null, "wait": 0 } }),
                json!({ "show_run": id }),
                json!({ "act_on_run": { "name": id, "action": "cancel" } }),
                json!({ "publish": { "artifact": "model/m:1", "digest": digest, "run": id } }),
                json!({ "publish": { "artifact": format!("model/m:{id}"), "digest": digest } }),
                json!({ "publish": { "artifact": "model/m:1", "digest": digest, "to": id } }),
                json!({ "deliver": { "artifacts": [format!("{id}/m:1")], "to": "all" } }),
                json!({ "start_run": { "name": id, "from": "a", "on": "b", "inputs": ["model/m:1"], "expect": "model/m", "ttl_seconds": 1 } }),
                json!({ "start_run": { "name": "r", "from": "a", "on": id, "inputs": ["model/m:1"], "expect": "model/m", "ttl_seconds": 1 } }),
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

    fn parse_wants(wants: Vec<Wanted>) -> Result<FetchRequest, Fault> {
        FetchRequest::parse(
            &postcard::to_stdvec(&FetchRequest {
                digest: Hash([1; 32]),
                priority: 0,
                wants,
            })
            .unwrap(),
        )
    }

    #[test]
    fn a_request_has_one_root_and_a_bounded_number_of_pieces() {
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
            assert_eq!(parse_wants(wants.clone()).unwrap().wants, wants);
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
            assert_eq!(
                parse_wants(wants).unwrap_err().code,
                base::fault::Code::Integrity
            );
        }
    }
}
