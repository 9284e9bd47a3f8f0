//! The settings of a connection, from `[line]` of the configuration.

use serde::Deserialize;

use crate::proxy::ProxySettings;

pub use base::congestion::Congestion;

/// `[line]`: how a connection is opened and how it shares its path.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionSettings {
    pub congestion: Congestion,
    /// `auto` (QUIC, or TCP if UDP is blocked), `quic` or `tcp`.
    pub transport: Transport,
    /// The proxies of the TCP transport, from `[hub]` or the environment.
    #[serde(skip)]
    pub proxy: ProxySettings,
}

/// The transport over which a site connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// QUIC, or TCP if UDP is blocked.
    #[default]
    Auto,
    Quic,
    Tcp,
}
