"""Folders of delta-rule models that transformers itself writes are read, and leave again as releases are written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain.checkpoint import single
from lasptrain.convert import verify
from lasptrain.convert.export import export
from lasptrain.convert.files import Folder
from lasptrain.convert.restore import open_weights, restore
from lasptrain.errors import ConvertError
from lasptrain.models.language_model import LanguageModel
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.recipe import loading
from tests.convert.test_convert import ROOT, loaded, rewrite

pytestmark = [
    pytest.mark.skipif(not verify.installed("transformers"), reason="needs the extra convert"),
    pytest.mark.filterwarnings("ignore"),  # of another library
]
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "layer_types": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
THIRDS = {"linear_num_key_heads": 4, "linear_value_head_dim": 8}  # transformers writes convolutions in equal thirds
MOONSHOT = {"kda_layers": [1, 2, 3], "full_attn_layers": [], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("OlmoHybrid", SIZES | GDN | THIRDS | {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    "olmo-rope": ("OlmoHybrid", SIZES | GDN | THIRDS | {"linear_allow_neg_eigval": False, "tie_word_embeddings": True}),
    "qwen": ("Qwen3_5", SIZES | GDN | {"head_dim": 16, "tie_word_embeddings": True}),
    "kimi": (
        "KimiLinear",
        {key: value for key, value in SIZES.items() if key != "layer_types"}
        | {"num_key_value_heads": 4, "linear_attn_config": MOONSHOT, "mlp_layer_types": ["dense"] * 3},
    ),
}


def written(name: str, folder: Path, **more: Any) -> Any:
    """A model of transformers itself, its numbers drawn so that they hide nothing, saved from memory."""
    import transformers

    kind, keys = CLASSES[name]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Qwen3_5" else f"{kind}Config")(**keys | more)
    model = drawn(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tokenizers/python-4k.model", folder / "tokenizer.model")
    return model


def drawn(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif tensor.dim() == 2:
                tensor.mul_(5)
    return model


def change(folder: Path, keys: dict[str, Any]) -> None:
    """Change keys of config.json; None takes one away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def ours(folder: Path) -> LanguageModel:
    weights = open_weights(folder)
    model = LanguageModel(weights.origin.model, 64, ShardedRecurrence("reference"))
    model.load_state_dict({key: weights.read(key) for key in weights.empty.state_dict()})
    return model


def error(folder: Path, want: Tensor) -> float:
    """The largest difference of our logits, over the largest logit."""
    model = ours(folder)
    with torch.no_grad():
        got = model.logits(model.hidden(TOKENS)[0])
    return float((got - want).abs().max() / want.abs().max())


