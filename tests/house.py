"""The rules of the house: where a line lives, how long a file may be, and who may import whom."""

import ast
import re

import pytest

from tests import faults
from tests.common import HERE

# All files in order: each imports only what stands before it. What a file runs as a program, under
# `if __name__ == "__main__"`, may come later.
ORDER = """
engine/distributed.py engine/read_back.py engine/run.py engine/arrays.py engine/randomness.py engine/presets.py
engine/config.py extras/foreign_checkpoint.py engine/checkpoint.py engine/stored.py
extras/page_style.py extras/svg_curves.py extras/run_facts.py extras/run_page.py engine/status.py
engine/best.py extras/archives.py extras/downloads.py extras/grids.py extras/local_server.py
data.py extras/image_cache.py extras/data_forms.py extras/data_lmdb.py extras/data_arrays.py extras/toy.py
extras/datasets.py
schedule.py extras/schedule_plot.py embedding_diffusion.py losses.py extras/two_tokens.py
extras/vqgan_losses.py vqvae.py extras/published_vqgan.py extras/tokenizer_metrics.py
sample.py extras/meta_count.py extras/price.py extras/sampling_options.py
extras/pictures.py extras/sample_files.py extras/serve.py extras/export.py extras/sample_command.py
extras/inception.py extras/metrics.py fid.py extras/fid_sources.py extras/fid_command.py
engine/batches.py engine/tokens.py extras/tokenizer_report.py engine/prepare.py engine/budget.py train.py
""".split()
OPTIONAL = {"matplotlib",  # packages that may be imported where they are needed, and what some builds lack
            "torch.distributed.fsdp", "torch.distributed.device_mesh", "torch.distributed.tensor"}
LIMITS = {"train.py": 300, "test_all.py": 400, "README.md": 260}
TOP = ["schedule.py", "embedding_diffusion.py", "losses.py", "vqvae.py", "sample.py", "data.py", "fid.py", "train.py",
       "test_all.py", "README.md"]


def files(pattern):
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern) if path.name != "__init__.py")


def length(name):
    return len((HERE / name).read_text().splitlines())


def imported(tree):
    """Names of modules in the import statements below a syntax tree, `from engine import run` as engine.run too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_room():
    """The top level is the tutorial and nothing else; all files are in ORDER, each with a docstring."""
    assert files("*.py") == sorted(name for name in TOP if name.endswith(".py"))
    assert sorted(ORDER) == sorted(files("engine/*.py") + files("extras/*.py")
                                   + [name for name in files("*.py") if name != "test_all.py"])
    for name in ORDER:
        assert ast.get_docstring(ast.parse((HERE / name).read_text())), f"{name} does not say what it is for"


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    """A file imports what stands before it in ORDER, at its top; inside a function only optional packages."""
    tree = ast.parse((HERE / name).read_text())
    module = {file: file[:-3].replace("/", ".") for file in ORDER}
    later = {module[file] for file in ORDER[ORDER.index(name):]}
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    assert not (found := later & set(imported(ast.Module(body, [])))), f"{name} imports {found}, which comes later"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = {module for module in imported(node) if module not in OPTIONAL
                      and module.rpartition(".")[0] not in OPTIONAL}
            assert not inside, f"{name}: {node.name} imports {inside} inside"


def test_lengths():
    """What stands in a room can be read in one sitting."""
    for name in [*TOP, *files("engine/*.py"), *files("extras/*.py")]:
        limit = LIMITS.get(name, 350 if name in TOP else 300)
        assert length(name) <= limit, f"{name} has {length(name)} lines, more than {limit}"


def test_the_table_of_lines():
    """The README names every file of the tutorial with the lines that it has."""
    table = dict(re.findall(r"^\|[^|]*\| `(\w+\.py)` \|.*\| (\d+) \|$", (HERE / "README.md").read_text(), re.M))
    assert table == {name: str(length(name)) for name in TOP if name.endswith(".py")}


def test_links_lead_somewhere():
    """Every relative link, the heading it names, and every file in backquotes of the READMEs is there."""
    for readme in ["README.md", *files("*/*.md")]:
        text, folder = (HERE / readme).read_text(), (HERE / readme).parent
        for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if "://" not in target:
                path = folder / target if target else HERE / readme
                assert path.exists(), f"{readme} links to {target}, which is not there"
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
                slugs = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
                assert not heading or heading in slugs, f"{readme} links to {target}#{heading}, which is not there"
        for name in re.findall(r"`((?:engine|extras|experiments|tests)/\w+\.\w+)`", text):
            assert (HERE / name).exists(), f"{readme} names {name}, which is not there"


def test_faults_are_still_faults():
    """What tests/faults.py would change is still there, exactly once: mend its list with the line that you changed."""
    assert faults.check() == []


def test_no_test_hides_another():
    """All tests meet in test_all.py's one namespace, where the second of a name takes the place of the first."""
    names = [node.name for name in ["test_all.py", *files("tests/*.py")]
             for node in ast.parse((HERE / name).read_text()).body if isinstance(node, ast.FunctionDef)
             and node.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
