"""A vLLM server under load: dense and pruned servers measured, and a pruned one tested for a long time."""
