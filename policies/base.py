"""What a policy is: the engine's contract, under the name that policies of other projects import it by."""

from ..contract.policy import Keep, Policy, Positions

__all__ = ["Keep", "Policy", "Positions"]
