//! The configured congestion control of a connection, which a site also sends to its hub.

use serde::{Deserialize, Serialize};

/// The congestion control of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// By the round trip time: CUBIC below 5 ms, BBR above.
    #[default]
    Auto,
    Bbr,
    Cubic,
}
