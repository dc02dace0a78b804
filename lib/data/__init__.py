"""From files of traces to datasets, rendered text and batches."""
