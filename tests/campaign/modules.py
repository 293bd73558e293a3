"""Random surgery on models: whatever is done to their modules, fused kernels compute what calls of the modules do.

One model has kernels="auto". Its twin, to which the same was done, is computed here in plain PyTorch by calls of its
children, in its dtype and in fp64. In outputs, gradients and two steps of SGD the errors of the model, against fp64,
must be of the size of its twin's.
"""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from plain_layer import plain_layer
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from ctr_kernels import TransformerLayer
from ctr_kernels.ffn.reference import ACTIVATIONS
from ctr_models import AutoInt, DCNv2, FTTransformer

from .surgery import LINEAR, NORM, scale_linear

ROWS, BATCH, FIELDS, FEATURES, LAYER_FIELDS = 2000, 8, 5, 3, 9
UNIT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}  # relative, of a tensor's norm
CHILDREN = {"attention_norm", "qkv", "out", "ffn_norm", "ffn_in", "ffn_out", "u", "v"}  # which kernels stand in for
WHOLE = ("double", "bfloat16", "bf16 table", "tied", "global hook", "copy")
NO_COPY = {"pruned", "old weight norm", "old spectral norm"}  # PyTorch does not copy weights that were computed
NO_PICKLE = NO_COPY | {"parametrised", "weight norm", "spectral norm"}


class Surgery(NamedTuple):
    name: str
    path: str  # of a child, or of a child and another that shares its weight; "" for all of a model
    seed: int


