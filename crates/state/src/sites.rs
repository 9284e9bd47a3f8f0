//! Sites, publishers and join tokens (the hub's).

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{PublisherName, SiteName, SiteSelector};
use base::peer::Peer;
use model::publisher_scope::PublisherScope;
use transport::identity::{Claim, Serial};

use crate::Catalogue;
use crate::engine::See;
use crate::members::Member;

/// The holder of a token's certificate, as it is stored in the table.
pub(crate) const SITE: &str = "site";
pub(crate) const PUBLISHER: &str = "publisher";

/// The row of a site.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteRow {
    /// Its name.
    pub name: SiteName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When it joined.
    pub joined_ms: i64,
    /// When something was last received from it, exact to a minute.
    pub seen_ms: Option<i64>,
    /// The program version that it runs.
    pub version: Option<String>,
    /// Its transfers that have not ended.
    pub open_transfers: u64,
    /// Its certificates.
    pub member: Member,
}

/// The sharing and training lists of a site, as it reported them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowLists {
    /// The site.
    pub site: SiteName,
    /// Its `[share] allow`.
    pub share: Vec<String>,
    /// Its `[train] allow`.
    pub train: Vec<String>,
}

/// A join token.
#[derive(Debug, Clone)]
pub(crate) struct TokenRow {
    /// The hash of its secret.
    pub secret_hash: Vec<u8>,
    /// The name of its holder.
    pub name: String,
    /// The labels of the site (a JSON object).
    pub labels: String,
    /// When it expires.
    pub expires_ms: i64,
    /// When it was used.
    pub used_ms: Option<i64>,
    /// [`SITE`] or [`PUBLISHER`].
    pub role: String,
    /// The hash of the key that it was used for.
    pub key_hash: Option<Vec<u8>>,
    /// When its holder last connected.
    pub seen_ms: Option<i64>,
}

impl TokenRow {
    /// Whether a token may be used now, and its holder; `None`: no token has this id. `claim` is
    /// what the caller states about itself. A token that a key has used stays valid for that key
    /// until its holder has connected.
    pub(crate) fn redeemed(
        row: Option<&Self>,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
        now_ms: i64,
    ) -> Result<Peer, Fault> {
        let role = match claim {
            Claim::Site(_) => SITE,
            Claim::Publisher => PUBLISHER,
        };
        let refuse = |why: &str| {
            Fault::not_allowed(format!("the join token {id} {why}")).with_next(format!(
                "make a new one at the hub: packhorse token create --{role} NAME"
            ))
        };
        let Some(row) = row.filter(|row| row.secret_hash == secret_hash) else {
            return Err(refuse("is not one of this hub"));
        };
        if let Some(used) = row.used_ms {
            // The answer to the holder of this key may have been lost, because the holder has not
            // connected since.
            let is_again = row.key_hash.as_ref().is_some_and(|key| key == key_hash)
                && row.seen_ms.is_none_or(|seen| seen < used);
            if !is_again {
                return Err(refuse("was used already"));
            }
        }
        if row.expires_ms < now_ms {
            return Err(refuse("has expired"));
        }
        if row.role != role {
            return Err(refuse(&format!("is for a {}, not for a {role}", row.role)));
        }
        let name = &row.name;
        match claim {
            Claim::Publisher => Ok(Peer::Publisher(name.parse()?)),
            Claim::Site(claimed) if name == claimed.as_str() => Ok(Peer::Site(claimed.clone())),
            Claim::Site(claimed) => Err(refuse(&format!(
                "is for the site {name}, and this config says {claimed}"
            ))),
        }
    }
}

