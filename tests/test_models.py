"""Models: any architecture can be cut, adapters live beside one frozen base, and what is saved is what PEFT opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import DECODERS, DEPTH, KINDS, PAD, adapted, distance, examples, play, same, shaken, tiny
from torch import Tensor

from fedtrio.data.batches import collate
from fedtrio.errors import ModelError
from fedtrio.frameworks import Centralized, Split
from fedtrio.models.adapter import AdaptedModel, adapt
from fedtrio.models.cut import WHOLE, Span, find_blocks, pack, unpack
from fedtrio.models.load import load_base, load_tokenizer, pick_device, resolve
from fedtrio.models.lora import LoraConfig
from fedtrio.models.train import task_loss

MORE = ("distilbert", "roberta", "opt", "gpt_neox", "gemma2")
NO_CAUSAL = ("bert", "distilbert", "roberta")
TASKS = [(k, "classification") for k in KINDS + MORE] + [(k, "causal-lm") for k in KINDS + MORE if k not in NO_CAUSAL]


# Cuts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task"), TASKS)
def test_every_architecture_can_be_cut_anywhere(kind: str, task: str, precision: str) -> None:
    model = adapted(kind, task, precision)
    assert model.depth == DEPTH
    for cut in range(DEPTH + 1):
        model.verify_cut((cut,))
        model.verify_cut((cut, DEPTH))
    model.verify_cut((1, 2, 3))


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    """One whose head looks at the text again: the server's half has no text."""
    torch.manual_seed(0)
    model = AdaptedModel(adapt(tiny("gpt2"), LoraConfig(), "classification"), "classification")
    model.verify_cut((2,))
    inner = model.module.forward

    def peeks(input_ids: Tensor, **rest: Any) -> Any:
        output = inner(input_ids=input_ids, **rest)
        output.logits = output.logits + input_ids.float().mean()
        return output

    model.module.forward = peeks  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"GPT2ForSequenceClassification can't be cut at \[2\]"):
        model.verify_cut((2,))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of equal blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_pack_and_unpack() -> None:
    lengths = torch.tensor([2, 4, 1])
    h_BTD = torch.randn(3, 4, 5)
    packed = pack(h_BTD, lengths)
    assert torch.equal(packed, torch.cat([h_BTD[i, :n] for i, n in enumerate(lengths.tolist())]))
    grid = unpack(packed, lengths)
    assert torch.equal(pack(grid, lengths), packed)
    assert grid.shape == h_BTD.shape and float(grid[0, 2:].abs().sum() + grid[2, 1:].abs().sum()) == 0


def test_parts_of_an_adapter() -> None:
    """Every trainable tensor lies at one side of every cut; the head with the last blocks."""
    for kind in KINDS:
        model = adapted(kind)
        for cut in range(DEPTH + 1):
            bottom, top = model.part(model.initial, (-1, cut)), model.part(model.initial, (cut, None))
            assert bottom.keys() | top.keys() == model.initial.keys() and not bottom.keys() & top.keys()
            assert all("lora_" in name for name in bottom)
            blocks = {int(part) for name in bottom for part in name.split(".") if part.isdigit()}
            assert blocks == set(range(cut))
        head = model.part(model.initial, (DEPTH, None))
        assert any("score" in name or "classifier" in name for name in head)


def test_a_tensor_on_both_sides_of_the_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("gpt2")
    name = next(iter(model.initial))
    monkeypatch.setitem(model._owner, name, [0, 3])
    with pytest.raises(ModelError, match=rf"{name}.*tied"):
        model.part(model.initial, (-1, 2))
    assert name in model.part(model.initial, WHOLE)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "wte"), ("llama", "embed_tokens"), ("bert", "word_embeddings")])
def test_embeddings_trained_whole_stay_at_the_site(kind: str, name: str) -> None:
    model = adapted(kind, modules_to_save=(name,))
    held = model.part(model.initial, (-1, 0))
    assert [n for n in held if name in n and "modules_to_save" in n]
    whole = play(Centralized(), model, (7,))
    assert all(distance({n: whole.adapter[n]}, {n: model.initial[n]}) > 1e-3 for n in held)
    assert same(play(Split(cut=0, labels="server"), model, (7,)).adapter, whole.adapter)


def test_lora_on_the_embeddings_stays_at_the_site() -> None:
    model = adapted("gpt2", target_modules=("wte", "c_attn"))
    held = model.part(model.initial, (-1, 0))
    assert len(held) == 2 and all("lora_embedding" in n for n in held)
    whole = play(Centralized(), model, (7,))
    assert all(distance({n: whole.adapter[n]}, {n: model.initial[n]}) > 1e-3 for n in held)
    assert same(play(Split(cut=2, labels="server"), model, (7,)).adapter, whole.adapter)


def test_a_module_shared_by_two_blocks_is_refused_where_the_cut_parts_them() -> None:
    torch.manual_seed(0)
    base: Any = tiny("gpt2")
    base.transformer.h[3].mlp = base.transformer.h[0].mlp
    model = AdaptedModel(adapt(base, LoraConfig(r=4), "classification"), "classification")
    with pytest.raises(ModelError, match="both sides of the cut"):
        model.part(model.initial, (-1, 2))


