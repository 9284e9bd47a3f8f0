//! What crosses the line: the kinds of streams, their messages, and their framing.
//!
//! Every stream begins with one byte that says its kind.
//!
//! ```text
//! 'C'  control, opened by the site, one for each connection: JSON messages both ways, each behind its u32 LE length
//! 'F'  fetch, opened by whoever lacks chunks: u32 LE length, a postcard [`FetchRequest`]; the answer is the frames
//!      asked for, in order, as they are stored (see `frame`), and the end of the stream. A frame with the fault codec
//!      stands for a chunk that could not be given and ends the answer.
//! 'Q'  question, opened by either: u32 LE length, JSON; the answer likewise, `{"Ok":…}` or `{"Err":fault}`
//! ```

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::types::{Action, State};
use crate::catalogue::{Body, Want};
use crate::chunk::Hash;
use crate::config::Congestion;
use crate::fault::Fault;
use crate::limits::CONTROL_FRAME_BYTES_MAX;
use crate::line::{Link, RecvHalf, SendHalf};
use crate::manifest::Digest;
use crate::names::{ArtifactRef, DeliveryId, RunName, SiteName, SiteSelector, TransferId, WorkId, WorkIds};
use crate::number;
use crate::omitted::Omitted;
use crate::run::{DesiredRun, Lineage, RunAct, RunOrder, RunReport};

/// First byte of a control stream.
pub const CONTROL: u8 = b'C';
/// First byte of a fetch stream.
pub const FETCH: u8 = b'F';
/// First byte of a question.
pub const QUESTION: u8 = b'Q';

/// Priorities of streams: control before questions before small transfers before large.
pub use crate::line::PRIORITY_CONTROL;
/// Questions.
pub const PRIORITY_QUESTION: i32 = 50;
/// Manifests.
pub const PRIORITY_MANIFEST: i32 = 20;

/// Asks for chunks of an artifact by where its manifest names them, so that nobody can ask for what he does not know
/// to belong to an artifact that he may read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FetchRequest {
    /// The artifact.
    pub digest: Digest,
    /// Higher is answered first.
    pub priority: i32,
    /// What of it.
    pub wants: Vec<Wanted>,
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
    /// The root manifest, and behind it the pages that it lists, if together they have no more than this many raw bytes.
    RootAndPages(u64),
    /// Entry pages of the artifact, as one difference against entry pages of another that the asker holds: by their
    /// numbers in the order of the manifests.
    Difference {
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
        version: String,
        /// Whom the site shares what is published there with: names or selectors; `None`: everybody.
        #[serde(default)]
        share: Option<Vec<String>>,
        /// The sites that this site trains for: names, or `all`. `None`: it has no trainer, or is older and decides by itself.
        #[serde(default)]
        train: Option<Vec<String>>,
        /// The congestion control that the site's line is set to, for what the hub sends as well.
        #[serde(default)]
        congestion: Congestion,
    },
    /// How transfers stand; any number of times for each.
    Report(Vec<Report>),
    /// How training runs stand at this site; any number of times for each.
    Runs(Vec<RunReport>),
    /// Everything that was published here in place and is no longer what it was, and how it changed; sent whole on connecting and
    /// whenever it differs.
    Changed(Vec<(ArtifactRef, String)>),
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
    /// Everything that the site has to do; sent whole whenever it changes, so that no single message matters.
    Desired {
        /// Rises with every change.
        revision: u64,
        /// What is not ended.
        transfers: Vec<Desired>,
        /// The training runs that this site trains, or has to clean up after.
        #[serde(default)]
        runs: Vec<DesiredRun>,
        /// Manifests of what is new, if they are small, so that the site need not ask: on a long line a round trip less.
        #[serde(default)]
        manifests: Vec<Told>,
    },
}

/// A manifest that was not asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    /// Of which artifact.
    pub digest: Digest,
    /// The frames of the root and of the pages that it lists, behind each other, in base64.
    pub frames: String,
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
        request: String,
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
    },
    /// An artifact was published at the site; the answer is an [`crate::api::types::Published`]. The hub fetches the
    /// manifest over the same line before it answers.
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
    /// A publisher has an artifact, which the hub fetches over the same line into its own store before it answers with an
    /// [`crate::api::types::Published`].
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
    /// A delivery as a whole, if each of its parts is the site's own or of what it holds; the answer is an
    /// [`crate::api::types::Delivery`].
    Delivery(DeliveryId),
    /// How transfers stand, each the site's own or of what it holds; the answer is a list and a cursor.
    Transfers {
        /// Ids of transfers or deliveries, comma-separated.
        id: WorkIds,
        /// Only what changed after this cursor.
        since: Option<u64>,
        /// Wait so many seconds for that.
        wait: u64,
    },
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
    /// Whether the site has this artifact still, as far as a quick look tells; the answer is a `bool`.
    Holds {
        /// Which.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
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

/// Asks the other end of a line, and waits for its answer.
pub async fn ask<Q: Serialize + Sync, T: DeserializeOwned>(link: &Link, question: &Q) -> Result<T, Fault> {
    let (mut send, mut recv) = link.open(PRIORITY_QUESTION).await?;
    send.write_all(&[QUESTION]).await?;
    self::send(&mut send, question).await?;
    send.finish()?;
    receive::<Result<T, Fault>>(&mut recv).await?
}

/// Sends one message behind its length.
pub async fn send<T: Serialize + Sync>(to: &mut SendHalf, message: &T) -> Result<(), Fault> {
    let text = serde_json::to_vec(message).map_err(|e| Fault::internal(format!("a message as JSON: {e}")))?;
    send_bytes(to, &text).await
}

/// Sends bytes behind their length.
pub async fn send_bytes(to: &mut SendHalf, bytes: &[u8]) -> Result<(), Fault> {
    let mut out = Vec::with_capacity(bytes.len() + 4);
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
    to.write_all(&out).await
}

/// Receives one message of at most [`CONTROL_FRAME_BYTES_MAX`].
pub async fn receive<T: DeserializeOwned>(from: &mut RecvHalf) -> Result<T, Fault> {
    let text = receive_bytes(from, CONTROL_FRAME_BYTES_MAX).await?;
    serde_json::from_slice(&text).map_err(|e| Fault::integrity(format!("the peer sent a malformed message: {e}")))
}

/// Receives bytes behind their length.
pub async fn receive_bytes(from: &mut RecvHalf, max: usize) -> Result<Vec<u8>, Fault> {
    let mut len = [0; 4];
    from.read_exact(&mut len).await?;
    let len = u32::from_le_bytes(len) as usize;
    if len > max {
        return Err(Fault::integrity(format!("the peer sent a message of {len} bytes; {max} are allowed")));
    }
    let mut out = vec![0; len];
    from.read_exact(&mut out).await?;
    Ok(out)
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
        for bad in ["/var/tmp/x", "../x", "..", ".", "", "a/b", "a\u{0}", "a\u{202e}b", "\n"] {
            assert!(!parses::<FromSite>(&report(bad)) && !parses::<FromSite>(&run(bad)), "{bad:?}");
            for question in questions(bad) {
                assert!(!parses::<AskHub>(&question), "{question}");
            }
        }
    }
}
