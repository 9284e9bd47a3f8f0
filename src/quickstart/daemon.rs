//! The daemons of a quickstart: child processes of this program, on free loopback ports.
//!
//! The standard input of each daemon is one end of a pipe. This process holds the other end. When
//! this process ends, even after a kill without time for cleanup, the pipe is closed and the daemon
//! stops. So no daemon remains.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, select_all};
use serde_json::Value;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::api::ApiToken;
use crate::cli::client::Client;
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::DRAIN_MAX;

/// How long a daemon may take to become ready.
const READY_MAX: Duration = Duration::from_secs(60);
/// How long the daemons of a killed run may take to stop.
const LAST_RUN_GONE_MAX: Duration = Duration::from_secs(15);
/// The number of attempts to start a daemon, other than waiting for a killed run: another program
/// may take a chosen port first.
const START_TRIES_MAX: u32 = 3;

/// The paths and addresses of a daemon.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// Its name.
    pub(super) name: &'static str,
    /// Its folder.
    pub(super) dir: PathBuf,
    /// Its configuration.
    pub(super) config: PathBuf,
    /// Its log.
    pub(super) log: PathBuf,
}

impl Home {
    /// The paths of this daemon in a quickstart's folder.
    pub(super) fn new(folder: &Path, name: &'static str) -> Self {
        let file = |end: &str| folder.join(format!("{name}.{end}"));
        Self {
            name,
            dir: folder.join(name),
            config: file("toml"),
            log: file("log"),
        }
    }

