"""Law 5: an exported model is the model, in its own library, and comes back to the bit."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_tools.tokenizer import load_tokenizer
from lasptrain import architectures
from lasptrain.architectures.ssd import Ssd
from lasptrain.checkpoint import single, steps
from lasptrain.convert import tables, targets, tokenizer, verify
from lasptrain.convert.export import RECORD, export
from lasptrain.convert.files import Folder
from lasptrain.convert.restore import open_weights, restore
from lasptrain.errors import CheckpointError, ConvertError, DataError, RecipeError, SetupError
from lasptrain.eval import load, main
from lasptrain.eval.load import load_model
from lasptrain.eval.runner import EvalConfig
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.recipe import loading
from lasptrain.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SIZES = {"dim": 32, "layers": 2, "heads": 4, "mlp": 48}
OLMO: dict[str, Any] = {"arch": "gdn", "decay": "paper", "output_norm_eps": 1e-5}
QWEN: dict[str, Any] = {"arch": "gdn", "decay": "paper", "centred_norms": True}
KIMI: dict[str, Any] = {"arch": "kda", "decay": "paper"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ssd": ("hf", {"arch": "ssd", "data_dependent": True, "conv": 3, "key_dim": 16}),
    "ssd-constant": ("granitemoehybrid", {"arch": "ssd", "tie": False}),
    "ssd-hybrid": (
        "hf",
        {"arch": "ssd", "layers": 3, "data_dependent": True, "decay": "learned", "softmax": [1], "kv_heads": 2}
        | {"rotary": 500.0},
    ),
    "ssd-nope": ("hf", {"arch": "ssd", "layers": 3, "softmax": [0, 2], "rotary": None, "tie": False}),
    "minimax": ("hf", {"arch": "minimax", "heads": 6, "dim": 36}),
    "minimax-hybrid": ("hf", {"arch": "minimax", "layers": 3, "softmax": [0, 2], "kv_heads": 2, "tie": False}),
    "minimax-sliding": ("minimax", {"arch": "minimax", "softmax": [0], "sliding_window": 9, "alpha": 2.5}),
    "tnl": ("transnormer", {"arch": "tnl"}),
    "tnl-untied": ("transnormer", {"arch": "tnl", "tie": False, "lrpe": [1]}),
    "linear_transformer": ("linear_attn", {"arch": "linear_transformer", "decay": "none", "normalizer": True}),
    "linear_transformer-sum": ("linear_attn", {"arch": "linear_transformer", "decay": "none", "tie": False}),
    "retnet": ("retnet", {"arch": "retnet"}),
    "olmo": ("hf", OLMO | {"negative_eigenvalues": True}),
    "olmo-hybrid": (
        "olmo_hybrid",
        OLMO
        | {"layers": 3, "key_heads": 2, "value_dim": 12, "conv": 3, "softmax": [1], "tie": False}
        | {"qk_norm": "whole", "softmax_norm": "after", "softmax_heads": 2, "kv_heads": 1, "rotary": 500.0},
    ),
    "olmo-nope": ("hf", OLMO | {"softmax": [1], "qk_norm": "whole", "softmax_norm": "after", "rotary": None}),
    "qwen": ("hf", QWEN | {"tie": False}),
    "qwen-hybrid": (
        "hf",
        QWEN
        | {"layers": 3, "heads": 6, "key_heads": 2, "key_dim": 8, "value_dim": 12, "softmax": [0], "qk_norm": "head"}
        | {"softmax_gate": True, "softmax_dim": 16, "softmax_heads": 2, "kv_heads": 1, "rotary_fraction": 0.25},
    ),
    "qwen-nope": (
        "qwen3_5",
        QWEN | {"norm_eps": 1e-5, "softmax": [1], "qk_norm": "head", "softmax_gate": True, "rotary": None},
    ),
    "kimi": ("hf", KIMI),
    "kimi-untied": ("kimi_linear", KIMI | {"norm_eps": 1e-5, "conv": 3, "tie": False}),
    "plain": ("safetensors", {"arch": "tnl", "decay": "alibi", "tie": False}),
}
IN_TRANSFORMERS = ("ssd", "minimax", "tnl", "gdn", "kda")
ELSEWHERE = [name for name, (_, model) in MODELS.items() if model["arch"] in IN_TRANSFORMERS]
ELSEWHERE.remove("plain")
VARIANTS: tuple[str, ...] = ("ssd-constant", "ssd-nope", "minimax-sliding", "tnl-untied", "linear_transformer-sum")
VARIANTS += ("olmo-nope", "qwen-nope", "kimi-untied")
MISREAD: dict[str, list[dict[str, Any]]] = {  # keys of other models with the same tensors
    "olmo": [{"negative_eigenvalues": False}, {"output_norm_eps": 1e-4}, {"gate": "sigmoid"}],
    "olmo-hybrid": [{"softmax_norm": "before"}, {"rotary": None}],
    "olmo-nope": [{"rotary": 1e4}],
    "qwen": [{"centred_norms": False}, {"output_norm_eps": 1e-5}],
    "qwen-hybrid": [{"rotary_fraction": 1.0}, {"rotary": 500.0}],
    "kimi": [{"gate": "silu"}, {"norm_eps": 1e-5}],
}
Exports = Callable[[str], tuple[Path, Path]]
transformers_needed = pytest.mark.skipif(not verify.installed("transformers"), reason="needs the extra convert")


def daily(names: Iterable[str]) -> list[Any]:
    """The names as parameters, the variants slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in names]


