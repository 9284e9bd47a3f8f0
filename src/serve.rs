//! The daemon: builds its components from the configuration, serves, and stops cleanly.

use std::fs::File;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::{self, AccessTokens, ApiToken, Backend, LocalSocket, USE_STORE_EVERY};
use crate::config::{Config, Role};
use crate::hub::Hub;
use crate::log_filter;
use crate::site::Site;
use base::blocking::blocking;
use base::fault::{Code, Fault, IoContext};
use base::limits::{DRAIN_MAX, STATE_RETRY_EVERY};
use base::workers::{Pace, Workers};
use base::{durable, open_files, private};
use content::store::{Rebuilt, rebuild_index as rebuild_index_of};
use transport::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity};

/// Runs a daemon until SIGTERM or SIGINT, or, if requested, until standard input ends. SIGHUP makes
/// it read again what can change while it runs.
pub async fn run(config: Config, until_stdin_ends: bool) -> Result<(), Fault> {
    let stop = CancellationToken::new();
    let token = stop.clone();
    let mut terminate = signal(SignalKind::terminate()).at("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).at("listen for SIGINT")?;
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tracing::info!("stopping");
        token.cancel();
    });
    if until_stdin_ends {
        let token = stop.clone();
        // Its own thread: it may hang in the read when the daemon stops for another reason, and
        // delays nothing.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            tracing::info!("standard input ended, stopping");
            token.cancel();
        });
    }
    let hangups = signal(SignalKind::hangup()).at("listen for SIGHUP")?;
    run_until(config, stop, hangups).await
}

/// What is read again at each SIGHUP.
struct Reload {
    hangups: tokio::sync::Mutex<Signal>,
    token: ApiToken,
    config: Config,
    /// Counts the hangups, for what a role reads again.
    count: watch::Sender<u64>,
}

impl Reload {
    /// Reads the API token and the log filter again at each SIGHUP.
    async fn keep(&self) {
        while self.hangups.lock().await.recv().await.is_some() {
            let (token, data_dir) = (self.token.clone(), self.config.data_dir.clone());
            match blocking(move || token.reload(&data_dir)).await {
                Ok(changed) => tracing::info!(changed, "SIGHUP: the API token was read again"),
                Err(fault) => {
                    tracing::error!(error = %fault, "SIGHUP: the API token cannot be read; the old one is kept");
                }
            }
            let file = self.config.file.clone();
            let filter = blocking(move || match file {
                Some(file) => {
                    let filter = crate::config::read(&file)?.log.filter;
                    log_filter::set_configured(filter.as_deref())
                }
                None => Ok(false),
            });
            match filter.await {
                Ok(used) => tracing::info!(used, "SIGHUP: the log filter was read again"),
                Err(fault) => {
                    tracing::error!(error = %fault, "SIGHUP: the configuration cannot be read; the log filter stays as it was");
                }
            }
            self.count.send_modify(|count| *count += 1);
        }
    }

    /// Starts the worker for it.
    fn start_worker(self: &Arc<Self>, workers: &Workers) {
        workers.start(
            "reload",
            Pace::Continuous,
            self,
            |reload, worker| async move {
                tokio::select! {
                    () = reload.keep() => {}
                    () = worker.stop().cancelled() => {}
                }
                Ok(())
            },
        );
    }
}

/// Starts the worker that reads the certificate of a site again at each SIGHUP.
fn start_certificate_worker(site: &Site, reloads: watch::Receiver<u64>) {
    let of = (site.clone(), reloads);
    site.workers().start(
        "reload-certificate",
        Pace::Continuous,
        &of,
        |(site, mut reloads), worker| async move {
            loop {
                tokio::select! {
                    changed = reloads.changed() => if changed.is_err() { break },
                    () = worker.stop().cancelled() => break,
                }
                match site.reload_certificate().await {
                    Ok(changed) => {
                        tracing::info!(changed, "SIGHUP: the certificate was read again");
                    }
                    Err(fault) => {
                        tracing::error!(error = %fault, "SIGHUP: the certificate cannot be read; the old one is kept");
                    }
                }
            }
            Ok(())
        },
    );
}

