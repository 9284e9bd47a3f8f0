//! The settings of the sinks, as `[sink.*]` of the configuration gives them.

use std::path::PathBuf;

use serde::Deserialize;

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
    /// Other hosts than the registry's own that the password is sent to, where the registry names
    /// them as its token service.
    #[serde(default)]
    pub realm_hosts: Vec<String>,
    /// Whether a missing Harbor project may be made.
    #[serde(default)]
    pub create_project: bool,
}