TOKENS = torch.randint(4096, (1, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_wrote_computes_the_same_here(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory it writes other names than those that are released; its way back is exact, in released names."""
    monkeypatch.setattr("lasptrain.convert.restore._fingerprint", lambda recipe: "0" * 64)  # preparing data takes long
    theirs = written(name, tmp_path / "theirs")
    want = theirs(TOKENS, use_cache=False).logits
    assert want.abs().max() > 0.5
    assert error(tmp_path / "theirs", want) < verify.TOLERANCE
    run = restore(tmp_path / "theirs", tmp_path / "run")
    out = export(run, tmp_path / "out", "hf", check=False).folder
    again = loaded(out)
    assert float((again(TOKENS, use_cache=False).logits - want).abs().max()) < verify.TOLERANCE
    state = theirs.state_dict()
    found = again.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)
    stored = {part for key in Folder(out).shapes for part in key.split(".")}
    assert not stored & {"attention_layer_norm", "feedforward_layer_norm", "block_sparse_moe"}


@torch.no_grad()
def test_a_released_model_that_sees_and_drafts_becomes_a_text_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3.5-0.8B's layout: a composite configuration, a tied head, a vision tower, and heads that draft."""
    import transformers
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("lasptrain.convert.restore._fingerprint", lambda recipe: "0" * 64)
    folder = tmp_path / "Qwen"
    layers = ["linear_attention"] * 3 + ["full_attention"]
    text = CLASSES["qwen"][1] | {"num_hidden_layers": 4, "layer_types": layers}
    text |= {"linear_num_key_heads": 4, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=sight, tie_word_embeddings=True)
    theirs = drawn(transformers.Qwen3_5ForConditionalGeneration(config).eval())
    theirs.save_pretrained(folder)
    save_file(
        load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(2, 4)}, folder / "model.safetensors"
    )
    shutil.copy(ROOT / "tokenizers/python-4k.model", folder / "tokenizer.model")
    released = {
        "mtp_num_hidden_layers": 1,
        "mamba_ssm_dtype": "float32",
        "attn_output_gate": True,
        "mlp_only_layers": [],
    }
    released |= {"full_attention_interval": 4}
    texts = json.loads((folder / "config.json").read_text())["text_config"]
    texts["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [1, 1, 0]}
    change(folder, {"text_config": texts | released})

    want = theirs(TOKENS, use_cache=False).logits
    told: list[str] = []
    run = restore(folder, tmp_path / "run", tell=told.append)
    line, base = told
    assert base == "base: Qwen, license unknown: no file and no card beside the weights names one"
    assert re.fullmatch(r"left out: \d+ tensors that our model has not: model\.visual \(\d+\), mtp\.fc \(1\)", line)
    assert loading.load(run / "recipe.yaml").model.tie
    out = export(run, tmp_path / "out", "hf", check=False).folder
    theirs_again = loaded(out)
    assert type(theirs_again).__name__ == "Qwen3_5ForCausalLM"
    assert float((theirs_again(TOKENS, use_cache=False).logits - want).abs().max()) < verify.TOLERANCE
    names = {key.replace("model.language_model.", "model."): key for key in Folder(folder).shapes}
    for key in Folder(out).shapes:
        assert torch.equal(Folder(out).read(key), Folder(folder).read(names[key])), key
    assert single.CheckpointReader(run).step == 0


def test_positions_are_left_out_as_releases_leave_them_out(tmp_path: Path) -> None:
    """Null means none, whatever transformers makes of it; written is the one form that it reads as none, too."""
    with torch.no_grad():
        want = written("olmo", tmp_path)(TOKENS, use_cache=False).logits
    for keys in ({"rope_parameters": None}, {"rope_parameters": {"rope_theta": None}}):
        change(tmp_path, keys)
        assert error(tmp_path, want) < verify.TOLERANCE
    change(tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    assert error(tmp_path, want) > 1e-2


def test_names_of_olmo_core_are_read(tmp_path: Path) -> None:
    with torch.no_grad():
        want = written("olmo", tmp_path)(TOKENS, use_cache=False).logits

    def renamed(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".linear_attn.o_" in key]:
            new = key.replace(".o_proj.", ".out_proj.").replace(".o_norm.", ".norm.")
            tensors[new] = tensors.pop(key)

    rewrite(tmp_path, renamed)
    assert error(tmp_path, want) < verify.TOLERANCE
    rewrite(tmp_path, lambda tensors: tensors.update(twice(tensors)))
    with pytest.raises(ConvertError, match=r"has .*\.norm1?\.weight and .*; expected one of them"):
        open_weights(tmp_path)


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gated norm of layer 0 under its other name, too."""
    return {"model.layers.0.linear_attn.o_norm.weight": tensors["model.layers.0.linear_attn.norm.weight"].clone()}


def test_keys_of_moonshot_win_over_flat_ones(tmp_path: Path) -> None:
    with torch.no_grad():
        want = written("kimi", tmp_path)(TOKENS, use_cache=False).logits
    flat = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    change(tmp_path, dict.fromkeys(flat) | {"linear_attn_config": MOONSHOT, "first_k_dense_replace": 3})
    assert error(tmp_path, want) < verify.TOLERANCE
    change(tmp_path, {"linear_head_dim": 4})
    assert error(tmp_path, want) < verify.TOLERANCE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo", {"linear_use_gate": False}, "linear_use_gate is False; expected True"),
    ("olmo", {"clip_qkv": 3}, "clip_qkv is 3; expected none, our model knows no such key"),
    (
        "olmo",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}},
        "rope_parameters: factor is 2",
    ),
    ("qwen", {"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}; expected none"),
    ("qwen", {"attn_output_gate": False}, "attn_output_gate is False; expected True"),
    ("kimi", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types names experts; expected dense"),
    ("kimi", {"layer_types": LAYERS}, "layer_types has MLA at [1]; expected none, it is not trained here"),
    ("kimi", {"linear_attn_config": MOONSHOT | {"gate_lower_bound": -5}}, "linear_attn_config: gate_lower_bound is -5"),
    ("kimi", {"use_full_rank_gate": True}, "use_full_rank_gate is True; expected none"),
    ("kimi", {"tie_word_embeddings": True}, "tie_word_embeddings is True; expected False"),
]


def test_what_their_classes_ignore_or_ours_lack_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("olmo", "qwen", "kimi"):
        written(name, tmp_path / name)
    for name, keys, message in REFUSED:
        folder = tmp_path / name
        before = (folder / "config.json").read_text()
        change(folder, keys)
        with pytest.raises(ConvertError, match=re.escape(message)):
            open_weights(folder)
        (folder / "config.json").write_text(before)
