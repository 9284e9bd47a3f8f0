-- Access tokens of the API. Only a hash of the secret is stored. `scope` is JSON; NULL in `expires_ms`: no expiry.
CREATE TABLE access_token (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    secret_hash BLOB NOT NULL,
    role TEXT NOT NULL,
    scope TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    created_by TEXT NOT NULL,
    rotated_ms INTEGER,
    expires_ms INTEGER,
    used_ms INTEGER,
    revoked_ms INTEGER
);
