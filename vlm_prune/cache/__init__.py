"""The KV cache of a pruned sequence: layers with two lengths, what they store, and the masks of both."""
