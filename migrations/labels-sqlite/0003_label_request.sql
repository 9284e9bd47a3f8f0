-- The transfer that delivered a version: the version that was requested last becomes the active one, whichever is loaded last.
-- Versions of before have no row.

CREATE TABLE label_request (
    version_id INTEGER PRIMARY KEY,
    transfer   TEXT NOT NULL
);
