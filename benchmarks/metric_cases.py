"""Make the cases that tests/test_metrics.py compares our metrics on: random answers, scored by other implementations.

    python benchmarks/metric_cases.py --lmms_eval SITE --mmmu eval_utils.py --pope evaluate.py --java java

Independent implementations, none of which the project needs: lmms-eval (VQA, ANLS, relaxed accuracy, exact match;
SITE is where it is installed), MMMU's own mmmu/utils/eval_utils.py, POPE's own evaluate.py, and pycocoevalcap (CIDEr
and, with Java, its tokeniser). The cases follow from a seed; a case is [prediction, answers, options, score].
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = """red blue two three ten none zero the a an man woman dog cats isn't dont youre 12 1,234 3.5 45% -7 .5 $5
    new-york t-shirt stop sign coca cola o'clock its dog's 7:30 10.000 a.m. (left) right/left "no" yes no not maybe
    Mr. Smith's café naïve 1e3 U.S. couldn't've somebody'd yall'll Paris, London? what's  nothing""".split()
MARKS = ["", "", "", ".", ",", "?", "!", " .", ";", "'", "\n", "  ", "_", "-"]
CAPTION = """a man in red shirt rides the horse on beach two dogs play with ball near old wooden table dog's isn't
    white-and-black cat sits, street. sign "stop" large group of people standing (outside) at 3:30 p.m. & eating pizza
    it's t-shirt woman's hat 1,000 birds fly/over don't water $5 50% #1 [sign] they're can't cannot 'stop' Mr. U.S.
    two-way 3.5 c'mon o'clock rock&roll skateboarder... blue-ish! "no" it: -- A.M. 1/2 children's dogs'
    gonna wanna gotta""".split()
SPLIT_BY_TOKENISERS = {"cannot", "gonna", "wanna", "gotta"}
PER_METRIC = 400


def main() -> None:
    """Write tests/data/metric_cases.json."""
    args = _arguments()
    rng = random.Random(20)
    cases: dict[str, Any] = {
        "vqa": _vqa(rng, _module(args.lmms_eval / "lmms_eval/tasks/_task_utils/vqa_eval_metric.py")),
        "anls": _anls(rng, _function(args.lmms_eval / "lmms_eval/api/metrics.py", ("levenshtein_distance", "anls"))),
        "relaxed": _relaxed(rng, _module(args.lmms_eval / "lmms_eval/tasks/chartqa/utils.py")),
        "exact_match": _exact(
            rng, _function(args.lmms_eval / "lmms_eval/api/metrics.py", ("exact_match_hf_evaluate",))
        ),
        "multiple_choice": _choices(rng, _module(args.mmmu)),
        "open": _open(rng, _module(args.mmmu)),
        "yes_no": _yes_no(rng, args.pope.read_text()),
        "cider": _cider(rng),
        "tokens": _tokens(rng, args.java),
    }
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in some) + "\n]"
        for name, some in cases.items()
    ]
    path = Path(__file__).resolve().parents[1] / "tests/data/metric_cases.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print({name: len(some) for name, some in cases.items()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("lmms_eval", "mmmu", "pope", "java"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(path: Path, names: tuple[str, ...]) -> Callable[..., Any]:
    """The last of some functions of a file whose other parts need packages that are not there."""
    import ast
    import string

    import numpy as np

    tree = ast.parse(path.read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in wanted:
        node.decorator_list = []
    space: dict[str, Any] = {"np": np, "string": string}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), space)
    return space[names[-1]]


def _text(rng: random.Random, longest: int = 4) -> str:
    words = [rng.choice(WORDS) + rng.choice(MARKS) for _ in range(rng.randint(0 if longest > 3 else 1, longest))]
    text = " ".join(words)
    return text.capitalize() if rng.random() < 0.3 else text


def _near(rng: random.Random, text: str) -> str:
    """A text that is often right: with another case, mark, article or letter."""
    changes: list[Callable[[str], str]] = [
        str,
        str.upper,
        lambda t: f"the {t}",
        lambda t: t + rng.choice(MARKS),
        lambda t: t[: len(t) // 2] + rng.choice("abc ") + t[len(t) // 2 :],
        lambda t: t[:-1],
    ]
    return rng.choice(changes)(text)


def _vqa(rng: random.Random, module: Any) -> list[Any]:
    normalise = module.EvalAIAnswerProcessor()
    cases = []
    for _ in range(PER_METRIC):
        pool = [_text(rng, 3) for _ in range(rng.randint(1, 4))]
        answers = [_near(rng, rng.choice(pool)) for _ in range(10)]
        given = _near(rng, rng.choice([*answers, _text(rng)]))
        plain, said = [normalise(a) for a in answers], normalise(given)
        scores = [min(1, sum(plain[j] == said for j in range(10) if j != i) / 3) for i in range(10)]
        cases.append([given, answers, [], round(sum(scores) / 10, 9)])
    return cases


def _anls(rng: random.Random, score: Callable[..., Any]) -> list[Any]:
    cases = []
    for _ in range(PER_METRIC):
        answers = [_text(rng, 3) for _ in range(rng.randint(1, 3))]
        given = _near(rng, _near(rng, rng.choice([*answers, _text(rng, 3)])))
        cases.append([given, answers, [], round(float(score(answers, [given])["anls"]), 9)])
    return cases


def _relaxed(rng: random.Random, module: Any) -> list[Any]:
    cases = []
    for _ in range(PER_METRIC):
        value = rng.choice([rng.uniform(-50, 50), rng.randint(-5, 2000), 0, rng.uniform(0, 1)])
        wanted = rng.choice([f"{value:.2f}", f"{value:g}", f"{value:.1f}%", _text(rng, 2).strip() or "yes"])
        factor = rng.choice([1, 1, 1.04, 0.96, 1.06, 100, 0.01])
        given = rng.choice(
            [f"{value * factor:.3f}", f"{value * factor:g}%", wanted, wanted.upper(), _text(rng).strip()]
        )
        cases.append([given, [wanted], [], float(module.relaxed_correctness(given, wanted))])
    return cases


def _exact(rng: random.Random, score: Callable[..., Any]) -> list[Any]:
    cases = []
    for _ in range(PER_METRIC):
        wanted = _text(rng, 2).strip()
        given = _near(rng, wanted).strip()
        found = score([given.strip()], [wanted], ignore_case=True, ignore_punctuation=True)["exact_match"]
        plain = [text for text in (given, wanted) if text != text.strip("\"'.,;:!?()-_ \n")]
        if not plain or found:  # where a mark stands beside a blank at an end, the other code keeps the blank
            cases.append([given, [wanted], [], float(found)])
    return cases


def _choices(rng: random.Random, module: Any) -> list[Any]:
    """Cases that the other code decides; it draws at random where it finds no option."""
    shapes = ["{L}", "({L})", "The answer is {L}", "{L} because it is {T}", "I think that it must be the {T} there",
              "({L}) rather than ({M})", "{L} or {M}", "{L}.", " {L} ", "'{L}'",
              "{M} is wrong, so {L} it is"]  # fmt: skip
    cases: list[Any] = []
    while len(cases) < PER_METRIC:
        options = list(dict.fromkeys(_text(rng, 2).strip() or "nothing" for _ in range(rng.randint(2, 6))))
        names = [chr(65 + i) for i in range(len(options))]
        shape = rng.choice(shapes)
        text = shape.format(L=rng.choice(names), M=rng.choice(names), T=rng.choice(options))
        found = {
            module.parse_multi_choice_response(text, names, dict(zip(names, options, strict=True))) for _ in range(12)
        }
        if len(found) == 1:
            answer = rng.choice([*found, rng.choice(names)])
            cases.append([text, [answer], options, float(found == {answer})])
    return cases


def _open(rng: random.Random, module: Any) -> list[Any]:
    shapes = ["{}", "The answer is {}", "x = {}", "It could be {}\nso it is {}", "so {} = 5.\nTherefore {}", "{} of {}"]
    cases = []
    for _ in range(PER_METRIC):
        answers = [_text(rng, 2).strip() or "x" for _ in range(rng.randint(1, 2))]
        parts = [rng.choice([*answers, _text(rng, 2)]) for _ in range(2)]
        given = rng.choice(shapes).format(*parts)
        right = module.eval_open(answers, module.parse_open_response(given))
        cases.append([given, answers, [], float(right)])
    return cases


def _yes_no(rng: random.Random, source: str) -> list[Any]:
    starts = ["Yes", "No", "yes", "no", "There is", "There is not", "Not", "no,", "Yes, there is a dog. No cat", "NO"]
    given = [f"{rng.choice(starts)} {_text(rng)}".replace("\n", " ") for _ in range(PER_METRIC)]
    with tempfile.TemporaryDirectory() as folder:
        ours, labels = Path(folder) / "answers", Path(folder) / "labels"
        ours.write_text("".join(json.dumps({"answer": text}) + "\n" for text in given))
        labels.write_text("".join(json.dumps({"label": name}) + "\n" for name in ("yes", "no") for _ in given[::2]))
        source = source.replace("ans_file = ''", f"ans_file = {str(ours)!r}")
        space: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(source.replace("label_file = ''", f"label_file = {str(labels)!r}"), space)
    said = [entry["answer"] for entry in space["answers"]]
    wanted = [rng.choice(["yes", "no"]) for _ in given]
    return [[text, [want], [], float(want == word)] for text, want, word in zip(given, wanted, said, strict=True)]


def _caption(rng: random.Random, plain: bool = False) -> str:
    words = [word for word in CAPTION if not plain or (word.isalpha() and word.islower())]
    chosen = [rng.choice(words) for _ in range(rng.randint(3, 12))]
    return " ".join(word for word in chosen if not plain or word not in SPLIT_BY_TOKENISERS)


def _cider(rng: random.Random) -> list[Any]:
    """The corpus is all references of these cases; captions of plain words, which every tokeniser splits alike."""
    from pycocoevalcap.cider.cider import Cider

    references = [[_caption(rng, plain=True) for _ in range(rng.randint(1, 5))] for _ in range(PER_METRIC)]
    given = []
    for some in references:
        words = rng.choice(some).split()
        rng.shuffle(words) if rng.random() < 0.3 else None
        given.append(
            " ".join(words[: rng.randint(1, len(words))] + _caption(rng, plain=True).split()[: rng.randint(0, 6)])
        )
    numbered = dict(enumerate(references))
    _, scores = Cider().compute_score(numbered, {i: [text] for i, text in enumerate(given)})
    return [[g, r, [], round(float(s) / 10, 9)] for g, r, s in zip(given, references, scores, strict=True)]


def _tokens(rng: random.Random, java: Path) -> list[Any]:
    """[caption, its words as the Penn Treebank tokeniser of pycocoevalcap has them]."""
    import os

    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    os.environ["PATH"] = f"{java.parent}:{os.environ['PATH']}"
    captions = [_caption(rng) for _ in range(PER_METRIC)]
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    return [[text, found[i][0].split()] for i, text in enumerate(captions)]


if __name__ == "__main__":
    main()
