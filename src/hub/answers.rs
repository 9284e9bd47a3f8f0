//! What the answers to sites and to publishers have in common.

use tokio::time::timeout;

use super::peer_budgets::PeerBudgets;
use crate::api::types::RunVerb;
use base::fault::Fault;
use base::limits::{ANSWER_BYTES_MAX, ANSWER_IDLE_MAX};
use base::peer::Peer;
use exchange::wire;
use model::paging;
use model::policy::Verb;
use model::protocol::AskHub;
use transport::SendHalf;

/// The verb of a question, before its object is known.
pub(super) fn verb_of(question: &AskHub) -> Verb {
    match question {
        AskHub::Publish { .. } => Verb::Offer,
        AskHub::Upload { .. } => Verb::Upload,
        AskHub::Renew { .. } => Verb::Renew,
        AskHub::Act { .. } => Verb::Act,
        AskHub::Deliver { .. } => Verb::Deliver,
        AskHub::Delivery(_) | AskHub::Transfers { .. } => Verb::Read,
        AskHub::ShowRun(_) | AskHub::ListRuns { .. } => Verb::Read,
        AskHub::StartRun(_) => Verb::Train,
        AskHub::ActOnRun(request) => verb_of_run(request.action),
        AskHub::LimitedRate => Verb::Control,
    }
}

/// The verb of an action on a training run.
pub(super) fn verb_of_run(action: RunVerb) -> Verb {
    match action {
        RunVerb::Finish => Verb::Finish,
        RunVerb::Cancel => Verb::Cancel,
    }
}

/// Sends the answer to a question. The unsent part of the answer counts against the peer's
/// budget.
pub(super) async fn send(
    budgets: &PeerBudgets,
    send: &mut SendHalf,
    peer: &Peer,
    answer: Result<serde_json::Value, Fault>,
) -> Result<(), Fault> {
    let answer = answer.and_then(fits);
    let text = serde_json::to_vec(&answer)
        .map_err(|e| Fault::internal(format!("an answer as JSON: {e}")))?;
    drop(answer);
    let _share = budgets
        .questions()
        .take(peer, text.len() as u64, wire::PRIORITY_QUESTION)
        .await?;
    send.set_priority(wire::PRIORITY_QUESTION);
    let sent = timeout(ANSWER_IDLE_MAX, wire::send_bytes(send, &text)).await;
    sent.map_err(|_| {
        Fault::unreachable(format!("{peer} does not read the answer to its question"))
    })??;
    send.finish()
}

/// Replaces an answer that its receiver would refuse as too large with a fault.
pub(super) fn fits(answer: serde_json::Value) -> Result<serde_json::Value, Fault> {
    let bytes = paging::json_bytes(&answer);
    if bytes <= ANSWER_BYTES_MAX {
        return Ok(answer);
    }
    Err(Fault::usage(format!(
        "the request was executed, but its answer has {bytes} bytes; at most {ANSWER_BYTES_MAX} are allowed"
    ))
    .with_next("see 'packhorse status'; name fewer artifacts and sites at once"))
}

pub(super) fn as_json<T: serde::Serialize>(value: T) -> Result<serde_json::Value, Fault> {
    serde_json::to_value(value).map_err(|e| Fault::internal(format!("an answer as JSON: {e}")))
}
