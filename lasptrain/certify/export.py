"""An exported model is the model: its logits in the target's library, and the weights that come back."""

from __future__ import annotations

from pathlib import Path

from lasptrain.certify.check import Check, Verdict, failed, not_run
from lasptrain.certify.resume import RUN
from lasptrain.certify.trial import Trial
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.checkpoint.steps import committed
from lasptrain.convert import files, targets, verify
from lasptrain.convert.export import export
from lasptrain.convert.restore import open_weights
from lasptrain.errors import ConvertError

NAME = "export"
LOGITS, OURS = "logits as {} in its library", "ours in fp64"
WEIGHTS, LEFT = "weights that come back from {}", "those that left"


def check(trial: Trial) -> list[Check]:
    """Export the run that was ended to every target that it can leave to. One process."""
    if not committed(trial.folder / RUN):
        why = "no checkpoint to export: the run of the resume check left none"
        return [not_run(NAME, LOGITS.format("a target"), OURS, why)]
    found = []
    for target, reason in targets.refusals(trial.recipe.model).items():
        if reason is None:
            found += _exported(trial, target)
        elif targets.TARGETS[target].expresses(trial.recipe.model.arch):
            found.append(not_run(NAME, LOGITS.format(target), OURS, reason))
    return found


def _exported(trial: Trial, target: str) -> list[Check]:
    """Return the checks of one target."""
    run, folder = trial.folder / RUN, trial.folder / f"export-{target}"
    try:
        parity = export(run, folder, target, force=True).parity
        back = _come_back(run, folder)
    except ConvertError as refusal:
        return [failed(NAME, LOGITS.format(target), OURS, str(refusal))]
    verdict: Verdict = "fails" if back else "holds"
    first = back[0] if back else None
    weights = Check(NAME, WEIGHTS.format(target), LEFT, verdict, float(len(back)), 0.0, parameter=first)
    if isinstance(parity, str):
        return [not_run(NAME, LOGITS.format(target), OURS, parity), weights]
    worst, error = max(parity.errors().items(), key=lambda item: item[1])
    tolerance = verify.TOLERANCE * max(1.0, parity.scale)
    logits = Check(NAME, LOGITS.format(target), OURS, "holds", error, tolerance, parameter=worst, note=parity.library)
    return [logits, weights]


def _come_back(run: Path, folder: Path) -> list[str]:
    """Return the names of weights that are others after an export and an import, or in a file of our own names."""
    left, back = CheckpointReader(run), open_weights(folder)
    ours = back.origin.target.arch is None
    raw = files.Folder(folder)
    odd = []
    for name in left.shapes:
        want = left.read(name).float()
        found = [back.read(name), *([raw.read(name).float()] if ours else [])]
        if not all(want.equal(x) for x in found):
            odd.append(name)
    return odd
