"""Program: a functional ATen graph with named weights, and how it is called.

The graph is a `torch.fx.Graph` of placeholders (the model's inputs, flat), `get_attr` nodes (weights, one node a
tensor), ATen or `graphopt::` operators and one output (the model's outputs, flat). `Signature` maps the model's own
calling convention to and from that flat form. Weights are shared between clones and replaced, never overwritten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError


@dataclass(frozen=True)
class Signature:
    """How the model is called.

    Attributes:
        in_spec: pytree structure of `(args, kwargs)` as captured.
        out_spec: pytree structure of the return value.
        parameters: names of the parameters of the model's forward, in order; they allow a keyword input to be given
            by position and the reverse.
        inputs: the name of each flat input, as a user would write it (`x`, `features.mask`).
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of a call; GraphoptError where the call does not have the captured structure."""
        for attempt in ((args, dict(kwargs)), self._as_captured(args, kwargs)):
            leaves, spec = pytree.tree_flatten(attempt)
            if spec == self.in_spec:
                return leaves
            if (reordered := self._flatten_like(attempt)) is not None:
                return reordered
        count = len(pytree.tree_leaves((args, dict(kwargs))))
        raise GraphoptError(
            "the inputs do not have the structure the model was captured with: expected "
            f"{', '.join(self.inputs) or 'nothing'}, got {count} value(s) for "
            f"{', '.join(self._given(args, kwargs)) or 'nothing'}"
        )

    def _flatten_like(self, tree: Any) -> list[Any] | None:
        """Flatten a tree of the captured structure whose dicts may list their keys in another order."""
        try:
            leaves = self.in_spec.flatten_up_to(tree)
        except ValueError:
            return None
        return leaves if all(pytree.tree_is_leaf(leaf) for leaf in leaves) else None

    def _captured_names(self) -> tuple[list[str], list[str]]:
        args_spec, kwargs_spec = self.in_spec.children()
        return list(self.parameters[: args_spec.num_children]), list(kwargs_spec.context or [])

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
        return [*self.parameters[: len(args)], *(f"input_{i}" for i in range(len(self.parameters), len(args))), *kwargs]

    def _as_captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move positional values to keywords and back, so that `f(a, b)` and `f(b=b, a=a)` are one call.

        A call that gives a parameter twice, or that cannot be moved, comes back as it is.
        """
        if set(self.parameters[: len(args)]) & set(kwargs):
            return args, dict(kwargs)
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        positional, keywords = self._captured_names()
        if len(args) > len(self.parameters) or len(positional) > len(self.parameters):
            return args, dict(kwargs)
        # A parameter that was left at its default when captured may be passed as None: that is what leaving it means.
        unknown = {k for k, v in given.items() if k not in (*positional, *keywords) and v is not None}
        if unknown or any(name not in given for name in (*positional, *keywords)):
            return args, dict(kwargs)
        return tuple(given[name] for name in positional), {name: given[name] for name in keywords}


