"""One technique a module: labelled data (and, where needed, a model) in, labelled data out, lazily."""
