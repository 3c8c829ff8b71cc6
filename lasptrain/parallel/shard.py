"""Spread a model from the meta device over a mesh: recompute → FSDP or DDP → initial weights.

And its optimizer's states likewise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lasptrain.ops import decay_rule, delta_rule, softmax
from lasptrain.parallel.host import to_device, to_host
from lasptrain.parallel.mesh import Mesh
from lasptrain.recipe.sections import REPLICATED

T = TypeVar("T", bound=Optimizer)

SMALLEST_OFFLOAD = 1 << 16  # elements; smaller tensors stay on the device

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default, aten.bmm.default
KEPT = {*PRODUCTS, decay_rule.ATTEND, delta_rule.ATTEND, *softmax.ATTEND}


class Block(Protocol):
    """A layer of the model: its forward goes through `recompute`, and it can compile itself."""

    recompute: Callable[..., Any]

    def compile_parts(self) -> None: ...


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(blocks: Sequence[Block], mode: str) -> None:
    """Apply activation checkpointing to blocks, whose forward goes through their attribute `recompute`.

    `none` keeps all activations, `full` a block's input only, `selective` also the outputs of matrix products and of
    the recurrence or softmax attention; `offload` keeps all, in host memory.
    """
    if mode == "none":
        return
    if mode == "offload":
        for block in blocks:
            block.recompute = partial(_offloaded, cast(nn.Module, block))
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.recompute = partial(checkpoint, **options)


def _offloaded(block: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Run the function; tensors saved for its backward, except weights, wait in page-locked host memory."""
    present = (parameter for parameter in block.parameters() if not isinstance(parameter, DTensor))
    weights = {parameter.untyped_storage().data_ptr() for parameter in present}

    def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if not x.is_cuda or x.numel() < SMALLEST_OFFLOAD or x.untyped_storage().data_ptr() in weights:
            return x
        return x.device, to_host(x)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else to_device(packed[1], packed[0])

    with saved_tensors_hooks(pack, unpack):
        return function(*args)


def _fully_shard(model: nn.Module, blocks: Sequence[Block], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Apply FSDP2 to each block and to the rest, over a row of ranks or replicate × shard.

    Forward inputs are not cast, because states enter in fp32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=False)
    for module in list(model.modules()):
        if getattr(module, "full_precision", False):
            fully_shard(module, mesh=mesh, mp_policy=exact)
    for block in blocks:
        fully_shard(cast(nn.Module, block), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _replicate(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> DistributedDataParallel:
    """Wrap in DDP that leaves buffers alone and broadcasts nothing at the start, as all ranks hold the same values."""
    new_name = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch >= 2.13
    buffers: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=mesh.get_group(),
        init_sync=False,
        gradient_as_bucket_view=True,
        **buffers,
    )


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write full-size values into parameters and buffers by name; a sharded one takes its own rows."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values:
        target = named[name]
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)


def parallelize(
    model: nn.Module,
    blocks: Sequence[Block],
    mesh: Mesh,
    device: torch.device,
    *,
    kind: str,
    mode: str,
    dtype: torch.dtype,
    fuse: bool = False,
    values: Iterable[tuple[str, Tensor]],
) -> nn.Module:
    """Spread a model on the meta device over the mesh; return the module to call in its place.

    Parameters are the same on every sp rank, so for parameters and gradients sp ranks are data-parallel ranks: all
    kinds work over the flattened dp × sp mesh. Gradients are reduced in at least fp32 to the MEAN over ranks, so
    callers scale the loss by the number of ranks.

    Args:
        kind: who holds what (ZeRO's stages, arXiv:1910.02054). `ddp`: every rank all; `zero1`: all but the optimizer's
            states, see `shard_optimizer`; `zero2` and `zero3` (also called `fsdp`): all is sharded over all ranks,
            where `zero2` gathers parameters once per update, see `set_gradient_sync`; `hsdp`: zero3 over the ranks of
            an sp group, which share a window, replicated over dp. One rank has all, whatever the kind.
        mode: of recomputation, see `recompute`.
        fuse: compile the blocks.
        dtype: of parameters in forward and backward; their own is at least fp32.
        values: initial parameters and buffers by name, full size; may be lazy.
    """
    flat = mesh.flat
    recompute(blocks, mode)
    if fuse:
        torch._dynamo.config.optimize_ddp = False  # else DDP's buckets cut blocks, and activations there are saved
        for block in blocks:
            block.compile_parts()
    lone, replicated = flat.size() == 1, kind in REPLICATED
    if not (lone or replicated):
        _fully_shard(model, blocks, mesh.grid if kind == "hsdp" else flat, dtype)
    model.to_empty(device=device)
    fill(model, values)
    return _replicate(model, flat, device) if replicated and not lone else model


def bump_parameter_versions(optimizer: T) -> T:
    """Bump parameters' version counters after each step (fused kernels do not), so cached casts are refreshed.

    Returns the optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.register_step_post_hook(lambda *_: increment_version(parameters))
    return optimizer


def shard_optimizer(optimizer: Optimizer, mesh: Mesh, kind: str) -> Optimizer:
    """Return the optimizer to use in place of one that has no states yet.

    With `zero1` each rank keeps the states of some whole parameters, of about equal size together, updates those and
    broadcasts them as one bucket. Where parameters are sharded, so are states; with `ddp` all ranks keep all, and
    groups say who the `replicas` are.
    """
    if kind == "ddp":
        for group in optimizer.param_groups:
            group["replicas"] = mesh.flat.get_group()
    if kind != "zero1":
        return optimizer
    with warnings.catch_warnings():  # since torch 2.13 this import runs a deprecated torch.jit.script of torch's own
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    groups = [dict(group) for group in optimizer.param_groups]  # they hold all options, which override any default
    return bump_parameter_versions(
        ZeroRedundancyOptimizer(
            groups, type(optimizer), process_group=mesh.flat.get_group(), parameters_as_bucket_view=True
        )
    )


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward without backward has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank: all of it unless it is sharded."""
    part: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return part


def full_tensor(x: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole. Collective where it is."""
    full: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return full


def set_gradient_sync(model: nn.Module, on: bool, *, always: bool = False, gathered: bool = False) -> None:
    """Set whether the next backward reduces gradients over ranks; if not, they accumulate locally in at least fp32.

    Until it does, FSDP also keeps parameters gathered and cast: once per update, not once per segment. `always` makes
    it reduce in each backward all the same: shards accumulate, and unsharded gradients never exist as a whole.
    `gathered` (`zero2`) keeps parameters between the last forward and its backward too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on or always)
        model.set_reshard_after_forward(on and not gathered)
        model.set_reshard_after_backward(on)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