/// Runs a daemon until `stop`. Unfinished work is recorded and resumes at the next start.
async fn run_until(config: Config, stop: CancellationToken, hangups: Signal) -> Result<(), Fault> {
    open_files::raise();
    durable::create_dir_all(&config.data_dir)?;
    let data_dir = config.data_dir.clone();
    private::tighten(&data_dir);
    let _lock = Lock::take(&config.data_dir)?;
    let token = ApiToken::open_or_create(&config.data_dir)?;
    log_filter::set_configured(config.log.filter.as_deref())?;
    let (count, reloaded) = watch::channel(0);
    let reload = Arc::new(Reload {
        hangups: tokio::sync::Mutex::new(hangups),
        token: token.clone(),
        config: config.clone(),
        count,
    });
    let listener = TcpListener::bind(config.listen.api).await.map_err(|e| {
        Fault::config(format!(
            "cannot listen on {} for the API: {e}",
            config.listen.api
        ))
        .with_next("choose another [listen] api, or stop what listens there")
    })?;
    if !config.listen.is_api_local() {
        tracing::warn!(api = %config.listen.api, "{}", crate::config::API_WITHOUT_TLS);
    }
    // Without the socket the command line uses TCP: some filesystems support no sockets.
    let local = LocalSocket::listen(&config.data_dir)
        .inspect_err(|fault| tracing::warn!(error = %fault, "no local socket for the API"))
        .ok();
    let api = Api {
        listener,
        local,
        token,
    };
    match config.role {
        Role::Hub => {
            let Some(hub) = api
                .while_opening(&stop, || Hub::open(config.clone(), stop.clone()))
                .await?
            else {
                return Ok(());
            };
            private::tighten(&data_dir);
            reload.start_worker(hub.workers());
            let work = hub.clone();
            let work = Box::pin(async move { work.run().await });
            let access = AccessTokens::open(hub.catalogue().clone(), false).await?;
            drive(
                api,
                Arc::new(access),
                Arc::new(hub.clone()),
                hub.workers(),
                work,
                stop,
                hub.stopped(),
            )
            .await
        }
        Role::Site => {
            let Some(site) = api
                .while_opening(&stop, || Site::open(config.clone(), stop.clone()))
                .await?
            else {
                return Ok(());
            };
            private::tighten(&data_dir);
            reload.start_worker(site.workers());
            start_certificate_worker(&site, reloaded);
            let work = site.clone();
            let work = Box::pin(async move { work.run().await });
            let access = AccessTokens::open(site.catalogue().clone(), true).await?;
            drive(
                api,
                Arc::new(access),
                Arc::new(site.clone()),
                site.workers(),
                work,
                stop,
                site.stopped(),
            )
            .await
        }
    }
}

