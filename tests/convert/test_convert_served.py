"""Who serves an export is said before training and on its card; the terms of weights travel with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data_tools.tokenizer import load_tokenizer
from lasptrain import architectures
from lasptrain.convert import gguf, tables, targets, verify
from lasptrain.convert.export import RECORD, export
from lasptrain.convert.files import Folder
from lasptrain.convert.restore import open_weights, restore
from lasptrain.errors import CheckpointError, ConvertError
from lasptrain.models.language_model import on_meta
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.recipe import loading
from lasptrain.run import origin
from tests.convert.test_convert import (
    KIMI,
    MODELS,
    OLMO,
    QWEN,
    ROOT,
    SIZES,
    loaded,
    make_run,
    rewrite,
    transformers_needed,
)

PIECES = "tokenizers/python-4k.model"
GRANITE: dict[str, Any] = {"arch": "ssd", "dim": 32, "heads": 4, "key_dim": 16, "value_dim": 16}
RELEASED = "OpenNLPLab/Some-1B"


def test_who_serves_a_model_is_said_before_it_is_trained() -> None:
    sliding = {"softmax": [1], "sliding_window": 8}
    qwen_softmax = QWEN | {"softmax": [1], "qk_norm": "head", "softmax_gate": True}
    no_class = "it has no class for arch tnl"
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("llama.cpp", PIECES, GRANITE, "yes, as GraniteMoeHybridForCausalLM"),
        (
            "llama.cpp",
            PIECES,
            GRANITE | {"value_dim": 8},
            "no, model.heads × value dim must be 2 × model.dim = 64, not 32",
        ),
        (
            "llama.cpp",
            PIECES,
            GRANITE | {"softmax": [1]},
            "no, its softmax layers have no positions, model.rotary is not",
        ),
        (
            "llama.cpp",
            PIECES,
            GRANITE | {"vocab": 257},
            "no, its converter pads vocabularies to multiples of 8, model.vo",
        ),
        ("llama.cpp", "bytes", GRANITE, "no, it has no tokenizer of bytes"),
        ("vLLM", "bytes", GRANITE | {"softmax": [1]}, "yes, as GraniteMoeHybridForCausalLM"),
        (
            "SGLang",
            PIECES,
            GRANITE | sliding,
            "no, --to hf: its softmax layers see all tokens, not model.sliding_window",
        ),
        ("vLLM", PIECES, {"arch": "minimax"}, "no, it has no MiniMaxForCausalLM since 0.24, and 0.23 cannot load the"),
        ("SGLang", PIECES, {"arch": "minimax"}, "no, it has no MiniMaxForCausalLM"),
        ("llama.cpp", PIECES, {"arch": "minimax"}, "no, it has no MiniMaxForCausalLM; its MiniMaxText01ForCausalLM"),
        ("vLLM", PIECES, OLMO, "yes, as OlmoHybridForCausalLM"),
        ("SGLang", PIECES, OLMO, "no, it has no OlmoHybridForCausalLM"),
        ("llama.cpp", PIECES, OLMO, "no, it has no OlmoHybridForCausalLM"),
        ("llama.cpp", "t/tokenizer.json", QWEN, "yes, as Qwen3_5ForCausalLM, if its converter knows the tokenizer"),
        ("llama.cpp", PIECES, QWEN | {"value_dim": 4}, "no, key dim 8 and value dim 4 differ"),
        *(
            (server, PIECES, qwen_softmax | {"rotary": None}, "no, its softmax layers are rotary, model.rotary is null")
            for server in ("vLLM", "SGLang", "llama.cpp")
        ),
        ("vLLM", PIECES, QWEN | {"value_dim": 4}, "yes, as Qwen3_5ForCausalLM"),
        ("vLLM", PIECES, {"arch": "gdn"}, "no, --to hf: olmo_hybrid: its gated norm .*; qwen3_5: its norms"),
        ("vLLM", PIECES, KIMI, "no, its gated norm has an eps of 1e-05, model.norm_eps is 1e-06"),
        ("vLLM", PIECES, KIMI | {"norm_eps": 1e-5}, "yes, as KimiLinearForCausalLM"),
        ("llama.cpp", PIECES, KIMI, "yes, as KimiLinearForCausalLM"),
        *((server, PIECES, {"arch": "tnl"}, f"no, {no_class}") for server in ("vLLM", "SGLang", "llama.cpp")),
    ]
    for server, tokenizer, keys, expected in cases:
        model = architectures.model({**SIZES, "vocab": 4096, **keys})
        told = [line.split(": ", 1) for line in targets.servers(model, tokenizer)]
        lines = {one: text for names, text in told for one in names.split(", ")}
        assert re.match(re.escape(expected).replace(r"\.\*", ".*"), lines[server]), (server, keys, lines[server])


@pytest.mark.parametrize("name", ["quickstart_ssd", "quickstart_qwen", "kda_1b_4096k"])
def test_a_shipped_recipe_of_each_family_that_llama_cpp_knows_fits_it(name: str) -> None:
    recipe = loading.load(ROOT / "recipes" / f"{name}.yaml")
    model = recipe.model if isinstance(recipe.model.vocab, int) else recipe.model.model_copy(update={"vocab": 4096})
    assert all(": yes, as " in line for line in targets.servers(model, recipe.data.tokenizer))


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export, not to be changed."""
    folder = tmp_path_factory.mktemp("granite")
    run = make_run(folder, GRANITE)
    return run, export(run, folder / "my-model", "hf", check=False).folder


