//! The access tokens of a daemon: who holds one, when it was used last, and when it ends.
//!
//! `serve` opens them from the catalogue; the API asks them about each request that presents one.
//! All tokens are in memory, so an unknown one costs a hash and a look into a map, and no query. A
//! change is stored before it takes effect. The last use is stored by a worker, once a minute: a
//! crash loses at most that.

mod refusals;
mod text;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::ApiToken;
use super::types::{AccessToken, AccessTokenReply, AccessTokenRequest};
use base::clock::{now_ms, rfc3339_ms, span};
use base::fault::Fault;
use base::names::{SiteSelector, check_access_name};
use model::actor::Actor;
use model::grant::{Grant, GrantScope, Role};
use model::publisher_scope::PATTERNS_MAX;
use refusals::Refusals;
use state::{AccessRow, Catalogue};
pub(crate) use text::TokenText;

/// How long before its expiry a token is reported.
const REPORTED_BEFORE: Duration = Duration::from_secs(14 * 86_400);
/// How often the last use of tokens is stored.
pub const USE_STORE_EVERY: Duration = Duration::from_secs(60);
/// The validity of a token for which none is given.
const TTL_DEFAULT: Duration = Duration::from_secs(90 * 86_400);
/// The longest validity.
const TTL_MAX: Duration = Duration::from_secs(3_660 * 86_400);

/// The access tokens of a daemon.
pub struct AccessTokens {
    catalogue: Catalogue,
    /// Whether this is a site's daemon, which knows the labels of no site.
    is_site: bool,
    held: RwLock<HashMap<String, Arc<Held>>>,
    refusals: Refusals,
    /// One change at a time, so that memory and catalogue agree.
    change: Mutex<()>,
}

/// A token, and what the daemon remembers of it.
pub(super) struct Held {
    row: AccessRow,
    pub(super) grant: Arc<Grant>,
    /// Cancelled when the token is revoked or rotated.
    ended: CancellationToken,
    /// When it was used last; 0: never. And the value that is stored.
    used_ms: AtomicI64,
    stored_ms: AtomicI64,
}

/// Why a token is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Invalid {
    /// Nobody has it. With the id that it names, if there is such a token.
    Unknown(Option<String>),
    /// It has expired.
    Expired(String),
    /// It was revoked.
    Revoked(String),
}

impl Invalid {
    /// The id of the token that exists.
    pub(super) fn id(&self) -> Option<&str> {
        match self {
            Self::Unknown(id) => id.as_deref(),
            Self::Expired(id) | Self::Revoked(id) => Some(id),
        }
    }

    /// What the log says of it.
    pub(super) fn for_log(&self) -> String {
        match self {
            Self::Unknown(None) => String::new(),
            Self::Unknown(Some(id)) => format!(", with a wrong secret for the access token {id}"),
            Self::Expired(id) => format!(", with the expired access token {id}"),
            Self::Revoked(id) => format!(", with the revoked access token {id}"),
        }
    }
}

impl Held {
    fn new(row: AccessRow) -> Arc<Self> {
        let used = row.used_ms.unwrap_or(0);
        Arc::new(Self {
            grant: Arc::new(Grant {
                id: row.id.clone(),
                name: row.name.clone(),
                role: row.role,
                scope: row.scope.clone(),
            }),
            ended: CancellationToken::new(),
            used_ms: used.into(),
            stored_ms: used.into(),
            row,
        })
    }

