"""A run as one self-contained page: what was trained, how it went, how good it is, and what it looks like."""
