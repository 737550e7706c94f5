"""Which groups have to be matched together."""

from __future__ import annotations

from modeconn.symmetry.spec import Group, PermutationSpec


def trees(spec: PermutationSpec) -> list[list[Group]]:
    """Return the groups in sets that can be relabelled one after another: a group and all that vary with it."""
    found: list[list[Group]] = []
    for group in sorted(spec.groups, key=lambda g: len(g.parents)):
        names = {name for name, _ in group.parents if name}
        home = [tree for tree in found if names & {g.name for g in tree}]
        merged = [g for tree in home for g in tree] + [group]
        found = [tree for tree in found if tree not in home] + [merged]
    return found
