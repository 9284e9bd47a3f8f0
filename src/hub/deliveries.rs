//! Deliveries: starts transfers, applies actions to them, and decides which of them an actor sees.
//!
//! The API, sessions, uploads and runs call it. Each change is written to the catalogue before it
//! has an effect; nothing else is stored.

mod plan;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::RwLock;

use super::entitlement::Entitlement;
use super::links::Links;
use crate::api::View;
use crate::api::types::{Action, Delivered, Delivery, State, Transfer, TransferQuery};
use crate::delivery::Whole;
use base::fault::{Fault, Reason};
use base::limits::{ANSWER_BYTES_MAX, DELIVERY_ARTIFACTS_MAX, DELIVERY_PARTS_MAX};
use base::names::{ArtifactRef, DeliveryId, SiteName, SiteSelector, TransferId};
use base::text::Message;
use model::actor::Actor;
use model::paging::Room;
use model::policy::{self, Object, Verb};
use model::protocol::{AskSite, Presence, PresenceState};
use state::{Body, Catalogue, DeliveryRow, Part, TransferRow, new_delivery_id};

/// How long a site may take to answer whether it still has an artifact.
const HOLDS_MAX: Duration = Duration::from_secs(5);
/// Sites that are asked this at once.
const HOLDS_AT_ONCE: usize = 32;
/// The bytes of an answer in addition to its list.
const ANSWER_FRAME_BYTES: usize = 1 << 10;

pub(super) fn no_artifact_named() -> Fault {
    Fault::usage("no artifact is named")
}

/// Refuses a request that is too large for one delivery or for one plan.
fn check_size(artifacts: &[ArtifactRef], sites: usize, parts_max: usize) -> Result<(), Fault> {
    let next = "name fewer artifacts or fewer sites at once";
    if artifacts.len() > DELIVERY_ARTIFACTS_MAX {
        return Err(Fault::usage(format!(
            "{} artifacts are named, and {DELIVERY_ARTIFACTS_MAX} are allowed at once",
            artifacts.len()
        ))
        .with_next(next));
    }
    let parts = artifacts.len().saturating_mul(sites);
    if parts > parts_max {
        let message = format!(
            "{} artifacts to {sites} sites are {parts} transfers, and {parts_max} are allowed at once",
            artifacts.len()
        );
        return Err(Fault::usage(message).with_next(next));
    }
    Ok(())
}

/// The deliveries of the hub. Cheap to clone.
#[derive(Clone)]
pub(super) struct Deliveries {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    links: Links,
    entitlement: Entitlement,
    /// The revoked sites, for the views of their transfers.
    revoked: RwLock<HashSet<SiteName>>,
}

