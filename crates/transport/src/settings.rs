//! The settings of a connection, as `[line]` of the configuration gives them.

use serde::Deserialize;

pub use base::congestion::Congestion;

/// `[line]`: how a connection is made and how it shares its path.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionSettings {
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
