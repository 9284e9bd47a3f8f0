-- Several artifacts as one delivery, and cross-site training runs.
CREATE TABLE delivery (
    id          TEXT PRIMARY KEY,
    run         TEXT,                         -- the run that borrows by it; NULL: somebody asked for it
    created_ms  INTEGER NOT NULL
);
-- What a delivery waits for: its own transfers, and those that stood already when it was asked for.
CREATE TABLE delivery_part (
    delivery    TEXT NOT NULL REFERENCES delivery (id),
    transfer    TEXT NOT NULL,
    PRIMARY KEY (delivery, transfer)
) WITHOUT ROWID;
CREATE INDEX delivery_part_transfer ON delivery_part (transfer);
INSERT INTO delivery (id, created_ms) SELECT delivery, MIN(created_ms) FROM transfer GROUP BY delivery;
INSERT INTO delivery_part (delivery, transfer) SELECT delivery, id FROM transfer;

ALTER TABLE transfer ADD COLUMN needs TEXT;                            -- at the hub: the artifact that must be there first
ALTER TABLE transfer ADD COLUMN after_ids TEXT NOT NULL DEFAULT '[]';  -- at a site: the transfers that go first (JSON)
ALTER TABLE transfer ADD COLUMN removed_ms INTEGER;                    -- when what it brought was taken away again

-- A training run. At the hub: the whole run; at the site that trains: its part of it.
CREATE TABLE run (
    name        TEXT PRIMARY KEY,
    state       TEXT NOT NULL,
    open        INTEGER NOT NULL,             -- 0: ended, and nothing is left to be cleaned up
    body        TEXT NOT NULL,                -- JSON
    created_ms  INTEGER NOT NULL,
    updated_ms  INTEGER NOT NULL
);
CREATE INDEX run_open ON run (open) WHERE open = 1;

-- What a model was made of; kept wherever the model is known.
CREATE TABLE lineage (
    reference   TEXT PRIMARY KEY,
    body        TEXT NOT NULL                 -- JSON
);
