//! Which transfers a site has to report to the hub: those whose row changed, and those whose report
//! the hub has not acknowledged.
//!
//! It holds ids; `control` reads a row just before it sends it, so many changes of one transfer are
//! one report, and an older state never follows a newer one. It begins empty with each connection:
//! the hub's complete list then asks for what the hub does not know.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use base::limits::{
    REPORTS_ACK_MAX, REPORTS_AGAIN_MAX, REPORTS_EVERY, REPORTS_OF_ENDS_EVERY, REPORTS_PROBE_MAX,
    REPORTS_UNACKED_MAX, STATE_RETRY_EVERY,
};
use base::names::TransferId;

/// The transfers to report over one connection.
#[derive(Debug, Default)]
pub(super) struct Reporter {
    /// Whether the hub acknowledges batches; `None`: it has not sent anything.
    acknowledges: Option<bool>,
    number: u64,
    due: BTreeSet<TransferId>,
    /// Whether a transfer that is due has ended.
    has_ends: bool,
    /// The last batch with a report of a transfer, and when it was sent.
    unacknowledged: HashMap<TransferId, (u64, Instant)>,
    /// Reports that the hub could not store, and when they are sent again.
    again: HashMap<TransferId, Instant>,
    pause: Option<Duration>,
    /// The hub stored none of the last batch.
    is_failing: bool,
    sent: Option<Instant>,
}

impl Reporter {
    /// The hub has sent its first message: reports may be sent.
    pub(super) fn begin(&mut self, acknowledges: bool) {
        self.acknowledges.get_or_insert(acknowledges);
    }

    /// Whether the hub acknowledges batches.
    pub(super) fn acknowledges(&self) -> bool {
        self.acknowledges == Some(true)
    }

    /// A transfer has to be reported.
    pub(super) fn note(&mut self, id: TransferId, is_end: bool) {
        self.has_ends |= is_end;
        self.again.remove(&id);
        self.due.insert(id);
    }

    /// The hub processed the batches up to this number, and could not store some reports of them.
    pub(super) fn processed(&mut self, number: u64, unstored: &[TransferId], now: Instant) {
        let before = self.unacknowledged.len();
        let pause = self.pause.unwrap_or(STATE_RETRY_EVERY);
        let mut failed = 0;
        for id in unstored {
            // Otherwise a newer report of the transfer is on its way. The hub names a transfer twice
            // if it could not store the reports of two batches.
            let is_latest = self
                .unacknowledged
                .get(id)
                .is_some_and(|(of, _)| *of <= number);
            if is_latest {
                self.unacknowledged.remove(id);
                failed += 1;
                if !self.due.contains(id) {
                    self.again.insert(id.clone(), now + pause);
                }
            }
        }
        self.unacknowledged.retain(|_, (of, _)| *of > number);
        let stored = before - self.unacknowledged.len() - failed;
        if failed > 0 {
            self.pause = Some((pause * 2).min(REPORTS_AGAIN_MAX));
        }
        if stored > 0 {
            (self.pause, self.is_failing) = (None, false);
        } else if failed > 0 {
            self.is_failing = true;
        }
    }

    /// When the next reports are to be sent; `None`: when something changes.
    pub(super) fn next_at(&self, now: Instant) -> Option<Instant> {
        let acknowledges = self.acknowledges?;
        let again = self.again.values().copied().min();
        let lost = self.unacknowledged.values();
        let lost = lost.map(|(_, sent)| *sent + REPORTS_ACK_MAX).min();
        let has_room = !acknowledges || self.unacknowledged.len() < REPORTS_UNACKED_MAX;
        let due = (!self.due.is_empty() && has_room).then(|| self.paced(now));
        let later = [again.filter(|_| has_room), lost].into_iter().flatten();
        later
            .map(|at| self.sent.map_or(at, |sent| at.max(sent + REPORTS_EVERY)))
            .chain(due)
            .min()
    }

