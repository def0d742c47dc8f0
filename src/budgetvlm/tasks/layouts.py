"""The data sets that are known by name: where they lie, how their columns are called, how they are asked and scored.

A role (what a reader needs) is given as column names: "question|query" takes the first that is there, "a+b" joins the
values of two. `--columns` uses the same words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
BY_OPTIONS = "by options"  # the metric multiple_choice for samples with options, exact_match for the others
CAPTION = "Provide a one-sentence caption for the provided image."

ROLES = ("question", "answers", "image", "options", "context", "sample_id", "image_id", "kind", "list")
REQUIRED = ("question", "answers", "image")

# Names that splits go by; the first one is ours.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "val2014", "dev"),
    "test": ("test", "testing"),
}


def _coco(text: str) -> str:
    """COCO_val2014_000000310196.jpg and 310196 are one image, in whichever data set."""
    digits = re.findall(r"\d+", text)
    return f"coco-{int(digits[-1])}" if digits else text


def _coco_of_okvqa(question_id: str) -> str:
    """A question's id is its image's with one more digit."""
    return f"coco-{question_id[:-1]}"


@dataclass(frozen=True)
class DatasetLayout:
    """How one data set is read.

    Attributes:
        repository: on the hub of Hugging Face; its Parquet files are ``<folder>/<split>-*``.
        splits: ours -> the data set's. Splits without public answers are left out.
        columns: role -> names. "list" is a column of questions about one image, each with names of its own.
        metric: one of `metrics.METRICS`, "cider", or `BY_OPTIONS`.
        prompt: with {question} and {options}; `context` goes before the question.
        image_name: from the value of the image_id column to an id that all data sets share; None: the data set's own.
        index_answers: the answer is the number of an option.
        kinds: names for values of the kind column.
        one_image: rows that mention a second image are left out.
    """

    repository: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str = "exact_match"
    prompt: str = SHORT
    max_new_tokens: int = 16
    folder: str = "data"
    image_name: Callable[[str], str] | None = None
    index_answers: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    one_image: bool = False


def _columns(**others: str) -> dict[str, str]:
    """Return the columns of a data set that names them as we do, but for those that are given."""
    return {"question": "question", "answers": "answers", "image": "image", **others}


_PLAIN = {
    "question": "question|query",
    "answers": "answers|answer|label",
    "image": "image|file_name|image_path",
    "sample_id": "question_id|sample_id|id|index",
    "image_id": "image_id",
    "options": "options|choices",
    "context": "hint|context",
    "kind": "kind|category|question_type",
}
OWN = DatasetLayout(columns=_PLAIN, metric=BY_OPTIONS)  # of a data set that is not in the table

LAYOUTS: dict[str, DatasetLayout] = {
    "text_vqa": DatasetLayout(
        "lmms-lab-encoder/textvqa",
        {"train": "train", "validation": "validation"},
        _columns(sample_id="question_id", image_id="image_id"),
        "vqa",
    ),
    "okvqa": DatasetLayout(
        "lmms-lab-encoder/OK-VQA",
        {"validation": "val2014"},
        _columns(sample_id="question_id", image_id="question_id", kind="question_type"),
        "vqa",
        image_name=_coco_of_okvqa,
    ),
    "coco_2014_vqa": DatasetLayout(
        "lmms-lab-encoder/VQAv2",
        {"validation": "validation"},
        _columns(sample_id="question_id", image_id="image_id", kind="answer_type"),
        "vqa",
        image_name=_coco,
    ),
    "doc_qa": DatasetLayout(
        "lmms-lab-encoder/DocVQA",
        {"validation": "validation"},
        _columns(sample_id="questionId", image_id="ucsf_document_id+ucsf_document_page_no", kind="question_types"),
        "anls",
        max_new_tokens=32,
        folder="DocVQA",
    ),
    "chart_qa": DatasetLayout(
        "HuggingFaceM4/ChartQA",
        {"train": "train", "validation": "val", "test": "test"},
        _columns(question="query|question", answers="label|answer", kind="human_or_machine|type"),
        "relaxed",
        "{question}\nAnswer the question with a single word.",
        kinds={"0": "human", "1": "machine", "human_test": "human", "augmented_test": "machine"},
    ),
    "ai2d": DatasetLayout(
        "lmms-lab-encoder/ai2d",
        {"test": "test"},
        _columns(answers="answer", options="options"),
        "multiple_choice",
        LETTER,
        index_answers=True,
    ),
    "science_qa_img": DatasetLayout(
        "lmms-lab/ScienceQA-IMG",
        {"train": "train", "validation": "validation", "test": "test"},
        _columns(answers="answer", options="choices", context="hint", kind="subject"),
        "multiple_choice",
        LETTER,
        index_answers=True,
    ),
    "mmmu": DatasetLayout(
        "lmms-lab-encoder/MMMU",
        {"train": "dev", "validation": "validation"},
        _columns(answers="answer", image="image_1", options="options", sample_id="id", kind="question_type"),
        "multiple_choice",
        LETTER,
        max_new_tokens=32,
        one_image=True,
    ),
    "tally_qa": DatasetLayout(
        "vikhyatk/tallyqa-test",
        {"test": "test"},
        _columns(list="qa", answers="answer", kind="is_simple"),
        "exact_match",
        "{question}\nAnswer the question using a single number.",
        max_new_tokens=8,
        kinds={"true": "simple", "false": "complex"},
    ),
    "st_qa": DatasetLayout(
        "vikhyatk/st-vqa",
        {"train": "train"},
        _columns(list="qas|qa"),
        "anls",
        max_new_tokens=32,
    ),
    "pope": DatasetLayout(
        "lmms-lab-encoder/POPE",
        {"test": "test"},
        _columns(answers="answer", sample_id="category+question_id", image_id="image_source", kind="category"),
        "yes_no",
        image_name=_coco,
    ),
    "coco_caption": DatasetLayout(
        "lmms-lab-encoder/COCO-Caption",
        {"validation": "val"},
        _columns(answers="answer|answers", sample_id="question_id", image_id="file_name|question_id"),
        "cider",
        CAPTION,
        max_new_tokens=64,
        image_name=_coco,
    ),
}
