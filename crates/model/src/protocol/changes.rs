//! The messages whose size depends on what changed, not on how many transfers are open: changes of
//! the desired state, and batches of reports. Members with their default value are left out.

use base::names::TransferId;
use base::number;
use serde::ser::{Error as _, SerializeSeq as _};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::control::{Desired, PushedManifest, Report};
use crate::receipt::{Certificate, Receipt};
use crate::run::DesiredRun;
use crate::transfer::Body;

/// What changed of the desired state of a site. Each message of a connection has the next revision;
/// a site that lacks the one before asks for the complete list ([`super::FromSite::List`]).
///
/// A complete list has one or more parts. The first has `begin`, the last has `end`; it takes effect
/// with the last part, which also has the runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// The revision that the site has after this message.
    #[serde(deserialize_with = "number::count")]
    pub revision: u64,
    /// A complete list begins: the site may have any revision.
    #[serde(skip_serializing_if = "is_false")]
    pub begin: bool,
    /// The complete list ends. The hub does not want any other transfer.
    #[serde(skip_serializing_if = "is_false")]
    pub end: bool,
    /// The complete list leaves out transfers: the site gives up none that is missing.
    #[serde(skip_serializing_if = "is_false")]
    pub partial: bool,
    /// Transfers that are new or that changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<Desired>,
    /// Transfers that the hub does not want any more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<TransferId>,
    /// Transfers that exist at the hub and that it cannot read: they continue as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<TransferId>,
    /// All training runs of the site, if one changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runs: Option<Vec<DesiredRun>>,
    /// Manifests of new artifacts, if they are small.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub manifests: Vec<PushedManifest>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Reports that a site sends together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReportBatch {
    /// Increases with every batch of a connection; the hub acknowledges it.
    #[serde(deserialize_with = "number::count")]
    pub number: u64,
    /// The certificate of the receipts that are sent without one, in this batch and in later ones;
    /// `None`: the one of an earlier batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate: Option<Certificate>,
    #[serde(serialize_with = "compact")]
    reports: Vec<Report>,
}

impl ReportBatch {
    /// A batch. `last`: the last certificate that was sent over this connection.
    pub fn new(number: u64, mut reports: Vec<Report>, last: &mut Option<Certificate>) -> Self {
        let (mut certificate, mut is_first) = (None, true);
        for receipt in receipts(&mut reports) {
            let own = receipt.take_certificate();
            let differs = last.as_ref() != Some(&own);
            if differs && is_first {
                certificate = Some(own.clone());
                *last = Some(own);
            } else if differs {
                // One batch has one certificate. Another one stays in its receipt.
                receipt.restore_certificate(&own);
            }
            is_first = false;
        }
        Self {
            number,
            certificate,
            reports,
        }
    }

    /// The reports, each receipt with its certificate, which is copied only for the report that is
    /// taken next: a batch may have many receipts. `last`: the last certificate that was received
    /// over this connection.
    pub fn into_reports(
        self,
        last: &mut Option<Certificate>,
    ) -> impl ExactSizeIterator<Item = Report> + use<> {
        if self.certificate.is_some() {
            *last = self.certificate;
        }
        let certificate = last.clone();
        self.reports.into_iter().map(move |mut report| {
            if let (Some(certificate), Some(receipt)) = (&certificate, &mut report.body.receipt) {
                receipt.restore_certificate(certificate);
            }
            report
        })
    }
}

fn receipts(reports: &mut [Report]) -> impl Iterator<Item = &mut Receipt> {
    reports
        .iter_mut()
        .filter_map(|report| report.body.receipt.as_mut())
}

/// Writes reports without the members that have their default value.
fn compact<S: Serializer>(reports: &[Report], to: S) -> Result<S::Ok, S::Error> {
    let json = |value: &Body| serde_json::to_value(value).map_err(S::Error::custom);
    let default = json(&Body::default())?;
    let mut out = to.serialize_seq(Some(reports.len()))?;
    for report in reports {
        let mut body = json(&report.body)?;
        remove_defaults(&mut body, &default);
        out.serialize_element(&serde_json::json!({
            "id": report.id, "generation": report.generation, "state": report.state, "body": body,
        }))?;
    }
    out.end()
}

fn remove_defaults(value: &mut Value, default: &Value) {
    if let (Value::Object(members), Value::Object(default)) = (value, default) {
        for (name, default) in default {
            if let Some(member) = members.get_mut(name) {
                remove_defaults(member, default);
            }
        }
        members.retain(|name, member| {
            default.get(name) != Some(&*member) && *member != Value::Object(Map::new())
        });
    }
}