def recipe_text(model: dict[str, Any]) -> str:
    return json.dumps(
        {
            "model": {**SIZES, **model, "vocab": 4096},
            "data": {"tokenizer": str(ROOT / "tokenizers/python-4k.model"), "window": 512},
            "optim": {"lr": 0.001},
            "train": {"steps": 9, "precision": "fp32"},
        }
    )


def value(name: str, tensor: Tensor) -> Tensor:
    """Initial values that hide nothing: matrices five times larger, weights that are not one, steps that open."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    if ".dt." in name:
        return tensor + 0.3 * noise
    if name.endswith("norm.weight") or ".norm" in name:
        return 1 + 0.3 * noise
    return tensor * 5 if name.endswith("weight") else tensor


@cache
def values(text: str) -> dict[str, Tensor]:
    cfg = architectures.model(json.loads(text))
    with torch.device("meta"):
        model = LanguageModel(cfg, 512, ShardedRecurrence("reference"))
    return {name: value(name, tensor).float() for name, tensor in initial_values(model, 0, CPU)}


def make_run(folder: Path, model: dict[str, Any]) -> Path:
    """A run with one checkpoint, as training leaves it."""
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_text(model), encoding="utf-8")
    recipe = loading.load(run / "recipe.yaml")
    tensors = values(json.dumps(recipe.model.model_dump(mode="json")))
    with torch.device("meta"):
        empty = LanguageModel(recipe.model, 512, ShardedRecurrence("reference"))
    meta = {
        "model": recipe.model.model_dump(mode="json"),
        "decays": empty.decays().tolist(),
        "dataset": "0" * 64,
        "order": {"seed": 0, "window": 512, "batch": 1, "reset_at_documents": True},
    }
    single.write(run, 7, empty, build_optimizer(empty, recipe.optim), tensors.__getitem__, meta)
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 3.25}\n{"step": 8, "loss": 9}\n', encoding="utf-8")
    return run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models are so small that a second thread waits longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A run of MODELS and its export, made once and not to be changed."""

    @cache
    def made(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        target, model = MODELS[name]
        run = make_run(folder, model)
        return run, export(run, folder / "out", target, check=False).folder

    return made


def equal(one: Path, other: Path) -> bool:
    a, b = single.CheckpointReader(one), single.CheckpointReader(other)
    assert (a.step, a.meta, a.shapes) == (b.step, b.meta, b.shapes)
    return all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


@pytest.mark.parametrize("name", daily(MODELS))
def test_what_comes_back_is_what_left(tmp_path: Path, name: str, exports: Exports) -> None:
    run, out = exports(name)
    target = json.loads((out / RECORD).read_text())["target"]
    assert target == targets.resolve(MODELS[name][0], loading.load(run / "recipe.yaml").model).name
    assert (
        Folder(out).shapes.keys() == json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys()
    )
    back = restore(out, tmp_path / "back")
    assert equal(run, back)
    assert loading.load(back / "recipe.yaml").model == loading.load(run / "recipe.yaml").model


def test_an_export_is_evaluated_as_its_run(tmp_path: Path, exports: Exports) -> None:
    run, whole = exports("ssd")
    out = shutil.copytree(whole, tmp_path / "out")
    record = (out / RECORD).read_text()
    here = str(ROOT / "tokenizers/python-4k.model")
    assert here in record
    (out / RECORD).write_text(record.replace(here, "/elsewhere/python-4k.model"))  # as on another machine
    a, b = load_model(run), load_model(out)
    assert (a.step, a.recipe.data.window, a.tokenizer.sha256) == (b.step, b.recipe.data.window, b.tokenizer.sha256)
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main.generate(run, ["import os"], 8, 0, 1, 0) == main.generate(out, ["import os"], 8, 0, 1, 0)
    asked = EvalConfig(("passkey",), (512,), samples=1)

    def nll(folder: Path, name: str) -> float:
        (cell,) = main.evaluate(folder, asked, tmp_path / name, 4096, 1)["cells"]
        found: float = cell["answer_nll"]
        return found

    expected = nll(run, "of the run")
    assert nll(out, "of the export") == expected
    rewrite(out, lambda tensors: tensors["model.embed_tokens.weight"].zero_())
    assert nll(out, "of zeros") != expected
    rewrite(out, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ConvertError, match=r"has no model\.embed_tokens\.weight"):
        load_model(out)
    with pytest.raises(CheckpointError, match=rf"found no recipe.yaml, no {RECORD} and no config\.json"):
        load_model(tmp_path)


def test_a_folder_without_our_record_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of others: all is told by config.json and the tokenizer's file."""
    target, model = MODELS["ssd"]
    run, out = make_run(tmp_path, model), tmp_path / "out"
    export(run, out, target, check=False)
    (out / RECORD).unlink()
    a, b = load_model(run), load_model(out)
    assert (b.step, b.tokenizer.sha256, b.recipe.data.tokenizer) == (
        0,
        a.tokenizer.sha256,
        str(out / "tokenizer.model"),
    )
    tokens, b.model.dtype = torch.arange(40)[None], a.model.dtype
    ours, theirs = (one.model.logits(one.model.hidden(tokens)[0]) for one in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert main.generate(out, ["import os"], 8, 0, 1, 0)
    assert load.window(out) > 0
    monkeypatch.setattr(a.tokenizer, "vocab_size", 5000)
    monkeypatch.setattr(load, "load_tokenizer", lambda _: a.tokenizer)
    with pytest.raises(CheckpointError, match="has 5000 pieces, the model 4096 rows; expected at least as many"):
        load_model(out)


@pytest.mark.parametrize("name", ["olmo", "qwen-hybrid", "kimi"])
def test_the_configuration_alone_tells_a_delta_rule_model(tmp_path: Path, name: str, exports: Exports) -> None:
    """A tied head comes back as one of its own, and a silent layer is dropped, or read as what it is."""
    run, whole = exports(name)
    out = shutil.copytree(whole, tmp_path / "out")
    (out / RECORD).unlink()
    tokens = torch.arange(40)[None] * 100
    weights = open_weights(out)
    model = LanguageModel(weights.origin.model, 64, ShardedRecurrence("reference"), dtype=torch.float64).double()
    model.load_state_dict({key: weights.read(key).double() for key in weights.empty.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.hidden(tokens)[0]), verify.reference(run)(tokens).float())
    if name == "kimi":
        rewrite(out, lambda tensors: tensors["model.layers.2.self_attn.o_proj.weight"].add_(1))
        with pytest.raises(ConvertError, match=r"layers\.2\.self_attn\.o_proj\.weight: holds other numbers"):
            open_weights(out)


def test_a_run_is_made_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Exports) -> None:
    _, out = exports("ssd")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    lookup = single.LazyPlanner.lookup_object

    def counted(self: Any, index: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = lookup(self, index)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(single.LazyPlanner, "lookup_object", counted)
    restore(out, tmp_path / "back")
    assert len(alive) > 50 and most <= 2


def loaded(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not verify.unexpected_keys(info, targets.MODEL_TYPES[model.config.model_type].computed)
    return model.eval()


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
@pytest.mark.parametrize("name", daily(ELSEWHERE))
def test_transformers_computes_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, exports: Exports
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run, out = exports(name)
    with torch.no_grad():
        theirs, ours = loaded(out), verify.reference(run)
        parity = verify.measure(theirs, ours, 4096, "")
        assert not parity.problems(), parity
        assert parity.scale > 1, "too small to see anything"
        for keys in MISREAD.get(name, []):
            with monkeypatch.context() as patched:
                changed = architectures.model(single.CheckpointReader(run).meta["model"] | keys)
                patched.setattr(architectures, "model", lambda _, changed=changed: changed)
                other = verify.reference(run)
            tokens = torch.arange(4096)[None, 7:4000:50]
            error = float((theirs(tokens, use_cache=False).logits - other(tokens)).abs().max())
            assert error > 3 * verify.TOLERANCE * parity.scale, (keys, error)
        if name == "tnl":
            given: list[int] = []
            theirs.model.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[1]))
            theirs.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=3)
            assert given == [3, 1, 1], "its cache is lost"
        if name in ("ssd-constant", "tnl", "minimax"):
            theirs.generation_config.pad_token_id = None
            theirs.model.layers[1].load_state_dict(theirs.model.layers[0].state_dict(), strict=False)
            first, *_, last = verify.measure(theirs, ours, 4096, "").problems()
            assert first.startswith("full ") and last == "texts do not end"


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
def test_what_goes_wrong_behind_the_window_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers counts cached tokens of minimax in layer 0: masks are wrong where that is linear."""
    model = {"arch": "minimax", "softmax": [1], "sliding_window": 200}
    with pytest.raises(ConvertError, match=r"--to hf: it counts cached tokens in layer 0"):
        targets.resolve("hf", architectures.model({**SIZES, "vocab": 4096, **model}))
    monkeypatch.setattr(targets, "refusals", lambda _: dict.fromkeys(targets.TARGETS))
    run = make_run(tmp_path, model)
    export(run, tmp_path / "out", "minimax", check=False)
    with torch.no_grad():
        parity = verify.measure(loaded(tmp_path / "out"), verify.reference(run), 4096, "")
    assert {problem.split()[0] for problem in parity.problems()} >= {"decode", "chunked", "generated"}
    assert max(parity.full, parity.padded) < 1e-5


@pytest.mark.slow
@transformers_needed
def test_a_process_of_its_own_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Exports) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, _ = exports("ssd")
    exported = export(run, tmp_path / "out", "hf")
    assert isinstance(exported.parity, verify.Parity)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "16 of 16 greedy tokens equal; texts end" in card
        and "3.2500 nats per token at step 7" in card
        and "3,584" in card
    )


def test_what_is_not_the_model_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Exports) -> None:
    run, _ = exports("ssd")
    wrong = verify.Parity(10.0, 0.5, 1e-5, 1e-5, 1e-5, 1e-5, 16, True, True, "it")
    monkeypatch.setattr(verify, "installed", lambda library: library != "tokenizers")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, json.dumps(wrong._asdict()), "")
    )
    with pytest.raises(ConvertError, match=r"verification: full 5\.0e-01; expected at most 0\.0001 × logit scale"):
        export(run, tmp_path / "out", "hf")
    export(run, tmp_path / "out", "hf", "bf16")  # rounded on purpose: told, not refused
    assert "not gated" in (tmp_path / "out/README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.skipif(not verify.installed("fla"), reason="needs flash-linear-attention")
@pytest.mark.parametrize("name", ["linear_transformer", "retnet"])
def test_flash_linear_attention_computes_the_same_interpreted(name: str, exports: Exports) -> None:
    run, out = exports(name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_fla", str(out), str(run)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parity = verify.Parity(**json.loads(done.stdout.splitlines()[-1]))
    assert parity.scale > 1 and parity.greedy == 2 and parity.ended
    assert max(parity.errors().values()) < verify.TOLERANCE


def test_the_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers.models")  # the repository's own folder has the package's name
    model = ROOT / "tokenizers/python-4k.model"
    assert tokenizer.export(model, tmp_path) == "fast, same ids as tokenizer.model on 10,000 lines"
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    parsed = json.loads(text)
    parsed["model"]["merges"] = parsed["model"]["merges"][::-1]
    assert tokenizer._different(model, json.dumps(parsed)) is not None


def test_a_fast_tokenizer_leaves_without_the_package_that_compares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer.model alone transformers makes a tokenizer of the model's class, with other ids."""
    monkeypatch.setattr("lasptrain.convert.tokenizer.installed", lambda name: False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run = make_run(tmp_path, {"arch": "ssd"})
    told = export(run, tmp_path / "out", "hf", check=False).tokenizer
    assert told == "fast, not compared: tokenizers is not installed (pip install 'lasptrain[convert]')"
    assert f"| tokenizer | {told} |" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    monkeypatch.undo()
    pytest.importorskip("tokenizers.models")
    text = (tmp_path / "out/tokenizer.json").read_text(encoding="utf-8")
    assert tokenizer._different(ROOT / "tokenizers/python-4k.model", text) is None
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["bos_token"] == "<s>"


def test_a_text_ends_where_the_next_would_begin(exports: Exports) -> None:
    """Without these a text from transformers has no end, and a batch no padding."""
    pytest.importorskip("tokenizers.models")
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    texts = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<unk>"}
    for name in ("ssd", "minimax", "tnl", "linear_transformer", "retnet", "plain"):
        _, out = exports(name)
        for file, keys in (
            ("config.json", ids),
            ("generation_config.json", ids),
            ("tokenizer_config.json", texts),
            ("special_tokens_map.json", texts),
        ):
            assert keys.items() <= json.loads((out / file).read_text()).items(), (name, file)


@transformers_needed
def test_the_tokenizer_of_an_export_begins_ends_and_pads(exports: Exports) -> None:
    import transformers

    own = load_tokenizer(ROOT / "tokenizers/python-4k.model")
    theirs = transformers.AutoTokenizer.from_pretrained(exports("ssd")[1])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
    texts = ["import os", "", *tokenizer.lines(100)]
    batch = theirs(texts, padding=True)
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        want = [own.bos, *own.encode(text)]
        assert row == [1] * (len(row) - len(want)) + want and sum(mask) == len(want)
        assert theirs.decode(row, skip_special_tokens=True) == own.decode(want)


def test_an_end_that_a_tokenizer_names_is_one(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers.models")
    from data_tools.fast_tokenizer import CONTROL, protocol

    model = protocol.ModelProto.FromString((ROOT / "tokenizers/python-4k.model").read_bytes())
    model.pieces[300].piece, model.pieces[300].type = "</s>", CONTROL
    (tmp_path / "t.model").write_bytes(model.SerializeToString())
    expected = {"bos_token_id": 0, "eos_token_id": [300, 0], "pad_token_id": 1}
    assert tokenizer.special(str(tmp_path / "t.model")).ids() == expected
    assert set(tokenizer.special("bytes").ids().values()) == {256}

    fast = tmp_path / "tokenizer.json"
    tokenizer.export(tmp_path / "t.model", tmp_path)
    assert tokenizer.special(str(fast)).ids() == expected
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": null, "chat": 1}')
    (tmp_path / "special_tokens_map.json").unlink()
    parsed = json.loads(fast.read_text(encoding="utf-8"))
    parsed["model"]["byte_fallback"] = False  # now <unk> may stand in a text
    fast.write_text(json.dumps(parsed), encoding="utf-8")
    (tmp_path / "out").mkdir()
    tokenizer.export(fast, tmp_path / "out")
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert named == {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "chat": 1}
    assert load_tokenizer(tmp_path / "out/tokenizer.json").sha256 == load_tokenizer(fast).sha256


def test_shards_precision_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Exports) -> None:
    monkeypatch.setattr("lasptrain.convert.files.write.__defaults__", (300_000,))
    run, _ = exports("ssd")
    export(run, tmp_path / "out", "hf", "bf16", check=False)
    folder = Folder(tmp_path / "out")
    assert len(set(folder.files.values())) > 1
    exact = {name for name in folder.shapes if folder.read(name).dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in exact} == {"A_log", "dt_bias", "D"}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    step = single.CheckpointReader(run)
    assert (
        record["step"] == 7 and record["slopes"]["layers.0.mixer.slope"] == step.read("layers.0.mixer.slope").tolist()
    )


def test_a_step_that_training_deletes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, MODELS["tnl-untied"][1])
    step, aside = run / "checkpoints" / "step-7", tmp_path / "aside"
    read, reads = single.CheckpointReader.read, 0

    def vanishing(self: single.CheckpointReader, name: str) -> Tensor:
        nonlocal reads
        reads += 1
        if reads == 3:
            step.rename(aside)
        return read(self, name)

    def committed(run: Path) -> list[int]:
        if aside.exists() and reads == 3:  # by now there is a newer one
            aside.rename(step)
            return [7]
        return found(run)

    found = steps.committed
    monkeypatch.setattr(single.CheckpointReader, "read", vanishing)
    with pytest.raises(CheckpointError, match=r"each step is replaced while it is read; expected a larger"):
        monkeypatch.setattr("lasptrain.convert.export.TRIES", 1)
        export(run, tmp_path / "out", "safetensors", check=False)
    monkeypatch.setattr("lasptrain.convert.export.TRIES", 5)
    monkeypatch.setattr(steps, "committed", committed)
    assert export(run, tmp_path / "out", "safetensors", check=False).folder == tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_cannot_be_done_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, MODELS["tnl-untied"][1])
    for to, reason in (
        ("hf", "arch tnl has no class there without custom code; expected safetensors, transnormer"),
        ("granitemoehybrid", "granitemoehybrid is arch ssd, not tnl; expected"),
    ):
        with pytest.raises(ConvertError, match=re.escape(reason)):
            export(run, tmp_path / "out", to)
    with pytest.raises(RecipeError, match="--to gguf: unknown; expected safetensors, transnormer"):
        export(run, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match=r"holds no recipe\.yaml"):
        export(tmp_path, tmp_path / "out", "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}

    out = tmp_path / "out"
    export(run, out, "transnormer", check=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(SetupError, match="exists; expected a new folder, or --force"):
        export(run, out, "transnormer", check=False)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    export(run, out, "safetensors", force=True, check=False)
    assert "modeling_transnormer.py" not in {path.name for path in out.iterdir()}
    held = sorted(run.rglob("*"))
    for aim in (run, tmp_path):
        with pytest.raises(SetupError, match=f"{aim.name}: holds no {RECORD}; --force replaces only"):
            export(run, aim, "safetensors", force=True, check=False)
    assert sorted(run.rglob("*")) == held
    for aim in (tmp_path / "out", tmp_path / "nowhere"):
        (tmp_path / "link").symlink_to(aim)
        with pytest.raises(SetupError, match="link: is a symbolic link; expected a folder, or a name that is free"):
            export(run, tmp_path / "link", "safetensors", force=True, check=False)
        (tmp_path / "link").unlink()

    file = next((run / "checkpoints/step-7").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged, .* does not match its SHA-256"):
        export(run, tmp_path / "other", "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, exports: Exports) -> None:
    _, whole = exports("ssd-constant")
    cases: dict[str, tuple[Any, str]] = {
        "extra": (lambda t: t.update(more=torch.zeros(1)), "has unknown more"),
        "missing": (lambda t: t.pop("lm_head.weight"), "has no lm_head.weight"),
        "shape": (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "model.norm.weight is [31]; expected [32]",
        ),
        "decays": (lambda t: t["model.layers.1.mamba.A_log"].add_(1), "the decays of layers.1.mixer.slope are not"),
        "convolution": (lambda t: t["model.layers.0.mamba.conv1d.weight"].add_(1), "holds other numbers than"),
        "step": (lambda t: t["model.layers.0.mamba.in_proj.weight"].add_(1), "the decay depends on the token"),
        "nan": (lambda t: t["model.norm.weight"][3:5].fill_(torch.nan), "model.norm.weight: 2 of 32 elements are NaN"),
        "inf": (lambda t: t["lm_head.weight"][9].fill_(-torch.inf), "lm_head.weight: 32 of 131,072 elements are NaN"),
    }
    for name, (change, message) in cases.items():
        out = shutil.copytree(whole, tmp_path / name)
        rewrite(out, change)
        with pytest.raises(ConvertError, match=re.escape(message)):
            restore(out, tmp_path / "back")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    with pytest.raises(ConvertError, match="hidden_act is 'gelu', the recipe's model has 'silu'"):
        restore(out, tmp_path / "back")
    shutil.copyfile(whole / "config.json", config)
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ConvertError, match="tie_word_embeddings is True, the recipe's model has False"):
        restore(out, tmp_path / "back")
    (out / RECORD).unlink()
    with pytest.raises(ConvertError, match=r"has unknown lm_head\.weight"):
        restore(out, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def test_weights_that_are_no_numbers_do_not_leave(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"arch": "retnet"})
    step = single.CheckpointReader(run)
    spoilt = {name: step.read(name) for name in step.shapes}
    spoilt["layers.1.mlp.down.weight"][0, 0] = torch.nan
    recipe = loading.load(run / "recipe.yaml")
    with torch.device("meta"):
        empty = LanguageModel(recipe.model, 512, ShardedRecurrence("reference"))
    single.write(run, 8, empty, build_optimizer(empty, recipe.optim), spoilt.__getitem__, step.meta)
    with pytest.raises(ConvertError, match=r"step-8: layers\.1\.mlp\.down\.weight: 1 of .* are NaN or infinite"):
        export(run, tmp_path / "out", "retnet", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("a hostile checkpoint", times=9)
def test_a_crafted_folder_is_refused_before_anything_is_made_for_it(tmp_path: Path, exports: Exports) -> None:
    _, whole = exports("ssd-constant")

    def refused(change: dict[str, Any], name: str, message: str, *, record: bool = True) -> None:
        out = shutil.copytree(whole, tmp_path / "crafted")
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | change))
        if not record:
            (out / RECORD).unlink()
        tracemalloc.start()
        with pytest.raises(ConvertError, match=message) as caught:
            restore(out, tmp_path / "back")
        assert tracemalloc.get_traced_memory()[1] < 2e8 and "\n" not in str(caught.value)
        tracemalloc.stop()
        shutil.rmtree(out)

    for step in (-3, "7", True, 1 << 60):
        refused({"step": step}, RECORD, "step: found .*; expected a number from 0 on")
    refused({"slopes": {"layers.0": ["a"]}}, RECORD, "slopes: found .*; expected lists of numbers")
    few = r"num_hidden_layers: 1,000,000,000 layers, with \d+ tensors; expected tensors for each"
    more = {"num_hidden_layers": 10**9, "layer_types": None}
    refused(more, "config.json", few, record=False)
    model = json.loads((whole / RECORD).read_text())["meta"]["model"]
    meta = json.loads((whole / RECORD).read_text())["meta"] | {"model": model | {"layers": 4096}}
    refused({"meta": meta}, RECORD, "4,096 layers, with|num_hidden_layers is")
    for make in (os.mkfifo, lambda file: file.write_text("[" * 100_000)):
        out = shutil.copytree(whole, tmp_path / "crafted")
        (out / "config.json").unlink()
        make(out / "config.json")
        with pytest.raises(ConvertError, match=r"config\.json: cannot be read as JSON"):
            restore(out, tmp_path / "back")
        shutil.rmtree(out)
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.fault("a disk that refuses to write")
def test_an_error_of_fsync_is_told_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Exports
) -> None:
    run, _ = exports("ssd-constant")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"Input/output error: '.*out") as caught:
        export(run, tmp_path / "out", "safetensors", check=False)
    assert caught.value.filename and not list(tmp_path.iterdir())


