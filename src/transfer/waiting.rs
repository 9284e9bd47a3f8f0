//! What a transfer shows while a sink keeps it waiting.
//!
//! A sink reports through `Waits` what a running call waits for; `attempt` makes its calls through here, and the row shows the
//! report within a moment. What a failed try waited for stays in the row until the next one gets further: somebody who looks between
//! two tries, or in the middle of one, sees the same reason.

use std::future::Future;

use super::Runner;
use crate::catalogue::TransferRow;
use crate::fault::{Fault, Reason};
use crate::limits::SINK_REPORT_AFTER;
use crate::sink::Incoming;

/// How a call on a sink goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// It answers soon; one that does not waits for the sink.
    Moments,
    /// It works for as long as that takes, and reports what it waits for.
    ItsTime,
}

/// Whether a reason stays in a row that is tried again, until the try gets further.
pub(super) fn stays(reason: Option<Reason>) -> bool {
    matches!(reason, Some(Reason::WaitingForSource | Reason::SinkUnavailable | Reason::SinkDenied | Reason::NoSpace))
}

impl Runner {
    /// Makes a call on a sink, and writes down meanwhile what it waits for.
    pub(super) async fn reporting<T>(
        &self,
        row: &mut TransferRow,
        incoming: &Incoming,
        takes: Takes,
        call: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let mut reports = incoming.waits.subscribe();
        let late = tokio::time::sleep(SINK_REPORT_AFTER);
        tokio::pin!(call, late);
        let mut silent = true;
        loop {
            tokio::select! {
                biased;
                done = &mut call => return done,
                Ok(()) = reports.changed() => {
                    silent = false;
                    let report = reports.borrow_and_update().clone();
                    self.show_wait(row, report.as_ref()).await;
                }
                () = &mut late, if silent => {
                    silent = false;
                    let what = incoming.artifact.kind;
                    let report = (takes == Takes::Moments).then(|| {
                        Fault::unreachable(format!("the sink of this {what} has not answered for {} s", SINK_REPORT_AFTER.as_secs()))
                            .with_next("see 'packhorse doctor' at the site; the transfer continues on its own when it answers")
                    });
                    // One that works for this long without a report is past what an earlier try waited for.
                    if report.is_some() || row.body.reason.is_some() {
                        self.show_wait(row, report.as_ref()).await;
                    }
                }
            }
        }
    }

    /// Writes down what the transfer waits for now, if that is new.
    pub(super) async fn show_wait(&self, row: &mut TransferRow, report: Option<&Fault>) {
        let (reason, message) = (report.map(|fault| fault.reason), report.map(|fault| &fault.message));
        if row.body.reason != reason || row.body.message.as_ref() != message {
            row.body.set_fault(report);
            self.save(row).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_the_sink_stays_between_two_tries() {
        assert!(stays(Some(Reason::SinkUnavailable)) && stays(Some(Reason::WaitingForSource)));
        assert!(!stays(Some(Reason::HubUnreachable)) && !stays(Some(Reason::WaitingForTurn)) && !stays(None));
    }
}
