-- The catalogue of one daemon, hub or site: what exists, who is there, what is on its way. Times are Unix milliseconds.
CREATE TABLE artifact (
    id          INTEGER PRIMARY KEY,
    reference   TEXT NOT NULL UNIQUE,         -- kind/name:version
    digest      BLOB NOT NULL,                -- BLAKE3 of root
    root        BLOB NOT NULL,                -- the root manifest's canonical bytes
    origin      TEXT,                         -- the site whose bytes these are; NULL: this daemon's own
    location    TEXT,                         -- where people find it on this daemon's sinks
    place       TEXT,                         -- where the daemon reads its files (JSON), if it holds them
    created_ms  INTEGER NOT NULL
);
CREATE INDEX artifact_digest ON artifact (digest);

CREATE TABLE site (
    name        TEXT PRIMARY KEY,
    labels      TEXT NOT NULL,                -- JSON object
    joined_ms   INTEGER NOT NULL,
    seen_ms     INTEGER,
    version     TEXT
);

CREATE TABLE token (
    id          TEXT PRIMARY KEY,
    secret_hash BLOB NOT NULL,
    site        TEXT NOT NULL,
    labels      TEXT NOT NULL,
    expires_ms  INTEGER NOT NULL,
    used_ms     INTEGER
);

CREATE TABLE transfer (
    id          TEXT PRIMARY KEY,
    delivery    TEXT NOT NULL,
    reference   TEXT NOT NULL,
    digest      BLOB NOT NULL,
    site        TEXT NOT NULL,
    want        TEXT NOT NULL DEFAULT 'run',  -- run, pause, cancel: what the hub asks for
    generation  INTEGER NOT NULL DEFAULT 0,   -- raised by every retry
    state       TEXT NOT NULL,
    body        TEXT NOT NULL,                -- the rest of what status shows (JSON)
    created_ms  INTEGER NOT NULL,
    updated_ms  INTEGER NOT NULL,
    finished_ms INTEGER,
    cursor      INTEGER NOT NULL              -- the event at which it last changed
);
CREATE INDEX transfer_site ON transfer (site, state);
CREATE INDEX transfer_cursor ON transfer (cursor);
CREATE INDEX transfer_delivery ON transfer (delivery);
-- One transfer for an artifact and a site at a time.
CREATE UNIQUE INDEX transfer_open ON transfer (reference, site) WHERE state NOT IN ('done', 'cancelled');

CREATE TABLE event (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms       INTEGER NOT NULL,
    what        TEXT NOT NULL,
    name        TEXT NOT NULL
);
