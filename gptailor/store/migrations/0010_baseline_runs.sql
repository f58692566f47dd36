-- How many trials a run of baselines makes: its run file's `trials` is what a search may score. NULL in other runs.
ALTER TABLE runs ADD COLUMN n_trials INTEGER;
