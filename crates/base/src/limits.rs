//! Every limit of the program, in one place, with its unit in its name.
//!
//! A queue, frame, timeout or concurrency that is not here has no limit, and that is a defect.

use std::time::Duration;

/// The bytes in flight that all transfers of one daemon share, unless the config says otherwise.
pub const MEMORY_BUDGET_BYTES: u64 = 256 << 20;
/// The largest control message on the line.
pub const CONTROL_FRAME_BYTES_MAX: usize = 4 << 20;
/// Manifests that a site is told of in one control message without asking…
pub const TOLD_MAX: usize = 16;
/// …and their bytes, at most.
pub const TOLD_BYTES_MAX: usize = 256 << 10;
/// Roots of such manifests that a site keeps until their transfers begin.
pub const PUSHED_MANIFESTS_MAX: usize = 64;
/// The largest request for chunks on the line.
pub const FETCH_REQUEST_BYTES_MAX: usize = 64 << 10;
/// The largest chunk, raw or stored.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The largest question on the line: whoever asks sends a few names.
pub const QUESTION_BYTES_MAX: usize = 64 << 10;
/// What a question takes in memory while it is answered, for each byte of its text.
pub const QUESTION_BYTES_FACTOR: u64 = 8;
/// What the questions of one peer take in memory together.
pub const QUESTIONS_BYTES_MAX: u64 = 4 << 20;
/// Questions of one connection that are answered at once.
pub const QUESTIONS_AT_ONCE_MAX: usize = 128;
/// How long a question may take to be answered, unless its answer moves content first.
pub const ANSWER_MAX: Duration = Duration::from_secs(120);
/// How long a question whose answer moves content first may move none.
pub const ANSWER_IDLE_MAX: Duration = Duration::from_secs(600);
/// The slowest that a message may arrive, in bytes a second, once it has begun.
pub const MESSAGE_BYTES_PER_SECOND_MIN: u64 = 8 << 10;
/// Messages larger than this are parsed where it may block.
pub const MESSAGE_BYTES_SMALL: usize = 64 << 10;
/// How long a fetch waits for data of its own, however much the connection brings for others: as
/// long as its peer may take to send what goes before it, and a little more.
pub const FETCH_IDLE_MAX: Duration = Duration::from_secs(960);
/// The same for a manifest that the hub fetches before it answers: a manifest goes before content.
pub const MANIFEST_IDLE_MAX: Duration = Duration::from_secs(120);
/// Less than this is no progress of a fetch that has not ended.
pub const FETCH_PROGRESS_BYTES: u64 = 16 << 10;
/// How long the hub may take to fetch the manifest of what a site publishes.
pub const OFFER_MAX: Duration = Duration::from_secs(3600);
/// The blocking work (reads, parsing, compression) that runs at once for one peer.
pub const PEER_WORK_MAX: usize = 8;
/// The reports of transfers and runs that the hub takes from one site, a second…
pub const REPORTS_PER_SECOND_MAX: u32 = 1_000;
/// …and at once, after a pause.
pub const REPORTS_AT_ONCE_MAX: u32 = 20_000;
/// The publishes, deliveries, actions and runs that one site or publisher may ask for, a second…
pub const CHANGES_PER_SECOND_MAX: u32 = 50;
/// …and at once, after a pause.
pub const CHANGES_AT_ONCE_MAX: u32 = 1_000;
/// The largest root manifest.
pub const ROOT_BYTES_MAX: usize = 1 << 20;
/// The raw bytes of chunks that one fetch request asks for, about: small enough that a stream's
/// window holds it.
pub const FETCH_BATCH_BYTES: u64 = 1 << 20;
/// The most chunks, pages, ranges and parts of one fetch request, all together.
pub const FETCH_BATCH_CHUNKS_MAX: usize = 1024;
/// The fetch requests a transfer keeps on the way at once…
pub const FETCH_IN_FLIGHT_MAX: usize = 32;
/// …and on a line with a round trip of this…
pub const FETCH_FAR_FROM: Duration = Duration::from_millis(20);
/// …this many: what 10 Gbit/s hold in 50 ms.
pub const FETCH_IN_FLIGHT_FAR_MAX: usize = 60;
/// The pages of an old version that new ones are squeezed against at once.
pub const DIFFERENCE_BASE_BYTES_MAX: u64 = 2 << 20;
/// A pack is sealed once it holds this much.
pub const PACK_BYTES: u64 = 32 << 20;
/// The most bytes of a transfer that were asked for and are not committed yet: what a kill costs at
/// the worst, beside the 8 MiB and more that the hub may still send to the dead.
pub const UNCOMMITTED_BYTES_MAX: u64 = 36 << 20;
/// The same where more is on the way; of that a kill costs no more unless the line is as fast as
/// that.
pub const UNCOMMITTED_BYTES_FAR_MAX: u64 = 76 << 20;
/// The same after bytes could not be stored, until some were: what each try that fails costs at the
/// most.
pub const UNCOMMITTED_BYTES_AFTER_FAILURE_MAX: u64 = 2 << 20;
/// A transfer's group commit: after this many bytes, which leaves more than half of the above to
/// what is on the way…
pub const COMMIT_BYTES: u64 = 16 << 20;
/// …or after this long, whichever comes first.
pub const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Nothing received on a busy transfer for this long means the line is dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a publisher calls a hub that has gone away, or has no room, before it gives up.
pub const HUB_AWAY_MAX: Duration = Duration::from_secs(600);
/// How long a publish or an import waits for room on a full disk before it gives up…
pub const ROOM_AWAITED_MAX: Duration = Duration::from_secs(600);
/// …and how often it looks.
pub const ROOM_LOOK_EVERY: Duration = Duration::from_secs(1);
/// The publishes that run at once from one state folder.
pub const PUBLISHES_AT_ONCE_MAX: usize = 16;
/// The first and the longest pause between two tries of anything.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest pause between two tries of anything.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// The longest pause before the hub is asked again for what lies at a site that is away.
pub const SOURCE_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The threads of one sink at once: what its transfers need, and calls beside them.
pub const SINK_THREADS_MAX: usize = 128;
/// A sink whose far end has not answered for this long is said not to answer. With the look each
/// second that is within 5 s.
pub const SINK_SILENT_AFTER: Duration = Duration::from_secs(3);
/// How long `doctor`, and whoever else does not wait for a transfer, waits for a sink.
pub const SINK_ANSWER_MAX: Duration = Duration::from_secs(5);
/// A text in a site's answer how an artifact is there.
pub const STANDING_TEXT_BYTES_MAX: usize = 1 << 10;
/// How long a site looks at an artifact that is to be delivered again, without reading it; the hub
/// waits a little longer.
pub const STANDING_LOOK_MAX: Duration = Duration::from_secs(4);
/// How long a transfer that is stopped waits for its threads, which may hang in a sink.
pub const SINK_STOP_MAX: Duration = Duration::from_secs(2);
/// How often a site tries again to remove what it could not remove from a staging folder.
pub const LEFTOVERS_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// A daemon says so often in the root of its files sink that it uses it…
pub const ROOT_USE_SAID_EVERY: Duration = Duration::from_secs(86_400);
/// …and one that has not said so for this long does not use it any longer.
pub const ROOT_USE_ENDS_AFTER: Duration = Duration::from_secs(30 * 86_400);
/// The bytes in flight that each sink has for itself, so that one that hangs cannot hold all of
/// them.
pub const SINK_OWN_BYTES: u64 = 2 << 20;
/// The longest pause before a sink that failed is tried again: a try that fails moves no byte.
pub const SINK_PAUSE_MAX: Duration = Duration::from_secs(10);
/// The names of folders that one walk over a tree holds at once, in bytes; a larger folder is read
/// in batches.
pub const WALK_NAMES_BYTES_MAX: usize = 32 << 20;
/// The largest JSON of an image (manifest, index, config), in bytes: what registries accept as
/// well.
pub const IMAGE_JSON_BYTES_MAX: u64 = 4 << 20;
/// All the JSON of one image together, in bytes.
pub const IMAGE_JSON_TOTAL_BYTES_MAX: u64 = 64 << 20;
/// The JSON of a layout that is read to tell referrers from images, in bytes.
pub const IMAGE_REFERRERS_JSON_BYTES_MAX: u64 = 16 << 20;
/// How deep indexes may stand in each other.
pub const IMAGE_INDEX_DEPTH_MAX: usize = 4;
/// The most members of an image archive.
pub const ARCHIVE_MEMBERS_MAX: usize = 65_536;
/// The names of all members of an image archive together, in bytes.
pub const ARCHIVE_NAMES_BYTES_MAX: usize = 16 << 20;
/// The largest extended header (a long name) in an archive, in bytes.
pub const ARCHIVE_HEADER_BYTES_MAX: u64 = 64 << 10;
/// Decompressing stops as a bomb when more than this many bytes came out…
pub const BOMB_BYTES: u64 = 1 << 30;
/// …and more than this many times what went in. Real layers reach 20, gzip cannot pass 1,032, zstd
/// has no bound.
pub const BOMB_RATIO: u64 = 256;
/// The layers of an image that are checked at once.
pub const IMAGE_CHECKS_MAX: usize = 4;
/// Connections from sites and publishers that the hub holds at once; publishers get three quarters
/// of them at most.
pub const SITE_CONNECTIONS_MAX: usize = 4096;
/// How long a cancel waits for a sink to say whether it holds the artifact.
pub const CANCEL_LOOK_MAX: Duration = Duration::from_secs(5);
/// A process that may have fewer files open than this says so at its start.
pub const OPEN_FILES_EASY: usize = 1024;
/// What strangers cause at will is logged in one line for this long, with a count…
pub const LOG_TALLY_EVERY: Duration = Duration::from_secs(60);
/// …and the last of them in so many characters.
pub const LOG_TALLY_CHARS_MAX: usize = 300;
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
/// A sink that has not answered for this long is shown as what the transfer waits for.
pub const SINK_REPORT_AFTER: Duration = Duration::from_secs(3);
/// How long a label database may take to accept a connection.
pub const LABEL_CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a label database may take to accept one batch of rows, or to hand out the next row.
pub const LABEL_SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long one statement without rows (an index, a switch) may take in a label database.
pub const LABEL_STATEMENT_MAX: Duration = Duration::from_secs(3600);
/// How long a commit waits for the writer's lock of SQLite before the delivery pauses and tries
/// again.
pub const LABEL_WRITER_WAIT_MAX: Duration = Duration::from_secs(4);
/// How long a statement waits for a lock in PostgreSQL before the delivery pauses and tries again.
pub const LABEL_LOCK_WAIT_MAX: Duration = Duration::from_secs(4);
/// A call on PostgreSQL that takes longer than this is watched from a second session: who blocks it
/// is reported.
pub const LABEL_BLOCKED_REPORT_AFTER: Duration = Duration::from_secs(1);
/// How long PostgreSQL may refuse or ignore that second session before the call is given up.
pub const LABEL_UNREACHABLE_MAX: Duration = Duration::from_secs(60);
/// How often a change of tables is tried against readers' locks, half a second each.
pub const LABEL_DDL_TRIES_MAX: u32 = 6;
/// How long an API long-poll may wait.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(60);
/// The largest body of an API request.
pub const API_BODY_BYTES_MAX: usize = 1 << 20;
/// How long the body of an API request may be silent, and take in all unless it keeps to…
pub const API_BODY_SILENCE_MAX: Duration = Duration::from_secs(30);
/// …this rate, in bytes a second.
pub const API_BODY_RATE_MIN: u64 = 4 << 10;
/// How long the head of an API request may take, from the connection or the end of the request
/// before.
pub const API_HEAD_MAX: Duration = Duration::from_secs(10);
/// The largest head of an API request.
pub const API_HEAD_BYTES_MAX: usize = 128 << 10;
/// Connections to the API at once, over TCP and as many over the local socket. Beyond that the
/// oldest without the token is closed; if all have shown it, the next one waits.
pub const API_CONNECTIONS_MAX: usize = 256;
/// Connections to the API of one address (IPv6: of one /64) that have not shown the token; beyond
/// that its oldest is closed.
pub const API_CONNECTIONS_PER_ADDRESS_MAX: usize = 32;
/// Characters of a request that the log shows.
pub const API_AUDIT_CHARS_MAX: usize = 500;
/// How long a client keeps a connection to the API for its next request: less than the daemon does.
pub const API_CLIENT_IDLE_MAX: Duration = Duration::from_secs(5);
/// A connection to the API on which nothing moved for this long is closed; twice the longest poll.
pub const API_IDLE_MAX: Duration = Duration::from_secs(120);
/// Rows of one API reply.
pub const API_ROWS_MAX: u32 = 10_000;
/// Rows of a long API reply that are in memory at once: it is made and sent a page at a time…
pub const API_PAGE_ROWS: u32 = 500;
/// …and the bytes of JSON of such a page, and of a reply that ends with a cursor. As many
/// connections as there can be hold two each.
pub const API_PAGE_BYTES: usize = 128 << 10;
/// Lists of the API that are made at once, a page or a whole small one; the others wait for their
/// turn.
pub const API_LISTS_AT_ONCE_MAX: usize = 4;
/// Ids in one API query.
pub const API_QUERY_IDS_MAX: usize = 1_000;
/// Events that a stream holds in memory at once.
pub const API_STREAM_EVENTS: u32 = 50;
/// Rows of one API reply when the request does not say, and the most where a reader goes on from a
/// cursor.
pub const API_ROWS_DEFAULT: u32 = 1_000;
/// Between two looks of a waiting API request: changes that come faster are told together.
pub const API_LOOK_EVERY: Duration = Duration::from_millis(10);
/// A quiet event stream says that it lives this often (proxies cut what is silent for 15 s).
pub const SSE_HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a waiting command bears a daemon that does not answer (a restart) before it gives up.
pub const DAEMON_AWAY_MAX: Duration = Duration::from_secs(300);
/// How long a command waits for the API's answer beyond the wait that it asked for.
pub const API_REPLY_MAX: Duration = Duration::from_secs(60);
/// A command off the terminal says how far it is this often.
pub const PROGRESS_LINE_EVERY: Duration = Duration::from_secs(10);
/// The longest statement of a receipt, bytes: a JSON object with a location.
pub const RECEIPT_STATEMENT_BYTES_MAX: usize = 16 << 10;
/// The longest signature of a receipt, bytes of base64.
pub const RECEIPT_SIGNATURE_BYTES_MAX: usize = 1 << 10;
/// The longest certificate of a receipt, bytes of base64.
pub const RECEIPT_CERTIFICATE_BYTES_MAX: usize = 8 << 10;
/// The longest message about a transfer, a run or a fault, bytes; longer ones are cut.
pub const MESSAGE_BYTES_MAX: usize = 8 << 10;
/// The longest text that says what to do next, bytes.
pub const NEXT_BYTES_MAX: usize = 2 << 10;
/// The longest location of an artifact, bytes: a path and its root.
pub const LOCATION_BYTES_MAX: usize = 5 << 10;
/// The longest value of one field in the log, bytes.
pub const LOG_FIELD_BYTES_MAX: usize = 16 << 10;
/// The longest version of a program, bytes.
pub const VERSION_BYTES_MAX: usize = 64;
/// The entries that the hub keeps of an `allow` list of a site, for sharing or for training; each
/// is a selection of sites.
pub const ALLOW_ENTRIES_MAX: usize = 10_000;
/// The longest certificate request, bytes of hex.
pub const RENEWAL_BYTES_MAX: usize = 16 << 10;
/// Reports that a site sends in one message, bytes of JSON.
pub const REPORT_BYTES_MAX: usize = 1 << 20;
/// One answer to a question over a connection between hub and site, bytes of JSON; longer lists
/// come in several.
pub const ANSWER_BYTES_MAX: usize = CONTROL_FRAME_BYTES_MAX - (64 << 10);
/// Artifacts of one delivery.
pub const DELIVERY_ARTIFACTS_MAX: usize = 1_000;
/// Artifacts times sites of one delivery.
pub const DELIVERY_PARTS_MAX: usize = 100_000;
/// Artifacts times sites of one plan.
pub const PLAN_ROWS_MAX: usize = 5_000;
/// Notes of one job.
pub const JOB_NOTES_MAX: usize = 1_000;
/// The result of one job, bytes of JSON; of a longer list the first rows are kept, and how many
/// there are.
pub const JOB_RESULT_BYTES_MAX: usize = 256 << 10;
/// Artifacts or sites of one delivery that are listed when all its names have no room in one
/// answer.
pub const NAMES_LISTED_MAX: usize = 1_000;
/// The largest count of bytes that is taken from a peer: 1 EiB, so that 16 of them add up without
/// overflow.
pub const COUNTED_BYTES_MAX: u64 = 1 << 60;
/// The largest generation of a transfer: nobody retries so often.
pub const GENERATION_MAX: i64 = 1 << 40;
/// The longest id of a transfer, a delivery or a run.
pub const ID_BYTES_MAX: usize = 64;
/// Ids that one question of a site names.
pub const IDS_ASKED_MAX: usize = 2_500;
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
/// Bytes of chunks that a publish hands to a worker at once…
pub const INGEST_BATCH_BYTES: usize = 1 << 20;
/// …and how many such batches are on the way.
pub const INGEST_BATCHES_MAX: usize = 8;
/// How long a connection to a registry may take to stand.
pub const REGISTRY_CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a registry may stay silent: before it answers a small request, or between two pieces of
/// a body.
pub const REGISTRY_SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a registry may take to answer once the whole of a blob was sent: some hash it again
/// first.
pub const REGISTRY_CLOSE_MAX: Duration = Duration::from_secs(15 * 60);
/// The pause before a registry in read-only mode is asked again.
pub const REGISTRY_READ_ONLY_PAUSE: Duration = Duration::from_secs(60);
/// The longest Retry-After that is obeyed.
pub const REGISTRY_RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);
/// The longest note on a transfer.
pub const NOTE_BYTES_MAX: usize = 2 << 10;
/// How long a request to a registry waits in place when the registry asks for a pause (429, 503). A
/// delivery pauses as a whole after that, and shows the reason.
pub const REGISTRY_PAUSE_IN_PLACE_MAX: Duration = Duration::from_secs(3);
/// The same for a request of a publish, which nothing else would repeat.
pub const REGISTRY_PAUSE_OF_PULL_MAX: Duration = Duration::from_secs(300);
/// The longest pause where the registry does not say how long it shall be.
pub const REGISTRY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// A registry that answers no request for this long is reported as such by the delivery that waits
/// for it.
pub const REGISTRY_SILENCE_REPORT_AFTER: Duration = Duration::from_secs(3);
/// Fetched blobs of a publish that failed are kept for this long, for the next try.
pub const PULLED_KEPT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The repositories of which such blobs are kept.
pub const PULLED_REPOSITORIES_MAX: usize = 8;
/// Blobs of one image that move to or from a registry at once.
pub const REGISTRY_BLOBS_IN_FLIGHT_MAX: usize = 3;
/// Each blob on its way to a registry is read in pieces of this size…
pub const REGISTRY_READ_BYTES: usize = 512 << 10;
/// …and this many of them wait at most.
pub const REGISTRY_READ_AHEAD_MAX: usize = 3;
/// The first chunk of an upload in chunks, which is used where a proxy limits the size of a
/// request.
pub const REGISTRY_CHUNK_BYTES: u64 = 64 << 20;
/// Chunks are not halved below this.
pub const REGISTRY_CHUNK_BYTES_MIN: u64 = 1 << 20;
/// Tries of one blob before the transfer's own pause takes over.
pub const REGISTRY_BLOB_TRIES_MAX: u32 = 3;
/// Bearer tokens that are kept.
pub const REGISTRY_TOKENS_KEPT_MAX: usize = 256;
/// The largest token, error body or list that is read from a registry.
pub const REGISTRY_BODY_BYTES_MAX: usize = 1 << 20;
/// How long a pull asks a registry in all for what refers to the image, beside the transfer of its
/// blobs.
pub const REGISTRY_REFERRERS_MAX: Duration = Duration::from_secs(3);
/// The manifests of one image whose referrers are asked for; the top one is the first.
pub const REGISTRY_REFERRER_SUBJECTS_MAX: usize = 8;
/// Such questions that are asked at once.
pub const REGISTRY_REFERRER_QUESTIONS_MAX: usize = 4;
/// The pages of one list of referrers that are read.
pub const REGISTRY_REFERRER_PAGES_MAX: usize = 4;
/// The referrers of one image that are counted.
pub const REGISTRY_REFERRERS_COUNTED_MAX: usize = 4096;
/// The most pages of a tag list that are read.
pub const REGISTRY_TAG_PAGES_MAX: usize = 64;
/// Blobs whose repository is remembered, for mounting.
pub const REGISTRY_MOUNTS_KEPT_MAX: usize = 16 << 10;
/// The largest image manifest or index, which is what registries take.
pub const IMAGE_MANIFEST_BYTES_MAX: usize = 4 << 20;
/// The most manifests under one image index…
pub const IMAGE_MANIFESTS_MAX: usize = 1024;
/// …and their bytes together.
pub const IMAGE_MANIFESTS_BYTES_MAX: usize = 32 << 20;
/// The longest a stream of the line may run ahead of its reader. With quinn a larger window dies on
/// a lossy line: it keeps at most 1,024 pieces out of order a stream and else closes the whole
/// connection.
pub const CONNECTION_STREAM_WINDOW_BYTES: u32 = 1280 << 10;
/// The longest all streams of one line may run ahead of their readers at a site: 10 Gbit/s times 50
/// ms. At the hub it is less over QUIC:
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// before the peer has shown who it is,
pub const CONNECTION_WINDOW_FIRST_BYTES: u64 = 256 << 10;
/// while nothing is fetched from it, at most
pub const CONNECTION_WINDOW_IDLE_BYTES_MAX: u64 = 8 << 20;
/// and at least;
pub const CONNECTION_WINDOW_LEAST_BYTES: u64 = 64 << 10;
/// while something is, of all lines of one peer together at most
pub const CONNECTION_WINDOW_WANTED_BYTES_MAX: u64 = 16 << 20;
/// and of each at least.
pub const CONNECTION_WINDOW_WANTED_LEAST_BYTES: u64 = 1 << 20;
/// What one line may buffer for sending however many there are.
pub const CONNECTION_SEND_BYTES_LEAST: u64 = 256 << 10;
/// What one line buffers for sending at least while there are few, and at most when its congestion
/// window asks for more.
pub const CONNECTION_SEND_BYTES_MIN: u64 = 8 << 20;
/// How often what a line may buffer for sending is fitted to what it carries and to how many there
/// are.
pub const CONNECTION_FIT_EVERY: Duration = Duration::from_millis(500);
/// The most one line buffers for sending.
pub const CONNECTION_SEND_BYTES_MAX: u64 = 96 << 20;
/// Streams that each end of a line may have open at once.
pub const CONNECTION_STREAMS_MAX: u32 = 256;
/// Packets asked of the path at most. Larger ones were no faster.
pub const CONNECTION_PACKET_BYTES_MAX: u16 = 16_250;
/// The buffers asked of the kernel for the line's UDP socket.
pub const CONNECTION_SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// A quiet line is kept open by a packet this often.
pub const CONNECTION_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long the hub's UDP port may stay silent before a site tries TCP.
pub const CONNECTION_QUIC_ANSWER_MAX: Duration = Duration::from_secs(4);
/// How long one handshake may take, from the first packet to the hub's welcome or to the end of a
/// join request.
pub const CONNECTION_HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long its first part, TLS, may take at the hub.
pub const CONNECTION_TLS_MAX: Duration = Duration::from_secs(5);
/// Unfinished handshakes over each transport; beyond that the oldest is closed for a new one.
pub const CONNECTION_HANDSHAKES_MAX: usize = 256;
/// Unfinished handshakes, and join requests, of one address (IPv6: of one /64); beyond that its
/// oldest is closed.
pub const CONNECTION_HANDSHAKES_PER_ADDRESS_MAX: usize = 8;
/// Unfinished QUIC handshakes of one address that has proved that packets to it arrive (a Retry).
pub const CONNECTION_HANDSHAKES_PROVED_MAX: usize = CONNECTION_HANDSHAKES_MAX / 4;
/// Join requests that the hub reads and answers at once; beyond that the oldest that is not being
/// answered is closed.
pub const CONNECTION_JOINS_MAX: usize = 64;
/// Connections of one publisher.
pub const CONNECTIONS_PER_PUBLISHER_MAX: usize = 16;
/// Connections of one site, which has more than one only while it reconnects or changes from TCP to
/// QUIC.
pub const CONNECTIONS_PER_SITE_MAX: usize = 4;
/// Handshakes at once from which on the hub makes new callers prove their address first.
pub const CONNECTION_HANDSHAKES_EASY: usize = 32;
/// Lines that are set up and wait for the daemon to take them.
pub const CONNECTION_ARRIVALS_WAITING_MAX: usize = 64;
/// Addresses of one host name that are tried.
pub const CONNECTION_ADDRESSES_MAX: usize = 8;
/// The largest join request, join answer or welcome.
pub const CONNECTION_HELLO_BYTES_MAX: usize = 64 << 10;
/// The longest reason sent along when a line is closed.
pub const CONNECTION_REASON_BYTES_MAX: usize = 1024;
/// The largest piece of a stream in one frame of the TCP line.
pub const MUX_FRAME_BYTES_MAX: usize = 64 << 10;
/// What one write to the TCP line takes together.
pub const MUX_BATCH_BYTES: usize = 256 << 10;
/// A stream of the TCP line takes the next bytes from its writer once fewer than this wait: the
/// next piece as it is…
pub const MUX_STREAM_QUEUE_BYTES: usize = 64 << 10;
/// …while all streams of the line hold less than this, else no more than the above. It feeds the
/// kernel's buffer, which holds what is in flight, so no line needs more of it.
pub const MUX_QUEUE_BYTES: usize = 8 << 20;
/// Control frames of the TCP line that wait to be sent; a peer that provokes more and reads none is
/// cut off.
pub const MUX_CONTROL_BYTES_MAX: usize = 256 << 10;
/// Streams of one site that the hub answers at once.
pub const FETCH_STREAMS_MAX: usize = 128;
/// The largest record of a label file: one annotation, image, row, task or object.
pub const LABEL_RECORD_BYTES_MAX: usize = 1 << 20;
/// The deepest nesting of a label record.
pub const LABEL_DEPTH_MAX: u32 = 128;
/// The largest small file beside labels that is read whole: a list of names or sizes, or one
/// image's XML.
pub const LABEL_SIDE_FILE_BYTES_MAX: u64 = 4 << 20;
/// Label rows kept in memory before they are spilled, for each sort that runs (two at once at
/// most).
pub const LABEL_SORT_BYTES: usize = 32 << 20;
/// The longest pause between two tries to reach the hub.
pub const RECONNECT_MAX: Duration = Duration::from_secs(15);
/// The pause before what a full disk did not take is written, told or opened again.
pub const STATE_RETRY_EVERY: Duration = Duration::from_secs(5);
/// With less room than this on the disk of its state, a hub does not ask for reports again that it
/// could not store.
pub const STATE_WRITE_BYTES_MIN: u64 = 1 << 20;
/// The pause between two log lines about the same disk that cannot be written.
pub const STATE_LOG_EVERY: Duration = Duration::from_secs(60);
/// The largest list of artifacts at the head of a bundle.
pub const BUNDLE_LIST_BYTES_MAX: usize = 64 << 20;
/// The shortest `[share] check_every`.
pub const CHECK_EVERY_MIN: Duration = Duration::from_secs(1);
/// Artifacts that changed where they were published, which a site tells the hub of in one message;
/// others are told as these are mended.
pub const CHANGED_TOLD_MAX: i64 = 500;
/// How long a command waits for a daemon that went away while it did a job: after a restart it
/// knows the job no more.
pub const JOB_AWAY_MAX: Duration = Duration::from_secs(15);
/// How long a cancelled job may take to stop by itself before it is given up.
pub const JOB_CANCEL_MAX: Duration = Duration::from_secs(3);
/// Room that the store leaves on its disk beside a whole pack, so that the databases can still be
/// written.
pub const STORE_SPARE_BYTES: u64 = 16 << 20;
/// A B-tree file up to this size is verified by its checksums when it is opened: that reads all of
/// it.
pub const TREE_CHECKED_BYTES_MAX: u64 = 64 << 20;
/// What is appended to a pack before the free space is checked again.
pub const APPEND_LOOK_BYTES: u64 = 1 << 20;
/// Inodes that stay free on the disk of a daemon's own state.
pub const STATE_INODES_SPARE: u64 = 64;
/// A file of this size is not begun to be published where it will not fit; smaller ones find that
/// out as they go.
pub const FORECAST_BYTES_MIN: u64 = 2 * PACK_BYTES;
/// Room that decompressing an archive leaves on its disk, which is the store's as well: what that
/// asks for one pack…
pub const SCRATCH_SPARE_BYTES: u64 = PACK_BYTES + STORE_SPARE_BYTES;
/// …and whether it is there still is looked at each time that this much was written.
pub const SCRATCH_LOOK_BYTES: u64 = 8 << 20;
/// Artifacts that one training run borrows.
pub const RUN_INPUTS_MAX: usize = 64;
/// Training runs of one site that are not ended and cleaned up: each is told to the site whole.
pub const RUNS_OPEN_MAX: usize = 64;
/// The longest life of a training run.
pub const RUN_TTL_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The end of a trainer's output that is shown at the hub, bytes.
pub const TRAINER_TAIL_BYTES: usize = 4 << 10;
/// A trainer's log file begins anew once it holds this much; one older file is kept.
pub const TRAINER_LOG_BYTES_MAX: u64 = 8 << 20;
/// How long a trainer that is asked to end may take before it is killed.
pub const TRAINER_GRACE: Duration = Duration::from_secs(10);
/// How often a trainer is started from nothing: it may have gone down with its machine.
pub const TRAINER_STARTS_MAX: u32 = 3;
/// How often a running trainer is looked at.
pub const TRAINER_LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a training platform may take to answer the call that starts a run.
pub const TRAINER_CALL_MAX: Duration = Duration::from_secs(30);
/// How long after a run's deadline a platform that does not answer is still told that the run is
/// over.
pub const TRAINER_CALL_OFF_MAX: Duration = Duration::from_secs(6 * 3600);
/// Less room than this for a daemon's own state is a fault for `doctor`: two packs and the
/// databases beside them.
pub const STATE_ROOM_BYTES_MIN: u64 = 128 << 20;
/// How often a daemon gives buffers back that nobody used since.
pub const REST_EVERY: Duration = Duration::from_secs(5);
/// How often a site looks whether the chunk index has rows of places that are gone…
pub const PLACES_SWEEP_EVERY: Duration = Duration::from_secs(60);
/// …how many rows it looks at in one go, while others wait to write…
pub const PLACES_SWEEP_ROWS: usize = 16_384;
/// …and how long it rests after that.
pub const PLACES_SWEEP_PAUSE: Duration = Duration::from_millis(50);
/// Answers that are believed for a moment, of one sort, are not more than these.
pub const LATELY_ANSWERS_MAX: usize = 4096;
/// Examples that are kept of one category of what a publish leaves out.
pub const OMITTED_EXAMPLES_MAX: usize = 5;
/// Characters of one such example.
pub const OMITTED_EXAMPLE_CHARS_MAX: usize = 200;
/// Characters after which a line for people about one category gets no further example.
pub const OMITTED_LINE_CHARS_MAX: usize = 200;
/// The files with several names whose inodes are remembered while a folder is read, to count hard
/// links: 18 MiB at most. Of what comes after so many, each file with several names counts as a
/// hard link.
pub const HARD_LINKED_FILES_KEPT_MAX: usize = 7 << 17;
/// The names of the extended attributes of one file, in bytes: what Linux lists at most.
pub const XATTR_NAMES_BYTES_MAX: usize = 64 << 10;
/// Jobs that trainers began, of which the API knows whose they are.
pub const RUN_JOBS_KEPT_MAX: usize = 256;
/// Redirects of a registry that are followed for one request.
pub const REGISTRY_REDIRECTS_MAX: usize = 10;
/// Chunks named in one report of a failed transfer that the hub reads again.
pub const REFUSED_CHUNKS_MAX: usize = 16;
/// The paths of folders that the links of one artifact step back from, and of those links, in
/// bytes.
pub const LINK_FOLDERS_BYTES_MAX: usize = 8 << 20;
/// How long one `doctor` checks manifests before it leaves the rest to the next.
pub const DOCTOR_MANIFESTS_MAX: Duration = Duration::from_secs(10);