/// Opens a daemon's state. While its disk is full this is repeated, and `waits` receives the
/// reason. `None`: the daemon is asked to stop.
async fn with_room<T, F: Future<Output = Result<T, Fault>>>(
    stop: &CancellationToken,
    pause: Duration,
    waits: &watch::Sender<Option<Fault>>,
    open: impl Fn() -> F,
) -> Result<Option<T>, Fault> {
    let mut logged = None;
    loop {
        let fault = match open().await {
            Err(fault) if fault.code == Code::NoSpace => fault,
            opened => return opened.map(Some),
        };
        if logged.as_ref() != Some(&fault.message) {
            tracing::error!(error = %fault, next = "make room; the daemon starts then", "the daemon waits for room on the disk of its state");
            logged = Some(fault.message.clone());
        }
        let reported = fault
            .context("the daemon has not started yet")
            .with_next("make room on that disk; the daemon then starts automatically");
        waits.send_replace(Some(reported));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}

/// The address of the API, and its token.
struct Api {
    listener: TcpListener,
    local: Option<LocalSocket>,
    token: ApiToken,
}

impl Api {
    /// Opens a daemon's state ([`with_room`]). While that waits for room, the API answers with the
    /// reason.
    async fn while_opening<T, F: Future<Output = Result<T, Fault>>>(
        &self,
        stop: &CancellationToken,
        open: impl Fn() -> F,
    ) -> Result<Option<T>, Fault> {
        let (waits, why) = watch::channel(None);
        tokio::select! {
            opened = with_room(stop, STATE_RETRY_EVERY, &waits, open) => opened,
            () = api::serve_starting(&self.listener, self.local.as_ref(), &self.token, why) => {
                Err(Fault::internal("the API ended while the daemon started"))
            }
        }
    }
}

async fn drive(
    api: Api,
    access: Arc<AccessTokens>,
    backend: Arc<dyn Backend>,
    workers: &Workers,
    work: impl Future<Output = Result<(), Fault>> + Send + 'static,
    stop: CancellationToken,
    stopped: impl Future<Output = ()>,
) -> Result<(), Fault> {
    let of = (Arc::new(api), access.clone(), backend);
    workers.start(
        "api",
        Pace::Continuous,
        &of,
        |(api, access, backend), worker| async move {
            let stop = worker.stop().clone();
            let stopping = async move { stop.cancelled().await };
            let (local, token) = (api.local.as_ref(), api.token.clone());
            api::serve(&api.listener, local, backend, token, access, stopping).await
        },
    );
    drop(of);
    workers.repeat("token-use", USE_STORE_EVERY, &access, |access| async move {
        let stored = access.store_use().await;
        stored.map_err(|fault| fault.context("store the last use of access tokens"))
    });
    let result = work.await;
    if let Err(fault) = access.store_use().await {
        tracing::warn!(error = %fault, "the last use of access tokens is not stored");
    }
    stop.cancel();
    // One deadline for all of it.
    let stopping = futures::future::join(stopped, workers.stopped());
    if tokio::time::timeout(DRAIN_MAX, stopping).await.is_err() {
        tracing::warn!(
            seconds = DRAIN_MAX.as_secs(),
            workers = ?workers.unfinished(),
            "not everything stopped in time; the rest resumes at the next start"
        );
    }
    result
}

/// Enrols a site: verifies the hub with the token, and stores the certificate. Returns its path.
pub async fn join(config: &Config, hub: &str, token: &str) -> Result<PathBuf, Fault> {
    if config.role != Role::Site {
        return Err(Fault::usage("only a site joins; this config is a hub's"));
    }
    durable::create_dir_all(&config.data_dir)?;
    private::tighten(&config.data_dir);
    let _lock = Lock::take(&config.data_dir)?;
    let token: JoinToken = token.parse()?;
    if let Some(there) = SiteIdentity::load(&config.data_dir)? {
        tracing::info!(
            site = there.holder().name(),
            "joining again: the existing certificate will be replaced"
        );
    }
    let request = CertificateRequest::kept(&config.data_dir)?;
    transport::join(
        hub,
        &token,
        &Claim::Site(config.name.clone()),
        &config.line,
        request,
    )
    .await?
    .save(&config.data_dir)?;
    Ok(SiteIdentity::path(&config.data_dir))
}

/// Rebuilds the index of each store of a stopped daemon from its packs.
pub async fn rebuild_index(config: &Config) -> Result<Vec<Rebuilt>, Fault> {
    if !config.data_dir.is_dir() {
        return Err(Fault::not_found(format!(
            "data_dir {} is not there",
            config.data_dir.display()
        ))
        .with_next("check data_dir in the configuration"));
    }
    let _lock = Lock::take(&config.data_dir)?;
    let stores = ["store", "relay"].map(|name| config.data_dir.join(name));
    let rebuilt: Vec<Rebuilt> = blocking(move || {
        stores
            .iter()
            .filter(|store| store.join("packs").is_dir())
            .map(|store| rebuild_index_of(store))
            .collect()
    })
    .await?;
    private::tighten(&config.data_dir);
    Ok(rebuilt)
}

/// Ensures one daemon for one data folder.
struct Lock {
    _file: File,
}

impl Lock {
    fn take(data_dir: &Path) -> Result<Self, Fault> {
        let path = data_dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .at(path.display())?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(_) => Err(Fault::conflict(format!(
                "another packhorse runs on {}",
                data_dir.display()
            ))
            .with_next("stop the other daemon, or give this one a data_dir of its own")),
        }
    }
}

