-- What a run's numbers were computed from. kind weights: name is the model (base or a candidate), part its file, digest of
-- what is in it. kind setting: name is the key, digest the value itself;
-- kind revision: name is the model, digest the hub's revision.
CREATE TABLE digests (
    run_id VARCHAR, kind VARCHAR, name VARCHAR, part VARCHAR, digest VARCHAR,
    PRIMARY KEY (run_id, kind, name, part)
);
-- Of each example as the model reads it, what is right, and how the answer is read; in the benchmark's seeded order.
-- digests: JSON list of text.
CREATE TABLE example_digests (
    run_id VARCHAR, benchmark VARCHAR, metric VARCHAR, split VARCHAR, first INTEGER, digests JSON,
    PRIMARY KEY (run_id, benchmark, metric, split, first)
);
-- How a score joins its examples' items: mean, mean by task (of a group whose tasks count alike), or the name of the
-- function. Where it is not the mean, the score over resamples of the examples, the same ones for every subject, so that
-- tests can be paired. NULL in evaluations that were made before.
ALTER TABLE evaluations ADD COLUMN aggregation VARCHAR;
CREATE TABLE resamples (
    run_id VARCHAR, plan_hash VARCHAR, benchmark VARCHAR, metric VARCHAR, split VARCHAR, n_samples INTEGER, scores JSON,
    PRIMARY KEY (run_id, plan_hash, benchmark, metric, split, n_samples)
);
