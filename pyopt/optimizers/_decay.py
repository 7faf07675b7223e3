"""What many rules do alike with weight_decay and maximize."""

from __future__ import annotations

from pyopt.optimizer import Group


def decay(group: Group) -> dict[str, float]:
    """The numbers of a rule for weight_decay, by an L2 penalty or decoupled, and for maximize."""
    decoupled = group.get("decoupled_weight_decay", False)
    return {
        "weight_decay": 0 if decoupled else group["weight_decay"],
        "decay_factor": 1 - group["lr"] * group["weight_decay"] if decoupled else 1,
        "gradient_factor": -1 if group["maximize"] else 1,
    }
