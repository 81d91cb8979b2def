"""What a policy is: the engine's contract, under its public import name."""

from ..contract.policy import Keep, Place, Policy, Positions, ScorerPolicy, SelectPolicy

__all__ = ["Keep", "Place", "Policy", "Positions", "ScorerPolicy", "SelectPolicy"]
