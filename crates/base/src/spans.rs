//! The spans of the log: one for each connection, transfer, run and job.
//!
//! Owns their names and the names of their fields, which are the same at hub and site: a search for
//! one transfer id finds what both did for it. Code that works on such an object runs inside its
//! span, and the log lines in it carry its fields without repeating them. No span has a parent: a
//! line carries the fields of the innermost one. [`crate::blocking`] and [`crate::threads`] take
//! the span of their caller along.
//!
//! A span is made once for each object, or for a message about it; never for a chunk, a frame or a
//! request for content.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Empty, display};
use tracing::{Span, info_span};

use crate::names::{ArtifactRef, RunName, SiteName, TransferId};
use crate::peer::Peer;

/// The target of every span: the filter of the log never removes these.
pub const TARGET: &str = "span";

/// A connection to a peer at this address. `connection` counts the connections of this process. A
/// peer that has not joined yet has no name.
pub fn connection(peer: impl Display, who: Option<&Peer>, transport: &str) -> Span {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let connection = NUMBER.fetch_add(1, Ordering::Relaxed);
    let (hub, site, publisher) = (Empty, Empty, Empty);
    let span = info_span!(target: TARGET, parent: None, "connection", connection, %peer, transport, hub, site, publisher);
    if let Some(who) = who {
        let field = match who {
            Peer::Hub(_) => "hub",
            Peer::Site(_) => "site",
            Peer::Publisher(_) => "publisher",
        };
        span.record(field, display(who.name()));
    }
    span
}

/// A transfer: one artifact to one site.
pub fn transfer(transfer: &TransferId, artifact: &ArtifactRef, site: &SiteName) -> Span {
    info_span!(target: TARGET, parent: None, "transfer", %transfer, %artifact, %site)
}

/// A training run.
pub fn run(run: &RunName) -> Span {
    info_span!(target: TARGET, parent: None, "run", %run)
}

/// A job of this daemon.
pub fn job(job: &str) -> Span {
    info_span!(target: TARGET, parent: None, "job", job)
}

#[cfg(test)]
mod tests {
    use tracing::dispatcher;

    use super::*;
    use crate::blocking::blocking;
    use crate::tally::Log;

    fn has(line: &[String], fields: &[&str]) {
        let line = line.first().expect("a line");
        assert!(fields.iter().all(|field| line.contains(field)), "{line}");
    }

    #[tokio::test]
    async fn a_log_line_has_the_fields_of_its_span_on_any_thread() {
        let (log, _guard) = Log::capture();
        let site: SiteName = "chengdu".parse().unwrap();
        let who = Peer::Site(site.clone());
        let connection = connection("192.0.2.1:7", Some(&who), "quic");
        let _connected = connection.enter();
        tracing::info!("connected");
        let fields = [
            "connection=",
            "peer=192.0.2.1:7",
            "transport=\"quic\"",
            " site=chengdu",
        ];
        has(&log.lines_with("connected"), &fields);
        let artifact = "dataset/line:v1".parse().unwrap();
        let _transfer = transfer(&"t-1".parse().unwrap(), &artifact, &site).entered();
        let dispatch = dispatcher::get_default(Clone::clone);
        let there = move || {
            dispatcher::with_default(&dispatch, || tracing::info!("in a thread"));
            Ok(())
        };
        blocking(there).await.unwrap();
        let lines = log.lines_with("in a thread");
        has(
            &lines,
            &["transfer=t-1", "artifact=dataset/line:v1", "site=chengdu"],
        );
        assert!(!lines[0].contains("connection="), "{lines:?}");
    }
}
