"""The README and the pages of `docs/` show code that runs, commands that parse, and links that lead somewhere."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import data_sets
import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from launching import call

from pals_hf import cli
from pals_hf.cli.arguments import TrainArguments
from pals_hf.cli.train import main as train
from pals_hf.cli.train import parse_arguments
from pals_hf.data import synthetic

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "examples" / "README.md"]
TRAINING, CONSOLE = "examples/run_seg_pals.py", "pals-hf"
OTHER_PROGRAMS = ("pip", "pytest")


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


@pytest.fixture
def few_scenes(monkeypatch):
    """Fewer built-in street scenes, to save time."""
    monkeypatch.setattr(synthetic, "NUM_IMAGES", {"train": 40, "validation": 6})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks(page, few_scenes, tmp_path, monkeypatch):
    """The blocks of a page run one after the other in one namespace."""
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"max_steps=\d+", "max_steps=2", "\n".join(blocks(page, "python")))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_the_code_of_the_readme_is_ten_lines():
    assert len([line for line in "".join(blocks(README, "python")).splitlines() if line]) == 10


# ---- Commands ----


def commands(page):
    """The commands of a page's shell blocks, as words without variables."""
    for line in re.sub(r"\\\n", " ", "".join(blocks(page, "bash"))).splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def program_of(words):
    """The program that a command starts - a script or `pals-hf COMMAND` - and its arguments."""
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
        return launch.training_script, launch.training_script_args
    if words[0] == CONSOLE:
        return f"{CONSOLE} {words[1]}", words[2:]
    if words[0] == "python":
        return words[1], words[2:]
    return words[0], words[1:]


@functools.cache
def help_of(program):
    """The help of a program with all its options, or None if it needs a package that is not installed."""
    name, *command = program.split()
    if name == CONSOLE:
        module = cli.COMMANDS[command[0]][0]
        return call(cli.main, *command, "--help_all" if module in ("train", "inspect_data") else "--help").stdout
    command = [sys.executable, ROOT / program, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if "ModuleNotFoundError" in result.stderr else result.stdout


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*", text))


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=shlex.join(words)) for page in PAGES for words in commands(page)]
)
def test_command(words, monkeypatch):
    """The program exists, has the options, and for a training their values are accepted, too."""
    monkeypatch.chdir(ROOT)
    program, arguments = program_of(words)
    if program in OTHER_PROGRAMS:
        return
    is_training = program in (TRAINING, f"{CONSOLE} train")
    assert program.startswith(CONSOLE) or (ROOT / program).is_file()
    known = help_of(f"{CONSOLE} train" if is_training else program)
    if known is None:
        pytest.skip(f"{program} needs a package that is not installed")
    assert options_in(" ".join(word for word in arguments if word.startswith("--"))) <= options_in(known)
    if is_training:
        parse_arguments([*arguments, "--bf16", "False"], TrainArguments)  # a recipe's bf16 needs a GPU


def test_the_first_command_of_the_readme():
    """`test_run_seg_pals.py` runs this command."""
    first, second = list(commands(README))[:2]
    assert first == ["pip", "install", "-e", "."]
    assert second == ["accelerate", "launch", TRAINING, "--train_fraction", "0.5"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_the_text(page):
    """Every `--option` in the text is one of `pals-hf`, of the launcher, or of a program that the page names."""
    launcher = {word for action in launch_command_parser()._actions for word in action.option_strings}
    ours = options_in(" ".join(help_of(f"{CONSOLE} {command}") for command in cli.COMMANDS))
    named = [ROOT / "examples" / name for name in re.findall(r"\w+\.py", text_of(page))]
    of_programs = options_in(" ".join(text_of(path) for path in named if path.is_file()))
    shown = " ".join(re.findall(r"`([^`]+)`", without_blocks(page)))
    assert options_in(shown) <= ours | launcher | of_programs | {"--help", "--help_all"}


# ---- Data sources ----


def data_rows():
    """The flags of the table of data sources."""
    text = text_of(ROOT / "docs" / "data.md")
    table = text[text.index("| data | flags |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return [(name, flags.strip("`").split()) for name, flags, _ in rows[1:] if "OWNER" not in flags]


@pytest.mark.parametrize(("name", "flags"), data_rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_source_of_the_table(name, flags, folder, few_scenes, tmp_path, monkeypatch):
    """Each command on a fixture in the layout it is for; the Hub is tested with the Hub's own client."""
    monkeypatch.chdir(tmp_path)
    data_sets.cityscapes(tmp_path / "cityscapes")
    data_sets.voc2012(tmp_path, trainaug=True)
    data_sets.ade20k(tmp_path)
    data_sets.camvid(tmp_path / "CamVid")
    data_sets.color_folder(tmp_path / "my_colors")
    data_sets.parquet(tmp_path / "my_parquet")
    load_dataset(str(tmp_path / "my_parquet")).save_to_disk(tmp_path / "my_saved")
    (tmp_path / "my_saved" / "id2label.json").write_text('["ground", "wall", "sky"]')
    folder.rename(tmp_path / "my_data")
    if "my_data" in flags:
        flags = [*flags, "--void_labels", "11"]
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]
    short += ["--eval_strategy", "no", "--save_strategy", "no"]
    train([*flags, *short, "--output_dir", "run", "--crop_size", "32", "32", "--train_count", "2"])
    assert (tmp_path / "run" / "model.safetensors").exists()


# ---- Text ----


def test_the_readme_is_short():
    assert len(text_of(README).split()) <= 1000


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_page_begins_with_its_question(page):
    assert re.fullmatch(r"# .+\?", text_of(page).splitlines()[0])


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_in_the_readme():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", text_of(README))
    assert {name_of(page) for page in DOCS} <= set(linked)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_token_is_left(page):
    """Fails until every `@TOKEN@`, which stands for a measurement, has been replaced."""
    assert re.findall(r"@[A-Z0-9_]+@", text_of(page)) == []