    /// Ready when the token has ended: it was revoked or rotated, or has expired.
    pub(super) async fn ended(&self) {
        let expired = async {
            loop {
                let Some(at_ms) = self.row.expires_ms else {
                    return std::future::pending().await;
                };
                let left = at_ms.saturating_sub(now_ms());
                if left <= 0 {
                    return;
                }
                // The wall clock may be set meanwhile.
                let left = Duration::from_millis(left.unsigned_abs());
                tokio::time::sleep(left.min(Duration::from_secs(5))).await;
            }
        };
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = expired => {}
        }
    }

    fn view(&self) -> AccessToken {
        let row = &self.row;
        let time = |ms: Option<i64>| ms.map(rfc3339_ms);
        let used = Some(self.used_ms.load(Ordering::Relaxed)).filter(|used| *used > 0);
        let patterns = row.scope.artifacts.iter().flatten();
        AccessToken {
            name: row.name.clone(),
            id: row.id.clone(),
            role: row.role,
            artifacts: patterns.map(ToString::to_string).collect(),
            sites: row.scope.sites.as_ref().map(ToString::to_string),
            state: match row {
                _ if row.revoked_ms.is_some() => "revoked",
                _ if row.expires_ms.is_some_and(|at| at <= now_ms()) => "expired",
                _ => "valid",
            }
            .into(),
            created_at: rfc3339_ms(row.created_ms),
            created_by: row.created_by.clone(),
            rotated_at: time(row.rotated_ms),
            expires_at: time(row.expires_ms),
            last_used: time(used),
            revoked_at: time(row.revoked_ms),
        }
    }
}

impl AccessTokens {
    /// The tokens of this catalogue.
    pub async fn open(catalogue: Catalogue, is_site: bool) -> Result<Self, Fault> {
        let rows = catalogue.access_tokens().await?.into_iter();
        let held = rows.map(|row| (row.id.clone(), Held::new(row))).collect();
        Ok(Self {
            catalogue,
            is_site,
            held: RwLock::new(held),
            refusals: Refusals::default(),
            change: Mutex::default(),
        })
    }

    /// The token that a request presents. Notes its use.
    pub(super) fn find(&self, presented: &[u8]) -> Result<Arc<Held>, Invalid> {
        let Some(text) = TokenText::parse(presented) else {
            return Err(Invalid::Unknown(None));
        };
        let Some(held) = self.held.read().get(text.id()).cloned() else {
            return Err(Invalid::Unknown(None));
        };
        let id = held.row.id.clone();
        // In constant time.
        if blake3::Hash::from(held.row.secret_hash) != text.hash() {
            return Err(Invalid::Unknown(Some(id)));
        }
        let now = now_ms();
        if held.row.revoked_ms.is_some() {
            return Err(Invalid::Revoked(id));
        }
        if held.row.expires_ms.is_some_and(|at| at <= now) {
            return Err(Invalid::Expired(id));
        }
        held.used_ms.fetch_max(now, Ordering::Relaxed);
        Ok(held)
    }

    /// Counts a request with an invalid token; see [`Refusals::count`].
    pub(super) fn refuse(&self, id: Option<&str>) -> Option<Duration> {
        self.refusals.count(id)
    }

    /// The key with which the daemon proves that it knows a token; `None`: there is no such token.
    pub(super) fn proof_key(&self, id: &str) -> Option<ApiToken> {
        let hash = blake3::Hash::from(self.held.read().get(id)?.row.secret_hash);
        ApiToken::parse(hash.to_hex().as_str()).ok()
    }

