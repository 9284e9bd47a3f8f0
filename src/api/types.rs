//! What crosses the API: requests, answers, and the documented fields of `status`.
//!
//! Times are RFC 3339 in UTC. Sizes are bytes. A field is never renamed or removed once released.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::fault::{Fault, Reason};
use crate::names::{ArtifactRef, RunName, SiteName};

/// The state of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not begun; the reason says what it waits for.
    Queued,
    /// The site works out what it lacks.
    Planning,
    /// Bytes move.
    Transferring,
    /// Everything is there; the sink makes it visible.
    Committing,
    /// Committed, receipt signed.
    Done,
    /// Held by somebody.
    Paused,
    /// Stopped by a fault that needs a person; `retry` begins again where it stood.
    Failed,
    /// Given up by somebody.
    Cancelled,
}

impl State {
    /// The word in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Queued => "queued",
            State::Planning => "planning",
            State::Transferring => "transferring",
            State::Committing => "committing",
            State::Done => "done",
            State::Paused => "paused",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens by itself.
    pub fn is_final(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Cancelled)
    }

    /// The state of that name.
    pub fn parse(s: &str) -> Option<Self> {
        use State as S;
        [S::Queued, S::Planning, S::Transferring, S::Committing, S::Done, S::Paused, S::Failed, S::Cancelled]
            .into_iter()
            .find(|state| state.as_str() == s)
    }
}

/// Bytes of a transfer, which never go backwards. What came over the line, or was reused, before an interruption is counted as resumed
/// too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Bytes {
    /// Raw bytes of all the artifact's files.
    pub total: u64,
    /// Taken from what the site already had.
    pub reused: u64,
    /// Found in place from before an interruption.
    pub resumed: u64,
    /// Raw bytes that came over the line.
    pub received: u64,
    /// Raw bytes durable at the site.
    pub committed: u64,
    /// What crossed the line for it, manifests and framing included.
    pub wire: u64,
}

/// One transfer, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Its id: `[A-Za-z0-9._-]`.
    pub id: String,
    /// The delivery it is part of.
    pub delivery: String,
    /// `kind/name:version`.
    #[schema(value_type = String)]
    pub artifact: ArtifactRef,
    /// The artifact's digest, hex.
    pub digest: String,
    /// Where it goes.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// Where it is.
    pub state: State,
    /// Why it is there, if not by itself.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// The last error or the wait, in words.
    pub message: Option<String>,
    /// What to do next about it.
    pub next: Option<String>,
    /// The transfer to the same site that must be done first, while it waits for that.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes a second over the last seconds; 0 when it stands.
    pub rate: u64,
    /// Seconds to go at this rate.
    pub eta_seconds: Option<u64>,
    /// How often it was begun.
    pub attempts: u32,
    /// Where it landed, once done.
    pub location: Option<String>,
    /// When it was asked for.
    pub created_at: String,
    /// When this last changed.
    pub updated_at: String,
    /// When it ended.
    pub finished_at: Option<String>,
    /// The signed receipt, once done.
    #[schema(value_type = Option<Object>)]
    pub receipt: Option<serde_json::Value>,
    /// When what it brought was taken away again, because a run had only borrowed it.
    #[serde(default)]
    pub removed_at: Option<String>,
    /// The event at which this last changed: give the largest one seen to `--since`.
    pub cursor: u64,
}

/// A delivery: the whole, and each of its parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delivery {
    /// Its id: `[A-Za-z0-9._-]`.
    pub id: String,
    /// Where the whole is: what the parts that are furthest behind do, `failed` once all ended and one failed.
    pub state: State,
    /// Why it stands, if a part does.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// The same in words.
    pub message: Option<String>,
    /// What to do next about it.
    pub next: Option<String>,
    /// Bytes of all parts together.
    pub bytes: Bytes,
    /// Parts that are done.
    pub done: u64,
    /// The artifacts, each once.
    pub artifacts: Vec<String>,
    /// The sites, each once.
    pub sites: Vec<String>,
    /// The training run that asked for it, if one did.
    pub run: Option<String>,
    /// When it was asked for.
    pub created_at: String,
    /// When its last part ended.
    pub finished_at: Option<String>,
    /// What there is to know beside that: at a site, that these are only the parts that go there, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its transfers, those that stood already when it was asked for with them.
    pub parts: Vec<Transfer>,
}

