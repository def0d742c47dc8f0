"""Small files with the columns that the known data sets have on the hub: images as {bytes, path}, a few rows each."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    """A tiny image whose red is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int) -> dict[str, Any]:
    """An image as the hub's Parquet files hold it."""
    return {"bytes": png(number), "path": f"{number}.png"}


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    """Write rows; columns called image... become images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        columns[name] = pa.array(values, IMAGE if name.startswith("image") and isinstance(values[0], dict) else None)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def _vqav2_answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": t, "answer_confidence": "yes", "answer_id": i + 1} for i, t in enumerate(texts)]


ROWS: dict[str, list[dict[str, Any]]] = {
    "text_vqa": [
        {"image_id": f"ab{n}", "question_id": 34600 + n, "question": f"what brand {n}?", "question_tokens": ["what"],
         "image": picture(n), "image_width": 6, "image_height": 5, "flickr_original_url": "", "flickr_300k_url": "",
         "answers": ["nokia"] * 9 + ["toshiba"], "image_classes": ["Phone"], "set_name": "val", "ocr_tokens": []}
        for n in range(3)
    ],
    "okvqa": [
        {"question_id": f"{297147 + n}5", "image": picture(n), "question": "What sport is this?",
         "answers": ["race"] * 8 + ["motocross"] * 2, "question_type": "four", "answer_type": "other"}
        for n in range(3)
    ],
    "coco_2014_vqa": [
        {"question_type": "what", "multiple_choice_answer": "net",
         "answers": _vqav2_answers(*["net"] * 7, "netting", "mesh", "net"), "image_id": 297147 + n // 2,
         "answer_type": "other", "question_id": 297147000 + n, "question": "What is this?", "image": picture(n // 2)}
        for n in range(4)
    ],
    "doc_qa": [
        {"questionId": str(49153 + n), "question": "What is the date?", "question_types": ["handwritten", "form"],
         "image": picture(n), "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": str(81 + n),
         "answers": ["8/12/93", "Aug 12"], "data_split": "val"}
        for n in range(3)
    ],
    "chart_qa": [
        {"image": picture(n // 2), "query": "How many?", "label": ["14"], "human_or_machine": n % 2} for n in range(4)
    ],
    "ai2d": [
        {"question": "which is a cub?", "options": ["2", "1", "0", "cub"], "answer": "2", "image": picture(n // 2)}
        for n in range(4)
    ],
    "science_qa_img": [
        {"image": picture(n), "question": "Which state?", "choices": ["Ohio", "Iowa"], "answer": 1,
         "hint": "Look at the map." if n else "", "task": "closed choice", "grade": "grade2",
         "subject": "social science", "topic": "geography", "category": "Geography", "skill": "s", "lecture": "",
         "solution": ""}
        for n in range(3)
    ],
    "mmmu": [
        {"id": "validation_Art_1", "question": "<image 1> Which style?", "options": "['Cubism', \"Ed's\"]",
         "explanation": "", "image_1": picture(0), "image_2": None, "img_type": "['Paintings']", "answer": "B",
         "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "Art"},
        {"id": "validation_Art_2", "question": "<image 1> or <image 2>?", "options": "['a', 'b']", "explanation": "",
         "image_1": picture(1), "image_2": picture(2), "img_type": "[]", "answer": "A", "topic_difficulty": "Easy",
         "question_type": "multiple-choice", "subfield": "Art"},
        {"id": "validation_Math_1", "question": "Find x in <image 1>.", "options": "[]", "explanation": "",
         "image_1": picture(3), "image_2": None, "img_type": "[]", "answer": "['8', '8.0']",
         "topic_difficulty": "Hard", "question_type": "open", "subfield": "Math"},
    ],
    "tally_qa": [
        {"image": picture(n),
         "qa": [{"question": f"How many cats {k}?", "answer": str(k), "is_simple": k == 0} for k in range(n)]}
        for n in range(4)
    ],
    "st_qa": [
        {"image": picture(n), "qas": [{"question": f"What street {k}?", "answers": ["Main St", "Main"]}
                                      for k in range(2)]}
        for n in range(2)
    ],
    "pope": [
        {"id": str(n), "question_id": str(n % 2 + 1), "question": "Is there a snowboard in the image?",
         "answer": "yes", "image_source": "COCO_val2014_000000297147", "image": picture(0),
         "category": ["adversarial", "popular"][n // 2]}
        for n in range(4)
    ],
    "coco_caption": [
        {"question_id": f"COCO_val2014_{297147 + n:012d}.jpg", "image": picture(n),
         "question": "Please carefully observe the image and come up with a caption.",
         "answer": [f"a red bus number {n}", "a bus on a street"], "id": n, "license": 1,
         "file_name": f"COCO_val2014_{297147 + n:012d}.jpg", "coco_url": "", "height": 5, "width": 6,
         "date_captured": ""}
        for n in range(3)
    ],
}  # fmt: skip
