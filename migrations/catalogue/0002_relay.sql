-- Sites as sources, and what the hub keeps of relayed bytes. Times are Unix milliseconds.
ALTER TABLE artifact ADD COLUMN published_ms INTEGER;              -- at a site: when it was published here, in place
ALTER TABLE artifact ADD COLUMN offer TEXT;                        -- at a site: what the hub has still to be told of it (JSON)
ALTER TABLE artifact ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0; -- at the hub: its relayed bytes stay whatever their age
ALTER TABLE artifact ADD COLUMN used_ms INTEGER;                   -- at the hub: when its relayed bytes were last asked for
ALTER TABLE site ADD COLUMN share TEXT;                            -- whom the site shares with (JSON list); NULL: everybody
