-- Publishers: whoever publishes at the hub from another machine. Times are Unix milliseconds.
ALTER TABLE token ADD COLUMN role TEXT NOT NULL DEFAULT 'site';    -- site or publisher: what the token's certificate is good for

CREATE TABLE publisher (
    name        TEXT PRIMARY KEY,
    joined_ms   INTEGER NOT NULL,
    seen_ms     INTEGER
);
