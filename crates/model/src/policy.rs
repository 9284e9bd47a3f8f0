//! Who may do what: the only place where an access right is decided.
//!
//! [`may`] is pure. The caller loads the facts that a rule needs (which site published an artifact,
//! whether it was delivered, the `[share]` and `[train]` lists) and passes them in the [`Object`].
//! Hub, site and API call it for every request and stream; nothing is stored. A pair of verb and
//! object for which there is no rule is refused.

mod token;
mod trainer;

use std::collections::BTreeMap;
use std::time::Duration;

use base::fault::Fault;
use base::names::{ArtifactRef, PublisherName, SiteName, SiteSelector};

use crate::actor::Actor;
use crate::publisher_scope::PublisherScope;

/// What an actor wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Keep a connection to the hub.
    Connect,
    /// Open a control stream: receive the list of wanted transfers and runs, send reports.
    Control,
    /// Replace its own certificate by a new one.
    Renew,
    /// Read the manifest of an artifact.
    ReadManifest,
    /// Read the content of an artifact.
    ReadContent,
    /// Receive, as a site, what another site published.
    Receive,
    /// Read what a wall screen shows: the lists of sites, transfers and deliveries.
    Watch,
    /// Read state: artifacts, transfers, runs, jobs, events.
    Read,
    /// Read what concerns the daemon as a whole: metrics, workers, `doctor`.
    Diagnose,
    /// Read which sites `[share]` excludes from an artifact.
    ReadExclusions,
    /// Read the digest of the artifact that already has the name which the actor wants to publish
    /// under.
    ReadDigest,
    /// Publish over the API of a daemon, or, as a site, the model of a run.
    Publish,
    /// Announce to the hub what was published in place at a site.
    Offer,
    /// Publish at the hub from another machine.
    Upload,
    /// Deliver an artifact to sites.
    Deliver,
    /// Ask what a delivery would cost.
    Plan,
    /// Pause, resume, cancel or retry a transfer.
    Act,
    /// Report the state of a transfer or a run.
    Report,
    /// Start a training run, or use an artifact as its input.
    Train,
    /// Have a site train, as the site that starts the run.
    Borrow,
    /// Finish a training run.
    Finish,
    /// Cancel a training run.
    Cancel,
    /// Keep the relayed bytes of an artifact.
    Pin,
    /// Verify an artifact.
    Verify,
    /// Export artifacts to a file.
    Export,
    /// Import artifacts from a file.
    Import,
    /// Remove unused content.
    Collect,
    /// Cancel a job.
    CancelJob,
    /// Create a join token.
    CreateToken,
    /// Create, list, rotate and revoke access tokens of the API.
    ManageAccess,
    /// Change, revoke, restore or remove a site or a publisher.
    ManageSites,
}

/// What the certificate of a peer is worth at the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The hub has no record of the peer.
    Unknown,
    /// It is the newest one of the peer, or the one before it, which is still accepted.
    Current,
    /// A newer one was issued.
    Superseded,
    /// The peer was revoked.
    Revoked,
}