@dataclass
class Program:
    """A captured model.

    Attributes:
        graph_module: the graph and its weights.
        signature: the model's calling convention.
        example_inputs: `(args, kwargs)` in the form of the signature.
        aliases: tied names, `other name -> name in the graph`.
        range_constraints: bounds of the symbolic dimensions, as torch.export states them.
        dimension_names: the user's names of symbolic dimensions, `symbol -> name` (`s58 -> batch`).
        notes: sentences about choices made on the way, shown in the report.
    """

    graph_module: fx.GraphModule
    signature: Signature
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    aliases: dict[str, str] = field(default_factory=dict)
    range_constraints: dict[Any, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dimension_names: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes, or the constants a model returns beside them."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor the graph reads, by name, in graph order."""
        return {str(node.target): self.weight(node) for node in self.graph.nodes if node.op == "get_attr"}

    def weight(self, node_or_name: fx.Node | str) -> Tensor:
        """Return the tensor behind a `get_attr` node or a weight's name (tied names too).

        Raises AttributeError where there is no such name, TypeError where it is no tensor's.
        """
        name = str(node_or_name.target) if isinstance(node_or_name, fx.Node) else node_or_name
        value: Any = self.graph_module
        name = self.aliases.get(name, name)
        for atom in name.split("."):
            value = getattr(value, atom)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is not a tensor of this program")
        return value

    @property
    def flat_example(self) -> list[Any]:
        return self.signature.flatten(*self.example_inputs)

    def run(self, flat_inputs: list[Any]) -> list[Any]:
        """Run on flat inputs and return flat outputs."""
        outputs: Any = self.graph_module(*flat_inputs)
        return list(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the model's own calling convention and return what the model returns.

        Raises GraphoptError where the call has another structure than the captured one, or another value where a value
        that is no tensor became part of the program.
        """
        return pytree.tree_unflatten(self.run(self.flattened(args, kwargs)), self.signature.out_spec)

    def flattened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of a call; GraphoptError where it does not fit what was captured."""
        flat = self.signature.flatten(args, kwargs)
        self._check_constants(flat)
        return flat

    def _check_constants(self, flat: list[Any]) -> None:
        for name, node, given in zip(self.signature.inputs, self.placeholders, flat, strict=True):
            captured = node.meta.get("val")
            absent = captured is None and "val" in node.meta
            if not absent and (not isinstance(captured, bool | int | float | str) or isinstance(given, Tensor)):
                continue
            if type(given) is not type(captured) or (given != captured and captured == captured):
                shown = "a tensor" if isinstance(given, Tensor) else repr(given)
                raise GraphoptError(
                    f"input {name} was captured as {captured!r} and is fixed, so it cannot be {shown}; "
                    "capture the model again with the value you need"
                )

    def module(self) -> ProgramModule:
        """Return an eval-mode `nn.Module` with the model's signature, outputs and names; weights are shared."""
        return ProgramModule(self)

    def clone(self) -> Program:
        """Return an independent graph over the same weight tensors."""
        return self._with(graph_module(copy.deepcopy(self.graph), self.weight))

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Return an independent graph over copies of the weights."""
        twin = self.map_weights(lambda name, weight: copy.deepcopy(weight, memo))
        twin.example_inputs = copy.deepcopy(self.example_inputs, memo)
        return twin

    def map_weights(self, change: Callable[[str, Tensor], Tensor]) -> Program:
        """Return a clone whose weight called `name` is `change(name, weight)`."""
        return self._with(
            graph_module(copy.deepcopy(self.graph), lambda node: change(str(node.target), self.weight(node)))
        )

    def _with(self, module: fx.GraphModule) -> Program:
        return Program(
            module,
            self.signature,
            self.example_inputs,
            dict(self.aliases),
            dict(self.range_constraints),
            list(self.notes),
            dict(self.dimension_names),
        )

    def save(self, path: str | Path) -> None:
        """Write a `.pt2` archive atomically; names, ties and provenance survive `Program.load`."""
        from graphopt.ir.archive import save_program

        save_program(self, Path(path))

    @staticmethod
    def load(path: str | Path, trust: bool = False) -> Program:
        """Read a `.pt2` archive written by `save` or by torch.export; see `graphopt.ir.archive` for what is refused."""
        from graphopt.ir.archive import load_program

        return load_program(Path(path), trust=trust)

    def __str__(self) -> str:
        from graphopt.ir.printing import program_text

        return program_text(self)

    def __repr__(self) -> str:
        calls = sum(node.op == "call_function" for node in self.graph.nodes)
        return f"<Program: {len(self.signature.inputs)} inputs, {calls} operators, {len(self.weights)} weights>"


class ProgramModule(nn.Module):
    """A Program as an ordinary module; its parameters, buffers and children are the graph module's own.

    `state_dict` and `load_state_dict` use the model's names, tied ones included. Training changes the Program itself:
    clone that first, or train `trainable(program)`, which has weights of its own.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        inner = program.graph_module
        object.__setattr__(self, "_program", program)
        self._parameters = inner._parameters
        self._buffers = inner._buffers
        self._modules = inner._modules
        self.register_state_dict_post_hook(_give_model_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_model_names)  # type: ignore[no-untyped-call]
        self.eval()

    @property
    def program(self) -> Program:
        return self._program  # type: ignore[return-value, unused-ignore]

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        return ProgramModule(copy.deepcopy(self.program, memo))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)


def _give_model_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, ProgramModule)
    for alias, name in module.program.aliases.items():
        if prefix + name in state:
            state[prefix + alias] = state[prefix + name]
    for alias, name in module.program.aliases.items():
        if _is_storable_form(name, alias):
            state.pop(prefix + name, None)