/// The error for a command that this role does not support.
pub(crate) fn wrong_role(what: &str, role: &str) -> Fault {
    Fault {
        code: Code::Usage,
        ..Fault::usage(format!(
            "{what} runs at a {role} only, and this daemon is not a {role}"
        ))
    }
    .with_next(format!("give --api or --config of the {role}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_start_on_a_full_disk_waits_for_room_and_for_nothing_else() {
        let (stop, tries, waits) = (
            CancellationToken::new(),
            AtomicU32::new(0),
            watch::channel(None).0,
        );
        let open = |full: u32, end: Result<&'static str, Fault>| {
            let nth = tries.fetch_add(1, Ordering::SeqCst);
            async move {
                if nth < full {
                    Err(Fault::no_space("the disk is full"))
                } else {
                    end
                }
            }
        };
        let opened = with_room(&stop, Duration::ZERO, &waits, || open(3, Ok("opened")))
            .await
            .unwrap();
        assert_eq!(
            (opened, tries.swap(0, Ordering::SeqCst)),
            (Some("opened"), 4)
        );
        let fault = with_room(&stop, Duration::ZERO, &waits, || {
            open(1, Err(Fault::config("wrong")))
        })
        .await
        .unwrap_err();
        assert_eq!(
            (fault.code, tries.swap(0, Ordering::SeqCst)),
            (Code::Config, 2)
        );
        stop.cancel();
        let hour = Duration::from_secs(3600);
        assert_eq!(
            with_room(&stop, hour, &waits, || open(u32::MAX, Ok("opened")))
                .await
                .unwrap(),
            None,
            "it stops when it is asked to"
        );
    }

    #[tokio::test]
    async fn a_request_during_the_wait_for_disk_space_gets_the_reason_immediately() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let token = ApiToken::open_or_create(dir.path()).unwrap();
        let api = Api {
            listener,
            local: None,
            token: token.clone(),
        };
        let (stop, has_room) = (
            CancellationToken::new(),
            std::sync::atomic::AtomicBool::new(false),
        );
        let open = || async {
            if has_room.load(Ordering::SeqCst) {
                Ok("opened")
            } else {
                Err(Fault::no_space("/data: the disk is full"))
            }
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        let ask = |token: &str| {
            let request = client
                .get(format!("{url}/v1/transfers"))
                .header(api::TOKEN_HEADER, token);
            async move {
                let response = request.send().await.unwrap();
                (response.status().as_u16(), response.text().await.unwrap())
            }
        };
        let asking = async {
            let (status, body) = ask(&token.secret()).await;
            assert!(
                status == 507
                    && body.contains("no_space")
                    && body.contains("/data")
                    && body.contains("make room"),
                "{status} {body}"
            );
            let (status, body) = ask("another").await;
            assert!(status == 503 && !body.contains("/data"), "{status} {body}");
            assert!(
                client
                    .get(format!("{url}/healthz"))
                    .send()
                    .await
                    .unwrap()
                    .status()
                    .is_success()
            );
            has_room.store(true, Ordering::SeqCst);
        };
        let (opened, ()) = tokio::join!(api.while_opening(&stop, open), asking);
        assert_eq!(opened.unwrap(), Some("opened"));
        // The listener is free for the daemon, and an existing connection is closed.
        let accepted = tokio::spawn(async move { api.listener.accept().await.is_ok() });
        tokio::net::TcpStream::connect(url.strip_prefix("http://").unwrap())
            .await
            .unwrap();
        assert!(accepted.await.unwrap());
    }
}
