"""One forward and backward of any model that leaves no trace in the model.

``torch.autograd.grad`` writes no ``.grad`` and calls no optimizer's hook, so it is used wherever it works. It fails
under FSDP2, where the forward uses other tensors than the parameters, and through a re-entrant checkpoint. In these
cases ``backward()`` runs, and the ``.grad`` that it wrote is removed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ._arguments import bad

Rows = list[tuple[str, Tensor, "Tensor | None"]]


def check_model(model: object) -> None:
    """Raise TypeError or ValueError, in one line, for a model without gradients to look at."""
    if not isinstance(model, nn.Module):
        raise bad("model", f"a {type(model).__name__}", "an nn.Module", "wrap a function in one", TypeError)
    parameters = list(model.parameters())
    expected = "at least one"
    if not any(p.requires_grad for p in parameters):
        raise bad("model", "no parameter with requires_grad", expected, "call model.requires_grad_()")
    parameters = [p for p in parameters if not is_lazy(p)]
    if any(p.is_meta for p in parameters):
        raise bad("model", "parameters on the meta device", "values", "call to_empty() and load or draw them first")
    if any(p.is_inference() for p in parameters):
        expected = "ones that autograd records"
        raise bad("model", "parameters made in inference mode", expected, "make the model outside inference_mode()")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        remedy = "shard it with torch.distributed.fsdp.fully_shard, or look at it before it is wrapped"
        raise bad("model", "a FullyShardedDataParallel", "a model that has its own parameters", remedy)


@contextmanager
def untouched(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """Restore buffers, random state and settings after the block: dropout and BatchNorm change some in a forward."""
    tensors = [*model.parameters(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with ExitStack() as stack:
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind))
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(_unsynchronised(module))
        stack.enter_context(_synchronised(_sharded_modules(model)))
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, _: Any = None) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer) and not buffer.is_meta:
                kept.setdefault((module, name), (buffer, buffer.detach().clone()))

    handles = []
    for module in model.modules():
        keep(module)
        if any(buffer is not None and is_lazy(buffer) for buffer in module._buffers.values()):
            # A lazy module fills its buffers in a hook before its first forward; our hook runs after that one.
            handles.append(module.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for (module, name), (buffer, value) in kept.items():
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _unsynchronised(module: DistributedDataParallel) -> Iterator[None]:
    # The reducer must neither wait for a backward that never comes nor average this backward's gradients.
    names = ("require_backward_grad_sync", "require_forward_param_sync", "_static_graph_delay_allreduce_enqueued")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    module.require_backward_grad_sync = False
    if names[2] in before:
        module._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


@contextmanager
def _synchronised(modules: list[Any]) -> Iterator[None]:
    """Inside, FSDP2 reduces gradients and shards parameters again, even if the training loop has switched that off."""
    groups = [group for module in modules for group in _groups(module)]
    contexts = [module._get_fsdp_state()._state_ctx for module in modules]
    pending = any(
        parameter.unsharded_accumulated_grad is not None
        or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
        for group in groups
        for parameter in group.fsdp_params
    ) or any(getattr(group, "_partial_reduce_output", None) is not None for group in groups)
    if pending:
        remedy = "look at them after a backward with set_requires_gradient_sync(True)"
        raise bad("model", "gradients that FSDP has yet to reduce", "none", remedy)
    settings: list[tuple[Any, str]] = [(context, "is_last_backward") for context in contexts]
    settings += [(g, name) for g in groups for name in ("reduce_grads", "all_reduce_grads", "reshard_after_backward")]
    before = [(owner, name, getattr(owner, name)) for owner, name in settings]
    for module in modules:
        module.reshard()
    for owner, name in settings:
        setattr(owner, name, True)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _survey(loss: Tensor) -> tuple[list[Tensor], bool]:
    """The leaves that a backward from ``loss`` writes to, and whether it passes through a re-entrant checkpoint."""
    leaves, reentrant = [], False
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        reentrant = reentrant or "checkpoint" in node.name().lower()
        todo += [following for following, _ in node.next_functions]
    return leaves, reentrant


@contextmanager
def _set_aside(leaves: list[Tensor]) -> Iterator[None]:
    """Take ``.grad`` and post-accumulate hooks, which may run an optimizer, from all leaves; give them back after."""
    held = []
    for leaf in leaves:
        hooks = getattr(leaf, "_post_accumulate_grad_hooks", None)
        held.append((leaf, leaf.grad, hooks, dict(hooks or {})))
    try:
        for leaf, _, hooks, _ in held:
            leaf.grad = None
            if hooks:
                hooks.clear()
        yield
    finally:
        for leaf, grad, hooks, entries in held:
            leaf.grad = grad
            if entries and hooks is not None:
                hooks.update(entries)


def differentiate(model: nn.Module, loss: Tensor, known: list[Tensor]) -> Rows:
    """Each parameter once: its name, itself, and its gradient, or None if it has no part in ``loss``.

    Hooks on parameters and modules run as in ``backward()``; post-accumulate hooks do not run. ``known`` holds the
    parameters from before the forward and other tensors that ``loss`` may depend on. A lazy parameter that the forward
    did not reach has no shape yet and is left out.
    """
    leaves, reentrant = _survey(loss)
    known = [t for t in known if t.is_leaf and t.requires_grad]
    leaves = list({id(t): t for t in [*known, *model.parameters(), *leaves] if not is_lazy(t)}.values())
    if reentrant and any(isinstance(m, DistributedDataParallel) and m.static_graph for m in model.modules()):
        # The reducer counts the calls of each parameter's hook in this backward and expects as many in every later one.
        got = "a DistributedDataParallel with static_graph=True over a re-entrant checkpoint"
        raise bad("model", got, "a checkpoint that takes part in autograd", "pass checkpoint(..., use_reentrant=False)")
    with _set_aside(leaves):
        captured: dict[int, Tensor | None] = {}
        if reentrant or _sharded_modules(model):
            loss.backward()
        else:
            wanted = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            captured = {id(p): grad for p, grad in zip(wanted, found, strict=True)}
        # A function may call backward() in its own backward, as reversible layers do; these gradients are in .grad.
        named = [(name, p) for name, p in model.named_parameters() if not is_lazy(p)]
        return [(name, p, _sum(captured.get(id(p)), p.grad)) for name, p in named]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` as one dense tensor. A sharded tensor is gathered: all its processes have to make this call."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    tensor = tensor if gather is None else gather()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
