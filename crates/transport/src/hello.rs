//! The first messages of a connection: the welcome of the hub, the join request and its answer.
//!
//! Each is the complete content of one stream, as JSON of at most [`CONNECTION_HELLO_BYTES_MAX`]
//! bytes.
//!
//! ```text
//! packhorse/1        hub → site   {"hub":NAME,"time_ms":N}, and where it applies "manifest_format":N, "renew_only":true
//! packhorse-join/1   site → hub   {"token_id":ID,"secret":BASE64,"site":NAME or null,"csr":BASE64}
//!                    hub → site   {"certificate":BASE64} or {"refused":FAULT}
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{RecvHalf, SendHalf};
use crate::identity::{key_hash, read_csr};
use base::fault::{Code, Fault};
use base::limits::CONNECTION_HELLO_BYTES_MAX;
use base::names::SiteName;
use base::text;

/// The first message of the hub on a connection that it accepts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) hub: SiteName,
    /// The clock of the hub, in milliseconds since 1970.
    pub(super) time_ms: u64,
    /// The newest format of manifests that the hub and all its sites read. A hub of an earlier
    /// version does not send it.
    #[serde(default = "first_format", skip_serializing_if = "is_first_format")]
    pub(super) manifest_format: u32,
    /// The certificate of the peer is expired: over this connection it may only renew it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) renew_only: bool,
}

fn first_format() -> u32 {
    1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes the field by reference"
)]
fn is_first_format(format: &u32) -> bool {
    *format == first_format()
}

/// The request of a joining site or publisher.
#[derive(Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) token_id: String,
    /// Base64 (url-safe, no padding), 32 bytes.
    pub(super) secret: String,
    /// The name in the configuration of the site; a publisher has none.
    pub(super) site: Option<SiteName>,
    /// Base64 (url-safe, no padding): the certificate request, DER.
    pub(super) csr: String,
}

/// A parsed join request.
pub(super) struct Asked {
    pub(super) token_id: String,
    pub(super) secret: [u8; 32],
    pub(super) site: Option<SiteName>,
    /// The certificate request, DER.
    pub(super) csr: Vec<u8>,
    /// The hash of the key in the request.
    pub(super) key_hash: [u8; 32],
}

impl Ask {
    /// Parses the fields.
    pub(super) fn read(self) -> Result<Asked, Fault> {
        let csr = decode(&self.csr)?;
        let key_hash = key_hash(&read_csr(&csr)?);
        let secret = <[u8; 32]>::try_from(decode(&self.secret)?)
            .map_err(|_| Fault::integrity("the token's secret is not 32 bytes"))?;
        Ok(Asked {
            token_id: self.token_id,
            secret,
            site: self.site,
            csr,
            key_hash,
        })
    }
}

/// The answer to a join request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// Base64 (url-safe, no padding): the new certificate, DER.
    Certificate(String),
    /// The reason for a rejection.
    Refused(Fault),
}

impl Answer {
    /// The part of a fault that an unauthenticated peer may see: a rejection completely, but no
    /// internal error of the hub.
    pub(super) fn refused(fault: Fault) -> Self {
        match fault.code {
            Code::NotAllowed | Code::NotFound | Code::Conflict | Code::Usage => {
                Answer::Refused(fault)
            }
            _ => Answer::Refused(
                Fault::unreachable("the hub cannot check the token at the moment")
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
        .map_err(|e| Fault::integrity(format!("a message of the connection holds no base64: {e}")))
}

/// Sends the only message of a stream.
pub(super) async fn send(stream: &mut SendHalf, message: &impl Serialize) -> Result<(), Fault> {
    let bytes = serde_json::to_vec(message)
        .map_err(|e| Fault::internal(format!("write a message of the connection: {e}")))?;
    stream.write_all(&bytes).await?;
    stream.finish()
}

/// Reads the only message of a stream.
pub(super) async fn receive<T: DeserializeOwned>(stream: &mut RecvHalf) -> Result<T, Fault> {
    parse(&stream.read_to_end(CONNECTION_HELLO_BYTES_MAX).await?)
}

/// Parses a message.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    text::parse_json(bytes).map_err(|why| {
        Fault::integrity(format!(
            "a message of the connection is not understood: {why}"
        ))
        .with_next("make sure that both ends run the same version")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These bytes are the message, and the message is these bytes.
    fn bytes<T: Serialize + DeserializeOwned>(text: &str) {
        let message: T = parse(text.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
    }

    #[test]
    fn the_bytes_of_each_message() {
        bytes::<Welcome>(r#"{"hub":"central","time_ms":5}"#);
        bytes::<Welcome>(r#"{"hub":"central","time_ms":5,"manifest_format":2}"#);
        bytes::<Welcome>(r#"{"hub":"central","time_ms":5,"renew_only":true}"#);
        bytes::<Ask>(r#"{"token_id":"abcdefghij","secret":"AAEC","site":"chengdu","csr":"MIHH"}"#);
        bytes::<Ask>(r#"{"token_id":"abcdefghij","secret":"AAEC","site":null,"csr":"MIHH"}"#);
        bytes::<Answer>(r#"{"certificate":"MIHH"}"#);
        bytes::<Answer>(
            r#"{"refused":{"code":"not_allowed","reason":"sink_denied","retry":"never","message":"m","next":"n"}}"#,
        );
    }
}
