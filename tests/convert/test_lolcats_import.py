"""Published LoLCATs weights: the same numbers as the paper's formula, an ordinary export, and every refusal."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import linearize
from linearize.artifacts.load import load_model
from linearize.artifacts.manifest import read_manifest, verify_manifest
from linearize.convert import lolcats_import
from linearize.convert.lolcats_format import read_published
from linearize.errors import RefusedError, UsageError
from linearize.modeling.cache_linearized import LinearizedCache
from linearize_cli.app import main

W, F, R = 16, 4, 3
HEADS, KV, D, LAYERS, C = 4, 2, 8, 2, 32


def distilled(*, layers: Any = range(LAYERS), window: bool = True, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """What LoLCATs' trainer saves after the attention transfer, drawn at random."""
    draw = torch.Generator().manual_seed(1)
    state: dict[str, torch.Tensor] = OrderedDict()
    for i in layers:
        name = f"{prefix}layers.{i}.self_attn."
        for side in "qk":
            state[name + f"feature_map_{side}.mlp.layer"] = torch.randn(HEADS, D, F, generator=draw)
        if window:
            state[name + "window_factors"] = torch.randn(1, HEADS, 1, 1, generator=draw)
    return state


def finetuned(targets: str = "qkvo") -> dict[str, torch.Tensor]:
    """What it saves after the low-rank finetuning."""
    draw = torch.Generator().manual_seed(2)
    sizes = {"q": (HEADS * D, C), "k": (KV * D, C), "v": (KV * D, C), "o": (C, HEADS * D)}
    state: dict[str, torch.Tensor] = OrderedDict()
    for i in range(LAYERS):
        for t in targets:
            name = f"base_model.model.model.layers.{i}.self_attn.{t}_proj.lora_"
            state[name + "A.default.weight"] = 0.3 * torch.randn(R, sizes[t][1], generator=draw)
            state[name + "B.default.weight"] = 0.3 * torch.randn(sizes[t][0], R, generator=draw)
    return state


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save({"model_state_dict": state, "step": 100, "distill/eval/loss": 0.25}, path)
    return path