def test_weights_of_others_begin_a_run(tmp_path: Path, exports: Exports) -> None:
    run, out = exports("tnl")
    folder = shutil.copytree(out, tmp_path / "public")
    tensors = {name: Folder(folder).read(name) for name in Folder(folder).shapes}
    for file in (RECORD, "model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(4000)))
    recipe = json.loads(recipe_text(MODELS["tnl"][1]))
    recipe["data"] |= {"source": str(tmp_path / "text.txt"), "cache": str(tmp_path / "cache"), "validation": 0}
    (tmp_path / "next.yaml").write_text(json.dumps(recipe))
    back = single.CheckpointReader(restore(folder, tmp_path / "back", tmp_path / "next.yaml"))
    first = single.CheckpointReader(run)
    assert back.step == 0 and back.meta["dataset"] != first.meta["dataset"]
    assert back.shapes == first.shapes
    assert all(torch.equal(back.read(name), first.read(name)) for name in back.shapes)
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(ConvertError, match="no tensors can be read from it"):
        Folder(folder)


def test_a_recipe_whose_tokenizer_makes_other_ids_is_told(tmp_path: Path, exports: Exports) -> None:
    """Of as many rows, so nothing else tells."""
    _, out = exports("tnl")
    from data_tools.fast_tokenizer import protocol

    model = protocol.ModelProto.FromString((ROOT / "tokenizers/python-4k.model").read_bytes())
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(4000)))
    recipe = json.loads(recipe_text(MODELS["tnl"][1]))
    recipe["data"] |= {"source": str(tmp_path / "text.txt"), "cache": str(tmp_path / "cache"), "validation": 0}
    for name in (recipe["data"]["tokenizer"], str(tmp_path / "other.model")):
        recipe["data"]["tokenizer"] = name
        (tmp_path / "next.yaml").write_text(json.dumps(recipe))
        told: list[str] = []
        restore(out, tmp_path / "back", tmp_path / "next.yaml", force=True, tell=told.append)
        found = [line for line in told if line.startswith("tokenizer: ")]
        assert len(found) == name.endswith("other.model")
    assert f"{name} of the recipe makes other ids of " in found[0] and found[0].endswith(f" than the one in {out}")


