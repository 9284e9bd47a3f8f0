//! The resources of the hub that one peer may use at once: memory for content, questions and
//! messages, blocking work, and how fast it reports and asks for changes.
//!
//! Code that serves a peer takes its share here first, and releases it by dropping it. In memory.

use tokio::sync::OwnedSemaphorePermit;

use base::budget::{Budget, Seat, Share, WorkPlaces};
use base::fault::Fault;
use base::limits::{
    CHANGES_AT_ONCE_MAX, CHANGES_PER_SECOND_MAX, CONTROL_FRAME_BYTES_MAX, MANIFEST_CHECKS_MAX,
    OFFERS_AT_ONCE_MAX, PEER_WORK_MAX, QUESTIONS_BYTES_MAX, REPORTS_AT_ONCE_MAX,
    REPORTS_PER_SECOND_MAX,
};
use base::peer::Peer;
use base::rate_limiter::RateLimiter;

/// What one site may have of the budget for content, bytes: enough answers to keep a fast line
/// full.
const SITE_SHARE_MAX: u64 = 12 << 20;

/// The limits of what is read for one answer before it is sent, bytes.
const ANSWER_BYTES: (u64, u64) = (64 << 10, 1 << 20);

/// The parts of all peers.
pub(super) struct PeerBudgets {
    /// Bytes that are read for peers and not yet sent.
    content: Budget,
    /// Bytes of questions that are being answered.
    questions: Budget,
    /// Bytes of control messages.
    messages: Budget,
    work: WorkPlaces,
    /// Manifests that are accepted.
    offers: WorkPlaces,
    /// Manifests that are checked.
    checks: WorkPlaces,
    reports: RateLimiter<Peer>,
    changes: RateLimiter<Peer>,
}

impl PeerBudgets {
    /// Budgets out of this much memory. Three eighths of it are for content and an eighth is for
    /// messages: what the connections hold to send is the other half.
    pub(super) fn new(memory: u64) -> Self {
        Self {
            content: Budget::new(memory / 8 * 3, SITE_SHARE_MAX),
            questions: Budget::new(memory / 16, QUESTIONS_BYTES_MAX),
            messages: Budget::new(memory / 16, CONTROL_FRAME_BYTES_MAX as u64),
            work: WorkPlaces::new(PEER_WORK_MAX),
            offers: WorkPlaces::new(OFFERS_AT_ONCE_MAX),
            checks: WorkPlaces::new(MANIFEST_CHECKS_MAX),
            reports: RateLimiter::new(REPORTS_PER_SECOND_MAX, REPORTS_AT_ONCE_MAX),
            changes: RateLimiter::new(CHANGES_PER_SECOND_MAX, CHANGES_AT_ONCE_MAX),
        }
    }

    /// What a connected peer keeps of each budget.
    pub(super) fn seats(&self) -> [Seat; 3] {
        [
            self.content.seat(),
            self.questions.seat(),
            self.messages.seat(),
        ]
    }

    /// Waits for memory for content.
    pub(super) async fn content(
        &self,
        peer: &Peer,
        bytes: u64,
        priority: i32,
    ) -> Result<Share, Fault> {
        self.content.take(peer, bytes, priority).await
    }

    /// What is read for one answer before it is sent: half of the part of a peer. A buffer that a peer
    /// has acknowledged in part is held completely, and no budget counts its first part. A fourth took
    /// more memory: more threads read at once, and each has its own part of the allocator.
    pub(super) fn answer_bytes(&self) -> u64 {
        (self.content.part() / 2).clamp(ANSWER_BYTES.0, ANSWER_BYTES.1)
    }

    /// The budget that questions and answers are taken out of.
    pub(super) fn questions(&self) -> &Budget {
        &self.questions
    }

    /// The budget that control messages are taken out of.
    pub(super) fn messages(&self) -> &Budget {
        &self.messages
    }

    /// Waits for a place for blocking work.
    pub(super) async fn work_place(&self, peer: &Peer) -> Option<OwnedSemaphorePermit> {
        self.work.take(peer).await
    }

    /// Waits until the manifest of one more artifact of this peer may be held.
    pub(super) async fn offer(&self, peer: &Peer) -> Option<OwnedSemaphorePermit> {
        self.offers.take(peer).await
    }

    /// Waits until one more manifest of this peer may be checked: for the memory of a check, and for
    /// a place for blocking work.
    pub(super) async fn check(&self, peer: &Peer) -> [Option<OwnedSemaphorePermit>; 2] {
        let check = self.checks.take(peer).await;
        [check, self.work_place(peer).await]
    }

    /// Waits until the peer may report so much.
    pub(super) async fn reports(&self, peer: &Peer, count: usize) {
        self.reports.go(peer, count).await;
    }

    /// Waits until the peer may ask for one change.
    pub(super) async fn change(&self, peer: &Peer) {
        self.changes.go(peer, 1).await;
    }
}
