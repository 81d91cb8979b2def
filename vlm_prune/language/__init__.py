"""The language model: its entry and exit, cuts between layers, attention that policies read or edit."""
