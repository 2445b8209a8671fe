"""What capture takes, and that the Program is called and answers as the model did."""

import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir.arguments import operator
from graphopt.ir.exported import source_line
from graphopt.ir.program import Program
from graphopt.ir.rewriter import module_path
from graphopt.ir.verify import verify

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Sample:
    """Never registered as a pytree."""

    image: Tensor
    mask: Tensor | None = None


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Function(nn.Module):
    """A module around a function of one input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert a == b


def operators(program: Program) -> list[str]:
    return [operator(node) for node in program.graph.nodes if node.op == "call_function"]


def sentence(info: pytest.ExceptionInfo[GraphoptError]) -> str:
    text = str(info.value)
    assert "\n" not in text
    assert text[-1] != "."
    return text


# --- Kinds of model


@pytest.mark.parametrize("name", [name for name in MODELS if "bn" not in name])
@pytest.mark.parametrize("dynamic", [False, True])
def test_models_compute_the_same(name: str, dynamic: bool) -> None:
    model = MODELS[name]()
    if dynamic and model.dynamic_shapes is None:
        pytest.skip("no dynamic shapes")
    program = capture(model.module, model.example_inputs, model.dynamic_shapes if dynamic else None)
    verify(program)
    model.module.eval()
    for inputs in model.calibration[:2]:
        found = program(**inputs) if isinstance(inputs, dict) else program(*inputs)
        assert_same(found, model.run(inputs))
    assert set(program.weights) <= {
        name for name, _ in [*model.module.named_parameters(), *model.module.named_buffers()]
    }


def test_graph_module() -> None:
    traced = fx.symbolic_trace(Linear())
    x = torch.randn(2, 4)
    assert_same(capture(traced, x)(x), traced(x))


def test_module_of_an_exported_program() -> None:
    """Its eval() raises; it is captured as it is."""
    model, x = Linear().eval(), torch.randn(2, 4)
    module = torch.export.export(model, (x,)).module()
    assert_same(capture(module, (x,))(x), model(x))


def test_exported_program_uses_its_own_inputs_and_names() -> None:
    model = MODELS["masked_encoder"]()
    program = capture(model.export())
    assert program.signature.inputs == ("input_ids", "attention_mask")
    ids, mask = model.example_inputs["input_ids"], model.example_inputs["attention_mask"]
    assert torch.equal(program.example_inputs[1]["input_ids"], ids)
    assert_same(program(ids, mask), model.run())
    assert_same(program(attention_mask=mask, input_ids=ids), model.run())


def test_file(tmp_path: Path) -> None:
    model = Linear().eval()
    x = torch.randn(2, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "a.pt2")
    capture(model, x).save(tmp_path / "b.pt2")
    for path in (tmp_path / "a.pt2", str(tmp_path / "b.pt2")):
        assert_same(capture(path)(x), model(x))
        other = torch.randn(2, 4)
        assert torch.equal(capture(path, (other,)).example_inputs[0][0], other)
        with pytest.raises(GraphoptError, match="shapes are fixed"):
            capture(path, dynamic_shapes=({0: Dim("b")},))


def test_module_of_a_program() -> None:
    first = capture(Linear(), torch.randn(2, 4))
    second = capture(first.module())
    assert str(second) == str(first)
    assert second.signature == first.signature
    assert second is not first


def test_compiled_and_data_parallel_modules_are_unwrapped() -> None:
    model, x = Linear(), torch.randn(2, 4)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert set(capture(wrapped, x).weights) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("model", [None, 3, Linear, lambda x: x, {"a": 1}])
def test_anything_else_is_refused(model: Any) -> None:
    with pytest.raises(GraphoptError, match=r"model must be an nn\.Module.*not") as info:
        capture(model, torch.ones(1))
    sentence(info)


def test_the_public_name_does_not_hide_the_package() -> None:
    code = """
import graphopt, sys, types
assert callable(graphopt.capture) and not isinstance(graphopt.capture, types.ModuleType)
from graphopt.capture.entry import capture
from graphopt.capture import inputs
assert graphopt.capture is capture and isinstance(sys.modules["graphopt.capture"], types.ModuleType)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- Inputs