# Many adapters on one base -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [WHOLE, (-1, 2)])
def test_two_sites_with_open_graphs(span: Span) -> None:
    """Gradients of two sites whose forward passes interleave are those of each alone."""
    model = adapted("gpt2")
    batches = [collate(examples(n=4, seed=s), range(4), PAD) for s in (1, 2)]

    def leaves(seed: int) -> dict[str, Tensor]:
        return {name: t.requires_grad_() for name, t in shaken(model.initial, seed).items()}

    def loss(adapter: dict[str, Tensor], i: int) -> Tensor:
        return model.forward(adapter, batches[i].lengths_B, batches[i].ids_BT, span=span).square().sum()

    together = [leaves(0), leaves(1)]
    losses = [loss(adapter, i) for i, adapter in enumerate(together)]
    for one in reversed(losses):
        one.backward()
    for i, adapter in enumerate([leaves(0), leaves(1)]):
        loss(adapter, i).backward()
        used = model.part(adapter, span)
        assert used
        for name in used:
            gradient = together[i][name].grad
            assert gradient is not None and torch.equal(gradient, adapter[name].grad)  # type: ignore[arg-type]
    assert not torch.equal(*[a[name].grad for a in together])  # type: ignore[arg-type]
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_training_leaves_the_base_and_the_start_alone() -> None:
    model = adapted("llama")
    base = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    start = {n: t.clone() for n, t in model.initial.items()}
    run = play(Centralized(), model, (7,))
    assert distance(run.adapter, start) > 1e-3
    assert same(base, {n: p.detach() for n, p in model.module.named_parameters()}) and same(start, model.initial)


def test_the_adapter_is_all_that_trains() -> None:
    """LoRA on every matrix of the blocks, none on the head, which trains whole; and no tensor shares its memory."""
    for kind in KINDS:
        model = adapted(kind)
        heads = [n for n in model.initial if "lora_" not in n]
        assert heads and all("score" in n or "classifier" in n for n in heads)
        assert not [n for n in model.initial if "lora_" in n and ("score" in n or "classifier" in n)]
        assert len({t.untyped_storage().data_ptr() for t in model.initial.values()}) == len(model.initial)
        assert len([n for n in model.initial if "lora_A" in n]) == len([n for n in model.initial if "lora_B" in n])


# What a side holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_held_bytes(kind: str) -> None:
    model = adapted(kind)
    frozen = [p for n, p in model.module.named_parameters() if n not in model.initial]
    copies = [p for n, p in model.module.named_parameters() if "original_module" in n]  # PEFT's untrained head: unused
    whole = sum(p.numel() * 8 for p in frozen) - sum(p.numel() * 8 for p in copies)
    assert model.held_bytes(WHOLE) == whole
    for cut in range(DEPTH + 1):
        assert model.held_bytes((-1, cut)) + model.held_bytes((cut, None)) == whole
    block = sum(p.numel() * 8 for n, p in find_blocks(model.module)[0].named_parameters() if "lora_" not in n)
    assert model.held_bytes((1, 2)) == block
    assert model.held_bytes((-1, 1), (DEPTH, None)) == model.held_bytes((-1, 1)) + model.held_bytes((DEPTH, None))


def test_a_tied_head_is_held_at_both_sides_but_once_in_one() -> None:
    model = adapted("qwen3", "causal-lm")
    embedding = model.module.get_input_embeddings().weight  # type: ignore[operator]
    shared = embedding.numel() * embedding.element_size()
    assert model.held_bytes((-1, 2)) + model.held_bytes((2, None)) == model.held_bytes(WHOLE) + shared
    bottom, head = model.held_bytes((-1, 2)), model.held_bytes((DEPTH, None))
    assert model.held_bytes((-1, 2), (DEPTH, None)) == bottom + head - shared


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task"), [(k, "classification") for k in KINDS] + [(k, "causal-lm") for k in DECODERS]
)
def test_what_is_saved_is_what_peft_opens(kind: str, task: str, tmp_path: Path) -> None:
    """A trained adapter, its head included, gives the same logits from its folder on a fresh base, and merged too."""
    torch.manual_seed(3)
    base = tiny(kind, task)
    base.save_pretrained(tmp_path / "base")
    model = AdaptedModel(adapt(base, LoraConfig(r=4), task), task, "fp64")  # type: ignore[arg-type]
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    adapter = shaken(model.initial, by=0.3)
    model.save(adapter, tmp_path / "adapter")
    assert same(before, {n: p.detach() for n, p in model.module.named_parameters()})
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"

    fresh = load_base(str(tmp_path / "base"), task, 5, PAD, dtype=torch.float64)  # type: ignore[arg-type]
    opened = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).double().eval()  # type: ignore[arg-type]
    batch = collate(examples(task, 5), range(5), PAD)
    with torch.no_grad():
        wanted = model.forward(adapter, batch.lengths_B, batch.ids_BT)
        start = model.forward(model.initial, batch.lengths_B, batch.ids_BT)
        logits = opened(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        merged = opened.merge_and_unload()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    kept = batch.mask_BT.bool() if task == "causal-lm" else slice(None)
    assert float((wanted - start)[kept].abs().max()) > 0.05  # the adapter matters
    assert torch.equal(logits[kept], wanted[kept])
    assert torch.allclose(merged[kept], wanted[kept], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_alone_is_saved_too(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    model = AdaptedModel(adapt(base, LoraConfig(r=4), "classification"), "classification", "fp64")
    heads = {n for n in model.initial if "lora_" not in n}
    adapter = {n: t + 1 if n in heads else t for n, t in model.initial.items()}
    model.save(adapter, tmp_path / "adapter")
    fresh = load_base(str(tmp_path / "base"), "classification", 5, PAD, dtype=torch.float64)
    opened = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).double().eval()  # type: ignore[arg-type]
    found = dict(opened.get_base_model().named_parameters())
    assert heads and all(torch.equal(found[n].detach(), adapter[n]) for n in heads)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "known"), [("gpt2", "c_attn"), ("llama", "q_proj"), ("bert", "query")])
