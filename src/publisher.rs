//! Publishing from another machine than the hub: reads a source on this machine, and sends the hub
//! what it lacks.
//!
//! The command line calls [`publish`]; this side has no daemon. The artifact's bytes stay where
//! they are: an [`InPlaceReader`] records where each chunk is, the hub receives the manifest, and
//! fetches over the connection that was opened from here.
//!
//! The state folder (`--state`, by default `~/.local/share/packhorse`) has a folder for each hub:
//! - `identity/site.pem`: the publisher's key and certificate, issued once for a join token;
//! - `work/<n>/`: manifest pages and chunk rows of one running publish. A lock separates concurrent
//!   publishes.
//!
//! A crash leaves a work folder, which the next publish takes over and empties. Nothing else is
//! needed to resume: the source is read again, and chunks that the hub already stored are not sent
//! again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::api::types::{Published, SourceOptions};
use crate::config::ConnectionSettings;
use crate::open_source::{self, Access};
use base::blocking::blocking;
use base::fault::{Code, Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::{
    CONNECTION_SEND_BYTES_MAX, FETCH_BATCH_BYTES, FETCH_IN_FLIGHT_MAX, FETCH_STREAMS_MAX,
    HUB_AWAY_MAX, PUBLISHES_AT_ONCE_MAX, SILENCE_MAX,
};
use base::names::{ArtifactRef, SiteSelector};
use base::omitted::Omitted;
use base::peer::Peer;
use base::{durable, private};
use content::ingest;
use content::manifest::Digest;
use content::store::Store;
use exchange::chunk_index::ChunkIndex;
use exchange::fetch;
use exchange::in_place::{HeldArtifact, Holdings, InPlaceReader};
use exchange::wire;
use model::protocol::{AskHub, FETCH, renewal};
use transport::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity, fingerprint};
use transport::{self, Link, ProxySettings, Redial};

/// Bytes that are read and not yet given to the connection, which has its own send buffer.
const MEMORY_TO_READ: u64 = 32 << 20;

/// A publish request.
#[derive(Debug, Clone)]
pub struct Asked {
    /// An absolute path, or `registry://host/repository:tag`.
    pub source: String,
    /// Its reference.
    pub artifact: ArtifactRef,
    /// Sites that it is delivered to at once.
    pub to: Option<String>,
    /// How the source is read.
    pub options: SourceOptions,
    /// The hub's address, `HOST:PORT`.
    pub hub: String,
    /// The join token, if this machine has no certificate of that hub.
    pub token: Option<String>,
    /// The state folder.
    pub state: PathBuf,
}

/// The result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Uploaded {
    /// The hub's answer.
    #[serde(flatten)]
    pub published: Published,
    /// Transmitted bytes, both ways, including the transport's overhead; without the one-time join.
    pub wire: u64,
}

