//! All limits of the program, with the unit in the name.
//!
//! A queue, frame, timeout or concurrency level without a limit in this file is a defect.

use std::time::Duration;

/// The bytes in flight that all transfers of one daemon share, unless the configuration sets
/// another value, or the control group of the process has little memory.
pub const MEMORY_BUDGET_BYTES: u64 = 256 << 20;
/// The part of the memory of a control group that these bytes may have without a configured value:
/// one of so many. The rest is for connections, databases and the memory map of files.
pub const MEMORY_BUDGET_CGROUP_PART: u64 = 4;
/// The largest control message of a connection.
pub const CONTROL_FRAME_BYTES_MAX: usize = 4 << 20;
/// The number of manifests that the hub sends to a site in one control message without a request.
pub const MESSAGE_MANIFESTS_MAX: usize = 16;
/// The total size of these manifests.
pub const MESSAGE_MANIFESTS_BYTES_MAX: usize = 256 << 10;
/// The number of pushed root manifests that a site keeps until their transfers start.
pub const PUSHED_MANIFESTS_MAX: usize = 64;
/// The size of such a root manifest. A larger one is requested.
pub const PUSHED_ROOT_BYTES_MAX: usize = 256 << 10;
/// The largest request for chunks.
pub const FETCH_REQUEST_BYTES_MAX: usize = 64 << 10;
/// The largest chunk, raw or stored.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The largest question; a question contains only a few names.
pub const QUESTION_BYTES_MAX: usize = 64 << 10;
/// The memory of a question while it is answered, per byte of its text.
pub const QUESTION_BYTES_FACTOR: u64 = 8;
/// The memory of all questions of one peer.
pub const QUESTIONS_BYTES_MAX: u64 = 4 << 20;
/// The number of questions of one connection that are answered at once.
pub const QUESTIONS_AT_ONCE_MAX: usize = 128;
/// The time limit for an answer that does not move content first.
pub const ANSWER_MAX: Duration = Duration::from_secs(120);
/// The longest pause without moved bytes in an answer that moves content first.
pub const ANSWER_IDLE_MAX: Duration = Duration::from_secs(600);
/// The slowest rate at which a message may arrive, in bytes per second.
pub const MESSAGE_BYTES_PER_SECOND_MIN: u64 = 8 << 10;
/// The values in a message of a site or a publisher. A value of one byte costs some hundred bytes
/// once it is parsed, so that the length of a message alone does not limit its memory.
pub const MESSAGE_VALUES_MAX: usize = 80 << 10;
/// The values in a message of the hub, whose lists are longer.
pub const HUB_MESSAGE_VALUES_MAX: usize = 256 << 10;
/// A message larger than this is parsed on a blocking thread.
pub const MESSAGE_BYTES_SMALL: usize = 64 << 10;
/// How long the answer to a fetch may wait for content while nothing else is sent over its
/// connection. It ends before the requester closes the connection as silent ([`SILENCE_MAX`]).
pub const ANSWER_SILENT_MAX: Duration = Duration::from_secs(20);
/// How long a fetch waits for its own data while the connection carries other data: the time that
/// the peer may need for the data before it, plus a reserve.
pub const FETCH_IDLE_MAX: Duration = Duration::from_secs(960);
/// The same, for a manifest that the hub fetches before it answers. A manifest is sent before
/// content.
pub const MANIFEST_IDLE_MAX: Duration = Duration::from_secs(120);
/// Fewer bytes than this do not count as progress of a fetch, unless it has ended.
pub const FETCH_PROGRESS_BYTES: u64 = 16 << 10;
/// How long the hub may take to fetch the manifest of an artifact that a site publishes.
pub const OFFER_MAX: Duration = Duration::from_secs(3600);
/// The blocking tasks (reads, parsing, compression) that run at once for one peer.
pub const PEER_WORK_MAX: usize = 8;
/// The reports of transfers and runs per second that the hub accepts from one site.
pub const REPORTS_PER_SECOND_MAX: u32 = 1_000;
/// The reports that the hub accepts from one site at once after a pause.
pub const REPORTS_AT_ONCE_MAX: u32 = 20_000;
/// The connections per second that the hub accepts from one site, and at once after a pause. Each
/// writes lines to the log and a row to the catalogue.
pub const SITE_CONNECTIONS_PER_SECOND_MAX: (u32, u32) = (1, 60);
/// The same for one publisher: each publish is a connection or two.
pub const PUBLISHER_CONNECTIONS_PER_SECOND_MAX: (u32, u32) = (10, 200);
/// The publishes, deliveries, actions and runs per second that one site or publisher may request.
pub const CHANGES_PER_SECOND_MAX: u32 = 50;
/// The same, at once after a pause.
pub const CHANGES_AT_ONCE_MAX: u32 = 1_000;
/// The largest root manifest.
pub const ROOT_BYTES_MAX: usize = 1 << 20;
/// The values in the text of a root manifest.
pub const ROOT_VALUES_MAX: usize = 16 << 10;
/// The manifests of one site or publisher that the hub accepts at once; others wait. Each is in
/// memory until its pages have arrived.
pub const OFFERS_AT_ONCE_MAX: usize = 8;
/// The checks of manifests that run at once for one peer, each with at most 4 MiB of tables; others
/// wait.
pub const MANIFEST_CHECKS_MAX: usize = 2;
/// The approximate number of raw bytes that one fetch request asks for; it fits in the window of a
/// stream.
pub const FETCH_BATCH_BYTES: u64 = 1 << 20;
/// The total number of chunks, pages, ranges and parts in one fetch request.
pub const FETCH_BATCH_CHUNKS_MAX: usize = 1024;
/// The number of fetch requests that a transfer keeps in flight.
pub const FETCH_IN_FLIGHT_MAX: usize = 32;
/// The round trip time from which a transfer keeps more fetch requests in flight.
pub const FETCH_FAR_FROM: Duration = Duration::from_millis(20);
/// The number of fetch requests in flight from that round trip time on: the data of 10 Gbit/s in 50
/// ms.
pub const FETCH_IN_FLIGHT_FAR_MAX: usize = 60;
/// The total size of the old pages against which new pages are compressed at once.
pub const DIFFERENCE_BASE_BYTES_MAX: u64 = 2 << 20;
/// The size from which a pack is full.
pub const PACK_BYTES: u64 = 32 << 20;
/// The bytes of a transfer that were requested and are not committed. A kill costs at most this,
/// plus at least 8 MiB that the hub may still send.
pub const UNCOMMITTED_BYTES_MAX: u64 = 36 << 20;
/// The same, with more requests in flight. A kill costs this much only on a connection of that
/// speed.
pub const UNCOMMITTED_BYTES_FAR_MAX: u64 = 76 << 20;
/// The same, after bytes could not be stored, until some are stored again. A failed attempt costs
/// at most this.
pub const UNCOMMITTED_BYTES_AFTER_FAILURE_MAX: u64 = 2 << 20;
/// The number of bytes after which a transfer commits. It leaves more than half of the limit above
/// for requests in flight.
pub const COMMIT_BYTES: u64 = 16 << 20;
/// The time after which a transfer commits, if the byte limit is not reached before.
pub const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// A busy connection that receives nothing for this long is considered dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a publisher tries to reconnect to a hub that disappeared or has no free slot.
pub const HUB_AWAY_MAX: Duration = Duration::from_secs(600);
/// How long a publish or import waits for space on a full disk.
pub const ROOM_AWAITED_MAX: Duration = Duration::from_secs(600);
/// How often it checks the free space.
pub const ROOM_LOOK_EVERY: Duration = Duration::from_secs(1);
/// The publishes that run at once from one state directory.
pub const PUBLISHES_AT_ONCE_MAX: usize = 16;
/// The first pause between two attempts.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest pause between two attempts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// The first pause before a background worker is restarted; the longest one is [`BACKOFF_MAX`].
pub const WORKER_RESTART_FIRST: Duration = Duration::from_secs(1);
/// How long a background worker may be late before `doctor` reports it.
pub const WORKER_LATE_AFTER: Duration = Duration::from_secs(60);
/// The longest iteration of a background worker whose work does not depend on the amount of
/// content.
pub const WORKER_BUSY_MAX: Duration = Duration::from_secs(600);
/// How long the iteration in progress of a background worker may take to end when the daemon stops.
pub const WORKER_STOP_MAX: Duration = Duration::from_secs(2);
/// The longest wait of a background worker for a change of the catalogue: then it looks without
/// one.
pub const CHANGE_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a daemon removes the oldest events beyond [`EVENTS_KEPT`].
pub const EVENT_TRIM_EVERY: Duration = Duration::from_secs(600);
/// The longest error text that is kept for a background worker.
pub const WORKER_ERROR_BYTES_MAX: usize = 1 << 10;
/// The longest pause before the hub is asked again for content of a site that is offline.
pub const SOURCE_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The threads of one sink at once: for its transfers and for other calls.
pub const SINK_THREADS_MAX: usize = 128;
/// The threads for paths of one filesystem at once: jobs that read a source, and the reads of what
/// is published there.
pub const MOUNT_THREADS_MAX: usize = 128;
/// Filesystems whose threads are remembered while they do nothing.
pub const MOUNTS_KEPT: usize = 64;
/// A sink that has not responded for this long is reported as silent. With a check each second, the
/// report comes within 5 s.
pub const SINK_SILENT_AFTER: Duration = Duration::from_secs(3);
/// How long `doctor`, and other callers that do not serve a transfer, wait for a sink.
pub const SINK_ANSWER_MAX: Duration = Duration::from_secs(5);
/// The longest text about the state of an artifact in the answer of a site.
pub const PRESENCE_TEXT_BYTES_MAX: usize = 1 << 10;
/// How long a site checks an artifact that is to be delivered again, without reading it. The hub
/// waits slightly longer.
pub const PRESENCE_CHECK_MAX: Duration = Duration::from_secs(4);
/// How long a stopped transfer waits for its threads, which may hang in a sink.
pub const SINK_STOP_MAX: Duration = Duration::from_secs(2);
/// How often a site retries the removal of leftovers in a staging directory.
pub const LEFTOVERS_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How often a daemon registers in the root of its files sink.
pub const ROOT_USE_SAID_EVERY: Duration = Duration::from_secs(86_400);
/// A daemon that has not registered for this long no longer uses the root.
pub const ROOT_USE_ENDS_AFTER: Duration = Duration::from_secs(30 * 86_400);
/// The bytes in flight reserved for each sink, so that a sink that hangs cannot occupy the complete
/// budget.
pub const SINK_OWN_BYTES: u64 = 2 << 20;
/// The longest pause before a failed sink is tried again; a failed attempt moves no bytes.
pub const SINK_PAUSE_MAX: Duration = Duration::from_secs(10);
/// The directory names that one walk over a tree holds in memory, in bytes. A larger directory is
/// read in batches.
pub const WALK_NAMES_BYTES_MAX: usize = 32 << 20;
/// The largest JSON document of an image (manifest, index, config) in bytes, which registries also
/// accept.
pub const IMAGE_JSON_BYTES_MAX: u64 = 4 << 20;
/// All JSON documents of one image, in bytes.
pub const IMAGE_JSON_TOTAL_BYTES_MAX: u64 = 64 << 20;
/// The JSON of a layout that is read to distinguish referrers from images, in bytes.
pub const IMAGE_REFERRERS_JSON_BYTES_MAX: u64 = 16 << 20;
/// The entries of a directory of OCI layouts that are looked at for layouts with the same blobs.
pub const LAYOUTS_SEARCHED_MAX: usize = 20_000;
/// The signatures, attestations and SBOMs that are carried with an image.
pub const IMAGE_REFERRERS_MAX: usize = 256;
/// The deepest nesting of indexes.
pub const IMAGE_INDEX_DEPTH_MAX: usize = 4;
/// The largest number of members of an image archive.
pub const ARCHIVE_MEMBERS_MAX: usize = 65_536;
/// All member names of an image archive, in bytes.
pub const ARCHIVE_NAMES_BYTES_MAX: usize = 16 << 20;
/// The largest number of parts of a sparse member of an image archive.
pub const ARCHIVE_SPARSE_PARTS_MAX: usize = 65_536;
/// The largest extended header (a long name) in an archive, in bytes.
pub const ARCHIVE_HEADER_BYTES_MAX: u64 = 64 << 10;
/// The most images in a list of images to publish.
pub const IMAGE_LIST_MAX: usize = 10_000;
/// Decompression of a layer or an archive stops as a decompression bomb after this many output
/// bytes, if the ratio is also exceeded. The default of `[limits] image_unpacked`: hashing them takes
/// minutes.
pub const UNPACKED_BYTES_MAX: u64 = 64 << 30;
/// The ratio of output to input for the bomb check. Real layers reach 20; gzip cannot exceed 1,032;
/// zstd has no limit.
pub const BOMB_RATIO: u64 = 256;
/// The layers of an image that are checked at once.
pub const IMAGE_CHECKS_MAX: usize = 4;
/// The memory of all decoders of layers and archives in a process: one with the largest window, and
/// three usual ones.
pub const DECODERS_BYTES_MAX: u64 = 160 << 20;
/// What one of them takes at least: a window of 8 MiB, which every decoder of zstd supports.
pub const DECODER_BYTES_MIN: u64 = 9 << 20;
/// The largest window or dictionary of an archive or a layer: zstd writes it with `--ultra -22`, and
/// `xz -9` has 64 MiB.
pub const DECODER_WINDOW_BYTES_MAX: u64 = 128 << 20;
/// The compressed bytes that may be read before anything is decompressed from them; a third of the
/// bytes behind them must be content.
pub const DECODER_EMPTY_BYTES_MAX: u64 = 2 << 20;
/// The values in a JSON document of an image.
pub const IMAGE_JSON_VALUES_MAX: usize = 64 << 10;
/// The connections of sites and publishers at the hub. Publishers get at most three quarters of
/// them.
pub const SITE_CONNECTIONS_MAX: usize = 4096;
/// How long a cancel waits for a sink to state whether it has the artifact.
pub const CANCEL_LOOK_MAX: Duration = Duration::from_secs(5);
/// A process with a lower limit of open files logs a warning at its start.
pub const OPEN_FILES_EASY: usize = 1024;
/// The period of one log line for events that strangers can trigger.
pub const LOG_TALLY_EVERY: Duration = Duration::from_secs(60);
/// The characters of the last event in such a line.
pub const LOG_TALLY_CHARS_MAX: usize = 300;
/// How long a clean stop may take before the remaining work is dropped; a resume completes it.
pub const DRAIN_MAX: Duration = Duration::from_secs(10);
/// The longest line of a canonical label file, which is one row: a record, its shape in pixels, and
/// its other fields.
pub const LABEL_LINE_BYTES_MAX: usize = 12 << 20;
/// The classes of one label set; only their ids are kept in memory.
pub const LABEL_CLASSES_MAX: usize = 100_000;
/// The approximate size of a batch of rows to or from a label database.
pub const LABEL_BATCH_BYTES: usize = 1 << 20;
/// How long the rows of a label version are counted by a quick check.
pub const LABEL_COUNT_MAX: Duration = Duration::from_millis(1500);
/// The number of batches that wait.
pub const LABEL_BATCHES_QUEUED_MAX: usize = 4;
/// A sink that has not responded for this long is reported as the reason why a transfer waits.
pub const SINK_REPORT_AFTER: Duration = Duration::from_secs(3);
/// How long a label database may take to accept a connection.
pub const LABEL_CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a label database may take to accept one batch of rows, or to return the next row.
pub const LABEL_SILENCE_MAX: Duration = Duration::from_secs(120);
/// How often a hub looks whether it received something from each site. `last_seen` is exact to this.
pub const HEARD_LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often a hub stores when it last received something from the connected sites.
pub const HEARD_STORE_EVERY: Duration = Duration::from_secs(60);
/// How long one statement without rows (an index, a switch) may take in a label database.
pub const LABEL_STATEMENT_MAX: Duration = Duration::from_secs(3600);
/// How long a commit waits for the writer lock of SQLite before the delivery pauses and retries.
pub const LABEL_WRITER_WAIT_MAX: Duration = Duration::from_secs(4);
/// How long a statement waits for a lock in PostgreSQL before the delivery pauses and retries.
pub const LABEL_LOCK_WAIT_MAX: Duration = Duration::from_secs(4);
/// A PostgreSQL call that takes longer than this is monitored from a second session, which reports
/// the blocking sessions.
pub const LABEL_BLOCKED_REPORT_AFTER: Duration = Duration::from_secs(1);
/// How long PostgreSQL may reject or ignore that second session before the call is aborted.
pub const LABEL_UNREACHABLE_MAX: Duration = Duration::from_secs(60);
/// How often a change of tables is tried against locks of readers, half a second each.
pub const LABEL_DDL_TRIES_MAX: u32 = 6;
/// The longest wait of an API long poll.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(50);
/// The largest body of an API request.
pub const API_BODY_BYTES_MAX: usize = 1 << 20;
/// The bytes of such bodies that take no memory of [`API_BODIES_BYTES_MAX`].
pub const API_BODY_BYTES_SMALL: usize = 64 << 10;
/// The memory for the larger bodies of all API requests that are handled at once.
pub const API_BODIES_BYTES_MAX: usize = 16 << 20;
/// The values in the body of an API request.
pub const API_BODY_VALUES_MAX: usize = 16 << 10;
/// The longest silence within the body of an API request, and its total time limit unless it keeps
/// the minimum rate.
pub const API_BODY_SILENCE_MAX: Duration = Duration::from_secs(30);
/// The minimum rate of the body of an API request, in bytes per second.
pub const API_BODY_RATE_MIN: u64 = 4 << 10;
/// The time limit for the head of an API request, from the connection or the end of the previous
/// request.
pub const API_HEAD_MAX: Duration = Duration::from_secs(10);
/// The largest head of an API request.
pub const API_HEAD_BYTES_MAX: usize = 128 << 10;
/// Connections to the API at once: over TCP, and the same number over the local socket. If more
/// arrive, the oldest connection without the token is closed; if all have presented it, the new one
/// waits.
pub const API_CONNECTIONS_MAX: usize = 256;
/// Connections to the API of one address (IPv6: of one /64) without the token. If more arrive, the
/// oldest is closed.
pub const API_CONNECTIONS_PER_ADDRESS_MAX: usize = 32;
/// The characters of a request in the log.
pub const API_AUDIT_CHARS_MAX: usize = 500;
/// How long a client keeps an idle connection to the API; less than the daemon does.
pub const API_CLIENT_IDLE_MAX: Duration = Duration::from_secs(5);
/// An API connection without traffic for this long is closed; twice the longest poll.
pub const API_IDLE_MAX: Duration = Duration::from_secs(120);
/// The rows of one API reply.
pub const API_ROWS_MAX: u32 = 10_000;
/// The rows of a long API reply that are in memory at once; the reply is created and sent page by
/// page.
pub const API_PAGE_ROWS: u32 = 500;
/// The JSON bytes of such a page, and of a reply that ends with a cursor. Every connection can hold
/// two.
pub const API_PAGE_BYTES: usize = 128 << 10;
/// The API lists that are created at once, a page or a complete small one; other requests wait.
pub const API_LISTS_AT_ONCE_MAX: usize = 4;
/// The ids in one API query.
pub const API_QUERY_IDS_MAX: usize = 1_000;
/// The events that a stream holds in memory.
pub const API_STREAM_EVENTS: u32 = 50;
/// The default number of rows of one API reply, and the limit of a reply that a reader continues
/// from a cursor.
pub const API_ROWS_DEFAULT: u32 = 1_000;
/// The interval between two checks of a waiting API request; faster changes are reported together.
pub const API_LOOK_EVERY: Duration = Duration::from_millis(10);
/// The interval of heartbeats on a quiet event stream (proxies close what is silent for 15 s).
pub const SSE_HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a waiting command tolerates a daemon that does not respond (a restart).
pub const DAEMON_AWAY_MAX: Duration = Duration::from_secs(300);
/// How long a command waits for the answer of the API in addition to the wait that it requested.
pub const API_REPLY_MAX: Duration = Duration::from_secs(60);
/// The interval of progress lines of a command without a terminal.
pub const PROGRESS_LINE_EVERY: Duration = Duration::from_secs(10);
/// The longest statement of a receipt in bytes: a JSON object with a location.
pub const RECEIPT_STATEMENT_BYTES_MAX: usize = 16 << 10;
/// The longest signature of a receipt, in bytes of base64.
pub const RECEIPT_SIGNATURE_BYTES_MAX: usize = 1 << 10;
/// The longest certificate of a receipt, in bytes of base64.
pub const RECEIPT_CERTIFICATE_BYTES_MAX: usize = 8 << 10;
/// The longest message about a transfer, a run or a fault, in bytes; a longer one is shortened.
pub const MESSAGE_BYTES_MAX: usize = 8 << 10;
/// The longest text that states what to do next, in bytes.
pub const NEXT_BYTES_MAX: usize = 2 << 10;
/// The longest location of an artifact, in bytes: a path and its root.
pub const LOCATION_BYTES_MAX: usize = 5 << 10;
/// The longest value of one field in the log, in bytes.
pub const LOG_FIELD_BYTES_MAX: usize = 16 << 10;
/// The longest version of a program, in bytes.
pub const VERSION_BYTES_MAX: usize = 64;
/// The entries of an `allow` list of a site (for sharing or for training) that the hub stores; each
/// is a selection of sites.
pub const ALLOW_ENTRIES_MAX: usize = 10_000;
/// The longest certificate request, in bytes of hex.
pub const RENEWAL_BYTES_MAX: usize = 16 << 10;
/// The reports that a site sends in one message, in bytes of JSON.
pub const REPORT_BYTES_MAX: usize = 1 << 20;
/// The transfers in one part of a desired state, or the reports in one batch, in bytes of JSON. On
/// a slow connection it delays an urgent message by this much.
pub const CHANGES_BYTES_MAX: usize = 32 << 10;
/// The open transfers of one site that the hub lists, and that a site accepts.
pub const TRANSFERS_LISTED_MAX: usize = 100_000;
/// The transfers whose reports a site has sent and the hub has not acknowledged.
pub const REPORTS_UNACKED_MAX: usize = 1_000;
/// The reports that a site sends at once after the hub could not store some.
pub const REPORTS_PROBE_MAX: usize = 8;
/// A report that the hub has not acknowledged for this long is sent again.
pub const REPORTS_ACK_MAX: Duration = Duration::from_secs(120);
/// The shortest pause between two batches of reports, unless one contains the end of a transfer.
pub const REPORTS_EVERY: Duration = Duration::from_millis(250);
/// The same, for a batch that contains the end of a transfer.
pub const REPORTS_OF_ENDS_EVERY: Duration = Duration::from_millis(20);
/// The longest pause before reports that the hub could not store are sent again.
pub const REPORTS_AGAIN_MAX: Duration = Duration::from_secs(15);
/// The shortest pause between two complete lists of desired transfers on one connection.
pub const LIST_EVERY_MIN: Duration = Duration::from_secs(5);
/// How long the hub rests after it compared the desired state of a site, in multiples of the time
/// that this took.
pub const LIST_REST_FACTOR: u32 = 4;
/// The longest such rest.
pub const LIST_REST_MAX: Duration = Duration::from_secs(5);
/// One answer to a question between hub and site, in bytes of JSON; a longer list is sent in
/// several answers.
pub const ANSWER_BYTES_MAX: usize = CONTROL_FRAME_BYTES_MAX - (64 << 10);
/// The artifacts of one delivery.
pub const DELIVERY_ARTIFACTS_MAX: usize = 1_000;
/// Artifacts times sites of one delivery.
pub const DELIVERY_PARTS_MAX: usize = 100_000;
/// Artifacts times sites of one plan.
pub const PLAN_ROWS_MAX: usize = 5_000;
/// The notes of one job.
pub const JOB_NOTES_MAX: usize = 1_000;
/// The result of one job, in bytes of JSON. Of a longer list, the first rows and the total number
/// are kept.
pub const JOB_RESULT_BYTES_MAX: usize = 256 << 10;
/// The artifacts or sites of one delivery that are listed if not all names fit in one answer.
pub const NAMES_LISTED_MAX: usize = 1_000;
/// The largest byte count accepted from a peer: 1 EiB, so that 16 of them can be added without
/// overflow.
pub const COUNTED_BYTES_MAX: u64 = 1 << 60;
/// The largest generation of a transfer, far above any real number of retries.
pub const GENERATION_MAX: i64 = 1 << 40;
/// The longest id of a transfer, a delivery or a run.
pub const ID_BYTES_MAX: usize = 64;
/// The ids in one question of a site.
pub const IDS_ASKED_MAX: usize = 2_500;
/// The transfer ids in one API query; a request line may have 64 KiB.
pub const API_IDS_MAX: usize = 200;
/// The largest configuration file.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// The largest secret or certificate file.
pub const SECRET_BYTES_MAX: u64 = 1 << 20;
/// The smallest `[limits] memory`; less cannot hold the batches of one transfer.
pub const MEMORY_BUDGET_BYTES_MIN: u64 = 32 << 20;
/// The events kept for `--since`. Older events are removed, and a reader that needs them must start
/// again.
pub const EVENTS_KEPT: i64 = 100_000;
/// The offending records or names that one error lists; of records, those of each kind.
pub const OFFENDERS_LISTED_MAX: usize = 20;
/// The chunk bytes that a publish passes to a worker at once.
pub const INGEST_BATCH_BYTES: usize = 1 << 20;
/// The number of such batches in flight.
pub const INGEST_BATCHES_MAX: usize = 8;
/// The time limit for connecting to a registry.
pub const REGISTRY_CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a registry may be silent: before it answers a small request, or between two pieces of a
/// body.
pub const REGISTRY_SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a registry may take to answer after a complete blob was sent; some hash it again first.
pub const REGISTRY_CLOSE_MAX: Duration = Duration::from_secs(15 * 60);
/// The pause before a registry in read-only mode is tried again.
pub const REGISTRY_READ_ONLY_PAUSE: Duration = Duration::from_secs(60);
/// The longest Retry-After that is respected.
pub const REGISTRY_RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);
/// The longest note on a transfer.
pub const NOTE_BYTES_MAX: usize = 2 << 10;
/// How long a request waits if the registry asks for a pause (429, 503). After that, the delivery
/// pauses and shows the reason.
pub const REGISTRY_PAUSE_IN_PLACE_MAX: Duration = Duration::from_secs(3);
/// The same, for a request of a publish, which is not repeated automatically.
pub const REGISTRY_PAUSE_OF_PULL_MAX: Duration = Duration::from_secs(300);
/// The longest pause if the registry does not state one.
pub const REGISTRY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// A registry that has not answered for this long is reported by the delivery that waits for it.
pub const REGISTRY_SILENCE_REPORT_AFTER: Duration = Duration::from_secs(3);
/// How long fetched blobs of a failed publish are kept for the next attempt.
pub const PULLED_KEPT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The number of repositories whose fetched blobs are kept.
pub const PULLED_REPOSITORIES_MAX: usize = 8;
/// The blobs of one image that are transferred to or from a registry at once.
pub const REGISTRY_BLOBS_IN_FLIGHT_MAX: usize = 3;
/// The size of the pieces in which a blob is read while it is sent to a registry.
pub const REGISTRY_READ_BYTES: usize = 512 << 10;
/// The number of such pieces that are read ahead.
pub const REGISTRY_READ_AHEAD_MAX: usize = 3;
/// The first chunk size of a chunked upload, which is used if a proxy limits the request size.
pub const REGISTRY_CHUNK_BYTES: u64 = 64 << 20;
/// The smallest chunk size.
pub const REGISTRY_CHUNK_BYTES_MIN: u64 = 1 << 20;
/// The attempts for one blob before the pause of the transfer applies.
pub const REGISTRY_BLOB_TRIES_MAX: u32 = 3;
/// The number of bearer tokens that are kept.
pub const REGISTRY_TOKENS_KEPT_MAX: usize = 256;
/// The largest token, error body or list that is read from a registry.
pub const REGISTRY_BODY_BYTES_MAX: usize = 1 << 20;
/// The total time for asking a registry for referrers of the image, in parallel with the transfer
/// of its blobs.
pub const REGISTRY_REFERRERS_MAX: Duration = Duration::from_secs(3);
/// The number of manifests of one image whose referrers are requested, with those of the referrers
/// themselves; the top manifest is the first.
pub const REGISTRY_REFERRER_SUBJECTS_MAX: usize = 32;
/// The number of these requests that run at once.
pub const REGISTRY_REFERRER_QUESTIONS_MAX: usize = 4;
/// The pages that are read from one list of referrers.
pub const REGISTRY_REFERRER_PAGES_MAX: usize = 4;
/// How often the list of a fallback tag is written until it has what was added.
pub const REGISTRY_FALLBACK_TRIES_MAX: usize = 4;
/// The referrers of one image that are counted.
pub const REGISTRY_REFERRERS_COUNTED_MAX: usize = 4096;
/// The pages that are read from a tag list.
pub const REGISTRY_TAG_PAGES_MAX: usize = 64;
/// The number of blobs whose repository is remembered for mounting.
pub const REGISTRY_MOUNTS_KEPT_MAX: usize = 16 << 10;
/// The largest image manifest or index, which is the limit of registries.
pub const IMAGE_MANIFEST_BYTES_MAX: usize = 4 << 20;
/// The number of manifests below one image index.
pub const IMAGE_MANIFESTS_MAX: usize = 1024;
/// The total size of these manifests.
pub const IMAGE_MANIFESTS_BYTES_MAX: usize = 32 << 20;
/// The receive window of a stream. A larger window fails with quinn on a connection with loss:
/// quinn stores at most 1,024 out-of-order pieces per stream, and closes the whole connection if
/// there are more.
pub const CONNECTION_STREAM_WINDOW_BYTES: u32 = 1280 << 10;
/// The receive window of a connection at a site: 10 Gbit/s times 50 ms. At the hub it is smaller
/// over QUIC; see the next limits.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// The receive window at the hub before the peer is authenticated.
pub const CONNECTION_WINDOW_FIRST_BYTES: u64 = 256 << 10;
/// The largest receive window at the hub while nothing is fetched from the peer.
pub const CONNECTION_WINDOW_IDLE_BYTES_MAX: u64 = 8 << 20;
/// The smallest receive window at the hub while nothing is fetched from the peer.
pub const CONNECTION_WINDOW_LEAST_BYTES: u64 = 64 << 10;
/// The largest receive window of all connections of one peer while the hub fetches from it.
pub const CONNECTION_WINDOW_WANTED_BYTES_MAX: u64 = 16 << 20;
/// The smallest receive window of each connection while the hub fetches from it.
pub const CONNECTION_WINDOW_WANTED_LEAST_BYTES: u64 = 1 << 20;
/// The bytes that a connection may always buffer for sending.
pub const CONNECTION_SEND_BYTES_LEAST: u64 = 256 << 10;
/// The bytes that a connection buffers for sending if there are few connections. A larger
/// congestion window increases this.
pub const CONNECTION_SEND_BYTES_MIN: u64 = 8 << 20;
/// The send buffer of a slow connection with a long round trip.
pub const CONNECTION_SEND_BYTES_SLOW: u64 = 32 << 10;
/// How often the send buffer of a connection in use is adjusted.
pub const CONNECTION_SEND_FIT_EVERY: Duration = Duration::from_millis(20);
/// What a connection of a site takes at the hub besides its send buffer: about 60 KiB for QUIC and
/// TLS, tasks and the state of the session; while it sends, also the packets that are being built and
/// the acknowledged part of a buffer. The send buffers get less memory by this.
pub const CONNECTION_STATE_BYTES: u64 = 128 << 10;
/// How often the send buffers are adjusted to the bandwidth and the number of connections.
pub const CONNECTION_FIT_EVERY: Duration = Duration::from_millis(500);
/// The largest send buffer of a connection.
pub const CONNECTION_SEND_BYTES_MAX: u64 = 96 << 20;
/// The streams that each end of a connection may have open at once.
pub const CONNECTION_STREAMS_MAX: u32 = 256;
/// The largest packet size that is probed. Larger packets were not faster.
pub const CONNECTION_PACKET_BYTES_MAX: u16 = 16_250;
/// The requested kernel buffers of the UDP socket.
pub const CONNECTION_SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// The interval of keep-alive packets on a quiet connection.
pub const CONNECTION_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long a site waits for an answer over UDP before it tries TCP.
pub const CONNECTION_QUIC_ANSWER_MAX: Duration = Duration::from_secs(4);
/// The time limit for a handshake, from the first packet to the welcome of the hub or to the end of
/// a join request.
pub const CONNECTION_HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// The time limit for TLS, the first part of a handshake, at the hub.
pub const CONNECTION_TLS_MAX: Duration = Duration::from_secs(5);
/// The unfinished handshakes over each transport. If more arrive, the oldest is closed.
pub const CONNECTION_HANDSHAKES_MAX: usize = 256;
/// The unfinished handshakes, and join requests, of one address (IPv6: of one /64). If more arrive,
/// the oldest is closed.
pub const CONNECTION_HANDSHAKES_PER_ADDRESS_MAX: usize = 8;
/// The unfinished QUIC handshakes of an address that was proved with a Retry.
pub const CONNECTION_HANDSHAKES_PROVED_MAX: usize = CONNECTION_HANDSHAKES_MAX / 4;
/// The join requests that the hub processes at once. If more arrive, the oldest that is not being
/// answered is closed.
pub const CONNECTION_JOINS_MAX: usize = 64;
/// The connections of one publisher.
pub const CONNECTIONS_PER_PUBLISHER_MAX: usize = 16;
/// The connections of one site. It has more than one only while it reconnects or changes from TCP
/// to QUIC.
pub const CONNECTIONS_PER_SITE_MAX: usize = 4;
/// The number of handshakes from which the hub requires new peers to prove their address first.
pub const CONNECTION_HANDSHAKES_EASY: usize = 32;
/// The established connections that wait for the daemon to accept them.
pub const CONNECTION_ARRIVALS_WAITING_MAX: usize = 64;
/// The addresses of one host name that are tried.
pub const CONNECTION_ADDRESSES_MAX: usize = 8;
/// The hub addresses in one configuration.
pub const CONNECTION_HUBS_MAX: usize = 8;
/// How long the name of a hub may take to resolve.
pub const CONNECTION_RESOLVE_MAX: Duration = Duration::from_secs(5);
/// The longest URL of a proxy.
pub const PROXY_URL_BYTES_MAX: usize = 2 << 10;
/// How long a proxy may take to open a connection; less than a handshake may take.
pub const PROXY_ANSWER_MAX: Duration = Duration::from_secs(8);
/// The largest answer of an HTTP proxy to CONNECT.
pub const PROXY_ANSWER_BYTES_MAX: usize = 8 << 10;
/// The largest join request, join answer or welcome.
pub const CONNECTION_HELLO_BYTES_MAX: usize = 64 << 10;
/// The longest reason in a close message.
pub const CONNECTION_REASON_BYTES_MAX: usize = 1024;
/// The largest piece of a stream in one frame of the TCP connection.
pub const MUX_FRAME_BYTES_MAX: usize = 64 << 10;
/// The bytes of one write to the TCP connection.
pub const MUX_BATCH_BYTES: usize = 256 << 10;
/// A stream of the TCP connection accepts the next piece from its writer when fewer bytes than this
/// are queued.
pub const MUX_STREAM_QUEUE_BYTES: usize = 64 << 10;
/// The bytes queued in all streams of the connection up to which a complete piece is accepted;
/// above it, each stream queues only up to the limit above. The queue feeds the kernel's buffer,
/// which holds the data in flight, so no connection needs more.
pub const MUX_QUEUE_BYTES: usize = 8 << 20;
/// The queued control frames of the TCP connection. A peer that causes more and does not read them
/// is disconnected.
pub const MUX_CONTROL_BYTES_MAX: usize = 256 << 10;
/// The streams of one site that the hub answers at once.
pub const FETCH_STREAMS_MAX: usize = 128;
/// The largest record of a label file: one annotation, image, row or object. A mask of a million
/// numbers fits.
pub const LABEL_RECORD_BYTES_MAX: usize = 4 << 20;
/// The characters of the place of a bad label record, and of what is wrong with it.
pub const LABEL_BAD_DETAIL_CHARS_MAX: usize = 400;
/// The largest task of Label Studio, which holds all annotations of an image: one is in memory at a
/// time.
pub const LABEL_TASK_BYTES_MAX: usize = 64 << 20;
/// The pixels of one mask, which is in memory as one byte a pixel; an image of 8192 × 8192.
pub const LABEL_MASK_PIXELS_MAX: u64 = 64 << 20;
/// The widest and the highest mask.
pub const LABEL_MASK_SIDE_PIXELS_MAX: u32 = 65_535;
/// The deepest nesting of a label record.
pub const LABEL_DEPTH_MAX: u32 = 128;
/// The largest small file of a label set that is read completely: a list of names or sizes, or the
/// XML of one image.
pub const LABEL_SIDE_FILE_BYTES_MAX: u64 = 4 << 20;
/// The label rows kept in memory before they are written to disk, for each running sort (at most
/// two).
pub const LABEL_SORT_BYTES: usize = 32 << 20;
/// The longest pause between two attempts to reach the hub in the first minutes: a hub that was
/// killed has its sites back soon after its start.
pub const RECONNECT_SOON_MAX: Duration = Duration::from_secs(3);
/// The attempts with such pauses.
pub const RECONNECT_SOON_ATTEMPTS: u32 = 100;
/// The longest pause between later attempts to reach the hub.
pub const RECONNECT_MAX: Duration = Duration::from_secs(15);
/// The pause before a write, report or open that failed because of a full disk is retried.
pub const STATE_RETRY_EVERY: Duration = Duration::from_secs(5);
/// With less space than this on the disk of its state, a hub does not request again the reports
/// that it could not store.
pub const STATE_WRITE_BYTES_MIN: u64 = 1 << 20;
/// The pause between two log lines about the same disk that cannot be written.
pub const STATE_LOG_EVERY: Duration = Duration::from_secs(60);
/// The largest list of artifacts at the beginning of a bundle.
pub const BUNDLE_LIST_BYTES_MAX: usize = 64 << 20;
/// The shortest `[share] check_every`.
pub const CHECK_EVERY_MIN: Duration = Duration::from_secs(1);
/// The artifacts changed at their source that a site reports to the hub in one message; the others
/// are reported after these are restored.
pub const CHANGED_REPORTED_MAX: i64 = 500;
/// How long a command waits for a daemon that disappeared during a job; a restarted daemon no
/// longer has the job.
pub const JOB_AWAY_MAX: Duration = Duration::from_secs(15);
/// How long a cancelled job may take to stop before it is aborted.
pub const JOB_CANCEL_MAX: Duration = Duration::from_secs(3);
/// The space that the store leaves free on its disk in addition to a whole pack, so that the
/// databases can still be written.
pub const STORE_SPARE_BYTES: u64 = 16 << 20;
/// The largest B-tree file whose checksums are verified when it is opened, which reads the complete
/// file.
pub const TREE_CHECKED_BYTES_MAX: u64 = 64 << 20;
/// The bytes that are appended to a pack before the free space is checked again.
pub const APPEND_LOOK_BYTES: u64 = 1 << 20;
/// The inodes that stay free on the disk of a daemon's own state.
pub const STATE_INODES_SPARE: u64 = 64;
/// A file of at least this size is not published if it does not fit; a smaller one fails during the
/// publish.
pub const FORECAST_BYTES_MIN: u64 = 2 * PACK_BYTES;
/// The space that decompressing an archive leaves free on its disk, which is also that of the
/// store: the space for one pack.
pub const SCRATCH_SPARE_BYTES: u64 = PACK_BYTES + STORE_SPARE_BYTES;
/// The number of written bytes after which that space is checked again.
pub const SCRATCH_LOOK_BYTES: u64 = 8 << 20;
/// The artifacts that one training run borrows.
pub const RUN_INPUTS_MAX: usize = 64;
/// The training runs of one site that are not ended and cleaned up. Each is sent to the site
/// completely.
pub const RUNS_OPEN_MAX: usize = 64;
/// The longest lifetime of a training run.
pub const RUN_TTL_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The end of a trainer's output that the hub shows, in bytes.
pub const TRAINER_TAIL_BYTES: usize = 4 << 10;
/// The size from which a trainer's log file is rotated; one older file is kept.
pub const TRAINER_LOG_BYTES_MAX: u64 = 8 << 20;
/// How long a trainer may take to stop before it is killed.
pub const TRAINER_GRACE: Duration = Duration::from_secs(10);
/// How often a trainer is started from the beginning; it may have stopped with its machine.
pub const TRAINER_STARTS_MAX: u32 = 3;
/// How often a running trainer is checked.
pub const TRAINER_LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a training platform may take to answer the call that starts a run.
pub const TRAINER_CALL_MAX: Duration = Duration::from_secs(30);
/// How long after the deadline of a run a platform that does not respond is still informed that the
/// run is over.
pub const TRAINER_CALL_OFF_MAX: Duration = Duration::from_secs(6 * 3600);
/// Less space than this for a daemon's own state is a fault in `doctor`: two packs and the
/// databases.
pub const STATE_ROOM_BYTES_MIN: u64 = 128 << 20;
/// How often a daemon frees unused buffers.
pub const REST_EVERY: Duration = Duration::from_secs(5);
/// How often a site checks whether the chunk index has rows of removed locations.
pub const PLACES_SWEEP_EVERY: Duration = Duration::from_secs(60);
/// The number of rows that it checks at once, while other writers wait.
pub const PLACES_SWEEP_ROWS: usize = 16_384;
/// The pause after that.
pub const PLACES_SWEEP_PAUSE: Duration = Duration::from_millis(50);
/// The entries of one expiring cache.
pub const LATELY_ANSWERS_MAX: usize = 4096;
/// The examples kept of one category of omitted content.
pub const OMITTED_EXAMPLES_MAX: usize = 5;
/// The examples kept of bad records of labels: twenty of each kind, and the count of each kind.
pub const OMITTED_BAD_RECORDS_MAX: usize = 500;
/// The characters of one such example.
pub const OMITTED_EXAMPLE_CHARS_MAX: usize = 200;
/// The characters after which a line about one category gets no further example.
pub const OMITTED_LINE_CHARS_MAX: usize = 200;
/// The files with several names whose inodes are remembered while a directory is read, to count
/// hard links: at most 18 MiB. Beyond this number, each file with several names counts as a hard
/// link.
pub const HARD_LINKED_FILES_KEPT_MAX: usize = 7 << 17;
/// The extended attributes of one entry in a manifest, and the name of one of them, in bytes.
pub const XATTRS_BYTES_MAX: usize = 32 << 10;
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// The paths of the files of one artifact that have several names, in bytes, with the memory of
/// each, that a publish keeps. The files beyond are published as separate files.
pub const HARD_LINK_BYTES_MAX: usize = 32 << 20;
/// The versions that one list of the answer of `adopt` names, and those that it looks for.
pub const ADOPT_LISTED_MAX: usize = 1000;
pub const ADOPT_VERSIONS_MAX: usize = 100_000;
/// The patterns of `--exclude`, or of one `.packhorseignore`, and the bytes of one pattern and of
/// such a file.
pub const EXCLUDE_PATTERNS_MAX: usize = 10_000;
pub const EXCLUDE_PATTERN_BYTES_MAX: usize = 4096;
pub const IGNORE_FILE_BYTES_MAX: u64 = 1 << 20;
/// How long a publish with `--settle` waits in all for files that are written to.
pub const SETTLE_WAIT_MAX: Duration = Duration::from_secs(60 * 60);
/// The names of the extended attributes of one file in bytes, the limit of Linux.
pub const XATTR_NAMES_BYTES_MAX: usize = 64 << 10;
/// The jobs of trainers and holders of tokens whose starters the API remembers.
pub const JOB_STARTERS_KEPT_MAX: usize = 1024;
/// The redirects of a registry that are followed for one request.
pub const REGISTRY_REDIRECTS_MAX: usize = 10;
/// The chunks that the hub reads again because a site refused them: those that one report of a failed
/// transfer names, and those of one range of a request. A site requests at most this many refused
/// chunks of a transfer again.
pub const REFUSED_CHUNKS_MAX: usize = 16;
/// How long one `doctor` checks manifests before it leaves the rest to the next call.
pub const DOCTOR_MANIFESTS_MAX: Duration = Duration::from_secs(10);
