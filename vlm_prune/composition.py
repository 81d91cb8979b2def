"""The policies that prune one model together: which decides what, with what budget. Made once, when pruning starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .call.budget import Budget
from .contract.anatomy import Anatomy
from .contract.policy import Policy
from .contract.stages import Stages
from .errors import BudgetError


@dataclass(frozen=True)
class Composition:
    """Policies in their written order, and how many visual tokens they keep.

    Attributes:
        written: as the user gave them.
        policies: the same, fitted to the model.
        budget: visual tokens to keep. It belongs to `owner`; any other policy takes its own default, as a share of what
            reaches it.
    """

    written: tuple[Policy, ...]
    policies: tuple[Policy, ...]
    budget: Budget

    @classmethod
    def fit(
        cls,
        written: tuple[Policy, ...],
        anatomy: Anatomy,
        tokens: int | None = None,
        ratio: float | None = None,
        per: str = "tile",
    ) -> Composition:
        """Fit policies to a model, and check the budget; see `api.prune`.

        Raises:
            BudgetError: the budget is invalid, or no policy takes one.
            ValueError: a policy does not fit this model, for instance because it names a layer that the model lacks.
        """
        owner = next((policy for policy in written if policy.prunes), None)
        if owner is None and (tokens is not None or ratio not in (None, 1)):  # a ratio of 1 is what they do
            name, given = (
                "+".join(p.name for p in written),
                f"ratio={ratio}" if tokens is None else f"tokens={tokens}",
            )
            raise BudgetError(
                f'policy="{name}" drops no tokens, so {given} has no meaning. Leave it out, or choose or add a policy '
                'that drops tokens, such as "flowcut".'
            )
        config = anatomy.decoder.config
        fitted = tuple(
            policy.for_decoder(config).for_family(anatomy.family, anatomy.mrope) for policy in written
        )
        default = 1.0 if owner is None else owner.default_ratio
        joint = _shares(per, anatomy) or any(policy.per_image for policy in fitted)
        available = None if joint and anatomy.features else anatomy.tower.units
        extra = int(anatomy.tower.keeps_cls)
        budget = Budget.checked(tokens, ratio, default, available, anatomy.tile, extra, joint)
        return cls(written, fitted, budget)

    @property
    def name(self) -> str:
        """The policies' names, joined by "+"."""
        return "+".join(policy.name for policy in self.policies)

    @property
    def acts(self) -> Stages:
        """The stages in which any of the policies acts."""
        return Stages.joined(policy.stages for policy in self.policies)

    @cached_property
    def owner(self) -> Policy | None:
        """The policy that the budget belongs to: the first one that drops tokens."""
        return next((policy for policy in self.policies if policy.prunes), None)

    @cached_property
    def encoder(self) -> Policy | None:
        """The policy that chooses among all tokens of an image: in the tower, around the projector, or at the entry."""
        return next((policy for policy in self.policies if policy.encodes), None)

    @property
    def entry(self) -> Policy | None:
        """That policy, if it chooses at the decoder's entry."""
        return self.encoder if self.encoder is not None and self.encoder.enters else None

    @property
    def positions(self) -> str:
        """The rule for the RoPE positions of what that policy keeps: "original" or "compact"."""
        return "original" if self.encoder is None else str(self.encoder.positions)

    def share(self, policy: Policy | None) -> Budget:
        """The budget of one of the policies; all tokens for ``None``."""
        if policy is None:
            return Budget(ratio=1.0)
        return (
            self.budget
            if policy is self.owner
            else Budget(ratio=policy.default_ratio, extra=self.budget.extra)
        )


def _shares(per: str, anatomy: Anatomy) -> bool:
    """Whether the tiles of an image share one budget. Raises if they cannot."""
    if per not in ("tile", "image", "video"):
        raise BudgetError(f'per={per!r}: choose "tile", or "image" or "video", which share a budget.')
    if per != "tile" and anatomy.tile != "image" and not anatomy.features:
        raise BudgetError(
            f'per="{per}": {anatomy.family} passes tiles to its tower without saying which form one image. Give '
            'the budget per="tile".'
        )
    return per != "tile"
