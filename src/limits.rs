//! Every limit of the program, in one place, with its unit in its name.
//!
//! A queue, frame, timeout or concurrency that is not here has no limit, and that is a defect.

use std::time::Duration;

/// The bytes in flight that all transfers of one daemon share, unless the config says otherwise.
pub const MEMORY_BUDGET_BYTES: u64 = 256 << 20;
/// The largest control message on the line.
pub const CONTROL_FRAME_BYTES_MAX: usize = 4 << 20;
/// The largest request for chunks on the line.
pub const FETCH_REQUEST_BYTES_MAX: usize = 64 << 10;
/// The largest chunk, raw or stored.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The largest root manifest.
pub const ROOT_BYTES_MAX: usize = 1 << 20;
/// The raw bytes of chunks that one fetch request asks for, about: small enough that a stream's window holds it.
pub const FETCH_BATCH_BYTES: u64 = 1 << 20;
/// The most chunks in one fetch request.
pub const FETCH_BATCH_CHUNKS_MAX: usize = 1024;
/// The fetch requests a transfer keeps on the way at once.
pub const FETCH_IN_FLIGHT_MAX: usize = 32;
/// A pack is sealed once it holds this much.
pub const PACK_BYTES: u64 = 32 << 20;
/// A transfer's group commit: after this many bytes…
pub const COMMIT_BYTES: u64 = 64 << 20;
/// …or after this long, whichever comes first.
pub const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Nothing received on a busy transfer for this long means the line is dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The first and the longest pause between two tries of anything.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest pause between two tries of anything.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// The transfers a site works on at once.
pub const TRANSFERS_ACTIVE_MAX: usize = 4;
/// Connections from sites that the hub accepts at once.
pub const SITE_CONNECTIONS_MAX: usize = 4096;
/// How long a clean stop may take before what is left is dropped (resume makes it whole).
pub const DRAIN_MAX: Duration = Duration::from_secs(10);
/// The longest line of a canonical label file, which is one row.
pub const LABEL_LINE_BYTES_MAX: usize = 2 << 20;
/// The most classes of one label set: their ids are the only part of it that is kept in memory.
pub const LABEL_CLASSES_MAX: usize = 100_000;
/// Rows on their way to or from a label database travel in batches of about this size…
pub const LABEL_BATCH_BYTES: usize = 1 << 20;
/// …and this many batches wait at most.
pub const LABEL_BATCHES_QUEUED_MAX: usize = 4;
/// How long a label database may take to accept a connection.
pub const LABEL_CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a label database may take to accept one batch of rows, or to hand out the next row.
pub const LABEL_SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long one statement without rows (an index, a switch) may take in a label database.
pub const LABEL_STATEMENT_MAX: Duration = Duration::from_secs(3600);
/// How long a commit waits for another writer of the same label set, or for the writer's lock of SQLite.
pub const LABEL_WRITER_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a commit waits for readers that planned their query before the new rows were attached.
pub const LABEL_READERS_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a change of tables is tried against readers' locks, half a second each.
pub const LABEL_DDL_TRIES_MAX: u32 = 6;
/// How long an API long-poll may wait.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(60);
/// The largest body of an API request.
pub const API_BODY_BYTES_MAX: usize = 1 << 20;
/// Events kept for `--since`; older ones are forgotten and a reader is told to start anew.
pub const EVENTS_KEPT: i64 = 100_000;
/// The most offending records or names that one error lists.
pub const OFFENDERS_LISTED_MAX: usize = 20;