    fn paced(&self, now: Instant) -> Instant {
        let pause = match self.has_ends {
            true => REPORTS_OF_ENDS_EVERY,
            false => REPORTS_EVERY,
        };
        self.sent.map_or(now, |sent| sent + pause)
    }

    /// The transfers to report now, in a batch that [`Self::sent`] numbers.
    pub(super) fn next(&mut self, now: Instant) -> Vec<TransferId> {
        if self.next_at(now).is_none_or(|at| at > now) {
            return Vec::new();
        }
        let due = &mut self.due;
        self.again.retain(|id, at| {
            let waits = *at > now;
            if !waits {
                due.insert(id.clone());
            }
            waits
        });
        self.unacknowledged.retain(|id, (_, sent)| {
            let waits = *sent + REPORTS_ACK_MAX > now;
            if !waits {
                due.insert(id.clone());
            }
            waits
        });
        let room = match (self.acknowledges(), self.is_failing) {
            (false, _) => usize::MAX,
            (true, true) => REPORTS_PROBE_MAX,
            (true, false) => REPORTS_UNACKED_MAX,
        };
        let room = match self.acknowledges() {
            true => room.saturating_sub(self.unacknowledged.len()),
            false => room,
        };
        let ids: Vec<TransferId> = self.due.iter().take(room).cloned().collect();
        for id in &ids {
            self.due.remove(id);
        }
        self.has_ends &= !self.due.is_empty();
        self.sent = Some(now);
        ids
    }

    /// These did not fit in the batch: they are sent with the next one.
    pub(super) fn put_back(&mut self, ids: impl IntoIterator<Item = TransferId>) {
        let before = self.due.len();
        self.due.extend(ids);
        self.has_ends |= self.due.len() > before;
    }