def _take_model_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, ProgramModule)
    for alias, name in module.program.aliases.items():
        if prefix + alias in state:
            value = state.pop(prefix + alias)
            state.setdefault(prefix + name, value)


# Attributes that fx.GraphModule needs for itself, at the top and below: a weight cannot be stored under such a name.
_TAKEN_AT_TOP = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_TAKEN_BELOW = frozenset(dir(nn.Module()))


def storable_name(name: str, taken: Collection[str] = ()) -> str:
    """Return the name under which a weight called `name` can be stored: `graph.weight` becomes `graph_.weight`.

    `taken` holds names that are in use already.
    """
    first, *rest = name.split(".")
    atoms = [first + "_" * (first in _TAKEN_AT_TOP), *(atom + "_" * (atom in _TAKEN_BELOW) for atom in rest)]
    storable = ".".join(atoms)
    while storable != name and storable in taken:
        storable += "_"
    return storable


def _is_storable_form(name: str, alias: str) -> bool:
    storable = storable_name(alias)
    return storable != alias and name.rstrip("_") == storable.rstrip("_")


def graph_module(graph: fx.Graph, weight: Callable[[fx.Node], Tensor]) -> fx.GraphModule:
    """Build a GraphModule over `graph` whose `get_attr` nodes read `weight(node)`, stored under their dotted names."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            assign_weight(root, str(node.target), weight(node))
    module = fx.GraphModule(root, graph, class_name="Program")
    module.eval()
    return module


def assign_weight(root: nn.Module, name: str, value: Tensor) -> None:
    """Store `value` under a dotted name, making plain modules on the way; a Parameter stays one, the rest are buffers.

    Raises TypeError where a part of the path is no module.
    """
    *path, leaf = name.split(".")
    for atom in path:
        if not hasattr(root, atom):
            root.add_module(atom, nn.Module())
        root = getattr(root, atom)
        if not isinstance(root, nn.Module):
            raise TypeError(f"there can be no weight called {name}: {atom} is no module")
    if isinstance(value, nn.Parameter):
        root._buffers.pop(leaf, None)
        root.register_parameter(leaf, value)
    else:
        root._parameters.pop(leaf, None)
        if leaf in root._buffers:
            root._buffers[leaf] = value
        else:
            root.register_buffer(leaf, value)


def remove_weight(root: nn.Module, name: str) -> None:
    """Delete the weight under a dotted name, and every module that this leaves empty."""
    *path, leaf = name.split(".")
    modules = [root]
    for atom in path:
        modules.append(getattr(modules[-1], atom))
    delattr(modules[-1], leaf)
    for parent, atom, child in reversed(list(zip(modules, path, modules[1:], strict=False))):
        if not (child._parameters or child._buffers or child._modules):
            delattr(parent, atom)


def fake_value(node: fx.Node) -> Any:
    """Return the node's abstract value, `meta["val"]`: a FakeTensor, a symbolic int, a constant, a tuple of these."""
    return node.meta.get("val")


def is_tensor(node: object) -> bool:
    """True where `node` is an fx node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_floating(node: object) -> bool:
    """True where `node` is an fx node whose value is one floating-point tensor."""
    return (
        isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()
    )


def static_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the node's shape where every dimension is a plain number, else None."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(int(size) for size in value.shape)
