//! `packhorse` itself: hubs and sites as real processes, and the command line as their client.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;

use super::command::{Output, bound, bound_as, run, wait};
use super::line::Line;
use super::{free_port, register_log, secs, wait_for};

/// The program under test.
pub(crate) const PACKHORSE: &str = env!("CARGO_BIN_EXE_packhorse");

/// Runs the program without a daemon's configuration.
#[track_caller]
pub(crate) fn packhorse(args: &[&str]) -> Output {
    run(clean(&mut bound(PACKHORSE)).args(args), secs(60))
}

/// Removes the environment variables that would affect the program.
fn clean(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PACKHORSE_") {
            command.env_remove(name);
        }
    }
    command
        .env("NO_COLOR", "1")
        .env("SOME_API_KEY", "a secret that a daemon gives to no trainer")
        .env_remove("RUST_LOG")
}

/// The bytes of a transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Bytes {
    pub(crate) total: u64,
    pub(crate) reused: u64,
    pub(crate) resumed: u64,
    pub(crate) received: u64,
    pub(crate) committed: u64,
    pub(crate) wire: u64,
}

/// A transfer as `status -o json` shows it: the fields that scripts rely on.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) id: String,
    pub(crate) artifact: String,
    pub(crate) site: String,
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) next: Option<String>,
    pub(crate) bytes: Bytes,
    pub(crate) attempts: u32,
    pub(crate) location: Option<String>,
    pub(crate) cursor: u64,
}

impl Transfer {
    /// Whether it changes no more without a command.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self.state.as_str(), "done" | "failed" | "cancelled")
    }

    /// Whether the reason of the state is one of these.
    pub(crate) fn has_reason(&self, reasons: &[&str]) -> bool {
        self.reason.as_deref().is_some_and(|r| reasons.contains(&r))
    }

    /// Checks that no byte counter decreased: a kill or a disconnect never reduces a counter. Only
    /// a retry of a transfer that was done or cancelled starts from zero.
    #[track_caller]
    fn check_goes_on_from(&self, was: &Self) {
        let counts = |b: Bytes| [b.reused, b.resumed, b.received, b.committed, b.wire];
        let goes_on = counts(was.bytes)
            .into_iter()
            .zip(counts(self.bytes))
            .all(|(was, now)| now >= was);
        assert!(
            goes_on,
            "the progress of transfer {} decreased: from {was:#?} to {self:#?}",
            self.id
        );
    }
}

/// A daemon: its configuration, its process while it runs, and the command line as its client.
pub(crate) struct Daemon {
    pub(crate) name: String,
    pub(crate) config: PathBuf,
    pub(crate) data_dir: PathBuf,
    pub(crate) api: SocketAddr,
    log: PathBuf,
    program: PathBuf,
    user: Option<u32>,
    child: Option<Child>,
}

impl Daemon {
    fn new(dir: &Path, name: &str, api: SocketAddr, config_text: &str) -> Self {
        let config = dir.join(format!("{name}.toml"));
        std::fs::write(&config, config_text).expect("write a config");
        let log = dir.join(format!("{name}.log"));
        register_log(&log);
        Self {
            name: name.into(),
            config,
            data_dir: dir.join(name),
            api,
            log,
            program: PACKHORSE.into(),
            user: None,
            child: None,
        }
    }

    /// Runs the daemon from now on as this user, from a copy of the program that this user can
    /// execute.
    pub(crate) fn run_as(&mut self, user: u32) {
        let dir = self.config.parent().expect("a config has a folder");
        let program = dir.join("packhorse-copy");
        std::fs::copy(PACKHORSE, &program).expect("copy the program");
        self.program = program;
        self.user = Some(user);
    }

    /// Runs the daemon from now on with this program.
    pub(crate) fn run_program(&mut self, program: &Path) {
        self.program = program.into();
    }

