//! The configuration: one TOML file; unknown keys are refused with their line, units are required,
//! secrets are in files.
//!
//! [`load`] is used at the start of a daemon and by `config check`: it checks the text, the rules
//! of the role, and the surroundings (secret files, the filesystem of `data_dir`). [`read`] stops
//! after the rules: the command line needs only the API's address, and may run as a user who cannot
//! read the daemon's secrets. Nothing here writes, and a [`Config`] never holds a secret, so its
//! `Debug` form may be logged.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use base::cgroup;
use base::durable;
use base::fault::Fault;
use base::limits::{
    CONFIG_BYTES_MAX, MEMORY_BUDGET_BYTES, MEMORY_BUDGET_BYTES_MIN, MEMORY_BUDGET_CGROUP_PART,
    UNPACKED_BYTES_MAX,
};
use base::names::SiteName;
pub use base::secrets::read_secret;
pub use sink::settings::{FilesSink, ImagesSink, LabelsSink};
use source::own::Own;
pub use transport::{Congestion, ConnectionSettings, Transport};
use transport::{Proxy, ProxySettings};

mod rules;

/// The role of this daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The central daemon.
    Hub,
    /// The daemon of one site.
    Site,
}

/// The whole configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its file, if it was read from one.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// `hub` or `site`.
    pub role: Role,
    /// This daemon's name; a site's name is in its certificate.
    pub name: SiteName,
    /// State, identity, and at the hub the packs.
    pub data_dir: PathBuf,
    /// The addresses to listen on.
    #[serde(default)]
    pub listen: Listen,
    /// The hub (sites only).
    pub hub: Option<Hub>,
    /// The destinations of artifacts (sites only).
    #[serde(default)]
    pub sink: Sinks,
    /// Who may receive what sites publish: at a site its own artifacts, at the hub those of all
    /// sites.
    #[serde(default)]
    pub share: Share,
    /// How often delivered files are read again (sites only).
    #[serde(default)]
    pub scrub: Scrub,
    /// The cache for bytes between sites (hub only).
    #[serde(default)]
    pub relay: Relay,
    /// What a publish over the API may read.
    #[serde(default)]
    pub publish: Publish,
    /// How to read registries that images are published from, by `HOST[:PORT]`.
    #[serde(default)]
    pub registry: BTreeMap<String, Registry>,
    /// The connection.
    #[serde(default)]
    pub line: ConnectionSettings,
    /// Limits.
    #[serde(default)]
    pub limits: Limits,
    /// The quotas of sites and publishers (hub only).
    #[serde(default)]
    pub quota: Quotas,
    /// The certificates of sites and publishers (hub only).
    #[serde(default)]
    pub identity: Identity,
    /// The log.
    #[serde(default)]
    pub log: Log,
    /// The trainer (sites only); without it this site trains for no other site.
    pub train: Option<Train>,
}

/// `[publish]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Publish {
    /// The directories below which the paths of a publish, an export and an import must be, for every
    /// token but the API token of the machine.
    pub roots: Vec<PathBuf>,
}

/// `[listen]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// The HTTP API.
    pub api: SocketAddr,
    /// Whether other machines may reach the API, which has no TLS of its own.
    pub api_without_tls: bool,
    /// The transport (hub only): UDP, and TCP for the fallback.
    pub quic: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            api: SocketAddr::from(([127, 0, 0, 1], 7480)),
            api_without_tls: false,
            quic: SocketAddr::from(([0, 0, 0, 0], 7443)),
        }
    }
}

impl Listen {
    /// Whether only this machine can reach the API.
    pub fn is_api_local(&self) -> bool {
        self.api.ip().to_canonical().is_loopback()
    }
}

/// The warning for [`Listen::api_without_tls`].
pub const API_WITHOUT_TLS: &str = "the API is served to other machines without TLS: anyone who can read the network traffic can read the admin token";

/// `[hub]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hub {
    /// `HOST:PORT`, or several in a list, the preferred one first; here separated by commas.
    #[serde(deserialize_with = "addresses")]
    pub address: String,
    /// The proxy of the TCP transport: `http://[USER@]HOST:PORT` or `socks5://[USER@]HOST:PORT`;
    /// `none`: not even the one of the environment.
    pub proxy: Option<String>,
    /// A file that holds the password of the proxy.
    pub proxy_password_file: Option<PathBuf>,
}

