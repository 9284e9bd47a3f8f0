//! The choice of a congestion control: a setting of a connection that a site also tells its hub.

use serde::{Deserialize, Serialize};

/// The congestion control of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
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
