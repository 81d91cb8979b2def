"""Captured calls: parts of a call are recorded once for each shape, and replayed on the device without the host."""
