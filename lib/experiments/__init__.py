"""A run as a whole: its folder and manifest, its stages, the pipeline, the report."""

import sys

# jsonschema, which nbformat imports, would spend three seconds on preparing a check of international addresses, where
# it finds this package; no schema of a notebook asks for one.
sys.modules.setdefault("rfc3987_syntax", None)