impl Hub {
    /// The proxies of the TCP transport: the configured one, or those of the environment.
    fn proxies(&self) -> Result<ProxySettings, String> {
        match self.proxy.as_deref() {
            None => Ok(ProxySettings::from_environment()),
            Some("none") => Ok(ProxySettings::default()),
            Some(url) => {
                let proxy = Proxy::parse(url)?;
                Ok(ProxySettings::of(match &self.proxy_password_file {
                    Some(path) => proxy.with_password_file(path.clone()),
                    None => proxy,
                }))
            }
        }
    }
}

/// One address, or a list of them.
fn addresses<'de, D: serde::Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected \"HOST:PORT\" or a list of them")]
    enum Addresses {
        One(String),
        Several(Vec<String>),
    }
    Ok(match Addresses::deserialize(d)? {
        Addresses::One(address) => address,
        Addresses::Several(list) => list.join(","),
    })
}

/// `[log]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The filter of the log, with the syntax of `RUST_LOG`. `PACKHORSE_LOG` comes before it. SIGHUP
    /// reads it again.
    pub filter: Option<String>,
}

/// `[sink]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sinks {
    /// Datasets, operators, models. Default: `<data_dir>/artifacts`.
    pub files: Option<FilesSink>,
    /// Labels. Default: SQLite at `<data_dir>/labels.db`.
    pub labels: Option<LabelsSink>,
    /// Images. Default: an OCI layout at `<data_dir>/images`.
    pub images: Option<ImagesSink>,
}

/// `[registry."HOST[:PORT]"]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// The registry user.
    pub username: Option<String>,
    /// A file that holds the password.
    pub password_file: Option<PathBuf>,
    /// A file of PEM certificates that are trusted in addition to the system's.
    pub ca_file: Option<PathBuf>,
    /// Additional hosts that may receive the password, if the registry names them as its token
    /// service.
    pub realm_hosts: Vec<String>,
    /// Accepts any certificate, and a registry without TLS.
    pub insecure: bool,
}

/// `[share]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Share {
    /// Sites that may receive it: names or label selectors. Default: all. If the hub and the site
    /// both have a list, both must allow; a site may always receive its own artifacts.
    pub allow: Option<Vec<String>>,
    /// How often a site checks its content that is published in place for changes (sites only).
    #[serde(deserialize_with = "duration")]
    pub check_every: Duration,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            allow: None,
            check_every: Duration::from_secs(300),
        }
    }
}

/// `[scrub]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scrub {
    /// The time within which each delivered file is read again and compared with its hash. For this
    /// long a delivery also uses a file again without hashing it, if nobody touched it. `0s`: neither.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
    /// Bytes per second that are read for this; 0: none. A file that was last read longer ago is then
    /// hashed when a delivery uses it again.
    #[serde(deserialize_with = "size")]
    pub rate: u64,
}

impl Default for Scrub {
    fn default() -> Self {
        Self {
            every: Duration::from_secs(7 * 86_400),
            rate: 16 << 20,
        }
    }
}

/// `[relay]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Relay {
    /// The disk budget for relayed bytes at the hub.
    #[serde(deserialize_with = "size")]
    pub budget: u64,
    /// How long they stay after their last use.
    #[serde(deserialize_with = "duration")]
    pub keep: Duration,
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            budget: 100 << 30,
            keep: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// `[identity]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    /// How long after its end a certificate can still be renewed, and nothing else be done with it.
    /// `0s`: not at all.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(180 * 24 * 3600),
        }
    }
}

/// `[limits]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The memory for bytes in flight of all transfers (`256MiB`).
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    /// The bytes that a layer or an archive of an image may have after decompression, whatever the
    /// ratio (`64GiB`).
    #[serde(deserialize_with = "size")]
    pub image_unpacked: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            image_unpacked: UNPACKED_BYTES_MAX,
            memory: default_memory(cgroup::memory_limit_bytes()),
        }
    }
}

/// The default of [`Limits::memory`] in a control group with this limit.
fn default_memory(limit: Option<u64>) -> u64 {
    limit.map_or(MEMORY_BUDGET_BYTES, |limit| {
        let part = limit / MEMORY_BUDGET_CGROUP_PART;
        part.clamp(MEMORY_BUDGET_BYTES_MIN, MEMORY_BUDGET_BYTES)
    })
}

/// `[quota]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quotas {
    /// Each site.
    pub site: Quota,
    /// Each publisher.
    pub publisher: Quota,
}

/// `[quota.site]` and `[quota.publisher]`: the limits of each of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Bytes of all its artifacts together, from their manifests.
    #[serde(deserialize_with = "size")]
    pub bytes: u64,
    /// Artifacts.
    pub artifacts: u64,
    /// Files, folders and links of one artifact.
    pub entries_per_artifact: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            bytes: 100 << 40,
            artifacts: 100_000,
            entries_per_artifact: 50_000_000,
        }
    }
}

