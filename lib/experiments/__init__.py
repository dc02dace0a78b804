"""A run as a whole: its folder and manifest, its stages, the pipeline, the report."""
