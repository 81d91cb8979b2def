"""What a policy is: the engine's contract, under the name that policies of other projects import it by."""

from ..contract.policy import Keep, Place, Policy, Positions, ScorerPolicy, SelectPolicy

__all__ = ["Keep", "Place", "Policy", "Positions", "ScorerPolicy", "SelectPolicy"]
