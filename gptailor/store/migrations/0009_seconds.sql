-- Where the seconds went of each process that worked on the run: a row a process, by when it began, and part of the work.
CREATE TABLE seconds (
    run_id VARCHAR, began_at TIMESTAMPTZ, part VARCHAR, seconds DOUBLE,
    PRIMARY KEY (run_id, began_at, part)
);
