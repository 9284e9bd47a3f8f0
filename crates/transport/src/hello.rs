//! The few messages of the line itself: the hub's welcome, the join request and its answer. JSON,
//! one a stream, up to its end.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{RecvHalf, SendHalf};
use base::fault::{Code, Fault};
use base::limits::CONNECTION_HELLO_BYTES_MAX;
use base::names::SiteName;
use base::text;

/// What the hub sends first on a line it accepts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) hub: SiteName,
    /// The hub's clock, in milliseconds since 1970.
    pub(super) time_ms: u64,
}

/// What a joining site sends.
#[derive(Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) token_id: String,
    /// Base64 (url-safe, no padding), 32 bytes.
    pub(super) secret: String,
    /// The name in the site's config; a publisher has none.
    pub(super) site: Option<SiteName>,
    /// Base64 (url-safe, no padding): the certificate request, DER.
    pub(super) csr: String,
}

/// What it gets: one of the two.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// Base64 (url-safe, no padding): the site's certificate, DER.
    Certificate(String),
    /// Why not.
    Refused(Fault),
}

impl Answer {
    /// What a stranger may know of a fault: all of a refusal, nothing of the hub's inner troubles.
    pub(super) fn refused(fault: Fault) -> Self {
        match fault.code {
            Code::NotAllowed | Code::NotFound | Code::Conflict | Code::Usage => {
                Answer::Refused(fault)
            }
            _ => Answer::Refused(
                Fault::unreachable("the hub could not check the token now")
                    .with_next("read the hub's log, then join again with this token"),
            ),
        }
    }
}

pub(super) fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(super) fn decode(text: &str) -> Result<Vec<u8>, Fault> {
    URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|e| Fault::integrity(format!("a message of the line holds no base64: {e}")))
}

/// Sends the only message of a stream.
pub(super) async fn send(stream: &mut SendHalf, message: &impl Serialize) -> Result<(), Fault> {
    let bytes = serde_json::to_vec(message)
        .map_err(|e| Fault::internal(format!("write a message of the line: {e}")))?;
    stream.write_all(&bytes).await?;
    stream.finish()
}

/// Reads the only message of a stream.
pub(super) async fn receive<T: DeserializeOwned>(stream: &mut RecvHalf) -> Result<T, Fault> {
    let bytes = stream.read_to_end(CONNECTION_HELLO_BYTES_MAX).await?;
    text::parse_json(&bytes).map_err(|why| {
        Fault::integrity(format!("a message of the line is not understood: {why}"))
            .with_next("make sure that both ends run the same version")
    })
}
