"""What protects activations at the cut: clipping and noise are what they say, and the report says what left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import KINDS, adapted, distance, federation, lab, play, rounds, same

from fedtrio.config import Config, SiteConfig
from fedtrio.frameworks import Split
from fedtrio.frameworks.split_noise import clipped, normal
from fedtrio.ledger import Ledger
from fedtrio.message import Reply, decode
from fedtrio.models.train import task_loss
from fedtrio.remote import Host
from fedtrio.report.traffic import left_sites
from fedtrio.result import costs

U_SHAPE = "activation gradients, activations, adapter"


def sent(folder: Path) -> list[Reply]:
    return [r for r in (decode(p.read_bytes()) for p in sorted(folder.glob("*-up-*"))) if "h" in r.tensors]


def test_clipping_by_hand() -> None:
    h_ND = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [30.0, -40.0]])
    assert torch.allclose(clipped(h_ND, 5.0), torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3.0, -4.0]]))
    assert torch.equal(clipped(h_ND, 5.0)[:3], h_ND[:3])


@pytest.mark.parametrize(("kind", "labels"), [(kind, ("server", "client")[i % 2]) for i, kind in enumerate(KINDS)])
def test_clipped_and_noised_as_in_one_loop(kind: str, labels: Any, tmp_path: Path) -> None:
    """D1: the weights are those of a model with the clipping and the noise between two of its blocks, in one graph."""
    model, settings = adapted(kind), {"clip": 0.5, "noise": 0.1}
    run = play(Split(cut=2, labels=labels, **settings), model, (7,), n=1, frames=tmp_path)  # type: ignore[arg-type]
    setting = lab(model)
    learner, data = setting.learner(model.initial), run.sites["site-1"].data
    for step, batch in enumerate(data.batches(1)):
        h_ND = model.forward(learner.tensors, batch.lengths_B, batch.ids_BT, span=(-1, 2))
        assert float(h_ND.detach().norm(dim=1).max()) > 0.5  # there is something to clip
        h_ND = clipped(h_ND, 0.5) + 0.05 * normal(h_ND, 0, 1, step, "site-1", b"")
        task_loss(model.forward(learner.tensors, batch.lengths_B, h_ND=h_ND, span=(2, None)), batch.targets).backward()  # type: ignore[arg-type]
        learner.step(setting.progress(1, step, data.steps))
    assert distance(run.adapter, learner.values()) < 1e-12
    assert distance(run.adapter, model.initial) > 1e-3


def test_norms_of_what_leaves(tmp_path: Path) -> None:
    """Clipped alone: no token is longer. A clip that nothing reaches changes nothing."""
    model = adapted("gpt2")
    plain = play(Split(labels="server"), model, frames=tmp_path / "plain")
    play(Split(labels="server", clip=0.5), model, frames=tmp_path / "clipped")
    norms = {n: torch.cat([r.tensor("h").norm(dim=1) for r in sent(tmp_path / n)]) for n in ("plain", "clipped")}
    assert float(norms["plain"].max()) > 0.5 >= float(norms["clipped"].max()) - 1e-12
    assert same(play(Split(labels="server", clip=1e9), model).adapter, plain.adapter)


def test_noise_is_gaussian_and_its_own_everywhere() -> None:
    like = torch.zeros(400, 32, dtype=torch.float64)
    words = [(0, 1, 0, "a", b""), (1, 1, 0, "a", b""), (0, 2, 0, "a", b""), (0, 1, 1, "a", b""), (0, 1, 0, "b", b""),
             (0, 1, 0, "a", b"secret")]  # fmt: skip
    draws = [normal(like, *word) for word in words]
    assert torch.equal(draws[0], normal(like, *words[0]))
    for i, draw in enumerate(draws):
        assert abs(float(draw.mean())) < 0.03 and abs(float(draw.std()) - 1) < 0.02
        for other in draws[:i]:
            assert abs(float((draw * other).mean())) < 0.04  # 4.5 standard errors


def test_a_secret_hides_the_noise_from_the_server() -> None:
    """What a real site adds can't be drawn again from what the server knows; the run stays a function of it."""
    method, model = Split(labels="server", clip=1.0, noise=0.5), adapted("gpt2")
    ends = []
    for secret in (b"", b"mine", b"mine"):
        setting = lab(model, epochs=1)
        sites, wire = federation(method, setting, (4, 3))
        sites["site-1"].secret = secret
        state, _ = rounds(method, setting, wire, 2)
        ends.append({**state["site"], **state["server"]})
    assert same(ends[1], ends[2]) and distance(ends[0], ends[1]) > 1e-4


def test_a_real_site_keeps_its_secret(tmp_path: Path) -> None:
    """Drawn once, so that a site that was killed draws the same noise; no one else may read it."""
    own = SiteConfig.model_validate({"data": {"train": "own.csv"}})
    secrets = [Host("clinic", own, tmp_path / folder)._secret() for folder in ("a", "a", "b")]
    assert secrets[0] == secrets[1] != secrets[2] and len(secrets[0]) == 64
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o077 == 0


def test_noise_needs_a_clip() -> None:
    with pytest.raises(ValueError, match="noise is a multiple of clip"):
        Config.model_validate({"split": {"noise": 0.1}})


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (Split(labels="server"), "activations, adapter, labels", "activation gradients, adapter"),
        (Split(labels="client"), U_SHAPE, U_SHAPE),
        (Split(labels="server", cut=0), "activations, labels", "nothing"),
    ],
)  # fmt: skip
def test_the_report_says_what_left(method: Split, up: str, down: str) -> None:
    """S9 in the ledger: where nothing below the cut trains, no gradient comes down. In the U-shape no label goes up."""
    ledger: Ledger = play(method, adapted("gpt2"), (5, 3), n=1).ledger
    entry = {"framework": "split", "seed": 0, **costs(method, {}, {}, ledger, {})}
    results = {"config": {"split": {"clip": 2.0, "noise": 0.5}}, "runs": [entry]}
    row = left_sites(results)[0]
    assert sorted(row["up"].split(", ")) == sorted(up.split(", ")) == entry["left_sites"]
    assert row["down"] == down and row["shield"] == "clipped to norm 2, noise of 0.5 times that"