def foreign_model(name: str, folder: Path, **more: Any) -> Any:
    """A model of transformers itself, its numbers drawn so that they hide nothing, saved as its authors would."""
    import transformers

    shared = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind, keys = FOREIGN[name]
    config = getattr(transformers, f"{kind}Config")(**shared | keys | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith(".D"):
                tensor.zero_()
            elif tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif tensor.dim() == 2:
                tensor.mul_(5)
    rounds = kind == "GraniteMoeHybrid" and more.get("tie_word_embeddings")  # MiniMax would round its decays too
    dtype = torch.bfloat16 if rounds else torch.float32
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return model.float()


GRANITE = {
    "shared_intermediate_size": 48,
    "num_local_experts": 0,
    "rms_norm_eps": 1e-5,
    "mamba_n_heads": 4,
    "mamba_n_groups": 4,
    "mamba_d_state": 16,
}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteMoeHybrid",
        GRANITE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "num_key_value_heads": 2,
            "position_embedding_type": "rope",
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "logits_scaling": 3.0,
        },
    ),
    "minimax": ("MiniMax", {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 1}),
}
FOREIGN["minimax"][1].update(num_experts_per_tok=1, mlp_alpha_factor=1.5, full_attn_alpha_factor=1.5)
FOREIGN["minimax"][1].update(linear_attn_alpha_factor=1.5)


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", FOREIGN)
def test_folders_of_others_compute_the_same_here(tmp_path: Path, name: str, tie: bool) -> None:
    """Sharded with an index, in bf16 too; defaults left out of the configuration, as a reader must allow."""
    folder = tmp_path / "theirs"
    theirs = foreign_model(name, folder, tie_word_embeddings=tie)
    config = json.loads((folder / "config.json").read_text())
    defaults = {
        "mamba_d_conv",
        "mamba_expand",
        "mamba_d_head",
        "hidden_act",
        "sliding_window",
        "block_size",
        "head_dim",
    }
    config = {key: value for key, value in config.items() if key not in defaults}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "tokenizers/python-4k.model", folder / "tokenizer.model")
    assert len(list(folder.glob("*.safetensors"))) > 1
    weights = open_weights(folder)
    model = LanguageModel(weights.origin.model, 64, ShardedRecurrence("reference"))
    model.load_state_dict({key: weights.read(key) for key in weights.empty.state_dict()})
    tokens = torch.randint(4096, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, want = model.logits(model.hidden(tokens)[0]), theirs(tokens).logits
    assert want.abs().max() > 0.5
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
def test_what_others_have_and_we_have_not_is_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, Any], str]] = {
        "groups": ("granite", {"mamba_n_groups": 1}, "mamba_n_groups is 1; expected 4"),
        "experts": ("granite", {"num_local_experts": 2}, "num_local_experts is 2; expected 0"),
        "bias": ("granite", {"attention_bias": True}, "attention_bias is True; expected False"),
        "eps": ("granite", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; expected 1e-05"),
        "mixture": ("minimax", {"num_local_experts": 8}, "num_local_experts is 8, 1 a token; expected 1 and 1"),
        "beta": ("minimax", {"mlp_beta_factor": 2}, "mlp_beta_factor is 2; expected 1"),
        "alphas": ("minimax", {"full_attn_alpha_factor": 3}, "full_attn_alpha_factor is 3, mlp_alpha_factor is 1.5"),
        "kind": ("minimax", {"model_type": "llama"}, "model_type is 'llama'; expected granitemoehybrid, minimax"),
        "tied": ("minimax", {"tie_word_embeddings": True}, "has unknown lm_head.weight"),
        "width": ("minimax", {"intermediate_size": 64}, "experts.0.w1.weight is [48, 32]; expected [64, 32]"),
        "none": ("minimax", {"hidden_size": "wide"}, "describes no model"),
        "factor": ("granite", {"residual_multiplier": "x"}, "residual_multiplier is 'x'; expected a number, not 0"),
        "rope": ("granite", {"rope_parameters": 9}, "describes no model (AttributeError: "),
        "theta": ("granite", {"rope_parameters": {"rope_theta": "x"}}, "describes no model (ValueError: "),
        "positions": ("granite", {"max_position_embeddings": "x"}, "max_position_embeddings is 'x'; expected a number"),
    }
    for name in FOREIGN:
        foreign_model(name, tmp_path / name, tie_word_embeddings=False)
        shutil.copy(ROOT / "tokenizers/python-4k.model", tmp_path / name / "tokenizer.model")
    for name, change, message in cases.values():
        file = tmp_path / name / "config.json"
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(ConvertError, match=re.escape(message)):
            restore(tmp_path / name, tmp_path / "back")
        file.write_text(before)
    (tmp_path / "minimax/tokenizer.model").unlink()
    with pytest.raises(ConvertError, match=r"holds no tokenizer\.model and no tokenizer\.json"):
        restore(tmp_path / "minimax", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == set(FOREIGN)


LINEAR = {"linear_attn": {"decay": "none"}}
MLA = "its softmax layers are MLA, which is not trained here; model.softmax = [1]"
LATE = "it counts cached tokens in layer 0, model.softmax = [1] leaves it out"


def reason(target: str, **model: Any) -> str | None:
    return targets.refusals(architectures.model({**SIZES, "vocab": 64, **model}))[target]


def test_where_a_model_can_go_is_said_before_it_is_trained() -> None:
    cases: list[tuple[str, dict[str, Any], str | None]] = [
        ("granitemoehybrid", {"arch": "ssd", "softmax": [0]}, None),
        (
            "granitemoehybrid",
            {"arch": "ssd", "softmax": [0], "sliding_window": 8},
            "its softmax layers see all tokens, not model.sliding_window = 8",
        ),
        ("granitemoehybrid", {"arch": "minimax"}, "granitemoehybrid is arch ssd, not minimax"),
        ("minimax", {"arch": "minimax", "softmax": [0], "sliding_window": 8}, None),
        ("minimax", {"arch": "minimax", "softmax": [1], "sliding_window": 8}, LATE),
        ("minimax", {"arch": "minimax", "softmax": [1]}, LATE),
        ("minimax", {"arch": "minimax", "decay": "window"}, "model.decay is window; it computes minimax_hf"),
        ("minimax", {"arch": "minimax", "value_dim": 4}, "key dim 8 and value dim 4 differ"),
        (
            "minimax",
            {"arch": "minimax", "softmax": [0], "rotary": None},
            "its softmax layers are rotary, model.rotary is null",
        ),
        ("minimax", {"arch": "minimax", "mlp": 49}, "model.mlp = 49 has no halves"),
        ("retnet", {"arch": "retnet", "decay": "window"}, "model.decay is window; its kernel computes retnet"),
        ("olmo_hybrid", {"arch": "gdn"}, "its gated norm has an eps of 1e-05, model.output_norm_eps means 1e-06"),
        ("olmo_hybrid", OLMO | {"conv": 0}, "its q, k and v pass a convolution, model.conv is 0"),
        ("olmo_hybrid", OLMO | {"softmax": [0]}, "its softmax layers have model.qk_norm = whole only, not none"),
        ("qwen3_5", {"arch": "gdn"}, "its norms multiply by 1 + weight, model.centred_norms is false"),
        ("qwen3_5", QWEN | {"negative_eigenvalues": True}, "its beta is below 1, model.negative_eigenvalues is true"),
        ("kimi_linear", KIMI | {"softmax": [1]}, MLA),
        ("kimi_linear", KIMI | {"value_dim": 4}, "key dim 8 and value dim 4 differ"),
        ("transnormer", {"arch": "tnl", "decay": "alibi"}, "model.decay is alibi; its layout means tnl"),
    ]
    for target, model, expected in cases:
        assert reason(target, **model) == expected, (target, model)
    with pytest.raises(ConvertError, match=r"--to hf: olmo_hybrid: its gated norm .*; qwen3_5: its norms multiply"):
        targets.resolve("hf", architectures.model({**SIZES, "vocab": 64, "arch": "gdn"}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"qk_norm": "head"}, "its softmax layers have model.qk_norm = none only, not head"),
        ({"softmax_gate": True}, "its softmax layers have model.softmax_gate = False only, not True"),
        ({"rotary_fraction": 0.5}, "its softmax layers have model.rotary_fraction = 1.0 only, not 0.5"),
        (
            {"softmax_dim": 32},
            "its softmax layers have as many heads as its others, of model.dim",
        ),
    ],
)
@pytest.mark.parametrize("arch", ["ssd", "minimax"])
def test_softmax_layers_with_more_stay(arch: str, keys: dict[str, Any], expected: str) -> None:
    found = reason({"ssd": "granitemoehybrid"}.get(arch, arch), arch=arch, softmax=[0], heads=2, **keys)
    assert found is not None and found.startswith(expected)


