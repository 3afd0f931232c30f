"""`pals-hf`: its list of commands, the help of each command, and the programs of examples/ that share their code."""

import runpy
from configparser import ConfigParser
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from launching import call

import pals_hf
from pals_hf import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_what_is_installed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert name == "pals-hf"
    assert EntryPoint(name, target, "console_scripts").load() is cli.main
    folders = (path.parent.relative_to(ROOT) for path in (ROOT / "pals_hf").rglob("*/__init__.py"))
    subpackages = {".".join(folder.parts) for folder in folders}
    elsewhere = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    assert all((ROOT / folder / "__init__.py").is_file() for folder in elsewhere.values())
    assert set(config["options"]["packages"].split()) == {"pals_hf", *subpackages, *elsewhere}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(arguments):
    result = call(cli.main, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    for name, (_, text) in cli.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in result.stdout.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command):
    result = call(cli.main, command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"pals-hf {command} " in result.stdout
    assert any(line.strip().startswith("--") for line in result.stdout.splitlines())


def test_version():
    assert call(cli.main, "--version").stdout == f"{pals_hf.__version__}\n"


def test_an_unknown_command_ends_in_one_line():
    result = call(cli.main, "segment")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: there is no command 'segment'.")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_unknown_flag_ends_in_one_line(command):
    result = call(cli.main, command, "--bogus", "1")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("run_seg_pals", "train"),
        ("predict", "predict"),
        ("inspect_dataset", "inspect_data"),
        ("push_checkpoint", "push"),
        ("export_onnx", "export"),
        ("app", "demo"),
    ],
)
def test_the_programs_of_examples_are_the_commands(script, module):
    if script == "app":
        pytest.importorskip("gradio", reason="needs the extra `demo`")
    names = runpy.run_path(str(EXAMPLES / f"{script}.py"))
    assert names["main"] is import_module(f"pals_hf.cli.{module}").main


def test_functions_of_a_program_can_be_imported_from_examples():
    assert callable(runpy.run_path(str(EXAMPLES / "predict.py"))["prepare_output_dir"])
    assert callable(runpy.run_path(str(EXAMPLES / "push_checkpoint.py"))["push"])
