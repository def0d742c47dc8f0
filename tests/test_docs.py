"""The documents say what is true: commands parse, flags exist, links lead somewhere, snippets compile."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import mutations, readme_picture
from budgetvlm import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "experiments", "log") for path in (ROOT / folder).rglob("*.md"))]
)
GUIDES = [ROOT / "experiments/controller/README.md", ROOT / "experiments/controller/README.en.md"]
TRAIN_SCRIPT = "experiments/controller/train_controller.py"
GUIDE_FLAGS = {
    "exp5_dir", "exp6_dir", "dataset_name", "model_path", "output_data_path", "force_recompute", "output_dir",
    "batch_size", "num_epochs", "lr", "group_size", "train_split",
    "reward_alpha", "reward_beta", "reward_gamma", "reward_delta", "reward_epsilon",
}  # fmt: skip

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[p.relative_to(ROOT).as_posix() for p in DOCUMENTS])


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """The commands of the shell blocks, each as its words, comments left out."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))


@each_document
def test_links_lead_to_files_that_exist(path):
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert [target for target in local if not (path.parent / target).exists()] == []


@each_document
def test_python_snippets_compile(path):
    for number, block in enumerate(blocks(path, "python"), 1):
        compile(block, f"{path.name}:snippet {number}", "exec")


@each_document
def test_shell_commands_would_be_accepted(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for words in commands(path):
        if words[0] == "budgetvlm":
            cli.command_parser(words[1]).parse_args(words[2:])
        elif words[0] == "make":
            assert set(words[1:]) <= targets, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words[1]
            assert flags(" ".join(words[2:])) <= flags(help_of(words[1])), words


READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_the_readme_is_short(readme):
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 90


def test_the_annotated_tree_of_the_architecture_names_what_exists_and_leaves_no_room_out():
    tree = next(b for b in blocks(ROOT / "ARCHITECTURE.md", "text") if "src/budgetvlm/" in b)
    folder, named = ROOT, set()
    for line in filter(str.strip, tree.splitlines()):
        name, indented = line.split()[0], line.startswith(" ")
        path = (folder if indented else ROOT) / name
        assert path.exists(), line
        named.add(path)
        folder = folder if indented else path
    package = ROOT / "src" / "budgetvlm"
    rooms = {path.parent for path in package.glob("*/__init__.py")} | set(package.glob("[a-z]*.py"))
    assert rooms - named == set()


def test_the_readmes_picture_and_table_show_the_figures_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    curves = readme_picture.read_curves(results)
    drawn = ElementTree.parse(readme_picture.PICTURE).getroot().find(".//{*}description")
    assert drawn is not None and drawn.text == curves.to_json(), "run python benchmarks/readme_picture.py"
    for readme in READMES:
        figures = [re.findall(r"[\d.]+", line) for line in readme.read_text(encoding="utf-8").splitlines()]
        for values in curves.accuracy.values():
            assert any([f"{value}" for value in values] == found[-len(values) - 1 : -1] for found in figures), readme


def test_the_guides_flags_exist():
    assert flags(help_of(TRAIN_SCRIPT)) >= GUIDE_FLAGS


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_the_guide_explains_every_flag_of_the_original(guide):
    listed = set(re.findall(r"^- `--([a-z_0-9]+)`", guide.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert listed >= GUIDE_FLAGS - {"output_dir"}
    assert listed <= flags(help_of(TRAIN_SCRIPT)), "the guide explains a flag that the script lacks"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_the_guides_defaults_are_the_scripts(guide):
    spec = importlib.util.spec_from_file_location("train_controller", ROOT / TRAIN_SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = guide.read_text(encoding="utf-8")
    stated = re.findall(r"^- `--(\w+)`.*(?:默认|default )([a-z0-9.-]+)", text, flags=re.MULTILINE)
    assert len(stated) >= 11
    for flag, value in stated:
        default = script.parser().get_default(flag)
        assert type(default)(value) == default, flag


def test_both_guides_show_the_same_commands_and_snippets():
    chinese, english = GUIDES
    assert commands(chinese) == commands(english)
    code = [[re.sub(r"\s*#.*", "", block) for block in blocks(guide, "python")] for guide in GUIDES]
    assert code[0] == code[1]


def test_the_guides_snippet_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """With the bundled controller in the place of the trained one, as a checkpoint that training writes."""
    import torch

    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.vlm.loading import bundled_controller

    controller = load_controller(bundled_controller("reference"))
    saved = {"controller_config": controller.config, "controller_state_dict": controller.state_dict()}
    (tmp_path / "checkpoints/controller").mkdir(parents=True)
    torch.save(saved, tmp_path / "checkpoints/controller/best_checkpoint.pt")
    shutil.copy(ROOT / "examples/signs.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(blocks(GUIDES[1], "python")[0], {"__name__": "snippet"})
    assert capsys.readouterr().out.split()[0] in ("X85", "85")


def test_both_readmes_show_the_same_commands():
    assert commands(ROOT / "README.md") == commands(ROOT / "README.zh-CN.md")


def test_the_worked_example_of_the_collapse_is_what_the_code_computes():
    import torch

    from budgetvlm.controller.grpo import compute_advantages
    from budgetvlm.controller.reward import constrained_reward

    text = (ROOT / "experiments/controller/GRPO_CONTROLLER_DESIGN.md").read_text(encoding="utf-8")
    accuracy = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    latency = torch.tensor([0.25, 0.5, 0.75, 1.0])
    rewards = constrained_reward(accuracy, latency, 1.0, torch.tensor(0.01))
    share = torch.tensor([0.8, 0.2])
    for scale, digits in (("none", 5), ("group", 3)):
        push = share @ compute_advantages(rewards, scale)
        for value in push.tolist():
            assert f"{value:+.{digits}f}".replace("0.", ".").replace("-", "−") in text, (scale, value)


def test_the_reward_example_of_the_design_is_what_the_code_computes():
    import torch

    from budgetvlm.controller.reward import guide_reward
    from budgetvlm.controller.training_options import RewardWeights

    text = (ROOT / "experiments/controller/GRPO_CONTROLLER_DESIGN.md").read_text(encoding="utf-8")
    accuracy, latency = torch.tensor([0.85, 0.70]), torch.tensor([0.95, 0.40])
    rewards = guide_reward(accuracy, latency, torch.tensor(1.0), torch.tensor([1.0, 0.4]), RewardWeights())
    assert all(f"= {reward:.3f}".replace("0.", ".") in text for reward in rewards.tolist())
    assert rewards[1] > rewards[0]


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/guarantee.md"])
def test_every_test_that_a_document_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert named
    for file, function in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in source, f"{file}::{function}"


def test_the_constants_of_the_guarantee_are_those_of_the_sources():
    text = (ROOT / "docs/guarantee.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    assert len(stated) >= 20
    for name, value, module in stated:
        assert constants(ROOT / "src" / "budgetvlm" / module).get(name) == value, (name, module)


def constants(path: Path) -> dict[str, str]:
    """The constants that a module assigns, several in one line too, each with the source of its value."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            targets, values = [ast.unparse(node.targets[0])], [ast.unparse(node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets, values = (
                    [ast.unparse(part) for part in parts.elts] for parts in (node.targets[0], node.value)
                )
            found |= dict(zip(targets, values, strict=True))
    return found


def test_the_mutations_of_contributing_can_be_applied():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for mutation in mutations.MUTATIONS:
        assert f"| {mutation.name} | `{mutation.file}` | `{mutation.test}` |" in text, mutation.name
        mutations.applied(mutation)
