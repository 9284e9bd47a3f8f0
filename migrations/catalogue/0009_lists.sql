-- Lists are read a page at a time, in the order of these keys.
CREATE INDEX delivery_created ON delivery (created_ms, id);
CREATE INDEX run_created ON run (created_ms, name);
CREATE INDEX transfer_reference ON transfer (reference, id);
-- The key that a token was used for: until its holder has connected, the same key may ask again.
ALTER TABLE token ADD COLUMN key_hash BLOB;