    /// Starts the process and does not wait.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("open the daemon's log");
        let mut command = match self.user {
            Some(user) => bound_as(user, user, &self.program),
            None => bound(&self.program),
        };
        clean(&mut command)
            .arg("serve")
            .arg("--config")
            .arg(&self.config)
            .env("DOCKER_CONFIG", self.docker_config());
        command
            .stdout(log.try_clone().expect("a handle for the log"))
            .stderr(log);
        self.child = Some(command.spawn().expect("start a daemon"));
    }

    /// The folder of `docker login` for this daemon; it does not exist at first.
    pub(crate) fn docker_config(&self) -> PathBuf {
        self.config.with_extension("docker")
    }

    /// Starts the process and waits until it is ready.
    pub(crate) fn start(&mut self) {
        self.spawn();
        self.wait_until("/readyz");
    }

    /// Starts the process and waits until it answers, ready or not.
    pub(crate) fn start_alive(&mut self) {
        self.spawn();
        self.wait_until("/healthz");
    }

    /// Waits until this path of the API answers 200.
    pub(crate) fn wait_until(&mut self, path: &str) {
        let api = self.api;
        let what = format!("{} answers 200 at http://{api}{path}", self.name);
        let child = self.child.as_mut().expect("the daemon was started");
        wait_for(&what, secs(30), || {
            if let Some(status) = child.try_wait().expect("check the daemon") {
                panic!("the daemon ended unexpectedly: {status}");
            }
            (get(api, path)?.0 == 200).then_some(())
        });
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon runs").id()
    }

    /// A line of `/proc/PID/status` that counts kilobytes, in bytes: `VmRSS` is the resident memory
    /// now, `VmHWM` the peak.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("the daemon runs");
        let line = status
            .lines()
            .find(|l| l.starts_with(field))
            .unwrap_or_else(|| panic!("no {field} in /proc"));
        let kilobytes = line
            .split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<u64>().ok());
        kilobytes.expect("/proc counts in numbers") << 10
    }

    /// Continues it after [`Daemon::freeze`].
    pub(crate) fn thaw(&self) {
        let pid = Pid::from_child(self.child.as_ref().expect("the daemon runs"));
        kill_process(pid, Signal::CONT).expect("continue the daemon");
    }

    /// Suspends it until it is killed or continued.
    pub(crate) fn freeze(&self) {
        let pid = Pid::from_child(self.child.as_ref().expect("the daemon runs"));
        kill_process(pid, Signal::STOP).expect("stop the daemon");
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        child.kill().expect("kill the daemon");
        child.wait().expect("wait for the daemon");
    }

    /// Requests it to stop and waits; it must end successfully and within its drain time.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::TERM).expect("signal the daemon");
        match wait(&mut child, secs(20)) {
            Some(status) => assert!(
                status.success(),
                "{} was requested to stop and ended with {status}",
                self.name
            ),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} did not stop within 20 s", self.name);
            }
        }
    }

    /// Whether the process still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| child.try_wait().expect("check the daemon").is_none())
    }

    /// Its log.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Replaces text in its configuration, for the next start.
    pub(crate) fn edit_config(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(&self.config).expect("read a config");
        assert!(
            text.contains(from),
            "{from:?} is not in the config:\n{text}"
        );
        std::fs::write(&self.config, text.replace(from, to)).expect("write a config");
    }

    /// Runs a command against this daemon.
    #[track_caller]
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        self.cli_within(args, secs(120))
    }

    /// The same with another time limit.
    #[track_caller]
    pub(crate) fn cli_within(&self, args: &[&str], limit: Duration) -> Output {
        run(&mut self.command(args), limit)
    }

    /// A command against this daemon, to be run.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = bound(PACKHORSE);
        clean(&mut command)
            .args(args)
            .arg("--config")
            .arg(&self.config);
        command
    }

    /// Runs a command that must succeed, and reads its answer as JSON.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        self.cli(&args).expect(0).json()
    }

    /// Publishes; the answer is `Published`.
    #[track_caller]
    pub(crate) fn publish(&self, source: &Path, reference: &str, more: &[&str]) -> Value {
        let source = source.to_str().expect("paths of fixtures are UTF-8");
        let args: Vec<&str> = ["publish", source, "--as", reference]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        self.json(&args)
    }

    /// Publishes a source that must be refused with this exit code and with these words on standard
    /// error. No artifact may be listed afterwards.
    #[track_caller]
    pub(crate) fn refuses(
        &self,
        source: &Path,
        reference: &str,
        more: &[&str],
        code: i32,
        words: &[&str],
    ) -> Output {
        let source = source.to_str().expect("paths of fixtures are UTF-8");
        let args: Vec<&str> = ["publish", source, "--as", reference]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        let output = self.cli(&args).expect(code).says(words);
        assert_eq!(
            output.out, "",
            "a failed command must print nothing on stdout"
        );
        self.cli(&["show", reference]).expect(5);
        output
    }

    /// Sends a request to the API, with its token. Returns status and body.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        get_with(self.api, path, &self.token_header()).expect("the daemon answers")
    }

    /// The value of one of its metrics.
    #[track_caller]
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let (code, text) = self.get("/metrics");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in the metrics ({code}):\n{text}"))
    }

    /// GETs a list. Returns its number of rows and its cursor.
    pub(crate) fn get_rows(&self, path: &str) -> (usize, u64) {
        let (head, body) =
            get_whole(self.api, path, &self.token_header()).expect("the daemon answers");
        let rows: Vec<Value> = serde_json::from_str(&body)
            .unwrap_or_else(|e| panic!("{path} is not a list: {e}\n{body}"));
        let cursor = head
            .lines()
            .find_map(|line| line.strip_prefix("x-packhorse-cursor: "))
            .expect("a list has a cursor");
        (rows.len(), cursor.parse().expect("a cursor is a number"))
    }

    fn token_header(&self) -> String {
        let token = std::fs::read_to_string(self.data_dir.join("api-token"))
            .expect("the daemon has a token");
        format!("X-Packhorse-Token: {}\r\n", token.trim())
    }

    /// Delivers. Returns the ids of the transfers.
    #[track_caller]
    pub(crate) fn deliver(&self, references: &[&str], to: &str) -> Vec<String> {
        let args: Vec<&str> = ["deliver"]
            .into_iter()
            .chain(references.iter().copied())
            .chain(["--to", to])
            .collect();
        ids(&self.json(&args))
    }

    /// One transfer by its id.
    #[track_caller]
    pub(crate) fn transfer(&self, id: &str) -> Transfer {
        let mut all = self.transfers(&[id]);
        assert_eq!(all.len(), 1, "status of {id} shows one transfer");
        all.remove(0)
    }

    /// The transfers that `status` shows with these arguments.
    #[track_caller]
    pub(crate) fn transfers(&self, args: &[&str]) -> Vec<Transfer> {
        let args: Vec<&str> = ["status"].into_iter().chain(args.iter().copied()).collect();
        let value = self.json(&args);
        serde_json::from_value(value.clone())
            .unwrap_or_else(|e| panic!("status is not a list of transfers: {e}\n{value:#}"))
    }

    /// Waits until `wanted` accepts a transfer, and returns it; panics if it ends in another way,
    /// or if its progress decreases during the wait.
    #[track_caller]
    pub(crate) fn wait_transfer(
        &self,
        id: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Transfer) -> bool,
    ) -> Transfer {
        let mut last = None;
        let deadline = std::time::Instant::now() + limit;
        loop {
            let now = self.transfer(id);
            // A test that retries a transfer does so before the wait: all values seen here belong
            // to one generation.
            if let Some(was) = &last {
                now.check_goes_on_from(was);
            }
            if wanted(&now) {
                return now;
            }
            assert!(
                !now.is_final(),
                "transfer {id} ended without being {what}: {now:#?}"
            );
            last.replace(now);
            assert!(
                std::time::Instant::now() < deadline,
                "transfer {id} is not {what} after {limit:?}: {last:#?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a transfer is done.
    #[track_caller]
    pub(crate) fn wait_done(&self, id: &str, limit: Duration) -> Transfer {
        let done = self.wait_transfer(id, "done", limit, |t| t.state == "done");
        assert_eq!(
            done.reason, None,
            "a completed transfer has no reason: {done:#?}"
        );
        done
    }

    /// Delivers one artifact to one site, and waits until it is done.
    #[track_caller]
    pub(crate) fn deliver_and_wait(&self, reference: &str, to: &str, limit: Duration) -> Transfer {
        let ids = self.deliver(&[reference], to);
        assert_eq!(ids.len(), 1, "one artifact to one site is one transfer");
        self.wait_done(&ids[0], limit)
    }

    /// The references that `artifacts` lists.
    #[track_caller]
    pub(crate) fn artifacts(&self) -> Vec<String> {
        let value = self.json(&["artifacts"]);
        let list = value.as_array().expect("artifacts is a list");
        list.iter()
            .map(|a| {
                a["artifact"]
                    .as_str()
                    .expect("an artifact has a name")
                    .to_owned()
            })
            .collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The ids in an answer of `publish` or `deliver`.
#[track_caller]
pub(crate) fn ids(answer: &Value) -> Vec<String> {
    let list = answer["transfers"]
        .as_array()
        .unwrap_or_else(|| panic!("no list of transfers in {answer}"));
    list.iter()
        .map(|id| id.as_str().expect("an id is text").to_owned())
        .collect()
}

/// A GET without a token: status and body. `None` if nothing listens there.
pub(crate) fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    get_with(address, path, "")
}

fn get_with(address: SocketAddr, path: &str, headers: &str) -> Option<(u16, String)> {
    let (head, body) = get_whole(address, path, headers)?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body))
}

/// Head and body.
fn get_whole(address: SocketAddr, path: &str, headers: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&address, secs(2)).ok()?;
    stream.set_read_timeout(Some(secs(10))).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Connection: close\r\n\r\n"
    )
    .ok()?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.to_owned(), body.to_owned()))
}

