-- The certificates of sites and publishers, and who changed what about them. Times are Unix milliseconds.
-- A site or publisher without a row, or without a serial, joined before; its certificate is accepted until it gets a newer one.
CREATE TABLE member (
    role              TEXT NOT NULL,             -- site or publisher
    name              TEXT NOT NULL,             -- the row stays when the site or publisher is removed: older certificates stay invalid
    serial            BLOB,                      -- of the newest certificate
    issued_ms         INTEGER,
    expires_ms        INTEGER,
    confirmed_ms      INTEGER,                   -- when the hub first saw it in a handshake
    previous          BLOB,                      -- the serial before a renewal, until the new one was seen
    previous_until_ms INTEGER,                   -- it is not accepted after this
    revoked_ms        INTEGER,
    revoked_by        TEXT,
    revoked_why       TEXT,
    change            TEXT,                      -- the last change by a person: set, revoked, restored, removed
    changed_ms        INTEGER,
    changed_by        TEXT,
    PRIMARY KEY (role, name)
) WITHOUT ROWID;
