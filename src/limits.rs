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
/// How long an API long-poll may wait.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(60);
/// The largest body of an API request.
pub const API_BODY_BYTES_MAX: usize = 1 << 20;
/// Connections to the API at once; the next one waits in the listener's backlog.
pub const API_CONNECTIONS_MAX: usize = 256;
/// Rows of one API reply.
pub const API_ROWS_MAX: u32 = 10_000;
/// Rows of one API reply when the request does not say.
pub const API_ROWS_DEFAULT: u32 = 1_000;
/// Between two looks of a waiting API request: changes that come faster are told together.
pub const API_LOOK_EVERY: Duration = Duration::from_millis(50);
/// A quiet event stream says that it lives this often (proxies cut what is silent for 15 s).
pub const SSE_HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a waiting command bears a daemon that does not answer (a restart) before it gives up.
pub const DAEMON_AWAY_MAX: Duration = Duration::from_secs(300);
/// How long a command waits for the API's answer beyond the wait that it asked for.
pub const API_REPLY_MAX: Duration = Duration::from_secs(60);
/// A command off the terminal says how far it is this often.
pub const PROGRESS_LINE_EVERY: Duration = Duration::from_secs(10);
/// Transfer ids in one API query: a request line has room for 64 KiB.
pub const API_IDS_MAX: usize = 200;
/// The largest configuration file.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// The largest secret or certificate file.
pub const SECRET_BYTES_MAX: u64 = 1 << 20;
/// The smallest `[limits] memory`: less cannot hold the batches of one transfer.
pub const MEMORY_BUDGET_BYTES_MIN: u64 = 32 << 20;
/// Events kept for `--since`; older ones are forgotten and a reader is told to start anew.
pub const EVENTS_KEPT: i64 = 100_000;
/// The most offending records or names that one error lists.
pub const OFFENDERS_LISTED_MAX: usize = 20;
