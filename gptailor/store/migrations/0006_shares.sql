-- What an edit left of a kept layer, as shares of what it was: query heads, MLP channels, weights that are not zero. NULL
-- where no edit leaves anything out.
ALTER TABLE layers ADD COLUMN heads DOUBLE;
ALTER TABLE layers ADD COLUMN channels DOUBLE;
ALTER TABLE layers ADD COLUMN weights DOUBLE;