def test_a_card_has_the_commands_that_keep_states_and_steps_exact(tmp_path: Path, granite: tuple[Path, Path]) -> None:
    card = (granite[1] / "README.md").read_text(encoding="utf-8")
    assert "vllm serve my-model --dtype float32 --mamba-ssm-cache-dtype float32\n" in card
    assert (
        "SGLANG_MAMBA_CONV_DTYPE=float32 python -m sglang.launch_server --model-path my-model --dtype float32" in card
    )
    assert "python llama.cpp/convert_hf_to_gguf.py my-model --outtype f32 --outfile my-model.gguf\n" in card
    assert " --override-kv tokenizer.ggml.add_space_prefix=bool:false\n" in card and "read and not run" in card
    run = make_run(tmp_path, MODELS["qwen"][1])
    card = (export(run, tmp_path / "out", "hf", check=False).folder / "README.md").read_text(encoding="utf-8")
    assert "python -m lasptrain.convert.gguf out llama.cpp --out out.gguf\n" in card
    (service,) = (one for one in targets.TARGETS["qwen3_5"].services if one.server == "llama.cpp")
    convert, serve = service.commands("out", "tokenizer.json")
    assert convert.endswith("--outfile out.gguf --no-mtp") and serve.endswith("add_bos_token=bool:true")


def foreign(folder: Path, export: Path) -> Path:
    """An export as weights of others, with their card and their terms."""
    shutil.copytree(export, folder)
    (folder / RECORD).unlink()
    card = f"---\nlicense: other\nlicense_name: some-1.0\nbase_model: A/B\nmodel_name: {RELEASED}\n---\n# Text\n"
    (folder / "README.md").write_text(card)
    (folder / "LICENSE.txt").write_text("Terms.\n")
    (folder / "NOTICE").write_text("Names.\n")
    return folder


def test_the_terms_of_weights_travel_into_a_run_and_into_what_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granite: tuple[Path, Path]
) -> None:
    monkeypatch.setattr("lasptrain.convert.restore._fingerprint", lambda recipe: "0" * 64)  # preparing data takes long
    source, told = foreign(tmp_path / "theirs", granite[1]), list[str]()
    run = restore(source, tmp_path / "run", tell=told.append)
    assert told == [f"base: {RELEASED}, license other"]
    next_run = tmp_path / "next"
    next_run.mkdir()
    origin.write(next_run, origin.Origin(run))
    assert (next_run / "base/NOTICE").read_text() == "Names.\n"
    first = export(run, tmp_path / "first", "hf", check=False).folder
    again = export(restore(first, tmp_path / "back"), tmp_path / "again", "safetensors", check=False).folder
    for out in (first, again):
        assert (out / "LICENSE.txt").read_text() + (out / "NOTICE").read_text() == "Terms.\nNames.\n"
        front = (out / "README.md").read_text().split("---\n")[1]
        assert f"license: other\nlicense_name: some-1.0\nbase_model: {RELEASED}\n" in front
        imported = (
            f"| tokens seen | 0, in windows of 4,096; an unknown number before, by {RELEASED}, whose weights were"
        )
        assert imported in (out / "README.md").read_text()
    (run / "base/base.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"base\.json: not what lasptrain writes"):
        export(run, tmp_path / "damaged", "safetensors", check=False)
    (source / "NOTICE").unlink()
    os.mkfifo(source / "NOTICE")
    with pytest.raises(ConvertError, match=r"NOTICE: cannot be read \(it is no regular file\)"):
        restore(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("folder", "named", "card", "told"),
    [
        ("a", "Org/Name", "---\nlicense: mit\n---\n", "base: Org/Name, license mit"),
        ("models--Org--Name/snapshots/1", "/home/x", "---\nlicense: [mit\n---\n", "base: Org/Name, license unknown"),
        (
            "plain",
            None,
            "no front matter",
            "base: plain, license unknown: no file and no card beside the weights names",
        ),
    ],
)
def test_a_base_has_the_name_that_its_folder_gives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    granite: tuple[Path, Path],
    folder: str,
    named: str | None,
    card: str,
    told: str,
) -> None:
    monkeypatch.setattr("lasptrain.convert.restore._fingerprint", lambda recipe: "0" * 64)
    monkeypatch.setattr("lasptrain.convert.restore.single.write", lambda *_: None)
    source = tmp_path / folder
    shutil.copytree(granite[1], source)
    (source / RECORD).unlink()
    (source / "README.md").write_text(card)
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": named}
    (source / "config.json").write_text(json.dumps(config))
    lines: list[str] = []
    restore(source, tmp_path / "run", tell=lines.append)
    assert lines[0].startswith(told)