/// Which delivery.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeliveryQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// How many.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct LimitQuery {
    /// At most this many, newest first (1,000 when absent).
    pub limit: Option<u32>,
}

/// One artifact, as `artifacts` and `show` list it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Artifact {
    /// `kind/name:version`.
    #[schema(value_type = String)]
    pub artifact: ArtifactRef,
    /// The BLAKE3 of its root manifest, hex.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Files.
    pub files: u64,
    /// The site whose bytes these are; absent when the hub holds them.
    #[schema(value_type = Option<String>)]
    pub origin: Option<SiteName>,
    /// When it was published.
    pub created_at: String,
    /// What its kind knows: the image's `sha256:` digest and platforms, the labels' dataset and counts.
    #[schema(value_type = Object)]
    pub info: serde_json::Value,
    /// Where it lies on this daemon's sinks (at a site), if it does.
    pub location: Option<String>,
    /// Whether the hub keeps its relayed bytes whatever their age.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// How it changed where it was published in place, at its origin or at this site: the first path and why. Absent: it is
    /// sound as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<String>,
    /// Whether it was published at this site: what lacks of it nobody else brings.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub published_here: bool,
}

/// Where a training run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its inputs are on their way.
    Delivering,
    /// They are there; the site has not begun yet.
    Waiting,
    /// The trainer works.
    Training,
    /// It ended well; what it made is being published.
    Publishing,
    /// The model is on its way home.
    Returning,
    /// The model is home.
    Done,
    /// It made no model.
    Failed,
    /// Given up by somebody.
    Cancelled,
}

impl RunState {
    /// The word in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Delivering => "delivering",
            RunState::Waiting => "waiting",
            RunState::Training => "training",
            RunState::Publishing => "publishing",
            RunState::Returning => "returning",
            RunState::Done => "done",
            RunState::Failed => "failed",
            RunState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens by itself, but for cleaning up.
    pub fn is_final(self) -> bool {
        matches!(self, RunState::Done | RunState::Failed | RunState::Cancelled)
    }
}

/// An artifact that a run trains with, or the model that it made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunInput {
    /// `kind/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
}

/// How a trainer did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunTrainer {
    /// How far the run is at its site: `waiting`, `training`, `trained`, `publishing`, `published`, `failed`.
    pub phase: String,
    /// How often it was started.
    pub starts: u32,
    /// When it was started last.
    pub started_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Its exit code.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What happened, in words.
    pub message: Option<String>,
    /// The end of what it said.
    pub tail: Option<String>,
}

/// A training run: `from` borrows `on`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// Its name.
    #[schema(value_type = String)]
    pub name: RunName,
    /// Who borrows, and gets the model.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// Who trains.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// Where it is.
    pub state: RunState,
    /// Why it stands, or why it ended badly.
    pub message: Option<String>,
    /// What to do next about it.
    pub next: Option<String>,
    /// What it trains with.
    pub inputs: Vec<RunInput>,
    /// The model that it is to make: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// The model that it made: reference and digest.
    pub model: Option<RunModel>,
    /// The delivery that brings the inputs.
    pub delivery: String,
    /// The transfer that brings the model home.
    pub home: Option<String>,
    /// The trainer, once its site has spoken of it.
    pub trainer: Option<RunTrainer>,
    /// Whether the site that trains has removed all that it borrowed.
    pub released: bool,
    /// When it was asked for.
    pub created_at: String,
    /// When it must have made its model.
    pub deadline_at: String,
    /// When it ended.
    pub finished_at: Option<String>,
}

/// A model that a run made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunModel {
    /// `model/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
}

/// Ask for a training run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name, unique: `[a-z0-9][a-z0-9._-]*`.
    pub name: String,
    /// The site that borrows, and gets the model.
    pub from: String,
    /// The site that trains.
    pub on: String,
    /// What it trains with: `kind/name:version`, one or more.
    pub inputs: Vec<String>,
    /// What it is to make: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// How long it may take to make it, seconds.
    pub ttl_seconds: u64,
}

