//! Hostile peers: a site, a publisher and a hub that have valid certificates and send what a test
//! requests.
//!
//! They use the program's own transport (QUIC or TCP + TLS), and write the bytes of streams
//! themselves: the test defines the first byte of a stream, the lengths and the messages. All calls
//! block and have a deadline, so that a test reads from top to bottom.

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

/// Runs a future to its end; panics if that takes longer than `limit`.
#[track_caller]
fn within<T>(what: &str, limit: Duration, work: impl Future<Output = T>) -> T {
    let ended = RUNTIME.block_on(async { tokio::time::timeout(limit, work).await });
    ended.unwrap_or_else(|_| panic!("{what}: not ended after {limit:?}"))
}

/// The settings of a connection over only this transport.
pub(crate) fn over(transport: Transport) -> ConnectionSettings {
    ConnectionSettings {
        congestion: Congestion::Auto,
        transport,
        ..ConnectionSettings::default()
    }
}

/// Both transports, for tests that must pass over each.
pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::Quic, Transport::Tcp];
