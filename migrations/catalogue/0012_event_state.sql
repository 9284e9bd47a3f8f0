-- What its subject was like at an event, as far as that may change later (JSON); NULL: the event is older than this column.
ALTER TABLE event ADD COLUMN state TEXT;
