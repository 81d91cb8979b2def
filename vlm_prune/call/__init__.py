"""What belongs to one call: its encode and forward state, rows, budget, receipt."""
