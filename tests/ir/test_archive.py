"""`.pt2` archives: what survives the file, and what a hostile file cannot do."""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, REQUIRED
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir.archive import load_program, save_program
from graphopt.ir.archive_checks import Refusal, check_expression, check_guard, check_structure
from graphopt.ir.exported import source_line
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter, module_path, provenance
from graphopt.ir.verify import verify

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Answer:
    value: Tensor
    extra: Tensor | None = None


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Returning(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x * 2)


def program() -> Program:
    torch.manual_seed(0)
    return capture(Linear(), (torch.randn(2, 4),))


@cache
def of_graphopt() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        program().save(Path(folder) / "model.pt2")
        return (Path(folder) / "model.pt2").read_bytes()


@cache
def of_torch() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Linear().eval(), (torch.ones(2, 4),)), buffer)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


# --- What survives


@pytest.mark.parametrize("name", [*REQUIRED, "two_inputs_plain_dataclass", "weight_norm_hook"])
def test_round_trip_keeps_everything(name: str, path: Path) -> None:
    model = MODELS[name]()
    before = capture(model.module, model.example_inputs, model.dynamic_shapes)
    before.notes.append("kept")
    before.save(path)
    after = Program.load(path)
    verify(after, before)
    assert str(after) == str(before)
    assert after.aliases == before.aliases
    assert after.signature == before.signature
    assert after.notes == before.notes
    assert {str(k): (v.lower, v.upper) for k, v in after.range_constraints.items()} == {
        str(k): (v.lower, v.upper) for k, v in before.range_constraints.items()
    }
    inputs = model.calibration[0]
    old, new = (p(**inputs) if isinstance(inputs, dict) else p(*inputs) for p in (before, after))
    assert type(old) is type(new)
    for a, b in zip(tree_leaves(old), tree_leaves(new), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before.flat_example, after.flat_example, strict=True):
        assert torch.equal(a, b)


def test_ties_and_parameters_survive(path: Path) -> None:
    model = MODELS["tied_language_model"]()
    capture(model.module, model.example_inputs).save(path)
    after = load_program(path)
    assert after.aliases == {"head.weight": "tokens.weight"}
    kinds = {name: type(w) for name, w in after.weights.items()}
    assert kinds["tokens.weight"] is nn.Parameter
    assert after.weight("tokens.weight").requires_grad


def test_provenance_of_operators_and_weights_survives(path: Path) -> None:
    edited = program().clone()
    rewriter = Rewriter(edited, author="test")
    linear = next(node for node in edited.graph.nodes if node.op == "call_function")
    x, weight, bias = linear.args
    half = rewriter.edit(weight, "half", lambda value: value / 2)
    rewriter.replace(linear, rewriter.insert(linear.target, x, half, bias, before=linear))
    rewriter.finish()
    new = next(node for node in edited.graph.nodes if node.op == "call_function")
    assert provenance(new) == {"by": "test", "rule": "", "from": ["linear"]}
    edited.save(path)
    after = load_program(path)
    assert str(after) == str(edited)
    for old, new in zip(edited.graph.nodes, after.graph.nodes, strict=True):
        assert provenance(new) == provenance(old)
        assert source_line(new) == source_line(old)
        assert module_path(new) == module_path(old)
    assert source_line(next(n for n in after.graph.nodes if n.op == "call_function")).startswith(__file__)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: Answer(y),
        lambda y: Answer(y, y + 1),
        lambda y: Pair(y, y + 1),
        lambda y: OrderedDict(a=y, b=[y, (y, None)]),
        lambda y: {"n": 3, "y": y, "flag": True},
        lambda y: [y, {"deep": Answer(y, None)}],
    ],
)
def test_outputs_keep_their_types(make: Callable[[Tensor], Any], path: Path) -> None:
    x = torch.randn(2, 3)
    capture(Returning(make), (x,)).save(path)
    found, expected = load_program(path)(x), make(x * 2)
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


