"""The model: architecture, weights in and out, decoding."""