/// What to do with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunVerb {
    /// The training platform has finished.
    Finish,
    /// Give it up.
    Cancel,
}

/// Ask to finish or cancel a run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunActionRequest {
    /// Which.
    pub name: String,
    /// What.
    pub action: RunVerb,
    /// `finish` only: why it failed, if it did.
    #[serde(default)]
    pub failed: Option<String>,
}

/// Which run.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RunQuery {
    /// Its name.
    pub name: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// What a model was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelLineage {
    /// The run that made it.
    #[schema(value_type = String)]
    pub run: RunName,
    /// For whom.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// Where.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// Of what: data, labels, code and image, by digest.
    pub inputs: Vec<RunInput>,
}

/// One artifact with where it went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ArtifactDetail {
    /// The artifact.
    #[serde(flatten)]
    pub artifact: Artifact,
    /// Its transfers.
    pub transfers: Vec<Transfer>,
    /// What it was made of, for a model that a training run made.
    #[serde(default)]
    pub lineage: Option<ModelLineage>,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Site {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SiteName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is connected now.
    pub online: bool,
    /// `quic` or `tcp`, while connected.
    pub line: Option<String>,
    /// Round trip, milliseconds, while connected.
    pub rtt_ms: Option<f64>,
    /// When it joined.
    pub joined_at: String,
    /// When it was last heard of.
    pub last_seen: Option<String>,
    /// The program version it runs.
    pub version: Option<String>,
    /// Transfers not yet ended.
    pub open_transfers: u64,
}

/// Ask to publish.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// An absolute path as the daemon sees it, or `registry://host/repo:tag`.
    pub source: String,
    /// `kind/name:version`.
    #[serde(rename = "as")]
    pub as_ref: String,
    /// Sites to deliver to at once.
    #[serde(default)]
    pub to: Option<String>,
    /// The training run that made it (at a site).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// How to read the source.
    #[serde(default)]
    pub options: SourceOptions,
}

/// How to read a source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// Labels: `coco`, `csv`, `jsonl`, `label_studio`, `voc`, `yolo`; guessed when absent.
    pub format: Option<String>,
    /// Labels: the dataset version that they belong to.
    #[serde(rename = "for")]
    pub for_dataset: Option<String>,
    /// Labels: accept samples that the dataset lacks.
    pub allow_missing: bool,
    /// Labels from CSV or JSON Lines: which column holds what (`sample_path=image,class=defect`).
    pub columns: BTreeMap<String, String>,
    /// Registry: a user name.
    pub username: Option<String>,
    /// Registry: a file that holds the password, as the daemon sees it.
    pub password_file: Option<String>,
}

/// Published.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Published {
    /// `kind/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
    /// Ids of the transfers that this began or that already stood.
    pub transfers: Vec<String>,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes that the store did not have yet, as stored.
    pub stored: u64,
    /// Whether the same content already stood under this reference.
    pub unchanged: bool,
    /// What there is to know beside that: at a site, that the hub has still to hear of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Ask to deliver.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeliverRequest {
    /// `kind/name:version`, one or more.
    pub artifacts: Vec<String>,
    /// Names, `all`, or a selector.
    pub to: String,
}

/// Delivered, or on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delivered {
    /// The references, as asked.
    pub artifact: String,
    /// The digest (of the first, where several were asked).
    pub digest: String,
    /// The delivery's id.
    pub delivery: String,
    /// Ids of its transfers.
    pub transfers: Vec<String>,
    /// The sites that the selection means too and that get nothing (told at the hub only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

/// A site that does not get an artifact, because `[share] allow` leaves it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// Whose list it is: `hub`, or `origin` for the site where the artifact was published.
    pub by: String,
    /// The same in words.
    pub why: String,
}

