"""The project's habits agree: setup.cfg, workflows, pre-commit, the issue form and CONTRIBUTING.md."""

import ast
import configparser
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def jobs_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands_of(job):
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read_string(read("setup.cfg"))
    return parser


@pytest.fixture(scope="module")
def pythons(setup):
    """The Python versions of the classifiers."""
    return re.findall(r"^Programming Language :: Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)


def test_python_versions_agree(setup, pythons):
    jobs = jobs_of(ROOT / ".github" / "workflows" / "tests.yml")
    assert pythons == jobs["tests"]["strategy"]["matrix"]["python-version"]
    assert setup["options"]["python_requires"] == f">={pythons[0]}"
    assert setup["mypy"]["python_version"] == pythons[0]
    assert tomllib.loads(read("ruff.toml"))["target-version"] == f"py{pythons[0].replace('.', '')}"
    lowest_python = [step["with"]["python-version"] for step in jobs["lowest"]["steps"] if "with" in step]
    assert lowest_python == [pythons[0]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_the_test_command_of_the_readme(workflow):
    section = read("README.md").split("\n## Tests\n")[1].split("\n## ")[0]
    pytest_command = re.search(r"pytest -n .*", section)[0]
    for name, job in jobs_of(workflow).items():
        assert job["runs-on"].startswith("ubuntu")  # signals that the package needs are missing on Windows
        expected = ["make quality"] if name == "quality" else [".ci/run", pytest_command]
        assert commands_of(job)[-1] in expected


def test_workflow_triggers():
    # In YAML 1.1 the key `on` is the value true.
    on = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))[True] for path in WORKFLOWS}
    assert set(on["tests"]) == {"push", "pull_request"}
    assert set(on["transformers-main"]) == {"schedule", "workflow_dispatch"}
    assert re.fullmatch(r"\d+ \d+ \* \* \d", on["transformers-main"]["schedule"][0]["cron"])  # weekly


def test_pre_commit_has_the_ruff_of_setup_cfg(setup):
    pinned = re.search(r"^ruff==(.+)$", setup["options.extras_require"]["quality"], re.MULTILINE)[1]
    repos = {repo["repo"].split("/")[-1]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    assert repos["ruff-pre-commit"]["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in repos["ruff-pre-commit"]["hooks"]] == ["ruff-check", "ruff-format"]


def test_types_are_published_and_checked(setup):
    assert (ROOT / "pals_hf" / "py.typed").exists()
    assert setup["options.package_data"]["pals_hf"] == "py.typed"
    for name in setup["mypy"]["files"].split(","):
        assert (ROOT / name.strip()).exists()
    assert "\tmypy\n" in read("Makefile").split("quality:")[1].split("\n\n")[0] + "\n"


def test_transformers_has_an_upper_bound(setup):
    """Each minor version of transformers is tested before it is allowed."""
    assert re.search(r"^transformers>=5\.\d+,<5\.\d+$", setup["options"]["install_requires"], re.MULTILINE)


def test_issue_form():
    assert yaml.safe_load(read(".github/ISSUE_TEMPLATE/config.yml"))["blank_issues_enabled"] is True
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug.yml"))
    assert {"name", "description", "body"} <= set(form)
    assert [field["id"] for field in form["body"]] == ["command", "output", "expected", "versions", "data"]
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])
    versions = form["body"][3]["attributes"]["description"]
    assert "pals-hf --version" in versions
    assert "transformers env" in versions


def test_contributing_lists_every_module():
    """Each file has a line in "Where a line belongs", alone or by its folder, and each line has a file."""
    section = read("CONTRIBUTING.md").split("\n## Where a line belongs\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+/[^`]*)`", row)]
    assert [name for name in listed if not (ROOT / name).exists()] == []
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "pals_hf").rglob("*.py")]
    folders = tuple(name for name in listed if name.endswith("/"))
    unlisted = {name for name in modules if name not in listed and not name.startswith(folders)}
    assert unlisted == {"pals_hf/data/__init__.py"}  # re-exports only


def test_imports_go_one_way():
    """CONTRIBUTING.md lists the modules in layers, and each module imports from its own layer or those before it."""
    chain = read("CONTRIBUTING.md").split("Imports go one way.")[1].split("\n\n")[0]
    layers = [re.findall(r"`(\w+)`", layer) for layer in chain.split("<-")]
    layer_of = {name: number for number, names in enumerate(layers) for name in names}
    for path in (ROOT / "pals_hf").rglob("*.py"):
        parts = path.relative_to(ROOT / "pals_hf").with_suffix("").parts
        if parts == ("__init__",):
            continue  # it imports lazily
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts) and node.module:
                imported = node.module.split(".")[0]
                assert layer_of[imported] <= layer_of[parts[0]], f"{path} imports {imported}"