/// A hub.
pub(crate) struct Hub {
    daemon: Daemon,
    /// The address for sites.
    pub(crate) quic: SocketAddr,
}

impl Hub {
    /// Writes its configuration, and starts nothing.
    pub(crate) fn new(dir: &Path) -> Self {
        let (api, quic) = (local(free_port()), local(free_port()));
        let data_dir = dir.join("hub");
        let text = format!(
            "role = \"hub\"\nname = \"hub\"\ndata_dir = {}\n[listen]\napi = \"{api}\"\nquic = \"{quic}\"\n",
            quoted(&data_dir)
        );
        Self {
            daemon: Daemon::new(dir, "hub", api, &text),
            quic,
        }
    }

    /// Starts a hub, and waits until it is ready.
    pub(crate) fn start_new(dir: &Path) -> Self {
        let mut hub = Self::new(dir);
        hub.start();
        hub
    }

    /// Creates a join token.
    #[track_caller]
    pub(crate) fn token(&self, site: &str, labels: &[&str]) -> String {
        let mut args = vec!["token", "create", "--site", site];
        for label in labels {
            args.extend(["--label", label]);
        }
        let out = self.cli(&args).expect(0).out;
        let token = out.trim().to_owned();
        assert!(
            !token.is_empty() && !token.contains(char::is_whitespace),
            "token create prints the token alone: {out:?}"
        );
        token
    }