/// What the verb applies to, with the facts that its rule needs.
#[derive(Debug, Clone, Copy)]
pub enum Object<'a> {
    /// The daemon as a whole: whether the actor may use the verb there at all. Where the verb
    /// applies to something particular, that is decided by a second question.
    Daemon,
    /// The record of the peer at the hub.
    Membership {
        /// What the certificate of the connection is worth.
        standing: Standing,
        /// How long the certificate has been expired.
        expired: Option<Duration>,
        /// How long an expired certificate can be renewed.
        grace: Duration,
    },
    /// An artifact of the hub's catalogue.
    Artifact {
        /// The site that published it; `None`: the hub holds the content.
        origin: Option<&'a SiteName>,
        /// Whether the actor has a transfer of its content that was neither cancelled nor removed.
        delivered: bool,
        /// Whether the actor offers or uploads it in this request.
        supplied: bool,
    },
    /// An artifact that a site may receive.
    Published(Published<'a>),
    /// Content, which may have several names.
    Content {
        /// Whether the actor has a transfer of it that was neither cancelled nor removed.
        delivered: bool,
        /// Whether the hub waits for the actor's answer to what a delivery of it would cost.
        planned: bool,
        /// The artifacts that these transfers name.
        names: &'a [Published<'a>],
    },
    /// An artifact with other content under the name that the actor wants to publish under.
    Taken {
        /// The artifact.
        published: Published<'a>,
        /// The publisher that uploaded it.
        publisher: Option<&'a PublisherName>,
        /// Whether the actor has a transfer of its content that was neither cancelled nor removed.
        delivered: bool,
    },
    /// An artifact that a publisher uploads.
    Upload {
        /// The artifact.
        artifact: &'a ArtifactRef,
        /// What the publisher may publish.
        scope: &'a PublisherScope,
    },
    /// A site that a publisher delivers its upload to.
    UploadTo {
        /// The site.
        site: &'a SiteName,
        /// Its labels.
        labels: &'a BTreeMap<String, String>,
        /// Where the publisher may deliver.
        scope: &'a PublisherScope,
    },
    /// A request to publish over the API.
    Publication {
        /// The artifact, as the request names it.
        reference: &'a str,
        /// The source.
        source: &'a str,
        /// The training run.
        run: Option<&'a str>,
        /// Whether the request names sites to deliver to.
        delivers: bool,
    },
    /// A transfer.
    Transfer {
        /// The site that it goes to.
        to: &'a SiteName,
    },
    /// The state of a transfer.
    Progress {
        /// The site that it goes to.
        to: &'a SiteName,
        /// The site that published the artifact.
        origin: Option<&'a SiteName>,
        /// Whether the actor has a transfer of the same content that was neither cancelled nor
        /// removed.
        delivered: bool,
    },
    /// A training run.
    Run {
        /// The site that started it.
        from: &'a SiteName,
        /// The site that trains.
        on: &'a SiteName,
    },
    /// A training run, known by its name only.
    RunByName(&'a str),
    /// A training run that does not exist yet.
    NewRun {
        /// The site that gets the model.
        from: &'a SiteName,
    },
    /// A site that trains for others.
    Trainer {
        /// Its `[train] allow`; `None`: the site has not reported it, and decides itself.
        allow: Option<&'a [String]>,
    },
    /// A job of the daemon.
    Job {
        /// Who started it, if the daemon remembers that.
        starter: Option<&'a Actor>,
    },
    /// An artifact, known by its name only.
    Named(&'a ArtifactRef),
    /// A site.
    Place {
        /// Its name.
        site: &'a SiteName,
        /// Its labels.
        labels: &'a BTreeMap<String, String>,
    },
}

/// What a site published, and whom it is shared with.
#[derive(Debug, Clone, Copy)]
pub struct Published<'a> {
    /// The site; `None`: the hub holds the content, and shares it with every site.
    pub origin: Option<&'a SiteName>,
    /// The lists that apply to it.
    pub sharing: Sharing<'a>,
}

/// The lists that decide whether a site may receive what another site published.
#[derive(Debug, Clone, Copy)]
pub struct Sharing<'a> {
    /// `[share] allow` of the hub; `None`: every site.
    pub hub: Option<&'a [SiteSelector]>,
    /// `[share] allow` of the site that published; `None`: every site.
    pub origin: Option<&'a [SiteSelector]>,
    /// The labels of the site that would receive.
    pub labels: &'a BTreeMap<String, String>,
}

/// Whose `[share] allow` excludes a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareList {
    /// The hub's, which is checked first.
    Hub,
    /// That of the site that published.
    Origin,
}

