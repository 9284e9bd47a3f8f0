//! Receipts: a site signs one when it has committed an artifact, and the hub requires it before a
//! transfer is `done`.
//!
//! A receipt has three texts: the statement (a JSON object), the site's signature over exactly
//! these bytes, and the site's certificate, both in base64. It is sent in a report, and stored in
//! the catalogues of site and hub.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use base::clock;
use base::fault::Fault;
use base::limits::{
    RECEIPT_CERTIFICATE_BYTES_MAX, RECEIPT_SIGNATURE_BYTES_MAX, RECEIPT_STATEMENT_BYTES_MAX,
};
use base::names::{ArtifactRef, SiteName, TransferId};
use base::text::{Exact, Lenient, skip_seq};
use content::manifest::Digest;

use crate::transfer::TransferRow;

/// A certificate in base64.
pub type Certificate = Exact<RECEIPT_CERTIFICATE_BYTES_MAX>;
type Signature = Exact<RECEIPT_SIGNATURE_BYTES_MAX>;
type StatementText = Exact<RECEIPT_STATEMENT_BYTES_MAX>;

/// A signed receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Receipt {
    certificate: Certificate,
    signature: Signature,
    statement: StatementText,
}

/// The fields of the statement that the hub compares. The statement also has the location of the
/// artifact and the time.
#[derive(Deserialize)]
struct Statement {
    artifact: ArtifactRef,
    digest: Digest,
    site: SiteName,
    transfer: TransferId,
}

impl Receipt {
    /// The receipt of a transfer that was committed at this time, in milliseconds since 1970. `sign` signs with the key of
    /// `certificate` (DER), the site's.
    pub fn sign(
        row: &TransferRow,
        committed_ms: i64,
        certificate: &[u8],
        sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, Fault>,
    ) -> Result<Self, Fault> {
        let statement = serde_json::json!({
            "artifact": row.artifact, "digest": row.digest, "site": row.site, "transfer": row.id,
            "location": row.body.location, "committed_at": clock::rfc3339_ms(committed_ms),
        })
        .to_string();
        let (signature, certificate) = (
            BASE64.encode(sign(statement.as_bytes())?),
            BASE64.encode(certificate),
        );
        let (certificate, signature, statement) = (
            Exact::new(certificate),
            Exact::new(signature),
            Exact::new(statement),
        );
        match (certificate, signature, statement) {
            (Some(certificate), Some(signature), Some(statement)) => Ok(Self {
                certificate,
                signature,
                statement,
            }),
            _ => Err(Fault::internal(format!(
                "the receipt for transfer {} is too long",
                row.id
            ))),
        }
    }

    /// Checks that a key of this site signed it for this transfer, artifact and content. The
    /// certificate comes with the receipt, because the site may have renewed its certificate
    /// between the commit and the report. `site_of` names the site that a certificate was issued
    /// to; `verify` checks a signature: certificate, signed bytes, signature.
    pub fn check(
        &self,
        row: &TransferRow,
        site_of: impl FnOnce(&[u8]) -> Result<SiteName, Fault>,
        verify: impl FnOnce(&[u8], &[u8], &[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let wrong =
            |why: &str| Fault::integrity(format!("the receipt for transfer {} {why}", row.id));
        let bytes = |text: &str| BASE64.decode(text).map_err(|_| wrong("is malformed"));
        let (certificate, signature) = (
            bytes(self.certificate.as_str())?,
            bytes(self.signature.as_str())?,
        );
        if site_of(&certificate)? != row.site {
            return Err(wrong("is signed by another site"));
        }
        verify(&certificate, self.statement.as_str().as_bytes(), &signature)?;
        let said: Statement =
            serde_json::from_str(self.statement.as_str()).map_err(|_| wrong("is malformed"))?;
        if said.transfer != row.id {
            return Err(wrong("is for another transfer"));
        }
        match said.digest == row.digest && said.artifact == row.artifact && said.site == row.site {
            true => Ok(()),
            false => Err(wrong("is for something else")),
        }
    }

    /// Removes the certificate, which is the same in all receipts of a batch of reports, and returns
    /// it.
    pub(crate) fn take_certificate(&mut self) -> Certificate {
        std::mem::replace(&mut self.certificate, Certificate::empty())
    }

    /// Restores the certificate of a receipt that was sent without it.
    pub(crate) fn restore_certificate(&mut self, certificate: &Certificate) {
        if self.certificate.as_str().is_empty() {
            self.certificate = certificate.clone();
        }
    }

    /// Parses a receipt; `None` for any other value. Other values from a peer take no memory.
    pub fn lenient<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Self>, D::Error> {
        d.deserialize_any(ReceiptVisitor)
    }
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Key {
    Certificate,
    Signature,
    Statement,
    #[serde(other)]
    Other,
}

struct ReceiptVisitor;

impl<'de> Visitor<'de> for ReceiptVisitor {
    type Value = Option<Receipt>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a receipt")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut certificate, mut signature, mut statement) = (None, None, None);
        while let Some(key) = map.next_key()? {
            match key {
                Key::Certificate => certificate = map.next_value::<Lenient<Certificate>>()?.0,
                Key::Signature => signature = map.next_value::<Lenient<Signature>>()?.0,
                Key::Statement => statement = map.next_value::<Lenient<StatementText>>()?.0,
                Key::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(certificate.zip(signature).zip(statement).map(
            |((certificate, signature), statement)| Receipt {
                certificate,
                signature,
                statement,
            },
        ))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        skip_seq(&mut seq)?;
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        Receipt::lenient(d)
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Body;

    #[test]
    fn a_body_keeps_receipts_and_nothing_in_their_place() {
        let body = |receipt: &str| {
            serde_json::from_str::<Body>(&format!("{{\"receipt\":{receipt}}}"))
                .unwrap()
                .receipt
        };
        let good =
            body(r#"{"statement":"s","more":[{}],"signature":"x","certificate":"y"}"#).unwrap();
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(
            text, r#"{"certificate":"y","signature":"x","statement":"s"}"#,
            "as it always was stored and shown"
        );
        assert_eq!(body(&text), Some(good));
        let long = format!(
            r#"{{"statement":"{}","signature":"x","certificate":"y"}}"#,
            "s".repeat(RECEIPT_STATEMENT_BYTES_MAX + 1)
        );
        for other in [
            "null",
            "7",
            "-7",
            "1.5",
            "true",
            "\"s\"",
            "[0,0,[0]]",
            "{}",
            r#"{"statement":1}"#,
            r#"{"statement":"s"}"#,
            &long,
        ] {
            assert_eq!(body(other), None, "{}", &other[..other.len().min(50)]);
        }
    }
}