/// Publishes. A broken connection is opened again, and a hub without room is asked again, for a
/// limited time.
pub async fn publish(asked: Asked, progress: Arc<JobProgress>) -> Result<Uploaded, Fault> {
    if asked.options.for_dataset.is_some() {
        return Err(Fault::usage("--for needs the list of the dataset's files, and a publisher cannot read what the hub has")
            .with_next("publish the labels without it, or at the hub or a site"));
    }
    open_source::check_image_name(&asked.artifact, &asked.options)?;
    let to: Option<SiteSelector> = asked.to.as_deref().map(str::parse).transpose()?;
    let token: Option<JoinToken> = asked.token.as_deref().map(str::parse).transpose()?;
    let dir = std::path::absolute(&asked.state)
        .at(asked.state.display())?
        .join(folder_of(&asked.hub));
    if token.is_none() && !SiteIdentity::path(&dir).exists() {
        // A mistyped address creates no files.
        return Err(no_publisher(&asked.hub, &dir));
    }
    durable::create_dir_all(&dir)?;
    private::tighten(&dir);
    progress.doing(format!("calling the hub at {}", asked.hub));
    // Before the source is read, which may take hours: a refusal of the hub is reported at once.
    let mut publisher = Publisher {
        hub: asked.hub.clone(),
        token,
        dir: dir.clone(),
        line: ConnectionSettings {
            proxy: ProxySettings::from_environment(),
            ..ConnectionSettings::default()
        },
        wire: 0,
        link: None,
    };
    let format = publisher.line().await.map_err(given_up)?.manifest_format();

    let work = blocking(move || Work::take(&dir)).await?;
    progress.doing(format!("reading {}", asked.source));
    let access = Access::of_user(&asked.state, format);
    let found = {
        let (source, progress, folder) = (asked.clone(), progress.clone(), work.folder.clone());
        let (runtime, access) = (tokio::runtime::Handle::current(), access.clone());
        let reading = blocking(move || read(&source, &access, &folder, &progress, &runtime)).await;
        reading.map_err(|fault| {
            fault
                .of_publish()
                .context(format_args!("publish {}", asked.artifact))
        })?
    };
    progress.doing(format!(
        "sending the hub what it lacks of {}",
        asked.artifact
    ));
    progress.total.store(0, Ordering::Relaxed);
    progress.bytes.store(0, Ordering::Relaxed);
    let omitted = found.omitted.brief();
    let question = AskHub::Upload {
        artifact: asked.artifact.clone(),
        digest: found.digest,
        to,
        omitted,
    };
    let published = publisher.offer(&question, &found.origin, &progress).await;
    publisher.hang_up().await;
    // An older hub does not say what was left out.
    let note = access.note(asked.artifact.kind, &asked.options, &found.omitted);
    let omitted = found.omitted.list();
    drop((found.origin, work));
    let published = published.map_err(given_up)?;
    Ok(Uploaded {
        published: Published {
            omitted,
            note: published.note.clone().or(note),
            ..published
        },
        wire: publisher.wire,
    })
}

/// A source that was read.
struct ReadSource {
    /// Provides its bytes.
    origin: InPlaceReader,
    digest: Digest,
    omitted: Omitted,
    /// Answers where they are.
    _holdings: Arc<Here>,
}

/// The connection's final error, for the user: there is no automatic retry.
fn given_up(fault: Fault) -> Fault {
    match fault.code {
        Code::Unreachable => {
            fault.with_next("check the address, that the hub runs, and that the network lets it through; then run this again")
        }
        _ => fault.of_publish(),
    }
}

/// A hub's address as a folder's name.
fn folder_of(hub: &str) -> String {
    hub.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') {
                c
            } else {
                '_'
            }
        })
        .collect()
}

/// Converts a folder name back to an address: the port follows a colon, and a host in brackets is
/// an IPv6 address.
fn address_of(folder: &str) -> Option<String> {
    let (host, port) = folder.rsplit_once('_')?;
    Some(
        match host
            .strip_prefix('_')
            .and_then(|host| host.strip_suffix('_'))
        {
            Some(v6) => format!("[{}]:{port}", v6.replace('_', ":")),
            None => format!("{host}:{port}"),
        },
    )
}

/// The hubs whose certificate this machine has, by folder.
fn known_hubs(state: &Path) -> Vec<String> {
    let folders = std::fs::read_dir(state).into_iter().flatten().flatten();
    let known = folders.filter(|folder| SiteIdentity::path(&folder.path()).exists());
    let mut hubs: Vec<String> = known
        .filter_map(|folder| address_of(folder.file_name().to_str()?))
        .collect();
    hubs.sort();
    hubs
}

/// The error for a missing certificate: without one, and without a token, the hub cannot be called.
/// It lists the known hubs, in case the address was mistyped.
fn no_publisher(hub: &str, dir: &Path) -> Fault {
    let make = "at the hub: packhorse token create --publisher NAME; then here again with --join-token TOKEN";
    let known = dir.parent().map(known_hubs).unwrap_or_default();
    let mut fault = Fault::not_allowed(format!(
        "this machine is no publisher of the hub at {hub} yet, and did not call it"
    ))
    .with_next(make);
    if !known.is_empty() {
        fault.message.push_str(&format!(
            "; it is a publisher of the hub at {}",
            known.join(", ")
        ));
        fault.next = format!("check the address in --hub; if it is right, {make}");
    }
    fault
}

