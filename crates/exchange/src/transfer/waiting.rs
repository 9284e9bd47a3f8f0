//! What a transfer shows while it waits for a sink.
//!
//! A sink reports through `Waits` what a running call waits for. `attempt` makes its calls through
//! this module, and the row shows the report within a moment. The reason of a failed attempt stays
//! in the row until the next attempt makes progress: a user sees the same reason between two
//! attempts and during one.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::Runner;
use base::fault::{Fault, Reason};
use base::limits::SINK_REPORT_AFTER;
use base::names::Kind;
use base::text::Message;
use sink::{Sink, Waits};
use state::{Body, TransferRow};

/// How often a sink is asked what delays a call.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The expected duration of a call to a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// Short: a call that does not return waits for the sink.
    Moments,
    /// Any duration: the call reports what it waits for.
    ItsTime,
    /// The same, and the row keeps its reason.
    AnyTime,
}

/// Whether a reason stays in a row until an attempt makes progress.
pub(super) fn stays(reason: Option<Reason>) -> bool {
    use Reason as R;
    matches!(
        reason,
        Some(R::WaitingForSource | R::SinkUnavailable | R::SinkDenied | R::NoSpace | R::Internal)
    )
}

impl Runner {
    /// Makes a call to a sink, and stores what it waits for: the report of the call, or the sink's
    /// own explanation of the delay.
    pub(super) async fn watched<T>(
        &self,
        row: &mut TransferRow,
        sink: &dyn Sink,
        waits: &Waits,
        takes: Takes,
        call: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let (began, before) = (Instant::now(), row.body.clone());
        let mut reports = waits.subscribe();
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        tokio::pin!(call);
        let (mut has_reported, mut shown) = (false, None);
        loop {
            tokio::select! {
                biased;
                done = &mut call => {
                    // After a failure the caller stores its reason; between the two there must be no
                    // moment without one.
                    if shown.is_some() && done.is_ok() {
                        self.show_again(row, &before).await;
                    }
                    return done;
                }
                Ok(()) = reports.changed() => has_reported = true,
                _ = ticks.tick() => {}
            }
            let report = reports
                .borrow_and_update()
                .clone()
                .or_else(|| sink.wait_reason());
            let is_late = began.elapsed() >= SINK_REPORT_AFTER;
            let silent = is_late && takes == Takes::Moments && !has_reported;
            let report = report.or_else(|| silent.then(|| silent_fault(row.artifact.kind)));
            match &report {
                Some(_) => self.show_wait(row, report.as_ref()).await,
                // A call that runs this long without a report is past what an earlier attempt
                // waited for.
                None if takes == Takes::ItsTime && (has_reported || is_late) => {
                    self.show_wait(row, None).await;
                }
                None if shown.is_some() => self.show_again(row, &before).await,
                None => {}
            }
            shown = report;
        }
    }

    /// Stores the reason that the transfer had before a call.
    async fn show_again(&self, row: &mut TransferRow, before: &Body) {
        (row.body.reason, row.body.message, row.body.next) =
            (before.reason, before.message.clone(), before.next.clone());
        self.save(row).await;
    }

    /// Stores what the transfer waits for, if that is new.
    async fn show_wait(&self, row: &mut TransferRow, report: Option<&Fault>) {
        let (reason, message) = (
            report.map(|fault| fault.reason),
            report.map(|fault| Message::from(fault.message.as_str())),
        );
        if row.body.reason != reason || row.body.message != message {
            row.body.set_fault(report);
            self.save(row).await;
        }
    }
}

/// The fault of a sink that should have answered by now.
fn silent_fault(what: Kind) -> Fault {
    Fault::unreachable(format!(
        "the sink of this {what} has not answered for {} s",
        SINK_REPORT_AFTER.as_secs()
    ))
    .with_next(
        "see 'packhorse doctor' at the site; the transfer continues on its own when it answers",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_the_sink_stays_between_two_tries() {
        assert!(stays(Some(Reason::SinkUnavailable)) && stays(Some(Reason::WaitingForSource)));
        assert!(
            !stays(Some(Reason::HubUnreachable))
                && !stays(Some(Reason::WaitingForTurn))
                && !stays(None)
        );
    }
}
