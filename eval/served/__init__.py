"""A vLLM server under load: measured dense against pruned, and tried for a long time."""