class Several(nn.Module):
    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        *,
        features: dict[str, Any] | None = None,
        scale: float = 2.0,
        flag: bool = True,
        mode: str = "sum",
    ) -> Tensor:
        y = x + pair[0] * pair[1]
        if features is not None:
            y = y + features["mask"] * features["deep"][0]
        return y * scale if flag and mode == "sum" else y


def test_nested_positional_and_keyword_inputs() -> None:
    torch.manual_seed(0)
    a, b, c, d, e = (torch.randn(2, 3) for _ in range(5))
    model = Several()
    plain = capture(model, (a, (b, c)))
    assert plain.signature.inputs == ("x", "pair.0", "pair.1")
    assert_same(plain(d, (e, a)), model(d, (e, a)))
    assert_same(plain(x=d, pair=(e, a)), model(d, (e, a)))
    nested = {"x": a, "pair": (b, c), "features": {"mask": d, "deep": [e]}, "scale": 3.0, "flag": True, "mode": "sum"}
    program = capture(model, nested)
    assert program.signature.inputs == (
        "x",
        "pair.0",
        "pair.1",
        "features.mask",
        "features.deep.0",
        "scale",
        "flag",
        "mode",
    )
    assert_same(program(**nested), model(**nested))
    with pytest.raises(GraphoptError, match="structure the model was captured with"):
        program(a)
    for change in ({"scale": 4.0}, {"flag": False}, {"mode": "other"}):
        with pytest.raises(GraphoptError, match=f"{next(iter(change))}"):
            program(**(nested | change))


def test_none_among_the_inputs_stays_none() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
            return x if mask is None else x * mask

    x = torch.randn(2)
    program = capture(Optional(), (x, None))
    assert_same(program(x, None), x)
    with pytest.raises(GraphoptError, match="mask"):
        program(x, torch.ones(2))


def test_one_tensor_a_list_and_numpy_are_inputs() -> None:
    x = torch.randn(2, 4)
    model = Linear().eval()
    for inputs in (x, [x], (x,), {"x": x}, x.numpy()):
        program = capture(model, inputs)
        assert_same(program(x), model(x))
        assert program.signature.inputs == ("x",)


def test_variable_arguments() -> None:
    class Sum(nn.Module):
        def forward(self, *terms: Tensor, factor: Tensor, **more: Tensor) -> Tensor:
            return sum(terms, more.get("offset", 0)) * factor

    a, b = torch.randn(2), torch.randn(2)
    with pytest.raises(GraphoptError, match="missing a required"):
        capture(Sum(), (a, b))
    program = capture(Sum(), {"factor": a, "offset": b})
    assert_same(program(factor=b, offset=a), Sum()(factor=b, offset=a))


def test_dataclass_input() -> None:
    class Masked(nn.Module):
        def forward(self, sample: Sample) -> Tensor:
            return sample.image * sample.mask if sample.mask is not None else sample.image

    sample = Sample(torch.randn(2), torch.ones(2))
    program = capture(Masked(), (sample,))
    assert program.signature.inputs == ("sample.image", "sample.mask")
    assert_same(program(sample), sample.image)


def test_the_given_inputs_are_copied_and_left_alone() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return nn.functional.relu(x, inplace=True) * 2

    x = torch.randn(3, requires_grad=False)
    before = x.clone()
    program = capture(InPlace().eval(), x)
    assert torch.equal(x, before)
    assert program.notes == [
        "the model overwrites its input x in place; the captured program leaves its inputs as they are"
    ]
    assert_same(program(x), (before + 1).relu() * 2)
    assert torch.equal(x, before)
    x.zero_()
    assert torch.equal(program.example_inputs[0][0], before)


