-- What a publish left out, and whom a site trains for.
ALTER TABLE artifact ADD COLUMN omitted TEXT;                      -- a JSON list of {what, count, examples}; NULL: nothing, or not known
ALTER TABLE site ADD COLUMN train_allow TEXT;                      -- sites that it trains for (JSON list); NULL: it has not said