@pytest.mark.parametrize("target", ["transnormer", "linear_attn", "retnet"])
def test_softmax_layers_stay_where_layers_are_linear(target: str) -> None:
    arch = targets.TARGETS[target].arch
    model = architectures.model({**SIZES, "vocab": 64, "arch": arch, **LINEAR.get(target, {})})
    assert targets.refusals(model)[target] is None
    mixed = model.model_copy(update={"softmax": (1,)})
    assert targets.refusals(mixed)[target] == "its layers are all linear, model.softmax = [1]"


def test_a_target_is_a_file_that_no_other_names() -> None:
    folder = ROOT / "lasptrain/convert"
    assert {file.stem for file in (folder / "targets").glob("*.py")} == {"__init__", *targets.NAMES}
    assert list(targets.NAMES) == [target.name for target in targets.TARGETS.values()]
    others = [target for target in targets.TARGETS.values() if target.arch]
    word = re.compile(rf"\b({'|'.join({name for target in others for name in (target.name, str(target.arch))})})\b")
    for file in [*folder.glob("*.py"), *(folder / "libraries").glob("*.py")]:
        if file.name not in {target.code for target in others}:
            assert not word.findall(file.read_text(encoding="utf-8")), file


def test_targets_and_their_rules_need_no_torch() -> None:
    code = f"""
import sys
from lasptrain.convert import configs, targets
from lasptrain import architectures
from lasptrain.architectures.ssd import Ssd
from lasptrain.architectures.tnl import Tnl
for name, keys in {[(target, keys) for target, keys in MODELS.values() if target != "hf"]!r}:
    model = architectures.model({{**{SIZES!r}, "vocab": 64, **keys}})
    target = targets.resolve(name, model)
    *own, others = targets.lines(model)
    named = [line.split(":")[0].split()[0] for line in own] + others.split(": ")[1].split(", ")
    assert sorted(named) == sorted(targets.NAMES)
    assert others.startswith(f"of another arch than {{model.arch}}: ")
    assert configs.config(target, model, {{}}, "float32") and target.rules(model, ["embed.weight"])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
def test_a_folder_of_others_begins_a_run_without_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_model("granite", tmp_path / "my model", tie_word_embeddings=True)
    shutil.copy(ROOT / "tokenizers/python-4k.model", tmp_path / "my model/tokenizer.model")
    monkeypatch.setattr("lasptrain.convert.restore._fingerprint", lambda recipe: "0" * 64)  # preparing data takes long
    run = restore(tmp_path / "my model", tmp_path / "back")
    recipe, step = loading.load(run / "recipe.yaml"), single.CheckpointReader(run)
    assert recipe.name == "my-model" and recipe.data.tokenizer == str(tmp_path / "my model/tokenizer.model")
    assert isinstance(recipe.model, Ssd)
    assert (recipe.model.softmax, recipe.model.decay) == ((1,), "learned")
    assert step.step == 0 and step.meta["model"] == recipe.model.model_dump(mode="json")
    export(run, tmp_path / "out", "hf", check=False)
    again = open_weights(tmp_path / "out")
    for name in step.shapes:
        assert torch.equal(again.read(name), step.read(name)), name


def test_a_fast_tokenizer_alone_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers.models")
    model = ROOT / "tokenizers/python-4k.model"
    tokenizer.export(model, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    fast, slow = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(model)
    assert (fast.vocab_size, fast.bos, fast.token_bytes) == (slow.vocab_size, slow.bos, slow.token_bytes)
    for text in tokenizer.lines(300):
        assert fast.encode(text) == slow.encode(text)
        assert fast.decode(slow.encode(text)) == slow.decode(slow.encode(text))
    parsed = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed | {"post_processor": None}))
    with pytest.raises(DataError, match="names no BOS"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_every_tensor_is_in_one_rule() -> None:
    cfg = architectures.model({**SIZES, "arch": "tnl", "vocab": 64})
    table = targets.TARGETS["transnormer"].rules(cfg, {"embed.weight"})
    with pytest.raises(ConvertError, match=r"has no layers\.0\.mixer\.gate.*more; has unknown strange"):
        tables.check_sources(table, {"strange", "embed.weight"}, "here")


def test_unigram_tokenizers_are_refused(tmp_path: Path) -> None:

    from data_tools.fast_tokenizer import protocol, tokenizer_json

    model = protocol.ModelProto.FromString((ROOT / "tokenizers/python-4k.model").read_bytes())
    model.trainer_spec.model_type = 1
    file = tmp_path / "t.model"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="no BPE model"):
        tokenizer_json(file)