def _with(**attributes: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    return model


@pytest.mark.parametrize(
    "attributes",
    [
        {"example_input_array": torch.ones(1, 3, 8, 8)},
        {"example_input_array": (torch.ones(1, 3, 8, 8),)},
        {"dummy_inputs": {"input": torch.ones(1, 3, 8, 8)}},
        {"pretrained_cfg": {"input_size": (3, 8, 8)}},
        {"default_cfg": SimpleNamespace(input_size=(3, 8, 8))},
        {
            "example_input_array": None,
            "dummy_inputs": {"input_ids": torch.ones(1, 3)},
            "pretrained_cfg": {"input_size": (3, 8, 8)},
        },
    ],
)
def test_models_that_say_what_they_eat(attributes: dict[str, Any]) -> None:
    program = capture(_with(**attributes))
    assert program.flat_example[0].shape == (1, 3, 8, 8)
    assert program.flat_example[0].dtype == torch.float32


def test_inputs_by_convention_take_the_type_of_the_weights() -> None:
    model = _with(pretrained_cfg={"input_size": (3, 8, 8)}).to(torch.bfloat16)
    assert capture(model).flat_example[0].dtype == torch.bfloat16


def test_dummy_inputs_of_a_library() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    assert capture(model).signature.inputs == ("input_ids",)


def test_a_model_that_does_not_say_what_it_eats() -> None:
    with pytest.raises(
        GraphoptError, match=r"Linear does not say what it eats; pass example_inputs: .* for forward\(x\)"
    ) as info:
        capture(Linear())
    sentence(info)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ((), "do not fit Linear.forward.*missing a required argument: 'x'"),
        ({}, "do not fit Linear.forward.*missing a required argument: 'x'"),
        ((torch.ones(1), torch.ones(1)), "too many positional arguments"),
        ({"y": torch.ones(1)}, "do not fit Linear"),
        (3, "inputs must be a tensor, a tuple or a dict of tensors, not int"),
        ("text", "inputs must be a tensor, a tuple or a dict of tensors, not str"),
        ((3,), "hold no tensor"),
        ((object(),), "example input x is a object, which no graph takes"),
        (torch.ones(0, 4), r"example input x has no elements \(shape \[0, 4\]\)"),
        (torch.full((2, 4), torch.nan), "example input x holds NaN or infinity"),
        ({"x": torch.full((2, 4), torch.inf)}, "example input x holds NaN or infinity"),
        (torch.ones(2, 4, device="meta"), "example input x is on the meta device"),
        (
            torch.ones(2, 5),
            r"the model itself fails on the example inputs: RuntimeError: .*test_capture.py:\d+, in forward",
        ),
        (torch.ones(2, 4, dtype=torch.int64), "the model itself fails on the example inputs"),
    ],
)
def test_bad_example_inputs(inputs: Any, match: str) -> None:
    with pytest.raises(GraphoptError, match=match) as info:
        capture(Linear(), inputs)
    sentence(info)


def test_exported_program_without_example_inputs() -> None:
    exported = torch.export.export(Linear().eval(), (torch.ones(2, 4),))
    exported.example_inputs = None
    with pytest.raises(GraphoptError, match="holds no example inputs; pass example_inputs"):
        capture(exported)
    assert capture(exported, (torch.zeros(2, 4),)).flat_example[0].sum() == 0


# --- Outputs


@pytest.mark.parametrize(
    "make",
    [
        lambda y: {"a": y, "b": [y, None, 3], "c": (y, {"d": True})},
        lambda y: Sample(y),
        lambda y: Sample(y, y + 1),
        lambda y: [Sample(y, y), Pair(y, Sample(y))],
        lambda y: (y,),
        lambda y: [y],
        lambda y: (y, 2.5, None),
    ],
)
def test_outputs_keep_their_types(make: Callable[[Tensor], Any]) -> None:
    x = torch.randn(2)
    program = capture(Function(lambda v: make(v * 2)), x)
    found, expected = program(x), make(x * 2)
    assert repr(found) == repr(expected)
    assert type(found) is type(expected)


