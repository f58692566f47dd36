"""How alike the layers of a family are, before any search: of one model, and of the base and its fine-tunes."""