    /// Its `data_dir`.
    pub(super) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

/// All running daemons. They are killed when this is dropped.
#[derive(Default)]
pub(super) struct Daemons(Vec<Daemon>);

struct Daemon {
    home: Home,
    child: Child,
    /// This process's end of the pipe: see the module.
    lifeline: ChildStdin,
}

/// A client and the addresses of a daemon that is ready.
pub(super) struct Ready {
    /// Its API.
    pub(super) client: Arc<Client>,
    /// The address of its API.
    pub(super) api: SocketAddr,
    /// The address of the hub's transport.
    pub(super) line: SocketAddr,
}

impl Daemons {
    /// Starts a daemon. `prepare` receives the addresses for the API and for the hub's transport,
    /// and writes the configuration.
    pub(super) async fn start<F>(
        &mut self,
        home: &Home,
        prepare: impl Fn(SocketAddr, SocketAddr) -> F,
    ) -> Result<Ready, Fault>
    where
        F: Future<Output = Result<(), Fault>>,
    {
        let began = Instant::now();
        let mut tries = 0;
        loop {
            let (api, line) = (free_port()?, free_port()?);
            let outcome = async {
                prepare(api, line).await?;
                Daemon::start(home, api).await
            };
            tries += 1;
            let fault = match outcome.await {
                Ok((daemon, client)) => {
                    self.0.push(daemon);
                    return Ok(Ready {
                        client: Arc::new(client),
                        api,
                        line,
                    });
                }
                Err(fault) => fault,
            };
            // A conflict means that a daemon of a killed run is still draining.
            let again = if fault.code == Code::Conflict {
                began.elapsed() < LAST_RUN_GONE_MAX
            } else {
                tries < START_TRIES_MAX
            };
            if !again {
                return Err(fault);
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until a daemon ends without a request to stop, which is an error.
    pub(super) async fn one_ended(&mut self) -> Fault {
        let waits = self.0.iter_mut().map(|daemon| {
            Box::pin(async {
                let status = daemon.child.wait().await;
                daemon.home.ended(status.ok())
            })
        });
        match waits.collect::<Vec<_>>() {
            none if none.is_empty() => std::future::pending().await,
            waits => select_all(waits).await.0,
        }
    }

    /// Stops all daemons: the sites first, so that the hub has no connections to drain.
    pub(super) async fn stop(mut self) {
        let sites = self.0.split_off(self.0.len().min(1));
        join_all(sites.into_iter().map(Daemon::stop)).await;
        join_all(self.0.into_iter().map(Daemon::stop)).await;
    }
}

impl Daemon {
    /// Starts the process, and waits until it is ready.
    async fn start(home: &Home, api: SocketAddr) -> Result<(Self, Client), Fault> {
        let program = std::env::current_exe().at("find this program")?;
        let log = std::fs::File::create(&home.log).at(home.log.display())?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg("--config")
            .arg(&home.config)
            .arg("--until-stdin-ends");
        for named in ["PACKHORSE_CONFIG", "PACKHORSE_API", "PACKHORSE_TOKEN_FILE"] {
            command.env_remove(named);
        }
        command
            .stdin(Stdio::piped())
            .stdout(log.try_clone().at(home.log.display())?)
            .stderr(log);
        // A separate process group: Ctrl-C reaches only this process, which then stops the daemons
        // in order.
        command.process_group(0).kill_on_drop(true).current_dir("/");
        let mut child = command
            .spawn()
            .at(format_args!("start the daemon {}", home.name))?;
        let Some(lifeline) = child.stdin.take() else {
            return Err(Fault::internal(format!(
                "the daemon {} was started without its pipe",
                home.name
            )));
        };
        let mut daemon = Self {
            home: home.clone(),
            child,
            lifeline,
        };
        let until = Instant::now() + READY_MAX;
        loop {
            if let Some(status) = daemon
                .child
                .try_wait()
                .at(format_args!("check the daemon {}", home.name))?
            {
                return Err(home.ended(Some(status)));
            }
            match client(home, api).await {
                Ok(client) => return Ok((daemon, client)),
                Err(fault) if Instant::now() >= until => {
                    return Err(fault.context(format_args!("{} is not ready", home.name)));
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn stop(mut self) {
        drop(self.lifeline);
        if timeout(DRAIN_MAX * 2, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

impl Home {
    /// The fault for a daemon that ended without a request to stop. Its last logged error is the
    /// reason.
    fn ended(&self, status: Option<ExitStatus>) -> Fault {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let said = |word: &str| {
            log.lines()
                .rev()
                .find_map(|line| line.trim_start().strip_prefix(word))
        };
        let code = status.and_then(|s| s.code());
        let how = status.map_or_else(|| "ended".to_owned(), |s| format!("ended ({s})"));
        let why = said("error: ")
            .map(|why| format!(": {why}"))
            .unwrap_or_default();
        let mut fault = Fault::internal(format!("the daemon {} {how}{why}", self.name)).with_next(
            said("next: ").map_or_else(
                || format!("read its log: {}", self.log.display()),
                str::to_owned,
            ),
        );
        let known = [
            Code::Config,
            Code::NotAllowed,
            Code::Conflict,
            Code::Integrity,
            Code::NoSpace,
            Code::Unreachable,
        ];
        if let Some(known) = known
            .into_iter()
            .find(|known| Some(i32::from(known.exit())) == code)
        {
            fault.code = known;
        }
        fault
    }
}

/// Connects to the daemon, and fails while it is not ready.
async fn client(home: &Home, api: SocketAddr) -> Result<Client, Fault> {
    let client = Client::to_daemon(
        &home.state(),
        api,
        ApiToken::read(&ApiToken::path(&home.state()))?,
    )?;
    client.get::<Value>("/readyz", &()).await?;
    Ok(client)
}

/// A loopback port that is free for both TCP and UDP at this moment.
fn free_port() -> Result<SocketAddr, Fault> {
    for _ in 0..16 {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).at("find a free port")?;
        let address = tcp.local_addr().at("find a free port")?;
        if UdpSocket::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(
        Fault::internal("there is no loopback port that is free for both TCP and UDP")
            .with_next("stop a program that uses loopback ports"),
    )
}

/// Writes a configuration: `lines` in TOML.
pub(super) fn write_config(home: &Home, lines: &str) -> Result<(), Fault> {
    durable::create_dir_all(&home.state())?;
    durable::replace(&home.config, lines.as_bytes())
}