def test_target_modules_that_match_nothing(kind: str, known: str) -> None:
    with pytest.raises(ModelError, match=rf"'nowhere'.*{known}"):
        adapt(tiny(kind), LoraConfig(target_modules=["nowhere"]), "classification")


def word_tokenizer(folder: Path, **special: str) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "<pad>": 2, "a": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)


def test_pad_tokens(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a pad token nor an end token"):
        load_tokenizer(word_tokenizer(tmp_path / "none"))
    only_end = load_tokenizer(word_tokenizer(tmp_path / "end", eos_token="</s>", padding_side="left"))
    assert only_end.pad_token_id == only_end.eos_token_id == 1 and only_end.padding_side == "right"
    assert load_tokenizer(word_tokenizer(tmp_path / "both", eos_token="</s>", pad_token="<pad>")).pad_token_id == 2


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for name in ("./nothing", str(tmp_path / "nothing"), "models/deep/nothing"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve(name, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve("empty", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "gpt2"}')
    path = resolve("broken", tmp_path)
    assert path == str(tmp_path / "broken")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_base(path, "classification", 2, 0)
    assert Path(resolve("nano", tmp_path)).is_dir()
    assert resolve("org/name", tmp_path) == "org/name"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_no_one_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nanoo': no such folder.*HF_HUB_OFFLINE.*did you mean 'nano'"):
        load_base("nanoo", "classification", 2, 0)


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ModelError, match="unknown"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no GPU"):
            pick_device("cuda")


def test_the_causal_loss_is_the_mean_over_targets() -> None:
    """Shifted by one, -100 left out, and zero (not NaN) where nothing is a target."""
    logits, targets = torch.randn(2, 4, 7, dtype=torch.float64), torch.tensor([[1, 2, 3, -100], [4, -100, 5, -100]])
    log_p = logits.log_softmax(-1)
    wanted = -(log_p[0, 0, 2] + log_p[0, 1, 3] + log_p[1, 1, 5]) / 3
    assert torch.allclose(task_loss(logits, targets), wanted, atol=1e-14)
    assert float(task_loss(logits, torch.full_like(targets, -100))) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_padding_to_a_multiple_changes_nothing(kind: str, task: str) -> None:
    """Batches are wider, and every logit, cut or whole, is the same; never beyond the model's positions."""
    if (kind, task) == ("bert", "causal-lm"):
        pytest.skip("BERT has no causal-lm")
    model, batch = adapted(kind, task), collate(examples(task, 5), range(5), PAD)
    widths: list[int] = []
    hook = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = []
    try:
        for multiple in (1, 8, 31):
            model.pad_to_multiple_of = multiple
            whole = model.forward(model.initial, batch.lengths_B, batch.ids_BT)
            h_ND = model.forward(model.initial, batch.lengths_B, batch.ids_BT, span=(-1, 2))
            found.append((whole, h_ND, model.forward(model.initial, batch.lengths_B, h_ND=h_ND, span=(2, None))))
    finally:
        model.pad_to_multiple_of = 1
        hook.remove()
    T = batch.ids_BT.shape[1]
    assert [widths[0], widths[3], widths[6]] == [T, -(-T // 8) * 8, 31] and T % 8
    kept = batch.mask_BT.bool() if task == "causal-lm" else slice(None)
    for whole, h_ND, joined in found:
        assert whole.shape == found[0][0].shape and h_ND.shape == found[0][1].shape
        atol = 1e-12 if kind in ("gpt2", "bert") else 1e-6  # others take norms and rotations in fp32
        assert torch.allclose(whole[kept], found[0][0][kept], atol=atol, rtol=0)
        assert torch.allclose(joined[kept], whole[kept], atol=1e-12, rtol=0)
    model.pad_to_multiple_of = 50
    try:
        assert model._widened(batch.ids_BT.shape[1]) == 32  # the tiny models have 32 positions
    finally:
        model.pad_to_multiple_of = 1
