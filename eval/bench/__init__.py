"""Speed and memory of pruning, against no pruning and against an oracle that never had the dropped tokens."""
