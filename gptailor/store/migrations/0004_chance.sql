-- The score of guessing, where the metric is a kind of accuracy: a coin's half is no capability.
ALTER TABLE evaluations ADD COLUMN chance DOUBLE;