def published(ids: torch.Tensor, weights: dict[str, torch.Tensor], maps: Any, lora: Any, *, end: bool) -> torch.Tensor:
    """Logits of a LoLCATs Llama, by the paper's equation 7 and nothing of ours: ids [T] -> [T, V].

    `end`: blocks of W tokens counted from the end of the text, as the reference does, or from its start.
    """
    T = len(ids)
    norm = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w  # noqa: E731
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2).float() / D)).repeat(1, 2)
    turn = lambda x: x * angle.cos() + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * angle.sin()  # noqa: E731
    phi = lambda x, w: torch.cat(((x @ w).softmax(-1), (-(x @ w)).softmax(-1)), -1).clamp(min=1e-12)  # noqa: E731
    block = (torch.arange(T) - (T if end else 0)).div(W, rounding_mode="floor")
    causal = torch.ones(T, T).tril().bool()
    near = causal & (block[:, None] - block[None, :] <= 1)
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        name = f"model.layers.{i}."
        matrix = {p: weights[f"{name}self_attn.{p}_proj.weight"] for p in "qkvo"}
        for p in matrix if lora else ():
            a, b = (lora[f"base_model.model.{name}self_attn.{p}_proj.lora_{s}.default.weight"] for s in "AB")
            matrix[p] = matrix[p] + 2.0 * b @ a
        h = norm(x, weights[name + "input_layernorm.weight"])
        q, k, v = ((h @ matrix[p].T).view(T, -1, D).transpose(0, 1) for p in "qkv")
        q, k, v = turn(q), turn(k).repeat_interleave(HEADS // KV, 0), v.repeat_interleave(HEADS // KV, 0)
        linear = phi(q, maps[f"{name}self_attn.feature_map_q.mlp.layer"]) @ phi(
            k, maps[f"{name}self_attn.feature_map_k.mlp.layer"]
        ).transpose(1, 2)
        if f"{name}self_attn.window_factors" in maps:
            scores = (q @ k.transpose(1, 2) * D**-0.5).masked_fill(~near, -1e8)
            gamma = maps[f"{name}self_attn.window_factors"][0].sigmoid()
            mass = gamma * (scores - scores.amax(-1, keepdim=True)).exp() * near + linear * (causal & ~near)
        else:
            mass = linear * causal
        y = (mass / mass.sum(-1, keepdim=True)) @ v
        x = x + y.transpose(0, 1).reshape(T, -1) @ matrix["o"].T
        h = norm(x, weights[name + "post_attention_layernorm.weight"])
        gate, up, down = (weights[f"{name}mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    return build_llama(tmp_path_factory.mktemp("base") / "tiny", initializer_range=0.2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def imported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    room = tmp_path_factory.mktemp("made")
    report = linearize.import_lolcats(
        base,
        room / "out",
        distilled=save(room / "x_lk_smd_wtk16_fd4_distill.pt", distilled()),
        finetuned=save(room / "x_ft.pt", finetuned()),
        device="cpu",
    )
    return room / "out", report


@torch.no_grad()
def test_logits_are_those_of_the_published_formula(base: Path, imported: tuple[Path, dict[str, Any]]) -> None:
    """At multiples of the block the reference's windows, counted from the end, are ours; elsewhere from the start."""
    model = load_model(imported[0], device="cpu")
    weights, ids = load_file(base / "model.safetensors"), torch.arange(7 * W) * 37 % 256
    maps, lora = distilled(), finetuned()
    for length, end in ((7 * W, True), (2 * W, True), (6 * W + 5, False), (W - 3, False)):
        want = published(ids[:length], weights, maps, lora, end=end)
        got = model(ids[None, :length], use_cache=False).logits[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    steps = LinearizedCache(model.config)  # decoding goes on with the same formula, which the reference's does not
    by_step = [model(ids[None, t : t + 1], past_key_values=steps).logits[0] for t in range(4 * W + 1)]
    want = published(ids[: 4 * W + 1], weights, maps, lora, end=False)
    assert (torch.cat(by_step) - want).norm() / want.norm() < 1e-5
    shifted = published(ids[: 6 * W + 5], weights, maps, lora, end=True)  # so the first lines can tell
    assert (model(ids[None, : 6 * W + 5], use_cache=False).logits[0] - shifted).abs().max() > 1e-3


def test_the_result_is_an_ordinary_export(base: Path, imported: tuple[Path, dict[str, Any]]) -> None:
    out, report = imported
    assert verify_manifest(out) == []
    manifest = read_manifest(out)
    assert manifest["imported"]["distilled"]["name"] == "x_lk_smd_wtk16_fd4_distill.pt"
    assert manifest["recipe"]["mixer"]["window"] == W and manifest["teacher"]["name"] == "tiny"
    assert {way["max_abs_difference"] for way in report["verification"].values()} == {0.0}
    assert report["lora"] == {"r": R, "alpha": 2.0 * R, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    assert report["layers"] == {"linear": [0, 1], "softmax": []} and report["merge_error"]["cast"]["max"] < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["mixer_window"] == W and config["mixer_feature_dim"] == F and config["layer_mixers"] == ["linear"] * 2
    assert not [name for name in load_file(out / "model.safetensors") if "lora" in name]
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert manifest["imported"]["finetuned"]["sha256"] in card and "Nothing was trained here" in card
    assert str(out.parent) not in card and [p.name for p in out.parent.glob(".*")] == []


@torch.no_grad()
def test_pure_linear_maps_tied_maps_and_kept_layers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No window factors: no window. One map for queries and keys: saved once. A layer without maps stays softmax."""
    monkeypatch.setattr(lolcats_import, "verify_export", lambda *a, **k: {})  # others see that it is done
    state = {name: t for name, t in distilled(window=False).items() if "_k." not in name}
    report = linearize.import_lolcats(base, tmp_path / "pure", distilled=save(tmp_path / "a.pt", state), device="cpu")
    assert report["window"] == 0 and report["lora"] is None
    maps = state | {name.replace("_q.", "_k."): t for name, t in state.items()}
    ids = torch.arange(5 * W) * 29 % 256
    want = published(ids, load_file(base / "model.safetensors"), maps, None, end=False)
    got = load_model(tmp_path / "pure", device="cpu")(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    maps = distilled(layers=[1], prefix="")
    torch.save(maps, tmp_path / "model.pt")  # as on the Hub: no epoch beside it, and nothing in the name
    found = read_published(tmp_path / "model.pt", None, window=None)
    assert sorted(found.maps) == [1] and found.window == 64 and found.spec().state_heads == "query"
    assert read_published(tmp_path / "model.pt", None, window=8).window == 8


def test_maps_that_were_finetuned_too_win(tmp_path: Path) -> None:
    later = {f"base_model.model.{name}": t + 1 for name, t in distilled().items()}
    found = read_published(
        save(tmp_path / "a.pt", distilled()), save(tmp_path / "b.pt", later | finetuned("v")), window=W
    )
    first = distilled()["model.layers.0.self_attn.feature_map_q.mlp.layer"]
    assert torch.equal(found.maps[0]["q_map.weight"], first + 1) and set(found.adapters[0]) == {"v_proj"}


NAME = "model.layers.1.self_attn."
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "T2R's bias": ("a", {NAME + "feature_map_q.mlp.bias": torch.ones(1, 4, 1, 1)}, {}, "maps with a bias"),
    "adapter maps": ("a", {NAME + "feature_map_q.mlp.layer0": torch.ones(4, 8, 4)}, {}, "adapter maps"),
    "an unknown tensor": ("a", {NAME + "gate": torch.ones(2)}, {}, r"cannot place 'model\.layers\.1\.self_attn\.gate'"),
    "full weights": ("a", {NAME + "q_proj.weight": torch.ones(32, 32)}, {}, "trained in full"),
    "two names of one": ("a", {"base_model.model." + NAME + "window_factors": torch.ones(4)}, {}, "twice"),
    "NaN": ("a", {NAME + "window_factors": torch.full((1, 4, 1, 1), float("nan"))}, {}, "not finite"),
    "adapters first": ("a", finetuned("q"), {}, "Give it as the finetuned one"),
    "a layer too many": ("a", distilled(layers=[2]), {}, "layer 2, and the base has 2 layers"),
    "other heads": ("a", {NAME + "window_factors": torch.ones(5)}, {}, r"shape \[5\], and this base needs \[4\]"),
    "other widths": ("a", {NAME + "feature_map_q.mlp.layer": torch.ones(4, 8, 5)}, {}, "different sizes"),
    "a sliding window": ("distill_lk_smd_wsw64_fd64", {}, {}, "sliding window of exactly N"),
    "a skip connection": ("run-lsc=1-s=0_distill", {}, {}, "skip connection"),
    "two windows": ("lk_smd_wtk64_fd64", {}, {"window": 32}, "says a block of 64"),
    "alpha of nothing": ("a", {}, {"lora_alpha": 8.0}, "there are no adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    stem, changes, options, words = REFUSED[case]
    path = save(tmp_path / f"{stem}.pt", distilled() | changes)
    with pytest.raises(UsageError, match=words):
        linearize.import_lolcats(base, tmp_path / "out", distilled=path, device="cpu", **options)
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pairs_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    maps = save(tmp_path / "a.pt", distilled())
    half = {name: t for name, t in finetuned("q").items() if "lora_B" not in name}
    lone = {name: t for name, t in finetuned("qv").items() if "layers.1.self_attn.v" not in name}
    wide = {name: torch.ones(3, 7) if "0.self_attn.q_proj.lora_A" in name else t for name, t in finetuned("q").items()}
    for state, words in ((half, "one half"), (lone, "layer 1 has no adapter of v_proj"), (wide, r"shape \[3, 7\]")):
        with pytest.raises(UsageError, match=words):
            linearize.import_lolcats(
                base, tmp_path / "out", distilled=maps, finetuned=save(tmp_path / "b.pt", state), window=W, device="cpu"
            )
    with pytest.raises(UsageError, match="lacks k_map"):
        state = distilled()
        del state[NAME + "feature_map_k.mlp.layer"]
        read_published(save(tmp_path / "c.pt", state), None, window=None)
    with pytest.raises(UsageError, match="no window factors"):
        read_published(save(tmp_path / "c.pt", distilled(window=False)), None, window=W)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(RefusedError):
        linearize.import_lolcats(base, tmp_path / "full", distilled=maps, device="cpu")
    with pytest.raises(UsageError, match="there is no file"):
        linearize.import_lolcats(base, tmp_path / "out", distilled=tmp_path / "none.pt", device="cpu")


def test_the_command(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:
    ways = {"import": {"way": "import linearize", "max_abs_difference": 0.0, "same_text": True}}
    monkeypatch.setattr(lolcats_import, "verify_export", lambda *a, **k: ways)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "maps.pt", distilled())
    command = ["import", "lolcats", str(base), "out", "--distilled", "maps.pt", "--window", "16", "--device", "cpu"]
    assert main([*command, "--dtype", "bfloat16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert undocumented("import lolcats", result) == []
    assert result["window"] == 16 and result["dtype"] == "bfloat16" and (tmp_path / "out" / "config.json").is_file()
    assert main(command) == 3 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main([*command[:3], "two", *command[4:]]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "2 linear layers, 0 softmax; 8 features a head; window 16" in shown and "audit two" in shown
    assert main(["import"]) == 2