/// What a delivery would cost, for one artifact and site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanRow {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// Whether the site answered; if not the numbers assume that it has nothing.
    pub asked: bool,
    /// Bytes of the artifact.
    pub total: u64,
    /// Bytes that would cross the line.
    pub missing: u64,
    /// Bytes that would be written at the site: what crosses the line, and what lies there and cannot be shared.
    #[serde(default)]
    pub needs: u64,
    /// Room at the site, bytes.
    pub free: Option<u64>,
    /// Seconds at the line's present or last rate.
    pub seconds: Option<u64>,
    /// In the first row of an artifact: the sites that the selection means too and that would get nothing of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

/// Work that was accepted (202) and goes on: ask `GET /v1/jobs?id=…&wait=…`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `running`, `done` or `failed`.
    pub state: String,
    /// Bytes worked through so far.
    pub bytes: u64,
    /// Bytes in all, where known.
    pub total: Option<u64>,
    /// What it does now, in words.
    pub doing: String,
    /// The answer, once done.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// The error, once failed.
    #[schema(value_type = Option<Object>)]
    pub error: Option<Fault>,
}

/// Which transfers.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct TransferQuery {
    /// Only these (comma-separated ids of transfers or deliveries).
    pub id: Option<String>,
    /// Only what changed after this cursor.
    pub since: Option<u64>,
    /// Wait up to this many seconds for a change after `since`.
    pub wait: Option<u64>,
    /// At most this many (1,000 when absent), in the order of their cursors when `since` is given, else newest first.
    pub limit: Option<u32>,
}

/// What `pause`, `resume`, `cancel` and `retry` ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Hold it.
    Pause,
    /// Let it go on.
    Resume,
    /// Give it up and clean.
    Cancel,
    /// Begin a failed or cancelled one again, where it stood.
    Retry,
}

/// One event, as the stream and `--watch` carry it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Rises by one or more from event to event; the SSE `id`.
    pub seq: u64,
    /// When.
    pub at: String,
    /// `transfer`, `artifact` or `site`.
    pub what: String,
    /// The thing after the change (a [`Transfer`], [`Artifact`] or [`Site`]).
    #[schema(value_type = Object)]
    pub body: serde_json::Value,
}

/// A join token, made for one site or one publisher.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// The site it is for.
    #[serde(default)]
    pub site: Option<String>,
    /// The publisher it is for: whoever publishes at the hub from another machine, and may do nothing else.
    #[serde(default)]
    pub publisher: Option<String>,
    /// The labels that the site will have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it is good, seconds.
    pub ttl_seconds: u64,
}

/// A join token, to be given to `packhorse join` at the site, or to `packhorse publish --hub`. It works once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenReply {
    /// The token.
    pub token: String,
}

/// Ask for `pause`, `resume`, `cancel` or `retry`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActionRequest {
    /// A transfer, or a delivery: then all of its transfers.
    pub id: String,
    /// What to do.
    pub action: Action,
}

/// Ask to verify.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// `kind/name:version`.
    pub artifact: String,
    /// Whether to fetch again what is bad.
    #[serde(default)]
    pub repair: bool,
}

/// Ask to keep an artifact's relayed bytes whatever their age, or no longer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// `kind/name:version`.
    pub artifact: String,
    /// Whether they stay.
    pub pinned: bool,
}

/// Ask to export.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// `kind/name:version`, one or more.
    pub artifacts: Vec<String>,
    /// The absolute path of the file to write, as the daemon sees it.
    pub out: String,
}

/// Ask to import.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// The absolute path of an exported file, as the daemon sees it.
    pub file: String,
}

/// Which artifact.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ShowQuery {
    /// `kind/name:version`.
    #[serde(rename = "ref")]
    #[param(rename = "ref")]
    pub artifact: String,
}

/// Which job.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// Which events.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only those after this one; all that are kept when absent. `Last-Event-ID` goes before it.
    pub since: Option<u64>,
    /// JSON only: wait up to this many seconds for one.
    pub wait: Option<u64>,
    /// JSON only: at most this many (1,000 when absent).
    pub limit: Option<u32>,
    /// `json` for an array, `sse` for a stream; when absent the `Accept` header decides.
    pub format: Option<String>,
}