def test_an_export_of_ours_is_no_base(tmp_path: Path, granite: tuple[Path, Path]) -> None:
    lines: list[str] = []
    run = restore(granite[1], tmp_path / "run", tell=lines.append)
    assert lines == ["base: none, it is an export without one"] and not (run / "base").exists()


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
def test_decays_that_transformers_keeps_are_in_the_file_and_need_not_be(tmp_path: Path) -> None:
    """Without them it reports them as newly initialized; exports of before have none."""
    run = make_run(tmp_path, MODELS["minimax-hybrid"][1])
    out = export(run, tmp_path / "out", "hf", check=False).folder
    ends = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    layer = loaded(out).model.layers[1].self_attn
    slope = layer.get_slope_rate()
    for name, value in zip(ends, (slope, *layer.decay_factors(slope)), strict=True):
        stored = Folder(out).read(f"model.layers.1.self_attn.{name}")
        torch.testing.assert_close(stored, value, rtol=1e-5, atol=1e-7)
        assert torch.equal(stored, getattr(layer, name))
    before = open_weights(out)
    rewrite(out, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(ends)])
    after = open_weights(out)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.empty.state_dict())


CONVERTER = """import sys
from conversion.base import TextModel
class Model(TextModel):
    class gguf_writer:
        add_add_space_prefix = staticmethod(print)
if "fails" in sys.argv[1]:
    raise ValueError("it fails")
Model()._set_vocab_gpt2()
open(sys.argv[sys.argv.index("--outfile") + 1], "w").write(" ".join(sys.argv[2:4] + sys.argv[6:]))
"""


def checkout(folder: Path) -> Path:
    """A checkout of llama.cpp with as much of its converter as is called or replaced."""
    (folder / "conversion").mkdir(parents=True)
    methods = ("    def _set_vocab_sentencepiece(self): pass", "    def _set_vocab_gpt2(self): raise ValueError")
    (folder / "conversion/base.py").write_text("\n".join(("class TextModel:", *methods)))
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


def test_what_is_missing_for_llama_cpp_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], granite: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(verify, "installed", lambda library: False)
    llama, out = checkout(tmp_path / "llama.cpp"), tmp_path / "model.gguf"
    assert gguf.main([str(granite[1]), str(llama), "--out", str(out)]) == 0
    assert (
        capsys.readouterr().out
        == "converted; not compared: llama-cpp-python is not installed (pip install llama-cpp-python)\n"
    )
    assert out.read_text() == "--outtype f32"
    shutil.copytree(granite[1], tmp_path / "fails")
    assert gguf.main([str(tmp_path / "fails"), str(llama)]) == ConvertError.code
    assert "cannot convert" in (said := capsys.readouterr().err) and said.endswith("ValueError: it fails\n")
    assert gguf.main([str(granite[1]), str(tmp_path)]) == ConvertError.code
    assert "holds no convert_hf_to_gguf.py; expected a checkout of ggml-org/llama.cpp" in capsys.readouterr().err
    (tmp_path / "tnl").mkdir()
    run = make_run(tmp_path / "tnl", MODELS["tnl"][1])
    other = export(run, tmp_path / "other", "transnormer", check=False).folder
    assert gguf.main([str(other), str(llama)]) == ConvertError.code
    assert "llama.cpp cannot take it: it has no class for arch tnl" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [False, True])
