-- How far the journal beside this file has been applied: the number of the last event.
ALTER TABLE runs ADD COLUMN journal_applied BIGINT;