/// Why something is refused. The caller chooses the text where it knows the names of what is
/// refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The actor must not learn whether the object exists: it gets the answer for an object that
    /// does not exist.
    Hidden,
    /// The hub has no record of the peer, or no longer.
    Unknown,
    /// The peer was revoked.
    Revoked,
    /// A newer certificate was issued to the peer.
    Superseded,
    /// The certificate is expired.
    Expired,
    /// A `[share]` list excludes the site.
    NotShared(ShareList),
    /// The `[train] allow` of the site that would train does not name the actor.
    NoTraining,
    /// The actor has no such right.
    NotAllowed {
        /// Why.
        why: String,
        /// What to do instead.
        next: String,
    },
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Hidden => Fault::not_found("there is no such object"),
            Refusal::Unknown => Fault::not_allowed("the hub has no record of this peer")
                .with_next("join again with a new token"),
            Refusal::Revoked => Fault::not_allowed("this peer was revoked at the hub")
                .with_next("ask the administrator of the hub to restore it"),
            Refusal::Superseded => {
                Fault::not_allowed("a newer certificate was issued for this name; this one is not accepted any more")
                    .with_next("use the newest certificate, or join again with a new token")
            }
            Refusal::Expired => Fault::not_allowed("the certificate has expired")
                .with_next("connect again: an expired certificate is renewed first; if that is refused, join again with a new token"),
            Refusal::NotShared(ShareList::Hub) => {
                Fault::not_allowed("the [share] allow of the hub excludes the site")
            }
            Refusal::NotShared(ShareList::Origin) => {
                Fault::not_allowed("the [share] allow of the publishing site excludes the site")
            }
            Refusal::NoTraining => Fault::not_allowed(
                "the [train] allow of the site that would train does not name this site",
            ),
            Refusal::NotAllowed { why, next } => Fault::not_allowed(why).with_next(next),
        }
    }
}

fn refuse(why: impl Into<String>, next: impl Into<String>) -> Result<(), Refusal> {
    Err(Refusal::NotAllowed {
        why: why.into(),
        next: next.into(),
    })
}

/// `Ok` if it is, else hidden.
fn visible(is: bool) -> Result<(), Refusal> {
    if is { Ok(()) } else { Err(Refusal::Hidden) }
}

/// Whether `actor` may do `verb` to `object`.
pub fn may(actor: &Actor, verb: Verb, object: &Object<'_>) -> Result<(), Refusal> {
    match actor {
        Actor::Admin => admin(verb),
        Actor::Token(grant) => token::may(grant, verb, object),
        Actor::Trainer(run) => trainer::may(run, verb, object),
        Actor::Site(site) => self::site(site, verb, object),
        Actor::Publisher(name) => publisher(name, verb, object),
        Actor::Hub => hub(verb),
    }
}

/// What a list of training runs shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// All runs.
    All,
    /// The runs that this site started or trains.
    Of(&'a SiteName),
}

/// Which training runs a list shows to `actor`: those for which [`may`] allows [`Verb::Read`].
pub fn runs_scope(actor: &Actor) -> Result<Scope<'_>, Refusal> {
    match actor {
        Actor::Admin => Ok(Scope::All),
        Actor::Site(site) => Ok(Scope::Of(site)),
        Actor::Token(_) | Actor::Trainer(_) | Actor::Publisher(_) | Actor::Hub => {
            Err(Refusal::Hidden)
        }
    }
}

/// The administrator may do everything but what only a peer does over its connection. The `[share]`
/// and `[train]` lists bind it too: it asks whether the *site* may receive, or borrow.
fn admin(verb: Verb) -> Result<(), Refusal> {
    match verb {
        Verb::Connect
        | Verb::Control
        | Verb::Renew
        | Verb::ReadManifest
        | Verb::ReadContent
        | Verb::Receive
        | Verb::Offer
        | Verb::Upload
        | Verb::Report
        | Verb::Borrow => refuse(
            "only a connected site or publisher does this",
            "use the API of the daemon",
        ),
        Verb::Watch
        | Verb::Read
        | Verb::Diagnose
        | Verb::ReadExclusions
        | Verb::ReadDigest
        | Verb::Publish
        | Verb::Deliver
        | Verb::Plan
        | Verb::Act
        | Verb::Train
        | Verb::Finish
        | Verb::Cancel
        | Verb::Pin
        | Verb::Verify
        | Verb::Export
        | Verb::Import
        | Verb::Collect
        | Verb::CancelJob
        | Verb::CreateToken
        | Verb::ManageAccess
        | Verb::ManageSites => Ok(()),
    }
}

