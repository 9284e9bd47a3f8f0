//! The configuration: one TOML file, unknown keys refused with their line, units required, secrets by file.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use crate::names::SiteName;

/// Which daemon this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The central one.
    Hub,
    /// One of many.
    Site,
}

/// The whole configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `hub` or `site`.
    pub role: Role,
    /// This daemon's name; a site's is what its certificate says.
    pub name: SiteName,
    /// State, identity, and at the hub the packs.
    pub data_dir: PathBuf,
    /// Where to listen.
    #[serde(default)]
    pub listen: Listen,
    /// The hub (sites only).
    pub hub: Option<Hub>,
    /// Where artifacts land (sites only).
    #[serde(default)]
    pub sink: Sinks,
    /// The line.
    #[serde(default)]
    pub line: Line,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
}

/// `[listen]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// The HTTP API.
    pub api: SocketAddr,
    /// The line (hub only): UDP, and TCP for the fallback.
    pub quic: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        Self { api: SocketAddr::from(([127, 0, 0, 1], 7480)), quic: SocketAddr::from(([0, 0, 0, 0], 7443)) }
    }
}

/// `[hub]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hub {
    /// `HOST:PORT`.
    pub address: String,
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

/// `[sink.files]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesSink {
    /// The folder on the NAS.
    pub root: PathBuf,
}

/// `[sink.labels]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelsSink {
    /// `postgres://user@host/db` or `sqlite:///path`.
    pub url: String,
    /// A file that holds the password.
    pub password_file: Option<PathBuf>,
}

/// `[sink.images]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagesSink {
    /// `https://host/project`, `http://host:port/project`, or `oci-layout:/path`.
    pub url: String,
    /// The registry user.
    pub username: Option<String>,
    /// A file that holds the password.
    pub password_file: Option<PathBuf>,
    /// A file of PEM certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether a missing Harbor project may be made.
    #[serde(default)]
    pub create_project: bool,
}

/// Which congestion control a line uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// By the round trip: CUBIC below 5 ms, BBR above.
    #[default]
    Auto,
    /// BBR.
    Bbr,
    /// CUBIC.
    Cubic,
}

/// `[line]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Line {
    /// Congestion control.
    pub congestion: Congestion,
    /// `auto` (QUIC, TCP where UDP is blocked), `quic` or `tcp`.
    pub transport: Transport,
}

/// Which transport a site dials with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// QUIC, and TCP where UDP is blocked.
    #[default]
    Auto,
    /// QUIC only.
    Quic,
    /// TCP only.
    Tcp,
}

/// `[limits]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The bytes in flight that all transfers share (`256MiB`).
    #[serde(deserialize_with = "size")]
    pub memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: crate::limits::MEMORY_BUDGET_BYTES }
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
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit.trim()).map(|(_, f)| *f);
    match (number.parse::<u64>(), factor) {
        (Ok(n), Some(f)) => n.checked_mul(f).ok_or_else(|| format!("{text:?} is too large")),
        _ => Err(format!("{text:?} is not a size: write a whole number with a unit, for example 20MiB")),
    }
}

fn size<'de, D: serde::Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    parse_size(&String::deserialize(d)?).map_err(serde::de::Error::custom)
}
