"""What the command line can do, by noun: `runs`, `traces`, `datasets`, `models`, `evaluation`, `doctor`.

Each module holds one function a verb and, in `add`, the flags of its verbs. A verb asks the package for the work, and
imports what takes long (jax, papermill, polars) only when it is called, so that `--help` and completion are quick.
"""