class Plan:
    """What is built, and what is done to it, from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw, self.seed, self.surgeries = random.Random(seed), seed, []
        draw = self.draw
        self.kind = draw.choice(["layer", "layer", "ft", "autoint", "dcnv2"])
        self.dim, heads = draw.choice([(16, 2), (32, 4), (48, 3), (64, 4), (64, 2), draw.choice([(24, 3), (48, 4)])])
        if self.kind == "layer":
            activation = draw.choice(list(ACTIVATIONS))
            self.make = partial(TransformerLayer, self.dim, heads, draw.choice([32, 64, 76]), activation=activation,
                                norm=draw.choice(["pre", "post"]))
            return
        self.history = draw.choice([0, 2])
        columns = self.history * FIELDS
        numeric = draw.choice(["token", "affine", "piecewise"] + [None] * (self.kind == "dcnv2"))
        settings = {"num_embeddings": ROWS, "num_dense": FEATURES, "num_sparse": FIELDS, "dropout": 0.0,
                    "tables": draw.choice(["shared", "per-field"]), "numeric": numeric, "history": self.history,
                    "numeric_edges": [[0.0, 0.25, 0.75]] * FEATURES, "embedding_std": 0.5,
                    "history_moments": [[0.25] * columns, [0.5] * columns], "dim": self.dim}
        if self.kind == "dcnv2":
            self.make = partial(DCNv2, **settings, rank=8, mlp_dims=(16,))
        else:
            model = FTTransformer if self.kind == "ft" else AutoInt
            pooling = {"pooling": draw.choice(["cls", "mean"])} if self.kind == "ft" else {}
            shortcut = draw.choice(["none", "cross"])
            self.make = partial(model, **settings, **pooling, num_heads=heads, shortcut=shortcut, num_layers=1)

    def build(self, salt: int, kernels: str, surgeries: list[Surgery]) -> nn.Module:
        """A model with other random numbers for each salt, after these surgeries, copies left out."""
        torch.manual_seed(self.seed + salt)
        model = self.make(kernels=kernels)
        for module in model.modules():
            if type(module) is nn.LayerNorm:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
        model.train(self.seed % 2 == 1 and not any("spectral" in s.name for s in self.surgeries))
        for surgery in surgeries:
            operate(model, surgery, salt)
        return model

    def choose(self, model: nn.Module) -> Surgery:
        """The next surgery for this model, which the others were made on."""
        draw = self.draw
        done = {s.name for s in self.surgeries}
        name, path = draw.choice(WHOLE), ""
        targets = [p for p, m in model.named_modules()
                   if type(m) in (nn.Linear, nn.LayerNorm) and m._parameters.get("weight") is not None
                   and "forward" not in m.__dict__ and m._parameters.get("bias") is not None]
        if draw.random() < 0.7 or name in done or {name, *done} >= {"double", "bfloat16"} or (
                name == "bf16 table" and (self.kind == "layer" or {"double", "bfloat16"} & done)):
            fused = [p for p in targets if p.rpartition(".")[2] in CHILDREN]
            path = draw.choice(fused if fused and draw.random() < 0.85 else targets)
            name = draw.choice(list(LINEAR if type(model.get_submodule(path)) is nn.Linear else NORM))
        elif name == "tied":
            kinds: dict[Any, list[str]] = {}
            for p in targets:
                m = model.get_submodule(p)
                kinds.setdefault((type(m), m.weight.shape, m.weight.dtype), []).append(p)
            twins = [paths for paths in kinds.values() if len(paths) > 1]
            if not twins:
                return self.choose(model)
            path = " ".join(draw.sample(draw.choice(twins), 2))
        if name == "pruned" and not model.get_submodule(path).weight.is_contiguous():
            return self.choose(model)  # PyTorch refuses
        return Surgery(name, path, draw.randrange(2**30))


def operate(model: nn.Module, surgery: Surgery, salt: int) -> None:
    """One surgery; random numbers of tensors depend on the salt, choices do not."""
    torch.manual_seed(surgery.seed + salt)
    name, path, seed = surgery
    if name in ("global hook", "copy"):
        return
    if name == "tied":
        one, other = (model.get_submodule(p) for p in path.split())
        other.weight = one.weight
    elif name == "bf16 table":
        model.store_embeddings_as(torch.bfloat16)  # type: ignore[operator]
    elif not path:
        getattr(model, name)()
    else:
        parent, _, child = path.rpartition(".")
        target = model.get_submodule(path)
        acts = LINEAR if type(target) is nn.Linear else NORM
        dtype = target.weight.dtype
        acts[name](model.get_submodule(parent), child, random.Random(seed))
        model.get_submodule(path).to(dtype)
        model.get_submodule(path).train(model.training)


def copied(plan: Plan, model: nn.Module, before: list[Surgery], seed: int) -> nn.Module:
    """The same model by another way, after the surgeries in `before`."""
    names = {s.name for s in before}
    ways = ["fresh", "emptied"] + ["deepcopy"] * (not names & NO_COPY) + ["pickle", "save"] * (not names & NO_PICKLE)
    way = random.Random(seed).choice(ways + ["assigned"] * (not names))
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    if way == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    state = copy.deepcopy(model.state_dict())
    if way == "assigned":
        with torch.device("meta"):
            fresh = plan.build(1, "auto", before)
    else:
        fresh = plan.build(1, "auto", before)
    if way == "emptied":
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(state, assign=way == "assigned")
    return fresh


# The models in plain PyTorch, by calls of their children.

def plain_rows(embedding: Any, sparse: torch.Tensor) -> torch.Tensor:
    table = embedding.table
    if embedding.tables == "per-field":
        rows = ROWS // FIELDS
        sparse = sparse % rows + torch.arange(FIELDS) * rows
    return F.embedding(sparse, table.weight).to(table.lookup_dtype)


def plain_tokens(tokenizer: Any, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    fields = plain_rows(tokenizer.embedding, sparse)
    numbers, dtype = dense[:, :FEATURES], fields.dtype
    if tokenizer.history is not None:
        history = tokenizer.history
        past = ((dense[:, FEATURES:] - 0.25) / 0.5).to(dtype).unflatten(1, (-1, FIELDS))
        fields = fields + (past.unsqueeze(-1) * history.weight).sum(1) + history.bias
    if tokenizer.dense == "token":
        first = tokenizer.dense_token(numbers.to(dtype)).unsqueeze(1)
    elif tokenizer.dense == "affine":
        first = numbers.to(dtype).unsqueeze(-1) * tokenizer.dense_weight + tokenizer.dense_bias
    else:
        shares = torch.stack([(numbers / 0.25).clamp(0, 1), ((numbers - 0.25) / 0.5).clamp(0, 1)], dim=-1).to(dtype)
        first = (shares.unsqueeze(-1) * tokenizer.numeric.weight).sum(2) + tokenizer.numeric.bias
    tokens = torch.cat([first, fields], dim=1)
    if tokenizer.cls is None:
        return tokens
    return torch.cat([tokenizer.cls.expand(len(tokens), 1, -1), tokens], dim=1)


def plain_cross(layers: Any, x0: torch.Tensor) -> torch.Tensor:
    x = x0
    for layer in layers:
        x = x0 * layer.v(layer.u(x)) + x
    return x


def plain(model: Any, *batch: torch.Tensor) -> torch.Tensor:
    """What the model computes."""
    if isinstance(model, TransformerLayer):
        return plain_layer(model, *batch)
    dense, sparse = batch
    if isinstance(model, DCNv2):
        if model.tokenizer is None:
            rows = plain_rows(model.embedding, sparse).flatten(1)
            x0 = torch.cat([dense.to(rows.dtype), rows], dim=1)
        else:
            x0 = plain_tokens(model.tokenizer, dense, sparse).flatten(1)
        return model.head(torch.cat([plain_cross(model.cross, x0), model.mlp(x0)], dim=1))
    tokens = x = plain_tokens(model.tokenizer, dense, sparse)
    for layer in model.layers:
        x = plain_layer(layer, x)
    logits = model.head(x[:, 0] if model.tokenizer.cls is not None else x.mean(1))
    if model.shortcut is not None:
        cross, x0 = model.shortcut[1], tokens.flatten(1)
        logits = logits + cross.head(torch.cat([plain_cross(cross.cross, x0), cross.mlp(x0)], dim=1))
    return logits


def run(function: Callable, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[tuple[str, torch.Tensor | None]]:
    """Names and tensors of two steps of SGD: outputs, gradients, and the parameters after them."""
    found: list[tuple[str, torch.Tensor | None]] = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = tuple(t.clone().requires_grad_(len(batch) == 1) for t in batch)
    for step in (1, 2):
        optimizer.zero_grad()
        out = function(*batch)
        wanted = torch.randn(out.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (out.double() * wanted).sum().div(len(out)).backward()  # linear: its gradient does not depend on what is lost
        found += [(f"output {step}", out.detach())]
        found += [(f"gradient {step} of {name}", None if p.grad is None else p.grad.to_dense())
                  for name, p in model.named_parameters()]
        found += [(f"gradient {step} of x", batch[0].grad)]
        optimizer.step()
    return found + [(name, p.detach()) for name, p in model.named_parameters()]


def check(seed: int) -> str:
    """Operate on a model; AssertionError if its fused kernels compute something else. Returns what it was."""
    plan = Plan(seed)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = plan.build(0, "eager", [])
        for _ in range(plan.draw.choice([1, 1, 1, 2, 3, 4])):
            surgery = plan.choose(twin)
            plan.surgeries.append(surgery)
            operate(twin, surgery, 0)
        twin = plan.build(0, "eager", plan.surgeries)  # train() or eval() depends on all of them
        model = plan.build(0, "auto", [])
        for i, surgery in enumerate(plan.surgeries):
            operate(model, surgery, 0)
            if surgery.name == "copy":
                model = copied(plan, model, plan.surgeries[:i], surgery.seed)
        repr(model)
        if any(s.name == "global hook" for s in plan.surgeries):
            stack.callback(register_module_forward_hook(scale_linear).remove)
        parameter = next(p for name, p in twin.named_parameters() if "table" not in name)
        dtype, generator = parameter.dtype, torch.Generator().manual_seed(seed)
        if plan.kind == "layer":
            batch: tuple[torch.Tensor, ...] = (
                torch.randn(BATCH, LAYER_FIELDS, plan.dim, generator=generator).to(dtype),)
        else:
            batch = (torch.rand(BATCH, FEATURES + plan.history * FIELDS, generator=generator),
                     torch.randint(ROWS, (BATCH, FIELDS), generator=generator))
        exact = plan.build(0, "eager", plan.surgeries).double()
        found, eager = run(model, model, batch), run(partial(plain, twin), twin, batch)
        truth = run(partial(plain, exact), exact, tuple(t.double() if t.is_floating_point() else t for t in batch))
        compare(found, eager, truth, plan, dtype)
        return f"{plan.kind} in {str(dtype).removeprefix('torch.')}"


def compare(found: list, eager: list, exact: list, plan: Plan, dtype: torch.dtype) -> None:
    """AssertionError unless every tensor's error is of the size of its twin's, or of the dtype."""
    stored = any(s.name == "bf16 table" for s in plan.surgeries)  # the twin rounds gradients of its rows to bf16
    unit = UNIT[torch.bfloat16 if stored else dtype]
    told = f"{plan.kind} {plan.make.keywords} {plan.surgeries}"
    largest = max(size(t) / t.numel() ** 0.5 for name, t in exact if t is not None and "gradient" in name)
    for (name, one), (other_name, other), (_, truth) in zip(found, eager, exact, strict=True):
        assert name == other_name, f"{name} in place of {other_name}: {told}"
        assert (one is None) == (other is None), f"{name} is {one}, expected {other}: {told}"
        if one is None or (dtype == torch.bfloat16 and plan.kind != "layer" and "output" not in name):
            continue  # in bf16 a hidden unit of a head may cross the kink of its ReLU
        assert one.shape == other.shape, f"{name}: {tuple(one.shape)}: {told}"
        assert one.dtype == other.dtype or (stored and "table" in name), f"{name}: {one.dtype}: {told}"
        error, allowed = size(one.double() - truth), 10 * size(other.double() - truth)
        floor = 0.01 * largest * other.numel() ** 0.5 if "gradient" in name else 0.0
        assert error <= allowed + unit * (size(truth) + floor) + 1e-12, (
            f"{name}: off by {error:.3g} of {size(truth):.3g}, eager by {allowed / 10:.3g}: {told}")


def size(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()
