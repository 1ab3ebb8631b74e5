"""Using trained generators."""