/// `[train]`: either a command or a platform.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// The trainer and its arguments; the path of the run's descriptor is appended.
    pub command: Vec<String>,
    /// A training platform, which receives the descriptor by POST.
    pub url: Option<String>,
    /// Runs that train at once (1 when absent).
    pub at_once: Option<u32>,
    /// The sites that this site trains for: names, or `all`. Empty: none.
    pub allow: Vec<String>,
}

/// Reads `HOST:PORT`, or `[V6]:PORT`, or several, separated by commas.
pub fn parse_host_port(text: &str) -> Result<String, String> {
    match transport::check_addresses(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(fault) => Err(fault.message),
    }
}

/// Reads `20MiB`, `4GB`, `512KiB`, `100B`: a whole number and a unit.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let units: [(&str, u64); 10] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = units
        .iter()
        .find(|(name, _)| *name == unit.trim())
        .map(|(_, f)| *f);
    match (number.parse::<u64>(), factor) {
        (Ok(n), Some(f)) => n
            .checked_mul(f)
            .ok_or_else(|| format!("{text:?} is too large")),
        _ => Err(format!(
            "{text:?} is not a size: write a whole number with a unit, for example 20MiB"
        )),
    }
}

fn size<'de, D: serde::Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    parse_size(&String::deserialize(d)?).map_err(serde::de::Error::custom)
}

fn duration<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(d)?).map_err(serde::de::Error::custom)
}

/// Reads `500ms`, `90s`, `15m`, `24h`, `7d`: a whole number and a unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let units: [(&str, u64); 5] = [
        ("ms", 1),
        ("s", 1_000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
    ];
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = units
        .iter()
        .find(|(name, _)| *name == unit.trim())
        .map(|(_, f)| *f);
    match (number.parse::<u64>(), factor) {
        (Ok(n), Some(f)) => n
            .checked_mul(f)
            .map(Duration::from_millis)
            .ok_or_else(|| format!("{text:?} is too long")),
        _ => Err(format!(
            "{text:?} is not a duration: write a whole number with a unit (ms, s, m, h, d), for example 30s"
        )),
    }
}

impl Config {
    /// The destination of folders: `[sink.files]` or its default.
    pub fn files_root(&self) -> PathBuf {
        self.sink
            .files
            .as_ref()
            .map_or_else(|| self.data_dir.join("artifacts"), |sink| sink.root.clone())
    }

    /// The destination of labels: `[sink.labels]` or its default.
    pub fn labels_sink(&self) -> LabelsSink {
        let default = || LabelsSink {
            url: format!("sqlite://{}", self.data_dir.join("labels.db").display()),
            password_file: None,
        };
        self.sink.labels.clone().unwrap_or_else(default)
    }

    /// The destination of images: `[sink.images]` or its default.
    pub fn images_sink(&self) -> ImagesSink {
        let default = || ImagesSink {
            url: format!("oci-layout:{}", self.data_dir.join("images").display()),
            username: None,
            password_file: None,
            ca_file: None,
            realm_hosts: Vec::new(),
            insecure: false,
            create_project: false,
        };
        self.sink.images.clone().unwrap_or_else(default)
    }

    /// The paths of this daemon that are never a source.
    pub fn own(&self) -> Own {
        let images = self
            .images_sink()
            .url
            .strip_prefix("oci-layout:")
            .map(PathBuf::from);
        let sinks: Vec<PathBuf> = std::iter::once(self.files_root()).chain(images).collect();
        Own::of(&self.data_dir, &sinks, self.secret_files())
    }

    /// The notes of `config check` on a valid configuration that may not do what was intended.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.role == Role::Hub && self.line.transport != Transport::Auto {
            notes.push("[line] transport has no effect at a hub: a hub accepts QUIC and TCP, each site chooses; remove the key".to_owned());
        }
        if self
            .train
            .as_ref()
            .is_some_and(|train| train.allow.is_empty())
        {
            notes.push(
                "[train] allow is empty: no site may train here; list the sites that may"
                    .to_owned(),
            );
        }
        notes
    }

    /// The files that hold a secret of this daemon, or the configuration itself.
    pub fn secret_files(&self) -> impl Iterator<Item = &Path> {
        self.named_files()
            .map(|(_, path)| path)
            .chain(self.file.as_deref())
    }

    /// Every file that this configuration requires, with its key.
    fn named_files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let labels = self
            .sink
            .labels
            .as_ref()
            .and_then(|s| s.password_file.as_deref())
            .map(|p| ("sink.labels.password_file", p));
        let images = self.sink.images.as_ref();
        let password = images
            .and_then(|s| s.password_file.as_deref())
            .map(|p| ("sink.images.password_file", p));
        let ca = images
            .and_then(|s| s.ca_file.as_deref())
            .map(|p| ("sink.images.ca_file", p));
        let registries = self.registry.values().flat_map(|registry| {
            let password = registry
                .password_file
                .as_deref()
                .map(|p| ("registry.password_file", p));
            [
                password,
                registry.ca_file.as_deref().map(|p| ("registry.ca_file", p)),
            ]
        });
        let proxy = self
            .hub
            .as_ref()
            .and_then(|hub| hub.proxy_password_file.as_deref())
            .map(|p| ("hub.proxy_password_file", p));
        [labels, password, ca, proxy]
            .into_iter()
            .chain(registries)
            .flatten()
    }
}