def test_a_dataclass_of_a_library() -> None:
    model = MODELS["bert"]()
    program = capture(model.module, model.example_inputs)
    found = program(**model.example_inputs)
    assert type(found).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert found.pooler_output is not None
    assert found.hidden_states is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda y: "text", "Function returns a str; return tensors only"),
        (lambda y: {"a": y, "b": [y, "text"]}, r"returns a str at output\['b'\]\[1\]"),
        (lambda y: (y, object()), r"returns a object at output\[1\]"),
        (lambda y: Sample(y, "text"), r"returns a str at output\.mask"),
        (lambda y: y.numpy(), "returns a ndarray"),
        (lambda y: None, "returns no tensor"),
        (lambda y: 3, "returns no tensor"),
    ],
)
def test_outputs_that_are_not_tensors(make: Callable[[Tensor], Any], match: str) -> None:
    with pytest.raises(GraphoptError, match=match) as info:
        capture(Function(make), torch.ones(2))
    sentence(info)


def test_a_cache_among_the_outputs_says_how_to_switch_it_off() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    model = LlamaForCausalLM(config)
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(
        GraphoptError, match=r"DynamicCache at output\['past_key_values'\].*model.config.use_cache = False"
    ):
        capture(model, inputs)
    model.config.use_cache = False
    assert type(capture(model, inputs)(**inputs)).__name__ == "CausalLMOutputWithPast"


# --- Dynamic shapes


def test_dynamic_shapes_run_at_other_sizes() -> None:
    model = MODELS["masked_encoder"]()
    program = capture(model.module, model.example_inputs, model.dynamic_shapes)
    assert len(program.range_constraints) == 2
    ids, mask = torch.randint(0, 64, (5, 7)), torch.ones(5, 7, dtype=torch.int64)
    model.module.eval()
    assert_same(program(ids, mask), model.module(ids, mask))


@pytest.mark.parametrize("shapes", [({0: Dim.AUTO},), {"x": {0: Dim.DYNAMIC}}, ((Dim("b", min=1, max=64), 4),)])
def test_every_form_of_dynamic_shapes(shapes: Any) -> None:
    model = Linear().eval()
    program = capture(model, torch.randn(3, 4), shapes)
    x = torch.randn(7, 4)
    assert_same(program(x), model(x))


# --- Weights


def test_names_ties_buffers_and_shared_modules_are_the_users() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.tokens.weight
            self.shared = nn.Linear(4, 4)
            self.again = self.shared
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("passing", torch.full((4,), 2.0), persistent=False)
            self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
            self.plain = torch.full((4,), 3.0)
            self.unused = nn.Linear(100, 100)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) * self.kept + self.passing * self.frozen + self.plain
            return self.head(self.again(self.shared(x)))

    model = Net()
    ids = torch.tensor([[1, 2, 3]])
    program = capture(model, ids)
    names = {"tokens.weight", "shared.weight", "shared.bias", "kept", "passing", "frozen", "plain"}
    assert set(program.weights) == names
    assert program.aliases["head.weight"] == "tokens.weight"
    assert program.weight("shared.weight") is model.shared.weight
    assert isinstance(program.weight("frozen"), nn.Parameter)
    assert not program.weight("frozen").requires_grad
    assert not isinstance(program.weight("kept"), nn.Parameter)
    assert_same(program(ids), model(ids))


def test_parametrizations_keep_their_names() -> None:
    model = MODELS["weight_norm_parametrized"]()
    program = capture(model.module, model.example_inputs)
    assert "0.parametrizations.weight.original0" in program.weights


def test_constants_made_in_forward() -> None:
    class Lazily(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0) ** 2
            return x * self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model, x = Lazily(), torch.randn(2, 4)
    program = capture(model, x)
    assert_same(program(x), model(x))
    assert isinstance(model.table, Tensor)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_parameters(value: float) -> None:
    model = Linear()
    with torch.no_grad():
        model.linear.bias[2] = value
    with pytest.raises(GraphoptError, match=r"parameter linear.bias holds (NaN|infinity); the model is broken") as info:
        capture(model, torch.ones(2, 4))
    sentence(info)


