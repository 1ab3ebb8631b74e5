"""A local page to try a model: drop a photograph, slide between before and after at full size, download the result."""
