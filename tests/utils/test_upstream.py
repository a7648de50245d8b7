"""What is taken from other libraries is there, under the names and with the parameters that megarl relies on."""

import ast
import importlib
import inspect
import logging
import re
from pathlib import Path
from types import ModuleType

import pytest

from megarl.utils import upstream
from megarl.utils.upstream import BORROWED, READ, REPLACED, TESTED, Borrowed, check_versions, replace, replace_entry

ROOT = Path(upstream.__file__).parents[1]
LIBRARIES = ("torch", "megatron", "sglang", "ray")


@pytest.fixture(scope="module", autouse=True)
def importable():
    from megarl.parallel import mcore_cpu
    from megarl.rollout import cpu_shims

    mcore_cpu.install()
    cpu_shims.install()


def owner_of(borrowed: Borrowed):
    """The module, or the class in it."""
    module, _, rest = borrowed.owner, "", ""
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}".strip(".")
    for name in filter(None, rest.split(".")):
        found = getattr(found, name)
    return found


def parameters(owner, name: str) -> tuple[str, ...]:
    """Of the library's own function, by its source: what is there may have been replaced."""
    tree = ast.parse(inspect.getsource(owner))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    arguments = functions[-1].args
    return tuple(argument.arg for argument in arguments.args + arguments.kwonlyargs)


@pytest.mark.parametrize("borrowed", BORROWED, ids=lambda borrowed: f"{borrowed.owner}:{borrowed.names[0]}")
def test_every_name_exists(borrowed):
    owner = owner_of(borrowed)
    for name in borrowed.names:
        if borrowed.in_instances:
            sources = [inspect.getsource(one) for one in owner.__mro__ if one.__module__ != "builtins"]
            assert any(re.search(rf"\bself\.{name}\b|^    {name}:", source, re.M) for source in sources), name
        else:
            assert hasattr(owner, name), name
        if borrowed.parameters:
            assert parameters(owner, name)[: len(borrowed.parameters)] == borrowed.parameters
    for file in borrowed.where.split(", "):
        text = (ROOT / file).read_text()
        assert all(name in text for name in borrowed.names), file


def test_the_versions_are_those_that_are_installed_for_the_tests():
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT.parent / "requirements" / "cpu.txt").read_text(), re.M))
    for name, tested in TESTED.items():
        assert f"{pinned[name].partition('+')[0]}.".startswith(f"{tested}."), name


def test_another_version_is_said_with_the_files_that_depend_on_it(monkeypatch, caplog):
    check_versions(*TESTED)
    assert caplog.text == ""
    monkeypatch.setitem(TESTED, "sglang", "0.5.2")  # a beginning of the number is not the number
    with caplog.at_level(logging.WARNING):
        check_versions("sglang", "torch")
    (record,) = caplog.records
    assert "is installed; megarl replaces and reads insides of 0.5.2" in record.getMessage()
    assert "rollout/shared_pixels.py" in record.getMessage()


def test_what_is_gone_or_not_listed_is_not_replaced(monkeypatch):
    module = ModuleType("sglang.gone")
    monkeypatch.setattr(upstream, "BORROWED", (Borrowed("sglang.gone", ("old", "TABLE"), REPLACED, "a.py", "why"),))
    with pytest.raises(AttributeError, match=r"sglang\.gone\.old does not exist in sglang 0.*; megarl/a\.py"):
        replace(module, "old", 1)
    with pytest.raises(AttributeError, match=r"sglang\.gone\.new is not in megarl\.utils\.upstream\.BORROWED"):
        replace(module, "new", 1)
    module.old, module.TABLE = 0, {"there": 1}
    replace(module, "old", 1)
    replace_entry(module, "TABLE", "there", 2)
    assert (module.old, module.TABLE) == (1, {"there": 2})
    with pytest.raises(KeyError, match="TABLE"):
        replace_entry(module, "TABLE", "gone", 2)


def sources():
    return {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def test_every_private_name_is_listed():
    """Imported with an underscore, or read with one from what is no name of megarl's own."""
    trees, ours, used = sources(), set(), {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    ours.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    ours.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in LIBRARIES:
                    private = re.search(r"\._", module) is not None
                    used |= {one.name: path for one in names if private or one.name.startswith("_")}
                case ast.Attribute(attr=name) if re.match(r"_[a-z]", name):
                    used.setdefault(name, path)
    listed = {name for borrowed in BORROWED for name in borrowed.names}
    listed |= {part for borrowed in BORROWED for part in borrowed.owner.split(".")}
    builtin = {"_exit"}  # of os
    assert {name: str(path) for name, path in used.items() if name not in listed | ours | builtin} == {}


def test_nothing_is_replaced_past_the_list():
    """An assignment to a name of an imported module or class."""
    found = []
    for path, tree in sources().items():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                library = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if (library or "").partition(".")[0] in LIBRARIES:
                    imported |= {(one.asname or one.name).partition(".")[0] for one in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                root = node.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in imported:
                    found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert found == ["parallel/mcore_cpu.py: moe_utils.te_general_gemm"]  # which mcore reads and never binds


def test_every_reason_is_one_of_three():
    assert {borrowed.how for borrowed in BORROWED} == {REPLACED, READ, upstream.OVERRIDDEN}
