//! Sites and publishers as the API changes them: relabels, revokes, restores and removes one.
//!
//! The catalogue is written first; then the connections are closed. A crash between the two closes
//! them as well.

use super::Hub;
use crate::api::View;
use crate::api::types::{
    Action, MemberAction, MemberActionRequest, Publisher, SetSiteRequest, Site,
};
use base::fault::Fault;
use base::names::{PublisherName, SiteName, check_label};
use base::peer::Peer;
use base::text;
use model::actor::Actor;
use model::paging::{Page, Pager, Room};
use state::no_member;
use transport::REVOKED;

/// The longest reason of a revocation.
const WHY_CHARS_MAX: usize = 200;
/// The labels that one site can have.
const LABELS_MAX: usize = 100;

impl Hub {
    pub(super) async fn show_site(&self, name: &str) -> Result<Site, Fault> {
        let site: SiteName = name.parse()?;
        let row = self.inner.catalogue.site(site.as_str()).await?;
        let row = row.ok_or_else(|| no_member(&Peer::Site(site)))?;
        Ok(self.site_view(&row))
    }

    pub(super) async fn relabel(
        &self,
        actor: &Actor,
        request: SetSiteRequest,
    ) -> Result<Site, Fault> {
        let site: SiteName = request.name.parse()?;
        if request.labels.is_empty() && request.remove_labels.is_empty() {
            return Err(Fault::usage("there is nothing to set")
                .with_next("name labels to set or to remove"));
        }
        for (key, value) in &request.labels {
            check_label(key, value)?;
            if request.remove_labels.contains(key) {
                return Err(Fault::usage(format!(
                    "the label {key:?} is both to be set and to be removed"
                )));
            }
        }
        let now = self.show_site(site.as_str()).await?.labels.len();
        if now.saturating_add(request.labels.len()) > LABELS_MAX {
            return Err(Fault::usage(format!(
                "a site has at most {LABELS_MAX} labels"
            )));
        }
        let (set, unset) = (&request.labels, &request.remove_labels);
        let online = self.inner.links.is_online(&site);
        self.inner
            .catalogue
            .set_labels(&site, set, unset, &actor.to_string(), online)
            .await?;
        tracing::info!(%site, who = %actor, "the labels of a site were changed");
        self.show_site(site.as_str()).await
    }

    pub(super) async fn change_site(
        &self,
        actor: &Actor,
        request: MemberActionRequest,
    ) -> Result<Site, Fault> {
        let site: SiteName = request.name.parse()?;
        let before = self.show_site(site.as_str()).await?;
        if request.action == MemberAction::Remove && request.force {
            self.cancel_all(&site).await?;
        }
        let who = Peer::Site(site.clone());
        self.change_member(actor, &who, &request).await?;
        self.inner.deliveries.read_revoked().await?;
        self.inner.catalogue.notify();
        match request.action {
            MemberAction::Remove => Ok(before),
            MemberAction::Revoke | MemberAction::Restore => self.show_site(site.as_str()).await,
        }
    }

    /// Cancels the transfers of a site that have not ended.
    async fn cancel_all(&self, site: &SiteName) -> Result<(), Fault> {
        for row in self.inner.catalogue.open_transfers(site).await? {
            if row.takes(Action::Cancel, false) {
                self.inner.catalogue.act(&row.id, Action::Cancel).await?;
            }
        }
        Ok(())
    }

    async fn change_member(
        &self,
        actor: &Actor,
        who: &Peer,
        request: &MemberActionRequest,
    ) -> Result<(), Fault> {
        let (catalogue, by) = (&self.inner.catalogue, actor.to_string());
        if request.why.is_some() && request.action != MemberAction::Revoke {
            return Err(Fault::usage("only a revocation has a reason"));
        }
        if request.force && request.action != MemberAction::Remove {
            return Err(Fault::usage("only a removal can be forced"));
        }
        match request.action {
            MemberAction::Revoke => {
                let why = request.why.as_deref().map(checked_why).transpose()?;
                let online = who
                    .site()
                    .is_some_and(|site| self.inner.links.is_online(site));
                catalogue.revoke(who, &by, why, online).await?;
                // The same words as a refused handshake, so that the peer reports it once.
                let told = self.inner.membership.why_revoked(who).await;
                let told = told.unwrap_or_else(|_| format!("{who} {REVOKED}"));
                self.disconnect(who, &told);
            }
            MemberAction::Restore => catalogue.restore(who, &by).await?,
            MemberAction::Remove => {
                catalogue.remove_member(who, &by, request.force).await?;
                self.disconnect(who, &format!("{who} was removed at the hub"));
            }
        }
        tracing::info!(%who, by, action = ?request.action, "a site or publisher was changed");
        Ok(())
    }

    fn disconnect(&self, who: &Peer, why: &str) {
        let closed = self.inner.listener.disconnect(who, None, why);
        if closed > 0 {
            tracing::info!(%who, closed, "connections were closed");
        }
    }

    pub(super) async fn publisher_page(
        &self,
        behind: Option<&str>,
        room: Room,
    ) -> Result<Page<Publisher>, Fault> {
        let mut pager = Pager::new(room);
        let rows = self.inner.catalogue.publishers(behind, room.rows_asked());
        for row in rows.await? {
            if !pager.put(row.view(), row.name.to_string()) {
                break;
            }
        }
        Ok(pager.page())
    }

    pub(super) async fn show_publisher(&self, name: &str) -> Result<Publisher, Fault> {
        let name: PublisherName = name.parse()?;
        let row = self.inner.catalogue.publisher(name.as_str()).await?;
        Ok(row.ok_or_else(|| no_member(&Peer::Publisher(name)))?.view())
    }

    pub(super) async fn change_publisher(
        &self,
        actor: &Actor,
        request: MemberActionRequest,
    ) -> Result<Publisher, Fault> {
        let before = self.show_publisher(&request.name).await?;
        let who = Peer::Publisher(request.name.parse()?);
        self.change_member(actor, &who, &request).await?;
        match request.action {
            MemberAction::Remove => Ok(before),
            MemberAction::Revoke | MemberAction::Restore => {
                self.show_publisher(&request.name).await
            }
        }
    }
}

/// The reason of a revocation, which the peer is told and which logs show.
fn checked_why(why: &str) -> Result<&str, Fault> {
    if why.chars().count() > WHY_CHARS_MAX || why.chars().any(text::is_unsafe) {
        return Err(Fault::usage(format!(
            "the reason must be one line of at most {WHY_CHARS_MAX} characters"
        )));
    }
    Ok(why)
}
