"""The encode stage: the vision tower is cut here, and around the projector."""