/// Reads a configuration and checks everything that needs no network: the text, the rules of the
/// role, the secret files, the filesystem of `data_dir`.
pub fn load(path: &Path) -> Result<Config, Fault> {
    let config = read(path)?;
    for (key, file) in config.named_files() {
        read_secret(file)
            .map_err(|f| Fault::config(format!("{}: {key}: {}", path.display(), f.message)))?;
    }
    refuse_network_filesystem(&config.data_dir).map_err(|f| f.context(path.display()))?;
    Ok(config)
}

/// Reads a configuration and checks its text and the rules of its role, without its surroundings.
pub fn read(path: &Path) -> Result<Config, Fault> {
    let here = path.display();
    let size = std::fs::metadata(path)
        .map_err(|e| Fault::config(format!("cannot read the configuration {here}: {e}")))?
        .len();
    if size > CONFIG_BYTES_MAX {
        return Err(Fault::config(format!(
            "{here} has {size} bytes; a configuration has at most {CONFIG_BYTES_MAX}"
        )));
    }
    let text = durable::read_regular_text(path, CONFIG_BYTES_MAX);
    let text =
        text.map_err(|e| Fault::config(format!("cannot read the configuration {here}: {e}")))?;
    Ok(Config {
        file: Some(path.to_owned()),
        ..parse(&text, &here.to_string())?
    })
}

/// Reads a configuration from text; `origin` is the file's name for messages.
pub fn parse(text: &str, origin: &str) -> Result<Config, Fault> {
    let mut config: Config = toml::from_str(text).map_err(|e| {
        // serde says "field"; TOML files have keys.
        let message = e
            .message()
            .replace("unknown field", "unknown key")
            .replace("missing field", "missing key");
        Fault::config(format!(
            "{}: {message}",
            position(origin, text, e.span().map_or(0, |s| s.start))
        ))
    })?;
    rules::check(&config, text).map_err(|broken| {
        Fault::config(format!(
            "{}: {}",
            position(origin, text, broken.offset),
            broken.message
        ))
    })?;
    if let Some(hub) = &config.hub {
        config.line.proxy = hub
            .proxies()
            .map_err(|why| Fault::config(format!("{origin}: hub.proxy: {why}")))?;
    }
    Ok(config)
}

/// `file:line:column`, both counted from 1, the column in characters.
fn position(origin: &str, text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    format!("{origin}:{line}:{column}")
}

/// Locks of SQLite and of the daemon do not work on network filesystems, where two daemons could
/// then share a folder.
fn refuse_network_filesystem(data_dir: &Path) -> Result<(), Fault> {
    // The folder may not exist yet: the mount of its parent counts.
    let Some(existing) = data_dir.ancestors().find(|p| p.exists()) else {
        return Ok(());
    };
    let stat = rustix::fs::statfs(existing)
        .map_err(|e| Fault::io(format!("statfs {}", existing.display()), &e.into()))?;
    match network_filesystem(stat.f_type as u64) {
        None => Ok(()),
        Some(kind) => Err(Fault::config(format!(
            "data_dir {} is on a network filesystem ({kind})",
            data_dir.display()
        ))
        .with_next(
            "set data_dir to a folder on a local disk; only [sink.files] root may lie on a NAS",
        )),
    }
}

/// The name of a network filesystem by its statfs magic (linux/magic.h and the filesystems' own
/// headers).
fn network_filesystem(magic: u64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        0x6969 => Some("nfs"),
        0x517b => Some("smb"),
        0xff53_4d42 => Some("cifs"),
        0xfe53_4d42 => Some("smb2"),
        0x5346_414f | 0x6b41_4653 => Some("afs"),
        0x7375_7245 => Some("coda"),
        0x564c => Some("ncp"),
        0x00c3_6400 => Some("ceph"),
        0x0bd0_0bd0 => Some("lustre"),
        0x4750_4653 => Some("gpfs"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