def test_the_comparison_in_llama_cpp_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granite: tuple[Path, Path], wrong: bool
) -> None:
    """Where the package is another name of our model, or of one that begins each piece anew."""
    logits, own = verify.reference(granite[0]), load_tokenizer(str(ROOT / PIECES))

    class Llama:
        def __init__(self, *_: object, **__: object) -> None:
            self.tokens: list[int] = []
            self.scores = torch.zeros(200, 4096).numpy()

        @property
        def n_tokens(self) -> int:
            return len(self.tokens)

        def eval(self, tokens: list[int]) -> None:
            before = self.n_tokens
            self.tokens += tokens
            read = tokens if wrong else self.tokens
            self.scores[before : self.n_tokens] = logits(torch.tensor([read]), len(tokens))[0].numpy()

        def tokenize(self, text: bytes, **_: object) -> list[int]:
            return [own.bos, *own.encode(text.decode())]

    package = ModuleType("llama_cpp")
    package.__dict__["Llama"] = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    found = gguf.compare(granite[1], open_weights(granite[1]), tmp_path)
    assert found.scale > 1 and found.lines == gguf.LINES
    assert found.equal is not wrong and (found.error < 1e-5) is not wrong


SEVEN = {  # Olmo-Hybrid-7B
    "model_type": "olmo_hybrid",
    "vocab_size": 100352,
    "hidden_size": 3840,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "num_key_value_heads": 30,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
    "linear_num_key_heads": 30,
    "linear_num_value_heads": 30,
    "linear_key_head_dim": 96,
    "linear_value_head_dim": 192,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
def test_every_name_and_shape_of_a_hybrid_of_7b_is_that_of_transformers() -> None:
    import transformers

    config = transformers.OlmoHybridConfig(**SEVEN, rope_parameters={"rope_type": "default", "rope_theta": None})
    with torch.device("meta"):
        theirs = transformers.OlmoHybridForCausalLM(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) > 7.4e9
    target = targets.TARGETS["olmo_hybrid"]
    model = architectures.model({"vocab": 100352} | target.keys(SEVEN | {"rope_parameters": None}, "config.json"))
    empty = on_meta(model, 64, ShardedRecurrence("reference"))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    made = tables.forms(target.rules(model, shapes), shapes, torch.float32)
    assert {name: form.shape for name, form in made.items()} == released(theirs)


def released(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model of transformers, under the names that its files have."""
    parts = {"q_conv1d": 30 * 96, "k_conv1d": 30 * 96, "v_conv1d": 30 * 192}
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if ".linear_attn.conv1d." in name:  # one in memory, three in files
            found |= {name.replace("conv1d", part): (rows, 1, 4) for part, rows in parts.items()}
        else:
            found[name] = tuple(tensor.shape)
    return found


MEMORY = """
import re, sys
from pathlib import Path
from lasptrain.convert import restore
from lasptrain.convert.export import export
restore._fingerprint = lambda recipe: "0" * 64
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def used(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before
small, source, run, out = map(Path, sys.argv[1:])
export(restore.restore(small, run.with_name("first")), out.with_name("first-out"), "hf", check=False)  # imports
print(used(lambda: restore.restore(source, run)), used(lambda: export(run, out, "hf", check=False)))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_a_folder_of_shards_is_read_and_written_within_its_largest_tensor(tmp_path: Path) -> None:
    """An embedding of 32 MB in fp32, of half that in its file, and a head as large: never both."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "small").mkdir()
    run = make_run(tmp_path / "small", MODELS["olmo-hybrid"][1])
    small = export(run, tmp_path / "small/out", "hf", check=False).folder
    (small / RECORD).unlink()
    out = shutil.copytree(small, tmp_path / "theirs")
    rows = 1 << 18
    tensors = load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors.pop(name)
        save_file({name: torch.ones(rows, 32, dtype=torch.bfloat16)}, out / f"model-{name}.safetensors")
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text()) | {"vocab_size": rows}
    (out / "config.json").write_text(json.dumps(config))
    largest = rows * 32 * 4
    command = [sys.executable, "-c", MEMORY, str(small), str(out), str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reading, writing = map(int, done.stdout.split())
    assert reading < 1.6 * largest and writing < 1.1 * largest, (reading / largest, writing / largest)