    /// Waits until the hub shows a site as online or offline.
    #[track_caller]
    pub(crate) fn wait_online(&self, site: &str, online: bool, limit: Duration) {
        wait_for(
            &format!(
                "site {site} is {} in sites",
                if online { "online" } else { "offline" }
            ),
            limit,
            || {
                let sites = self.json(&["sites"]);
                let found = sites
                    .as_array()?
                    .iter()
                    .find(|s| s["name"] == site)?
                    .clone();
                (found["online"] == online).then_some(())
            },
        );
    }
}

impl Deref for Hub {
    type Target = Daemon;
    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Hub {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// The settings of a site besides its name.
#[derive(Default)]
pub(crate) struct SiteSpec<'a> {
    /// `K=V`, given to `token create`.
    pub(crate) labels: &'a [&'a str],
    /// The address to which it connects, if not the hub's.
    pub(crate) through: Option<SocketAddr>,
    /// The NAS, if not a folder beside the configuration.
    pub(crate) root: Option<PathBuf>,
    /// The lines of `[sink.labels]`, if not the default.
    pub(crate) labels_sink: Option<String>,
    /// The lines of `[sink.images]`, if not an OCI layout beside the configuration.
    pub(crate) images_sink: Option<String>,
    /// Additional lines at the end.
    pub(crate) more: &'a str,
}

/// A site.
pub(crate) struct Site {
    daemon: Daemon,
    /// The NAS.
    pub(crate) root: PathBuf,
    /// The SQLite file of its labels, unless the spec sets another database.
    pub(crate) labels_db: PathBuf,
    /// The OCI layout of its images, unless the spec sets another sink.
    pub(crate) layout: PathBuf,
    through: SocketAddr,
}