/// Who may enter: a peer with its newest certificate. With an expired one it may only renew it, within
/// the grace.
fn member(
    verb: Verb,
    standing: Standing,
    expired: Option<Duration>,
    grace: Duration,
) -> Result<(), Refusal> {
    match standing {
        Standing::Unknown => Err(Refusal::Unknown),
        Standing::Revoked => Err(Refusal::Revoked),
        Standing::Superseded => Err(Refusal::Superseded),
        Standing::Current => match expired {
            None => Ok(()),
            Some(time) if verb == Verb::Renew && time < grace => Ok(()),
            Some(_) => Err(Refusal::Expired),
        },
    }
}

/// A site acts on its own transfers and runs, and sends on what it published or received.
fn site(site: &SiteName, verb: Verb, object: &Object<'_>) -> Result<(), Refusal> {
    match (verb, *object) {
        (
            Verb::Connect | Verb::Renew,
            Object::Membership {
                standing,
                expired,
                grace,
            },
        ) => member(verb, standing, expired, grace),
        (
            Verb::Control
            | Verb::Renew
            | Verb::ReadManifest
            | Verb::ReadContent
            | Verb::Read
            | Verb::Offer
            | Verb::Deliver
            | Verb::Act
            | Verb::Report
            | Verb::Train
            | Verb::Finish
            | Verb::Cancel,
            Object::Daemon,
        ) => Ok(()),
        (Verb::Upload, _) => refuse(
            "a site publishes at its own daemon",
            "run the command at the site",
        ),
        (Verb::Receive, Object::Published(published)) => receive(site, published),
        // Sharing may have ended since the transfer began. One name that is shared is enough.
        (
            Verb::ReadContent,
            Object::Content {
                delivered, names, ..
            },
        ) => visible(delivered && any_is_shared(site, names)),
        (
            Verb::ReadManifest,
            Object::Content {
                delivered,
                planned,
                names,
            },
        ) => visible(planned || delivered && any_is_shared(site, names)),
        (
            Verb::Deliver,
            Object::Artifact {
                origin,
                delivered,
                supplied,
            },
        ) => visible(supplied || delivered || origin == Some(site)),
        (
            Verb::Read | Verb::Train,
            Object::Artifact {
                origin, delivered, ..
            },
        ) => visible(delivered || origin == Some(site)),
        (Verb::ReadExclusions, Object::Artifact { origin, .. }) => visible(origin == Some(site)),
        (
            Verb::ReadDigest,
            Object::Taken {
                published,
                delivered,
                ..
            },
        ) => visible(delivered || published.origin.is_some() && receive(site, published).is_ok()),
        (Verb::Act | Verb::Report, Object::Transfer { to }) => visible(to == site),
        (
            Verb::Read,
            Object::Progress {
                to,
                origin,
                delivered,
            },
        ) => visible(to == site || delivered || origin == Some(site)),
        (Verb::Read | Verb::Finish | Verb::Cancel, Object::Run { from, on }) => {
            visible(from == site || on == site)
        }
        // The model of the run.
        (Verb::Publish | Verb::Report, Object::Run { on, .. }) => visible(on == site),
        (Verb::Train, Object::NewRun { from }) if from == site => Ok(()),
        (Verb::Train, Object::NewRun { .. }) => refuse(
            "a site starts runs for itself only",
            "name this site in --from, or start it at the hub",
        ),
        (Verb::Borrow, Object::Trainer { allow }) => {
            if allow.is_none_or(|allow| names_site(allow, site)) {
                Ok(())
            } else {
                Err(Refusal::NoTraining)
            }
        }
        _ => refuse(
            "a site has no such right",
            "ask the administrator of the hub",
        ),
    }
}

