"""Plans and models in other people's forms: Hugging Face folders, mergekit files, published plans."""