impl Site {
    /// Writes its configuration. It does not run and has not joined.
    pub(crate) fn new(dir: &Path, hub: &Hub, name: &str, spec: &SiteSpec<'_>) -> Self {
        let api = local(free_port());
        let through = spec.through.unwrap_or(hub.quic);
        let root = spec
            .root
            .clone()
            .unwrap_or_else(|| dir.join(format!("{name}-nas")));
        std::fs::create_dir_all(&root).expect("create the NAS");
        let labels_db = dir.join(format!("{name}-labels.db"));
        let layout = dir.join(format!("{name}-images"));
        let labels_sink = spec
            .labels_sink
            .clone()
            .unwrap_or_else(|| format!("url = \"sqlite://{}\"", labels_db.display()));
        let images_sink = spec
            .images_sink
            .clone()
            .unwrap_or_else(|| format!("url = \"oci-layout:{}\"", layout.display()));
        let text = format!(
            "role = \"site\"\nname = \"{name}\"\ndata_dir = {}\n\n[listen]\napi = \"{api}\"\n\n[hub]\naddress = \"{through}\"\n\n\
             [sink.files]\nroot = {}\n\n[sink.labels]\n{labels_sink}\n\n[sink.images]\n{images_sink}\n\n{}\n",
            quoted(&dir.join(name)),
            quoted(&root),
            spec.more,
        );
        Self {
            daemon: Daemon::new(dir, name, api, &text),
            root,
            labels_db,
            layout,
            through,
        }
    }

    /// Enrols it.
    #[track_caller]
    pub(crate) fn join(&self, hub: &Hub, labels: &[&str]) {
        let token = hub.token(&self.name, labels);
        let said = self.join_with(&token).expect(0).out;
        let certificate = self.data_dir.join("identity/site.pem");
        assert!(
            said.starts_with(&format!(
                "site {} joined the hub at {}; ",
                self.name, self.through
            )),
            "{said}"
        );
        assert!(
            said.contains(certificate.to_str().unwrap())
                && certificate.exists()
                && said.lines().count() == 1,
            "{said}"
        );
    }

    /// Tries to enrol it with a token.
    #[track_caller]
    pub(crate) fn join_with(&self, token: &str) -> Output {
        self.cli(&["join", "--hub", &self.through.to_string(), "--token", token])
    }

    /// Enrols and starts a site, and waits until it is ready and connected to the hub.
    pub(crate) fn start_new(dir: &Path, hub: &Hub, name: &str, spec: &SiteSpec<'_>) -> Self {
        let mut site = Self::new(dir, hub, name, spec);
        site.join(hub, spec.labels);
        site.start();
        hub.wait_online(name, true, secs(20));
        site
    }

    /// The same behind its own proxy.
    pub(crate) fn start_behind(dir: &Path, hub: &Hub, name: &str) -> (Line, Self) {
        let line = Line::to(hub.quic);
        let site = Self::start_new(
            dir,
            hub,
            name,
            &SiteSpec {
                through: Some(line.address()),
                ..SiteSpec::default()
            },
        );
        (line, site)
    }

    /// The folder of a version of a file artifact.
    pub(crate) fn folder(&self, reference: &str) -> PathBuf {
        self.root.join(reference.replace(':', "/"))
    }

    /// The content of `CURRENT` of a series (`kind/name`).
    #[track_caller]
    pub(crate) fn current(&self, series: &str) -> String {
        let path = self.root.join(series).join("CURRENT");
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    }

    /// The files in staging and other hidden folders of the NAS. An ended transfer must leave none.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        super::find(&self.root, &|path| {
            let inside = path.strip_prefix(&self.root).expect("found under the root");
            let hidden = inside
                .components()
                .next()
                .is_some_and(|c| c.as_os_str().to_string_lossy().starts_with('.'));
            // The records of the committed versions belong to Packhorse and are kept.
            let note = inside.starts_with(".packhorse/versions")
                || inside.starts_with(".packhorse/sites")
                || inside == Path::new(".packhorse/id");
            hidden && !note && path.metadata().is_ok_and(|m| m.is_file() && m.len() > 0)
        })
    }
}

impl Deref for Site {
    type Target = Daemon;
    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Site {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}
