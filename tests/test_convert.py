"""Law 5: an exported model is the model, in its own library, and comes back to the bit."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain import checkpoint
from lasptrain import recipe as recipes
from lasptrain.convert import tables, targets, tokenizer, verify
from lasptrain.convert.export import RECORD, export
from lasptrain.convert.files import Folder
from lasptrain.convert.restore import restore
from lasptrain.errors import CheckpointError, ConvertError, DataError
from lasptrain.eval import main
from lasptrain.eval.evaluate import Asked
from lasptrain.eval.load import load_model
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.attention import Attention

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZES = {"dim": 32, "layers": 2, "heads": 4, "mlp": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ssd": ("hf", {"arch": "ssd", "data_dependent": True, "conv": 3, "key_dim": 16}),
    "ssd-constant": ("granitemoehybrid", {"arch": "ssd", "tie": False}),
    "tnl": ("transnormer", {"arch": "tnl"}),
    "tnl-untied": ("transnormer", {"arch": "tnl", "tie": False, "lrpe": [1]}),
    "linear_transformer": ("linear_attn", {"arch": "linear_transformer", "decay": "none", "normalizer": True}),
    "retnet": ("retnet", {"arch": "retnet"}),
    "plain": ("safetensors", {"arch": "tnl", "decay": "alibi", "tie": False}),
}
transformers_needed = pytest.mark.skipif(not verify.installed("transformers"), reason="needs the extra convert")


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
    cfg = recipes.Model.model_validate(json.loads(text))
    with torch.device("meta"):
        model = LanguageModel(cfg, 512, Attention("reference"))
    return {name: value(name, tensor).float() for name, tensor in initial_values(model, 0, CPU)}


def make_run(folder: Path, model: dict[str, Any]) -> Path:
    """A run with one checkpoint, as training leaves it."""
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_text(model), encoding="utf-8")
    recipe = recipes.load(run / "recipe.yaml")
    tensors = values(json.dumps(recipe.model.model_dump(mode="json")))
    with torch.device("meta"):
        empty = LanguageModel(recipe.model, 512, Attention("reference"))
    meta = {
        "model": recipe.model.model_dump(mode="json"),
        "decays": empty.decays().tolist(),
        "dataset": "0" * 64,
        "order": {"seed": 0, "window": 512, "batch": 1, "reset_at_documents": True},
    }
    checkpoint.write(run, 7, empty, tensors.__getitem__, meta)
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 3.25}\n{"step": 8, "loss": 9}\n', encoding="utf-8")
    return run


def equal(one: Path, other: Path) -> bool:
    a, b = checkpoint.Opened(one), checkpoint.Opened(other)
    assert (a.step, a.meta, a.shapes) == (b.step, b.meta, b.shapes)
    return all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_what_left(tmp_path: Path, name: str) -> None:
    target, model = MODELS[name]
    run = make_run(tmp_path, model)
    exported = export(run, tmp_path / "out", target, check=False)
    assert exported.target == targets.resolve(target, recipes.load(run / "recipe.yaml").model)
    assert (
        Folder(tmp_path / "out").shapes.keys()
        == json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"].keys()
    )
    back = restore(tmp_path / "out", tmp_path / "back")
    assert equal(run, back)
    assert recipes.load(back / "recipe.yaml").model == recipes.load(run / "recipe.yaml").model


def test_an_export_is_evaluated_as_its_run(tmp_path: Path) -> None:
    target, model = MODELS["ssd"]
    run, out = make_run(tmp_path, model), tmp_path / "out"
    export(run, out, target, check=False)
    record = (out / RECORD).read_text()
    here = str(ROOT / "tokenizers/python-4k.model")
    assert here in record
    (out / RECORD).write_text(record.replace(here, "/elsewhere/python-4k.model"))  # as on another machine
    a, b = load_model(run), load_model(out)
    assert (a.step, a.recipe.data.window, a.tokenizer.sha256) == (b.step, b.recipe.data.window, b.tokenizer.sha256)
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main.generate(run, ["import os"], 8, 0, 1, 0) == main.generate(out, ["import os"], 8, 0, 1, 0)
    asked = Asked(("passkey",), (512,), samples=1)

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
    (out / RECORD).unlink()
    with pytest.raises(CheckpointError, match=f"found no recipe.yaml and no {RECORD}"):
        load_model(out)


def test_a_run_is_made_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, MODELS["ssd"][1])
    export(run, tmp_path / "out", "hf", check=False)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    lookup = checkpoint._Lazily.lookup_object

    def counted(self: Any, index: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = lookup(self, index)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint._Lazily, "lookup_object", counted)
    restore(tmp_path / "out", tmp_path / "back")
    assert len(alive) > 50 and most <= 2


def loaded(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
    return model.eval()


@transformers_needed
@pytest.mark.filterwarnings("ignore")  # of another library
@pytest.mark.parametrize("name", ["ssd", "ssd-constant", "tnl", "tnl-untied"])
def test_transformers_computes_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    target, model = MODELS[name]
    run = make_run(tmp_path, model)
    export(run, tmp_path / "out", target, check=False)
    with torch.no_grad():
        theirs, ours = loaded(tmp_path / "out"), verify.reference(run)
        parity = verify.measure(theirs, ours, 4096, "")
        assert not parity.problems(), parity
        assert parity.scale > 1, "too small to see anything"
        theirs.model.layers[1].load_state_dict(theirs.model.layers[0].state_dict(), strict=False)
        assert verify.measure(theirs, ours, 4096, "").problems()


@transformers_needed
def test_a_process_of_its_own_verifies_and_refuses(tmp_path: Path) -> None:
    run = make_run(tmp_path, MODELS["ssd"][1])
    exported = export(run, tmp_path / "out", "hf")
    assert isinstance(exported.parity, verify.Parity)
    card = (tmp_path / "out/README.md").read_text()
    assert "16 of 16 greedy tokens equal" in card and "3.2500 nats per token at step 7" in card and "3,584" in card
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.01'))
    with pytest.raises(ConvertError, match=r"verification: full \d"):
        verify.compare(tmp_path / "out", run, exact=True)


def test_the_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers.models")  # the repository's own folder has the package's name
    model = ROOT / "tokenizers/python-4k.model"
    assert tokenizer.export(model, tmp_path) == "fast, same ids as tokenizer.model on 10,000 lines"
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    parsed = json.loads(text)
    parsed["model"]["merges"] = parsed["model"]["merges"][::-1]
    assert tokenizer._different(model, json.dumps(parsed)) is not None


def test_shards_precision_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasptrain.convert.files.write.__defaults__", (300_000,))
    run = make_run(tmp_path, MODELS["ssd"][1])
    export(run, tmp_path / "out", "hf", "bf16", check=False)
    folder = Folder(tmp_path / "out")
    assert len(set(folder.files.values())) > 1
    exact = {name for name in folder.shapes if folder.read(name).dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in exact} == {"A_log", "dt_bias", "D"}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    step = checkpoint.Opened(run)
    assert (
        record["step"] == 7 and record["slopes"]["layers.0.mixer.slope"] == step.read("layers.0.mixer.slope").tolist()
    )


def test_what_cannot_be_done_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, MODELS["tnl-untied"][1])
    for to, reason in (
        ("hf", "arch tnl has no class there without custom code; expected safetensors, transnormer"),
        ("granitemoehybrid", "granitemoehybrid is arch ssd, not tnl; expected"),
        ("gguf", "unknown; expected safetensors, transnormer"),
    ):
        with pytest.raises(ConvertError, match=re.escape(reason)):
            export(run, tmp_path / "out", to)
    with pytest.raises(ConvertError, match=r"holds no recipe\.yaml"):
        export(tmp_path, tmp_path / "out", "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}

    out = tmp_path / "out"
    export(run, out, "transnormer", check=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ConvertError, match="exists; expected a new folder, or --force"):
        export(run, out, "transnormer", check=False)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    export(run, out, "safetensors", force=True, check=False)
    assert "modeling_transnormer.py" not in {path.name for path in out.iterdir()}
    for aim in (tmp_path / "out", tmp_path / "nowhere"):
        (tmp_path / "link").symlink_to(aim)
        with pytest.raises(ConvertError, match="link: is a symbolic link; expected a folder, or a name that is free"):
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


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, MODELS["ssd-constant"][1])
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
    }
    export(run, tmp_path / "whole", "hf", check=False)
    for name, (change, message) in cases.items():
        out = shutil.copytree(tmp_path / "whole", tmp_path / name)
        rewrite(out, change)
        with pytest.raises(ConvertError, match=re.escape(message)):
            restore(out, tmp_path / "back")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ConvertError, match="tie_word_embeddings is True, the recipe's model has False"):
        restore(out, tmp_path / "back")
    (out / RECORD).unlink()
    with pytest.raises(ConvertError, match="missing; expected an export of lasptrain, or --recipe"):
        restore(out, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def test_weights_of_others_begin_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, MODELS["tnl"][1])
    folder = tmp_path / "public"
    export(run, folder, "transnormer", check=False)
    tensors = {name: Folder(folder).read(name) for name in Folder(folder).shapes}
    for file in (RECORD, "model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(4000)))
    recipe = json.loads(recipe_text(MODELS["tnl"][1]))
    recipe["data"] |= {"source": str(tmp_path / "text.txt"), "cache": str(tmp_path / "cache"), "validation": 0}
    (tmp_path / "next.yaml").write_text(json.dumps(recipe))
    back = checkpoint.Opened(restore(folder, tmp_path / "back", tmp_path / "next.yaml"))
    first = checkpoint.Opened(run)
    assert back.step == 0 and back.meta["dataset"] != first.meta["dataset"]
    assert back.shapes == first.shapes
    assert all(torch.equal(back.read(name), first.read(name)) for name in back.shapes)
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(ConvertError, match="no tensors can be read from it"):
        Folder(folder)


def test_every_tensor_is_in_one_rule() -> None:
    cfg = recipes.Model.model_validate({**SIZES, "arch": "tnl", "vocab": 64})
    table = tables.transnormer(cfg, {"embed.weight"})
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
