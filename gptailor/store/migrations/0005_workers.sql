-- Trials of a run may overlap: after how many others each was asked for, as which it was told, and who scored it. NULL in
-- runs of one worker that were made before: each was asked for after all before it.
ALTER TABLE trials ADD COLUMN asked_after INTEGER;
ALTER TABLE trials ADD COLUMN told_as INTEGER;
ALTER TABLE trials ADD COLUMN worker VARCHAR;
