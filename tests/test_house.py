"""The rules of the house: how long rooms and files may be, who may import whom, where links lead."""

import ast
import graphlib
import re

import pytest

from tests.common import HERE

ROOMS = {"top": (2300, 310), "engine": (1600, 290), "extras": (2900, 230), "experiments": (1700, 400),
         "tests": (4400, 450)}  # lines of a room, of one file
FILES = {room: sorted(HERE.glob("*.py" if room == "top" else f"{room}/*.py")) for room in ROOMS}
TEXTS = {path: path.read_text() for path in sum(FILES.values(), [])}
READMES = sorted([*HERE.glob("*.md"), *HERE.glob("[!.]*/*.md")])
METHOD = ["vqvae", "schedule", "embedding_diffusion", "losses", "sample"]  # each may use those before it
FOR_THE_METHOD = ["engine.distributed", "engine.randomness"]
BELOW = {"engine": ["method"], "data": ["engine", "method"]}  # train and extras may use all but train
OPTIONAL = {"matplotlib", "lmdb"}  # packages that a function may import


def imports(tree):
    """Names of modules that a syntax tree imports; `from engine import run` is engine and engine.run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def may_use(module, used):
    if module in METHOD:
        return used in FOR_THE_METHOD + METHOD[:METHOD.index(module)]
    floor, floor_of_used = ("method" if name in METHOD else name.partition(".")[0] for name in (module, used))
    return used != "train" and (floor not in BELOW or floor_of_used in [floor, *BELOW[floor]])


@pytest.mark.parametrize("room", ROOMS)
def test_lengths(room):
    """A room and a file can be read in one sitting; every file says what it is for."""
    most, longest = ROOMS[room]
    lengths = {path.name: len(TEXTS[path].splitlines()) for path in FILES[room]}
    assert sum(lengths.values()) <= most
    assert [name for name, n in lengths.items() if n > (400 if name == "test_all.py" else longest)] == []
    assert [path.name for path in FILES[room] if not ast.get_docstring(ast.parse(TEXTS[path]))] == []


def test_lengths_of_all():
    """Lines, and bytes, so that nothing is won by longer lines."""
    assert sum(len(text.splitlines()) for text in TEXTS.values()) <= 12_500
    assert sum(len(text.encode()) for text in TEXTS.values()) <= 680_000
    assert [path for path, text in TEXTS.items() if re.search("^.{111}", text, re.M)] == []


def test_imports_run_one_way():
    """The method, engine/, data, extras/, train: nothing above is imported, and there is no circle."""
    graph, wrong = {}, []
    rooms = [path for room in ("top", "engine", "extras") for path in FILES[room] if path.stem != "test_all"]
    modules = {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in rooms}
    for module, path in modules.items():
        tree = ast.parse(TEXTS[path])
        # `if __name__ == "__main__"` is exempt: a file may hand its command line to extras/
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__")]
        graph[module] = set(imports(tree)) & modules.keys()
        wrong += [(module, used) for used in graph[module] if not may_use(module, used)]
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            wrong += [(module, used) for used in imports(function) if used.partition(".")[0] not in OPTIONAL]
    assert wrong == []
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(HERE)))
def test_links_lead_somewhere(path):
    """Every relative link, the heading it names, and every file in backquotes is there."""
    text = path.read_text()
    for target, heading in re.findall(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if heading else []
        slugs = ["", *(re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings)]
        assert heading in slugs, f"{target}#{heading}"
    for name in re.findall(r"`((?:engine|extras|experiments|tests)/\w+\.\w+)`", text):
        assert (HERE / name).exists(), name
