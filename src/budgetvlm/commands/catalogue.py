"""All commands of `budgetvlm`: their modules, what they are for, and examples that the help shows."""

from __future__ import annotations

import argparse
import importlib

from budgetvlm.commands.parser import Parser

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("budgetvlm.commands.quickstart", "all of the below with the bundled model and task, in minutes"),
    "profile": ("budgetvlm.commands.profile", "measure accuracy or latency of every setting of the knobs"),
    "rescore": ("budgetvlm.commands.rescore", "score the answers that were profiled by another metric"),
    "prepare": ("budgetvlm.commands.prepare", "join both profiles into a table and extract the features"),
    "import": ("budgetvlm.commands.import_results", "make a table from results of other programs"),
    "train": ("budgetvlm.commands.train", "train a controller with GRPO on a table and its features"),
    "calibrate": ("budgetvlm.commands.calibrate", "fit the guard to this machine from a few requests"),
    "adapt": (
        "budgetvlm.commands.adapt",
        "adapt a controller to another machine, budgets or model from little",
    ),
    "evaluate": ("budgetvlm.commands.evaluate", "compare the controller with simple policies on held-out samples"),
    "compare": ("budgetvlm.commands.compare", "compare every policy, simple and strong, on one table"),
    "report": ("budgetvlm.commands.report", "one HTML file about what was measured, learnt and chosen"),
    "explain": ("budgetvlm.commands.explain", "why a setting is chosen for an image, a question and a budget"),
    "ask": ("budgetvlm.commands.ask", "answer a question about an image within a budget"),
    "serve": ("budgetvlm.commands.serve", "answer OpenAI clients, each request within its budget"),
    "versions": ("budgetvlm.commands.manage_versions", "list, compare, promote and take back versions of a controller"),
    "update": ("budgetvlm.commands.update", "improve a controller by the scores of what it served, once proven"),
    "bench": ("budgetvlm.commands.bench", "measure this project's speed claims on your machine"),
    "check-model": ("budgetvlm.commands.check_model", "list the knobs of a model and prove that they work"),
    "export": ("budgetvlm.commands.export", "write a model at one setting as a checkpoint for other engines"),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("budgetvlm quickstart",),
    "profile": (
        "budgetvlm profile accuracy --model_path reference --dataset_name signs --split train,validation,test \\\n"
        "      --num_samples 1500 --output_dir ./results/profiling/exp5_accuracy",
        "budgetvlm profile latency --model_path reference --dataset_name signs --split train,validation,test \\\n"
        "      --num_samples 60 --output_dir ./results/profiling/exp6_latency",
    ),
    "rescore": (
        "budgetvlm rescore --dataset_name receipts --metric relaxed --output_dir ./results/profiling/exp5_relaxed",
    ),
    "prepare": (
        "budgetvlm prepare --model_path reference --dataset_name signs \\\n"
        "      --exp5_dir ./results/profiling/exp5_accuracy --exp6_dir ./results/profiling/exp6_latency \\\n"
        "      --output_data_path ./data/controller_training_data.json",
    ),
    "import": (
        "budgetvlm import lmms --run 'max_crops=4,top_k=8,num_active_blocks=16=logs/a' \\\n"
        "      --run 'max_crops=12,top_k=8,num_active_blocks=16=logs/b' --metric exact_match --output ./data/T.parquet",
        "budgetvlm import table --input results.csv --column score=accuracy --column latency_ms=time \\\n"
        "      --latency_unit s --features F.npz --output ./data/T.parquet",
        "budgetvlm import profiles --exp5_dir ./results/exp5 --exp6_dir ./results/exp6 --dataset_name text_vqa \\\n"
        "      --features F.npz --output ./data/T.parquet",
    ),
    "train": (
        "budgetvlm train --data ./data/controller_training_data.json --output_dir ./checkpoints/controller",
        "budgetvlm train --table T.parquet --features F.safetensors --output_dir ./checkpoints/controller",
    ),
    "calibrate": (
        "budgetvlm calibrate --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json \\\n"
        "      --samples 50 --alpha 0.05",
    ),
    "adapt": (
        "budgetvlm adapt --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json \\\n"
        "      --requests 50 --output_dir ./checkpoints/here",
        "budgetvlm adapt --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json \\\n"
        "      --budget_ms 20 40 80 --price 0.05",
        "budgetvlm adapt --from earlier.json,earlier2.json --data new/few.json --output_dir ./checkpoints/new",
    ),
    "evaluate": (
        "budgetvlm evaluate --data ./data/controller_training_data.json --checkpoint ./checkpoints/controller",
        "budgetvlm evaluate --table T.parquet --features F.safetensors --checkpoint ./checkpoints/controller --json",
        "budgetvlm evaluate --live --checkpoint ./checkpoints/controller --num_requests 1500",
    ),
    "compare": (
        "budgetvlm compare --data ./data/controller_training_data.json --output_dir ./results/compare",
        "budgetvlm compare --table T.parquet --quick",
    ),
    "report": (
        "budgetvlm report --data ./data/controller_training_data.json --checkpoint ./checkpoints/controller \\\n"
        "      --output report.html",
    ),
    "explain": (
        'budgetvlm explain --image photo.png --question "read the sign in red" --budget_ms 40 \\\n'
        "      --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json",
    ),
    "ask": (
        'budgetvlm ask --image photo.png --question "read the sign in red" --budget_ms 40 \\\n'
        "      --checkpoint ./checkpoints/controller",
    ),
    "serve": ("budgetvlm serve --model_path reference --budget_ms 100 --port 8000",),
    "versions": (
        "budgetvlm versions list --checkpoint ./checkpoints/controller",
        "budgetvlm versions rollback --checkpoint ./checkpoints/controller",
    ),
    "update": (
        "budgetvlm update --requests requests.sqlite --checkpoint ./checkpoints/controller",
        "budgetvlm update --requests requests.sqlite --checkpoint ./checkpoints/controller --scores shadow --dry_run",
    ),
    "bench": (
        "budgetvlm bench --quick",
        "budgetvlm bench --sections decision overhead --data ./data/controller_training_data.json \\\n"
        "      --checkpoint ./checkpoints/controller --json",
    ),
    "check-model": (
        "budgetvlm check-model reference",
        "budgetvlm check-model ./models/llava-v1.6-mistral-7b --device cuda --quick",
        "budgetvlm check-model --engine http://127.0.0.1:8000/v1 --model_path ./models/SmolVLM-Instruct",
    ),
    "export": ("budgetvlm export --model_path reference --num_active_blocks 4 --top_k 2 --output ./exported",),
}


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; imports that command's module and no other."""
    module = importlib.import_module(COMMANDS[name][0])
    examples = EXAMPLES[name]
    epilog = "\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples])
    parser = Parser(prog=f"budgetvlm {name}", description=(module.__doc__ or "").strip(), epilog=epilog)
    module.add_arguments(parser)
    parser.set_defaults(run=parser.get_default("run") or module.run)
    return parser
