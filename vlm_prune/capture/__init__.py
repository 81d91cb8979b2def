"""Captured calls: parts of a call recorded once for each shape, and replayed by the device without the host."""
