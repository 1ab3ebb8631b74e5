"""Pictures on disk -> uint8 store -> batches on the device."""
