"""The guide's layout: its scripts run from the repository root, with its flags, and its names can be imported."""

import importlib
import shlex
import sys
from pathlib import Path

import pytest
import torch
from planted_tables import tiny

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "experiments/controller/train_controller.py"
FLAGS = """--exp5_dir --exp6_dir --dataset_name --model_path --output_data_path --force_recompute --output_dir
    --batch_size --num_epochs --lr --group_size --train_split --reward_alpha --reward_beta --reward_gamma --reward_delta
    --reward_epsilon --objective --feature_dim --seed --resume --overwrite --device --price""".split()


@pytest.fixture
def script(monkeypatch):
    """The script as a module, imported as from the repository root."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("experiments.controller.train_controller")


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """Stands in for the preparation; remembers what it was asked for."""
    from budgetvlm.profiling.prepare import preparation as module

    calls = []

    def prepare(options, *, force_recompute):
        calls.append({**vars(options), "dataset_name": options.dataset_name, "force_recompute": force_recompute})
        table, features = tiny()
        return module.PreparedData(table, features, options.output_data_path)

    monkeypatch.setattr(module, "prepare", prepare)
    return calls


def test_every_flag_of_the_guide_is_there_with_its_default(script):
    parser = script.parser()
    assert set(FLAGS) <= set(parser._option_string_actions)
    args = parser.parse_args([])
    assert (args.batch_size, args.num_epochs, args.lr, args.group_size, args.train_split) == (64, 100, 1e-4, 8, 0.8)
    weights = [getattr(args, f"reward_{name}") for name in ("alpha", "beta", "gamma", "delta", "epsilon")]
    assert weights == [1.0, 0.5, 10.0, 0.1, 0.05]
    assert args.objective == "constrained"


def guide_command(tmp_path: Path, *more: str) -> list[str]:
    words = ["--exp5_dir", tmp_path / "exp5", "--exp6_dir", tmp_path / "exp6", "--dataset_name", "text_vqa"]
    return [
        str(word) for word in (*words, "--model_path", "my model", "--output_data_path", tmp_path / "d.json", *more)
    ]


def test_without_output_dir_it_prepares_and_prints_the_command_that_trains(script, prepared, tmp_path, capsys):
    assert script.main(guide_command(tmp_path, "--force_recompute", "--reward_gamma", "5", "--seed", "3")) == 0
    options = prepared[0]
    assert (options["exp5_dir"], options["exp6_dir"]) == (tmp_path / "exp5", tmp_path / "exp6")
    assert (options["dataset_name"], options["model_path"]) == ("text_vqa", "my model")
    assert options["output_data_path"] == tmp_path / "d.json"
    assert options["force_recompute"] is True and options["seed"] == 0 and options["train_split"] == 0.8
    printed = capsys.readouterr().out
    command = printed[printed.index("python experiments") :].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:2] == ["python", SCRIPT]
    again = script.parser().parse_args(words[2:])
    assert (again.output_dir, again.force_recompute, again.group_size) == (Path("checkpoints/controller"), False, 8)
    assert (again.model_path, again.reward_gamma, again.seed) == ("my model", 5.0, 3)


def test_the_training_command_trains_and_a_second_time_says_how_to_choose(script, prepared, tmp_path, capsys):
    words = guide_command(tmp_path, "--output_dir", str(tmp_path / "out"), "--batch_size", "64", "--num_epochs", "2",
                          "--lr", "1e-4", "--group_size", "8")  # fmt: skip
    assert script.main(words) == 0
    assert "maximised (objective constrained): accuracy" in capsys.readouterr().out
    training = torch.load(tmp_path / "out" / "best_checkpoint.pt")["training"]
    assert training["grpo"]["num_generations"] == 8
    prepared.clear()
    assert script.main(words) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
    assert not prepared  # said before the long work, not after it
    assert script.main([*words, "--resume"]) == 0
    assert script.main([*words, "--overwrite", "--objective", "reward"]) == 0
    assert "maximised (objective reward): 1 accuracy - 0.5 sigmoid" in capsys.readouterr().out


def test_the_guides_third_step(script, prepared, tmp_path):
    script.main(guide_command(tmp_path, "--output_dir", str(tmp_path / "out"), "--num_epochs", "1"))
    GRPOController = importlib.import_module("experiments.controller.controller_model").GRPOController
    _, features = tiny()
    image_feat, lang_feat = torch.from_numpy(features.image[:1]), torch.from_numpy(features.language[:1])
    budget = torch.tensor([25.0])

    checkpoint = torch.load(tmp_path / "out" / "best_checkpoint.pt")
    controller = GRPOController(**checkpoint["controller_config"])
    controller.load_state_dict(checkpoint["controller_state_dict"])
    controller.eval()
    with torch.no_grad():
        logits = controller(image_feat, lang_feat, budget)
        actions = controller.sample_actions(logits, deterministic=True)
        assert actions["max_crops"].item() in (1, 4)
        assert actions["top_k"].item() in (2, 8)


def test_wrong_flags_are_refused_before_the_data_is_prepared(script, prepared, tmp_path, capsys):
    assert script.main(guide_command(tmp_path, "--group_size", "1")) == 2
    assert "at least 2 settings" in capsys.readouterr().err
    assert script.main(guide_command(tmp_path, "--resume")) == 2
    assert "--output_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        script.main(guide_command(tmp_path, "--reward_apha", "1"))
    assert "Did you mean --reward_alpha?" in capsys.readouterr().err
    assert not prepared


def test_an_interruption_ends_with_130(script, tmp_path, monkeypatch):
    from budgetvlm.profiling.prepare import preparation as module

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", interrupted)
    assert script.main(guide_command(tmp_path)) == 130


def test_as_a_program_missing_results_are_one_message_without_a_traceback(run_script, tmp_path):
    done = run_script(SCRIPT, "--exp5_dir", tmp_path / "none", "--exp6_dir", tmp_path / "none",
                      "--dataset_name", "signs", "--output_data_path", tmp_path / "d.json", timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_names_of_the_guide_can_be_imported_from_the_repository_root(run_script):
    code = (
        "from experiments.controller.controller_model import GRPOController\n"
        "from experiments.controller.grpo_trainer import GRPOConfig, GRPOTrainer\n"
        "print(GRPOConfig(num_generations=8).group_size)"
    )
    done = run_script("-c", code)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_help_is_there_and_quick_to_read(run_script):
    done = run_script(SCRIPT, "--help")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in FLAGS)
    assert sys.executable not in done.stdout