def test_inputs_of_a_dataclass_stay_a_harmless_archive(path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, pair: Answer) -> Tensor:
            return pair.value + pair.extra

    inputs = Answer(torch.ones(2), torch.ones(2))
    capture(Sum(), (inputs,)).save(path)
    after = load_program(path)
    assert torch.equal(after(inputs), torch.full((2,), 2.0))
    assert isinstance(after.example_inputs[0][0], Answer)


def test_torch_reads_what_graphopt_writes(path: Path) -> None:
    before = program()
    before.save(path)
    x = torch.randn(2, 4)
    assert torch.equal(torch.export.load(path).module()(x), before(x))


def test_graphopt_reads_what_torch_writes(path: Path) -> None:
    model = Linear().eval()
    x = torch.randn(2, 4)
    torch.export.save(torch.export.export(model, (x,)), path)
    assert torch.equal(load_program(path)(x), model(x))


_FOREIGN = """
import sys
from dataclasses import dataclass
import torch
@dataclass
class Elsewhere:
    y: torch.Tensor
class M(torch.nn.Module):
    def forward(self, x):
        return Elsewhere(x * 2)
"""


@pytest.mark.parametrize("writer", ["graphopt", "torch"])
def test_a_class_not_known_here_is_a_sentence(
    writer: str, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"elsewhere_{writer}"
    (tmp_path / f"{module}.py").write_text(_FOREIGN)
    write = {
        "graphopt": "from graphopt.capture import capture; capture(M(), (torch.ones(2),)).save(sys.argv[1])",
        "torch": (
            f"torch.export.register_dataclass(Elsewhere, serialized_type_name='{module}.Elsewhere'); "
            "torch.export.save(torch.export.export(M(), (torch.ones(2),)), sys.argv[1])"
        ),
    }[writer]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    code = f"from {module} import *\n{write}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], env=environment, check=True, cwd=tmp_path)
    with pytest.raises(GraphoptError, match=f"Elsewhere, which is not known here; import {module} first"):
        load_program(path)
    monkeypatch.syspath_prepend(tmp_path)
    after = load_program(path, trust=True)
    assert type(after(torch.ones(2))).__name__ == "Elsewhere"


class Parts(nn.Module):
    """Two views of one tensor: the second does not begin where the tensor does."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


def test_what_is_loaded_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    program = capture(Parts(), (torch.randn(2, 6),), ({0: torch.export.Dim("batch")},))
    program.save(tmp_path / "first.pt2")
    Program.load(tmp_path / "first.pt2").save(tmp_path / "second.pt2")
    assert (tmp_path / "first.pt2").read_bytes() == (tmp_path / "second.pt2").read_bytes()


# --- Damaged files


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match=r"cannot read .*absent.pt2: No such file"):
        load_program(tmp_path / "absent.pt2")
    with pytest.raises(GraphoptError, match="cannot read"):
        load_program(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 nonsense", os.urandom(4096)])
def test_not_an_archive(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(GraphoptError, match=r"is not a .pt2 archive, or is damaged"):
        load_program(path)


def test_truncated_anywhere(path: Path) -> None:
    path.write_bytes(of_graphopt())
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 20)):
        path.write_bytes(data[:size])
        with pytest.raises(GraphoptError, match=r"damaged|holds no exported program"):
            load_program(path)


def test_a_flipped_byte_in_a_weight_is_noticed(path: Path) -> None:
    path.write_bytes(of_graphopt())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("weights/weight_0"))
    start = entry.header_offset
    name, extra = struct.unpack("<HH", data[start + 26 : start + 30])
    data[start + 30 + name + extra] ^= 1
    path.write_bytes(data)
    with pytest.raises(GraphoptError, match=r"checksum of its member .*weight_0"):
        load_program(path)


Change = Callable[[bytes], bytes]


def tamper(path: Path, changes: dict[str, Change | bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite members of an archive: a function of the old content, new content, or None to drop it."""
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    for name, change in changes.items():
        full = name if name.startswith("/") else f"{root}/{name}"
        if change is None:
            del members[full]
        else:
            members[full] = change(members[full]) if callable(change) else change
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name.lstrip("/"), content)