    /// All tokens, by name.
    pub(super) fn list(&self) -> Vec<AccessToken> {
        let mut all: Vec<AccessToken> = self.held.read().values().map(|held| held.view()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// One token.
    pub(super) fn show(&self, name: &str) -> Result<AccessToken, Fault> {
        let found = self.named(name).map(|held| held.view());
        found.ok_or_else(|| {
            Fault::not_found(format!(
                "there is no access token {}",
                name.chars().take(64).collect::<String>().escape_debug()
            ))
            .with_next("'packhorse access list' lists them")
        })
    }

    fn named(&self, name: &str) -> Option<Arc<Held>> {
        let held = self.held.read();
        held.values().find(|held| held.row.name == name).cloned()
    }

    /// Creates a token. The answer has its text, which is stored nowhere.
    pub(super) async fn create(
        &self,
        by: &Actor,
        request: AccessTokenRequest,
    ) -> Result<AccessTokenReply, Fault> {
        check_access_name(&request.name)?;
        let scope = self.scope_of(&request)?;
        let expires_ms = expiry(request.role, request.ttl_seconds, request.no_expiry)?;
        let _one = self.change.lock().await;
        let text = self.new_text()?;
        let row = AccessRow {
            id: text.id().to_owned(),
            name: request.name,
            secret_hash: *text.hash().as_bytes(),
            role: request.role,
            scope,
            created_ms: now_ms(),
            created_by: by.to_string(),
            rotated_ms: None,
            expires_ms,
            used_ms: None,
            revoked_ms: None,
        };
        self.catalogue.add_access_token(&row).await?;
        // The stored list may also have lost the oldest revoked token.
        self.load(None).await?;
        self.reply(text, &row.name)
    }

    /// Replaces the secret of a token. The old one ends at once.
    pub(super) async fn rotate(
        &self,
        name: &str,
        ttl_seconds: Option<u64>,
    ) -> Result<AccessTokenReply, Fault> {
        let _one = self.change.lock().await;
        self.show(name)?;
        let old = self.named(name);
        let (text, never) = (
            self.new_text()?,
            old.as_ref().is_some_and(|old| old.row.expires_ms.is_none()),
        );
        let role = old.as_ref().map_or(Role::Viewer, |old| old.row.role);
        let expires_ms = expiry(role, ttl_seconds, never && ttl_seconds.is_none())?;
        let hash = *text.hash().as_bytes();
        self.catalogue
            .rotate_access_token(name, text.id(), &hash, expires_ms)
            .await?;
        self.load(old).await?;
        self.reply(text, name)
    }

    /// Revokes a token: its requests are refused from now on, and what it waits for ends.
    pub(super) async fn revoke(&self, name: &str) -> Result<AccessToken, Fault> {
        let _one = self.change.lock().await;
        self.show(name)?;
        let old = self.named(name);
        self.catalogue.revoke_access_token(name).await?;
        self.load(old).await?;
        self.show(name)
    }

    fn new_text(&self) -> Result<TokenText, Fault> {
        let text = TokenText::generate()?;
        if self.held.read().contains_key(text.id()) {
            return Err(Fault::conflict("the id of the new token exists")
                .with_next("run the command again"));
        }
        Ok(text)
    }

    fn reply(&self, text: TokenText, name: &str) -> Result<AccessTokenReply, Fault> {
        Ok(AccessTokenReply {
            access: self.show(name)?,
            token: text.into_secret(),
        })
    }

    /// Makes memory agree with the catalogue, and ends `old`.
    async fn load(&self, old: Option<Arc<Held>>) -> Result<(), Fault> {
        let rows = self.catalogue.access_tokens().await?;
        {
            let mut held = self.held.write();
            let mut all = HashMap::with_capacity(rows.len());
            for row in rows {
                // One that did not change keeps its last use and its readers.
                let same = held.get(&row.id).filter(|held| {
                    held.row.secret_hash == row.secret_hash
                        && held.row.revoked_ms == row.revoked_ms
                        && held.row.expires_ms == row.expires_ms
                });
                let used = held
                    .get(&row.id)
                    .map(|held| held.used_ms.load(Ordering::Relaxed));
                let token = same.cloned().unwrap_or_else(|| Held::new(row));
                token
                    .used_ms
                    .fetch_max(used.unwrap_or(0), Ordering::Relaxed);
                all.insert(token.row.id.clone(), token);
            }
            *held = all;
        }
        if let Some(old) = old {
            old.ended.cancel();
        }
        Ok(())
    }

    fn scope_of(&self, request: &AccessTokenRequest) -> Result<GrantScope, Fault> {
        if request.artifacts.len() > PATTERNS_MAX {
            return Err(Fault::usage(format!(
                "a token has at most {PATTERNS_MAX} patterns of artifacts"
            )));
        }
        let patterns = request.artifacts.iter().map(|pattern| pattern.parse());
        let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
        let sites: Option<SiteSelector> = request.sites.as_deref().map(str::parse).transpose()?;
        if self.is_site && matches!(sites, Some(SiteSelector::Labels(_))) {
            return Err(Fault::usage(
                "a site does not know the labels of sites: its tokens select sites by name",
            )
            .with_next("give --sites NAME,NAME, or create the token at the hub"));
        }
        let scope = GrantScope {
            artifacts: (!patterns.is_empty()).then_some(patterns),
            sites: sites.filter(|sites| *sites != SiteSelector::All),
        };
        if scope.is_limited() && request.role == Role::Admin {
            return Err(Fault::usage(
                "the role admin has no scope: it could create a token without one",
            )
            .with_next("omit --artifacts and --sites, or choose another role"));
        }
        Ok(scope)
    }

    /// Stores the last use of the tokens that were used since it was stored.
    pub async fn store_use(&self) -> Result<(), Fault> {
        let used: Vec<(Arc<Held>, i64)> = {
            let held = self.held.read();
            held.values()
                .map(|held| (held.clone(), held.used_ms.load(Ordering::Relaxed)))
                .filter(|(held, used)| *used > held.stored_ms.load(Ordering::Relaxed))
                .collect()
        };
        if used.is_empty() {
            return Ok(());
        }
        let rows: Vec<(String, i64)> = used
            .iter()
            .map(|(held, used)| (held.row.id.clone(), *used))
            .collect();
        self.catalogue.access_tokens_used(&rows).await?;
        for (held, used) in used {
            held.stored_ms.fetch_max(used, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The valid tokens that expire soon, and those that expired as recently, with the milliseconds
    /// that are left.
    fn expiring(&self) -> Vec<(String, i64)> {
        let (now, soon) = (now_ms(), REPORTED_BEFORE.as_millis() as i64);
        let held = self.held.read();
        let left = |held: &Arc<Held>| {
            let row = &held.row;
            let left = row.expires_ms?.saturating_sub(now);
            (row.revoked_ms.is_none() && left.abs() <= soon).then(|| (row.name.clone(), left))
        };
        let mut all: Vec<(String, i64)> = held.values().filter_map(left).collect();
        all.sort();
        all
    }

    /// What `doctor` says of the tokens.
    pub(super) fn doctor(&self) -> Vec<String> {
        let line = |(name, left): (String, i64)| {
            let time = span(Duration::from_millis(left.unsigned_abs()));
            let next = format!("'packhorse access rotate {name}' gives it a new secret and time");
            if left > 0 {
                format!("fault access token {name}: it expires in {time}; {next}")
            } else {
                format!(
                    "fault access token {name}: it expired {time} ago; {next}, 'packhorse access revoke {name}' ends this message"
                )
            }
        };
        self.expiring().into_iter().map(line).collect()
    }

    /// What the metrics say of the tokens.
    pub(super) fn metrics(&self) -> String {
        let mut out = format!(
            "# TYPE packhorse_api_invalid_tokens_total counter\npackhorse_api_invalid_tokens_total {}\n",
            self.refusals.total()
        );
        let expiring = self.expiring();
        if !expiring.is_empty() {
            out.push_str("# TYPE packhorse_access_token_expires_in_seconds gauge\n");
        }
        for (name, left) in expiring {
            let _ = writeln!(
                out,
                "packhorse_access_token_expires_in_seconds{{token=\"{name}\"}} {}",
                left / 1000
            );
        }
        out
    }
}

/// When a token of this role expires.
fn expiry(role: Role, ttl_seconds: Option<u64>, never: bool) -> Result<Option<i64>, Fault> {
    if never {
        if role != Role::Wall {
            return Err(Fault::usage(format!(
                "a token of the role {role} must expire: only the role wall may have no expiry"
            ))
            .with_next("give --ttl with a duration, for example 90d"));
        }
        return Ok(None);
    }
    let ttl = ttl_seconds.map_or(TTL_DEFAULT, Duration::from_secs);
    if ttl.is_zero() || ttl > TTL_MAX {
        return Err(Fault::usage(format!(
            "the validity of a token must be longer than 0 and at most {} days",
            TTL_MAX.as_secs() / 86_400
        )));
    }
    Ok(Some(now_ms().saturating_add(ttl.as_millis() as i64)))
}