/// A publisher uploads, has delivered what it uploads, and does nothing else.
fn publisher(name: &PublisherName, verb: Verb, object: &Object<'_>) -> Result<(), Refusal> {
    match (verb, *object) {
        (
            Verb::Connect | Verb::Renew,
            Object::Membership {
                standing,
                expired,
                grace,
            },
        ) => member(verb, standing, expired, grace),
        (Verb::Upload | Verb::Renew, Object::Daemon) => Ok(()),
        (Verb::Upload, Object::Upload { artifact, scope }) => match &scope.artifacts {
            Some(patterns) if !patterns.iter().any(|pattern| pattern.includes(artifact)) => {
                let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
                refuse(
                    format!(
                        "the publisher {name} may publish {} only, not {artifact}",
                        patterns.join(", ")
                    ),
                    "publish under another name, or ask the administrator of the hub for a token with other --artifacts",
                )
            }
            _ => Ok(()),
        },
        (
            Verb::Deliver,
            Object::UploadTo {
                site,
                labels,
                scope,
            },
        ) => match &scope.deliver_to {
            Some(to) if !to.sites().is_some_and(|sites| sites.includes(site, labels)) => refuse(
                format!("the publisher {name} may deliver to {to} only, not to {site}"),
                "publish without --to, or ask the administrator of the hub to deliver",
            ),
            _ => Ok(()),
        },
        (Verb::Deliver, Object::Artifact { supplied: true, .. }) => Ok(()),
        (Verb::ReadDigest, Object::Taken { publisher, .. }) => visible(publisher == Some(name)),
        (Verb::ReadManifest | Verb::ReadContent | Verb::ReadExclusions, _) => Err(Refusal::Hidden),
        _ => refuse(
            format!("{name} is a publisher, and may publish and nothing else"),
            "ask the hub's own API, or join as a site",
        ),
    }
}

/// At a site and at a publisher the hub may read all content: the hub decides for whom.
fn hub(verb: Verb) -> Result<(), Refusal> {
    match verb {
        Verb::ReadManifest | Verb::ReadContent | Verb::Plan | Verb::Verify => Ok(()),
        _ => refuse(
            "the hub reads, plans and verifies at its peers, and nothing else",
            "look at the log of the hub",
        ),
    }
}

/// A site always receives what it published itself.
fn receive(site: &SiteName, Published { origin, sharing }: Published<'_>) -> Result<(), Refusal> {
    if origin.is_none_or(|origin| origin == site) {
        return Ok(());
    }
    let allows = |list: &[SiteSelector]| {
        list.iter()
            .any(|selector| selector.includes(site, sharing.labels))
    };
    if !sharing.hub.is_none_or(allows) {
        return Err(Refusal::NotShared(ShareList::Hub));
    }
    if !sharing.origin.is_none_or(allows) {
        return Err(Refusal::NotShared(ShareList::Origin));
    }
    Ok(())
}

fn any_is_shared(site: &SiteName, names: &[Published<'_>]) -> bool {
    names
        .iter()
        .any(|published| receive(site, *published).is_ok())
}

/// Whether a `[train] allow` names a site: by its name or by `all`. Labels do not count: the hub
/// assigns them, and the site that trains decides by itself.
fn names_site(list: &[String], site: &SiteName) -> bool {
    list.iter().any(|text| match text.parse::<SiteSelector>() {
        Ok(SiteSelector::All) => true,
        Ok(SiteSelector::Names(names)) => names.contains(site),
        Ok(SiteSelector::Labels(_)) | Err(_) => false,
    })
}

#[cfg(test)]
mod tests;