def test_infinity_in_a_buffer_is_a_mask_and_nan_is_broken() -> None:
    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), value).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.mask).softmax(-1)

    capture(Masked(-torch.inf), torch.ones(4, 4))
    with pytest.raises(GraphoptError, match="buffer mask holds NaN"):
        capture(Masked(torch.nan), torch.ones(4, 4))


def test_weights_without_values() -> None:
    with pytest.raises(GraphoptError, match=r"parameter 0\.weight has no shape yet; run the model once"):
        capture(nn.Sequential(nn.LazyLinear(4)), torch.ones(2, 4))
    with pytest.raises(GraphoptError, match=r"weight linear\.weight is on the meta device"):
        capture(Linear().to("meta"), torch.ones(2, 4))


# --- The graph


def test_regions_of_no_grad_and_autocast_are_inlined_with_their_casts() -> None:
    class Regions(Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.linear(x) * 2
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(y)
                with torch.autocast("cpu", enabled=False):
                    y = self.linear(y.float())
            with torch.enable_grad():
                return y + 1

    model, x = Regions().eval(), torch.randn(2, 4)
    program = capture(model, x)
    verify(program)
    assert torch.equal(program(x), model(x))
    assert operators(program).count("linear") == 3
    assert "_to_copy" in operators(program)
    for node in program.graph.nodes:
        if operator(node) == "linear":
            assert source_line(node).startswith(__file__)
            assert module_path(node) == "linear"


def test_guards_and_assertions_are_dropped() -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] > 1)
            torch._assert(x.shape[1] == 4, "four")
            assert x.dtype == torch.float32
            chosen = x[x[:, 0] > 0]
            return chosen * 2

    program = capture(Checks(), torch.randn(6, 4), ({0: Dim("b", min=2)},))
    assert set(operators(program)) == {"slice", "select", "gt", "index", "mul"}
    x = torch.randn(9, 4)
    assert_same(program(x), x[x[:, 0] > 0] * 2)


def test_large_operators_stay_whole() -> None:
    model = MODELS["vision_transformer"]()
    found = operators(capture(model.module, model.example_inputs))
    assert found.count("scaled_dot_product_attention") == 2
    assert found.count("layer_norm") == 5
    assert found.count("linear") == 9
    assert found.count("conv2d") == 1


def test_capture_is_deterministic() -> None:
    model = MODELS["bert"]()
    first, second = (str(capture(model.module, model.example_inputs)) for _ in range(2))
    assert first == second


def test_random_operators_are_noted() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True) + torch.randn_like(x)

    notes = capture(Noise().eval(), torch.ones(4)).notes
    assert len(notes) == 1
    assert "draws random numbers" in notes[0]
    assert "randn_like" in notes[0]
    assert "dropout" in notes[0]
    attention = MODELS["vision_transformer"]()
    assert capture(attention.module, attention.example_inputs).notes[1:] == []


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
@pytest.mark.parametrize("kind", ["module", "parameter", "buffer", "parameter below"])
def test_names_that_torch_uses_for_itself(name: str, kind: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            if kind == "module":
                self.add_module(name, nn.Linear(4, 4))
            elif kind == "buffer":
                self.register_buffer(name, torch.randn(4))
            else:
                owner = self if kind == "parameter" else self.linear
                owner.register_parameter(name, nn.Parameter(torch.randn(4)))

        def forward(self, x: Tensor) -> Tensor:
            held = getattr(self.linear if kind == "parameter below" else self, name)
            return self.linear(x) + (held(x) if kind == "module" else held)

    model, x = Named().eval(), torch.randn(2, 4)
    exported = torch.export.export(model, (x,))
    names = list(exported.state_dict)
    for each in (model, exported):
        program = capture(each, (x,))
        torch.testing.assert_close(program(x), model(x))
        assert program.module().state_dict().keys() == model.state_dict().keys()
    assert list(exported.state_dict) == names  # the user's program is not touched


def test_a_buffer_of_such_a_name_that_is_updated_is_refused_by_its_own_name() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("meta", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.meta += 1
            return x + self.meta

    with pytest.raises(GraphoptError, match="the model updates its buffer meta in forward"):
        capture(Counting(), torch.ones(2))