/// Sites, publishers and join tokens.
#[async_trait]
pub trait Sites: Send + Sync {
    /// Stores a join token: only the hash of its secret. A site and a publisher may not have the
    /// same name.
    async fn add_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        holder: &Peer,
        labels: &BTreeMap<String, String>,
        ttl_seconds: u64,
    ) -> Result<(), Fault>;

    /// Limits what the publisher of a join token may do once it used the token. Limits that the token
    /// does not name stay as they are.
    async fn limit_token(&self, id: &str, scope: &PublisherScope) -> Result<(), Fault>;

    /// What a publisher may do; `None`: this hub does not know it.
    async fn publisher_scope(&self, name: &PublisherName) -> Result<Option<PublisherScope>, Fault>;

    /// Uses a join token, by the rules of `TokenRow::redeemed`, and enrols its site or publisher. The
    /// serial is that of the new certificate; from now on no earlier one of this name is accepted.
    async fn redeem_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<(Peer, Serial), Fault>;

    /// Records that a publisher is connected; `false` for one that this hub does not know.
    async fn publisher_seen(&self, name: &PublisherName) -> Result<bool, Fault>;

    /// Records that a site connected or disconnected, and when something was last received from it.
    /// Each of its open transfers gets a new event number: their reason has changed.
    async fn site_seen(
        &self,
        site: &SiteName,
        online: bool,
        at_ms: i64,
        version: Option<&str>,
    ) -> Result<(), Fault>;

    /// Stores when something was last received from these sites. It is no event: nothing else about
    /// the sites changes.
    async fn sites_heard(&self, heard: &[(SiteName, i64)]) -> Result<(), Fault>;

    /// Records the newest format of manifests that a site reads.
    async fn set_manifest_format(&self, site: &SiteName, format: u32) -> Result<(), Fault>;

    /// The newest format of manifests that all sites read. `None`: no site was ever connected.
    async fn manifest_format(&self) -> Result<Option<u32>, Fault>;

    /// Records which sites a site trains for; `None`: it has reported no list.
    async fn set_train_allow(&self, site: &SiteName, allow: Option<&[String]>)
    -> Result<(), Fault>;

    /// The list of [`Sites::set_train_allow`], as JSON.
    async fn train_allow(&self, site: &SiteName) -> Result<Option<String>, Fault>;

    /// The lists that the sites reported, by name; the list of a site that reported none is empty.
    async fn allow_lists(&self) -> Result<Vec<AllowLists>, Fault>;

    /// All sites, by name.
    async fn sites(&self) -> Result<Vec<SiteRow>, Fault>;

    /// The site with this name, if it exists.
    async fn site(&self, name: &str) -> Result<Option<SiteRow>, Fault>;

    /// Passes `rows` sites to `see`, by name, beginning after this one.
    async fn each_site(
        &self,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, SiteRow>,
    ) -> Result<(), Fault>;
}

/// The fault for sites that do not exist.
pub fn no_site<'a>(names: impl IntoIterator<Item = &'a SiteName>) -> Fault {
    let names: Vec<&str> = names.into_iter().map(SiteName::as_str).collect();
    Fault::not_found(format!("there is no site {}", names.join(", ")))
        .with_next("'packhorse sites' lists those that have joined")
}

/// The fault for a selection without a site.
pub fn no_site_selected() -> Fault {
    Fault::not_found("the selection matches no site")
        .with_next("'packhorse sites' lists them with their labels")
}

impl Catalogue {
    /// The `[train] allow` that a site reported; `None`: it has not reported one.
    pub async fn train_list(&self, site: &SiteName) -> Result<Option<Vec<String>>, Fault> {
        let allow = self.train_allow(site).await?;
        Ok(allow.map(|allow| serde_json::from_str(&allow).unwrap_or_default()))
    }

    /// The selected sites. A name that does not exist, and a selection without sites, is the fault
    /// `not_found`. A site that is revoked is not selected; its name is the fault `conflict`.
    pub async fn select_sites(&self, selector: &SiteSelector) -> Result<Vec<SiteName>, Fault> {
        let (revoked, all): (Vec<SiteRow>, Vec<SiteRow>) = self
            .sites()
            .await?
            .into_iter()
            .partition(|site| site.member.revoked.is_some());
        if let SiteSelector::Names(names) = selector
            && let Some(site) = revoked.iter().find(|site| names.contains(&site.name))
        {
            return Err(
                Fault::conflict(format!("site {} is revoked", site.name)).with_next(format!(
                    "leave it out, or let it in again: packhorse site restore {}",
                    site.name
                )),
            );
        }
        let chosen: Vec<SiteName> = match selector {
            SiteSelector::All => all.into_iter().map(|s| s.name).collect(),
            SiteSelector::Names(names) => {
                let is_missing = |name: &&SiteName| !all.iter().any(|s| s.name == **name);
                let mut missing = names.iter().filter(is_missing).peekable();
                if missing.peek().is_some() {
                    return Err(no_site(missing));
                }
                names.clone()
            }
            SiteSelector::Labels(terms) => all
                .into_iter()
                .filter(|site| terms.iter().all(|t| t.matches(&site.labels)))
                .map(|s| s.name)
                .collect(),
        };
        if chosen.is_empty() {
            return Err(no_site_selected());
        }
        Ok(chosen)
    }
}