/// Reads the source: stores its manifest, and records where its content is. Blocks.
fn read(
    asked: &Asked,
    access: &Access,
    folder: &Path,
    progress: &Arc<JobProgress>,
    runtime: &tokio::runtime::Handle,
) -> Result<ReadSource, Fault> {
    let kind = asked.artifact.kind;
    open_source::check_bad_out(&asked.options)?;
    let store = Store::open(&folder.join("store"))?;
    let index = Arc::new(ChunkIndex::open(folder)?);
    let here = Arc::new(Here::default());
    let origin = InPlaceReader::new(
        store,
        index,
        folder.join("published"),
        here.clone(),
        None,
        MEMORY_TO_READ,
    );
    let base = open_source::base_of(kind, &asked.source, &asked.options, None)?;
    let found = open_source::in_scratch(&folder.with_extension("scratch"), progress, |scratch| {
        let mut source = open_source::open(
            kind,
            &asked.source,
            &asked.options,
            None,
            access,
            scratch,
            runtime,
        )?;
        open_source::read(source.as_mut(), &asked.options, |source| {
            ingest::reported(progress, |counted| {
                origin.publish(kind, source, base.as_ref(), counted)
            })
        })
    })?;
    let (digest, omitted) = (found.ingested.digest, found.ingested.omitted);
    *here.0.lock() = Some((
        digest,
        HeldArtifact {
            root: found.ingested.root,
            places: vec![found.place],
        },
    ));
    Ok(ReadSource {
        origin,
        digest,
        omitted,
        _holdings: here,
    })
}

/// The one artifact of this process.
#[derive(Default)]
struct Here(Mutex<Option<(Digest, HeldArtifact)>>);

#[async_trait]
impl Holdings for Here {
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault> {
        Ok(self
            .0
            .lock()
            .as_ref()
            .filter(|(own, _)| *own == digest)
            .map(|(_, held)| held.clone()))
    }
}

/// A publisher's side of the connection.
struct Publisher {
    hub: String,
    token: Option<JoinToken>,
    dir: PathBuf,
    line: ConnectionSettings,
    /// Transmitted bytes of earlier connections.
    wire: u64,
    link: Option<Link>,
}

impl Publisher {
    /// The connection, opened if there is none. A token is used if the hub does not accept the
    /// certificate.
    async fn line(&mut self) -> Result<Link, Fault> {
        if let Some(link) = self.link.clone().filter(|link| !link.is_closed()) {
            return Ok(link);
        }
        self.hang_up().await;
        let identity = self.identity(false).await?;
        let link = match transport::dial(
            &self.hub,
            &identity,
            &self.line,
            CONNECTION_SEND_BYTES_MAX,
        )
        .await
        {
            Err(fault) if fault.code == Code::NotAllowed && self.token.is_some() => {
                let identity = self.identity(true).await?;
                transport::dial(&self.hub, &identity, &self.line, CONNECTION_SEND_BYTES_MAX).await?
            }
            dialled => dialled?,
        };
        if link.is_for_renewal() {
            // The certificate has expired, and the hub admits it for nothing else.
            let renewed = self.renew(&identity, &link).await;
            link.close_and_flush("the certificate was renewed").await;
            renewed?;
            let identity = self.identity(false).await?;
            let link = transport::dial(&self.hub, &identity, &self.line, CONNECTION_SEND_BYTES_MAX)
                .await?;
            self.link = Some(link.clone());
            return Ok(link);
        }
        if identity.needs_renewal()
            && let Err(fault) = self.renew(&identity, &link).await
        {
            tracing::warn!(error = %fault, "the certificate could not be renewed; retrying at the next publish");
        }
        self.link = Some(link.clone());
        Ok(link)
    }

