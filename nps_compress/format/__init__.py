"""The ``.nps`` container of format_spec/SPEC.md: bytes and tables, no tensors of weights."""
