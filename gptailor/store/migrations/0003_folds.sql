-- A removed layer that is folded into a kept one instead of dropped (its factor is in layers.factor), and whose examples
-- stand behind an evaluation, so that tests between subjects can be paired.
ALTER TABLE layers ADD COLUMN folded_into INTEGER;
ALTER TABLE evaluations ADD COLUMN plan_hash VARCHAR;