    /// Closes the connection, and counts its bytes.
    async fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            link.close_and_flush("published").await;
            let (sent, received) = link.bytes();
            self.wire += sent + received;
        }
    }

    /// The stored certificate; else a new one for the token, which works once. `anew`: the stored
    /// one is invalid.
    async fn identity(&mut self, anew: bool) -> Result<SiteIdentity, Fault> {
        let dir = self.dir.clone();
        // Two publishes that start at once must not both use the token.
        let _turn = blocking(move || lock(&dir.join("identity.lock"), true)).await?;
        let dir = self.dir.clone();
        let kept = blocking(move || SiteIdentity::load(&dir))
            .await?
            .filter(|kept| matches!(kept.holder(), Peer::Publisher(_)));
        let of_other_hub = |kept: &SiteIdentity| {
            self.token
                .as_ref()
                .is_some_and(|token| *token.ca_hash() != fingerprint(kept.ca_der()))
        };
        if let Some(kept) = kept.filter(|kept| !anew && !of_other_hub(kept)) {
            return Ok(kept);
        }
        let Some(token) = self.token.take() else {
            return Err(no_publisher(&self.hub, &self.dir));
        };
        let joined = transport::join(
            &self.hub,
            &token,
            &Claim::Publisher,
            &self.line,
            CertificateRequest::kept(&self.dir)?,
        )
        .await?;
        joined.save(&self.dir)?;
        Ok(joined)
    }

    /// Renews an old certificate, unless another publish of this machine has just done it.
    async fn renew(&self, identity: &SiteIdentity, link: &Link) -> Result<(), Fault> {
        let dir = self.dir.clone();
        let _turn = blocking(move || lock(&dir.join("identity.lock"), true)).await?;
        let dir = self.dir.clone();
        let stored = blocking(move || SiteIdentity::load(&dir)).await?;
        if stored.is_some_and(|stored| stored.cert_der() != identity.cert_der()) {
            return Ok(());
        }
        let request = identity.make_renewal_request()?;
        let question = AskHub::Renew {
            request: renewal(request.csr_der())?,
        };
        let answer: String = wire::ask(link, &question).await?;
        let cert = hex::decode(answer)
            .map_err(|_| Fault::integrity("the hub sent a malformed certificate"))?;
        let renewed = request.complete(&cert, identity.ca_der())?;
        let dir = self.dir.clone();
        blocking(move || renewed.save(&dir)).await
    }

    /// Announces the artifact and answers the hub's fetches, until the hub has everything. A hub
    /// that is offline or has no room is waited for.
    async fn offer(
        &mut self,
        question: &AskHub,
        origin: &InPlaceReader,
        progress: &JobProgress,
    ) -> Result<Published, Fault> {
        let giving = progress.what();
        let (mut redial, mut away_since, mut full_since) =
            (Redial::default(), Instant::now(), None);
        loop {
            let tried = async {
                let link = self.line().await?;
                let (before, begun) = (link.bytes(), Instant::now());
                let answer = tokio::select! {
                    answer = wire::ask_to_move(&link, question) => answer,
                    () = serve(&link, origin) => Err(Fault::unreachable("the connection to the hub ended")),
                    () = watch(&link, progress) => Err(Fault::internal("the progress display ended")),
                };
                let sent = link.bytes().0 - before.0;
                if answer.is_err() {
                    link.close("replaced by a new connection");
                }
                Ok::<_, Fault>((answer, sent, begun.elapsed()))
            };
            let fault = match tried.await {
                Ok((Ok(published), ..)) => return Ok(published),
                Ok((Err(fault), sent, took)) => {
                    // A hub that accepted data, or was connected for a long time, is available. A
                    // hub that only accepts the connection is not: it may refuse for ever.
                    if sent > MOVED_BYTES || took > SILENCE_MAX {
                        (redial, away_since) = (Redial::default(), Instant::now());
                    }
                    if sent > KEPT_BYTES {
                        full_since = None;
                    }
                    fault
                }
                // The local disk: it is not waited for.
                Err(fault) if fault.code == Code::NoSpace => return Err(fault),
                Err(fault) => fault,
            };
            if fault.code == Code::NotAllowed && self.token.is_some() {
                // The hub does not know this publisher any more; the token enrols it again.
                self.hang_up().await;
                self.identity(true).await?;
                continue;
            }
            let since = match fault.code {
                Code::Unreachable => away_since,
                Code::NoSpace => *full_since.get_or_insert_with(Instant::now),
                _ => return Err(fault),
            };
            if since.elapsed() > HUB_AWAY_MAX {
                return Err(fault);
            }
            if fault.code == Code::NoSpace {
                away_since = Instant::now();
                progress.doing("waiting for room at the hub");
                tracing::warn!(error = %fault, "the hub has no room; it is asked again, and the publish resumes");
            } else {
                tracing::warn!(error = %fault, "the connection broke; it is opened again, and the publish resumes");
            }
            tokio::time::sleep(redial.pause()).await;
            progress.doing(giving.clone());
        }
    }
}

