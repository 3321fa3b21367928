"""From a recipe, a YAML file, to a run."""
