"""Apply small changes that break what the project promises, and check that the tests named for each one fail.

    python benchmarks/mutations.py                # all mutations, a few minutes
    python benchmarks/mutations.py --only cut     # those whose name contains "cut"

Each mutation is applied to a copy of the sources and tests in a temporary folder; the repository is not touched. The
exit code is 1 if a mutation survives. The table in CONTRIBUTING.md lists the same mutations, which a test checks.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "benchmarks", "experiments", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutation:
    """A change of one line, and the test that has to notice it.

    Attributes:
        name: what the change does, in words.
        file: path below ``src/budgetvlm``.
        before: text that stands exactly once in the file. after: what replaces it.
        test: ``test_file.py::test_name``.
    """

    name: str
    file: str
    before: str
    after: str
    test: str


CUTS = 'return cut == "always" or not (promised and may_be_late)'
MASK = "allowed = controller.allowed(controller.feasible(budget, bounds) & measured)"
MUTATIONS = [
    Mutation(
        '`cut="needed"` always cuts', "answer.py", CUTS, "return True",
        "test_calibration.py::test_which_answers_are_cut",
    ),
    Mutation(
        '`cut="needed"` ignores the credit', "answer.py", CUTS, CUTS.replace("(promised and may_be_late)", "promised"),
        "test_calibration.py::test_which_answers_are_cut",
    ),
    Mutation(
        "a request is cut whatever the rule says", "answer.py",
        "cut = cuts(self._terms.cut, self.choice.feasible, guard.may_be_late)", "cut = True",
        "test_cut.py::test_a_request_hands_what_the_credit_says_to_its_model",
    ),
    Mutation(
        "the conformal bound counts no loss for the new request", "guard/conformal.py",
        "(loss.sum(axis=0) + 1) / (len(loss) + 1)", "loss.sum(axis=0) / len(loss)",
        "test_conformal.py::test_the_smallest_factor_that_will_do",
    ),
    Mutation(
        "the margin is the quantile of n scores instead of n + 1", "guard/kernels.py",
        "rank = max((count + 1) * (1 - level) - 1, 0.0)", "rank = max(count * (1 - level) - 1, 0.0)",
        "test_guard_constants.py::test_the_quantile_counts_the_request_to_come_and_grows_beyond_the_scores",
    ),
    Mutation(
        "the margin leaves twice the level above the bound", "guard/kernels.py",
        "rank = max((count + 1) * (1 - level) - 1, 0.0)", "rank = max((count + 1) * (1 - 2 * level) - 1, 0.0)",
        "test_margin.py::test_it_begins_with_the_quantile_of_the_scores",
    ),
    Mutation(
        "training ignores which settings the budget allows", "controller/trainer.py",
        MASK, MASK.replace("controller.feasible(budget, bounds) & measured", "measured"),
        "test_grpo.py::test_rewards_of_settings_beyond_the_budget_change_nothing",
    ),
    Mutation(
        "training ignores which settings were measured", "controller/trainer.py",
        MASK, MASK.replace(" & measured", ""),
        "test_grpo.py::test_only_allowed_and_measured_settings_count",
    ),
    Mutation(
        "training masks with the bounds of all inputs", "controller/trainer.py",
        MASK, MASK.replace("(budget, bounds)", "(budget)"),
        "test_input_bounds.py::test_training_and_evaluation_use_the_same_masks",
    ),
    Mutation(
        "bounds for each input may make more requests late", "guard/input_bounds.py",
        "kept and np.nansum(after.late - before.late) <= 0", "kept",
        "test_input_bounds.py::test_where_it_does_not_the_bounds_are_those_of_all_inputs",
    ),
    Mutation(
        "a body's size is looked at when all of it is there", "serving/gate.py",
        "if size > most:", "if not more and size > most:",
        "test_serving_limits.py::test_a_body_without_a_length_is_refused_once_it_is_too_large",
    ),
    Mutation(
        "a job goes on although nobody waits for it", "serving/served_model.py",
        "return not client.left()", "return True",
        "test_replica_process.py::test_a_job_that_nobody_waits_for_ends_within_one_token",
    ),
    Mutation(
        "a request is lost with its engine", "engines/router.py",
        "if not (again() and in_time", "if True or not (again() and in_time",
        "test_engine_faults.py::test_who_gets_an_error_is_answered_by_another",
    ),
    Mutation(
        "what was learnt counts for any calibration", "serving/learnt_state.py",
        'document.get("began_as") == self._began_as', 'document.get("began_as")',
        "test_learnt_state.py::test_a_new_calibration_starts_anew_and_is_not_written_over",
    ),
    Mutation(
        "a signal to stop waits for nobody", "serving/gate.py",
        "while self.open and time", "while not self.open and time",
        "test_serving_limits.py::test_draining_finishes_what_was_accepted_and_refuses_the_rest",
    ),
]  # fmt: skip


def applied(mutation: Mutation, root: Path = ROOT) -> str:
    """The mutated text of the file.

    Raises:
        ValueError: the text to be replaced does not stand exactly once in the file.
    """
    text = (root / "src" / "budgetvlm" / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.before)) != 1:
        raise ValueError(
            f"mutation {mutation.name!r}: {mutation.before!r} stands {count} times in {mutation.file} and should stand "
            "there once; if the code has changed, change the mutation with it"
        )
    return text.replace(mutation.before, mutation.after)


def is_caught(mutation: Mutation, root: Path = ROOT) -> bool:
    """Run the mutation's test on a mutated copy of the repository; True if the test fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = root / name
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, copy / name)
        (copy / "src" / "budgetvlm" / mutation.file).write_text(applied(mutation, root), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "NUMBA_CACHE_DIR": str(copy / "numba")}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # neither passed nor failed: the test was not found, or not even collected
        raise RuntimeError(f"mutation {mutation.name!r}: {mutation.test} did not run:\n{done.stdout}\n{done.stderr}")
    return done.returncode == 1


def main(arguments: list[str] | None = None) -> int:
    """Apply the mutations and print which are caught; return 1 if one survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="only mutations whose name contains this text")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to mutate (default: this one)")
    options = parser.parse_args(arguments)
    survived = 0
    for mutation in (m for m in MUTATIONS if options.only in m.name):
        caught = is_caught(mutation, options.root)
        survived += not caught
        print(f"{'caught  ' if caught else 'SURVIVED'} {mutation.name:<60} {mutation.test}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
