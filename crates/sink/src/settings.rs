//! The settings of the sinks, from `[sink.*]` of the configuration.

use std::path::PathBuf;

use serde::Deserialize;

/// `[sink.files]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesSink {
    /// The directory on the NAS.
    pub root: PathBuf,
}

/// `[sink.labels]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelsSink {
    /// `postgres://user@host/db` or `sqlite:///path`.
    pub url: String,
    /// The path of a file with the password.
    pub password_file: Option<PathBuf>,
}

/// `[sink.images]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagesSink {
    /// `https://host/project`, `http://host:port/project`, or `oci-layout:/path`.
    pub url: String,
    pub username: Option<String>,
    /// The path of a file with the password.
    pub password_file: Option<PathBuf>,
    /// The path of a file with PEM certificates that are trusted in addition to those of the
    /// system.
    pub ca_file: Option<PathBuf>,
    /// Hosts other than the registry to which the password may be sent, if the registry names them
    /// as its token service.
    #[serde(default)]
    pub realm_hosts: Vec<String>,
    /// Whether any certificate of the registry is accepted.
    #[serde(default)]
    pub insecure: bool,
    /// Whether a missing Harbor project is created.
    #[serde(default)]
    pub create_project: bool,
}
