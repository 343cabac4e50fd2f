"""The mean over those who hold a tensor, where sites cut the model at different blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .adapters import weighted_mean

SERVER = ""  # no site has this name
Named = Mapping[str, Tensor]


def mean_over_holders(
    at_sites: Mapping[str, Named], weights: Mapping[str, float], at_server: Named | None = None
) -> dict[str, Tensor]:
    """Σ_k p_k θ_k for each tensor, over the sites that hold it, with p renormalised over them.

    `at_server` is the one copy that stands in for all sites that do not hold a tensor themselves, and counts as much
    as they do together. So each tensor's weights always sum to those of all sites; where nobody used the server's copy
    it does not count.
    """
    copies: dict[str, Named] = {**at_sites, **({SERVER: at_server} if at_server else {})}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for copy in copies.values() for name in copy):
        away = any(name not in copy for copy in at_sites.values())
        holders = tuple(h for h, copy in copies.items() if name in copy and (h != SERVER or away))
        groups.setdefault(holders, []).append(name)
    mean: dict[str, Tensor] = {}
    for holders, names in groups.items():
        rest = sum(weight for site, weight in weights.items() if site not in holders)
        shares = {holder: rest if holder == SERVER else weights[holder] for holder in holders}
        mean |= weighted_mean({h: {name: copies[h][name] for name in names} for h in holders}, shares)
    return mean
