-- What plans are worth in use, beside the dense base: quantity is decode or prefill (tokens a second), first_token
-- (seconds), memory or disk (bytes). device: and its numbers, `cpu, float32`. batch: texts side by side. value and dense:
-- medians over rounds in turns; ratio: the median of value / dense; spread: half the width of the middle half.
CREATE TABLE measurements (
    run_id VARCHAR, plan_hash VARCHAR, device VARCHAR, quantity VARCHAR, batch INTEGER, subject VARCHAR, config_id INTEGER,
    value DOUBLE, spread DOUBLE, dense DOUBLE, ratio DOUBLE, ratio_spread DOUBLE, measured_at TIMESTAMPTZ,
    PRIMARY KEY (run_id, plan_hash, device, quantity, batch)
);