/// If more than this was sent, it was not only a handshake and a question.
const MOVED_BYTES: u64 = 1 << 20;
/// If more than this was sent, the hub stored a part, because at most half of this is in flight. A
/// hub with a full disk may have received less.
const KEPT_BYTES: u64 = 2 * FETCH_IN_FLIGHT_MAX as u64 * FETCH_BATCH_BYTES;

/// Answers the hub's requests.
async fn serve(link: &Link, origin: &InPlaceReader) {
    let streams = Arc::new(Semaphore::new(FETCH_STREAMS_MAX));
    let Some(hub) = link.peer().cloned() else {
        return;
    };
    // Dropped with this future, they end with it.
    let mut tasks = JoinSet::new();
    while let Some((send, mut recv)) = link.accept().await {
        let Ok(turn) = streams.clone().acquire_owned().await else {
            return;
        };
        while tasks.try_join_next().is_some() {}
        let (link, origin, hub) = (link.clone(), origin.clone(), hub.clone());
        tasks.spawn(async move {
            let _turn = turn;
            let mut kind = [0];
            if matches!(
                timeout(SILENCE_MAX, recv.read_exact(&mut kind)).await,
                Ok(Ok(()))
            ) && kind[0] == FETCH
            {
                fetch::serve(send, recv, &link, &hub, &origin).await;
            }
        });
    }
}

/// Reports the sent bytes.
async fn watch(link: &Link, progress: &JobProgress) {
    let before = link.bytes().0;
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        progress
            .bytes
            .store(link.bytes().0 - before, Ordering::Relaxed);
    }
}

/// A work folder that no other process uses. Removed when it is dropped.
struct Work {
    folder: PathBuf,
    _lock: File,
}

impl Work {
    fn take(dir: &Path) -> Result<Self, Fault> {
        let all = dir.join("work");
        durable::create_dir_all(&all)?;
        for number in 0..PUBLISHES_AT_ONCE_MAX {
            let Ok(lock) = lock(&all.join(format!("{number}.lock")), false) else {
                continue;
            };
            let folder = all.join(number.to_string());
            durable::remove_all(&folder)?;
            durable::create_dir_all(&folder)?;
            return Ok(Self {
                folder,
                _lock: lock,
            });
        }
        Err(Fault::conflict(format!(
            "{PUBLISHES_AT_ONCE_MAX} publishes run from {} already",
            dir.display()
        ))
        .with_next("wait for one of them, or name another folder by --state"))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // The next publish empties it.
        let _ = durable::remove_all(&self.folder);
    }
}

/// Locks a file, for as long as it is open.
fn lock(path: &Path, wait: bool) -> Result<File, Fault> {
    use rustix::fs::FlockOperation::{LockExclusive, NonBlockingLockExclusive};
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .at(path.display())?;
    let how = if wait {
        LockExclusive
    } else {
        NonBlockingLockExclusive
    };
    rustix::fs::flock(&file, how)
        .map_err(std::io::Error::from)
        .at(format_args!("lock {}", path.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests;
