"""The language model: its entry and exit, cuts between layers, attention that is read or edited."""