impl Deliveries {
    /// The deliveries of this catalogue.
    pub(super) fn new(catalogue: Catalogue, links: Links, entitlement: Entitlement) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                links,
                entitlement,
                revoked: RwLock::default(),
            }),
        }
    }

    /// Reads which sites are revoked: at the start, and after a change.
    pub(super) async fn read_revoked(&self) -> Result<(), Fault> {
        let sites = self.inner.catalogue.sites().await?;
        let revoked = sites
            .into_iter()
            .filter(|site| site.member.revoked.is_some());
        *self.inner.revoked.write() = revoked.map(|site| site.name).collect();
        Ok(())
    }

    /// A transfer as the API shows it. If its site is offline, that is the reason of an open
    /// transfer.
    pub(super) fn view(&self, row: &TransferRow) -> Transfer {
        let mut view = row.view();
        if !row.state.is_final()
            && row.state != State::Paused
            && !self.inner.links.is_online(&row.site)
        {
            view.reason = Some(Reason::SiteOffline);
            let (message, next) = match self.inner.revoked.read().contains(&row.site) {
                true => (
                    format!("site {} is revoked", row.site),
                    format!("let it in again with 'packhorse site restore {}', or cancel the transfer", row.site),
                ),
                false => (
                    format!("site {} is not connected", row.site),
                    "no action is needed: the transfer resumes when the site reconnects; see 'packhorse sites'".into(),
                ),
            };
            (view.message, view.next) = (Some(message), Some(next));
            (view.rate, view.eta_seconds) = (0, None);
        }
        view
    }

    /// A delivery as the API shows it, and as a site receives it, with as many of its parts as fit
    /// in `max` bytes.
    pub(super) async fn whole(&self, row: &DeliveryRow, max: usize) -> Result<Delivery, Fault> {
        let mut whole = Whole::new(max);
        self.inner
            .catalogue
            .each_part(&row.id, |part| whole.add(self.view(&part)))
            .await?;
        Ok(whole.end(row))
    }

    /// Starts a delivery. `supplied`: the actor offers or uploads the artifacts in this request.
    pub(super) async fn deliver(
        &self,
        actor: &Actor,
        artifacts: &[ArtifactRef],
        selector: &SiteSelector,
        supplied: bool,
    ) -> Result<Delivered, Fault> {
        if artifacts.is_empty() {
            return Err(no_artifact_named());
        }
        let sites = self.inner.catalogue.select_sites(selector).await?;
        check_size(artifacts, sites.len(), DELIVERY_PARTS_MAX)?;
        let (mut parts, mut left_out) = (Vec::new(), Vec::new());
        for artifact in artifacts {
            let entitlement = &self.inner.entitlement;
            let row = entitlement
                .artifact_for(actor, Verb::Deliver, artifact, supplied)
                .await?;
            let targets = entitlement
                .targets(actor, artifact, row.origin.as_ref(), &sites, selector)
                .await?;
            parts.push(Part::new(&row, &targets.sites));
            left_out.extend(targets.left_out);
        }
        let delivery = new_delivery_id();
        let (transfers, notes) = self.begin_and_compare(&delivery, None, &parts).await?;
        let digest = parts
            .first()
            .map(|part| part.digest.hex())
            .unwrap_or_default();
        let artifact = artifacts
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let transfers = transfers.into_iter().map(Into::into).collect();
        Ok(Delivered {
            artifact,
            digest,
            delivery: delivery.into(),
            transfers,
            left_out,
            notes,
        })
    }

    /// Starts a delivery, and repeats the transfers whose content the sites have lost since they
    /// were done, or cannot check now.
    pub(super) async fn begin(
        &self,
        id: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
    ) -> Result<Vec<TransferId>, Fault> {
        Ok(self.begin_and_compare(id, run, parts).await?.0)
    }

    /// The same, and returns the state at the sites that had received something of it before.
    async fn begin_and_compare(
        &self,
        id: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
    ) -> Result<(Vec<TransferId>, Vec<String>), Fault> {
        let (mut lost, mut notes) = (Vec::new(), Vec::new());
        let done = self.inner.catalogue.done_already(parts).await?;
        let mut asked = futures::stream::iter(done)
            .map(|row| async move {
                let presence = self.presence(&row).await;
                (row, presence)
            })
            .buffered(HOLDS_AT_ONCE);
        while let Some((row, presence)) = asked.next().await {
            let found = found(&row, &presence);
            notes.extend(found.note);
            if found.again {
                lost.push(row.id);
            } else if row.body.message != found.message {
                let body = Body {
                    message: found.message,
                    ..row.body
                };
                self.inner
                    .catalogue
                    .update_transfer(&row.id, row.generation, row.state, &body)
                    .await?;
            }
        }
        Ok((
            self.inner.catalogue.deliver(id, run, parts, &lost).await?,
            notes,
        ))
    }

    /// The state of a delivered artifact at a site, as the site reports it. `None`: the site is
    /// offline or slow.
    async fn presence(&self, row: &TransferRow) -> Option<Presence> {
        let (artifact, digest) = (row.artifact.clone(), row.digest);
        let question = AskSite::CheckPresence {
            artifact: artifact.clone(),
            digest,
        };
        match tokio::time::timeout(
            HOLDS_MAX,
            self.inner.links.ask::<Presence>(&row.site, &question),
        )
        .await
        {
            Ok(Ok(presence)) => return Some(presence),
            Ok(Err(_)) => {}
            Err(_) => return None,
        }
        // A site of the previous version reports only whether it has the artifact.
        let question = AskSite::Holds { artifact, digest };
        let answer = tokio::time::timeout(
            HOLDS_MAX,
            self.inner.links.ask::<bool>(&row.site, &question),
        )
        .await
        .ok()?
        .ok()?;
        let state = if answer {
            PresenceState::Intact
        } else {
            PresenceState::Missing
        };
        Some(Presence {
            state,
            detail: None,
            active: None,
        })
    }

    /// Performs an action on a transfer, or on all transfers of a delivery. An actor that may not
    /// act on all of them gets the answer for a transfer that does not exist.
    pub(super) async fn act_on(
        &self,
        actor: &Actor,
        id: &str,
        action: Action,
    ) -> Result<(), Fault> {
        // For several transfers, a retry repeats the failed ones; if none failed, each is verified
        // again.
        let (mut ids, mut failed, mut may_act) = (Vec::new(), false, true);
        let query = TransferQuery {
            id: Some(id.to_owned()),
            ..TransferQuery::default()
        };
        let see = |row: TransferRow| {
            failed |= matches!(row.state, State::Failed | State::Cancelled);
            may_act &= policy::may(actor, Verb::Act, &Object::Transfer { to: &row.site }).is_ok();
            ids.push(row.id);
            may_act
        };
        self.inner
            .catalogue
            .scan_transfers(&query, None, i64::MAX, see)
            .await?;
        if !may_act {
            return Err(no_transfers(id));
        }
        let single = ids.len() == 1;
        let (mut acted, mut refused) = (false, None);
        for one in ids {
            let row = self.inner.catalogue.transfer(&one).await?;
            let fits = row.takes(action, failed);
            if !fits && single {
                let state = if row.removed_ms.is_some() {
                    "removed"
                } else {
                    row.state.as_str()
                };
                return Err(nothing_to(action, &format!("transfer {id} is {state}")));
            }
            let refusal = if fits && action == Action::Retry {
                let artifact = self.inner.catalogue.artifact(&row.artifact).await?;
                self.inner
                    .entitlement
                    .no_longer_shared(actor, &row, &artifact)
                    .await?
            } else {
                None
            };
            match (fits, refusal) {
                (true, None) => {
                    acted = true;
                    self.inner.catalogue.act(&row.id, action).await?;
                }
                (_, refusal) => refused = refused.or(refusal),
            }
        }
        // For several transfers, the permitted ones continue.
        match refused {
            _ if acted => Ok(()),
            Some(refusal) => Err(refusal),
            None => Err(nothing_to(
                action,
                &format!("the action does not apply to any transfer of {id}"),
            )),
        }
    }

    /// Whether an actor may read the state of each of these transfers.
    pub(super) async fn may_read_all(
        &self,
        actor: &Actor,
        query: &TransferQuery,
    ) -> Result<bool, Fault> {
        let mut of_others: HashMap<(ArtifactRef, SiteName), TransferRow> = HashMap::new();
        let see = |row: TransferRow| {
            // Most transfers are the actor's own. The others need more facts.
            let own = Object::Progress {
                to: &row.site,
                origin: None,
                delivered: false,
            };
            if policy::may(actor, Verb::Read, &own).is_err() {
                of_others.insert((row.artifact.clone(), row.site.clone()), row);
            }
            true
        };
        let catalogue = &self.inner.catalogue;
        catalogue.scan_transfers(query, None, i64::MAX, see).await?;
        for row in of_others.values() {
            if !self.inner.entitlement.may_read_progress(actor, row).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// As many of the transfers of ids as one answer can have, and the next cursor. If some are
    /// left, the transfers that changed first are returned, and the rest follows after the cursor.
    pub(super) async fn answer_page(
        &self,
        id: &str,
        since: Option<u64>,
    ) -> Result<(Vec<Transfer>, u64), Fault> {
        let query = TransferQuery {
            since: Some(since.unwrap_or(0)),
            ..all_of(id)
        };
        // Space for the list, the cursor and the enclosing JSON.
        let room = Room {
            rows: u32::MAX,
            bytes: ANSWER_BYTES_MAX - ANSWER_FRAME_BYTES,
        };
        let (mut page, cursor) = self
            .inner
            .catalogue
            .transfer_page(&query, None, room, |row| self.view(row))
            .await?;
        if page.next.is_none() && since.is_none() {
            // The list is complete: in the order of creation.
            page.rows.sort_by(|one, other| one.id.cmp(&other.id));
        }
        Ok((page.rows, cursor))
    }
}

/// The fault of an action that does not apply to any of the named transfers.
fn nothing_to(action: Action, how: &str) -> Fault {
    let word = match action {
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Cancel => "cancel",
        Action::Retry => "retry",
    };
    Fault::conflict(format!("{how}: there is nothing to {word}"))
        .with_next("see 'packhorse status'")
}

/// The handling of an artifact whose transfer is done already.
struct RepeatedDelivery {
    /// Whether its transfer starts again.
    again: bool,
    /// A note for the client.
    note: Option<String>,
    /// The message of the transfer from now on, if it does not start again.
    message: Option<Message>,
}

fn found(row: &TransferRow, presence: &Option<Presence>) -> RepeatedDelivery {
    let (artifact, site) = (&row.artifact, &row.site);
    let Some(presence) = presence else {
        // Offline or slow: the transfer is done when the site has verified its copy.
        return RepeatedDelivery {
            again: true,
            note: Some(format!(
                "{artifact} arrived at {site} before; the site does not answer now, and verifies its copy when it does"
            )),
            message: None,
        };
    };
    let detail = presence
        .detail
        .as_ref()
        .map(|detail| format!(": {detail}"))
        .unwrap_or_default();
    let again = |what: &str| RepeatedDelivery {
        again: true,
        note: Some(format!("{artifact} {what} at {site}{detail}")),
        message: None,
    };
    match (presence.state, &presence.active) {
        (PresenceState::Missing, _) => again("is delivered again, because it is missing"),
        (PresenceState::Damaged, _) => {
            again("is delivered again, because it was changed or damaged")
        }
        (PresenceState::Unavailable, _) => again("waits until the site can check its copy"),
        (PresenceState::Intact, Some(active))
            if active.as_str() != artifact.version() && !active.is_empty() =>
        {
            let message = format!(
                "the site has it, but it is not active: the active version is {active}. To make this content active, publish it under a new version"
            );
            RepeatedDelivery {
                again: false,
                note: Some(format!("{artifact} at {site}: {message}")),
                message: Some(message.into()),
            }
        }
        (PresenceState::Intact, _) => RepeatedDelivery {
            again: false,
            note: None,
            message: None,
        },
    }
}

/// A query for these ids, each of a transfer or a delivery.
pub(super) fn all_of(id: &str) -> TransferQuery {
    TransferQuery {
        id: Some(id.to_owned()),
        ..TransferQuery::default()
    }
}

/// The answer for transfers that do not exist, or that an actor may not know.
pub(super) fn no_transfers(ids: &str) -> Fault {
    Fault::not_found(format!("there is no transfer or delivery {ids}"))
        .with_next("'packhorse status' lists them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;
    use model::receipt::Receipt;
    use transport::identity::Claim;

    #[tokio::test]
    async fn an_action_that_applies_to_no_transfer_of_a_delivery_is_refused() {
        let bench = Bench::start().await;
        let token = bench.token(None, Some("office")).await;
        bench
            .publish(&bench.source("a", 100, 1), "model/a:v1", Some(&token))
            .await
            .unwrap();
        for site in ["east", "west"] {
            bench
                .join(
                    &bench.token(Some(site), None).await,
                    &Claim::Site(site.parse().unwrap()),
                )
                .await;
        }
        let delivered = bench
            .hub
            .inner
            .deliveries
            .deliver(
                &Actor::Admin,
                &["model/a:v1".parse().unwrap()],
                &"east,west".parse().unwrap(),
                false,
            )
            .await
            .unwrap();
        let code = async |id: &str, action| {
            bench
                .hub
                .inner
                .deliveries
                .act_on(&Actor::Admin, id, action)
                .await
                .map(|_| ())
                .map_err(|fault| fault.code)
        };
        let (all, one) = (delivered.delivery.as_str(), delivered.transfers[0].as_str());
        for (action, expected) in [
            (Action::Cancel, Ok(())),
            (Action::Pause, Err(Code::Conflict)),
            (Action::Retry, Ok(())),
            // A repeated request gets the same answer; what is paused is resumed, not tried again.
            (Action::Retry, Ok(())),
            (Action::Pause, Ok(())),
            (Action::Retry, Err(Code::Conflict)),
        ] {
            assert_eq!(code(all, action).await, expected, "{action:?}");
            if expected.is_err() {
                assert_eq!(code(one, action).await, expected, "{action:?} of one");
            }
        }
    }

    #[tokio::test]
    async fn an_offline_site_is_asked_again_what_it_still_holds() {
        let bench = Bench::start().await;
        let token = bench.token(None, Some("office")).await;
        bench
            .publish(&bench.source("a", 100, 1), "model/a:v1", Some(&token))
            .await
            .unwrap();
        let site = bench
            .join(
                &bench.token(Some("west"), None).await,
                &Claim::Site("west".parse().unwrap()),
            )
            .await;
        let inner = &bench.hub.inner;
        let deliver = async || {
            let artifacts = ["model/a:v1".parse().unwrap()];
            let sites = "west".parse().unwrap();
            inner
                .deliveries
                .deliver(&Actor::Admin, &artifacts, &sites, false)
                .await
                .unwrap()
        };
        let first = deliver().await;
        assert_eq!(first.notes, Vec::<String>::new());
        let id: TransferId = first.transfers[0].as_str().parse().unwrap();
        let row = inner.catalogue.transfer(&id).await.unwrap();
        let receipt = Receipt::sign(&row, base::clock::now_ms(), site.cert_der(), |text| {
            site.sign(text)
        })
        .unwrap();
        let arrived = Body {
            receipt: Some(receipt),
            ..row.body.clone()
        };
        inner
            .catalogue
            .update_transfer(&id, row.generation, State::Done, &arrived)
            .await
            .unwrap();

        // Nobody knows whether its copy is still there.
        let second = deliver().await;
        assert_eq!(second.transfers, first.transfers);
        let again = inner.catalogue.transfer(&id).await.unwrap();
        assert_eq!(again.state, State::Queued, "it waits for the site");
        assert!(again.generation > row.generation);
        assert!(second.notes[0].contains("verifies its copy"), "{second:?}");
        let shown = inner.deliveries.view(&again);
        assert_eq!(shown.reason, Some(Reason::SiteOffline));
    }
}
