//! Converts the catalogue's rows, and the reports of the daemon's workers, to the form of the API.

use base::clock::rfc3339_ms;
use base::workers;
use content::manifest::KindInfo;
use model::publisher_scope::PublisherScope;
use state::{
    ArtifactRow, Catalogue, EventRow, MalformedRow, Member, PublisherRow, Revocation, SiteRow,
    TransferRow,
};

use super::types::{
    Artifact, Event, MemberCertificate, MemberChange, MemberRevocation, Publisher, Site, State,
    Transfer, Worker, WorkerError,
};

/// What `doctor` says of the rows that could not be read since the daemon started.
pub fn malformed_lines(catalogue: &Catalogue) -> Vec<String> {
    let rows = catalogue.malformed_rows();
    let line = |row: &MalformedRow| {
        format!(
            "fault catalogue: {row}; it is skipped; restore the data directory from a backup, or remove the row, then restart the daemon"
        )
    };
    rows.iter().map(line).collect()
}

/// A row that the API shows.
pub trait View {
    /// Its form in the API.
    type As;

    /// Its form in the API. The running daemon adds what only it knows.
    fn view(&self) -> Self::As;
}

impl View for ArtifactRow {
    type As = Artifact;

    fn view(&self) -> Artifact {
        let info = match &self.root.info {
            KindInfo::Files => serde_json::json!({}),
            KindInfo::Image(image) => serde_json::to_value(image).unwrap_or_default(),
            KindInfo::Labels(labels) => serde_json::to_value(labels).unwrap_or_default(),
        };
        Artifact {
            artifact: self.artifact.clone(),
            digest: self.digest.hex(),
            bytes: self.root.totals.bytes,
            files: self.root.totals.files,
            origin: self.origin.clone(),
            created_at: rfc3339_ms(self.created_ms),
            info,
            location: self.location.clone(),
            pinned: self.pinned,
            changed: self.changed.clone(),
            published_here: self.published,
            omitted: self.omitted.list(),
        }
    }
}

impl View for TransferRow {
    type As = Transfer;

    fn view(&self) -> Transfer {
        let body = self.body.clone();
        let moves = self.state == State::Transferring;
        Transfer {
            id: self.id.to_string(),
            delivery: self.delivery.to_string(),
            artifact: self.artifact.clone(),
            digest: self.digest.hex(),
            site: self.site.clone(),
            state: self.state,
            reason: body.reason,
            message: body.message.map(Into::into),
            next: body.next.map(Into::into),
            waits_for: body.waits_for.map(Into::into),
            bytes: body.bytes,
            rate: if moves { body.rate } else { 0 },
            eta_seconds: if moves { body.eta_seconds } else { None },
            attempts: body.attempts,
            location: body.location.map(Into::into),
            note: body.note.map(Into::into),
            created_at: rfc3339_ms(self.created_ms),
            updated_at: rfc3339_ms(self.updated_ms),
            finished_at: self.finished_ms.map(rfc3339_ms),
            receipt: body.receipt,
            removed_at: self.removed_ms.map(rfc3339_ms),
            cursor: self.cursor as u64,
        }
    }
}

impl View for SiteRow {
    type As = Site;

    fn view(&self) -> Site {
        Site {
            name: self.name.clone(),
            labels: self.labels.clone(),
            online: false,
            line: None,
            line_reason: None,
            rtt_ms: None,
            joined_at: rfc3339_ms(self.joined_ms),
            last_seen: self.seen_ms.map(rfc3339_ms),
            version: self.version.clone(),
            open_transfers: self.open_transfers,
            certificate: certificate(&self.member),
            revoked: self.member.revoked.as_ref().map(revocation),
            changed: self.member.changed.as_ref().map(change),
        }
    }
}

impl View for PublisherRow {
    type As = Publisher;

    fn view(&self) -> Publisher {
        // A scope that cannot be read allows nothing.
        let scope: Option<PublisherScope> = match self.scope.as_deref() {
            None => Some(PublisherScope::default()),
            Some(text) => serde_json::from_str(text).ok(),
        };
        let text = |list: Vec<_>| list.iter().map(ToString::to_string).collect();
        let (artifacts, deliver_to) = match scope {
            Some(scope) => (
                scope.artifacts.map(text),
                scope.deliver_to.map(|to| to.to_string()),
            ),
            None => (Some(Vec::new()), Some("none".into())),
        };
        Publisher {
            name: self.name.to_string(),
            joined_at: rfc3339_ms(self.joined_ms),
            last_seen: self.seen_ms.map(rfc3339_ms),
            artifacts,
            deliver_to,
            certificate: certificate(&self.member),
            revoked: self.member.revoked.as_ref().map(revocation),
            changed: self.member.changed.as_ref().map(change),
        }
    }
}

fn certificate(member: &Member) -> Option<MemberCertificate> {
    Some(MemberCertificate {
        serial: member.serial.as_ref()?.to_string(),
        issued_at: rfc3339_ms(member.issued_ms?),
        expires_at: rfc3339_ms(member.expires_ms?),
        used_at: member.confirmed_ms.map(rfc3339_ms),
        previous_until: member
            .previous
            .as_ref()
            .map(|(_, until)| rfc3339_ms(*until)),
    })
}

fn revocation(revoked: &Revocation) -> MemberRevocation {
    MemberRevocation {
        at: rfc3339_ms(revoked.at_ms),
        by: revoked.by.clone(),
        why: revoked.why.clone(),
    }
}

fn change(changed: &state::MemberChange) -> MemberChange {
    MemberChange {
        what: changed.what.clone(),
        at: rfc3339_ms(changed.at_ms),
        by: changed.by.clone(),
    }
}

impl View for EventRow {
    type As = Event;

    fn view(&self) -> Event {
        Event {
            seq: self.seq,
            at: rfc3339_ms(self.at_ms),
            what: self.what.clone(),
            body: serde_json::Value::Null,
        }
    }
}

impl View for workers::Report {
    type As = Worker;

    fn view(&self) -> Worker {
        Worker {
            name: self.name.into(),
            state: self.state.as_str().into(),
            last_iteration: self.last_iteration_ms.map(rfc3339_ms),
            iterations: self.iterations,
            errors: self.errors,
            restarts: self.restarts,
            last_error: self.last_error.as_ref().map(|last| WorkerError {
                at: rfc3339_ms(last.at_ms),
                message: last.fault.message.clone(),
                next: last.fault.next.clone(),
            }),
            problem: self.problem.clone(),
        }
    }
}
