CREATE TABLE runs (
    run_id VARCHAR PRIMARY KEY, name VARCHAR, status VARCHAR, spec JSON, base_model VARCHAR,
    n_layers INTEGER, n_removed INTEGER, seed INTEGER,
    created_at TIMESTAMPTZ, started_at TIMESTAMPTZ, ended_at TIMESTAMPTZ, heartbeat_at TIMESTAMPTZ,
    engine_pid INTEGER, engine_host VARCHAR, versions JSON, error VARCHAR
);
CREATE TABLE trials (
    run_id VARCHAR, trial_id INTEGER, config_id INTEGER, budget INTEGER, seed BIGINT, status VARCHAR, origin VARCHAR,
    started_at TIMESTAMPTZ, ended_at TIMESTAMPTZ, suggest_seconds DOUBLE, stitch_seconds DOUBLE, evaluate_seconds DOUBLE,
    error VARCHAR, configuration JSON,
    PRIMARY KEY (run_id, trial_id)
);
CREATE TABLE scores (
    run_id VARCHAR, trial_id INTEGER, benchmark VARCHAR, metric VARCHAR, score DOUBLE, stderr DOUBLE,
    n_samples INTEGER, is_objective BOOLEAN, higher_is_better BOOLEAN,
    PRIMARY KEY (run_id, trial_id, benchmark, metric)
);
-- One row per configuration: the decoded plan and what it weighs.
CREATE TABLE plans (
    run_id VARCHAR, config_id INTEGER, plan_hash VARCHAR, plan JSON, n_parameters BIGINT,
    PRIMARY KEY (run_id, config_id)
);
CREATE TABLE layers (
    run_id VARCHAR, config_id INTEGER, layer INTEGER, position INTEGER, operation VARCHAR, sources VARCHAR[],
    method VARCHAR, factor DOUBLE, output_scale DOUBLE,
    PRIMARY KEY (run_id, config_id, layer)
);
CREATE TABLE evaluations (
    run_id VARCHAR, subject VARCHAR, config_id INTEGER, benchmark VARCHAR, metric VARCHAR, split VARCHAR,
    score DOUBLE, stderr DOUBLE, n_samples INTEGER, higher_is_better BOOLEAN, evaluated_at TIMESTAMPTZ,
    PRIMARY KEY (run_id, subject, benchmark, metric, split, n_samples)
);
-- What each example gave, in the benchmark's nested order, so that nothing is scored twice and tests can be paired.
-- items: JSON list, one item an example, each what lm-eval's process_results gave for the metric.
CREATE TABLE examples (
    run_id VARCHAR, plan_hash VARCHAR, benchmark VARCHAR, metric VARCHAR, split VARCHAR, first INTEGER, items JSON,
    PRIMARY KEY (run_id, plan_hash, benchmark, metric, split, first)
);
