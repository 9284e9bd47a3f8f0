//! Hostile peers: a site, a publisher and a hub that hold real certificates and say whatever a test
//! wants.
//!
//! They use the program's own transport (QUIC or TCP + TLS), and write the bytes of streams by
//! hand: the first byte of a stream, lengths and messages are the test's. Everything is blocking
//! and has a deadline, so that a test reads from top to bottom.

mod artifact;
mod hub;
mod peer;

pub(crate) use artifact::{Artifact, EntryPage, IndexPage, frame};
pub(crate) use hub::{FalseHub, desired, wanted};
pub(crate) use peer::{Connection, Identity, Stream, framed};

use std::future::Future;
use std::sync::LazyLock;
use std::time::Duration;

use packhorse::config::{Congestion, ConnectionSettings, Transport};

/// One runtime for all hostile peers of this process.
static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("start a runtime")
});

/// Runs a future to its end; panics when that takes longer than `limit`.
#[track_caller]
fn within<T>(what: &str, limit: Duration, work: impl Future<Output = T>) -> T {
    let ended = RUNTIME.block_on(async { tokio::time::timeout(limit, work).await });
    ended.unwrap_or_else(|_| panic!("{what}: not ended after {limit:?}"))
}

/// The settings of a connection over this transport and no other.
pub(crate) fn over(transport: Transport) -> ConnectionSettings {
    ConnectionSettings {
        congestion: Congestion::Auto,
        transport,
    }
}

/// Both transports, for tests that must hold over each.
pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::Quic, Transport::Tcp];
