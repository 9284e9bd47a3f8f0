//! How a registry is accessed, and where a user changes that.

use std::path::PathBuf;

use crate::{Credentials, Origin, Registry};
use base::fault::Fault;

/// How a registry is accessed.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub credentials: Option<Credentials>,
    /// A file with PEM certificates that are trusted in addition to those of the system: of
    /// authorities, or the registry's own.
    pub ca_file: Option<PathBuf>,
    /// Accepts any certificate; [`Registry::of_source`] also accepts a registry without TLS.
    pub insecure: bool,
    /// Where a user sets these values.
    pub settings: Settings,
}

impl From<Option<Credentials>> for Access {
    fn from(credentials: Option<Credentials>) -> Self {
        Self {
            credentials,
            ..Self::default()
        }
    }
}

/// Where a user sets how a registry is accessed. Advice in errors names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Settings {
    /// `[sink.images]` of a site.
    #[default]
    Sink,
    /// `[registry."HOST"]` of a daemon that reads an image.
    Daemon,
    /// The options of a command that reads an image itself.
    Command,
}

impl Settings {
    /// Advice for a certificate that is not trusted.
    pub(crate) fn untrusted(self, host: &str) -> String {
        let of =
            "the certificate of the authority that signed it, or to the registry's own certificate";
        match self {
            Self::Sink => format!("set ca_file in [sink.images] to {of}"),
            Self::Daemon => format!(
                "set ca_file in [registry.\"{host}\"] of the daemon's configuration to {of}, and restart the daemon"
            ),
            Self::Command => format!("set --ca-file to {of}"),
        }
    }

    /// Advice for a registry without TLS.
    pub(crate) fn without_tls(self) -> &'static str {
        match self {
            Self::Sink => "if the registry has no TLS, use http:// in sink.images.url",
            Self::Daemon | Self::Command => {
                "if the registry has no TLS, write the source with http:// (http://HOST/REPOSITORY:TAG)"
            }
        }
    }

    /// Advice for credentials that are missing or rejected; `are_set`: the registry got some.
    pub(crate) fn credentials(self, host: &str, are_set: bool) -> String {
        match self {
            Self::Daemon if are_set => format!(
                "check the repository, and that the user of [registry.\"{host}\"] in the daemon's configuration, or of 'docker login {host}', may pull it"
            ),
            Self::Command if are_set => format!(
                "check the repository, and that the user of --username, or of 'docker login {host}', may pull it"
            ),
            Self::Sink => "check username and password_file in [sink.images]".to_owned(),
            Self::Daemon => format!(
                "check the repository, and set username and password_file in [registry.\"{host}\"] of the daemon's configuration, or run 'docker login {host}' as the user of the daemon"
            ),
            Self::Command => format!(
                "check the repository, and give --username and --password-file, or run 'docker login {host}'"
            ),
        }
    }

    /// Advice for a token service at another host.
    pub(crate) fn realm_host(self, host: &str, realm: &str) -> String {
        match self {
            Self::Sink => format!("add \"{realm}\" to realm_hosts in [sink.images]"),
            Self::Daemon => format!(
                "add \"{realm}\" to realm_hosts in [registry.\"{host}\"] of the daemon's configuration, and restart the daemon"
            ),
            Self::Command => format!("give --realm-host {realm}"),
        }
    }

    /// Where the address of the registry is written.
    pub(crate) fn where_the_address_is(self) -> &'static str {
        match self {
            Self::Sink => "in sink.images.url",
            Self::Daemon | Self::Command => "in the source",
        }
    }
}

impl Registry {
    /// A client for a registry that an image is read from. With `insecure`, TLS is not used if the
    /// registry has none and `origin` does not require it.
    pub async fn of_source(origin: Origin, access: Access) -> Result<Self, Fault> {
        let registry = Self::open(origin.clone(), access.clone())?;
        if !access.insecure || !origin.https {
            return Ok(registry);
        }
        // An answer of any kind shows that the registry uses TLS.
        if let Err(crate::Error::Fault(_)) = registry.ping().await {
            let plain = Origin {
                https: false,
                ..origin
            };
            let plain = Self::open(plain, access)?;
            if !matches!(plain.ping().await, Err(crate::Error::Fault(_))) {
                return Ok(plain);
            }
        }
        Ok(registry)
    }
}
