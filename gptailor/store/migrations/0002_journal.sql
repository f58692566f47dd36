-- How far the journal beside this file has been applied: the number of the last event.
CREATE TABLE journal (run_id VARCHAR PRIMARY KEY, applied BIGINT);
