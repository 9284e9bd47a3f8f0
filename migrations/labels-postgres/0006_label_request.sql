-- The transfer that delivered a version: the version that was requested last becomes the active one, whichever is loaded last.
-- Versions of before have no row. A table of its own, without a foreign key: no reader and no load is in its way.

CREATE TABLE packhorse.label_request (
    version_id bigint PRIMARY KEY,
    transfer   text COLLATE "C" NOT NULL
);