    /// A batch with these transfers is sent. Returns its number.
    pub(super) fn sent(&mut self, ids: impl IntoIterator<Item = TransferId>, now: Instant) -> u64 {
        self.number += 1;
        if self.acknowledges() {
            let number = self.number;
            self.unacknowledged
                .extend(ids.into_iter().map(|id| (id, (number, now))));
        }
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> TransferId {
        format!("t-{n:05}").parse().unwrap()
    }

    fn begun() -> Reporter {
        let mut reporter = Reporter::default();
        reporter.begin(true);
        reporter
    }

    fn send(reporter: &mut Reporter) -> (u64, Vec<TransferId>) {
        let ids = reporter.next(Instant::now());
        let number = reporter.sent(ids.clone(), Instant::now());
        (number, ids)
    }

    #[tokio::test(start_paused = true)]
    async fn changes_that_follow_each_other_are_one_report() {
        let mut reporter = Reporter::default();
        reporter.note(id(1), false);
        assert_eq!(
            reporter.next_at(Instant::now()),
            None,
            "before the first message of the hub"
        );
        reporter.begin(true);
        assert_eq!(send(&mut reporter).1, [id(1)]);
        for _ in 0..5 {
            reporter.note(id(1), false);
        }
        assert!(reporter.next(Instant::now()).is_empty());
        assert_eq!(
            reporter.next_at(Instant::now()),
            Some(Instant::now() + REPORTS_EVERY)
        );
        reporter.note(id(2), true);
        let soon = Instant::now() + REPORTS_OF_ENDS_EVERY;
        assert_eq!(
            reporter.next_at(Instant::now()),
            Some(soon),
            "an end is reported sooner"
        );
        tokio::time::advance(REPORTS_OF_ENDS_EVERY).await;
        assert_eq!(send(&mut reporter).1, [id(1), id(2)]);
    }

    #[test]
    fn the_first_report_is_sent_at_once() {
        let mut reporter = begun();
        reporter.note(id(1), false);
        assert_eq!(reporter.next(Instant::now()), [id(1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_was_not_stored_is_sent_until_it_is() {
        let mut reporter = begun();
        reporter.note(id(1), true);
        let (mut number, _) = send(&mut reporter);
        let mut pauses = Vec::new();
        for _ in 0..4 {
            reporter.processed(number, &[id(1)], Instant::now());
            let at = reporter.next_at(Instant::now()).unwrap();
            pauses.push(at - Instant::now());
            assert!(reporter.next(Instant::now()).is_empty());
            tokio::time::advance(at - Instant::now()).await;
            let (next, ids) = send(&mut reporter);
            assert_eq!(ids, [id(1)]);
            number = next;
        }
        assert_eq!(pauses[0], STATE_RETRY_EVERY);
        assert_eq!(pauses[3], REPORTS_AGAIN_MAX);
        reporter.processed(number, &[], Instant::now());
        assert_eq!(reporter.next_at(Instant::now()), None, "it is stored");
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_report_replaces_one_that_was_not_stored() {
        let mut reporter = begun();
        reporter.note(id(1), false);
        let (first, _) = send(&mut reporter);
        tokio::time::advance(REPORTS_EVERY).await;
        reporter.note(id(1), true);
        let (second, ids) = send(&mut reporter);
        assert_eq!(ids, [id(1)]);
        reporter.processed(first, &[id(1)], Instant::now());
        let lost = Instant::now() + REPORTS_ACK_MAX;
        assert_eq!(
            reporter.next_at(Instant::now()),
            Some(lost),
            "the newer one is on its way"
        );
        reporter.processed(second, &[], Instant::now());
        assert_eq!(reporter.next_at(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn two_reports_of_one_transfer_may_fail_together() {
        let mut reporter = begun();
        reporter.note(id(1), false);
        send(&mut reporter);
        tokio::time::advance(REPORTS_EVERY).await;
        reporter.note(id(1), true);
        let (second, _) = send(&mut reporter);
        reporter.processed(second, &[id(1), id(1)], Instant::now());
        let at = reporter.next_at(Instant::now()).unwrap();
        assert_eq!(at - Instant::now(), STATE_RETRY_EVERY);
        tokio::time::advance(STATE_RETRY_EVERY).await;
        let (third, ids) = send(&mut reporter);
        assert_eq!(ids, [id(1)]);
        // None was stored, so the pause grows.
        reporter.processed(third, &[id(1)], Instant::now());
        let at = reporter.next_at(Instant::now()).unwrap();
        assert_eq!(at - Instant::now(), 2 * STATE_RETRY_EVERY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_without_an_answer_is_sent_again() {
        let mut reporter = begun();
        reporter.note(id(1), true);
        send(&mut reporter);
        tokio::time::advance(REPORTS_ACK_MAX).await;
        assert_eq!(send(&mut reporter).1, [id(1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_reports_without_an_answer_are_bounded_and_a_failing_hub_gets_few() {
        let mut reporter = begun();
        for n in 0..2 * REPORTS_UNACKED_MAX {
            reporter.note(id(n), false);
        }
        let (number, ids) = send(&mut reporter);
        assert_eq!(ids.len(), REPORTS_UNACKED_MAX);
        tokio::time::advance(REPORTS_EVERY).await;
        assert!(reporter.next(Instant::now()).is_empty());
        reporter.processed(number, &ids, Instant::now());
        let (number, ids) = send(&mut reporter);
        assert_eq!(ids.len(), REPORTS_PROBE_MAX);
        reporter.processed(number, &ids[1..], Instant::now());
        tokio::time::advance(REPORTS_EVERY).await;
        assert!(
            send(&mut reporter).1.len() > REPORTS_PROBE_MAX,
            "one was stored"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_hub_gets_all_reports_and_acknowledges_none() {
        let mut reporter = Reporter::default();
        reporter.begin(false);
        for n in 0..2 * REPORTS_UNACKED_MAX {
            reporter.note(id(n), false);
        }
        assert_eq!(send(&mut reporter).1.len(), 2 * REPORTS_UNACKED_MAX);
        assert_eq!(reporter.next_at(Instant::now()), None);
    }
}