def test_tampering_itself_is_harmless(path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    path.write_bytes(of_graphopt())
    tamper(path, {})
    load_program(path)
    tamper(path, {}, zipfile.ZIP_DEFLATED)
    load_program(path)


@pytest.mark.parametrize("member", ["models/model.json", "data/sample_inputs/model.pt", "archive_format"])
def test_missing_member(member: str, path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {member: None})
    with pytest.raises(GraphoptError, match="holds no exported program"):
        load_program(path)


@pytest.mark.parametrize(
    "member",
    ["data/weights/weight_0", "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"],
)
def test_missing_weights(member: str, path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {member: None})
    with pytest.raises(GraphoptError):
        load_program(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_broken_json(content: bytes, path: Path) -> None:
    for member in ("models/model.json", "data/weights/model_weights_config.json", "extra/graphopt.json"):
        path.write_bytes(of_graphopt())
        tamper(path, {member: content})
        with pytest.raises(GraphoptError):
            load_program(path)


def test_zip_bomb(path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {"data/weights/weight_9": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    with pytest.raises(GraphoptError, match=r"not a .pt2 archive, or is damaged .* bytes in a file of"):
        load_program(path)


def test_bomb_inside_the_sample_inputs(path: Path) -> None:
    path.write_bytes(of_graphopt())
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    tamper(path, {"data/sample_inputs/model.pt": nested.getvalue()})
    with pytest.raises(GraphoptError, match="refused because its member data/sample_inputs"):
        load_program(path)


@pytest.mark.parametrize("name", ["/../outside", "extra/../../x", "/other/root"])
def test_members_outside_the_root(name: str, path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {name: b"x"})
    with pytest.raises(GraphoptError, match="outside its root folder"):
        load_program(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(path: Path) -> None:
    path.write_bytes(of_graphopt())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/models/model.json", b"{}")
    with pytest.raises(GraphoptError, match=r"two members of one name|members outside|damaged"):
        load_program(path)


def test_a_tensor_larger_than_its_bytes(path: Path) -> None:
    path.write_bytes(of_graphopt())

    def enlarge(content: bytes) -> bytes:
        config = json.loads(content)
        config["config"]["linear.weight"]["tensor_meta"]["sizes"] = [{"as_int": 10**6}, {"as_int": 10**6}]
        return json.dumps(config).encode()

    tamper(path, {"data/weights/model_weights_config.json": enlarge})
    with pytest.raises(GraphoptError, match=r"'linear\.weight' is said to have 1000000000000 elements"):
        load_program(path)


# --- Hostile files: each of these creates a file when torch loads or runs it, and none when graphopt does


class Attack:
    """An object whose unpickling creates `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _edit(change: Callable[[dict[str, Any]], None]) -> Change:
    def edited(content: bytes) -> bytes:
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return edited


def _weight_config(name: str, path_name: str, use_pickle: bool) -> Change:
    def change(data: dict[str, Any]) -> None:
        like = data["config"].get("linear.weight") or {"is_param": False, "tensor_meta": None}
        data["config"][name] = like | {"path_name": path_name, "use_pickle": use_pickle}

    return _edit(change)


def _python(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def _with_expression(code: str) -> Change:
    def change(model: dict[str, Any]) -> None:
        values = model["graph_module"]["graph"]["tensor_values"]
        values["x"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    return _edit(change)


def _with_hidden_expression(code: str) -> Change:
    """The same under a tensor called as a field that holds free text elsewhere."""

    def change(model: dict[str, Any]) -> None:
        graph = model["graph_module"]["graph"]
        meta = json.loads(json.dumps(graph["tensor_values"].pop("x")))
        meta["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}
        text = json.dumps(model).replace('{"name": "x"}', '{"name": "metadata"}')
        model.clear()
        model.update(json.loads(text))
        model["graph_module"]["graph"]["tensor_values"]["metadata"] = meta

    return _edit(change)


def _with_name(marker: Path) -> Change:
    code = f"linear=[__import__('os').mknod({str(marker)!r})]"

    def change(content: bytes) -> bytes:
        data = json.loads(content)
        for node in data["graph_module"]["graph"]["nodes"]:
            node["name"] = node["name"] and node["name"].replace("linear", code)
        text = json.dumps(data)
        return (
            text.replace('"as_tensor": {"name": "linear"}', f'"as_tensor": {{"name": {json.dumps(code)}}}')
            .replace('"linear": {"dtype"', f'{json.dumps(code)}: {{"dtype"')
            .encode()
        )

    return change


def _with_guard(marker: Path) -> Change:
    return _edit(lambda model: model.update(guards_code=[f"{_python(marker)} is None"]))


def _with_call(target: str, text: str) -> Change:
    def change(model: dict[str, Any]) -> None:
        node = json.loads(json.dumps(model["graph_module"]["graph"]["nodes"][0]))
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": text}, "kind": 1}]
        node["outputs"], node["name"] = [{"as_none": True}], "called"
        model["graph_module"]["graph"]["nodes"].append(node)

    return _edit(change)


MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"

ATTACKS: dict[str, tuple[Callable[[Path], dict[str, Change | bytes | None]], str]] = {
    "sample inputs": (
        lambda m: {"data/sample_inputs/model.pt": _saved(((torch.ones(2, 4), Attack(m)), {}))},
        r"data/sample_inputs/model.pt needs more than torch.load\(weights_only=True\)",
    ),
    "plain pickle": (
        lambda m: {"data/sample_inputs/model.pt": pickle.dumps(((Attack(m),), {}), protocol=2)},
        "data/sample_inputs/model.pt needs more than",
    ),
    "pickled weight": (
        lambda m: {"data/weights/weight_7": _saved(Attack(m)), WEIGHTS: _weight_config("w", "weight_7", True)},
        "says use_pickle: true for 'w'",
    ),
    "old weights": (lambda m: {"data/weights/model.pt": _saved({"w": Attack(m)})}, "data/weights/model.pt needs more"),
    "old constants": (lambda m: {"data/constants/model.pt": _saved({"w": Attack(m)})}, "data/constants/model.pt needs"),
    "opaque constant": (
        lambda m: {
            "data/constants/opaque_obj_0": pickle.dumps(Attack(m), protocol=2),
            CONSTANTS: _weight_config("c", "opaque_obj_0", True),
        },
        "opaque_obj_0 is or may be an object that needs unpickling",
    ),
    "symbolic size": (lambda m: {MODEL: _with_expression(_python(m))}, "a symbolic size is more than arithmetic"),
    "hidden symbolic size": (
        lambda m: {MODEL: _with_hidden_expression(_python(m))},
        "a symbolic size is more than arithmetic",
    ),
    "name of a value": (lambda m: {MODEL: _with_name(m)}, "a value of its graph is called"),
    "guard": (lambda m: {MODEL: _with_guard(m)}, "a guard is more than a comparison"),
    "call of Python": (lambda m: {MODEL: _with_call("torch.os.mknod", str(m))}, "its graph calls torch.os.mknod"),
    "import": (
        lambda m: {
            MODEL: _edit(
                lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(
                    out_spec=json.dumps(
                        [
                            1,
                            {
                                "type": "collections.defaultdict",
                                "context": {
                                    "default_factory_module": "graphopt_hostile",
                                    "default_factory_name": "f",
                                    "dict_context": ["y"],
                                },
                                "children_spec": [{"type": None, "context": None, "children_spec": []}],
                            },
                        ]
                    )
                )
            )
        },
        "names a module to import",
    ),
}


# torch 2.13 makes names into identifiers and verifies what a graph calls; nothing promises that it always will.
STOPPED_BY_TORCH = {"name of a value", "call of Python"}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name: str, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "attacked"
    (tmp_path / "graphopt_hostile.py").write_text(f"open({str(marker)!r}, 'w')\nf = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    path.write_bytes(of_torch())
    changes, reason = ATTACKS[name]
    tamper(path, changes(marker))
    with pytest.raises(GraphoptError, match=reason) as refused:
        capture(path)
    assert "refused" in str(refused.value)
    assert "trust=True" in str(refused.value)
    assert not marker.exists()
    # The attack works on a loader that trusts the file, so that the refusal above is what stopped it.
    with contextlib.suppress(Exception):
        capture(path, trust=True)(torch.ones(2, 4))
    assert marker.exists() == (name not in STOPPED_BY_TORCH)
    sys.modules.pop("graphopt_hostile", None)


def test_compiled_libraries_are_refused(path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(GraphoptError, match="is or may be a compiled library"):
        load_program(path)


def test_the_format_before_pt2_is_refused(tmp_path: Path, path: Path) -> None:
    marker = tmp_path / "attacked"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", b"8.8")
        archive.writestr("serialized_example_inputs.pt", _saved(Attack(marker)))
    with pytest.raises(GraphoptError, match=r"outside its root|holds no exported program"):
        load_program(path)
    assert not marker.exists()


def test_operators_that_open_files_are_refused(tmp_path: Path, path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {MODEL: _with_call("torch.ops.aten.from_file.default", str(tmp_path / "f"))})
    with pytest.raises(GraphoptError, match=r"calls torch\.ops\.aten\.from_file"):
        load_program(path)


def test_operators_of_others_need_trust(path: Path) -> None:
    path.write_bytes(of_graphopt())
    tamper(path, {MODEL: _with_call("torch.ops.someone.op.default", "x")})
    with pytest.raises(GraphoptError, match=r"calls torch\.ops\.someone\.op\.default"):
        load_program(path)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(32), Symbol('s53', positive=True, integer=True))",
        "Pow(Symbol('s53', positive=True, integer=True), Integer(2))",
        "Add(Integer(-1), FloorDiv(Symbol('s0'), Integer(2)))",
        "Max(1, s0) + 2*u1",
        "Eq(Symbol('u0', integer=True), Integer(1))",
    ],
)
def test_arithmetic_is_allowed(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "Symbol('x y')",
        "open('f')",
        "9**9**9",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "[s0 for s0 in ()]",
        "lambda: 0",
        "f'{s0}'",
        "s0 if s1 else s2",
        "Symbol('s0', **{})",
        "(" * 500 + ")" * 500,
        "s0;s1",
        "",
    ],
)
def test_anything_but_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        check_expression(text)


@pytest.mark.parametrize("text", ["L['a'].size()[0] == L['b']['k'].size()[1]", "L['mode'] == 'fast'", "L['n'] == 3"])
def test_comparisons_are_allowed(text: str) -> None:
    check_guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "L['x'].__class__",
        "L['x'] == 'a\") or f(\"'",
        "exec('1')",
        "(lambda: 1)()",
        "L['x'].size()[0] == 2**99",
    ],
)
def test_other_guards_are_refused(text: str) -> None:
    with pytest.raises(Refusal):
        check_guard(text)


def test_structures_that_import_are_refused() -> None:
    context = json.dumps({"__enum__": True, "fqn": "os:path", "name": "x"})
    with pytest.raises(Refusal, match="names a module"):
        check_structure(json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}]))


# --- Writing


def test_no_half_written_file_where_the_folder_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GraphoptError, match="cannot write"):
        program().save(tmp_path / "file" / "model.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


_FULL = """
import resource, sys, torch
from pathlib import Path
from graphopt.errors import GraphoptError
from graphopt.ir.archive import load_program
program = load_program(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    program.save(sys.argv[2])
except GraphoptError as error:
    print("SENTENCE", error)
"""


def test_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    before = program()
    before.save(path)
    target = tmp_path / "out" / "model.pt2"
    before.save(target)
    old = target.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", _FULL, str(path), str(target), "5000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"SENTENCE cannot write {target}: File too large"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert target.read_bytes() == old
    assert [entry.name for entry in target.parent.iterdir()] == ["model.pt2"]


def test_save_replaces_and_makes_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model.pt2"
    before = program()
    save_program(before, target)
    save_program(before, target)
    assert [entry.name for entry in target.parent.iterdir()] == ["model.pt2"]
    load_program(target)
